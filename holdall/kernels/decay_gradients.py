"""The gradient of decays as an exact sum over the terms that each decay multiplies.

Every token decays a state, writes into it and reads it, S_t = w_t S_{t-1} + k_t u_t^T. With dS'_t, the
gradient of the decayed state w_t S_{t-1},

    dlog w_t = sum_V (w_t S_{t-1}) dS'_t

where every term contains w_t. The usual formula, q_t . dq_t - k_t . dk_t summed over all later tokens, has
each token's own q_t . k_t in both sums. It cancels, but its rounding error does not, and is not multiplied by
any decay: the gradient of a strong decay loses all digits. Here a chunk's tokens are cut into blocks. Let S
be the state before a block and dS the gradient of the state after it, C_t the decay from the block's start up
to t, G(t, s) = C_t / C_s, L the last token, and e_t the gradient of what q_t reads:

    dlog w_r = sum_{s < r <= t} G(t, s) k_s q_t (e_t . u_s)              both in the block
               + sum_{t >= r} C_t q_t (S e_t) + sum_{s < r} G(L, s) k_s (dS u_s) + C_L sum_V S dS

For linear attention u is v, and e is dy. The delta rule writes u_t = beta_t (v_t - S'_t^T k_t), so it reads
twice: its second pair of q and e is k and -dv. S and dS of a block follow from those of its chunk and from
the writes and reads of the other blocks. A program has a block and a tile of keys, and loops over tiles of
values.

Memory traffic: q, k, the decays and both states once, u, dy and dv once per tile of keys, if data shared by
the blocks of a chunk stays in the cache; one value per decay is written. Operations per chunk, with J tokens
per block, N blocks per chunk and two reads: 3 (N - 1) C K V for states, 6 C K V for their contributions,
4 J C V for pairs; and 8 J C K on ordinary cores if each key dimension has its own decay.

Letters: B row, T time, N chunks, C time within a chunk, J time within a block, H heads, K key dim,
V value dim, X decays: K, or 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from holdall.kernels import cdiv
from holdall.kernels.language import LOG2_E, dot, narrow

BLOCK = tl.constexpr(16)
"""Tokens per block, the smallest size of a matrix product."""


def decay_gradients(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    u_BTHV: Tensor,
    dy_BTHV: Tensor,
    dv_BTHV: Tensor | None,
    s_BNHKV: Tensor,
    ds_BNHKV: Tensor,
    log_decay: Tensor,
    chunk: int,
) -> Tensor:
    """The gradient of log_decay, (B, T, H) or (B, T, H, K), in fp32.

    Args:
        u_BTHV: the values written under the keys.
        dv_BTHV: the gradient of the delta rule's values; None for linear attention.
        s_BNHKV, ds_BNHKV: the state before each chunk, and the gradient of the state after it.
        log_decay: the log decays themselves, not cumulative sums, in fp32.
    """
    (rows, length, heads, key_dim), value_dim = q_BTHK.shape, u_BTHV.shape[3]
    each_key = log_decay.ndim == 4
    most_v = 32 if q_BTHK.element_size() == 4 else 64  # with more, fp32 does not fit into registers
    tile_k, tile_v = (
        min(most, max(16, triton.next_power_of_2(size)))
        for most, size in ((32, key_dim), (most_v, value_dim))
    )
    tiles, blocks = cdiv(key_dim, tile_k), cdiv(length, BLOCK.value)
    found = log_decay.new_empty(1 if each_key else tiles, *log_decay.shape)
    _kernel[(tiles * blocks * rows * heads,)](
        q_BTHK, k_BTHK, u_BTHV, dy_BTHV, dv_BTHV, s_BNHKV, ds_BNHKV, log_decay, found, rows, length,
        H=heads, K=key_dim, V=value_dim, C=chunk, TILE_K=tile_k, TILE_V=tile_v, EACH_KEY=each_key,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return found[0] if len(found) == 1 else found.sum(0)


@triton.jit
def _log_decays(log_w_ptr, token_J, real_J, key_K, K: tl.constexpr, EACH_KEY: tl.constexpr):
    """The log decays of a block in base 2, (J, X)."""
    if EACH_KEY:
        at_JK, here_JK = token_J[:, None] * K + key_K[None, :], real_J[:, None] & (key_K < K)[None, :]
        return LOG2_E * tl.load(log_w_ptr + at_JK, mask=here_JK, other=0.0)
    else:
        return LOG2_E * tl.load(log_w_ptr + token_J, mask=real_J, other=0.0)[:, None]


@triton.jit
def _since(x_JX, EACH_KEY: tl.constexpr):
    """Cumulative sums over tokens."""
    if EACH_KEY:
        return tl.cumsum(x_JX, 0)
    else:
        j = tl.arange(0, BLOCK)
        return tl.sum(tl.where(j[None, :] <= j[:, None], tl.trans(x_JX), 0.0), 1)[:, None]


@triton.jit
def _sums(log_w_JX, EACH_KEY: tl.constexpr):
    """Cumulative sums of the integer parts and of the fractions in [0, 1], and the totals of both.

    Integer sums are exact, so that a strong decay costs no precision in differences of sums.
    """
    whole_JX = tl.floor(log_w_JX)
    left_JX = log_w_JX - whole_JX
    return _since(whole_JX, EACH_KEY), _since(left_JX, EACH_KEY), tl.sum(whole_JX, 0), tl.sum(left_JX, 0)


@triton.jit
def _until(log_w_JX, EACH_KEY: tl.constexpr):
    """The decay from each token to the end of the block."""
    whole_JX, left_JX, whole_X, left_X = _sums(log_w_JX, EACH_KEY)
    return tl.exp2((whole_X[None, :] - whole_JX) + (left_X[None, :] - left_JX))


@triton.jit(do_not_specialize=["rows", "length"])
def _kernel(
    q_ptr, k_ptr, u_ptr, dy_ptr, dv_ptr, s_ptr, ds_ptr, log_w_ptr, out_ptr, rows, length,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    TILE_K: tl.constexpr, TILE_V: tl.constexpr, EACH_KEY: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (K + TILE_K - 1) // TILE_K
    blocks = tl.cdiv(length, BLOCK)
    tile = tl.program_id(0) % tiles
    n = tl.program_id(0) // tiles % blocks // (C // BLOCK)
    block = tl.program_id(0) // tiles % blocks % (C // BLOCK)
    row = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    b, h = row // H, row % H
    j, key, value = tl.arange(0, BLOCK), tile * TILE_K + tl.arange(0, TILE_K), tl.arange(0, TILE_V)
    real_k = key < K
    start = n * C
    later_blocks = tl.cdiv(tl.minimum(C, length - start), BLOCK) - 1 - block
    state = ((b * tl.cdiv(length, C) + n) * H + h) * K * V
    dtype = q_ptr.dtype.element_ty

    t = start + block * BLOCK + j
    real_t, token = t < length, (b * length + t) * H + h
    at_JK, here_JK = token[:, None] * K + key[None, :], real_t[:, None] & real_k[None, :]
    q_JK, k_JK = (
        tl.load(q_ptr + at_JK, mask=here_JK, other=0.0),
        tl.load(k_ptr + at_JK, mask=here_JK, other=0.0),
    )

    to_q_JJ, to_k_JJ = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    q_reads_JK, k_reads_JK = tl.zeros((BLOCK, TILE_K), tl.float32), tl.zeros((BLOCK, TILE_K), tl.float32)
    written_JK, through_K = tl.zeros((BLOCK, TILE_K), tl.float32), tl.zeros((TILE_K,), tl.float32)
    for first in range(0, V, TILE_V):
        v = first + value
        real_v = v < V
        at_KV, here_KV = state + key[:, None] * V + v[None, :], real_k[:, None] & real_v[None, :]
        s_KV = tl.load(s_ptr + at_KV, mask=here_KV, other=0.0).to(tl.float32)
        ds_KV = tl.load(ds_ptr + at_KV, mask=here_KV, other=0.0).to(tl.float32)
        for i in range(0, block):
            t_i = start + i * BLOCK + j
            token_i = (b * length + t_i) * H + h
            at_i = token_i[:, None] * V + v[None, :]
            log_w_i = _log_decays(log_w_ptr, token_i, t_i < length, key, K, EACH_KEY)
            k_i = tl.load(
                k_ptr + token_i[:, None] * K + key[None, :],
                mask=(t_i < length)[:, None] & real_k[None, :], other=0.0,
            )  # fmt: skip
            u_i = tl.load(u_ptr + at_i, mask=(t_i < length)[:, None] & real_v[None, :], other=0.0)
            k_i = narrow(k_i.to(tl.float32) * _until(log_w_i, EACH_KEY), dtype)
            s_KV = dot(tl.trans(k_i), u_i, s_KV * tl.exp2(tl.sum(log_w_i, 0))[:, None])
        for back in range(0, later_blocks):
            t_i = start + (block + later_blocks - back) * BLOCK + j
            token_i = (b * length + t_i) * H + h
            at_i, here_i = token_i[:, None] * V + v[None, :], (t_i < length)[:, None] & real_v[None, :]
            at_k, here_k = token_i[:, None] * K + key[None, :], (t_i < length)[:, None] & real_k[None, :]
            log_w_i = _log_decays(log_w_ptr, token_i, t_i < length, key, K, EACH_KEY)
            since_i = tl.exp2(_since(log_w_i, EACH_KEY))
            q_i = tl.load(q_ptr + at_k, mask=here_k, other=0.0).to(tl.float32)
            dy_i = tl.load(dy_ptr + at_i, mask=here_i, other=0.0)
            q_i = narrow(q_i * since_i, dtype)
            ds_KV = dot(tl.trans(q_i), dy_i, ds_KV * tl.exp2(tl.sum(log_w_i, 0))[:, None])
            if dv_ptr is not None:
                k_i = tl.load(k_ptr + at_k, mask=here_k, other=0.0).to(tl.float32)
                dv_i = tl.load(dv_ptr + at_i, mask=here_i, other=0.0)
                k_i = narrow(-k_i * since_i, dtype)
                ds_KV = dot(tl.trans(k_i), dv_i, ds_KV)
        through_K += tl.sum(s_KV * ds_KV, 1)
        s_KV, ds_KV = narrow(s_KV, dtype), narrow(ds_KV, dtype)
        at_JV, here_JV = token[:, None] * V + v[None, :], real_t[:, None] & real_v[None, :]
        u_JV = tl.load(u_ptr + at_JV, mask=here_JV, other=0.0)
        dy_JV = tl.load(dy_ptr + at_JV, mask=here_JV, other=0.0)
        to_q_JJ = dot(dy_JV, tl.trans(u_JV), to_q_JJ)
        q_reads_JK = dot(dy_JV, tl.trans(s_KV), q_reads_JK)
        written_JK = dot(u_JV, tl.trans(ds_KV), written_JK)
        if dv_ptr is not None:
            dv_JV = tl.load(dv_ptr + at_JV, mask=here_JV, other=0.0)
            to_k_JJ = dot(dv_JV, tl.trans(u_JV), to_k_JJ)
            k_reads_JK = dot(dv_JV, tl.trans(s_KV), k_reads_JK)

    log_w_JX = _log_decays(log_w_ptr, token, real_t, key, K, EACH_KEY)
    wide_k_JK = k_JK.to(tl.float32)
    before_JK = q_JK.to(tl.float32) * q_reads_JK - wide_k_JK * k_reads_JK
    before_JK *= tl.exp2(_since(log_w_JX, EACH_KEY))
    behind_JK = wide_k_JK * written_JK * _until(log_w_JX, EACH_KEY)
    through_K *= tl.exp2(tl.sum(log_w_JX, 0))
    whole_JX, left_JX, _, _ = _sums(log_w_JX, EACH_KEY)
    if EACH_KEY:
        # backwards from the last token: what the block's tokens write and tokens from t on read
        for back in range(0, BLOCK):
            i = BLOCK - 1 - back
            now_J1, earlier_J1 = (j == i)[:, None], (j < i)[:, None]
            t_i = start + block * BLOCK + i
            here_K = key < tl.where(t_i < length, K, 0)
            at_K = ((b * length + t_i) * H + h) * K + key
            q_K = tl.load(q_ptr + at_K, mask=here_K, other=0.0).to(tl.float32)
            reads_JK = tl.sum(tl.where(now_J1, to_q_JJ, 0.0), 0)[:, None] * q_K[None, :]
            if dv_ptr is not None:
                k_K = tl.load(k_ptr + at_K, mask=here_K, other=0.0).to(tl.float32)
                reads_JK -= tl.sum(tl.where(now_J1, to_k_JJ, 0.0), 0)[:, None] * k_K[None, :]
            whole_K, left_K = (
                tl.sum(tl.where(now_J1, whole_JX, 0.0), 0), tl.sum(tl.where(now_J1, left_JX, 0.0), 0)
            )  # fmt: skip
            between_JK = (whole_K[None, :] - whole_JX) + (left_K[None, :] - left_JX)
            between_JK = tl.exp2(tl.where(earlier_J1, between_JK, 0.0))
            behind_JK += tl.where(earlier_J1, between_JK * wide_k_JK * reads_JK, 0.0)
            through_K += tl.sum(tl.where(now_J1, before_JK, 0.0), 0)
            found_K = through_K + tl.sum(tl.where(earlier_J1, behind_JK, 0.0), 0)
            tl.store(out_ptr + at_K, found_K, mask=here_K)
    else:
        pairs_JJ = dot(q_JK, tl.trans(k_JK)) * to_q_JJ
        if dv_ptr is not None:
            pairs_JJ -= dot(k_JK, tl.trans(k_JK)) * to_k_JJ
        earlier_JJ = j[None, :] < j[:, None]
        between_JJ = (whole_JX - tl.trans(whole_JX)) + (left_JX - tl.trans(left_JX))
        pairs_JJ *= tl.exp2(tl.where(earlier_JJ, between_JJ, 0.0))
        # rows: the token of the decay; columns: the tokens that write, read by any token from that one on
        onwards_JJ = j[None, :] >= j[:, None]
        pairs_JJ = dot(tl.where(onwards_JJ, 1.0, 0.0), tl.where(earlier_JJ, pairs_JJ, 0.0))
        pairs_JJ += tl.sum(behind_JK, 1)[None, :]
        found_J = tl.sum(through_K) + tl.sum(tl.where(earlier_JJ, pairs_JJ, 0.0), 1)
        before_1J = tl.sum(before_JK, 1)[None, :]
        found_J += tl.sum(tl.where(onwards_JJ, before_1J, 0.0), 1)
        tl.store(out_ptr + tile * rows.to(tl.int64) * length * H + token, found_J, mask=real_t)
