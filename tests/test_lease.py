"""One writer per folder: processes that start at once, are killed or stopped, run in another namespace,
belong to another user, and file systems without links."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

import cbnb
from cbnb import cli
from cbnb.basics import lease
from cbnb.basics.disk import release, reserve
from cbnb.basics.jsonfiles import RunError, write_json, write_owned
from cbnb.config import get_config
from cbnb.data.streams import encode_stream
from cbnb.masking.masker import ChatMasker
from cbnb.report import figures as report
from cbnb.run.directory import close_run, open_run
from cbnb.run.metrics import append_line, append_metrics, truncate_metrics
from cbnb.run.stages import Run, hold, process_state, read_status, set_status, still_running
from cbnb.step.models import add_adapter, load_model, load_tokenizer
from cbnb.sweep import jobs
from cbnb.train import same, trainer
from cbnb.transcripts.tinyworld import make_transcripts
from forked import forked

FAST = "import os, sys, time, random\nfrom cbnb.basics import lease\nlease.BEAT, lease.EXPIRY = 0.05, 3\n"
RUNS = (
    "from cbnb.basics.jsonfiles import RunError\nfrom cbnb.run.directory import open_run\n"
    "from cbnb.run.metrics import append_metrics, write_result\nfrom cbnb.run.stages import set_status, "
    "stage\n"
)
WAYS = {
    "here": "",
    "elsewhere": "own = f'container {os.getpid()}'\nlease.namespace = lambda: own\n",
    "no links": "def refuse(*paths): raise PermissionError('no hard links here')\nos.link = refuse\n",
}
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
    return subprocess.Popen(
        [*before, sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def stop(process):
    "Stops a process of `python`; returns when it stands still."
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def fast(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "EXPIRY", 3)  # a busy machine may be silent for a second
    # the thread of an earlier test may be asleep for its own, longer beat
    monkeypatch.setattr(lease, "RENEWING", [])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_never_two_at_once(tmp_path, way):
    """Five processes want one lease again and again, and are killed at any moment; whoever is inside when
    another enters was told that its place is lost."""
    chance, workers = random.Random(1), [python(FAST + WAYS[way] + WORKER, tmp_path) for _ in range(5)]
    log = tmp_path / "log"
    try:
        for _ in range(4 if way == "elsewhere" else 12):
            time.sleep(chance.random() * 0.4)
            victim = workers.pop(chance.randrange(5))
            stop(victim)  # it says nothing after its "gone", and nobody enters before
            with open(log, "a") as f:
                f.write(f"gone {victim.pid}\n")
            victim.kill()
            victim.wait()
            workers.append(python(FAST + WAYS[way] + WORKER, tmp_path))
        time.sleep(2.5 if way == "elsewhere" else 0.5)
        end = time.monotonic() + 30  # on a full machine a process takes seconds to start
        while log.read_text().count("enter") <= 20 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        # all of them before the first is killed, whose place would be free
        for worker in workers:
            stop(worker)
        for worker in workers:
            worker.kill(), worker.wait()
    events, inside, entered = [line.split() for line in log.read_text().splitlines()], set(), 0
    lost = {(i, who) for i, (word, who) in enumerate(events) if word == "lost"}
    for i, (word, who) in enumerate(events):
        if word == "enter":
            entered += 1
            assert all(any(at > i and who == other for at, who in lost) for other in inside), (
                f"{inside} were inside when {who} entered"
            )
            inside.add(who)
        else:
            inside.discard(who)
    assert entered > 20


def test_a_container_is_heard_and_its_death_is_waited_for(tmp_path, monkeypatch):
    "Process numbers of another namespace mean nothing here: its renewals do."
    fast(monkeypatch)
    other = python(
        FAST + RUNS + "open_run({}, run_dir=sys.argv[1])\nprint(flush=True)\ntime.sleep(60)",
        tmp_path / "run",
        before=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
    )
    try:
        other.stdout.readline()
        record = lease.read_lease(tmp_path / "run" / ".lease")[0]
        assert (
            record["namespace"] != lease.namespace()
            and lease.process_start(record["pid"]) != record["pid_started"]
        )
        with pytest.raises(RunError, match="is running on"):
            open_run({}, run_dir=tmp_path / "run")
        assert still_running(tmp_path / "run", read_status(tmp_path / "run"))
    finally:
        other.kill(), other.wait()
    assert open_run({}, run_dir=tmp_path / "run").attempt == 2
    set_status(Run(tmp_path / "run"), "done")


def test_a_namespace_that_looks_at_the_proc_of_another(tmp_path):
    """In `unshare --pid` without a /proc of its own a process number leads to some other process: it proves
    nothing, and a writer that lives there keeps its lease."""
    code = """
