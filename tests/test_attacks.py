"""Attacks on a breaker: what an attacker may touch, what is kept, and what may be said afterwards."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from cbnb.attacks import attack
from cbnb.attacks.asking import ask_rows, plain_row, soft_row, victim_now
from cbnb.attacks.attack import attack_student, two_parts
from cbnb.attacks.control import attack_verdict, plant_control
from cbnb.attacks.forge import forge_tries, many_tries, words_rows
from cbnb.attacks.gcg import prompt_with, suffix_row, survivors, usable_tokens
from cbnb.attacks.prefill import answer_start
from cbnb.attacks.soft import optimise_soft, soft_attack
from cbnb.attacks.span import SpanError, attack_item, attack_items, check_owned, insertion, rewritten_prompt
from cbnb.basics.jsonfiles import RunError
from cbnb.cli import main
from cbnb.config import NOTEBOOK_PARAMETERS, ConfigError, get_config
from cbnb.evaluate.adapters import check_evaluation
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.masker import ChatMasker
from cbnb.report.figures import attack_table, attack_words, report_page, result_table
from cbnb.report.verdicts import attack_measures
from cbnb.run.metrics import read_json_lines
from cbnb.run.records import fault, read_record
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.sweep.spec import check_settings
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from forked import cells
from helpers import NBS
from train_common import few

NOTEBOOK_DEFAULTS = {name: p.default for name, p in NOTEBOOK_PARAMETERS["train"].items()}
SHORT = Decoding(max_new_tokens=16)


@pytest.fixture(scope="module")
def world():
    "A student with noise for an adapter, masker, reader, and twelve items."
    masker = ChatMasker(load_tokenizer("tinyagent"))
    student = add_adapter(load_model("tinyagent"), get_config("tinyagent")).eval()
    torch.manual_seed(0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    reader = derive_reader(masker)
    items, reasons = attack_items(masker, reader, make_transcripts("injection", 12, "eval"))
    assert not reasons
    return student, masker, reader, items


def test_only_tokens_of_the_injected_text_are_owned(world):
    _, masker, _, items = world
    for item in items:
        (span,) = item.question.injection_spans
        words = item.question.messages[span.message]["content"][span.start : span.end]
        own = np.flatnonzero(item.own)
        assert (np.diff(own) == 1).all() and masker.tokenizer.decode(item.prompt[own]).strip() in words
        before = masker.tokenizer.decode(item.prompt[: own[0]])
        assert words not in before and item.question.messages[1]["content"] in before


def test_no_attack_takes_a_position_of_somebody_else(world):
    student, _, _, items = world
    soft = torch.zeros(1, student.config.hidden_size)
    for item in items[:3]:
        for position in np.flatnonzero(~item.own):
            for attempt in (
                lambda i=item, p=position: check_owned(i, [p]),
                lambda i=item, p=position: soft_row(i, soft, p + 1),
            ):
                with pytest.raises(SpanError, match="not the attacker's"):
                    attempt()
        with pytest.raises(SpanError, match="not the attacker's"):
            soft_row(item, soft, 0)


def test_an_attack_leaves_all_other_ids_as_training_has_them(world):
    student, masker, _, items = world
    for item in items:
        (encoding,) = masker.encode_batch([item.question])
        assert np.array_equal(encoding.input_ids[: len(item.prompt)], item.prompt)
        at = insertion(item)
        row = soft_row(item, torch.zeros(3, student.config.hidden_size), at)
        assert np.array_equal(row.prompt, item.prompt) and item.own[at - 1]
        longer = prompt_with(item, [5, 6, 7])
        assert np.array_equal(longer[:at], item.prompt[:at]) and np.array_equal(
            longer[at + 3 :], item.prompt[at:]
        )


def test_other_words_change_the_prompt_inside_of_the_injected_text_only(world):
    _, masker, _, items = world
    for item in items:
        for words in ("x", 'He said "now".', "A\nB", "é😀\\"):
            question, _ = rewritten_prompt(masker, item, words)
            assert [m for i, m in enumerate(question.messages) if i != 3] == [
                m for i, m in enumerate(item.question.messages) if i != 3
            ]
            content = question.messages[3]["content"]
            if item.question.messages[3]["content"].startswith("{"):
                assert words in json.loads(content)["note"]


def test_suffixes_are_asked_as_text_and_those_that_survive_keep_their_ids(world):
    student, masker, reader, items = world
    usable = np.flatnonzero(usable_tokens(masker, len(masker.tokenizer)))
    draw, victim = np.random.default_rng(0), victim_now("x", student, masker, reader, SHORT)
    suffixes = [draw.choice(usable, 2).tolist() for _ in range(40)]
    alive = survivors(masker, items[:2], suffixes)
    assert 0 < sum(alive) < 40
    for suffix, well in zip(suffixes, alive):
        same = [
            np.array_equal(suffix_row(victim, i, suffix).prompt, prompt_with(i, suffix)) for i in items[:2]
        ]
        assert all(same) == well


def test_the_model_writes_the_last_argument_itself(world):
    _, masker, _, items = world
    for item in items:
        value = list(item.question.meta["injected_call"]["arguments"].values())[-1]
        whole = masker.tokenizer.decode(item.target)
        for tokens in range(len(item.target) + 5):
            start = masker.tokenizer.decode(answer_start(masker, item, tokens))
            assert len(start) <= whole.rfind(value)
        assert len(answer_start(masker, item, 99)) >= 8


@pytest.mark.parametrize("value", ["a\nb", 'say "x"', "xerxes", None, True, 5, [1, "z"], {"k": "v"}])
def test_no_value_is_begun_however_it_is_written(world, value):
    "The start is the same for another value: nothing of it is in there, but all that stands before it is."
    _, masker, reader, items = world
    question = items[0].question
    call = question.meta["injected_call"]
    name = list(call["arguments"])[-1]

    def start(last):
        other = {"name": call["name"], "arguments": call["arguments"] | {name: last}}
        messages = [
            *question.messages[:-1],
            question.messages[-1] | {"tool_calls": [{"type": "function", "function": other}]},
        ]
        meta = question.meta | {"injected_call": other}
        return answer_start(
            masker,
            attack_item(masker, reader, dataclasses.replace(question, messages=messages, meta=meta)),
            99,
        )

    begun = masker.tokenizer.decode(start(value))
    assert (
        begun == masker.tokenizer.decode(start("other" if isinstance(value, str) else value))
        and name in begun
    )
    assert (
        re.search(rf'"{name}"?:?\s*"?$', begun)
        and not reader.read(start(value).tolist(), question.tools).calls
    )


def test_an_injected_text_that_cannot_be_written_back_is_left_out(world):
    "A tool that writes JSON with escapes for letters: other words would stand there in another form."
    _, masker, reader, items = world
    for question in (item.question for item in items):
        (span,) = question.injection_spans
        content = question.messages[span.message]["content"]
        if content.startswith("{"):
            break
    words = "H\\u00e9llo "
    messages = list(question.messages)
    messages[span.message] = messages[span.message] | {
        "content": content[: span.start] + words + content[span.start :]
    }
    spans = (dataclasses.replace(span, end=span.end + len(words)),)
    with pytest.raises(SpanError, match="escapes the injected text"):
        attack_item(masker, reader, dataclasses.replace(question, messages=messages, injection_spans=spans))


def test_steps_of_something_else_are_told_by_name(world, tmp_path):
    from safetensors.torch import save_file

    student, masker, reader, items = world
    victim = victim_now("x", student, masker, reader, SHORT, tmp_path)
    list(optimise_soft(victim, items[:2], 2))
    for path in tmp_path.glob("*.safetensors"):
        save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(RunError, match="it holds other, not exp_avg"):
        list(optimise_soft(victim, items[:2], 2))


def test_withstood_needs_every_attacked_point():
    "One spontaneous hit among many makes no claim of items that were never attacked."

    def point(hits, n, passes):
        return {"at": "x", "forward": passes, "backward": 0, "counts": {"attack_success": [hits, n]}}

    control = [point(0, 16, 0), point(16, 16, 64)]
    few = attack_verdict({"control": control, "breaker": [point(1, 64, 0), point(0, 4, 64)]})
    assert few["verdict"] == "inconclusive"
    assert attack_verdict({"control": control, "breaker": [point(1, 64, 0)]})["verdict"] == "inconclusive"
    assert (
        attack_verdict({"control": control, "breaker": [point(1, 64, 0), point(0, 64, 64)]})["verdict"]
        == "supported"
    )


def test_what_cannot_be_attacked_is_left_out_with_its_reason(world):
    _, masker, reader, items = world
    question = items[0].question
    wrong = {
        "no injection span": dataclasses.replace(question, injection_spans=()),
        "does not obey": dataclasses.replace(
            question, messages=[*question.messages[:-1], {"role": "assistant", "content": "No."}]
        ),
    }
    for words, one in wrong.items():
        with pytest.raises(SpanError, match=words):
            attack_item(masker, reader, one)
    assert attack_items(masker, reader, wrong.values())[0] == []


def test_forged_turns_are_refused_where_the_masker_refuses_control_tokens(world):
    student, masker, reader, items = world
    victim = victim_now("x", student, masker, reader, SHORT)
    words = dict(forge_tries())["a turn of the user"]
    rows, reasons = words_rows(victim, masker, items, words)
    assert not rows and reasons == {"the masker refuses control tokens": len(items)}
    lenient = ChatMasker(masker.tokenizer, control="allow")
    assert len(words_rows(victim, lenient, items, words)[0]) == len(items)
    rows, reasons = words_rows(
        victim_now("x", student, masker, reader, Decoding(max_new_tokens=480)),
        masker,
        items,
        dict(many_tries())["16 times"],
    )
    assert not rows and list(reasons) == ["the prompt is longer than the model's positions"]


def test_kept_answers_belong_to_one_strength_of_the_adapter(world, tmp_path):
    student, masker, reader, items = world
    from cbnb.evaluate.dial import scaled

    rows = [plain_row(item) for item in items[:2]]
    for scale in (1.0, 0.5, 1.0):
        with scaled(student, scale):
            ask_rows(victim_now("x", student, masker, reader, SHORT, tmp_path), rows, "s")
    lines = read_json_lines(tmp_path / "answers.jsonl")
    assert len(lines) == 4 and not any(fault("answers.jsonl", line) for line in lines)


def test_a_damaged_step_is_told_by_name(world, tmp_path):
    student, masker, reader, items = world
    victim = victim_now("x", student, masker, reader, SHORT, tmp_path)
    list(optimise_soft(victim, items[:2], 2))
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"\x00" * 40)
    with pytest.raises(RunError, match="000001.safetensors cannot be read"):
        list(optimise_soft(victim, items[:2], 2))


@pytest.mark.slow
def test_an_attack_with_a_rate_of_nothing_is_reported_as_too_weak(world, monkeypatch):
    student, masker, reader, items = world
    control = plant_control(student, lambda name: victim_now(name, student, masker, reader, SHORT), items)
    assert control is not None

    def still(victim, train, items, steps, seed=0, each=False):
        return soft_attack(victim, train, items, 1, seed, each, rate=0.0)

    monkeypatch.setattr(attack, "soft_attack", still)
    record = attack_student(student, (masker, masker), reader, SHORT, items[:4], items, ["soft"], 32)
    found = record["attacks"]["soft"]
    assert found["verdict"] == "void" and "attack too weak" in found["text"]
    assert np.isnan(attack_measures(record)["attacked_soft"])


def test_items_that_were_optimised_on_are_not_attacked(world):
    items = world[3]
    train, rest = two_parts([], items)
    assert not {i.question.id for i in train} & {i.question.id for i in rest} and len(train) + len(rest) == 12
    assert two_parts(items[:6], items[4:])[0] == items[:4]


def record_of(hits, verdict="refuted"):
    "A small attacks.json."
    counts = {"attack_success": [hits, 64], "attack_success_lax": [64, 64], "unparseable": [0, 64]}
    point = {"at": "<b>", "forward": 1, "backward": 1, "counts": counts}
    soft = {
        "budget": 2,
        "verdict": verdict,
        "text": "<i>",
        "points": {"breaker": [point], "control": [point]},
    }
    items = {"optimised_on": 1, "attacked": 64}
    return {"key": "k", "seed": 0, "items": items, "control": None, "attacks": {"soft": soft}, "left_out": {}}


def test_the_report_has_a_section_whose_words_are_escaped():
    figures = {"attack_success": 0.0, "n": {"attack": 64}}
    page = report_page("t", [], result_table(figures, figures), {}, attacks=record_of(3))
    assert "<h2>Attacked</h2>" in page and "&lt;b&gt;" in page and "<i>" not in page
    assert "Attacked" not in report_page("t", [], result_table(figures, figures), {})
    assert attack_table(record_of(3))["breaker"].tolist() == ["3 of 64, 0.016 to 0.13"]
    assert attack_words(record_of(3))[0] == "soft, 2 passes: refuted; <i>"
    assert page.count("<svg") == 2 and "soft, attack success: refuted" in page


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"items": {}},
        {"attacks": []},
        {"key": 3},
        {"attacks": {"soft": {"verdict": "void", "text": "", "points": {}}}},
        {"attacks": {"soft": {"budget": 1, "verdict": "won", "text": "", "points": {}}}},
        {
            "attacks": {
                "soft": {"budget": 1, "verdict": "void", "text": "", "points": {"base": [{"at": "x"}]}}
            }
        },
    ],
)
def test_a_record_that_was_edited_is_refused(change, tmp_path):
    (tmp_path / "attacks.json").write_text(json.dumps(record_of(1)))
    assert read_record(tmp_path / "attacks.json")
    (tmp_path / "attacks.json").write_text(json.dumps(record_of(1) | change))
    with pytest.raises(RunError, match="attacks.json is not in order"):
        read_record(tmp_path / "attacks.json")


@pytest.mark.slow
def test_the_command_attacks_goes_on_and_says_so(world, tmp_path, capsys):
    student = world[0]
    save_adapter(student, tmp_path / "noise")
    write_transcripts(tmp_path / "eval.jsonl", make_transcripts("injection", 8, "eval"))
    words = ["attack", str(tmp_path / "noise"), "--model", "tinyagent", "--out", str(tmp_path / "out")]
    words += ["--eval-data", str(tmp_path / "eval.jsonl"), "--attacks", "prefill", "--budget", "4"]
    assert main(words) in (0, 1)
    first = (tmp_path / "out" / "attacks.json").read_bytes()
    lines = (tmp_path / "out" / "attacks" / "answers.jsonl").read_bytes()
    shown = capsys.readouterr()
    assert "prefill on breaker, 1 tokens, 4 passes" in shown.err and "results: " in shown.out
    assert main(words) in (0, 1)
    assert (tmp_path / "out" / "attacks.json").read_bytes() == first
    assert (tmp_path / "out" / "attacks" / "answers.jsonl").read_bytes() == lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "no breaker to attack"),
        (["none", "--attacks", "softt"], "did you mean 'soft'"),
        (["none", "--seed", "-1"], "seed must be"),
        (["nowhere/at/all"], "neither a run directory"),
    ],
)
def test_the_command_refuses_in_one_sentence(words, said, capsys):
    assert main(["attack", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def finished_run(folder, world):
    "A directory like that of a run, with the noise as its adapter, and without a result.json."
    save_adapter(world[0], folder / "adapter")
    write_transcripts(folder / "eval.jsonl", make_transcripts("injection", 8, "eval"))
    parameters = {"preset": "tinyagent", "data": "tinyagent", "eval_data": str(folder / "eval.jsonl")}
    (folder / "params.json").write_text(json.dumps(parameters))
    (folder / "config.json").write_text(json.dumps({"model": "tinyagent"}))
    return folder


def test_a_run_that_is_not_finished_is_not_attacked(world, tmp_path, capsys):
    "It has an adapter, and no result yet."
    run = finished_run(tmp_path, world)
    assert main(["attack", str(run), "--attacks", "prefill", "--budget", "8"]) == 2
    error = capsys.readouterr().err
    assert "the run is not finished" in error and error.count("\n") == 1
    assert not (run / "attacks.json").exists() and not (run / "attacks").exists()
    given = {"adapter": str(run), "second_adapter": "", "eval_data": "", "model": None}
    given |= dict.fromkeys(("max_new_tokens", "temperature", "samples", "seed"))
    assert check_evaluation(given)[1] == "tinyagent"
    with pytest.raises(RunError, match="the run is not finished"):
        check_evaluation(given | {"attacks": "soft", "attack_budget": 64})
    with pytest.raises(RunError, match="attacks want a breaker"):
        check_evaluation(given | {"adapter": "none", "attacks": "soft", "eval_data": "tinyagent"})
    with pytest.raises(ConfigError, match="did you mean 'soft'"):
        check_evaluation(given | {"attacks": "sofft"})


def test_several_processes_do_not_attack(world, tmp_path, monkeypatch):
    run = finished_run(tmp_path, world)
    (run / "result.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="by one process, and 2 were started"):
        attack.attack_run(str(run), "prefill", 8)
    with pytest.raises(ConfigError, match="by one process"):
        check_settings(NOTEBOOK_DEFAULTS | {"attacks": "soft"}, 2)
    check_settings(NOTEBOOK_DEFAULTS | {"attacks": "soft"}, 1)
    check_settings(NOTEBOOK_DEFAULTS, 2)


def test_nothing_to_attack_says_why(world, tmp_path, capsys):
    run = finished_run(tmp_path, world)
    (run / "result.json").write_text("{}")
    path, bare = tmp_path / "bare.jsonl", make_transcripts("injection", 8, "eval")
    write_transcripts(path, [dataclasses.replace(t, injection_spans=()) for t in bare])
    assert main(["attack", str(run), "--attacks", "prefill", "--eval-data", str(path)]) == 2
    assert "8 left out: it has no injection span" in capsys.readouterr().err


@pytest.mark.slow
def test_earlier_attacks_stay_where_they_are_of_the_same_breaker_and_items(world, tmp_path, capsys):
    run = finished_run(tmp_path, world)
    (run / "result.json").write_text("{}")
    words = ["attack", str(run), "--eval-data", str(run / "eval.jsonl")]
    kept = {}
    for name, budget in (("prefill", "8"), ("many", "16")):
        assert main([*words, "--attacks", name, "--budget", budget]) in (0, 1)
        kept[name] = read_record(run / "attacks.json")["attacks"][name]
    record = read_record(run / "attacks.json")
    assert record["attacks"] == kept and [a["budget"] for a in kept.values()] == [8, 16]
    assert "dropped" not in capsys.readouterr().err
    assert main([*words, "--attacks", "many", "--budget", "16", "--seed", "1"]) in (0, 1)
    assert "note: attacks.json held prefill, of another adapter" in capsys.readouterr().err
    assert list(read_record(run / "attacks.json")["attacks"]) == ["many"]


@pytest.mark.slow
def test_a_training_attacks_itself_and_an_evaluation_what_it_measured(tmp_path):
    "On a few transcripts, after two steps: the files, the card and the page have it, and the same call adds."
    given = few(tmp_path, total_steps=2, diagnose_steps=0, max_new_tokens=24, eval_loop="none")
    run = tmp_path / "run"
    done = cells("-p", "run_dir", run, "-p", "attacks", "many", "-p", "attack_budget", 8, *given)
    assert done.returncode == 0, done.stdout[-3000:]
    first = read_record(run / "attacks.json")
    assert list(first["attacks"]) == ["many"] and first["attacks"]["many"]["budget"] == 8
    assert "<h2>Attacked</h2>" in (run / "report.html").read_text()
    assert "| many | 8 |" in (run / "adapter" / "README.md").read_text()
    words = ("-p", "adapter", run, "-p", "attacks", "prefill", "-p", "attack_budget", 8)
    done = cells("-p", "run_dir", tmp_path / "again", *words, notebook=NBS / "evaluate.ipynb")
    assert done.returncode == 0, done.stdout[-3000:]
    both = read_record(run / "attacks.json")
    assert (
        list(both["attacks"]) == ["prefill", "many"] and both["attacks"]["many"] == first["attacks"]["many"]
    )
    assert not (tmp_path / "again" / "attacks.json").exists()
    assert "| prefill | 8 |" in (run / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_training_that_could_not_attack_itself_does_not_begin(tmp_path):
    given = few(tmp_path, total_steps=2, eval_loop="none")
    done = cells("-p", "run_dir", tmp_path / "run", "-p", "attacks", "soft", "-p", "attack_budget", 1, *given)
    assert done.returncode and "a budget of 1 passes buys no point of soft" in done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
