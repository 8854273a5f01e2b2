"""The checks of the pre-flight, the probe and the alarm `dead` on random models of three families, in float32
and bfloat16."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import cbnb.train.breaker
from cbnb.data.streams import Sample, collate
from cbnb.preflight.checks import make_check
from cbnb.preflight.probe import probe_only, probe_training
from cbnb.preflight.step_checks import (
    check_detachment,
    check_direction,
    gradient_findings,
    plain_logits,
    some_pairs,
)
from cbnb.step.models import DTYPES, add_adapter, decoder_blocks
from cbnb.train.alarms import find_alarms
from cbnb.train.breaker import CircuitBreaker
from families import tiny_model
from helpers import quick_bfloat16
from test_families import settings
from test_step import pairs


@pytest.fixture(autouse=True, scope="module")
def quick():
    with quick_bfloat16():
        yield


LENGTHS = ((12, 25), (30, 9), (17, 14), (21, 20))


@pytest.fixture(
    params=[(family, dtype) for family in ("Llama", "Gemma 2", "OLMo 2") for dtype in DTYPES], ids=" ".join
)
def made(request):
    "`(student, config, batch, logits of the untouched model)`."
    family, dtype = request.param
    config = settings(
        family,
        dtype=dtype,
        batch_size=4,
        total_steps=60,
        warmup_steps=2,
        learning_rate=3e-3,
        gradient_checkpointing=False,
    )
    model, batch = tiny_model(family).to(DTYPES[dtype]), collate(pairs(LENGTHS), 0)
    plain = plain_logits(model, batch["benign"])
    return add_adapter(model, config), config, batch, plain


def verdict(name, function, *arguments):
    check = make_check(name, function, *arguments)
    return check.verdict, " · ".join(p.text for p in check.findings if p.verdict != "pass")


@pytest.mark.filterwarnings("ignore")
def test_a_sound_model_passes_and_a_reversed_kl_does_not(made, monkeypatch):
    student, config, batch, plain = made
    breaker = CircuitBreaker(student, config)
    for name, function, *arguments in (
        ("direction", check_direction, breaker, batch),
        ("detachment", check_detachment, breaker, batch, plain),
    ):
        assert verdict(name, function, *arguments)[0] != "fail", verdict(name, function, *arguments)
    assert [p.text for p in gradient_findings(breaker, batch) if p.verdict == "fail"] == []
    right = cbnb.train.breaker.head_kl

    def reversed_kl(ours, theirs, head, *more):
        return right(theirs.to(ours.dtype), ours.to(theirs.dtype), head, *more)

    monkeypatch.setattr(cbnb.train.breaker, "head_kl", reversed_kl)
    assert verdict("direction", check_direction, breaker, batch)[0] == "fail"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("retain_weight, alive", [(0.0, True), (1e4, False)])
def test_the_probe_and_the_alarm_tell_a_breaker_that_opens_from_a_dead_one(made, retain_weight, alive):
    student, config, *_ = made
    config = replace(config, retain_weight=retain_weight)
    harmful, benign = map(list, zip(*pairs(LENGTHS)))
    found = probe_only(partial(probe_training, student, harmful * 2, benign * 2, pad_id=0, steps=60), config)
    assert found.floor["dtype"] == config.dtype and bool(found.outlook.alive) == alive, found.outlook
    # what was probed, as the log of a run that ends there
    alarms = {
        alarm["alarm"]
        for alarm in find_alarms(
            found.rows, replace(config, total_steps=len(found.rows), warmup_steps=2), found.floor
        )
    }
    assert ("dead" in alarms) == (not alive), alarms


def rows_seen(tokens):
    """Tokens that the last block of a model sees while its direction, its detachment and its gradients are
    checked on rows of `tokens` tokens."""
    config, model = settings("Llama", batch_size=4), tiny_model("Llama")
    long = [
        Sample(np.arange(tokens, dtype=np.int32) % 90, np.arange(tokens) % 7 == 6, str(i)) for i in range(40)
    ]
    batch, seen = collate(some_pairs(long, long), 0), []
    plain = plain_logits(model, batch["benign"])
    breaker = CircuitBreaker(add_adapter(model, config), config)
    hook = decoder_blocks(breaker.student)[-1].register_forward_hook(
        lambda module, args, output: seen.append(
            (output[0] if isinstance(output, tuple) else output).shape[-2]
        )
    )
    try:
        checks = [
            make_check("direction", check_direction, breaker, batch),
            make_check("detachment", check_detachment, breaker, batch, plain),
        ]
    finally:
        hook.remove()
    assert [c.verdict for c in checks if c.verdict == "fail"] == []
    return sum(seen)


@pytest.mark.filterwarnings("ignore")
def test_what_the_checks_read_does_not_grow_with_the_rows():
    assert all(0 < rows_seen(tokens) < 32 * 128 for tokens in (500, 4000))
