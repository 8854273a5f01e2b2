"""Check what a change since main can have broken, in at most three minutes on two cores: make quick.

Lint and types come first. Then run the notebooks that were changed, the test files that were changed, and
those that import a changed module; tests marked `slow` are left out. What the time did not suffice for is
listed at the end: `make test` runs everything.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180
LAST_START = 150  # what begins later would hardly end in time
BIN = Path(sys.executable).parent


def git(*args):
    "Output lines of a git command in the repository; none where it fails."
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files():
    "Paths below the root that differ from where this branch left main: committed, uncommitted and new ones."
    base = next((b for name in ("origin/main", "main") for b in git("merge-base", name, "HEAD")), "HEAD")
    names = {*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")}
    return sorted(name for name in names if (ROOT / name).is_file())


def imported(path):
    "Dotted names of cbnb's modules, and of modules of tests/, that a Python file imports."
    text = path.read_text(encoding="utf-8")
    names = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.M)
    return {*names, *(f"cbnb.{name}" for name in re.findall(r"^from cbnb import (\w+)", text, re.M))}


def chosen_tests(names):
    "Test files among the changed `names`, then those that import a changed module or helper."
    modules = {
        ".".join(Path(name).with_suffix("").parts).removeprefix("tests.")
        for name in names
        if name.endswith(".py")
    }
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    touched = [t for t in tests if str(t.relative_to(ROOT)) in names]
    return touched + [t for t in tests if t not in touched and imported(t) & modules]


def jobs(names):
    "(title, command) of each part, in the order in which they are started."
    yield "lint", [BIN / "ruff", "check", "-q", "."]
    yield "format", [BIN / "ruff", "format", "-q", "--check", "."]
    yield "types", [BIN / "mypy"]
    for name in names:
        if re.fullmatch(r"nbs/(?!bench/).*\.ipynb", name):
            yield name, [BIN / "nbdev_test", "--path", name, "--n_workers", "0"]
    for test in chosen_tests(names):
        yield str(test.relative_to(ROOT)), [sys.executable, "-m", "pytest", "-q", "-m", "not slow", test]


def run(title, command, begin):
    "(title, state, output, seconds) of one part; state is `passed`, `failed` or `left out`."
    if (start := time.monotonic()) - begin > LAST_START:
        return title, "left out", "", 0.0
    env = os.environ | {"OMP_NUM_THREADS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    try:
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=begin + SECONDS - start,
        )
    except subprocess.TimeoutExpired:
        return title, "left out", "", time.monotonic() - start
    # pytest ends with 5 where all tests of a file are slow
    passed = done.returncode == 0 or done.returncode == 5 and "pytest" in command
    return title, "passed" if passed else "failed", done.stdout, time.monotonic() - start


def main():
    "Run all parts, two at a time; exit status 1 where one failed."
    begin, names = time.monotonic(), changed_files()
    states = {"passed": [], "failed": [], "left out": []}
    with ThreadPoolExecutor(2) as pool:
        for title, state, output, seconds in pool.map(lambda job: run(*job, begin), jobs(names)):
            states[state].append(title)
            print(f"{state:8}  {seconds:5.1f} s  {title}", flush=True)
            if state == "failed":
                print(output, flush=True)
    if states["left out"]:
        print(f"not run in {SECONDS} s: {' '.join(states['left out'])}; make test runs everything")
    counts = ", ".join(f"{len(titles)} {state}" for state, titles in states.items())
    print(f"make quick: {counts}, {time.monotonic() - begin:.0f} s")
    sys.exit(bool(states["failed"]))


if __name__ == "__main__":
    main()
