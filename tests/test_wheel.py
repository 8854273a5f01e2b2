"""The wheel that a user would install: built by way of the sdist, complete, and enough by itself to train
with."""

import re
import sys
import zipfile
from collections import Counter
from importlib.metadata import distribution, distributions, version

import pytest
from packaging.requirements import Requirement

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


def locked(layer):
    "What lock/<layer>.txt lists for this Python and machine."
    text = (ROOT / "lock" / f"{layer}.txt").read_text()
    found = [Requirement(line) for line in re.findall(r"^([^#\s-].*?) \\$", text, re.M)]
    return [wanted for wanted in found if wanted.marker is None or wanted.marker.evaluate()]


def link_locked(requirements, packages):
    """Put into the folder `packages` links to the files of `requirements`, and of nothing else that is
    installed here: .ci/venv has installed them by their hashes, from the same lists. Folders that other
    packages share are made, and their files linked one by one."""
    shared = Counter(
        top for d in distributions() for top in {path.parts[0] for path in d.files or () if path.parts}
    )
    for wanted in requirements:
        found = distribution(wanted.name)
        assert found.files and wanted.specifier.contains(found.version, prereleases=True), wanted
        for path in found.files:
            # commands, which nothing here calls, are beside the folder of packages
            if path.parts[0] == "..":
                continue
            linked = path if shared[path.parts[0]] > 1 else path.parents[-2] if path.parent.parts else path
            place = packages / linked
            if "__pycache__" in linked.parts or place.exists() or not found.locate_file(linked).exists():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(found.locate_file(linked))


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
    """Into an environment with nothing but what the lock lists for a run, away from the repository: install
    the wheel, train a few steps with what it brings."""
    venv, away = tmp_path / "venv", tmp_path / "away"
    away.mkdir()
    made = run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=away)
    assert made.returncode == 0, made.stdout
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    # the base install, where torch is the build that is installed here
    torch = "cpu" if version("torch").endswith("+cpu") else "cuda"
    link_locked([*locked("run"), *locked(torch)], next(venv.glob("lib/python3*/site-packages")))
    installed = run(*pip, "install", "--quiet", "--no-compile", "--no-deps", wheel, cwd=away)
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
