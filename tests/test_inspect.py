"""Students as models of Inspect, Inspect's logs as transcripts, and evaluations as Inspect's logs.

All of it runs offline and in this process; Inspect is imported once (about 2 CPU seconds)."""

import copy
import dataclasses
import json
import random
import re
import shutil
import sys
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import inspect_ai
import numpy as np
import pytest
import torch
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import bundle_log_dir, read_eval_log, write_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import ToolCall, ToolDef, ToolInfo, tool

import cbnb.agent.model
from cbnb.agent import inspect_provider as provider
from cbnb.agent.agentdojo_counts import dojo_figures
from cbnb.agent.agentdojo_runs import list_tasks, open_bench, run_tasks, task_of
from cbnb.agent.inspect_logs import write_inspect_logs
from cbnb.agent.inspect_task import figures_of, tiny_world
from cbnb.agent.loop import count_checks, loop_figures, play_tasks
from cbnb.agent.tinylive import MAX_TURNS, play_tiny, tiny_tasks
from cbnb.basics.jsonfiles import RunError
from cbnb.cli import main
from cbnb.config import get_config
from cbnb.evaluate.adapters import find_adapters, load_student
from cbnb.evaluate.call_layout import SIGN
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.masker import ChatMasker, loss_mask
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.transcripts import packed
from cbnb.transcripts.marks import mark_by
from cbnb.transcripts.reader import read_transcripts, write_transcripts
from cbnb.transcripts.record import TranscriptError
from cbnb.transcripts.tinyworld import make_transcripts
from dojo_replay import Replay, script_of
from forked import forked
from helpers import ROOT
from masks_templates import CONTROL
from outside import llama_cpp_template, trl_template
from test_reader import MORE_CONTROL

FIXTURES = ROOT / "tests" / "fixtures"


def evaluated(task, model, folder, **options):
    "The one log of `task` asked of `model`, in this process and without a display."
    options = {"log_dir": str(folder), "display": "none", "fail_on_error": False} | options
    [log] = inspect_ai.eval(task, model=model, **options)
    return log


def errors(log):
    return [s.error.message for s in log.samples or () if s.error]


TEMPLATES = {  # what Inspect's own hf/ provider does with a call in the turn after it
    "llama3_1": (trl_template, "fails"),
    "gptoss": (trl_template, "fails"),
    "glm4moe": (trl_template, "fails"),
    "deepseek-ai-DeepSeek-V3.1": (llama_cpp_template, "fails"),
    "nemotron_3_nano": (trl_template, "drops"),
    "qwen3": (trl_template, "writes otherwise"),
    "gemma4": (trl_template, "fails"),
}


