"""Try it: the same prompt, answer and reading as an evaluation; nothing of a stranger's text is obeyed; a
conversation goes on after whatever is wrong."""

import dataclasses
import io
import json

import pytest
import torch

from cbnb.cli import main
from cbnb.evaluate.answers import answer_questions
from cbnb.evaluate.decoding import Decoding
from cbnb.step.models import save_adapter
from cbnb.transcripts.reader import write_transcripts
from cbnb.transcripts.tinyworld import make_transcripts
from cbnb.widgets import chat as module
from cbnb.widgets.chat import COMMANDS, Session, ask, chat_form, obey, open_chat

EVIL = "\x1b]0;owned\a\x1b[2J\u202eright\x08<script>alert(1)</script>"
SHORT = Decoding(max_new_tokens=24)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A chat with an adapter of noise, the folder that holds it and a file of attacks, and these."
    folder = tmp_path_factory.mktemp("chat")
    bare = open_chat("none", "tinyagent")
    torch.manual_seed(0)
    for name, weight in bare.student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    save_adapter(bare.student, folder / "noise")
    attacks = make_transcripts("injection", 3, "eval")
    write_transcripts(folder / "attacks.jsonl", attacks)
    return open_chat(str(folder / "noise"), "tinyagent"), folder, attacks


@pytest.fixture
def session(world):
    return Session(world[0], decoding=SHORT, tools=world[2][0].tools)


def test_prompt_and_answer_are_those_of_training_and_evaluation(world):
    chat, _, attacks = world
    lines = answer_questions(chat.student, chat.masker, chat.reader, attacks[:1], Decoding(batch_size=1))
    one = ask(chat, attacks[0].messages[:-1], attacks[0].tools, 1.0)
    assert one.ids == lines[0]["ids"] and one.complete == (lines[0]["finish"] == "ended")
    assert one.answer.calls == lines[0]["read"]["calls"] and one.answer.text == lines[0]["read"]["text"]
    whole = chat.masker.encode(attacks[0].messages, attacks[0].tools).input_ids
    assert one.prompt_ids.tolist() == whole[: len(one.prompt_ids)].tolist()
    base = ask(chat, attacks[0].messages[:-1], attacks[0].tools, 0)
    assert base.answer.calls and base.ids != one.ids
    begun = ask(chat, attacks[0].messages[:-1], attacks[0].tools, 0, SHORT, "<|python_tag|>")
    assert begun.ids == base.ids, "a control token in a prefill is that token"


