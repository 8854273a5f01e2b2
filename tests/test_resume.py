"""A run that is interrupted, as often and in whatever moment, ends as the one that was not, to the last bit
of its log and of its adapter."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from helpers import ROOT
from resume_common import STEPS

DRIVER = Path(__file__).parent / "resume_common.py"
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def load(path):
    return json.loads(Path(path).read_text())


def result(folder):
    "A run's log, byte for byte, and the sha256 of its adapter."
    return (folder / "metrics.jsonl").read_text(), hashlib.sha256(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def newest(folder):
    "Step of the newest checkpoint of a run, 0 for none."
    return max(
        (int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("checkpoint-*")), default=0
    )


@pytest.fixture(scope="module")
def attempt(tmp_path_factory):
    """`attempt(folder, end)`: exit status of one attempt; what it printed is in the file `log` beside the
    runs."""
    with open(tmp_path_factory.mktemp("driver") / "log", "w") as log:
        driver = subprocess.Popen(
            [sys.executable, DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=ENV,
        )

        def attempt(folder, end=None):
            print(json.dumps({"folder": str(folder), "end": end}), file=driver.stdin, flush=True)
            while not (line := driver.stdout.readline()).strip().lstrip("-").isdigit():
                assert line, Path(log.name).read_text()[-4000:]
            return int(line)

        yield attempt
        driver.stdin.close()
        driver.wait(10)


@pytest.fixture(scope="module")
def whole(attempt, tmp_path_factory):
    "Log and adapter of the run that nobody interrupts."
    folder = tmp_path_factory.mktemp("whole")
    assert attempt(folder) == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 6, 8, 9] and newest(folder) == STEPS
    return result(folder)


ends = st.one_of(
    st.tuples(
        st.sampled_from(["kill at step", "kill in step", "stop", "SIGTERM", "SIGUSR2", "SIGINT"]),
        st.integers(0, STEPS - 1),
    ),
    st.tuples(st.just("kill at event"), st.integers(1, 160)),
    st.tuples(st.just("kill in save"), st.integers(1, 15)),
    st.tuples(st.just("kill after"), st.just(0)),
)


@pytest.mark.slow
@settings(max_examples=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.lists(ends, min_size=2, max_size=4))
@example([("kill in save", 4), ("kill in save", 1), ("kill at event", 30), ("kill after", 0)])
@example([("kill at step", 0), ("kill at step", 1), ("stop", 3), ("SIGTERM", 3)])
def test_interrupted_at_any_moment(attempt, whole, tmp_path_factory, interruptions):
    from cbnb.run.sealed import damage

    folder = tmp_path_factory.mktemp("run")
    for how, number in interruptions:
        before = newest(folder)
        code = attempt(folder, [how, number])
        status, saved = load(folder / "status.json"), newest(folder)
        if code == 0:
            break  # the moment never came
        assert code == (-9 if how.startswith("kill") else 1) and status["state"] == (
            "running" if how.startswith("kill") else "interrupted"
        )
        assert status["resumed_step"] in (None, before), "it went on from the newest checkpoint"
        assert saved >= before and not any(map(damage, (folder / "checkpoints").glob("checkpoint-*"))), (
            "what has its name is whole"
        )
    else:
        assert attempt(folder) == 0
    status = load(folder / "status.json")
    assert status["state"] == "done" and status["note"] is None, (
        "nothing had to be passed over: what is half written never gets its name"
    )
    assert result(folder) == whole
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["checkpoint-8", "checkpoint-9"]
    shutil.rmtree(folder)


@pytest.mark.slow
def test_full_disk(whole, tmp_path):
    """On small disks of their own: failed with the disk's name, the last checkpoint whole, and the same end
    as ever when there is space again."""
    space = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip(
            "no small disk can be mounted here: run this test as root, or where `unshare --map-root-user "
            "--mount` is allowed"
        )
    done = subprocess.run(
        [*space, sys.executable, DRIVER, tmp_path],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    codes = [int(line) for line in done.stdout.splitlines() if line.strip().isdigit()]
    assert codes == [1, 0, 1, 0] and done.returncode == 0, done.stdout[-4000:]
    from cbnb.run.sealed import damage

    for name in ("own", "other"):
        failed = tmp_path / f"{name}-failed"
        status, saved = load(failed / "status.json"), newest(failed)
        assert status["state"] == "failed", status
        assert (
            f"No space left on device: the disk mounted at {tmp_path}/disk-{name}, where" in status["error"]
            and "free some" in status["error"]
        )
        assert (
            saved == 4
            and not damage(failed / "checkpoints" / "checkpoint-4")
            and not (failed / "checkpoints" / ".unfinished").exists()
        )
        status = load(tmp_path / name / "status.json")
        assert (
            status["state"] == "done" and status["resumed_step"] == saved and result(tmp_path / name) == whole
        )
    assert (tmp_path / "own-failed" / ".reserve").exists() and not (
        tmp_path / "other-failed" / ".reserve"
    ).exists()
