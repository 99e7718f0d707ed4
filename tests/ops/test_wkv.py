"""RWKV's mean and matrices: the sums that define them, keys and decays of any size, chunks and loops alike.

Letters: B row, T time, E channels, H heads, K key dim, V value dim.
"""

import functools

import pytest
import torch
from torch import Tensor

from holdall.ops.linear_attention import linear_attention_loop
from holdall.ops.wkv import NOTHING, matrix_wkv, matrix_wkv_loop, wkv, wkv_loop
from holdall.testing import laws

B, E, DOUBLE = 2, 3, torch.float64
NAMES = ("y", "m", "l", *(f"gradient of {name}" for name in ("k", "v", "w", "u", "m", "l")))
chunked = functools.partial(wkv, chunk=8)
both = pytest.mark.parametrize("function", [wkv_loop, chunked], ids=["loop", "chunks"])


def inputs(length: int, *, dtype: torch.dtype = DOUBLE, scale: float = 1.0) -> list[Tensor]:
    """k, v, w and u; `scale` is the size of the keys."""
    k, v = (laws.draw(B, length, E, dtype=dtype, seed=i) for i in range(2))
    w, u = -laws.draw(E, dtype=dtype, seed=2).exp(), laws.draw(E, dtype=dtype, seed=3)
    return [scale * k, v, w, u]


def nothing(*, dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    return [torch.zeros(B, E, dtype=dtype), torch.full((B, E), NOTHING, dtype=dtype)]


def after_some(**how) -> list[Tensor]:
    dtype = how.get("dtype", DOUBLE)
    return list(wkv_loop(*inputs(5, **how), *nothing(dtype=dtype))[1:])


def results_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    ends = function(*leaves)
    ups = [laws.draw(*end.shape, dtype=end.dtype, seed=20 + i) for i, end in enumerate(ends)]
    return [*ends, *torch.autograd.grad(ends, leaves, ups)]


@both
def test_it_is_the_mean_that_its_formula_says(function) -> None:
    k, v, w, u = inputs(20)
    y, m, log = function(k, v, w, u, *nothing())
    for t in range(20):
        age = torch.arange(t - 1, -1, -1)[:, None]
        weight = torch.cat(((age * w + k[:, :t]).exp(), (u + k[:, t : t + 1]).exp()), dim=1)
        laws.assert_close(f"token {t}", y[:, t], (weight * v[:, : t + 1]).sum(1) / weight.sum(1))
    weight = (torch.arange(19, -1, -1)[:, None] * w + k).exp()
    laws.assert_close("mean", m, (weight * v).sum(1) / weight.sum(1))
    laws.assert_close("log weight", log, weight.sum(1).log())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 50])
@pytest.mark.parametrize("start", [nothing, after_some])
def test_chunks_equal_the_loop(start, length: int) -> None:
    tensors = [*inputs(length), *start()]
    want = results_and_gradients(wkv_loop, tensors)
    for name, got, right in zip(NAMES, results_and_gradients(chunked, tensors), want, strict=True):
        laws.assert_close(name, got, right)


@both
def test_gradcheck(function) -> None:
    leaves = [t.requires_grad_() for t in (*inputs(9), *after_some())]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("start", [nothing, after_some])
def test_keys_of_any_size_are_sound_and_exact_in_fp32(start, scale: float) -> None:
    how = {"dtype": torch.float32}
    tensors = [*inputs(100, scale=scale, **how), *start(**how)]
    plain = laws.plainly(results_and_gradients, wkv_loop, tensors)
    truth = results_and_gradients(wkv_loop, [t.double() for t in tensors])
    for name, got, loop, true in zip(
        NAMES, results_and_gradients(chunked, tensors), plain, truth, strict=True
    ):
        assert got.isfinite().all(), name
        laws.assert_as_good_as_plain(name, got, loop, true)


@both
@pytest.mark.parametrize("by", [-1e4, -200.0, 200.0, 1e4])
def test_keys_that_are_all_larger_or_smaller_change_only_the_weight(function, by: float) -> None:
    k, v, w, u = inputs(30)
    y, m, log = function(k, v, w, u, *nothing())
    got = function(k + by, v, w, u, *nothing())
    bound = 1e4 * laws.SPREAD * torch.finfo(DOUBLE).eps  # the keys themselves are rounded
    for name, tensor, want in zip(("y", "m", "l"), got, (y, m, log + by), strict=True):
        laws.assert_close(name, tensor, want, bound)


@both
def test_of_nothing_nothing_is_remembered(function) -> None:
    """The first token is its own mean, to the bit, whatever number stands where no mean is."""
    k, v, w, u = inputs(1, dtype=torch.float32, scale=1e4)
    _, empty = nothing(dtype=torch.float32)
    y, m, log = function(k, v, w, u, torch.zeros_like(empty), empty)
    for name, got, want in (("y", y, v), ("m", m, v[:, 0]), ("l", log, k[:, 0])):
        laws.assert_bitwise(name, got, want)


