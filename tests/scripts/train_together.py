"""Run by tests/test_processes.py, once per process, by torchrun or alone: trainings of the tiny agent
that several processes make together.

usage: train_together.py JOBS     a JSON list of {"run_dir", "fsdp", "config": overrides,
                                  "stop_after": step or null, "teacher_cache", "encoded_cache", "evaluated"}
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from cbnb.basics.processes import join, rank, world_size
from cbnb.config import get_config
from cbnb.data.streams import encode_stream
from cbnb.data.twins import draft_twins
from cbnb.evaluate.decoding import Decoding
from cbnb.evaluate.evaluation import evaluate
from cbnb.masking.masker import ChatMasker
from cbnb.run.directory import open_run
from cbnb.run.metrics import write_result
from cbnb.run.stages import stage
from cbnb.step.models import add_adapter, load_model, load_tokenizer, save_adapter
from cbnb.step.objectives import find_objective
from cbnb.train.store import twins_for
from cbnb.train.teacher_cache import open_cache
from cbnb.train.trainer import train_breaker
from cbnb.transcripts.tinyworld import make_transcripts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helpers import moved  # noqa: E402

torch.set_num_threads(1)
masker = ChatMasker(load_tokenizer("tinyagent"))
pad_id = masker.tokenizer.pad_token_id


class StopAfter(TrainerCallback):
    "Asks for a stop, in the last process alone, after a step."

    def __init__(self, run, step):
        self.run, self.step = run, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and rank() == world_size() - 1:
            (self.run.path / "stop").touch()


for job in json.loads(sys.argv[1]):
    config = get_config(
        "tinyagent",
        **{
            "total_steps": 3,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 0,
            "lora_dropout": 0.0,
            "diagnose_steps": 2,
            "save_steps": 0,
        }
        | job["config"],
    )
    attacks, twins = make_transcripts("injection", 20), None
    harmful, _ = encode_stream(attacks, masker, config.harmful_policy)
    benign, _ = encode_stream(make_transcripts("plain", 20), masker, config.benign_policy)
    if find_objective(config.objective).sides:
        drafts, report = draft_twins(attacks, [])
        twins = twins_for(config, drafts, masker, report, job.get("encoded_cache", ""))
    heldout = [t for kind in ("injection", "plain") for t in make_transcripts(kind, 5, "eval")]
    run = open_run({"config": json.dumps(job["config"])}, run_dir=job["run_dir"])
    with stage(run, "training"):
        student = moved(add_adapter(load_model("tinyagent", fsdp=job["fsdp"]), config))
        parts = [
            p.to_local().numel() if hasattr(p, "to_local") else p.numel()
            for p in student.parameters()
            if not p.requires_grad
        ]
        cache = (
            open_cache(job["teacher_cache"], student, harmful, benign, config, pad_id, twins=twins or ())
            if job.get("teacher_cache")
            else None
        )
        done = train_breaker(
            student,
            harmful,
            benign,
            config,
            run,
            pad_id,
            callbacks=[StopAfter(run, job["stop_after"])] if job.get("stop_after") else [],
            cache=cache,
            twins=twins,
        )
        if done:
            if job.get("evaluated"):
                found = evaluate(
                    student,
                    masker,
                    heldout,
                    config,
                    decoding=Decoding(max_new_tokens=24, batch_size=3),
                    folder=run.path,
                    stage="after",
                )
                write_result(run, found | {"own_weights": sum(parts)})
            save_adapter(student, run.path / "adapter")
    print(f"{rank()} of {world_size()}: {run.path.name} {'done' if done else 'stopped'}", flush=True)
if world_size() > 1:
    join().destroy_process_group()