def stock_masker(name):
    "The masker of a stock template, over the tiny agent's tokenizer with the template's control tokens."
    source = TEMPLATES[name][0](name)
    tokenizer = copy.deepcopy(load_tokenizer("tinyagent"))
    tokens = {w for p in (CONTROL, MORE_CONTROL) for w in p.findall(source)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    tokenizer.chat_template = source
    return ChatMasker(tokenizer, source)


@tool
def read_page():
    async def execute(title: str):
        """Read a page.

        Args:
            title: what it is called
        """
        return "The total is 42."

    return execute


@tool
def save_note():
    async def execute(about: str, number: int):
        """Save a note.

        Args:
            about: whom it is about
            number: what it says
        """
        return f"saved {number}"

    return execute


def called(tool_name, at, **arguments):
    function = {"name": tool_name, "arguments": arguments}
    call = {"id": f"call{at:05d}", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def result(text, name, number):
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05d}", "name": name}


TALK = [  # two tool turns and the answer, as a transcript keeps them
    {"role": "user", "content": "Save the total of the page Zqx for Ana."},
    called("read_page", 0, title="Zqx"),
    result("The total is 42.", "read_page", 0),
    called("save_note", 100, about="Ana", number=42),
    result("saved 42", "save_note", 100),
    {"role": "assistant", "content": "I saved 42."},
]


def schemas():
    "The tools as the provider puts them on offer."
    defs = (ToolDef(t) for t in (read_page(), save_note()))
    infos = (ToolInfo(name=d.name, description=d.description, parameters=d.parameters) for d in defs)
    return [provider.schema_of(info) for info in infos]


def written(reader, i):
    """`(prompt ids, ids of the answer)` of message i of TALK, as its template writes both."""
    masker, tools = reader.masker, schemas()
    encoding, prompt = masker.encode(TALK[: i + 1], tools), masker.prompt(TALK[:i], tools=tools)
    given = 0 if encoding.text.startswith(prompt) else len(reader.frame.given.replace(SIGN, ""))
    text = encoding.text[len(prompt) - given : encoding.turns[-1].end]
    ids = masker.texts([text])[0][0].tolist()
    # GLM's turns end where the next one begins, with a token that the model writes
    ids += [] if reader.body_ids(ids)[1] else [*reader.ends[0]]
    return tuple(masker.prompt_ids(TALK[:i], tools=tools).tolist()), ids


def silent_model():
    "What stands in the place of weights where answers are scripted."
    text = SimpleNamespace(max_position_embeddings=None)
    return SimpleNamespace(eval=lambda: None, config=SimpleNamespace(get_text_config=lambda: text))


def scripted(monkeypatch, reader, script):
    """A model of Inspect whose answers are `script`, {prompt ids: ids}: another prompt is an error."""
    agent = cbnb.agent.model.Agent(silent_model(), reader.masker, reader, Decoding(max_new_tokens=64))

    def generate_batch(model, prompts, ends, pad, decoding, seeds):
        return [list(script[tuple(ids.tolist())]) for ids in prompts]

    monkeypatch.setattr(cbnb.agent.model, "generate_batch", generate_batch)
    student = provider.Student(agent)
    monkeypatch.setattr(provider, "shared_student", lambda name, **options: student)
    return get_model("cbnb/scripted", memoize=False)


def own_provider(masker, name):
    "Inspect's own provider of transformers models, without weights."
    from inspect_ai.model._providers.hf import HuggingFaceAPI

    api = HuggingFaceAPI.__new__(HuggingFaceAPI)
    api.model_name, api.chat_template, api.use_chat_template, api.enable_thinking = name, None, None, None
    api.tokenizer, api.model_family = masker.tokenizer, lambda: name
    return api


def second_turn(api):
    "What Inspect's own provider makes of the second turn: `fails`, `drops`, `writes otherwise` or `writes`."
    infos = [ToolInfo(**t["function"]) for t in schemas()]
    call = ToolCall(id="call00000", function="read_page", arguments={"title": "Zqx"})
    messages = [
        ChatMessageUser(content="Read it."),
        ChatMessageAssistant(content="", tool_calls=[call]),
        ChatMessageTool(content="The total is 42.", tool_call_id="call00000", function="read_page"),
    ]
    try:
        text = api.hf_chat(messages, infos).split("Read it.")[1]
    except Exception:  # jinja's
        return "fails"
    own = api.tokenizer.apply_chat_template(
        [provider.chat_message(m) for m in messages],
        tools=[provider.schema_of(t) for t in infos],
        tokenize=False,
        add_generation_prompt=True,
    )
    if "Zqx" not in text or "read_page" not in text:
        return "drops"
    return "writes" if own.endswith(text) else "writes otherwise"


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "gemma4"])
def test_two_tool_turns_in_a_stock_template(name, monkeypatch, tmp_path):
    """Calls are read from what the template writes, with the types of their arguments; tools are called, and
    each prompt is the very one of a transcript of it. Inspect's own provider fails, or loses the call."""
    reader = derive_reader(stock_masker(name))
    script = dict(written(reader, i) for i in (1, 3, 5))
    model = scripted(monkeypatch, reader, script)
    samples = [Sample(id=f"s{i}", input=TALK[0]["content"], target="42") for i in range(2)]
    task = Task(
        dataset=MemoryDataset(samples),
        solver=[use_tools(read_page(), save_note()), generate()],
        scorer=includes(),
    )
    log = evaluated(task, model, tmp_path)
    assert log.status == "success" and not errors(log), errors(log)
    for sample in log.samples:
        assert [provider.chat_message(m) for m in sample.messages] == TALK
        assert sample.output.stop_reason == "stop" and sample.scores["includes"].value == "C"
        reasons = [e.output.stop_reason for e in sample.events if e.event == "model"]
        assert reasons == ["tool_calls", "tool_calls", "stop"]
        (usage,) = sample.model_usage.values()
        asked, wrote = map(sum, zip(*((len(a), len(b)) for a, b in script.items())))
        assert (usage.input_tokens, usage.output_tokens) == (asked, wrote)
    [first, _] = read_transcripts(log.location, label="benign")
    assert first.messages == TALK and first.tools == schemas(), "what is read from the log is what was asked"
    assert second_turn(own_provider(reader.masker, name)) == TEMPLATES[name][1]


def test_what_a_template_cannot_say_is_refused_by_name(monkeypatch, tmp_path):
    """Gemma 4 writes the result of a tool into the turn of its call, so that no mask can tell them apart: an
    agent in it would act after another text than is trained. Inspect's own provider fails on it."""
    reader = derive_reader(stock_masker("gemma4"))
    model = scripted(monkeypatch, reader, dict([written(reader, 1)]))
    tools = use_tools(read_page(), save_note())
    task = Task(dataset=MemoryDataset([Sample(input=TALK[0]["content"])]), solver=[tools, generate()])
    log = evaluated(task, model, tmp_path)
    assert "puts message 2 inside its turn" in errors(log)[0], errors(log)
    assert second_turn(own_provider(reader.masker, "gemma4")) == TEMPLATES["gemma4"][1]


