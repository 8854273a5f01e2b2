"""Every chat template that trl and axolotl ship, on transcripts of several kinds: what becomes of each, held
against transformers' own renders. Texts of all messages are unique, so that a word of one message in the mask
of another is seen whatever the template does."""

import re
from functools import cache
from unittest import mock

import numpy as np
from jinja2 import TemplateError

from cbnb.masking.masker import ChatMasker, loss_mask
from cbnb.masking.policies import Encoding
from cbnb.masking.rendering import FROZEN_NOW
from cbnb.masking.templates import MaskError
from masks_common import answer, ask, say
from outside import axolotl_template, axolotl_templates, qwen3, trl_template, trl_templates

FAMILIES = {  # family: {name: source}
    "trl": lambda: {n: trl_template(n) for n in trl_templates() if not n.endswith("_training")},
    "axolotl": lambda: {n: axolotl_template(n) for n in axolotl_templates()},
    "trl training": lambda: {n: trl_template(n) for n in trl_templates() if n.endswith("_training")},
}
CONTROL = re.compile(
    r"<[|｜][^<>\s'|｜]{1,40}[|｜]>|<(?:start|end)_of_(?:turn|utterance)>|<turn\|>|<\|turn>|</s>|\[/?[A-Z_]{3,}\]|\[\|\w+\|\]"  # noqa: E501
)
THINKING = re.compile(r"(<think>|\[THINK\]|<\|channel>thought)\s*((</think>|\[/THINK\]|<channel\|>)\s*)?$")


def think(text):
    return {"reasoning_content": text, "thinking": text}


CHAT = [
    say("user", "Quince?"),
    say("assistant", "Rhubarb, ah."),
    say("user", "Sorrel"),
    say("assistant", "Tansy\nOh."),
    say("user", "Urtica"),
]
CALL = [
    say("user", "Quince?"),
    say("assistant", "", tool_calls=[ask("reed", id="Sedge")]),
    answer("TANSY"),
    say("assistant", "Umbel."),
    say("user", "Vetch"),
    say("assistant", "Woad."),
]
PARALLEL = [
    say("user", "Quince?"),
    say("assistant", "", tool_calls=[ask("reed", 1, id="Sedge"), ask("reed", 2, id="Teasel")]),
    answer("TANSY", 1),
    answer("ULEX", 2),
    say("assistant", "Vetch."),
]
KINDS = {  # kind: messages
    "chat": CHAT,
    "chat, answer last": CHAT[:-1],
    "system": [say("system", "Parsley."), *CHAT],
    "blanks": [
        say("user", " Quince? \n"),
        say("assistant", "\n Rhubarb. \n"),
        say("user", "\tSorrel"),
        say("assistant", " Tansy "),
    ],
    "call": CALL,
    "parallel calls": PARALLEL,
    "text beside a call": [CALL[0], {**CALL[1], "content": "Rhubarb."}, *CALL[2:]],
    "thinking": [
        say("user", "Quince?"),
        say("assistant", "Rhubarb.", **think("Sorrel.")),
        say("user", "Tansy"),
        say("assistant", "Umbel.", **think("Vetch.")),
    ],
    "thinking and calls": [
        CALL[0],
        {**CALL[1], **think("Rhubarb.")},
        CALL[2],
        {**CALL[3], **think("Xeris.")},
        *CALL[4:],
    ],
    "two answers in a row": [*CHAT[:2], say("assistant", "Sorrel."), *CHAT[4:], say("assistant", "Woad.")],
}


def words(message):
    "The unique words that a message says."
    said = [
        message.get("content") or "",
        message.get("thinking") or "",
        *(str(c["function"]["arguments"]["id"]) for c in message.get("tool_calls") or ()),
    ]
    return [w for text in said for w in re.findall(r"\w{4,}", text)]


@cache
def sources():
    return {(family, name): source for family, read in FAMILIES.items() for name, source in read().items()}


@cache
def tokenizer():
    "Qwen 3's tokenizer, to which what looks like a control token in any of the templates is one."
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(qwen3().backend_tokenizer.to_str())
    core.add_special_tokens(sorted({w for s in sources().values() for w in CONTROL.findall(s)} | {"<|eos|>"}))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|eos|>")


class Clock:
    "A `datetime` that stands still, as the engine's does."

    @staticmethod
    def now():
        return FROZEN_NOW


def plain(source, messages, prompt=False):
    "transformers' own render, or None where the template refuses."
    with mock.patch("transformers.utils.chat_template_utils.datetime", Clock):
        try:
            return tokenizer().apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return None


@cache
def results():
    """{(family, name, kind): the Encoding, or the reason why the template (None) or the engine (text of its
    MaskError) refuses}."""
    out, masker = {}, ChatMasker(tokenizer(), "{{ messages }}")
    for (family, name), source in sources().items():
        masker.chat_template = source
        for kind, messages in KINDS.items():
            try:
                out[family, name, kind] = masker.encode(messages)
            except MaskError as e:
                out[family, name, kind] = str(e) if plain(source, messages) is not None else None
    return out


@cache
def header(source):
    "What `source` writes for a generation prompt after a lone question, or None if that cannot be told."
    ask = [say("user", "Quince?")]
    without, asked = plain(source, ask), plain(source, ask, True)
    for end in ("", "<|eos|>"):  # some write EOS in the place of a prompt
        if without is not None and asked is not None and asked.startswith(start := without.removesuffix(end)):
            return asked[len(start) :]
    return None


def in_mask(encoding):
    "bool, one a character of the text: whether its token is trained."
    inside = np.zeros(len(encoding.text), bool)
    for (start, end), trains in zip(encoding.offsets, loss_mask(encoding)):
        inside[start:end] |= trains
    return inside


