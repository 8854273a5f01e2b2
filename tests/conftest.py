"""Skips are told, never silent: at the end as a list with what to do, and as failures where everything must
run (CBNB_REQUIRE_ALL=1)."""

import os
import time
from collections import Counter
from pathlib import Path

# No test asks a hub for anything, and two test processes on two cores must not fight over them. Set before
# any library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")

import pytest
from hypothesis import settings

# The same examples on every machine and day, so that a red run can be repeated; a slow machine is no failure.
settings.register_profile("cbnb", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("cbnb")

LONG = (
    "test_train.py",
    "test_train_job.py",
    "test_slurm.py",
    "test_preflight.py",
    "test_wheel.py",
    "test_lab.py",
    "test_resume.py",
    "test_ablation.py",
)
BEGUN = time.monotonic()
# not for what the tests start, which may be .ci/nbtest.py itself
PARTS = os.environ.pop("CBNB_PARTS", None)
REQUIRE_ALL = os.environ.get("CBNB_REQUIRE_ALL") == "1"


def reason_of(report):
    "Why a report was skipped or expected to fail."
    if hasattr(report, "wasxfail"):
        return f"marked xfail: {report.wasxfail}"
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr).removeprefix(
        "Skipped: "
    )


def forbid_skip(report):
    "Under CBNB_REQUIRE_ALL=1 turn a skip or an xfail into a failure that names its reason."
    if REQUIRE_ALL and (report.skipped or hasattr(report, "wasxfail")):
        report.longrepr = f"not allowed to be left out under CBNB_REQUIRE_ALL=1: {reason_of(report)}"
        report.outcome = "failed"
        if hasattr(report, "wasxfail"):
            del report.wasxfail
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return forbid_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return forbid_skip((yield))


def pytest_terminal_summary(terminalreporter):
    show_seconds(terminalreporter)
    show_parts(terminalreporter)
    left_out = [r for key in ("skipped", "xfailed") for r in terminalreporter.stats.get(key, [])]
    if not left_out:
        return
    terminalreporter.section("not run on this machine, and how to make it run")
    for report in left_out:
        terminalreporter.write_line(f"{report.nodeid}: {reason_of(report)}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The long files first, so that the processes, which take a file each as it comes, end at about the same
    time."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def show_seconds(terminalreporter):
    "How long each file took, its fixtures and tests together: where the time of a long run goes."
    seconds = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if hasattr(report, "duration"):
            seconds[report.nodeid.split("::")[0]] += report.duration
    slow = [(path, spent) for path, spent in seconds.most_common() if spent >= 10]
    if not slow:
        return
    terminalreporter.section("seconds by file, from 10 on")
    for path, spent in slow:
        terminalreporter.write_line(f"{spent:7.0f}  {path}")


def show_parts(terminalreporter):
    "What each part of .ci/run took, which it writes to the file CBNB_PARTS, a line a part; this one is last."
    if not PARTS:
        return
    rows = [line.split(maxsplit=1) for line in Path(PARTS).read_text().splitlines()]
    rows.append((f"{time.monotonic() - BEGUN:.0f}", "pytest"))
    terminalreporter.section("seconds by part")
    for spent, name in [*rows, (sum(int(spent) for spent, _ in rows), "together")]:
        terminalreporter.write_line(f"{spent:>7}  {name}")


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium for a whole module: it must be closed before another module's asyncio code runs."
    from lab.labharness import CHROMIUM, chromium

    if not os.path.exists(CHROMIUM):
        pytest.skip("no Chromium found: apt-get install chromium, or name one: CHROMIUM=/path make test")
    with chromium() as browser:
        yield browser


@pytest.fixture
def pages(browser):
    "Standalone pages in that browser: open, look, check. lab/pageharness.py says how."
    from lab.pageharness import Pages

    with Pages() as pages:
        yield pages