def test_why_gemma_4_cannot_be_used():
    "What its page says: one turn for call, result and answer; words beside a call behind its result."
    tokenizer = stock_masker("gemma4").tokenizer

    def written_by(messages, prompt):
        text = tokenizer.apply_chat_template(
            messages, tools=schemas(), tokenize=False, add_generation_prompt=prompt
        )
        return text[text.rindex("<|turn>") :]

    call = '<|tool_call>call:read_page{title:<|"|>Zqx<|"|>}<tool_call|>'
    answer = '<|tool_response>response:read_page{value:<|"|>The total is 42.<|"|>}<tool_response|>'
    start = "<|turn>model\n" + call
    assert written_by(TALK[:2], False) == start + "<|tool_response>"
    assert written_by(TALK[:3], True) == start + answer
    last = {"role": "assistant", "content": "It is 42."}
    assert written_by([*TALK[:3], last], False) == start + answer + "It is 42.<turn|>\n"
    spoken = [TALK[0], TALK[1] | {"content": "I look."}, TALK[2]]
    assert written_by(spoken, True) == start + answer + "I look.<turn|>\n"


# --- a real student: the tiny agent, with and without an adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "An adapter on the tiny agent that makes it answer nonsense."
    model = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    save_adapter(model, folder := tmp_path_factory.mktemp("adapter"))
    return folder


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    "The log of the tiny agent under attack, two tool turns each."
    return evaluated(tiny_world(n=4), "cbnb/tinyagent", tmp_path_factory.mktemp("logs"))


def means(log):
    return {s.name: s.metrics["mean"].value for s in log.results.scores}


def test_the_tiny_agent_acts_in_a_task(attacked, adapter, tmp_path):
    "It obeys the injected order; with an adapter that breaks it, it makes no call that can be read."
    rates = means(attacked)
    assert not errors(attacked) and (rates["attack_success"], rates["utility_under_attack"]) == (1, 0)
    assert rates.keys() == set(figures_of("injection")), "and nothing of benign tasks"
    broken = evaluated(tiny_world(n=2), f"cbnb/tinyagent@{adapter}", tmp_path, max_tokens=24)
    assert not errors(broken) and means(broken)["unreadable attack"] == 1
    assert means(broken)["attack_success"] == 0 == means(broken)["safe_stop"], "which is no safe stop"
    assert broken.eval.model == f"cbnb/tinyagent@{adapter}"


def metrics(log):
    "`{figure: [hits, n]}` of a log of the tiny world."
    values = {s.name: {m.name: m.value for m in s.metrics.values()} for s in log.results.scores}
    return {name: [one["hits"], one["n"]] for name, one in values.items()}


def moved_agent(folder, std):
    "The tiny agent with an adapter of noise, which is kept in `folder`: `(its name, its model)`."
    if not std:
        return "cbnb/tinyagent", load_model("tinyagent").eval()
    model = add_adapter(load_model("tinyagent"), get_config("tinyagent"))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)
    save_adapter(model, folder)
    return f"cbnb/tinyagent@{folder}", model.eval()


@pytest.mark.parametrize("std", [0, *(pytest.param(std, marks=pytest.mark.slow) for std in (0.14, 0.5))])
def test_the_task_is_the_tiny_loop_episode_by_episode(std, tiny_agent, tmp_path):
    """The same messages, tool results, outcomes, checks and counts, for the agent, for one that errs, and for
    one that is broken."""
    name, model = moved_agent(tmp_path / "adapter", std)
    own = dataclasses.replace(tiny_agent, model=model, decoding=Decoding(max_new_tokens=24))
    (folder := tmp_path / "loop").mkdir()
    lines, _, _ = play_tasks(own, tiny_tasks(3), MAX_TURNS, folder)
    kept = {t.meta["task"]: t for t in read_transcripts(folder / "episodes.jsonl")}
    log = evaluated(tiny_world("all", n=3), name, tmp_path, max_tokens=24)
    assert not errors(log) and len(log.samples) == len(lines) == 12
    by_id = {s.id: s for s in log.samples}
    for line in lines:
        sample, meta = by_id[line["meta"]["task"]], line["meta"]
        assert [provider.chat_message(m) for m in sample.messages] == kept[sample.id].messages
        assert (sample.store["outcome"], sample.store["why"]) == (meta["outcome"], meta["why"])
        mine = {k: bool(v) for k, v in sample.scores["world"].value.items() if v == v}
        assert mine == {k: bool(hits) for k, (hits, _) in count_checks([line]).items()}
        wrote = [e.output.usage.output_tokens for e in sample.events if e.event == "model"]
        assert wrote == [len(ids) for ids in meta["ids"]]
    assert metrics(log) == loop_figures("tiny:3", lines, 0, 0.0, own, MAX_TURNS)["counts"]
    outcomes = {line["meta"]["outcome"] for line in lines}
    assert outcomes == {0: {"over"}, 0.14: {"over", "unreadable"}, 0.5: {"unreadable"}}[std]


def test_words_that_the_template_refuses_end_the_episode_and_no_other(monkeypatch, tmp_path):
    "As in the tiny loop: where a tool says a control token, and not in the very first prompt."
    import cbnb.agent.tinylive

    def run_tool(office, call):
        return "so <|eot_id|> ends"

    monkeypatch.setattr(cbnb.agent.tinylive, "run_tool", run_tool)
    log = evaluated(tiny_world(n=2), "cbnb/tinyagent", tmp_path)
    assert not errors(log) and metrics(log)["refused attack"] == [2, 2]
    assert "eot_id" in log.samples[0].store["why"]