def test_a_conversation_with_results_by_hand_and_by_the_model(session, world):
    attack = world[2][0]
    obey(session, "/use base")
    obey(session, attack.messages[1]["content"])
    assert session.messages[-1]["tool_calls"][0]["function"]["name"] == "get_ticket"
    lines = obey(session, "/tool " + attack.messages[3]["content"].replace("\n", "\\n"))
    assert session.messages[-2]["content"] == attack.messages[3]["content"]
    assert sum(line.startswith(("base (scale 0)", "breaker (scale 1)")) for line in lines) == 2
    obey(session, "/use breaker")
    answer, control = session.answers["breaker"].answer, session.chat.masker.control
    assert session.messages[-1] == module.message_of(answer, session.messages[:-1], control)
    obey(session, "/new")
    obey(session, "/user Read it.")
    obey(session, '/call {"name": "get_ticket", "arguments": {"id": "garnet"}}')
    obey(session, "/tool total: 3")
    assert [m["role"] for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    prompt = "\n".join(obey(session, "/prompt"))
    assert "total: 3" in prompt and "garnet" in prompt
    obey(session, "/scale 0")
    obey(session, "/again")
    assert session.answers["base"].ids == session.answers["breaker"].ids


def test_what_is_wrong_is_one_sentence_and_changes_nothing(session, world):
    obey(session, "Hello")
    for line in (
        "/scale x",
        "/scale -1",
        "/scale nan",
        "/sample hot",
        "/sample 1 -1",
        "/sample nan",
        "/max 0",
        "/use me",
        "/tool there is no call",
        "/call {}",
        "/call [",
        '/call {"name": "a", "arguments": 1}',
        "/tools [1]",
        "/tools nowhere.json",
        "/nothing",
        "Say <|eot_id|>.",
    ):
        before = dataclasses.replace(session, messages=list(session.messages))
        with pytest.raises((ValueError, OSError)) as caught:
            obey(session, line)
        assert session == before, line
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, line
    said = []
    inputs = iter(["/scale x", "/quit"])
    module.talk(session, lambda prompt: next(inputs), lambda *lines: said.extend(lines))
    assert len(said) == 1 and "/scale wants" in said[0]
    help_lines = obey(session, "/help")
    assert all(any(line.startswith(f"/{name}") for line in help_lines) for name in COMMANDS)


def test_a_conversation_goes_on_after_an_answer_that_no_template_writes(session, monkeypatch):
    """A breaker begins a call and never ends it: its control token would be refused in the next prompt."""
    broken = "<|python_tag|>{ kettle<|begin_of_text|>"
    ids = session.chat.masker.tokenizer(broken, add_special_tokens=False)["input_ids"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "generate_batch", lambda *given: [list(ids)])
        lines = obey(session, "Hello")
    assert lines[-1].endswith("without the control tokens in the breaker's answer")
    assert session.messages[-1]["content"] == "{ kettle" and broken in "".join(lines)
    assert len(obey(session, "And now?")) > 2 and len(session.messages) == 4


def test_sampling_repeats_with_its_seed(world):
    chat, _, attacks = world

    def ids(seed):
        hot = Decoding(max_new_tokens=12, temperature=2.0, seed=seed)
        return ask(chat, attacks[0].messages[:-1], attacks[0].tools, 0, hot).ids

    assert ids(1) == ids(1) != ids(2)


def test_a_hostile_answer_is_text_in_the_terminal_and_in_the_form(world, monkeypatch, capsys):
    chat, folder, attacks = world
    ids = chat.masker.tokenizer(EVIL, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(module, "generate_batch", lambda *given: [list(ids)])
    monkeypatch.setattr(module, "open_chat", lambda *given: chat)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert main(["chat", "none"]) == 0
    said = capsys.readouterr().out
    assert "alert(1)" in said and said.isprintable() is False and not set("\x1b\a\x08\u202e") & set(said)
    assert "its turn did not end" in said
    form = chat_form(chat, attacks[0].messages[:-1], attacks[0].tools)
    html = form.fields["shown"].value
    assert "&lt;script" in html and "<script" not in html and not set("\x1b\a\x08\u202e") & set(html)


def test_one_question_from_the_standard_input(world, monkeypatch, capsys):
    _, folder, attacks = world
    given = ["chat", str(folder / "noise"), "--model", "tinyagent", "--max", "24"]

    def said(text, *more):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = main([*given, *more])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    status, out, _ = said("", "--from", str(folder / "attacks.jsonl"), "--number", "2", "--scale", "0.5")
    assert status == 0 and "base (scale 0): complete" in out and "breaker (scale 0.5)" in out
    order = attacks[1].meta["injected_call"]["name"]
    assert f"> call: {order} " in out, "the base obeys"
    for text, *more in (
        ("",),
        ("hello", "--scale", "much"),
        ("hello", "--from", str(folder / "attacks.jsonl"), "--number", "9"),
        ("hello", "--tools", "nowhere.json"),
        ("/scale x\nhello",),
    ):
        status, out, err = said(text, *more)
        assert status == 2 and err.startswith("cbnb chat: ") and err.count("\n") == 1, (text, more, err)


def test_an_adapter_is_looked_at_as_an_evaluation_does(world, tmp_path, capsys):
    for wrong in (
        [str(tmp_path)],
        ["no/such/adapter/here"],
        [str(world[1] / "noise"), "--model", str(tmp_path)],
    ):
        assert main(["chat", *wrong]) == 2, wrong
        err = capsys.readouterr().err
        assert err.startswith("cbnb chat: ") and err.count("\n") == 1 and "Traceback" not in err
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "nan"
    broken.mkdir()
    config = json.loads((world[1] / "noise" / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(world[1] / "noise" / "adapter_model.safetensors")
    save_file({k: v * float("nan") for k, v in weights.items()}, broken / "adapter_model.safetensors")
    assert main(["chat", str(broken), "--model", "tinyagent"]) == 2
    assert "NaN" in capsys.readouterr().err


def test_the_form_asks_what_stands_in_it(world):
    chat, _, attacks = world
    form = chat_form(chat, attacks[0].messages[:-1], attacks[0].tools)
    assert (
        list(form.answers) == ["base", "breaker"]
        and form.messages == attacks[0].messages[:-1][:2] + form.messages[2:]
    )
    assert chat.masker.prompt(form.messages, attacks[0].tools) == chat.masker.prompt(
        attacks[0].messages[:-1], attacks[0].tools
    )
    form.fields["call"].value, form.fields["result"].value = "", "total: 1"
    form.fields["scale"].value, form.fields["longest"].value = 0.0, 20
    form.fields["ask"].click()
    assert form.messages[-1]["content"] == "total: 1" and form.answers["breaker"].scale == 0
    assert form.answers["base"].ids == form.answers["breaker"].ids
    form.fields["go_on"].click()
    form.fields["user"].value = "And now?"
    form.fields["ask"].click()
    assert [m["role"] for m in form.messages] == ["system", "user", "assistant", "tool", "assistant", "user"]
    form.fields["user"].value = ""
    form.fields["call"].value = "{"
    form.fields["result"].value = "x"
    form.fields["ask"].click()
    assert "the call is no JSON" in form.fields["shown"].value
    still = form._repr_mimebundle_()
    assert "text/html" in still and "widget-view" not in json.dumps(list(still))


def test_a_model_that_fails_at_one_question_can_be_asked_another(session, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    said, inputs = [], iter(["Hello", "/quit"])
    monkeypatch.setattr(module, "generate_batch", fails)
    module.talk(session, lambda prompt: next(inputs), lambda *lines: said.extend(lines))
    assert said == ["CUDA out of memory"] and session.messages == []


def test_another_speaker_changes_no_call_that_was_written_by_hand(session):
    obey(session, "Hello")
    obey(session, "/user Read the ticket garnet.")
    obey(session, '/call {"name": "get_ticket", "arguments": {"id": "garnet"}}')
    before = list(session.messages)
    obey(session, "/use base")
    assert session.messages == before
