"""The Taylor step with a ring against the loop in the same dtype, both against fp64.

Letters: B row, H heads, K key dim, V value dim, L tokens between two writes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_checks import poisoned
from torch import Tensor

import holdall
from holdall.contract import join_rows, map_state
from holdall.contract.forms import KernelError
from holdall.kernels import replay as kernels
from holdall.ops.linear_attention import FEATURE_MAPS
from holdall.ops.replay import (
    ReplayState,
    ScaledReplayState,
    as_carried,
    empty_replay,
    in_full,
    replay_attention,
    replay_attention_loop,
    roll_back,
)
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
TAYLOR = FEATURE_MAPS["taylor"]


def draw(
    lengths: tuple[int, ...], heads: int, key_dim: int, value_dim: int, replay: int, *, steps: int = 1,
    dtype: torch.dtype = SINGLE, device: torch.device,
) -> tuple[list[tuple[Tensor, ...]], ReplayState]:  # fmt: skip
    """q, k, v of some tokens, as strided parts of one projection; and the state of rows of these lengths."""
    sizes = [heads * key_dim, heads * key_dim, heads * value_dim]
    x = laws.draw(len(lengths), max(lengths) + steps, sum(sizes), dtype=dtype)

    def part(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(u.unflatten(-1, (heads, -1)) for u in x.split(sizes, dim=-1))

    states = []
    for row, length in enumerate(lengths):
        state = empty_replay(
            1, heads, key_dim, value_dim, replay, feature_map=TAYLOR, normalise=True, dtype=dtype
        )
        if length:
            _, after = replay_attention(
                *part(x[row : row + 1, :length]), state, replay=replay, feature_map=TAYLOR, normalise=True
            )
            assert after is not None
            state = after
        states.append(state)
    rest = torch.stack([x[row, length : length + steps] for row, length in enumerate(lengths)]).to(device)
    state = map_state(join_rows(states), lambda tensor: tensor.to(device))
    return [part(rest[:, t : t + 1]) for t in range(steps)], state


def carried(state: ReplayState, dtype: torch.dtype) -> Any:
    """The state with S in another dtype, in fp16 with exponents."""
    if dtype != torch.float16:
        return state._replace(s_BHFV=state.s_BHFV.to(dtype))
    none_BH = torch.zeros(state.z_BHF.shape[:2], dtype=torch.int32, device=state.z_BHF.device)
    nothing = torch.full_like(state.summed_B, -1)  # so that all rows count as written
    like = ScaledReplayState(state.s_BHFV.half(), *state[1:6], nothing, none_BH)
    return as_carried(state, like)


def plain_step(tensors: tuple[Tensor, ...], state: Any) -> tuple[Tensor, ...]:
    y, after = replay_attention_loop(*tensors, in_full(state), feature_map=TAYLOR)
    return y, in_full(as_carried(after, state)).s_BHFV, after.z_BHF


def check(tensors: tuple[Tensor, ...], state: Any, inplace: bool) -> Any:
    """One step; the next state."""
    given = map_state(state, torch.clone)
    with poisoned():
        y, after = kernels.replay_attention(*tensors, given, feature_map=TAYLOR, inplace=inplace)
    plain = laws.plainly(plain_step, tensors, state)
    wide = map_state(in_full(state), lambda t: t.double() if laws.differentiable(t) else t)
    true_y, truth = replay_attention_loop(*(x.double() for x in tensors), wide, feature_map=TAYLOR)
    got_true = ((y, true_y), (in_full(after).s_BHFV, truth.s_BHFV), (after.z_BHF, truth.z_BHF))
    for name, want, (got, true) in zip("ysz", plain, got_true, strict=True):
        laws.assert_as_good_as_plain(name, got, want, true)
    assert [t.dtype for t in after] == [t.dtype for t in state]
    for name in ("k_BSGK", "v_BSHV", "seen_B", "summed_B"):
        laws.assert_bitwise(name, getattr(after, name), getattr(truth, name).to(getattr(state, name).dtype))
    for name, mine, got, before in zip(state._fields, given, after, state, strict=True):
        if inplace and not name.endswith("_B"):
            assert got.data_ptr() == mine.data_ptr()
        else:
            laws.assert_bitwise(f"{name} that went in", mine, before)
    same_B = after.summed_B == state.summed_B
    laws.assert_bitwise("sums of a row that is not written", after.s_BHFV[same_B], state.s_BHFV[same_B])
    if isinstance(state, ScaledReplayState):
        largest_BH = after.s_BHFV.abs().amax((-1, -2))
        assert ((largest_BH == 0) | (largest_BH >= 2**13) & (largest_BH <= 2**14)).all()
    return after


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16])
@pytest.mark.parametrize("state_dtype", [SINGLE, HALF, torch.float16])
def test_steps(state_dtype: torch.dtype, dtype: torch.dtype, inplace: bool, device: torch.device) -> None:
    """Rows of all counts in one batch: empty, not yet full, full now, and full a step later."""
    tokens, state = draw((0, 2, 5, 6, 7, 10), 2, 8, 12, 3, steps=2, dtype=dtype, device=device)
    state = carried(state, state_dtype)
    for tensors in tokens:
        state = check(tensors, state, inplace)


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "replay"), [(1, 1, 1), (4, 3, 2), (8, 64, 1), (7, 130, 3), (24, 16, 16)]
)
def test_sizes(key_dim: int, value_dim: int, replay: int, device: torch.device) -> None:
    lengths = (2 * replay - 1, 2 * replay + 1)  # one row is full with the next token, and one is not
    tokens, state = draw(lengths, 1, key_dim, value_dim, replay, device=device)
    for inplace in (False, True):
        check(tokens[0], state, inplace)


def test_what_was_taken_back_is_not_looked_at(device: torch.device) -> None:
    """Slots of tokens that were rolled back, or are in the sums, may hold anything."""
    tokens, state = draw((3, 7, 9), 2, 4, 6, 4, device=device)
    state = roll_back(state, torch.tensor([1, 2, 3], device=device))
    want, _ = kernels.replay_attention(*tokens[0], state, feature_map=TAYLOR)
    slots = torch.arange(8, device=device)
    dead_BS = (state.seen_B[:, None] - 1 - slots) % 8 >= (state.seen_B - state.summed_B)[:, None]
    assert dead_BS.any(1).all()
    poison = [u.masked_fill(dead_BS[..., None, None], torch.nan) for u in (state.k_BSGK, state.v_BSHV)]
    got, _ = kernels.replay_attention(
        *tokens[0], state._replace(k_BSGK=poison[0], v_BSHV=poison[1]), feature_map=TAYLOR
    )
    laws.assert_bitwise("beside NaN", got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("state_dtype", [SINGLE, HALF, torch.float16])
def test_many_rows(batch: int, state_dtype: torch.dtype, device: torch.device) -> None:
    for key_dim, value_dim in ((16, 112), (24, 128), (32, 16)):
        lengths = tuple(row % 50 for row in range(batch))
        tokens, state = draw(lengths, 16, key_dim, value_dim, 16, dtype=HALF, device=device)
        state = carried(state, state_dtype)
        for inplace in (False, True):
            check(tokens[0], state, inplace)
            first, second = (
                kernels.replay_attention(
                    *tokens[0], map_state(state, torch.clone), feature_map=TAYLOR, inplace=inplace
                )
                for _ in "ab"
            )
            for one, other in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
                laws.assert_bitwise("a second time", other, one)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_steps(device: torch.device) -> None:
    """Through several writes, which come in each row when its own ring is full."""
    tokens, state = draw((0, 3, 9, 30), 2, 16, 32, 4, device=device)

    def step(state: ReplayState) -> Tensor:
        y, after = kernels.replay_attention(*tokens[0], state, feature_map=TAYLOR, inplace=True)
        state.seen_B.copy_(after.seen_B)
        state.summed_B.copy_(after.summed_B)
        return y

    want = map_state(state, torch.clone)
    step(map_state(state, torch.clone))  # the first call puts a table on the device
    for _ in range(11):
        y = step(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(state)
    for _ in range(11):
        graph.replay()
    for name, mine, right in zip(("y", *state._fields), (got, *state), (y, *want), strict=True):
        laws.assert_bitwise(f"{name} after eleven replays", mine, right)


def test_members_of_a_population(device: torch.device) -> None:
    tokens, state = draw((3, 7, 8, 0), 2, 4, 6, 4, device=device)
    y, after = kernels.replay_attention(*tokens[0], state, feature_map=TAYLOR)
    folded: Any = [x.unflatten(0, (2, 2)) for x in (*tokens[0], *state)]

    def one(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        y, after = kernels.replay_attention(q, k, v, ReplayState(*tensors), feature_map=TAYLOR)
        return y, *after

    for got, right in zip(torch.func.vmap(one)(*folded), (y, *after), strict=True):
        laws.assert_bitwise("under vmap", got.flatten(0, 1), right)


@pytest.mark.compile
@torch.no_grad()
def test_one_graph_under_compile(device: torch.device) -> None:
    tokens, state = draw((3, 7), 2, 4, 6, 4, device=device)
    want, after = kernels.replay_attention(*tokens[0], state, feature_map=TAYLOR)
    torch._dynamo.reset()
    compiled = torch.compile(kernels.replay_attention, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        y, got = compiled(*tokens[0], map_state(state, torch.clone), feature_map=TAYLOR, inplace=inplace)
        for mine, right in zip((y, *got), (want, *after), strict=True):
            laws.assert_bitwise("compiled", mine, right)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    tokens, state = draw((1,), 1, 4, 4, 2, dtype=DOUBLE, device=device)
    with pytest.raises(KernelError, match="float64"):
        kernels.replay_attention(*tokens[0], state, feature_map=TAYLOR)
    tokens, state = draw((1,), 1, 33, 4, 2, device=device)
    with pytest.raises(KernelError, match="at most 32 key dimensions, not 33"):
        kernels.replay_attention(*tokens[0], state, feature_map=TAYLOR)
    tokens, state = draw((1,), 1, 4, 4, 2, device=device)
    with pytest.raises(KernelError, match="the Taylor map and for none"):
        kernels.replay_attention(*tokens[0], state, feature_map=FEATURE_MAPS["quadratic"])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1,) * 14, (20, 1, 1, 3, 1, 9, 1)])
def test_a_mixer_steps_by_the_kernel(
    sizes: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = holdall.describe("taylor").configure(width=16, feature_dim=4, heads=2, chunk=16, replay=3)
    loop, mixer = (laws.build(replace(config, form=form)).to(device) for form in ("loop", "kernel"))
    x = laws.draw(2, sum(sizes), 16, dtype=SINGLE).to(device)
    want, steps = laws.named(*loop(x)), []
    launch = kernels.replay_attention
    monkeypatch.setattr(  # where the op keeps what it found
        replay_attention,
        "kernel",
        lambda *args, **how: steps.append(1) or launch(*args, **how),
        raising=False,
    )
    for inplace in (False, True):
        call = lambda u, s, inplace=inplace: mixer(u, s, inplace=inplace)  # noqa: E731
        for name, got in laws.named(*laws.read_in_pieces(call, x, sizes)).items():
            torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5, msg=name)
    assert len(steps) == 2 * sizes.count(1)
