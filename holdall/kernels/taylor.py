"""Taylor linear attention in chunks: Based's second-order exp(q . k), without storing features.

    y_t = sum_{j <= t} p_tj v_j / (sum_{j <= t} p_tj + eps)
    p_tj = 1 + s + s^2 / 2,   s = q_t . k_j / sqrt(K)

and p_tj = phi(q_t) . phi(k_j) with the F = 1 + K + K (K + 1) / 2 features of holdall.ops.linear_attention.
A row is cut into segments of L tokens. Within a segment all pairs are computed as in FlashAttention; all
earlier tokens enter through the state at its start. Forward takes three launches:

    sums      for each segment          sum phi(k) v^T, sum phi(k)
    prefix    over the segments         the state before each of them, and the last one
    outputs   for each block of queries phi(q) S + pairs, over phi(q) . z + pairs

and backward grad_q (from the same prefix), then sums and prefix of the gradients' state, backwards in time,
and grad_kv. With r_t = 1 / (den_t + eps), the gradients of numerator and denominator are
r_t dy_t and m_t = -r_t (dy_t . y_t), so that dp_tj = r_t dy_t . v_j + m_t, and the state that carries them is

    dS = sum_t phi(q_t) r_t dy_t^T,   dz = sum_t phi(q_t) m_t

`absorb`, which reads a prefix without queries, takes the first two launches alone and stores no state but the
last, from which `taylor_attention` then starts. So a prefix costs 2 F V operations of its state and 4 F K of
its features more per token and head, and reads its keys and values, 2 (K + V) bytes, once.

Features are computed where they are used: the factors x_i and x_j of 64 features are two products of x with
one-hot matrices, exact, on the tensor cores, whose results are multiplied in registers.

Memory traffic in bf16: q, k, v, y once, 4 (K + V) bytes per token and head: 168 MB for 4 rows x 16 heads x
8192 tokens at K = 16, V = 64, 0.056 ms at 3 TB/s. Sums read k and v once more; states cost 10 F V bytes per
segment. Operations of matrix products per token and head, forward: 4 F V for the state, 12 F K for the
features, L (K + V) for the pairs; 0.1 MFLOP at these sizes, 53 GFLOP in all, 0.08 ms at 650 TFLOP/s.

Letters: B row, T time, H heads, K key dim, V value dim, F features, C tokens of a block, N segments.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import cdiv, register_batch_vmap
from holdall.kernels.language import append, dot, narrow
from holdall.ops.derivatives import once_differentiable
from holdall.ops.linear_attention import FEATURE_MAPS

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

FEATURES = FEATURE_MAPS["taylor"].size
MAX_KEY, MAX_VALUE = 32, 128
SEGMENT = 512
"""Tokens per segment: with this many, pairs cost about as much as the features of the state."""
TILE = 64
"""Features per tile."""


def refusal(key_dim: int, value_dim: int, dtype: torch.dtype) -> str:
    """Why there is no kernel for these sizes; empty if there is one."""
    if key_dim > MAX_KEY or value_dim > MAX_VALUE:
        return f"the Taylor kernel takes feature_dim <= {MAX_KEY} and head widths <= {MAX_VALUE}"
    if dtype == torch.float16:
        return "sums of Taylor features go beyond float16's 65504; use bfloat16"
    return ""


def taylor_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"] | None = None,
    z_BHF: Float[Tensor, "b h f"] | None = None,
    *,
    eps: float = 1e-12,
    want_state: bool = True,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h f v"] | None, Float[Tensor, "b h f"] | None]:
    """The kernel form of `holdall.ops.linear_attention.linear_attention` with the Taylor map, normalised.

    Sums are in fp32; features, scores and states are cast to the dtype of v for matrix products. So with
    bfloat16 the outputs are as accurate as plain PyTorch's, which is in fp32 until the output is rounded,
    while the states have the accuracy of products of bfloat16 features.

    Raises:
        KernelError: no kernel for this device, dtype or size.
    """
    _check(q_BTHK, k_BTHK, v_BTHV)
    y_BTHV, *_, s_BHFV, z_BHF = torch.ops.holdall.taylor_forward(
        *_alike(q_BTHK, k_BTHK, v_BTHV), *_wide(s_BHFV, z_BHF), eps, want_state
    )
    return (y_BTHV, s_BHFV, z_BHF) if want_state else (y_BTHV, None, None)


def absorb(
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"] | None = None,
    z_BHF: Float[Tensor, "b h f"] | None = None,
) -> tuple[Float[Tensor, "b h f v"], Float[Tensor, "b h f"]]:
    """The kernel form of `holdall.ops.linear_attention.absorb` with the Taylor map: the state, no outputs."""
    _check(k_BTHK, v_BTHV)
    return torch.ops.holdall.taylor_absorb(*_alike(k_BTHK, v_BTHV), *_wide(s_BHFV, z_BHF))


def _check(*tensors: Tensor) -> None:
    forms.require_kernel(*tensors)
    if why := refusal(tensors[0].shape[-1], tensors[-1].shape[-1], tensors[-1].dtype):
        raise forms.KernelError(why)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """Cast to one dtype, each with a contiguous last dimension."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    return [x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in tensors]


