"""The wheel that a user would install: built by way of the sdist, complete, and enough by itself to train
with."""

import sys
import zipfile
from importlib.metadata import version

import pytest

from helpers import ROOT, copy_tree, files_of, run


def package_files():
    "Every file of the package, relative to it."
    return {name for name in files_of(ROOT / "cbnb") if not name.endswith(".part")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel: sdist first, then the wheel from the sdist, so that a file missing from either is
    missed."""
    copy = copy_tree(tmp_path_factory.mktemp("wheel") / "cbnb")
    built = run(sys.executable, "-m", "build", cwd=copy)
    assert built.returncode == 0, built.stdout[-4000:]
    return next((copy / "dist").glob("cbnb-*.whl"))


@pytest.mark.slow
def test_wheel_is_complete(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = archive.read(next(n for n in names if n.endswith(".dist-info/entry_points.txt"))).decode()
    assert "cbnb=cbnb.cli:main" in scripts.replace(
        " ", ""
    ) and "[papermill.engine]\ncbnb=cbnb.run.kernels\n" in scripts.replace(" ", "")
    assert {n.removeprefix("cbnb/") for n in names if n.startswith("cbnb/")} == package_files()
    others = {n.split("/")[0] for n in names} - {"cbnb"}
    assert len(others) == 1 and next(iter(others)).endswith(".dist-info"), f"the wheel would install {others}"


@pytest.mark.slow
def test_installed_wheel_trains(wheel, tmp_path):
    """Into an empty environment, away from the repository: install the wheel, train a few steps with what it
    brings."""
    venv, away = tmp_path / "venv", tmp_path / "away"
    away.mkdir()
    made = run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=away)
    assert made.returncode == 0, made.stdout
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    # the base install by hash, where torch is the build that is installed here; what is never imported need
    # not be compiled
    torch = "cpu" if version("torch").endswith("+cpu") else "cuda"
    locked = ("--require-hashes", "-r", ROOT / "lock" / "run.txt", "-r", ROOT / "lock" / f"{torch}.txt")
    for what in (locked, (wheel, "--no-deps")):
        installed = run(*pip, "install", "--quiet", "--no-compile", *what, cwd=away, timeout=1500)
        assert installed.returncode == 0, installed.stdout[-4000:]
    assert run(*pip, "check", cwd=away).returncode == 0
    entry = run(
        venv / "bin" / "cbnb",
        "masks",
        ROOT / "tests" / "fixtures" / "agent.jsonl",
        "--model",
        "tinyagent",
        "--json",
        cwd=away,
        env={"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"},
    )
    assert entry.returncode == 0 and '{"summary": ' in entry.stdout, entry.stdout[-4000:]
    nowhere = run(
        venv / "bin" / "cbnb",
        "train",
        "--beta-kl",
        "0.3",
        cwd=away,
        env={"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"},
    )
    assert (
        nowhere.returncode == 2 and "nbs/train.ipynb is neither here nor in the project" in nowhere.stdout
    ), nowhere.stdout
    data = sorted(name for name in package_files() if not name.endswith(".py"))
    script = ROOT / "tests" / "scripts" / "train_few_steps.py"
    trained = run(python, script, *data, cwd=away, env={"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"})
    assert trained.returncode == 0, trained.stdout[-4000:]
    present = run(*pip, "list", "--format=freeze", cwd=away).stdout.lower()
    assert "\ncbnb==" in f"\n{present}" and not any(
        f"\n{name}==" in f"\n{present}" for name in ("fastcore", "nbdev", "pytest", "trl", "resvg_py")
    )
