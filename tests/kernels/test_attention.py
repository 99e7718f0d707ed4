"""Steps over reserved slots: the kernel and the plain form in the same dtype, against the loop in fp64.

Letters: B row, T new tokens, S slots, H heads of queries, G of keys and values, K key dim, V value dim.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import poisoned, times_compiled
from torch import Tensor

import holdall
from holdall.contract import forms, trim
from holdall.contract.forms import KernelError
from holdall.kernels import attention as kernel
from holdall.ops.attention import KeyValueCache, full_attention_loop, reserved_attention
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
attend = kernel.reserved_attention


class Step(NamedTuple):
    """The arguments of a step."""

    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTGV: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor
    seen_B: Tensor
    filled_B: Tensor

    def copy(self) -> Step:
        return Step(*(x.clone() for x in self))

    def row(self, b: int) -> Step:
        return Step(*(x[b : b + 1] for x in self))


def inputs(
    *, filled: tuple[int, ...], slots: int, new: int = 1, seen: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (2, 2), dims: tuple[int, int] = (16, 16), dtype: torch.dtype,
    device: torch.device,
) -> Step:  # fmt: skip
    """q, k, v as strided parts of one projection, beside slots that are NaN where a row has not read."""
    (many, few), batch = heads, len(filled)
    sizes = [many * dims[0], few * dims[0], few * dims[1]]
    parts = laws.draw(batch, new, sum(sizes), dtype=dtype).to(device).split(sizes, dim=-1)
    q, k, v = (part.unflatten(-1, (n, -1)) for part, n in zip(parts, (many, few, few), strict=True))
    slots_k, slots_v = (
        laws.draw(batch, slots, few, d, dtype=dtype, seed=1 + i).to(device) for i, d in enumerate(dims)
    )
    for x in (slots_k, slots_v):
        for row, (end, count) in enumerate(zip(filled, seen or filled, strict=True)):
            x[row, end:] = torch.nan
            x[row, : end - count] = torch.nan
    counts = (torch.tensor(n, device=device) for n in (seen or filled, filled))
    return Step(q, k, v, slots_k, slots_v, *counts)


def loop(step: Step, scale: float) -> Tensor:
    """The definition in fp64, row by row, over what the row has read."""
    ys = []
    for b in range(len(step.filled_B)):
        row, end = step.row(b), int(step.filled_B[b])
        read = slice(end - int(step.seen_B[b]), end)
        cache = KeyValueCache(row.k_BSGK[:, read].double(), row.v_BSGV[:, read].double(), row.seen_B)
        ys.append(full_attention_loop(*(x.double() for x in row[:3]), cache, scale=scale)[0])
    return torch.cat(ys)


def without_nan(step: Step) -> Step:
    """What PyTorch's own attention needs in slots that it masks."""
    return step._replace(k_BSGK=step.k_BSGK.nan_to_num(0.0), v_BSGV=step.v_BSGV.nan_to_num(0.0))


