"""What is said to a terminal: nothing in it is obeyed or unseen, whoever says it; and how a command ends that
is refused, interrupted or no longer read."""

import ast
import builtins
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache

import nbformat
import pytest

from cbnb import cli
from cbnb.basics.terminal import LONGEST_PIECE, SENTENCE, error_text, sentence, tame_kernel, visible, warn
from cbnb.config import ConfigError
from cbnb.report import figures as report
from cbnb.transcripts.reader import read_transcripts
from cbnb.transcripts.record import TranscriptError
from forked import forked
from fuzz_cli import EVIL
from helpers import ROOT, code_cells, environment, notebooks

SAID_BY = "cbnb/basics/terminal.py"


@cache
def sources():
    "`[(name, syntax tree)]` of every module, and of every cell of the notebooks that papermill runs."
    return list(trees())


def is_run(path):
    return any("parameters" in cell.metadata.get("tags", ()) for cell in code_cells(path))


def trees():
    for path in sorted((ROOT / "cbnb").rglob("*.py")):
        if path.name != "_modidx.py":
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
    for path in notebooks():
        if path.parent.name == "bench" or not is_run(path):
            continue
        for cell in code_cells(path):
            yield path.name, ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M))


def calls(tree):
    "`(what is called, call)` of every call in a syntax tree."
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


# --- by one function, everywhere ---


def test_lines_are_printed_by_say_and_warnings_given_by_warn():
    """`print` itself writes only JSON, whose escapes hold everything, and what `terminal_lines` and
    `span_lines` have made visible and coloured."""
    printers = ("print", "warnings.warn", "sys.stdout.write", "sys.stderr.write")
    harmless = re.compile(r"print\((json\.dumps\(.*\)|\*(terminal|span)_lines\(.*\), '', sep='\\n')\)")
    found = [
        (name, ast.unparse(call))
        for name, tree in sources()
        if name != SAID_BY
        for what, call in calls(tree)
        if what in printers and not harmless.fullmatch(ast.unparse(call))
    ]
    assert not found, f"say it by cbnb.basics.terminal.say, or warn: {found}"


def test_an_exit_says_nothing_by_itself():
    "`sys.exit(text)` prints the text as it is, and its status is 1."
    found = [
        (name, ast.unparse(call))
        for name, tree in sources()
        for what, call in calls(tree)
        if what == "sys.exit"
        and call.args
        and not isinstance(call.args[0], ast.Call)
        and not isinstance(getattr(call.args[0], "value", 0), int)
    ]
    assert not found, f"raise it in what cbnb.basics.terminal.run_program carries out: {found}"


def test_one_function_makes_visible():
    modules = (ROOT / "cbnb").rglob("*.py")
    found = [path.name for path in modules if "isprintable" in path.read_text(encoding="utf-8")]
    assert found == ["terminal.py"]


