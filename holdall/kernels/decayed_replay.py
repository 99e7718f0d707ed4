"""One token of a decayed sum or delta rule with a ring: the state is read, and written in rows that are full.

    y = (w q) S + sum_i (q . w_i k_i) u_i + (q . k) u       u = v, or
                                                            u = beta (v - (w k) S - sum_i (k . w_i k_i) u_i)

over the ring's tokens, where w and w_i are the decays of S and of a token until now, one per head or per key
dimension, or none. See holdall/ops/replay.py for when S is written.

One program handles some columns of S of one head of a row, whose u and y need no other columns: it loads them
once, for q and k both. Whether that row's ring is full is one number for the program, so both ways are
branches: if it is, the oldest half is added token by token, as the definition does, and the columns are
stored. Counts, and ring slots of keys and decays, are written by one of the programs that read them, into
memory that none of them looks at. So a step can be recorded in a CUDA graph.

Bytes of a row and head, S in fp32, keys and values in bf16, decays and what a delta rule writes in fp32: S is
read, 4 K V, and as many are written in one step of L. Of the ring, 1.5 L tokens of 2 K + 2 V + 4 X are moved
on average, with 4 V for a delta rule; of keys that heads share, each has its part.

    Mamba-2, K 128, V 64, X 1, 64 heads to a key, L 16            32.8 + 2.0 +  3.3 KB of 65.5: 0.58
    Gated DeltaNet, K 128, V 128, X 1, 2 heads to a key, L 16     65.5 + 4.1 + 15.8 KB of 131:  0.65

of what a step moves that writes S each time. At 3.02 TB/s 128 rows of 64 such heads of Mamba-2 take 0.10 ms.
Operations: 2 K V per row and head and as many again for a delta rule, 2 (K + V) for each token in the ring.

Letters: B row, S slots of the ring, L tokens of half a ring, H heads, G groups of heads that share keys, K
key dim, V value dim, X log decays of a head and token.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import dense_last, register_batch_vmap
from holdall.kernels.language import exp, narrow

S = TypeVar("S", bound=Any)
MAX_KEY_DIM = 256
"""Most key dimensions for which columns of a state and the keys of a ring fit into registers."""


def kernel_refusal(key_dim: int) -> str:
    """Why the step has no kernel for such heads; empty if it has."""
    if key_dim <= MAX_KEY_DIM:
        return ""
    return f"the step with a ring takes at most {MAX_KEY_DIM} key dimensions, not {key_dim}"


@triton.jit
def _decay(log):
    """e^log, 0 of what is below the smallest number."""
    return exp(tl.maximum(log, -200.0), True)


@triton.jit(do_not_specialize=["H", "SHARED"])
def _step_kernel(
    q_ptr, k_ptr, v_ptr, log_ptr, beta_ptr, s_ptr, ring_k_ptr, ring_v_ptr, ring_log_ptr, seen_ptr, summed_ptr,
    y_ptr, next_seen_ptr, next_summed_ptr, q_b, q_h, k_b, k_h, v_b, v_h, H, SHARED,
    K: tl.constexpr, V: tl.constexpr, X: tl.constexpr, HALF: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    SLOTS: tl.constexpr = 2 * HALF
    CORRECTS: tl.constexpr = beta_ptr is not None
    row_head = tl.program_id(0).to(tl.int64)
    b, h = row_head // H, row_head % H
    groups, group = H // SHARED, h // SHARED
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + group * k_h
    v_ptr += b * v_b + h * v_h
    s_ptr += row_head * K * V
    ring_k_ptr += (b * SLOTS * groups + group) * K
    ring_v_ptr += (b * SLOTS * H + h) * V
    ring_log_ptr += (b * SLOTS * H + h) * X
    k_step, v_step, log_step = groups * K, H * V, H * X

    seen, summed = tl.load(seen_ptr + b), tl.load(summed_ptr + b)
    live = seen - summed
    full = live + 1 == SLOTS
    first = tl.where(full, HALF, 0)
    n, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_here, v_here = c < K, d < V
    at = c[:, None] * V + d[None, :]
    s_KV = tl.load(s_ptr + at, mask=k_here[:, None] & v_here[None, :], other=0.0).to(tl.float32)
    if full:
        for token in range(HALF):
            slot = (summed + token) % SLOTS
            if X == 1:
                s_KV *= _decay(tl.load(ring_log_ptr + slot * log_step))
            elif X > 1:
                s_KV *= _decay(tl.load(ring_log_ptr + slot * log_step + c, mask=k_here, other=0.0))[:, None]
            k_K = tl.load(ring_k_ptr + slot * k_step + c, mask=k_here, other=0.0).to(tl.float32)
            v_V = tl.load(ring_v_ptr + slot * v_step + d, mask=v_here, other=0.0).to(tl.float32)
            s_KV += k_K[:, None] * v_V[None, :]
        # a thread may read what another one stores: all must have read before the first writes
        tl.debug_barrier()
        narrow_s = narrow(s_KV, s_ptr.dtype.element_ty)
        tl.store(s_ptr + at, narrow_s, mask=k_here[:, None] & v_here[None, :])

    # the ring's tokens that the sums do not have, oldest first, and the new one, which has no slot yet
    slot_S = (summed + n) % SLOTS
    live_S = (n >= first) & (n < live)
    k_SK = tl.load(
        ring_k_ptr + slot_S[:, None] * k_step + c[None, :], mask=live_S[:, None] & k_here[None, :], other=0.0
    ).to(tl.float32)
    v_SV = tl.load(
        ring_v_ptr + slot_S[:, None] * v_step + d[None, :], mask=live_S[:, None] & v_here[None, :], other=0.0
    ).to(tl.float32)
    q_K = tl.load(q_ptr + c, mask=k_here, other=0.0).to(tl.float32)
    k_new = tl.load(k_ptr + c, mask=k_here, other=0.0)
    k_K = k_new.to(tl.float32)
    kept_q, kept_k = q_K, k_K
    if X > 0:
        # at n the log decay of the token after it: sums of what lies between, never differences of sums
        later_S = (summed + n + 1) % SLOTS
        between_S = (n >= first) & (n + 1 < live)
        newest_S = (n >= first) & (n + 1 == live)
        oldest_ptr = ring_log_ptr + (summed + first) % SLOTS * log_step
        if X == 1:
            log_new = tl.load(log_ptr + row_head)
            log_S = tl.load(ring_log_ptr + later_S * log_step, mask=between_S, other=0.0)
            log_S = tl.where(newest_S, log_new, log_S)
            whole = tl.where(live > first, tl.load(oldest_ptr), log_new) + tl.sum(log_S, 0)
            kept_q, kept_k = q_K * _decay(whole), k_K * _decay(whole)
            k_SK *= _decay(tl.cumsum(log_S, 0, reverse=True))[:, None]
        else:
            log_new = tl.load(log_ptr + row_head * X + c, mask=k_here, other=0.0)
            log_SK = tl.load(
                ring_log_ptr + later_S[:, None] * log_step + c[None, :],
                mask=between_S[:, None] & k_here[None, :], other=0.0,
            )  # fmt: skip
            log_SK = tl.where(newest_S[:, None], log_new[None, :], log_SK)
            oldest_K = tl.load(oldest_ptr + c, mask=k_here, other=0.0)
            whole = tl.where(live > first, oldest_K, log_new) + tl.sum(log_SK, 0)
            kept_q, kept_k = q_K * _decay(whole), k_K * _decay(whole)
            k_SK *= _decay(tl.cumsum(log_SK, 0, reverse=True))

    v_new = tl.load(v_ptr + d, mask=v_here, other=0.0)
    u_V = v_new.to(tl.float32)
    if CORRECTS:
        held_V = tl.sum(kept_k[:, None] * s_KV, 0) + tl.sum(tl.sum(k_K[None, :] * k_SK, 1)[:, None] * v_SV, 0)
        u_V = tl.load(beta_ptr + row_head).to(tl.float32) * (u_V - held_V)
    f_S = tl.sum(q_K[None, :] * k_SK, 1)
    y_V = tl.sum(kept_q[:, None] * s_KV, 0) + tl.sum(f_S[:, None] * v_SV, 0) + tl.sum(q_K * k_K, 0) * u_V
    tl.store(y_ptr + row_head * V + d, narrow(y_V, y_ptr.dtype.element_ty), mask=v_here)

    # into a slot that was not looked at
    slot = seen % SLOTS
    tl.store(ring_v_ptr + slot * v_step + d, narrow(u_V, ring_v_ptr.dtype.element_ty), mask=v_here)
    if tl.program_id(1) == 0:
        if h % SHARED == 0:
            tl.store(ring_k_ptr + slot * k_step + c, k_new, mask=k_here)
        if X == 1:
            tl.store(ring_log_ptr + slot * log_step, log_new)
        elif X > 1:
            tl.store(ring_log_ptr + slot * log_step + c, log_new, mask=k_here)
        if h == 0:
            tl.store(next_seen_ptr + b, seen + 1)
            tl.store(next_summed_ptr + b, summed + first)


@torch.library.custom_op(
    "holdall::decayed_replay_inplace", mutates_args=("s_BHKV", "k_BSGK", "v_BSHV", "log_BSHX")
)
def _inplace(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1HV: Tensor, log_B1HX: Tensor | None, beta_B1H: Tensor | None,
    s_BHKV: Tensor, k_BSGK: Tensor, v_BSHV: Tensor, log_BSHX: Tensor, seen_B: Tensor, summed_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y and the next counts; all else of the next state is written into the given one."""
    (batch, _, heads, key_dim), value_dim, slots = q_B1HK.shape, v_B1HV.shape[-1], k_BSGK.shape[1]
    q, k, v = (dense_last(x) for x in (q_B1HK, k_B1GK, v_B1HV))
    log, beta = (None if x is None else x.contiguous() for x in (log_B1HX, beta_B1H))
    y_B1HV, next_seen, next_summed = (
        v.new_empty(v.shape),
        torch.empty_like(seen_B),
        torch.empty_like(summed_B),
    )
    strides = (stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2)))
    block = triton.next_power_of_2
    block_v = min(32, max(16, block(value_dim)))
    _step_kernel[(batch * heads, triton.cdiv(value_dim, block_v))](
        q, k, v, log, beta, s_BHKV, k_BSGK, v_BSHV, log_BSHX, seen_B, summed_B,
        y_B1HV, next_seen, next_summed, *strides, heads, heads // k_BSGK.shape[2],
        K=key_dim, V=value_dim, X=log_BSHX.shape[-1], HALF=slots // 2,
        BLOCK_K=max(16, block(key_dim)), BLOCK_V=block_v, BLOCK_S=block(slots), num_warps=4,
    )  # fmt: skip
    return y_B1HV, next_seen, next_summed


