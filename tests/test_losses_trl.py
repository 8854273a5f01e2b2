"""The KL term against TRL's own implementations of the forward KL.

TRL's generalized JSD with beta = 0 is D_KL(teacher || student); it has no T² and takes labels aligned with
the *logits*, so the shift and the factor are put on here. Its projection-fused kernel is compared with logits
that it makes itself."""

import os

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.gkd import GKDTrainer  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402

from cbnb.step.losses import kl_divergence_loss, predicting_positions, token_kl  # noqa: E402

B, S, V = 3, 11, 53


def batch(seed, distance=0.5, dtype=torch.float64):
    "Student logits (with gradient), teacher logits, token mask with an empty row and a target at token 0."
    g = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(B, S, V, generator=g, dtype=dtype)
    student = (teacher + distance * torch.randn(B, S, V, generator=g, dtype=dtype)).requires_grad_()
    mask = torch.rand(B, S, generator=g) < 0.5
    mask[0, 0], mask[0, 1], mask[1] = True, True, False
    return student, teacher, mask


def trl_loss(student, teacher, mask, temperature, beta=0):
    labels = torch.where(predicting_positions(mask), 0, -100)
    return temperature**2 * GKDTrainer.generalized_jsd_loss(
        student, teacher, labels, beta=beta, temperature=temperature
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("distance", [1e-3, 0.5, 5.0])
def test_value_and_gradient_equal_trl(temperature, distance):
    student, teacher, mask = batch(0, distance)
    ours, theirs = (
        kl_divergence_loss(student, teacher, mask, temperature),
        trl_loss(student, teacher, mask, temperature),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    grads = [torch.autograd.grad(x, student)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-14)


def test_float32_equals_trl():
    student, teacher, mask = batch(1, dtype=torch.float32)
    torch.testing.assert_close(
        kl_divergence_loss(student, teacher, mask, 2.0),
        trl_loss(student, teacher, mask, 2.0),
        rtol=1e-5,
        atol=1e-7,
    )


def test_direction_is_the_forward_one():
    "TRL's beta = 1 is the reverse direction; were ours reversed, this test would fail."
    student, teacher, mask = batch(2, 2.0)
    teacher = 3 * teacher  # a sharp teacher: the two directions then differ widely
    ours, reverse = kl_divergence_loss(student, teacher, mask), trl_loss(student, teacher, mask, 1.0, beta=1)
    assert abs(ours.item() - reverse.item()) > 0.5 * ours.item()
    torch.testing.assert_close(kl_divergence_loss(teacher, student, mask), reverse, rtol=1e-9, atol=1e-12)


def test_unshifted_labels_give_another_number():
    student, teacher, mask = batch(3)
    unshifted = GKDTrainer.generalized_jsd_loss(student, teacher, torch.where(mask, 0, -100), beta=0)
    assert abs(kl_divergence_loss(student, teacher, mask).item() - unshifted.item()) > 1e-3 * unshifted.item()


def test_empty_mask_is_zero_in_both():
    student, teacher, mask = batch(4)
    assert (
        kl_divergence_loss(student, teacher, mask & False).item()
        == trl_loss(student, teacher, mask & False, 1.0).item()
        == 0.0
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_token_kl_equals_trls_fused_kernel(temperature):
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(V, 16, generator=g)
    teacher = torch.randn(7, 16, generator=g)
    student = (teacher + 0.3 * torch.randn(7, 16, generator=g)).requires_grad_()
    ours = token_kl(student @ weight.T, teacher @ weight.T, temperature)
    theirs = (
        temperature**2
        * ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 0.0, temperature)[0]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