def test_every_error_is_a_sentence():
    classes = [node for _, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = [(name, kind) for name, kind in vars(builtins).items() if isinstance(kind, type)]
    raised = {name for name, kind in kinds if issubclass(kind, BaseException)}
    own = {c.name: c for c in classes if any(ast.unparse(base) in raised for base in c.bases)}
    assert len(own) > 10 and {"TranscriptError", "ConfigError", "CommandError"} < own.keys()
    # an OSError like any other: cbnb.basics.terminal itself reads by its module
    said_by_others = {
        "InputError",
        # of the process that runs a template, which has nothing of ours: MaskError says it
        "Refused",
    }
    silent = {
        name for name, c in own.items() if "__str__ = error_text" not in map(ast.unparse, c.body)
    } - said_by_others
    assert not silent, f"give it __str__ = error_text of cbnb.basics.terminal: {silent}"
    assert TranscriptError.__str__ is ConfigError.__str__ is error_text
    assert str(ConfigError(f"one\n{EVIL}")) == visible(f"one\n{EVIL}")
    assert len(str(ConfigError("word " * 9999))) <= SENTENCE


def test_a_warning_is_a_sentence(tmp_path):
    path = tmp_path / f"evil{EVIL[:5]}.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\nnull\n')
    with pytest.warns(UserWarning) as told:
        list(read_transcripts(path, label="benign", on_error="skip"))
    assert told and all(str(w.message).isprintable() for w in told) and "evil\\x1b" in str(told[0].message)

    def reader():
        warn(EVIL)

    with pytest.warns(UserWarning) as told:
        reader()
    assert str(told[0].message) == visible(EVIL) and told[0].filename == __file__


@pytest.mark.parametrize("length", [LONGEST_PIECE + 1, 5_000, 200_000])
def test_no_value_is_told_whole(length):
    "In quotation marks, without blanks, as a word of the command line; what stands before and after stays."
    long = "a b " * length
    for text, words in (
        (f"the label {long!r} is unknown; use benign", ()),
        (f"{'x' * length} is no folder; give one", ()),
        (f"the tools {long} are not there; give some", [f"--tools={long}"]),
    ):
        said = sentence(text, words)
        assert len(said) <= SENTENCE and "more characters" in said and len(said) < len(text)
        assert said.split()[-1] == text.split()[-1]


def test_a_kernel_tells_errors_in_bounds():
    "As a run notebook does: what a library raises, and from what, by the time a traceback is made of it."

    def work():
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
        tame_kernel()
        shell.run_cell(f"raise ValueError({EVIL!r})")
        shell.kernel = "stands for one"
        tame_kernel()
        shell.run_cell("print('TAMED')")
        shell.run_cell(
            f"try: raise OSError({EVIL!r})\n"
            f"except OSError as e: raise RuntimeError('x' * 5000 + {EVIL!r}) from e"
        )
        shell.run_cell(
            "import logging; heard = logging.getLogger('a library')\n"
            f"heard.addHandler(logging.StreamHandler()); heard.warning('a model of type %s', {EVIL!r})"
        )

    said = forked(work, env=environment("/nowhere", PYTHONIOENCODING="utf-8:surrogateescape")).stdout
    wild, _, tamed = said.partition("TAMED")
    colours = re.compile("\x1b\\[[0-9;]*m")
    assert "\x1b]0;" in wild, "the test does not see what it looks for"
    assert "RuntimeError" in tamed and visible(EVIL)[:20] in tamed
    assert "a model of type \\x1b" in tamed and "x" * 1000 not in tamed
    assert {c for c in colours.sub("", tamed) if not c.isprintable()} == {"\n"}, tamed


# --- what papermill runs for a command ---


@pytest.fixture
def project(tmp_path):
    """A project's folder with a train.ipynb whose cell raises a library's error, and a preflight.ipynb whose
    review refuses."""
    shown = "from cbnb.run.parameters import strict_parameters\nstrict_parameters(globals())\n"
    cells = {
        "train": [f"raise RuntimeError('no such block: {EVIL[:-2].encode('unicode_escape').decode()}')"],
        "preflight": [
            "from pathlib import Path\nfrom cbnb.preflight.checks import Check, Finding, Page\n"
            "page = Page(Path(run_dir) / 'preflight.json', {}, {})\n"
            "page.add(Check('alive', (Finding('alive', 'fail', 'a dead run \\x1b[2J'),)))\npage.close()"
        ],
    }
    (tmp_path / "nbs").mkdir()
    for name, (code,) in cells.items():
        kernel = {"display_name": "python3", "language": "python", "name": "python3"}
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        parameters = "seed: int = 0  # a number\nrun_dir: str = ''  # a folder"
        nb.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, shown + code)]
        nb.cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(nb, tmp_path / "nbs" / f"{name}.ipynb")
    (tmp_path / "settings.ini").touch()
    return tmp_path


