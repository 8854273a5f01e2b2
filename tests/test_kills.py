"""Fifty kills at random moments of an evaluation, a report, a sweep that is prepared, and both caches: the
next attempt ends as the one that nobody killed, to the last bit."""

import json
import os
import random
import signal
import sys
from functools import partial

import pytest

from cbnb.config import get_config
from cbnb.report import sweep, verdicts
from cbnb.sweep import keys as ablation
from cbnb.transcripts.tinyworld import make_transcripts
from test_lease import NOTEBOOK

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")
CONFIG = get_config("tinyagent", batch_size=2)


@pytest.fixture(scope="module")
def agent():
    "`(student, masker, reader)` of the tiny agent, which attempts in forked processes share."
    from cbnb.evaluate.reader import derive_reader
    from cbnb.masking.masker import ChatMasker
    from cbnb.step.models import add_adapter, load_model, load_tokenizer

    masker = ChatMasker(load_tokenizer("tinyagent"))
    return add_adapter(load_model("tinyagent"), CONFIG), masker, derive_reader(masker)


def evaluation(agent, folder):
    from cbnb.evaluate.answers import answer_questions
    from cbnb.evaluate.decoding import Decoding

    student, masker, reader = agent
    questions = make_transcripts("injection", 6, "eval")
    answer_questions(
        student,
        masker,
        reader,
        questions,
        Decoding(max_new_tokens=3, batch_size=2),
        folder=folder,
        stage="after",
    )


def report(agent, folder):
    sweep.write_sweep(verdicts.read_sweep([folder.parent / "specimen"]), folder)


def preparation(agent, folder):
    os.environ["CBNB_RUNS"] = str(folder)
    found = ablation.plan_sweep(folder.parent / "toy.yaml")
    ablation.write_plan(found)
    for run in found.runs:
        ablation.prepare_run(found, run, {"source": "x"})


def encoding(agent, folder):
    from cbnb.train.store import stored_stream

    stored_stream(folder, make_transcripts("plain", 12), agent[1], "assistant_only", processes=1)


def teacher(agent, folder):
    from cbnb.data.streams import encode_stream
    from cbnb.train.teacher_cache import open_cache

    student, masker, _ = agent
    harmful, benign = (
        encode_stream(make_transcripts(kind, 4), masker, "assistant_only")[0]
        for kind in ("injection", "plain")
    )
    open_cache(folder, student, harmful, benign, CONFIG, masker.tokenizer.pad_token_id)


def attempt(work, folder, number=0):
    """`work(folder)` in a process of its own that is killed before the `number`-th thing that it does to
    files there; returns (exit status, how many it did)."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        seen, code = 0, 1

        def hook(event, args):
            nonlocal seen
            if event in EVENTS and args and str(folder) in str(args[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work(folder)
            code = 0
        finally:
            os.write(writing, str(seen).encode())
            os._exit(code)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(reading) as said:
        return code, int(said.read() or 0)


def contents(folder):
    "`{path: bytes}` of all that has a name of its own there; the time in a status is left out."
    found = {
        p.relative_to(folder): p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part[0] == "." for part in p.relative_to(folder).parts)
    }
    return {
        name: json.loads(p.read_text()) | {"updated": None} if name.name == "status.json" else p.read_bytes()
        for name, p in found.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "work", (evaluation, report, preparation, encoding, teacher), ids=lambda work: work.__name__
)
def test_killed_at_any_moment(agent, work, tmp_path, capfd):
    verdicts.write_specimen(tmp_path / "specimen", betas=(0.0, 0.3), seeds=(0,))
    (tmp_path / "toy.ipynb").write_text(json.dumps(NOTEBOOK))
    (tmp_path / "toy.yaml").write_text(f"notebook: {tmp_path / 'toy.ipynb'}\nseeds: [0, 1]\n")
    act, chance, killed = partial(work, agent), random.Random(work.__name__), 0
    (whole := tmp_path / "whole").mkdir()
    code, events = attempt(act, whole)
    assert code == 0 and events > 3 and contents(whole)
    while killed < (6 if work is report else 11):  # its pictures take a second
        (folder := tmp_path / f"run{killed}").mkdir()
        for _ in range(2):
            code, _ = attempt(act, folder, chance.randint(1, events))
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
        assert attempt(act, folder)[0] == 0
        assert contents(folder) == contents(whole), killed
