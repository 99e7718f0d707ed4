"""Draws by Gumbel noise on a GPU, for the equations see holdall/ops/noise.py.

One program per row reads its logits twice, for the largest and for the draw: B V floats from memory, and
again from the cache, where plain PyTorch makes some thirty passes over (B, V), most of them of int64. The
noise costs two rounds of a 32-bit hash, two logarithms and a division for each token. 128 rows of 50,257 are
26 MB, 0.005 ms at 4.8 TB/s; at one row a program's latency of V / BLOCK loads is all there is.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import overlapped
from holdall.kernels.language import wait_for_inputs

BLOCK, WARPS = 4096, 8
"""Tokens at a time, and what computes them."""


def draw(z_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor) -> Tensor:
    """`holdall.ops.noise.draw`. Raises KernelError if no kernel can run on these tensors."""
    require_kernel(z_BV, temperature_B)
    return _draw(z_BV, temperature_B, seed_B, position_B)


@torch.library.custom_op("holdall::noisy_draw", mutates_args=())
def _draw(z: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    z_BV = z if z.stride(-1) == 1 else z.contiguous()
    rows, vocab = z_BV.shape
    token_B = torch.empty(rows, dtype=torch.long, device=z.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocab))
        _draw_kernel[(rows,)](
            z_BV, temperature.contiguous(), seed.contiguous(), position.contiguous(), token_B,
            z_BV.stride(0), vocab, BLOCK=block, num_warps=WARPS, **overlapped(z.device),
        )  # fmt: skip
    return token_B


@_draw.register_fake
def _(z: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.long)


@triton.jit
def _mixed(word):
    """A round of the hash, of 32-bit words in int64: a few of them, whose sums must not overflow."""
    mask = 0xFFFFFFFF
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & mask
    word = ((word ^ (word >> 15)) * 0x846CA68B) & mask
    return word ^ (word >> 16)


@triton.jit
def _mixed_32(word):
    """The same of a tile of words in uint32."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _keys(seed, position):
    """The two words of a seed and a position, in int64."""
    mask = 0xFFFFFFFF
    one, other = seed * 0 + 0x9E3779B9, seed * 0 + 0x85EBCA6B
    low, high = seed & mask, (seed >> 32) & mask
    one, other = _mixed((one + low) & mask), _mixed(other ^ low)
    one, other = _mixed((one + high) & mask), _mixed(other ^ high)
    low, high = position & mask, (position >> 32) & mask
    one, other = _mixed((one + low) & mask), _mixed(other ^ low)
    one, other = _mixed((one + high) & mask), _mixed(other ^ high)
    return one, other


@triton.jit
def _gumbel(token, one, other):
    """-log E of a tile of tokens."""
    word = _mixed_32(_mixed_32(token.to(tl.uint32) + one) ^ other)
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.9604644775390625e-08)
    # -log(1 - u) without losing the digits of a small u: x / (1 - x / 2 + x^2 / 12) = -log(1 - x) + O(x^5)
    small = u / (1 - u * (0.5 + u * 0.08333333))
    e = tl.where(u < 0.015625, small, -tl.log(1 - u))
    return -tl.log(e)


@triton.jit(do_not_specialize=["vocab", "row_stride"])
def _draw_kernel(
    z_ptr, temperature_ptr, seed_ptr, position_ptr, token_ptr, row_stride, vocab, BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    lane = tl.arange(0, BLOCK)
    largest_lane = tl.full((BLOCK,), float("-inf"), tl.float32)
    wrong_lane = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + lane
        z = tl.load(z_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        wrong_lane = tl.where(z != z, 1, wrong_lane)
        largest_lane = tl.maximum(largest_lane, z)
    largest = tl.max(largest_lane, 0)
    wrong = (tl.max(wrong_lane, 0) > 0) | (largest == float("inf")) | (largest == float("-inf"))

    largest = tl.where(wrong, 0.0, largest)  # or differences would be NaN
    temperature = tl.load(temperature_ptr + row)
    hot = temperature > 0
    divisor = tl.where(hot, temperature, 1.0)
    one, other = _keys(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    one, other = one.to(tl.uint32), other.to(tl.uint32)
    best_lane = tl.full((BLOCK,), float("-inf"), tl.float32)
    token_lane = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + lane
        z = tl.load(z_ptr + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        value = (z - largest) / divisor + tl.where(hot, _gumbel(token, one, other), 0.0)
        better = value > best_lane  # of equals the first one stays
        best_lane = tl.where(better, value, best_lane)
        token_lane = tl.where(better, token, token_lane)
    best = tl.max(best_lane, 0)
    drawn = tl.min(tl.where(best_lane == best, token_lane, 2147483647), 0)
    tl.store(token_ptr + row, tl.where(wrong, -1, drawn).to(tl.int64))
