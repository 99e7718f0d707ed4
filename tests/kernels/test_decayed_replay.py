"""The step of decayed sums and delta rules with a ring against the loop in the same dtype, both against fp64.

Letters: B row, H heads, G groups of heads that share keys, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_checks import poisoned
from torch import Tensor

import holdall
from holdall.contract import join_rows, map_state
from holdall.contract.forms import KernelError
from holdall.kernels import replay as kernels
from holdall.ops.delta_rule import unit_length
from holdall.ops.linear_attention import FEATURE_MAPS
from holdall.ops.replay import (
    ReplayState,
    ScaledReplayState,
    empty_replay,
    replay_attention,
    replay_attention_loop,
    roll_back,
)
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
Tokens = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Kind:
    """What is summed: with no decay, one per head or one per key dimension; by the delta rule or not."""

    name: str
    decay: str = ""
    corrects: bool = False

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("sum"),
    Kind("decayed", "head"),
    Kind("decayed per key", "key"),
    Kind("delta", "", corrects=True),
    Kind("gated delta", "head", corrects=True),
    Kind("delta, decayed per key", "key", corrects=True),
)
QUICK = {"decayed", "delta, decayed per key"}
each_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=str(kind), marks=[pytest.mark.full] * (str(kind) not in QUICK)) for kind in KINDS],
)


@dataclass(frozen=True)
class Sizes:
    heads: int = 2
    groups: int = 2
    key_dim: int = 8
    value_dim: int = 12
    replay: int = 3


def draw(
    lengths: tuple[int, ...], kind: Kind, sizes: Sizes = Sizes(), *, steps: int = 1,
    dtype: torch.dtype = SINGLE, device: torch.device,
) -> tuple[list[Tokens], ReplayState]:  # fmt: skip
    """Some tokens, q, k and v as strided parts of one projection; and the state of rows of these lengths."""
    heads, groups, key_dim, value_dim = sizes.heads, sizes.groups, sizes.key_dim, sizes.value_dim
    parts, rows, longest = [heads * key_dim, groups * key_dim, heads * value_dim], len(lengths), max(lengths)
    x = laws.draw(rows, longest + steps, sum(parts), dtype=dtype)
    fade, beta = (laws.draw(rows, longest + steps, heads, n, dtype=SINGLE, seed=n) for n in (key_dim, 1))
    # from next to none to all but everything
    log_decay = {"": None, "head": -(fade[..., 0] - 1).exp(), "key": -(fade - 1).exp()}[kind.decay]

    def tokens(row: Any, first: int, last: int) -> Tokens:
        q, k, v = (
            u.unflatten(-1, (n, -1))
            for u, n in zip(x[row, first:last].split(parts, dim=-1), (heads, groups, heads), strict=True)
        )
        log = None if log_decay is None else log_decay[row, first:last]
        if not kind.corrects:
            return q, k, v, log, None
        return q, unit_length(k).to(dtype), v, log, 2 * beta[row, first:last, :, 0].sigmoid()

    states, rest = [], []
    for row, length in enumerate(lengths):
        state: Any = empty_replay(
            1, heads, key_dim, value_dim, sizes.replay, key_groups=groups, corrects=kind.corrects,
            dtype=dtype, decays={"": 0, "head": 1, "key": key_dim}[kind.decay],
        )  # fmt: skip
        if length:
            q, k, v, log, one = (None if u is None else u[None] for u in tokens(row, 0, length))
            _, state = replay_attention(q, k, v, state, log, one, replay=sizes.replay)
        states.append(state)
        rest.append(tokens(row, length, length + steps))
    joined = [None if u[0] is None else torch.stack(u).to(device) for u in zip(*rest, strict=True)]
    each = [tuple(None if u is None else u[:, t : t + 1] for u in joined) for t in range(steps)]
    return each, map_state(join_rows(states), lambda tensor: tensor.to(device))


def step(tokens: Tokens, state: Any, **how: Any) -> Any:
    q, k, v, *rest = tokens
    return kernels.replay_attention(q, k, v, state, *rest, **how)


def in_loop(tokens: Tokens, state: Any) -> tuple[Tensor, Any]:
    """The definition, with S as wide as all else, and stored as it was."""
    q, k, v, *rest = tokens
    wide = state._replace(s_BHFV=state.s_BHFV.to(state.z_BHF.dtype))
    y, after = replay_attention_loop(q, k, v, wide, *rest)
    return y, after._replace(s_BHFV=after.s_BHFV.to(state.s_BHFV.dtype))


def parts_of(y: Tensor, state: Any) -> tuple[Tensor, ...]:
    return y, state.s_BHFV.to(state.z_BHF.dtype), state.v_BSHV


def check(tokens: Tokens, state: Any, inplace: bool) -> Any:
    """One step; the next state."""
    given = map_state(state, torch.clone)
    with poisoned():
        y, after = step(tokens, given, inplace=inplace)
    plain = laws.plainly(lambda tokens, state: parts_of(*in_loop(tokens, state)), tokens, state)
    wide = map_state(state, lambda t: t.double() if laws.differentiable(t) else t)
    true_y, truth = in_loop(tuple(None if u is None else u.double() for u in tokens), wide)
    got, true = parts_of(y, after), parts_of(true_y, truth)
    for name, want, mine, right in zip(("y", "s", "written"), plain, got, true, strict=True):
        laws.assert_as_good_as_plain(name, mine, want, right)
    assert [t.dtype for t in after] == [t.dtype for t in state]
    for name in ("k_BSGK", "log_decay_BSHX", "seen_B", "summed_B"):
        laws.assert_bitwise(name, getattr(after, name), getattr(truth, name).to(getattr(state, name).dtype))
    for name, mine, now, before in zip(state._fields, given, after, state, strict=True):
        if inplace and not name.endswith("_B"):
            assert now.data_ptr() == mine.data_ptr()
        else:
            laws.assert_bitwise(f"{name} that went in", mine, before)
    same_B = after.summed_B == state.summed_B
    laws.assert_bitwise("sums of a row that is not written", after.s_BHFV[same_B], state.s_BHFV[same_B])
    return after


@each_kind
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_steps(kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of all counts in one batch: empty, not yet full, full now, and full a step later."""
    tokens, state = draw((0, 2, 5, 6, 7, 10), kind, steps=2, dtype=dtype, device=device)
    for inplace in (False, True):
        after = state
        for now in tokens:
            after = check(now, after, inplace)