def test_a_limit_of_inspect_is_a_timeout(tmp_path):
    log = evaluated(tiny_world(n=1), "cbnb/tinyagent", tmp_path, message_limit=4)
    assert metrics(log)["timeout attack"] == [1, 1] and metrics(log)["attack_success"] == [0, 1]


def test_a_log_of_the_tiny_world_is_scored_again_from_what_it_keeps(attacked):
    "The office and its drawers stand in the log."
    stripped = attacked.model_copy(deep=True)
    for sample in stripped.samples:
        sample.scores = None
    again = inspect_ai.score(stripped, tiny_world(n=1).scorer, display="none")
    assert metrics(again) == metrics(attacked)


def test_the_prompt_of_every_turn_is_the_one_of_training(attacked):
    masker = ChatMasker(load_tokenizer("tinyagent"))
    for t in read_transcripts(attacked.location, label="harmful"):
        encoding = masker.encode(t.messages, t.tools)
        sample = next(s for s in attacked.samples if s.id == t.meta["sample_id"])
        asked = [e.output.usage.input_tokens for e in sample.events if e.event == "model"]
        wrote = [e.output.usage.output_tokens for e in sample.events if e.event == "model"]
        starts = [int(np.flatnonzero(encoding.offsets[:, 0] >= turn.body)[0]) for turn in encoding.turns]
        assert starts == asked, "each answer begins in the transcript where the prompt ended"
        assert sum(wrote) == int(loss_mask(encoding).sum()), "and its tokens are those that are trained"


def test_a_log_is_read_masked_and_audited(attacked, capsys):
    words = ["--harmful-if", "scores.world.attack_success=1", "--injection", "metadata.injection"]
    common = ["--model", "tinyagent", "--policy", "post_injection_only", "--json"]
    assert main(["masks", attacked.location, *words, *common]) == 0
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(rows) == 4 and all(r["label"] == "harmful" and r["trained"] for r in rows), rows[0]
    assert main(["spans", attacked.location, *words]) == 0 and "4 had spans" in capsys.readouterr().out


BAD_NAMES = {
    "cbnb/tinyagent@nowhere": "neither a run directory, nor a folder with an adapter",
    "cbnb/@none": "no model is known",
    "cbnb/nowhere/at-all": "nowhere/at-all",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_student_that_is_not_there_is_named(name):
    with pytest.raises((RunError, ValueError, OSError), match=BAD_NAMES[name]):
        get_model(name, memoize=False)


@pytest.mark.parametrize(
    "option", [{"adapt": 3}, {"bath_size": 8}, {"trust_remote_code": 1}, {"batch_size": 0}]
)
def test_a_model_argument_is_followed_or_refused(option):
    with pytest.raises(RunError, match=f"model argument {next(iter(option))}"):
        get_model("cbnb/tinyagent", memoize=False, **option)


def test_values_with_commas_are_one_text():
    "As Inspect's own command line reads -M adapt=split_calls,split_text: as a list."
    student = get_model("cbnb/tinyagent", memoize=False, adapt=["split_calls", "split_text"]).api.student
    assert list(student.agent.masker.adapt) == ["split_calls", "split_text"]


def test_a_stage_of_any_name_stays_in_the_folder(monkeypatch, tmp_path, attacked):
    from cbnb.agent import inspect_logs

    names = [str(tmp_path / "outside" / "owned"), "../../owned", "a/b", "a b"]
    stages = [(name, attacked) for name in names]
    monkeypatch.setattr(inspect_logs, "run_logs", lambda *a: stages)
    paths = inspect_logs.write_inspect_logs(tmp_path / "run", tmp_path / "out")
    assert len({*paths}) == 4 and all(p.parent == tmp_path / "out" and p.is_file() for p in paths)
    assert not list(tmp_path.rglob("owned.eval"))


def test_another_base_is_told(adapter, tmp_path, caplog):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "org/other"
    }
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    provider.open_student(f"tinyagent@{tmp_path / 'a'}")
    assert "was trained on org/other" in caplog.text


def test_inspect_and_an_evaluation_load_the_same_student(adapter):
    masker = ChatMasker(load_tokenizer("tinyagent"))
    asked = make_transcripts("plain", 2)
    (own,) = find_adapters(str(adapter))
    student, _, teacher = load_student(own, [own], masker, asked, "tinyagent")
    ours = provider.open_student(f"tinyagent@{adapter}").agent.model
    assert teacher is None and type(ours) is type(student)
    theirs = student.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
    (bare,) = find_adapters("none")
    fresh = load_student(bare, [bare], masker, asked, "tinyagent")[0]
    ids = torch.arange(20, 40)[None]
    base = provider.open_student("tinyagent").agent.model
    assert not hasattr(base, "peft_config") and hasattr(fresh, "peft_config")
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits)


