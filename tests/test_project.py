"""Guards of the project itself: notebooks and modules in step, settings really read, nothing in a commit that
should not be there."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pip
import pytest

from helpers import (
    BIN,
    NBS,
    ROOT,
    code_cells,
    copy_tree,
    default_exp,
    files_of,
    notebooks,
    read,
    run,
    run_notebooks,
)

# also inside a notebook's JSON strings
CONFLICT = re.compile(r'(?:^|\\n)[ \t"]*(?:<{7} |>{7} |={7}(?:\\n)?"?,?$)', re.M)
ADDRESS = re.compile(r"(?:https?:)?//(?!127\.0\.0\.1|localhost)[a-z0-9-]+(?:\.[a-z0-9-]+)+", re.I)
NAMESPACES = ("http://www.w3.org/", "https://www.w3.org/")


def settings(root=ROOT):
    "The settings of settings.ini, read by configparser alone."
    parser = ConfigParser()
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def modules():
    "Exported modules: every .py of the package that nbdev writes for a notebook."
    return [p for p in sorted((ROOT / "cbnb").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]


def source_files():
    "Every file that a commit holds or would hold."
    if not (ROOT / ".git").exists():
        return [ROOT / p for p in files_of(ROOT) if not p.startswith((".venv/", "runs/"))]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [p for name in listed.stdout.decode().split("\0") if name and (p := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(files before, files after, notebooks before, folder) of nbdev_export and nbdev_clean in a copy of the
    sources."""
    copy = copy_tree(tmp_path_factory.mktemp("export") / "cbnb")
    before = files_of(copy)
    for command in ("nbdev_export", "nbdev_clean"):
        result = run(BIN / command, cwd=copy)
        assert result.returncode == 0, result.stdout
    return before, files_of(copy), copy


# --- notebooks and modules ---


def test_default_exp_is_unique():
    names = [name for p in notebooks() if (name := default_exp(p))]
    assert names and len(names) == len(set(names)), (
        f"two notebooks export to one module: {sorted(n for n in names if names.count(n) > 1)}"
    )


def test_every_module_has_its_notebook():
    assert modules(), "no exported module found"
    for module in modules():
        named = re.search(r"File to edit: (\S+\.ipynb)", module.read_text(encoding="utf-8"))
        assert named, f"{module.relative_to(ROOT)} names no notebook: it is not exported by nbdev"
        assert (module.parent / named[1]).exists(), (
            f"{module.relative_to(ROOT)} is stale: its notebook {named[1]} is gone"
        )


def test_every_notebook_has_its_module():
    wanted = {name for p in notebooks() if (name := default_exp(p))}
    there = {".".join(m.relative_to(ROOT / "cbnb").with_suffix("").parts) for m in modules()}
    assert wanted == there


def test_export_and_clean_leave_no_diff(exported):
    before, after, _ = exported
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"run make export: nbdev_export and nbdev_clean change {changed}"


def test_readme_is_made_from_the_index(exported):
    _, _, copy = exported
    result = run(sys.executable, copy / ".ci" / "pages.py", "readme", cwd=copy)
    assert result.returncode == 0, result.stdout
    assert (copy / "README.md").read_text() == (ROOT / "README.md").read_text(), (
        "run make readme: nbs/index.ipynb gives another README.md"
    )


def test_parameters_tag_survives_clean(exported):
    _, _, copy = exported

    def tagged(nbs):
        return {p.relative_to(nbs): [c.metadata.get("tags") for c in code_cells(p)] for p in notebooks(nbs)}

    assert tagged(copy / "nbs") == tagged(NBS)


@pytest.mark.parametrize("path", [NBS / "train.ipynb"], ids=lambda p: p.name)
def test_train_has_one_parameters_cell(path):
    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"papermill needs one cell tagged parameters, found {len(tagged)}"


@pytest.mark.parametrize("path", run_notebooks(), ids=lambda p: p.name)
def test_papermill_reads_every_parameter(path, caplog):
    """A line that it cannot parse is a warning in each run's output, and its `-p` an unknown name; `papermill
    --help-notebook` shows what stands behind it."""
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node

    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    read = _infer_parameters(load_notebook_node(str(path)))
    assert not caplog.records, caplog.text
    assert [p.name for p in read] == [
        n.target.id for c in tagged for n in ast.parse(c.source).body if isinstance(n, ast.AnnAssign)
    ] and all(p.help for p in read)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.name)
