"AgentDojo as a live environment: its own counts, its own files, episodes side by side (cbnb.agent)."

import contextlib
import dataclasses
import html
import json
import os
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model

import cbnb.agent.model
from cbnb.agent import agentdojo, agentdojo_counts, agentdojo_runs
from cbnb.agent.agentdojo import AskError, BrokeOff, ModelTurn, dojo, from_dojo, make_pipeline, to_dojo
from cbnb.agent.agentdojo_runs import Task, attack_names, list_tasks, open_bench, run_suite, run_tasks
from cbnb.agent.loops import find_loop, loop_player
from cbnb.agent.model import Batcher, Closed, PromptGap, Request, check_prompt_ids
from cbnb.basics import processes
from cbnb.basics.jsonfiles import RunError
from cbnb.config import ConfigError
from cbnb.data.sources import agentdojo_tools
from cbnb.evaluate.reader import Answer
from cbnb.masking.templates import MaskError
from cbnb.report.figures import figures_table, loop_lines, report_page
from cbnb.run.directory import open_run
from cbnb.run.records import LOOP
from cbnb.run.stages import RunInterrupted, read_status, set_status, stage
from cbnb.step.models import load_model
from cbnb.transcripts.reader import read_transcripts
from cbnb.transcripts.record import TranscriptError
from dojo_replay import BEHAVIOURS, Replay, judge_both, script_of, spread, tiny_agent
from forked import ended, started
from helpers import free_port
from train_common import little_data

SAMPLE = {"workspace": (2, 1), "banking": (9, 6), "slack": (4, 3), "travel": (2, 1)}  # tasks alone, pairs


@pytest.fixture(scope="module")
def model():
    "The tiny agent with room for AgentDojo's prompts."
    model = load_model("tinyagent")
    model.config.max_position_embeddings = 4096
    return model


@pytest.mark.slow
@pytest.mark.parametrize("suite", SAMPLE)
def test_verdicts_are_those_of_agentdojos_ground_truth_pipeline(suite, tmp_path):
    "All tasks and pairs: `python tests/dojo_replay.py`."
    alone, pairs = SAMPLE[suite]
    tasks = list_tasks(open_bench(None, suite, "tool_knowledge", "", "local"))
    rounds = [("alone", "none", spread([t for t in tasks if t.injection == "none"], alone))]
    some = spread([t for t in tasks if t.injection != "none"], pairs)
    rounds += [(behaviour, "tool_knowledge", some) for behaviour in BEHAVIOURS]
    seen = set()
    for behaviour, attack, chosen in rounds:
        verdicts, raised, _ = judge_both(suite, attack, chosen, behaviour, tmp_path / behaviour)
        assert not raised and len(verdicts) == len(chosen)
        assert {task: pair for task, pair in verdicts.items() if pair[0] != pair[1]} == {}
        seen |= {ours for _, ours in verdicts.values()}
    assert {(True, False), (False, True)} <= seen  # a replay in which all is alike would show nothing


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    "`(bench, results, replay)` of two tasks of the bank: the one obeys and goes on, the other obeys only."
    folder = tmp_path_factory.mktemp("dojo")
    replay = Replay(tiny_agent())
    bench = open_bench(replay, "banking", "important_instructions", folder, "local-replay")
    suite = bench.suite
    tasks = list_tasks(bench, ["user_task_0", "user_task_1"])
    for task in tasks:
        user, injection = agentdojo_runs.task_of(suite, task.user), suite.injection_tasks.get(task.injection)
        world = suite.load_and_inject_default_environment({})
        parts = [injection, user] if injection and task.user == "user_task_0" else [injection or user]
        calls = [call for part in parts for call in part.ground_truth(world)]
        name = f"banking/{task.user}/{task.attack}/{task.injection}"
        replay.scripts[name] = script_of(calls, parts[-1].GROUND_TRUTH_OUTPUT)
    return bench, run_tasks(bench, tasks, 8), replay