import os, sys, time
from cbnb.basics import lease
lease.BEAT = 0.05
print(lease.identity()["pid_started"], lease.identity()["namespace"], flush=True)
ready, done = os.pipe()
if (writer := os.fork()) == 0:
    lease.take_lease(sys.argv[1])
    os.write(done, b"x")
    time.sleep(60)
os.read(ready, 1)
try: lease.take_lease(sys.argv[1], tell=None)
except lease.Held as e: print("held:", e)
"""
    first = python(code, tmp_path, before=["unshare", "--pid", "--fork", "--kill-child"])
    # the writer ends with the first process of its namespace
    said = first.communicate(timeout=60)[0].splitlines()
    assert said[0] == "None None" and said[-1].startswith("held: ") and "(pid 2)" in said[-1], said


def test_a_number_without_a_start_proves_nothing():
    """The record of a process that could not be looked up is judged by its renewal; a status that names one
    is not proved over."""
    record = lease.identity() | {"token": "a", "pid": 999_999}
    assert lease.judge_lease(record, 0) == "over"
    for unseen in (record | {"pid_started": None}, lease.identity() | {"token": "a", "pid_started": None}):
        assert (lease.judge_lease(unseen, 0), lease.judge_lease(unseen, lease.EXPIRY + 1)) == (
            "fresh",
            "over",
        )
        assert process_state(unseen) == "fresh" and still_running("/nowhere", unseen)
    assert not still_running("/nowhere", record) and not still_running("/nowhere", lease.identity())


@pytest.mark.parametrize(
    "bad",
    (
        '"pid": Infinity',
        '"pid": 1e999',
        '"pid": NaN',
        '"pid": -5',
        '"pid": "7"',
        f'"pid": 1{"0" * 400}',
        '"node": ["x"]',
        '"beat": {}',
        '"slurm_restarts": Infinity',
        '"token": null',
    ),
)
def test_a_lease_of_wrong_fields_is_told(tmp_path, bad, monkeypatch):
    "It is unreadable for whoever looks and whoever wants its place; nothing but `Held` is raised."
    shutil.copytree(Path(__file__).with_name("finished"), run := tmp_path / "sweep" / "run")
    status = json.loads((run / "status.json").read_text()) | {"state": "running"}
    (run / "status.json").write_text(json.dumps(status))
    whole = json.dumps(lease.identity() | {"token": "a", "beat": 0})
    (run / ".lease").write_text(f"{whole[:-1]}, {bad}}}")
    assert lease.read_lease(run / ".lease")[0] == {} and lease.lease_state(run) == "unreadable"
    assert still_running(run, status) and close_run(run, 1) == "running"
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(["status", str(tmp_path)]) in (0, None)
    assert "run" in out.getvalue()
    clock = iter(range(1000))
    monkeypatch.setattr(lease.time, "monotonic", lambda: next(clock))  # a second a look
    with pytest.raises(lease.Held, match="not a lease that can be read"):
        lease.take_lease(run)


@contextmanager
def ended_within(seconds):
    "AssertionError in what runs longer: an OSError could be caught there."

    def end(number, frame):
        raise AssertionError(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ("a link", "a pipe", "a folder", "a file of tomorrow"))
def test_what_stands_in_the_place_of_a_guard(tmp_path, kind, monkeypatch):
    "A lease is over, and what would be its guard is none: it is named, at once for what is no file."
    monkeypatch.setattr(lease, "EXPIRY", 0.2)
    (tmp_path / ".lease").write_text(
        json.dumps(lease.identity() | {"token": "a", "beat": 0, "pid_started": "1"})
    )
    guard = tmp_path / ".lease.over"
    if kind == "a link":
        guard.symlink_to("/nowhere")
    if kind == "a pipe":
        os.mkfifo(guard)
    if kind == "a folder":
        guard.mkdir()
    if kind == "a file of tomorrow":
        guard.write_text("")
        os.utime(guard, (time.time() + 86_400,) * 2)
    began = time.monotonic()
    with ended_within(10), pytest.raises(lease.Held, match=r"\.lease\.over"):
        lease.take_lease(tmp_path)
    assert (time.monotonic() - began < 0.2) == (kind != "a file of tomorrow")
    with pytest.raises(RunError, match=r"\.lease\.over"):
        hold(tmp_path)
    guard.rmdir() if kind == "a folder" else guard.unlink()
    lease.take_lease(tmp_path)
    lease.give_back(tmp_path)


def test_threads_of_one_process(tmp_path):
    "One of six threads opens the run; those that are refused do not give back what it holds."
    for number in range(5):
        run, said, start = tmp_path / str(number), [], threading.Barrier(6)

        def go(run=run, said=said, start=start):
            start.wait(timeout=30)
            try:
                said.append(open_run({}, run_dir=run).attempt)
            except RunError as e:
                said.append(str(e))

        threads = [threading.Thread(target=go) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert said.count(1) == 1, said
        assert all(
            "is running on" in words or "in another thread" in words for words in said if words != 1
        ), said
        assert lease.lease_state(run) == "mine"
        with pytest.raises(RunError, match="in another thread"):
            open_run({}, run_dir=run)
        set_status(Run(run), "interrupted")
        # one after the other, by one thread
        assert [open_run({}, run_dir=run).attempt for _ in range(2)] == [2, 3]
        set_status(Run(run), "done")


def lose(folder):
    "Another process takes the place of this one's lease."
    record = lease.identity() | {
        "token": "b" * 32,
        "beat": 0,
        "pid": os.getppid(),
        "pid_started": lease.process_start(os.getppid()),
    }
    # a file of its own, as a real one is: the heartbeat of this process may be writing to the old one
    (folder / ".lease.new").write_text(json.dumps(record))
    os.replace(folder / ".lease.new", folder / ".lease")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_writers_ask(tmp_path):
    "Whoever has lost its run writes no file of it, whichever it is."
    run = open_run({}, run_dir=tmp_path)
    append_metrics(run, {"step": 1})
    (tmp_path / "adapter").mkdir()
    release(tmp_path)
    lose(tmp_path)
    before = contents(tmp_path)
    result = json.loads((Path(__file__).parent / "finished" / "result.json").read_text())
    card = tmp_path / "adapter" / "README.md"
    writers = [
        lambda: write_json(tmp_path / "config.json", {}),
        lambda: truncate_metrics(run, -1),
        lambda: reserve(tmp_path),
        lambda: same.keep_same(run, "data", lambda: {"x": "y"}),
        lambda: write_owned(card, b""),
        lambda: report.write_run_report(tmp_path, result),
        lambda: append_metrics(run, {"step": 2}),
        lambda: set_status(run, "done"),
    ]
    for write in writers:
        with pytest.raises(lease.Held, match="was taken over"):
            write()
    assert contents(tmp_path) == before
    lease.give_back(tmp_path)


def test_a_lease_that_is_given_back_in_this_moment_is_not_lost(tmp_path):
    "Between the removal of its file and the end of `give_back`, another thread that asks waits."
    lease.take_lease(tmp_path)
    path, refusals = lease.lease_path(tmp_path), []

    def ask():
        try:
            lease.check_lease(tmp_path)
        except lease.Held as e:
            refusals.append(e)

    asker = threading.Thread(target=ask)
    with lease.LOCK:
        path.unlink()
        asker.start()
        asker.join(0.3)
        assert asker.is_alive(), "it waits"
        lease.give_back(tmp_path)
    asker.join()
    assert refusals == [] and path not in lease.HELD


def test_a_checkpoint_of_a_lost_run(tmp_path, monkeypatch):
    """The run is taken over while its second checkpoint is saved: that one gets no name, and no older one
    goes."""
    config = get_config(
        "tinyagent", total_steps=2, batch_size=2, warmup_steps=0, save_steps=1, diagnose_steps=0
    )
    tokenizer = load_tokenizer("tinyagent")
    masker, run = ChatMasker(tokenizer), open_run({}, run_dir=tmp_path)
    streams = [
        encode_stream(make_transcripts(kind, 4), masker, policy)[0]
        for kind, policy in (("injection", config.harmful_policy), ("plain", config.benign_policy))
    ]
    seal, made = trainer.seal, []

    def sealed(folder):
        seal(folder)
        made.append(folder.name)
        if len(made) == 2:
            lose(tmp_path), before.update(contents(tmp_path))

    before = {}
    monkeypatch.setattr(trainer, "seal", sealed)
    student = add_adapter(load_model("tinyagent"), config)
    with pytest.raises(lease.Held):
        trainer.train_breaker(student, *streams, config, run, tokenizer.pad_token_id)
    assert made == ["checkpoint-1", "checkpoint-2"] and list(
        trainer.checkpoints(tmp_path / "checkpoints")
    ) == [1]
    assert contents(tmp_path) == before
    lease.give_back(tmp_path)


def test_who_slept_too_long_writes_nothing_more(tmp_path, monkeypatch):
    "A job that is suspended on another node and goes on after its run was taken over."
    fast(monkeypatch)
    other = python(
        FAST
        + RUNS
        + WAYS["elsewhere"]
        + """
