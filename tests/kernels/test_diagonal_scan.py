"""The diagonal scans' kernels against the plain forms in the same dtype, both against fp64.

Letters: B row, T time, X channels, P modes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import assert_trains_under_vmap, times_compiled, traced
from torch import Tensor

import holdall
from holdall.contract.forms import KernelError
from holdall.kernels import diagonal_scan as kernel
from holdall.ops import diagonal_scan as ops
from holdall.testing import laws

SINGLE, COMPLEX, DOUBLE = torch.float32, torch.complex64, torch.float64
FORMS = {True: (kernel.steady_scan, ops.steady_scan), False: (kernel.diagonal_scan, ops.diagonal_scan)}


pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(
    length: int, *, device: torch.device, dtype: torch.dtype = SINGLE, steady: bool = False, batch: int = 2,
    shape: tuple[int, ...] = (5,),
) -> list[Tensor]:  # fmt: skip
    """a, or its logarithm, b, and the state before."""
    wide = torch.complex128 if dtype.is_complex else DOUBLE
    a = laws.draw(1, *shape, dtype=wide)[0] if steady else laws.draw(batch, length, *shape, dtype=wide)
    a = 0.1 * a - 0.2 if steady else a / (0.1 + a.abs())  # memories of tens of tokens
    b, h = laws.draw(batch, length, *shape, dtype=wide, seed=1), laws.draw(batch, *shape, dtype=wide, seed=2)
    return [u.to(device, dtype) for u in (a, b, h)]


def results(function: Any, args: list[Tensor]) -> dict[str, Tensor]:
    leaves = [u.detach().requires_grad_() for u in args]
    h = function(*leaves)
    up = laws.draw(*h.shape, dtype=h.dtype, seed=20).to(h.device)
    grads = torch.autograd.grad(h, leaves, up)
    return {"states": h, **{f"gradient of {n}": g for n, g in zip(("a", "b", "h"), grads, strict=True)}}


def check(args: list[Tensor], *, steady: bool) -> dict[str, Tensor]:
    ours, plain = FORMS[steady]
    wide = torch.complex128 if args[0].is_complex() else DOUBLE
    got, other = results(ours, args), laws.plainly(results, plain, args)
    truth = results(plain, [u.to(wide) for u in args])
    for name, mine in got.items():
        laws.assert_as_good_as_plain(name, mine, other[name], truth[name])
    return got


GPU_LENGTHS = [pytest.param(length, marks=pytest.mark.gpu) for length in (1000, 16384)]
MORE_LENGTHS = [pytest.param(length, marks=pytest.mark.full) for length in (63, 64)]


@pytest.mark.parametrize("length", [1, 65, *MORE_LENGTHS, *GPU_LENGTHS])
@pytest.mark.parametrize("dtype", [SINGLE, COMPLEX], ids=str)
@pytest.mark.parametrize("steady", [False, True])
def test_lengths(steady: bool, dtype: torch.dtype, length: int, device: torch.device) -> None:
    check(inputs(length, device=device, dtype=dtype, steady=steady), steady=steady)


@pytest.mark.parametrize("dtype", [SINGLE, COMPLEX], ids=str)
@pytest.mark.parametrize("length", [9, 29])
def test_what_a_steady_decay_rounds_off_counts_like_the_rest(
    length: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is a third of the decay: it is too small to be seen otherwise, both ways and in segments."""
    monkeypatch.setattr(kernel, "TILE", 4)
    monkeypatch.setattr(kernel, "LEAST", 2)
    log_a, b, h = inputs(length, device=device, dtype=dtype, steady=True)
    a = log_a.exp()
    split = results(lambda a, b, h: kernel._scan(a * 2 / 3, (a / 3).detach(), b, h), [a, b, h])
    whole = results(lambda a, b, h: ops.steady_scan(a.log(), b, h), [a, b, h])
    whole["gradient of a"] = whole["gradient of a"] * 2 / 3  # the other third is a constant to autograd
    for name, right in whole.items():
        laws.assert_close(name, split[name], right, 1e-5 * laws.size(right))


def test_a_steady_scan_has_its_twins_dtype_and_refuses_fp64(device: torch.device) -> None:
    log_a, b, h = inputs(5, device=device, steady=True)
    for dtype in (torch.bfloat16, SINGLE):
        assert kernel.steady_scan(log_a.to(dtype), b.to(dtype), h.to(dtype)).dtype == dtype
    with pytest.raises(KernelError, match="float64"):
        kernel.steady_scan(log_a.double(), b, h)


@pytest.mark.parametrize("dtype", [SINGLE, COMPLEX], ids=str)
@pytest.mark.parametrize("steady", [False, True])
def test_segments_of_time_are_the_whole(
    steady: bool, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "TILE", 4)
    monkeypatch.setattr(kernel, "LEAST", 2)
    assert kernel.segments(2, 29, 5) == (4, 2)
    check(inputs(29, device=device, dtype=dtype, steady=steady), steady=steady)


