"""Diagonal recurrences: chunks side by side are the loop, with real and with complex coefficients.

Letters: B row, T time, D channels, N state per channel.
"""

import functools

import pytest
import torch
from torch import Tensor

from holdall.ops.diagonal_scan import diagonal_scan, diagonal_scan_loop, steady_scan
from holdall.ops.selective_scan import selective_scan, selective_scan_loop
from holdall.testing import laws

B, D, N, DOUBLE = 2, 3, 4, torch.float64
LENGTHS = (1, 2, 7, 8, 9, 16, 20)


def results_and_gradients(function, tensors: list[Tensor], **how) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    ends = function(*leaves, **how)
    ends = [ends] if isinstance(ends, Tensor) else list(ends)
    ups = [laws.draw(*end.shape, dtype=end.dtype, seed=20 + i) for i, end in enumerate(ends)]
    return [*ends, *torch.autograd.grad(ends, leaves, ups)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128])
@pytest.mark.parametrize("shape", [(), (D,), (D, N)], ids=str)
def test_diagonal_chunks_equal_the_loop(length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a = 0.5 * laws.draw(B, length, *shape, dtype=dtype)
    tensors = [
        a,
        laws.draw(B, length, *shape, dtype=dtype, seed=1),
        laws.draw(B, *shape, dtype=dtype, seed=2),
    ]
    want = results_and_gradients(diagonal_scan_loop, tensors)
    for i, got in enumerate(results_and_gradients(diagonal_scan, tensors, chunk=8)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128])
@pytest.mark.parametrize("shape", [(D,), (D, N)], ids=str)
def test_a_steady_scan_is_a_diagonal_one(length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [
        laws.draw(*shape, dtype=dtype) - 1,
        laws.draw(B, length, *shape, dtype=dtype, seed=1),
        laws.draw(B, *shape, dtype=dtype, seed=2),
    ]

    def loop(log_a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        return diagonal_scan_loop(log_a.exp().expand_as(b), b, h)

    want = results_and_gradients(loop, tensors)
    for i, got in enumerate(results_and_gradients(steady_scan, tensors, chunk=8)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


def test_diagonal_is_the_closed_sum() -> None:
    a, b, h = 0.5, laws.draw(1, 10, dtype=DOUBLE), laws.draw(1, dtype=DOUBLE, seed=1)
    states = diagonal_scan(torch.full((1, 10), a, dtype=DOUBLE), b, h, chunk=4)
    for t in range(10):
        want = a ** (t + 1) * h + sum(a ** (t - j) * b[:, j] for j in range(t + 1))
        laws.assert_close(f"state {t}", states[:, t], want)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.complex128])
def test_gradcheck_of_the_diagonal_scan(dtype: torch.dtype) -> None:
    leaves = [laws.draw(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in
              enumerate([(1, 5, 2), (1, 5, 2), (1, 2)])]  # fmt: skip
    assert torch.autograd.gradcheck(lambda a, b, h: diagonal_scan(a, b, h, chunk=2), leaves)


@pytest.mark.parametrize("a", [0.0, 1e-30, 1.0])
def test_forgetting_everything_or_nothing_is_exact(a: float) -> None:
    decay = torch.full((B, 100, D), a)
    b, h = laws.draw(B, 100, D, dtype=torch.float32), laws.draw(B, D, dtype=torch.float32, seed=1)
    plain, got = laws.plainly(diagonal_scan_loop, decay, b, h), diagonal_scan(decay, b, h, chunk=8)
    truth = diagonal_scan_loop(decay.double(), b.double(), h.double())
    laws.assert_as_good_as_plain("states", got, plain, truth)


def selective_inputs(length: int, *, dtype: torch.dtype = DOUBLE, dt: float = 1.0) -> list[Tensor]:
    x, log_dt = (laws.draw(B, length, D, dtype=dtype, seed=i) for i in range(2))
    b, c = (laws.draw(B, length, N, dtype=dtype, seed=i) for i in (2, 3))
    a = -laws.draw(D, N, dtype=dtype, seed=4).exp()
    return [x, dt * log_dt.exp(), a, b, c, laws.draw(B, D, N, dtype=dtype, seed=5)]


@pytest.mark.parametrize("length", LENGTHS)
def test_selective_chunks_equal_the_loop(length: int) -> None:
    tensors = selective_inputs(length)
    want = results_and_gradients(selective_scan_loop, tensors)
    for i, got in enumerate(results_and_gradients(selective_scan, tensors, chunk=8)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


def test_selective_is_a_diagonal_scan_of_its_steps() -> None:
    x, dt, a, b, c, h = selective_inputs(20)
    decay = (dt[..., None] * a).exp()
    states = diagonal_scan_loop(decay, (dt * x)[..., None] * b[:, :, None], h)
    y, end = selective_scan(*(x, dt, a, b, c, h), chunk=8)
    laws.assert_close("y", y, (states * c[:, :, None]).sum(-1))
    laws.assert_close("state", end, states[:, -1])


@pytest.mark.parametrize("dt", [1e-4, 1.0, 100.0])
def test_step_sizes_of_any_kind_are_sound_and_exact_in_fp32(dt: float) -> None:
    tensors = selective_inputs(100, dtype=torch.float32, dt=dt)
    plain = laws.plainly(results_and_gradients, selective_scan_loop, tensors)
    truth = results_and_gradients(selective_scan_loop, [t.double() for t in tensors])
    for i, got in enumerate(results_and_gradients(selective_scan, tensors, chunk=16)):
        assert got.isfinite().all()
        laws.assert_as_good_as_plain(f"result or gradient {i}", got, plain[i], truth[i])


def test_the_state_stays_in_fp32_beside_bf16() -> None:
    tensors = [t.bfloat16() for t in selective_inputs(100)]
    for scan in (selective_scan_loop, functools.partial(selective_scan, chunk=16)):
        y, h = scan(*tensors[:5], tensors[5].float())
        assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
        assert h.untyped_storage().nbytes() == h.numel() * h.element_size()
