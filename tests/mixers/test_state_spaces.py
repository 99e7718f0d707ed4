"""S4D, DSS, S4 and Liquid-S4 against their papers' convolutions, and where their weights start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import holdall
from holdall.mixers.dss import DSSConfig
from holdall.mixers.liquid_s4 import LiquidS4Config
from holdall.mixers.s4 import S4Config
from holdall.mixers.s4d import S4DConfig
from holdall.ops import hippo
from holdall.testing import laws

DOUBLE = torch.float64
LENGTH = 40


def convolved(x_BTD: Tensor, kernel_DL: Tensor) -> Tensor:
    """y_t = sum_{j <= t} K_{t-j} x_j, as a product with a triangular matrix."""
    total = x_BTD.shape[1]
    lag_TT = torch.arange(total)[:, None] - torch.arange(total)
    matrix_DTT = torch.where(lag_TT >= 0, kernel_DL[:, lag_TT.clamp(min=0)], 0.0)
    return torch.einsum("dts,bsd->btd", matrix_DTT, x_BTD)


def glu_block(mixer, y_BTD: Tensor) -> Tensor:
    value_BTD, gate_BTD = (F.gelu(y_BTD) @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(2, dim=-1)
    return value_BTD * gate_BTD.sigmoid()


def fresh(config) -> torch.nn.Module:
    """As published: without the noise that laws.build adds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.build()


@pytest.mark.claim("mixers/s4d.py", "Weights")
@torch.no_grad()
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_s4d_is_the_papers_convolution(init: str, discretisation: str, form: str) -> None:
    """K_l = 2 Re sum_n C_n B_n s_n a_n^l, the discretised pair (a, s) solved for with matrices."""
    mixer = laws.build(
        S4DConfig(width=6, state=8, init=init, discretisation=discretisation, form=form)
    ).double()
    x_BTD = laws.tokens(mixer, LENGTH)
    a_DN = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
    dt_D1 = mixer.log_dt.exp()[:, None]
    if discretisation == "zoh":
        decay_DN = (dt_D1 * a_DN).exp()
        scale_DN = (decay_DN - 1) / a_DN
    else:
        decay_DN = (1 + dt_D1 / 2 * a_DN) / (1 - dt_D1 / 2 * a_DN)
        scale_DN = dt_D1 / (1 - dt_D1 / 2 * a_DN)
    weight_DN = torch.view_as_complex(mixer.B) * torch.view_as_complex(mixer.C) * scale_DN
    kernel_DL = 2 * (weight_DN[..., None] * decay_DN[..., None] ** torch.arange(LENGTH)).sum(1).real
    want_BTD = glu_block(mixer, convolved(x_BTD, kernel_DL) + mixer.D * x_BTD)
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD)


@pytest.mark.claim("mixers/dss.py", "Weights")
@torch.no_grad()
@pytest.mark.parametrize("form", ["loop", "parallel"])
def test_dss_is_the_papers_convolution(form: str) -> None:
    """K_l = Re sum_n W_n (exp(z_n) - 1) / Lambda_n exp(l z_n), with paces of its own for Re and Im."""
    mixer = laws.build(DSSConfig(width=6, modes=5, form=form)).double()
    x_BTD = laws.tokens(mixer, LENGTH)
    lambda_N = torch.complex(-mixer.Lambda_log_neg_re.exp(), mixer.Lambda_im)
    pace_D2 = mixer.log_dt.exp()
    assert not torch.equal(pace_D2[:, 0], pace_D2[:, 1])
    z_DN = torch.complex(pace_D2[:, :1] * lambda_N.real, pace_D2[:, 1:] * lambda_N.imag)
    weight_DN = torch.view_as_complex(mixer.W) * (z_DN.exp() - 1) / lambda_N
    kernel_DL = (weight_DN[..., None] * (z_DN[..., None] * torch.arange(LENGTH)).exp()).sum(1).real
    y_BTD = convolved(x_BTD, kernel_DL) + mixer.D * x_BTD
    want_BTD = F.gelu(y_BTD) @ mixer.out_proj.weight.T + mixer.out_proj.bias
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD)


@pytest.mark.claim("mixers/dss.py", "DSS-softmax is refused")
@torch.no_grad()
def test_dss_softmaxs_kernel_depends_on_its_length() -> None:
    """Its taps are powers divided by their sum over all L, (exp(L z) - 1) / (exp(z) - 1), and by Lambda."""
    mixer = laws.build(DSSConfig(width=6, modes=5)).double()
    lambda_N = torch.complex(-mixer.Lambda_log_neg_re.exp(), mixer.Lambda_im)
    z_DN = torch.complex(mixer.log_dt[:, :1].exp() * lambda_N.real, mixer.log_dt[:, 1:].exp() * lambda_N.imag)

    def taps(length: int) -> Tensor:
        powers_DNL = (z_DN[..., None] * torch.arange(length)).exp()
        weight_DN = torch.view_as_complex(mixer.W) / lambda_N / powers_DNL.sum(-1)
        return (weight_DN[..., None] * powers_DNL).sum(1).real

    assert laws.distance(taps(40)[:, :20], taps(20)) > 0.1 * laws.size(taps(20))
    with pytest.raises(ValueError, match="version 'softmax'"):
        DSSConfig(version="softmax")


