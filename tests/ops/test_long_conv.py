"""Long causal convolutions against the sum that defines them."""

import pytest
import torch

from holdall.ops.long_conv import (
    fast_size,
    long_conv,
    long_conv_loop,
    toeplitz_conv,
)
from holdall.testing import laws

B, D, DOUBLE = 2, 3, torch.float64


def direct_sum(x_BTD: torch.Tensor, filter_LD: torch.Tensor, past: int) -> torch.Tensor:
    """y_t = sum_{j <= t} h_{t-j} x_j, written as it is."""
    ys = [
        sum(filter_LD[t - j] * x_BTD[:, j] for j in range(t + 1))  # a triangle of terms
        for t in range(past, x_BTD.shape[1])
    ]
    return torch.stack(ys, dim=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("convolve", [long_conv_loop, long_conv])
@pytest.mark.parametrize(("past", "length"), [(0, 1), (0, 2), (0, 17), (5, 1), (5, 12), (31, 33)])
@pytest.mark.parametrize("spare", [0, 9])
def test_long_is_the_direct_sum(convolve, past: int, length: int, spare: int) -> None:
    seen_BSD = laws.draw(B, past + length, D, dtype=DOUBLE)
    filter_LD = laws.draw(
        past + length + spare, D, dtype=DOUBLE, seed=1
    )  # taps beyond the context are not used
    y_BTD, next_BPD = convolve(seen_BSD[:, past:], filter_LD, seen_BSD[:, :past])
    laws.assert_close("y", y_BTD, direct_sum(seen_BSD, filter_LD, past))
    laws.assert_close("past", next_BPD, seen_BSD)


@pytest.mark.parametrize("length", [1, 12])
def test_gradients_of_a_long_convolution_equal_the_loops(length: int) -> None:
    tensors = [laws.draw(B, length, D, dtype=DOUBLE), laws.draw(20, D, dtype=DOUBLE, seed=1),
               laws.draw(B, 5, D, dtype=DOUBLE, seed=2)]  # fmt: skip
    grads = []
    for convolve in (long_conv, long_conv_loop):
        leaves = [t.clone().requires_grad_() for t in tensors]
        ends = convolve(*leaves)
        grads.append(
            torch.autograd.grad(ends, leaves, [laws.draw(*e.shape, dtype=DOUBLE, seed=5) for e in ends])
        )
    for name, got, want in zip(("x", "filter", "past"), *grads, strict=True):
        laws.assert_close(f"gradient of {name}", got, want)


@pytest.mark.parametrize(("past", "length", "spare"), [(0, 1, 0), (0, 7, 2), (5, 4, 0), (3, 9, 4)])
def test_by_products_it_is_the_direct_sum_too(past: int, length: int, spare: int) -> None:
    """What short rows on a GPU run; under vmap, and with its gradients."""
    seen_MBSD = laws.draw(2, B, past + length, D, dtype=DOUBLE).requires_grad_()
    filter_MLD = laws.draw(2, past + length + spare, D, dtype=DOUBLE, seed=1).requires_grad_()
    got = torch.func.vmap(lambda seen, taps: toeplitz_conv(seen, taps, length))(seen_MBSD, filter_MLD)
    pairs = zip(seen_MBSD, filter_MLD, strict=True)
    want = torch.stack([long_conv_loop(seen[:, past:], taps, seen[:, :past])[0] for seen, taps in pairs])
    laws.assert_close("y", got, want)
    up = laws.draw(*got.shape, dtype=DOUBLE, seed=2)
    grads = [torch.autograd.grad((y * up).sum(), (seen_MBSD, filter_MLD)) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        laws.assert_close("gradient", one, other)


def test_transforms_are_long_enough_and_powers_of_two() -> None:
    for least in range(1, 300):
        size = fast_size(least)
        assert least <= size <= max(2, 2 * least - 1)
        assert size & (size - 1) == 0
