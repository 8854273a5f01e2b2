"""Kinds of tokens in the templates that trl, axolotl and llama.cpp ship: is each token of a call's name, of
its arguments, of words and of reasoning told as what it is?

Messages are made of words that stand nowhere else, so that a search of the text says what each token is: a
few lines, one token after the other, against what the reader locates."""

import dataclasses
import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from cbnb.config import get_config
from cbnb.evaluate.call_layout import QUESTION, tool
from cbnb.evaluate.evaluation import heldout_batches
from cbnb.evaluate.reader import derive_reader
from cbnb.evaluate.token_kinds import TokenKind, token_kinds
from cbnb.masking.masker import ChatMasker
from cbnb.masking.templates import MaskError
from cbnb.transcripts.record import Transcript
from masks_templates import KINDS as CONVERSATIONS
from test_reader import TOOLS, message, names, reader_of, verdict

NAMES = ("quincetool", "reedtool")
ARGUMENTS = ({"sorrelkey": "Tansy", "umbelkey": 48151623}, {"vetchkey": "Woad über 漢字"})
SCHEMAS = [tool(NAMES[0], sorrelkey="string", umbelkey="integer"), tool(NAMES[1], vetchkey="string")]
WORDS, THOUGHT = "Xeris yarrow.", "Zinnia aster."
SOME = (
    "gpt_oss",  # channels, and a recipient
    "qwen3",  # JSON between tags
    "mistral_tekken",
    "llama4",  # calls without a marker
    "llama.cpp/GLM-4.6",  # XML of two kinds
    "llama.cpp/Qwen3-Coder",
    "llama.cpp/deepseek-ai-DeepSeek-V3.1",  # a name, then JSON
    "llama.cpp/MiniMax-M2",
    "llama.cpp/moonshotai-Kimi-K2",
)


def calls_of(number):
    functions = [{"name": n, "arguments": a} for n, a in zip(NAMES[:number], ARGUMENTS)]
    return [{"id": f"abcdefg{n:02}", "type": "function", "function": f} for n, f in enumerate(functions)]


def say(content="", number=0, thought=""):
    more = {"tool_calls": calls_of(number)} if number else {}
    more |= {"reasoning_content": thought} if thought else {}
    return {"role": "assistant", "content": content, **more}


SAID = {
    "words": say(WORDS),
    "a call": say(number=1),
    "two calls": say(number=2),
    "words beside a call": say(WORDS, 1),
    "reasoning": say(WORDS, thought=THOUGHT),
    "reasoning and a call": say(number=1, thought=THOUGHT),
}


def by_search(encoding):
    "The kind of each token of the last turn, by the words that it has a part of; syntax where it has none."
    parts = {WORDS: TokenKind.TEXT, THOUGHT: TokenKind.THINKING}
    parts |= dict.fromkeys(NAMES, TokenKind.CALL_NAME)
    for arguments in ARGUMENTS:
        parts |= dict.fromkeys(arguments, TokenKind.CALL_KEY)
        texts = [str(value) for value in arguments.values()]
        texts += [json.dumps(text)[1:-1] for text in texts]
        parts |= dict.fromkeys(texts, TokenKind.CALL_VALUE)
    turn, kinds = encoding.turns[-1], []
    places = [
        (m.start(), m.end(), kind)
        for word, kind in parts.items()
        for m in re.finditer(re.escape(word), encoding.text)
        if turn.body <= m.start()
    ]
    for start, end in encoding.offsets.tolist():
        own = [kind for s, e, kind in places if s < end and start < e]
        kinds.append(max(own, default=TokenKind.CALL_SYNTAX))
    return np.array(kinds)


def own_tokens(encoding):
    "Tokens of the last turn, without its end."
    turn = encoding.turns[-1]
    return (encoding.offsets[:, 0] >= turn.body) & (encoding.offsets[:, 1] <= turn.eot)


