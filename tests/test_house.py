"""What keeps the house open to others: pages that explain what they export, short examples, annotated
functions. Width, imports and types are the part of `make lint` and `make types`."""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

import fastcore
import pytest

from helpers import NBS, ROOT, default_exp, read

sys.path.insert(0, str(ROOT / ".ci"))
import pages as site

PAGES = [
    page for room, *_ in site.ROOMS for page in site.pages_of_room(room) if default_exp(page) is not None
]
WORDS = 3  # of prose, per statement that a page exports
LINES = 25  # of a cell; a single definition may take more
LONG_FUNCTION = 60  # lines, with its docstring


def name_of(page):
    "A page as `room/NN_name`."
    return str(page.relative_to(NBS).with_suffix(""))


def code_of(page):
    "`(source, exported)` of each code cell of a page, magics left out."
    for cell in read(page).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            yield cell.source, bool(re.search(r"^#\s*\|\s*export", cell.source, re.M))


def tree_of(source):
    "The syntax tree of a cell; where IPython alone can read it, lines of magics stand as `pass`."
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))


def is_text(node):
    "Whether a statement is a docstring or another lone string."
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def statements(source):
    """How many statements Python source has, imports and docstrings left out: lines of code, but a formatter
    does not change it."""
    nodes = [node for node in ast.walk(tree_of(source)) if isinstance(node, ast.stmt)]
    return sum(not isinstance(node, (ast.Import, ast.ImportFrom)) and not is_text(node) for node in nodes)


def test_the_ids_of_cells_differ():
    "By them export names its cells, and a merge knows them; nbformat would mend the second of two unasked."
    for path in sorted(NBS.rglob("*.ipynb")):
        ids = Counter(cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
        assert max(ids.values()) == 1, (path.name, [name for name, n in ids.items() if n > 1])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_explains_what_it_exports(page):
    words = sum(len(cell.source.split()) for cell in read(page).cells if cell.cell_type == "markdown")
    exported = sum(statements(source) for source, is_export in code_of(page) if is_export)
    assert words >= WORDS * exported, f"{words} words for {exported} statements"


def is_definition(source):
    "Whether a cell is one function or class, with what is imported or decorated."
    body = [node for node in tree_of(source).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return len(body) == 1 and isinstance(body[0], (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_cells_fit_a_screen(page):
    long = [
        source.splitlines()[:3]
        for source, _ in code_of(page)
        if len(source.splitlines()) > LINES and not is_definition(source)
    ]
    assert not long, f"{len(long)} of more than {LINES} lines: {long[:3]}"


def functions(tree):
    "Public functions and methods at the top of a module."
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        yield from (f for f in inner if isinstance(f, ast.FunctionDef) and not f.name.startswith("_"))


def is_annotated(function):
    "Whether all parameters and the return of a function have annotations."
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    named = [a for a in named if a is not None and a.arg not in ("self", "cls")]
    return function.returns is not None and all(a.annotation is not None for a in named)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_public_functions_are_annotated(page):
    path = ROOT / "cbnb" / f"{default_exp(page).replace('.', '/')}.py"
    bare = [f.name for f in functions(ast.parse(path.read_text(encoding="utf-8"))) if not is_annotated(f)]
    assert not bare, f"without annotations: {' '.join(bare)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_functions_and_classes_have_docstrings(page):
    "Seen once: a docstring in parentheses, which Python takes for an expression without effect."
    path = ROOT / "cbnb" / f"{default_exp(page).replace('.', '/')}.py"
    top = ast.parse(path.read_text(encoding="utf-8")).body
    nodes = [node for node in top if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    bare = [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare, f"without a docstring: {' '.join(bare)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_functions_fit_a_screen(page):
    long = [
        f"{node.name} {node.end_lineno - node.lineno + 1}"
        for source, is_export in code_of(page)
        if is_export
        for node in ast.walk(tree_of(source))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONG_FUNCTION
    ]
    assert not long, f"functions of more than {LONG_FUNCTION} lines: {', '.join(long)}"


PARTICIPLES = set(
    "told found kept said made seen given known held taken shown written begun done gone met sent meant left "
    "drawn chosen bought brought built caught driven fallen felt forgotten grown heard hidden lost paid "
    "risen spoken spent stolen stuck taught thrown torn understood woken won worn".split()
)
NOUNS = {"seed", "need", "feed", "speed", "thought"}


def bound_names(tree):
    "Every name that functions, classes, parameters and assignments of a module bind, as often as they do."
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def participles(folder):
    "Participles among the names that the modules below `folder` bind, and all of these names."
    names = [
        name.strip("_")
        for path in folder.rglob("*.py")
        if not path.name.startswith("_")
        for name in bound_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    ends = re.compile(r"[a-z]{2,}[^e]ed")
    return [n for n in names if n not in NOUNS and (n in PARTICIPLES or ends.fullmatch(n))], names


def test_participles_are_as_rare_as_in_fastcore():
    "`found` and `kept` say how a value came about, not what it is; a noun does."
    (ours, names), (theirs, all_of_theirs) = map(participles, (ROOT / "cbnb", Path(fastcore.__file__).parent))
    assert len(ours) / len(names) <= len(theirs) / len(all_of_theirs), Counter(ours).most_common(20)
