"""Short causal convolutions against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from holdall.ops.short_conv import short_conv, short_conv_loop
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


def test_gradcheck_of_a_short_convolution() -> None:
    leaves = [laws.draw(*shape, dtype=DOUBLE, seed=i).requires_grad_() for i, shape in
              enumerate([(B, 4, D), (D, 3), (D,), (B, 2, D)])]  # fmt: skip
    assert torch.autograd.gradcheck(short_conv, leaves)
