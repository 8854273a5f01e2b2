"""`cbnb ablate`, `status`, `train` and `fetch` as a user calls them; the notebooks 11… hold the examples,
tests/test_slurm.py the real SLURM."""

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import ROOT, copy_tree, environment
from train_common import little_data, load

WAIT = "\n    ".join(
    [
        "begun = run.path / 'begun'",
        "begun.touch()",
        "while not stop_requested(run): time.sleep(0.05)",
        "raise RunInterrupted('stopped')",
    ]
)


def cbnb(*arguments, runs, cwd=ROOT, timeout=600, **more):
    "`cbnb ARGUMENTS` to its end."
    return subprocess.run(
        [sys.executable, "-m", "cbnb.cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(runs, **more),
        timeout=timeout,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def toy(folder, body="pass", grid="{x: [1, 2]}"):
    "A spec with a notebook that needs no model, whose run carries out `body`."
    sources = [
        "x: float = 1.0\ntext: str = ''\nrun_dir: str = ''",
        "import os, time, signal\nfrom cbnb.run.directory import open_run\nfrom cbnb.run.parameters import "
        "strict_parameters\n"
        "from cbnb.run.stages import RunInterrupted, set_status, stage, stop_requested\nrun = "
        "open_run(strict_parameters(globals()), name='toy', run_dir=run_dir or None)\n"
        f"with stage(run, 'work'):\n    {body}\nset_status(run, 'done')",
    ]
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {"tags": ["parameters"] if i == 0 else []},
            "source": s,
            "outputs": [],
            "execution_count": None,
        }
        for i, s in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (folder / "toy.ipynb").write_text(
        json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    (folder / "toy.yaml").write_text(f"notebook: {folder / 'toy.ipynb'}\ngrid: {grid}\n")
    return folder / "toy.yaml"


def states(sweep):
    return sorted(load(path)["state"] for path in sweep.glob("*/status.json"))


def until(condition, seconds=60):
    "Waits for `condition()`."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_of_trainings(tmp_path):
    """Two trainings side by side; the same line again is idle; an edited loss runs again; what is in the
    folders."""
    runs, spec = tmp_path / "runs", tmp_path / "two.yaml"
    few = little_data(tmp_path) | {"total_steps": 2, "warmup_steps": 1, "batch_size": 2}
    spec.write_text(f"parameters: {json.dumps(few)}\ngrid: {{beta_kl: [0, 3e-1]}}\n")
    done = cbnb("ablate", spec, "--local", 2, runs=runs)
    assert done.returncode == 0 and "2 done" in done.stdout, done.stdout
    sweep = load(runs / "two" / "sweep.json")
    assert [run["parameters"]["beta_kl"] for run in sweep["runs"]] == [0.0, 0.3]
    for run in sweep["runs"]:
        folder = runs / "two" / run["dir"]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and load(folder / "key.json")["key"] == run["key"]
        assert load(folder / "result.json")["after"] and (folder / "out.1.ipynb").exists()
        assert not set(load(folder / "code.json")) & {"env", "environ", "environment"} and os.environ[
            "HOME"
        ] not in (folder / "code.json").read_text().replace(str(ROOT), "")
    again = cbnb("ablate", spec, "--local", 2, runs=runs)
    assert (
        again.returncode == 0 and "0 to start" in again.stdout and not list(runs.glob("*/*/out.2.ipynb"))
    ), again.stdout
    said = [json.loads(line) for line in cbnb("status", "--json", runs=runs).stdout.splitlines()]
    assert [row["state"] for row in said] == ["done", "done"]
    copy = copy_tree(tmp_path / "copy")
    losses = copy / "cbnb" / "step" / "losses.py"
    losses.write_text(losses.read_text() + "\n# edited\n")
    edited = cbnb("ablate", spec, "--dry-run", "--local", 1, runs=runs, cwd=copy, PYTHONPATH=copy)
    assert "2 new), 2 to start" in edited.stdout, edited.stdout


@pytest.mark.parametrize(
    "text, words",
    [
        ("parameters: {beta_k: 0.3}", ("'beta_k'", "did you mean 'beta_kl'")),
        ("grid: {beta_kl: [0, high]}", ("run 2 of 2", "wants float")),
        ("grid: {warmup_steps: [1, -1]}", ("warmup_steps", "at least 0")),
        ("notebook: nbs/none.ipynb", ("nbs/none.ipynb",)),
        ("grid: {beta_kl: 0.3}", ("lists of values",)),
    ],
)
def test_a_wrong_spec_starts_nothing(text, words, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    done = cbnb("ablate", tmp_path / "s.yaml", "--local", 1, runs=tmp_path / "runs")
    assert (
        done.returncode == 2
        and all(word in done.stdout for word in words)
        and len(done.stdout.splitlines()) == 1
    ), done.stdout
    assert not (tmp_path / "runs").exists()


def test_parameters_never_meet_a_shell(tmp_path):
    text = f"$(touch {tmp_path}/x); `touch {tmp_path}/x` && touch {tmp_path}/x '"
    spec = toy(tmp_path, f"assert text == {text!r}", json.dumps({"text": [text]}))
    done = cbnb("ablate", spec, "--local", 1, runs=tmp_path / "runs")
    assert done.returncode == 0 and not (tmp_path / "x").exists(), done.stdout


@pytest.mark.slow
def test_interrupt_leaves_what_the_next_call_goes_on_from(tmp_path):
    spec, sweep = toy(tmp_path, WAIT), tmp_path / "runs" / "toy"
    for signals, wanted in ((1, ["interrupted", "queued"]), (2, ["interrupted", "queued"])):
        for path in sweep.glob("*/begun"):
            path.unlink()
        process = subprocess.Popen(
            [sys.executable, "-m", "cbnb.cli", "ablate", spec, "--local", "1"],
            cwd=ROOT,
            env=environment(tmp_path / "runs"),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until(lambda: list(sweep.glob("*/begun")))
        assert "waits for a worker" in cbnb("status", sweep, runs=tmp_path / "runs").stdout
        for _ in range(signals):
            os.kill(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130 and states(sweep) == wanted, said
    toy(tmp_path)  # another notebook: another key
    assert (
        "2 new), 2 to start" in cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path / "runs").stdout
    )
    toy(tmp_path, WAIT)
    assert (
        "1 interrupted, 1 queued), 2 to start"
        in cbnb("ablate", spec, "--dry-run", "--local", 1, runs=tmp_path / "runs").stdout
    )


@pytest.mark.slow
def test_a_killed_kernel_has_failed(tmp_path):
    "papermill may take it for a success."
    spec = toy(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "{x: [1]}")
    done = cbnb("ablate", spec, "--local", 1, runs=tmp_path / "runs")
    assert done.returncode == 1 and states(tmp_path / "runs" / "toy") == ["failed"], done.stdout
    listed = cbnb("ablate", spec, "--local", 1, runs=tmp_path / "runs")
    assert (
        listed.returncode == 1
        and "0 to start" in listed.stdout
        and "--retry failed starts it again" in listed.stdout
    )
    assert (
        "retry"
        in cbnb("ablate", spec, "--retry", "failed", "--dry-run", "--local", 1, runs=tmp_path / "runs").stdout
    )


def test_two_calls_at_once_run_nothing_twice(tmp_path):
    spec = toy(tmp_path, "time.sleep(1)")
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "cbnb.cli", "ablate", spec, "--local", "2"],
            cwd=ROOT,
            env=environment(tmp_path / "runs"),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert {process.returncode for process in both} <= {0, 2} and 0 in {
        process.returncode for process in both
    }, said
    assert states(tmp_path / "runs" / "toy") == ["done", "done"]
    assert [load(p)["attempt"] for p in (tmp_path / "runs" / "toy").glob("*/status.json")] == [
        1,
        1,
    ] and not list(tmp_path.glob("runs/toy/*/out.2.ipynb"))


def test_an_allocation_does_not_leak(tmp_path):
    "sbatch gets the user's SBATCH_… wishes, and nothing of the allocation that `cbnb ablate` is called in."
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in {
        "sbatch": f"env > {tmp_path}/env.$$; printf '%s\\n' \"$@\" > {tmp_path}/args.$$; echo 7",
        "squeue": "true",
        "scontrol": "true",
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o700)
    path = f"{commands}{os.pathsep}{environment(tmp_path)['PATH']}"
    done = cbnb(
        "ablate",
        toy(tmp_path),
        runs=tmp_path / "runs",
        PATH=path,
        SLURM_JOB_ID=1,
        SLURM_MEM_PER_NODE=4,
        SLURM_CONF="/etc/slurm.conf",
        SBATCH_PARTITION="gpu",
        SBATCH_CPU_BIND="x",
    )
    assert done.returncode == 0 and "job 7: 2 runs" in done.stdout, done.stdout
    first = min(tmp_path.glob("env.*"), key=lambda p: p.stat().st_mtime_ns).read_text()
    assert set(re.findall(r"^((?:SLURM|SBATCH)\w*)=", first, re.M)) == {"SLURM_CONF", "SBATCH_PARTITION"}
    arguments = [
        p.read_text().splitlines()
        for p in sorted(tmp_path.glob("args.*"), key=lambda p: p.stat().st_mtime_ns)
    ]
    assert (
        "--array=0-1" in arguments[0]
        and "--dependency=afterany:7" in arguments[1]
        and arguments[1][-1] == str(tmp_path / "runs" / "toy")
    )


BANNER = "echo '*** Welcome to cluster 3: 42 GPU hours left ***'"


@pytest.mark.parametrize(
    "sbatch, squeue, job",
    [
        (f"{BANNER}; echo 17; {BANNER}", "true", "17"),
        (f"{BANNER} >&2; echo '17;big'", "true", "17"),
        (f"{BANNER}; echo Submitted batch job 17", "true", "17"),
        # no id at all: by its name
        (BANNER, f"{BANNER}; case $* in *' -n '*) echo 16; echo 17;; esac", "17"),
        (
            "echo 'Socket timed out on send/recv operation' >&2; exit 1",
            "case $* in *' -n '*) echo 17;; esac",
            "17",
        ),
        (BANNER, "true", None),
    ],
)
def test_what_sbatch_took_is_submitted(tmp_path, sbatch, squeue, job):
    """Whatever a site prints around its answer: the array is recorded, and while the queue knows its name it
    is not submitted again."""
    (commands := tmp_path / "bin").mkdir()
    record = (
        "case $* in *array*) for a in $*; do case $a in --job-name=*) echo ${a#*=} >> %s/name;; esac; "
        "done;; esac" % tmp_path
    )
    asked = (
        'case $* in *%%i*) while read n; do for t in 0 1; do echo "17_$t|PENDING|Priority|$n"; done; done < '
        "%s/name;; esac" % tmp_path
    )
    for name, body in {
        "sbatch": f"{record}\n{sbatch}",
        "squeue": f"[ -f {tmp_path}/name ] || exit 0\n{asked}\n{squeue}",
        "scontrol": BANNER,
        "sacct": BANNER,
    }.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o700)
    spec, path = toy(tmp_path), f"{commands}{os.pathsep}{environment(tmp_path)['PATH']}"
    done = cbnb("ablate", spec, runs=tmp_path / "runs", PATH=path)
    told = f"job {job}: 2 runs" if job else r"job cbnb-toy-\w{6}-1-0: 2 runs"
    assert done.returncode == 0 and re.search(told, done.stdout), done.stdout
    assert ("no report will follow" in done.stdout) == (job is None), done.stdout
    assert load(tmp_path / "runs" / "toy" / "jobs" / "0001.json")["arrays"][0]["job"] == job
    again = cbnb("ablate", spec, runs=tmp_path / "runs", PATH=path)
    assert (
        again.returncode == 0
        and "2 queued), 0 to start" in again.stdout
        and len((tmp_path / "name").read_text().split()) == 1
    ), again.stdout


def test_what_sbatch_refuses_is_not(tmp_path):
    (commands := tmp_path / "bin").mkdir()
    for name, body in {
        "sbatch": f"{BANNER}; echo 'sbatch: error: invalid partition' >&2; exit 1",
        "squeue": BANNER,
        "scontrol": "true",
        "sacct": BANNER,
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o700)
    done = cbnb(
        "ablate",
        toy(tmp_path),
        runs=tmp_path / "runs",
        PATH=f"{commands}{os.pathsep}{environment(tmp_path)['PATH']}",
    )
    assert done.returncode == 2 and "sbatch refuses: sbatch: error: invalid partition" in done.stdout
    assert load(tmp_path / "runs" / "toy" / "jobs" / "0001.json")["arrays"] == []


@pytest.mark.slow
def test_a_thousand_runs(tmp_path):
    "Answers come in seconds; the bound is generous, the time is printed."
    spec = toy(tmp_path, grid=f"{{x: {[i / 8 for i in range(1000)]}}}")
    from cbnb.sweep.keys import plan_sweep, prepare_run, write_plan

    before = os.environ.get("CBNB_RUNS")
    os.environ["CBNB_RUNS"] = str(tmp_path / "runs")
    try:
        sweep = plan_sweep(spec)
    finally:
        os.environ.pop("CBNB_RUNS") if before is None else os.environ.update(CBNB_RUNS=before)
    write_plan(sweep)
    for run in sweep.runs:
        prepare_run(sweep, run, {"source": "x"})
    for command, words in (
        (("ablate", spec, "--dry-run", "--local", 2), "1000 queued), 1000 to start"),
        (("status", sweep.path), "1000 queued"),
    ):
        began = time.monotonic()
        done = cbnb(*command, runs=tmp_path / "runs")
        print(f"cbnb {command[0]}: {time.monotonic() - began:.1f} s")
        assert done.returncode == 0 and words in done.stdout and time.monotonic() - began < 20, done.stdout[
            -500:
        ]


@pytest.mark.slow
def test_train_from_the_command_line(tmp_path):
    "The flags are the notebook's parameters; the exit status is papermill's."
    few = [
        word
        for name, value in little_data(tmp_path).items()
        for word in (f"--{name.replace('_', '-')}", value)
    ] + ["--total-steps", 2, "--warmup-steps", 1]
    done = cbnb(
        "train",
        "--preset",
        "tinyagent",
        "--beta-kl",
        "5e-1",
        "--kl-temperature",
        2,
        *few,
        "--run-dir",
        tmp_path / "run",
        runs=tmp_path / "runs",
    )
    assert (
        done.returncode == 0
        and f"run directory: {tmp_path / 'run'}" in done.stdout
        and "held-out KL" in done.stdout
    ), done.stdout[-2000:]
    told = load(tmp_path / "run" / "params.json")
    assert (told["beta_kl"], told["kl_temperature"], told["total_steps"]) == (0.5, 2.0, 2) and load(
        tmp_path / "run" / "status.json"
    )["state"] == "done"
    for arguments, words in (
        (("--beta-k", 1), "did you mean '--beta-kl'"),
        (("--beta-kl", "high"), "wants float"),
        (("--beta-kl", -1), "at least 0"),
        (("--run-dir", tmp_path / "run"), "is finished"),
    ):
        refused = cbnb("train", *arguments, runs=tmp_path / "runs")
        assert refused.returncode == 2 and words in refused.stdout and not (tmp_path / "runs").exists(), (
            refused.stdout
        )


@pytest.fixture
def hub(tmp_path):
    """A model hub on loopback with one model, the shipped tiny agent, and a pickled file; gives its address
    and the paths that were asked for."""
    from cbnb.basics.places import TINYAGENT

    files, commit, asked = (
        {p.name: p.read_bytes() for p in TINYAGENT.iterdir() if p.is_file()}
        | {"pytorch_model.bin": b"pickle"},
        "c" * 40,
        [],
    )

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked.append(path)
            if "/org/gated" in path:
                return self.answer(b"{}", 403, X_Error_Code="GatedRepo")
            if "/org/tiny" not in path:
                return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            if path.startswith("/api/models/org/tiny/tree/"):
                return self.answer(
                    json.dumps(
                        [
                            {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                            for n, b in files.items()
                        ]
                    ).encode(),
                    Content_Type="application/json",
                )
            if path.startswith("/api/"):
                return self.answer(
                    json.dumps(
                        {"id": "org/tiny", "sha": commit, "siblings": [{"rfilename": n} for n in files]}
                    ).encode(),
                    Content_Type="application/json",
                )
            body = files.get(path.rpartition("/")[2])
            if body is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            self.answer(
                body,
                ETag=f'"{hashlib.sha1(body).hexdigest()}"',
                X_Repo_Commit=commit,
                Content_Type="application/octet-stream",
            )

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_fetch_fills_a_cache_that_needs_no_network(hub, tmp_path):
    address, asked = hub
    at = {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": 0,
        "HF_HOME": tmp_path / "home",
        "HF_HUB_DISABLE_XET": 1,
        "runs": tmp_path / "runs",
    }
    done = cbnb("fetch", "org/tiny", "--cache", tmp_path / "cache", **at)
    assert done.returncode == 0, done.stdout
    path = Path(done.stdout.splitlines()[-1])
    assert (
        (path / "model.safetensors").exists()
        and (path / "tokenizer.json").exists()
        and not (path / "pytorch_model.bin").exists()
    )
    assert (
        not any("pytorch_model.bin" in a for a in asked)
        and f"HF_HUB_CACHE={tmp_path / 'cache'}" in done.stdout
    )
    code = (
        "from cbnb.step.models import load_model, load_tokenizer; load_model('org/tiny'); "
        "print(len(load_tokenizer('org/tiny')))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(tmp_path / "runs", HF_HUB_CACHE=tmp_path / "cache", HF_HUB_OFFLINE=1),
    )
    assert loaded.returncode == 0 and loaded.stdout.split()[-1].isdecimal(), loaded.stdout
    for model, words in (
        ("org/gated", "accept its terms"),
        ("org/none", "not on the hub"),
        ("a b", "cannot be fetched"),
        ("tinyagent", "on this machine already"),
    ):
        refused = cbnb("fetch", model, "--cache", tmp_path / "cache", **at)
        assert refused.returncode == 2 and words in refused.stdout and "Traceback" not in refused.stdout, (
            refused.stdout
        )
