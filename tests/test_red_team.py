"""The table of what was tried (nbs/red_team.md) says what the tests do."""

import ast

from helpers import ROOT
from red_team_table import FILE, rows, table


def test_the_table_is_of_these_tests():
    assert FILE.read_text() == table(), "python tests/red_team_table.py --write"


def test_its_commands_run_something():
    for *_, test in rows():
        file, _, name = test.partition("::")
        defined = {
            node.name
            for node in ast.parse((ROOT / "tests" / file).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert name in defined if name else any(n.startswith("test_") for n in defined), test
