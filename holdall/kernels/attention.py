"""Attention of a few new tokens over reserved slots: a decode step that reads the filled ones alone.

    s_tj = scale q_t . k_j     y_t = sum_j exp(s_tj) v_j / sum_j exp(s_tj),  filled - seen <= j <= filled + t

The slots are cut into parts of 256, and part i belongs to program i mod P of a row and a head of keys
(Flash-Decoding, Dao, Haziza, Massa, Sizov, 2023; the running softmax is FlashAttention's). A program loads a
block of keys and values once for all queries that share it, those of H / G heads and T tokens, and leaves a
maximum, a sum and weighted values for each; a second launch joins them. The new tokens belong to program 0,
which also writes their keys and values into their slots. No other program reads those: all look only at slots
that were filled before.

Counts are read on the device. The grid depends on the capacity alone, and a program without a filled slot
returns at once, so that a step can be recorded as a CUDA graph and replayed at every length. P depends on G
alone, and parts start at multiples of 256: the bits of a row depend on what it has read, not on the number of
rows, nor on the capacity. There are no sums across programs but those of the second launch, in fixed order.

Memory traffic: (K + V) G elements for each filled slot of a row. 128 rows of 1,024 tokens with 8 groups of 70
dimensions in bf16 are 294 MB, 0.061 ms at the 4.8 TB/s of an H200's data sheet. The parts' results are
(V + 2) H fp32 values each, written and read: 2.4% of that in this case, with 24 heads. Operations are
2 (K + V) H per slot and token, here 3 for each byte: it is memory-bound.

Letters: B row, T new tokens, S slots, P programs, H heads (of queries; G of keys and values), K key dim, V
value dim, M the H / G queries of each new token that share keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import cdiv, dense_last, overlapped, padded, register_batch_vmap, wants_gradient
from holdall.kernels.language import attend_block, load_rows, store_rows, wait_for_inputs
from holdall.ops import attention

MAX_NEW = 8
"""Most new tokens; longer pieces have enough queries for PyTorch's own attention."""
MAX_QUERIES = 64
"""Most queries, of new tokens and heads, that share a head of keys within one program."""
PART = 256
"""Slots of one part."""
LOG2_E = 1.4426950408889634


