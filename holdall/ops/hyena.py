"""Hyena: a short convolution of all projections, then gates and long convolutions in turn.

    [g_1 .. g_n, v] = shortconv(W_in x)        v <- h_i * (g v) + d_i (g v) for the gates from the last on
    y = W_out (g_1 v)

Letters: x and y input and output, g_1 to g_n gates, v what they gate, h_i the long filters, d_i their skips,
W_in and W_out learned maps. Of shapes: B row, T time, D width, U channels of the first projection, E channels
of all long filters, L taps, W taps of the short filters, P past tokens.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of, plain
from holdall.ops.long_conv import BY_PRODUCTS, long_conv
from holdall.ops.short_conv import short_conv

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def hyena(
    input_BTD: Float[Tensor, "b t d"],
    in_weight_UD: Float[Tensor, "u d"],
    in_bias_U: Float[Tensor, "u"],
    short_weight_UW: Float[Tensor, "u w"],
    short_bias_U: Float[Tensor, "u"],
    filter_LE: Float[Tensor, "l e"],
    skip_E: Float[Tensor, "e"],
    out_weight_DD: Float[Tensor, "d d"],
    out_bias_D: Float[Tensor, "d"],
    past: tuple[Tensor, Tensor] | None,
    *,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], tuple[Tensor, Tensor] | None]:
    """Projections included, since on a GPU they change the layout for products along time.

    Args:
        filter_LE: the filters in the order in which they are used, of as many taps as there are tokens.
        past: inputs that the short convolution still needs, (B, P, U), and what each long convolution has
            read, (B, P, E); None if nothing was read yet.
        inplace: the kernel of the short convolution may overwrite its past; the plain forms do not.
        want_state: whether the past after the last token is needed.
        form: "loop", "parallel" or "kernel". Whole rows of up to `BY_PRODUCTS` tokens have a kernel for
            everything, others for the short convolution alone: the long ones are the library's transforms.

    Returns:
        y_BTD, and the past after the last token.
    """
    width = input_BTD.shape[2]
    if form == "kernel" and past is None and not want_state and input_BTD.shape[1] <= BY_PRODUCTS:
        y_BTD = kernel_of(hyena)(
            input_BTD, in_weight_UD, in_bias_U, short_weight_UW, short_bias_U, filter_LE, skip_E,
            out_weight_DD, out_bias_D,
        )  # fmt: skip
        return y_BTD, None
    gated_BTD, past = between_projections(
        F.linear(input_BTD, in_weight_UD, in_bias_U), short_weight_UW, short_bias_U, filter_LE, skip_E, past,
        width=width, inplace=inplace, want_state=want_state, form=form,
    )  # fmt: skip
    return F.linear(gated_BTD, out_weight_DD, out_bias_D), past


def between_projections(
    u_BTU: Tensor,
    short_weight_UW: Tensor,
    short_bias_U: Tensor,
    filter_LE: Tensor,
    skip_E: Tensor,
    past: tuple[Tensor, Tensor] | None,
    *,
    width: int,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What `hyena` does between its projections, of whatever maps they are."""
    if past is None:
        rows, taps = u_BTU.shape[0], short_weight_UW.shape[1]
        past = u_BTU.new_zeros(rows, taps - 1, u_BTU.shape[2]), u_BTU.new_zeros(rows, 0, filter_LE.shape[1])
    short_BPU, long_BPE = past
    u_BTU, short_BPU = short_conv(u_BTU, short_weight_UW, short_bias_U, short_BPU, inplace=inplace, form=form)
    *gates, v_BTD = u_BTU.split(width, dim=-1)
    filters, skips, pasts = filter_LE.split(width, dim=-1), skip_E.split(width), long_BPE.split(width, dim=-1)
    kept: list[Tensor] = []
    for gate_BTD, h_LD, d_D, old_BPD in zip(reversed(gates[1:]), filters, skips, pasts, strict=True):
        v_BTD = v_BTD * gate_BTD
        c_BTD, past_BPD = long_conv(v_BTD, h_LD, old_BPD, form=plain(form))
        v_BTD = c_BTD + d_D * v_BTD
        kept.append(past_BPD)
    return v_BTD * gates[0], (short_BPU, torch.cat(kept, dim=-1)) if want_state else None
