"""The counts behind the mask notebook's claim: masks of `cbnb.masking.masker` held against official encoders,
independent renderers and templates.

Each function of `COMPARISONS` compares one encoder on random transcripts and returns a `Row`; a difference
that it cannot explain is an AssertionError. `python tests/masks_table.py` prints the table, and with
`--write` puts it into `nbs/masks_outside.md`, where the notebook shows it and a test compares it.
"""

import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from cbnb.masking.masker import ChatMasker, loss_mask
from masks_common import TOOLS, dumps, masker_for, say, text, transcript
from masks_templates import FAMILIES, KINDS, outcomes, verdicts
from outside import (
    axolotl_template,
    gemma3,
    gpt_oss,
    harmony,
    importable,
    llama3,
    llama4,
    meta_llama3,
    meta_llama4,
    qwen3,
    renderer,
    trl_template,
)

SEEDS, EACH = range(3), 70
FILE = Path(__file__).resolve().parents[1] / "nbs" / "masks_outside.md"


@dataclass
class Row:
    """One encoder: transcripts compared, those with the same ids, those with the same mask, and the others by
    their explanation."""

    encoder: str
    transcripts: int = 0
    ids: int = 0
    masks: int = 0
    explained: Counter = field(default_factory=Counter)

    def add(self, encoding, ids, mask, explain=None):
        """Counts one transcript. `explain(encoding, ids, mask)` says why the two differ, after proving it,
        and must do so where they do."""
        ours = loss_mask(encoding).tolist()
        same_ids, same_mask = encoding.input_ids.tolist() == list(ids), ours == [bool(x) for x in mask]
        self.transcripts, self.ids, self.masks = (
            self.transcripts + 1,
            self.ids + same_ids,
            self.masks + (same_ids and same_mask),
        )
        if same_ids and same_mask:
            return
        why = explain and explain(encoding, list(ids), [bool(x) for x in mask])
        assert why, difference(encoding, ids, mask)
        self.explained[why] += 1


def difference(encoding, ids, mask):
    "A readable first difference."
    rows = [*zip(encoding.input_ids.tolist(), loss_mask(encoding).tolist(), ids, map(bool, mask))]
    at = next((i for i, (a, m, b, n) in enumerate(rows) if (a, m) != (b, n)), len(rows))
    near = encoding.text[
        encoding.offsets[max(at - 8, 0), 0] : encoding.offsets[min(at + 8, len(encoding.offsets) - 1), 1]
    ]
    return f"token {at} of {len(encoding.input_ids)} and {len(ids)}: {rows[at : at + 3]} in {near!r}"


def rngs(name):
    "A random generator a transcript, `EACH` of them for each seed."
    for seed in SEEDS:
        rng = random.Random(f"{name} {seed}")
        for _ in range(EACH):
            yield rng


def pieces_of(message, tokens, header):
    "Tokens and mask of one message of Meta's: all that an assistant's message holds after its header."
    return tokens, [False] * header + [message["role"] == "assistant"] * (len(tokens) - header)


