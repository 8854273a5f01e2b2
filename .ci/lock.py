"""Write the files of lock/: exact versions, and the hashes of all files that the package index has of
each, for pip install --require-hashes.

    run.txt      what a run needs: settings.ini's requirements, but for torch
    extras.txt   pictures, data sets, AgentDojo, Inspect and GGUF files on top
    dev.txt      what export, tests and docs need on top
    cuda.txt     torch as the index has it, and what it needs on top of run.txt: the CUDA build for Linux, a
                 CPU build for macOS and Windows
    cpu.txt      or the CPU build of torch for Linux, which other places have
    tools.txt    what `make lock` and `make sbom` run

Versions are those of constraints.txt; what is not there (other systems, other Pythons, CUDA) stays as it was
locked, or is the newest that fits. uv resolves for all systems and Pythons at once, with the index of pip's
own settings. CPU builds of torch are looked for in the further places of those settings; where there are none
their hashes stay as they were.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "lock"
LAYERS = {
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
# torch, and what it asks for on Linux, unless it is a CPU build
CUDA = ("torch==", "nvidia-", "cuda-", "triton==")
TOOLS = ["uv==0.13.9", "cyclonedx-bom==7.5.0"]
HEAD = "# Made by make lock from settings.ini and constraints.txt: edit those.\n"


@cache
def pip_settings():
    "{name: [value, …]} of pip's settings, of all its files and the environment."
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^(?:\S+)\.([a-z-]+)='(.*)'$", listed, re.M)
    return {
        name: [word for key, value in found if key == name for word in value.split()] for name, _ in found
    }


def compiled(requirements, pinned=(), kept=(), places=()):
    """{`name==version ; marker`: [hash, …]} of all that the requirement lines want, by uv: `pinned` versions
    (lines as in constraints.txt) count, `kept` ones (keys of an earlier result) where nothing speaks against
    them; `places` are options that name where else to look."""
    settings = pip_settings()
    index = [f"--default-index={url}" for url in settings.get("index-url", [])[-1:]] if not places else []
    certificate = dict([("SSL_CERT_FILE", path) for path in settings.get("cert", [])[-1:]])
    with tempfile.TemporaryDirectory() as folder:
        constraints, out = Path(folder) / "constraints.txt", Path(folder) / "out.txt"
        constraints.write_text("\n".join(pinned))
        out.write_text("\n".join(kept))
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            "-",
            "--quiet",
            "--universal",
            "--python-version=3.11",
            "--generate-hashes",
            "--no-strip-extras",
            "--no-header",
            "--no-annotate",
            f"--constraints={constraints}",
            f"--output-file={out}",
            *index,
            *places,
        ]
        done = subprocess.run(
            command,
            input="\n".join(requirements),
            capture_output=True,
            text=True,
            env=os.environ | certificate,
        )
        if done.returncode:
            sys.exit(f"uv finds no versions: {done.stderr.strip()}")
        return packages(out.read_text())


def packages(text):
    "{first line of a package, without its backslash: its hash lines} of the lines of a lock file."
    found = re.findall(r"^([^\s#-].*?) \\\n((?:    --hash=\S+(?: \\)?\n?)+)", text, re.M)
    return {first: re.findall(r"--hash=(\S+)", hashes) for first, hashes in found}


def cpu_hashes(torch):
    """The hashes of the CPU builds of `torch` (name==version) in the places where pip looks beside its index:
    other indexes, folders of wheels."""
    settings = pip_settings()
    wheels = [
        path
        for place in settings.get("find-links", [])
        for path in Path(place).glob(f"{torch.replace('==', '-')}+cpu-*.whl")
    ]
    found = [f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in wheels]
    for url in settings.get("extra-index-url", []):
        try:
            found += sum(
                compiled([f"{torch}+cpu"], places=["--no-deps", f"--default-index={url}"]).values(), []
            )
        except SystemExit:
            pass  # it has none
    return sorted(set(found))


def written(name, parents, found):
    "Write lock/<name>.txt."
    lines = [f"-r {parent}.txt" for parent in parents]
    lines += [
        " \\\n    ".join([first, *(f"--hash={h}" for h in hashes)]) for first, hashes in sorted(found.items())
    ]
    (LOCK / f"{name}.txt").write_text(HEAD + "\n".join(lines) + "\n")
    print(f"lock/{name}.txt: {len(found)} packages")


def main():
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    LOCK.mkdir(exist_ok=True)
    before = {}
    for path in LOCK.glob("*.txt"):
        before |= packages(path.read_text())
    pinned = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    wanted = [[r for key in keys for r in parser["DEFAULT"][key].split()] for keys in LAYERS.values()]
    whole = compiled(sum(wanted, []), pinned, before)
    layers = {layer: compiled(sum(wanted[:n], []), whole, whole) for n, layer in enumerate(LAYERS, 1)}
    torch = next(first for first in whole if first.startswith("torch=="))
    cpu = (
        cpu_hashes(torch)
        or before.get(f"{torch}+cpu")
        or sys.exit(f"{torch} has no CPU build where pip looks: set PIP_EXTRA_INDEX_URL")
    )
    cuda = {first: hashes for first, hashes in layers["run"].items() if first.startswith(CUDA)}
    seen = set(cuda)
    for layer, parent in zip(layers, ([], ["run"], ["extras"])):
        written(
            layer, parent, {first: hashes for first, hashes in layers[layer].items() if first not in seen}
        )
        seen |= layers[layer].keys()
    written("cuda", [], cuda)
    written("cpu", [], {f"{torch}+cpu": cpu})
    written("tools", [], compiled(TOOLS, kept=before))


if __name__ == "__main__":
    main()
