"""Causal convolutions against torch's own, and against the sum that defines them."""

import pytest
import torch
import torch.nn.functional as F

from holdall.ops.conv import (
    fast_size,
    long_conv,
    long_conv_loop,
    short_conv,
    short_conv_loop,
    toeplitz_conv,
)
from holdall.testing import laws

B, D, DOUBLE = 2, 3, torch.float64


@pytest.mark.parametrize("convolve", [short_conv_loop, short_conv])
@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_short_is_torchs_conv1d(convolve, taps: int, bias: bool, length: int) -> None:
    x_BTD = laws.draw(B, length, D, dtype=DOUBLE)
    weight_DW, past_BPD = (
        laws.draw(D, taps, dtype=DOUBLE, seed=1),
        laws.draw(B, taps - 1, D, dtype=DOUBLE, seed=2),
    )
    bias_D = laws.draw(D, dtype=DOUBLE, seed=3) if bias else None
    y_BTD, next_BPD = convolve(x_BTD, weight_DW, bias_D, past_BPD)
    seen_BSD = torch.cat((past_BPD, x_BTD), dim=1)
    want_BDT = F.conv1d(seen_BSD.mT, weight_DW[:, None], bias_D, groups=D)
    laws.assert_close("y", y_BTD, want_BDT.mT)
    laws.assert_close("past", next_BPD, seen_BSD[:, length:])


def test_short_keeps_no_more_alive_than_its_taps() -> None:
    past_BPD = short_conv(torch.ones(B, 1000, D), torch.ones(D, 4), None, torch.zeros(B, 3, D))[1]
    assert past_BPD.untyped_storage().nbytes() == past_BPD.numel() * past_BPD.element_size()


def test_short_sums_in_fp32() -> None:
    """Eight taps in bf16 err no more than one rounding of the exact sum."""
    x_BTD, weight_DW = (
        laws.draw(B, 50, D, dtype=torch.bfloat16),
        laws.draw(D, 8, dtype=torch.bfloat16, seed=1),
    )
    past_BPD = torch.zeros(B, 7, D, dtype=torch.bfloat16)
    y_BTD, _ = short_conv(x_BTD, weight_DW, None, past_BPD)
    truth, _ = short_conv(x_BTD.double(), weight_DW.double(), None, past_BPD.double())
    torch.testing.assert_close(y_BTD, truth.bfloat16(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


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


def test_gradcheck_of_a_short_convolution() -> None:
    leaves = [laws.draw(*shape, dtype=DOUBLE, seed=i).requires_grad_() for i, shape in
              enumerate([(B, 4, D), (D, 3), (D,), (B, 2, D)])]  # fmt: skip
    assert torch.autograd.gradcheck(short_conv, leaves)


def test_transforms_are_long_enough_and_powers_of_two() -> None:
    for least in range(1, 300):
        size = fast_size(least)
        assert least <= size <= max(2, 2 * least - 1)
        assert size & (size - 1) == 0