def test_it_goes_on_where_it_stopped() -> None:
    k, v, w, u = inputs(30)
    y, *want = chunked(k, v, w, u, *nothing())
    state, ys = nothing(), []
    for k_piece, v_piece in zip(k.split([11, 1, 18], 1), v.split([11, 1, 18], 1), strict=True):
        piece, *state = chunked(k_piece, v_piece, w, u, *state)
        ys.append(piece)
    laws.assert_close("y", torch.cat(ys, dim=1), y)
    for name, got, right in zip(("m", "l"), state, want, strict=True):
        laws.assert_close(name, got, right)


@both
def test_the_sums_stay_in_fp32_beside_bf16(function) -> None:
    y, *state = function(*inputs(20, dtype=torch.bfloat16), *nothing(dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    for tensor in state:
        assert tensor.dtype == torch.float32
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# ------------------------------------------------------------------------------------ a matrix for each head

H, K, V = 3, 4, 5
MATRIX_NAMES = ("y", "state", *(f"gradient of {name}" for name in ("r", "k", "v", "w", "u", "state")))
halves = functools.partial(matrix_wkv, chunk=8)
both_matrices = pytest.mark.parametrize("function", [matrix_wkv_loop, halves], ids=["loop", "chunks"])


def matrix_inputs(length: int, *, dtype: torch.dtype = DOUBLE, w: float | None = None) -> list[Tensor]:
    """r, k, v, w, u and a state as after some tokens; decays of all sizes if not of one."""
    r, k, v = (laws.draw(B, length, H, d, dtype=dtype, seed=i) for i, d in enumerate((K, K, V)))
    log = -(2 * laws.draw(H, K, dtype=dtype, seed=3)).exp()
    log = log if w is None else torch.full_like(log, w)
    return [r, k, v, log, laws.draw(H, K, dtype=dtype, seed=4), laws.draw(B, H, K, V, dtype=dtype, seed=5)]


@both_matrices
def test_a_matrix_is_the_sum_that_its_formula_says(function) -> None:
    r, k, v, w, u, s = matrix_inputs(20)
    y, end = function(r, k, v, w, u, s)
    for t in range(20):
        faded = (torch.arange(t - 1, -1, -1)[:, None, None] * w).exp()
        seen = torch.cat((faded * k[:, :t], u * k[:, t : t + 1]), dim=1)
        want = torch.einsum("bhk,bshk,bshv->bhv", r[:, t], seen, v[:, : t + 1])
        want = want + torch.einsum("bhk,hk,bhkv->bhv", r[:, t], (t * w).exp(), s)
        laws.assert_close(f"token {t}", y[:, t], want)
    faded = (torch.arange(19, -1, -1)[:, None, None] * w).exp()
    want = torch.einsum("bshk,bshv->bhkv", faded * k, v) + (20 * w).exp()[..., None] * s
    laws.assert_close("state", end, want)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 50])
@pytest.mark.parametrize("chunk", [1, 2, 8, 64])
def test_halves_of_chunks_equal_the_loop(chunk: int, length: int) -> None:
    tensors = matrix_inputs(length)
    want = results_and_gradients(matrix_wkv_loop, tensors)
    got = results_and_gradients(functools.partial(matrix_wkv, chunk=chunk), tensors)
    for name, tensor, right in zip(MATRIX_NAMES, got, want, strict=True):
        laws.assert_close(name, tensor, right)


def test_it_is_linear_attention_that_asks_one_token_late_and_the_bonus() -> None:
    r, k, v, w, u, s = matrix_inputs(30)
    y, end = halves(r, k, v, w, u, s)
    late_r = torch.cat((r[:, 1:], r[:, :1]), dim=1)
    late_y, want_end, _ = linear_attention_loop(late_r, k, v, s, None, w.expand(B, 30, H, K))
    want = torch.cat((torch.einsum("bhk,bhkv->bhv", r[:, 0], s)[:, None], late_y[:, :-1]), dim=1)
    laws.assert_close("y", y, want + (r * u * k).sum(-1, keepdim=True) * v)
    laws.assert_close("state", end, want_end)


@pytest.mark.parametrize("w", [None, -1e-9, -1.0, -50.0, -1e9])
def test_however_fast_it_fades_halves_are_as_exact_as_the_loop(w: float | None) -> None:
    tensors = matrix_inputs(100, dtype=torch.float32, w=w)
    plain = laws.plainly(results_and_gradients, matrix_wkv_loop, tensors)
    truth = results_and_gradients(matrix_wkv_loop, [t.double() for t in tensors])
    got = results_and_gradients(matrix_wkv, tensors)
    for name, tensor, loop, true in zip(MATRIX_NAMES, got, plain, truth, strict=True):
        assert tensor.isfinite().all(), name
        laws.assert_as_good_as_plain(name, tensor, loop, true)


@both_matrices
def test_gradcheck_of_matrices(function) -> None:
    leaves = [t[:1].requires_grad_() if t.ndim == 4 else t.requires_grad_() for t in matrix_inputs(9)]
    assert torch.autograd.gradcheck(function, leaves)


@both_matrices
@pytest.mark.parametrize("length", [1, 20])
def test_a_matrix_stays_in_fp32_beside_bf16(function, length: int) -> None:
    *tensors, s = matrix_inputs(length, dtype=torch.bfloat16)
    y, end = function(*tensors, s.float())
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert end.untyped_storage().nbytes() == end.numel() * end.element_size()
