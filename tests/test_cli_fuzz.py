"""Command lines made from the parser itself, see fuzz_cli.py; `make fuzz` runs two thousand."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import fuzz_cli
from forked import forked

LINES = 120


@pytest.mark.slow
def test_lines_of_every_command():
    """No exception leaves the program, what is refused is one sentence, and nothing is written elsewhere,
    obeyed by a terminal, told whole or waited for."""
    lines = list(fuzz_cli.run_lines(26, range(LINES)))
    assert [line["number"] for line in lines] == list(range(LINES))
    bad = [fuzz_cli.told(line) for line in lines if line["found"]]
    assert not bad, "\n".join(bad)
    met = Counter((line["argv"][0], line["status"]) for line in lines if line["argv"])
    assert {name for name, _ in met} >= {*fuzz_cli.parsers(), fuzz_cli.REPORT}, (
        "a command that no line has called"
    )
    assert {status for _, status in met} == {0, 1, 2} and sum(
        n for (_, status), n in met.items() if status < 2
    ) > LINES / 10


def test_the_fuzz_finds_what_it_looks_for():
    assert (
        fuzz_cli.faults(["status"], 0, "fine\n", "")
        == []
        == fuzz_cli.faults(["status", "x"], 2, "", "cbnb status: x is not a folder\n")
    )
    long = "a b " * 100
    for argv, status, out, err in (
        (["status"], "TypeError leaves main", "", ""),
        (["status"], 3, "", ""),
        (["status"], 0, "Traceback (most recent call last)", ""),
        (["status"], 0, "\x1b[31m", ""),
        (["status"], 0, "\u200b", ""),
        (["masks", "--color"], 0, "\x1b[2J", ""),
        (["status"], 2, "", ""),
        (["status"], 2, "", "cbnb: one\ncbnb: two\n"),
        (["status"], 2, "", "usage: x\n"),
        (["status"], 2, "", "cbnb: " + "x " * 2000),
        (["status", f"--x={long}"], 2, "", f"cbnb: {long}\n"),
    ):
        assert fuzz_cli.faults(argv, status, out, err), (argv, status, out, err)
    assert not fuzz_cli.faults(["masks", "--color"], 0, "\x1b[32;1;4mx\x1b[0m", "")


def test_the_fuzz_can_write_nowhere_else(tmp_path):
    (tmp_path / "inside").mkdir()

    def work():
        wrote = {}
        fuzz_cli.shut_in(tmp_path / "inside")
        fuzz_cli.watch(tmp_path / "inside", wrote)
        (tmp_path / "inside" / "x").touch()
        assert wrote == {"inside": True}
        for act in (
            lambda: (tmp_path / "y").touch(),
            lambda: os.replace(tmp_path / "inside" / "x", tmp_path / "y"),
            lambda: os.symlink("a", tmp_path / "y"),
            lambda: open("/dev/zero", "wb"),
            lambda: (tmp_path / "inside").rmdir(),
            lambda: os.truncate(tmp_path / "kept", 0),
        ):
            try:
                act()
            except OSError:
                continue
            return 1
        assert wrote["outside"] == str(tmp_path / "y")

    (tmp_path / "kept").write_text("x")
    done = forked(work)
    assert done.returncode == 0 and (tmp_path / "kept").read_text() == "x", done.stdout


def test_the_target_of_the_makefile(capsys):
    said = subprocess.run(
        ["make", "-n", "fuzz", "LINES=7", "SEED=3"],
        cwd=Path(__file__).parent.parent,
        text=True,
        capture_output=True,
    ).stdout
    assert "tests/fuzz_cli.py 7 3" in said
    assert not fuzz_cli.main(4, 1) and "4 lines of seed 1" in capsys.readouterr().out
