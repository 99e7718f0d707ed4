"""One token of Taylor linear attention with a ring: the state is read, and written in rows that are full.

    y = (phi(q) S + sum_i f_i v_i) / (phi(q) . z + sum_i f_i + eps)
    f_i = 1 + s + s^2 / 2,  s = q . k_i / sqrt(K),  over the ring's tokens and the new one

See holdall/ops/replay.py for when S and z are written, and taylor_step.py for the features.

One program handles one head of a row. Whether that row's ring is full is one number for the program, so both
ways are branches, and a row that is not full writes nothing but one slot of its ring. No program reads what
another one writes: counts come back in new tensors. Counts decide nothing but which way a program goes, so a
step can be recorded in a CUDA graph.

S is read: 4 F V bytes per row and head in fp32, and as many are written in one step of L. Of the ring,
1.5 L (K + V) elements are read on average. At K = 16, V = 112, L = 16 and a ring in bf16 these are 68.5, 4.3
and 6.1 KB, 0.58 of the 137 KB of a step that writes S each time. 128 rows of 16 heads are 162 MB, 0.054 ms at
3.02 TB/s. Operations: 2 F V per row and head, and as many for each token that S takes in. With S in fp16 a
row that writes reads S twice, first for its largest entry, which makes its exponent.

Letters: B row, S slots of the ring, L tokens of half a ring, H heads, K key dim, V value dim, F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import overlapped, padded, register_batch_vmap
from holdall.kernels.decayed_replay import decayed_replay, kernel_refusal
from holdall.kernels.language import dot, load_rows, narrow, wait_for_inputs
from holdall.kernels.taylor_step import MAX_KEY_DIM, _config, _feature, _features, _indices
from holdall.ops import replay
from holdall.ops.linear_attention import FEATURE_MAPS, IDENTITY, FeatureMap
from holdall.ops.replay import S, ScaledReplayState

__all__ = ["kernel_refusal", "replay_attention"]
WARPS = 2
"""Of a program: more of them compute the same features again."""
LEAST, TOP = tl.constexpr(replay.LEAST), tl.constexpr(replay.TOP)


@triton.jit
def _score(q_K, k_SK):
    """1 + s + s^2 / 2 of each key, for a q that was divided by sqrt(K)."""
    s = tl.sum(q_K[None, :] * k_SK, 1)
    return 1 + s + 0.5 * s * s


@triton.jit
def _power(exponent):
    """2^exponent, from its bits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(largest):
    """Of sums whose largest entry this is: as in `holdall.ops.replay.as_carried`."""
    above = (largest.to(tl.int32, bitcast=True) >> 23) - 126
    return tl.where(largest == 0, 0, tl.maximum(above - TOP, LEAST))