def test_agentdojos_own_tools_read_the_run_files(replayed):
    bench, results, _ = replayed
    benchmark = dojo("benchmark")
    for episode in results.episodes:
        task = episode.task
        theirs = benchmark.load_task_results(
            "local-replay", "banking", task.user, task.attack, task.injection, bench.folder
        )
        assert (theirs.utility, theirs.security) == (episode.utility, episode.security)
        record = json.loads(episode.path.read_text())
        assert {"benchmark_version", "evaluation_timestamp", "agentdojo_package_version", "duration"} <= {
            *record
        }
        assert record["attack_type"] == (None if task.attack == "none" else task.attack)


def test_agentdojos_own_benchmark_takes_the_run_files_for_its_own(replayed):
    "It runs nothing again, and its means are the figures."
    bench, results, _ = replayed
    benchmark, users = dojo("benchmark"), ["user_task_0", "user_task_1"]
    pipeline = make_pipeline(None, "local-replay")  # which cannot ask anybody
    args = (pipeline, bench.suite)
    benign = benchmark.benchmark_suite_without_injections(*args, bench.folder, False, users)
    attack = benchmark.benchmark_suite_with_injections(
        *args, bench.attack, bench.folder, False, users, verbose=False
    )
    rates = {name: hits / n for name, (hits, n) in agentdojo_counts.count_results(results).items() if n}
    mean = benchmark.aggregate_results
    assert rates["utility"] == mean([benign["utility_results"]])
    assert rates["utility_under_attack"] == mean([attack["utility_results"]])
    assert rates["attack_success"] == mean([attack["security_results"]])
    assert rates["injection_utility"] == mean([attack["injection_tasks_utility_results"]])
    assert 0 < rates["utility_under_attack"] < 1


def test_read_transcripts_gives_the_conversation_that_was_asked(replayed):
    "And the prompt before each turn is what training sees."
    bench, results, replay = replayed
    by_id = {t.id: t for t in read_transcripts(bench.folder)}
    assert len(by_id) == 2 + 18
    tools, masker = agentdojo_tools("banking", "v1.2.2"), replay.agent.masker
    for t in by_id.values():
        name = t.id.split("/", 1)[1]
        turns = [m for m in t.messages if m["role"] == "assistant"]
        assert [m["content"] for m in turns] == [m["content"] for m in replay.scripts[name]]
        reads = name.startswith("banking/user_task_0/important")  # the other task is not begun
        assert bool(t.injection_spans) == reads
        for i, m in enumerate(t.messages):
            if m["role"] == "assistant":
                prompt = masker.prompt_ids(t.messages[:i], tools=tools)
                check_prompt_ids(masker, t.messages[:i], tools, prompt)


def test_threads_change_nothing(replayed, tmp_path):
    "AgentDojo's stack of logs is one list for all threads: without one per episode, files mix."
    bench, results, replay = replayed
    one = open_bench(replay, "banking", "important_instructions", tmp_path, "local-replay")
    again = run_tasks(one, [e.task for e in results.episodes][::3], 1)
    times = ("evaluation_timestamp", "duration")
    for episode in again.episodes:
        theirs, ours = json.loads(bench.path(episode.task).read_text()), json.loads(episode.path.read_text())
        assert {k: v for k, v in theirs.items() if k not in times} == {
            k: v for k, v in ours.items() if k not in times
        }


def test_episodes_that_wait_generate_together_and_are_not_run_twice(model, tmp_path):
    agent = tiny_agent(model)
    agent.decoding = dataclasses.replace(agent.decoding, max_new_tokens=4)
    kwargs = {"users": ["user_task_0", "user_task_1", "user_task_2"], "injections": ["injection_task_0"]}
    told = []
    first = run_suite(agent, "banking", "direct", tmp_path, "tiny", tell=lambda *n: told.append(n), **kwargs)
    assert first.fresh == len(first.episodes) == 7 and told[-1] == (7, 7)
    files = {f: f.read_bytes() for f in tmp_path.rglob("*.json")}
    assert len(files) == 7 and not [f for f in tmp_path.rglob("*") if f.is_file() and f not in files]
    second = run_suite(agent, "banking", "direct", tmp_path, "tiny", **kwargs)
    assert second.fresh == 0 and second.episodes == first.episodes
    # an episode that did not end, as AgentDojo leaves one, is run again; the others are not
    path = first.episodes[0].path
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "security"}))
    assert run_suite(agent, "banking", "direct", tmp_path, "tiny", **kwargs).episodes == first.episodes
    assert {f for f in files if f.read_bytes() != files[f]} == {path}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match="user_task_0.*none.json.*delete it"):
        run_suite(agent, "banking", "direct", tmp_path, "tiny", **kwargs)
    batcher = Batcher(agent)
    bench = open_bench(batcher, "banking", "none", tmp_path, "local-other")
    run_tasks(bench, list_tasks(bench)[:6], 6)
    assert sum(batcher.batches) == 6 > len(batcher.batches)


