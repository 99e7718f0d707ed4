"""Linear attention with decay: a state of fixed size that softmax attention is often traded for.

    S_t = a_t S_{t-1} + phi(k_t) v_t^T        y_t = phi(q_t)^T S_t
    z_t = a_t z_{t-1} + phi(k_t)              normalised: y_t / (phi(q_t) . z_t + eps), or
                                              y_t / max(phi(q_t) . z_t, floor)

The decay a_t is absent, one number per head (RetNet, Mamba-2) or one per key dimension (GLA). The
feature map phi makes the family: phi(q) . phi(k) stands where softmax has exp(q . k).

Letters: q_t, k_t, v_t query, key and value of token t, phi the feature map, a_t the decay, S_t and z_t the
state, y_t the output, eps and floor keep the divisor away from zero. Of shapes: B row, T time, C time within
a chunk, H heads, K key dim, F features of phi, V value dim.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.fading import Fading

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

# --------------------------------------------------------------------------------------- feature maps


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A feature map and the score that it induces.

    Attributes:
        features: (..., K) to (..., F).
        size: F for a given K.
        scores: (..., T, K), (..., S, K) to phi(q) . phi(k) of all pairs, (..., T, S); given where there is a
            way to it that does not build the features.
    """

    features: Callable[[Tensor], Tensor]
    size: Callable[[int], int]
    scores: Callable[[Tensor, Tensor], Tensor] | None = None

    def pairs(
        self, q_BHTK: Float[Tensor, "b h t k"], k_BHSK: Float[Tensor, "b h s k"]
    ) -> Float[Tensor, "b h t s"]:
        """phi(q_t) . phi(k_s) for all pairs, (B, H, T, S)."""
        if self.scores is not None:
            return self.scores(q_BHTK, k_BHSK)
        return self.features(q_BHTK) @ self.features(k_BHSK).mT


def taylor_features(x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b f"]:
    """Features whose dot product is 1 + s + s^2 / 2, s = q . k / sqrt(K): exp(s) to second order.

    [1, x_i / K^(1/4), x_i^2 / sqrt(2 K), x_i x_j / sqrt(K) for i < j]. The full outer product has every
    x_i x_j twice, 1 + K + K^2 features; this symmetric half, with the second copy in the weight, gives the
    same products from 1 + K + K (K + 1) / 2: 153 instead of 273 at K = 16.
    Arora et al., "Based", 2024, arXiv 2402.18668, equation 2.
    """
    dim = x.shape[-1]
    second = quadratic_features(x) * math.sqrt(0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x / dim**0.25, second), dim=-1)


def taylor_scores(
    q_BHTK: Float[Tensor, "*b t k"], k_BHSK: Float[Tensor, "*b s k"]
) -> Float[Tensor, "*b t s"]:
    """1 + s + s^2 / 2 of all pairs, from the dot products themselves."""
    s_BHTS = q_BHTK @ k_BHSK.mT * q_BHTK.shape[-1] ** -0.5
    return 1 + s_BHTS + 0.5 * s_BHTS.square()


