"""One writer per folder: processes that start at once, are killed or stopped, run in another namespace, belong to another user, and file systems without links."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import forked

import cbnb
from cbnb.sweep import jobs
from cbnb.basics import lease
from cbnb.basics.jsonfiles import RunError
from cbnb.run.directory import open_run
from cbnb.run.metrics import append_line, append_metrics
from cbnb.run.stages import Run, read_status, set_status, still_running

FAST = ("import os, sys, time, random\nfrom cbnb.basics import lease\nfrom cbnb.basics.jsonfiles import RunError\n"
        "from cbnb.run.directory import open_run\nfrom cbnb.run.metrics import append_metrics, write_result\n"
        "from cbnb.run.stages import set_status, stage\nlease.BEAT, lease.EXPIRY = 0.05, 3\n")
WAYS = {"here": "", "elsewhere": "own = f'container {os.getpid()}'\nlease.namespace = lambda: own\n",
        "no links": "def refuse(*paths): raise PermissionError('no hard links here')\nos.link = refuse\n"}
WORKER = """
log, end = os.open(f"{sys.argv[1]}/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT), time.monotonic() + 60
def say(word): os.write(log, f"{word} {os.getpid()}\\n".encode())
while time.monotonic() < end:
    try: lease.take_lease(sys.argv[1], tell=None)
    except lease.Held:
        time.sleep(0.01)
        continue
    say("enter")
    time.sleep(random.random() * 0.03)
    try: lease.check_lease(sys.argv[1])
    except lease.Held: say("lost")
    else: say("leave")
    lease.give_back(sys.argv[1])
"""


def python(code, *arguments, before=()):
    "A Python process with `code`, whose output is read by `.stdout`."
    return subprocess.Popen([*before, sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def stop(process):
    "Stops a process of `python`; returns when it stands still."
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def fast(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "EXPIRY", 3)   # a busy machine may be silent for a second
    monkeypatch.setattr(lease, "RENEWING", [])   # the thread of an earlier test may be asleep for its own, longer beat


@pytest.mark.parametrize("way", WAYS)
def test_never_two_at_once(tmp_path, way):
    "Five processes want one lease again and again, and are killed at any moment; whoever is inside when another enters was told that its place is lost."
    chance, workers = random.Random(1), [python(FAST + WAYS[way] + WORKER, tmp_path) for _ in range(5)]
    log = tmp_path / "log"
    try:
        for _ in range(4 if way == "elsewhere" else 12):
            time.sleep(chance.random() * 0.4)
            victim = workers.pop(chance.randrange(5))
            stop(victim)  # it says nothing after its "gone", and nobody enters before
            with open(log, "a") as f: f.write(f"gone {victim.pid}\n")
            victim.kill()
            victim.wait()
            workers.append(python(FAST + WAYS[way] + WORKER, tmp_path))
        time.sleep(2.5 if way == "elsewhere" else 0.5)
    finally:
        for worker in workers: stop(worker)  # all of them before the first is killed, whose place would be free
        for worker in workers: worker.kill(), worker.wait()
    events, inside, entered = [line.split() for line in log.read_text().splitlines()], set(), 0
    lost = {(i, who) for i, (word, who) in enumerate(events) if word == "lost"}
    for i, (word, who) in enumerate(events):
        if word == "enter":
            entered += 1
            assert all(any(at > i and who == other for at, who in lost) for other in inside), f"{inside} were inside when {who} entered"
            inside.add(who)
        else: inside.discard(who)
    assert entered > 20


def test_a_container_is_heard_and_its_death_is_waited_for(tmp_path, monkeypatch):
    "Process numbers of another namespace mean nothing here: its renewals do."
    fast(monkeypatch)
    other = python(FAST + "open_run({}, run_dir=sys.argv[1])\nprint(flush=True)\ntime.sleep(60)", tmp_path / "run",
                   before=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"])
    try:
        other.stdout.readline()
        record = lease.read_lease(tmp_path / "run" / ".lease")[0]
        assert record["namespace"] != lease.namespace() and lease.process_start(record["pid"]) != record["pid_started"]
        with pytest.raises(RunError, match="is running on"): open_run({}, run_dir=tmp_path / "run")
        assert still_running(tmp_path / "run", read_status(tmp_path / "run"))
    finally: other.kill(), other.wait()
    assert open_run({}, run_dir=tmp_path / "run").attempt == 2
    set_status(Run(tmp_path / "run"), "done")


def test_who_slept_too_long_writes_nothing_more(tmp_path, monkeypatch):
    "A job that is suspended on another node and goes on after its run was taken over."
    fast(monkeypatch)
    other = python(FAST + WAYS["elsewhere"] + """
run = open_run({}, run_dir=sys.argv[1])
print(flush=True)
sys.stdin.readline()
for act in (lambda: append_metrics(run, {"step": 1}), lambda: write_result(run, {}), lambda: set_status(run, "done")):
    try: act()
    except lease.Held as e: print(e, flush=True)
try:
    with stage(run, "training"): pass
except (lease.Held, RunError) as e: print(e, flush=True)
""", tmp_path)
    try:
        other.stdout.readline()
        other.send_signal(signal.SIGSTOP)
        run = open_run({}, run_dir=tmp_path)
        assert run.attempt == 2
        append_metrics(run, {"step": 5})
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and p.name != ".lease"}
        other.send_signal(signal.SIGCONT)
        said = other.communicate("go\n", timeout=60)[0].strip().splitlines()
        assert len(said) == 5 and all("was taken over by" in line for line in said[:3]) and "is running on" in said[-1], said
        assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and p.name != ".lease"}
        append_metrics(run, {"step": 6})
    finally: other.kill(), other.wait()
    set_status(Run(tmp_path), "done")


NOTEBOOK = {"cells": [{"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "execution_count": None, "outputs": [],
                       "source": "seed: int = 0  # x\nrun_dir: str = \"\"  # y"}],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}


def as_user(number, work, runs_at):
    "What `work()` says in a process of the user `number`: its value or the error's text."
    def act():
        os.setgroups([])
        os.setgid(number), os.setuid(number)
        os.umask(0o022)
        try: print(work())
        except (RunError, lease.NotOwn) as e: print(f"refused: {e}")
    return forked(act, cwd="/", env={"PATH": os.environ["PATH"], "CBNB_RUNS": str(runs_at), "HOME": "/nonexistent"}).stdout


@pytest.fixture
def shared():
    "A folder that everybody may write to, outside of pytest's own, which only its user may enter."
    import tempfile
    path = Path(tempfile.mkdtemp(prefix="cbnb-shared-"))
    path.chmod(0o755)
    (path / "runs").mkdir()
    (path / "toy.ipynb").write_text(json.dumps(NOTEBOOK))
    (path / "toy.yaml").write_text(f"notebook: {path / 'toy.ipynb'}\nseeds: [0]\n")
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users: run it as root, as CI does")
@pytest.mark.parametrize("mode", (0o1777, 0o777))
def test_a_folder_of_two_users(shared, mode):
    "What one user has planted under the right names is neither executed nor written to by the next."
    os.chmod(shared / "runs", mode)
    victim, mallory = 54321, 54322

    def plant():
        "A sweep's folder with the right key and an edited notebook."
        sweep = jobs.plan_sweep(shared / "toy.yaml")
        sweep.path.mkdir(mode=0o777)
        path = jobs.prepare_run(sweep, sweep.runs[0], {"source": "x"})
        text = (path / "notebook.ipynb").read_text().replace("seed: int", "import this\\nseed: int")
        (path / "notebook.ipynb").write_text(text)
        for p in (sweep.path, path): p.chmod(0o777)
        for p in path.iterdir(): p.chmod(0o666)
        return path
    planted = as_user(mallory, plant, shared / "runs").strip()
    for call in (lambda: jobs.ablate(shared / "toy.yaml", local=1), lambda: jobs.run_command(Path(planted)), lambda: open_run({"seed": 0}, run_dir=planted)):
        assert "belongs to another user" in as_user(victim, call, shared / "runs")

    # a link in the place of the lock, of the metrics, of the run itself
    (shared / "precious").write_text("precious")
    os.chown(shared / "precious", victim, victim)
    def mine(): return open_run({"seed": 1}, run_dir=shared / "runs" / "mine").path
    as_user(victim, mine, shared / "runs")
    mine_at = shared / "runs" / "mine"
    mine_at.chmod(0o777)
    assert "others can write to" in as_user(victim, lambda: open_run({"seed": 1}, run_dir=mine_at), shared / "runs")
    for name in (".lease", ".lock"):
        (mine_at / name).unlink(missing_ok=True)
        (mine_at / name).symlink_to(shared / "precious")
        said = as_user(victim, lambda: lease.take_lease(mine_at, name), shared / "runs")
        assert "Held" in said or "no lease that can be read" in said, said
    (mine_at / "metrics.jsonl").symlink_to(shared / "precious")
    assert "OSError" in as_user(victim, lambda: append_line(mine_at / "metrics.jsonl", {"step": 1}), shared / "runs")
    assert (shared / "precious").read_text() == "precious"

    # a day's folder is nobody's own
    def fresh(): return open_run({"seed": 2}).path
    first, second = (as_user(who, fresh, shared / "runs").strip() for who in (mallory, victim))
    assert Path(first).parent == Path(second).parent and first != second, (first, second)


def test_no_module_asks_for_file_locks():
    "`flock` is refused by some file systems, and holds in one kernel only: nothing here counts on it."
    for path in Path(cbnb.__file__).parent.rglob("*.py"): assert "fcntl" not in path.read_text(), path
