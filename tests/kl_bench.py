"""Ways to the KL term, cbnb's and its peers', for nbs/bench/kl.ipynb: what each gives, how long it takes, how
much memory.

`python tests/kl_bench.py WAY TOKENS VOCABULARY SHARE CHUNK` prints the peak extra memory of one call in
bytes, of a process of its own. A way takes final hidden states [T, d] of student (with gradient) and teacher,
the weight [V, d], and the positions of the targets (bool [T]); it returns the loss, whose gradient it has put
into the student's `.grad`. T² is 1 here: temperatures are compared in tests/test_losses_trl.py and
nbs/step/01_fused_kl.ipynb.
"""

import os
import sys
import time
from functools import cache, partial
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
WIDTH = 512  # hidden size on a CPU


def inputs(tokens, vocabulary, share, width=WIDTH, dtype=torch.float32, device="cpu", move=0.02):
    "Student, teacher, weight, and targets in runs, as turns are: random, the student near its teacher."
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=g) / width**0.5
    teacher = 2 * torch.randn(tokens, width, generator=g)
    student = teacher + move * torch.randn(tokens, width, generator=g)
    targets = (torch.arange(tokens) % 64) < round(64 * share)
    student, teacher, weight = (x.to(device, dtype) for x in (student, teacher, weight))
    return student.requires_grad_(), teacher, weight, targets.to(device)


def backward(loss):
    loss.backward()
    return loss.detach()


# --- ways: (student, teacher, weight, targets, chunk) -> loss ---


def ours(student, teacher, weight, targets, chunk):
    from cbnb.step.fused_kl import fused_linear_kl

    return backward(fused_linear_kl(student[targets], teacher[targets], weight, None, chunk_size=chunk))


def materialised(student, teacher, weight, targets, chunk):
    """All logits of all tokens, both log-softmaxes, the mask at the end, in as few steps as torch's own
    functions allow."""
    kl = F.kl_div(
        (student @ weight.T).float().log_softmax(-1),
        (teacher @ weight.T).float().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return backward((kl * targets).sum() / targets.sum())


def seed(student, teacher, weight, targets, chunk, temperature=1.0):
    """The same as it is usually written, and was in the seed: divided by the temperature, a softmax for the
    teacher, the mask on every entry."""
    log_q, p = (
        F.log_softmax((student @ weight.T) / temperature, dim=-1),
        F.softmax((teacher @ weight.T) / temperature, dim=-1),
    )
    kl = F.kl_div(log_q, p, reduction="none") * targets[:, None]
    return backward(kl.sum() / targets.sum() * temperature**2)


def gathered(student, teacher, weight, targets, chunk):
    "The logits of the targets alone, all at once."
    return materialised(student[targets], teacher[targets], weight, targets[targets], chunk)


def trl(student, teacher, weight, targets, chunk):
    "TRL 1.16: its chunk sizes are its own; on a CPU masked tokens go through it like all others."
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 0.0, 1.0)
    return backward((kl * targets).sum() / targets.sum())


def trl_gathered(student, teacher, weight, targets, chunk):
    return trl(student[targets], teacher[targets], weight, targets[targets], chunk)


@cache
def liger_loss():
    """Liger 0.8.5, unpacked without triton, which a CPU does not need; torch.compile off, which makes it no
    faster here."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        import outside

        sys.path.insert(0, str(outside.fetch("liger")))
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    return LigerFusedLinearJSDLoss


def liger(student, teacher, weight, targets, chunk):
    loss = liger_loss()(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk
    )
    return backward(loss(student, weight, teacher, weight, torch.where(targets, 0, -100)))


def liger_gathered(student, teacher, weight, targets, chunk):
    return liger(student[targets], teacher[targets], weight, targets[targets], chunk)


WAYS = {
    "cbnb": ours,
    "materialised": materialised,
    "materialised, the seed's": seed,
    "gathered, then materialised": gathered,
    "TRL": trl,
    "TRL, gathered before": trl_gathered,
    "Liger": liger,
    "Liger, gathered before": liger_gathered,
}


def floor(student, teacher, weight, targets, chunk):
    "Only the three products of the targets' rows, each into a buffer that is there already."
    h = student.detach()[targets]
    t = teacher[targets]
    z, g = (
        torch.empty(chunk, len(weight), dtype=h.dtype, device=h.device),
        torch.empty(chunk, h.shape[1], dtype=h.dtype, device=h.device),
    )
    for start in range(0, len(h), chunk):
        a, b = h[start : start + chunk], t[start : start + chunk]
        n = len(a)
        torch.mm(a, weight.T, out=z[:n])
        torch.mm(b, weight.T, out=z[:n])
        torch.mm(z[:n], weight, out=g[:n])


# --- measuring ---


def seconds(call, device="cpu"):
    "Processor time of a call on a CPU, time between two waits for the device elsewhere."
    if device == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def times(calls, repeats=3, device="cpu"):
    "{name: median seconds} of calls that take turns, after one round that is not counted."
    rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: median(r[name] for r in rounds[1:]) for name in calls}


def compared(
    tokens, vocabulary, share, chunk, ways=tuple(WAYS), repeats=3, floors=(128, 256, 512, 4096), **more
):
    """{way: seconds} and, under `floor`, the least of the three products in chunks of each of `floors` rows,
    all in turn; with the losses {way: value}."""
    made = inputs(tokens, vocabulary, share, **more)
    losses = {}

    def run(name):
        made[0].grad = None
        losses[name] = WAYS[name](*made, chunk).item()

    n = int(made[3].sum())
    sizes = sorted({min(size, n) for size in floors})
    calls = {name: partial(run, name) for name in ways} | {
        ("floor", size): partial(floor, *made, size) for size in sizes
    }
    found = times(calls, repeats, more.get("device", "cpu"))
    return {name: found[name] for name in ways} | {
        "floor": min(found["floor", size] for size in sizes)
    }, losses


def peak(way, tokens, vocabulary, share, chunk, **more):
    """Peak extra bytes of one call beside its inputs, here and now: of this process on a CPU (so let it be a
    fresh one), of the allocator elsewhere."""
    made = inputs(tokens, vocabulary, share, **more)
    if made[0].is_cuda:
        WAYS[way](*made, chunk)
        made[0].grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](*made, chunk)
        return torch.cuda.max_memory_allocated() - before
    small = inputs(64, 512, 1.0)
    WAYS[way](*small, 64)  # imports and thread pools

    def status(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))

    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # VmHWM starts again from what is resident
    before = status("VmRSS")
    WAYS[way](*made, chunk)
    return status("VmHWM") - before


def fresh_peak(*arguments):
    "`peak` in a process of its own."
    import subprocess

    out = subprocess.run(
        [sys.executable, os.path.abspath(__file__), *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return int(out.stdout.split()[-1])


if __name__ == "__main__":
    way, tokens, vocabulary, share, chunk = sys.argv[1:]
    print(peak(way, int(tokens), int(vocabulary), float(share), int(chunk)))
