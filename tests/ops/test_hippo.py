"""The spectra that state spaces start from, against the matrices that define them."""

import math

import pytest
import torch

from holdall.ops import hippo
from holdall.testing import laws


def legs_matrix(n: int) -> torch.Tensor:
    rows = []
    for i in range(n):
        rows.append(
            [-math.sqrt((2 * i + 1) * (2 * j + 1)) if i > j else -(i + 1.0) * (i == j) for j in range(n)]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 64])
def test_legs_is_normal_less_rank_one(n: int) -> None:
    lambda_N, p_N, b_N, v_NN = hippo.legs(n)
    a_NN = v_NN @ (torch.diag(lambda_N) - torch.outer(p_N, p_N.conj())) @ v_NN.mH
    want_NN = legs_matrix(n).to(a_NN.dtype)
    laws.assert_close("A", a_NN, want_NN)
    laws.assert_close("V V*", v_NN @ v_NN.mH, torch.eye(n, dtype=a_NN.dtype))
    laws.assert_close(
        "b", v_NN @ b_N, torch.tensor([math.sqrt(2 * i + 1) for i in range(n)], dtype=a_NN.dtype)
    )
    assert lambda_N.imag.diff().ge(0).all()
    for name, u_N in (("p", p_N), ("b", b_N)):
        laws.assert_close(f"{name} is real and positive", u_N, u_N.abs().to(u_N.dtype))


def test_legs_modes_are_conjugate_pairs() -> None:
    for u_N in hippo.legs(16)[:3]:
        laws.assert_close("other half", u_N.flip(0), u_N.conj().resolve_conj())


def test_dss_takes_the_skew_part_of_hippo() -> None:
    n = 6
    skew_NN = (legs_matrix(2 * n) - legs_matrix(2 * n).T) / 2
    want_N = torch.linalg.eigvals(skew_NN).imag.sort(descending=True).values[:n]
    got_N = hippo.skew_hippo(n)
    laws.assert_close("imaginary parts", got_N.imag, want_N)
    laws.assert_close("real parts", got_N.real, torch.full((n,), -0.5, dtype=torch.float64))


def test_the_inverse_law_is_what_legs_tends_to() -> None:
    """Its largest frequencies: of the order N^2 / pi, and the larger N the better."""
    errors = []
    for n in (16, 64, 256):
        law_N, legs_N = hippo.s4d_inv(n).imag[:3], hippo.skew_hippo(n).imag[:3]
        errors.append((law_N / legs_N - 1).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


def test_the_linear_law() -> None:
    want_N = torch.tensor([complex(-0.5, math.pi * m) for m in range(5)], dtype=torch.complex128)
    laws.assert_close("lambda", hippo.s4d_lin(5), want_N)


def test_step_sizes_are_log_uniform() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        log_dt = hippo.log_step_sizes(100, 100)
    assert log_dt.shape == (100, 100)
    assert math.log(1e-3) <= log_dt.min() < log_dt.max() <= math.log(1e-1)
    torch.testing.assert_close(log_dt.mean().item(), math.log(1e-2), rtol=0.01, atol=0)
