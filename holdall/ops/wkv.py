"""RWKV's attentions over a past that fades at a fixed rate, where the token itself has a bonus of its own.

RWKV-4, per channel: a mean of all values, weighted by their keys and by their age.

    wkv_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t)
          / (sum_{i<t} e^{(t-1-i) w + k_i}     + e^{u + k_t})

Keys are exponents of any size, so no sum of exponentials is ever formed: the past is the mean m of its values
and the logarithm l of its weight, and a token moves the mean by its share of the weight, which is a sigmoid.

    wkv_t = m + sigmoid(u + k_t - l) (v_t - m)
    m <- m + sigmoid(k_t - l - w) (v_t - m)         l <- log(e^{l + w} + e^{k_t})

RWKV-5, per head: a matrix of outer products whose rows, one per key channel, fade each at their own rate.

    y_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t       S_t = diag(e^w) S_{t-1} + k_t v_t^T

w <= 0 is the logarithm of a decay and u the bonus; both are fixed over time.

Letters: k_i and v_i key and value of token i, r_t the receptance (query) of token t, e Euler's number, w the
log decay, u the bonus, m and l mean and log weight of the past, S_t the state, y_t the output. Of shapes: B
row, T time, G chunks, C time within a chunk, E channels, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.diagonal_scan import CHUNK, diagonal_scan

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

NOTHING = -1e38
"""The log of no weight at all: finite, so that no difference is NaN, and lost beside any key."""

# ---------------------------------------------------------------------------------------------- RWKV-4


def wkv_loop(
    k_BTE: Float[Tensor, "b t e"],
    v_BTE: Float[Tensor, "b t e"],
    w_E: Float[Tensor, "e"],
    u_E: Float[Tensor, "e"],
    m_BE: Float[Tensor, "b e"],
    l_BE: Float[Tensor, "b e"],
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b e"], Float[Tensor, "b e"]]:
    """The definition, in the dtype of the state; returns wkv_BTE in the dtype of v, and the next m and l.

    Of a past that holds nothing, l is NOTHING; m is zero and does not matter.
    """
    dtype = m_BE.dtype
    w_E, u_E = w_E.to(dtype), u_E.to(dtype)
    ys = []
    for k_BE, v_BE in zip(k_BTE.to(dtype).unbind(1), v_BTE.to(dtype).unbind(1), strict=True):
        ys.append(m_BE + (u_E + k_BE - l_BE).sigmoid() * (v_BE - m_BE))
        l_BE = l_BE + w_E
        m_BE = m_BE + (k_BE - l_BE).sigmoid() * (v_BE - m_BE)
        l_BE = _log_add(k_BE, l_BE)
    return torch.stack(ys, dim=1).to(v_BTE.dtype), m_BE, l_BE


def wkv(
    k_BTE: Float[Tensor, "b t e"],
    v_BTE: Float[Tensor, "b t e"],
    w_E: Float[Tensor, "e"],
    u_E: Float[Tensor, "e"],
    m_BE: Float[Tensor, "b e"],
    l_BE: Float[Tensor, "b e"],
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b e"], Float[Tensor, "b e"]]:
    """The weights of all times first, chunks side by side; given them, the mean is a diagonal recurrence."""
    dtype = m_BE.dtype
    k_BTE, wide_BTE, w_E, u_E = (x.to(dtype) for x in (k_BTE, v_BTE, w_E, u_E))
    l_BTE = _log_weights(k_BTE, w_E, l_BE, chunk)
    before_BTE = torch.cat((l_BE[:, None], l_BTE[:, :-1]), dim=1)
    lead_BTE = k_BTE - (before_BTE + w_E)
    m_BTE = diagonal_scan((-lead_BTE).sigmoid(), lead_BTE.sigmoid() * wide_BTE, m_BE, chunk=chunk)
    past_BTE = torch.cat((m_BE[:, None], m_BTE[:, :-1]), dim=1)
    y_BTE = past_BTE + (u_E + k_BTE - before_BTE).sigmoid() * (wide_BTE - past_BTE)
    # copies: views of the last token would keep all tokens in memory
    return y_BTE.to(v_BTE.dtype), m_BTE[:, -1].clone(), l_BTE[:, -1].clone()


def _log_weights(k_BTE: Tensor, w_E: Tensor, l_BE: Tensor, chunk: int) -> Tensor:
    """l_t = log(e^{l_{t-1} + w} + e^{k_t}) after each token, (B, T, E)."""
    rows, total = k_BTE.shape[:2]
    if total <= chunk:
        ls = []
        for k_BE in k_BTE.unbind(1):
            l_BE = _log_add(k_BE, l_BE + w_E)
            ls.append(l_BE)
        return torch.stack(ls, dim=1)
    k_GCE = F.pad(k_BTE, (0, 0, 0, -total % chunk), value=NOTHING).unflatten(1, (-1, chunk)).flatten(0, 1)
    # each chunk as if nothing came before it, then what did come before, aged
    alone_GCE = _log_weights(k_GCE, w_E, torch.full_like(k_GCE[:, 0], NOTHING), chunk)
    alone_BGCE = alone_GCE.unflatten(0, (rows, -1))
    after_BGE = _log_weights(alone_BGCE[:, :, -1], chunk * w_E, l_BE, alone_BGCE.shape[1])
    before_BGE = torch.cat((l_BE[:, None], after_BGE[:, :-1]), dim=1)
    age_C1 = torch.arange(1, chunk + 1, device=w_E.device)[:, None]
    return _log_add(alone_BGCE, before_BGE[:, :, None] + age_C1 * w_E).flatten(1, 2)[:, :total]


def _log_add(key: Tensor, past: Tensor) -> Tensor:
    """log(e^key + e^past). The past may be NOTHING, where torch.logaddexp's second derivative is NaN."""
    return key - F.logsigmoid(key - past)