@pytest.mark.parametrize("shape", [(), (33,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("steady", [False, True])
def test_channels_in_any_shape(steady: bool, shape: tuple[int, ...], device: torch.device) -> None:
    check(inputs(5, device=device, steady=steady, shape=shape), steady=steady)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_beside_a_state_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    a, b, h = inputs(20, device=device)
    check([a.to(dtype), b.to(dtype), h], steady=False)


@pytest.mark.parametrize("a", [0.0, 1e-30, 1.0])
def test_forgetting_everything_or_nothing(a: float, device: torch.device) -> None:
    _, b, h = inputs(40, device=device)
    for name, u in check([torch.full_like(b, a), b, h], steady=False).items():
        assert u.isfinite().all(), name


def test_the_same_bits_twice(device: torch.device) -> None:
    args = inputs(20, device=device, steady=True, batch=3, shape=(33,))
    first, second = (results(kernel.steady_scan, args) for _ in range(2))
    for name, u in first.items():
        laws.assert_bitwise(name, second[name], u)


@pytest.mark.parametrize("steady", [False, True])
def test_members_of_a_population(steady: bool, device: torch.device) -> None:
    ours = FORMS[steady][0]
    args = inputs(5, device=device, steady=steady)
    stacked = [torch.stack((u, u + 0.1)) for u in args[:2]] + [args[2]]  # h is shared

    def one_by_one(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        return torch.stack([ours(a[m], b[m], h) for m in range(2)])

    got = results(torch.func.vmap(ours, in_dims=(0, 0, None)), stacked)
    for name, want in results(one_by_one, stacked).items():
        torch.testing.assert_close(got[name], want, msg=lambda text, name=name: f"{name}: {text}")


MIXERS = {"hawk": {}, "s5": {"state": 8, "blocks": 1}}


def mixers_of(name: str, device: torch.device) -> tuple[Any, Any]:
    """The same weights in the kernel's form and in the plain one."""
    built = [
        laws.build(holdall.describe(name).configure(width=8, form=form, **MIXERS[name])).to(device)
        for form in ("kernel", "parallel")
    ]
    assert [mixer.form for mixer in built] == ["kernel", "parallel"]
    return built[0], built[1]


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_in_pieces_is_the_plain_one(name: str, device: torch.device) -> None:
    fast, plain = mixers_of(name, device)
    x = laws.draw(2, 9, 8, dtype=SINGLE).to(device)
    with torch.no_grad():
        want = laws.plainly(laws.outcome, plain, x)
        truth = laws.outcome(laws.twin(plain, dtype=DOUBLE).to(device), x.double())
        for sizes in ([9], [3, 5, 1]):
            for part, u in laws.named(*laws.read_in_pieces(fast, x, sizes)).items():
                laws.assert_as_good_as_plain(f"{part} in {sizes}", u, want[part], truth[part])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_a_population_trains_under_vmap(name: str, autocast: bool, device: torch.device) -> None:
    fast, _ = mixers_of(name, device)
    x = laws.draw(2, 2, 6, 8, dtype=SINGLE).to(device)
    assert_trains_under_vmap(fast, x, autocast=autocast, still=True)


@pytest.mark.compile
@traced
@pytest.mark.parametrize("name", MIXERS)
def test_one_graph_under_compile(name: str, device: torch.device) -> None:
    fast, _ = mixers_of(name, device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = laws.draw(2, 5, 8, dtype=SINGLE).to(device).requires_grad_()
    (got,), (want,) = (torch.autograd.grad(f(x)[0].square().sum(), x) for f in (compiled, fast))
    torch.testing.assert_close(got, want)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    with pytest.raises(KernelError, match="float64"):
        kernel.diagonal_scan(*(u.double() for u in inputs(3, device=device)))
    for name in MIXERS:
        assert "float64" in holdall.describe(name).configure().kernel_refusal(device, DOUBLE)


@pytest.mark.gpu
@pytest.mark.parametrize("steady", [False, True])
def test_a_cuda_graph_replays_training(steady: bool, device: torch.device, assert_replays: Any) -> None:
    ours, leaves = FORMS[steady][0], [u.requires_grad_() for u in inputs(1000, device=device, steady=steady)]
    up = torch.randn_like(leaves[1])
    assert_replays(lambda: torch.autograd.grad(ours(*leaves), leaves, up))


@pytest.mark.gpu
def test_a_new_length_compiles_nothing(device: torch.device) -> None:
    kernels = kernel._forward_kernel, kernel._backward_kernel, kernel._ends_kernel
    for length in (64, 1000):  # one segment, and several
        results(kernel.diagonal_scan, inputs(length, device=device))
    before = times_compiled(*kernels)
    for length in (2, 16, 63, 128, 2048):
        results(kernel.diagonal_scan, inputs(length, device=device))
    assert times_compiled(*kernels) == before


@pytest.mark.gpu("tens of GB")
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    """The last row of many is as if alone, where its offset is beyond 2^31."""
    args = inputs(1 << 15, device=device, batch=1, shape=(1024,))
    a, b, h = (u.expand(66, *u.shape[1:]).contiguous() for u in args)
    assert a.numel() > 1 << 31
    with torch.no_grad():
        torch.testing.assert_close(kernel.diagonal_scan(a, b, h)[-1:], kernel.diagonal_scan(*args))