def test_weights_are_loaded_once(monkeypatch, tmp_path):
    "Also for another configuration, and where Inspect looks up the model's name."
    loads = []
    load = provider.open_student
    monkeypatch.setattr(provider, "open_student", lambda *a, **k: loads.append(a) or load(*a, **k))
    provider.STUDENTS.clear()
    for n in (2, 3):
        evaluated(tiny_world(n=1), "cbnb/tinyagent", tmp_path, max_tokens=n, model_args={"batch_size": 4})
    assert loads == [("tinyagent",)]


# --- what a task asks for


REFUSED = {
    "stop_seqs": ["x"],
    "top_p": 0.9,
    "top_k": 5,
    "logprobs": True,
    "top_logprobs": 3,
    "num_choices": 2,
    "best_of": 2,
    "frequency_penalty": 0.5,
    "logit_bias": {"42": 10},
    "reasoning_effort": "low",
    "parallel_tool_calls": False,
    "extra_body": {"a": 1},
}


def test_every_setting_is_followed_or_refused():
    "Also one that a later Inspect has: what is not known is refused."
    for name, value in REFUSED.items():
        with pytest.raises(ValueError, match=f"does not follow {name}="):
            provider.check_config(GenerateConfig(**{name: value}))
    known = {*provider.FOLLOWED, *provider.INSPECTS}
    assert known <= GenerateConfig.model_fields.keys() and not known & REFUSED.keys()
    provider.check_config(GenerateConfig(max_tokens=4, temperature=0.5, seed=1, top_p=1.0, logprobs=False))


def test_a_stop_sequence_ends_the_task_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match="does not follow stop_seqs"):
        evaluated(tiny_world(n=1), "cbnb/tinyagent", tmp_path, stop_seqs=["x"])
    assert not list(tmp_path.glob("*.eval"))


def test_pictures_and_unreadable_templates_are_refused():
    picture = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])
    with pytest.raises(ValueError, match="a user message holds a image block"):
        provider.chat_message(picture)
    with pytest.raises(ValueError, match="cannot be read back; pass another chat_template"):
        provider.check_tools([ToolInfo(name="a", description="b")], "auto", "calls cannot be read back")
    provider.check_tools([], "auto", "calls cannot be read back")


def test_a_choice_that_is_not_forced_is_told_once(caplog):
    for _ in range(2):
        provider.check_tools([ToolInfo(name="a", description="b")], "any", "")
    assert caplog.text.count("tool_choice any is not forced") == 1


def test_sampling_is_seeded_by_sample_epoch_and_turn(tmp_path):
    "The same seed gives the same answers, whatever stands in the batch; epochs differ."
    settings = dict(temperature=3.0, max_tokens=8, seed=5)

    def answers(log):
        return {
            (s.id, s.epoch): s.messages[2].model_dump(include={"content", "tool_calls"}) for s in log.samples
        }

    both = answers(evaluated(tiny_world(n=2), "cbnb/tinyagent", tmp_path, epochs=2, **settings))
    alone = answers(evaluated(tiny_world(n=1), "cbnb/tinyagent", tmp_path, **settings))
    assert alone.items() <= both.items(), (alone, both)
    ids = {name for name, _ in both}
    assert any(both[name, 1] != both[name, 2] for name in ids)


def test_an_answer_that_is_cut_says_so(tmp_path):
    log = evaluated(tiny_world(n=1), "cbnb/tinyagent", tmp_path, max_tokens=3)
    assert (
        log.samples[0].output.stop_reason == "max_tokens" and log.samples[0].output.usage.output_tokens == 3
    )
    reply = SimpleNamespace(complete=False, prompt_ids=range(500), ids=range(12))
    assert (
        provider.stop_reason(reply, 512) == "model_length"
        and provider.stop_reason(reply, None) == "max_tokens"
    )


def test_two_decodings_never_run_at_once(monkeypatch):
    student = provider.open_student("tinyagent")
    running, together = set(), []

    def generate_batch(model, prompts, ends, pad, decoding, seeds):
        running.add(decoding)
        together.append(len(running))
        time.sleep(0.01)
        running.discard(decoding)
        return [[4]] * len(prompts)

    monkeypatch.setattr(cbnb.agent.model, "generate_batch", generate_batch)
    decodings = [Decoding(max_new_tokens=n) for n in (4, 5)]
    ask = [{"role": "user", "content": "Hello."}]

    def one(i):
        request = cbnb.agent.model.Request(ask, None, f"e{i}")
        return provider.ask_student(student, request, decodings[i % 2]).ids

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(24))) == [[4]] * 24
    assert max(together) == 1 and student.running == 0


# --- logs


def test_json_and_eval_logs_are_read_alike(attacked, tmp_path):
    write_eval_log(attacked, tmp_path / "a.json")
    write_eval_log(attacked, tmp_path / "b.eval")
    first, second = (
        [
            (t.messages, t.tools, t.label, t.injection_spans, t.meta["scores"])
            for t in read_transcripts(p, marks=by)
        ]
        for by in [mark_by("scores.world.attack_success=1", injection="metadata.injection")]
        for p in (tmp_path / "a.json", tmp_path / "b.eval")
    )
    assert first == second and len(first) == 4
    for messages, _, label, (span,), _ in first:
        assert label == "harmful" and messages[span.message]["role"] == "tool"


