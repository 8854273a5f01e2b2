"""Samples on disk are those that `encode_stream` makes: by policy, turn and number of processes; trained on
as a list is; nothing is left of what failed."""

from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

import cbnb.train.store
from cbnb.config import get_config
from cbnb.data.sources import Reading
from cbnb.data.streams import EmptyStream, PairedStreams, collate, encode_stream, refusals
from cbnb.masking.masker import ChatMasker
from cbnb.step.models import load_tokenizer
from cbnb.train.same import versions
from cbnb.train.store import StoredSamples, kept_for, pieces, stored_refusals, stored_stream
from cbnb.transcripts.record import TranscriptError
from cbnb.transcripts.tinyworld import TASK_KINDS, make_transcripts


@pytest.fixture(scope="module")
def masker():
    return ChatMasker(load_tokenizer("tinyagent"))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(cbnb.train.store, "STORE_PIECE", 7)


def equal(a, b):
    return (
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.loss_mask, b.loss_mask)
        and a.transcript == b.transcript
    )


CASES = {
    "plain": ("assistant_only", {}),
    "cut": ("assistant_only", {"max_length": 60, "lost_context": "keep"}),
    "cut and dropped": ("assistant_only", {"max_length": 60}),
    "by turn": ("completion_only", {"split_turns": True}),
    "calls": ("tool_calls_only", {}),
    "without targets": ("post_injection_only", {"max_length": 40, "truncation": "right"}),
}


@pytest.mark.parametrize("processes", (1, 3))
@pytest.mark.parametrize("case", CASES)
def test_rows_order_and_report_are_those_of_encode_stream(case, processes, masker, tmp_path):
    transcripts, (policy, how) = [t for kind in TASK_KINDS for t in make_transcripts(kind, 9)], CASES[case]
    samples, report = encode_stream(transcripts, masker, policy, **how)
    for _ in range(2):  # made, then found
        stored, told = stored_stream(tmp_path, transcripts, masker, policy, processes=processes, **how)
        assert told == report and len(stored) == len(samples) and all(map(equal, stored, samples))
    assert len([*tmp_path.iterdir()]) == 1


def test_a_stored_stream_is_trained_on_as_a_list_is(masker, tmp_path):
    pairs, lists = [], []
    for kind, policy in (("injection", "post_injection_only"), ("plain", "assistant_only")):
        transcripts = make_transcripts(kind, 20)
        lists.append(encode_stream(transcripts, masker, policy)[0])
        pairs.append(stored_stream(tmp_path, transcripts, masker, policy, processes=2)[0])
    wanted = DataLoader(PairedStreams(*lists, 24), 4, collate_fn=lambda some: collate(some, 0))
    for workers in (0, 1):
        for ours, theirs in zip(
            DataLoader(
                PairedStreams(*pairs, 24), 4, collate_fn=lambda some: collate(some, 0), num_workers=workers
            ),
            wanted,
            strict=True,
        ):
            assert all(
                ours[kind]["input_ids"].equal(theirs[kind]["input_ids"])
                and ours[kind]["loss_mask"].equal(theirs[kind]["loss_mask"])
                for kind in ("harmful", "benign")
            )


def test_what_cannot_be_encoded_leaves_nothing(masker, tmp_path):
    plain = make_transcripts("plain", 20)
    for make in (
        lambda: encode_stream(plain, masker, "assistant_only", 1),
        lambda: stored_stream(tmp_path, plain, masker, "assistant_only", processes=2, max_length=1),
    ):
        with pytest.raises(EmptyStream, match="the stream stream is empty, 20 transcripts read") as found:
            make()
        assert found.value.report.transcripts == 20
    with pytest.raises(TypeError, match="read twice"):
        stored_stream(tmp_path, iter(plain), masker, "assistant_only")
    with pytest.raises(TypeError, match="name of a policy"):
        stored_stream(tmp_path, plain, masker, lambda encoding: encoding)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("split_turns", (False, True))
def test_what_the_template_refuses_is_found_again_without_encoding(
    split_turns, masker, tmp_path, monkeypatch
):
    "The same transcripts for the same causes, whoever finds them."
    plain = make_transcripts("plain", 30)
    quoted = {"role": "user", "content": masker.tokenizer.eos_token}
    mixed = [replace(t, messages=[quoted, *t.messages]) if i % 10 == 4 else t for i, t in enumerate(plain)]
    wanted = {i: str(e) for i, e in enumerate(refusals(mixed, masker, split_turns)) if e is not None}
    assert [*wanted] == [4, 14, 24] and stored_refusals(
        tmp_path, mixed, masker, split_turns, processes=3
    ) == wanted
    config, one, two = (
        get_config("tinyagent", split_turns=split_turns),
        *(Reading(on_error="skip", records=30) for _ in range(2)),
    )
    kept = kept_for(config, mixed, masker, one)
    monkeypatch.setattr(cbnb.train.store, "refusals", None)
    assert (
        kept_for(config, mixed, masker, two, tmp_path) == kept == [t for t in plain if t in mixed]
        and one.record() == two.record()
    )
    with pytest.raises(
        TranscriptError, match="refuses transcripts: 3 of 20 records are skipped, above max_skipped 0.1"
    ):
        kept_for(config, mixed, masker, Reading(on_error="skip", records=20), tmp_path)
    assert kept_for(config, mixed, masker, Reading(), tmp_path) is mixed and len([*tmp_path.iterdir()]) == 1


def test_no_more_than_a_few_pieces_are_under_way(masker):
    "A stream without an end is encoded as far as it is asked for."
    read = []

    def endless():
        while True:
            read.append(1)
            yield plain[len(read) % 20]

    plain = make_transcripts("plain", 20)
    made = pieces(endless(), masker, "assistant_only", processes=2)
    for _ in range(3):
        next(made)
    made.close()
    assert len(read) <= 7 * (3 + 2 * 2)


def test_an_empty_file_is_a_sequence_of_nothing(tmp_path):
    report = cbnb.train.store.write_samples(tmp_path / "none.arrow", [])
    assert (
        len(StoredSamples(tmp_path / "none.arrow")) == 0 == report.transcripts
        and [*StoredSamples(tmp_path / "none.arrow")] == []
    )


def test_another_version_of_what_encodes_takes_no_samples_of_this_one(masker, tmp_path, monkeypatch):
    plain = make_transcripts("plain", 3)
    stored_stream(tmp_path, plain, masker, "assistant_only", processes=1)
    for library in ("tokenizers", "transformers", "jinja2", "Python"):
        monkeypatch.setattr(cbnb.train.store, "versions", lambda: versions() | {library: "0"})
        stored_stream(tmp_path, plain, masker, "assistant_only", processes=1)
    assert len([*tmp_path.iterdir()]) == 5
