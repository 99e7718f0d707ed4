"""A short causal convolution times a gate: what a gated convolution does between its projections.

    y_t = act(c_t) act(g_t) [+ x_t],    c_t = b + sum_{i < W} w_i x_{t - W + 1 + i}

x and the gate g are two tensors, or the two halves of one projection, [x | g]. Letters: B row, T new tokens,
D channels, W taps, E channels of the projection: D, or 2 D if x is half of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.ops.conv import short_conv, short_conv_loop

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

Silu = Literal["none", "conv", "both"]
"""What goes through x sigmoid(x): nothing, the convolution's output, or that and the gate."""


def gated_conv_loop(
    input_BTD: Float[Tensor, "b t d"] | None,
    projected_BTE: Float[Tensor, "b t e"],
    projection_bias_E: Float[Tensor, "e"] | None,
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b w-1 d"],
    *,
    silu: Silu = "none",
    skip: bool = False,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b w-1 d"]]:
    """The definition.

    Args:
        input_BTD: what is convolved; None if it is the first half of the projection.
        projected_BTE: the gate, or [x | gate]; without the projection's bias if that is given apart.
        past_BPD: the W - 1 values of x before these, bias included, oldest first; zeros at the start.
        skip: whether x itself is added.
        inplace: `past_BPD` may be overwritten; the plain forms leave it alone.

    Returns:
        y_BTD, and the past after the last token.
    """
    return _gated(
        short_conv_loop, input_BTD, projected_BTE, projection_bias_E, weight_DW, bias_D, past_BPD, silu, skip
    )


def gated_conv(
    input_BTD: Float[Tensor, "b t d"] | None,
    projected_BTE: Float[Tensor, "b t e"],
    projection_bias_E: Float[Tensor, "e"] | None,
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b w-1 d"],
    *,
    silu: Silu = "none",
    skip: bool = False,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b w-1 d"]]:
    """All tokens at once, O(T W); arguments as in the loop."""
    return _gated(
        short_conv, input_BTD, projected_BTE, projection_bias_E, weight_DW, bias_D, past_BPD, silu, skip
    )


def _gated(
    convolve: Callable[..., tuple[Tensor, Tensor]],
    input_BTD: Tensor | None,
    projected_BTE: Tensor,
    projection_bias_E: Tensor | None,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    past_BPD: Tensor,
    silu: Silu,
    skip: bool,
) -> tuple[Tensor, Tensor]:
    if projection_bias_E is not None:
        projected_BTE = projected_BTE + projection_bias_E.to(projected_BTE.dtype)
    x_BTD, gate_BTD = (input_BTD, projected_BTE) if input_BTD is not None else projected_BTE.chunk(2, dim=-1)
    c_BTD, past_BPD = convolve(x_BTD, weight_DW, bias_D, past_BPD)
    if silu != "none":
        c_BTD = F.silu(c_BTD)
    if silu == "both":
        gate_BTD = F.silu(gate_BTD)
    return torch.addcmul(x_BTD, c_BTD, gate_BTD) if skip else c_BTD * gate_BTD, past_BPD