def carried_out(project, module, *arguments):
    "The finished process of `python -m module` in a project's folder."
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=project,
        env=environment(project / "runs"),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", "RuntimeError: no such block: \\x1b]0;owned"),
        ("preflight", "pre-flight refuses this run: alive (a dead run \\x1b[2J)"),
    ],
)
def test_a_cell_that_raises_is_one_sentence(project, command, words):
    "No traceback of papermill's, which is in the executed notebook; status 1, as documented."
    done = carried_out(project, "cbnb.cli", command, "--run-dir", "run")
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said
    assert sum(words in line for line in re.split("[\r\n]", said)) == 1, said
    assert all(c.isprintable() or c in "\r\n" for c in said), said
    (kept,) = (project / "run").glob("*.ipynb")
    (error,) = [o for cell in code_cells(kept) for o in cell.outputs if o.output_type == "error"]
    shown = "".join(error.traceback)
    assert shown and "\x1b]" not in shown and "\x1b[2J" not in shown and error.evalue.isprintable()
    if command == "train":
        assert words in json.loads((project / "run" / "status.json").read_text())["error"]


def test_a_wrong_parameter_is_the_last_line_of_papermill(project):
    """By `cbnb.run.execute`, which `cbnb` and the batch scripts call, it is the only one; papermill itself
    says its page first."""
    wrong = "x\x1b[2J" + "y" * 5000
    for module, once in (("cbnb.run.execute", True), ("papermill", False)):
        done = carried_out(
            project, module, "nbs/train.ipynb", "out.ipynb", "-p", "seed", wrong, "--no-progress-bar"
        )
        said = [line for line in done.stderr.splitlines() if line.strip()]
        # an interrupt, at any time
        last = [line for line in said if not line.startswith("[IPKernelApp]")][-1]
        assert done.returncode == 1 and last.startswith("ParameterError: parameter 'seed' wants int"), said[
            -3:
        ]
        assert len(last) <= SENTENCE and last.isprintable()
        assert (done.stderr.count("ParameterError") == 1) == ("Traceback" not in done.stderr) == once, (
            done.stderr
        )


