"""A real step in a process of its own, and the most memory that it held, for tests/test_plan.py and
nbs/bench/plan.ipynb.

usage: plan_peak.py CASE [LENGTH]     a key of CASES, and tokens per row in place of its own; prints the peak
                                      in bytes: what came on top of the imported libraries
"""

import os
import subprocess
import sys
from dataclasses import replace

CASES = {  # name: (settings of the run, kind of model, its shape)
    "large vocabulary": (
        dict(batch_size=8, max_length=256, target_layers=(4, 8), lora_layers=(0, 11)),
        "llama",
        dict(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=32000,
        ),
    ),
    "checkpointing": (
        dict(
            batch_size=8, max_length=256, target_layers=(3,), lora_layers=(0, 7), gradient_checkpointing=True
        ),
        "qwen3",
        dict(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=16000,
        ),
    ),
    "bfloat16 from block 4": (
        dict(batch_size=2, max_length=512, target_layers=(4, 8), lora_layers=(4, 11), dtype="bfloat16"),
        "mistral",
        dict(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=16000,
        ),
    ),
}


def given(case, length=None):
    "`(config, the model's configuration)` of a case, with rows of `length` tokens in place of its own."
    from transformers import AutoConfig

    from cbnb.config import get_config

    settings, kind, shape = CASES[case]
    return get_config(
        "tinyagent", **settings | ({"max_length": length} if length else {})
    ), AutoConfig.for_model(kind, **shape)


def measured(case, *length):
    """Peak bytes of the case's step, with rows of `length` tokens if given, in a fresh process. glibc keeps
    freed memory for later, several times as much as is in use at once; with these thresholds it gives it
    back, so that the peak is what tensors held."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    return int(
        subprocess.run(
            [sys.executable, __file__, case, *map(str, length)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
    )


def resident(name):
    "Bytes that /proc tells of this process: VmRSS now, VmHWM at most."
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))


def make_step(config, shape):
    """One step of a run with these settings on a model of that shape, with its optimizer's state there, as in
    any step but the first."""
    import torch
    from transformers import AutoModelForCausalLM

    from cbnb.preflight.plan import rows_of
    from cbnb.step.models import DTYPES, add_adapter
    from cbnb.train.breaker import CircuitBreaker

    student = add_adapter(
        AutoModelForCausalLM.from_config(shape, dtype=DTYPES[config.dtype]).eval().requires_grad_(False),
        config,
    )
    breaker = CircuitBreaker(student, config).train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], foreach=False)
    batch = [rows_of(config.batch_size, config.max_length, 0.5) for _ in range(2)]
    for rows in batch:
        rows |= {
            "attention_mask": torch.ones_like(rows["input_ids"]),
            "input_ids": torch.randint(shape.vocab_size, rows["input_ids"].shape),
        }
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    sum(breaker(*batch, torch.ones(3)).values()).backward()
    optimizer.step()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    config, shape = given(sys.argv[1], *map(int, sys.argv[2:]))
    small = (
        replace(config, batch_size=1, max_length=16),
        type(shape)(
            **shape.to_dict()
            | dict(
                hidden_size=32,
                intermediate_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size=64,
            )
        ),
    )
    make_step(*small)  # what the first step of a process sets up: kernels for this processor, tens of MB
    before = resident("VmRSS")
    make_step(config, shape)
    print(resident("VmHWM") - before)