def dense(legs) -> list[Tensor]:
    """S4 as published, over both modes of each pair: A_DMM, B_DM, C_DM and dt_D1."""
    lambda_DN = torch.complex(-legs.log_A_real.exp(), legs.A_imag)
    p_DN, b_DN, c_DN = (torch.view_as_complex(u) for u in (legs.P, legs.B, legs.C))
    lambda_DM, p_DM, b_DM, c_DM = (torch.cat((u, u.conj()), dim=-1) for u in (lambda_DN, p_DN, b_DN, c_DN))
    a_DMM = torch.diag_embed(lambda_DM) - p_DM[:, :, None] * p_DM.conj()[:, None]
    return [a_DMM, b_DM, c_DM, legs.log_dt.exp()[:, None]]


def discretised(a_DMM: Tensor, b_DM: Tensor, dt_D1: Tensor) -> tuple[Tensor, Tensor]:
    eye_MM, half_D11 = torch.eye(a_DMM.shape[-1], dtype=a_DMM.dtype), dt_D1[..., None] / 2
    inverse_DMM = torch.linalg.inv(eye_MM - half_D11 * a_DMM)
    return inverse_DMM @ (eye_MM + half_D11 * a_DMM), (inverse_DMM @ (dt_D1 * b_DM)[..., None])[..., 0]


def kernel_by_recurrence(a_DMM: Tensor, b_DM: Tensor, c_DM: Tensor, length: int) -> Tensor:
    taps = []
    for _ in range(length):
        taps.append((c_DM * b_DM).sum(-1).real)
        b_DM = (a_DMM @ b_DM[..., None])[..., 0]
    return torch.stack(taps, dim=-1)


def kernel_at_roots_of_unity(legs, length: int) -> Tensor:
    """The paper's algorithm: the truncated generating function, by Cauchy products and Woodbury."""
    a_DMM, b_DM, c_DM, dt_D1 = dense(legs)
    step_DMM, _ = discretised(a_DMM, b_DM, dt_D1)
    lambda_DN = torch.complex(-legs.log_A_real.exp(), legs.A_imag)
    lambda_DM = torch.cat((lambda_DN, lambda_DN.conj()), dim=-1)
    p_DN = torch.view_as_complex(legs.P)
    p_DM = torch.cat((p_DN, p_DN.conj()), dim=-1)
    # a hair within the circle, where 1 + z vanishes at -1: the kernel and its truncation are damped as much
    z_L = 0.999 * torch.exp(-2j * math.pi * torch.arange(length, dtype=DOUBLE) / length)
    cut_DM = c_DM - 0.999**length * (c_DM[:, None] @ torch.linalg.matrix_power(step_DMM, length))[:, 0]
    node_DL = 2 / dt_D1 * (1 - z_L) / (1 + z_L)

    def cauchy(u_DM: Tensor, v_DM: Tensor) -> Tensor:
        return ((u_DM * v_DM)[:, None] / (node_DL[..., None] - lambda_DM[:, None])).sum(-1)

    woodbury_DL = cauchy(cut_DM, p_DM) * cauchy(p_DM.conj(), b_DM) / (1 + cauchy(p_DM.conj(), p_DM))
    values_DL = 2 / (1 + z_L) * (cauchy(cut_DM, b_DM) - woodbury_DL)
    return torch.fft.ifft(values_DL).real / 0.999 ** torch.arange(length, dtype=DOUBLE)


@pytest.mark.claim("mixers/s4.py", "Weights")
@torch.no_grad()
@pytest.mark.parametrize("form", ["loop", "parallel"])
def test_s4_is_the_papers_convolution(form: str) -> None:
    """By the dense recurrence and by roots of unity: the same kernel, and the same outputs as the mixer."""
    mixer = laws.build(S4Config(width=6, state=8, chunk=16, form=form)).double()
    x_BTD = laws.tokens(mixer, LENGTH)
    a_DMM, b_DM, c_DM, dt_D1 = dense(mixer.kernel)
    kernel_DL = kernel_by_recurrence(*discretised(a_DMM, b_DM, dt_D1), c_DM, LENGTH)
    laws.assert_close("kernel", kernel_at_roots_of_unity(mixer.kernel, LENGTH), kernel_DL)
    want_BTD = glu_block(mixer, convolved(x_BTD, kernel_DL) + mixer.D * x_BTD)
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD)