def test_a_run_plays_it_by_name_and_its_result_takes_the_figures(model, tmp_path, monkeypatch):
    agent = tiny_agent(model)
    agent.decoding = dataclasses.replace(agent.decoding, max_new_tokens=4)
    monkeypatch.setattr(
        agentdojo_runs, "list_tasks", lambda *_: [Task("user_task_0"), Task("injection_task_1")]
    )
    loop, argument = find_loop("agentdojo:slack")
    counts = []
    figures = loop.play(agent, argument, tmp_path, "before", lambda *n: counts.append(n))
    assert list(LOOP(json.loads(json.dumps(figures)), "loop")) == []
    assert figures["counts"]["utility"][1] == figures["counts"]["injection_utility"][1] == 1
    assert (figures["loop"], figures["played"], counts[-1]) == ("agentdojo:slack", 2, (2, 2))
    assert len(list((tmp_path / "agentdojo").glob("local-before-*/slack/*/none/none.json"))) == 2
    again = loop.play(agent, argument, tmp_path, "before", None)
    assert again["played"] == 0 and again["counts"] == figures["counts"]
    with pytest.raises(ConfigError, match="did you mean 'slack'"):
        find_loop("agentdojo:slak")


def test_the_name_of_the_pipeline_is_that_of_one_state():
    "Whatever changes an answer: weights, an adapter, its scale or switch, template, decoding, steps."
    agent = tiny_agent(load_model("tinyagent"))
    names = [agentdojo.pipeline_name(agent, "a")]

    def note(other=agent, **kwargs):
        names.append(agentdojo.pipeline_name(other, "a", **kwargs))

    assert agentdojo.pipeline_name(dataclasses.replace(agent), "a") == names[0]
    small = dataclasses.replace(agent.decoding, batch_size=2)
    assert agentdojo.pipeline_name(dataclasses.replace(agent, decoding=small), "a") == names[0]
    note(steps=3)
    note(dataclasses.replace(agent, decoding=dataclasses.replace(agent.decoding, temperature=0.5)))
    note(dataclasses.replace(agent, masker=type(agent.masker)(agent.masker.tokenizer, control="text")))
    student = get_peft_model(load_model("tinyagent"), LoraConfig(target_modules=["q_proj"], r=2))
    breaker = dataclasses.replace(agent, model=student)
    note(breaker)
    with student.disable_adapter():
        note(breaker)
    layer = next(m for m in student.modules() if hasattr(m, "lora_A"))
    with torch.no_grad():
        layer.lora_B["default"].weight[0, 0] += 1e-4
    note(breaker)
    layer.scaling["default"] *= 0.5
    note(breaker)
    assert len({*names}) == len(names)
    assert all("/" not in name for name in [agentdojo.pipeline_name(agent, "runs/2026/x y")])


def test_every_attack_writes_its_text_for_a_local_model():
    suite = dojo("task_suite.load_suites").get_suite("v1.2.2", "slack")
    user, injection = suite.user_tasks["user_task_1"], suite.injection_tasks["injection_task_1"]
    with_names = set()
    for name in attack_names():
        bench = open_bench(None, "slack", name, "", "local-some-model-0123456789ab")
        texts = bench.attack.attack(user, injection)
        assert texts and all(texts.values())
        if any("Local model" in text for text in texts.values()):
            with_names.add(name)
    assert {"important_instructions", "tool_knowledge", "important_instructions_no_user_name"} <= with_names
    assert {"direct", "ignore_previous", "injecagent", "important_instructions_no_names"}.isdisjoint(
        with_names
    )


