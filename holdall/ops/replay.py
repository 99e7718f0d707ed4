"""Decayed sums and delta rules whose state is read with every token and written with every L-th.

    y_t = phi(q_t) (G(t, n) S) + sum_i f_ti u_i,   f_ti = phi(q_t) . G(t, i) phi(k_i)

S is the decayed sum of phi(k) u^T over the first n = `summed` tokens, a multiple of L, and G(t, i) the decay
between two tokens; i runs over the tokens since, whose keys, values and log decays are in a ring of 2 L
slots, token p in slot p mod 2 L. When these are 2 L tokens, the oldest L of them, one half of the ring, are
added to S. So outputs are those of `linear_attention` and `delta_rule` up to rounding, while S, by far the
most of what a step moves, is mostly read only.

- A sum writes its values: u_i = v_i. Where outputs are normalised, y_t is divided by the same expression with
  ones for values, plus eps; S then has z beside it, the sum of phi(k).
- A delta rule writes u_i = beta_i (v_i - what is held under k_i), which is computed when the token is read,
  in the same pass over S that the output takes. From then on it is a decayed sum too. As u depends on all of
  the past it is as wide as S.

After n tokens `summed` is L max(0, floor(n / L) - 1): however a text is cut, the state is the same, and the
ring has its last L tokens. So as many can be taken back by lowering a count (`roll_back`). If S was written
meanwhile, `summed` is then ahead of what n alone says, until n has caught up: so it is a field of its own.
Outputs on the way there differ by rounding from those of a row that never read what was taken back, since
some tokens are in S instead of the ring. A single S cannot do better: a write changes it. What a delta rule
writes on the way differs by rounding with them, and so does its state from then on.

Dao AI Lab and NVIDIA do this for Mamba-2 and call it ReplaySSM, 2026. Without decay the ring's part is
attention without a softmax; for the Taylor map f is 1 + s + s^2 / 2, from the dot products themselves.

Letters: q_t, k_i, v_i query, key and value of tokens t and i, phi the feature map, beta_i the strength of a
write, u_i what token i writes, S and z the sums, n how many tokens they have, G(t, i) the decay between two
tokens, f_ti the weight of token i, s a dot product, y_t the output. Of shapes: B row, T new tokens, S slots
of the ring, L tokens of half a ring, N tokens that the sums do not have, H heads, G groups of heads that
share keys, K key dim, F features of phi, V value dim, X log decays of a head and token: none, one, or one per
key dimension.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.contract.room import fill, known_to_the_host
from holdall.contract.state import StateError, elements_per_row
from holdall.ops.delta_rule import delta_rule
from holdall.ops.linear_attention import IDENTITY, FeatureMap, linear_attention, per_key
from holdall.ops.running import cumsum

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Int


class ReplayState(NamedTuple):
    """Sums over a row's first tokens, and a ring with what those since would add.

    s_BHFV: the decayed sum of phi(k) u^T.
    z_BHF: the decayed sum of phi(k); without elements where outputs are not normalised.
    k_BSGK: the last 2 L tokens' keys in the activations' dtype, position p in slot p mod 2 L.
    v_BSHV: likewise their values; what a delta rule writes instead, u, is as wide as z.
    log_decay_BSHX: their log decays, as wide; without elements where nothing decays.
    seen_B: how many tokens the row has read.
    summed_B: how many of them s and z have; slots of earlier tokens are never looked at.
    """

    s_BHFV: Tensor
    z_BHF: Tensor
    k_BSGK: Tensor
    v_BSHV: Tensor
    log_decay_BSHX: Tensor
    seen_B: Tensor
    summed_B: Tensor


class ScaledReplayState(NamedTuple):
    """A `ReplayState` whose S is 2^exponent times s, in fp16, with an exponent of each row's heads.

    The largest entry of s is between 2^13 and 2^14, so that 2^-28 of it still has all of fp16's 11 bits. The
    exponent changes when S is written, and rounding with it. z, which counts tokens, is as wide as ever.
    """

    s_BHFV: Tensor
    z_BHF: Tensor
    k_BSGK: Tensor
    v_BSHV: Tensor
    log_decay_BSHX: Tensor
    seen_B: Tensor
    summed_B: Tensor
    exponent_BH: Tensor


S = TypeVar("S", ReplayState, ScaledReplayState)
R = TypeVar("R", bound=Any)  # a state with such a ring, and perhaps more
TOP = 14
"""The largest entry of an fp16 sum is at most 2^14, a quarter of the range."""
LEAST = -100
"""Exponents below are none: sums that are so small are as good as zero."""


def in_full(state: Any) -> ReplayState:
    """The state with S as wide as z; what is wide already is not copied."""
    s_BHFV = state.s_BHFV.to(state.z_BHF.dtype)
    if isinstance(state, ScaledReplayState):
        s_BHFV = s_BHFV * _power(state.exponent_BH)[..., None, None]
    return ReplayState(s_BHFV, *state[1:7])


def as_carried(state: ReplayState, like: S) -> S:
    """The state with S as `like` has it, rounded to nearest; without a write the bits are those of `like`."""
    if not isinstance(like, ScaledReplayState):
        return type(like)(state.s_BHFV.to(like.s_BHFV.dtype), *state[1:])
    with torch.no_grad():
        largest_BH = state.s_BHFV.abs().amax((-1, -2))
        fits_BH = (torch.frexp(largest_BH).exponent - TOP).clamp(min=LEAST).masked_fill(largest_BH == 0, 0)
        written_B1 = (state.summed_B != like.summed_B)[:, None]
        exponent_BH = torch.where(written_B1, fits_BH.to(like.exponent_BH.dtype), like.exponent_BH)
    s_BHFV = (state.s_BHFV * _power(-exponent_BH)[..., None, None]).to(like.s_BHFV.dtype)
    return ScaledReplayState(s_BHFV, *state[1:], exponent_BH)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly: from its bits, since pow may be off by one."""
    return ((exponent + 127) << 23).view(torch.float32)


