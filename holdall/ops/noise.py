"""Draws by Gumbel noise that is a hash: of a seed, a position and a token, and of nothing else.

    token = argmax_i  z_i / temperature - log E_i        E_i = -log(1 - u_i),  u_i uniform in (0, 1)

which draws from the softmax of z / temperature, the Gumbel-max trick (Maddison et al., arXiv 1411.0030). u_i
is computed in 32-bit integers, the same on every device, in every batch, however often it is drawn again.

Letters: z_i the logit of token i, E_i exponential noise, u_i uniform noise. Of shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdall.contract.forms import kernel_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Int

MASK = (1 << 32) - 1


def draw(
    z_BV: Float[Tensor, "b v"],
    temperature_B: Float[Tensor, "b"],
    seed_B: Int[Tensor, "b"],
    position_B: Int[Tensor, "b"],
    *,
    form: str = "parallel",
) -> Int[Tensor, "b"]:
    """A token of each row; -1 where z is NaN or its largest infinite.

    Args:
        z_BV: logits, fp32; -inf for tokens that are not to be drawn.
        temperature_B: fp32; 0 takes the likeliest token, the first of several.
        seed_B, position_B: int64.
        form: "parallel" or "kernel"; logarithms may differ in their last bit.
    """
    if form == "kernel":
        return kernel_of(draw)(z_BV, temperature_B, seed_B, position_B)
    # after the largest is subtracted, the smallest temperature gives -inf and never NaN
    largest_B1 = z_BV.amax(-1, keepdim=True)
    hot_B1 = (temperature_B > 0)[:, None]
    scaled_BV = (z_BV - largest_B1) / torch.where(hot_B1, temperature_B[:, None], 1.0)
    noise_BV = gumbel(seed_B, position_B, z_BV.shape[-1])
    token_B = (scaled_BV + torch.where(hot_B1, noise_BV, 0.0)).argmax(-1)
    return torch.where(largest_B1[:, 0].isfinite(), token_B, -1)


def gumbel(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """-log E for each token, (B, V) fp32: Gumbel noise that depends on its arguments alone."""
    # in fp32, u keeps its digits near 0, which are those of the likeliest tokens, down to 2^-33
    word_BV = words(seed_B, position_B, vocab)
    u_BV = ((word_BV.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-u_BV)).log()


def words(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """32 random bits for each token, (B, V) int64: a hash of seed, position and token."""
    one_B, other_B = _keys(seed_B, position_B)
    token_V = torch.arange(vocab, device=seed_B.device)
    return _mixed(_mixed((token_V + one_B[:, None]) & MASK) ^ other_B[:, None])


def _keys(seed_B: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 bits for each pair of a seed and a position.

    Of two chains, one by sums and one by xor: were the second word a function of the first, two seeds could
    have the same noise at all positions but for a shift: so had 2 pairs among the first 1,000 seeds.
    """
    one_B, other_B = torch.full_like(seed_B, 0x9E3779B9), torch.full_like(seed_B, 0x85EBCA6B)
    for word_B in (seed_B & MASK, seed_B >> 32 & MASK, position_B & MASK, position_B >> 32 & MASK):
        one_B, other_B = _mixed((one_B + word_B) & MASK), _mixed(other_B ^ word_B)
    return one_B, other_B


def _mixed(word: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in int64, that spreads each bit over all (Wellons, 2018)."""
    word = (word ^ word >> 16) * 0x7FEB352D & MASK
    word = (word ^ word >> 15) * 0x846CA68B & MASK
    return word ^ word >> 16
