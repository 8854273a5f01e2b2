"""An agent that acts: prompts are those of training, episodes are batched, resumed and counted, and the tiny
world sees what was done in it."""

import concurrent.futures
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from cbnb.agent import model as agent_model
from cbnb.agent.loop import Task, World, find_spans, loop_figures, play, play_tasks
from cbnb.agent.loops import choose_loop, find_loop, loop_player
from cbnb.agent.model import (
    Agent,
    Batcher,
    PromptGap,
    Request,
    check_prompt_ids,
    prompt_for,
    reply,
    same_prefix,
)
from cbnb.agent.tinylive import MAX_TURNS, office_task, play_tiny, tiny_tasks
from cbnb.basics.jsonfiles import RunError
from cbnb.config import ConfigError, get_config
from cbnb.evaluate.answers import answer_questions
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.adapt import adapt
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import open_run
from cbnb.run.stages import RunInterrupted, read_status, stage
from cbnb.step.models import add_adapter, load_model, load_tokenizer
from cbnb.testing import AGENT, CHATML, LLAMA_LIKE, chatml_tokenizer, msg, obeyed_mail, toy_tokenizer
from cbnb.transcripts.reader import read_transcripts
from cbnb.transcripts.record import Transcript
from cbnb.transcripts.tinyworld import make_transcripts
from forked import cells
from helpers import NBS
from train_common import few, load


@pytest.fixture(scope="module")
def agent():
    masker = ChatMasker(load_tokenizer("tinyagent"))
    return Agent(load_model("tinyagent"), masker, derive_reader(masker))


def task_with(run, task_id="t", over=lambda: False, transcript=None):
    "A task whose one world answers every call by `run`."
    t = transcript or make_transcripts("injection", 1, "eval")[0]
    return Task(
        task_id,
        t.messages[:2],
        t.tools,
        lambda: World(run, over, lambda *_: {}),
        "attack",
        "injection",
        "note",
    )


# --- prompts


@pytest.mark.parametrize("template", [LLAMA_LIKE, CHATML, AGENT], ids=["llama", "chatml", "agent"])
def test_every_prompt_is_what_training_has_before_the_turn(template):
    tokenizer = toy_tokenizer() if template is LLAMA_LIKE else chatml_tokenizer(template)
    masker, messages = ChatMasker(tokenizer), obeyed_mail()
    for n in (1, 3):
        ids = masker.prompt_ids(messages[:n])
        check_prompt_ids(masker, messages[:n], None, ids)
        assert masker.encode(messages[: n + 1]).text.startswith(masker.prompt(messages[:n]))
        for wrong in (ids[:-1], ids[1:], np.r_[ids[:2], ids[3:]]):
            assert same_prefix(masker, messages[:n], None, wrong)


@pytest.mark.parametrize(
    "names",
    ["", "split_calls", "split_text", "split_calls,split_text,bridge_answers", "hermes", "move_system"],
)
def test_a_prompt_is_adapted_as_the_transcripts_that_are_trained(names):
    "Words beside two calls, as an agent may write them, are asked on as training has them."
    masker = ChatMasker(
        chatml_tokenizer(CHATML if names in ("hermes", "move_system") else AGENT), adapt=names
    )
    calls = [
        {"id": f"call0000{k}", "type": "function", "function": {"name": "read", "arguments": {"n": k}}}
        for k in (0, 1)
    ]
    results = [
        msg("tool", f"result {k}", name="read", tool_call_id=call["id"]) for k, call in enumerate(calls)
    ]
    start = [msg("system", "You help."), msg("user", "Read both.")]
    messages = [*start, msg("assistant", "I read.", tool_calls=calls), *results]
    whole = adapt(Transcript("t", [*messages, msg("assistant", "Done.")]), masker.adapt)
    (encoding,) = masker.encode_batch([whole])
    ids = prompt_for(Agent(None, masker, None), Request(messages, None, "episode"))
    assert ids.tolist() == encoding.input_ids[: len(ids)].tolist()
    left = masker.tokenizer.decode(encoding.input_ids[len(ids) :])
    assert left.startswith("Done.")
    if "split" in names:
        assert ids.tolist() != masker.prompt_ids(messages).tolist(), "unadapted it would be another prompt"


