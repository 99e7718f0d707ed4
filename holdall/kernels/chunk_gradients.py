"""The part of the delta rule's backward for which flash-linear-attention has no correct kernel on every GPU.

With the chunks' states S and their gradients dS, the rows u that tokens write under their keys and du, the
decays g summed from the chunk's start (base 2, one per head, or none) and G(t, s) = 2^(g_t - g_s) for s <= t,
else 0:

    P_ts = G(t, s) (dy_t . u_s)
    dq_t = 2^g_t S dy_t + sum_s P_ts k_s                dk_s = 2^(g_C - g_s) dS u_s + sum_t P_ts q_t
    dw_t = -S du_t                                      dg_t = dq_t . q_t - dk_t . k_t
    dg_C += 2^g_C sum(S dS) + sum_s 2^(g_C - g_s) (dS u_s) . k_s

Triton 3.4 to 3.7.0 miscompiles the package's kernel for Hopper GPUs if there are decays
(flash-linear-attention#640), and with wide heads it needs more shared memory than there is. Here tiles are
small, and fp32 operands are multiplied in fp32: Triton's products in three passes of tf32 ran as a single
pass on an H100, sometimes with differing results, or read out of bounds.

Memory traffic: q, k, u, dy, du, S and dS once per tile of key dimensions, dq, dk and dw once. Operations per
chunk: 2 C V (C + 3 K) + 4 C^2 K, C = 64.

Letters: B row, T time, N chunks, C time within a chunk, H heads, K key dim, V value dim, J blocks of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.kernels import cdiv
from holdall.kernels.language import dot, narrow


def _tile(size: int, key_dim: int, value_dim: int, decays: bool) -> int:
    """Key and value dimensions per tile: with more, a chunk's sums do not fit into registers; with fewer, the
    products of token pairs are recomputed more often. `size`: bytes per element."""
    return 32 if size == 4 or (max(key_dim, value_dim) <= 64 and not decays) else 64


def chunk_gradients(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    u_BTHV: Tensor,
    dy_BTHV: Tensor,
    du_BTHV: Tensor,
    s_BNHKV: Tensor,
    ds_BNHKV: Tensor,
    sums_BTH: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk and dw in the dtype of q, and the gradient of the cumulative decays, if any, in fp32."""
    (rows, length, heads, key_dim), value_dim = q_BTHK.shape, u_BTHV.shape[3]
    tile = _tile(q_BTHK.element_size(), key_dim, value_dim, sums_BTH is not None)
    block_k, block_v = (min(tile, max(16, triton.next_power_of_2(size))) for size in (key_dim, value_dim))
    blocks, chunks = cdiv(key_dim, block_k), cdiv(length, chunk)
    dq, dk, dw = (torch.empty_like(q_BTHK) for _ in range(3))
    dsums_JBTH = None if sums_BTH is None else sums_BTH.new_empty(blocks, *sums_BTH.shape)
    _kernel[(blocks * chunks * rows * heads,)](
        q_BTHK, k_BTHK, u_BTHV, dy_BTHV, du_BTHV, s_BNHKV, ds_BNHKV, sums_BTH,
        dq, dk, dw, dsums_JBTH, rows, length,
        H=heads, K=key_dim, V=value_dim, C=chunk, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return dq, dk, dw, None if dsums_JBTH is None else dsums_JBTH.sum(0)


@triton.jit(do_not_specialize=["rows", "length"])
def _kernel(
    q_ptr, k_ptr, u_ptr, dy_ptr, du_ptr, s_ptr, ds_ptr, sums_ptr,
    dq_ptr, dk_ptr, dw_ptr, dsums_ptr, rows, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    chunks = tl.cdiv(length, C)
    block = tl.program_id(0) % blocks
    n = tl.program_id(0) // blocks % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    b, h = row // H, row % H
    t, key, value = n * C + tl.arange(0, C), block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    real_t, real_k = t < length, key < K
    token = (b * length + t) * H + h
    state = ((b * chunks + n) * H + h) * K * V
    dtype = q_ptr.dtype.element_ty

    pairs_CC = tl.zeros((C, C), tl.float32)
    dq_CK, dk_CK, dw_CK = (
        tl.zeros((C, BLOCK_K), tl.float32), tl.zeros((C, BLOCK_K), tl.float32),
        tl.zeros((C, BLOCK_K), tl.float32),
    )  # fmt: skip
    to_last = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    for start in range(0, V, BLOCK_V):
        real_v = start + value < V
        at_CV = token[:, None] * V + start + value[None, :]
        at_VK = state + key[None, :] * V + start + value[:, None]
        here_CV, here_VK = real_t[:, None] & real_v[None, :], real_v[:, None] & real_k[None, :]
        u_CV = tl.load(u_ptr + at_CV, mask=here_CV, other=0.0)
        dy_CV = tl.load(dy_ptr + at_CV, mask=here_CV, other=0.0)
        du_CV = tl.load(du_ptr + at_CV, mask=here_CV, other=0.0)
        s_VK = tl.load(s_ptr + at_VK, mask=here_VK, other=0.0)
        ds_VK = tl.load(ds_ptr + at_VK, mask=here_VK, other=0.0)
        if sums_ptr is not None:
            to_last += s_VK.to(tl.float32) * ds_VK.to(tl.float32)
        s_VK, ds_VK = narrow(s_VK.to(tl.float32), dtype), narrow(ds_VK.to(tl.float32), dtype)
        pairs_CC = dot(dy_CV, tl.trans(u_CV), pairs_CC)
        dq_CK = dot(dy_CV, s_VK, dq_CK)
        dk_CK = dot(u_CV, ds_VK, dk_CK)
        dw_CK = dot(du_CV, s_VK, dw_CK)

    at_CK = token[:, None] * K + key[None, :]
    here_CK = real_t[:, None] & real_k[None, :]
    q_CK = tl.load(q_ptr + at_CK, mask=here_CK, other=0.0)
    k_CK = tl.load(k_ptr + at_CK, mask=here_CK, other=0.0)
    pairs_CC = tl.where((t[:, None] >= t[None, :]) & real_t[:, None], pairs_CC, 0.0)
    last = tl.minimum(n * C + C, length) - 1
    if sums_ptr is not None:
        g_C = tl.load(sums_ptr + token, mask=real_t, other=0.0)
        g_last = tl.load(sums_ptr + (b * length + last) * H + h)
        later = (t[:, None] >= t[None, :]) & real_t[:, None]
        pairs_CC *= tl.exp2(tl.where(later, g_C[:, None] - g_C[None, :], 0.0))
        dq_CK *= tl.exp2(g_C)[:, None]
        dk_CK *= tl.where(real_t, tl.exp2(tl.where(real_t, g_last - g_C, 0.0)), 0.0)[:, None]
        dg_last = tl.sum(to_last) * tl.exp2(g_last) + tl.sum(dk_CK * k_CK.to(tl.float32))
    pairs_CC = narrow(pairs_CC, dtype)
    dq_CK += dot(pairs_CC, k_CK)
    dk_CK += dot(tl.trans(pairs_CC), q_CK)
    if sums_ptr is not None:
        dg_C = tl.sum(dq_CK * q_CK.to(tl.float32), 1) - tl.sum(dk_CK * k_CK.to(tl.float32), 1)
        dg_C += tl.where(t == last, dg_last, 0.0)
        tl.store(dsums_ptr + block * rows.to(tl.int64) * length * H + token, dg_C, mask=real_t)
    tl.store(dq_ptr + at_CK, narrow(dq_CK, dtype), mask=here_CK)
    tl.store(dk_ptr + at_CK, narrow(dk_CK, dtype), mask=here_CK)
    tl.store(dw_ptr + at_CK, narrow(-dw_CK, dtype), mask=here_CK)
