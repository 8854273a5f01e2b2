"""What several tests share: where the sources are, and a throw-away copy of them."""

import os
import shutil
import socket
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
# texts of a stranger that must not run, hide or colour anything in a page or a terminal
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<!--",
    "\u202egnol",
    "\x1b[31m",
    "a\u200bb",
    "&lt;b&gt;",
]
# what an agent may have printed: keys that are known by their beginning, and one of the environment
KEYS = {
    "hub": "hf_" + "Zq7Rt2Lm9Xv" * 3,
    "service": "sk-proj-" + "Zq7Rt2Lm9Xv" * 3,
    "cloud": "AKIA" + "ZQ7RT2LM9XVB4KWP",
    "environment": "9f2c7be01d4a8836aa",
}
NOT_SOURCE = (
    ".git",
    ".venv",
    ".cache",
    ".pytest_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    "__pycache__",
    "runs",
    "build",
    "dist",
    "_docs",
    "_proc",
    "*.egg-info",
    "out*.ipynb",
    "*.part",
)


def copy_tree(target):
    "Copy the sources (not the environment, runs or builds) into the new folder `target`; returns it."
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_SOURCE)))


def files_of(folder):
    "{path relative to folder: bytes} of every source file below it."
    skip = {"__pycache__", ".ipynb_checkpoints"}
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not skip & set(p.parts)
    }


def environment(runs, **more):
    "This environment with a runs folder, without SLURM's variables."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    return (
        clean
        | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "CBNB_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
        | {k: str(v) for k, v in more.items()}
    )


def run(*command, cwd, env=None, timeout=600):
    """Run a command to its end; returns the CompletedProcess with stdout and stderr together as text in
    `.stdout`."""
    environment = (
        os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | (env or {})
    )
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment,
        timeout=timeout,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def free_port():
    "A TCP port of this machine that nothing listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def notebooks(nbs=NBS):
    """Paths of the notebooks below nbs/, in order; without those that nbdev ignores (a name or folder with .
    or _ in front)."""
    return [
        p
        for p in sorted(nbs.rglob("*.ipynb"))
        if not any(part[0] in "._" for part in p.relative_to(nbs).parts)
    ]


def read(path):
    "A notebook."
    return nbformat.read(path, as_version=4)


def code_cells(path):
    "The code cells of the notebook at `path`."
    return [c for c in read(path).cells if c.cell_type == "code"]


def default_exp(path):
    "The module that a notebook exports to, or None for a run notebook."
    for cell in code_cells(path):
        for line in cell.source.splitlines():
            words = line.replace("#|", "# |").split()
            if words[:3] == ["#", "|", "default_exp"]:
                return words[3]
    return None


def run_notebooks(nbs=NBS):
    "The notebooks that papermill runs: those that export nothing, but for the README's and the benchmarks."
    return [
        p
        for p in notebooks(nbs)
        if default_exp(p) is None and p.name != "index.ipynb" and p.parent.name != "bench"
    ]


@contextmanager
def quick_bfloat16():
    """Inside, a CPU takes products of bfloat16 matrices in float32 and rounds them once, as hardware that has
    bfloat16 does. One that has not goes element by element, five to twenty times slower."""
    import torch

    def product(a, b):
        # another overload: not this one
        if a.dtype != torch.bfloat16:
            return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
        return torch.mm(a.float(), b.float(), out=torch.empty(a.shape[0], b.shape[1])).to(torch.bfloat16)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, which is what is wanted
        library.impl("mm", product, "CPU")
    try:
        yield
    finally:
        library._destroy()


def moved(student):
    """`student` away from the untouched one, where all gradients are rounding noise that Adam would
    amplify."""
    import torch

    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=draw))
    return student
