"""Pages from the notebooks, without quarto and without a network.

    pages.py readme    README.md from nbs/index.ipynb
    pages.py docs      a static site of all notebooks in _docs/
    pages.py strip     remove from the notebooks themselves: widget state (megabytes, and useless without its kernel) and what was written
                       to stderr (progress, warnings with this machine's paths)
"""
import json, os, posixpath, re, shutil, subprocess, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, PROC, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit that notebook, not this file. -->\n\n"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.M)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)


def notebooks():
    "Paths of all notebooks below nbs/, in reading order."
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def without_directives(nb):
    "Drop what is nbdev's and not the reader's: hidden and default_exp cells, raw cells, `#|` lines, quarto's `:::` fences."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "raw": continue
        if cell.cell_type == "code":
            if re.search(r"^#\s*\|\s*(hide|default_exp)\b", cell.source, re.M): continue
            cell.source = DIRECTIVE.sub("", cell.source).strip()
            if not cell.source: continue
        else:
            cell.source = re.sub(r"^:::.*$\n?", "", cell.source, flags=re.M)
        cells.append(cell)
    nb.cells = cells
    nb.metadata.language_info = {"name": "python"}         # nbdev_clean removes it; without it code is shown uncoloured
    return nb


def links_from_root(source):
    "Rewrite the relative links of nbs/index.ipynb so that they hold in README.md, one folder up."
    def fix(match): return f"]({posixpath.normpath(posixpath.join('nbs', match[1]))})"
    return re.sub(r"\]\((?![a-z]+:|#|/)([^)\s]+)\)", fix, source)


def readme_text():
    "The text of README.md: the index notebook with outputs as text, since a README can show neither HTML nor scripts."
    from nbconvert import MarkdownExporter
    nb = without_directives(nbformat.read(NBS / "index.ipynb", as_version=4))
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = links_from_root(cell.source)
        for output in cell.get("outputs", []):
            if "data" in output: output.data = {k: v for k, v in output.data.items() if k in ("text/markdown", "text/plain")}
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
    def inline(match): return convert(match[1])
    def block(match): return "\n" + convert(" ".join(match[1].split()), display="block") + "\n"
    parts = CODE.split(source)
    for i in range(0, len(parts), 2):
        text = re.sub(r"\$\$(.+?)\$\$", block, parts[i], flags=re.S)
        parts[i] = re.sub(r"(?<![\\$\w])\$(?![\s$])([^$\n]*?[^\s\\$])\$(?![\w$])", inline, text)
    return "".join(parts)


def links_to_pages(source):
    "Links from one notebook to another become links from one page to another."
    return re.sub(r"\]\((?![a-z]+:)([^)\s#]+)\.ipynb(#[^)\s]*)?\)", lambda m: f"]({m[1]}.html{m[2] or ''})", source)


def without_remote_scripts(html):
    "Drop the scripts for formulas and diagrams that exporters and plotly put in: from another machine, and needed by no page."
    html = re.sub(r"<!-- MathJax configuration -->.*?<!-- End of mathjax configuration -->", "", html, flags=re.S)
    html = re.sub(r"<script src=\\?[\"'][^>]*mathjax[^>]*>\s*</script>", "", html, flags=re.I)
    return re.sub(r"<script type=\"module\">(?:(?!</script>).)*mermaid(?:(?!</script>).)*</script>", "", html, flags=re.S)


def external_loads(page):
    "Addresses that opening this page, style sheet or notebook output would load from another machine."
    text = page.read_text(encoding="utf-8", errors="replace")
    if page.suffix == ".css": return re.findall(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", text)
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|audio)\b[^>]*>", text)
    tags = [t for t in tags if not re.search(r"rel=[\"']?(canonical|alternate|next|prev)", t)]
    known = re.findall(r"https?://[a-z.]*(?:cdnjs|jsdelivr|unpkg|googleapis|gstatic)\.[^\"'\s]+", text)
    return known + [a for t in tags for a in re.findall(r"(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", t)]


def docs():
    "Build the site; an address that a page would load from elsewhere is an error."
    shutil.rmtree(PROC, ignore_errors=True)
    for path in notebooks():
        nb = without_directives(nbformat.read(path, as_version=4))
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = math_to_mathml(links_to_pages(cell.source))
        target = PROC / path.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    shutil.copy(ROOT / ".ci" / "site.css", PROC / "site.css")
    for folder in ("pictures", "examples"): shutil.copytree(NBS / folder, PROC / folder, ignore=shutil.ignore_patterns("*.ipynb"), dirs_exist_ok=True)
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--clean", "--quiet", "-f", str(ROOT / ".ci" / "mkdocs.yml")], check=True,
                   env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})         # its theme announces an end of life at every build
    for page in SITE.rglob("*.html"): write(page, without_remote_scripts(page.read_text(encoding="utf-8")))
    found = {p: external_loads(p) for p in SITE.rglob("*") if p.suffix in (".html", ".css")}
    bad = [f"{p.relative_to(ROOT)}: {a}" for p, addresses in found.items() for a in addresses]
    if bad: sys.exit("these pages would load from another machine:\n  " + "\n  ".join(sorted(set(bad))))
    print(f"{len(list(SITE.rglob('*.html')))} pages; open {SITE.relative_to(ROOT)}/index.html")


def strip():
    "Remove widget state and the views that need it from every notebook: nbdev_clean keeps both. Text or HTML beside a view stays."
    for path in notebooks():
        nb = json.loads(path.read_text(encoding="utf-8"))
        found = nb["metadata"].pop("widgets", None)
        for cell in nb["cells"]:
            shown = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
            found = found or len(shown) < len(cell.get("outputs", []))
            for output in shown: found = output.get("data", {}).pop(WIDGET_VIEW, None) or found
            if "outputs" in cell: cell["outputs"] = shown
        if found:
            write(path, json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True) + "\n")
            print(f"removed widget state or stderr from {path.relative_to(ROOT)}")


if __name__ == "__main__":
    tasks = {"readme": lambda: write(ROOT / "README.md", readme_text()), "docs": docs, "strip": strip}
    if len(sys.argv) != 2 or sys.argv[1] not in tasks: sys.exit(f"usage: pages.py {'|'.join(tasks)}")
    tasks[sys.argv[1]]()
