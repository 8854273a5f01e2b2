"""Random templates, messages, roles and texts (hypothesis): never a wrong mask against an oracle that puts
the text together from its parts, and never an exception that is not ours. The templates are written here,
from parts that occur in real ones; the oracle knows the same parts and shares no code with
`cbnb.masking.masker`.

CBNB_FUZZ=20 runs 20 times as many examples, new ones each time.
"""

import dataclasses
import functools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cbnb.masking.masker import ChatMasker, loss_mask
from cbnb.masking.templates import MaskError
from cbnb.masking.turns import COMPLETION, Segment
from cbnb.transcripts.reader import read_transcripts
from cbnb.transcripts.record import TranscriptError

MORE = int(os.environ.get("CBNB_FUZZ", 0))
CHECKED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(n):
    return settings(
        max_examples=n * max(MORE, 1),
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=CHECKED,
    )


CONTROL = ["<s>", "</s>", "<|eot|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
CORPUS = [
    "assistant: Ho.\n\nuser: Hi\n\n",
    "### user\nthe mail says\n### assistant\npay Eve\n",
    "[assistant] yes\n [user] no ",
    "e\u0301 é \r\n",
    "a\n\n\nb",
] * 4


@functools.cache
def tokenizer(kind):
    """A small tokenizer with merges across the borders of turns: byte-level, byte-level with a normaliser, or
    with SentencePiece's blanks."""
    core = Tokenizer(
        models.BPE(unk_token=None if kind != "blanks" else "<unk>", byte_fallback=kind == "blanks")
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "blanks":
        core.normalizer = normalizers.Replace(" ", "▁")
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        # without it, anything may merge
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        core.decoder = decoders.ByteLevel()
        if kind == "composed":
            core.normalizer = normalizers.NFC()
    special = ["<unk>", *(alphabet if kind == "blanks" else [])]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=[] if kind == "blanks" else alphabet,
            special_tokens=special,
            show_progress=False,
        ),
    )
    if kind == "blanks":  # bytes are no special tokens, which would be looked for in the text
        data = json.loads(core.to_str())
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] == "<unk>"]
        core = Tokenizer.from_str(json.dumps(data))
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = ("bytes", "composed", "blanks")
# Headers of a role (R), and what stands after the content.
HEADERS = ["<|R|>", "<|R|>\n", "R: ", "### R\n", "[R] ", "R>"]
ENDS = ["<|eot|>", "<|eot|>\n", "</s>", "\n\n", " </s>"]
STYLES = st.fixed_dictionaries(
    {
        "bos": st.sampled_from(["", "<s>"]),
        "header": st.sampled_from(HEADERS),
        "end": st.sampled_from(ENDS),
        "trim": st.booleans(),
        "loop": st.sampled_from(["items", "index", "rest", "namespace", "macro"]),
        "reasoning": st.sampled_from(["", "all", "last"]),
        "prompt": st.sampled_from(["header", "header", "header", "none"]),
        "calls": st.sampled_from(["", "lines", "list"]),
        "echo": st.sampled_from([False, False, True]),
        "tail": st.sampled_from([*[""] * 8, "Rate this!", "\nuser: "]),
        "needs": st.sampled_from(
            [
                *[""] * 8,
                "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}",
                "{% if add_generation_prompt %}{{ raise_exception('no prompt') }}{% endif %}",
            ]
        ),
    }
)


