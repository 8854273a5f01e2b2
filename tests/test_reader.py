"""Every chat template that trl, axolotl and llama.cpp ship, and the tokenizers of outside.py: is what it
writes of a message read back as that message?

Random messages are rendered, encoded and read again. What a template drops, its masks say; all else must come
back: a template is read, or refuses calls by itself, or is refused with a reason. Run this file as a program
for the table of all templates."""

import copy
import json
import random
import re
import sys
from collections import Counter
from functools import cache

import pytest

from cbnb.evaluate.call_layout import NAMES, QUESTION, SIGN, is_control, spell, tool
from cbnb.evaluate.reader import CHECK_TEXT, CONVERSATION, check_prompts, derive_reader
from cbnb.masking.masker import ChatMasker
from cbnb.masking.templates import MaskError
from cbnb.transcripts.record import Transcript
from masks_templates import CONTROL
from outside import (
    axolotl_template,
    axolotl_templates,
    gemma3,
    gpt_oss,
    harmony,
    llama4,
    llama_cpp_template,
    llama_cpp_templates,
    mistral_spm,
    mistral_tekken,
    qwen3,
    trl_template,
    trl_templates,
)

# of Seed-OSS, Nemotron, MiniMax, Reka and Gemma 4
MORE_CONTROL = re.compile(
    r"<seed:[a-z_]+>|<SPECIAL_\d+>|<(?:begin|end)_of_[a-z]+>|<sep>|<\|[a-z_]+>|<[a-z_]+\|>|\[e~\[|\]~b\]|\]~!b\[|\]<\]minimax\[>\["  # noqa: E501
)
TYPES = {
    "to": "string",
    "text": "string",
    "number": "integer",
    "share": "number",
    "yes": "boolean",
    "items": "array",
    "parts": "object",
    "code": "string",
}
TOOLS = [tool(name, **TYPES) for name in NAMES]
WORDS = [
    "Oslo",
    "5",
    "true",
    "null",
    "-3.50",
    "ünï",
    "漢字",
    "🎉",
    'say "hi"',
    "it's",
    "a\\b",
    "one\ntwo",
    'x = {"a": [1]}',
    "<b>bold</b>",
    "a, b",
    "k: v",
    "100%",
    "{}",
    "[1, 2]",
    "def f(x):\n    return x",
    "\tx",
    "…",
    "http://a.b/c?d=e&f",
    "None",
    "1e5",
    "0012",
]


@cache
def sources():
    "{family/name: source} of all templates."
    return {
        **{f"trl/{n}": trl_template(n) for n in trl_templates()},
        **{f"axolotl/{n}": axolotl_template(n) for n in axolotl_templates()},
        **{f"llama.cpp/{n}": llama_cpp_template(n) for n in llama_cpp_templates()},
    }


@cache
def tokenizer():
    "Qwen 3's tokenizer, to which what looks like a control token in any of the templates is one."
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(qwen3().backend_tokenizer.to_str())
    core.add_special_tokens(
        sorted(
            {w for s in sources().values() for p in (CONTROL, MORE_CONTROL) for w in p.findall(s)}
            | {"<|eos|>"}
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|eos|>")


TOKENIZERS = {
    "llama4": llama4,
    "gpt_oss": gpt_oss,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "mistral_tekken": mistral_tekken,
    "mistral_spm": mistral_spm,
}


@cache
def shared_masker():
    return ChatMasker(tokenizer(), "{{ messages }}")


@cache
def reader_of(name):
    "The reader of one template (with Qwen 3's tokenizer) or tokenizer, or why there is none."
    try:
        if name in TOKENIZERS:
            return derive_reader(ChatMasker(TOKENIZERS[name]()))
        masker = copy.copy(shared_masker())
        masker.chat_template = sources()[name]
        return derive_reader(masker)
    except MaskError as e:
        return str(e)


def value(rng, kind, depth=0):
    "A random argument of a JSON type."
    if kind == "string":
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3))).strip()
    if kind == "integer":
        return rng.randint(-(10**6), 10**6)
    if kind == "number":
        return rng.choice([0.5, -2.25, 1e-7, 123456.789])
    if kind == "boolean":
        return rng.random() < 0.5
    inner = ["string", "integer", "boolean"] + ["array", "object"] * (depth < 2)
    items = [value(rng, rng.choice(inner), depth + 1) for _ in range(rng.randint(1, 3))]
    return items if kind == "array" else {f"k{n}": item for n, item in enumerate(items)}


