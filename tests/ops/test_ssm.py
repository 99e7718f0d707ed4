"""Time-invariant diagonal state spaces: the fast form against the loop, and the loop against a direct sum."""

import pytest
import torch
from torch import Tensor

from holdall.ops.ssm import bilinear, diagonal_ssm, diagonal_ssm_loop, zoh
from holdall.testing import laws

B, D, N = 2, 3, 4


def problem(
    length: int, *, dtype: torch.dtype = torch.float64, shared: bool = False, modes: int = N
) -> list[Tensor]:
    """Tokens, decays with angles up to several turns a step, input and output maps, and a state."""
    wide = torch.float64
    rows = 1 if shared else D
    x_BTD, h_BDN2 = laws.draw(B, length, D, dtype=wide), laws.draw(B, D, modes, 2, dtype=wide, seed=1)
    rate_DN, angle_DN = laws.draw(rows, modes, dtype=wide, seed=2), laws.draw(rows, modes, dtype=wide, seed=3)
    log_a_DN = torch.complex(-(10 ** (rate_DN - 2)), 8 * angle_DN)
    b_DN, c_DN = (torch.view_as_complex(laws.draw(rows, modes, 2, dtype=wide, seed=s)) for s in (4, 5))
    real = torch.promote_types(dtype, torch.float32)
    maps = (u.to(real.to_complex()) for u in (log_a_DN, b_DN, c_DN))
    return [x_BTD.to(dtype), *maps, h_BDN2.to(real)]


@pytest.mark.parametrize("ssm", [diagonal_ssm_loop, diagonal_ssm])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_is_the_direct_sum(ssm, length: int) -> None:
    """y_t = sum_{j <= t} K_{t-j} x_j + Re sum_n c_n a_n^(t+1) h_n, with the kernel written as it is."""
    x_BTD, log_a_DN, b_DN, c_DN, h_BDN2 = problem(length)
    kernel = [(c_DN * b_DN * (j * log_a_DN).exp()).sum(-1).real for j in range(length)]
    h_BDN = torch.view_as_complex(h_BDN2)
    ys, states = [], []
    for t in range(length):
        y_BD = (c_DN * ((t + 1) * log_a_DN).exp() * h_BDN).sum(-1).real
        ys.append(y_BD + sum(kernel[t - j] * x_BTD[:, j] for j in range(t + 1)))
        states.append(((length - 1 - t) * log_a_DN).exp() * b_DN * x_BTD[:, t, :, None])
    end_BDN = (length * log_a_DN).exp() * h_BDN + sum(states)
    y_BTD, end_BDN2 = ssm(x_BTD, log_a_DN, b_DN, c_DN, h_BDN2)
    laws.assert_close("y", y_BTD, torch.stack(ys, dim=1))
    laws.assert_close("state", end_BDN2, torch.view_as_real(end_BDN))


def test_the_loop_is_a_form_of_it() -> None:
    x_BTD, *maps, h_BDN2 = problem(40, dtype=torch.float32)
    for start, zeros in ((h_BDN2, h_BDN2), (None, torch.zeros_like(h_BDN2))):
        want_BTD, want_BDN2 = diagonal_ssm_loop(x_BTD, *maps, zeros)
        y_BTD, end_BDN2 = diagonal_ssm(x_BTD, *maps, start, chunk=16, form="loop")
        laws.assert_bitwise("y", y_BTD, want_BTD)
        laws.assert_bitwise("state", end_BDN2, want_BDN2)
        assert diagonal_ssm(x_BTD, *maps, start, want_state=False, form="loop")[1] is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 1024])
@pytest.mark.parametrize("length", [1, 2, 16, 17, 48, 50])
def test_chunks_equal_the_loop(length: int, chunk: int, shared: bool) -> None:
    x_BTD, *maps, h_BDN2 = problem(length, shared=shared)
    for start, zeros in ((h_BDN2, h_BDN2), (None, torch.zeros_like(h_BDN2))):
        want_BTD, want_BDN2 = diagonal_ssm_loop(x_BTD, *maps, zeros)
        y_BTD, end_BDN2 = diagonal_ssm(x_BTD, *maps, start, chunk=chunk)
        laws.assert_close("y", y_BTD, want_BTD)
        laws.assert_close("state", end_BDN2, want_BDN2)
        y_BTD, none = diagonal_ssm(x_BTD, *maps, start, chunk=chunk, want_state=False)
        laws.assert_close("y alone", y_BTD, want_BTD)
        assert none is None