def differences(reader, said):
    "Tokens of which the search says another kind, as text; None where the template refuses such a message."
    try:
        encoding = reader.masker.encode([*QUESTION, said], tools=SCHEMAS)
    except MaskError:
        return None
    if not encoding.turns or encoding.turns[-1].message != 1:
        return None
    found = token_kinds(encoding, Transcript("t", [*QUESTION, said], SCHEMAS), reader)
    expected, own = by_search(encoding), own_tokens(encoding)
    # a name may stand in the id of a call, too, and words beside a call be written as reasoning (gpt-oss)
    twice = (expected == TokenKind.CALL_NAME) & (found == TokenKind.CALL_SYNTAX)
    as_thought = (expected == TokenKind.TEXT) & (found == TokenKind.THINKING) & bool(said.get("tool_calls"))
    is_name = own & (found == TokenKind.CALL_NAME)
    named = (is_name & ~np.roll(is_name, 1)).sum() >= len(said.get("tool_calls") or [])  # each call's own
    expected = np.where(twice & named | as_thought, found, expected)
    return [
        (encoding.text[slice(*encoding.offsets[i])], TokenKind(expected[i]).name, TokenKind(found[i]).name)
        for i in np.flatnonzero(own & (found != expected))
    ]


def misjudged(name):
    "Differences by what is said, of one template."
    reader = reader_of(name)
    rows = {what: differences(reader, said) for what, said in SAID.items()}
    return {what: row for what, row in rows.items() if row}, sum(row is not None for row in rows.values())


@pytest.mark.parametrize("name", SOME)
def test_each_token_is_of_the_kind_of_its_word(name):
    wrong, tried = misjudged(name)
    assert not wrong and tried >= 3


@pytest.mark.slow
def test_each_token_is_of_the_kind_of_its_word_in_every_template():
    """Two templates write a header behind that of the prompt, so that the reader finds no reasoning: what the
    masker's marks do not enclose is unknown, and its segment of the words has the closing tag too."""
    wrong, unknown, tried = {}, set(), 0
    for name in names():
        if verdict(name) != "read":
            continue
        own, count = misjudged(name)
        tried += count
        for what, rows in own.items():
            around = ("THINKING", "CALL_SYNTAX", "TEXT") if "Laguna" in name else ()
            other = [row for row in rows if row[2] != "UNKNOWN" and row[1] not in around]
            unknown |= {name} if len(other) < len(rows) else set()
            wrong |= {(name, what): other} if other else {}
    print(tried, unknown)
    assert tried > 600 and not wrong and all("Laguna" in name for name in unknown)


@pytest.mark.slow
def test_random_calls_are_located_in_every_template():
    "Escapes, other scripts, nested values, values that look like markup: of what is read nothing is unknown."
    unknown, tried = {}, Counter()
    for name in names():
        if verdict(name) != "read":
            continue
        reader, rng = reader_of(name), random.Random(name)
        for _ in range(8):
            messages = [*QUESTION, message(rng)]
            try:
                encoding = reader.masker.encode(messages, tools=TOOLS)
            except MaskError:
                continue
            if encoding.turns and encoding.turns[-1].message == 1:
                kinds = token_kinds(encoding, Transcript("t", messages, TOOLS), reader)[own_tokens(encoding)]
                tried.update(TokenKind(kind).name for kind in kinds.tolist())
                if (kinds == TokenKind.UNKNOWN).any():
                    unknown[name] = messages[-1]
    print(tried, [*unknown])
    assert min(tried[k] for k in ("CALL_VALUE", "CALL_NAME", "CALL_KEY", "TEXT", "THINKING")) > 1000
    assert all("Laguna" in name for name in unknown), unknown


@pytest.mark.parametrize("name", SOME)
def test_values_are_those_that_were_written(name):
    """What is escaped in the text is the value; its quotes are not, but for those in a token of it. Nothing
    of a conversation of several turns is unknown, or taken for a prompt."""
    reader = reader_of(name)
    values = ['say "hi" \\ it\'s', "<b>&amp;</b>", "ünï 漢字 🎉", "one\ntwo", "{}", "5"]
    arguments = dict(zip(("to", "text", "code"), values)), dict(zip(("to", "text", "code"), values[3:]))
    functions = [{"name": n, "arguments": a} for n, a in zip(("zqtool", "zqtwo"), arguments)]
    calls = [{"id": f"abcdefg{n:02}", "type": "function", "function": f} for n, f in enumerate(functions)]
    results = [
        {"role": "tool", "content": "done", "tool_call_id": call["id"], "name": call["function"]["name"]}
        for call in calls
    ]
    talk = [{"role": "user", "content": "Do it."}]
    for n in (0, 1):
        talk += [{"role": "assistant", "content": "", "tool_calls": calls[n : n + 1]}, results[n]]
    talk += [{"role": "assistant", "content": "It is done: f(x) = {}."}]
    encoding = reader.masker.encode(talk, tools=TOOLS)
    kinds = token_kinds(encoding, Transcript("t", talk, TOOLS), reader)
    assert TokenKind.UNKNOWN not in kinds
    for turn, said in zip(encoding.turns, (arguments[0], arguments[1], {})):
        own = (encoding.offsets[:, 0] >= turn.body) & (encoding.offsets[:, 1] <= turn.eot)
        assert TokenKind.PROMPT not in kinds[own] and TokenKind.END not in kinds[own]
        # several tokens may be of one character
        places = {
            at
            for i in np.flatnonzero(own & (kinds == TokenKind.CALL_VALUE))
            for at in range(*encoding.offsets[i])
        }
        text = "".join(encoding.text[at] for at in sorted(places))
        for value in said.values():
            plain = {
                value,
                value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"),
                repr(value)[1:-1],
            }
            assert any(word in text for word in plain), (value, text)
    ends = [
        kinds[(encoding.offsets[:, 0] >= t.eot) & (encoding.offsets[:, 0] < t.end)] for t in encoding.turns
    ]
    assert all((end == TokenKind.END).all() for end in ends)