def quadratic_features(x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b f"]:
    """Features whose dot product is s^2, s = q . k / sqrt(K): K (K + 1) / 2, as every pair counts once.

    [x_i^2 / sqrt(K), x_i x_j sqrt(2 / K) for i < j].
    """
    dim = x.shape[-1]
    # looked up by a product with ones and zeros, which is exact: gradients of x[..., i] take three times as
    # long on a CPU, and what torch.compile of torch 2.13 makes of them there writes beyond its memory
    pairs = torch.triu_indices(dim, dim, offset=1, device=x.device).flatten()
    left, right = (x @ torch.eye(dim, dtype=x.dtype, device=x.device)[:, pairs]).chunk(2, dim=-1)
    return torch.cat((x.square(), left * right * math.sqrt(2)), dim=-1) / math.sqrt(dim)


def quadratic_scores(
    q_BHTK: Float[Tensor, "*b t k"], k_BHSK: Float[Tensor, "*b s k"]
) -> Float[Tensor, "*b t s"]:
    """s^2 of all pairs, from the dot products themselves."""
    return (q_BHTK @ k_BHSK.mT).square() / q_BHTK.shape[-1]


def elu_plus_one(x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """1 + x above zero, exp(x) below: all digits of the exponential, where adding 1 to F.elu drops them.

    It also is what torch.compile gets right: F.elu's backward lays out its result differently from what
    torch 2.13 expects on a CPU, and the view that follows fails.
    """
    return F.relu(x) + x.clamp(max=0).exp()


def identity_features(x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    return x


def square_features(x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    return x.square() * math.sqrt(0.5)


def as_many(dim: int) -> int:
    """How many features a map has that works on each dimension by itself."""
    return dim


def pairs_of(dim: int) -> int:
    return dim * (dim + 1) // 2


def taylor_size(dim: int) -> int:
    return 1 + dim + pairs_of(dim)


# functions with a name, so that a mixer that holds one can be pickled
FEATURE_MAPS = {
    "identity": FeatureMap(features=identity_features, size=as_many),
    "relu": FeatureMap(features=F.relu, size=as_many),
    "square": FeatureMap(features=square_features, size=as_many),
    "elu1": FeatureMap(features=elu_plus_one, size=as_many),
    "quadratic": FeatureMap(features=quadratic_features, scores=quadratic_scores, size=pairs_of),
    "taylor": FeatureMap(features=taylor_features, scores=taylor_scores, size=taylor_size),
}
"""Parameter-free maps by name."""

IDENTITY = FEATURE_MAPS["identity"]

# ------------------------------------------------------------------------------------------- the maths


def kernel_refusal(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    *,
    feature_map: FeatureMap = IDENTITY,
    decay_per_key: bool = False,
) -> str:
    """Why there is no kernel for such heads, map and decay; empty if there is one."""
    return kernel_of(kernel_refusal)(
        key_dim, value_dim, dtype, feature_map=feature_map, decay_per_key=decay_per_key
    )


def linear_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"],
    z_BHF: Float[Tensor, "b h f"] | None = None,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    feature_map: FeatureMap = IDENTITY,
    eps: float = 1e-12,
    floor: float | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h f v"], Float[Tensor, "b h f"] | None]:
    """The definition; arguments and results as in `linear_attention`."""
    dtype = s_BHFV.dtype
    q_BTHF, k_BTHF = feature_map.features(q_BTHK.to(dtype)), feature_map.features(k_BTHK.to(dtype))
    ys = []
    for t in range(q_BTHK.shape[1]):
        q_BHF, k_BHF, v_BHV = q_BTHF[:, t], k_BTHF[:, t], v_BTHV[:, t].to(dtype)
        if log_decay is not None:
            a_BHF = per_key(log_decay)[:, t].to(dtype).exp()
            s_BHFV = a_BHF[..., None] * s_BHFV
            z_BHF = None if z_BHF is None else a_BHF * z_BHF
        s_BHFV = s_BHFV + k_BHF[..., :, None] * v_BHV[..., None, :]
        y_BHV = torch.einsum("bhf,bhfv->bhv", q_BHF, s_BHFV)
        if z_BHF is not None:
            z_BHF = z_BHF + k_BHF
            y_BHV = y_BHV / _kept_off_zero((q_BHF * z_BHF).sum(-1, keepdim=True), eps, floor)
        ys.append(y_BHV)
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), s_BHFV, z_BHF


def linear_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"] | None,
    z_BHF: Float[Tensor, "b h f"] | None = None,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    feature_map: FeatureMap = IDENTITY,
    normalise: bool = False,
    eps: float = 1e-12,
    floor: float | None = None,
    chunk: int = 128,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h f v"] | None, Float[Tensor, "b h f"] | None]:
    """Chunk by chunk: all pairs within a chunk, the state for everything before it. O(T (C (K + V) + F V)).

    Args:
        s_BHFV, z_BHF: the incoming state; None if nothing was read yet (z also where the output is not
            normalised). Sums are accumulated in at least fp32, where s is narrower too.
        log_decay: log a_t <= 0, (B, T, H) or, with the identity map, (B, T, H, K); None for no decay.
        normalise: divide by phi(q) . z + eps or, where a floor is given, by the larger of phi(q) . z and it.
        chunk: tokens per chunk. Kernels have sizes of their own.
        inplace: the incoming state may be overwritten.
        want_state: whether the state after the last token is needed.
        form: "loop", "parallel" or "kernel".

    Returns:
        y_BTHV in the dtype of v, and the next s and z (None where not asked for or not normalised).

    Before the first state exists, and for scores that have a shorter way, no features are built.
    """
    if form == "kernel":
        return kernel_of(linear_attention)(
            q_BTHK, k_BTHK, v_BTHV, s_BHFV, z_BHF, log_decay, feature_map=feature_map, normalise=normalise,
            eps=eps, floor=floor, inplace=inplace, want_state=want_state,
        )  # fmt: skip
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    if s_BHFV is not None:
        s_BHFV = s_BHFV.to(torch.promote_types(s_BHFV.dtype, torch.float32))
    if form == "loop":
        if s_BHFV is None:
            s_BHFV, z_BHF = _nothing(k_BTHK, v_BTHV, feature_map)
            z_BHF = z_BHF if normalise else None
        return linear_attention_loop(
            q_BTHK, k_BTHK, v_BTHV, s_BHFV, z_BHF, log_decay, feature_map=feature_map, eps=eps, floor=floor
        )
    q_BHTK, k_BHTK, v_BHTV = (x.transpose(1, 2).to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV))
    # split, not sliced: the gradient of a slice is as long as all of it, which chunk by chunk is quadratic
    chunks = list(zip(*(x.split(chunk, dim=2) for x in (q_BHTK, k_BHTK, v_BHTV)), strict=True))
    decays = [None] * len(chunks) if log_decay is None else log_decay.split(chunk, dim=1)
    ys = []
    for number, ((q, k, v), decay) in enumerate(zip(chunks, decays, strict=True), 1):
        fading = None
        if decay is not None:
            fading = Fading(per_key(decay).transpose(1, 2).to(dtype))
        score_BHCC = _pairs_within(q, k, fading, feature_map)
        y = score_BHCC @ v
        norm = score_BHCC.sum(-1, keepdim=True) if normalise else None
        if s_BHFV is not None:
            q_BHCF = feature_map.features(q)
            if fading is not None:
                q_BHCF = q_BHCF * fading.since_CK
            y = y + q_BHCF @ s_BHFV
            if norm is not None and z_BHF is not None:
                norm = norm + q_BHCF @ z_BHF[..., None]
        ys.append(y if norm is None else y / _kept_off_zero(norm, eps, floor))
        if want_state or number < len(chunks):
            s_BHFV, z_BHF = _advance(s_BHFV, z_BHF, k, v, fading, feature_map, normalise, inplace)
    y_BTHV = (ys[0] if len(ys) == 1 else torch.cat(ys, dim=2)).transpose(1, 2).to(v_BTHV.dtype)
    return (y_BTHV, s_BHFV, z_BHF) if want_state else (y_BTHV, None, None)


def absorb_loop(
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"],
    z_BHF: Float[Tensor, "b h f"],
    *,
    feature_map: FeatureMap = IDENTITY,
) -> tuple[Float[Tensor, "b h f v"], Float[Tensor, "b h f"]]:
    """The definition; arguments and results as in `absorb`."""
    dtype = s_BHFV.dtype
    for k_BHK, v_BHV in zip(k_BTHK.to(dtype).unbind(1), v_BTHV.to(dtype).unbind(1), strict=True):
        k_BHF = feature_map.features(k_BHK)
        s_BHFV = s_BHFV + k_BHF[..., :, None] * v_BHV[..., None, :]
        z_BHF = z_BHF + k_BHF
    return s_BHFV, z_BHF


def absorb(
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"] | None,
    z_BHF: Float[Tensor, "b h f"] | None,
    *,
    feature_map: FeatureMap = IDENTITY,
    chunk: int = 128,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b h f v"], Float[Tensor, "b h f"]]:
    """s and z after keys and values that no query asks about on the way, without decay; O(T F V).

    Arguments are those of `linear_attention`. The tokens' order does not matter, so this is how a text is
    read without a direction.
    """
    if form == "kernel":
        return kernel_of(absorb)(k_BTHK, v_BTHV, s_BHFV, z_BHF, feature_map=feature_map)
    if form == "loop":
        if s_BHFV is None or z_BHF is None:
            s_BHFV, z_BHF = _nothing(k_BTHK, v_BTHV, feature_map)
        return absorb_loop(k_BTHK, v_BTHV, s_BHFV, z_BHF, feature_map=feature_map)
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    for k, v in zip(k_BTHK.split(chunk, dim=1), v_BTHV.split(chunk, dim=1), strict=True):
        k_BHCK, v_BHCV = (u.transpose(1, 2).to(dtype) for u in (k, v))
        s_BHFV, z_BHF = _advance(s_BHFV, z_BHF, k_BHCK, v_BHCV, None, feature_map, True, False)
    assert s_BHFV is not None
    assert z_BHF is not None
    return s_BHFV, z_BHF


def _nothing(k_BTHK: Tensor, v_BTHV: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    """The sums of no tokens."""
    (rows, _, heads, key_dim), value_dim = k_BTHK.shape, v_BTHV.shape[-1]
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    s_BHFV = v_BTHV.new_zeros(rows, heads, feature_map.size(key_dim), value_dim, dtype=dtype)
    return s_BHFV, s_BHFV[..., 0].clone()


def _kept_off_zero(norm: Tensor, eps: float, floor: float | None) -> Tensor:
    """What to divide by: papers add something small, or take the larger of the two."""
    return norm + eps if floor is None else norm.clamp(min=floor)


def per_key(log_decay: Tensor) -> Tensor:
    """(B, T, H) to (B, T, H, 1); (B, T, H, K) stays."""
    return log_decay[..., None] if log_decay.ndim == 3 else log_decay


def _pairs_within(q: Tensor, k: Tensor, fading: Fading | None, feature_map: FeatureMap) -> Tensor:
    """Decayed causal scores of all pairs of a chunk, (B, H, C, C)."""
    if fading is None:
        future_CC = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        return feature_map.pairs(q, k).masked_fill(future_CC, 0.0)
    if fading.since_CK.shape[-1] == 1:
        return feature_map.pairs(q, k) * fading.between()
    q, k = feature_map.features(q), feature_map.features(k)
    return fading.pairs(q[..., None, :], k[..., None, :])[..., 0, 0, :]


def _advance(
    s_BHFV: Tensor | None,
    z_BHF: Tensor | None,
    k: Tensor,
    v: Tensor,
    fading: Fading | None,
    feature_map: FeatureMap,
    normalise: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    """The state after a chunk."""
    k_BHCF = feature_map.features(k)
    keep_BHF = None
    if fading is not None:
        k_BHCF = k_BHCF * fading.until_CK
        keep_BHF = fading.since_CK[:, :, -1]
    gain_BHFV, gain_BHF = k_BHCF.mT @ v, k_BHCF.sum(2) if normalise else None
    if s_BHFV is None:
        return gain_BHFV, gain_BHF
    if keep_BHF is not None:
        s_BHFV = s_BHFV.mul_(keep_BHF[..., None]) if inplace else s_BHFV * keep_BHF[..., None]
        z_BHF = None if z_BHF is None else (z_BHF.mul_(keep_BHF) if inplace else z_BHF * keep_BHF)
    s_BHFV = s_BHFV.add_(gain_BHFV) if inplace else s_BHFV + gain_BHFV
    if z_BHF is not None and gain_BHF is not None:
        z_BHF = z_BHF.add_(gain_BHF) if inplace else z_BHF + gain_BHF
    return s_BHFV, z_BHF