def prefix_says(source, text, messages, i):
    """What the assistant wrote in message i by transformers' renders of the messages before and up to it, or
    None if these are no prefixes."""
    before, upto = plain(source, messages[:i], True), plain(source, messages[: i + 1])
    if before is None or upto is None:
        return None
    if not (text.startswith(before) and text.startswith(upto) and len(before) <= len(upto)):
        return None
    return upto[len(before) :].rstrip()


def explained(got, want, source, warnings, i):
    """Why what is trained of message i differs from what stands between the two renders; None if nothing
    explains it."""
    mine = [w for w in warnings if f"message {i}" in w]
    if any("straddles a border" in w for w in mine):
        cut = min(len(want) - len(want.lstrip()), len(want))
        if got and want.endswith(got) and not want[: len(want) - len(got)].strip() and cut:
            return "a token across the border is left out"
        return None
    more = want[len(got) :] if want.startswith(got) else None
    if more is None:
        return None
    if more.strip() == "<|eos|>":
        return "EOS stands after the last turn only"
    asked, head = plain(source, [say("user", "Quince?")]), header(source)
    if asked.endswith(more.strip()) and len(CONTROL.findall(more)) > 1:
        return "the template always ends in a header, asked for or not"
    no_eot = any("no end-of-turn token" in w for w in mine)
    if head is not None and no_eot and CONTROL.fullmatch(more.strip()):
        return "the next turn writes its end-of-turn token (told in a warning)"
    return None


@cache
def verdicts():
    """For each located turn {(family, name, kind, message): how it was proven}. AssertionError for a wrong
    mask: a word of another message in it, one of its own missing, a header, or other text than transformers'
    renders say where these are prefixes."""
    out = {}
    for (family, name, kind), encoding in results().items():
        if not isinstance(encoding, Encoding):
            continue
        source, messages, where = sources()[family, name], KINDS[kind], (family, name, kind)
        text, mask, inside, head = encoding.text, loss_mask(encoding), in_mask(encoding), header(source)
        assert text == plain(source, messages), where
        for i, message in enumerate(messages):
            told = [w for w in encoding.warnings if f"message {i}" in w]
            for word in words(message):
                at = text.find(word)
                assert text.count(word) == 1 or at < 0 and any("drops" in w for w in told), (
                    where,
                    word,
                    told,
                )
                if at >= 0:
                    assert (
                        inside[at : at + len(word)].all()
                        == inside[at : at + len(word)].any()
                        == (message["role"] == "assistant")
                    ), (where, word)
            if message["role"] != "assistant":
                continue
            at = np.flatnonzero(mask & (encoding.message_index == i))
            if not len(at):
                assert any("drops" in w for w in told) and not any(w in text for w in words(message)), (
                    where,
                    i,
                )
                out[family, name, kind, i] = "nothing of it in the text"
                continue
            assert (np.diff(at) == 1).all(), (where, i)
            start, end = encoding.offsets[at[0], 0], encoding.offsets[at[-1], 1]
            got = text[start:end]
            want = prefix_says(source, text, messages, i)
            if want is not None:
                why = "equal" if got.rstrip() == want else explained(got, want, source, encoding.warnings, i)
                assert why, (where, i, got, want, encoding.warnings)
                out[family, name, kind, i] = why
                continue
            # The template rewrites what stands before. A header must stand right before the mask, none in it,
            # and an end-of-turn token last.
            heads = {h.strip() for h in (head or "", THINKING.sub("", head or "")) if h.strip()}
            assert not heads or any(text[:start].rstrip().endswith(h) for h in heads), (
                where,
                i,
                text[:start][-80:],
                heads,
            )
            assert not any(h in got for h in heads if h != "<|start|>assistant"), (where, i, got)
            # GLM's calls have no token of their own after them
            ended = re.search(f"(?:{CONTROL.pattern}|</tool_call>)\\s*$", got)
            assert ended or any("no end-of-turn token" in w for w in told), (where, i, got)
            out[family, name, kind, i] = (
                "no prefix: header, words and end checked"
                if heads
                else "no prefix, no header: words and end checked"
            )
    return out


@cache
def tagged():
    """{(family, name, kind): what transformers' own generation tags train of trl's training templates beyond
    our mask}, as pieces of text."""
    out = {}
    for key, encoding in results().items():
        if key[0] != "trl training" or not isinstance(encoding, Encoding):
            continue
        with mock.patch("transformers.utils.chat_template_utils.datetime", Clock):
            theirs = tokenizer().apply_chat_template(
                KINDS[key[2]],
                chat_template=sources()[key[:2]],
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        ours, mask = loss_mask(encoding), np.array(theirs["assistant_masks"], bool)
        assert theirs["input_ids"] == encoding.input_ids.tolist(), key
        assert mask[ours].all(), (key, "we train what their tags do not")
        pieces, extra = [], np.flatnonzero(mask & ~ours)
        for run in np.split(extra, np.flatnonzero(np.diff(extra) > 1) + 1) if len(extra) else ():
            pieces.append(encoding.text[encoding.offsets[run[0], 0] : encoding.offsets[run[-1], 1]])
        out[key] = pieces
    return out


def outcomes(family):
    "{template: (kinds located, kinds that the template refuses, {kind: error} that the engine refuses)}"
    out = {}
    for (of, name, kind), result in results().items():
        if of != family:
            continue
        located, itself, us = out.setdefault(name, ([], [], {}))
        if result is None:
            itself.append(kind)
        elif isinstance(result, str):
            us[kind] = result
        else:
            located.append(kind)
    return out
