"""The delta rule: a state of fixed size that is corrected towards the new value, where a sum would only add.

    delta rule        S' = diag(w_t) S_{t-1}        S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T
    generalised       S_t = diag(w_t) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T
    both              y_t = S_t^T q_t

The first reads what the decayed state holds under a key and moves it towards the value: the gradient step of
size beta on |S^T k - v|^2 / 2 (DeltaNet, Gated DeltaNet, Kimi Delta Attention). The second has a removal key
b and a place a where what it removes is put, and it reads the state as it was before the decay (RWKV-7).
The decay w_t is absent, one number per head or one per key dimension.

How a chunk is read at once. Every token writes one row u_t under the key a_t, where u_t depends on what
earlier tokens of the chunk wrote. With G(t, s) the decay from token s to token t and S_0 the state before:

    u_t = c_t + S_{t-1}^T b_t = c_t + S_0^T G(t-1, 0) b_t + sum_{s < t} (b_t . G(t-1, s) a_s) u_s

is a unit lower-triangular system (the WY or UT transform), solved for the parts with and without S_0. The
delta rule is the case a = k, b = -beta w k, c = beta v; in the general one c is what the plain writes k v^T
of the chunk hold under b. Solutions of all chunks are found side by side; what remains to be done in
order are two products with the state per chunk.

Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
2024, arXiv 2406.06484; Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, arXiv 2412.06464.

Letters: q_t, k_t, v_t query, key and value of token t, beta_t the strength of a write, w_t the decay, S_t the
state, S' the decayed one, a_t and b_t place and key of what is removed, y_t the output, u_t what is written,
c_t its part that no other write of the chunk changes, G(t, s) the decay from token s to t. Of shapes: B row,
T time, N chunks, C time within a chunk, H heads, K key dim, V value dim, R reads of a state.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.linear_attention import decay_between, per_key
from holdall.ops.running import cumsum

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

CHUNK = 16
"""Tokens per chunk. Longer ones take fewer steps but lose digits: a u sums over all before it in a chunk."""
SIDE_BY_SIDE = 64
"""Chunks that are solved side by side: enough to keep a device busy, few enough to bound the memory."""


def kernel_refusal(key_dim: int) -> str:
    """Why there is no kernel for heads of so many key dimensions; empty if there is one."""
    return kernel_of(kernel_refusal)(key_dim)


def unit_length(x: Float[Tensor, "*b k"], eps: float = 1e-6) -> Float[Tensor, "*b k"]:
    """x / sqrt(|x|^2 + eps), in at least fp32. Along a key of unit length, beta in [0, 2] never amplifies."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def delta_rule_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    beta_BTH: Float[Tensor, "b t h"],
    s_BHKV: Float[Tensor, "b h k v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """The definition; arguments and results as in `delta_rule`."""
    dtype = s_BHKV.dtype
    ys = []
    for t in range(q_BTHK.shape[1]):
        q_BHK, k_BHK, v_BHV = (x[:, t].to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV))
        if log_decay is not None:
            s_BHKV = per_key(log_decay)[:, t, :, :, None].to(dtype).exp() * s_BHKV
        held_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, k_BHK)
        u_BHV = beta_BTH[:, t, :, None].to(dtype) * (v_BHV - held_BHV)
        s_BHKV = s_BHKV + k_BHK[..., :, None] * u_BHV[..., None, :]
        ys.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BHK))
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), s_BHKV


def delta_rule(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    beta_BTH: Float[Tensor, "b t h"],
    s_BHKV: Float[Tensor, "b h k v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    chunk: int = CHUNK,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Chunk by chunk, O(T (C (K + V) + K V)).

    Args:
        q_BTHK: queries; a scale such as 1 / sqrt(K) is the caller's.
        k_BTHK: keys, of unit length if beta goes up to 2, else the state may grow without bound.
        beta_BTH: how far the state moves towards the value: 0 not at all, 1 all the way, 2 as far beyond.
        s_BHKV: the incoming state, in the dtype to compute in, zeros if nothing was read yet.
        log_decay: log w_t <= 0, (B, T, H) or (B, T, H, K); None for no decay.
        chunk: tokens per chunk. With a decay per key dimension, pairs within a chunk cost K times as
            much memory, so such chunks are cut to 16 tokens. The kernel has a chunk length of its own.
        inplace: the parallel form may write one token into the state. Not for training.
        form: "loop", "parallel" or "kernel".

    Returns:
        y_BTHV in the dtype of v, and the next state.
    """
    tensors = q_BTHK, k_BTHK, v_BTHV, beta_BTH, s_BHKV, log_decay
    if form == "kernel":
        return kernel_of(delta_rule)(*tensors)
    if form == "loop":
        return delta_rule_loop(*tensors)
    if q_BTHK.shape[1] == 1:  # no chunk to speak of
        return _step_in_place(*tensors) if inplace else delta_rule_loop(*tensors)
    dtype = s_BHKV.dtype
    log_w, k_BTHK = _log_w(log_decay, q_BTHK, dtype), k_BTHK.to(dtype)
    beta_BTH1 = beta_BTH[..., None].to(dtype)
    corrected = (k_BTHK, -beta_BTH1 * log_w.exp() * k_BTHK, beta_BTH1 * v_BTHV)
    y_BTHV, s_BHKV = _in_chunks(q_BTHK, corrected, None, s_BHKV, log_w, chunk)
    return y_BTHV.to(v_BTHV.dtype), s_BHKV


def _step_in_place(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, beta_B1H: Tensor, s_BHKV: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule_loop`, in the memory of the state."""
    q_BHK, k_BHK, v_BHV, beta_BH = (x[:, 0].to(s_BHKV.dtype) for x in (q_B1HK, k_B1HK, v_B1HV, beta_B1H))
    if log_decay is not None:
        s_BHKV.mul_(per_key(log_decay)[:, 0, :, :, None].to(s_BHKV.dtype).exp())
    u_BHV = beta_BH[..., None] * (v_BHV - _read(s_BHKV, k_BHK))
    s_BHKV.addcmul_(k_BHK[..., :, None], u_BHV[..., None, :])
    return _read(s_BHKV, q_BHK)[:, None].to(v_B1HV.dtype), s_BHKV


def _read(s_BHKV: Tensor, key_BHK: Tensor) -> Tensor:
    """S^T k, (B, H, V)."""
    return (key_BHK[..., None, :] @ s_BHKV)[..., 0, :]


def generalised_delta_rule_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    a_BTHK: Float[Tensor, "b t h k"],
    b_BTHK: Float[Tensor, "b t h k"],
    s_BHKV: Float[Tensor, "b h k v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """The definition; arguments and results as in `generalised_delta_rule`."""
    dtype = s_BHKV.dtype
    ys = []
    for t in range(q_BTHK.shape[1]):
        q_BHK, k_BHK, v_BHV, a_BHK, b_BHK = (
            x[:, t].to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
        )
        held_BHV = torch.einsum("bhkv,bhk->bhv", s_BHKV, b_BHK)
        if log_decay is not None:
            s_BHKV = per_key(log_decay)[:, t, :, :, None].to(dtype).exp() * s_BHKV
        s_BHKV = s_BHKV + a_BHK[..., :, None] * held_BHV[..., None, :]
        s_BHKV = s_BHKV + k_BHK[..., :, None] * v_BHV[..., None, :]
        ys.append(torch.einsum("bhkv,bhk->bhv", s_BHKV, q_BHK))
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), s_BHKV


def generalised_delta_rule(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    a_BTHK: Float[Tensor, "b t h k"],
    b_BTHK: Float[Tensor, "b t h k"],
    s_BHKV: Float[Tensor, "b h k v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    chunk: int = CHUNK,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Chunk by chunk, O(T (C (K + V) + K V)). Arguments and results are those of `delta_rule`, but:

    Args:
        a_BTHK: where what the state holds under b is put; its negative share of b to remove that.
        b_BTHK: the key under which the state is read, before the decay.
    """
    tensors = q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, s_BHKV, log_decay
    if form == "kernel":
        return kernel_of(generalised_delta_rule)(*tensors)
    if form == "loop":
        return generalised_delta_rule_loop(*tensors)
    if q_BTHK.shape[1] == 1:
        return _generalised_step_in_place(*tensors) if inplace else generalised_delta_rule_loop(*tensors)
    dtype = s_BHKV.dtype
    log_w, a_BTHK, b_BTHK = _log_w(log_decay, q_BTHK, dtype), a_BTHK.to(dtype), b_BTHK.to(dtype)
    corrected, plain = (a_BTHK, b_BTHK, torch.zeros_like(v_BTHV)), (k_BTHK, v_BTHV)
    y_BTHV, s_BHKV = _in_chunks(q_BTHK, corrected, plain, s_BHKV, log_w, chunk)
    return y_BTHV.to(v_BTHV.dtype), s_BHKV


def _generalised_step_in_place(
    q_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    s_BHKV: Tensor,
    log_decay: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token of `generalised_delta_rule_loop`, in the memory of the state."""
    q_BHK, k_BHK, v_BHV, a_BHK, b_BHK = (
        x[:, 0].to(s_BHKV.dtype) for x in (q_B1HK, k_B1HK, v_B1HV, a_B1HK, b_B1HK)
    )
    held_BHV = _read(s_BHKV, b_BHK)
    if log_decay is not None:
        s_BHKV.mul_(per_key(log_decay)[:, 0, :, :, None].to(s_BHKV.dtype).exp())
    s_BHKV.addcmul_(a_BHK[..., :, None], held_BHV[..., None, :])
    s_BHKV.addcmul_(k_BHK[..., :, None], v_BHV[..., None, :])
    return _read(s_BHKV, q_BHK)[:, None].to(v_B1HV.dtype), s_BHKV


# ----------------------------------------------------------------------------------------- within chunks


def _log_w(log_decay: Tensor | None, q_BTHK: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, H, 1 or K); zeros where nothing decays."""
    if log_decay is None:
        return torch.zeros_like(q_BTHK[..., :1], dtype=dtype)
    return per_key(log_decay).to(dtype)


def _in_chunks(
    q_BTHK: Tensor,
    corrected: tuple[Tensor, Tensor, Tensor],
    plain: tuple[Tensor, Tensor] | None,
    s_BHKV: Tensor,
    log_w: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state, where each token writes a (c + S^T b)^T, corrected being a, b and c, and then
    k v^T, plain being k and v if there are such writes."""
    if log_w.shape[-1] > 1:
        chunk = min(chunk, 16)
    inputs = [x.to(s_BHKV.dtype) for x in (q_BTHK, log_w, *corrected, *(plain or ()))]
    ys = []
    for now in zip(*(x.split(chunk * SIDE_BY_SIDE, dim=1) for x in inputs), strict=True):
        new = now[0].shape[1]
        size = min(chunk, new)
        # zeros behind the last token write nothing and forget nothing
        padded = (F.pad(x, (0, 0, 0, 0, 0, -new % size)) for x in now)
        y_BNHCV, s_BHKV = _side_by_side(s_BHKV, *(x.unflatten(1, (-1, size)).transpose(2, 3) for x in padded))
        ys.append(y_BNHCV.transpose(2, 3).flatten(1, 2)[:, :new])
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1), s_BHKV


def _side_by_side(
    s_BHKV: Tensor, q: Tensor, log_w: Tensor, a: Tensor, b: Tensor, c: Tensor, *plain: Tensor
) -> tuple[Tensor, Tensor]:
    """Some chunks, (B, N, H, C, .) each; the system of each is solved before any state is known."""
    between_CCK = decay_between(log_w)
    since_CK = cumsum(log_w, -2).exp()
    before_CK = F.pad(since_CK[..., :-1, :], (0, 0, 1, 0), value=1.0)
    # the state after a token has two readers: that token's query and the next token's b
    reads_CRK = torch.stack((F.pad(b[..., 1:, :], (0, 0, 0, 1)), q), dim=-2)
    from_a_CC, y_from_a_CC = _pairs(reads_CRK, a, between_CCK)
    y_CV, gain_KV = torch.zeros_like(c), None
    if plain:
        k, v = plain
        from_k_CC, y_from_k_CC = _pairs(reads_CRK, k, between_CCK)
        c, y_CV = c + _one_later(from_k_CC) @ v, y_from_k_CC @ v
        gain_KV = (k * between_CCK[..., -1, :, :]).mT @ v
    # of the matrix, only what lies below the diagonal is looked at; on it stand ones
    u_CV, u_from_s_CK = torch.linalg.solve_triangular(
        -_one_later(from_a_CC), torch.cat((c, b * before_CK), dim=-1), upper=False, unitriangular=True
    ).split([c.shape[-1], b.shape[-1]], dim=-1)
    a_end_KC, keep_K1 = (a * between_CCK[..., -1, :, :]).mT, since_CK[..., -1, :, None]
    states, us = [], []
    for i in range(q.shape[1]):
        states.append(s_BHKV)
        us.append(u_CV[:, i] + u_from_s_CK[:, i] @ s_BHKV)
        s_BHKV = keep_K1[:, i] * s_BHKV + a_end_KC[:, i] @ us[-1]
        s_BHKV = s_BHKV if gain_KV is None else s_BHKV + gain_KV[:, i]
    y_CV = y_CV + (q * since_CK) @ torch.stack(states, dim=1) + y_from_a_CC @ torch.stack(us, dim=1)
    return y_CV, s_BHKV


def _pairs(reads_CRK: Tensor, keys_CK: Tensor, between_CCK: Tensor) -> tuple[Tensor, ...]:
    """read_t . G(t, s) key_s of all pairs, (..., C, C) for each of the R readers."""
    if between_CCK.shape[-1] == 1:
        pairs_RCC = torch.einsum("bnhtrk,bnhsk->bnhrts", reads_CRK, keys_CK) * between_CCK[..., None, :, :, 0]
    else:
        pairs_RCC = torch.einsum("bnhtsk,bnhsk,bnhtrk->bnhrts", between_CCK, keys_CK, reads_CRK)
    return pairs_RCC.unbind(-3)


def _one_later(pairs_CC: Tensor) -> Tensor:
    """From what the next token reads to what a token reads: row t becomes row t + 1, the first is zero."""
    return F.pad(pairs_CC[..., :-1, :], (0, 0, 1, 0))
