"""Rotary positions of queries and keys on a GPU, angles included, in one kernel; for reading, not training.

    angle_tf = (seen + t) base^(-2f / dims)
    y_f = a cos - b sin,  y_{F+f} = b cos + a sin,  (a, b) = (x_f, x_{F+f}), f < F;  the other features stay

In PyTorch that is 32 kernels: 6 for positions and frequencies, and for queries and keys each 6 for cosines
and sines in fp64 and 7 that turn. Memory traffic: q and k in and out, 4 H K elements a token; 128 rows of 16
heads of 112 in bf16 are 1.8 MB, below 1 us.

Frequencies, angles, cosines and sines are in fp64, as in holdall/ops/rotary.py: there are only F of them for
all heads of a program. A frequency is 2 to the power of a number below log2(base) that is rounded twice: it
errs by 2^-52 log2(base) of its size at most, and for base 10,000 the angle by 3e-9 at position 1,000,000. The
largest error is then that of a cosine or sine rounded to fp32, 3e-8.

Letters: B row, T new tokens, H heads of queries, G of keys, K head dim, F pairs.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import cdiv, overlapped
from holdall.kernels.language import narrow, wait_for_inputs

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Int

PAIRS_AT_ONCE = 512
"""Pairs of a program: 4 per thread."""


def rotate_both(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTGK: Float[Tensor, "b t g k"],
    seen_B: Int[Tensor, "#b"],
    dims: int,
    base: float,
    scaling: tuple[float, ...] = (),
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t g k"]]:
    """The kernel form of `holdall.ops.rotary.rotate_both`, which documents the arguments; no gradients.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(q_BTHK, k_BTGK)
    return _rotate(q_BTHK, k_BTGK, seen_B, dims, base, list(scaling))


@torch.library.custom_op("holdall::rotate_both", mutates_args=())
def _rotate(
    q: Tensor, k: Tensor, seen: Tensor, dims: int, base: float, scaling: list[float]
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k))
    turned_q, turned_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    (rows, new, heads, head_dim), groups, pairs = q.shape, k.shape[2], cdiv(dims, 2)
    if not (q.numel() or k.numel()):
        return turned_q, turned_k
    padded = triton.next_power_of_2(pairs)
    block = min(triton.next_power_of_2(max(heads, groups)), max(1, PAIRS_AT_ONCE // padded))
    blocks_q, blocks_k = cdiv(heads, block), cdiv(groups, block)
    stretch, low, high, context = (*scaling, 0.0, 0.0, 0.0)[:4] if scaling else (1.0, 0.0, 0.0, 0.0)
    _kernel[(rows * new, blocks_q + blocks_k)](
        q, k, turned_q, turned_k, seen, *q.stride()[:3], *k.stride()[:3],
        seen.stride(0) if seen.shape[0] > 1 else 0, new, heads, groups,
        K=head_dim, PAIRS=pairs, SLOPE=-2 * math.log2(base) / dims,
        STRETCH=stretch, LOW=low, HIGH=high, TURNS=context / (2 * math.pi),
        PADDED=padded, REST=triton.next_power_of_2(max(1, head_dim - 2 * pairs)), BLOCK=block,
        **overlapped(q.device),
    )  # fmt: skip
    return turned_q, turned_k


@_rotate.register_fake
def _(
    q: Tensor, k: Tensor, seen: Tensor, dims: int, base: float, scaling: list[float]
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@triton.jit(do_not_specialize=["T"])
def _kernel(
    q_ptr, k_ptr, turned_q_ptr, turned_k_ptr, seen_ptr, q_b, q_t, q_h, k_b, k_t, k_g, seen_b, T, H, G,
    K: tl.constexpr, PAIRS: tl.constexpr, SLOPE: tl.constexpr,
    STRETCH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, TURNS: tl.constexpr,
    PADDED: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One program for a token and a block of heads, first those of the queries, then those of the keys."""
    wait_for_inputs(OVERLAPPED)
    token = tl.program_id(0).to(tl.int64)
    b, t, block = token // T, token % T, tl.program_id(1)
    f = tl.arange(0, PADDED)
    # a float that is no tensor would be fp32
    slope = tl.full((PADDED,), SLOPE, tl.float64)
    frequency = tl.exp2(f.to(tl.float64) * slope)
    if STRETCH != 1.0:
        frequency = _scaled(frequency, STRETCH, LOW, HIGH, TURNS)
    angle = (tl.load(seen_ptr + b * seen_b) + t).to(tl.float64) * frequency
    cos, sin = tl.cos(angle).to(tl.float32)[None, :], tl.sin(angle).to(tl.float32)[None, :]
    blocks_q = tl.cdiv(H, BLOCK)
    if block < blocks_q:
        q_ptr += b * q_b + t * q_t
        _turn(q_ptr, turned_q_ptr + token * H * K, block * BLOCK, q_h, H, cos, sin, K, PAIRS, REST, BLOCK)
    else:
        k_ptr += b * k_b + t * k_t
        first = (block - blocks_q) * BLOCK
        _turn(k_ptr, turned_k_ptr + token * G * K, first, k_g, G, cos, sin, K, PAIRS, REST, BLOCK)


@triton.jit
def _scaled(
    frequency, STRETCH: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, TURNS: tl.constexpr
):  # fmt: skip
    """As in `standard_frequencies`, in fp64."""
    stretch = tl.full(frequency.shape, STRETCH, tl.float64)
    if TURNS == 0:
        return frequency / stretch
    low, turns = tl.full(frequency.shape, LOW, tl.float64), tl.full(frequency.shape, TURNS, tl.float64)
    stays = (turns * frequency - low) / (tl.full(frequency.shape, HIGH, tl.float64) - low)
    stays = tl.minimum(tl.maximum(stays, 0.0), 1.0)
    return frequency * (stays + (1 - stays) / stretch)


@triton.jit
def _turn(
    x_ptr, y_ptr, first, x_h, heads, cos, sin,
    K: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    h = (first + tl.arange(0, BLOCK))[:, None]
    f = tl.arange(0, cos.shape[1])[None, :]
    here = (h < heads) & (f < PAIRS)
    a = tl.load(x_ptr + h * x_h + f, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + h * x_h + f + PAIRS, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + h * K + f, narrow(a * cos - b * sin, y_ptr.dtype.element_ty), mask=here)
    tl.store(y_ptr + h * K + f + PAIRS, narrow(b * cos + a * sin, y_ptr.dtype.element_ty), mask=here)
    if 2 * PAIRS < K:
        rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
        beside = (h < heads) & (rest < K)
        tl.store(y_ptr + h * K + rest, tl.load(x_ptr + h * x_h + rest, mask=beside), mask=beside)