# ---------------------------------------------------------------------------------------------- RWKV-5


def kernel_refusal(key_dim: int) -> str:
    """Why there is no kernel of RWKV-5's for heads of so many key dimensions; empty if there is one."""
    return kernel_of(kernel_refusal)(key_dim)


def matrix_wkv_loop(
    r_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    w_HK: Float[Tensor, "h k"],
    u_HK: Float[Tensor, "h k"],
    s_BHKV: Float[Tensor, "b h k v"],
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """The definition, in the dtype of the state; returns y_BTHV in the dtype of v, and the next state."""
    dtype = s_BHKV.dtype
    keep_HK1, u_HK1 = w_HK.to(dtype).exp()[..., None], u_HK.to(dtype)[..., None]
    ys = []
    for r_BHK, k_BHK, v_BHV in zip(*(x.to(dtype).unbind(1) for x in (r_BTHK, k_BTHK, v_BTHV)), strict=True):
        kv_BHKV = k_BHK[..., None] * v_BHV[..., None, :]
        ys.append(torch.einsum("bhk,bhkv->bhv", r_BHK, s_BHKV + u_HK1 * kv_BHKV))
        s_BHKV = keep_HK1 * s_BHKV + kv_BHKV
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), s_BHKV


def matrix_wkv(
    r_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    w_HK: Float[Tensor, "h k"],
    u_HK: Float[Tensor, "h k"],
    s_BHKV: Float[Tensor, "b h k v"],
    *,
    chunk: int = 64,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """All chunks at once: within one by halves, between them by a state for each. O(T (C (K + V) + K V)).

    A later token sees an earlier one through the middle of the smallest block that holds both: what has faded
    up to there is a factor of the key, what fades from there on one of the receptance, and both are powers
    of decays, never a quotient. Blocks of 2, 4, ... tokens up to the chunk, a power of two, hold all pairs.

    `form` is "loop", "parallel" or "kernel", which has a chunk of its own. With `inplace`, the parallel form
    writes one token into the memory of the state. Not for training.
    """
    tensors = r_BTHK, k_BTHK, v_BTHV, w_HK, u_HK, s_BHKV
    if form == "kernel":
        return kernel_of(matrix_wkv)(*tensors)
    if form == "loop":
        return matrix_wkv_loop(*tensors)
    dtype, total = s_BHKV.dtype, r_BTHK.shape[1]
    if total == 1 and inplace:
        return _matrix_step_in_place(*tensors)
    chunk = min(chunk, 1 << (total - 1).bit_length())
    tail = total - (total - 1) // chunk * chunk
    w_HK, u_H11K = w_HK.to(dtype), u_HK.to(dtype)[:, None, None]
    r_BHGCK, k_BHGCK, v_BHGCV = (
        F.pad(x.to(dtype).transpose(1, 2), (0, 0, 0, chunk - tail)).unflatten(2, (-1, chunk))
        for x in (r_BTHK, k_BTHK, v_BTHV)
    )

    def fading(tokens: int) -> Tensor:
        """The decays over 0, 1, ... tokens, (H, 1, tokens, K)."""
        age_C1 = torch.arange(tokens, device=w_HK.device)[:, None]
        return (age_C1 * w_HK[:, None]).exp()[:, None]

    y_BHGCV = (r_BHGCK * u_H11K * k_BHGCK).sum(-1, keepdim=True) * v_BHGCV
    half = 1
    while half < chunk:
        fade = fading(half)[:, None]
        r, k, v = (x.unflatten(3, (-1, 2, half)) for x in (r_BHGCK, k_BHGCK, v_BHGCV))
        early_k, early_v, late_r = k[:, :, :, :, 0] * fade.flip(-2), v[:, :, :, :, 0], r[:, :, :, :, 1] * fade
        late_y = late_r @ early_k.mT @ early_v
        y_BHGCV = y_BHGCV + torch.stack((torch.zeros_like(late_y), late_y), dim=4).flatten(3, 5)
        half *= 2

    fade, before_BHGKV = fading(chunk), s_BHKV[:, :, None]
    if total > chunk:
        gain_BGHKV = ((k_BHGCK * fade.flip(-2)).mT @ v_BHGCV)[:, :, :-1].transpose(1, 2)
        keep_HK1 = (chunk * w_HK).exp()[..., None]
        after_BGHKV = diagonal_scan(keep_HK1.expand_as(gain_BGHKV), gain_BGHKV, s_BHKV)
        before_BHGKV = torch.cat((before_BHGKV, after_BGHKV.transpose(1, 2)), dim=2)
    y_BHGCV = y_BHGCV + (r_BHGCK * fade) @ before_BHGKV
    last_BHCK = k_BHGCK[:, :, -1, :tail] * fading(tail)[:, 0].flip(-2)
    s_BHKV = (tail * w_HK).exp()[..., None] * before_BHGKV[:, :, -1] + last_BHCK.mT @ v_BHGCV[:, :, -1, :tail]
    return y_BHGCV.flatten(2, 3)[:, :, :total].transpose(1, 2).to(v_BTHV.dtype), s_BHKV


def _matrix_step_in_place(
    r_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, w_HK: Tensor, u_HK: Tensor, s_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `matrix_wkv_loop`, in the memory of the state."""
    r_BHK, k_BHK, v_BHV = (x[:, 0].to(s_BHKV.dtype) for x in (r_B1HK, k_B1HK, v_B1HV))
    bonus_BH1 = (r_BHK * u_HK.to(s_BHKV.dtype) * k_BHK).sum(-1, keepdim=True)
    y_BHV = (r_BHK[..., None, :] @ s_BHKV)[..., 0, :] + bonus_BH1 * v_BHV
    s_BHKV.mul_(w_HK.to(s_BHKV.dtype).exp()[..., None]).addcmul_(k_BHK[..., None], v_BHV[..., None, :])
    return y_BHV[:, None].to(v_B1HV.dtype), s_BHKV
