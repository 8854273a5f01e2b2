"""What a user starts as a process of its own, in a process forked from this one, which has imported
everything: the same code, files, exit status and printed lines, without the ten seconds in which torch,
transformers and peft are imported. What a kernel, papermill or a shell does is tested where `papermill` and
`run` are called."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from helpers import BIN, NBS, ROOT, code_cells, environment


def begin(work, said, cwd, env):
    "In the child: `work()` with its output in the file `said`; never returns."
    code = 1
    gc.freeze()  # a look through all that is imported takes a second, and a training has several
    try:
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(said, number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(os.dup(n), "r" if n == 0 else "w", buffering=1) for n in range(3)
        )
        code = work() or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def started(work, cwd=ROOT, env=None):
    """A forked process that runs `work()`, whose value is the exit status: its number, and the file of what
    it prints."""
    said = tempfile.TemporaryFile()
    if (pid := os.fork()) == 0:
        begin(work, said.fileno(), cwd, dict(os.environ if env is None else env))
    return pid, said


def ended(pid, said, timeout=600):
    "The CompletedProcess of what `started` gave, when it has ended, with all that it printed in `.stdout`."
    with said:
        end = time.monotonic() + timeout
        while not (over := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise subprocess.TimeoutExpired(str(pid), timeout)
            time.sleep(0.02)
        said.seek(0)
        return subprocess.CompletedProcess(pid, os.waitstatus_to_exitcode(over[1]), said.read().decode())


def forked(work, cwd=ROOT, env=None, timeout=600):
    """Runs `work()`, whose value is the exit status, in a forked process; returns the CompletedProcess with
    all that it printed in `.stdout`."""
    return ended(*started(work, cwd, env), timeout)


def imported(notebook):
    "Imports here what the notebook imports, once, so that no child has to."
    lines = (line.split() for cell in code_cells(notebook) for line in cell.source.splitlines())
    for words in lines:
        if words[:1] in (["from"], ["import"]):
            importlib.import_module(words[1].rstrip(","))


def execute(notebook, parameters):
    """Executes the code cells of `notebook` one after the other, with the `parameters` behind the cell that
    declares them."""
    namespace = {"__name__": "__main__"}
    for cell in code_cells(notebook):
        exec(compile(cell.source, Path(notebook).name, "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", ()):
            namespace |= parameters


def cells(*arguments, cwd=ROOT, runs=None, notebook=NBS / "train.ipynb", timeout=900, **env):
    """What `papermill NOTEBOOK -p …` executes, with papermill's own reading of the `-p NAME VALUE` arguments,
    the runs folder `runs` and further environment variables."""
    from papermill.cli import _resolve_type

    words = list(zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True))
    assert {word for word, *_ in words} <= {"-p"}, "only -p NAME VALUE"
    parameters = {name: _resolve_type(str(value)) for _, name, value in words}
    imported(notebook)
    given = {"CBNB_RUNS": str(runs)} if runs else {}
    process = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | given | env
    return forked(lambda: execute(notebook, parameters), cwd, process, timeout)


def command(*arguments, runs, cwd=ROOT, timeout=600):
    "What `cbnb ARGUMENTS` does, with the runs folder `runs`."
    from cbnb.cli import main

    return forked(lambda: main([str(a) for a in arguments]), cwd, environment(runs), timeout)
