"""A short convolution whose last inputs are in a ring, so that tokens can be taken back by lowering a count.

Beside a state with `replay` (holdall/ops/replay.py), which counts a row's tokens: the input of token p is in
slot p mod P. The W - 1 inputs that the next token needs are looked up there; the L slots more keep those that
it needs after L tokens were taken back. Which slots are filled is never asked: no token needs inputs from
before the row's first but the zeros that a row starts with.

Letters: B row, T new tokens, D or E channels, W taps, P slots, W - 1 + L; those of holdall/ops/replay.py.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from holdall.contract.room import fill
from holdall.ops.replay import ReplayState, replay_attention
from holdall.ops.short_conv import short_conv

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


class ConvReplayState(NamedTuple):
    """A `ReplayState`, and the last inputs of the short convolution before it, position p in slot p mod P."""

    s_BHFV: Tensor
    z_BHF: Tensor
    k_BSGK: Tensor
    v_BSHV: Tensor
    log_decay_BSHX: Tensor
    seen_B: Tensor
    summed_B: Tensor
    conv_BPE: Tensor


def replay_behind_conv(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTGK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t h v"],
    state: Any,
    conv_BPE: Float[Tensor, "b p e"] | None,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    beta_BTH: Float[Tensor, "b t h"] | None = None,
    **how: Any,
) -> tuple[Float[Tensor, "b t h v"], Any]:
    """`replay_attention`, with its options, of a state that has inputs of a convolution beside it.

    Args:
        state: a `ConvReplayState`, or a `ReplayState` where there is no convolution.
        conv_BPE: what `recent_conv` gave for the next state; None without a convolution.
    """
    y_BTHV, after = replay_attention(
        q_BTHK, k_BTGK, v_BTHV, ReplayState(*state[:7]), log_decay, beta_BTH, **how
    )
    if after is None or conv_BPE is None:
        return y_BTHV, after
    return y_BTHV, ConvReplayState(*after, conv_BPE)


def recent_conv(
    x_BTD: Float[Tensor, "b t d"],
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    state: Any,
    *,
    silu: bool = False,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p d"]]:
    """`short_conv` after the inputs `state.conv_BPE`: a ring of them in a `ConvReplayState`, else just W - 1.

    Returns outputs and the next `conv_BPE`.
    """
    past_BPD = state.conv_BPE
    if not isinstance(state, ConvReplayState):
        return short_conv(x_BTD, weight_DW, bias_D, past_BPD, silu=silu, inplace=inplace, form=form)
    slots, back = past_BPD.shape[1], weight_DW.shape[1] - 1
    slot_BW = (state.seen_B[:, None] - back + torch.arange(back, device=x_BTD.device)) % slots
    needed_BWD = past_BPD[torch.arange(len(past_BPD), device=x_BTD.device)[:, None], slot_BW]
    y_BTD, _ = short_conv(x_BTD, weight_DW, bias_D, needed_BWD, silu=silu, form=form)
    late = max(x_BTD.shape[1] - slots, 0)
    return y_BTD, fill(past_BPD, x_BTD[:, late:], state.seen_B + late, inplace=inplace)