def empty_replay(
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    replay: int,
    *,
    key_groups: int = 0,
    feature_map: FeatureMap = IDENTITY,
    normalise: bool = False,
    decays: int = 0,
    corrects: bool = False,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> ReplayState:
    """The state of rows that have read nothing, beside activations of `dtype`.

    Args:
        key_groups: groups of neighbouring heads that share keys, G; 0 for as many as heads.
        decays: log decays of a head and token, X: 0, 1 or K.
        corrects: whether values are those that a delta rule writes.
    """
    wide, features, slots = torch.promote_types(dtype, torch.float32), feature_map.size(key_dim), 2 * replay

    def zeros(*sizes: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.zeros(batch, *sizes, dtype=dtype, device=device)

    return ReplayState(
        zeros(heads, features, value_dim),
        zeros(heads, features * normalise),
        zeros(slots, key_groups or heads, key_dim, dtype=dtype),
        zeros(slots, heads, value_dim, dtype=wide if corrects else dtype),
        zeros(slots, heads, decays),
        zeros(dtype=torch.long),
        zeros(dtype=torch.long),
    )


def kernel_refusal(key_dim: int) -> str:
    """Why a step with a ring has no kernel for heads of so many key dimensions; empty if it has one."""
    return kernel_of(kernel_refusal)(key_dim)


def replay_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTGK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t h v"],
    state: ReplayState,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    beta_BTH: Float[Tensor, "b t h"] | None = None,
    *,
    feature_map: FeatureMap = IDENTITY,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "b t h v"], ReplayState]:
    """The definition: look at sums and ring together, put the token into the ring, add half of it if full."""
    dtype, slots = state.s_BHFV.dtype, state.k_BSGK.shape[1]
    slot_S, heads, ys = torch.arange(slots, device=q_BTHK.device), q_BTHK.shape[2], []
    for t in range(q_BTHK.shape[1]):
        k_BHK = of_each_head(k_BTGK[:, t], heads)
        q_BHF, k_BHF = (feature_map.features(x.to(dtype)) for x in (q_BTHK[:, t], k_BHK))
        u_BHV = v_BTHV[:, t].to(dtype)
        s_BHFV, z_BHF = _sums_with(state, state.seen_B - state.summed_B, feature_map)
        if log_decay is not None:
            keep_BHX = per_key(log_decay)[:, t].to(dtype).exp()
            s_BHFV = keep_BHX[..., None] * s_BHFV
            z_BHF = keep_BHX * z_BHF if z_BHF.shape[-1] else z_BHF
        if beta_BTH is not None:
            held_BHV = torch.einsum("bhf,bhfv->bhv", k_BHF, s_BHFV)
            u_BHV = beta_BTH[:, t, :, None].to(dtype) * (u_BHV - held_BHV)
        s_BHFV = s_BHFV + k_BHF[..., :, None] * u_BHV[..., None, :]
        y_BHV = torch.einsum("bhf,bhfv->bhv", q_BHF, s_BHFV)
        if z_BHF.shape[-1]:
            y_BHV = y_BHV / ((q_BHF * (z_BHF + k_BHF)).sum(-1, keepdim=True) + eps)
        ys.append(y_BHV)

        here_BS11 = (slot_S == (state.seen_B % slots)[:, None])[..., None, None]
        state = state._replace(
            k_BSGK=torch.where(here_BS11, k_BTGK[:, t, None].to(state.k_BSGK.dtype), state.k_BSGK),
            v_BSHV=torch.where(here_BS11, u_BHV[:, None].to(state.v_BSHV.dtype), state.v_BSHV),
            seen_B=state.seen_B + 1,
        )
        if log_decay is not None:
            log_B1HX = per_key(log_decay)[:, t, None].to(dtype)
            state = state._replace(log_decay_BSHX=torch.where(here_BS11, log_B1HX, state.log_decay_BSHX))
        old_B = slots // 2 * (state.seen_B - state.summed_B == slots)
        s_BHFV, z_BHF = _sums_with(state, old_B, feature_map)
        state = state._replace(s_BHFV=s_BHFV, z_BHF=z_BHF, summed_B=state.summed_B + old_B)
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), state


