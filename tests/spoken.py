"""What an assistant wrote, spelled as three stock templates spell it, from the messages alone: an oracle for
masks that asks no masker."""

import json
import re
from collections import Counter

import numpy as np

from cbnb.masking.masker import ChatMasker, loss_mask
from outside import gemma3, llama3, mistral_spm, trl_template

STOCK = {  # name: (tokenizer, chat template, adaptations, end of turn)
    "Llama 3.1": (llama3, lambda: trl_template("llama3_1"), "split_calls,split_text", "<|eot_id|>"),
    "Mistral": (mistral_spm, lambda: None, "drop_empty,shorten_ids,split_text,bridge_answers", "</s>"),
    "Gemma 3": (gemma3, lambda: None, "bridge_answers,join_users,hermes", "<end_of_turn>"),
}


def stock_masker(name, adapt=()):
    tokenizer, template, _, _ = STOCK[name]
    return ChatMasker(tokenizer(), template(), adapt=adapt)


def squeezed(text):
    return re.sub(r"\s+", "", text)


def spelled(name, messages):
    """A Counter of the assistant's turns in `messages`, without blanks, as the template `name` writes them
    after its adaptations."""
    turns = []
    for m in messages:
        if m["role"] != "assistant":
            continue
        text, calls = (m.get("content") or "").strip(), m.get("tool_calls") or ()
        key = "parameters" if name == "Llama 3.1" else "arguments"
        written = [
            f'{{"name": "{c["function"]["name"]}", "{key}": '
            f"{json.dumps(c['function']['arguments'], ensure_ascii=False)}}}"
            for c in calls
        ]
        if name == "Gemma 3":
            turns.append(text + "".join(f"<tool_call>{w}</tool_call>" for w in written))
            continue
        if text or not calls and name == "Llama 3.1":
            turns.append(text)
        if name == "Llama 3.1":
            turns += written
        elif calls:
            turns.append(f"[TOOL_CALLS] [{', '.join(written)}]")
    return Counter(map(squeezed, turns))


def trained(name, encoding):
    """A Counter of the turns that the loss mask of an Encoding trains, without blanks, ids of calls and ends
    of turns."""
    inside = np.zeros(len(encoding.text) + 1, bool)
    for start, end in encoding.offsets[loss_mask(encoding)]:
        inside[start:end] = True
    text = "".join(np.array([*encoding.text], "U1")[inside[:-1]])
    if name == "Mistral":
        text = re.sub(r', "id": "[0-9A-Za-z]{9}"', "", text)
    *turns, rest = text.split(STOCK[name][3])
    return Counter(map(squeezed, turns)) + Counter([squeezed(rest)] * bool(squeezed(rest)))