def message(rng):
    "A random assistant message: text, reasoning, one call or several."
    kind = rng.choice(
        ["text", "call", "call", "call", "calls", "text call", "thought", "thought call", "all"]
    )
    out = {"role": "assistant", "content": ""}
    if kind in ("text", "text call", "thought", "all"):
        out["content"] = f"Well, {value(rng, 'string')}."
    if kind in ("thought", "thought call", "all"):
        out["reasoning_content"] = f"Hm, {value(rng, 'string')}."
    if "call" in kind or kind == "all":
        count = 1 if kind != "calls" else rng.randint(2, 3)
        keys = [rng.sample(sorted(TYPES), rng.randint(0, 4)) for _ in range(count)]
        out["tool_calls"] = [
            {
                "id": f"abcdefg{n:02}",
                "type": "function",
                "function": {"name": NAMES[n], "arguments": {k: value(rng, TYPES[k]) for k in some}},
            }
            for n, some in enumerate(keys)
        ]
    return out


def answer_to(reader, said, tools=TOOLS):
    """`(the Answer read from what a model would generate for the message said, what the template drops of
    it)`. Raises MaskError where it refuses it."""
    masker = reader.masker
    encoding, prompt = masker.encode([*QUESTION, said], tools=tools), masker.prompt(QUESTION, tools=tools)
    turn = encoding.turns[-1]
    if turn.message != 1:
        raise MaskError("it has no turn")
    # else the prompt has begun another kind of answer, with or without reasoning
    goes_on = encoding.text.startswith(prompt)
    begin = len(prompt) - (0 if goes_on else len(reader.frame.given.replace(SIGN, "")))
    # the prompt's tokens are given: an answer's do not reach into it
    ids = masker.texts([encoding.text[begin : turn.end]])[0][0]
    answer = (
        reader.read(ids, tools)
        if goes_on
        else reader.read_text(spell(masker, reader.body_ids(ids)[0]), tools, True)
    )
    return answer, [w for w in encoding.warnings if "drops" in w or "no turn" in w]


def expected(said):
    return (
        said.get("reasoning_content", ""),
        said["content"],
        [c["function"] for c in said.get("tool_calls", ())],
    )


def spelled(text):
    return " ".join(text.split())


def misread(reader, said):
    "What is wrong with the answer read for the message `said`: nothing, an empty string."
    try:
        answer, drops = answer_to(reader, said)
    except MaskError:
        return None
    thought, text, calls = expected(said)
    if answer.calls != calls:
        lost = sum(int(n) for w in drops for n in re.findall(r"(\d+) of its \d+ tool calls", w))
        if not lost or answer.calls != calls[: len(calls) - lost]:
            return f"calls {answer.calls} for {calls}"
    if answer.problem and not drops:
        return f"problem: {answer.problem}"
    # beside calls some templates write text as reasoning: it must be in one of the two
    read, said_ = spelled(answer.reasoning + " " + answer.text), (thought, text)
    for part in said_:
        if part and spelled(part) not in read and not any("content" in w or "reasoning" in w for w in drops):
            return f"{part!r} is lost: {answer}"
    if not calls and text and answer.text and spelled(answer.text) != spelled(text) and not drops:
        return f"text {answer.text!r} for {text!r}"
    return ""


def names():
    return [*sources(), *TOKENIZERS]


