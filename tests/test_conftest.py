"""The hooks of conftest.py do their work in several processes too, where reports travel from the workers."""

import re
import shutil
import sys

import pytest

from helpers import ROOT, run


@pytest.fixture(scope="module")
def left_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("left_out")
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_left_out.py").write_text(
        "import os, pytest\n"
        "def test_skip(): pytest.skip('needs a thing: install it')\n"
        "@pytest.mark.xfail(reason='is broken')\ndef test_xfail(): assert False\n"
        "def test_where():\n"
        "    print(*[os.environ[name] for name in ('OMP_NUM_THREADS', 'HF_HUB_OFFLINE', "
        "'PYTEST_XDIST_WORKER')])\n"
        "    assert False\n"
    )
    (folder / "test_module.py").write_text(
        "import pytest\npytest.skip('no module: make one', allow_module_level=True)\n"
    )
    (folder / "test_fine.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(20))\ndef test_fine(n): pass\n"
    )
    (folder / "slow").mkdir()
    # no need to wait for it: setup, call and teardown are said to take 7 s each
    (folder / "slow" / "conftest.py").write_text(
        "import pytest\n"
        "@pytest.hookimpl(wrapper=True)\n"
        "def pytest_runtest_makereport():\n"
        "    report = yield\n"
        "    report.duration = 7\n"
        "    return report\n"
    )
    (folder / "slow" / "test_slow.py").write_text("def test_slow(): pass\n")
    return folder


@pytest.mark.parametrize("strict", ["", "1"])
def test_hooks_in_two_processes(left_out, strict, tmp_path):
    (tmp_path / "parts").write_text("130 environment\n20 lint and so on\n")
    said = run(
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        left_out / "temporary",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--continue-on-collection-errors",
        ".",
        cwd=left_out,
        env={
            "CBNB_REQUIRE_ALL": strict,
            "CBNB_PARTS": str(tmp_path / "parts") if strict else "",
            "PYTEST_ADDOPTS": "",
        },
    )
    *_, last = lines = said.stdout.splitlines()
    assert said.returncode == 1 and re.search(r"^1 1 gw\d$", said.stdout, re.M), said.stdout
    assert re.search(r"^ +21  slow/test_slow\.py$", said.stdout, re.M), said.stdout
    parts = re.search(
        r"^ {4}130  environment\n {5}20  lint and so on\n +(\d+)  pytest\n +(\d+)  together$",
        said.stdout,
        re.M,
    )
    assert bool(parts) == bool(strict) and (not parts or int(parts[2]) == 150 + int(parts[1])), said.stdout
    if strict:
        assert "3 failed, 21 passed, 1 error" in last, said.stdout
        for reason in ("needs a thing: install it", "marked xfail: is broken", "no module: make one"):
            assert f"not allowed to be left out under CBNB_REQUIRE_ALL=1: {reason}" in lines, said.stdout
    else:
        assert "1 failed, 21 passed, 2 skipped, 1 xfailed" in last, said.stdout
        for line in (
            "test_left_out.py::test_skip: needs a thing: install it",
            "test_left_out.py::test_xfail: marked xfail: is broken",
            "test_module.py: no module: make one",
        ):
            assert line in lines, said.stdout
