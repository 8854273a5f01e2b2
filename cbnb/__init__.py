"""Circuit breakers (representation rerouting) for fine-tuning language-model agents.

What is imported most is offered here. Each name is loaded at its first use, so that `import cbnb` needs no
torch.
"""

__version__ = "0.1.0"

HOMES = {
    "read_transcripts": "transcripts.reader",
    "ChatMasker": "masking.masker",
    "loss_mask": "masking.policies",
    "kl_divergence_loss": "step.losses",
    "fused_linear_kl": "step.fused_kl",
    "CircuitBreaker": "train.breaker",
    "get_config": "config",
}
__all__ = list(HOMES)


def __getattr__(name):
    "Load one of the names of `HOMES`. Raises AttributeError for any other."
    if name not in HOMES:
        raise AttributeError(f"module 'cbnb' has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"cbnb.{HOMES[name]}"), name)
    return found


def __dir__():
    return sorted({*globals(), *HOMES})