def test_notebook_is_fit_to_commit(path):
    nb = read(path)
    assert "widgets" not in nb.metadata, "widget state: run make export"
    assert nb.metadata.kernelspec.name == "python3", (
        "papermill would look for another kernel than the environment's"
    )
    for cell in code_cells(path):
        errors = [o.evalue for o in cell.outputs if o.output_type == "error"]
        assert not errors, f"an error is shown: {errors[0]}"
        views = [o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
        assert not views, "a widget's view without its state: run make export"
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], (
            "what was written to stderr is shown: run make export"
        )


def plain_python(cell):
    "A code cell's syntax tree, without its magics."
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M))


# one's own format, policy or objective is defined in one cell there: that is what they show
ADD_YOUR_OWN = [p for p in run_notebooks() if p.name.startswith("add_")]


@pytest.mark.parametrize("path", [p for p in run_notebooks() if p not in ADD_YOUR_OWN], ids=lambda p: p.name)
def test_run_notebook_defines_nothing(path):
    "What a run notebook defines lives in __main__: pickles and spawned workers cannot find it."
    for cell in code_cells(path):
        defined = [
            n.name
            for n in ast.walk(plain_python(cell))
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]
        assert not defined, f"{defined} belongs into a module notebook"


@pytest.mark.parametrize("path", run_notebooks(), ids=lambda p: p.name)
def test_run_notebook_uses_no_figure_widget(path):
    "A FigureWidget stores megabytes in the output notebook and shows nothing without its kernel."
    for cell in code_cells(path):
        names = {getattr(n, "id", None) or getattr(n, "attr", None) for n in ast.walk(plain_python(cell))}
        imported = {
            a.name for n in ast.walk(plain_python(cell)) if isinstance(n, ast.ImportFrom) for a in n.names
        }
        assert "FigureWidget" not in names | imported


def test_no_conflict_markers():
    files = source_files()
    assert files
    for path in files:
        text = path.read_bytes()
        if b"\0" in text:
            continue
        match = CONFLICT.search(text.decode("utf-8", errors="replace"))
        assert not match or path.suffix == ".md" and match[0].strip().startswith("="), (
            f"{path.relative_to(ROOT)} holds a conflict marker"
        )


def test_conflict_markers_are_recognised():
    for marker in (
        "<" * 7 + " HEAD",
        ">" * 7 + " theirs",
        "=" * 7,
        '    "' + "<" * 7 + ' HEAD\\n",',
        '    "' + "=" * 7 + '\\n",',
    ):
        assert CONFLICT.search(f"a\n{marker}\nb"), marker
    for plain in ("=" * 8, "# " + "=" * 7, "a << b", "=" * 50):
        assert not CONFLICT.search(f"a\n{plain}\nb"), plain


# --- settings, package, versions ---


def test_nbdev_reads_settings_ini(tmp_path):
    """A changed version must reach nbdev and the package: with nbdev 3 or a [project] table settings.ini
    would be decoration."""
    copy = copy_tree(tmp_path / "cbnb")
    path = copy / "settings.ini"
    path.write_text(re.sub(r"^version = .*$", "version = 9.8.7", path.read_text(), flags=re.M))
    program = (
        "from nbdev.config import get_config; c = get_config(); print(c.version, c.lib_path, c.tst_flags)"
    )
    result = run(sys.executable, "-c", program, cwd=copy)
    assert result.stdout.strip().endswith(f"9.8.7 {copy / 'cbnb'} slow cuda net"), result.stdout
    assert run(BIN / "nbdev_export", cwd=copy).returncode == 0
    assert '__version__ = "9.8.7"' in (copy / "cbnb" / "__init__.py").read_text()
    assert run(sys.executable, "setup.py", "--version", cwd=copy).stdout.split()[-1] == "9.8.7"


def test_pyproject_leaves_the_project_to_settings():
    import tomllib

    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system", "tool"}


