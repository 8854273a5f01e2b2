"""Pre-flight's checks of the step beside a training step of the same model, each in a process of its own, for
nbs/bench/preflight.ipynb."""

import json
import os
import re
import subprocess
import sys
import time

# SmolLM2-135M's
SHAPE = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
)
ROWS, LENGTH = 4, 512  # pairs of rows of a training step


def watched(function):
    "`(CPU seconds, bytes at the peak)` of the process while `function()` runs."
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    began = time.process_time()
    function()
    return time.process_time() - began, int(
        re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]
    ) * 1024


PARTS = ("a training step", "direction", "detachment", "gradients")


def main(dtype, part):
    'Prints `{"cpu_seconds", "bytes", "verdicts"}` of one of `PARTS`.'
    from cbnb.config import get_config
    from cbnb.data.streams import collate
    from cbnb.preflight.checks import make_check
    from cbnb.preflight.step_checks import (
        check_detachment,
        check_direction,
        gradient_findings,
        plain_logits,
        some_pairs,
    )
    from cbnb.step.models import DTYPES, add_adapter
    from cbnb.train.breaker import CircuitBreaker
    from cbnb.train.floor import batch_terms
    from step_bench import make_model, make_pairs

    model = make_model(dtype=DTYPES[dtype], **SHAPE)
    config = get_config(
        "tinyagent",
        target_layers=(10, 20),
        lora_layers=(0, 20),
        lora_dropout=0.0,
        dtype=dtype,
        learning_rate=1e-4,
    )
    pairs = make_pairs(ROWS, LENGTH, SHAPE["vocab_size"])
    few, whole = (
        collate(some_pairs(*map(list, zip(*pairs))), 0),
        collate(pairs, 0, buckets="buckets" in config.savings),
    )
    plain = plain_logits(model, few["benign"])
    breaker, points = CircuitBreaker(add_adapter(model, config), config), []

    def step():
        breaker.train()
        sum(batch_terms(breaker, whole).values()).backward()

    calls = {
        "a training step": step,
        "direction": lambda: points.extend(make_check("direction", check_direction, breaker, few).findings),
        "detachment": lambda: points.extend(
            make_check("detachment", check_detachment, breaker, few, plain).findings
        ),
        "gradients": lambda: points.extend(gradient_findings(breaker, few)),
    }
    seconds, most = watched(calls[part])
    print(
        json.dumps({"cpu_seconds": seconds, "bytes": most, "verdicts": sorted({p.verdict for p in points})})
    )


def measured(dtype, part):
    """What `main` prints, of a fresh process with one thread: freed memory of another part would count for
    this one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, dtype, part],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
