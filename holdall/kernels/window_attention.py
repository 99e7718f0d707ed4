"""Sliding-window attention that computes only the band, and a decode step on the ring buffer.

    s_tj = scale q_t . k_j,  t - w < j <= t
    L_t = log sum_j exp(s_tj)        y_t = sum_j exp(s_tj - L_t) v_j

Forward (the algorithm of FlashAttention-2, Dao 2023, arXiv 2307.08691): a block of queries loops over the
blocks of keys from its first query's window on, w - 1 + block in all, with a running maximum and sum; L_t is
stored for the backward. The tokens of the incoming ring buffer have positions -(w - 1) .. -1, and are read
from slots (seen + position) mod S, where S is w - 1 or more, if a row has filled them; the new ones have
positions 0 .. T - 1.

Backward, with p_tj = exp(s_tj - L_t) recomputed:

    dv_j = sum_t p_tj dy_t        ds_tj = p_tj (dy_t . v_j - D_t),  D_t = dy_t . y_t
    dq_t = scale sum_j ds_tj k_j                          dk_j = scale sum_t ds_tj q_t

One program has block i of the queries and block i of the keys: first it sums dq over the keys in its queries'
windows, then dk and dv over the queries whose windows contain its keys, j .. j + w - 1, of all heads that
share them. So there are no sums across programs, results are deterministic, and neighbouring programs read
the same tiles at about the same time, from the L2 cache. Blocks of the ring buffer have separate programs.

Memory traffic: forward 2 K + 2 V elements per token and head, q, k, v and y, and backward twice that, q, k,
v, y, dy (and L) in, dq, dk and dv out; operations 2 (K + V) min(w, T) per token and head, and backward 2.5
times that. In bf16 with head dimension 128 and rows of 256 tokens, that is 1 KiB and at most 66 kFLOP per
token: 0.34 ns at 3 TB/s, 0.1 ns at 680 TFLOP/s. Short rows are memory-bound; windows from about 900 on are
compute-bound.

PyTorch's flex attention, compiled with the band as its mask, cannot be used here, since it has no rule for
vmap. It also took 0.24 ms forward and 0.42 ms backward for 1024 rows of 256 tokens, one head of 128 and
window 65, where this kernel takes 0.10 ms and 0.36 ms, and memory traffic alone 0.09 ms and 0.18 ms (one
H100, torch 2.11).

A decode step reads the ring buffer once, 2 (w - 1) K elements per row and head of keys, and computes next to
nothing. In place it writes one slot, otherwise the whole next ring buffer.

Letters: B row, T new tokens, S slots, H heads (of queries; G of keys and values), K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import cdiv, dense_last, overlapped, padded, register_batch_vmap, wants_gradient
from holdall.kernels.language import (
    attend_block,
    dot,
    load_rows,
    narrow,
    plus_product,
    store_rows,
    wait_for_inputs,
)
from holdall.ops.attention import KeyValueCache, empty_cache
from holdall.ops.derivatives import once_differentiable
from holdall.ops.window_attention import narrowed, next_ring

MAX_HEAD_DIM = 128
"""Largest head dimension for which blocks of queries, keys and values fit into shared memory."""

LOG2_E = 1.4426950408889634


# ---------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["T", "window", "slots", "H", "G"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, ring_k_ptr, ring_v_ptr, seen_ptr, y_ptr, log_ptr,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g,
    T, window, slots, scale, one, H, G,
    K: tl.constexpr, V: tl.constexpr, HAS_RING: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_T)
    row_head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_T
    b = (row_head // H).to(tl.int64)
    h = row_head % H
    g = h // (H // G)
    back = window - 1
    t = first + tl.arange(0, BLOCK_T)
    q = load_rows(q_ptr + b * q_b + h * q_h, t.to(tl.int64) * q_t, t < T, K, BLOCK_K)
    # finite, to avoid infinity minus infinity for a query without any key in a block
    top = tl.full((BLOCK_T,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)

    if HAS_RING:
        seen = tl.load(seen_ptr + b)
        total += tl.where(seen < 0, float("nan"), 0.0)  # a row that gave back more than it had
        seen = tl.maximum(seen, 0)
        newest = (seen % slots).to(tl.int32)
        oldest = -tl.minimum(seen, back).to(tl.int32)
        for start in range(tl.maximum(first - back, oldest), 0, BLOCK_S):
            j = start + tl.arange(0, BLOCK_S)
            slot = ((b * slots + (newest + slots + j) % slots) * G + g).to(tl.int64)
            k = load_rows(ring_k_ptr, slot * K, j < 0, K, BLOCK_K)
            v = load_rows(ring_v_ptr, slot * V, j < 0, V, BLOCK_V)
            visible = (j < 0)[None, :] & (j[None, :] > t[:, None] - window)
            top, total, acc = attend_block(q, k, v, visible, scale, top, total, acc, one)

    for start in range(tl.maximum(first - back, 0), tl.minimum(first + BLOCK_T, T), BLOCK_S):
        j = start + tl.arange(0, BLOCK_S)
        k = load_rows(k_ptr + b * k_b + g * k_g, j.to(tl.int64) * k_t, j < T, K, BLOCK_K)
        v = load_rows(v_ptr + b * v_b + g * v_g, j.to(tl.int64) * v_t, j < T, V, BLOCK_V)
        visible = (j[None, :] <= t[:, None]) & (j[None, :] > t[:, None] - window)
        top, total, acc = attend_block(q, k, v, visible, scale, top, total, acc, one)

    row = (b * T + t) * H + h
    store_rows(y_ptr, row * V, t < T, acc * (1.0 / total)[:, None], V, BLOCK_V)
    tl.store(log_ptr + row, top + tl.log2(total), mask=t < T)


@triton.jit
def _grad_queries(dq, q, dy, log, mean, k, v, visible, scale, one):
    """Contribution of one block of keys to the gradient of the queries."""
    score = dot(q, tl.trans(k)) * scale
    p = tl.exp2(tl.where(visible, score - log[:, None], float("-inf")))
    ds = p * (dot(dy, tl.trans(v)) - mean[:, None])
    return plus_product(dq, narrow(ds, k.dtype), k, one)


@triton.jit
def _grad_keys(
    k, v, j, q_ptr, dy_ptr, y_ptr, log_ptr, b, g, q_t, q_h, first, last, T, window, scale, one,
    H, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values at positions j, from the queries first .. last - 1.

    Queries beyond the last and the gradients of their outputs are zero, and contribute nothing.
    """
    dk = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    for n in range(GROUP):
        h = g * GROUP + n
        for start in range(first, last, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            row = (b * T + t) * H + h
            q = load_rows(q_ptr + h * q_h, t.to(tl.int64) * q_t, t < T, K, BLOCK_K)
            dy = load_rows(dy_ptr, row * V, t < T, V, BLOCK_V)
            y = load_rows(y_ptr, row * V, t < T, V, BLOCK_V)
            mean = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
            log = tl.load(log_ptr + row, mask=t < T, other=0.0)
            visible = (t[None, :] >= j[:, None]) & (t[None, :] < j[:, None] + window)
            score = dot(k, tl.trans(q)) * scale
            p = tl.exp2(tl.where(visible, score - log[None, :], float("-inf")))
            dv = plus_product(dv, narrow(p, dy.dtype), dy, one)
            ds = p * (dot(v, tl.trans(dy)) - mean[None, :])
            dk = plus_product(dk, narrow(ds, q.dtype), q, one)
    return dk, dv


@triton.jit(do_not_specialize=["T", "window", "G"])
def _backward_kernel(
    dy_ptr, q_ptr, k_ptr, v_ptr, ring_k_ptr, ring_v_ptr, seen_ptr, y_ptr, log_ptr,
    dq_ptr, dk_ptr, dv_ptr, dring_k_ptr, dring_v_ptr,
    q_b, q_t, q_h, k_b, k_t, k_g, v_b, v_t, v_g,
    T, window, scale, weight, one, G,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_RING: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    H = G * GROUP
    back = window - 1
    blocks = tl.cdiv(T, BLOCK_S)
    ring_blocks = 0
    if HAS_RING:
        ring_blocks = tl.cdiv(back, BLOCK_S)
    row_head = tl.program_id(0) // (blocks + ring_blocks)
    block = tl.program_id(0) % (blocks + ring_blocks)
    b = (row_head // G).to(tl.int64)
    g = row_head % G
    q_ptr += b * q_b
    newest, oldest = 0, 0
    if HAS_RING:
        seen = tl.load(seen_ptr + b)
        newest = (seen % back).to(tl.int32)
        oldest = -tl.minimum(seen, back).to(tl.int32)

    if block < blocks:
        begin = block * BLOCK_S
        for n in range(GROUP):
            h = g * GROUP + n
            for first in range(begin, tl.minimum(begin + BLOCK_S, T), BLOCK_T):
                t = first + tl.arange(0, BLOCK_T)
                row = (b * T + t) * H + h
                q = load_rows(q_ptr + h * q_h, t.to(tl.int64) * q_t, t < T, K, BLOCK_K)
                dy = load_rows(dy_ptr, row * V, t < T, V, BLOCK_V)
                y = load_rows(y_ptr, row * V, t < T, V, BLOCK_V)
                mean = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
                log = tl.load(log_ptr + row, mask=t < T, other=0.0)
                dq = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
                if HAS_RING:
                    for start in range(tl.maximum(first - back, oldest), 0, BLOCK_S):
                        j = start + tl.arange(0, BLOCK_S)
                        slot = ((b * back + (newest + back + j) % back) * G + g).to(tl.int64)
                        k = load_rows(ring_k_ptr, slot * K, j < 0, K, BLOCK_K)
                        v = load_rows(ring_v_ptr, slot * V, j < 0, V, BLOCK_V)
                        visible = (j < 0)[None, :] & (j[None, :] > t[:, None] - window)
                        dq = _grad_queries(dq, q, dy, log, mean, k, v, visible, scale, one)
                for start in range(tl.maximum(first - back, 0), tl.minimum(first + BLOCK_T, T), BLOCK_S):
                    j = start + tl.arange(0, BLOCK_S)
                    k = load_rows(k_ptr + b * k_b + g * k_g, j.to(tl.int64) * k_t, j < T, K, BLOCK_K)
                    v = load_rows(v_ptr + b * v_b + g * v_g, j.to(tl.int64) * v_t, j < T, V, BLOCK_V)
                    visible = (j[None, :] <= t[:, None]) & (j[None, :] > t[:, None] - window)
                    dq = _grad_queries(dq, q, dy, log, mean, k, v, visible, scale, one)
                store_rows(dq_ptr, row * K, t < T, dq * weight, K, BLOCK_K)

        j = begin + tl.arange(0, BLOCK_S)
        k = load_rows(k_ptr + b * k_b + g * k_g, j.to(tl.int64) * k_t, j < T, K, BLOCK_K)
        v = load_rows(v_ptr + b * v_b + g * v_g, j.to(tl.int64) * v_t, j < T, V, BLOCK_V)
        dk, dv = _grad_keys(
            k, v, j, q_ptr, dy_ptr, y_ptr, log_ptr, b, g, q_t, q_h,
            begin, tl.minimum(begin + BLOCK_S + back, T), T, window, scale, one,
            H, GROUP, K, V, BLOCK_K, BLOCK_V, BLOCK_T, BLOCK_S,
        )  # fmt: skip
        row = (b * T + j) * G + g
        store_rows(dk_ptr, row * K, j < T, dk * weight, K, BLOCK_K)
        store_rows(dv_ptr, row * V, j < T, dv, V, BLOCK_V)

    if HAS_RING:  # noqa: SIM102 - this one is decided when the kernel is compiled
        if block >= blocks:
            begin = (block - blocks) * BLOCK_S - back
            j = begin + tl.arange(0, BLOCK_S)
            slot = ((b * back + (newest + back + j) % back) * G + g).to(tl.int64)
            # unfilled slots may hold anything
            filled = (j < 0) & (j >= oldest)
            k = load_rows(ring_k_ptr, slot * K, filled, K, BLOCK_K)
            v = load_rows(ring_v_ptr, slot * V, filled, V, BLOCK_V)
            dk, dv = _grad_keys(
                k, v, j, q_ptr, dy_ptr, y_ptr, log_ptr, b, g, q_t, q_h,
                0, tl.minimum(tl.minimum(begin + BLOCK_S, 0) + back, T), T, window, scale, one,
                H, GROUP, K, V, BLOCK_K, BLOCK_V, BLOCK_T, BLOCK_S,
            )  # fmt: skip
            dk, dv = tl.where(filled[:, None], dk * weight, 0.0), tl.where(filled[:, None], dv, 0.0)
            store_rows(dring_k_ptr, slot * K, j < 0, dk, K, BLOCK_K)
            store_rows(dring_v_ptr, slot * V, j < 0, dv, V, BLOCK_V)


@triton.jit(do_not_specialize=["slots", "window", "H", "G"])
def _step_kernel(
    q_ptr, k_ptr, v_ptr, ring_k_ptr, ring_v_ptr, seen_ptr, y_ptr, next_k_ptr, next_v_ptr, next_seen_ptr,
    q_b, q_h, k_b, k_g, v_b, v_g,
    slots, window, scale, H, G,
    K: tl.constexpr, V: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """One program per row and head of keys, which alone accesses its part of the ring buffer."""
    wait_for_inputs(OVERLAPPED)
    b = (tl.program_id(0) // G).to(tl.int64)
    g = tl.program_id(0) % G
    count = tl.load(seen_ptr + b)
    seen = tl.maximum(count, 0)
    own = (seen % slots).to(tl.int32)
    filled = tl.minimum(seen, slots).to(tl.int32)
    visible = tl.minimum(seen, window - 1).to(tl.int32)
    dk, dv = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_own = tl.load(k_ptr + b * k_b + g * k_g + dk, mask=dk < K, other=0.0)
    v_own = tl.load(v_ptr + b * v_b + g * v_g + dv, mask=dv < V, other=0.0)
    head = tl.arange(0, BLOCK_H)
    used = head < H // G
    head = tl.where(used, g * (H // G) + head, 0)
    q = load_rows(q_ptr + b * q_b, head * q_h, used, K, BLOCK_K)
    # the first key is the token's own
    top = tl.sum(q.to(tl.float32) * k_own.to(tl.float32)[None, :], 1) * scale
    # of a row that gave back more than it had all outputs are NaN
    total = tl.full((BLOCK_H,), 1.0, tl.float32) + tl.where(count < 0, float("nan"), 0.0)
    acc = tl.zeros((BLOCK_H, BLOCK_V), tl.float32) + v_own.to(tl.float32)[None, :]

    last = slots
    if INPLACE:
        last = filled
    for start in tl.range(0, last, BLOCK_S, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_S)
        row = (b * slots + slot) * G + g
        k = load_rows(ring_k_ptr, row * K, slot < slots, K, BLOCK_K)
        v = load_rows(ring_v_ptr, row * V, slot < slots, V, BLOCK_V)
        # scores of all heads per slot, (S, H): with a single head in the layout of the key and value tiles
        if BLOCK_H == 1:
            score = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1)[:, None] * scale
        else:
            score = dot(k, tl.trans(q)) * scale
        # a slot's token is in the window if it is one of the last; there may be more slots than those
        near = (slot < slots) & ((own - 1 - slot + slots + slots) % slots < visible)
        score = tl.where(near[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        p = tl.exp2(score - higher[None, :])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 0)
        # unfilled slots may hold anything, even NaN, which a zero probability would not remove
        seen_v = tl.where(near[:, None], v, 0.0)
        if BLOCK_H == 1:
            acc = acc * shrink[:, None] + tl.sum(p * seen_v.to(tl.float32), 0)[None, :]
        else:
            acc = dot(tl.trans(narrow(p, v.dtype)), seen_v, acc * shrink[:, None])
        top = higher
        if not INPLACE:
            mine = (slot == own)[:, None]
            store_rows(next_k_ptr, row * K, slot < slots, tl.where(mine, k_own[None, :], k), K, BLOCK_K)
            store_rows(next_v_ptr, row * V, slot < slots, tl.where(mine, v_own[None, :], v), V, BLOCK_V)

    store_rows(y_ptr, (b * H + head) * V, used, acc / total[:, None], V, BLOCK_V)
    if INPLACE:
        # the new token replaces the one that leaves the window, which all threads have read before
        tl.debug_barrier()
        row = (b * slots + own) * G + g
        tl.store(next_k_ptr + row * K + dk, k_own, mask=dk < K)
        tl.store(next_v_ptr + row * V + dv, v_own, mask=dv < V)
    if g == 0:
        tl.store(next_seen_ptr + b, count + 1)


# --------------------------------------------------------------------------------------------- the launches


def _forward_config(dtype: torch.dtype, dim: int) -> dict[str, int]:
    if dtype == torch.float32:
        return _single_config(dim)
    return {"BLOCK_T": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 1 if dim > 64 else 3}


def _backward_config(dtype: torch.dtype, dim: int) -> dict[str, int]:
    if dtype == torch.float32:
        return _single_config(dim)
    return {"BLOCK_T": 32 if dim > 64 else 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 2}


def _single_config(dim: int) -> dict[str, int]:
    """The configuration in fp32, whose products have operands in registers, so that blocks are smaller."""
    block = 32 if dim <= 64 else 16
    return {"BLOCK_T": block, "BLOCK_S": block, "num_warps": 8, "num_stages": 1}


def _step_config(dtype: torch.dtype, programs: int, group: int) -> dict[str, int]:
    """Few warps if there are many programs, else many. Heads that share keys are a product of tiles."""
    if group > 1:
        return {"BLOCK_S": 16 if dtype == torch.float32 else 32, "STAGES": 2, "num_warps": 4}
    if programs < 512:
        return {"BLOCK_S": 64, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_S": 16, "STAGES": 3, "num_warps": 1}


def _sizes(k_BTGK: Tensor, v_BTGV: Tensor, ring_k_BSGK: Tensor) -> dict[str, Any]:
    """The constants of a launch that come from the shapes."""
    key_dim, value_dim = k_BTGK.shape[-1], v_BTGV.shape[-1]
    return {
        "K": key_dim,
        "V": value_dim,
        "HAS_RING": ring_k_BSGK.shape[1] > 0,
        "BLOCK_K": padded(key_dim),
        "BLOCK_V": padded(value_dim),
    }


@torch.library.custom_op("holdall::window_attention_forward", mutates_args=())
def _forward(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, ring_k_BSGK: Tensor, ring_v_BSGV: Tensor, seen_B: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and L in base 2; a ring buffer without slots means that nothing was read yet."""
    batch, new, heads, _ = q_BTHK.shape
    q, k, v = map(dense_last, (q_BTHK, k_BTGK, v_BTGV))
    y_BTHV = v.new_empty(batch, new, heads, v.shape[-1])
    log_BTH = v.new_empty(batch, new, heads, dtype=torch.float32)
    sizes = _sizes(k, v, ring_k_BSGK)
    config = _forward_config(q.dtype, max(sizes["BLOCK_K"], sizes["BLOCK_V"]))
    _forward_kernel[(batch * heads * cdiv(new, config["BLOCK_T"]),)](
        q, k, v, ring_k_BSGK.contiguous(), ring_v_BSGV.contiguous(), seen_B.contiguous(), y_BTHV, log_BTH,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], new, window, ring_k_BSGK.shape[1], scale * LOG2_E,
        1.0, heads, k.shape[2], **sizes, **config,
    )  # fmt: skip
    return y_BTHV, log_BTH


@_forward.register_fake
def _(q_BTHK, k_BTGK, v_BTGV, ring_k_BSGK, ring_v_BSGV, seen_B, window, scale):
    sizes = q_BTHK.shape[:3]
    return v_BTGV.new_empty(*sizes, v_BTGV.shape[-1]), v_BTGV.new_empty(sizes, dtype=torch.float32)


@once_differentiable()
@torch.library.custom_op("holdall::window_attention_backward", mutates_args=())
def _backward(
    dy_BTHV: Tensor, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, ring_k_BSGK: Tensor, ring_v_BSGV: Tensor,
    seen_B: Tensor, y_BTHV: Tensor, log_BTH: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, new, heads, _ = q_BTHK.shape
    q, k, v = map(dense_last, (q_BTHK, k_BTGK, v_BTGV))
    ring_k, ring_v = ring_k_BSGK.contiguous(), ring_v_BSGV.contiguous()
    grads = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, ring_k, ring_v)
    )
    sizes = _sizes(k, v, ring_k)
    config = _backward_config(q.dtype, max(sizes["BLOCK_K"], sizes["BLOCK_V"]))
    blocks = cdiv(new, config["BLOCK_S"]) + cdiv(ring_k.shape[1], config["BLOCK_S"])
    _backward_kernel[(batch * k.shape[2] * blocks,)](
        dy_BTHV.contiguous(), q, k, v, ring_k, ring_v, seen_B.contiguous(), y_BTHV, log_BTH, *grads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], new, window, scale * LOG2_E, scale, 1.0,
        k.shape[2], GROUP=heads // k.shape[2], **sizes, **config,
    )  # fmt: skip
    return grads  # type: ignore[return-value]


@_backward.register_fake
def _(dy_BTHV, q_BTHK, k_BTGK, v_BTGV, ring_k_BSGK, ring_v_BSGV, seen_B, y_BTHV, log_BTH, window, scale):
    inputs = q_BTHK, k_BTGK, v_BTGV, ring_k_BSGK, ring_v_BSGV
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, dy_BTHV: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dring_k, dring_v = _backward(dy_BTHV, *ctx.saved_tensors, ctx.window, ctx.scale)
    return dq, dk, dv, dring_k, dring_v, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


def _launch_step(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1GV: Tensor, ring_k: Tensor, ring_v: Tensor, seen_B: Tensor,
    next_k: Tensor, next_v: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y and the next token count; writes the next ring to the given tensors, maybe the ring's."""
    batch, _, heads, _ = q_B1HK.shape
    q, k, v = map(dense_last, (q_B1HK, k_B1GK, v_B1GV))
    y_B1HV, next_seen_B = v.new_empty(batch, 1, heads, v.shape[-1]), torch.empty_like(seen_B)
    sizes = _sizes(k, v, ring_k)
    del sizes["HAS_RING"]
    group = heads // k.shape[2]
    programs, slots = batch * k.shape[2], ring_k.shape[1]
    _step_kernel[(programs,)](
        q, k, v, ring_k, ring_v, seen_B.contiguous(), y_B1HV, next_k, next_v, next_seen_B,
        q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2), slots, window,
        scale * LOG2_E, heads, k.shape[2], **sizes, INPLACE=ring_k is next_k,
        BLOCK_H=1 if group == 1 else padded(group), **_step_config(q.dtype, programs, group),
        **overlapped(q.device),
    )  # fmt: skip
    return y_B1HV, next_seen_B


@torch.library.custom_op("holdall::window_attention_step", mutates_args=())
def _step(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1GV: Tensor, ring_k_BSGK: Tensor, ring_v_BSGV: Tensor, seen_B: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ring_k, ring_v = ring_k_BSGK.contiguous(), ring_v_BSGV.contiguous()
    next_k, next_v = torch.empty_like(ring_k), torch.empty_like(ring_v)
    y_B1HV, next_seen_B = _launch_step(
        q_B1HK, k_B1GK, v_B1GV, ring_k, ring_v, seen_B, next_k, next_v, window, scale
    )
    return y_B1HV, next_k, next_v, next_seen_B


@_step.register_fake
def _(q_B1HK, k_B1GK, v_B1GV, ring_k_BSGK, ring_v_BSGV, seen_B, window, scale):
    rings = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (ring_k_BSGK, ring_v_BSGV))
    return v_B1GV.new_empty(*q_B1HK.shape[:3], v_B1GV.shape[-1]), *rings, torch.empty_like(seen_B)


register_batch_vmap(_step)


@torch.library.custom_op(
    "holdall::window_attention_step_inplace", mutates_args=("ring_k_BSGK", "ring_v_BSGV")
)
def _step_inplace(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1GV: Tensor, ring_k_BSGK: Tensor, ring_v_BSGV: Tensor, seen_B: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_step(
        q_B1HK, k_B1GK, v_B1GV, ring_k_BSGK, ring_v_BSGV, seen_B, ring_k_BSGK, ring_v_BSGV, window, scale
    )


@_step_inplace.register_fake
def _(q_B1HK, k_B1GK, v_B1GV, ring_k_BSGK, ring_v_BSGV, seen_B, window, scale):
    return v_B1GV.new_empty(*q_B1HK.shape[:3], v_B1GV.shape[-1]), torch.empty_like(seen_B)


# --------------------------------------------------------------------------------------------- the function


def kernel_refusal(head_dim: int) -> str:
    """Why there is no kernel for heads of this size; empty if there is one."""
    if head_dim > MAX_HEAD_DIM:
        return f"the kernel takes heads of at most {MAX_HEAD_DIM} dimensions, not {head_dim}"
    return ""


def window_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    cache: KeyValueCache | None,
    *,
    window: int,
    scale: float,
    inplace: bool = False,
    want_state: bool = True,
) -> tuple[Tensor, KeyValueCache | None]:
    """`holdall.ops.window_attention` on a GPU: same arguments, same results.

    One token after a cache, without gradients, is one launch. In place it writes into the ring buffer;
    `seen_B` is always new. Under autocast it computes in autocast's dtype, like PyTorch's own attention.

    Raises:
        KernelError: no kernel can run on these tensors, or with heads of this size.
    """
    forms.require_kernel(q_BTHK, k_BTHK, v_BTHV)
    batch, new, groups, key_dim = k_BTHK.shape
    if why := kernel_refusal(max(key_dim, v_BTHV.shape[-1])):
        raise forms.KernelError(why)
    if torch.is_autocast_enabled(q_BTHK.device.type):
        dtype = torch.get_autocast_dtype(q_BTHK.device.type)
    else:
        dtype = q_BTHK.dtype
    q, k, v = q_BTHK.to(dtype), k_BTHK.to(dtype), v_BTHV.to(dtype)
    if (
        cache
        and new == 1
        and want_state
        and cache.k_BSHK.dtype == dtype
        and not wants_gradient(q, k, v, *cache)
    ):
        if inplace and cache.k_BSHK.is_contiguous() and cache.v_BSHV.is_contiguous():
            y_B1HV, seen_B = _step_inplace(q, k, v, *cache, window, scale)
            return y_B1HV, KeyValueCache(cache.k_BSHK, cache.v_BSHV, seen_B)
        y_B1HV, *after = _step(q, k, v, *cache, window, scale)
        return y_B1HV, KeyValueCache(*after)
    if cache:
        ring = KeyValueCache(cache.k_BSHK.to(dtype), cache.v_BSHV.to(dtype), cache.seen_B)
        if cache.k_BSHK.shape[1] > window - 1 and wants_gradient(q, k, v, *cache):
            ring = narrowed(ring, window - 1)  # the backward knows rings of a window only
    else:
        ring = empty_cache(batch, 0, groups, key_dim, v.shape[-1], dtype=dtype, device=v.device)
    y_BTHV, _ = _forward(q, k, v, *ring, window, scale)
    return y_BTHV, next_ring(cache, k_BTHK, v_BTHV, window=window, inplace=inplace) if want_state else None
