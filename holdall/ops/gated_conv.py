"""A short causal convolution times a gate: what a gated convolution does between its projections.

    y_t = act(c_t) act(g_t) [+ x_t],    c_t = b + sum_{i < W} w_i x_{t - W + 1 + i}

x and the gate g are two tensors, or the two halves of one projection, [x | g]. Letters: x_t and y_t input and
output of token t, g_t the gate, c_t the convolution, w_i tap i of W, b its bias, act an activation. Of
shapes: B row, T new tokens, D channels, W taps, E channels of the projection: D, or 2 D if x is half of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.contract.rollback import nan_where_lost
from holdall.contract.room import fill
from holdall.ops.short_conv import short_conv

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Int

Silu = Literal["none", "conv", "both"]
"""What goes through x sigmoid(x): nothing, the convolution's output, or that and the gate."""


def kernel_refusal(taps: int) -> str:
    """Why there is no kernel for this many taps; empty if there is one."""
    return kernel_of(kernel_refusal)(taps)


def gated_conv(
    input_BTD: Float[Tensor, "b t d"] | None,
    projected_BTE: Float[Tensor, "b t e"],
    projection_bias_E: Float[Tensor, "e"] | None,
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b p d"],
    seen_B: Int[Tensor, "b"] | None = None,
    *,
    silu: Silu = "none",
    skip: bool = False,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p d"]]:
    """The plain forms are those of the short convolution; O(T W).

    Args:
        input_BTD: what is convolved; None if it is the first half of the projection.
        projected_BTE: the gate, or [x | gate]; without the projection's bias if that is given apart.
        past_BPD: the W - 1 values of x before these, bias included, oldest first; zeros at the start.
        seen_B: how many tokens a row has read, where the past is a ring instead: of P >= W - 1 slots, that of
            position p in slot p mod P. It keeps as many tokens as it has slots.
        skip: whether x itself is added.
        inplace: `past_BPD` may be overwritten; the plain forms leave it alone.
        form: "loop", "parallel" or "kernel".

    Returns:
        y_BTD, and the past after the last token.
    """
    if form == "kernel":
        return kernel_of(gated_conv)(
            input_BTD, projected_BTE, projection_bias_E, weight_DW, bias_D, past_BPD, seen_B,
            silu=silu, skip=skip, inplace=inplace,
        )  # fmt: skip
    if seen_B is not None:
        return beside_ring(
            functools.partial(gated_conv, form=form), input_BTD, projected_BTE, projection_bias_E, weight_DW,
            bias_D, past_BPD, seen_B, silu=silu, skip=skip, inplace=inplace,
        )  # fmt: skip
    if projection_bias_E is not None:
        projected_BTE = projected_BTE + projection_bias_E.to(projected_BTE.dtype)
    x_BTD, gate_BTD = (input_BTD, projected_BTE) if input_BTD is not None else projected_BTE.chunk(2, dim=-1)
    c_BTD, past_BPD = short_conv(x_BTD, weight_DW, bias_D, past_BPD, silu=silu != "none", form=form)
    if silu == "both":
        gate_BTD = F.silu(gate_BTD)
    return torch.addcmul(x_BTD, c_BTD, gate_BTD) if skip else c_BTD * gate_BTD, past_BPD


def beside_ring(
    convolve: Callable[..., tuple[Tensor, Tensor]],
    input_BTD: Tensor | None,
    projected_BTE: Tensor,
    projection_bias_E: Tensor | None,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    ring_BPD: Tensor,
    seen_B: Tensor,
    *,
    silu: Silu,
    skip: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The same by a gated convolution that knows no rings: its past taken out of one, and x put into it."""
    slots, taps, new = ring_BPD.shape[1], weight_DW.shape[1], projected_BTE.shape[1]
    at_BP = (seen_B[:, None] + torch.arange(slots - taps + 1, slots, device=seen_B.device)) % slots
    y_BTD, _ = convolve(
        input_BTD, projected_BTE, projection_bias_E, weight_DW, bias_D,
        ring_BPD.take_along_dim(at_BP[..., None], dim=1), silu=silu, skip=skip,
    )  # fmt: skip
    last = max(new - slots, 0)
    x_BTD = projected_BTE.chunk(2, dim=-1)[0] if input_BTD is None else input_BTD
    x_BTD = x_BTD[:, last:]
    if input_BTD is None and projection_bias_E is not None:
        x_BTD = x_BTD + projection_bias_E.chunk(2)[0].to(x_BTD.dtype)
    return nan_where_lost(y_BTD, seen_B), fill(
        ring_BPD, x_BTD.to(ring_BPD.dtype), seen_B + last, inplace=inplace
    )