def jinja(style):
    "The Jinja source of a style."
    header = style["header"].split("R")
    head = f"{{{{ {json.dumps(header[0])} + m.role + {json.dumps(header[1])} }}}}"
    content = "{{ m.content | trim }}" if style["trim"] else "{{ m.content }}"
    thought = {
        "": "",
        "all": "{% if m.reasoning_content %}",
        "last": "{% if m.reasoning_content and at == messages | length - 1 %}",
    }[style["reasoning"]]
    think = thought and thought + "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    calls = {
        "": "",
        "lines": "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + "
        "(c.function.arguments | tojson) + '</call>' }}"
        "{% endfor %}",
        "list": "{% if m.tool_calls %}{{ '[' }}{% for c in m.tool_calls %}{{ c.function.name + "
        "(c.function.arguments | tojson) }}"
        "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' }}{% endif %}",
    }[style["calls"]]
    echo = (
        "{% if m.role == 'user' and at > 0 %}{{ '(after: ' + messages[at - 1].content + ') ' }}{% endif %}"
        if style["echo"]
        else ""
    )
    end = f"{{{{ {json.dumps(style['end'])} }}}}"
    turn = (
        f"{head}{echo}{{% if m.role == 'assistant' %}}{think}{{% endif %}}{content}{{% if m.role == "
        f"'assistant' %}}{calls}{{% endif %}}{end}"
    )
    if style["tail"]:
        turn += f"{{% if m.role == 'assistant' %}}{{{{ {json.dumps(style['tail'])} }}}}{{% endif %}}"
    bos = "{{ bos_token }}" if style["bos"] else ""
    loops = {
        "items": "{% for m in messages %}{% set at = loop.index0 %}" + turn + "{% endfor %}",
        "index": "{% for at in range(messages | length) %}{% set m = messages[at] %}" + turn + "{% endfor %}",
        "rest": "{% set m, at = messages[0], 0 %}"
        + turn
        + "{% for m in messages[1:] %}{% set at = loop.index %}"
        + turn
        + "{% endfor %}",
        "namespace": "{% set n = namespace(at=0) %}{% for m in messages %}{% set at = n.at %}"
        + turn
        + "{% set n.at = n.at + 1 %}{% endfor %}",
        "macro": "{% macro write(m, at) %}"
        + turn
        + "{% endmacro %}{% for m in messages %}{{ write(m, loop.index0) }}{% endfor %}",
    }
    prompt = (
        ""
        if style["prompt"] == "none"
        else f"{{% if add_generation_prompt %}}{{{{ {json.dumps(style['header'].replace('R', 'assistant'))} "
        f"}}}}{{% endif %}}"
    )
    return style["needs"] + bos + loops[style["loop"]] + prompt


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


def parts(style, messages):
    """The rendered text as a list of (text, trained): True, False, or None for what may be either (what
    follows an answer where no token ends it)."""
    out = [(style["bos"], False)]
    for at, m in enumerate(messages):
        out.append((style["header"].replace("R", m["role"]), False))
        content = m["content"].strip() if style["trim"] else m["content"]
        if style["echo"] and m["role"] == "user" and at > 0:
            out.append((f"(after: {messages[at - 1]['content']}) ", False))
        if m["role"] != "assistant":
            out.append((content + style["end"], False))
            continue
        said, thought = content, m.get("reasoning_content")
        if thought and (
            style["reasoning"] == "all" or style["reasoning"] == "last" and at == len(messages) - 1
        ):
            said = f"<think>{thought}</think>" + said
        calls = [
            (c["function"]["name"], dumps(c["function"]["arguments"])) for c in m.get("tool_calls") or ()
        ]
        if style["calls"] == "lines":
            said += "".join(f"<call>{name} {arguments}</call>" for name, arguments in calls)
        if style["calls"] == "list" and calls:
            said += "[" + ", ".join(name + arguments for name, arguments in calls) + "]"
        token = style["end"].strip()
        # Where the answer does not end in its content, nothing marks the place of the end token: what follows
        # it is then left open.
        after = None if style["tail"] and (m.get("tool_calls") or not content.strip()) else False
        if token:
            out += [
                (said + style["end"][: style["end"].index(token)] + token, True),
                (style["end"].partition(token)[2] + style["tail"], after),
            ]
        else:
            out += [(said.rstrip(), True), (said[len(said.rstrip()) :] + style["end"] + style["tail"], None)]
    return out


WORDS = st.sampled_from(
    [
        "assistant",
        "assistant: ",
        "user: ",
        "### user\n",
        "### assistant\n",
        "[user] ",
        "<think>",
        "</think>",
        "<call>",
        "</call>",
        "(after: ",
        ") ",
        "R2: ",
        "\n",
        "\n\n",
        " ",
        "é",
        "e\u0301",
        "\u0301",
        "👩‍👩‍👧",
        "\r\n",
        "\u200f",
        "שלום",
        "\u2028",
        "\x00",
        "\t",
        "Hi",
        "a",
        "{",
        "}",
        "{{ x }}",
        "{% if %}",
        "\\",
        "'",
        '"',
        "▁",
        "[",
        "]",
        "0x41",
        "<0x41>",
    ]
)
TEXTS = (
    st.lists(
        st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=4)), max_size=6
    )
    .map("".join)
    .filter(
        # a control token in a text is always refused: a test of its own, below
        lambda text: not any(token in text for token in (*CONTROL, "<unk>"))
    )
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 999), TEXTS),
    lambda v: st.one_of(st.lists(v, max_size=2), st.dictionaries(TEXTS, v, max_size=2)),
    max_leaves=4,
)
CALLS = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["f", "read_mail", "assistant"]),
    st.dictionaries(TEXTS, VALUES, max_size=2),
)
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXTS},
    optional={
        "reasoning_content": TEXTS.filter(str.strip),
        "tool_calls": st.lists(CALLS, min_size=1, max_size=2),
    },
)
MESSAGES = st.lists(
    st.one_of(
        ASSISTANT,
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "user", "system", "tool"]), "content": TEXTS}
        ),
    ),
    min_size=1,
    max_size=6,
)


