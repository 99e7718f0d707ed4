"""The short causal convolution, one filter of a handful of taps per channel, with or without SiLU after it.

    y_t = b + sum_{i < W} w_i x_{t - W + 1 + i}       the last tap multiplies the current token

Letters: x_t and y_t input and output of token t, w_i tap i of W, b the bias. Of shapes: B row, T new tokens,
D channels, W taps, P past tokens.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def kernel_refusal(taps: int) -> str:
    """Why there is no kernel for this many taps; empty if there is one, or if there is no convolution."""
    return kernel_of(kernel_refusal)(taps)


def short_conv_loop(
    x_BTD: Float[Tensor, "b t d"],
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b w-1 d"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b w-1 d"]]:
    """The definition, without SiLU; arguments and results as in `short_conv`."""
    ys = []
    for t in range(x_BTD.shape[1]):
        seen_BWD = torch.cat((past_BPD, x_BTD[:, t : t + 1]), dim=1)
        y_BD = torch.einsum("bwd,dw->bd", seen_BWD, weight_DW)
        ys.append(y_BD if bias_D is None else y_BD + bias_D)
        past_BPD = seen_BWD[:, 1:]
    return torch.stack(ys, dim=1), past_BPD.clone()


def short_conv(
    x_BTD: Float[Tensor, "b t d"],
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b w-1 d"],
    *,
    silu: bool = False,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b w-1 d"]]:
    """The outputs, and the inputs that the next tokens need.

    Args:
        past_BPD: the W - 1 inputs before these, oldest first; zeros at the start.
        silu: whether outputs go through x sigmoid(x).
        inplace: `past_BPD` may be overwritten; the plain forms leave it unchanged.
        form: "loop", "parallel" or "kernel".
    """
    if form == "kernel":
        return kernel_of(short_conv)(x_BTD, weight_DW, bias_D, past_BPD, silu=silu, inplace=inplace)
    convolve = short_conv_loop if form == "loop" else shifted_products
    y_BTD, past_BPD = convolve(x_BTD, weight_DW, bias_D, past_BPD)
    return F.silu(y_BTD) if silu else y_BTD, past_BPD


def shifted_products(
    x_BTD: Float[Tensor, "b t d"],
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b w-1 d"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b w-1 d"]]:
    """The parallel form, W products: for a handful of taps cheaper than a library's convolution. O(T W).

    The sum is kept in at least fp32, as libraries do: in bf16 each tap would add a rounding of its own.
    """
    taps, new = weight_DW.shape[1], x_BTD.shape[1]
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    seen_BSD = torch.cat((past_BPD, x_BTD), dim=1)
    wide_BSD, weight_DW = seen_BSD.to(dtype), weight_DW.to(dtype)
    y_BTD = wide_BSD[:, taps - 1 :] * weight_DW[:, -1]
    if bias_D is not None:
        y_BTD = y_BTD + bias_D
    for tap in range(taps - 1):
        y_BTD = torch.addcmul(y_BTD, wide_BSD[:, tap : tap + new], weight_DW[:, tap])
    # a copy: a view of the last few tokens would keep all of them in memory for as long as the state lives
    return y_BTD.to(x_BTD.dtype), seen_BSD[:, new:].clone()
