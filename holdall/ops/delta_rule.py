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
T time, N chunks, C time within a chunk, H heads, M heads of all rows, K key dim, V value dim, R reads of a
state, X all columns of a system.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.fading import Fading
from holdall.ops.linear_attention import per_key

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
        chunk: tokens per chunk. The kernel has a chunk length of its own.
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
    inputs = _log_w(log_decay, q_BTHK, s_BHKV.dtype), q_BTHK, k_BTHK, v_BTHV, beta_BTH[..., None]
    y_BTHV, s_BHKV = _in_chunks(_corrected, inputs, s_BHKV, chunk)
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
    least_log_decay: float = -math.inf,
    chunk: int = CHUNK,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Chunk by chunk, O(T (C (K + V) + K V)). Arguments and results are those of `delta_rule`, but:

    Args:
        least_log_decay: what no log decay is below; a bound near zero saves the parallel form work.
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
    inputs = _log_w(log_decay, q_BTHK, s_BHKV.dtype), q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK
    solve = functools.partial(_generalised, least_log_decay=least_log_decay)
    y_BTHV, s_BHKV = _in_chunks(solve, inputs, s_BHKV, chunk)
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


class _Chunks(NamedTuple):
    """Chunks before any state is known, (N, M, C, .) each: u = u_CV + u_from_s S_0, and what that makes.

    y_CV and gain_KV are what plain writes add to outputs and state, None without any.
    """

    u_CV: Tensor
    u_from_s_CK: Tensor
    y_from_s_CK: Tensor
    y_from_u_CC: Tensor
    keep_K1: Tensor
    gain_from_u_KC: Tensor
    y_CV: Tensor | None = None
    gain_KV: Tensor | None = None


def _in_chunks(
    solve: Callable[..., _Chunks], inputs: tuple[Tensor, ...], s_BHKV: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Outputs and final state, chunks being made of these inputs, (B, T, H, .) each."""
    (rows, _, heads), ys, s_MKV = inputs[0].shape[:3], [], s_BHKV.flatten(0, 1)
    inputs = tuple(x_BTHX.to(s_BHKV.dtype) for x_BTHX in inputs)
    for now in zip(*(x_BTHX.split(chunk * SIDE_BY_SIDE, dim=1) for x_BTHX in inputs), strict=True):
        new = now[0].shape[1]
        size = min(chunk, new)
        # zeros behind the last token write nothing and forget nothing
        padded = (F.pad(x_BTHX, (0, 0, 0, 0, 0, -new % size)) for x_BTHX in now)
        # what products read together lies together
        chunks = (x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).flatten(1, 2) for x in padded)
        y_NMCV, s_MKV = _one_by_one(solve(*chunks), s_MKV)
        y_BNCHV = y_NMCV.unflatten(1, (rows, heads)).permute(1, 0, 3, 2, 4)
        ys.append(y_BNCHV.flatten(1, 2)[:, :new])
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1), s_MKV.unflatten(0, (rows, heads))


def _corrected(log_w: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> _Chunks:
    """Of the delta rule, which reads the decayed state."""
    fading = Fading(log_w)
    ((from_k_CC, y_from_k_CC),) = _pairs(torch.stack((k, q), dim=-2), (k,), fading)
    right_CX = beta * torch.cat((v, -k * fading.since_CK), dim=-1)
    u_CV, u_from_s_CK = _solved(beta * from_k_CC, right_CX).split([v.shape[-1], k.shape[-1]], dim=-1)
    return _Chunks(
        u_CV, u_from_s_CK, q * fading.since_CK, y_from_k_CC, fading.since_CK[..., -1, :, None],
        (k * fading.until_CK).mT,
    )  # fmt: skip


def _generalised(
    log_w: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, least_log_decay: float
) -> _Chunks:
    """Of the generalised rule, which reads the state before it decays."""
    fading = Fading(log_w, least=least_log_decay)
    # the state after a token has two readers: that token's query and the next token's b
    reads_CRK = torch.stack((F.pad(b[..., 1:, :], (0, 0, 0, 1)), q), dim=-2)
    (from_a_CC, y_from_a_CC), (from_k_CC, y_from_k_CC) = _pairs(reads_CRK, (a, k), fading)
    before_CK = F.pad(fading.since_CK[..., :-1, :], (0, 0, 1, 0), value=1.0)
    right_CX = torch.cat((_one_later(from_k_CC) @ v, b * before_CK), dim=-1)
    u_CV, u_from_s_CK = _solved(-_one_later(from_a_CC), right_CX).split([v.shape[-1], b.shape[-1]], dim=-1)
    return _Chunks(
        u_CV, u_from_s_CK, q * fading.since_CK, y_from_a_CC, fading.since_CK[..., -1, :, None],
        (a * fading.until_CK).mT, y_from_k_CC @ v, (k * fading.until_CK).mT @ v,
    )  # fmt: skip


def _one_by_one(chunks: _Chunks, s_MKV: Tensor) -> tuple[Tensor, Tensor]:
    """The state through all chunks, and their outputs."""
    states, us, count = [], [], len(chunks.u_CV)
    # unbind and not an index per chunk, whose gradient would be a tensor of zeros for all chunks, each
    gains = [None] * count if chunks.gain_KV is None else chunks.gain_KV.unbind()
    parts = chunks.u_CV, chunks.u_from_s_CK, chunks.keep_K1, chunks.gain_from_u_KC
    for u_CV, u_from_s_CK, keep_K1, gain_from_u_KC, gain_KV in zip(
        *(part.unbind() for part in parts), gains, strict=True
    ):
        states.append(s_MKV)
        us.append(torch.baddbmm(u_CV, u_from_s_CK, s_MKV))
        kept_MKV = keep_K1 * s_MKV if gain_KV is None else torch.addcmul(gain_KV, keep_K1, s_MKV)
        s_MKV = torch.baddbmm(kept_MKV, gain_from_u_KC, us[-1])
    y_CV = chunks.y_from_s_CK @ torch.stack(states) + chunks.y_from_u_CC @ torch.stack(us)
    return y_CV if chunks.y_CV is None else y_CV + chunks.y_CV, s_MKV


def _pairs(reads_CRK: Tensor, keys: tuple[Tensor, ...], fading: Fading) -> list[tuple[Tensor, ...]]:
    """read_t . G(t, s) key_s of all pairs, (..., C, C) for each of the R readers, of each of the keys."""
    if fading.since_CK.shape[-1] == 1:
        between_CC = fading.between()[..., None, :]
        pairs = [torch.einsum("...trk,...sk->...trs", reads_CRK, k_CK) * between_CC for k_CK in keys]
    else:
        pairs = list(fading.pairs(reads_CRK, torch.stack(keys, dim=-2)).unbind(-2))
    return [pairs_CRC.unbind(-2) for pairs_CRC in pairs]


def _solved(system_CC: Tensor, right_CX: Tensor) -> Tensor:
    """X of (1 + system) X = right, the system being what lies below the diagonal of the matrix.

    By forward substitution: the inverse of a chunk whose keys are nearly the same has lost its digits. Taken
    from the right, since LAPACK wants columns together, and would be given copies.
    """
    return torch.linalg.solve_triangular(
        system_CC.mT, right_CX.mT, upper=True, left=False, unitriangular=True
    ).mT


def _one_later(pairs_CC: Tensor) -> Tensor:
    """From what the next token reads to what a token reads: row t becomes row t + 1, the first is zero."""
    return F.pad(pairs_CC[..., :-1, :], (0, 0, 1, 0))