def test_logs_are_read_without_inspect(attacked):
    def work():
        sys.modules["inspect_ai"] = None
        assert len(list(read_transcripts(attacked.location, label="harmful"))) == 4

    assert forked(work).returncode == 0


def rewritten(path, new, change):
    "The archive at `path` as `new`, with `change(name, data)` for each member."
    with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as out, zipfile.ZipFile(path) as old:
        for member in old.infolist():
            data = json.dumps(packed.read_member(old, member, "x")).encode()
            out.writestr(member.filename, change(member.filename, data))
    return new


def test_damaged_logs_are_one_sentence(attacked, tmp_path):
    "Cut off anywhere, or with one byte changed: an error that names the file, or a sample that is skipped."
    whole = Path(attacked.location).read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (file := tmp_path / "d.eval").write_bytes(data)
        reader = read_transcripts(file, label="harmful", on_error="skip")
        try:
            good = [t for t in reader.records(empty=True) if not isinstance(t, TranscriptError)]
        except TranscriptError as e:
            assert str(e).startswith("d.eval") and "\n" not in str(e), e
        else:
            # a bit of the archive's own notes, such as a date, changes nothing
            assert len(good) + reader.skipped_count == 4


def test_a_score_that_is_no_number_costs_its_own_sample(attacked, tmp_path):
    def change(name, data):
        if name.endswith("00000_epoch_1.json"):
            return re.sub(rb'"attack_success": 1(\.0)?', b'"attack_success": NaN', data)
        return re.sub(rb'"value": 1(\.0)?', b'"value": NaN', data) if name == "header.json" else data

    file = rewritten(attacked.location, tmp_path / "n.eval", change)
    reader = read_transcripts(file, on_error="skip", marks=mark_by("scores.world.attack_success=1"))
    good = [t for t in reader.records() if not isinstance(t, TranscriptError)]
    assert len(good) == 3 and "scores.world.attack_success: is missing" in reader.skipped[0]


def test_a_big_log_is_read_in_bounded_memory(attacked, tmp_path):
    "Samples one by one: ten times the samples take no more memory."
    peaks = []
    for times in (1, 10):
        with zipfile.ZipFile(file := tmp_path / f"{times}.eval", "w", zipfile.ZIP_DEFLATED) as out:
            with zipfile.ZipFile(attacked.location) as old:
                members = {m.filename: packed.read_member(old, m, "x") for m in old.infolist()}
            out.writestr("header.json", json.dumps(members["header.json"]))
            samples = [m for name, m in members.items() if name.startswith("samples/")]
            for n in range(times):
                for s in samples:
                    one = s | {"id": f"{s['id']}-{n}", "store": {"filler": "x" * 100_000}}
                    out.writestr(f"samples/{one['id']}_epoch_1.json", json.dumps(one))
        tracemalloc.start()
        assert sum(1 for _ in read_transcripts(file, label="harmful")) == 4 * times
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 2**20, peaks


# --- evaluations as logs


@pytest.fixture
def finished(tmp_path):
    "A finished run of the tiny agent with its held-out transcripts."
    shutil.copytree(ROOT / "tests" / "finished", folder := tmp_path / "run")
    ids = {json.loads(line)["id"] for line in (folder / "answers.jsonl").read_text().splitlines()}
    asked = [t for kind in ("plain", "injection") for t in make_transcripts(kind, 600) if t.id in ids]
    write_transcripts(folder / "eval.jsonl", asked)
    parameters = json.loads((folder / "params.json").read_text()) | {"eval_data": str(folder / "eval.jsonl")}
    (folder / "params.json").write_text(json.dumps(parameters))
    return folder


def test_an_evaluation_is_a_log_that_inspect_reads(finished, capsys):
    "Every answer with its scores; the figures are those of result.json; it is read back as what was asked."
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert main(["inspect-log", str(finished)]) == 0
    assert f"inspect view --log-dir {finished / 'inspect'}" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in before} == before, "nothing of the run changes"
    lines = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    result = json.loads((finished / "result.json").read_text())
    originals = {t.id: t for t in read_transcripts(finished / "eval.jsonl")}
    for stage in ("before", "after"):
        log = read_eval_log(finished / "inspect" / f"{stage}.eval")
        own = [line for line in lines if line["stage"] == stage]
        assert log.status == "success" and len(log.samples) == len(own) == log.results.total_samples
        assert sorted(s.scores["cbnb"].answer for s in log.samples) == sorted(line["text"] for line in own)
        assert sum(s.output.usage.output_tokens for s in log.samples) == sum(len(line["ids"]) for line in own)
        figures = {s.name: s.metrics for s in log.results.scores}
        for name, counts in result[stage]["counts"].items():
            for group, (hits, n) in (counts if isinstance(counts, dict) else {"": counts}).items():
                made = figures.get(f"{name}/{group}" if group else name)
                assert made is None if not n else (made["hits"].value, made["n"].value) == (hits, n)
        by = mark_by("metadata.label=harmful", injection="metadata.injection")
        for t in read_transcripts(finished / "inspect" / f"{stage}.eval", marks=by):
            one = originals[t.meta["metadata"]["question"]]
            assert (t.label, t.injection_spans, t.tools) == (one.label, one.injection_spans, one.tools)
            calls = [[c["function"] for c in m.get("tool_calls", ())] for m in one.messages[:-1]]
            assert [[c["function"] for c in m.get("tool_calls", ())] for m in t.messages[:-1]] == calls