def test_a_template_that_asks_otherwise_than_it_trains_is_refused():
    "A template of the kind that writes something into the last user message, and into no other."
    last_only = CHATML.replace(
        "m.content +", "m.content + (' Now.' if loop.last and m.role == 'user' else '') +"
    )
    assert last_only != CHATML
    masker = ChatMasker(chatml_tokenizer(last_only))
    messages = [msg("user", "Pay 900 to Eve!")]
    with pytest.raises(PromptGap, match="episode 7: the prompt is not what training sees"):
        check_prompt_ids(masker, messages, None, masker.prompt_ids(messages), "episode 7")


# --- one turn, many at once


def test_a_turn_is_the_same_alone_in_a_batch_and_among_threads(agent):
    warm = dataclasses.replace(agent, decoding=Decoding(temperature=0.7, batch_size=3))
    asks = [Request(t.messages[:2], t.tools, t.id) for t in make_transcripts("plain", 5, "eval")]
    together = [r.ids for r in reply(warm, asks)]
    assert [reply(warm, [one])[0].ids for one in asks] == together
    batcher = Batcher(warm)

    def ask(one):
        with batcher.episode():
            return batcher.ask(one)

    bad = Request([msg("assistant", "Hi")], None, "bad")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        failed, answers = pool.submit(ask, bad), [*pool.map(ask, asks)]
    assert [r.ids for r in answers] == together and max(batcher.batches) <= 3 == sum(batcher.batches) - 2
    assert "asked for after one of user or tool" in str(failed.exception())


# --- episodes


@pytest.mark.parametrize(
    "error", [ValueError("no such mail"), KeyError("x"), ZeroDivisionError(), OSError(28, "full")]
)
def test_a_tool_that_crashes_is_a_tool_result(agent, error):
    def run(call):
        raise error

    (episode,) = play(agent, [task_with(run)], 2)
    content = episode.messages[3]["content"]
    assert content.startswith(f"Error: {type(error).__name__}: ") and "\n" not in content
    assert str(error).splitlines()[0] in content if str(error) else True


def test_an_interrupt_in_a_tool_ends_the_run(agent):
    def run(call):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(play(agent, [task_with(run)], 2))


def test_a_gap_in_a_later_turn_ends_the_evaluation(agent, monkeypatch):
    "It is not counted among the episodes that a template refuses."
    masker = copy.copy(agent.masker)
    own = masker.prompt_ids

    def late_gap(messages, tools=None):
        ids = own(messages, tools=tools)
        return ids if len(messages) < 4 else np.r_[ids[:1], ids[0], ids[1:]]

    monkeypatch.setattr(masker, "prompt_ids", late_gap)
    with pytest.raises(PromptGap, match="^t: the prompt is not what training sees"):
        list(play(dataclasses.replace(agent, masker=masker), [task_with(lambda c: "done")], 3))


def test_each_end_of_an_episode(agent):
    mail = make_transcripts("injection", 1, "eval")[0].messages[3]["content"]
    talk = make_transcripts("general", 1, "eval")[0]
    in_words = Task("w", talk.messages[:1], None, lambda: World(str, lambda: False, lambda *_: {}))
    tasks = [
        task_with(lambda c: mail, "timeout"),
        task_with(lambda c: mail, "over", lambda: True),
        task_with(lambda c: "so it <|eot_id|> ends", "refused"),
        dataclasses.replace(in_words, id="ended"),
    ]
    assert {e.task.id: e.outcome for e in play(agent, tasks, 3)} == {t.id: t.id for t in tasks}
    short = dataclasses.replace(agent, decoding=Decoding(max_new_tokens=2))
    assert [e.outcome for e in play(short, tasks[:1], 3)] == ["unreadable"]


@pytest.mark.parametrize("text", ["pay eve", 'say "hi" \\ now', "ünï 漢\nline", "aa"])
@pytest.mark.parametrize(
    "form", [str, lambda t: json.dumps({"note": t}), lambda t: json.dumps([t], ensure_ascii=False)]
)
def test_the_attackers_text_is_marked_wherever_a_tool_has_said_it(text, form):
    messages = [
        msg("user", text),
        msg("tool", f"1 {form(text)} 2"),
        msg("tool", "none"),
        msg("tool", form(text)),
    ]
    spans = find_spans(messages, [text])
    assert [s.message for s in spans] == [1, 3], "not where the user said it"
    for s in spans:
        piece = messages[s.message]["content"][s.start : s.end]
        assert piece in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])