# Templates written for this test: Meta's encoders write a turn the same way for every role, and a call as
# plain text.
LLAMA3_TOOLS = """{{- bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' -}}
{{- m.content }}{% for c in m.tool_calls or [] %}
{{- '{"name": "' + c.function.name + '", "parameters": ' + (c.function.arguments | tojson) + '}' }}{% endfor %}
{{- '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""  # noqa: E501
LLAMA4_TOOLS = """{{- bos_token }}{% for m in messages %}
{{- '<|header_start|>' + ('ipython' if m.role == 'tool' else m.role) + '<|header_end|>\n\n' -}}
{{- m.content }}{% for c in m.tool_calls or [] %}
{{- '{"name": "' + c.function.name + '", "parameters": ' + (c.function.arguments | tojson) + '}' }}{% endfor %}
{{- '<|eom|>' if m.role == 'tool' or m.tool_calls else '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"""  # noqa: E501


def said_text(message):
    "A message's text as Meta's encoder gets it: a call is spelled out."
    calls = [
        f'{{"name": "{c["function"]["name"]}", "parameters": {dumps(c["function"]["arguments"])}}}'
        for c in message.get("tool_calls") or ()
    ]
    return message["content"] + "".join(calls)


def meta(name, chat_format, templates, tokenizer, stop):
    """Meta's ChatFormat, message by message, on the stock template (plain chats) and on one that writes calls
    as it does."""
    row = Row(name)
    maskers = [ChatMasker(tokenizer, template) for template in templates]
    for n, rng in enumerate(rngs(name)):
        messages = transcript(rng, calls=n % 2, parallel=n % 4 == 1)
        ids, mask = [chat_format.tokenizer.special_tokens["<|begin_of_text|>"]], [False]
        for m in messages:
            tokens = stop(m)
            more = pieces_of(m, tokens, len(chat_format._encode_header(m["role"])))
            ids, mask = ids + more[0], mask + more[1]
        row.add(maskers[n % 2].encode(messages), ids, mask)
    return row


@cache
def compare_llama3():
    chat = meta_llama3()
    from llama_models.datatypes import RawMessage

    return meta(
        "Meta `ChatFormat`, Llama 3 (llama-models 0.3.0)",
        chat,
        [trl_template("llama3"), LLAMA3_TOOLS],
        llama3(),
        lambda m: chat.encode_message(RawMessage(role=m["role"], content=said_text(m)), None)[0],
    )


@cache
def compare_llama4():
    chat = meta_llama4()
    from llama_models.datatypes import RawMessage, StopReason

    def message(m):
        reason = StopReason.end_of_message if m.get("tool_calls") else StopReason.end_of_turn
        more = {"stop_reason": reason} if m["role"] == "assistant" else {}
        return chat.encode_message(RawMessage(role=m["role"], content=said_text(m), **more), None)[0]

    return meta(
        "Meta `ChatFormat`, Llama 4 (llama-models 0.3.0)",
        chat,
        [axolotl_template("llama4"), LLAMA4_TOOLS],
        llama4(),
        message,
    )


def harmony_conversation(messages, tools):
    """The conversation as harmony's own objects. The template writes two line feeds after the instructions
    and results as JSON strings."""
    import openai_harmony as oh

    def message(role, content, channel=None, recipient=None, content_type=None, name=None):
        out = oh.Message.from_author_and_content(oh.Author(role=role, name=name), content)
        out.channel, out.recipient, out.content_type = channel, recipient, content_type
        return out

    out = [message(oh.Role.SYSTEM, oh.SystemContent.new().with_conversation_start_date("2025-01-01"))]
    system, name = messages[0]["content"] if messages[0]["role"] == "system" else None, None
    if system is not None or tools:
        developer = oh.DeveloperContent.new()
        if system is not None:
            developer = developer.with_instructions(system + "\n\n" * (not tools))
        if tools:
            developer = developer.with_function_tools(
                [oh.ToolDescription.new(**t["function"]) for t in tools]
            )
        out.append(message(oh.Role.DEVELOPER, developer))
    owners = [None] * len(out)  # of each harmony message: the transcript's message if the assistant wrote it
    for i, m in enumerate(messages):
        new = []
        if m["role"] == "user":
            new = [message(oh.Role.USER, m["content"])]
        if m["role"] == "tool":
            new = [
                message(
                    oh.Role.TOOL, dumps(m["content"]), "commentary", "assistant", name=f"functions.{name}"
                )
            ]
        if m["role"] == "assistant":
            if m.get("reasoning_content"):
                new = [message(oh.Role.ASSISTANT, m["reasoning_content"], "analysis")]
            for call in m.get("tool_calls") or ():
                name = call["function"]["name"]
                new.append(
                    message(
                        oh.Role.ASSISTANT,
                        dumps(call["function"]["arguments"]),
                        "commentary",
                        f"functions.{name}",
                        "json",
                    )
                )
            if not m.get("tool_calls"):
                new.append(message(oh.Role.ASSISTANT, m["content"], "final"))
        out, owners = out + new, owners + [i if m["role"] == "assistant" else None] * len(new)
    return out, owners


@cache
def compare_harmony():
    """OpenAI's own gpt-oss encoder. It has no masks: the model's part of a turn is all after its first
    `<|start|>assistant`, and harmony's message by message rendering says where each message begins."""
    encoder, tokenizer, name = harmony(), gpt_oss(), "openai-harmony 0.0.8, gpt-oss"
    import openai_harmony as oh

    row, masker = Row(name), ChatMasker(tokenizer)
    for n, rng in enumerate(rngs(name)):
        messages = transcript(rng, parallel=False)
        if n % 2:  # reasoning before the last answer, which both keep
            messages[-1]["reasoning_content"] = text(rng)
        tools = TOOLS if n % 3 == 0 else None
        conversation, owners = harmony_conversation(messages, tools)
        ids = encoder.render_conversation_for_training(
            oh.Conversation.from_messages(conversation), oh.RenderConversationConfig(auto_drop_analysis=False)
        )
        mask, start = [False] * len(ids), encoder.encode("<|start|>", allowed_special="all")[0]
        begins = [i for i, token in enumerate(ids) if token == start] + [len(ids)]
        assert len(begins) == len(owners) + 1
        for k, owner in enumerate(owners):
            if owner is None:
                continue
            first = owners[k - 1] != owner
            mask[begins[k] + 2 * first : begins[k + 1]] = [True] * (begins[k + 1] - begins[k] - 2 * first)
        row.add(masker.encode(messages, tools), ids, mask)
    return row


def blank_edges(rng, messages):
    "Half of the assistant's texts get blanks or line feeds at an end."
    for m in messages:
        if m["role"] == "assistant" and not m.get("tool_calls") and rng.random() < 0.5:
            m["content"] = (
                rng.choice(["", "", " ", "\n"]) + m["content"] + rng.choice([" ", "  ", "\n", "\n\n", "\t "])
            )
    return messages


def mistral(name, setup, file):
    """mistral-common's encoder. It takes the blanks off the end of what the assistant said, its own template
    does not: such a transcript counts as explained if without these blanks it is the same."""
    folder = importable("mistral") / "mistral_common" / "data"
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    official, row, (masker, _) = (
        MistralTokenizer.from_file(str(folder / file), mode=ValidationMode.finetuning),
        Row(name),
        masker_for(setup),
    )
    instruct, wrote = official.instruct_tokenizer, []
    for method in ("encode_user_message", "encode_tool_message", "encode_assistant_message"):

        def encode(*args, own=getattr(instruct, method), assistant="assistant" in method, **kwargs):
            out = own(*args, **kwargs)
            wrote.append((assistant, len(out if assistant else out[0])))
            return out

        setattr(instruct, method, encode)

    def request(m):
        if not m.get("tool_calls"):
            return m
        calls = [
            {**c, "function": {**c["function"], "arguments": dumps(c["function"]["arguments"])}}
            for c in m["tool_calls"]
        ]
        return {"role": "assistant", "tool_calls": calls}

    for n, rng in enumerate(rngs(name)):
        messages, tools = transcript(rng), TOOLS if n % 3 == 0 else None
        if n % 5 == 0:
            messages = blank_edges(rng, messages)
        wrote.clear()
        ids = official.encode_chat_completion(
            ChatCompletionRequest(messages=[request(m) for m in messages], tools=tools)
        ).tokens
        mask = [False] + [m for assistant, size in wrote for m in [assistant] * size]
        assert len(mask) == len(ids)

        def stripped(encoding, ids, mask):
            bare = [
                say("assistant", m["content"].rstrip(" "))
                if m["role"] == "assistant" and not m.get("tool_calls")
                else m
                for m in messages
            ]
            again = masker.encode(bare, tools)
            same = again.input_ids.tolist() == ids and loss_mask(again).tolist() == mask
            return (
                same
                and bare != messages
                and "it strips the blanks at the end of an answer, its template does not"
            )

        row.add(masker.encode(messages, tools), ids, mask, stripped)
    return row


@cache
def compare_tekken():
    return mistral("mistral-common 1.13.1, tekken v3", "mistral-tekken", "tekken_240718.json")


@cache
def compare_spm():
    return mistral(
        "mistral-common 1.13.1, SentencePiece v3", "mistral-spm", "mistral_instruct_tokenizer_240323.model.v3"
    )


def token_texts(tokenizer, ids):
    "The bytes of each token of a byte-level BPE tokenizer, by transformers' own alphabet."
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back, added = {c: b for b, c in bytes_to_unicode().items()}, tokenizer.added_tokens_decoder
    return [
        added[i].content.encode()
        if i in added
        else bytes(back[c] for c in tokenizer.convert_ids_to_tokens(i))
        for i in ids
    ]


def byte_mask(tokenizer, ids, mask):
    "The text of `ids` as bytes, and for each byte whether its token is in `mask`."
    texts = token_texts(tokenizer, ids)
    return b"".join(texts), [m for t, m in zip(texts, mask) for _ in t]


def cut_separately(tokenizer):
    """Explains other ids of the same text by their having been tokenised in pieces: each byte must be in both
    masks or in none, but for those in a token across a border, which we name in a warning and leave out."""

    def explain(encoding, ids, mask):
        own = encoding.input_ids.tolist()
        (text, theirs), (same, ours) = (
            byte_mask(tokenizer, ids, mask),
            byte_mask(tokenizer, own, loss_mask(encoding)),
        )
        across = {
            int(m[1])
            for w in encoding.warnings
            if (m := re.match(r"token (\d+) .* straddles a border", w, re.S))
        }
        _, named = byte_mask(tokenizer, own, [i in across for i in range(len(own))])
        proven = (
            ids != own
            and text == same
            and all(t == o or (n and not o) for t, o, n in zip(theirs, ours, named))
        )
        return (
            proven
            and "it tokenises a turn in pieces: same text, same bytes in the mask but for a token across a "
            "border, which we leave out"
        )

    return explain


def rendered(name, theirs, tokenizer, template=None, **options):
    "A renderer of the `renderers` package; its mask is what the model samples."
    row, masker = Row(name), ChatMasker(tokenizer, template)
    for n, rng in enumerate(rngs(name)):
        messages, tools = transcript(rng, **options), TOOLS if n % 2 else None
        if n % 5 == 0:
            messages = blank_edges(rng, messages)
        out = theirs.render(messages, tools=tools)
        row.add(masker.encode(messages, tools), out.token_ids, out.sampled_mask, cut_separately(tokenizer))
    return row


@cache
def compare_qwen3():
    return rendered(
        "renderers 0.1.12, Qwen3 with tools and thinking",
        renderer("qwen3", "Qwen3Renderer", qwen3()),
        qwen3(),
        thinking=True,
        text_beside_call=True,
    )


@cache
def compare_llama31():
    return rendered(
        "renderers 0.1.12, Llama 3.1 with tools",
        renderer("llama_3", "Llama3Renderer", llama3()),
        llama3(),
        trl_template("llama3_1"),
        parallel=False,
    )


def generation_mask(tokenizer, messages, tools, template):
    "Ids and mask by transformers' own `{% generation %}` tags."
    out = tokenizer.apply_chat_template(
        messages, tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def extra_token(text):
    "Explains a mask that has, beside ours, nothing but `text` right after each end-of-turn token."

    def explain(encoding, ids, mask):
        ours, texts = loss_mask(encoding), [encoding.text[s:e] for s, e in encoding.offsets]
        extra = [i for i, m in enumerate(mask) if m != ours[i]]
        last = [i + 1 for i in np.flatnonzero(ours) if i + 1 < len(ours) and not ours[i + 1]]
        proven = (
            ids == encoding.input_ids.tolist()
            and all(mask[i] and texts[i] == text for i in extra)
            and extra == last
        )
        return (
            proven
            and f"trl's tags also train the {text!r} after the end-of-turn token, which the model never "
            "writes"
        )

    return explain


def tagged(name, tokenizer, template, training, prepare, **options):
    "Generation tags in trl's training version of a template, which must render the same ids."
    row, masker = Row(name), ChatMasker(tokenizer, template)
    for n, rng in enumerate(rngs(name)):
        messages, tools = prepare(transcript(rng, **options), TOOLS if n % 2 else None)
        row.add(
            masker.encode(messages, tools),
            *generation_mask(tokenizer, messages, tools, training),
            extra_token("\n"),
        )
    return row


@cache
def compare_qwen3_tags():
    "trl's training version keeps the reasoning of earlier turns, so our mask is made with that version, too."
    training = trl_template("qwen3_training")
    return tagged(
        "trl 1.16.0 generation tags, Qwen3 with tools and thinking",
        qwen3(),
        training,
        training,
        lambda m, tools: (m, tools),
        thinking=True,
        text_beside_call=True,
    )


def in_words(messages, tools):
    """Tools as Gemma 3 knows them, whose template has none: described in the system text, called and answered
    in words."""
    out = []
    if tools:
        out.append(say("system", "You can call " + dumps(tools)))
    elif messages[0]["role"] == "system":
        out.append(messages[0])
    for m in messages:
        calls = [
            f"```tool_code\n{c['function']['name']}(**{dumps(c['function']['arguments'])})\n```"
            for c in m.get("tool_calls") or ()
        ]
        role = {"tool": "user"}.get(m["role"], m["role"])
        content = (
            "\n".join([m["content"]] * bool(m["content"]) + calls) if role == "assistant" else m["content"]
        )
        if m["role"] == "tool":
            content = f"```tool_output\n{content}\n```"
        if role == "system":
            continue
        # parallel results are one message
        if out and out[-1]["role"] == role:
            out[-1] = say(role, out[-1]["content"] + "\n" + content)
        else:
            out.append(say(role, content))
    return out, None


@cache
def compare_gemma3():
    return tagged(
        "trl 1.16.0 generation tags, stock Gemma 3, tools in words",
        gemma3(),
        None,
        trl_template("gemma3_training"),
        in_words,
    )


COMPARISONS = {
    "llama3": compare_llama3,
    "llama4": compare_llama4,
    "gpt-oss": compare_harmony,
    "tekken": compare_tekken,
    "spm": compare_spm,
    "qwen3": compare_qwen3,
    "qwen3-tags": compare_qwen3_tags,
    "llama3.1": compare_llama31,
    "gemma3": compare_gemma3,
}


def encoder_table():
    "Markdown, a line an encoder."
    lines = [
        "| held against | transcripts | ids equal | masks equal | differences, each proven in the test |",
        "|---|--:|--:|--:|---|",
    ]
    for compare in COMPARISONS.values():
        row = compare()
        why = (
            "; ".join(f"{n}: {text}" for text, n in sorted(row.explained.items()))
            .replace("|", "\\|")
            .replace("\n", "\\n")
        )
        lines.append(f"| {row.encoder} | {row.transcripts} | {row.ids} | {row.masks} | {why or 'none'} |")
    return lines


def template_table():
    """Markdown, a line a family of templates, then the names of those that are refused for some kind of
    transcript."""
    lines = [
        "| templates | transcripts | located | refused by the template itself | refused by us, with a clear "
        "error | assistant turns located "
        "| equal to transformers' prefix renders | explained | no prefix, checked otherwise |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    names = []
    for family in FAMILIES:
        found = outcomes(family)
        located, itself, us = (sum(len(o[k]) for o in found.values()) for k in range(3))
        how = Counter(
            "no prefix" if v.startswith("no prefix") else v if v == "equal" else "explained"
            for k, v in verdicts().items()
            if k[0] == family
        )
        lines.append(
            f"| {len(found)} {family} | {located + itself + us} | {located} | {itself} | {us} | "
            f"{sum(how.values())} "
            f"| {how['equal']} | {how['explained']} | {how['no prefix']} |"
        )
        for name, (_, _, errors) in sorted(found.items()):
            if errors:
                names.append(
                    f"- {family} `{name}` refused by us: "
                    f"{', '.join(errors) if len(errors) < len(KINDS) else 'all kinds'}"
                )
        for name, (here, _, errors) in sorted(found.items()):
            if not here and not errors:
                names.append(f"- {family} `{name}` refuses every kind itself")
    why = Counter(v for v in verdicts().values() if v != "equal" and not v.startswith("no prefix"))
    names += [
        "",
        "Explained turns: "
        + "; ".join(f"{n}: {v}" for v, n in sorted(why.items(), key=lambda x: -x[1]))
        + ".",
    ]
    return [*lines, "", f"Kinds of transcript: {', '.join(KINDS)}.", "", *names]


def table():
    "The text of `nbs/masks_outside.md`."
    head = (
        "<!-- Made by `python tests/masks_table.py --write`: do not edit. tests/test_masks_outside.py "
        "compares it. -->"
    )
    title = [
        "# Masks held against others",
        "",
        "> Token ids and masks beside independent encoders and templates, and each difference with its "
        "reason",
    ]
    return "\n".join([head, "", *title, "", *encoder_table(), "", *template_table(), ""])


if __name__ == "__main__":
    if "--write" in sys.argv:
        FILE.write_text(table(), encoding="utf-8")
    else:
        print(table())