def of_each_head(k_TGK: Tensor, heads: int) -> Tensor:
    """Keys of each head, (..., H, K), of which neighbouring heads share one."""
    groups = k_TGK.shape[-2]
    return k_TGK if groups == heads else k_TGK.repeat_interleave(heads // groups, dim=-2)


def _sums_with(state: ReplayState, count_B: Tensor, feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    """The sums with so many of the ring's tokens, one by one from the oldest."""
    s_BHFV, z_BHF, k_BSGK, v_BSHV, log_decay_BSHX, _, summed_B = state
    dtype, slots, device = s_BHFV.dtype, k_BSGK.shape[1], summed_B.device
    row_B1 = torch.arange(len(summed_B), device=device)[:, None]
    slot_BN = (summed_B[:, None] + torch.arange(slots, device=device)) % slots
    k_BNHK = of_each_head(k_BSGK[row_B1, slot_BN].to(dtype), s_BHFV.shape[1])
    k_BNHF, v_BNHV = feature_map.features(k_BNHK), v_BSHV[row_B1, slot_BN].to(dtype)
    keep_BNHX = torch.ones_like(k_BNHF)
    if log_decay_BSHX.shape[-1]:
        keep_BNHX = log_decay_BSHX[row_B1, slot_BN].exp()
    most = int(count_B.max()) if known_to_the_host(count_B) and len(count_B) else slots
    for n in range(most):
        more_B11, keep_BHX, k_BHF = (n < count_B)[:, None, None], keep_BNHX[:, n], k_BNHF[:, n]
        gain_BHFV = k_BHF[..., :, None] * v_BNHV[:, n, :, None]
        s_BHFV = torch.where(more_B11[..., None], keep_BHX[..., None] * s_BHFV + gain_BHFV, s_BHFV)
        if z_BHF.shape[-1]:
            z_BHF = torch.where(more_B11, keep_BHX * z_BHF + k_BHF, z_BHF)
    return s_BHFV, z_BHF


def replay_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTGK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t h v"],
    state: S | None,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    beta_BTH: Float[Tensor, "b t h"] | None = None,
    *,
    replay: int,
    feature_map: FeatureMap = IDENTITY,
    normalise: bool = False,
    eps: float = 1e-12,
    chunk: int = 128,
    fresh: bool = False,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], S | ReplayState | None]:
    """A few tokens against sums, ring and each other; many as without a ring, between two small products.

    Nothing waits for a device, and no shape depends on counts: every row may have its own.

    Args:
        k_BTGK: keys, G of them for H heads: neighbouring heads share one.
        state: the incoming one; None if nothing was read yet, then the next one's S is as wide as z. S may
            be narrower, or fp16 with exponents: it is rounded when it is written, once per call.
        log_decay, chunk: as in `linear_attention`; per key dimension with the identity map alone.
        beta_BTH: as in `delta_rule`, which takes the identity map and does not normalise; None for a sum.
        replay: tokens between two writes of the sums, L.
        normalise: divide as in `linear_attention`.
        fresh: whether the state has read nothing, and is given for its sizes alone.
        inplace: the incoming state may be overwritten.
        want_state: whether the state after the last token is needed.
        form: "loop", "parallel" or "kernel". The kernel reads one token without gradients; more of them take
            the kernel of `linear_attention` or `delta_rule` where they are many.

    Returns:
        y_BTHV in the dtype of v, and the next state (None where not asked for).
    """
    (batch, new, heads, key_dim), value_dim = q_BTHK.shape, v_BTHV.shape[-1]
    given: Any = state or empty_replay(
        batch, heads, key_dim, value_dim, replay, key_groups=k_BTGK.shape[2], feature_map=feature_map,
        normalise=normalise, decays=0 if log_decay is None else per_key(log_decay).shape[-1],
        corrects=beta_BTH is not None, dtype=v_BTHV.dtype, device=v_BTHV.device,
    )  # fmt: skip
    if form == "kernel" and new == 1 and not _wants_gradient(q_BTHK, k_BTGK, v_BTHV, *given):
        return kernel_of(replay_attention)(
            q_BTHK, k_BTGK, v_BTHV, given, log_decay, beta_BTH, feature_map=feature_map, eps=eps,
            inplace=inplace,
        )  # fmt: skip
    tokens = _Tokens(q_BTHK, k_BTGK, v_BTHV, log_decay, beta_BTH)
    reader = _Reader(feature_map, normalise, eps, chunk, form)
    if (fresh or state is None) and not want_state and form != "loop":
        return reader.without_ring(tokens, None, None, want_state=False)[0], None
    full, after = in_full(given), None
    if form == "loop":
        y_BTHV, after = replay_attention_loop(
            q_BTHK, k_BTGK, v_BTHV, full, log_decay, beta_BTH, feature_map=feature_map, eps=eps
        )
    elif new < 2 * replay:
        y_BTHV, after = _few(tokens, full, reader, inplace, want_state)
    else:
        y_BTHV, after = _many(tokens, full, reader, inplace, want_state)
    return y_BTHV, None if after is None or not want_state else as_carried(after, given)