@triton.jit
def _exact_dot(a, b, acc):
    """a @ b + acc with a in fp32: beside bf16 in three parts of 8 bits each, whose products are exact."""
    if b.dtype == tl.bfloat16:
        high = narrow(a, tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = narrow(rest, tl.bfloat16)
        low = narrow(rest - middle.to(tl.float32), tl.bfloat16)
        acc = dot(low, b, acc)
        acc = dot(middle, b, acc)
        return dot(high, b, acc)
    else:
        return dot(a, b.to(tl.float32), acc)


@triton.jit
def _written(
    s_ptr, old_k_ptr, v_LV, f, d, i, j, weight, power,
    F: tl.constexpr, V: tl.constexpr, K_STEP, HALF: tl.constexpr,
):  # fmt: skip
    """A tile of S with the oldest half of the ring added, whose values are v_LV, zero beyond HALF tokens."""
    mask = (f < F)[:, None] & (d < V)[None, :]
    s = tl.load(s_ptr + f[:, None] * V + d[None, :], mask=mask, other=0.0).to(tl.float32) * power
    token = tl.arange(0, v_LV.shape[0])
    k_ptr = old_k_ptr + (token * K_STEP)[None, :]
    real = (token < HALF)[None, :]
    x_i = tl.load(k_ptr + (i - 1)[:, None], mask=real & (i > 0)[:, None], other=1.0).to(tl.float32)
    x_j = tl.load(k_ptr + (j - 1)[:, None], mask=real & (j > 0)[:, None], other=1.0).to(tl.float32)
    return _exact_dot(weight[:, None] * x_i * x_j, v_LV, s)


@triton.jit(do_not_specialize=["H"])
def _replay_kernel(
    q_ptr, k_ptr, v_ptr, s_ptr, z_ptr, ring_k_ptr, ring_v_ptr, exponent_ptr, seen_ptr, summed_ptr,
    y_ptr, next_seen_ptr, next_summed_ptr, table_ptr, weight_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, scale, eps, H,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HALF: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    SLOTS: tl.constexpr = 2 * HALF
    row_head = tl.program_id(0).to(tl.int64)
    b, h = row_head // H, row_head % H
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    s_ptr += row_head * F * V
    z_ptr += row_head * F
    ring_k_ptr += (b * SLOTS * H + h) * K
    ring_v_ptr += (b * SLOTS * H + h) * V
    seen, summed = tl.load(seen_ptr + b), tl.load(summed_ptr + b)
    full = seen + 1 - summed == SLOTS
    # where the oldest half of the ring begins, which goes into the sums if it is full
    old_k_ptr = ring_k_ptr + summed % SLOTS * H * K
    old_v_ptr = ring_v_ptr + summed % SLOTS * H * V
    since = seen - summed
    if full:
        since -= HALF
    if h == 0:
        tl.store(next_seen_ptr + b, seen + 1)
        tl.store(next_summed_ptr + b, seen - since)

    # the ring's tokens that the sums do not have, and the new one, which has no slot yet: loaded here, used
    # after S has been read
    slot, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    age = (seen - 1 - slot + SLOTS) % SLOTS
    live = (slot < SLOTS) & (age < since)
    q_K = tl.load(q_ptr + c, mask=c < K, other=0.0).to(tl.float32) * scale
    k_K = tl.load(k_ptr + c, mask=c < K, other=0.0)
    k_SK = tl.load(
        ring_k_ptr + slot[:, None] * H * K + c[None, :], mask=live[:, None] & (c < K)[None, :], other=0.0
    )
    f_z = tl.arange(0, BLOCK_F)
    z = tl.load(z_ptr + f_z, mask=f_z < F, other=0.0)
    f_S = tl.zeros((BLOCK_S,), tl.float32)
    f_own, norm = 0.0, eps
    token = tl.arange(0, BLOCK_L)

    power, narrower = 1.0, 1.0
    if SCALED:
        exponent = tl.load(exponent_ptr + row_head)
        power = _power(exponent)
        if full:
            # S is read once more for its largest entry, which comes from everywhere, before any is written
            largest = tl.zeros((TILE, BLOCK_V), tl.float32)
            for first in tl.static_range(0, V, BLOCK_V):
                for start in tl.range(0, F, TILE):
                    d, f = first + tl.arange(0, BLOCK_V), start + tl.arange(0, TILE)
                    i, j, weight = _indices(table_ptr, weight_ptr, f, F)
                    v_LV = load_rows(old_v_ptr + first, token * H * V, token < HALF, V - first, BLOCK_V)
                    s = _written(s_ptr, old_k_ptr, v_LV, f, d, i, j, weight, power, F, V, H * K, HALF)
                    largest = tl.maximum(largest, tl.abs(s))
            exponent = _exponent(tl.max(largest))
            # all threads have read the old one, since all of them took part in the largest
            tl.store(exponent_ptr + row_head, exponent)
        narrower = _power(-exponent)

    for first in tl.static_range(0, V, BLOCK_V):
        d = first + tl.arange(0, BLOCK_V)
        v = tl.load(v_ptr + d, mask=d < V, other=0.0)
        v_SV = tl.load(
            ring_v_ptr + slot[:, None] * H * V + d[None, :], mask=live[:, None] & (d < V)[None, :], other=0.0
        )
        y = tl.zeros((TILE, BLOCK_V), tl.float32)
        if full:
            v_LV = load_rows(old_v_ptr + first, token * H * V, token < HALF, V - first, BLOCK_V)
            for start in tl.range(0, F, TILE):
                f = start + tl.arange(0, TILE)
                i, j, weight = _indices(table_ptr, weight_ptr, f, F)
                s = _written(s_ptr, old_k_ptr, v_LV, f, d, i, j, weight, power, F, V, H * K, HALF)
                y += _feature(q_ptr, i, j, weight)[:, None] * s
                s = narrow(s * narrower, s_ptr.dtype.element_ty)
                mask = (f < F)[:, None] & (d < V)[None, :]
                tl.store(s_ptr + f[:, None] * V + d[None, :], s, mask=mask)
        else:
            for start in tl.range(0, F, TILE, num_stages=STAGES):
                f = start + tl.arange(0, TILE)
                mask = (f < F)[:, None] & (d < V)[None, :]
                s = tl.load(s_ptr + f[:, None] * V + d[None, :], mask=mask, other=0.0).to(tl.float32)
                i, j, weight = _indices(table_ptr, weight_ptr, f, F)
                y += _feature(q_ptr, i, j, weight)[:, None] * s
            y *= power
        if first == 0:
            f_S = tl.where(live, _score(q_K, k_SK.to(tl.float32)), 0.0)
            f_own = tl.sum(_score(q_K, k_K.to(tl.float32)[None, :]), 0)
            i_z, j_z, weight_z = _indices(table_ptr, weight_ptr, f_z, F)
            if full:
                for old in range(HALF):
                    z += _feature(old_k_ptr + old * H * K, i_z, j_z, weight_z)
                # a thread may read what another one stores: all must have read before the first writes
                tl.debug_barrier()
                tl.store(z_ptr + f_z, z, mask=f_z < F)
            norm += tl.sum(f_S, 0) + f_own + tl.sum(_feature(q_ptr, i_z, j_z, weight_z) * z, 0)
        y_V = tl.sum(f_S[:, None] * v_SV.to(tl.float32), 0) + f_own * v.to(tl.float32)
        y_V = (y_V + tl.sum(y, 0)) / norm
        tl.store(y_ptr + row_head * V + d, narrow(y_V, y_ptr.dtype.element_ty), mask=d < V)
        # into a slot that was not looked at
        tl.store(ring_v_ptr + seen % SLOTS * H * V + d, v, mask=d < V)
    tl.store(ring_k_ptr + seen % SLOTS * H * K + c, k_K, mask=c < K)


@torch.library.custom_op(
    "holdall::taylor_replay_inplace", mutates_args=("s_BHFV", "z_BHF", "k_BSGK", "v_BSHV", "exponent_BH")
)
def _replay_inplace(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, s_BHFV: Tensor, z_BHF: Tensor, k_BSGK: Tensor,
    v_BSHV: Tensor, seen_B: Tensor, summed_B: Tensor, exponent_BH: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y and the next counts; all else of the next state is written into the given one. Exponents: of fp16."""
    batch, _, heads, key_dim = q_B1HK.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_B1HK, k_B1HK, v_B1HV))
    y_B1HV, next_seen, next_summed = (
        v.new_empty(v.shape),
        torch.empty_like(seen_B),
        torch.empty_like(summed_B),
    )
    features, value_dim = s_BHFV.shape[2:]
    slots, block = k_BSGK.shape[1], triton.next_power_of_2
    strides = (stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2)))
    _replay_kernel[(batch * heads,)](
        q, k, v, s_BHFV, z_BHF, k_BSGK, v_BSHV, exponent_BH, seen_B, summed_B, y_B1HV, next_seen, next_summed,
        *_features(key_dim, s_BHFV.device), *strides, key_dim**-0.5, eps, heads,
        F=features, K=key_dim, V=value_dim, HALF=slots // 2,
        BLOCK_F=block(features), BLOCK_K=block(key_dim), BLOCK_S=block(slots), SCALED=exponent_BH is not None,
        BLOCK_L=padded(slots // 2), **{**_config(value_dim), "num_warps": WARPS}, **overlapped(s_BHFV.device),
    )  # fmt: skip
    return y_B1HV, next_seen, next_summed


@_replay_inplace.register_fake
def _(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, k_BSGK, v_BSHV, seen_B, summed_B, exponent_BH, eps):
    return v_B1HV.new_empty(v_B1HV.shape), torch.empty_like(seen_B), torch.empty_like(summed_B)


@torch.library.custom_op("holdall::taylor_replay", mutates_args=())
def _replay(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, s_BHFV: Tensor, z_BHF: Tensor, k_BSGK: Tensor,
    v_BSHV: Tensor, seen_B: Tensor, summed_B: Tensor, exponent_BH: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y and the next state, in a copy. Exponents without elements are none."""
    parts = (s_BHFV, z_BHF, k_BSGK, v_BSHV, exponent_BH)
    *copies, exponents = (x.clone(memory_format=torch.contiguous_format) for x in parts)
    scaled = exponents if exponents.numel() else None
    y_B1HV, *counts = _replay_inplace(q_B1HK, k_B1HK, v_B1HV, *copies, seen_B, summed_B, scaled, eps)
    return y_B1HV, *copies, *counts, exponents


@_replay.register_fake
def _(q_B1HK, k_B1HK, v_B1HV, s_BHFV, z_BHF, k_BSGK, v_BSHV, seen_B, summed_B, exponent_BH, eps):
    state = (s_BHFV, z_BHF, k_BSGK, v_BSHV, seen_B, summed_B, exponent_BH)
    after = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in state)
    return v_B1HV.new_empty(v_B1HV.shape), *after


register_batch_vmap(_replay)


def replay_attention(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    state: S,
    log_decay: Tensor | None = None,
    beta_B1H: Tensor | None = None,
    *,
    feature_map: FeatureMap = IDENTITY,
    eps: float = 1e-12,
    inplace: bool = False,
) -> tuple[Tensor, S]:
    """`holdall.ops.replay.replay_attention` for one token, without gradients.

    Normalised with the Taylor map here; with no map and not normalised in decayed_replay.py.

    Args:
        state: s in fp32, in bf16, or, with the Taylor map, in fp16 with exponents; what is as wide as z in
            fp32; keys and values in the dtype of k and v.
        inplace: all but the counts is updated in place.

    Returns:
        y_B1HV in the dtype of v, and the next state.

    Raises:
        KernelError: no kernel can run on these tensors, for another map, or for this many key dimensions.
    """
    if feature_map == IDENTITY and not state.z_BHF.shape[-1]:
        return decayed_replay(q_B1HK, k_B1HK, v_B1HV, state, log_decay, beta_B1H, inplace=inplace)
    forms.require_kernel(q_B1HK, k_B1HK, v_B1HV, *state[:4])
    if feature_map != FEATURE_MAPS["taylor"]:
        raise forms.KernelError("there are kernels for the Taylor map and for none; form 'parallel' has all")
    if q_B1HK.shape[-1] > MAX_KEY_DIM:
        raise forms.KernelError(
            f"the kernel takes at most {MAX_KEY_DIM} key dimensions, not {q_B1HK.shape[-1]}"
        )
    q, k, v = q_B1HK, k_B1HK.to(state.k_BSGK.dtype), v_B1HV.to(state.v_BSHV.dtype)
    exponent_BH = state.exponent_BH if isinstance(state, ScaledReplayState) else None
    tensors, counts = state[:4], (state.seen_B, state.summed_B)
    if inplace and all(tensor.is_contiguous() for tensor in state):
        y_B1HV, *counts = _replay_inplace(q, k, v, *tensors, *counts, exponent_BH, eps)
        return y_B1HV.to(v_B1HV.dtype), state._replace(seen_B=counts[0], summed_B=counts[1])
    exponents = state.seen_B.new_empty(len(v), 0) if exponent_BH is None else exponent_BH
    y_B1HV, *after = _replay(q, k, v, *tensors, *counts, exponents, eps)
    s_BHFV, z_BHF, k_BSGK, v_BSHV, seen_B, summed_B, exponents = after
    changed = {"s_BHFV": s_BHFV, "z_BHF": z_BHF, "k_BSGK": k_BSGK, "v_BSHV": v_BSHV}
    changed |= {"seen_B": seen_B, "summed_B": summed_B, "log_decay_BSHX": state.log_decay_BSHX.clone()}
    if exponent_BH is not None:
        changed["exponent_BH"] = exponents
    return y_B1HV.to(v_B1HV.dtype), state._replace(**changed)
