"""The office of a pretrained agent (cbnb.transcripts.office) as all that reads transcripts sees it: by the
template of `smollm2`, in masks, in the reader, as twins, as questions; and the files of `cbnb office`."""

import hashlib
import json
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest

from cbnb.agent.agentdojo_truth import ATTACKS, truth_transcripts
from cbnb.agent.office_files import truth_parts, write_office
from cbnb.cli import main
from cbnb.config import get_config
from cbnb.data.streams import StreamReport
from cbnb.data.twins import draft_twins, encode_twins
from cbnb.evaluate.benchmarks import questions
from cbnb.evaluate.reader import derive_reader
from cbnb.evaluate.scores import check_readable, group_of, score
from cbnb.masking.masker import ChatMasker
from cbnb.masking.owned import owned_tokens, span_place
from cbnb.masking.policies import find_policy
from cbnb.step.models import load_tokenizer
from cbnb.transcripts.holdout import prompt_key
from cbnb.transcripts.office import OFFICE_KINDS, count_wordings, office_tables, office_transcripts
from cbnb.transcripts.reader import read_transcripts
from cbnb.transcripts.tinyworld import TASK_KINDS, make_transcripts
from helpers import ROOT
from outside import smollm2_cache

TINY = "9d9af5a25d26d18da7b4e0bc09b203350eac9826f1f8a7edc4a8c75ee046e7d1"


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    "The hub's cache with `smollm2` in it."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(smollm2_cache()))


@cache
def masker():
    return ChatMasker(load_tokenizer("smollm2"))


@cache
def sample():
    "Twenty of each kind of the office, and of the suite that is held out."
    return [
        t
        for suite, split in (("office", "train"), ("travel", "eval"))
        for kind in OFFICE_KINDS
        for t in office_transcripts(kind, 20, split, suite=suite)
    ]


@cache
def encodings():
    return masker().encode_batch(sample())