def _wide(s_BHFV: Tensor | None, z_BHF: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if s_BHFV is None or z_BHF is None else (s_BHFV.float(), z_BHF.float())


# --------------------------------------------------------------------------------------------- features


@functools.cache
def _table(key_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of the features: feature f is weight_f x_i x_j, where either factor may be 1 instead.

    Returns:
        hot_2KF: one-hot columns that select x_i, or x_j, in a product with x; ones_2F: 1 where the factor is
        1; weight_F, 0 in the padding of the last tile.
    """
    one, each = [-1] * key_dim, list(range(key_dim))
    i, j = torch.triu_indices(key_dim, key_dim, offset=1).tolist()
    factors_2F = torch.tensor([[-1, *each, *each, *i], [-1, *one, *each, *j]])
    weight_F = torch.tensor(
        [1.0] + [key_dim**-0.25] * key_dim + [(2 * key_dim) ** -0.5] * key_dim + [key_dim**-0.5] * len(i)
    )
    fill = -len(weight_F) % TILE
    factors_2F, weight_F = (torch.nn.functional.pad(x, (0, fill), value=0) for x in (factors_2F, weight_F))
    padded = max(16, triton.next_power_of_2(key_dim))
    hot_2KF = factors_2F[:, None] == torch.arange(padded)[:, None]
    return hot_2KF.to(device, dtype), (factors_2F < 0).to(device, torch.float32), weight_F.to(device)


@triton.jit
def _hot(hot, factor: tl.constexpr, tile, NF: tl.constexpr, TILE: tl.constexpr, FK: tl.constexpr):
    """A tile of the one-hot matrix of the first (0) or second (1) factor of each feature, (FK, TILE)."""
    f = tile * TILE + tl.arange(0, TILE)
    return tl.load(hot + factor * FK * NF + tl.arange(0, FK)[:, None] * NF + f[None, :])


@triton.jit
def _ones(ones, factor: tl.constexpr, tile, NF: tl.constexpr, TILE: tl.constexpr):
    return tl.load(ones + factor * NF + tile * TILE + tl.arange(0, TILE))


@triton.jit
def _factors(x_CK, i_KF, j_KF, ones, tile, NF: tl.constexpr, TILE: tl.constexpr):
    """Both factors of each token's features. Only the first tile has features with a factor 1."""
    i_CF, j_CF = dot(x_CK, i_KF), dot(x_CK, j_KF)
    if tile == 0:
        i_CF += _ones(ones, 0, tile, NF, TILE)[None, :]
        j_CF += _ones(ones, 1, tile, NF, TILE)[None, :]
    return i_CF, j_CF


@triton.jit
def _place(T, H, C: tl.constexpr):
    """Row and head of a program, and its first token. Neighbouring programs take neighbouring heads, which
    are adjacent in memory."""
    h, pid = tl.program_id(0) % H, tl.program_id(0) // H
    blocks = tl.cdiv(T, C)
    return (pid // blocks).to(tl.int64) * H + h, pid % blocks * C


@triton.jit
def _block(x, rows, stride_t, T, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Tokens `rows` of one row and head, zero beyond the end."""
    column = tl.arange(0, PADDED)
    inside = (rows < T)[:, None] & (column < SIZE)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride_t + column[None, :], mask=inside, other=0.0)


@triton.jit
def _held(s, z, tile, F: tl.constexpr, V: tl.constexpr, FV: tl.constexpr, TILE: tl.constexpr):
    """A tile of a state, zero beyond its features."""
    f, column = tile * TILE + tl.arange(0, TILE), tl.arange(0, FV)
    inside = (f < F)[:, None] & (column < V)[None, :]
    s_FV = tl.load(s + f[:, None] * V + column[None, :], mask=inside, other=0.0)
    return s_FV, tl.load(z + f, mask=f < F, other=0.0)


# ---------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["T", "L", "N", "FIRST", "COUNT"])
def _sums(
    k, v, scale, shift, hot, ones, sums, T, L, N, FIRST, COUNT, H,
    k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr,
    FK: tl.constexpr, FV: tl.constexpr, NF: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
    SCALED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A group of tiles of features, without their weights, of one segment: sum phi(k) v^T and sum phi(k).

    For the gradients' state each token's feature enters the first sum scaled, and the second weighted.
    """
    groups: tl.constexpr = NF // TILE // GROUP
    h, pid = tl.program_id(0) % H, tl.program_id(0) // H
    first_tile, n = pid % groups * GROUP, FIRST + pid // groups % COUNT
    bh = (pid // groups // COUNT).to(tl.int64) * H + h
    k += (bh // H) * k_b + (bh % H) * k_h
    v += (bh // H) * v_b + (bh % H) * v_h
    held = ()
    for _ in tl.static_range(GROUP):
        held = append(append(held, tl.zeros((TILE, FV), tl.float32)), tl.zeros((TILE,), tl.float32))
    for start in range(n * L, min(n * L + L, T), C):
        t_C = start + tl.arange(0, C)
        k_CK, v_CV = _block(k, t_C, k_t, T, K, FK), _block(v, t_C, v_t, T, V, FV)
        before, held = held, ()
        for g in tl.static_range(GROUP):
            tile = first_tile + g
            i_FC = dot(tl.trans(_hot(hot, 0, tile, NF, TILE, FK)), tl.trans(k_CK))
            j_FC = dot(tl.trans(_hot(hot, 1, tile, NF, TILE, FK)), tl.trans(k_CK))
            if tile == 0:
                i_FC += tl.where((t_C < T)[None, :], _ones(ones, 0, tile, NF, TILE)[:, None], 0.0)
                j_FC += _ones(ones, 1, tile, NF, TILE)[:, None]
            phi_FC = i_FC * j_FC
            weighted_FC = phi_FC
            if SCALED:
                weighted_FC *= tl.load(shift + bh * T + t_C, mask=t_C < T, other=0.0)[None, :]
                phi_FC *= tl.load(scale + bh * T + t_C, mask=t_C < T, other=0.0)[None, :]
            s_FV = dot(narrow(phi_FC, v_CV.dtype), v_CV, before[2 * g])
            held = append(append(held, s_FV), before[2 * g + 1] + tl.sum(weighted_FC, 1))
    sums += (bh * N + n) * WIDTH
    column = tl.arange(0, FV)
    for g in tl.static_range(GROUP):
        f = (first_tile + g) * TILE + tl.arange(0, TILE)
        inside = (f < F)[:, None] & (column < V)[None, :]
        tl.store(sums + f[:, None] * V + column[None, :], held[2 * g], mask=inside)
        tl.store(sums + F * V + f, held[2 * g + 1], mask=f < F)


@triton.jit(do_not_specialize=["N", "FIRST", "COUNT"])
def _prefix(
    sums, weight, s_in, z_in, s_prefix, z_prefix, s_out, z_out, N, FIRST, COUNT,
    F: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, REVERSE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The state before each segment, in either direction of time; s and z are adjacent. Without STORE only
    the last one leaves the registers.

    The stored states are multiplied by the weights again, since the other kernels use unweighted features.
    """
    blocks: tl.constexpr = (F * V + F + BLOCK - 1) // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_s, is_z = at < F * V, (at >= F * V) & (at < F * V + F)
    weight = tl.load(weight + tl.where(is_s, at // V, at - F * V), mask=is_s | is_z, other=0.0)
    held = tl.zeros((BLOCK,), tl.float32)
    if HAS_IN:
        held += tl.load(s_in + bh * (F * V) + at, mask=is_s, other=0.0)
        held += tl.load(z_in + bh * F + at - F * V, mask=is_z, other=0.0)
    for step in range(N):
        n = N - 1 - step if REVERSE else step
        if STORE:
            given, s_n = held * weight, s_prefix + (bh * N + n) * (F * V) + at
            tl.store(s_n, narrow(given, s_prefix.dtype.element_ty), mask=is_s)
            tl.store(z_prefix + (bh * N + n) * F + at - F * V, given, mask=is_z)
        if (n >= FIRST) & (n < FIRST + COUNT):
            held += weight * tl.load(sums + (bh * N + n) * WIDTH + at, mask=is_s | is_z, other=0.0)
    if HAS_OUT:
        tl.store(s_out + bh * (F * V) + at, held, mask=is_s)
        tl.store(z_out + bh * F + at - F * V, held, mask=is_z)


@triton.jit
def _met(
    y_CV, den_C, q_CK, t_C, k, v, start, first, k_t, v_t, T,
    K: tl.constexpr, V: tl.constexpr, FK: tl.constexpr, FV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Contribution of a block of keys, which may be the queries' own, to their outputs."""
    t_S = start + tl.arange(0, S)
    k_SK, v_SV = _block(k, t_S, k_t, T, K, FK), _block(v, t_S, v_t, T, V, FV)
    s_CS = dot(q_CK, tl.trans(k_SK))
    p_CS = 1.0 + s_CS * (K**-0.5 + s_CS * (0.5 / K))
    if start >= first:
        p_CS = tl.where(t_C[:, None] >= t_S[None, :], p_CS, 0.0)
    return dot(narrow(p_CS, v_SV.dtype), v_SV, y_CV), den_C + tl.sum(p_CS, 1)


@triton.jit(do_not_specialize=["T", "L", "N"])
def _outputs(
    q, k, v, s_prefix, z_prefix, hot, ones, y, den, T, L, N, H, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    FK: tl.constexpr, FV: tl.constexpr, NF: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, HAS_IN: tl.constexpr,
):  # fmt: skip
    """One block of queries: everything before the segment through the state, the segment in pairs."""
    bh, first = _place(T, H, C)
    n = first // L
    q += (bh // H) * q_b + (bh % H) * q_h
    k += (bh // H) * k_b + (bh % H) * k_h
    v += (bh // H) * v_b + (bh % H) * v_h
    t_C, column = first + tl.arange(0, C), tl.arange(0, FV)
    q_CK = _block(q, t_C, q_t, T, K, FK)
    y_CV = tl.zeros((C, FV), tl.float32)
    den_C = tl.zeros((C,), tl.float32)
    s_prefix += (bh * N + n) * (F * V)
    z_prefix += (bh * N + n) * F
    tiles = 0
    if HAS_IN or n > 0:
        tiles = NF // TILE
    for tile in range(tiles):
        i_KF, j_KF = _hot(hot, 0, tile, NF, TILE, FK), _hot(hot, 1, tile, NF, TILE, FK)
        s_FV, z_F = _held(s_prefix, z_prefix, tile, F, V, FV, TILE)
        i_CF, j_CF = _factors(q_CK, i_KF, j_KF, ones, tile, NF, TILE)
        phi_CF = i_CF * j_CF
        den_C += tl.sum(phi_CF * z_F[None, :], 1)
        y_CV = dot(narrow(phi_CF, s_FV.dtype), s_FV, y_CV)
    for start in range(n * L, min(first + C, T), S):
        y_CV, den_C = _met(y_CV, den_C, q_CK, t_C, k, v, start, first, k_t, v_t, T, K, V, FK, FV, S)
    out = bh // H * T * H * V + bh % H * V + t_C.to(tl.int64)[:, None] * (H * V) + column[None, :]
    inside = (t_C < T)[:, None] & (column < V)[None, :]
    tl.store(y + out, narrow(y_CV * (1.0 / (den_C + eps))[:, None], y.dtype.element_ty), mask=inside)
    tl.store(den + bh * T + t_C, den_C, mask=t_C < T)


# --------------------------------------------------------------------------------------------- backward


@triton.jit
def _through(dx_CK, dphi_CF, i_CF, j_CF, i_KF, j_KF):
    """dx += d phi / dx: each feature's gradient times one factor goes to the other factor's x."""
    dx_CK = dot(narrow(dphi_CF * j_CF, i_KF.dtype), tl.trans(i_KF), dx_CK)
    return dot(narrow(dphi_CF * i_CF, j_KF.dtype), tl.trans(j_KF), dx_CK)


@triton.jit
def _grad_q_met(
    dq_CK, q_CK, dy_CV, r_C, m_C, t_C, k, v, start, first, k_t, v_t, T,
    K: tl.constexpr, V: tl.constexpr, FK: tl.constexpr, FV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Contribution of a block of keys, which may be the queries' own, to their gradients."""
    t_S = start + tl.arange(0, S)
    k_SK, v_SV = _block(k, t_S, k_t, T, K, FK), _block(v, t_S, v_t, T, V, FV)
    slope_CS = K**-0.5 + dot(q_CK, tl.trans(k_SK)) * (1.0 / K)
    ds_CS = (dot(dy_CV, tl.trans(v_SV)) * r_C[:, None] + m_C[:, None]) * slope_CS
    if start >= first:
        ds_CS = tl.where(t_C[:, None] >= t_S[None, :], ds_CS, 0.0)
    return dot(narrow(ds_CS, k_SK.dtype), k_SK, dq_CK)


@triton.jit(do_not_specialize=["T", "L", "N"])
def _grad_q(
    q, k, v, y, dy, den, s_prefix, z_prefix, hot, ones, dq, scale, shift, T, L, N, H, eps,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    FK: tl.constexpr, FV: tl.constexpr, NF: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, HAS_IN: tl.constexpr,
):  # fmt: skip
    """One block of queries; also r_t and m_t of its tokens, which the other gradients need (scale, shift)."""
    bh, first = _place(T, H, C)
    n = first // L
    q += (bh // H) * q_b + (bh % H) * q_h
    k += (bh // H) * k_b + (bh % H) * k_h
    v += (bh // H) * v_b + (bh % H) * v_h
    y += bh // H * T * H * V + bh % H * V
    dy += bh // H * T * H * V + bh % H * V
    t_C = first + tl.arange(0, C)
    q_CK, dy_CV = _block(q, t_C, q_t, T, K, FK), _block(dy, t_C, H * V, T, V, FV)
    r_C = 1.0 / (tl.load(den + bh * T + t_C, mask=t_C < T, other=1.0) + eps)
    y_CV = _block(y, t_C, H * V, T, V, FV)
    m_C = -r_C * tl.sum(dy_CV.to(tl.float32) * y_CV.to(tl.float32), 1)
    tl.store(scale + bh * T + t_C, r_C, mask=t_C < T)
    tl.store(shift + bh * T + t_C, m_C, mask=t_C < T)
    dq_CK = tl.zeros((C, FK), tl.float32)
    s_prefix += (bh * N + n) * (F * V)
    z_prefix += (bh * N + n) * F
    tiles = 0
    if HAS_IN or n > 0:
        tiles = NF // TILE
    for tile in range(tiles):
        i_KF, j_KF = _hot(hot, 0, tile, NF, TILE, FK), _hot(hot, 1, tile, NF, TILE, FK)
        s_FV, z_F = _held(s_prefix, z_prefix, tile, F, V, FV, TILE)
        dphi_CF = dot(dy_CV, tl.trans(s_FV)) * r_C[:, None] + m_C[:, None] * z_F[None, :]
        i_CF, j_CF = _factors(q_CK, i_KF, j_KF, ones, tile, NF, TILE)
        dq_CK = _through(dq_CK, dphi_CF, i_CF, j_CF, i_KF, j_KF)
    for start in range(n * L, min(first + C, T), S):
        dq_CK = _grad_q_met(
            dq_CK, q_CK, dy_CV, r_C, m_C, t_C, k, v, start, first, k_t, v_t, T, K, V, FK, FV, S
        )
    _store_block(dq, dq_CK, bh, H, t_C, T, K, FK)


@triton.jit
def _store_block(x, x_CK, bh, H, t_C, T, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Into a dense (B, T, H, SIZE)."""
    column = tl.arange(0, PADDED)
    at = bh // H * T * H * SIZE + bh % H * SIZE + t_C.to(tl.int64)[:, None] * (H * SIZE) + column[None, :]
    tl.store(x + at, narrow(x_CK, x.dtype.element_ty), mask=(t_C < T)[:, None] & (column < SIZE)[None, :])


@triton.jit
def _grad_kv_met(
    dk_CK, dv_CV, k_CK, v_CV, t_C, q, dy, scale, shift, start, q_t, dy_t, T, CAUSAL: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, FK: tl.constexpr, FV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Contribution of a block of queries to the gradients of keys and values."""
    t_S = start + tl.arange(0, S)
    q_SK, dy_SV = _block(q, t_S, q_t, T, K, FK), _block(dy, t_S, dy_t, T, V, FV)
    r_S = tl.load(scale + t_S, mask=t_S < T, other=0.0)
    m_S = tl.load(shift + t_S, mask=t_S < T, other=0.0)
    s_CS = dot(k_CK, tl.trans(q_SK))
    p_CS = (1.0 + s_CS * (K**-0.5 + s_CS * (0.5 / K))) * r_S[None, :]
    ds_CS = (dot(v_CV, tl.trans(dy_SV)) * r_S[None, :] + m_S[None, :]) * (K**-0.5 + s_CS * (1.0 / K))
    if CAUSAL:
        later_CS = t_C[:, None] <= t_S[None, :]
        p_CS, ds_CS = tl.where(later_CS, p_CS, 0.0), tl.where(later_CS, ds_CS, 0.0)
    dv_CV = dot(narrow(p_CS, dy_SV.dtype), dy_SV, dv_CV)
    return dot(narrow(ds_CS, q_SK.dtype), q_SK, dk_CK), dv_CV


@triton.jit(do_not_specialize=["T", "L", "N"])
def _grad_kv(
    q, k, v, dy, scale, shift, s_suffix, z_suffix, hot, ones, dk, dv, T, L, N, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    FK: tl.constexpr, FV: tl.constexpr, NF: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, HAS_OUT: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One block of keys and values: later segments through the gradients' state, its own in pairs."""
    bh, first = _place(T, H, C)
    n = first // L
    k += (bh // H) * k_b + (bh % H) * k_h
    v += (bh // H) * v_b + (bh % H) * v_h
    t_C = first + tl.arange(0, C)
    k_CK, v_CV = _block(k, t_C, k_t, T, K, FK), _block(v, t_C, v_t, T, V, FV)
    dk_CK = tl.zeros((C, FK), tl.float32)
    dv_CV = tl.zeros((C, FV), tl.float32)
    s_suffix += (bh * N + n) * (F * V)
    z_suffix += (bh * N + n) * F
    tiles = 0
    if HAS_OUT or n < N - 1:
        tiles = NF // TILE
    for tile in range(tiles):
        i_KF, j_KF = _hot(hot, 0, tile, NF, TILE, FK), _hot(hot, 1, tile, NF, TILE, FK)
        ds_FV, dz_F = _held(s_suffix, z_suffix, tile, F, V, FV, TILE)
        i_CF, j_CF = _factors(k_CK, i_KF, j_KF, ones, tile, NF, TILE)
        dv_CV = dot(narrow(i_CF * j_CF, ds_FV.dtype), ds_FV, dv_CV)
        dphi_CF = dot(v_CV, tl.trans(ds_FV)) + dz_F[None, :]
        dk_CK = _through(dk_CK, dphi_CF, i_CF, j_CF, i_KF, j_KF)
    if PAIRS:
        q += (bh // H) * q_b + (bh % H) * q_h
        dy += bh // H * T * H * V + bh % H * V
        scale += bh * T
        shift += bh * T
        for start in range(first, min(first + C, T), S):
            dk_CK, dv_CV = _grad_kv_met(
                dk_CK, dv_CV, k_CK, v_CV, t_C, q, dy, scale, shift, start,
                q_t, H * V, T, True, K, V, FK, FV, S,
            )  # fmt: skip
        for start in range(first + C, min(n * L + L, T), S):
            dk_CK, dv_CV = _grad_kv_met(
                dk_CK, dv_CV, k_CK, v_CV, t_C, q, dy, scale, shift, start,
                q_t, H * V, T, False, K, V, FK, FV, S,
            )  # fmt: skip
    _store_block(dk, dk_CK, bh, H, t_C, T, K, FK)
    _store_block(dv, dv_CV, bh, H, t_C, T, V, FV)


# ------------------------------------------------------------------------------------------ the launches

# Block sizes, tuned on an H100, independent of lengths. Segments are a multiple of all C and S; GROUP is the
# largest number of tiles of a state that one program accumulates.
CONFIGS: dict[str, dict[str, int]] = {
    "sums": {"C": 32, "GROUP": 3, "num_warps": 4, "num_stages": 4, "maxnreg": 168},
    "outputs": {"C": 128, "S": 64, "num_warps": 4, "num_stages": 3},
    "grad_q": {"C": 64, "S": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
    "grad_kv": {"C": 64, "S": 32, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
}
WIDE: dict[str, dict[str, int]] = {"sums": {"GROUP": 1}, "outputs": {"C": 64}, "grad_kv": {"maxnreg": 255}}
"""Overrides for more than 64 value dimensions, whose sums would not fit into registers."""


class _Sizes:
    """Sizes that all launches of a call share."""

    def __init__(self, k_BTHK: Tensor, v_BTHV: Tensor) -> None:
        self.batch, self.time, self.heads, key = k_BTHK.shape
        value, device = v_BTHV.shape[-1], k_BTHK.device
        self.features = FEATURES(key)
        self.segment = SEGMENT
        self.segments = cdiv(self.time, self.segment)
        hot_2KF, ones_2F, self.weight = _table(key, v_BTHV.dtype, device)
        self.table = hot_2KF, ones_2F
        self.width = cdiv(self.features * (value + 1), 32) * 32
        self.constants: dict[str, Any] = {
            "K": key, "V": value, "F": self.features, "NF": self.weight.shape[0], "TILE": TILE,
            "FK": max(16, triton.next_power_of_2(key)), "FV": max(16, triton.next_power_of_2(value)),
        }  # fmt: skip
        self.empty = functools.partial(torch.empty, dtype=torch.float32, device=device)

    def config(self, kernel: str) -> dict[str, int]:
        return CONFIGS[kernel] | (WIDE.get(kernel, {}) if self.constants["FV"] > 64 else {})

    def blocks(self, kernel: str) -> tuple[int]:
        return (self.batch * self.heads * cdiv(self.time, self.config(kernel)["C"]),)

    def sums(
        self, k: Tensor, v: Tensor, scale: Tensor | None, shift: Tensor | None, first: int, count: int
    ) -> Tensor:
        """(B, H, N, WIDTH); only segments first .. first + count - 1 are computed."""
        sums = self.empty((self.batch, self.heads, self.segments, self.width))
        tiles = self.constants["NF"] // TILE
        # as many tiles as fit into registers: keys and values are read once for each group
        config = self.config("sums")
        group = next(size for size in range(config["GROUP"], 0, -1) if tiles % size == 0)
        if count:
            _sums[(self.batch * self.heads * count * tiles // group,)](
                k, v, scale, shift, *self.table, sums, self.time, self.segment, self.segments, first, count,
                self.heads, *k.stride()[:3], *v.stride()[:3], WIDTH=self.width, SCALED=scale is not None,
                **self.constants, **config | {"GROUP": group},
            )  # fmt: skip
        return sums

    def prefix(
        self, sums: Tensor, s_in: Tensor | None, z_in: Tensor | None, first: int, count: int,
        dtype: torch.dtype, *, want_out: bool, reverse: bool = False, store: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """s and z before each segment, (B, H, N, F, V) and (B, H, N, F), unless N is 0 as they are not to be
        stored; and after the last, if requested."""
        size = self.batch, self.heads, self.segments if store else 0, self.features
        value = self.constants["V"]
        s_prefix = torch.empty(*size, value, dtype=dtype, device=sums.device)
        z_prefix = self.empty(size)
        outs = size[:2] if want_out else (self.batch, 0)
        s_out = self.empty((*outs, self.features, value))
        z_out = self.empty((*outs, self.features))
        block = 1024
        grid = (self.batch * self.heads * cdiv(self.features * (value + 1), block),)
        _prefix[grid](
            sums, self.weight, s_in, z_in, s_prefix, z_prefix, s_out, z_out, self.segments, first, count,
            F=self.features, V=value, WIDTH=self.width, BLOCK=block,
            HAS_IN=s_in is not None, HAS_OUT=want_out, REVERSE=reverse, STORE=store,
        )  # fmt: skip
        return s_prefix, z_prefix, s_out, z_out


@torch.library.custom_op("holdall::taylor_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, z: Tensor | None, eps: float, want_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, its denominators, the states before the segments, the last state."""
    sizes = _Sizes(k, v)
    y, den, *states = _forward_fake(q, k, v, s, z, eps, want_state)
    s, z = (None, None) if s is None or z is None else (s.contiguous(), z.contiguous())
    if s is not None or want_state or sizes.segments > 1:
        count = sizes.segments if want_state else sizes.segments - 1
        sums = sizes.sums(k, v, None, None, 0, count)
        states = list(sizes.prefix(sums, s, z, 0, count, v.dtype, want_out=want_state))
    _outputs[sizes.blocks("outputs")](
        q, k, v, states[0], states[1], *sizes.table, y, den, sizes.time, sizes.segment, sizes.segments,
        sizes.heads, eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], HAS_IN=s is not None,
        **sizes.constants, **sizes.config("outputs"),
    )  # fmt: skip
    return y, den, states[0], states[1], states[2], states[3]


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, z: Tensor | None, eps: float, want_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, time, heads, key), value = k.shape, v.shape[-1]
    features, segments = FEATURES(key), cdiv(time, SEGMENT)
    y, den = v.new_empty(batch, time, heads, value), v.new_empty(batch, heads, time, dtype=torch.float32)
    held = heads if s is not None or want_state or segments > 1 else 0
    s_prefix = v.new_empty(batch, held, segments, features, value)
    out = (batch, heads if want_state else 0, features)
    z_prefix = den.new_empty(batch, held, segments, features)
    return y, den, s_prefix, z_prefix, den.new_empty(*out, value), den.new_empty(out)


@once_differentiable()
@torch.library.custom_op("holdall::taylor_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, den: Tensor, s_prefix: Tensor, z_prefix: Tensor, dy: Tensor,
    ds: Tensor | None, dz: Tensor | None, eps: float, has_in: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, where there was one, of the incoming state."""
    sizes = _Sizes(k, v)
    dy = dy.contiguous()
    ds, dz = _gradients_of_state(ds, dz, k, v)
    dq, dk, dv, ds_in, dz_in = _backward_fake(q, k, v, y, den, s_prefix, z_prefix, dy, ds, dz, eps, has_in)
    scale, shift = torch.empty_like(den), torch.empty_like(den)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    lengths = sizes.time, sizes.segment, sizes.segments
    _grad_q[sizes.blocks("grad_q")](
        q, k, v, y, dy, den, s_prefix, z_prefix, *sizes.table, dq, scale, shift, *lengths, sizes.heads, eps,
        *strides, HAS_IN=has_in, **sizes.constants, **sizes.config("grad_q"),
    )  # fmt: skip
    s_suffix, z_suffix = s_prefix, z_prefix  # never read where no later segment and no state has a gradient
    if ds is not None or has_in or sizes.segments > 1:
        first = 0 if has_in else 1
        sums = sizes.sums(q, dy, scale, shift, first, sizes.segments - first)
        s_suffix, z_suffix, ds_in, dz_in = sizes.prefix(
            sums, ds, dz, first, sizes.segments - first, v.dtype, want_out=has_in, reverse=True
        )
    _grad_kv[sizes.blocks("grad_kv")](
        q, k, v, dy, scale, shift, s_suffix, z_suffix, *sizes.table, dk, dv, *lengths, sizes.heads,
        *strides, HAS_OUT=ds is not None, PAIRS=True, **sizes.constants, **sizes.config("grad_kv"),
    )  # fmt: skip
    return dq, dk, dv, ds_in, dz_in


def _gradients_of_state(
    ds: Tensor | None, dz: Tensor | None, k: Tensor, v: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of s and z, or None if neither was used; if one was, the other's is zero."""
    if ds is None and dz is None:
        return None, None
    key, value = k.shape[-1], v.shape[-1]
    size = k.shape[0], k.shape[2], FEATURES(key)
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device=k.device)
    return (
        zeros(*size, value) if ds is None else ds.contiguous(),
        zeros(size) if dz is None else dz.contiguous(),
    )


@_backward.register_fake
def _backward_fake(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, den: Tensor, s_prefix: Tensor, z_prefix: Tensor, dy: Tensor,
    ds: Tensor | None, dz: Tensor | None, eps: float, has_in: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, _, heads, key), value = k.shape, v.shape[-1]
    state = (batch, heads if has_in else 0, FEATURES(key))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, den.new_empty(*state, value), den.new_empty(state)


@torch.library.custom_op("holdall::taylor_absorb", mutates_args=())
def _absorb(k: Tensor, v: Tensor, s: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
    sizes = _Sizes(k, v)
    s, z = (None, None) if s is None or z is None else (s.contiguous(), z.contiguous())
    sums = sizes.sums(k, v, None, None, 0, sizes.segments)
    # no query asks for the states on the way
    _, _, s_out, z_out = sizes.prefix(sums, s, z, 0, sizes.segments, v.dtype, want_out=True, store=False)
    return s_out, z_out


@_absorb.register_fake
def _absorb_fake(k: Tensor, v: Tensor, s: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor]:
    (batch, _, heads, key), value = k.shape, v.shape[-1]
    z_out = v.new_empty(batch, heads, FEATURES(key), dtype=torch.float32)
    return z_out.new_empty(*z_out.shape, value), z_out


@once_differentiable()
@torch.library.custom_op("holdall::taylor_absorb_backward", mutates_args=())
def _absorb_backward(k: Tensor, v: Tensor, ds: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Every token sees the same gradient of the state: one segment, no pairs."""
    sizes = _Sizes(k, v)
    sizes.segment, sizes.segments = max(sizes.time, 1), 1
    dk, dv = _absorb_backward_fake(k, v, ds, dz)
    weight_F = sizes.weight[: sizes.features]
    ds, dz = (ds * weight_F[:, None]).to(v.dtype).contiguous(), (dz * weight_F).contiguous()
    strides = *k.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    _grad_kv[sizes.blocks("grad_kv")](
        k, k, v, v, dz, dz, ds, dz, *sizes.table, dk, dv, sizes.time,
        sizes.segment, 1, sizes.heads, *strides, HAS_OUT=True, PAIRS=False, **sizes.constants,
        **sizes.config("grad_kv"),
    )  # fmt: skip
    return dk, dv


@_absorb_backward.register_fake
def _absorb_backward_fake(k: Tensor, v: Tensor, ds: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


# ---------------------------------------------------------------------------------- gradients and batches


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, s, _, ctx.eps, _ = inputs
    ctx.has_in = s is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output[:4])


def _call_backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    *_, ds, dz = others
    q, k, v, y, *rest = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dq, dk, dv, ds_in, dz_in = _backward(q, k, v, y, *rest, dy, ds, dz, ctx.eps, ctx.has_in)
    return dq, dk, dv, *((ds_in, dz_in) if ctx.has_in else (None, None)), None, None


def _save_absorb(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, s, _ = inputs
    ctx.has_in = s is not None
    ctx.save_for_backward(k, v)


def _call_absorb_backward(ctx: Any, ds: Tensor, dz: Tensor) -> tuple[Any, ...]:
    k, v = ctx.saved_tensors
    return *_absorb_backward(k, v, ds, dz), *((ds, dz) if ctx.has_in else (None, None))


_forward.register_autograd(_call_backward, setup_context=_save_forward)
_absorb.register_autograd(_call_absorb_backward, setup_context=_save_absorb)
for _op in (_forward, _backward, _absorb, _absorb_backward):
    register_batch_vmap(_op)