# ---------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["S", "T", "G", "programs"])
def _parts_kernel(
    q_ptr, k_ptr, v_ptr, slots_k_ptr, slots_v_ptr, seen_ptr, filled_ptr, y_ptr, top_ptr, total_ptr,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g, S, T, scale, one, G, programs,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PART: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """Parts p, p + P, ... of one row and head of keys."""
    wait_for_inputs(OVERLAPPED)
    # neighbouring programs read neighbouring heads of the same slots, whose sectors they share
    g = tl.program_id(0) % G
    p = tl.program_id(0) // G % programs
    b = (tl.program_id(0) // G // programs).to(tl.int64)
    filled = tl.load(filled_ptr + b)
    last = tl.minimum(filled, S).to(tl.int32)
    first = tl.maximum(filled - tl.load(seen_ptr + b), 0).to(tl.int32)
    if (p > 0) & (p * PART >= last):
        return

    m = tl.arange(0, BLOCK_M)
    t, h = m // GROUP, g * GROUP + m % GROUP
    q = load_rows(q_ptr + b * q_b, t * q_t + h * q_h, t < T, K, BLOCK_K)
    # finite, to avoid infinity minus infinity where a block has no visible slot
    top = tl.full((BLOCK_M,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)

    if p == 0:
        j = tl.arange(0, BLOCK_T)
        k_new = load_rows(k_ptr + b * k_b + g * k_g, j * k_t, j < T, K, BLOCK_K)
        v_new = load_rows(v_ptr + b * v_b + g * v_g, j * v_t, j < T, V, BLOCK_V)
        visible = (j[None, :] <= t[:, None]) & (j < T)[None, :]
        top, total, acc = attend_block(q, k_new, v_new, visible, scale, top, total, acc, one)
        row = (b * S + (filled + j) % S) * G + g
        store_rows(slots_k_ptr, row * K, j < T, k_new, K, BLOCK_K)
        store_rows(slots_v_ptr, row * V, j < T, v_new, V, BLOCK_V)

    blocks: tl.constexpr = PART // BLOCK_S
    parts = tl.cdiv(tl.cdiv(last, PART) - p, programs)
    for i in tl.range(0, parts * blocks, num_stages=STAGES):
        slot = (p + i // blocks * programs) * PART + i % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
        # the others may hold anything, even NaN, which a zero probability would not remove
        visible = (slot >= first) & (slot < last)
        row = (b * S + slot) * G + g
        k = load_rows(slots_k_ptr, row * K, visible, K, BLOCK_K)
        v = load_rows(slots_v_ptr, row * V, visible, V, BLOCK_V)
        top, total, acc = attend_block(q, k, v, visible[None, :], scale, top, total, acc, one)

    query = ((b * programs + p) * T + t) * (G * GROUP) + h
    store_rows(y_ptr, query * V, t < T, acc, V, BLOCK_V)
    tl.store(top_ptr + query, top, mask=t < T)
    tl.store(total_ptr + query, total, mask=t < T)


@triton.jit(do_not_specialize=["S", "queries", "programs"])
def _join_kernel(
    part_y_ptr, top_ptr, total_ptr, filled_ptr, y_ptr, S, queries, programs,
    V: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One query of a row: the sum over the programs that had something to read, as program 0 always has."""
    wait_for_inputs(OVERLAPPED)
    b = (tl.program_id(0) // queries).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    parts = tl.cdiv(tl.minimum(tl.load(filled_ptr + b), S), PART)
    used = (p < tl.maximum(parts, 1)) & (p < programs)
    query = (b * programs + p) * queries + tl.program_id(0) % queries
    top = tl.load(top_ptr + query, mask=used, other=-1e38)
    weight = tl.where(used, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(weight * tl.load(total_ptr + query, mask=used, other=0.0), 0)
    part_y = load_rows(part_y_ptr, query * V, used, V, BLOCK_V)
    y = tl.sum(weight[:, None] * part_y, 0) / total
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    store_rows(y_ptr, row * V, row >= 0, y[None, :], V, BLOCK_V)


# --------------------------------------------------------------------------------------------- the launches


def _programs(groups: int) -> int:
    """P: together about as many programs per row as a large GPU has multiprocessors. A power of two."""
    return min(64, max(8, triton.next_power_of_2(128 // groups)))


def _config(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Blocks small enough that three programs share a multiprocessor's registers up to 128 dimensions. In
    fp32 products have operands in registers, so that blocks are smaller."""
    if dtype == torch.float32:
        return {"BLOCK_S": 32 if dim <= 64 else 16, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_S": 64 if dim <= 64 else 32, "STAGES": 4 if dim <= 128 else 3, "num_warps": 4}


def _launch(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seen_B: Tensor,
    filled_B: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Returns y; writes the new keys and values into the slots, which are contiguous."""
    batch, new, heads, key_dim = q_BTHK.shape
    _, slots, groups, value_dim = v_BSGV.shape
    q, k, v = map(dense_last, (q_BTHK, k_BTGK, v_BTGV))
    filled = filled_B.contiguous()
    most = _programs(groups)
    programs = min(most, cdiv(slots, PART))
    y_BTHV = v.new_empty(batch, new, heads, value_dim)
    part_y = v.new_empty(batch, programs, new, heads, value_dim, dtype=torch.float32)
    top, total = (part_y.new_empty(part_y.shape[:-1]) for _ in range(2))
    block_k, block_v = padded(key_dim), padded(value_dim)
    _parts_kernel[(batch * programs * groups,)](
        q, k, v, k_BSGK, v_BSGV, seen_B.contiguous(), filled, part_y, top, total,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], slots, new, scale * LOG2_E, 1.0, groups, programs,
        GROUP=heads // groups, K=key_dim, V=value_dim, PART=PART, BLOCK_K=block_k, BLOCK_V=block_v,
        BLOCK_M=padded(new * heads // groups), BLOCK_T=padded(new), **_config(q.dtype, max(block_k, block_v)),
        **overlapped(q.device),
    )  # fmt: skip
    _join_kernel[(batch * new * heads,)](
        part_y, top, total, filled, y_BTHV, slots, new * heads, programs,
        V=value_dim, PART=PART, BLOCK_P=most, BLOCK_V=block_v, **overlapped(q.device),
    )  # fmt: skip
    return y_BTHV


@torch.library.custom_op("holdall::reserved_attention", mutates_args=())
def _step(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seen_B: Tensor,
    filled_B: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and the slots with what is new in a copy."""
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k_BSGK, v_BSGV))
    return _launch(q_BTHK, k_BTGK, v_BTGV, k, v, seen_B, filled_B, scale), k, v


@_step.register_fake
def _(q_BTHK, k_BTGK, v_BTGV, k_BSGK, v_BSGV, seen_B, filled_B, scale):
    slots = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k_BSGK, v_BSGV))
    return v_BTGV.new_empty(*q_BTHK.shape[:3], v_BTGV.shape[-1]), *slots


register_batch_vmap(_step)


@torch.library.custom_op("holdall::reserved_attention_inplace", mutates_args=("k_BSGK", "v_BSGV"))
def _step_inplace(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seen_B: Tensor,
    filled_B: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    return _launch(q_BTHK, k_BTGK, v_BTGV, k_BSGK, v_BSGV, seen_B, filled_B, scale)


@_step_inplace.register_fake
def _(q_BTHK, k_BTGK, v_BTGV, k_BSGK, v_BSGV, seen_B, filled_B, scale):
    return v_BTGV.new_empty(*q_BTHK.shape[:3], v_BTGV.shape[-1])


# --------------------------------------------------------------------------------------------- the function


def reserved_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    seen_B: Tensor,
    filled_B: Tensor,
    *,
    scale: float,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`holdall.ops.attention.reserved_attention` on a GPU: same arguments, same results.

    Up to 8 tokens without gradients are two launches. Longer pieces, which have work enough for PyTorch's own
    attention, and training are the plain form.

    Raises:
        KernelError: no kernel can run on these tensors, or with heads of this size.
    """
    tensors = q_BTHK, k_BTHK, v_BTHV, k_BSHK, v_BSHV
    forms.require_kernel(*tensors)
    new, heads = q_BTHK.shape[1:3]
    if why := attention.kernel_refusal(max(k_BTHK.shape[-1], v_BTHV.shape[-1])):
        raise forms.KernelError(why)
    if (
        new > MAX_NEW
        or new > k_BSHK.shape[1]
        or new * heads > MAX_QUERIES * k_BTHK.shape[2]
        or len({tensor.dtype for tensor in tensors}) > 1
        or wants_gradient(*tensors)
    ):
        return attention.reserved_attention(*tensors, seen_B, filled_B, scale=scale, inplace=inplace)
    if inplace and k_BSHK.is_contiguous() and v_BSHV.is_contiguous():
        return _step_inplace(*tensors, seen_B, filled_B, scale), k_BSHK, v_BSHV
    return _step(*tensors, seen_B, filled_B, scale)
