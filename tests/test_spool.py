"""Transcripts on disk: the data stage gives what it gives of a list, in memory that hardly grows with the
data; nothing is left of the file; forked processes read it."""

import os
import signal
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from cbnb.data.sources import Reading
from cbnb.data.streams import drop_refused, encode_stream, load_streams, read_streams
from cbnb.masking.actions import for_policy, own_notes
from cbnb.masking.masker import ChatMasker
from cbnb.step.models import load_tokenizer
from cbnb.train.store import stored_stream
from cbnb.transcripts import holdout as H
from cbnb.transcripts.reader import read_transcripts, write_transcripts
from cbnb.transcripts.spool import Spooled, spool_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from test_holdout import write_runs


@pytest.fixture(scope="module")
def masker():
    return ChatMasker(load_tokenizer("tinyagent"))


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    "The folder of temporary files, of this test alone."
    (place := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.mark.parametrize("by", ("auto", "task", "suite", "prompt"))
def test_the_streams_are_those_of_lists(by, tmp_path):
    "In all that train does to them, and in their order."
    write_runs(tmp_path, 10, 5, ("office", "bank"))
    found = list(map(own_notes(made := list(read_transcripts(tmp_path))), made))
    lists = H.part(*([t for t in found if t.label == label] for label in ("harmful", "benign")), by)
    harmful, benign, held, left_out = load_streams([tmp_path], heldout_by=by)
    assert isinstance(harmful, Spooled) and isinstance(benign, Spooled) and isinstance(lists.harmful, list)
    assert (
        harmful == lists.harmful
        and benign == lists.benign
        and held == lists.held_out
        and [*left_out.items()] == [*lists.left_out.items()]
    )
    assert H.held_lines(harmful + benign, held, left_out) == H.held_lines(
        lists.harmful + lists.benign, held, left_out
    )
    assert (
        any("own_work" in t.meta for t in harmful) and for_policy(harmful, "post_injection_only") is harmful
    )


def test_refused_ones_are_left_out_of_a_stream_on_disk_as_of_a_list(masker):
    good, quoted = make_transcripts("plain", 3), {"role": "user", "content": masker.tokenizer.eos_token}
    chats = [
        t for one in good for t in (one, replace(one, id=f"bad-{one.id}", messages=[quoted, *one.messages]))
    ]
    one, two = (Reading(on_error="skip", max_skipped=1.0, records=6) for _ in range(2))
    kept, listed = drop_refused(spool_transcripts(chats), masker, one), drop_refused(chats, masker, two)
    assert (
        kept == listed == good
        and isinstance(kept, Spooled)
        and one.record() == two.record()
        and one.skipped.total() == 3
    )


def test_memory_hardly_grows_with_the_data(tmp_path):
    """A transcript more takes less than 500 bytes at the peak of all that train reads and chooses; in a list,
    over 5,000."""

    def most(n):
        chats = (t for kind in ("injection", "plain") for t in make_transcripts(kind, n // 2))
        write_transcripts(path := tmp_path / f"{n}.jsonl", chats)
        tracemalloc.start()
        harmful, benign, held, left_out = load_streams([path], [heldout])
        H.held_lines(harmful + benign, held, left_out)
        for _ in harmful + benign:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        listed = [*harmful, *benign]
        return peak, tracemalloc.get_traced_memory()[0] / len(listed), tracemalloc.stop()

    write_transcripts(heldout := tmp_path / "heldout.jsonl", make_transcripts("plain", 5, "eval"))
    (few, *_), (many, whole, _) = most(100), most(500)
    assert (many - few) / 400 < 500 < 5000 < whole, (few, many, whole)


def test_no_file_is_left_whatever_ends_the_process(scratch, tmp_path):
    """None has a name, not even while transcripts are written; a process that is killed leaves none; the
    space is free when the last sequence is gone."""
    path = tmp_path / "chats.jsonl"
    write_transcripts(path, make_transcripts("plain", 20))
    names = []

    def watched():
        for t in read_transcripts(path):
            names.extend(os.listdir(scratch))
            yield t

    kept = spool_transcripts(watched())
    assert len(kept) == 20 and not names and not os.listdir(scratch)
    if (pid := os.fork()) == 0:
        read_streams([path])
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL and not os.listdir(scratch)

    def open_files():
        return sum(
            os.path.realpath(link).startswith(str(scratch)) for link in Path("/proc/self/fd").iterdir()
        )

    part = kept[3:5]
    del kept
    assert open_files() == 1 and len(part) == len([*part])
    del part
    assert not open_files()


def test_processes_read_one_file(masker, tmp_path, monkeypatch):
    "What several processes encode of it, and what several read at once, is what one makes of a list."
    monkeypatch.setattr("cbnb.train.store.STORE_PIECE", 7)
    chats = make_transcripts("plain", 40)
    kept = spool_transcripts(chats)
    samples, report = encode_stream(chats, masker, "assistant_only")
    stored, told = stored_stream(tmp_path, kept, masker, "assistant_only", processes=3)
    assert told == report and [s.input_ids.tolist() for s in stored] == [
        s.input_ids.tolist() for s in samples
    ]
    readers = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                if kept != chats:
                    os._exit(1)
            os._exit(0)
        readers.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in readers] == [0] * 4


def test_the_mask_explorer_shows_them():
    from cbnb.widgets.masks import as_shelf

    shelf = as_shelf(spool_transcripts(chats := make_transcripts("plain", 5)))
    assert (
        shelf.at(4) == chats[3]
        and [id for _, id, _ in shelf.listing] == [t.id for t in chats]
        and not shelf.more
    )
