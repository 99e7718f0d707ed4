"""Linear attention whose state is read with every token and written with every L-th.

    y_t = (phi(q_t) S + sum_i f_ti v_i) / (phi(q_t) . z + sum_i f_ti + eps),   f_ti = phi(q_t) . phi(k_i)

S and z are the sums of phi(k) v^T and phi(k) over the first `summed` tokens, a multiple of L; i runs over
the tokens since, whose keys and values are in a ring of 2 L slots, token p in slot p mod 2 L. When these are
2 L tokens, the oldest L of them, one half of the ring, are added to S and z. So the outputs are those of
`linear_attention` up to rounding, while S, by far the most of what a step moves, is mostly read only.

After n tokens `summed` is L max(0, floor(n / L) - 1): however a text is cut, the state is the same, and the
ring has its last L tokens. So as many can be taken back by lowering a count (`roll_back`). If S was written
meanwhile, `summed` is then ahead of what n alone says, until n has caught up: so it is a field of its own.
Outputs on the way there differ by rounding from those of a row that never read what was taken back, since
some tokens are in S instead of the ring. A single S cannot do better: a write changes it.

Dao AI Lab and NVIDIA do this for Mamba-2 and call it ReplaySSM, 2026. Without decay the ring's part is
attention without a softmax; for the Taylor map f is 1 + s + s^2 / 2, from the dot products themselves.

Letters: B row, T new tokens, S slots of the ring, L tokens of half a ring, H heads, K key dim, F features of
phi, V value dim, N slots and new tokens.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.contract.room import fill, known_to_the_host
from holdall.ops.linear_attention import FeatureMap, linear_attention

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Int


class ReplayState(NamedTuple):
    """Sums over a row's first tokens, and a ring with the keys and values of those since.

    k_BSHK, v_BSHV: the last 2 L tokens' in the activations' dtype, position p in slot p mod 2 L.
    seen_B: how many tokens the row has read.
    summed_B: how many of them s and z have; slots of earlier tokens are never looked at.
    """

    s_BHFV: Tensor
    z_BHF: Tensor
    k_BSHK: Tensor
    v_BSHV: Tensor
    seen_B: Tensor
    summed_B: Tensor


class ScaledReplayState(NamedTuple):
    """A `ReplayState` whose S is 2^exponent times s, in fp16, with an exponent of each row's heads.

    The largest entry of s is between 2^13 and 2^14, so that 2^-28 of it still has all of fp16's 11 bits. The
    exponent changes when S is written, and rounding with it. z, which counts tokens, is as wide as ever.
    """

    s_BHFV: Tensor
    z_BHF: Tensor
    k_BSHK: Tensor
    v_BSHV: Tensor
    seen_B: Tensor
    summed_B: Tensor
    exponent_BH: Tensor


S = TypeVar("S", ReplayState, ScaledReplayState)
TOP = 14
"""The largest entry of an fp16 sum is at most 2^14, a quarter of the range."""
LEAST = -100
"""Exponents below are none: sums that are so small are as good as zero."""


def in_full(state: Any) -> ReplayState:
    """The state with S as wide as z; what is wide already is not copied."""
    s_BHFV = state.s_BHFV.to(state.z_BHF.dtype)
    if isinstance(state, ScaledReplayState):
        s_BHFV = s_BHFV * _power(state.exponent_BH)[..., None, None]
    return ReplayState(s_BHFV, *state[1:6])


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
    feature_map: FeatureMap,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> ReplayState:
    """The state of rows that have read nothing, beside activations of `dtype`."""
    wide, features, slots = torch.promote_types(dtype, torch.float32), feature_map.size(key_dim), 2 * replay
    return ReplayState(
        torch.zeros(batch, heads, features, value_dim, dtype=wide, device=device),
        torch.zeros(batch, heads, features, dtype=wide, device=device),
        torch.zeros(batch, slots, heads, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, slots, heads, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )


def replay_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    state: ReplayState,
    *,
    feature_map: FeatureMap,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "b t h v"], ReplayState]:
    """The definition: put the token into the ring, add half a ring to the sums if it is full, then look."""
    dtype, slots = state.s_BHFV.dtype, state.k_BSHK.shape[1]
    half, slot_S = slots // 2, torch.arange(slots, device=q_BTHK.device)
    ys = []
    for t in range(q_BTHK.shape[1]):
        s_BHFV, z_BHF, k_BSHK, v_BSHV, seen_B, summed_B = state
        here_BS11 = (slot_S == (seen_B % slots)[:, None])[..., None, None]
        k_BSHK = torch.where(here_BS11, k_BTHK[:, t, None], k_BSHK)
        v_BSHV = torch.where(here_BS11, v_BTHV[:, t, None], v_BSHV)
        seen_B = seen_B + 1
        k_BHSF = feature_map.features(k_BSHK.transpose(1, 2).to(dtype))
        v_BHSV = v_BSHV.transpose(1, 2).to(dtype)

        full_B1 = (seen_B - summed_B == slots)[:, None]
        oldest_BS = full_B1 & (slot_S // half == (summed_B // half % 2)[:, None])
        s_BHFV = s_BHFV + torch.einsum("bs,bhsf,bhsv->bhfv", oldest_BS.to(dtype), k_BHSF, v_BHSV)
        z_BHF = z_BHF + torch.einsum("bs,bhsf->bhf", oldest_BS.to(dtype), k_BHSF)
        summed_B = summed_B + half * full_B1[:, 0]

        q_BHF = feature_map.features(q_BTHK[:, t].to(dtype))
        since_BS = (seen_B[:, None] - 1 - slot_S) % slots < (seen_B - summed_B)[:, None]
        f_BHS = torch.einsum("bhf,bhsf->bhs", q_BHF, k_BHSF) * since_BS[:, None]
        y_BHV = torch.einsum("bhf,bhfv->bhv", q_BHF, s_BHFV) + torch.einsum("bhs,bhsv->bhv", f_BHS, v_BHSV)
        norm_BH = (q_BHF * z_BHF).sum(-1) + f_BHS.sum(-1) + eps
        ys.append(y_BHV / norm_BH[..., None])
        state = ReplayState(s_BHFV, z_BHF, k_BSHK, v_BSHV, seen_B, summed_B)
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), state


def replay_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    state: S | None,
    *,
    replay: int,
    feature_map: FeatureMap,
    eps: float = 1e-12,
    chunk: int = 128,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], S | ReplayState | None]:
    """A few tokens against sums, ring and each other; many as `linear_attention`, between two small products.

    Nothing waits for a device, and no shape depends on counts: every row may have its own.

    Args:
        state: the incoming one; None if nothing was read yet, then the next one's S is as wide as z. S may
            be narrower, or fp16 with exponents: it is rounded when it is written, once per call.
        replay: tokens between two writes of the sums, L.
        chunk: as in `linear_attention`.
        inplace: the incoming state may be overwritten.
        want_state: whether the state after the last token is needed.
        form: "loop", "parallel" or "kernel". The kernel reads one token without gradients; more of them take
            the kernel of `linear_attention` where they are many.

    Returns:
        y_BTHV in the dtype of v, and the next state (None where not asked for).
    """
    if state is None and not want_state and form != "loop":
        y_BTHV, *_ = linear_attention(
            q_BTHK, k_BTHK, v_BTHV, None, feature_map=feature_map, normalise=True, eps=eps, chunk=chunk,
            want_state=False, form=form,
        )  # fmt: skip
        return y_BTHV, None
    (batch, new, heads, key_dim), value_dim = k_BTHK.shape, v_BTHV.shape[-1]
    given: Any = state or empty_replay(
        batch, heads, key_dim, value_dim, replay,
        feature_map=feature_map, dtype=v_BTHV.dtype, device=v_BTHV.device,
    )  # fmt: skip
    if form == "kernel" and new == 1 and not _wants_gradient(q_BTHK, k_BTHK, v_BTHV, *given):
        return kernel_of(replay_attention)(
            q_BTHK, k_BTHK, v_BTHV, given, feature_map=feature_map, eps=eps, inplace=inplace
        )
    full, after = in_full(given), None
    if form == "loop":
        y_BTHV, after = replay_attention_loop(q_BTHK, k_BTHK, v_BTHV, full, feature_map=feature_map, eps=eps)
    elif new < 2 * replay - 1:
        y_BTHV, after = _few(q_BTHK, k_BTHK, v_BTHV, full, feature_map, eps, inplace, want_state)
    else:
        y_BTHV, after = _many(
            q_BTHK, k_BTHK, v_BTHV, full, feature_map, eps, chunk, inplace, want_state, form
        )
    return y_BTHV, None if after is None or not want_state else as_carried(after, given)


def _few(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    state: ReplayState,
    feature_map: FeatureMap,
    eps: float,
    inplace: bool,
    want_state: bool,
) -> tuple[Tensor, ReplayState | None]:
    """Fewer than 2 L - 1 tokens: against the sums as they came, and against ring and each other in pairs."""
    s_BHFV, z_BHF, ring_k, ring_v, seen_B, summed_B = state
    dtype, slots, new = s_BHFV.dtype, ring_k.shape[1], q_BTHK.shape[1]
    q_BHTK = q_BTHK.transpose(1, 2).to(dtype)
    k_BNHK, v_BNHV = torch.cat((ring_k, k_BTHK), dim=1), torch.cat((ring_v, v_BTHV), dim=1)
    past_BTN = _since(state)[:, None].expand(-1, new, -1)
    own_TT = torch.ones(new, new, dtype=torch.bool, device=q_BTHK.device).tril()
    visible_BTN = torch.cat((past_BTN, own_TT.expand(len(past_BTN), -1, -1)), dim=2)
    f_BHTN = feature_map.pairs(q_BHTK, k_BNHK.transpose(1, 2).to(dtype))
    f_BHTN = f_BHTN.masked_fill(~visible_BTN[:, None], 0.0)
    # what is behind the last token may be what a row did not keep, infinite or NaN: never times zero
    v_BHNV = v_BNHV.masked_fill(~visible_BTN[:, -1, :, None, None], 0.0).transpose(1, 2).to(dtype)
    q_BHTF = feature_map.features(q_BHTK)
    y_BHTV = q_BHTF @ s_BHFV + f_BHTN @ v_BHNV
    norm_BHT1 = q_BHTF @ z_BHF[..., None] + f_BHTN.sum(-1, keepdim=True) + eps
    y_BTHV = (y_BHTV / norm_BHT1).transpose(1, 2).to(v_BTHV.dtype)
    if not want_state:
        return y_BTHV, None

    half = slots // 2
    own = inplace
    for _ in range((half - 1 + new) // half):  # most writes that fewer than 2 L in the ring can come to
        full_B = seen_B + new - summed_B >= slots
        if known_to_the_host(full_B) and not full_B.any():
            break
        position_BL = summed_B[:, None] + torch.arange(half, device=seen_B.device)
        at_BL = torch.where(
            position_BL < seen_B[:, None], position_BL % slots, slots + position_BL - seen_B[:, None]
        )
        # a row that is not full takes any slots that there are, and adds nothing
        at_BL11 = at_BL.clamp(max=slots + new - 1)[..., None, None]
        k_BLHK, v_BLHV = (x.take_along_dim(at_BL11, 1) for x in (k_BNHK, v_BNHV))
        keep_BL = full_B[:, None].expand(-1, half)
        s_BHFV, z_BHF = _added(s_BHFV, z_BHF, k_BLHK, v_BLHV, keep_BL, feature_map, inplace=own)
        own = True
        summed_B = summed_B + half * full_B
    if not own:
        s_BHFV, z_BHF = s_BHFV.clone(), z_BHF.clone()
    return y_BTHV, _next(state, s_BHFV, z_BHF, k_BTHK, v_BTHV, summed_B, inplace)


def _many(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    state: ReplayState,
    feature_map: FeatureMap,
    eps: float,
    chunk: int,
    inplace: bool,
    want_state: bool,
    form: str,
) -> tuple[Tensor, ReplayState | None]:
    """At least 2 L - 1 tokens: after them, all that the ring holds now is in the sums.

    So the ring is added first. All but the last 2 L - 1 tokens will be in the sums too, and are read as
    without a ring; of those last ones the first L - 1 at most are, as the row's count has it.
    """
    s_BHFV, z_BHF, ring_k, ring_v, seen_B, _ = state
    slots, new = ring_k.shape[1], q_BTHK.shape[1]
    half, split = slots // 2, new - slots + 1
    read = functools.partial(
        linear_attention, feature_map=feature_map, normalise=True, eps=eps, chunk=chunk, form=form
    )
    s, z = _added(s_BHFV, z_BHF, ring_k, ring_v, _since(state), feature_map, inplace=inplace and want_state)
    if not want_state:
        return read(q_BTHK, k_BTHK, v_BTHV, s, z, want_state=False)[0], None
    # sums that gradients need are left alone; without gradients they are this call's
    own, ys = not torch.is_grad_enabled(), []
    if split:
        y, s, z = read(q_BTHK[:, :split], k_BTHK[:, :split], v_BTHV[:, :split], s, z, inplace=own)  # type: ignore[assignment]
        ys.append(y)
    k, v = k_BTHK[:, split:], v_BTHV[:, split:]
    ys.append(read(q_BTHK[:, split:], k, v, s, z, want_state=False)[0])
    summed_B = half * ((seen_B + new) // half - 1).clamp(min=0)
    more_B1 = (summed_B - seen_B - split)[:, None]
    keep_BL = torch.arange(half - 1, device=seen_B.device) < more_B1
    s, z = _added(s, z, k[:, : half - 1], v[:, : half - 1], keep_BL, feature_map, inplace=own)
    return torch.cat(ys, dim=1), _next(state, s, z, k_BTHK, v_BTHV, summed_B, inplace)


def roll_back(state: S, count_B: Int[Tensor, " b"], *, inplace: bool = False) -> S:
    """The state without each row's last tokens, `count_B` of them: its count is lowered, all else stays.

    In place the count alone is written; otherwise all of the state is copied. A row that is to lose tokens
    which its sums have becomes NaN, as only the device knows its count.
    """
    if not inplace:
        state = type(state)(*(tensor.clone() for tensor in state))
    state.seen_B.sub_(count_B)
    state.z_BHF.masked_fill_((state.seen_B < state.summed_B)[:, None, None], torch.nan)
    return state


def _since(state: ReplayState) -> Tensor:
    """Which slots hold tokens that the sums do not have, (B, S)."""
    slots, seen_B1 = state.k_BSHK.shape[1], state.seen_B[:, None]
    slot_S = torch.arange(slots, device=seen_B1.device)
    return (seen_B1 - 1 - slot_S) % slots < seen_B1 - state.summed_B[:, None]


def _added(
    s_BHFV: Tensor,
    z_BHF: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    keep_BN: Tensor,
    feature_map: FeatureMap,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The sums with those of some tokens that are to be kept; without any the same bits."""
    dtype, keep_BN11 = s_BHFV.dtype, keep_BN[..., None, None]
    k_BNHF = feature_map.features(k_BNHK.to(dtype)).masked_fill(~keep_BN11, 0.0)
    v_BNHV = v_BNHV.to(dtype).masked_fill(~keep_BN11, 0.0)
    k_BHNF = k_BNHF.transpose(1, 2)
    gain_BHFV, gain_BHF = k_BHNF.mT @ v_BNHV.transpose(1, 2), k_BHNF.sum(2)
    if inplace:
        return s_BHFV.add_(gain_BHFV), z_BHF.add_(gain_BHF)
    return s_BHFV + gain_BHFV, z_BHF + gain_BHF


def _next(
    state: ReplayState,
    s_BHFV: Tensor,
    z_BHF: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    summed_B: Tensor,
    inplace: bool,
) -> ReplayState:
    """The state after new tokens, the last of which go into the ring."""
    slots, new = state.k_BSHK.shape[1], k_BTHK.shape[1]
    last = max(new - slots, 0)
    first_B, dtype = state.seen_B + last, state.k_BSHK.dtype
    k_BSHK = fill(state.k_BSHK, k_BTHK[:, last:].to(dtype), first_B, inplace=inplace)
    v_BSHV = fill(state.v_BSHV, v_BTHV[:, last:].to(dtype), first_B, inplace=inplace)
    # counts are new tensors, which the border copies into those that are given away
    return ReplayState(s_BHFV, z_BHF, k_BSHK, v_BSHV, state.seen_B + new, summed_B.clone())


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