class _Tokens(NamedTuple):
    """New tokens, as the op takes them."""

    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTHV: Tensor
    log_decay: Tensor | None
    beta_BTH: Tensor | None

    def keys(self) -> Tensor:
        """Of each head, (B, T, H, K)."""
        return of_each_head(self.k_BTGK, self.q_BTHK.shape[2])

    def part(self, first: int, last: int) -> _Tokens:
        return _Tokens(*(None if x is None else x[:, first:last] for x in self))  # type: ignore[arg-type]


class _Since(NamedTuple):
    """Tokens that the sums do not have, as wide as these, oldest first; behind a row's last one anything.

    live_B: how many of them are not new.
    """

    k_BGNK: Tensor
    v_BHNV: Tensor
    log_decay_BHNX: Tensor | None
    live_B: Tensor

    def part(self, first: int, last: int) -> _Since:
        k_BGNK, v_BHNV, log_decay_BHNX, live_B = self
        if log_decay_BHNX is not None:
            log_decay_BHNX = log_decay_BHNX[:, :, first:last]
        return _Since(k_BGNK[:, :, first:last], v_BHNV[:, :, first:last], log_decay_BHNX, live_B - first)

    def places(self) -> Tensor:
        return torch.arange(self.k_BGNK.shape[2], device=self.live_B.device)


