"""The batch scripts on a real SLURM, brought up by tests/slurm/slurm-up: arrays, failures, preemption, time
limit, requeue and exact resume."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from forked import cells
from helpers import BIN, ROOT
from test_ablation import cbnb, toy
from train_common import few, little_data, load, metrics

SCRIPTS = sorted((ROOT / "slurm").rglob("*.sbatch"))
UP, DOWN = ROOT / "tests" / "slurm" / "slurm-up", ROOT / "tests" / "slurm" / "slurm-down"


def free_ports(number=16):
    "The first of `number` ports in a row that nobody listens on."
    for first in range(16817, 60000, 50):
        try:
            for port in range(first, first + number):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


class Slurm:
    "A cluster: `env` for its commands, `say` carries one out."

    def __init__(self, folder, runs):
        self.folder, self.runs = folder, runs
        self.env = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "CBNB_RUNS": str(runs),
            "MODEL": "tinyagent",
            "SKIP_PREFLIGHT": "1",
        }  # it is tests/test_preflight.py's

    def say(self, *command, check=True, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        clean |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | self.env | env
        done = subprocess.run(
            [str(c) for c in command],
            cwd=ROOT,
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 or not check, done.stderr + done.stdout
        return done.stdout + ("" if check else done.stderr)

    def submit(self, *arguments, **env):
        "Submits; returns the job's id. Its output goes to `<id>.out`."
        return self.say("sbatch", "--parsable", f"--output={self.runs}/%j.out", *arguments, **env).strip()

    def job(self, job):
        "What SLURM knows of a job, as a dict."
        return dict(re.findall(r"(\w+)=(\S*)", self.say("scontrol", "show", "job", "-o", job)))

    def ended(self, *jobs, seconds=400):
        "Waits until the jobs (arrays: all their tasks) have left the queue; returns their last records."
        self.until(
            lambda: (
                not self.say("squeue", "-h", "-t", "PD,R,CG,CF,S,RQ,RH", "-j", ",".join(jobs), check=False)
                .strip()
                .replace("slurm_load_jobs", "")
            ),
            seconds,
        )
        return [self.job(job) for job in jobs]

    def until(self, condition, seconds=200, every=0.3):
        end = time.monotonic() + seconds
        while not (said := condition()):
            assert time.monotonic() < end, self.say("squeue") + "".join(
                f"\n{p}\n{p.read_text()[-3000:]}" for p in self.runs.rglob("*.out")
            )
            time.sleep(every)
        return said


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    missing = [
        p
        for p in ("slurmctld", "slurmd", "sbatch", "munged")
        if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} missing: apt-get install --no-install-recommends slurmctld slurmd "
            "slurm-client munge"
        )
    folder = Path(tempfile.mkdtemp(prefix="cbnb-slurm-", dir="/tmp"))  # a socket's path must be short
    env = os.environ | {"CBNB_SLURM_DIR": str(folder), "CBNB_SLURM_PORT": str(free_ports())}
    up = subprocess.run([UP], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)
    try:
        logs = "".join(p.read_text()[-1500:] for p in (folder / "log").glob("*")) if up.returncode else ""
        assert up.returncode == 0, up.stderr + logs
        yield Slurm(folder, tmp_path_factory.mktemp("slurm"))
    finally:
        subprocess.run([DOWN], env=env, capture_output=True, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


LIMITED = "\n    ".join(
    [
        "begun = run.path / 'begun'",
        "while not begun.exists() and not stop_requested(run): time.sleep(0.1)",
        "if not begun.exists():",
        "    begun.touch()",
        "    raise RunInterrupted('stopped')",
    ]
)


@pytest.fixture(scope="module")
def early(slurm, tmp_path_factory):
    """Jobs that take a while, submitted first: one of the five published runs, and one that nothing but its
    time limit ends."""
    folder = tmp_path_factory.mktemp("early")
    short = few(folder, total_steps=3)
    published = slurm.submit("slurm/tests/train_kl.sbatch", *short, SWEEP=str(slurm.runs / "train_kl"))
    said = cbnb(
        "ablate",
        toy(folder, LIMITED, "{x: [1]}"),
        "--slurm",
        **{"runs": slurm.runs / "limited"} | slurm_env(slurm),
        SBATCH_TIMELIMIT="1",
        SBATCH_SIGNAL="B:USR2@40",
    )
    assert said.returncode == 0, said.stdout
    return {"published": published, "limited": re.search(r"job (\d+): 1 runs", said.stdout)[1]}


def slurm_env(slurm):
    return {k: v for k, v in slurm.env.items() if k != "CBNB_RUNS"}


@pytest.fixture(scope="module")
def sweep(slurm, early, tmp_path_factory):
    """Five runs by `cbnb ablate`, one of which has its kernel killed: `(spec, folder, output of cbnb ablate,
    states that cbnb status told meanwhile)`."""
    folder = tmp_path_factory.mktemp("spec")
    little = little_data(folder) | {"warmup_steps": 1, "batch_size": 2, "total_steps": 4, "save_steps": 0}
    spec = folder / "five.yaml"
    spec.write_text(
        json.dumps(
            {
                "parameters": little,
                "runs": [{"beta_kl": 0.3, "total_steps": 40}, *({"beta_kl": b} for b in (1, 0, 0.1, 0.5))],
            }
        )
    )
    said = cbnb("ablate", spec, "--slurm", runs=slurm.runs, **slurm_env(slurm))
    assert said.returncode == 0, said.stdout
    path, seen, killed = slurm.runs / "five", set(), []
    victim = next(
        path / run["dir"] for run in load(path / "sweep.json")["runs"] if run["parameters"]["beta_kl"] == 1
    )

    def looked():
        rows = [
            json.loads(line)
            for line in cbnb(
                "status", "--json", path, runs=slurm.runs, **slurm_env(slurm)
            ).stdout.splitlines()
        ]
        seen.update(row["state"] for row in rows)
        status = load(victim / "status.json")
        if status["state"] == "running" and status.get("stage") and not killed:
            killed.append(status["pid"])
            os.kill(status["pid"], signal.SIGKILL)
        return len(rows) == 5 and all(row["state"] in ("done", "failed", "lost") for row in rows)

    slurm.until(looked, 400, every=4)  # a Python a look, beside the jobs
    return spec, path, said.stdout, seen, victim


def test_scripts_are_accepted(slurm):
    assert len(SCRIPTS) == 8
    for script in SCRIPTS:
        slurm.say("bash", "-n", script)
        assert "to start at" in slurm.say("sbatch", "--test-only", script, check=False), script


@pytest.mark.slow
def test_a_typo_fails_in_seconds(slurm):
    began = time.monotonic()
    (job,) = slurm.ended(slurm.submit("slurm/05_train.sbatch", "-p", "beta_k", 0.3))
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "1:0" and job["Restarts"] == "0", job
    assert (
        "did you mean 'beta_kl'" in (slurm.runs / f"{job['JobId']}.out").read_text()
        and time.monotonic() - began < 60
    )


@pytest.mark.slow
def test_array_of_five(slurm, sweep):
    """Done, but for the one whose kernel was killed: that one failed, whatever papermill's metadata says.
    Each had a GPU of its own."""
    spec, path, said, seen, victim = sweep
    assert "5 runs" in said and {"queued", "running"} <= seen
    ended = {p.parent: load(p) for p in path.glob("*/status.json")}
    assert {p.name: s["state"] for p, s in ended.items()} == {
        p.name: "failed" if p == victim else "done" for p in ended
    } and len(ended) == 5
    assert ended[victim]["error"] and all(s["job"] for s in ended.values())
    logs = [p.read_text() for p in (path / "logs").glob("*_*.out") if "report" not in p.name]
    assert len(logs) == 5 and all(re.search(r"starts on node\d, GPU \d\n", log) for log in logs), logs
    shown = cbnb("status", path, runs=slurm.runs, **slurm_env(slurm)).stdout
    assert "4 done, 1 failed" in shown and ended[victim]["error"] in shown


@pytest.mark.slow
def test_report_follows_although_a_run_failed(slurm, sweep):
    path = sweep[1]
    slurm.ended(load(path / "jobs" / "0001.json")["report"])
    (page,) = (path / "report").glob("*.html")
    assert sweep[4].name in page.read_text() and (path / "report" / "runs.csv").exists()


def test_resubmission_is_idle(slurm, sweep):
    before = slurm.say("squeue", "-h", "-t", "all", "-o", "%i")
    again = cbnb("ablate", sweep[0], "--slurm", runs=slurm.runs, **slurm_env(slurm))
    assert "4 done, 1 failed), 0 to start" in again.stdout and "--retry failed" in again.stdout, again.stdout
    assert slurm.say("squeue", "-h", "-t", "all", "-o", "%i") == before


@pytest.mark.slow
def test_preempted_and_signalled_yet_the_same(slurm, sweep):
    """A training that another partition pushes out, and `scancel --signal` later ends once more, goes on by
    itself and ends like the undisturbed one."""
    undisturbed = next(
        sweep[1] / run["dir"]
        for run in load(sweep[1] / "sweep.json")["runs"]
        if run["parameters"]["beta_kl"] == 0.3
    )
    spec = sweep[0].with_name("pushed.yaml")
    spec.write_text(
        json.dumps(
            {
                "parameters": load(sweep[0].with_name("five.yaml"))["parameters"]
                | {"beta_kl": 0.3, "total_steps": 40}
            }
        )
    )
    said = cbnb("ablate", spec, "--slurm", runs=slurm.runs, **slurm_env(slurm), SBATCH_PARTITION="preempt")
    job = re.search(r"job (\d+): 1 runs", said.stdout)[1]
    (run,) = (slurm.runs / "pushed" / r["dir"] for r in load(slurm.runs / "pushed" / "sweep.json")["runs"])

    def step():
        return (
            metrics(run)[-1]["step"]
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size
            else 0
        )

    slurm.until(lambda: step() >= 3)
    node = slurm.say("squeue", "-h", "-j", job, "-o", "%N").strip()
    slurm.submit("-p", "gpu", "-w", node, "--exclusive", "--mem=0", "--wrap=sleep 1")

    def resumed():
        return load(run / "status.json").get("resumed_step") or 0

    slurm.until(lambda: load(run / "status.json")["attempt"] == 2 and 0 < resumed() < step() - 2)
    slurm.say("scancel", "--signal=USR2", "--batch", f"{job}_0")
    slurm.until(lambda: load(run / "status.json")["state"] == "done", 300)
    status = load(run / "status.json")
    assert status["attempt"] == 3 and status["restarts"] == 2 and 3 < status["resumed_step"] < 40, status
    assert (run / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        undisturbed / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_two_nodes_make_one_run(slurm, tmp_path):
    """A process on each of two nodes, signalled on the way: it goes on, by two again, and ends like a run of
    one process."""
    path, several = (
        slurm.runs / "multi",
        few(
            tmp_path,
            total_steps=30,
            batch_size=2,
            gradient_accumulation_steps=2,
            lora_dropout=0.0,
            preset="tinyagent",
        ),
    )
    multi = slurm.submit(
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--gres=gpu:1",
        "--mem=1000",
        "slurm/05_train_multi.sbatch",
        *several,
        RUN_DIR=str(path),
    )

    def step():
        return (
            metrics(path)[-1]["step"]
            if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").stat().st_size
            else 0
        )

    slurm.until(lambda: step() >= 3, 300)
    slurm.say("scancel", "--signal=USR2", "--batch", multi)
    slurm.until(lambda: load(path / "status.json")["state"] == "done", 400)
    status, log = load(path / "status.json"), (slurm.runs / f"{multi}.out").read_text()
    assert (status["processes"], status["attempt"]) == (2, 2) and 3 <= status["resumed_step"] < 30, (
        status,
        log[-2000:],
    )
    for name in ("out.1.ipynb", "out.1.rank1.ipynb", "out.2.ipynb", "out.2.rank1.ipynb"):
        assert (path / name).is_file(), log[-2000:]
    # what the batch script sets of the published run, and the arguments that win over it
    published = [
        "-p",
        "beta_kl",
        "0.5",
        "-p",
        "kl_temperature",
        "1.0",
        "-p",
        "alpha_max",
        "10.0",
        "-p",
        "alpha_decay_multiplier",
        "2.0",
    ]
    one = cells(*published, *several, runs=slurm.runs / "one")
    assert one.returncode == 0, one.stdout[-2000:]
    (other,) = (p.parent for p in (slurm.runs / "one").glob("*/*/metrics.jsonl"))
    for a, b in zip(metrics(other), metrics(path), strict=True):
        assert all(
            abs(a[key] - b[key]) < 1e-3 * max(abs(a[key]), 0.1)
            for key in ("step", "loss_reroute", "loss_retain", "loss_kl", "c_s", "lr")
        ), (a, b)


def test_time_limit_stops_and_goes_on(slurm, early):
    (run,) = (p.parent for p in (slurm.runs / "limited").glob("toy/*/status.json"))
    slurm.until(lambda: load(run / "status.json")["state"] == "done", 300)
    status, log = load(run / "status.json"), (run.parent / "logs" / f"{early['limited']}_0.out").read_text()
    assert (status["attempt"], status["restarts"]) == (2, 1) and "requeue after restart 0" in log, log


def test_the_five_published_runs(slurm, early):
    "One after the other in one job, then the report, whose verdicts one seed cannot make `supported`."
    (job,) = slurm.ended(early["published"])
    log = (slurm.runs / f"{job['JobId']}.out").read_text()
    assert job["JobState"] == "COMPLETED", log[-3000:]
    told = {
        (p["beta_kl"], p["kl_temperature"], p["seed"])
        for p in (load(f) for f in (slurm.runs / "train_kl").glob("*/params.json"))
    }
    assert told == {(0.0, 1.0, 0), (0.1, 1.0, 0), (0.3, 1.0, 0), (0.5, 1.0, 0), (0.3, 2.0, 0)}
    assert list((slurm.runs / "train_kl" / "report").glob("*.html"))
    assert not re.search(r"^\S.*: supported", log, re.M) and re.search(r"void|inconclusive", log), log[-2000:]