@pytest.mark.parametrize("length", [1, 5, 35])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_equal_the_loops(length: int, shared: bool) -> None:
    tensors = problem(length, shared=shared)
    grads = []
    for ssm in (lambda *args: diagonal_ssm(*args, chunk=16), diagonal_ssm_loop):
        leaves = [t.clone().requires_grad_() for t in tensors]
        ends = ssm(*leaves)
        ups = [laws.draw(*e.shape, dtype=e.dtype, seed=7 + i) for i, e in enumerate(ends)]
        grads.append(torch.autograd.grad(ends, leaves, ups))
    for name, got, want in zip(("x", "log_a", "b", "c", "h"), *grads, strict=True):
        laws.assert_close(f"gradient of {name}", got, want)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 4000), (torch.bfloat16, 1500)])
def test_errs_no_more_than_the_loop(dtype: torch.dtype, length: int) -> None:
    """Angles of several turns per token, and modes that hardly fade over all of the text."""
    args = problem(length, dtype=dtype)
    wide = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in args]
    for got, plain, truth in zip(
        diagonal_ssm(*args), laws.plainly(diagonal_ssm_loop, *args), diagonal_ssm_loop(*wide), strict=True
    ):
        laws.assert_as_good_as_plain("", got, plain, truth)


def test_the_state_is_a_value_of_its_own() -> None:
    for length in (1, 16, 40):
        x_BTD, *maps, h_BDN2 = problem(length)
        for start in (None, h_BDN2):
            end_BDN2 = diagonal_ssm(x_BTD, *maps, start, chunk=16)[1]
            assert end_BDN2.untyped_storage().nbytes() == end_BDN2.numel() * end_BDN2.element_size()
            assert end_BDN2.is_contiguous()


def test_zoh_solves_the_differential_equation() -> None:
    """exp of the matrix [[a, b], [0, 0]] dt moves (h, x) on with x held."""
    a, b, dt = complex(-0.7, 2.3), complex(0.4, -1.1), 0.3
    exact = torch.linalg.matrix_exp(dt * torch.tensor([[a, b], [0, 0]], dtype=torch.complex128))
    log_a, scale = zoh(
        torch.full((1, 1), dt, dtype=torch.float64), torch.tensor([[a]], dtype=torch.complex128)
    )
    laws.assert_close("a", log_a.exp()[0, 0], exact[0, 0])
    laws.assert_close("b", b * scale[0, 0], exact[0, 1])


def test_bilinear_is_the_trapezoidal_rule() -> None:
    """(h' - h) / dt = a (h' + h) / 2 + b x, for oscillations of less and of more than a turn per token."""
    a_1N = torch.tensor([[complex(-0.7, 2.3), complex(-0.5, 900.0), complex(-30.0, 0.0)]]).to(
        torch.complex128
    )
    dt, b, h, x = 0.1, complex(0.4, -1.1), complex(1.5, 0.2), 0.8
    log_a_1N, scale_1N = bilinear(torch.full((1, 1), dt, dtype=torch.float64), a_1N)
    next_1N = log_a_1N.exp() * h + scale_1N * b * x
    laws.assert_close("step", (next_1N - h) / dt, a_1N * (next_1N + h) / 2 + b * x)


@pytest.mark.parametrize("rule", [zoh, bilinear])
def test_short_steps_lose_no_digits(rule) -> None:
    dt_D1, a_1N = torch.tensor([[1e-6], [1e-3]]), torch.tensor([[-0.5 + 0j, -0.5 + 300j]])
    for got, want in zip(rule(dt_D1, a_1N), rule(dt_D1.double(), a_1N.to(torch.complex128)), strict=True):
        torch.testing.assert_close(got.real, want.real.float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(got.imag, want.imag.float(), rtol=1e-6, atol=1e-12)


def test_a_state_may_lie_anywhere_in_memory() -> None:
    """As states from a file do: 8 bytes off, where 16 of a complex number cannot be loaded at once."""
    x_BTD, *maps, h_BDN2 = problem(20)
    shifted = torch.empty(h_BDN2.numel() + 1, dtype=h_BDN2.dtype)[1:].view(h_BDN2.shape).copy_(h_BDN2)
    for length in (1, 20):
        for ssm in (diagonal_ssm, diagonal_ssm_loop):
            got, want = (ssm(x_BTD[:, :length], *maps, h) for h in (shifted, h_BDN2))
            assert torch.equal(got[0], want[0])