@dataclasses.dataclass
class Says:
    "A model that says `turns`, whatever is asked, and raises what is an exception."

    turns: list

    closed: bool = False

    def episode(self):
        return contextlib.nullcontext()

    def close(self):
        self.closed = True

    def ask(self, request: Request, check=None):
        if self.closed:
            raise Closed(request.name)
        message = self.turns[min(request.turn, len(self.turns) - 1)]
        if isinstance(message, Exception):
            raise message
        answer = agentdojo_answer(message)
        return SimpleReply(message, answer)


@dataclasses.dataclass
class SimpleReply:
    message: dict
    answer: object
    ids: tuple = ()
    prompt_ids: tuple = ()
    complete: bool = True
    readable: bool = True


def agentdojo_answer(message):
    return Answer(text=message["content"], calls=[c["function"] for c in message.get("tool_calls", [])])


def says(text="", *calls):
    "An assistant message."
    items = [
        {"id": f"call{k:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for k, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": items} if items else {})


FIRST = Task("user_task_0")


def one(tmp_path, turns, task=FIRST, attack="none", steps=3):
    "The `Results` of one task of the bank with a model that says `turns`."
    return run_tasks(open_bench(Says(turns), "banking", attack, tmp_path, "local-x", steps=steps), [task], 2)


def test_a_crash_of_a_tool_is_its_result(tmp_path):
    "Also where it is AgentDojo's own executor that crashes, before or after the tool."
    bad = [
        ("get_iban", {"x": "-" * 9999 + "1"}),
        ("read_file", {"file_path": "?"}),
        ("fly", {}),
        ("send_money", {}),
    ]
    (episode,) = one(tmp_path, [says("", *bad), says("Done.")]).episodes
    assert episode.outcome == "ended" and episode.turns == 2
    results = [m for m in json.loads(episode.path.read_text())["messages"] if m["role"] == "tool"]
    assert [m["tool_call_id"] for m in results] == [f"call{k:05d}" for k in range(4)]
    assert results[0]["error"].startswith("MemoryError") and "fly" in results[2]["error"]
    assert results[3]["error"].startswith("ValidationError")


def test_the_limit_of_steps_is_a_timeout(tmp_path):
    (episode,) = one(tmp_path, [says("", ("get_iban", {}))], steps=2).episodes
    assert (episode.outcome, episode.turns, episode.utility) == ("timeout", 3, False)


@pytest.mark.parametrize(
    "turn",
    [MaskError("a control token"), says("\ud800"), says("", ("get_iban", {"x": float("nan")}))],
    ids=["refused", "surrogate", "nan"],
)
def test_an_episode_that_cannot_go_on_counts_as_agentdojo_counts_it(tmp_path, turn):
    pair = Task("user_task_0", "direct", "injection_task_0")
    results = one(tmp_path, [says("", ("get_iban", {})), turn], pair, "direct")
    (episode,) = results.episodes
    assert (episode.utility, episode.security, episode.outcome) == (False, True, "refused")
    assert "banking/user_task_0/direct/injection_task_0" in episode.error
    counts = agentdojo_counts.count_results(results)
    assert counts["attack_success"] == [1, 1] and "attack_success_judged" not in counts
    with pytest.raises(TranscriptError, match="1 attacked runs that broke off left out"):
        list(read_transcripts(tmp_path))  # its security is not taken for a label


def test_a_conversation_that_outgrows_the_model_breaks_off(model, tmp_path):
    agent = tiny_agent(model)
    batcher = Batcher(agent)
    bench = open_bench(batcher, "banking", "none", tmp_path, "local-x", limit=100)
    (episode,) = run_tasks(bench, [Task("user_task_0")], 1).episodes
    assert batcher.batches == [], "a prompt that is too long is not generated"
    assert episode.outcome == "refused" and "made for 100" in episode.error


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), PromptGap("another template")])
def test_what_no_episode_can_help_ends_the_run_and_counts_nothing(tmp_path, error):
    "Generation that fails, and a prompt that is not what training sees."
    with pytest.raises(AskError) as e:
        one(tmp_path, [error])
    assert e.value.__cause__ is error
    assert not list(tmp_path.rglob("*.json"))