@cache
def verdict(name):
    "`read`, `refuses calls` (the template itself), or why cbnb refuses it."
    reader = reader_of(name)
    why = reader if isinstance(reader, str) else reader.cannot
    if not why:
        return "read"
    own = "refuses this transcript" in why or "does not write tool calls" in why
    return ("refuses calls: " if own else "refused: ") + why


@cache
def verdicts():
    return {name: verdict(name) for name in names()}


@pytest.mark.slow
def test_every_template_is_read_or_refused_and_none_is_misread():
    tried, counts = 0, Counter()
    for name in names():  # one after the other: few compiled templates are kept
        said = verdict(name)
        counts[said.partition(":")[0]] += 1
        if said != "read":
            continue
        rng = random.Random(name)
        for _ in range(8):
            one = message(rng)
            wrong = misread(reader_of(name), one)
            assert not wrong, f"{name}: {json.dumps(one, ensure_ascii=False)}: {wrong}"
            tried += wrong is not None
    print(dict(counts), tried, "messages read back")
    assert counts["read"] >= 110 and tried > 6 * counts["read"] and counts["refused"] <= 14, (counts, tried)


def read_by(kind=None):
    'The names of templates whose calls are read, with a control token before calls if `kind` is "signed".'
    readers = {name: reader_of(name) for name, said in verdicts().items() if said == "read"}
    return {name: r for name, r in readers.items() if kind != "signed" or SIGN in r.calls.layout.open}


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefg01", "type": "function", "function": {"name": NAMES[0], "arguments": {"to": "Oslo"}}}
    ],
}


@pytest.mark.parametrize("value", ["5", "true", "plain"])
def test_a_string_that_may_be_null_is_read_as_text(value):
    """Where a template writes values without quotes: what a schema calls a string or null stays one, and
    counts as the call that it is."""
    tools = [tool(NAMES[0], to=["string", "null"])]
    wanted = {"name": NAMES[0], "arguments": {"to": value}}
    said = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefg01", "type": "function", "function": wanted}],
    }
    tried = [name for name in sources() if re.search(r"GLM-4\.6|Qwen3-Coder", name)]
    assert len(tried) >= 2
    for name in tried:
        reader = reader_of(name)
        (made,) = answer_to(reader, said, tools)[0].calls
        assert made == wanted and reader.same(made, wanted, tools), (name, made)


@pytest.mark.slow
def test_a_call_that_lost_its_control_tokens_is_loose():
    readers = read_by("signed")
    assert len(readers) >= 25
    for name, reader in readers.items():
        ids = reader.masker.texts([reader.masker.encode([*QUESTION, CALL], tools=TOOLS).text])[0][0]
        made = reader.read_text(
            "".join(w for w in spell(reader.masker, ids).rsplit(QUESTION[0]["content"], 1)[1]), TOOLS
        )
        plain = [i for i in ids.tolist() if not is_control(reader.masker, i)]
        answer = reader.read_text(spell(reader.masker, plain).rsplit(QUESTION[0]["content"], 1)[1], TOOLS)
        assert made.calls and not answer.calls, (name, answer)


@pytest.mark.slow
def test_what_is_thought_or_follows_the_end_of_the_turn_is_no_call():
    thinking = 0
    for name, reader in read_by().items():
        thought = {
            "role": "assistant",
            "content": "No.",
            "reasoning_content": 'I could say {"name": "zqtool", "arguments": {"to": "Oslo"}}.',
        }
        try:
            answer, drops = answer_to(reader, thought)
        except MaskError:
            answer, drops = None, True
        if not drops:
            thinking += 1
            assert answer.calls == [] and "could" in answer.reasoning + answer.text, (name, answer)
        text = reader.masker.encode([*QUESTION, CALL], tools=TOOLS).text
        ids = reader.masker.texts([text])[0][0].tolist()
        assert (
            not reader.read([*reader.ends[0], *ids], TOOLS).calls
            and reader.read([*reader.ends[0], *ids], TOOLS).ended
        ), name
    assert thinking >= 20


