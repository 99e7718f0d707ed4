"""The Taylor decode step against the loop in the same dtype, both against fp64.

Letters: B row, H heads, K key dim, V value dim, F features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_checks import poisoned
from torch import Tensor

import holdall
from holdall.contract import bytes_per_row
from holdall.contract.forms import KernelError
from holdall.kernels.taylor_step import taylor_step
from holdall.ops.linear_attention import FEATURE_MAPS, linear_attention_loop
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
TAYLOR = FEATURE_MAPS["taylor"]


def draw(
    batch: int, heads: int, key_dim: int, value_dim: int, *, steps: int = 1, past: int = 20,
    dtype: torch.dtype = SINGLE, device: torch.device,
) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, Tensor]]:  # fmt: skip
    """q, k, v of some tokens, as strided parts of one projection; and the fp32 state after `past` others."""
    sizes = [heads * key_dim, heads * key_dim, heads * value_dim]
    parts = laws.draw(batch, steps, sum(sizes), dtype=dtype).to(device).split(sizes, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in parts)
    old_k = TAYLOR.features(laws.draw(batch, heads, past, key_dim, dtype=DOUBLE, seed=1))
    s = old_k.mT @ laws.draw(batch, heads, past, value_dim, dtype=DOUBLE, seed=2)
    state = s.to(SINGLE).to(device), old_k.sum(2).to(SINGLE).to(device)
    return [tuple(x[:, t : t + 1] for x in (q, k, v)) for t in range(steps)], state


def plain_step(tensors: tuple[Tensor, ...], state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    y, s, z = linear_attention_loop(*tensors, *(x.float() for x in state), feature_map=TAYLOR)
    return y, s.to(state[0].dtype), z


def check(tensors: tuple[Tensor, ...], state: tuple[Tensor, Tensor], inplace: bool) -> tuple[Tensor, Tensor]:
    """One step; the next state."""
    given = [x.clone() for x in state]
    with poisoned():
        y, *after = taylor_step(*tensors, *given, inplace=inplace)
    plain = laws.plainly(plain_step, tensors, state)
    truth = linear_attention_loop(*(x.double() for x in (*tensors, *state)), feature_map=TAYLOR)
    for name, got, want, true in zip("ysz", (y, *after), plain, truth, strict=True):
        laws.assert_as_good_as_plain(name, got, want, true)
    for mine, got, before in zip(given, after, state, strict=True):
        if inplace:
            assert got.data_ptr() == mine.data_ptr()
        else:
            laws.assert_bitwise("what went in", mine, before)
    return after[0], after[1]


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16])
@pytest.mark.parametrize("state_dtype", [SINGLE, HALF])
def test_steps(state_dtype: torch.dtype, dtype: torch.dtype, inplace: bool, device: torch.device) -> None:
    tokens, (s, z) = draw(3, 2, 16, 24, steps=3, dtype=dtype, device=device)
    state = s.to(state_dtype), z
    for tensors in tokens:
        state = check(tensors, state, inplace)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (4, 3), (8, 64), (7, 130), (24, 112), (32, 16)])
def test_sizes(key_dim: int, value_dim: int, device: torch.device) -> None:
    tokens, state = draw(2, 1, key_dim, value_dim, device=device)
    for inplace in (False, True):
        check(tokens[0], state, inplace)


def test_from_nothing(device: torch.device) -> None:
    tokens, state = draw(2, 2, 8, 8, device=device)
    y, *_ = taylor_step(*tokens[0], *(torch.zeros_like(x) for x in state))
    torch.testing.assert_close(y, tokens[0][2])  # a single token sees itself alone


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 128, 512])
@pytest.mark.parametrize("state_dtype", [SINGLE, HALF])
def test_many_rows(batch: int, state_dtype: torch.dtype, device: torch.device) -> None:
    for key_dim, value_dim in ((16, 112), (16, 64), (24, 128), (32, 16)):
        tokens, (s, z) = draw(batch, 16, key_dim, value_dim, past=5, dtype=HALF, device=device)
        for inplace in (False, True):
            check(tokens[0], (s.to(state_dtype), z), inplace)
            first, second = (
                taylor_step(*tokens[0], s.clone().to(state_dtype), z.clone(), inplace=inplace) for _ in "ab"
            )
            for one, other in zip(first, second, strict=True):
                laws.assert_bitwise("a second time", other, one)


@pytest.mark.gpu("tens of GB")
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    batch, heads, key_dim, value_dim = 1100, 16, 16, 1024
    q, k, v = (torch.randn(batch, 1, heads, d, device=device) for d in (key_dim, key_dim, value_dim))
    s = torch.randn(batch, heads, TAYLOR.size(key_dim), value_dim, device=device, dtype=HALF)
    assert s.numel() > 2**31
    z = torch.rand(batch, heads, s.shape[2], device=device)
    tail = [x[-2:].clone() for x in (q, k, v, s, z)]
    y, *after = taylor_step(q, k, v, s, z, inplace=True)
    for got, want in zip((y, *after), taylor_step(*tail), strict=True):
        laws.assert_bitwise("the last rows", got[-2:], want)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_steps(device: torch.device) -> None:
    tokens, state = draw(4, 2, 16, 32, device=device)
    taylor_step(*tokens[0], *state)  # the first call puts a table on the device
    want = [x.clone() for x in state]
    for _ in range(3):
        y, *want = taylor_step(*tokens[0], *want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, *_ = taylor_step(*tokens[0], *state, inplace=True)
    for _ in range(3):
        graph.replay()
    for mine, right in zip((got, *state), (y, *want), strict=True):
        laws.assert_bitwise("after three replays", mine, right)


def test_members_of_a_population(device: torch.device) -> None:
    tokens, state = draw(4, 2, 8, 16, device=device)
    want = taylor_step(*tokens[0], *state)
    folded = [x.unflatten(0, (2, 2)) for x in (*tokens[0], *state)]
    for got, right in zip(torch.func.vmap(taylor_step)(*folded), want, strict=True):
        laws.assert_bitwise("under vmap", got.flatten(0, 1), right)


@pytest.mark.compile
@torch.no_grad()
def test_one_graph_under_compile(device: torch.device) -> None:
    tokens, state = draw(2, 2, 8, 16, device=device)
    want = taylor_step(*tokens[0], *state)
    torch._dynamo.reset()
    compiled = torch.compile(taylor_step, fullgraph=True, backend="aot_eager")
    for inplace in (False, True):
        got = compiled(*tokens[0], *(x.clone() for x in state), inplace=inplace)
        for mine, right in zip(got, want, strict=True):
            laws.assert_bitwise("compiled", mine, right)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    tokens, (s, z) = draw(1, 1, 4, 4, dtype=DOUBLE, device=device)
    with pytest.raises(KernelError, match="float64"):
        taylor_step(*tokens[0], s, z)
    tokens, state = draw(1, 1, 33, 4, device=device)
    with pytest.raises(KernelError, match="at most 32 key dimensions, not 33"):
        taylor_step(*tokens[0], *state)


# --------------------------------------------------------------------------------------- the state's dtype


def mixers_of(device: torch.device, **options: Any) -> dict[str, Any]:
    config = holdall.describe("taylor").configure(width=32, feature_dim=8, heads=2, chunk=16, **options)
    return {form: laws.build(replace(config, form=form)).to(device) for form in config.forms}


@torch.no_grad()
def test_every_form_carries_a_bf16_state_of_half_the_bytes(device: torch.device) -> None:
    x = laws.draw(2, 40, 32, dtype=SINGLE).to(device)
    full, half = mixers_of(device), mixers_of(device, state_dtype="bf16")
    y, want = full["loop"](x)
    for form, mixer in half.items():
        got_y, state = mixer(x)
        start = mixer.init_state(2, dtype=SINGLE)
        assert (
            (state.s_BHFV.dtype, state.z_BHF.dtype)
            == (start.s_BHFV.dtype, start.z_BHF.dtype)
            == (HALF, SINGLE)
        )
        torch.testing.assert_close(got_y, y, rtol=1e-3, atol=1e-4)  # rounded only where calls meet
        torch.testing.assert_close(state.s_BHFV.float(), want.s_BHFV, rtol=2**-8, atol=1e-4, msg=form)
        elements, features = mixer.state_elements(40), 2 * 45
        assert elements == full[form].state_elements(40)
        assert bytes_per_row(state) == 2 * (elements - features) + 4 * features


@torch.no_grad()
def test_a_bf16_state_goes_on_alike_in_every_form(device: torch.device) -> None:
    """Token by token, each call rounds once: the forms differ by rounding, and inplace changes nothing."""
    x = laws.draw(2, 30, 32, dtype=SINGLE).to(device)
    mixers = mixers_of(device, state_dtype="bf16")
    want = laws.read_in_pieces(mixers["loop"], x, [20] + [1] * 10)
    exact, _ = mixers_of(device)["loop"](x)
    assert 1e-4 < laws.distance(want[0], exact) < 0.02 * laws.size(exact)
    for form, mixer in mixers.items():
        for inplace in (False, True):
            call = lambda u, s, mixer=mixer, inplace=inplace: mixer(u, s, inplace=inplace)  # noqa: E731
            y, state = laws.read_in_pieces(call, x, [20] + [1] * 10)
            torch.testing.assert_close(y, want[0], rtol=1e-2, atol=1e-3, msg=f"{form} {inplace}")
            torch.testing.assert_close(state.s_BHFV, want[1].s_BHFV, rtol=2**-6, atol=1e-2)


def test_gradients_pass_a_rounded_state(device: torch.device) -> None:
    x = laws.draw(2, 6, 32, dtype=SINGLE).to(device).requires_grad_()
    mixer = mixers_of(device, state_dtype="bf16")["parallel"]
    y, _ = laws.read_in_pieces(mixer, x, [3, 3])
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (want,) = torch.autograd.grad(mixers_of(device)["parallel"](x)[0].square().sum(), x)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)


@torch.no_grad()
def test_a_mixer_steps_by_the_kernel(device: torch.device) -> None:
    mixers = mixers_of(device)
    if "kernel" not in mixers:
        pytest.skip("the mixer has no kernel yet")
    x = laws.draw(2, 8, 32, dtype=SINGLE).to(device)
    want = laws.named(*mixers["loop"](x))
    for inplace in (False, True):
        call = lambda u, s, inplace=inplace: mixers["kernel"](u, s, inplace=inplace)  # noqa: E731
        for name, got in laws.named(*laws.read_in_pieces(call, x, [1] * 8)).items():
            torch.testing.assert_close(got, want[name], rtol=1e-4, atol=1e-5, msg=name)