@torch.no_grad()
def check(step: Step, scale: float | None = None) -> None:
    """In place and in a copy: as good as plain, what is new in its slots, and all else as it was."""
    scale = scale or step.q_BTHK.shape[-1] ** -0.5
    truth = loop(step, scale)
    plain, *_ = laws.plainly(reserved_attention, *without_nan(step), scale=scale)
    _, *want = reserved_attention(*step, scale=scale)
    ys = []
    for inplace in (True, False):
        given = step.copy()
        with poisoned():
            y, *slots = attend(*given, scale=scale, inplace=inplace)
        laws.assert_as_good_as_plain("y", y, plain, truth)
        for name, got, right, mine, before in zip("kv", slots, want, given[3:5], step[3:5], strict=True):
            assert torch.equal(got.nan_to_num(7.0), right.nan_to_num(7.0)), f"slots of {name}"
            assert (got.data_ptr() == mine.data_ptr()) == inplace
            if not inplace:
                assert torch.equal(mine.nan_to_num(7.0), before.nan_to_num(7.0)), f"{name} that went in"
        ys.append(y)
    laws.assert_bitwise("y in place and in a copy", *ys)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_counts_of_filled_slots(heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """None, one, the end of a block and of a part on either side, and all but one."""
    filled = (0, 1, 64, 255, 256, 257, 599)
    check(inputs(filled=filled, slots=600, heads=heads, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_many_heads(dtype: torch.dtype, device: torch.device) -> None:
    check(inputs(filled=(1, 70), slots=300, heads=(24, 8), dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (70, 70), (128, 128), (24, 48), (256, 256)], ids=str)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    check(inputs(filled=(0, 40, 69), slots=70, heads=(6, 2), dims=dims, dtype=dtype, device=device))


@pytest.mark.parametrize("new", [2, 5, 8])
def test_several_new_tokens_see_each_other_in_order(new: int, device: torch.device) -> None:
    for heads in ((2, 2), (8, 1)):
        filled = (0, 255, 300 - new)
        check(inputs(filled=filled, slots=300, new=new, heads=heads, dtype=SINGLE, device=device))


def test_more_parts_than_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(kernel, "_programs", lambda groups: 2)
    check(inputs(filled=(0, 300, 600, 1299), slots=1300, dtype=SINGLE, device=device))


def test_rows_with_empty_slots_in_front(device: torch.device) -> None:
    how: Any = {"filled": (300, 300, 300, 12), "seen": (300, 20, 0, 5), "slots": 301}
    check(inputs(**how, dtype=SINGLE, device=device))


def test_scores_too_large_for_an_exponential(device: torch.device) -> None:
    check(inputs(filled=(300, 5), slots=310, dtype=SINGLE, device=device), scale=400.0)


@torch.no_grad()
def test_bits_of_a_row_depend_neither_on_other_rows_nor_on_the_capacity(device: torch.device) -> None:
    step = inputs(filled=(0, 70, 600, 257, 511), slots=700, heads=(4, 2), dtype=HALF, device=device)
    want, *_ = attend(*step, scale=0.25)
    for b in range(5):
        laws.assert_bitwise(f"row {b} alone", attend(*step.row(b), scale=0.25)[0][0], want[b])
        for slots in (int(step.filled_B[b]) + 1, 3000):
            alone = step.row(b)
            more = [x.new_full((1, slots, *x.shape[2:]), torch.nan) for x in alone[3:5]]
            for old, now in zip(alone[3:5], more, strict=True):
                now[:, : old.shape[1]] = old[:, :slots]
            got, *_ = attend(*alone[:3], *more, *alone[5:], scale=0.25)
            laws.assert_bitwise(f"row {b} among {slots} slots", got[0], want[b])


@torch.no_grad()
def test_a_row_beyond_its_capacity_touches_no_other(device: torch.device) -> None:
    step = inputs(filled=(40, 40, 39), slots=40, dtype=SINGLE, device=device)
    step = step._replace(filled_B=step.filled_B + torch.tensor([0, 57, 0], device=device))
    given = step.copy()
    y, *slots = attend(*given, scale=0.25, inplace=True)
    laws.assert_bitwise("the row with room", y[2], attend(*step.row(2), scale=0.25)[0][0])
    for now, before, new in zip(slots, step[3:5], step[1:3], strict=True):
        for row, slot in enumerate((0, 97 % 40, 39)):
            want = before[row].clone()
            want[slot] = new[row, 0]
            laws.assert_bitwise(f"slots of row {row}", now[row], want)


# ------------------------------------------------------------------------------ mixer, vmap, compile, graphs


def mixers_of(device: torch.device, **options: Any) -> tuple[Any, Any]:
    """The same weights in the kernel's form and in the plain one."""
    built = [
        laws.build(holdall.describe("attention").configure(form=form, **options)).to(device)
        for form in ("kernel", "parallel")
    ]
    assert [mixer.form for mixer in built] == ["kernel", "parallel"]
    return built[0], built[1]


@torch.no_grad()
def test_a_mixer_steps_by_the_kernel(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In pieces, of which those of more than eight tokens are the plain form's."""
    fast, plain = mixers_of(device, width=32, heads=4, kv_heads=2, rotary=0.5)
    x = laws.draw(3, 24, 32, dtype=SINGLE).to(device)
    truth = laws.outcome(laws.twin(plain, dtype=DOUBLE).to(device), x.double())
    want = laws.plainly(laws.outcome, plain, x)
    steps: list[int] = []
    launch = kernel._launch
    monkeypatch.setattr(kernel, "_launch", lambda *args: (steps.append(args[0].shape[1]), launch(*args))[1])
    state = fast.init_state(3, dtype=SINGLE, device=device, capacity=24)
    sizes = [10, 1, 1, 4, 8]
    addresses = [tensor.data_ptr() for tensor in state]
    ys = []
    for piece in x.split(sizes, dim=1):
        y, state = fast(piece, state, inplace=True)
        ys.append(y)
    assert steps == sizes[1:]
    assert [tensor.data_ptr() for tensor in state] == addresses
    for name, got in laws.named(torch.cat(ys, dim=1), trim(state)).items():
        laws.assert_as_good_as_plain(name, got, want[name], truth[name])


@torch.no_grad()
def test_a_step_in_place_makes_no_copies(device: torch.device) -> None:
    fast, _ = mixers_of(device, width=32)
    state = fast.init_state(2, dtype=SINGLE, device=device, capacity=4)
    x = laws.draw(2, 1, 32, dtype=SINGLE).to(device)
    _, after = inspect.unwrap(type(fast).forward)(fast, x, state, inplace=True)
    for name, old, new in zip(state._fields, state, after, strict=True):
        assert new is old, name
    assert after.seen_B.tolist() == after.filled_B.tolist() == [1, 1]


def test_gradients_are_those_of_the_plain_form(device: torch.device) -> None:
    step = without_nan(inputs(filled=(3, 9), slots=12, dtype=SINGLE, device=device))
    leaves = [x.requires_grad_() for x in step[:5]]
    for got, want in zip(
        *(
            torch.autograd.grad(f(*step, scale=0.25)[0].square().sum(), leaves)
            for f in (attend, reserved_attention)
        ),
        strict=True,
    ):
        laws.assert_bitwise("gradient", got, want)


def test_members_of_a_population(device: torch.device) -> None:
    step = inputs(filled=(3, 9, 0, 11), slots=12, dtype=SINGLE, device=device)
    folded = [x.unflatten(0, (2, 2)) for x in without_nan(step)]
    got = torch.func.vmap(lambda *x: attend(*x, scale=0.25))(*folded)
    for mine, right in zip(got, attend(*without_nan(step), scale=0.25), strict=True):
        laws.assert_bitwise("under vmap", mine.flatten(0, 1), right)


@pytest.mark.compile
@torch.no_grad()
def test_one_graph_under_compile(device: torch.device) -> None:
    step = without_nan(inputs(filled=(3, 9), slots=12, dtype=SINGLE, device=device))
    want = attend(*step, scale=0.25)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        got = compiled(*step.copy(), scale=0.25, inplace=inplace)
        for mine, right in zip(got, want, strict=True):
            laws.assert_bitwise("compiled", mine, right)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    with pytest.raises(KernelError, match="float64"):
        attend(*inputs(filled=(1,), slots=4, dtype=DOUBLE, device=device), scale=1.0)
    with pytest.raises(KernelError, match="at most 256 dimensions, not 264"):
        attend(*inputs(filled=(1,), slots=4, dims=(16, 264), dtype=SINGLE, device=device), scale=1.0)


def test_strict_does_not_insist_on_a_kernel_for_wider_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (holdall.describe("attention").configure(width=512, heads=n) for n in (1, 2))
    gpu = torch.device("cuda")
    with forms.strict():
        assert wide.resolved_form(gpu) == "parallel"
        assert narrow.resolved_form(gpu) == "kernel"
        with pytest.raises(KernelError, match="float64"):
            narrow.resolved_form(gpu, DOUBLE)
    with pytest.raises(KernelError, match="at most 256 dimensions, not 512"):
        holdall.build("attention", width=512, form="kernel")


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 128])
@pytest.mark.parametrize(("heads", "dims"), [
    ((24, 8), (70, 70)), ((24, 24), (70, 70)), ((32, 8), (64, 64)), ((16, 1), (128, 128)),
], ids=str)  # fmt: skip
def test_many_rows_of_many_slots(heads: Any, dims: Any, rows: int, device: torch.device) -> None:
    filled = tuple((4999 * (row + 1)) // rows for row in range(rows))
    for dtype in (HALF, SINGLE):
        step = inputs(filled=filled, slots=5000, heads=heads, dims=dims, dtype=dtype, device=device)
        check(step)
        with torch.no_grad():
            first, second = (attend(*step.copy(), scale=0.1)[0] for _ in range(2))
        laws.assert_bitwise("a second time", second, first)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_steps_at_every_length(device: torch.device) -> None:
    step = inputs(filled=(0, 250, 511), slots=600, heads=(24, 8), dims=(70, 70), dtype=HALF, device=device)
    attend(*step, scale=0.1)  # compiles
    mine, graph = step.copy(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *_ = attend(*mine, scale=0.1, inplace=True)
        mine.seen_B.add_(1)
        mine.filled_B.add_(1)
    want = step.copy()
    for _ in range(20):
        graph.replay()
        right, *_ = attend(*want, scale=0.1, inplace=True)
        want.seen_B.add_(1)
        want.filled_B.add_(1)
        laws.assert_bitwise("a replay", y, right)
    assert torch.equal(mine.k_BSGK.nan_to_num(7.0), want.k_BSGK.nan_to_num(7.0))


@pytest.mark.gpu
@torch.no_grad()
def test_a_new_capacity_compiles_nothing(device: torch.device) -> None:
    def call(slots: int, rows: int) -> None:
        attend(*inputs(filled=(1,) * rows, slots=slots, dtype=HALF, device=device), scale=0.1)

    call(64, 1)
    before = times_compiled(kernel._parts_kernel, kernel._join_kernel)
    for slots, rows in ((1, 1), (100, 3), (1024, 16), (5000, 2)):
        call(slots, rows)
    assert times_compiled(kernel._parts_kernel, kernel._join_kernel) == before


@pytest.mark.gpu("tens of GB")
@torch.no_grad()
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    slots = 2**24 + 300
    k = torch.randn(2, slots, 1, 128, device=device, dtype=HALF)
    now = torch.randn(2, 1, 1, 128, device=device, dtype=HALF)
    filled_B = torch.full((2,), slots - 1, device=device)
    seen_B = torch.full((2,), 600, device=device)
    y, *_ = attend(now, now, now, k, k.clone(), seen_B, filled_B, scale=0.1, inplace=True)
    end = k[:, -601:].clone()
    short_B = torch.full((2,), 600, device=device)
    want, *_ = reserved_attention(now, now, now, end, end.clone(), short_B, short_B, scale=0.1)
    torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)
    laws.assert_bitwise("the last slot", k[:, -1], now[:, 0])