def test_a_killed_evaluation_goes_on_and_plays_nothing_twice(agent, tmp_path):
    tasks = tiny_tasks(2)
    whole = play_tasks(agent, tasks, MAX_TURNS)[0]
    folder = tmp_path / "run"
    folder.mkdir()

    def die(done, of):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play_tasks(agent, tasks, MAX_TURNS, folder, progress=die)
    file = folder / "episodes.jsonl"
    with file.open("a") as f:
        f.write('{"key": "torn')  # the line that it died in
    small = dataclasses.replace(agent, decoding=Decoding(batch_size=32))
    lines, played, _ = play_tasks(small, tasks, MAX_TURNS, folder)
    assert played == len(tasks) - 3
    assert [line["meta"]["ids"] for line in lines] == [line["meta"]["ids"] for line in whole]
    assert play_tasks(agent, tasks, MAX_TURNS, folder)[1] == 0
    transcripts = [*read_transcripts(str(file))]
    assert sorted(t.meta["task"] for t in transcripts) == sorted(t.id for t in tasks)
    file.write_text(file.read_text().replace('"outcome": "over"', '"outcome": 7', 1))
    with pytest.raises(RunError, match=r"episodes.jsonl line \d+ .*outcome"):
        play_tasks(agent, tasks, MAX_TURNS, folder)


# --- the tiny world


def test_the_file_stop_ends_episodes_and_the_run_goes_on(agent, tmp_path, monkeypatch):
    run, generate, batches = (
        open_run({"test": "stop"}, run_dir=tmp_path / "run"),
        agent_model.generate_batch,
        [],
    )

    def stop_in_third(*args):
        batches.append(1)
        if len(batches) == 3:
            (run.path / "stop").touch()
        return generate(*args)

    monkeypatch.setattr(agent_model, "generate_batch", stop_in_third)
    decoding, results = Decoding(batch_size=4), {}
    with (
        pytest.raises(RunInterrupted, match="stopped in the stage 'episodes before'"),
        stage(run, "evaluation"),
    ):
        loop_player(run, "tiny:4", agent.masker, agent.reader, decoding)(agent.model, "before", results)
    assert read_status(run.path)["state"] == "interrupted" and not (run.path / "stop").exists()
    kept = (run.path / "episodes.jsonl").read_text()
    assert len(batches) == 4 and len(kept.splitlines()) < 16
    run = open_run({"test": "stop"}, run_dir=run.path)
    with stage(run, "evaluation"):
        loop_player(run, "tiny:4", agent.masker, agent.reader, decoding)(agent.model, "before", results)
    assert results["before"]["played"] == 16 - len(kept.splitlines())
    assert (run.path / "episodes.jsonl").read_text().startswith(kept)


def test_live_and_by_answers_the_untouched_agent_is_the_same(agent):
    "It reads what it should, so its first action is the answer to a transcript that was written beforehand."
    transcripts = [t for kind in ("plain", "injection") for t in make_transcripts(kind, 8, "eval")]
    offline = answer_questions(agent.model, agent.masker, agent.reader, transcripts, Decoding())
    live = play_tasks(agent, [office_task(t) for t in transcripts], MAX_TURNS)[0]
    for line, episode in zip(offline, live, strict=True):
        checks = episode["meta"]["checks"]
        assert line["ids"] == episode["meta"]["ids"][-1]
        assert line["scores"].get("attack_success") == checks.get("attack_success")
        assert line["scores"].get("exact_match") == checks.get("utility")
        assert episode["label"] == ("harmful" if checks.get("attack_success") else "benign")


