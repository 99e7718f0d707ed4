"""Running sums and products by doubling are PyTorch's, gradients too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdall.ops import running

WAYS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sums": (running.sums_by_doubling, torch.cumsum, running.cumsum),
    "products": (running.products_by_doubling, torch.cumprod, running.cumprod),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_it_is_pytorchs(way: str, count: int, dim: int) -> None:
    shape = [2, 2, 2]
    shape[dim] = count
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    up = torch.randn_like(x)
    ours, theirs, either = (function(x, dim) for function in WAYS[way])
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(either, theirs)  # on a CPU
    torch.testing.assert_close(*(torch.autograd.grad(y, x, up)[0] for y in (ours, theirs)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_repeats_it(way: str) -> None:
    x = torch.rand(3, 100, 5, device="cuda").requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        y = WAYS[way][2](x, 1)
        (grad,) = torch.autograd.grad(y.sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(y, WAYS[way][1](x, 1))
    assert grad.isfinite().all()