@each_kind
def test_sizes(kind: Kind, device: torch.device) -> None:
    for sizes in (Sizes(1, 1, 1, 1, 1), Sizes(2, 1, 20, 3, 2), Sizes(1, 1, 4, 37, 16)):
        lengths = (2 * sizes.replay - 1, 2 * sizes.replay + 1)  # one row is full with the next token
        tokens, state = draw(lengths, kind, sizes, device=device)
        check(tokens[0], state, True)


def test_heads_share_keys(device: torch.device) -> None:
    for kind in KINDS[1], KINDS[4]:
        tokens, state = draw((2, 5, 6), kind, Sizes(heads=6, groups=2), device=device)
        for inplace in (False, True):
            check(tokens[0], state, inplace)


def test_sums_in_bf16_are_rounded_when_they_are_written(device: torch.device) -> None:
    tokens, state = draw((2, 5, 6, 30), KINDS[4], steps=3, dtype=HALF, device=device)
    state = state._replace(s_BHFV=state.s_BHFV.to(HALF))
    for now in tokens:
        state = check(now, state, True)


@each_kind
def test_what_was_taken_back_is_not_looked_at(kind: Kind, device: torch.device) -> None:
    """Slots of tokens that were rolled back, or are in the sums, may hold anything."""
    tokens, state = draw((3, 7, 9), kind, Sizes(replay=4), device=device)
    state = roll_back(state, torch.tensor([1, 2, 3], device=device))
    want, _ = step(tokens[0], state)
    slots = torch.arange(8, device=device)
    dead_BS = (state.seen_B[:, None] - 1 - slots) % 8 >= (state.seen_B - state.summed_B)[:, None]
    assert dead_BS.any(1).all()
    names = ("k_BSGK", "v_BSHV", "log_decay_BSHX")
    poison = {name: getattr(state, name).masked_fill(dead_BS[..., None, None], torch.nan) for name in names}
    laws.assert_bitwise("beside NaN", step(tokens[0], state._replace(**poison))[0], want)


@each_kind
def test_a_row_that_loses_what_its_sums_have_becomes_nan(kind: Kind, device: torch.device) -> None:
    tokens, state = draw((8, 9), kind, Sizes(replay=4), device=device)
    y, _ = step(tokens[0], roll_back(state, torch.tensor([5, 1], device=device)))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.gpu