def test_harmony_as_its_models_write_it():
    encoding, reader = harmony(), reader_of("gpt_oss")
    from openai_harmony import Conversation, Message, Role

    said = [
        Message.from_role_and_content(Role.ASSISTANT, "Let me look.").with_channel("analysis"),
        Message.from_role_and_content(Role.ASSISTANT, '{"to": "Oslo"}')
        .with_channel("commentary")
        .with_recipient("functions.zqtool")
        .with_content_type("json"),
    ]
    ids = encoding.render_conversation(Conversation.from_messages(said))
    start = reader.masker.tokenizer.encode("<|start|>assistant", add_special_tokens=False)
    assert ids[:2] == start
    answer = reader.read(ids[2:], TOOLS)
    assert (answer.reasoning, answer.calls, answer.markers) == (
        "Let me look.",
        [{"name": "zqtool", "arguments": {"to": "Oslo"}}],
        True,
    ), answer


def test_what_a_template_writes_alike_is_the_same_unless_the_schema_tells():
    reader, call = reader_of("llama.cpp/Qwen3-Coder"), lambda v: {"name": "zqtool", "arguments": {"to": v}}
    loose = [tool("zqtool")]
    assert (
        reader.same(call("5"), call(5), loose)
        and not reader.same(call("5"), call(5), TOOLS)
        and not reader.same(call("5"), call(6), loose)
    )
    strict = reader_of("qwen3")
    assert strict.same(call("5"), call("5"), loose) and not strict.same(call("5"), call(5), loose)


def test_a_cut_off_call_is_none():
    reader = reader_of("qwen3")
    ids = reader.masker.texts(
        ['<tool_call>\n{"name": "zqtool", "arguments": {"to": "Oslo"}}\n</tool_call><|im_end|>']
    )[0][0].tolist()
    assert reader.read(ids).calls and not reader.read(ids[:-3]).calls and not reader.read(ids[:-3]).ended


def test_an_end_of_turn_of_two_tokens_is_one_end():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or () "
        "%}<tool_call>{{ c.function | tojson }}</tool_call>"
        "{% endfor %}<|im_end|><|endoftext|>{% endfor %}{% if add_generation_prompt "
        "%}<|im_start|>assistant\n{% endif %}"
    )
    reader, end = (
        derive_reader(ChatMasker(qwen3(), source)),
        qwen3().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
    )
    assert reader.ends == (tuple(end),) and not reader.cannot
    answer, _ = answer_to(reader, CALL)
    assert answer.calls and answer.ended


ODD = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or () %}<tool_call>{{ c.function.name }}
{% for k, v in c.function.arguments.items() %}{{ k }}: {% if v is string %}text({{ v }}).
{% else %}value[{{ v | tojson }}];
{% endif %}{% endfor %}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<tool_call>(?P<name>\S+)\n",
            "close_pattern": r"</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"(?P<key>\w+): (?:text\(|value\[)(?P<value>.*?)(?:\)\.|\];)\n",
                "value_parser": {"name": "text"},
            },
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


# write a system prompt while a user's message is last
LATE = (
    "axolotl/mistral_v2v3",
    "axolotl/mistral_v3_tekken",
    "axolotl/pixtral",
    "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407",
)


def test_a_context_that_is_trained_in_one_form_and_asked_in_another_is_refused():
    """Of all templates, those that write a system prompt into the prompt and not into the trained transcript,
    and only for transcripts that have one; written into the first user message it is trained and asked alike.
    """
    readers = {name: reader_of(name) for name in names()}
    assert {name for name, reader in readers.items() if not isinstance(reader, str) and reader.gaps} == set(
        LATE
    )
    with_system, without = Transcript("a1", CONVERSATION), Transcript("a2", CONVERSATION[1:])
    for name in LATE:
        check_prompts(readers[name], [without])
        with pytest.raises(MaskError, match="transcript a1: .*adapt=move_system") as told:
            check_prompts(readers[name], [without, with_system])
        assert "zqsystem" in str(told.value) or "system" in str(told.value)
        masker = ChatMasker(tokenizer(), sources()[name], adapt=["move_system"])
        check_prompts(derive_reader(masker), [without, with_system])
        assert masker.encode(CONVERSATION).text.count("zqsystem") == 1


