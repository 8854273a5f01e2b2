"""The whole training step, cbnb's and a plain one, for nbs/bench/step.ipynb: same losses, same gradients, how
long."""

import numpy as np
import torch
import torch.nn.functional as F

from kl_bench import times

SHAPE = dict(
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4096,
)


def make_model(device="cpu", dtype=torch.float32, **shape):
    "A Llama with random weights, frozen."
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | shape)).to(device, dtype)
    return model.eval().requires_grad_(False)


def make_student(model, first, **settings):
    """The model with a moved adapter on its attention and MLP, from block `first` on, and the configuration;
    targets are blocks 4 and 8."""
    from cbnb.config import get_config
    from cbnb.step.models import add_adapter, num_blocks

    config = get_config(
        "tinyagent",
        **{
            "target_layers": (4, 8),
            "lora_layers": (first, num_blocks(model) - 1),
            "lora_dropout": 0.0,
            "beta_kl": 0.3,
            **settings,
        },
    )
    student = add_adapter(model, config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
    return student.train(), config


def make_pairs(rows, length, vocabulary, ragged=False):
    """Pairs of samples: half of a row is completion, in two turns; of one length, or spread between a quarter
    of it and the whole."""
    from cbnb.data.streams import Sample

    rng = np.random.default_rng(0)

    def sample(i):
        n = int(length * (1 - 0.75 * i / (rows - 1))) if ragged else length
        mask = (np.arange(n) // max(n // 4, 1)) % 2 == 1
        return Sample(rng.integers(0, vocabulary, n).astype(np.int32), mask, str(i))

    return [(sample(i), sample(rows - 1 - i)) for i in range(rows)]


def plain_step(student, batch, config):
    """The step as the seed made it: every row through every block, twice, with all hidden states; the output
    layer on every position of every row, twice; the KL from all logits, masked at the end (here by predicting
    positions, so that the losses are the same)."""
    from cbnb.step.losses import predicting_positions, token_reroute, token_retain
    from cbnb.step.models import teacher_mode

    def run(rows):
        return student(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )

    def both(rows):
        with teacher_mode(student):
            theirs = run(rows)
        return run(rows), theirs

    def over_layers(per_token, ours, theirs, mask):
        return sum(
            (per_token(ours.hidden_states[k + 1], theirs.hidden_states[k + 1]) * mask).sum() / mask.sum()
            for k in config.target_layers
        ) / len(config.target_layers)

    harmful, benign = batch["harmful"], batch["benign"]
    ours, theirs = both(harmful)
    reroute = over_layers(token_reroute, ours, theirs, harmful["loss_mask"])
    ours, theirs = both(benign)
    retain = over_layers(token_retain, ours, theirs, benign["loss_mask"])
    targets = predicting_positions(benign["loss_mask"])
    kl = F.kl_div(
        ours.logits.float().log_softmax(-1),
        theirs.logits.float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return {"loss_reroute": reroute, "loss_retain": retain, "loss_kl": (kl * targets).sum() / targets.sum()}


def gradient(student, terms):
    "Terms as numbers, and the flat gradient of their weighted sum, in float64 on the CPU."
    student.zero_grad(set_to_none=True)
    sum(w * terms[f"loss_{k}"] for k, w in (("reroute", 1.0), ("retain", 0.1), ("kl", 3.0))).backward()
    return {k: v.item() for k, v in terms.items()}, torch.cat(
        [p.grad.flatten() for p in student.parameters() if p.requires_grad and p.grad is not None]
    ).double().cpu()


def compared(model, first, pairs, ways, cache_folder=None, repeats=3, device="cpu", **settings):
    """`{way: (seconds, terms, relative error of the gradient against the plain step)}` of one step, forward
    and backward. `ways`: names; `plain`, `cache` (all savings and a teacher cache), or the text of `savings`.
    """
    from dataclasses import replace

    from accelerate.utils import send_to_device

    from cbnb.data.streams import collate
    from cbnb.train.breaker import CircuitBreaker
    from cbnb.train.teacher_cache import open_cache

    student, config = make_student(model, first, **settings)
    cache = open_cache(cache_folder, student, *map(list, zip(*pairs)), config, 0) if "cache" in ways else None
    calls, found = {}, {}
    for way in ways:
        if way == "plain":
            batch = send_to_device(collate(pairs, 0), device)

            def step(batch=batch):
                return plain_step(student, batch, config)
        else:
            own = config if way in ("cache", "all") else replace(config, savings=way)
            breaker = CircuitBreaker(student, own)
            batch = send_to_device(
                collate(pairs, 0, buckets="buckets" in own.savings, cache=cache if way == "cache" else None),
                device,
            )

            def step(breaker=breaker, batch=batch):
                return breaker(batch["harmful"], batch["benign"], batch["counts"])

        def call(way=way, step=step):
            found[way] = gradient(student, step())

        calls[way] = call
    took = times(calls, repeats, device)
    reference = found[ways[0]][1]
    return {
        way: (took[way], found[way][0], ((found[way][1] - reference).norm() / reference.norm()).item())
        for way in ways
    }
