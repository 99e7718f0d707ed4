"""Linear attention with a ring: beside what the laws say, rows of their own counts, drafts, and its cost.

Letters: B row, T time, H heads, K key dim, V value dim, L tokens between two writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import holdall
from holdall.contract import StateError, join_rows, map_state, select_rows
from holdall.ops import linear_attention as plain
from holdall.ops.delta_rule import delta_rule_loop, unit_length
from holdall.ops.linear_attention import (
    FEATURE_MAPS,
    IDENTITY,
    FeatureMap,
    linear_attention,
    linear_attention_loop,
    per_key,
)
from holdall.ops.replay import (
    ReplayState,
    ScaledReplayState,
    as_carried,
    empty_replay,
    in_full,
    replay_attention,
    roll_back,
)
from holdall.testing import laws

DOUBLE = torch.float64
B, H, K, V = 3, 4, 4, 6
MAP = FEATURE_MAPS["taylor"]
Tokens = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Kind:
    """What is summed: under which map, normalised or not, with X log decays, by the delta rule or not."""

    name: str
    feature_map: FeatureMap = IDENTITY
    normalise: bool = False
    decays: int = 0
    corrects: bool = False
    groups: int = H

    def __str__(self) -> str:
        return self.name


TAYLOR = Kind("taylor", MAP, normalise=True)
KINDS = (
    TAYLOR,
    Kind("sum"),
    Kind("decayed", decays=1),
    Kind("decayed and normalised", FEATURE_MAPS["elu1"], normalise=True, decays=1),
    Kind("decayed, with shared keys", decays=1, groups=2),
    Kind("decayed per key, with one key for all", decays=K, groups=1),
    Kind("delta", corrects=True),
    Kind("gated delta, with shared keys", decays=1, corrects=True, groups=2),
    Kind("delta, decayed per key, with shared keys", decays=K, corrects=True, groups=2),
)
QUICK = {"taylor", "decayed, with shared keys", "delta, decayed per key, with shared keys"}
each_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=str(kind), marks=[pytest.mark.full] * (str(kind) not in QUICK)) for kind in KINDS],
)


def draw(new: int, rows: int = B, seed: int = 0, kind: Kind = TAYLOR) -> Tokens:
    """q, k, v, log decays from next to none to all but everything, and beta from 0 to 2."""
    q, k, v, fade, beta = (
        laws.draw(rows, new, H, n, dtype=DOUBLE, seed=5 * seed + i) for i, n in enumerate((K, K, V, K, 1))
    )
    k = k[:, :, : kind.groups]
    log_decay = {0: None, 1: -(fade[..., 0] - 1).exp(), K: -(fade - 1).exp()}[kind.decays]
    if not kind.corrects:
        return q, k, v, log_decay, None
    return q, unit_length(k), v, log_decay, 2 * beta[..., 0].sigmoid()


def start(replay: int, rows: int = B, kind: Kind = TAYLOR) -> ReplayState:
    return empty_replay(
        rows, H, K, V, replay, feature_map=kind.feature_map, normalise=kind.normalise, decays=kind.decays,
        corrects=kind.corrects, key_groups=kind.groups, dtype=DOUBLE,
    )  # fmt: skip


def read(tokens: Tokens, state: ReplayState | None, replay: int, kind: Kind = TAYLOR, **how: Any) -> Any:
    q, k, v, log_decay, beta = tokens
    return replay_attention(
        q, k, v, state, log_decay, beta, replay=replay, feature_map=kind.feature_map,
        normalise=kind.normalise, chunk=16, **how,
    )  # fmt: skip


def each(function: Callable[..., Tensor], *tokens: Tokens) -> Any:
    """A function of every tensor of some tokens."""
    return tuple(None if one[0] is None else function(*one) for one in zip(*tokens, strict=True))


def part(tokens: Tokens, first: int, last: int) -> Any:
    return each(lambda x: x[:, first:last], tokens)


def without_ring(tokens: Tokens, kind: Kind = TAYLOR) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs and sums by the definitions of the ops without a ring."""
    q, k, v, log_decay, beta = tokens
    k, state = k.repeat_interleave(H // kind.groups, dim=2), start(1, len(q), kind)
    if beta is not None:
        return *delta_rule_loop(q, k, v, beta, state.s_BHFV, log_decay), None
    z_BHF = state.z_BHF if kind.normalise else None
    return linear_attention_loop(q, k, v, state.s_BHFV, z_BHF, log_decay, feature_map=kind.feature_map)


@each_kind
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_sums_follow_and_the_ring_has_the_rest(form: str, kind: Kind) -> None:
    for replay in (1, 2, 5) if kind == TAYLOR else (3,):
        length = 8 * replay
        tokens, state = draw(length, kind=kind), start(replay, kind=kind)
        want = without_ring(tokens, kind)[0]
        for n in range(1, length + 1):
            y, state = read(part(tokens, n - 1, n), state, replay, kind, form=form)
            laws.assert_close("y", y, want[:, n - 1 : n])
            summed = max(0, n // replay - 1) * replay
            assert state.seen_B.tolist() == [n] * B
            assert state.summed_B.tolist() == [summed] * B
            if summed:
                _, s_BHFV, z_BHF = without_ring(part(tokens, 0, summed), kind)
                laws.assert_close("s", state.s_BHFV, s_BHFV)
                if z_BHF is not None:
                    laws.assert_close("z", state.z_BHF, z_BHF)
            for p in range(max(0, n - 2 * replay), n):
                slot = p % (2 * replay)
                laws.assert_bitwise(f"key {p}", state.k_BSGK[:, slot], tokens[1][:, p])
                if not kind.corrects:
                    laws.assert_bitwise(f"value {p}", state.v_BSHV[:, slot], tokens[2][:, p])
                if kind.decays:
                    log_decay = per_key(tokens[3])[:, p]
                    laws.assert_bitwise(f"decay {p}", state.log_decay_BSHX[:, slot], log_decay)


@each_kind
@torch.no_grad()
def test_rows_of_any_counts_read_together_what_the_loop_reads_of_each(kind: Kind) -> None:
    replay, lengths = 4, (0, 1, 3, 4, 7, 8, 9, 21)
    tokens, states = draw(70, len(lengths), kind=kind), []
    for row, length in enumerate(lengths):
        state = start(replay, 1, kind)
        if length:
            _, state = read(each(lambda x, n=length, r=row: x[r : r + 1, :n], tokens), state, replay, kind)
        states.append(state)
    for new in (1, 2, 6, 7, 8, 9, 40):

        def next_of(row: int, new: int = new) -> Tokens:
            return each(lambda x: x[row : row + 1, lengths[row] : lengths[row] + new], tokens)

        alone = [read(next_of(row), state, replay, kind, form="loop") for row, state in enumerate(states)]
        now = each(lambda *x: torch.cat(x), *map(next_of, range(len(lengths))))
        for inplace in (False, True):
            y, after = read(now, map_state(join_rows(states), torch.clone), replay, kind, inplace=inplace)
            for row, (want, end) in enumerate(alone):
                laws.assert_close(f"row {row}", y[row], want[0])
                for name, tensor in end._asdict().items():
                    laws.assert_close(f"{name} of row {row}", getattr(after, name)[row], tensor[0])


@each_kind
@torch.no_grad()
def test_drafts_of_which_each_row_keeps_as_many_as_it_likes(kind: Kind) -> None:
    """As speculative decoding runs: tokens, then drafts up to the limit, of which some are taken back."""
    lots, tokens, ys = torch.Generator().manual_seed(0), draw(90, kind=kind), [[] for _ in range(B)]  # type: ignore[var-annotated]
    replay = 3
    (want, *_), state, at = without_ring(tokens, kind), start(replay, kind=kind), [0] * B
    while max(at) < 80:
        new = int(torch.randint(1, replay + 1, (), generator=lots))
        keep = torch.randint(0, new + 1, (B,), generator=lots)
        # what is kept is right, the rest are other tokens
        wrong, kept = (
            draw(new, seed=7 + sum(at), kind=kind),
            list(enumerate(zip(at, keep.tolist(), strict=True))),
        )

        def drafted(x: Tensor, u: Tensor, kept: Any = kept) -> Tensor:
            return torch.stack([torch.cat((x[b, p : p + n], u[b, n:])) for b, (p, n) in kept])

        y, state = read(each(drafted, tokens, wrong), state, replay, kind, inplace=True)
        state = roll_back(state, new - keep, inplace=True)
        for b, n in enumerate(keep.tolist()):
            ys[b].append(y[b, :n])
            at[b] += n
    assert state.seen_B.tolist() == at
    for b, pieces in enumerate(ys):
        laws.assert_close(f"row {b}", torch.cat(pieces), want[b, : at[b]])


@each_kind
@torch.no_grad()
def test_what_was_taken_back_may_have_been_infinite(kind: Kind) -> None:
    tokens, replay = draw(30, kind=kind), 4
    want = without_ring(tokens, kind)[0]
    for first in (3, 8, 21):
        _, state = read(part(tokens, 0, first), None, replay, kind)
        poison = each(lambda x: torch.full_like(x[:, :4], torch.nan), tokens)
        _, after = read(poison, state, replay, kind)
        back = roll_back(after, torch.tensor([4] * B))
        y, _ = read(part(tokens, first, first + 4), back, replay, kind)
        laws.assert_close("after NaN", y, want[:, first : first + 4])


@each_kind
@torch.no_grad()
def test_a_row_that_loses_what_its_sums_have_becomes_nan(kind: Kind) -> None:
    """Where only a GPU knows the counts, nothing waits, and that row alone shows it, from then on."""
    tokens = draw(30, kind=kind)
    _, state = read(part(tokens, 0, 8), None, 4, kind)
    state = roll_back(state, torch.tensor([5, 4, 0]))
    for p in (8, 9, 25):
        y, state = read(part(tokens, p, p + 1), state, 4, kind)
        assert y[0].isnan().all()
        assert y[1:].isfinite().all()
        _, state = read(part(tokens, 9, 25), state, 4, kind)


def mixer(**options: Any) -> Any:
    return laws.build(holdall.describe("taylor").configure(width=16, feature_dim=4, **options)).double()


@torch.no_grad()
def test_a_rollback_beyond_what_a_row_has_is_refused() -> None:
    ring = mixer(replay=4)
    x_BTD = laws.tokens(ring, 8)
    _, state = ring(x_BTD)  # of 8 tokens 4 are in the sums
    state = ring.rollback(state, 3)
    with pytest.raises(
        StateError, match="taylor of width 16 cannot take back 2 tokens of row 1: only its last 1"
    ):
        ring.rollback(state, torch.tensor([1, 2]))
    with pytest.raises(StateError, match="cannot take back 5 tokens: its rollback_limit is 4"):
        ring.rollback(state, 5)
    with pytest.raises(StateError, match="cannot take back -1 tokens"):
        ring.rollback(state, -1)
    with pytest.raises(StateError, match="NormalisedState, where taylor of width 16 needs a ReplayState"):
        ring.rollback(mixer()(x_BTD)[1], 1)
    with pytest.raises(StateError, match="rollback_limit is 0; read the tokens that are to stay again"):
        mixer().rollback(mixer()(x_BTD)[1], 1)
    # a number is known to the host wherever the state is
    elsewhere = map_state(state, lambda tensor: tensor.to("meta"))
    assert ring.rollback(elsewhere, 4).seen_B.shape == (2,)
    with pytest.raises(StateError, match="cannot take back 5 tokens: its rollback_limit is 4"):
        ring.rollback(elsewhere, 5)
    # where the host knows no counts, as on a GPU, nothing waits, and that row alone shows it
    back = roll_back(state, torch.tensor([1, 2]))
    y_BTD, _ = ring(x_BTD, back)
    assert y_BTD[0].isfinite().all()
    assert y_BTD[1].isnan().all()
    assert [len(tensor) for tensor in ring.rollback(select_rows(state, []), 1)] == [0] * 7


@torch.no_grad()
def test_a_long_prompt_is_read_by_one_call_and_its_end_and_the_ring_by_small_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features are built of no more tokens than those of the call, two rings and L more."""
    read_tokens: list[int] = []
    built: list[int] = []
    from holdall.ops import replay as ops

    def counted(q: Tensor, *args: Any, **how: Any) -> Any:
        read_tokens.append(q.shape[1])
        return plain.linear_attention(q, *args, **how)

    added = ops._Reader.added

    def counted_sums(reader: Any, s: Tensor, z: Tensor, since: Any, *args: Any, **how: Any) -> Any:
        built.append(since.k_BGNK.shape[2])
        return added(reader, s, z, since, *args, **how)

    monkeypatch.setattr(ops, "linear_attention", counted)
    monkeypatch.setattr(ops._Reader, "added", counted_sums)
    _, state = read(draw(5), None, 16)
    read_tokens.clear()
    built.clear()
    read(draw(512), state, 16)
    assert read_tokens == [512 - 32]
    assert built == [31, 16]


@each_kind
def test_no_sums_are_written_in_a_step_unless_a_ring_is_full(kind: Kind) -> None:
    tokens, state = draw(60, kind=kind), start(4, kind=kind)
    writes = 0
    with torch.no_grad():
        for t in range(60):
            before, version = state.s_BHFV, state.s_BHFV._version
            _, state = read(part(tokens, t, t + 1), state, 4, kind, inplace=True)
            assert state.s_BHFV is before
            writes += state.s_BHFV._version != version
    assert writes == 60 // 4 - 1


def test_training_builds_no_ring() -> None:
    q, k, v, *_ = tokens = draw(50)
    y, after = read(tokens, None, 4, want_state=False)
    assert after is None
    want = linear_attention(q, k, v, None, feature_map=MAP, normalise=True, chunk=16, want_state=False)[0]
    laws.assert_bitwise("without a state", y, want)


# --------------------------------------------------------------------------------------- the state's dtype


def narrow(state_dtype: str, replay: int = 4, form: str = "auto") -> Any:
    config = holdall.describe("taylor").configure(
        width=16, feature_dim=4, heads=2, chunk=16, replay=replay, state_dtype=state_dtype, form=form
    )
    return laws.build(config)


@torch.no_grad()
@pytest.mark.parametrize("state_dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("sizes", [(1,) * 30, (20, 1, 1, 3, 1, 9)], ids=str)
def test_every_form_carries_a_state_of_half_the_bytes(state_dtype: str, sizes: tuple[int, ...]) -> None:
    x_BTD = laws.draw(2, sum(sizes), 16, dtype=torch.float32)
    want, _ = narrow("fp32")(x_BTD)
    ends = {}
    for form in ("loop", "parallel"):
        mixer = narrow(state_dtype, form=form)
        for inplace in (False, True):
            call = lambda u, s, mixer=mixer, inplace=inplace: mixer(u, s, inplace=inplace)  # noqa: E731
            y_BTD, state = laws.read_in_pieces(call, x_BTD, sizes)
            fields = mixer.init_state(2, dtype=torch.float32)
            assert [t.dtype for t in state] == [t.dtype for t in fields]
            assert state.s_BHFV.element_size() == 2
            assert state.z_BHF.dtype == torch.float32
            assert laws.elements_per_row(state) == mixer.state_elements(30)
            assert 1e-6 < laws.distance(y_BTD, want) < 0.01 * laws.size(want)
            ends[form, inplace] = in_full(state).s_BHFV
    for end in ends.values():
        torch.testing.assert_close(end, ends["loop", False], rtol=2**-7, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("state_dtype", ["bf16", "fp16"])
def test_sums_are_rounded_when_they_are_written_and_not_between(state_dtype: str) -> None:
    mixer, state, writes = narrow(state_dtype), None, 0
    for x_B1D in laws.draw(2, 41, 16, dtype=torch.float32).split(1, dim=1):
        before = state
        _, state = mixer(x_B1D, state)
        if before is not None and torch.equal(before.summed_B, state.summed_B):
            laws.assert_bitwise("sums", state.s_BHFV, before.s_BHFV)
            assert state[7:] == () or torch.equal(state.exponent_BH, before.exponent_BH)
        else:
            writes += before is not None
    assert writes == 41 // 4 - 1


@torch.no_grad()
def test_a_power_of_two_is_taken_out_of_sums_in_fp16_whatever_it_is() -> None:
    """Values 2^n as large have outputs 2^n as large, to the bit: nothing overflows, and no bits are lost."""
    (q, k, v), like = (x.float() for x in draw(60)[:3]), None
    for power in (0, -40, 60):
        wide = empty_replay(B, H, K, V, 4, feature_map=MAP, normalise=True, dtype=torch.float32)
        state: Any = ScaledReplayState(wide.s_BHFV.half(), *wide[1:], torch.zeros(B, H, dtype=torch.int32))
        ys = []
        for t in range(60):
            y, state = read(part((q, k, v * 2.0**power, None, None), t, t + 1), state, 4)
            ys.append(y * 2.0**-power)
        assert state.s_BHFV.isfinite().all()
        assert 2**13 <= laws.size(state.s_BHFV) <= 2**14
        like = torch.cat(ys, dim=1) if like is None else like
        laws.assert_bitwise(f"outputs by values of 2^{power}", torch.cat(ys, dim=1), like)


def test_what_is_not_written_keeps_its_bits_where_rounding_has_reached_the_next_power_of_two() -> None:
    wide = start(4, 1)
    wide.s_BHFV[:, 0, 3, 2] = 2**14 - 1  # fp16 rounds it to 2^14, which would have another exponent
    wide.s_BHFV[:, 0, 1, 1] = 2.0**-24  # and this would be lost by it
    none_BH = torch.zeros(1, H, dtype=torch.int32)
    like = ScaledReplayState(wide.s_BHFV.half(), *wide[1:], none_BH)
    state = as_carried(wide._replace(summed_B=wide.summed_B + 4), like)
    again = as_carried(in_full(state), state)
    for name, tensor in again._asdict().items():
        laws.assert_bitwise(name, tensor, getattr(state, name))
    assert state.s_BHFV[0, 0, 3, 2] == 2**14
    assert state.s_BHFV[0, 0, 1, 1] > 0


def test_gradients_pass_rounded_sums() -> None:
    x_BTD = laws.draw(2, 12, 16, dtype=torch.float32).requires_grad_()
    (want,) = torch.autograd.grad(narrow("fp32")(x_BTD)[0].square().sum(), x_BTD)
    for state_dtype in ("bf16", "fp16"):
        y_BTD, _ = laws.read_in_pieces(narrow(state_dtype), x_BTD, [5, 1, 6])
        (got,) = torch.autograd.grad(y_BTD.square().sum(), x_BTD)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


def test_fp16_without_a_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp16' needs replay, 16 say: without it, take 'bf16' or 'fp32'"):
        narrow("fp16", replay=0)