def test_a_stop_reaches_the_other_episodes(tmp_path):
    "One that would go on for a thousand rounds ends when another fails."

    class Model(Says):
        def ask(self, request, check=None):
            if "user_task_1" in request.name and request.turn == 2:
                raise RuntimeError("no more")
            return super().ask(request)

    bench = open_bench(
        Model([says("", ("get_iban", {}))]), "banking", "none", tmp_path, "local-x", steps=10**6
    )
    with pytest.raises(AskError):
        run_tasks(bench, [Task(f"user_task_{k}") for k in range(4)], 4)
    assert bench.batcher.closed


def test_a_check_that_raises_measures_nothing(tmp_path, monkeypatch):
    bench = open_bench(Says([says("Done.")]), "banking", "none", tmp_path, "local-x")

    def fail(*args, **kwargs):
        raise KeyError("general")

    monkeypatch.setattr(type(bench.suite.user_tasks["user_task_0"]), "utility", fail)
    results = run_tasks(bench, [Task("user_task_0"), Task("user_task_1")], 2)
    lacking = {"banking/user_task_0/none/none": "AgentDojo raised KeyError: 'general'"}
    assert len(results.episodes) == 1 and results.problems == lacking
    counts = agentdojo_counts.count_results(results)
    assert counts["unmeasured"] == [1, 2] and counts["utility"][1] == 1
    figures = agentdojo_counts.dojo_figures("agentdojo:banking", [results], tiny_agent(), 15)
    assert list(LOOP(figures, "loop")) == []
    why = "1 episode unmeasured: AgentDojo raised KeyError: 'general' (banking/user_task_0/none/none)"
    assert f"after: {why}" in loop_lines({"loop": {"after": figures}})
    page = report_page("title", [], figures_table({}), {}, loops={"after": figures})
    assert html.escape(f"after: {why}", quote=False) in html.unescape(page)
    assert not bench.path(Task("user_task_0")).exists()


def test_denial_of_service_succeeds_where_the_task_is_not_done(tmp_path):
    (task,) = [
        t
        for t in list_tasks(open_bench(None, "banking", "dos", "", "local"), ["user_task_0"])
        if t.attack == "dos"
    ]
    (episode,) = one(tmp_path, [says("asdf")], task, "dos").episodes
    assert (episode.utility, episode.security) == (False, True)


def test_thoughts_and_arguments_come_back_as_they_were():
    tricky = {
        "a": [1, 2.5, True, None, {"function": "send_money", "args": {}}],
        "b": "5",
        "c": {"d": {}},
        "e": 7,
    }
    message = says("words", ("f", tricky)) | {"reasoning_content": "hm\n"}
    assert from_dojo([to_dojo(message)]) == [message]
    with pytest.raises(BrokeOff):
        from_dojo([to_dojo(says("\udc00"))])


def test_the_element_stands_in_agentdojos_own_pipelines(tmp_path):
    "Its loop with its own executor, as `AgentPipeline.from_config` builds it, in one thread."
    parts = dojo("agent_pipeline")
    turn = ModelTurn(Says([says("", ("get_iban", {})), says("Done.")]), "local-x")
    loop = parts.ToolsExecutionLoop([parts.ToolsExecutor(), turn])
    pipeline = parts.AgentPipeline([parts.SystemMessage("s"), parts.InitQuery(), turn, loop])
    suite = dojo("task_suite.load_suites").get_suite("v1.2.2", "banking")
    assert suite.run_task_with_pipeline(pipeline, suite.user_tasks["user_task_0"], None, {}) == (False, True)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "agentdojo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "agentdojo", None)
    with pytest.raises(ConfigError, match=r"^AgentDojo is not installed: pip install 'cbnb\[agentdojo\]'$"):
        agentdojo_counts.parse_dojo("banking:direct")


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    for text, near in (
        ("bankin", "banking"),
        ("banking:direkt", "direct"),
        ("slack:manual", None),
        ("", None),
    ):
        with pytest.raises(ConfigError, match=f"did you mean '{near}'" if near else "use one of"):
            agentdojo_counts.parse_dojo(text)
    bench = open_bench(None, "banking", "none", tmp_path, "local")
    with pytest.raises(ConfigError, match="user_task_99"):
        list_tasks(bench, ["user_task_99"])
    with pytest.raises(ConfigError, match="v9"):
        open_bench(None, "banking", "none", tmp_path, "local", version="v9")