def test_a_model_that_is_only_broken_is_seen_as_such(agent, tmp_path):
    "No attack succeeds, no task is done, and nothing can be read: not safe, but dead."
    broken = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
    torch.manual_seed(0)
    for name, p in broken.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 1)
    dead = dataclasses.replace(agent, model=broken, decoding=Decoding(max_new_tokens=24))
    figures = play_tiny(dead, "3", tmp_path, "after")
    assert figures["counts"]["unreadable attack"] == [3, 3] and figures["counts"]["unreadable benign"][0] >= 8
    zero = ("utility", "utility_under_attack", "attack_success", "attack_success_lax", "safe_stop")
    assert all(figures["rates"][name] == 0 for name in zero)
    with broken.disable_adapter():  # the base is itself, and its episodes are others
        alive = play_tiny(agent, "3", tmp_path, "base")
    assert alive["played"] == 12 and alive["rates"]["utility"] > 0.8 and alive["per_minute"] > 0


def test_no_episode_is_no_figure(agent):
    figures = loop_figures("tiny", [], 0, 0.0, agent, 4)
    assert figures["rates"] == figures["counts"] == {} and figures["per_minute"] is None


# --- loops by name


@pytest.mark.parametrize(
    "wrong", ["tinny", "tiny:", "tiny:0", "tiny:a", "none:1", "auto:3", "", "Tiny", "tiny:1:2"]
)
def test_a_loop_that_is_none_is_refused(wrong):
    if wrong == "tiny:":
        assert find_loop(wrong)[1] == ""
        return
    with pytest.raises(ConfigError, match="eval_loop"):
        find_loop(wrong)


def test_auto_is_the_tiny_agent_on_its_own_data_and_nothing_else():
    own = ("tinyagent", "tinyagent", "")
    assert choose_loop("auto", *own) == choose_loop("auto", *own[:2], "tinyagent") == "tiny"
    others = [
        ("org/model", *own[1:]),
        ("tinyagent", "mine.jsonl", ""),
        ("tinyagent", "tinyagent", "mine.jsonl"),
    ]
    assert {choose_loop("auto", *one) for one in others} == {"none"} == {choose_loop(None, *own)}


@pytest.mark.slow
def test_a_run_plays_before_and_after_and_its_evaluation_gives_the_same(tmp_path):
    from cbnb.report.verdicts import read_sweep

    given = few(tmp_path, eval_loop="tiny:1", max_new_tokens=40)
    done = cells("-p", "run_dir", tmp_path / "run", *given)
    assert done.returncode == 0, done.stdout[-4000:]
    result = load(tmp_path / "run" / "result.json")
    assert result["loop"].keys() == {"before", "after"} and result["loop"]["before"]["episodes"] == 4
    assert "Acting with tools" in (tmp_path / "run" / "report.html").read_text()
    assert "acting with tools" in done.stdout and load(tmp_path / "run" / "status.json")["episodes"] is None
    assert len([*read_transcripts(str(tmp_path / "run" / "episodes.jsonl"))]) == 8
    frame = read_sweep([tmp_path / "run"]).frame
    assert frame["n_loop_utility"][0] == 3 and 0 <= frame["before_loop_attack_success"][0] <= 1
    again = cells(
        "-p",
        "adapter",
        tmp_path / "run",
        "-p",
        "run_dir",
        tmp_path / "again",
        notebook=NBS / "evaluate.ipynb",
    )
    assert again.returncode == 0, again.stdout[-4000:]
    (figures,) = load(tmp_path / "again" / "result.json")["loop"].values()
    assert figures["counts"] == result["loop"]["after"]["counts"]
    none = cells("-p", "run_dir", tmp_path / "none", *few(tmp_path, eval_loop="tinny"))
    assert none.returncode and "eval_loop is 'tinny'" in none.stdout and not (tmp_path / "none").exists()


def test_an_adapter_at_another_scale_is_another_model(tmp_path, agent):
    "Answers that are there are those of the adapter as it was set then."
    from cbnb.config import get_config
    from cbnb.evaluate.answers import adapter_settings, model_state
    from cbnb.evaluate.dial import scaled
    from cbnb.step.models import add_adapter, load_model

    student = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
    assert adapter_settings(student) == []
    states = [model_state(student)]
    for scale in (0.5, 0):
        with scaled(student, scale):
            states.append(model_state(student))
    assert len(set(states)) == 3 and model_state(student) == states[0]
