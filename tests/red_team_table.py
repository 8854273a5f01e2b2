"""What was tried against cbnb, and what held: a row for each kind, with the tests that try it and how many
cases they have.

`python tests/red_team_table.py` prints the table from those tests, and with `--write` puts it into
`nbs/red_team.md`; test_red_team.py compares it.
"""

import sys
from pathlib import Path

import fuzz_cli
import hostile
import test_adapters
import test_cli_fuzz
import test_files
import test_kills
import test_lease
import test_loaders
import test_reading
import test_records
import test_withheld

FILE = Path(__file__).resolve().parents[1] / "nbs" / "red_team.md"
HEAD = (
    "<!-- Made by `python tests/red_team_table.py --write`: do not edit. tests/test_red_team.py compares "
    "it. -->\n\n"
)
HEAD += (
    "# Red team\n\n> What was tried against runs and shared folders, what holds, and the test that "
    "tries it\n\n"
)


def rows():
    "`[(what was tried, what holds, tests)]`; a test is `file.py` or `file.py::name` of tests/."
    works = len(
        next(
            mark for mark in test_kills.test_killed_at_any_moment.pytestmark if mark.name == "parametrize"
        ).args[1]
    )
    return [
        (
            f"{len(test_loaders.KINDS)} ways to bring code with a model, tokenizer or adapter",
            "without `trust_remote_code` none runs and nobody is asked; with it they load",
            "test_loaders.py",
        ),
        (
            "two users on one shared folder, sticky and not: a planted sweep with the right key, links at "
            "the place of lock, log and run",
            "refused; the victim's files are as they were",
            "test_lease.py::test_a_folder_of_two_users",
        ),
        (
            f"five processes that want one run, killed at any moment, {len(test_lease.WAYS)} ways: one "
            "namespace, a namespace each, no hard links",
            "never two at once, but for one that was told that it lost its place",
            "test_lease.py::test_never_two_at_once",
        ),
        (
            "a container (`unshare`) that holds a run and dies; a process that is stopped for longer than "
            "its lease",
            "is heard, is waited for; writes nothing more when it goes on",
            "test_lease.py",
        ),
        (
            f"{len(test_withheld.VALUES)} secrets of the environment, printed, raised, logged, in parts and "
            "past the kernel",
            "none is in anything that a run leaves, which only its user can read",
            "test_withheld.py",
        ),
        (
            f"{2 * len(test_records.FILES) * 10} damages of the files of a finished and of a running run",
            "told in that run's row; the rows of the others do not change",
            "test_records.py",
        ),
        (
            "a log to which two attempts have written; parameters of no kind; half a million bad lines",
            "no figures of such a log, the other runs as they were; reading ends after 10,001",
            "test_records.py",
        ),
        (
            f"{len(test_withheld.WRITTEN)} ways to write a secret: JSON, repr, HTML, URL, base64, hex, a "
            "shell's quotes, line ends, one in another",
            "none stays in an executed notebook",
            "test_withheld.py",
        ),
        (
            f"{len(hostile.BOMBS)} chat templates that take over 5 seconds or 512 MiB, and "
            f"{len(hostile.REFUSALS)} that refuse",
            "ended in bounds of time, memory and output, in a process of its own; refused in a sentence",
            "test_templates.py",
        ),
        (
            f"{len(test_reading.NO_FILES)} things that are no regular file, for "
            f"{len(test_reading.COMMANDS)} commands; a million bad records",
            "refused before they are opened; the list ends after 10,001",
            "test_reading.py",
        ),
        (
            "data, model, tokenizer, template, code and library versions changed under a run; a log that "
            "was cut",
            "refused or told; what is missing of the log is counted",
            "test_same.py",
        ),
        (
            f"{len(test_files.COMMANDS)} commands with an output that is an input, a folder, a link, a pipe "
            "or a device; full disks",
            "refused; a full disk names its mount, and nothing is half-made",
            "test_files.py",
        ),
        (
            f"{len(test_adapters.FAIL)} adapters that are not what they say, {len(test_adapters.PASS)} that "
            "are",
            "refused, or taken, by their numbers",
            "test_adapters.py",
        ),
        (
            "ports that are taken by another kernel each time",
            "a run is reached by unix sockets; papermill's own way ends",
            "test_kernels.py",
        ),
        (
            f"{works * 10} random kills of evaluation, report, preparation, encoded and teacher cache",
            "the next attempt makes what an undisturbed one makes, bit for bit",
            "test_kills.py",
        ),
        (
            f"{test_cli_fuzz.LINES} command lines made from the parser, {len(fuzz_cli.parsers()) + 1} "
            "commands; `make fuzz` makes 2,000",
            "no traceback, one sentence, exit status 2; nothing written elsewhere or told whole",
            "test_cli_fuzz.py",
        ),
        (
            "control, direction and invisible characters in names, ids, labels, errors and warnings",
            "made visible by one function",
            "test_terminal.py",
        ),
    ]


def table():
    "The text of `nbs/red_team.md`."
    lines = [f"| {tried} | {holds} | `pytest tests/{test}` |" for tried, holds, test in rows()]
    return HEAD + "\n".join(["| what was tried | what holds | by |", "|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(table())
    else:
        print(table())
