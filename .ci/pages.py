"""Pages from the notebooks, without quarto and without a network.

pages.py readme      README.md from nbs/index.ipynb
pages.py parameters  the parameters cells of the notebooks from the declarations of cbnb.config
pages.py tables      the tables of nbs/reference/ and nbs/explanation/ from the notebooks and declarations
pages.py docs        a static site of all notebooks and Markdown pages in _docs/
pages.py strip       remove from the notebooks themselves: widget state (megabytes, and useless without its
                     kernel), progress bars, and what was written to stderr (with this machine's paths)
"""

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit that notebook, not this file. -->\n\n"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDTH = 110  # columns of the parameters cells
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)
BAR = re.compile(r"\d+%\|.*\| \d+/\d+ \[")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


# The rooms of the package in reading order, which is also the order of imports: no page needs a later one.
# (folder of nbs/ and cbnb/, or a page at the top; title; what it is for)
ROOMS = (
    (
        "basics",
        "Basics",
        "Read and write files, talk to a terminal, agree among processes: what every other room stands on.",
    ),
    (
        "transcripts",
        "Transcripts",
        "Read conversations of many formats as one record, and hold some of them out.",
    ),
    ("testing", "Specimens", "Build small tokenizers, templates and conversations for examples and tests."),
    ("masking", "Masks", "Turn a conversation into tokens, and decide which of them count and why."),
    (
        "config",
        "Config",
        "Hold every setting of a run in one frozen record, with presets and the schedule of the terms.",
    ),
    (
        "step",
        "The step",
        "Compute reroute, retain and KL from one set of weights that is student and teacher at once.",
    ),
    ("data", "Data", "Name, convert and mark data, and mix them into two streams of batches."),
    ("run", "A run", "Start a run with strict parameters, and keep everything it makes in one directory."),
    ("report", "Report", "Draw a run, compare the runs of a sweep, and state verdicts with their intervals."),
    ("train", "Training", "Train the adapter, watch it by alarms, stop and resume, and describe the result."),
    (
        "evaluate",
        "Evaluation",
        "Generate answers, read and score them, and measure how far the student left its teacher.",
    ),
    ("sft", "The agent stage", "Fine-tune a pretrained model on transcripts, so that it calls tools at all."),
    ("agent", "Agents", "Let a model act with tools, turn after turn, and measure what it has done."),
    (
        "attacks",
        "Attacks",
        "Attack a breaker where an attacker may, count what that costs, and say only what a control allows.",
    ),
    ("sweep", "Sweeps", "Turn one file into checked runs, and start each of them once, here or by SLURM."),
    ("preflight", "Pre-flight", "Review a run on its own model and data before a GPU hour is spent."),
    (
        "widgets",
        "Views",
        "Look at masks, at the KL of every token, at every answer, and at a run or a sweep.",
    ),
    ("cli", "Command line", "Offer the same functions as commands."),
)
# The parts of the site. An entry is a page or a pattern of pages below nbs/, or (title, entries). The rooms
# follow at the end.
PARTS = (
    ("Tutorial", ("start.ipynb", "tutorial.ipynb")),
    (
        "How-to",
        (
            "howto/data.ipynb",
            "howto/add_format.ipynb",
            "howto/add_policy.ipynb",
            "howto/model.md",
            "howto/office.md",
            "howto/inspect.md",
            "howto/cluster.md",
            "howto/report.ipynb",
            "howto/add_objective.ipynb",
            "howto/add_view.ipynb",
            "howto/agentdojo.md",
            "howto/attack.md",
            "howto/look.md",
            "howto/wrong.md",
            (
                "Notebooks to run",
                (
                    "agent.ipynb",
                    "preflight.ipynb",
                    "train.ipynb",
                    "evaluate.ipynb",
                    "chat.ipynb",
                    "report.ipynb",
                    "explore_masks.ipynb",
                    "explore_kl.ipynb",
                    "explore_answers.ipynb",
                ),
            ),
        ),
    ),
    (
        "Reference",
        (
            "reference/parameters.md",
            "reference/run_directory.md",
            "reference/commands.md",
            "reference/policies.md",
            "reference/modules.md",
            "slurm/README.md",
            "examples/README.md",
            "CONTRIBUTING.md",
            "style.md",
            ("Measured", ("masks_outside.md", "real_sources.md", "red_team.md", "bench/*.ipynb")),
        ),
    ),
    (
        "Explanation",
        (
            "explanation/method.md",
            "explanation/results.md",
            "explanation/methods.ipynb",
            "explanation/cost.md",
        ),
    ),
)
BESIDE = ("slurm/README.md", "CONTRIBUTING.md")  # pages of the site that stand beside nbs/