def test_what_was_not_written_is_unknown():
    reader = reader_of("qwen3")
    encoding = reader.masker.encode([*QUESTION, say(number=1)], tools=SCHEMAS)
    for other in (say(WORDS), say(number=2) | {"tool_calls": calls_of(2)[1:]}):
        kinds = token_kinds(encoding, Transcript("t", [*QUESTION, other], SCHEMAS), reader)
        kinds = kinds[own_tokens(encoding)]
        # the masker knows the name by its marks
        assert {*kinds.tolist()} <= {TokenKind.UNKNOWN, TokenKind.CALL_NAME, TokenKind.CALL_SYNTAX}
        assert (kinds == TokenKind.UNKNOWN).sum() > 5 and TokenKind.CALL_VALUE not in kinds


@pytest.mark.parametrize("name", ("qwen3", "gpt_oss", "llama.cpp/GLM-4.6"))
def test_conversations_of_the_masks_are_located(name):
    reader, counts = reader_of(name), Counter()
    for kind, messages in CONVERSATIONS.items():
        try:
            encoding = reader.masker.encode(messages)
        except MaskError:
            continue
        kinds = token_kinds(encoding, Transcript(kind, messages), reader)
        generated = np.isin(encoding.segments, (6, 7, 8, 9, 10, 11))
        counts.update(TokenKind(k).name for k in kinds[generated].tolist())
        assert TokenKind.UNKNOWN not in kinds, kind
    assert min(counts[k] for k in ("CALL_NAME", "CALL_KEY", "CALL_VALUE", "TEXT")) > 2
    assert counts["PROMPT"] == 0


class Student:
    "What `heldout_batches` wants of one."

    device = "cpu"


@pytest.mark.parametrize("split", (False, True))
def test_kinds_of_rows_are_those_of_their_targets(split):
    "Through truncation, the order by length and padding: target by target."
    from cbnb.step.models import load_tokenizer
    from cbnb.transcripts.tinyworld import make_transcripts

    masker = ChatMasker(load_tokenizer("tinyagent"))
    reader = derive_reader(masker)
    config = dataclasses.replace(
        get_config("tinyagent"), max_length=110, lost_context="keep", split_turns=split
    )
    some = make_transcripts("plain", 7, split="eval") + make_transcripts("general", 4, split="eval")
    batches = [*heldout_batches(Student(), masker, some, config, "benign", 3, reader)]
    ids = np.concatenate([r["input_ids"].flatten()[r["predicting_index"] + 1].numpy() for r in batches])
    kinds, owners = (np.concatenate([r[k].numpy() for r in batches]) for k in ("kinds", "owners"))
    assert len(ids) == len(kinds) == len(owners) and len({*owners.tolist()}) == len(some)
    end = masker.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert ((ids == end) == (kinds == TokenKind.END)).all()
    texts = np.array([masker.tokenizer.decode([i]).strip() for i in ids.tolist()])
    called = {c["function"]["name"] for t in some for m in t.messages for c in m.get("tool_calls") or ()}
    assert {*texts[kinds == TokenKind.CALL_NAME].tolist()} <= called
    assert {*kinds.tolist()} >= {TokenKind.CALL_SYNTAX, TokenKind.CALL_VALUE, TokenKind.TEXT}
    assert not {TokenKind.PROMPT, TokenKind.UNKNOWN} & {*kinds.tolist()}