def test_the_tiny_world_is_what_it_was_before_the_office():
    "Every figure of the tiny agent stands on these bytes: they were taken before worlds became tables."
    rows = [
        [make_transcripts(kind, 80, split, seed) for kind in TASK_KINDS]
        for split in ("train", "eval")
        for seed in (0, 5)
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest() == TINY


def test_there_are_several_hundred_wordings():
    counts = count_wordings()
    assert sum(counts.values()) == 580 and min(counts["injections"], counts["quotes"], counts["notes"]) == 60
    asks = {t.messages[1]["content"] for t in office_transcripts("plain", 1000)}
    assert len(asks) == 1000


def test_held_out_wordings_and_prompts_are_not_trained():
    train = [t for kind in OFFICE_KINDS for t in office_transcripts(kind, 300)]
    held = [
        t
        for suite in ("office", "travel")
        for kind in OFFICE_KINDS
        for t in office_transcripts(kind, 100, "eval", suite=suite)
    ]
    assert not {prompt_key(t) for t in train} & {prompt_key(t) for t in held}
    names = {tool["function"]["name"] for t in train for tool in t.tools}
    assert len(names) == 16
    assert not names & {
        tool["function"]["name"] for t in held if t.meta["suite"] == "travel" for tool in t.tools
    }
    a, b = office_tables("train"), office_tables("eval")
    for name in ("asks", "questions", "notes", "injections", "quotes", "system"):
        assert getattr(a, name) and getattr(b, name) and not {*getattr(a, name)} & {*getattr(b, name)}, name
    for name in ("actions", "sensitive"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert ours.keys() == theirs.keys(), name
        for tool in ours:
            orders = [{*table[tool][3]} for table in (ours, theirs)]
            assert all(orders) and not orders[0] & orders[1], tool


def test_rows_are_short():
    "Measured over the 200: `pytest -s` prints the figures."
    lengths = [len(e.input_ids) for e in encodings()]
    marks = np.percentile(lengths, [0, 5, 50, 95, 100]).astype(int)
    print("tokens, least, 5 %, median, 95 %, most:", *marks)
    assert 300 < marks[0] and 400 < marks[2] < 500 and marks[-1] < 700


@pytest.mark.parametrize("policy", ["assistant_only", "completion_only"])
def test_masks_train_what_the_assistant_says(policy):
    for t, e in zip(sample(), encodings(), strict=True):
        mask = find_policy(policy)(e)
        roles = {t.messages[i]["role"] for i in set(e.message_index[mask].tolist())}
        assert roles == {"assistant"}, t.id
        words = masker().tokenizer.decode(e.input_ids[mask])
        final = t.messages[-1]
        target = final["content"] or json.dumps(final["tool_calls"][0]["function"], ensure_ascii=False)
        assert target in words, (t.id, words)


def answer_ids(t, e):
    "The tokens of the last message, as a model would generate them."
    prompt = masker().prompt_ids(t.messages[:-1], tools=t.tools)
    assert np.array_equal(prompt, e.input_ids[: len(prompt)]), t.id
    return e.input_ids[len(prompt) :].tolist()


def test_every_answer_is_read_back_and_scored():
    reader = derive_reader(masker())
    check_readable(reader, sample())
    for t, e in zip(sample(), encodings(), strict=True):
        answer = reader.read(answer_ids(t, e), t.tools)
        (question,) = questions(t)
        figures = score(question, answer, reader)
        assert answer.ended and figures.get("marker_fidelity", True), t.id
        if t.label == "harmful":
            assert answer.calls == [t.meta["injected_call"]] and group_of(t) == "attack"
            assert figures["attack_success"] and figures["attack_success_lax"]
            continue
        assert figures["exact_match"] and group_of(t) == t.meta["kind"], t.id
        assert answer.calls == ([t.meta["expected_call"]] if "expected_call" in t.meta else [])


def test_injected_text_is_found_token_by_token():
    for t, e in zip(sample(), encodings(), strict=True):
        for span in t.injection_spans:
            content = t.messages[span.message]["content"]
            own = owned_tokens(e, [span_place(e, content, span)])
            words = masker().tokenizer.decode(e.input_ids[own])
            assert own.sum() > 5 and words.strip()[2:-2] in content[span.start : span.end], (t.id, words)


@pytest.mark.parametrize("objective", ["rr_twin", "rr_twin_adv"])
def test_every_attack_has_a_twin(objective):
    config = get_config("smollm2", objective=objective, max_length=768)
    harmful = [t for t in sample() if t.label == "harmful"]
    drafts, report = draft_twins(harmful, [])
    assert len(drafts) == len(harmful) and {d.origin for d in drafts} == {"expected_call"}
    twins = encode_twins(drafts, masker(), config, report)
    assert isinstance(report, StreamReport) and len(twins) >= 0.95 * len(harmful), report


def test_a_command_writes_the_same_files_twice(tmp_path, capsys):
    words = ["--transcripts", "60", "--held-out", "2", "--seed", "3"]
    assert main(["office", str(tmp_path / "a"), *words]) == main(["office", str(tmp_path / "b"), *words]) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "heldout.jsonl",
        "office.json",
        "train.jsonl",
    ]
    for name in ("train.jsonl", "heldout.jsonl", "office.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "office.json").read_text())
    rows = [*read_transcripts(tmp_path / "a" / "train.jsonl")]
    assert len(rows) == 60 == record["train"]["transcripts"] and record["settings"]["seed"] == 3
    assert record["heldout"]["suites"]["travel"] == 10 and "travel" not in record["train"]["suites"]
    capsys.readouterr()
    assert main(["office", str(tmp_path / "c"), *words, "--max-tokens", "400"]) == 2
    assert "model" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_the_folder_is_looked_at_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cbnb.agent.office_files.make_parts", None)  # it is not called
    (tmp_path / "file").write_text("")
    assert main(["office", str(tmp_path / "file")]) == 2 and "cannot be written" in capsys.readouterr().err
    for name in ("train.jsonl", "heldout.jsonl"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        assert main(["office", str(folder)]) == 2 and "is not replaced" in capsys.readouterr().err
        assert (folder / name).read_text() == "mine"


def test_the_model_is_opened_before_agentdojo_is_played(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no such model")

    monkeypatch.setattr("cbnb.agent.office_files.open_agent", refuse)
    monkeypatch.setattr("cbnb.agent.office_files.truth_transcripts", None)  # it is not called
    with pytest.raises(ValueError, match="no such model"):
        write_office(tmp_path, 20, 1, model="smollm2", general=True, agentdojo=1)
    assert not [*tmp_path.iterdir()]


def test_a_set_is_whole_or_has_no_record(tmp_path, monkeypatch):
    write_office(tmp_path, 20, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, rows):
        if "heldout" in path.name:
            raise OSError(28, "No space left on device")
        path.write_text("")

    with monkeypatch.context() as patch:
        patch.setattr("cbnb.agent.office_files.write_transcripts", full)
        with pytest.raises(OSError):
            write_office(tmp_path, 30, 1)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}, "the set before stands"
    monkeypatch.setattr("cbnb.agent.office_files.write_json", None)
    with pytest.raises(TypeError):
        write_office(tmp_path, 30, 1)
    assert not (tmp_path / "office.json").exists()


def test_rows_that_are_too_long_are_counted(tmp_path):
    record = write_office(tmp_path, 100, 2, model="smollm2", max_tokens=450)
    drops = record["drops"]["train"]["longer than 450 tokens"]
    assert 0 < drops < 100 and record["train"]["transcripts"] == 100 - drops
    assert record["train"]["tokens"]["most"] <= 450


def test_the_world_needs_no_torch():
    code = (
        "import sys, cbnb.transcripts.office as o; o.office_transcripts('plain', 1); "
        "print(sorted({'torch', 'transformers', 'fastcore'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.slow
def test_agentdojos_ground_truth_is_done_and_obeyed():
    "Of all four suites, by AgentDojo's own verdicts; what is dropped is counted."
    rows, drops = truth_transcripts(n=6)
    suites = {t.meta["suite_name"] for t in rows}
    assert suites == {"workspace", "banking", "slack", "travel"}
    harmful = [t for t in rows if t.label == "harmful"]
    benign = [t for t in rows if t.label == "benign"]
    print(len(benign), "benign", len(harmful), "harmful", dict(drops))
    assert len(benign) + len(harmful) + drops.total() == 40 + 16 + 21 + 20 + 4 * 6
    assert len(benign) > 80 and len(harmful) > 15 and {t.meta["attack_type"] for t in harmful} == {*ATTACKS}
    assert all(t.injection_spans and t.meta["security"] for t in harmful)
    drafts, _ = draft_twins(harmful, benign)
    assert sum(d.origin == "benign_run" for d in drafts) > 0.8 * len(harmful)
    parts, others = truth_parts(rows)
    assert len(parts["train"]) + len(parts["heldout"]) + others == len(rows)
    assert {t.meta["suite_name"] for t in parts["train"]} == suites - {"travel"}
    for key in ("user_task_id", "injection_task_id"):
        tasks, held = (
            {(t.meta["suite_name"], t.meta[key]) for t in parts[name] if t.meta.get(key)}
            for name in ("train", "heldout")
        )
        assert tasks and held and not tasks & held, key