@pytest.mark.claim("mixers/s4.py", "Weights")
@torch.no_grad()
def test_a_checkpoints_c_is_ours_cut_at_the_length_of_its_kernel() -> None:
    """S4Block takes its C (1 - dA z)^-1 dB at the roots of unity z for the kernel's spectrum."""
    mixer = laws.build(S4Config(width=3, state=4, chunk=16)).double()
    a_DMM, b_DM, c_DM, dt_D1 = dense(mixer.kernel)
    a_DMM, b_DM = discretised(a_DMM, b_DM, dt_D1)
    eye_MM = torch.eye(a_DMM.shape[-1], dtype=a_DMM.dtype)
    checkpoint_DM = (c_DM[:, None] @ (eye_MM - torch.linalg.matrix_power(a_DMM, LENGTH)))[:, 0]
    z_L = torch.exp(-2j * math.pi * torch.arange(LENGTH, dtype=DOUBLE) / LENGTH)
    spectrum_DL = torch.stack(
        [(checkpoint_DM * torch.linalg.solve(eye_MM - a_DMM * z, b_DM)).sum(-1) for z in z_L], dim=-1
    )
    x_BTD = laws.tokens(mixer, LENGTH)
    y_BTD = convolved(x_BTD, torch.fft.ifft(spectrum_DL).real) + mixer.D * x_BTD
    laws.assert_close("output", mixer(x_BTD)[0], glu_block(mixer, y_BTD))


@pytest.mark.claim("mixers/s4.py", "the code clips")
@pytest.mark.claim("mixers/s4d.py", "the code clips")
@pytest.mark.parametrize("name", ["s4", "s4d", "liquid-s4"])
def test_legs_starts_real_and_unclipped(name: str) -> None:
    options = {"init": "legs"} if name == "s4d" else {}
    mixer = fresh(holdall.describe(name).configure(width=3, state=64, **options))
    kernel = mixer if name == "s4d" else mixer.kernel
    for parameter in (kernel.B,) if name == "s4d" else (kernel.B, kernel.P):
        assert laws.size(parameter[..., 1]) < 1e-12
    assert kernel.B[..., 0].max() > 2


@torch.no_grad()
def test_s4_starts_as_hippo() -> None:
    """Its state is that of the Legendre memory, in another basis."""
    n, width = 16, 5
    mixer = fresh(S4Config(width=width, state=n)).double()
    # the spectrum again in fp64: parameters are fp32
    lambda_N, p_N, b_N, v_NN = hippo.legs(n)
    half = n // 2
    torch.testing.assert_close(mixer.kernel.A_imag, lambda_N.imag[half:].expand(width, -1), rtol=1e-6, atol=0)
    mixer.kernel.A_imag.copy_(lambda_N.imag[half:].expand(width, -1))
    mixer.kernel.log_A_real.fill_(math.log(0.5))
    for u_DN2, v_N in ((mixer.kernel.P, p_N), (mixer.kernel.B, b_N)):
        want_DN2 = torch.view_as_real(v_N[half:]).expand(width, -1, -1)
        torch.testing.assert_close(u_DN2, want_DN2, rtol=1e-6, atol=1e-6)
        u_DN2.copy_(want_DN2)
    roots_N = (2 * torch.arange(n, dtype=DOUBLE) + 1).sqrt()
    a_NN = -torch.outer(roots_N, roots_N).tril(-1) - torch.diag(torch.arange(n, dtype=DOUBLE) + 1)
    x_BTD = laws.tokens(mixer, 20)
    step_DNN, in_DN = discretised(
        a_NN.expand(width, n, n), roots_N.expand(width, n), mixer.kernel.log_dt.exp()[:, None]
    )
    want_BDN = torch.zeros(2, width, n, dtype=DOUBLE)
    for x_BD in x_BTD.unbind(1):
        want_BDN = (step_DNN @ want_BDN[..., None])[..., 0] + in_DN * x_BD[..., None]
    h_BDN = torch.view_as_complex(mixer(x_BTD)[1].h_BDN2)
    got_BDN = torch.cat((h_BDN.conj().flip(-1), h_BDN), dim=-1) @ v_NN.mT
    laws.assert_close("memory", got_BDN, want_BDN.to(got_BDN.dtype))