@_inplace.register_fake
def _(q_B1HK, k_B1GK, v_B1HV, log_B1HX, beta_B1H, s_BHKV, k_BSGK, v_BSHV, log_BSHX, seen_B, summed_B):
    return v_B1HV.new_empty(v_B1HV.shape), torch.empty_like(seen_B), torch.empty_like(summed_B)


@torch.library.custom_op("holdall::decayed_replay", mutates_args=())
def _step(
    q_B1HK: Tensor, k_B1GK: Tensor, v_B1HV: Tensor, log_B1HX: Tensor | None, beta_B1H: Tensor | None,
    s_BHKV: Tensor, k_BSGK: Tensor, v_BSHV: Tensor, log_BSHX: Tensor, seen_B: Tensor, summed_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and the next state, in a copy."""
    parts = (s_BHKV, k_BSGK, v_BSHV, log_BSHX)
    copies = [x.clone(memory_format=torch.contiguous_format) for x in parts]
    y_B1HV, *counts = _inplace(
        q_B1HK, k_B1GK, v_B1HV, log_B1HX, beta_B1H, *copies, seen_B, summed_B
    )  # fmt: skip
    return y_B1HV, *copies, *counts


@_step.register_fake
def _(q_B1HK, k_B1GK, v_B1HV, log_B1HX, beta_B1H, s_BHKV, k_BSGK, v_BSHV, log_BSHX, seen_B, summed_B):
    state = (s_BHKV, k_BSGK, v_BSHV, log_BSHX, seen_B, summed_B)
    after = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
    return v_B1HV.new_empty(v_B1HV.shape), *after


register_batch_vmap(_step)


def decayed_replay(
    q_B1HK: Tensor,
    k_B1GK: Tensor,
    v_B1HV: Tensor,
    state: S,
    log_decay: Tensor | None,
    beta_B1H: Tensor | None,
    *,
    inplace: bool,
) -> tuple[Tensor, S]:
    """`holdall.kernels.replay.replay_attention` with no map, not normalised; s in fp32 or bf16.

    Raises:
        KernelError: no kernel can run on these tensors, or for this many key dimensions.
    """
    forms.require_kernel(q_B1HK, k_B1GK, v_B1HV, *state[:5])
    if why := kernel_refusal(q_B1HK.shape[-1]):
        raise forms.KernelError(why)
    if len(state) > 7:
        raise forms.KernelError("only with the Taylor map the kernel takes states with exponents")
    s_BHKV, z_BH0, k_BSGK, v_BSHV, log_BSHX, seen_B, summed_B = state
    log_B1HX = None
    if log_decay is not None:
        log_B1HX = (log_decay[..., None] if log_decay.ndim == 3 else log_decay).to(log_BSHX.dtype)
    tensors = (q_B1HK, k_B1GK.to(k_BSGK.dtype), v_B1HV, log_B1HX, beta_B1H)
    ring = (s_BHKV, k_BSGK, v_BSHV, log_BSHX, seen_B, summed_B)
    if inplace and all(tensor.is_contiguous() for tensor in state):
        y_B1HV, *counts = _inplace(*tensors, *ring)
        return y_B1HV, type(state)(*state[:5], *counts)
    y_B1HV, s_BHKV, *after = _step(*tensors, *ring)
    return y_B1HV, type(state)(s_BHKV, z_BH0.clone(), *after)
