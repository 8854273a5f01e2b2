"""Several processes make one run: the same numbers as one process, each other's checkpoints, one end for all."""  # noqa: E501

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from accelerate.state import AcceleratorState

from cbnb.basics.jsonfiles import write_json
from cbnb.run.metrics import read_json_lines
from forked import cells as one_process
from forked import ended, execute, imported, started
from helpers import BIN, NBS, ROOT, free_port, run
from train_common import few, load, metrics

SCRIPT = ROOT / "tests" / "scripts" / "train_together.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
# by batch_size and gradient_accumulation_steps; two processes make the first without accumulation, and share
# the rows of the last
SIZES = {"accumulated": (2, 4), "at once": (4, 2), "one micro-batch": (8, 1)}
# the size whose runs are evaluated: held-out questions are shared in the same way whatever it is
EVALUATED = "at once"


def make_runs(jobs):
    "What `python tests/scripts/train_together.py JOBS` does."
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process which was forked
    sys.argv = [str(SCRIPT), json.dumps(jobs)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def ranks(processes):
    "For each of so many processes the variables by which they find each other; none for one alone."
    if processes == 1:
        return [{}]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [group | {"RANK": k, "LOCAL_RANK": k} for k in map(str, range(processes))]


def together(processes, jobs, timeout=600):
    """Runs the jobs of train_together.py one after another by so many forked processes, which find each other
    by the variables that torchrun sets; torchrun itself starts the notebook, see `launch`. Returns their
    output."""
    imported(NBS / "train.ipynb")
    begun = [started(lambda: make_runs(jobs), ROOT, os.environ | own) for own in ranks(processes)]
    outcomes = [ended(*one, timeout) for one in begun]
    for done in outcomes:
        assert done.returncode == 0, done.stdout[-6000:]
    return "".join(done.stdout for done in outcomes)


def job(folder, name, size, fsdp=False, **more):
    batch_size, accumulation = SIZES[size]
    return {
        "run_dir": str(folder / name),
        "fsdp": fsdp,
        "config": {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        | more.pop("config", {}),
    } | more


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of one process, of two and of two with the base in parts, by size; and those
    that were stopped and gone on with by others."""
    folder = tmp_path_factory.mktemp("together")
    stopped = [
        job(folder, f"{way} then {other}", "at once", way == "fsdp", stop_after=1)
        for way, other in (("ddp", "one"), ("fsdp", "ddp"), ("ddp", "fsdp"))
    ]
    at_zero = {"config": {"beta_kl": 0, "target_layers": [1], "lora_layers": [0, 3]}}
    caches = {f"{name}_cache": str(folder / f"{name}-cache") for name in ("teacher", "encoded")}
    # searches: of an objective that has twins too
    twin, pairs, soft = ({"config": {"objective": name}} for name in ("rr_twin", "dpo", "rr_twin_adv"))
    one = [job(folder, f"one {size}", size, evaluated=size == EVALUATED) for size in SIZES] + [
        job(folder, "one with twins", "accumulated", **twin),
        job(folder, "one with pairs", "accumulated", **pairs),
        job(folder, "one with searches", "accumulated", **soft),
        job(folder, "one then fsdp", "at once", stop_after=1),
        job(folder, "one at beta 0", "at once", **at_zero),
    ]
    two = [
        job(folder, f"{way} {size}", size, way == "fsdp", evaluated=size == EVALUATED)
        for way in ("ddp", "fsdp")
        for size in SIZES
    ]
    two += [
        job(folder, "ddp at beta 0", "at once", **at_zero),
        job(folder, "fsdp with twins", "accumulated", True, **twin),
        job(folder, "ddp with pairs", "accumulated", **pairs),
        job(folder, "fsdp with pairs", "accumulated", True, **pairs),
        job(folder, "ddp with searches", "accumulated", **soft),
        job(folder, "ddp cached", "accumulated", **caches, **twin),
    ]
    told = together(1, one) + together(2, two + stopped)
    assert told.count("stopped") == 1 + 3 * 2, "each process of a stopped run says so"
    for name in ("ddp then one", "fsdp then ddp", "ddp then fsdp"):
        assert (
            load(folder / name / "status.json")["resumed_step"] == 0
            and (folder / name / "checkpoints" / "checkpoint-1").is_dir()
        )
    together(1, [job(folder, "ddp then one", "at once")])
    together(
        2,
        [
            job(folder, "fsdp then ddp", "at once"),
            job(folder, "ddp then fsdp", "at once", True),
            job(folder, "one then fsdp", "at once", True),
        ],
    )
    return folder


def differences(a, b):
    """The largest relative difference of two logs' figures, and its key; of a figure near 0, such as the
    cosine of two gradients, the absolute one."""
    rows, others = metrics(a), metrics(b)
    assert [row.keys() for row in rows] == [row.keys() for row in others] and [
        row["step"] for row in rows
    ] == [1, 2, 3]
    return max(
        (abs(x[key] - y[key]) / max(abs(x[key]), 5e-2 if "_cos_" in key else 1e-2), key)
        for x, y in zip(rows, others)
        for key in x
        if x[key] is not None
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_make_the_run_of_one(runs, way, size):
    worst, key = differences(runs / f"one {size}", runs / f"{way} {size}")
    assert worst < 1e-5, key
    assert load(runs / f"{way} {size}" / "status.json")["processes"] == 2


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_answer_as_one(runs, way):
    made = [runs / f"{name} {EVALUATED}" for name in ("one", way)]
    one, two = (load(run / "result.json") for run in made)
    for key in ("attack_success", "exact_match", "unparseable", "n", "counts", "marker_fidelity"):
        assert one[key] == two[key]
    answers = [
        {(line["id"], line["asked"]): line["ids"] for line in read_json_lines(run / "answers.jsonl")}
        for run in made
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 15 and not list(made[1].glob("answers.rank*")), (
        "each its share, in one file"
    )
    assert math.isclose(
        one["heldout_kl"]["in_domain"], two["heldout_kl"]["in_domain"], rel_tol=1e-3
    ) and math.isclose(one["harmful_cosine"], two["harmful_cosine"], abs_tol=1e-4)
    # in parts, the first process keeps half of the frozen weights
    assert (
        two["own_weights"] == one["own_weights"]
        if way == "ddp"
        else 0.4 < two["own_weights"] / one["own_weights"] < 0.6
    )


@pytest.mark.parametrize("name", ["ddp then one", "fsdp then ddp", "ddp then fsdp", "one then fsdp"])
def test_they_go_on_from_each_others_checkpoints(runs, name):
    assert differences(runs / "one at once", runs / name)[0] < 1e-5
    assert load(runs / name / "status.json")["resumed_step"] == 1


def test_adapter_weights_that_no_term_reaches(runs):
    assert differences(runs / "one at beta 0", runs / "ddp at beta 0")[0] < 1e-5


@pytest.mark.parametrize(
    "way, what, count, term",
    [
        ("ddp", "searches", "twin_targets", "twin"),
        ("fsdp", "twins", "twin_targets", "twin"),
        ("ddp", "pairs", "preference_pairs", "preference"),
        ("fsdp", "pairs", "preference_pairs", "preference"),
    ],
)
def test_two_processes_share_the_twins(runs, way, what, count, term):
    worst, key = differences(runs / f"one with {what}", runs / f"{way} with {what}")
    assert worst < 1e-4, key
    assert all(row[count] and row[f"loss_{term}"] > 0 for row in metrics(runs / f"{way} with {what}"))


def test_two_processes_share_the_caches_of_states_and_twins(runs):
    worst, key = differences(runs / "one with twins", runs / "ddp cached")
    assert worst < 1e-4, key
    for name in ("teacher", "encoded"):
        assert len([p for p in (runs / f"{name}-cache").iterdir() if p.is_dir()]) == 1


def launch(folder, notebook, *parameters, processes=2, **options):
    "The README's launcher line: `processes` papermills make one run, in `folder`."
    words = " ".join(f"'{p}'" for p in (*few(folder, **options.pop("few", {})), *parameters))
    line = f"exec papermill {notebook} {folder}/out.$RANK.ipynb --cwd {NBS} {words}"
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CBNB_RUNS": str(folder / "runs"),
    }
    return subprocess.Popen(
        [str(w) for w in (*TORCHRUN, processes, "--no-python", "bash", "-c", line)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def the_run(folder):
    return next((folder / "runs").glob("*/*/status.json")).parent


@pytest.mark.slow
def test_the_notebook_by_torchrun(tmp_path):
    "With the base in parts; without, two processes make it by srun in tests/test_slurm.py."
    process = launch(tmp_path, NBS / "train.ipynb", "-p", "fsdp", True)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-5000:]
    path = the_run(tmp_path)
    status = load(path / "status.json")
    assert (
        (status["state"], status["processes"]) == ("done", 2)
        and len(metrics(path)) == 4
        and "fsdp" not in load(path / "params.json")
    )
    assert (
        (path / "adapter" / "adapter_model.safetensors").is_file()
        and (path / "report.html").is_file()
        and load(path / "result.json")["after"]["n"]["attack"] == 2
    )
    for name in ("out.1.ipynb", "out.1.rank1.ipynb"):  # both processes' notebooks, whole
        cells = [c for c in nbformat.read(path / name, as_version=4).cells if c.cell_type == "code"]
        assert "end_recording" in cells[-1].source and not any(
            o.output_type == "error" for c in cells for o in c.outputs
        )
    # taken back to step 3, it is the same run for one process, which tells that it is alone
    before = metrics(path)
    shutil.rmtree(path / "checkpoints" / "checkpoint-4")
    write_json(path / "status.json", status | {"state": "interrupted"})
    done = one_process(*few(tmp_path), "-p", "run_dir", path)
    assert done.returncode == 0 and load(path / "made_from.json")["told"]["processes"] == "1", done.stdout[
        -4000:
    ]
    assert load(path / "status.json")["changes"] == ["attempt 2 has processes 1, and the one before it had 2"]
    assert metrics(path)[:3] == before[:3] and load(path / "status.json")["resumed_step"] == 3


@pytest.mark.slow
def test_rows_that_cannot_be_shared_are_refused_before_anything_is_loaded(tmp_path):
    process = launch(
        tmp_path, NBS / "train.ipynb", "-p", "gradient_accumulation_steps", 1, few={"batch_size": 3}
    )
    said = process.communicate(timeout=200)[0]
    assert (
        process.returncode
        and "3 rows per step, which 2 processes cannot share evenly" in said
        and not (tmp_path / "runs").exists()
    )


def alive(folder):
    "The processes that were started with `folder` in their environment, kernels among them."

    def environment(place):
        try:
            return place.read_bytes()
        except OSError:
            return b""

    return [
        place.parent.name
        for place in Path("/proc").glob("[0-9]*/environ")
        if str(folder).encode() in environment(place)
    ]


def tripping(folder, what):
    "A notebook in `folder`: train.ipynb, in which process 1 does `what` behind step 2, and notes the time."
    notebook = nbformat.read(NBS / "train.ipynb", as_version=4)
    cell = next(c for c in notebook.cells if "if not train_breaker(" in c.source)
    trip = [
        "    from transformers import TrainerCallback",
        "    import time",
        "    from cbnb.basics.processes import rank",
        "    class Trip(TrainerCallback):",
        "        def on_step_end(self, args, state, control, **kwargs):",
        "            if state.global_step == 2 and rank() == 1:",
        "                (run.path / 'tripped').write_text(str(time.time()))",
        f"                {what}",
    ]
    lines = cell.source.splitlines()
    at = next(i for i, line in enumerate(lines) if "with live_dashboard" in line)
    cell.source = "\n".join([*lines[:at], *trip, *lines[at:]]).replace(
        "[alarms, view]", "[alarms, view, Trip()]"
    )
    nbformat.write(notebook, folder / "trip.ipynb")
    return folder / "trip.ipynb"


def failed(folder, ended, word):
    "The run's directory, once it has failed with `word` within a minute behind its trip."
    path = the_run(folder)
    assert ended - float((path / "tripped").read_text()) < 60
    status = load(path / "status.json")
    assert status["state"] == "failed" and word in status["error"], status
    return path, status


@pytest.mark.slow
def test_when_one_process_dies_all_end(tmp_path):
    "Its launcher, its papermills and their kernels too."
    process = launch(tmp_path, tripping(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    said = process.communicate(timeout=300)[0]
    assert process.returncode, said[-3000:]
    path, status = failed(tmp_path, time.time(), "another process has ended without a word")
    time.sleep(3)
    assert not alive(tmp_path), "a process of it goes on"
    assert load(path / "status.json") == status


@pytest.mark.slow
def test_when_one_process_raises_all_end(tmp_path):
    "Forked processes, which nobody else ends: the one that goes on must notice by itself."
    notebook, given = tripping(tmp_path, "raise OSError('the disk of this node is gone')"), few(tmp_path)
    parameters = dict(zip(given[1::3], given[2::3], strict=True))
    imported(notebook)

    def make():
        AcceleratorState._reset_state(reset_partial_state=True)
        execute(notebook, parameters)

    own = os.environ | {"CBNB_RUNS": str(tmp_path / "runs")}
    begun = [started(make, NBS, own | rank) for rank in ranks(2)]
    outcomes = [ended(*one, 300) for one in begun]
    told = [(done.returncode, done.stdout[-3000:]) for done in outcomes]
    assert all(code for code, _ in told), told
    path, status = failed(tmp_path, time.time(), "in process 1 of 2: OSError: the disk of this node is gone")
    time.sleep(1)
    assert load(path / "status.json") == status


def test_cbnb_train_leaves_several_processes_to_papermill(tmp_path):
    said = run(BIN / "cbnb", "train", cwd=ROOT, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert said.returncode == 2 and "papermill" in said.stdout