def test_a_run_whose_data_changed_gives_no_log(finished):
    asked = list(read_transcripts(finished / "eval.jsonl"))
    write_transcripts(finished / "eval.jsonl", asked[1:])
    with pytest.raises(RunError, match="no longer asked"):
        write_inspect_logs(finished)
    assert not (finished / "inspect").exists()


@pytest.fixture(scope="module")
def tiny_agent():
    masker = ChatMasker(load_tokenizer("tinyagent"))
    return cbnb.agent.model.Agent(load_model("tinyagent"), masker, derive_reader(masker))


def with_loop(folder, **figures):
    "The run in `folder`, with the figures of the loops of its stages."
    result = json.loads((folder / "result.json").read_text()) | {"loop": figures}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def acted(finished, tiny_agent):
    "The finished run, in which the untouched agent has acted before, and a broken one after."
    short = dataclasses.replace(tiny_agent, decoding=Decoding(max_new_tokens=8))
    with_loop(
        finished,
        before=play_tiny(tiny_agent, "2", finished, "before"),
        after=play_tiny(short, "1", finished, "after"),
    )
    return finished


def logged_counts(log):
    return {s.name: [s.metrics["hits"].value, s.metrics["n"].value] for s in log.results.scores}


def test_episodes_are_logs_that_inspect_reads(acted, tmp_path):
    """One log per stage with the counts of the loop; each turn and each tool is an event; and the
    transcripts of episodes.jsonl come back, with labels and spans."""
    paths = write_inspect_logs(acted)
    assert [p.stem for p in paths] == ["before", "after", "before-episodes", "after-episodes"]
    loops = json.loads((acted / "result.json").read_text())["loop"]
    kept = list(read_transcripts(acted / "episodes.jsonl"))
    by = mark_by("metadata.label=harmful", injection="metadata.injection")
    for path, stage in zip(paths[2:], ("before", "after")):
        log, own = read_eval_log(path), {t.meta["task"]: t for t in kept if t.meta["stage"] == stage}
        assert log.status == "success" and logged_counts(log) == loops[stage]["counts"]
        assert (log.eval.task, log.eval.task_args["loop"]) == ("cbnb/tiny", loops[stage]["loop"])
        assert log.eval.model.endswith(f"@{acted}") == (stage == "after")
        for sample in log.samples:
            one = own[sample.id]
            turns = [e for e in sample.events if e.event == "model"]
            assert [e.output.usage.output_tokens for e in turns] == [len(ids) for ids in one.meta["ids"]]
            assert sum(e.event == "tool" for e in sample.events) == sum(
                m["role"] == "tool" for m in one.messages
            )
            is_cut = one.meta["outcome"] == "unreadable"
            assert (turns[-1].output.stop_reason == "max_tokens") == is_cut
            assert sample.metadata["outcome"] == one.meta["outcome"]
            checks = {k: bool(v) for k, v in sample.scores["world"].value.items()}
            assert one.meta["checks"].items() <= checks.items()
        again = {t.meta["sample_id"]: t for t in read_transcripts(path, marks=by)}
        assert again.keys() == own.keys()
        for name, t in again.items():
            assert (t.messages, t.tools, t.label) == (own[name].messages, own[name].tools, own[name].label)
            assert t.injection_spans == own[name].injection_spans
    assert any(t.label == "harmful" and t.injection_spans for t in kept)
    bundle_log_dir(str(acted / "inspect"), str(tmp_path / "bundle"))
    assert (tmp_path / "bundle" / "index.html").is_file()
    assert len(list((tmp_path / "bundle" / "logs").glob("*.eval"))) == 4