def unrolled(kernel, x_TD: Tensor, kept) -> Tensor:
    """The liquid recurrence x_k = (A + B u_k) x_{k-1} + B u_k in full: a sum over all products of inputs.

    A path passes each token by A or by B u, from the token that it starts at. `kept` says which of the paths
    count at a token, by the tokens whose inputs they have read; their sum is x_k, and y_k = C x_k.
    """
    a_DMM, b_DM, c_DM, dt_D1 = dense(kernel)
    a_DMM, b_DM = discretised(a_DMM, b_DM, dt_D1)
    ys, paths = [], {}
    for k, u_D in enumerate(x_TD):
        grown = {read: (a_DMM @ x_DM[..., None])[..., 0] for read, x_DM in paths.items()}
        grown |= {(*read, k): b_DM * u_D[:, None] * x_DM for read, x_DM in paths.items()}
        grown[(k,)] = b_DM * u_D[:, None]
        paths = grown
        states = [x_DM for read, x_DM in paths.items() if kept(read, k)]
        ys.append((c_DM * sum(states)).sum(-1).real)
    return torch.stack(ys)


@pytest.mark.claim(
    "mixers/liquid_s4.py",
    "there the products",
    "its recurrent step",
    "its kb",
    "its B^p",
    "as in the code, pb's",
)
@torch.no_grad()
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("kernel", ["pb", "kb"])
def test_liquid_s4_keeps_the_products_of_neighbours(kernel: str, degree: int, form: str) -> None:
    """All 2^T - 1 products of the liquid recurrence, of which KB keeps those of up to P neighbours, and PB of
    these those that end at the current token; PB keeps single inputs all the same."""
    config = LiquidS4Config(width=3, state=4, kernel=kernel, degree=degree, chunk=4, form=form)
    mixer = laws.build(config).double()
    x_BTD = laws.tokens(mixer, 9)

    def kept(read: tuple[int, ...], now: int) -> bool:
        neighbours = read[-1] - read[0] == len(read) - 1
        return neighbours and len(read) <= degree and (kernel == "kb" or len(read) == 1 or read[-1] == now)

    y_BTD = torch.stack([unrolled(mixer.kernel, x_TD, kept) for x_TD in x_BTD])
    want_BTD = glu_block(mixer, y_BTD + mixer.D * x_BTD)
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD)


@pytest.mark.parametrize("init", ["lin", "inv", "legs"])
def test_s4d_starts_as_published(init: str) -> None:
    mixer = fresh(S4DConfig(width=400, state=16, init=init))
    assert math.log(1e-3) <= mixer.log_dt.min() < mixer.log_dt.max() <= math.log(1e-1)
    torch.testing.assert_close(mixer.log_A_real, torch.full((400, 8), math.log(0.5)))
    want_N = {
        "lin": math.pi * torch.arange(8.0),
        "inv": 16 / math.pi * (16 / (2 * torch.arange(8.0) + 1) - 1),
        "legs": hippo.legs(16)[0].imag[8:].float(),
    }[init]
    torch.testing.assert_close(mixer.A_imag, want_N.expand(400, 8))
    b_N = hippo.legs(16)[2].real[8:].float() if init == "legs" else torch.ones(8)
    torch.testing.assert_close(mixer.B, torch.stack((b_N, torch.zeros(8)), dim=-1).expand(400, 8, 2))
    # C is complex normal: half of the variance in each part
    torch.testing.assert_close(mixer.C.var().item(), 0.5, rtol=0.05, atol=0)
    torch.testing.assert_close(mixer.D.std().item(), 1.0, rtol=0.1, atol=0)


def test_dss_starts_as_published() -> None:
    mixer = fresh(DSSConfig(width=400, modes=16))
    assert torch.equal(mixer.log_dt[:, 0], mixer.log_dt[:, 1])
    assert math.log(1e-3) <= mixer.log_dt.min() < mixer.log_dt.max() <= math.log(1e-1)
    torch.testing.assert_close(mixer.Lambda_log_neg_re, torch.full((16,), math.log(0.5)))
    assert (mixer.Lambda_im > 0).all()
    assert (mixer.Lambda_im.diff() < 0).all()
    torch.testing.assert_close(mixer.W.std().item(), 1.0, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("s4d", {"state": 7}, "conjugate pairs"),
        ("s4d", {"chunk": 0}, "chunk = 0"),
        ("s4", {"state": 7}, "conjugate pairs"),
        ("s4", {"chunk": 48}, "power of two"),
        ("liquid-s4", {"state": 7}, "conjugate pairs"),
        ("liquid-s4", {"chunk": 48}, "power of two"),
        ("liquid-s4", {"degree": 1}, "degree = 1 must be at least 2"),
        ("dss", {"version": "softmax"}, "length of the kernel"),
        ("dss", {"version": "sofmax"}, "no version 'sofmax'"),
        ("dss", {"modes": 0}, "modes = 0"),
    ],
)
def test_configs_say_what_does_not_fit(name: str, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        holdall.describe(name).configure(**options)
