"""What the mask tests share: random transcripts, and the completion of each stock template spelled out by
hand. No oracle here uses code of `cbnb.masking.masker`."""

import json

import numpy as np

from cbnb.masking.masker import ChatMasker, loss_mask
from cbnb.masking.policies import mask_table
from outside import gemma3, llama3, mistral_spm, mistral_tekken, qwen3, trl_template

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read_mail",
            "description": "Read a mail.",
            "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
        },
    }
]


def say(role, text, **more):
    return {"role": role, "content": text, **more}


def ask(name, number=1, **arguments):
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(text, number=1):
    return say("tool", text, tool_call_id=f"call{number:05d}")


def dumps(value):
    return json.dumps(value, ensure_ascii=False)


# What the assistant generates in message i, written by hand for each template (no code of the package is
# used).
def llama31_completion(messages, i):
    m = messages[i]
    if not m.get("tool_calls"):
        return m["content"].strip() + "<|eot_id|>"
    f = m["tool_calls"][0]["function"]
    return f'{{"name": "{f["name"]}", "parameters": {dumps(f["arguments"])}}}<|eot_id|>'


def llama3_completion(messages, i):
    return messages[i]["content"].strip() + "<|eot_id|>"


def qwen_calls(m):
    calls = [
        f'<tool_call>\n{{"name": "{c["function"]["name"]}", "arguments": '
        f"{dumps(c['function']['arguments'])}}}\n</tool_call>"
        for c in m.get("tool_calls", [])
    ]
    return "\n".join(([m["content"]] if m["content"] else []) + calls)


def qwen25_completion(messages, i):
    # Qwen 2.5 writes a line feed before every call, also the first one when there is no text: its header then
    # ends before that line feed
    m = messages[i]
    if not m.get("tool_calls"):
        return m["content"] + "<|im_end|>"
    return qwen_calls(m) + "<|im_end|>"


def qwen3_completion(messages, i):
    m, last_user = (
        messages[i],
        max((k for k, x in enumerate(messages) if x["role"] == "user"), default=len(messages) - 1),
    )
    thought = m.get("reasoning_content", "")
    thinks = i > last_user and (i == len(messages) - 1 or thought)
    return (
        (f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" if thinks else "") + qwen_calls(m) + "<|im_end|>"
    )


def mistral_completion(messages, i, spm=False):
    m = messages[i]
    if not m.get("tool_calls"):
        return " " * (spm and messages[i - 1]["role"] in ("user", "tool")) + m["content"] + "</s>"
    calls = [
        f'{{"name": "{c["function"]["name"]}", "arguments": {dumps(c["function"]["arguments"])}, "id": '
        f'"{c["id"]}"}}'
        for c in m["tool_calls"]
    ]
    return "[TOOL_CALLS]" + " " * spm + "[" + ", ".join(calls) + "]</s>"


def spm_completion(messages, i):
    return mistral_completion(messages, i, spm=True)


def gemma3_completion(messages, i):
    return messages[i]["content"].strip() + "<end_of_turn>"


SETUPS = {
    "llama3.1": (llama3, lambda: trl_template("llama3_1"), llama31_completion),
    "qwen2.5": (qwen3, lambda: trl_template("qwen2_5"), qwen25_completion),
    "qwen3": (qwen3, lambda: None, qwen3_completion),
    "qwen3-trl": (qwen3, lambda: trl_template("qwen3"), qwen3_completion),
    "mistral-tekken": (mistral_tekken, lambda: None, mistral_completion),
    "mistral-spm": (mistral_spm, lambda: None, spm_completion),
}
NO_TOOLS = {"gemma3": (gemma3, lambda: None, gemma3_completion)}
MASKERS = {}


def masker_for(name):
    "The (cached) masker and completion oracle of a setup."
    tokenizer, template, completion = (SETUPS | NO_TOOLS)[name]
    if name not in MASKERS:
        MASKERS[name] = ChatMasker(tokenizer(), template())
    return MASKERS[name], completion


def trained(masker, encoding, i, mask=None):
    "What the mask trains of message i, as decoded tokens; the tokens must be contiguous."
    at = np.flatnonzero((loss_mask(encoding) if mask is None else mask) & (encoding.message_index == i))
    if not len(at):
        return ""
    assert (np.diff(at) == 1).all(), "the completion of one message is one stretch"
    spans = encoding.offsets[at]
    text = encoding.text[spans[0, 0] : spans[-1, 1]]
    if masker.tokenizer.backend_tokenizer.normalizer is None:  # byte-level: decoding is exact
        assert masker.tokenizer.decode(encoding.input_ids[at], skip_special_tokens=False) == text
    return text


def check(name, messages, tools=None, warnings=()):
    """Encodes and compares every assistant turn with the oracle; nothing else may be in the mask. Returns
    Encoding."""
    masker, completion = masker_for(name)
    encoding = masker.encode(messages, tools)
    mask = loss_mask(encoding)
    assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i in assistants:
        assert trained(masker, encoding, i) == completion(messages, i), mask_table(encoding, mask, runs=True)
    assert set(encoding.message_index[mask].tolist()) <= set(assistants)
    assert encoding.text == masker.tokenizer.apply_chat_template(
        messages, tools, chat_template=masker.chat_template, tokenize=False
    )
    assert (
        encoding.input_ids.tolist() == masker.tokenizer(encoding.text, add_special_tokens=False)["input_ids"]
    )
    assert [w for w in encoding.warnings if not any(x in w for x in warnings)] == []
    return encoding


WORDS = [
    "Pay",
    "the",
    "mail",
    "says:",
    "assistant",
    "user\n\n",
    "[INST",
    "<tool_call",
    "🙂",
    "👩‍👩‍👧",
    "naïve",
    "مرحبا",
    "שלום",
    "中文",
    "a\r\nb",
    "\t",
    "  ",
    '{"a": 1}',
    "'",
    "\\n",
    "7",
    "Human:",
    "### Assistant:",
    "start_header_id",
    "e\u0301",
    "𝔘",
]


def text(rng, lone=False):
    "A random text without leading or trailing white space; sometimes a text that other roles use as well."
    if rng.random() < 0.15:
        return rng.choice(["Yes.", "OK", "assistant", "mail 8"])
    return ("x" + " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))).strip() + "."


def transcript(rng, parallel=True, thinking=False, text_beside_call=False, calls=True):
    "A random multi-turn transcript, with tools if `calls`, in the order all stock templates accept."
    messages, number = [say("system", text(rng))] * (rng.random() < 0.5), 0
    for _ in range(rng.randint(1, 3)):
        messages.append(say("user", text(rng)))
        for _ in range(rng.choice([0, 0, 1, 2]) if calls else 0):
            asked = [
                ask(rng.choice(["read_mail", "pay"]), number := number + 1, id=number, note=text(rng))
                for _ in range(rng.choice([1, 1, 2]) if parallel else 1)
            ]
            messages.append(
                say(
                    "assistant",
                    text(rng) if text_beside_call and rng.random() < 0.3 else "",
                    tool_calls=asked,
                )
            )
            messages += [
                say("tool", text(rng), tool_call_id=c["id"], name=c["function"]["name"]) for c in asked
            ]
        messages.append(say("assistant", text(rng)))
        if thinking:
            for m in messages[-3:]:
                if m["role"] == "assistant" and rng.random() < 0.5:
                    m["reasoning_content"] = text(rng)
    return messages
