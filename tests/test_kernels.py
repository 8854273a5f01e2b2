"""Kernels that start at the same moment: none may die of a port that another has taken."""
import asyncio, socket
from contextlib import ExitStack

import jupyter_client.connect, nbformat, papermill, pytest
from jupyter_client.connect import LocalPortCache, port_names
from traitlets.config import Config

import cbnb.kernels
from cbnb.kernels import socket_config
from forked import ended, started
from helpers import ROOT

ASKS = "from ipykernel.connect import get_connection_info\nprint(get_connection_info(unpack=True)['transport'])"


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


def test_no_clash_of_ports_ends_a_run(notebook, taken):
    out = notebook.parent
    works = [lambda i=i: execute(notebook, out / f"out{i}.ipynb") for i in range(8)]
    works.append(lambda: execute(notebook, out / "tcp.ipynb", "nbclient"))   # papermill's own way, which the clash ends
    *ours, tcp = [ended(*process, timeout=240) for process in [started(work) for work in works]]
    assert tcp.returncode and "Address already in use" in tcp.stdout and "Kernel died" in tcp.stdout, tcp.stdout[-3000:]
    for done in ours:
        assert not done.returncode and "ipc" in done.stdout.split() and "TCP" not in done.stdout, done.stdout[-3000:]


def test_sockets_are_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "r"))
    with socket_config() as config: place = config.KernelManager.connection_file
    assert place.startswith(str(tmp_path / "r")) and not any((tmp_path / "r").iterdir())
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / ("r" * 100)))
    with socket_config() as config: assert not config.KernelManager.connection_file.startswith(str(tmp_path / "rr"))
    monkeypatch.setattr(cbnb.kernels, "socket_folder", lambda bases: None)
    with socket_config() as config: assert not config


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
        manager = AsyncMappingKernelManager(connection_dir=str(tmp_path), config=Config(KernelManager={"cache_ports": False}))
        kernel = manager.get_kernel(key := await manager.start_kernel(kernel_name="python3"))
        while key in manager and kernel.shell_port in taken: await asyncio.sleep(0.1)
        assert key in manager, "given up"
        client = kernel.client()
        client.start_channels()
        try: await client.wait_for_ready(timeout=120)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(key, now=True)
    asyncio.run(start())
    assert len(written) == 2
