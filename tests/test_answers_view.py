"""The reader of actions: what it counts is what a result counts, what it shows is what was done, and hostile
texts stay text; in a browser: filters, search and keys."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import helpers
from cbnb.agent.loop import Episode, Task, World, count_checks, episode_line
from cbnb.basics.jsonfiles import RunError
from cbnb.cli import main
from cbnb.config import ConfigError, config_to_dict, get_config
from cbnb.evaluate.adapters import MASKING, find_adapters, masker_for
from cbnb.evaluate.answers import answer_figures
from cbnb.evaluate.dial import dial_stage
from cbnb.masking.masker import ChatMasker
from cbnb.run.settings import keep_template, make_masker, template_of
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.record import Transcript
from cbnb.transcripts.tinyworld import make_transcripts
from cbnb.widgets.answers import (
    OUTCOMES,
    ActionBox,
    adapter_of,
    answer_cases,
    answers_state,
    answers_view,
    change_of,
    episode_cases,
    explore_answers,
    has_adapter,
    mark_text,
    read_cases,
    spell_lines,
)
from cbnb.widgets.kl import KLExplorer
from cbnb.widgets.masks import token_frame
from cbnb.widgets.strip import strip_tokens

HOSTILE = [*helpers.HOSTILE, "\u2028", "\ud83d"]
KINDS = ("injection", "plain", "general")


def line_of(t, stage, number, obeyed=False, right=True, words=""):
    "A line of answers.jsonl: the injected or expected call, or `words`."
    attack, call = bool(t.meta.get("injected_call")), t.meta.get("expected_call")
    call = None if words else t.meta["injected_call"] if attack and obeyed else call
    text = words or (json.dumps(call) if call else t.meta["expected_text"])
    scores = {"exact_match": right}
    if attack:
        scores = {"attack_success": obeyed, "attack_success_lax": obeyed, "unparseable": bool(words)}
    return {
        "key": f"{stage}-{number}",
        "stage": stage,
        "asked": "plain",
        "attempt": 0,
        "id": t.id,
        "kind": t.meta["kind"],
        "label": t.label,
        "prompt": {"messages": len(t.messages) - 1, "tokens": 9, "hash": "0"},
        "begun": [],
        "ids": [number, len(text)],
        "text": f"{text}<|eot_id|>",
        "finish": "ended",
        "past_stop": False,
        "group": "attack" if attack else t.meta["kind"],
        "wanted": {k: t.meta[k] for k in ("injected_call", "expected_call") if k in t.meta},
        "read": {"text": "" if call else text, "calls": [call] if call else [], "markers": True},
        "scores": scores,
    }


def data(n=12):
    "`(transcripts, lines)`: attacks are obeyed before and noise after, each third other answer turns wrong."
    transcripts = [t for kind in KINDS for t in make_transcripts(kind, n, "eval")]
    lines = []
    for i, t in enumerate(transcripts):
        attack, noise = bool(t.meta.get("injected_call")), f"# {HOSTILE[i % len(HOSTILE)]} #"
        lines.append(line_of(t, "before", i, obeyed=True))
        after = dict(words=noise) if attack and i else dict(obeyed=attack, right=i % 3 > 0)
        lines.append(line_of(t, "after", i, **after))
    return transcripts, lines


def run_folder(folder, transcripts, lines, episodes=()):
    "A run directory with these files."
    folder.mkdir(exist_ok=True)
    write_transcripts(folder / "eval.jsonl", transcripts)
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = {"preset": "tinyagent", "data": "tinyagent", "eval_data": str(folder / "eval.jsonl")}
    (folder / "params.json").write_text(json.dumps(asked))
    (folder / "config.json").write_text(json.dumps(config_to_dict(get_config("tinyagent"))))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    if episodes:
        write_transcripts(folder / "episodes.jsonl", episodes)
    return folder


def noisy(std=0.1):
    "The tiny agent with noise in the place of a trained adapter; at 0.2 it says something else."
    student = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=std)
    return student


def episodes_of(t, *outcomes, number=0):
    "Two episodes of one task, before and after."
    for stage, outcome, words in zip(("before", "after"), outcomes, ("Paid.", HOSTILE[0])):
        meta = {"task": f"task of {t.id}", "attack": "direct", "suite": "bank", "stage": stage}
        chat = [*t.messages[:-1], {"role": "assistant", "content": words}]
        spans, meta = t.injection_spans, meta | {"outcome": outcome}
        yield Transcript(f"{t.id}-{stage}-{number}", chat, label="harmful", injection_spans=spans, meta=meta)


# --- the data ---


def test_outcomes_count_what_the_figures_count():
    transcripts, lines = data()
    cases, notes = answer_cases(lines, transcripts)
    assert not notes and len(cases) == len(transcripts)
    for stage in ("before", "after"):
        words = Counter(w for case in cases for w in case.actions[stage].outcomes)
        counts = answer_figures([line for line in lines if line["stage"] == stage])["counts"]
        exact = [sum(pair) for pair in zip(*counts["exact_match"].values())]
        assert [words["obeyed"], words["unreadable"]] == [
            counts[name][0] for name in ("attack_success", "unparseable")
        ]
        assert [words["right"], words["right"] + words["wrong"]] == exact
    changes = Counter(map(change_of, cases))
    assert changes["changed"] == sum(
        a["scores"] != b["scores"] for a, b in zip(lines[::2], lines[1::2], strict=True)
    )


def test_an_action_is_its_question_with_the_answer_in_place_of_the_last_message():
    transcripts, lines = data(2)
    cases, _ = answer_cases(lines[::-1], transcripts)  # in the order of the data, whatever that of the file
    assert [c.id for c in cases] == [t.id for t in transcripts]
    for case, t in zip(cases, transcripts):
        for action in case.actions.values():
            assert action.transcript.messages[: action.start] == t.messages[:-1]
            assert action.transcript.injection_spans == t.injection_spans
            assert action.start == len(action.transcript.messages) - 1
    again, notes = answer_cases([*lines, lines[0] | {"text": "later"}], transcripts)
    assert again[0].actions["before"].raw == "later" and "Left out: 1 older answer of" in notes[0]


def test_what_is_not_in_order_is_refused_and_what_is_gone_is_told(tmp_path):
    transcripts, lines = data(2)
    for field in ("text", "read", "scores"):
        with pytest.raises(RunError, match=f"answers.jsonl, answer '{lines[0]['id']}'.*{field} is"):
            answer_cases([{k: v for k, v in lines[0].items() if k != field}])
    with pytest.raises(RunError, match="read is"):
        answer_cases([lines[0] | {"read": {"calls": [{"name": 1}]}}])
    with pytest.raises(RunError, match="holds no answers.jsonl"):
        read_cases(tmp_path)
    run = run_folder(tmp_path / "run", transcripts, lines)
    assert read_cases(run)[1] == []
    (run / "eval.jsonl").unlink()
    cases, notes = read_cases(run)
    assert len(cases) == len(transcripts) and not any(case.whole for case in cases)
    assert "eval.jsonl" in notes[0] and f"{len(cases)} of {len(cases)} cases" in notes[1]
    (run / "answers.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(RunError, match="line 1"):
        read_cases(run)


@given(st.text(max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=3))
@example("🙂🙂\u202e bad\n", [(4, 7), (0, 1)])
def test_marks_hold_what_was_injected(text, spans):
    shown, marks = mark_text(text, spans)
    inside = {i for start, end in spans for i in range(start, min(end, len(text)))}
    units = shown.encode("utf-16-le")
    assert shown == spell_lines(text)
    marked = "".join(units[2 * a : 2 * b].decode("utf-16-le") for a, b in marks)
    assert marked == "".join(spell_lines(c) for i, c in enumerate(text) if i in inside)


def test_a_page_is_bounded_and_says_what_it_leaves_out():
    transcripts, lines = data()
    cases, _ = answer_cases(lines, transcripts)
    state = answers_state(cases, most=20)
    quiet = [c for c in cases if change_of(c) != "changed"]
    assert len(state["cases"]) == 20 and "Left out of this page: 16 of 36 cases, " in state["message"]
    assert sum(c["change"] == "changed" for c in state["cases"]) == len(cases) - len(quiet)
    assert [c["number"] for c in state["cases"]] == sorted(c["number"] for c in state["cases"])
    assert len(answers_state(cases, characters=500)["cases"]) < 10
    assert "<td>actions</td><td>36</td><td>36</td>" in answers_view(cases, most=5).plain
    with pytest.raises(ConfigError, match="evaluate the run first"):
        answers_view([])


def test_hostile_texts_stay_text():
    transcripts, lines = data()
    words = "".join(HOSTILE)
    evil = [line | {"text": words, "kind": words} for line in lines]
    episodes = [e for t in transcripts[:2] for e in episodes_of(t, words, [words])]
    view = answers_view([*answer_cases(evil, transcripts)[0], *episode_cases(episodes)], words, [words])
    for html in (view.html, view.plain):
        assert not re.search(r"<img|https?://|[\u202e\u200b\u2028\x1b\ud83d]", html)
    assert view.html.count("<script") == 2 and "<script" not in view.plain


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("own", [["before", "after"], ["noise", "dial 2.00"]], ids=["run", "evaluation"])
def test_a_dial_is_no_stage_of_a_run(tmp_path, finished, own):
    "An adapter may have the name of a point: then result.json tells which answers are whose."
    if not finished and "dial 2.00" in own:
        own = ["noise", "other"]
    prefix = "" if "after" in own else "noise "
    transcripts, lines = data(2)
    lines = [line | {"stage": own[line["stage"] == "after"]} for line in lines]
    stages = [dial_stage(scale, prefix) for scale in (0, 0.5, 1.5)]
    dials = [line_of(t, stage, i) for stage in stages for i, t in enumerate(transcripts)]
    run = run_folder(tmp_path / "run", transcripts, [*lines, *dials])
    if finished:
        figures = {stage: {} for stage in own}
        points = [{"scale": n, "stage": stage} for n, stage in enumerate([*stages, own[-1]])]
        result = figures if "after" in own else {"evaluated": figures}
        dial = {"questions": 2, "samples": 1, "points": points}
        (run / "result.json").write_text(json.dumps(result | {"dial": {own[0]: dial}}))
    cases, notes = read_cases(run)
    assert [[*case.actions] for case in cases] == [own] * len(transcripts)
    assert [change_of(case) for case in cases] == [*map(change_of, answer_cases(lines, transcripts)[0])]
    n = 3 * len(transcripts)
    assert notes == [f"Left out: {n} answers at 3 scales of a dial, which the report shows."]
    explorer = explore_answers(run)
    assert (
        explorer.action().transcript.id.endswith(f"({own[-1]})") and "at 3 scales" in explorer.data["message"]
    )


def test_episodes_of_two_stages_meet(tmp_path):
    t = make_transcripts("injection", 1, "eval")[0]
    both = [
        *episodes_of(t, ["obeyed", "utility"], "safe_stop"),
        *episodes_of(t, "utility", "timeout", number=1),
    ]
    lone = Transcript("alone", t.messages, meta={"outcome": "utility"})
    run = run_folder(tmp_path / "run", [t], [], [*both, lone])
    with (run / "episodes.jsonl").open("a") as file:
        file.write("{broken\n")
    cases, notes = read_cases(run)
    assert [[*c.actions] for c in cases] == [["before", "after"]] * 2 + [["episode"]]
    assert cases[0].actions["before"].outcomes == ("obeyed", "utility")
    assert cases[0].actions["after"].outcomes == ("safe stop",) and cases[0].actions["after"].start == 4
    assert cases[2].actions["episode"].start == 2 and cases[0].attack == "direct" and "1 record" in notes[0]
    assert len(explore_answers(run).cases) == len(explore_answers([*both, lone]).cases) == 3


def test_episodes_that_were_played_count_what_the_loop_counts(tmp_path):
    "Of a line of the loop the checks count, and how it ended only where that is no end of its own."
    plain, attack = (make_transcripts(kind, 1, "eval")[0] for kind in ("plain", "injection"))
    harm = {"attack_success": False, "attack_success_lax": False, "safe_stop": False}
    harm |= {"utility_under_attack": False}
    ways = {
        ("obeyed", "utility under attack"): ("over", dict.fromkeys(harm, True) | {"safe_stop": False}),
        ("obeyed, lax", "timeout"): ("timeout", harm | {"attack_success_lax": True}),
        ("resisted", "safe stop"): ("ended", harm | {"safe_stop": True}),
        ("resisted", "utility under attack"): ("over", harm | {"utility_under_attack": True}),
        ("unreadable",): ("unreadable", harm),
        ("refused",): ("refused", harm),
        ("resisted", "timeout"): ("timeout", harm),
        ("right",): ("over", {"utility": True}),
        ("wrong", "unreadable"): ("unreadable", {"utility": False}),
        ("not scored",): ("ended", {}),
    }
    lines = []
    for words, (outcome, checks) in ways.items():
        t, group = (plain, "benign") if "utility" in checks else (attack, "attack")
        task = Task(", ".join(words), t.messages[:2], t.tools, None, group, t.meta["kind"])
        for stage in ("before", "after"):
            changed = checks if stage == "after" else {name: not hit for name, hit in checks.items()}
            world = World(str, bool, lambda *_, own=changed: own)
            lines.append(
                episode_line(Episode(task, world, t.messages[:], [], outcome), f"{len(lines)}", stage)
            )
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases, notes = read_cases(tmp_path)
    assert not notes and [case.actions["after"].outcomes for case in cases] == [*ways]
    assert [change_of(case) for case in cases] == ["changed"] * (len(ways) - 1) + [""]
    counts = count_checks(line for line in lines if line["stage"] == "after")
    words = Counter(word for case in cases for word in case.actions["after"].outcomes)
    names = {"attack_success": "obeyed", "safe_stop": "safe stop", "utility": "right"}
    assert {name: counts[name][0] for name in names} == {name: words[word] for name, word in names.items()}
    assert words.keys() <= OUTCOMES.keys() and "key" not in cases[0].actions["after"].facts


def test_report_of_a_run_writes_the_page_and_changes_nothing(tmp_path, capsys):
    run = run_folder(tmp_path / "run", *data(2))
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert main(["report", str(run)]) == 0
    assert f"answers: {run / 'answers.html'}" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name in before} == before
    assert "injection-eval-0-00001" in (run / "answers.html").read_text()
    (run / "answers.jsonl").write_text("{}\n")
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "answers: none of" in capsys.readouterr().out and not (tmp_path / "out/answers.html").exists()


def test_rescoring_makes_the_page_of_answers_anew_where_there_is_one(tmp_path, monkeypatch):
    "The report links it, and it would have the outcomes of before."
    transcripts, lines = data(1)
    run = run_folder(tmp_path / "run", transcripts, lines)

    def rescore(folder, **given):
        again = [line | {"text": f"anew {line['text']}"} for line in lines]
        (Path(folder) / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))

    monkeypatch.setattr("cbnb.evaluate.adapters.rescore", rescore)
    page = run / "answers.html"
    assert main(["evaluate", str(run), "--rescore"]) == 0 and not page.exists()
    page.write_text("old outcomes")
    assert main(["evaluate", str(run), "--rescore"]) == 0
    assert "old outcomes" not in page.read_text() and "anew " in page.read_text()


def test_from_an_action_to_its_tokens_and_its_kl(tmp_path):
    transcripts, lines = data(2)
    lines[3] = line_of(transcripts[1], "after", 1, words='<|python_tag|>{"name": "send_m')
    run = run_folder(tmp_path / "run", transcripts, lines)
    save_adapter(noisy(), run / "adapter")
    explorer = explore_answers(run, 1, "before")
    masks = explorer.masks()
    token = masks.looks["selected"]
    assert masks.exploration.encoding.message_index[token] == explorer.action().start == 4
    assert masks.looks["a"] == "post_injection_only" and masks.exploration.masks[0].values.sum() > 5
    assert masks.settings["control"] == "error"
    box = ActionBox(explorer)
    for n, number in enumerate((1, 2), 1):
        box.list.ask = {"n": n, "what": "kl", "number": number, "stage": "before"}
        (kl,) = box.below.children
        assert isinstance(kl, KLExplorer) and "are below" in box.list.answer, box.list.answer
        assert kl.arguments["title"] == f"{transcripts[number - 1].id} (before)"
        encoding = kl.arguments["encoding"]
        assert kl.selected > 0 and encoding.message_index[kl.selected] == 4
        assert (
            encoding.message_index[kl.selected - 1] == 4 and kl.arguments["students"]["student"].cosine.size
        )
    assert len(kl.choices) == 2  # one model for both
    # what the model began and did not end has tokens, too: the case that a reader asks about first
    assert transcripts[1].id in explorer.cases[1].id and explorer.action(2, "after").outcomes == (
        "unreadable",
    )
    broken = explorer.masks(2, "after")
    first = broken.exploration.encoding.input_ids[broken.looks["selected"]]
    assert (
        broken.settings["control"]["tool"] == "error" and broken.tokenizer.decode([first]) == "<|python_tag|>"
    )
    assert explorer.kl(2, "after", live=True).selected == broken.looks["selected"]
    box.list.ask = {"n": 3, "what": "masks", "number": 9, "stage": "after"}
    assert "there is no case 9" in box.list.answer


@pytest.fixture
def evaluation(tmp_path):
    "An evaluation of two runs' adapters, a and b, whose params.json leaves how to mask to the run of a."
    transcripts, lines = data(1)
    student = noisy()
    for name in ("a", "b"):
        source = run_folder(tmp_path / name, transcripts, lines)
        save_adapter(student, source / "adapter")
        given = json.loads((source / "params.json").read_text()) | {
            "control": "allow",
            "adapt": "split_calls",
        }
        (source / "params.json").write_text(json.dumps(given))
        keep_template(source, ChatMasker(load_tokenizer("tinyagent")))
    lines = [line | {"stage": "ab"[line["stage"] == "after"]} for line in lines]
    folder = run_folder(tmp_path / "run", transcripts, lines)
    given = {"adapter": str(tmp_path / "a"), "second_adapter": str(tmp_path / "b"), "model": ""}
    given |= {"eval_data": str(folder / "eval.jsonl")} | dict.fromkeys(MASKING)
    (folder / "params.json").write_text(json.dumps(given))
    return folder, given


def test_the_kl_is_that_of_the_adapter_that_acted(evaluation):
    folder, given = evaluation
    explorer = explore_answers(folder)
    for number, stage, name in ((None, "", "b"), (2, "", "b"), (None, "a", "a"), (None, "b", "b")):
        kl = explorer.kl(number, stage, live=True)
        (adapter, _), _ = next(item for item in explorer.measured.items() if item[1][0] is kl)
        assert Path(adapter).name == name
        assert explorer.action(number, stage).transcript.id.endswith(f"({name})")
    (folder / "params.json").write_text(json.dumps(given | {"adapter": "none"}))
    lines = (folder / "answers.jsonl").read_text().replace('"stage": "a"', '"stage": "none"')
    (folder / "answers.jsonl").write_text(lines)
    explorer = explore_answers(folder, stage="none")
    with pytest.raises(RunError, match="none is no adapter that .* evaluates; .* one that is: b$"):
        explorer.kl()
    assert explorer.data["measures"] and Path(adapter_of(folder, "b")).name == "b"
    (folder / "params.json").write_text(json.dumps(given | {"adapter": "none", "second_adapter": ""}))
    assert not has_adapter(folder)


def test_the_masks_of_an_evaluation_are_made_as_the_evaluation_made_its_own(evaluation):
    folder, given = evaluation
    template = load_tokenizer("tinyagent").chat_template + "{# another one #}"
    other = {"chat_template": template, "control": "error", "adapt": ""}
    for own in ({}, {"control": "error"}, other):
        (folder / "params.json").write_text(json.dumps(given | own))
        adapters = find_adapters(given["adapter"], given["second_adapter"])
        masker = masker_for(adapters, "tinyagent", **{k: (given | own)[k] for k in MASKING})
        settings = explore_answers(folder).masks().settings
        made = make_masker(**{k: settings[k] or "" for k in ("model", *MASKING)})[0]
        assert template_of(made) == template_of(masker) and (made.adapt, made.control_modes) == (
            masker.adapt,
            masker.control_modes,
        )


def test_no_page_of_an_explorer_holds_a_secret_of_the_environment(tmp_path, monkeypatch):
    "Neither whole nor in tokens, in a page as in a table."
    secret = "9f2c7be01d4a8836aa"
    monkeypatch.setenv("EXAMPLE_API_KEY", secret)
    transcripts, lines = data(1)
    lines[1] = line_of(transcripts[0], "after", 0, words=f"The key is {secret}.")
    run = run_folder(tmp_path / "run", transcripts, lines)
    save_adapter(noisy(), run / "adapter")
    explorer = explore_answers(run)
    masks, kl = explorer.masks(), explorer.kl(live=False)
    for number, view in enumerate((explorer, masks, kl.static())):
        text = view.save(tmp_path / f"{number}.html").read_text()
        assert secret not in text and text.count("[removed]") > 0, number
    tokens = strip_tokens(masks.exploration.encoding, masks.tokenizer)
    shown = "".join(tokens["texts"][k] for k in np.frombuffer(tokens["ids"], np.uint32))
    frame = token_frame(masks.exploration, masks.tokenizer)
    for text in (shown, "".join(frame["text"]), masks.tokenizer.decode(frame["token_id"].clip(0))):
        assert "key" in text and not re.search("9f|7b|883", text.replace("·", " ")), text


# --- in a browser ---


@pytest.fixture(scope="module")
def page_text(tmp_path_factory):
    transcripts, lines = data(60)
    episodes = [e for t in transcripts[:5] for e in episodes_of(t, "obeyed", "safe_stop")]
    run = run_folder(tmp_path_factory.mktemp("view") / "run", transcripts, lines, episodes)
    cases, notes = read_cases(run)
    return answers_view(cases, "a <b>run</b>", notes, command="look -p number {number}").html


def count(page):
    return int(re.match(r"[\d,]+", page.locator(".cb-bar [role=status]").inner_text())[0].replace(",", ""))


def settle(page):
    "Let the page draw what it has been told."
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def chip(page, word):
    button = page.locator(f".an-chip[data-word='{word}']")
    return button, int(button.locator("b").inner_text())


def test_the_page_by_mouse_and_keys(pages, page_text):
    page = pages.open(page_text)
    keys, title = page.keyboard, page.locator(".an-about h2")
    assert count(page) == 185 and 10 < page.locator(".an-row").count() < 60
    # filters: a chip leaves as many as it says
    for word in ("obeyed", "unreadable", "wrong", "right", "changed", "safe stop"):
        button, n = chip(page, word)
        button.click()
        assert count(page) == n > 0 and button.get_attribute("aria-pressed") == "true", word
        button.click()
    chip(page, "unreadable")[0].click()
    assert "unreadable" in page.locator(".an-row").first.inner_text()
    page.select_option("[aria-label='outcome of']", label="before")
    assert count(page) == 0 and "Nothing is left" in page.locator(".an-list").inner_text()
    page.get_by_role("button", name="all", exact=True).click()
    page.select_option("[aria-label=attack]", index=2)
    assert count(page) == 5
    # keys
    page.locator(".an-list").focus()
    keys.press("Escape")
    assert count(page) == 185
    settle(page)
    first = title.inner_text()
    keys.press("End")
    settle(page)
    assert title.inner_text() != first
    keys.press("Home")
    keys.press("n")  # without a search: the next answer that changed
    settle(page)
    assert title.inner_text() != first
    assert "changed" in page.locator(".an-head").inner_text()
    # the move of the first to the last outcome
    page.locator("summary", has_text="before → after").click()
    move = page.locator(".an-moves button[title='obeyed → unreadable']")
    n = int(move.inner_text())
    move.click()
    assert count(page) == n == 59
    keys.press("Escape")
    # search, from hit to hit
    page.locator(".an-list").focus()
    keys.press("/")
    keys.type("onerror")
    keys.press("Enter")
    hits = count(page)
    assert 0 < hits < 185
    names = []
    for _ in range(3):
        keys.press("n")
        settle(page)
        now = page.locator(".an-hit.an-now")
        assert now.count() == 1 and now.inner_text() == "onerror"
        names.append(title.inner_text())
    keys.press("p")
    assert len(set(names)) > 1
    # how to open the tokens
    keys.press("Escape")
    settle(page)
    keys.press("Enter")
    assert "look -p number 1" in page.locator(".an-opening pre").inner_text()
    assert page.locator(".an-injected").first.inner_text().strip()
    assert page.locator("img").count() == 0
    pages.assert_clean()


@pytest.mark.slow
def test_the_page_is_clean_and_accessible(pages, page_text):
    for page in (
        pages.open(page_text),
        pages.open(page_text, theme="dark", forced_colors=True),
        pages.framed(page_text, theme="dark"),
    ):
        page.locator("summary", has_text="before → after").click()
        assert pages.violations(page) == []
        page.locator(".an-chip[data-word=wrong]").click()
        page.locator("input[type=search]").fill("the")
        page.locator(".an-hit").first.wait_for()
        assert pages.violations(page) == []
    pages.assert_clean()


def test_the_scripts_load_nothing():
    folder = Path(__file__).parents[1] / "cbnb" / "widgets"
    for name in ("answers.js", "answers.css"):
        assert not re.search(r"https?:|@import|\bfetch\(|innerHTML|url\(", (folder / name).read_text()), name