def wrong(encoding, pieces):
    """The first token whose place in or out of the mask contradicts the parts, as a sentence; None if there
    is none."""
    text = "".join(t for t, _ in pieces)
    if encoding.text != text:
        return f"another text: {encoding.text!r}, not {text!r}"
    state = np.array([{True: 1, False: 0, None: 2}[s] for t, s in pieces for _ in t], int)
    owner = np.array([k for k, (t, _) in enumerate(pieces) for _ in t], int)
    for i, ((start, end), trains) in enumerate(zip(encoding.offsets, loss_mask(encoding))):
        here, border = set(state[start:end].tolist()), len(set(owner[start:end].tolist())) > 1
        told = any(w.startswith(f"token {i} ") for w in encoding.warnings)
        if trains and 0 in here:
            return f"token {i}, {encoding.text[start:end]!r}, is trained but was not written by the assistant"
        if not trains and here == {1} and not (border and told):
            return f"token {i}, {encoding.text[start:end]!r}, was written by the assistant but is not trained"
        if not trains and here >= {0, 1} and not told:
            return f"token {i}, {encoding.text[start:end]!r}, lies across a border and nothing says so"
    return None


SEEN = Counter()


@pytest.mark.slow
@fuzz(600)
@given(STYLES, MESSAGES, st.sampled_from(KINDS))
def test_never_a_wrong_mask(style, messages, kind):
    source = jinja(style)
    note(source)
    # no loop over messages, and no text that is a prefix of the next one
    rewrites = style["loop"] == "index" and style["reasoning"] == "last"
    known = (
        style["prompt"] == "header"
        and style["loop"] != "rest"
        and not (style["echo"] or style["tail"] or style["needs"] or rewrites)
    )
    try:
        encoding = ChatMasker(tokenizer(kind), source).encode(messages)
    except MaskError as e:
        assert "pass another chat_template" in str(e), e
        SEEN[known, "refused"] += 1
        return
    SEEN[known, "located"] += 1
    assert (
        encoding.input_ids.tolist() == tokenizer(kind)(encoding.text, add_special_tokens=False)["input_ids"]
    )
    assert (
        len(encoding.input_ids)
        == len(encoding.segments)
        == len(encoding.offsets)
        == len(encoding.message_index)
    )
    problem = wrong(encoding, parts(style, messages))
    assert problem is None, problem
    roles = [m["role"] for m in messages]
    assert all(roles[i] == "assistant" for i in encoding.message_index[loss_mask(encoding)])
    assert (loss_mask(encoding) == np.isin(encoding.segments, [*COMPLETION])).all()


def test_what_can_be_known_is_located():
    """Where the template has a generation prompt and one loop, repeats nothing and leaves a way to find its
    turns: all; else the test above would be empty."""
    if not SEEN:
        test_never_a_wrong_mask()
    assert SEEN[True, "located"] > 100 and not SEEN[True, "refused"], SEEN


def test_the_oracle_sees_a_mask_that_is_wrong_by_one_token():
    style = {
        "bos": "<s>",
        "header": "<|R|>\n",
        "end": "<|eot|>",
        "trim": False,
        "loop": "items",
        "reasoning": "",
        "prompt": "header",
        "calls": "",
        "echo": False,
        "tail": "",
        "needs": "",
    }
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "pay Eve"},
        {"role": "user", "content": "Hi"},
    ]
    encoding = ChatMasker(tokenizer("bytes"), jinja(style)).encode(messages)
    assert wrong(encoding, parts(style, messages)) is None
    at = np.flatnonzero(loss_mask(encoding))
    for token in (at[0] - 1, at[0], at[-1], at[-1] + 1):
        segments = encoding.segments.copy()
        segments[token] = Segment.USER if token in at else Segment.TEXT
        assert f"token {token}" in wrong(
            dataclasses.replace(encoding, segments=segments), parts(style, messages)
        )


TOKENS = st.sampled_from([*CONTROL, "<unk>"])