run = open_run({}, run_dir=sys.argv[1])
print(flush=True)
sys.stdin.readline()
for act in (lambda: append_metrics(run, {"step": 1}), lambda: write_result(run, {}), lambda: set_status(run, "done")):
    try: act()
    except lease.Held as e: print(e, flush=True)
try:
    with stage(run, "training"): pass
except (lease.Held, RunError) as e: print(e, flush=True)
""",  # noqa: E501
        tmp_path,
    )
    try:
        other.stdout.readline()
        other.send_signal(signal.SIGSTOP)
        run = open_run({}, run_dir=tmp_path)
        assert run.attempt == 2
        append_metrics(run, {"step": 5})
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and p.name != ".lease"}
        other.send_signal(signal.SIGCONT)
        said = other.communicate("go\n", timeout=60)[0].strip().splitlines()
        assert (
            len(said) == 5
            and all("was taken over by" in line for line in said[:3])
            and "is running on" in said[-1]
        ), said
        assert before == {
            p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and p.name != ".lease"
        }
        append_metrics(run, {"step": 6})
    finally:
        other.kill(), other.wait()
    set_status(Run(tmp_path), "done")


NOTEBOOK = {
    "cells": [
        {
            "cell_type": "code",
            "id": "a",
            "metadata": {"tags": ["parameters"]},
            "execution_count": None,
            "outputs": [],
            "source": 'seed: int = 0  # x\nrun_dir: str = ""  # y',
        }
    ],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


def as_user(number, work, runs_at):
    "What `work()` says in a process of the user `number`: its value or the error's text."

    def act():
        os.setgroups([])
        os.setgid(number), os.setuid(number)
        os.umask(0o022)
        try:
            print(work())
        except (RunError, lease.NotOwn) as e:
            print(f"refused: {e}")

    return forked(
        act, cwd="/", env={"PATH": os.environ["PATH"], "CBNB_RUNS": str(runs_at), "HOME": "/nonexistent"}
    ).stdout


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


@pytest.mark.slow
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
        for p in (sweep.path, path):
            p.chmod(0o777)
        for p in path.iterdir():
            p.chmod(0o666)
        return path

    planted = as_user(mallory, plant, shared / "runs").strip()
    for call in (
        lambda: jobs.ablate(shared / "toy.yaml", local=1),
        lambda: jobs.run_command(Path(planted)),
        lambda: open_run({"seed": 0}, run_dir=planted),
    ):
        assert "belongs to another user" in as_user(victim, call, shared / "runs")

    # a link in the place of the lock, of the metrics, of the run itself
    (shared / "precious").write_text("precious")
    os.chown(shared / "precious", victim, victim)

    def mine():
        return open_run({"seed": 1}, run_dir=shared / "runs" / "mine").path

    as_user(victim, mine, shared / "runs")
    mine_at = shared / "runs" / "mine"
    mine_at.chmod(0o777)
    assert "others can write to" in as_user(
        victim, lambda: open_run({"seed": 1}, run_dir=mine_at), shared / "runs"
    )
    for name in (".lease", ".lock"):
        (mine_at / name).unlink(missing_ok=True)
        (mine_at / name).symlink_to(shared / "precious")
        said = as_user(victim, lambda: lease.take_lease(mine_at, name), shared / "runs")
        assert "Held" in said or "not a lease that can be read" in said, said
    (mine_at / "metrics.jsonl").symlink_to(shared / "precious")
    assert "metrics.jsonl is a link" in as_user(
        victim, lambda: append_line(mine_at / "metrics.jsonl", {"step": 1}), shared / "runs"
    )
    assert (shared / "precious").read_text() == "precious"

    # a day's folder is nobody's own
    def fresh():
        return open_run({"seed": 2}).path

    first, second = (as_user(who, fresh, shared / "runs").strip() for who in (mallory, victim))
    assert Path(first).parent == Path(second).parent and first != second, (first, second)


def test_no_module_asks_for_file_locks():
    "`flock` is refused by some file systems, and holds in one kernel only: nothing here counts on it."
    for path in Path(cbnb.__file__).parent.rglob("*.py"):
        assert "fcntl" not in path.read_text(), path