def place(path):
    "The path of the page `path` on the site, as a PurePath from its root."
    return path.relative_to(NBS if path.is_relative_to(NBS) else ROOT)


def pages_in(entry):
    "Paths of the pages that an entry of `PARTS` names, in order."
    if not isinstance(entry, str):
        return [page for inner in entry[1] for page in pages_in(inner)]
    return [ROOT / entry] if entry in BESIDE else sorted(NBS.glob(entry))


def pages_of_room(room):
    "Paths of the notebooks of a room of `ROOMS`, by their number."
    return [
        page for page in (NBS / f"{room}.ipynb",) if page.exists() and not (NBS / room).exists()
    ] or sorted((NBS / room).glob("*.ipynb"))


def pages():
    """Paths of all pages in reading order: the start page, the parts, the rooms; what is in none of them
    comes last."""
    ordered = [
        NBS / "index.ipynb",
        *(page for part in PARTS for page in pages_in(part)),
        *(page for room, *_ in ROOMS for page in pages_of_room(room)),
    ]
    found = {
        p
        for kind in ("*.ipynb", "*.md")
        for p in NBS.rglob(kind)
        if not any(part[0] in "._" for part in place(p).parts)
    }
    return [p for p in dict.fromkeys(ordered) if p in found or p.exists()] + sorted(found - set(ordered))


def notebooks():
    "Paths of all notebooks below nbs/, in reading order."
    return [p for p in pages() if p.suffix == ".ipynb"]


def head(path):
    "`(title, sentence)` of a page: its first heading, and the quoted sentence below that or an empty text."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(
            "".join(c["source"]) for c in json.loads(text)["cells"][:2] if c["cell_type"] == "markdown"
        )
    title = re.search(r"^# (.+)$", text, re.M)
    if not title:
        sys.exit(f"{path.relative_to(ROOT)} has no title: begin it with a line such as '# Masks'")
    quoted = re.search(r"^# .+\n+((?:>.*\n?)+)", text, re.M)
    return title[1].strip(), " ".join(re.sub(r"^> ?", "", quoted[1], flags=re.M).split()).rstrip(
        "."
    ) if quoted else ""


def nav():
    """The site's navigation, as mkdocs takes it: the start page, the four parts, and the rooms as parts of
    the explanation."""

    def named(page):
        return {head(page)[0]: str(place(page))}

    def section(title, entries):
        return {
            title: [
                item
                for entry in entries
                for item in (
                    [named(page) for page in pages_in(entry)] if isinstance(entry, str) else [section(*entry)]
                )
            ]
        }

    rooms = [{title: [named(page) for page in pages_of_room(room)]} for room, title, _ in ROOMS]
    parts = [section(*part) for part in PARTS]
    parts[-1]["Explanation"] += rooms
    return [{"Start": "index.ipynb"}, *parts]


def on_config(config):
    "Give mkdocs the navigation: it calls this hook once its settings are read."
    config["nav"] = nav()
    return config