def test_batch_scripts_say_names_by_one_function():
    "`say` of slurm/common.sh; the one other line is a function's value."
    scripts = (*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch"))
    told = [
        line
        for path in scripts
        for line in path.read_text().splitlines()
        if re.search(r"\b(echo|printf)\b.*\$", line) and not line.startswith("say() {")
    ]
    assert [line.strip() for line in told] == ['echo "$1/out.$n.ipynb"'], told
    (say,) = re.findall("^say\\(\\) .*", (ROOT / "slurm" / "common.sh").read_text(), re.M)
    done = subprocess.run(
        ["bash", "-c", f'{say}\nsay "$1" "$2"', "bash", EVIL.replace("\ud800", ""), "a run"],
        capture_output=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    assert (
        done.returncode == 0 and re.fullmatch(rb"[ -~]+ a run\n", done.stdout) and b"]0;owned?" in done.stdout
    )


# --- how a command ends ---


def program(*arguments, **more):
    command = [sys.executable, "-m", "cbnb.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment("/nowhere"), text=True, **more)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "A folder of runs whose table is longer than a pipe holds."
    folder = tmp_path_factory.mktemp("many")
    for i in range(1200):
        (folder / f"run-{i}").mkdir()
        (folder / f"run-{i}" / "status.json").write_text(json.dumps({"state": "failed", "error": "x" * 90}))
    return folder


def test_a_pipe_that_is_closed_ends_it_without_a_word(many):
    "`cbnb status | head -1`, also of stderr, and of --help."
    for arguments, lines, statuses in (
        (("status", many), 1, (141,)),
        (("status", many, "--json"), 0, (141,)),
        # argparse passes over what it cannot write
        (("train", "--help"), 0, (0, 141)),
    ):
        process = program(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert all(process.stdout.readline() for _ in range(lines))
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() in statuses
    read, write = os.pipe()
    os.close(read)
    process = program("status", "/nowhere", stdout=write, stderr=write)
    os.close(write)
    assert process.wait() == 141


def test_an_output_that_is_full_or_closed(many):
    with open("/dev/full", "w") as full:
        process = program("status", many, stdout=full, stderr=subprocess.PIPE)
    said = process.stderr.read()
    assert (
        process.wait() == 2 and said.startswith("cbnb status: [Errno 28]") and len(said.splitlines()) == 1
    ), said
    closed = subprocess.run(
        f"exec {sys.executable} -m cbnb.cli status {many} >&-",
        shell=True,
        env=environment("/nowhere"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert closed.returncode == 0 and not closed.stderr, closed.stderr


def test_an_interrupt_ends_it_without_a_word(many, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)

    monkeypatch.setattr("cbnb.run.status.run_rows", interrupted)
    done = forked(lambda: cli.main(["status", str(many)]))
    assert (done.returncode, done.stdout) == (130, "")


def test_the_names_of_a_status_table(tmp_path):
    run = tmp_path / f"evil{EVIL[:-2].replace('/', '')}"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "failed", "error": EVIL + "x" * 9000}))
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(["status", str(tmp_path)]) == 0
    said = out.getvalue()
    assert (
        all(line.isprintable() for line in said.splitlines())
        and "\\x1b]0;owned" in said
        and len(said) < SENTENCE
    )


def test_the_verdicts_of_a_sweep(tmp_path):
    "Names of runs and parameters, values, errors, notes and a plan's entries, each a stranger's."
    run = tmp_path / f"evil{EVIL[:-2].replace('/', '')}"
    run.mkdir()
    (tmp_path / "sweep.json").write_text(json.dumps({"name": EVIL, "runs": [{"dir": EVIL}, EVIL]}))
    (run / "status.json").write_text(json.dumps({"state": "failed", "error": EVIL}))
    (run / "params.json").write_text(json.dumps({"beta_kl": 0.3, "seed": EVIL, EVIL: EVIL}))
    result = {"after": {"exact_match": {EVIL: 1.0}}, "alarms": [{"alarm": EVIL, "text": EVIL}]}
    (run / "result.json").write_text(json.dumps(result))
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(["report", str(tmp_path)]) == 0
    said = out.getvalue()
    assert all(line.isprintable() for line in said.splitlines()) and said.count("\\x1b]0;owned") > 3
    for name in ("report.html", "runs.csv"):
        text = (tmp_path / "report" / name).read_text()
        assert not [c for c in text if not c.isprintable() and c not in "\n\r"], name


def test_what_argparse_refuses():
    "One sentence, whatever stands in it; a notebook of parameters that is broken harms no other command."
    long = "a b " * 500
    for arguments in (
        ["masks"],
        [EVIL],
        ["status", "--no-such" + EVIL],
        ["status", f"--json={long}"],
        ["ablate", "x", f"--l={long}"],
    ):
        with redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = err.getvalue()
        assert ended.value.code == 2 and said.startswith("cbnb") and len(said.splitlines()) == 1, said
        assert said[:-1].isprintable() and len(said) < SENTENCE, said


def test_programs_beside_cbnb_tell_no_argument_whole(capsys):
    "Two folders that are none, of many words each."
    long = ["one two " * 50, "three four " * 40]
    assert report.main(long) == 2
    said = capsys.readouterr().err
    assert (
        len(said.splitlines()) == 2
        and said.count("more characters") == 2
        and not any(word in said for word in long)
    )
    every = [
        call
        for name, tree in sources()
        if name != SAID_BY
        for what, call in calls(tree)
        if what == "run_program"
    ]
    without = [ast.unparse(call.args[0]) for call in every if len(call.args) < 4]
    assert len(every) > 4 and without == ["partial(carry_out, sys.argv[1:] if argv is None else argv)"], (
        without
    )


def test_the_help_of_a_strangers_notebook(tmp_path, monkeypatch):
    "The folder that a command is called in may hold a notebook of anybody's, whose comments are the help."
    (tmp_path / "nbs").mkdir()
    cell = nbformat.v4.new_code_cell(
        "seed: int = 0  # of mine\nmine: int = 0  # a number\x1b[2J\u202e", metadata={"tags": ["parameters"]}
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "nbs" / "train.ipynb")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    said = out.getvalue()
    assert ended.value.code == 0 and "a number\\x1b[2J\\u202e" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_a_broken_notebook_of_parameters_harms_no_other_command(tmp_path, monkeypatch):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "train.ipynb").write_text("{")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        assert cli.main(["status", str(tmp_path)]) == 0 and cli.main(["train", "--seed", "0"]) == 2
    assert "train.ipynb is no readable notebook" in err.getvalue() and len(err.getvalue().splitlines()) == 1