@each_kind
@pytest.mark.parametrize("batch", [1, 128])
def test_many_rows(kind: Kind, batch: int, device: torch.device) -> None:
    for sizes in (Sizes(16, 1, 128, 64, 16), Sizes(8, 4, 128, 128, 16), Sizes(4, 4, 256, 64, 16)):
        lengths = tuple(row % 50 for row in range(batch))
        tokens, state = draw(lengths, kind, sizes, dtype=HALF, device=device)
        for inplace in (False, True):
            check(tokens[0], state, inplace)
            first, second = (step(tokens[0], map_state(state, torch.clone), inplace=inplace) for _ in "ab")
            for one, other in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
                laws.assert_bitwise("a second time", other, one)


@pytest.mark.gpu
@each_kind
@torch.no_grad()
def test_a_cuda_graph_replays_steps(kind: Kind, device: torch.device) -> None:
    """Through several writes, which come in each row when its own ring is full."""
    tokens, state = draw((0, 3, 9, 30), kind, Sizes(2, 2, 16, 32, 4), device=device)

    def advance(state: ReplayState) -> Tensor:
        y, after = step(tokens[0], state, inplace=True)
        state.seen_B.copy_(after.seen_B)
        state.summed_B.copy_(after.summed_B)
        return y

    want = map_state(state, torch.clone)
    advance(map_state(state, torch.clone))  # the first call compiles
    for _ in range(11):
        y = advance(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = advance(state)
    for _ in range(11):
        graph.replay()
    for name, mine, right in zip(("y", *state._fields), (got, *state), (y, *want), strict=True):
        laws.assert_bitwise(f"{name} after eleven replays", mine, right)


def test_members_of_a_population(device: torch.device) -> None:
    (tokens,), state = draw((3, 7, 8, 0), KINDS[5], device=device)
    y, after = step(tokens, state)
    folded: Any = [x.unflatten(0, (2, 2)) for x in (*tokens, *state)]  # type: ignore[union-attr]

    def one(*tensors: Tensor) -> Any:
        y, after = step(tensors[:5], ReplayState(*tensors[5:]))
        return y, *after

    for got, right in zip(torch.func.vmap(one)(*folded), (y, *after), strict=True):
        laws.assert_bitwise("under vmap", got.flatten(0, 1), right)


@pytest.mark.compile
@torch.no_grad()
def test_one_graph_under_compile(device: torch.device) -> None:
    (tokens,), state = draw((3, 7), KINDS[4], device=device)
    want, after = step(tokens, state)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        y, got = compiled(tokens, map_state(state, torch.clone), inplace=inplace)
        for mine, right in zip((y, *got), (want, *after), strict=True):
            laws.assert_bitwise("compiled", mine, right)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    (tokens,), state = draw((1,), KINDS[0], dtype=DOUBLE, device=device)
    with pytest.raises(KernelError, match="float64"):
        step(tokens, state)
    (tokens,), state = draw((1,), KINDS[0], Sizes(1, 1, 257, 4, 2), device=device)
    with pytest.raises(KernelError, match="at most 256 key dimensions, not 257"):
        step(tokens, state)
    (tokens,), state = draw((1,), KINDS[0], device=device)
    with pytest.raises(KernelError, match="Taylor map and for none"):
        step(tokens, state, feature_map=FEATURE_MAPS["elu1"])
    exponents = torch.zeros(1, 2, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match="states with exponents"):
        step(tokens, ScaledReplayState(*state, exponents))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba-2", pytest.param("gated-delta-net", marks=pytest.mark.full)])
def test_a_mixer_steps_by_the_kernel(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"state": 8, "head_dim": 16} if name == "mamba-2" else {"head_dim": 16, "value_ratio": 1}
    config = holdall.describe(name).configure(width=16, replay=3, **options)
    loop = laws.build(replace(config, form="loop")).to(device)
    mixer = laws.build(config).to(device)
    mixer.form = "kernel"  # whatever packages its prompts would need
    sizes, steps, launch = (1, 1, 1, 2, 1, 1, 1, 1, 1), [], kernels.replay_attention
    x = laws.draw(2, sum(sizes), 16, dtype=SINGLE).to(device)
    want = laws.named(*loop(x))
    monkeypatch.setattr(  # where the op keeps what it found
        replay_attention,
        "kernel",
        lambda *args, **how: steps.append(1) or launch(*args, **how),
        raising=False,
    )
    for inplace in (False, True):
        call = lambda u, s, inplace=inplace: mixer(u, s, inplace=inplace)  # noqa: E731
        for part, got in laws.named(*laws.read_in_pieces(call, x, sizes)).items():
            torch.testing.assert_close(got, want[part], rtol=1e-3, atol=1e-4, msg=part)
    assert len(steps) == 2 * sizes.count(1)