SAYS = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" %}TEXT{% for c in m.tool_calls or () %}<tool_call>CALL</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501
WHOLE, PAIRED = (
    "{{ c.function | tojson }}",
    '{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<arg name="{{ k }}">VALUE</arg>{% '
    "endfor %}",
)
PLAIN = "{{ v if v is string else v | tojson }}"


def made_of(text="{{ m.content }}", call=WHOLE):
    return SAYS.replace("TEXT", text).replace("CALL", call)


@pytest.mark.parametrize(
    "source",
    [
        made_of(),
        made_of(call=PAIRED.replace("VALUE", PLAIN)),
        made_of("{{ m.content | e }}"),
        made_of(call=PAIRED.replace("VALUE", "{{ (v if v is string else v | tojson) | e }}")),
    ],
)
def test_what_a_template_escapes_is_read_as_it_was(source):
    reader = derive_reader(ChatMasker(qwen3(), source))
    assert not reader.cannot
    for text in ("a < b && c", '<b>it\'s</b> &amp; "so"', CHECK_TEXT):
        said = {
            "role": "assistant",
            "content": text,
            "tool_calls": [
                {
                    "id": "abcdefg01",
                    "type": "function",
                    "function": {"name": NAMES[0], "arguments": {"to": text, "number": 3}},
                }
            ],
        }
        answer, drops = answer_to(reader, said)
        assert (answer.text, answer.calls) == (text, [said["tool_calls"][0]["function"]]) and not drops, (
            source,
            answer,
        )


@pytest.mark.parametrize(
    "source, why",
    [
        (made_of("{{ m.content | upper }}"), "text"),
        (made_of("{{ m.content | replace('-', '_') }}"), "text"),
        (made_of(call="{{ c.function | tojson | lower }}"), "call"),
        (
            made_of(
                call="{{ {'name': c.function.name | replace('_', '-'), 'arguments': c.function.arguments} | "
                "tojson }}"
            ),
            "call",
        ),
        (made_of(call="{{ c.function | tojson | truncate(400, True, '') }}"), "call"),
        (made_of(call=PAIRED.replace("VALUE", "{{ v | string | lower }}")), "call"),
    ],
)
def test_what_a_template_changes_for_good_is_refused(source, why):
    "Words, names and arguments that cannot be taken back: never read as something else."
    if why == "text":
        with pytest.raises(MaskError, match="no answer can be read"):
            derive_reader(ChatMasker(qwen3(), source))
    else:
        assert "cannot be read back" in derive_reader(ChatMasker(qwen3(), source)).cannot


def test_a_response_template_reads_where_no_inverse_is_derived_and_only_if_it_gives_all_back():
    own = copy.deepcopy(qwen3())
    own.chat_template = ODD
    assert derive_reader(ChatMasker(own)).cannot
    own.response_template = RESPONSE
    reader = derive_reader(ChatMasker(own))
    assert not reader.cannot and reader.prefix is not None
    answer, _ = answer_to(reader, CALL)
    assert answer.calls == [CALL["tool_calls"][0]["function"]] and answer.ended and answer.markers
    own.response_template = {
        **RESPONSE,
        "fields": {
            **RESPONSE["fields"],
            "tool_calls": {**RESPONSE["fields"]["tool_calls"], "repeats": False},
        },
    }
    assert "cannot be read back" in derive_reader(ChatMasker(own)).cannot


def main():
    for name in names():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        said = verdict(name)
        rng, wrong = random.Random(name), ""
        for _ in range(40 * (said == "read")):
            one = message(rng)
            if bad := misread(reader_of(name), one):
                wrong = f"MISREAD {one}: {bad}"
                break
        print(f"{name:55} {said[:110]} {wrong[:500]}", flush=True)


if __name__ == "__main__":
    main()
