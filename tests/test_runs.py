"""What a notebook cannot show of the room cbnb.run and cbnb.config: crashes, several processes, real
papermill, a real git repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import cbnb
from cbnb.basics.jsonfiles import RunError, read_json, write_json
from cbnb.run.directory import open_run
from cbnb.run.stages import read_status, stage

PACKAGE = Path(cbnb.__file__).resolve().parent


@pytest.fixture(autouse=True)
def runs_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("CBNB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]))
    for name in [k for k in os.environ if k.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def python(code, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_no_notebook_is_recorded_outside_of_a_kernel(tmp_path):
    out, err = python(
        "from cbnb.run.recorder import record_notebook; from cbnb.run.stages import Run; from pathlib "
        "import Path; "
        f"print(record_notebook(Run(Path({str(tmp_path)!r}))))"
    ).communicate()
    assert out.strip() == "None" and not list(tmp_path.iterdir()), err


@pytest.mark.parametrize("module", ["cbnb.config", "cbnb.run.directory", "cbnb.run.__main__"])
def test_import_is_light(module):
    out, err = python(
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    ).communicate()
    assert out.strip() == "[]", err


# --- files are whole or absent
# -------------------------------------------------------------------------------------------------------


def test_failed_rename_leaves_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json(path, {"state": "running"})

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError):
        write_json(path, {"state": "done"})
    assert read_json(path) == {"state": "running"} and [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_kill_in_the_middle_of_write_json(tmp_path, where):
    run = open_run({"seed": 0}, run_dir=tmp_path / "run")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom cbnb.run.stages import Run, set_status\n"
        f"os.{where} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "set_status(Run(Path(sys.argv[1])), 'done')"
    )
    child = python(code, run.path)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert read_status(run.path)["state"] == "running"  # the old file, whole
    # and the litter does not stop the next attempt
    assert open_run({"seed": 0}, run_dir=run.path).attempt == 2


def test_readers_never_see_a_torn_status(tmp_path):
    run = open_run({"seed": 0}, run_dir=tmp_path / "run")
    child = python(
        "import sys\nfrom pathlib import Path\nfrom cbnb.run.stages import Run, set_status\nrun = "
        "Run(Path(sys.argv[1]))\nprint('go', flush=True)\n"
        "for i in range(300): set_status(run, 'running', note='x' * (i * 37 % 5000))",
        run.path,
    )
    assert child.stdout.readline() == "go\n"
    seen = 0
    while child.poll() is None:
        assert read_status(run.path)["state"] == "running"
        seen += 1
    assert child.returncode == 0 and seen > 0


def test_failed_stage_survives_a_full_disk(tmp_path, monkeypatch):
    run = open_run({"seed": 0}, run_dir=tmp_path / "run")

    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError):
        with stage(run, "train"):
            monkeypatch.setattr(os, "replace", full)
            1 / 0  # noqa: B018


# --- several processes
# ------------------------------------------------------------------------------------------------------------

OPEN = (
    "import sys\nfrom cbnb.basics.jsonfiles import RunError\nfrom cbnb.run.directory import "
    "open_run\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    "try: print('run', open_run({'seed': 0}, run_dir=sys.argv[1] or None).path, flush=True)\n"
    "except RunError as e: print('error', e, flush=True)\n"
    "sys.stdin.readline()"
)


def race(run_dir, n=6):
    "n processes open a run at the same moment and stay alive until all have answered."
    children = [python(OPEN, run_dir) for _ in range(n)]
    try:
        assert all(c.stdout.readline() == "ready\n" for c in children)
        for c in children:
            c.stdin.write("go\n"), c.stdin.flush()
        return [c.stdout.readline().split(maxsplit=1) for c in children]
    finally:
        for c in children:
            c.communicate("end\n")


def test_direct_runs_never_share_a_folder(tmp_path):
    answers = race("")
    assert all(kind == "run" for kind, _ in answers) and len({path for _, path in answers}) == len(answers)
    assert all(read_status(path.strip())["attempt"] == 1 for _, path in answers)


def test_one_process_gets_an_explicit_folder(tmp_path):
    answers = race(tmp_path / "job")
    assert sorted(kind for kind, _ in answers) == ["error"] * 5 + ["run"]
    assert all("is running on" in text for kind, text in answers if kind == "error")


def test_killed_run_is_resumed(tmp_path):
    child = python(OPEN, tmp_path / "job")
    child.stdin.write("go\n"), child.stdin.flush()
    assert child.stdout.readline() == "ready\n" and child.stdout.readline().startswith("run")
    with pytest.raises(RunError, match="is running on"):
        open_run({"seed": 0}, run_dir=tmp_path / "job")
    child.kill()
    child.wait()
    assert open_run({"seed": 0}, run_dir=tmp_path / "job").attempt == 2


# --- which code ran
# ------------------------------------------------------------------------------------------------------------


def test_code_state_in_a_real_repository(tmp_path):
    "Commit and diff of a tracked package; tokens in the diff and the remote's password are not written."
    shutil.copytree(
        PACKAGE, tmp_path / "repo" / "cbnb", ignore=shutil.ignore_patterns("__pycache__", "tinyagent_model")
    )

    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
            cwd=tmp_path / "repo",
            check=True,
            capture_output=True,
        )

    def state():
        child = python(
            "import json, cbnb.run.code as r; print(json.dumps(r.code_state()))",
            cwd=tmp_path / "repo",
            env={**os.environ, "PYTHONPATH": str(tmp_path / "repo"), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        out, err = child.communicate()
        return json.loads(out)

    git("init", "-q")
    git("remote", "add", "origin", "https://me:passw0rd@example.org/x.git")
    untracked = state()
    assert untracked["commit"] is None and untracked["diff"] is None and len(untracked["source"]) == 64
    git("add", "."), git("commit", "-qm", "x")
    clean = state()
    assert len(clean["commit"]) == 40 and clean["diff"] == "" and clean["source"] == untracked["source"]
    token = "hf_" + "a1B2" * 8
    with open(tmp_path / "repo" / "cbnb" / "config.py", "a") as f:
        f.write(f"\n# {token} https://me:other@example.org\n")
    dirty = state()
    assert (
        dirty["commit"] == clean["commit"]
        and dirty["source"] != clean["source"]
        and "+# [removed] https://[removed]example.org" in dirty["diff"]
    )
    assert not any(secret in json.dumps(dirty) for secret in (token, "passw0rd", "me:other"))


# --- real papermill
# ------------------------------------------------------------------------------------------------------------

PARAMETERS = """beta_kl: float = 0.3  # weight of the KL term
seed: int = 0
target_layers: str = "1,2"
full: bool = False
learning_rate: float | None = None"""
CHECK = """from cbnb.run.parameters import strict_parameters
parameters = strict_parameters(globals())"""
OPEN_RUN = (
    "from cbnb.run.directory import open_run\nfrom cbnb.run.metrics import write_result\nfrom "
    "cbnb.run.stages import set_status\n"
    "run = open_run(parameters)\nwrite_result(run, {'beta_kl': beta_kl})\nset_status(run, 'done')"
)


def papermill(folder, *args, tags=("parameters",)):
    "Exit status, stderr and seconds of the plain papermill command on a small run notebook."
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, CHECK, OPEN_RUN)]
    cells[0].metadata["tags"] = list(tags)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "train.ipynb"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "train.ipynb", "out.ipynb", *args],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr, time.monotonic() - start


def test_papermill_with_good_parameters(tmp_path):
    rc, err, _ = papermill(
        tmp_path,
        "-p",
        "beta_kl",
        "1",
        "-p",
        "seed",
        "1_0",
        "-p",
        "target_layers",
        "2",
        "-p",
        "full",
        "True",
        "-p",
        "learning_rate",
        "1e-4",
    )
    assert rc == 0, err
    [run] = (tmp_path / "runs").glob("*/train-*")
    assert read_json(run / "params.json") == {
        "beta_kl": 1.0,
        "seed": 10,
        "target_layers": "2",
        "full": True,
        "learning_rate": 1e-4,
    }
    assert read_status(run)["state"] == "done" and read_json(run / "result.json") == {"beta_kl": 1.0}
    assert (run / "notebook.ipynb").read_text() == (tmp_path / "train.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, tags, words",
    [
        (("-p", "beta_k", "0.3"), ("parameters",), "unknown parameter 'beta_k' (did you mean 'beta_kl'?)"),
        (("-p", "beta_kl", "true"), ("parameters",), "'beta_kl' wants float, but 'true' (str) was given"),
        (("-p", "beta_kl", "nan"), ("parameters",), "'beta_kl' wants a finite number"),
        (("-p", "beta_kl", "0.5"), (), "tag the cell with the defaults 'parameters'"),
    ],
)
def test_papermill_with_bad_parameters_fails_fast(tmp_path, args, tags, words):
    rc, err, seconds = papermill(tmp_path, *args, tags=tags)
    assert rc != 0 and words in err
    assert seconds < 15 and not (tmp_path / "runs").exists()