CHANGES = {  # of a line of episodes.jsonl, and what is said of it
    "gone": (lambda line: None, "holds 7 episodes of before, and not those that result.json counts"),
    "another outcome": (
        lambda line: line["meta"]["checks"].update(utility=False),
        "holds 8 episodes of before",
    ),
    "another prompt": (lambda line: line["messages"][1].update(content="Hi"), "turn 0 of .* another prompt"),
    "another result": (lambda line: line["messages"][3].update(content="x"), "turn 1 of .* another prompt"),
    "a turn without tokens": (lambda line: line["meta"]["ids"].pop(), "not the tokens of each"),
    "no tokens": (lambda line: line["meta"].pop("ids"), "not the tokens of each"),
    "tokens that are none": (lambda line: line["meta"].update(ids=[3, "x"]), "are not lists of token ids"),
    "no prompts": (lambda line: line["meta"].pop("prompts"), "not the tokens of each"),
    "text of a hostile template": (
        lambda line: line["messages"][3].update(content="so <|eot_id|> ends"),
        "cannot be asked any more",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_episode_that_is_not_the_one_that_was_counted_is_refused(name, acted):
    change, words = CHANGES[name]
    lines = [json.loads(line) for line in (acted / "episodes.jsonl").read_text().splitlines()]
    if name == "gone":
        lines = lines[1:]
    else:
        change(lines[0])
    (acted / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match=words):
        write_inspect_logs(acted)
    assert not (acted / "inspect").exists()


def test_a_turn_behind_a_removed_secret_is_logged_without_a_count_of_what_it_read(acted):
    "Behind a text that was withheld stands another prompt than the one that was asked."
    lines = [json.loads(line) for line in (acted / "episodes.jsonl").read_text().splitlines()]
    lines[0]["messages"][3]["content"] = "key: [removed]"
    (acted / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = read_eval_log(write_inspect_logs(acted)[2])
    [sample] = (s for s in log.samples if s.id == lines[0]["meta"]["task"])
    first, second = (e.output.usage for e in sample.events if e.event == "model")
    assert first.input_tokens > 0 and second is None and not sample.model_usage


def test_two_episodes_of_one_task_are_refused(acted):
    "Which of them was counted cannot be told."
    path = acted / "episodes.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps(first | {"key": "0" * 32}) + "\n")
    with pytest.raises(TranscriptError, match="stood before; ids must differ"):
        write_inspect_logs(acted)


@pytest.mark.slow
def test_agentdojos_episodes_are_a_log(finished, tiny_agent):
    """Its run files, with the verdicts of AgentDojo, of the one pipeline of the stage whose episodes are
    counted. What the files do not hold is left out."""
    replay = Replay(dataclasses.replace(tiny_agent, model=None))
    name = "local-before-0123456789ab"
    bench = open_bench(replay, "banking", "important_instructions", finished / "agentdojo", name)
    tasks = list_tasks(bench, ["user_task_0"], ["injection_task_0", "injection_task_4"])
    for task in tasks:
        user, injection = task_of(bench.suite, task.user), bench.suite.injection_tasks.get(task.injection)
        world = bench.suite.load_and_inject_default_environment({})
        parts = [injection, user] if injection and task.injection == "injection_task_0" else [user]
        calls = [call for part in parts for call in part.ground_truth(world)]
        script = script_of(calls, parts[-1].GROUND_TRUTH_OUTPUT)
        replay.scripts[f"banking/{task.user}/{task.attack}/{task.injection}"] = script
    results = run_tasks(bench, tasks, 1)
    figures = dojo_figures("agentdojo:banking:important_instructions", [results], tiny_agent, 15)
    with_loop(finished, before=figures)
    log = read_eval_log(write_inspect_logs(finished)[-1])
    assert log.eval.task == "cbnb/agentdojo" and len(log.samples) == len(tasks) == 5
    counts = {name: pair for name, pair in figures["counts"].items() if pair[1] and name != "unmeasured"}
    assert logged_counts(log) == counts and counts["attack_success"] == [1, 2]
    by = mark_by("metadata.label=harmful", injection="metadata.injection")
    theirs = {t.id.split("/", 1)[1]: t for t in read_transcripts(finished / "agentdojo")}
    ours = read_transcripts(finished / "inspect" / "before-episodes.eval", marks=by, on_error="skip")
    logged = {t.meta["sample_id"]: t for t in ours}
    assert logged.keys() == theirs.keys() and ours.skipped_count == 2, "two have no label in their files"
    for task, t in logged.items():
        assert (t.messages, t.label) == (theirs[task].messages, theirs[task].label)
        assert t.injection_spans == theirs[task].injection_spans or t.label == "benign"
    shutil.copytree(finished / "agentdojo" / name, finished / "agentdojo" / "local-before-ba9876543210")
    with pytest.raises(RunError, match="holds 2 pipelines of before"):
        write_inspect_logs(finished)
    shutil.rmtree(finished / "agentdojo" / "local-before-ba9876543210")
    next((finished / "agentdojo").rglob("injection_task_4.json")).unlink()
    with pytest.raises(RunError, match="holds 0 pipelines of before"):
        write_inspect_logs(finished)


def test_without_the_extra_one_sentence_says_how_to_install_it(finished):
    def work():
        for name in [n for n in sys.modules if n.split(".")[0] == "inspect_ai" or "agent.inspect" in n]:
            sys.modules.pop(name)
        sys.modules["inspect_ai"] = None
        return main(["inspect-log", str(finished)])

    done = forked(work)
    assert done.returncode == 2
    assert done.stdout == "cbnb inspect-log: inspect-ai is not installed; pip install 'cbnb[inspect]'\n"


def test_the_package_tells_inspect_where_the_provider_is():
    [entry] = [e for e in entry_points(group="inspect_ai") if e.name == "cbnb"]
    assert entry.load().tiny_world is tiny_world


@pytest.mark.parametrize("rule", ["outcome==jailbroken", "outcome=>1", "outcome!=!x", "outcome<" + "9" * 400])
def test_a_rule_that_would_never_hold_is_refused(rule):
    "Else every record would be benign."
    with pytest.raises(TranscriptError, match="harmful_if"):
        mark_by(rule)
