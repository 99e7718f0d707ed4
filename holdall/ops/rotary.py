"""Rotary positions (Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer", 2021, arXiv 2104.09864).

Each pair of features is turned by an angle proportional to the token's position, so that the product
of a query and a key depends on their distance alone.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdall.contract.forms import kernel_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Int


def rotate(
    x_BTHK: Float[Tensor, "b t h k"],
    position_BT: Int[Tensor, "#b t"],
    frequency_F: Float[Tensor, "f"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "b t h k"]:
    """Turn the first 2F features of each head by position * frequency; the others stay.

    Args:
        x_BTHK: queries or keys.
        position_BT: integer positions, (B, T) or (1, T).
        frequency_F: radians per token of each pair.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise (0, F), (1, F + 1), ...

    The angle is computed in fp64: in fp32, position 100,000 would be off by up to a hundredth of a radian.
    Raises ValueError if a head has fewer than 2F features.
    """
    (turns,) = frequency_F.shape
    if 2 * turns > x_BTHK.shape[-1]:
        raise ValueError(f"{turns} pairs to turn are more than heads of {x_BTHK.shape[-1]} dimensions have")
    turn = _turn_once if torch.compiler.is_compiling() else _turn
    cos, sin = turn(position_BT, frequency_F, x_BTHK.dtype)
    turned, rest = x_BTHK[..., : 2 * turns], x_BTHK[..., 2 * turns :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :turns], turned[..., turns:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rotate_both(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTGK: Float[Tensor, "b t g k"],
    seen_B: Int[Tensor, "#b"],
    dims: int,
    base: float,
    scaling: tuple[float, ...] = (),
    *,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t g k"]]:
    """Turn the queries and keys of the next T tokens at the standard frequencies, in halves, not interleaved.

    Args:
        seen_B: tokens read before these, (B,) or (1,).
        dims: sets the frequencies, as in `standard_frequencies`; at least 1.
        base: of the frequencies.
        scaling: of the frequencies, as in `standard_frequencies`.
        form: "parallel" is `rotate`; "kernel" is one kernel for all of it, without gradients.
    """
    if form == "kernel":
        return kernel_of(rotate_both)(q_BTHK, k_BTGK, seen_B, dims, base, scaling)
    frequency_F = standard_frequencies(dims, base, q_BTHK, scaling)
    position_BT = seen_B[:, None] + torch.arange(q_BTHK.shape[1], device=q_BTHK.device)
    return rotate(q_BTHK, position_BT, frequency_F), rotate(k_BTGK, position_BT, frequency_F)


def _turn(position_BT: Tensor, frequency_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each angle, for all heads, (B, T, 1, F)."""
    angle_BT1F = (position_BT[..., None].double() * frequency_F.double())[:, :, None, :]
    return angle_BT1F.cos().to(dtype), angle_BT1F.sin().to(dtype)


_SCHEMA = "(Tensor position, Tensor frequency, ScalarType dtype) -> (Tensor, Tensor)"


@torch.library.custom_op("holdall::rotary_turn", mutates_args=(), schema=_SCHEMA)
def _turn_once(position_BT: Tensor, frequency_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_turn` that torch.compile does not look into: it would compute cosines and sines in fp64 for each
    feature of each head, forward and backward: a sixth of a Transformer's training step on an H100."""
    return _turn(position_BT, frequency_F, dtype)


@_turn_once.register_fake
def _(position_BT: Tensor, frequency_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _turn(position_BT, frequency_F, dtype)


def rotary_dims(head_dim: int, share: float) -> int:
    """The number d = int(share * head_dim) that sets the frequencies of heads of which a share is turned.

    As in flash-attention and GPT-NeoX an odd d makes (d + 1) / 2 pairs, so that d + 1 dimensions turn.
    Raises ValueError if a head has no more than d dimensions then.
    """
    dims = int(share * head_dim)
    if dims + dims % 2 > head_dim:
        raise ValueError(
            f"rotary {share} of heads of {head_dim} dimensions makes {dims // 2 + 1} pairs, {dims + 1}"
            f" dimensions: take heads of an even number of dimensions, or rotary below {dims}/{head_dim}"
        )
    return dims


def standard_frequencies(
    dims: int, base: float, like: Tensor, scaling: tuple[float, ...] = ()
) -> Float[Tensor, "f"]:
    """The usual frequencies f = base^(-2i / dims) for all 2i < dims, (F,), F = dims / 2 rounded up.

    Scaled by (s,), positions are s times as close: f / s (Chen et al., "Extending Context Window of Large
    Language Models via Positional Interpolation", 2023, arXiv 2306.15595). By (s, low, high, C), as in
    Llama 3.1, only pairs that turn less than `low` times within C tokens are, those that turn more than
    `high` times stay, and between them f (1 - r) / s + f r, with r from 0 to 1 in the number of turns.

    On the device of `like` and in fp64. They are made when needed and not kept as a buffer, which a cast of
    the module to bf16 would round: at position 2,048 by a third of a radian.
    """
    frequency_F = base ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=like.device) / dims)
    if not scaling:
        return frequency_F
    stretch, *ramp = scaling
    if not ramp:
        return frequency_F / stretch
    low, high, context = ramp
    stays_F = ((context / (2 * math.pi) * frequency_F - low) / (high - low)).clamp(0, 1)
    return frequency_F * (stays_F + (1 - stays_F) / stretch)


def check_scaling(scaling: tuple[float, ...]) -> None:
    """Raise ValueError for what `standard_frequencies` does not take."""
    whole = len(scaling) in (0, 1, 4) and all(number > 0 for number in scaling)
    if not whole or (len(scaling) == 4 and scaling[1] >= scaling[2]):
        raise ValueError(
            f"rotary_scaling = {scaling} must be (), (factor,) or (factor, low, high, context), "
            "all above zero, with low < high"
        )