def default_exp(path):
    """The module that the notebook `path` exports to, with the package's name in front; None for a notebook
    without one."""
    named = re.search(r"#\s*\|\s*default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
    return f"cbnb.{named[1]}" if named else None


def link(page, table):
    "A Markdown link to `page` from the page `table`."
    return f"[{head(page)[0]}]({posixpath.relpath(page, table.parent)})"


def module_table(path):
    "Rows of every module in reading order: its name, its notebook, what it is for."
    rows = [
        f"| `{module}` | {link(page, path)} | {head(page)[1]} |"
        for room, *_ in ROOMS
        for page in pages_of_room(room)
        if (module := default_exp(page))
    ]
    return ["| module | notebook | |", "|---|---|---|", *rows]


def room_list(path):
    "The rooms in reading order: title, what it is for, and its pages."
    return [
        line
        for i, (room, title, sentence) in enumerate(ROOMS, 1)
        for line in (
            f"{i}. **{title}** (`cbnb.{room}`). {sentence}<br>",
            "   " + " · ".join(link(page, path) for page in pages_of_room(room)),
        )
    ]


def declarations():
    "The parameters of each notebook, as `cbnb.config` declares them, and the titles of their groups."
    sys.path.insert(0, str(ROOT))
    from cbnb.config import GROUPS, NOTEBOOK_PARAMETERS

    return NOTEBOOK_PARAMETERS, GROUPS


def parameter_lines(declared):
    """The lines of a parameters cell for one parameter: its declaration with as much behind it as fits, and
    the rest as a comment above. What papermill reads stands behind, so it may hold no equals sign."""
    from cbnb.config import notebook_type, sentences

    default = declared.default
    value = json.dumps(default, ensure_ascii=False) if isinstance(default, str) else repr(default)
    line = f"{declared.name}: {notebook_type(declared)} = {value}  # {declared.meaning}"
    _, *above = sentences(declared)
    if len(line) > WIDTH or "=" in declared.meaning:
        sys.exit(f"the meaning of {declared.name} does not fit behind it, or has an equals sign: {line}")
    while above and len(f"{line}; {above[0]}") <= WIDTH and "=" not in above[0]:
        line = f"{line}; {above.pop(0)}"
    comment = textwrap.wrap(
        "; ".join(above),
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*comment, line]


def parameters_cell(name):
    "The source of the parameters cell of the notebook `name`: its parameters in their groups."
    parameters, groups = declarations()
    blocks = []
    for group, title in groups.items():
        lines = [line for d in parameters[name].values() if d.group == group for line in parameter_lines(d)]
        if lines:
            blocks.append("\n".join([f"# --- {title} ---", *lines]))
    return "\n\n".join(blocks)


def write_cells():
    "Write the parameters cell of each notebook that is declared; the cell keeps its id and its tag."
    for name in declarations()[0]:
        path = NBS / f"{name}.ipynb"
        nb = json.loads(path.read_text(encoding="utf-8"))
        (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", ())]
        source = parameters_cell(name)
        if "".join(cell["source"]) != source:
            cell["source"] = source.splitlines(keepends=True)
            write(path, json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
            print(f"wrote the parameters of {path.relative_to(ROOT)}")


def parameter_table(path):
    "Rows of the parameters of train.ipynb, a table for each group: name, type, default, limits, meaning."
    parameters, groups = declarations()
    from cbnb.config import limits_in_words, notebook_kind

    def row(d):
        default = "" if d.default is None else "empty" if d.default == "" else f"`{d.default!r}`"
        words = "; ".join(text for text in (d.meaning, d.unset, d.more) if text)
        cells = (f"`{d.name}`", notebook_kind(d), default, limits_in_words(d.limits), words)
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    lines = []
    for group, title in groups.items():
        if rows := [row(d) for d in parameters["train"].values() if d.group == group]:
            head = ["| name | type | default | limits | |", "|---|---|---|---|---|"]
            lines += [*([""] if lines else []), f"## {title}", "", *head, *rows]
    return lines


TABLES = {
    "reference/modules.md": module_table,
    "reference/parameters.md": parameter_table,
    "explanation/method.md": room_list,
}
MARK = re.compile(r"(<!-- table: made by `make export` -->\n\n).*?(\n\n<!-- end of table -->)", re.S)


def with_table(name):
    "The text of the page `name` of `TABLES` with its table as the notebooks are now."
    path = NBS / name
    lines = "\n".join(TABLES[name](path))
    text, n = MARK.subn(lambda m: m[1] + lines + m[2], path.read_text(encoding="utf-8"))
    if n != 1:
        sys.exit(f"nbs/{name} wants one table between its two comments, and has {n}")
    return text


def without_directives(nb):
    """Drop what is nbdev's and not the reader's: hidden and default_exp cells, raw cells, `#|` lines,
    quarto's `:::` fences."""
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "raw":
            continue
        if cell.cell_type == "code":
            if re.search(r"^#\s*\|\s*(hide|default_exp)\b", cell.source, re.M):
                continue
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            if not cell.source:
                continue
        else:
            cell.source = re.sub(r"^:::.*$\n?", "", cell.source, flags=re.M)
        cells.append(cell)
    nb.cells = cells
    # nbdev_clean removes it; without it code is shown uncoloured
    nb.metadata.language_info = {"name": "python"}
    return nb


def links_from_root(source):
    "Rewrite the relative links of nbs/index.ipynb so that they hold in README.md, one folder up."

    def fix(match):
        return f"]({posixpath.normpath(posixpath.join('nbs', match[1]))})"

    return re.sub(r"\]\((?![a-z]+:|#|/)([^)\s]+)\)", fix, source)


def readme_text():
    """The text of README.md: the index notebook with outputs as text, since a README can show neither HTML
    nor scripts."""
    from nbconvert import MarkdownExporter

    nb = without_directives(nbformat.read(NBS / "index.ipynb", as_version=4))
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = links_from_root(cell.source)
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data = {k: v for k, v in output.data.items() if k in ("text/markdown", "text/plain")}
    body, _ = MarkdownExporter().from_notebook_node(nb)
    return NOTE + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def write(path, text):
    "Write under a temporary name, then rename."
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def math_to_mathml(source):
    "Formulas as MathML, which browsers draw without a script; code spans and fences are left alone."
    from latex2mathml.converter import convert

    def inline(match):
        return convert(match[1])

    def block(match):
        return "\n" + convert(" ".join(match[1].split()), display="block") + "\n"

    parts = CODE.split(source)
    for i in range(0, len(parts), 2):
        text = re.sub(r"\$\$(.+?)\$\$", block, parts[i], flags=re.S)
        parts[i] = re.sub(r"(?<![\\$\w])\$(?![\s$])([^$\n]*?[^\s\\$])\$(?![\w$])", inline, text)
    return "".join(parts)


def links_to_pages(source):
    "Links from one notebook to another page become links from one page of the site to another."

    def fix(match):
        return f"]({re.sub('README$', 'index', match[1])}.html{match[2] or ''})"

    return re.sub(r"\]\((?![a-z]+:)([^)\s#]+)\.(?:ipynb|md)(#[^)\s]*)?\)", fix, source)


def links_beside(source, page):
    "Links of `page` that cross the edge of nbs/ become links between places on the site."

    def fix(match):
        target = Path(os.path.normpath(page.parent / match[1]))
        crosses = page.is_relative_to(NBS) != target.is_relative_to(NBS)
        return (
            f"]({posixpath.relpath(place(target), place(page).parent)}"
            if crosses and target.exists()
            else match[0]
        )

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s#]+)", fix, source)


def without_remote_scripts(html):
    """Drop the scripts for formulas and diagrams that exporters and plotly put in: from another machine, and
    needed by no page."""
    html = re.sub(
        r"<!-- MathJax configuration -->.*?<!-- End of mathjax configuration -->", "", html, flags=re.S
    )
    html = re.sub(r"<script src=\\?[\"'][^>]*mathjax[^>]*>\s*</script>", "", html, flags=re.I)
    return re.sub(
        r"<script type=\"module\">(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>",
        "",
        html,
        flags=re.S,
    )


def external_loads(page):
    "Addresses that opening this page, style sheet or notebook output would load from another machine."
    text = page.read_text(encoding="utf-8", errors="replace")
    if page.suffix == ".css":
        return re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", text)
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*>", text)
    tags = [t for t in tags if not re.search(r"rel=[\"']?(canonical|alternate|next|prev)", t)]
    known = re.findall(r"https?://[a-z.]*(?:cdnjs|jsdelivr|unpkg|googleapis|gstatic)\.[^\"'\s]+", text)
    return known + [a for t in tags for a in re.findall(r"(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", t)]


def docs():
    "Build the site; an address that a page would load from elsewhere is an error."
    shutil.rmtree(PROC, ignore_errors=True)
    for path in pages():
        target = PROC / place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":  # mkdocs itself follows the links of these
            write(target, math_to_mathml(links_beside(path.read_text(encoding="utf-8"), path)))
            continue
        nb = without_directives(nbformat.read(path, as_version=4))
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = math_to_mathml(links_to_pages(links_beside(cell.source, path)))
        nbformat.write(nb, target)
    shutil.copy(ROOT / ".ci" / "site.css", PROC / "site.css")
    for folder in ("pictures", "examples"):
        shutil.copytree(
            NBS / folder, PROC / folder, ignore=shutil.ignore_patterns("*.ipynb", "*.md"), dirs_exist_ok=True
        )
    # the trees of HTML that it builds are no garbage: looking for some takes a fifth of the time
    mkdocs = "import gc; gc.set_threshold(200_000, 50, 100); from mkdocs.__main__ import cli; cli()"
    subprocess.run(
        [sys.executable, "-c", mkdocs, "build", "--clean", "--quiet", "-f", str(ROOT / ".ci" / "mkdocs.yml")],
        check=True,
        # its theme announces an end of life at every build
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    for page in SITE.rglob("*.html"):
        write(page, without_remote_scripts(page.read_text(encoding="utf-8")))
    found = {p: external_loads(p) for p in SITE.rglob("*") if p.suffix in (".html", ".css")}
    bad = [f"{p.relative_to(ROOT)}: {a}" for p, addresses in found.items() for a in addresses]
    if bad:
        sys.exit("these pages would load from another machine:\n  " + "\n  ".join(sorted(set(bad))))
    print(f"{len(list(SITE.rglob('*.html')))} pages; open {SITE.relative_to(ROOT)}/index.html")


def is_progress(output):
    "Whether an output is a progress bar of tqdm, as plain text or beside a widget."
    return bool(BAR.search("".join(output.get("data", {}).get("text/plain", ""))))


def strip():
    """Remove widget state, the views that need it, and progress bars from every notebook: nbdev_clean keeps
    all of them. Text or HTML beside a view stays."""
    for path in notebooks():
        nb = json.loads(path.read_text(encoding="utf-8"))
        found = nb["metadata"].pop("widgets", None)
        for cell in nb["cells"]:
            shown = [o for o in cell.get("outputs", []) if o.get("name") != "stderr" and not is_progress(o)]
            found = found or len(shown) < len(cell.get("outputs", []))
            for output in shown:
                found = output.get("data", {}).pop(WIDGET_VIEW, None) or found
            if "outputs" in cell:
                cell["outputs"] = shown
        if found:
            write(path, json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
            print(f"removed widget state or stderr from {path.relative_to(ROOT)}")


if __name__ == "__main__":
    tasks = {
        "readme": lambda: write(ROOT / "README.md", readme_text()),
        "docs": docs,
        "strip": strip,
        "parameters": write_cells,
        "tables": lambda: [write(NBS / name, with_table(name)) for name in TABLES],
    }
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        sys.exit(f"usage: pages.py {'|'.join(tasks)}")
    tasks[sys.argv[1]]()
