"""Run nbdev_test over the notebooks and say how many it ran, which failed and which cells it left out.

nbdev_test itself prints no counts, and calls "no notebook found" a success. The counts here are its own
report of what it completed, held against the notebooks that it should have found: one that is missing fails,
and so does finding none.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob

TIMEOUT = 1800  # seconds for all notebooks: nbdev_test has no time limit of its own
# as long as all others: nbdev_test, by the alphabet, begins them last
LONG = r"^(05_trainer|01_probe|06_review|preflight|agent|train|add_objective)\.ipynb$"


def run_nbdev_test(runs, *choice):
    """Run `nbdev_test` with its output shown as it comes and the run directories of train.ipynb in `runs`;
    returns (exit status, output)."""
    # unbuffered workers would mix their lines
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    env |= {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1", "CBNB_RUNS": runs}
    command = [
        str(Path(sys.executable).parent / "nbdev_test"),
        *choice,
        "--n_workers",
        "1",
        "--do_print",
        "--timing",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    timer = threading.Timer(TIMEOUT, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if not line.startswith(("Starting ", "- Completed ", "No files were")):
            print(line, end="", flush=True)
    status = process.wait()
    if not timer.is_alive():
        print(f"nbdev_test was stopped after {TIMEOUT} s", flush=True)
    timer.cancel()
    return status, "".join(lines)


def run_both(runs):
    "The long notebooks beside all others, on two cores; returns (exit status, output) of both together."
    choices = [("--file_re", LONG), ("--skip_file_re", LONG)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda choice: run_nbdev_test(runs, *choice), choices))
    return max(abs(status) for status, _ in done), "".join(output for _, output in done)


def cells_left_out(notebooks, nbs, flags):
    "Counter of (notebook below nbs, flag) for the cells that nbdev_test skips because of a directive."
    left_out = Counter()
    for path in notebooks:
        for cell in read_nb(path).cells:
            if cell.cell_type != "code":
                continue
            directives = set(re.findall(r"^#\s*\|\s*(\w+)", cell.source, re.M))
            for flag in flags & directives:
                left_out[str(path.relative_to(nbs)), flag] += 1
            if re.search(r"^#\s*\|\s*eval:\s*false", cell.source, re.M | re.I):
                left_out[str(path.relative_to(nbs)), "eval: false"] += 1
    return left_out


def main():
    nbs = get_config().nbs_path
    found = sorted(nbglob(as_path=True))
    # nbdev_test's own sign for a folder to leave alone
    notebooks = [p for p in found if not (p.parent / ".notest").exists()]
    start = time.time()
    with tempfile.TemporaryDirectory() as runs:
        status, output = run_both(os.environ.get("CBNB_TEST_RUNS") or runs)
    completed = {Path(p) for p in re.findall(r"- Completed (.+?\.ipynb)", output)}
    reports = re.findall(r"Failed On The Following Notebooks:\n=+\n((?:\t.+\n?)+)", output)
    names = {line.strip() for report in reports for line in report.splitlines()}
    # it names a failed notebook without its folder
    failed = [p for p in notebooks if p.name in names]
    never_ran = [p for p in notebooks if p not in failed and p.absolute() not in completed]
    for path in failed:
        print(f"failed: {path.relative_to(nbs)}")
    for path in never_ran:
        print(f"not run to its end: {path.relative_to(nbs)}")
    for (name, flag), n in sorted(
        cells_left_out(notebooks, nbs, set(get_config().tst_flags.split())).items()
    ):
        how = (
            "open it in make lab"
            if flag.startswith("eval")
            else f"nbdev_test --path nbs/{name} --flags {flag}"
        )
        print(f"left out: {n} cell(s) marked '{flag}' in {name}; to run: {how}")
    for path in found:
        if path not in notebooks:
            print(
                f"left out: {path.relative_to(nbs)}, which needs downloads and measures this machine; to "
                "run: make bench"
            )
    bad = len(failed) + len(never_ran)
    if not notebooks:
        print("no notebook found: nothing was tested")
    print(f"notebooks: {len(notebooks) - bad} passed, {bad} failed")
    print(f"(nbdev_test took {time.time() - start:.0f} s)", flush=True)
    if parts := os.environ.get("CBNB_PARTS"):
        with open(parts, "a") as file:
            print(f"{time.time() - start:.0f} notebooks", file=file)
    return 1 if status or bad or not notebooks else 0


if __name__ == "__main__":
    sys.exit(main())