def locked(name):
    """{canonical name: {version: hashes}} of lock/<name>.txt; every line belongs to a package with hashes,
    and none names a place."""
    from packaging.utils import canonicalize_name

    text = (ROOT / "lock" / f"{name}.txt").read_text()
    entry = r"([\w.-]+)(?:\[[^]]+\])?==(\S+)(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
    rest = re.sub(entry, "", text)
    assert not re.sub(r"#.*\n|-r \w+\.txt\n", "", rest), f"lock/{name}.txt: {rest[:200]}"
    assert not re.search(r"https?://|file:|--(?:extra-)?index|--find-links", text)
    found = {}
    for package, release, hashes in re.findall(entry, text):
        found.setdefault(canonicalize_name(package), {})[release] = hashes.split("--hash=")[1:]
    return found


def test_lock_settings_and_constraints_agree():
    """What a layer of the lock holds meets settings.ini, in the versions of constraints.txt; `make lock`
    after a change of either."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert pins["torch"] == "2.13.0"
    layers = {
        "run": ["requirements"],
        "extras": [
            "pictures_requirements",
            "hf_requirements",
            "agentdojo_requirements",
            "inspect_requirements",
            "real_requirements",
        ],
        "dev": ["dev_requirements"],
    }
    assert {key for keys in layers.values() for key in keys} == {
        key for key in settings() if key.endswith("requirements")
    }
    held = {"torch": locked("cuda")["torch"]}
    for layer, keys in layers.items():
        for name, versions in locked(layer).items():
            held.setdefault(name, {}).update(versions)
        for wanted in (Requirement(text) for key in keys for text in settings()[key].split()):
            versions = held.get(canonicalize_name(wanted.name))
            assert versions, f"{wanted} is missing in lock/{layer}.txt: make lock"
            assert all(wanted.specifier.contains(v) for v in versions), (
                f"{wanted}: lock/{layer}.txt has {list(versions)}: make lock"
            )
    assert not pins.keys() - held.keys() - {"wheel"}, (
        "make lock: constraints.txt names what the lock does not"
    )
    assert not [name for name in held if name in pins and set(held[name]) != {pins[name]}], "make lock"
    assert list(locked("cpu")) == ["torch"] and list(locked("cpu")["torch"]) == [f"{pins['torch']}+cpu"]
    assert list(held["torch"]) == [pins["torch"]] and "nvidia-nccl-cu13" in locked("cuda")
    assert {"uv", "cyclonedx-bom"} <= locked("tools").keys()
    assert not {"resvg-py", "datasets", "pytest", "nbdev"} & locked("run").keys(), "a run needs none of these"


def test_a_torch_that_the_lock_does_not_know_is_refused_in_a_sentence(tmp_path):
    """A place in pip's settings with the CPU build for a Python or system that lock/cpu.txt has no hash of:
    nothing of it is installed, nor all the rest."""
    venv, wheels = tmp_path / "venv", tmp_path / "wheels"
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path).returncode == 0
    packages = next(venv.glob("lib/python3*/site-packages"))
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    wheels.mkdir()
    with zipfile.ZipFile(
        wheels / f"torch-{next(iter(locked('cpu')['torch']))}-py3-none-any.whl", "w"
    ) as wheel:
        wheel.writestr("torch.py", "")
    refused = run(
        ROOT / ".ci" / "venv",
        venv,
        "run",
        cwd=ROOT,
        env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull},
    )
    assert refused.returncode == 1, refused.stdout
    assert refused.stdout.splitlines()[-1].startswith(
        "cbnb: lock/cpu.txt has not the hash of torch 2.13.0+cpu that pip finds here, for Python 3"
    )
    assert (
        "make lock" in refused.stdout
        and "Traceback" not in refused.stdout
        and "tampered" not in refused.stdout
    )
    assert [p.name for p in packages.iterdir()] == ["pip"] and not (venv / ".user").exists()


@pytest.mark.slow
def test_make_sbom_lists_what_is_installed_with_licences(tmp_path):
    "In a copy, by the tools of its own lock, of the environment that runs this."
    copy, venv = copy_tree(tmp_path / "cbnb"), Path(sys.prefix)
    made = run("make", "sbom", f"VENV={venv}", "-o", f"{venv}/.user", cwd=copy)
    assert made.returncode == 0, made.stdout[-3000:]
    bom = json.loads((copy / "sbom.json").read_text())
    parts = {part["name"]: part for part in bom["components"]}
    assert (
        bom["bomFormat"] == "CycloneDX"
        and {"torch", "transformers", "numpy", "pytest"} <= parts.keys()
        and "uv" not in parts
    )
    assert (
        parts["transformers"]["version"] == version("transformers")
        and parts["numpy"]["purl"] == f"pkg:pypi/numpy@{version('numpy')}"
    )
    unlicensed = [name for name, part in parts.items() if not part.get("licenses")]
    # which state none, or have a licence file alone
    assert set(unlicensed) <= {"resvg_py", "agent-client-protocol"}, unlicensed


def test_changelog_names_the_version():
    assert re.search(rf"^## {re.escape(settings()['version'])}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.slow
def test_package_imports_no_development_library():
    """A user of cbnb must not inherit nbdev's old fastcore, nor need an extra. Import every module in a fresh
    process and look at what came with it."""
    program = (
        "import json, pkgutil, sys, importlib, cbnb\n"
        "names = [m.name for m in pkgutil.walk_packages(cbnb.__path__, 'cbnb.') if not "
        "m.name.endswith('__main__')]\n"
        "for name in names: importlib.import_module(name)\n"
        "unwanted = {'fastcore', 'nbdev', 'execnb', 'trl', 'pytest', 'jupyterlab', 'jupyter_server', "
        "'resvg_py'} & {m.split('.')[0] for m in sys.modules}\n"
        "print(json.dumps([names, sorted(unwanted)]))"
    )
    result = run(sys.executable, "-c", program, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    names, unwanted = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(names) >= len(modules()) and not unwanted, unwanted


def test_package_data_asks_no_other_machine():
    """What a browser or a program may load from the package names no address elsewhere; text for readers
    (.md) may."""
    for path in (ROOT / "cbnb").rglob("*"):
        if not path.is_file() or path.suffix in (".py", ".md", ".safetensors", ".pyc"):
            continue
        found = [
            a
            for a in ADDRESS.findall(path.read_text(encoding="utf-8", errors="replace"))
            if not a.startswith(NAMESPACES)
        ]
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


@pytest.mark.slow
def test_an_editable_install_wins_over_a_folder_of_its_name(tmp_path):
    """In the folder that holds a clone named cbnb, Python finds that clone first: a folder without a module,
    which must not be taken for the package."""
    import numpy

    clone, venv = copy_tree(tmp_path / "cbnb"), tmp_path / "venv"
    for command in (
        (sys.executable, "-m", "venv", "--without-pip", venv),
        (
            sys.executable,
            "-m",
            "pip",
            "--python",
            venv / "bin" / "python",
            "install",
            "--quiet",
            "--no-deps",
            "-e",
            clone,
        ),
    ):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:]
    folder = next(venv.glob("lib/python3*/site-packages"))
    # what cbnb needs; that folder's own .pth files are not read
    (folder / "shared.pth").write_text(f"{Path(numpy.__file__).parent.parent}\n")
    env = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    program = (
        "import cbnb, cbnb.basics.places as p, cbnb.run.code as r; print(cbnb.__file__, "
        "p.TINYAGENT.is_dir(), r.code_state()['version'])"
    )
    (elsewhere := tmp_path / "elsewhere" / "cbnb").mkdir(parents=True)
    for where in (tmp_path, elsewhere.parent, elsewhere, clone):
        found = run(venv / "bin" / "python", "-c", program, cwd=where, env=env)
        assert found.stdout.split() == [str(clone / "cbnb" / "__init__.py"), "True", settings()["version"]], (
            where,
            found.stdout,
        )
    assert (
        run(venv / "bin" / "cbnb", "--version", cwd=elsewhere.parent, env=env).stdout.strip()
        == f"cbnb {settings()['version']}"
    )


# --- the tools around the tests ---


def test_a_skip_fails_where_everything_must_run(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_left_out.py").write_text(
        "import pytest\n"
        "def test_skip(): pytest.skip('needs a thing: install it')\n"
        "@pytest.mark.xfail\ndef test_xfail(): assert False\n"
        "def test_fine(): pass\n"
    )
    (tmp_path / "test_module.py").write_text(
        "import pytest\npytest.skip('no module: make one', allow_module_level=True)\n"
    )
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        ".",
    )
    relaxed = run(*command, cwd=tmp_path, env={"CBNB_REQUIRE_ALL": ""})
    assert relaxed.returncode == 0 and "test_skip: needs a thing: install it" in relaxed.stdout, (
        relaxed.stdout
    )
    strict = run(*command, cwd=tmp_path, env={"CBNB_REQUIRE_ALL": "1"})
    assert (
        strict.returncode != 0
        and "needs a thing: install it" in strict.stdout
        and "no module: make one" in strict.stdout
    ), strict.stdout
    assert not re.search("skipped|xfailed", strict.stdout.splitlines()[-1]), strict.stdout


def small_project(folder, bench=None, **sources):
    """A copy of the project's settings and tools with only the given notebooks, one code cell each; `bench`
    is one in nbs/bench/."""
    import nbformat

    (folder / "nbs").mkdir(parents=True)
    (folder / "cbnb").mkdir()
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    shutil.copy(ROOT / "settings.ini", folder)
    for name, source in sources.items():
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]),
            folder / "nbs" / f"{name}.ipynb",
        )
    if bench is not None:
        shutil.copytree(NBS / "bench", folder / "nbs" / "bench", ignore=shutil.ignore_patterns("*.ipynb"))
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(bench)]),
            folder / "nbs" / "bench" / "speed.ipynb",
        )
    return run(sys.executable, ".ci/nbtest.py", cwd=folder)


@pytest.mark.slow
def test_notebook_counts(tmp_path):
    fine = small_project(tmp_path / "fine", a="assert True", b="#| slow\n1/0")
    assert fine.returncode == 0 and "notebooks: 2 passed, 0 failed" in fine.stdout, fine.stdout
    assert "left out: 1 cell(s) marked 'slow' in b.ipynb" in fine.stdout
    timed = small_project(tmp_path / "timed", a="assert True", bench="1/0")
    assert (
        timed.returncode == 0
        and "left out: bench/speed.ipynb" in timed.stdout
        and "notebooks: 1 passed, 0 failed" in timed.stdout
    ), timed.stdout
    failing = small_project(tmp_path / "failing", a="assert True", b="1/0")
    assert failing.returncode == 1 and "failed: b.ipynb\nnotebooks: 1 passed, 1 failed" in failing.stdout, (
        failing.stdout
    )
    dying = small_project(tmp_path / "dying", a="import os; os._exit(3)")
    assert dying.returncode == 1 and "notebooks: 0 passed, 1 failed" in dying.stdout, dying.stdout
    empty = small_project(tmp_path / "empty")
    assert empty.returncode == 1 and "no notebook found" in empty.stdout, empty.stdout


def make(target, folder, *variables, env=None):
    "`make target` with an environment whose Python only says how it was called; returns what it said."
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    fake = venv / "bin" / "python"
    fake.write_text('#!/bin/sh\necho "args: $*"\nenv | grep -E "^(JUPYTER|PYTHON)" | sort\n')
    fake.chmod(0o755)
    (venv / "tools").mkdir(exist_ok=True)
    for stamp in (".user", ".dev", "tools/.done"):
        (venv / stamp).touch()
    result = run("make", target, f"VENV={venv}", *variables, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_make_train_passes_beta_and_guards_the_kernel(tmp_path):
    folder = tmp_path / "run"
    said = make(
        "train",
        tmp_path,
        "BETA_KL=0.1",
        f"RUN_DIR={folder}",
        env={"JUPYTER_PATH": "/somewhere", "PYTHONPATH": "/elsewhere", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (
        f"args: -m papermill nbs/train.ipynb {folder}/out.1.ipynb -p beta_kl 0.1 -p run_dir {folder}" in said
    )
    assert f"args: -m cbnb.report {folder}" in said
    assert (
        "JUPYTER_PREFER_ENV_PATH=1" in said
        and "/somewhere" not in said
        and "/elsewhere" not in said
        and "DONTWRITE" not in said
    )
    assert "-p beta_kl 0.3" in make("train", tmp_path, f"RUN_DIR={folder}")


def test_make_bench_runs_the_benchmarks(tmp_path):
    clean = tmp_path / "venv" / "bin" / "nbdev_clean"
    clean.parent.mkdir(parents=True)
    clean.write_text("#!/bin/sh\necho cleaned\n")
    clean.chmod(0o755)
    said = make("bench", tmp_path)
    benchmarks = sorted(str(p.relative_to(ROOT)) for p in (NBS / "bench").glob("*.ipynb"))
    assert (
        benchmarks
        and all(f"args: -m papermill {p} {p} --cwd nbs/bench\n" in said for p in benchmarks)
        and "cleaned" in said
    )
    said = make("bench", tmp_path, "BENCH=nbs/bench/kl.ipynb", "BENCH_ARGS=-p device cuda")
    assert (
        "args: -m papermill nbs/bench/kl.ipynb runs/bench-kl.ipynb --cwd nbs/bench -p device cuda\n" in said
        and said.count("args: ") == 1
    )


def test_make_lab_listens_on_loopback(tmp_path):
    assert "--ip=127.0.0.1" in make("lab", tmp_path)


def test_environment_prefers_its_own_kernel(tmp_path):
    "A stale user-level python3 kernel must not be what papermill starts."
    stale = tmp_path / "share" / "jupyter" / "kernels" / "python3"
    stale.mkdir(parents=True)
    kernel = {
        "argv": ["/nowhere/python", "-f", "{connection_file}"],
        "display_name": "stale",
        "language": "python",
    }
    (stale / "kernel.json").write_text(json.dumps(kernel))
    program = (
        "from jupyter_client.kernelspec import KernelSpecManager as K; "
        "print(K().get_kernel_spec('python3').resource_dir)"
    )
    env = {"JUPYTER_DATA_DIR": str(tmp_path / "share" / "jupyter"), "JUPYTER_PREFER_ENV_PATH": "1"}
    found = run(sys.executable, "-c", program, cwd=tmp_path, env=env)
    assert Path(found.stdout.strip()).is_relative_to(sys.prefix), found.stdout


def test_formulas_become_mathml():
    sys.path.insert(0, str(ROOT / ".ci"))
    from pages import links_from_root, links_to_pages, math_to_mathml, without_remote_scripts

    assert math_to_mathml("costs $5 and `$x$` or $5") == "costs $5 and `$x$` or $5"
    assert math_to_mathml("an $x_i$ here").startswith("an <math") and "$" not in math_to_mathml(
        "$$\\frac{1}{N}$$ and $T^2$"
    )
    assert (
        links_from_root("[a](masking/06_masker.ipynb#x) [b](../Makefile)")
        == "[a](nbs/masking/06_masker.ipynb#x) [b](Makefile)"
    )
    assert links_from_root("[c](http://a.b/c) [d](#e)") == "[c](http://a.b/c) [d](#e)"
    assert (
        links_to_pages("[a](06_masker.ipynb#x) [b](../bench/b.ipynb)")
        == "[a](06_masker.html#x) [b](../bench/b.html)"
    )
    assert (
        without_remote_scripts('a<script src="https://cdn.x/mathjax/y.js"></script><script>1</script>b')
        == "a<script>1</script>b"
    )


def test_what_is_imported_most_is_offered_at_the_top():
    "Each name is that of its module, and `import cbnb` loads neither torch nor any module of the package."
    program = (
        "import sys, cbnb; print(*[m for m in sys.modules if m == 'torch' or m.startswith('cbnb.')], '|');"
        "from cbnb import *; import importlib;"
        "print(all(globals()[n] is getattr(importlib.import_module('cbnb.' + m), n) for n, m in "
        "cbnb.HOMES.items()), len(cbnb.HOMES))"
    )
    said = run(sys.executable, "-c", program, cwd=ROOT).stdout.split()
    assert said == ["|", "True", "7"], said