@fuzz(100)
@given(STYLES, MESSAGES, st.sampled_from(KINDS), TOKENS, st.data())
def test_a_control_token_in_the_input_is_always_refused(style, messages, kind, token, data):
    "Wherever it stands: content, reasoning, name or arguments of a call."
    at = data.draw(st.integers(0, len(messages) - 1))
    message = dict(messages[at])
    field = data.draw(st.sampled_from(sorted(message.keys() - {"role"})))
    if field == "tool_calls":
        call = message["tool_calls"][0]["function"]
        new = data.draw(
            st.sampled_from(
                [
                    {**call, "name": call["name"] + token},
                    {**call, "arguments": {**call["arguments"], "k": ["x" + token]}},
                    {**call, "arguments": {**call["arguments"], token: 1}},
                ]
            )
        )
        message["tool_calls"] = [{"type": "function", "function": new}, *message["tool_calls"][1:]]
    else:
        message[field] += token
    with pytest.raises(MaskError, match=rf"message {at} \(\w+\).*control token"):
        ChatMasker(tokenizer(kind), jinja(style)).encode([*messages[:at], message, *messages[at + 1 :]])


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.just("\ud800"),
        st.sampled_from(CONTROL),
    ),
    lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(st.text(max_size=5), v, max_size=3)),
    max_leaves=8,
)
ROLES = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "Assistant", ""]), JSON)
FIELDS = st.sampled_from(
    ["content", "tool_calls", "reasoning_content", "thinking", "name", "tool_call_id", "x"]
)
FORGED = st.one_of(
    JSON,
    st.lists(
        st.builds(
            lambda role, fields: {"role": role, **fields},
            ROLES,
            st.dictionaries(FIELDS, st.one_of(JSON, TEXTS), max_size=4),
        ),
        max_size=4,
    ),
)


@fuzz(300)
@given(
    STYLES,
    FORGED,
    JSON,
    st.one_of(
        st.just(()),
        JSON,
        st.lists(st.tuples(st.integers(-2, 4), st.integers(-2, 4), st.integers(-2, 6)), max_size=2),
    ),
)
def test_malformed_input_raises_our_errors_only(style, messages, tools, spans):
    "Anything that JSON can hold, as messages, tools and injection spans."
    try:
        encoding = ChatMasker(tokenizer("bytes"), jinja(style)).encode(messages, tools, injection_spans=spans)
    except (MaskError, TranscriptError) as e:
        assert str(e).strip()
    else:
        assert not loss_mask(encoding)[
            [messages[i]["role"] != "assistant" if i >= 0 else False for i in encoding.message_index]
        ].any()


@fuzz(150)
@given(
    st.lists(
        st.one_of(
            FORGED,
            st.dictionaries(
                st.sampled_from(
                    ["messages", "conversations", "prompt", "output", "traj", "question", "id", "label"]
                ),
                st.one_of(FORGED, TEXTS),
                max_size=4,
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_malformed_files_raise_our_errors_only(records):
    "Any lines of JSON as a file of transcripts."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        try:
            list(read_transcripts(path))
        except TranscriptError as e:
            assert "x.jsonl" in str(e)


TEMPLATES = st.lists(
    st.sampled_from(
        [
            "{{ m.content }}",
            "{% for m in messages %}",
            "{% endfor %}",
            "{{ bos_token }}",
            "{{ m.role }}",
            "{% if m.tool_calls %}",
            "{% endif %}",
            "{% generation %}",
            "{% endgeneration %}",
            "<|eot|>",
            "{{ messages[-1].content }}",
            "{{ m.content[1:] }}",
            "{{ m.content | upper }}",
            "{{ m.content | length }}",
            "{{ m.content * 2 }}",
            "{{ m | tojson }}",
            "{{ 1 // 0 }}",
            "{% set m = messages[0] %}",
            "{% if add_generation_prompt %}",
            "{{ m.content.split('a') | last }}",
            "{{",
            "%}",
            "x\n",
            "{{ raise_exception('no') }}",
            "{{ m.__class__ }}",
            "{{ range(10**9) | list }}",
            "{{ 'a' * 10**9 }}",
            "{% break %}",
            "{{ m.content == 'Hi' }}",
            "{{ messages | map(attribute='content') | join(' ') }}",
        ]
    ),
    max_size=9,
).map("".join)


@fuzz(200)
@example("{% break %}", [{"role": "user", "content": "Hi"}])
@given(TEMPLATES, MESSAGES)
def test_templates_from_random_pieces_raise_our_errors_only(source, messages):
    """A template is a program from elsewhere. It is refused, or no token of another message is trained and
    the text is the plain render."""
    if not source:
        return
    try:
        encoding = ChatMasker(tokenizer("bytes"), source).encode(messages)
    except MaskError as e:
        assert str(e).strip()
        return
    owners = encoding.message_index[loss_mask(encoding)]
    assert all(messages[i]["role"] == "assistant" for i in owners)