@dataclass(frozen=True)
class _Reader:
    """How tokens are read: the arguments that all of a call's parts share."""

    feature_map: FeatureMap
    normalise: bool
    eps: float
    chunk: int
    form: str

    def without_ring(
        self,
        tokens: _Tokens,
        s_BHFV: Tensor | None,
        z_BHF: Tensor | None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, Any, Any]:
        """Outputs and sums, by the op that has no ring."""
        q, _, v, log_decay, beta_BTH = tokens
        k = tokens.keys()
        if beta_BTH is None:
            y_BTHV, s_BHFV, z_next = linear_attention(
                q, k, v, s_BHFV, z_BHF if self.normalise else None, log_decay, feature_map=self.feature_map,
                normalise=self.normalise, eps=self.eps, chunk=self.chunk, form=self.form, inplace=inplace,
                want_state=want_state,
            )  # fmt: skip
            return y_BTHV, s_BHFV, z_next if self.normalise else z_BHF
        if s_BHFV is None:
            wide = torch.promote_types(v.dtype, torch.float32)
            s_BHFV = v.new_zeros(len(v), *k.shape[2:], v.shape[-1], dtype=wide)
        y_BTHV, s_BHFV = delta_rule(
            q, k, v, beta_BTH, s_BHFV, log_decay, chunk=self.chunk, inplace=inplace, form=self.form
        )
        return y_BTHV, s_BHFV, z_BHF

    def attend(
        self, tokens: _Tokens, since: _Since, s_BHFV: Tensor, z_BHF: Tensor
    ) -> tuple[Tensor, Tensor, _Since]:
        """Outputs of new tokens against sums, ring and each other; what they write; and `since` with it."""
        dtype, new = s_BHFV.dtype, tokens.q_BTHK.shape[1]
        q_BHTK, v_BHTV = (x.transpose(1, 2).to(dtype) for x in (tokens.q_BTHK, tokens.v_BTHV))
        at_BT = since.live_B[:, None] + torch.arange(new, device=since.live_B.device)
        hidden_B1TN = (since.places() > at_BT[..., None])[:, None]
        decays = None
        if since.log_decay_BHNX is not None:
            log_BHTNX = since.log_decay_BHNX[:, :, None].masked_fill(hidden_B1TN[..., None], 0.0)
            decays = _decays(log_BHTNX)

        def look(key_BHTK: Tensor) -> tuple[Tensor, Tensor]:
            """What a key is multiplied with S by, and its scores with the tokens since."""
            key_BHTF, keep_BHTX, between_BHTNX = self.feature_map.features(key_BHTK), None, None
            if decays is not None:
                keep_BHTX, between_BHTNX = decays
                key_BHTF = key_BHTF * keep_BHTX
            if between_BHTNX is not None and between_BHTNX.shape[-1] > 1:
                k_BHNK = since.k_BGNK.repeat_interleave(key_BHTK.shape[1] // since.k_BGNK.shape[1], dim=1)
                f_BHTN = torch.einsum("bhtk,bhnk,bhtnk->bhtn", key_BHTK, k_BHNK, between_BHTNX)
                return key_BHTF, f_BHTN.masked_fill(hidden_B1TN, 0.0)
            # heads that share keys are more queries of these
            of_group = key_BHTK.unflatten(1, (since.k_BGNK.shape[1], -1)).flatten(2, 3)
            f_BHTN = self.feature_map.pairs(of_group, since.k_BGNK).unflatten(2, (-1, new)).flatten(1, 2)
            if between_BHTNX is not None:
                f_BHTN = f_BHTN * between_BHTNX[..., 0]
            return key_BHTF, f_BHTN.masked_fill(hidden_B1TN, 0.0)

        q_BHTF, f_BHTN = look(q_BHTK)
        u_BHTV = v_BHTV
        if tokens.beta_BTH is None:
            y_BHTV = q_BHTF @ s_BHFV
        else:
            # one pass over S for both of its readers
            k_BHTF, own_BHTN = look(tokens.keys().transpose(1, 2).to(dtype))
            y_BHTV, held_BHTV = (torch.cat((q_BHTF, k_BHTF), dim=2) @ s_BHFV).split(new, dim=2)
            past_BHNV = since.v_BHNV.masked_fill((since.places() >= at_BT[:, :1])[:, None, :, None], 0.0)
            beta_BHT1 = tokens.beta_BTH.transpose(1, 2)[..., None].to(dtype)
            u_BHTV = beta_BHT1 * (v_BHTV - held_BHTV - own_BHTN @ past_BHNV)
            # less what those before it wrote; of the matrix, only what lies below the diagonal is looked at
            own_BHTT = own_BHTN.take_along_dim(at_BT[:, None, None], 3)
            u_BHTV = torch.linalg.solve_triangular(
                beta_BHT1 * own_BHTT, u_BHTV, upper=False, unitriangular=True
            )
            index_BHTV = at_BT[:, None, :, None].expand_as(u_BHTV)
            since = since._replace(v_BHNV=past_BHNV.scatter(2, index_BHTV, u_BHTV))
        y_BHTV = y_BHTV + f_BHTN @ since.v_BHNV
        if self.normalise:
            y_BHTV = y_BHTV / (q_BHTF @ z_BHF[..., None] + f_BHTN.sum(-1, keepdim=True) + self.eps)
        return y_BHTV.transpose(1, 2).to(tokens.v_BTHV.dtype), u_BHTV, since

    def added(
        self, s_BHFV: Tensor, z_BHF: Tensor, since: _Since, count_B: Tensor, *, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """The sums with each row's first tokens, `count_B` of them; without any the same bits."""
        drop_B1N1 = (since.places() >= count_B[:, None])[:, None, :, None]
        groups, heads = since.k_BGNK.shape[1], s_BHFV.shape[1]
        k_BHNF = self.feature_map.features(since.k_BGNK.repeat_interleave(heads // groups, dim=1))
        keep_BHF = None
        if since.log_decay_BHNX is not None:
            keep_BHF, after_BHNX = _decays(since.log_decay_BHNX.masked_fill(drop_B1N1, 0.0))
            k_BHNF = k_BHNF * after_BHNX
        k_BHNF = k_BHNF.masked_fill(drop_B1N1, 0.0)
        gain_BHFV, gain_BHF = k_BHNF.mT @ since.v_BHNV.masked_fill(drop_B1N1, 0.0), k_BHNF.sum(2)
        if not inplace:
            s_BHFV, z_BHF = s_BHFV.clone(), z_BHF.clone()
        if keep_BHF is not None:
            s_BHFV = s_BHFV.mul_(keep_BHF[..., None])
            z_BHF = z_BHF.mul_(keep_BHF) if self.normalise else z_BHF
        return s_BHFV.add_(gain_BHFV), z_BHF.add_(gain_BHF) if self.normalise else z_BHF


def _few(
    tokens: _Tokens, state: ReplayState, reader: _Reader, inplace: bool, want_state: bool
) -> tuple[Tensor, ReplayState | None]:
    """Fewer than 2 L tokens: against the sums as they came, and against ring and each other in pairs."""
    s_BHFV, z_BHF, ring_k, *_, seen_B, summed_B = state
    slots, new = ring_k.shape[1], tokens.q_BTHK.shape[1]
    y_BTHV, u_BHTV, since = reader.attend(tokens, _together(state, tokens), s_BHFV, z_BHF)
    if not want_state:
        return y_BTHV, None

    half, own = slots // 2, inplace
    for write in range((half - 1 + new) // half):  # most that fewer than 2 L in the ring can come to
        full_B = seen_B + new - summed_B >= slots
        if known_to_the_host(full_B) and not full_B.any():
            break
        oldest = since.part(write * half, (write + 1) * half)
        s_BHFV, z_BHF = reader.added(s_BHFV, z_BHF, oldest, half * full_B, inplace=own)
        own = True
        summed_B = summed_B + half * full_B
    if not own:
        s_BHFV, z_BHF = s_BHFV.clone(), z_BHF.clone()
    return y_BTHV, _next(state, s_BHFV, z_BHF, tokens, u_BHTV, summed_B, inplace)


def _many(
    tokens: _Tokens, state: ReplayState, reader: _Reader, inplace: bool, want_state: bool
) -> tuple[Tensor, ReplayState | None]:
    """At least 2 L tokens: after them, all that the ring holds now is in the sums.

    So the ring is added first. All but the last 2 L tokens will be in the sums too, and are read as without
    a ring; of those last ones the first L at most are, as the row's count has it.
    """
    s_BHFV, z_BHF, ring_k, *_, seen_B, _ = state
    slots, new = ring_k.shape[1], tokens.q_BTHK.shape[1]
    half, split, ring = slots // 2, new - slots, _together(state, tokens.part(0, 0))
    s, z = reader.added(s_BHFV, z_BHF, ring, ring.live_B, inplace=inplace and want_state)
    if not want_state:
        return reader.without_ring(tokens, s, z, want_state=False)[0], None
    # sums that gradients need are left alone; without gradients they are this call's
    own, ys = not torch.is_grad_enabled(), []
    if split:
        y, s, z = reader.without_ring(tokens.part(0, split), s, z, inplace=own)
        ys.append(y)
    last = tokens.part(split, new)
    log_decay = None if last.log_decay is None else per_key(last.log_decay).transpose(1, 2).to(s.dtype)
    k, v = (x.transpose(1, 2).to(s.dtype) for x in (last.k_BTGK, last.v_BTHV))
    y, u_BHTV, since = reader.attend(last, _Since(k, v, log_decay, torch.zeros_like(seen_B)), s, z)
    ys.append(y)
    summed_B = half * ((seen_B + new) // half - 1).clamp(min=0)
    s, z = reader.added(s, z, since.part(0, half), summed_B - seen_B - split, inplace=own)
    return torch.cat(ys, dim=1), _next(state, s, z, tokens, u_BHTV, summed_B, inplace)


def _together(state: ReplayState, tokens: _Tokens) -> _Since:
    """What is in the ring alone, and then the new tokens."""
    slots, seen_B, summed_B = state.k_BSGK.shape[1], state.seen_B, state.summed_B
    # of a row that lost what its sums have, which is NaN, none
    live_B, dtype = (seen_B - summed_B).clamp(min=0), state.z_BHF.dtype
    new, row_B1 = tokens.q_BTHK.shape[1], torch.arange(len(seen_B), device=seen_B.device)[:, None]
    n_N = torch.arange(slots - 1 + new, device=seen_B.device)
    # slots are followed by the new tokens, the last of which stands for all that is behind it
    new_BN = (slots + n_N - live_B[:, None]).clamp(max=slots + new - 1)
    index_BN = torch.where(n_N < live_B[:, None], (summed_B[:, None] + n_N) % slots, new_BN)

    def joined(ring_BSHX: Tensor, new_BTHX: Tensor) -> Tensor:
        both_BSHX = torch.cat((ring_BSHX.to(dtype), new_BTHX.to(dtype)), dim=1)
        return both_BSHX[row_B1, index_BN].transpose(1, 2)

    k, v = joined(state.k_BSGK, tokens.k_BTGK), joined(state.v_BSHV, tokens.v_BTHV)
    log_decay = None
    if tokens.log_decay is not None:
        log_decay = joined(state.log_decay_BSHX, per_key(tokens.log_decay))
    return _Since(k, v, log_decay, live_B)


def _decays(log_NX: Tensor) -> tuple[Tensor, Tensor]:
    """The decay over all tokens, (..., X), and from each of them to the last, (..., N, X).

    Sums of what lies between, never differences of sums: see holdall/ops/fading.py.
    """
    after_NX = cumsum(F.pad(log_NX[..., 1:, :], (0, 0, 0, 1)).flip(-2), -2).flip(-2)
    return (log_NX[..., 0, :] + after_NX[..., 0, :]).exp(), after_NX.exp()


def _next(
    state: ReplayState,
    s_BHFV: Tensor,
    z_BHF: Tensor,
    tokens: _Tokens,
    u_BHTV: Tensor,
    summed_B: Tensor,
    inplace: bool,
) -> ReplayState:
    """The state after new tokens, the last of which go into the ring."""
    slots, new = state.k_BSGK.shape[1], tokens.q_BTHK.shape[1]
    last = max(new - slots, 0)

    def put(ring_BSHX: Tensor, new_BTHX: Tensor) -> Tensor:
        return fill(ring_BSHX, new_BTHX.to(ring_BSHX.dtype), state.seen_B + last, inplace=inplace)

    log_decay_BSHX = state.log_decay_BSHX
    if tokens.log_decay is not None:
        log_decay_BSHX = put(log_decay_BSHX, per_key(tokens.log_decay)[:, last:])
    # counts are new tensors, which the border copies into those that are given away
    return ReplayState(
        s_BHFV, z_BHF, put(state.k_BSGK, tokens.k_BTGK[:, last:]), put(state.v_BSHV, u_BHTV.transpose(1, 2)),
        log_decay_BSHX, state.seen_B + new, summed_B.clone(),
    )  # fmt: skip


def roll_back(state: R, count_B: Int[Tensor, " b"], *, inplace: bool = False) -> R:
    """The state without each row's last tokens, `count_B` of them: its count is lowered, all else stays.

    In place the count alone is written; otherwise all of the state is copied. A row that is to lose tokens
    which its sums have becomes NaN, as only the device knows its count.
    """
    if not inplace:
        state = type(state)(*(tensor.clone() for tensor in state))
    state.seen_B.sub_(count_B)
    read = state.z_BHF if state.z_BHF.shape[-1] else state.s_BHFV[:, :, 0]
    read.masked_fill_((state.seen_B < state.summed_B)[:, None, None], torch.nan)
    return state


def take_back(state: R, count_B: Int[Tensor, " b"], owner: str, *, inplace: bool = False) -> R:
    """`roll_back`, which refuses with StateError what a row cannot give back, where the host knows that."""
    if known_to_the_host(count_B) and len(count_B):
        kept_B = state.seen_B - state.summed_B
        if (short_B := count_B > kept_B).any():
            row = int(short_B.nonzero()[0])
            raise StateError(
                f"{owner} cannot take back {int(count_B[row])} tokens of row {row}: only its last "
                f"{int(kept_B[row])} are in its ring alone, after an earlier rollback or so few tokens. "
                "Take back no more than were read since"
            )
    return roll_back(state, count_B, inplace=inplace)


def elements_with_ring(mixer: Any) -> int:
    """Elements of a row's state, which has a fixed size: those that it starts with."""
    return elements_per_row(mixer.init_state(1, dtype=torch.float32, device=torch.device("meta")))


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