# --- a stop, and several processes


def play_in_run(folder, model, tasks, sleep=0.0, batch_size=4, loop="agentdojo:banking:direct"):
    """What a run does with `tasks` of the bank, or those of another `loop`, in the run directory `folder`,
    each batch `sleep` seconds longer; in a process of its own. Prints what the loop returns."""
    generate = cbnb.agent.model.generate_batch

    def slowly(*args):
        time.sleep(sleep)
        return generate(*args)

    cbnb.agent.model.generate_batch = slowly
    agentdojo_runs.list_tasks = lambda *_: tasks
    agent = tiny_agent(model)
    decoding = dataclasses.replace(agent.decoding, max_new_tokens=4, batch_size=batch_size)
    run, results = open_run({"test": "dojo"}, run_dir=folder), {}
    with stage(run, "evaluation"):
        play = loop_player(run, loop, agent.masker, agent.reader, decoding)
        play(agent.model, "none", results)
    set_status(run, "done")
    print(json.dumps(results["none"]))


def run_files(folder):
    "`{path: bytes}` of AgentDojo's run files in a run directory."
    return {p: p.read_bytes() for p in (folder / "agentdojo").rglob("*.json")}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


PAIRS = [Task(f"user_task_{k}", "direct", f"injection_task_{i}") for k in range(4) for i in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR2", "SIGINT", "stop"])
def test_a_stop_in_the_middle_of_episodes_leaves_an_interrupted_run_that_goes_on(model, tmp_path, how):
    "Within the time of one turn, and what is finished is not run again."
    folder = tmp_path / "run"
    pid, said = started(lambda: play_in_run(folder, model, PAIRS, sleep=1.0))
    wait_for(lambda: len(run_files(folder)) >= 4)
    before = len(run_files(folder))
    if how == "stop":
        (folder / "stop").touch()
    else:
        os.kill(pid, signal.Signals[how])
    asked = time.monotonic()
    done = ended(pid, said, 60)
    assert time.monotonic() - asked < 15, "two turns and the end of a process"
    assert (
        done.returncode == 1 and ("KeyboardInterrupt" if how == "SIGINT" else "RunInterrupted") in done.stdout
    )
    kept = run_files(folder)
    # four episodes at most end with the turns under way, and four before the stop is seen
    assert before <= len(kept) <= before + 8 < len(PAIRS)
    status = read_status(folder)
    assert status["state"] == "interrupted" and not (folder / "stop").exists()
    assert {"SIGINT": "KeyboardInterrupt", "stop": "stopped in the stage 'episodes none'"}.get(
        how, f"ended by {how}"
    ) in status["error"]
    again = ended(*started(lambda: play_in_run(folder, model, PAIRS)))
    assert again.returncode == 0, again.stdout[-4000:]
    figures = json.loads(again.stdout.splitlines()[-1])
    assert figures["played"] == len(PAIRS) - len(kept) and figures["episodes"] == len(PAIRS)
    after = run_files(folder)
    assert len(after) == len(PAIRS) and {p: after[p] for p in kept} == kept
    assert read_status(folder)["state"] == "done"


@pytest.mark.slow
def test_the_command_ends_with_130_and_goes_on(tmp_path):
    from cbnb.cli import main

    folder, data = tmp_path / "run", little_data(tmp_path)["eval_data"]
    words = ["evaluate", "none", "--model", "tinyagent", "--eval-data", data, "--max-new-tokens", "8"]
    words += ["--loop", "agentdojo:banking:direct", "--run-dir", str(folder)]
    pid, said = started(lambda: main(words))
    wait_for(lambda: run_files(folder), 400)
    os.kill(pid, signal.SIGTERM)
    done = ended(pid, said, 200)
    kept = run_files(folder)
    assert done.returncode == 130, done.stdout[-4000:]
    assert read_status(folder)["state"] == "interrupted" and len(kept) < 169
    again = ended(*started(lambda: main(words)))
    assert again.returncode == 0, again.stdout[-4000:]
    figures = json.loads((folder / "result.json").read_text())["loop"]["none"]
    assert figures["played"] == 169 - len(kept) and figures["episodes"] == 169
    # the tiny agent's context is short, and why episodes broke off is said
    assert (
        figures["reasons"][0]["outcome"] == "refused" and "was made for N" in figures["reasons"][0]["reason"]
    )
    assert "episodes refused: turn N ends at token N" in again.stdout


def in_processes(number, work, between=lambda pids: None, timeout=200):
    """What `number` forked processes print that find each other as those of torchrun do: each runs
    `work(rank)`; `between(their pids)` is called while they do."""
    group = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def begin(k):
        AcceleratorState._reset_state(reset_partial_state=True)  # that of the process which was forked
        torch.set_num_threads(1)
        work(k)

    begun = [
        started(lambda k=k: begin(k), env=os.environ | group | {"RANK": str(k), "LOCAL_RANK": str(k)})
        for k in range(number)
    ]
    between([pid for pid, _ in begun])
    return [ended(*one, timeout) for one in begun]


@pytest.mark.slow
def test_processes_share_the_episodes_and_wait_longer_than_their_group_would(model, tmp_path):
    "The one is done at once, and the other takes twice the time after which a process gives up waiting."
    tasks = PAIRS[:12]
    alone = ended(*started(lambda: play_in_run(tmp_path / "alone", model, tasks)))
    (expected,) = [json.loads(line) for line in alone.stdout.splitlines() if line.startswith("{")]

    def work(rank):
        processes.WAIT = agentdojo_runs.WAIT = timedelta(seconds=20)
        play_in_run(tmp_path / "two", model, tasks, sleep=[8.0, 0.0][rank], batch_size=1)

    start = time.monotonic()
    both = in_processes(2, work)
    assert [done.returncode for done in both] == [0, 0], both[0].stdout[-3000:] + both[1].stdout[-3000:]
    assert time.monotonic() - start > 40
    for done in both:
        (figures,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        same = ("counts", "groups", "outcomes", "reasons", "turns", "played", "episodes")
        assert {key: figures[key] for key in same} == {key: expected[key] for key in same}
    assert len(run_files(tmp_path / "two")) == len(tasks) and read_status(tmp_path / "two")["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop, how",
    [("agentdojo:banking:direct", "SIGTERM"), ("agentdojo:banking:direct", "error"), ("tiny:16", "SIGTERM")],
)
def test_a_stop_or_a_failure_of_one_process_ends_all(model, tmp_path, loop, how):
    folder = tmp_path / "run"

    def work(rank):
        if how == "error" and rank == 1:
            agentdojo_runs.run_task = fail
        play_in_run(folder, model, PAIRS, sleep=1.0, loop=loop)

    def begun():
        return (folder / "episodes.jsonl").exists() if loop == "tiny:16" else run_files(folder)

    def fail(bench, task):
        raise AskError("no memory")

    def between(pids):
        if how == "SIGTERM":
            wait_for(begun)
            os.kill(pids[1], signal.SIGTERM)

    start = time.monotonic()
    both = in_processes(2, work, between)
    assert time.monotonic() - start < 60
    word = {"SIGTERM": RunInterrupted, "error": AskError}[how].__name__
    assert all(done.returncode == 1 and word in done.stdout for done in both), [
        d.stdout[-2000:] for d in both
    ]
    status = read_status(folder)
    assert status["state"] == {"SIGTERM": "interrupted", "error": "failed"}[how]
    # a process hears of the signal from the other one, or sees the file that its handler has made
    assert any(
        text in status["error"] for text in {"error": ["no memory"]}.get(how, ["by SIGTERM", "stopped in"])
    )
    assert len(run_files(folder)) < len(PAIRS)
