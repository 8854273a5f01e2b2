"""Episodes of the tiny loop with a model of another size in the agent's place, for nbs/bench/episodes.ipynb.

A model with random weights writes nonsense, and an episode of nonsense ends with its first turn. So the
larger model does all of its work, and its logits are then replaced by those of the turn that the tiny agent
has written after the same prompt: episodes, prompts and lengths of turns are the tiny agent's, the time is
the larger model's."""

import dataclasses
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cbnb.agent.loop import play_tasks
from cbnb.agent.model import Agent, Request, prompt_for
from cbnb.agent.tinylive import MAX_TURNS, tiny_tasks
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.reader import derive_reader
from cbnb.masking.masker import ChatMasker
from cbnb.step.models import load_model, load_tokenizer

SHAPES = {  # of SmolLM2-135M, and a smaller one to try the benchmark with
    "135M": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9),
    "small": dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3),
}


def make_model(shape, device="cpu", dtype=torch.float32):
    "A Llama of a shape of `SHAPES` with random weights, tied embeddings and SmolLM2's vocabulary."
    torch.manual_seed(0)
    size = SHAPES[shape] | {"num_key_value_heads": SHAPES[shape]["num_attention_heads"] // 3}
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, **size)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def tiny_agent():
    masker = ChatMasker(load_tokenizer("tinyagent"))
    return Agent(load_model("tinyagent", device="cpu"), masker, derive_reader(masker), Decoding())


def script_of(agent, tasks, lines):
    "`{prompt ids: ids of the turn}` of the episodes in `lines`, whose prompts are checked to be training's."
    by_id = {t.id: t for t in tasks}
    script = {}
    for episode in turns_of(by_id, lines):
        for request, ids in episode:
            script[tuple(prompt_for(agent, request).tolist())] = ids
    return script


def turns_of(by_id, lines):
    "The turns of each episode in `lines`: `[(request, ids)]`."
    for line in lines:
        task = by_id[line["meta"]["task"]]
        messages = [parsed(m) for m in line["messages"]]
        starts = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        yield [
            (Request(messages[:at], task.tools, task.id, turn), ids)
            for turn, (at, ids) in enumerate(zip(starts, line["meta"]["ids"], strict=True))
        ]


def parsed(message):
    "A message of a line of episodes.jsonl, its arguments as objects."
    calls = [
        c | {"function": c["function"] | {"arguments": json.loads(c["function"]["arguments"])}}
        for c in message.get("tool_calls") or ()
    ]
    return message | ({"tool_calls": calls} if calls else {})


def dictate(model, script):
    """Let `model` write the turns of `script`, `{prompt ids: ids}`: each forward pass is made, and the logits
    of its last position are replaced. A prompt that is not in the script is an error. Returns the count
    `{"passes"}`, which grows."""
    rows, counts = {}, {"passes": 0}

    def replace(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")  # none where nothing is padded
        mask = torch.ones_like(ids) if mask is None else mask
        if ids.shape[1] > 1:  # prompts, padded on the left
            rows["script"] = [script[tuple(row[m.bool()].tolist())] for row, m in zip(ids, mask)]
            rows["step"] = 0
        counts["passes"] += 1
        step = rows["step"]
        output.logits[:, -1] = 0
        for row, turn in enumerate(rows["script"]):
            output.logits[row, -1, turn[min(step, len(turn) - 1)]] = 1
        rows["step"] = step + 1
        return output

    model.register_forward_hook(replace, with_kwargs=True)
    return counts


def timed(agent, tasks, size, device="cpu"):
    "`(lines, seconds)` of the episodes of `tasks` in batches of `size`; on a CPU seconds of its processor."
    clock = time.monotonic if device == "cuda" else time.process_time
    one = dataclasses.replace(agent, decoding=dataclasses.replace(agent.decoding, batch_size=size))
    start = clock()
    lines, played, _ = play_tasks(one, tasks, MAX_TURNS)
    assert played == len(tasks)
    return lines, clock() - start


def recorded(n):
    "`(agent, tasks, lines, script)` of `n` tasks of each kind, played by the tiny agent."
    agent, tasks = tiny_agent(), tiny_tasks(n)
    lines, _, _ = play_tasks(agent, tasks, MAX_TURNS)
    return agent, tasks, lines, script_of(agent, tasks, lines)
