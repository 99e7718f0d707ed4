"""Cross-entropy in blocks against PyTorch's own on all logits."""

import functools
import math

import pytest
import torch

from holdall.contract.forms import KernelError
from holdall.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_loop


def inputs(dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    h_ND = torch.randn(37, 8, generator=rng, dtype=dtype) * scale
    head_VD = torch.randn(50, 8, generator=rng, dtype=dtype)
    return h_ND.requires_grad_(), head_VD.requires_grad_(), torch.randint(50, (37,), generator=rng)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0, 30.0])
@pytest.mark.parametrize("block", [1, 10, 37, None])
def test_loss_and_gradients_are_those_of_the_definition(block: int | None, soft_cap: float) -> None:
    h, head, target = inputs(torch.float64)
    loss, right = linear_cross_entropy(h, head, target, block=block, soft_cap=soft_cap)
    truth = linear_cross_entropy_loop(h, head, target, soft_cap).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=0)
    assert torch.equal(right, (h @ head.T).argmax(-1) == target)
    for got, want in zip(
        torch.autograd.grad(3 * loss, (h, head)), torch.autograd.grad(3 * truth, (h, head)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_a_target_that_occurs_twice_gets_both_gradients() -> None:
    h, head, target = inputs(torch.float64)
    target[:] = 7
    loss, _ = linear_cross_entropy(h, head, target)
    (got,) = torch.autograd.grad(loss, head)
    (want,) = torch.autograd.grad(linear_cross_entropy_loop(h, head, target).mean(), head)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_large_logits_do_not_overflow() -> None:
    h, head, target = inputs(torch.float32, scale=1e4)
    loss, _ = linear_cross_entropy(h, head, target)
    truth = linear_cross_entropy_loop(h.double(), head.double(), target).mean()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, head)))


def test_a_bound_holds_for_large_logits() -> None:
    """At c tanh(z / c) with z far beyond c, the loss is bounded by 2 c + log V, and stays finite."""
    h, head, target = inputs(torch.float32, scale=1e4)
    loss, _ = linear_cross_entropy(h, head, target, soft_cap=2.0)
    assert loss < 4 + math.log(50)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, head)))
    with pytest.raises(KernelError, match="soft cap"):
        linear_cross_entropy(h, head, target, soft_cap=2.0, form="kernel")


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_members_of_a_population_are_batched(soft_cap: float) -> None:
    h, head, target = (torch.stack((each, each.flip(0))).detach() for each in inputs(torch.float64))
    loss_of = functools.partial(linear_cross_entropy, soft_cap=soft_cap)
    losses, _ = torch.func.vmap(loss_of)(h, head, target)
    for member in range(2):
        alone, _ = loss_of(h[member], head[member], target[member])
        torch.testing.assert_close(losses[member], alone)
