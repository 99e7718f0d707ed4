"""Diagonal-plus-rank-one state spaces: against dense matrices, and the fast form against the loop."""

import pytest
import torch
from torch import Tensor

from holdall.ops import hippo
from holdall.ops.dplr import Transition, dplr_bilinear, dplr_ssm, dplr_ssm_loop
from holdall.ops.ssm import as_complex
from holdall.testing import laws

B, D, N, DOUBLE = 2, 3, 4, torch.float64


def system(dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    """dt, lambda, p and b of a perturbed LegS of size 2N, rounded to the dtype and wide again."""
    lambda_N, p_N, b_N, _ = (u[N:] if u.ndim == 1 else u for u in hippo.legs(2 * N))
    dt_D1 = torch.tensor([[1e-3], [1e-2], [0.5]], dtype=DOUBLE)
    noise = [as_complex(laws.draw(D, N, 2, dtype=DOUBLE, seed=s)) for s in range(3)]
    lambda_DN = lambda_N + 0.05 * noise[0]
    tensors = [dt_D1, lambda_DN, p_N + 0.3 * noise[1], b_N + 0.3 * noise[2]]
    return [u.to(dtype.to_complex() if u.is_complex() else dtype) for u in tensors]


def problem(length: int, *, dtype: torch.dtype = DOUBLE, inputs: int = 1) -> list:
    real = torch.promote_types(dtype, torch.float32)
    transition, b_DN = dplr_bilinear(*system(real))
    b_IDN = torch.stack([b_DN ** (i + 1) for i in range(inputs)])
    c_DN = as_complex(laws.draw(D, N, 2, dtype=real, seed=4))
    x_BTID = laws.draw(B, length, inputs, D, dtype=dtype, seed=5)
    return [x_BTID, transition, b_IDN, c_DN, laws.draw(B, D, N, 2, dtype=real, seed=6)]


def both_halves(u_DN: Tensor) -> Tensor:
    return torch.cat((u_DN, u_DN.conj()), dim=-1)


def test_bilinear_is_the_trapezoidal_rule_of_the_dense_matrix() -> None:
    """(h' - h) / dt = A (h' + h) / 2 + b x, with A over both modes of each conjugate pair."""
    dt_D1, lambda_DN, p_DN, b_DN = system()
    transition, in_DN = dplr_bilinear(dt_D1, lambda_DN, p_DN, b_DN)
    h_DN, x = as_complex(laws.draw(D, N, 2, dtype=DOUBLE, seed=7)), 0.7
    next_DN = transition(h_DN) + in_DN * x
    p_DM = both_halves(p_DN)
    a_DMM = torch.diag_embed(both_halves(lambda_DN)) - p_DM[:, :, None] * p_DM.conj()[:, None]
    mean_DM1 = both_halves(next_DN + h_DN)[..., None] / 2
    want_DM = (a_DMM @ mean_DM1)[..., 0] + both_halves(b_DN) * x
    laws.assert_close("slope", both_halves(next_DN - h_DN) / dt_D1, want_DM)


def test_the_loop_is_a_form_of_it() -> None:
    *args, h_BDN2 = problem(40, dtype=torch.float32)
    for start, zeros in ((h_BDN2, h_BDN2), (None, torch.zeros_like(h_BDN2))):
        want_BTD, want_BDN2 = dplr_ssm_loop(*args, zeros)
        for want_state in (True, False):
            y_BTD, end_BDN2 = dplr_ssm(*args, start, chunk=64, want_state=want_state, form="loop")
            laws.assert_bitwise("y", y_BTD, want_BTD)
            assert (end_BDN2 is not None) == want_state
            if end_BDN2 is not None:
                laws.assert_bitwise("state", end_BDN2, want_BDN2)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 8), (2, 8), (8, 8), (13, 8), (40, 8), (9, 1), (50, 64), (63, 32)]
)
def test_chunks_equal_the_loop(length: int, chunk: int, inputs: int) -> None:
    args = problem(length, inputs=inputs)
    (y_BTD, h_BDN2), (want_BTD, want_BDN2) = dplr_ssm(*args, chunk=chunk), dplr_ssm_loop(*args)
    laws.assert_close("y", y_BTD, want_BTD)
    laws.assert_close("state", h_BDN2, want_BDN2)
    assert h_BDN2.untyped_storage().nbytes() == h_BDN2.numel() * h_BDN2.element_size()


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("length", [1, 7, 16, 17])
def test_a_kernel_alone_equals_the_loop(length: int, inputs: int) -> None:
    """Without a state before or after, up to two chunks are one; more of them are taken as ever."""
    x_BTID, transition, b_IDN, c_DN, h_BDN2 = problem(length, inputs=inputs)
    tensors = [x_BTID, *transition, b_IDN, c_DN]
    results = []
    for alone in (True, False):
        x, e, g, r, b, c = leaves = [t.clone().requires_grad_() for t in tensors]
        if alone:
            y_BTD, after = dplr_ssm(x, Transition(e, g, r), b, c, None, chunk=8, want_state=False)
            assert after is None
        else:
            y_BTD, _ = dplr_ssm_loop(x, Transition(e, g, r), b, c, torch.zeros_like(h_BDN2))
        up_BTD = laws.draw(*y_BTD.shape, dtype=DOUBLE, seed=8)
        grads = torch.autograd.grad(y_BTD, leaves, up_BTD, materialize_grads=True)
        results.append([y_BTD, *grads])
    for name, got, want in zip(("y", "x", "e", "g", "r", "b", "c"), *results, strict=True):
        laws.assert_close(name, got, want)


@pytest.mark.parametrize("length", [1, 5, 21])
def test_gradients_equal_the_loops(length: int) -> None:
    x_BTID, transition, *rest = problem(length, inputs=2)
    tensors = [x_BTID, *transition, *rest]
    grads = []
    for ssm in (lambda *args: dplr_ssm(*args, chunk=8), dplr_ssm_loop):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        ends = ssm(leaves[0], Transition(*leaves[1:4]), *leaves[4:])
        ups = [laws.draw(*e.shape, dtype=e.dtype, seed=8 + i) for i, e in enumerate(ends)]
        grads.append(torch.autograd.grad(ends, leaves, ups))
    for name, got, want in zip(("x", "e", "g", "r", "b", "c", "h"), *grads, strict=True):
        laws.assert_close(f"gradient of {name}", got, want)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 4000), (torch.bfloat16, 1000)])
def test_errs_no_more_than_the_loop(dtype: torch.dtype, length: int) -> None:
    x_BTID, transition, *rest = args = problem(length, dtype=dtype)
    wide = [u.to(torch.complex128 if u.is_complex() else DOUBLE) for u in (x_BTID, *transition, *rest)]
    truth = dplr_ssm_loop(wide[0], Transition(*wide[1:4]), *wide[4:])
    for got, plain, true in zip(dplr_ssm(*args), laws.plainly(dplr_ssm_loop, *args), truth, strict=True):
        laws.assert_as_good_as_plain("", got, plain, true)
