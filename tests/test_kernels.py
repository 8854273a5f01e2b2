"""Kernels that start at the same moment: none may die of a port that another has taken."""

import asyncio
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import jupyter_client.connect
import nbformat
import papermill
import pytest
from jupyter_client.connect import LocalPortCache, port_names
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

import cbnb.run.kernels
from cbnb.run.kernels import socket_config
from forked import ended, started
from helpers import ROOT

ASKS = (
    "from ipykernel.connect import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"
)


@pytest.fixture
def notebook(tmp_path):
    "The path of a notebook that prints how its kernel is reached."
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(ASKS)], metadata={"kernelspec": kernel})
    nbformat.write(nb, tmp_path / "asks.ipynb")
    return tmp_path / "asks.ipynb"


@pytest.fixture
def taken(monkeypatch):
    "Five ports that are in use, and that are chosen whenever a kernel looks for some: the clash, each time."
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(5)]
        ports = [s.getsockname()[1] for s in held]
        chosen = iter(ports * 100)
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda self, ip: next(chosen))
        yield ports


def execute(notebook, out, engine=None):
    papermill.execute_notebook(notebook, out, engine_name=engine, progress_bar=False)
    (told,) = nbformat.read(out, as_version=4).cells[-1].outputs
    print(told.text)


@pytest.mark.slow
def test_no_clash_of_ports_ends_a_run(notebook, taken):
    out = notebook.parent
    works = [lambda i=i: execute(notebook, out / f"out{i}.ipynb") for i in range(8)]
    # papermill's own way, which the clash ends
    works.append(lambda: execute(notebook, out / "tcp.ipynb", "nbclient"))
    *ours, tcp = [ended(*process, timeout=240) for process in [started(work) for work in works]]
    assert tcp.returncode and "Address already in use" in tcp.stdout and "Kernel died" in tcp.stdout, (
        tcp.stdout[-3000:]
    )
    for done in ours:
        assert not done.returncode and "ipc" in done.stdout.split() and "TCP" not in done.stdout, done.stdout[
            -3000:
        ]


@pytest.fixture
def short():
    """A folder with a short path, as that of a socket has to be: pytest's own is longer in each further
    process."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_sockets_are_where_the_environment_says(short, monkeypatch, capsys):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(short / "r"))
    with socket_config() as config:
        place = config.KernelManager.connection_file
    assert place.startswith(str(short / "r")) and not any((short / "r").iterdir())
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(short / ("r" * 100)))
    with socket_config() as config:
        assert not config.KernelManager.connection_file.startswith(str(short / "rr"))
    monkeypatch.setattr(cbnb.run.kernels, "socket_folder", lambda bases: None)
    with socket_config() as config:
        assert not config
    told = capsys.readouterr().err
    assert str(short) in told and "TCP" in told and "set TMPDIR" in told and told.count("\n") == 1


HOLDS = (
    "from cbnb.run.kernels import *; c = socket_config(); "
    "print(c.__enter__().KernelManager.connection_file, flush=True); input()"
)


def test_sockets_of_a_killed_run_are_removed_by_the_next(short, monkeypatch):
    """The run is in another pid namespace, as in a container that shares the folder: its process number says
    nothing here."""
    env = os.environ | {"JUPYTER_RUNTIME_DIR": str(short)}
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", HOLDS]
    other = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(short))
    try:
        folder = Path(other.stdout.readline().strip()).parent
        assert folder.parent == short
        os.utime(folder, (0, 0))
        with socket_config():
            assert folder.exists()
        (child,) = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        other.wait()  # which the child's end comes before
    finally:
        other.kill()
        other.communicate()
    # as one that another user left
    with cbnb.run.kernels.socket_folder([short])[1] as sign:
        stranger = Path(sign.getsockname()).parent
    os.chown(stranger, 65534, 65534)
    for left in (folder, stranger):
        os.utime(left, (0, 0))
    assert list(folder.iterdir())
    with socket_config():
        assert not folder.exists()
    assert list(short.iterdir()) == [stranger]


def test_an_environment_that_does_not_name_the_engine(notebook, tmp_path):
    """As one that was made before cbnb had it: cbnb's own starts take the engine all the same, a plain
    papermill's run says what is missing."""
    papermill_engines.register(None, NBClientEngine)
    sys.modules.pop("cbnb.run.kernels")

    def ours():
        sys.argv = ["execute", str(notebook), str(tmp_path / "ours.ipynb"), "--no-progress-bar"]
        runpy.run_module("cbnb.run.execute", run_name="__main__")

    try:
        own = started(ours)
        nb = nbformat.read(notebook, as_version=4)
        nb.cells = [
            nbformat.v4.new_code_cell("seed: int = 0  # random", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(
                "import cbnb.run.parameters as p\np.entry_points = lambda **_: "
                "[]\np.strict_parameters(globals())"
            ),
        ]
        papermill.execute_notebook(nb, tmp_path / "plain.ipynb", {"seed": 1}, progress_bar=False)
        done = ended(*own, timeout=120)
    finally:
        papermill_engines.register(None, cbnb.run.kernels.engine)
        sys.modules["cbnb.run.kernels"] = cbnb.run.kernels
    assert not done.returncode, done.stdout
    (transport,) = nbformat.read(tmp_path / "ours.ipynb", as_version=4).cells[-1].outputs
    (note, _) = nbformat.read(tmp_path / "plain.ipynb", as_version=4).cells[-1].outputs
    assert (
        transport.text == "ipc\n"
        and "note: this environment does not name" in note.text
        and "pip install" in note.text
    )


def test_make_lab_starts_a_kernel_again_on_other_ports(taken, tmp_path, monkeypatch):
    "The server's own kernel manager, with the flag of make lab: the first choice of ports is taken."
    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

    assert "--KernelManager.cache_ports=False" in (ROOT / "Makefile").read_text()
    written, write = [], jupyter_client.connect.write_connection_file

    def first_taken(*args, **kwargs):
        written.append(args)
        return write(*args, **kwargs | (dict(zip(port_names, taken)) if len(written) == 1 else {}))

    monkeypatch.setattr(jupyter_client.connect, "write_connection_file", first_taken)

    async def start():
        manager = AsyncMappingKernelManager(
            connection_dir=str(tmp_path), config=Config(KernelManager={"cache_ports": False})
        )
        kernel = manager.get_kernel(key := await manager.start_kernel(kernel_name="python3"))
        while key in manager and kernel.shell_port in taken:
            await asyncio.sleep(0.1)
        assert key in manager, "given up"
        client = kernel.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=120)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(key, now=True)

    asyncio.run(start())
    assert len(written) == 2
