"""Where state spaces start: the spectra, in double precision, that let them remember from the first step on.

HiPPO-LegS keeps the coefficients of the past in Legendre polynomials, on a scale that grows with it:

    h' = A h + b x      A_ij = -sqrt((2i + 1) (2j + 1)) for i > j, -(i + 1) for i = j, 0 for i < j
                        b_i = sqrt(2i + 1)

Its eigenvectors are too large to work with, but A is a normal matrix less one of rank one: A + p p^T equals V
diag(lambda) V^* with p_i = sqrt(i + 1/2), and all its eigenvalues have the real part -1/2 and come in
conjugate pairs (Gu, Goel, Ré, 2021, arXiv 2111.00396). S4 keeps both terms, S5 and DSS the normal one. S4D's
other spectra are simpler laws for it (Gu, Gupta, Goel, Ré, 2022, arXiv 2206.11893).

Letters: h the state and h' its derivative in time, x the input, A and b matrix and input map of the ODE, i
and j degrees of polynomials, p the rank-one term, V eigenvectors, lambda eigenvalues.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DT_MIN, DT_MAX = 1e-3, 1e-1
"""The published step sizes: memories of about 10 to 1000 tokens."""


def log_step_sizes(*shape: int) -> Tensor:
    """Logarithms of step sizes, uniform between those of DT_MIN and DT_MAX, from torch's random state."""
    return torch.empty(shape).uniform_(math.log(DT_MIN), math.log(DT_MAX))


def step_size_bias(*shape: int) -> Tensor:
    """Numbers whose softplus are such step sizes: the bias of a projection that starts near zero."""
    dt = log_step_sizes(*shape).exp()
    return dt + torch.log(-torch.expm1(-dt))


def legs(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LegS in the basis where its normal part is diagonal: A = V (diag(lambda) - p p^*) V^*.

    Returns lambda_N by ascending imaginary part, p_N = V^* p, b_N = V^* b and V_NN, all complex128. For even
    n the second half are the modes with positive imaginary parts, the first their conjugates. An eigenvector
    is unique up to its phase: here the one is taken that makes p_n and b_n real and positive.
    """
    index_N = torch.arange(n, dtype=torch.float64)
    b_N, p_N = (2 * index_N + 1).sqrt(), (index_N + 0.5).sqrt()
    lower_NN = torch.outer(p_N, p_N).tril(-1)
    # the normal part is -1/2 plus a skew-symmetric matrix, so that times -i is Hermitian
    imaginary_N, v_NN = torch.linalg.eigh(-1j * (lower_NN.T - lower_NN))
    v_NN = v_NN * torch.sgn(v_NN.mH @ b_N.to(v_NN.dtype))
    return (
        torch.complex(torch.full_like(imaginary_N, -0.5), imaginary_N),
        v_NN.mH @ p_N.to(v_NN.dtype),
        v_NN.mH @ b_N.to(v_NN.dtype),
        v_NN,
    )


def skew_hippo(n: int) -> Tensor:
    """DSS's n eigenvalues with positive imaginary parts, largest first: those of LegS of size 2n."""
    return legs(2 * n)[0][:n].conj().resolve_conj()


def s4d_lin(n: int) -> Tensor:
    """-1/2 + i pi m for m < n: a Fourier series."""
    index_N = torch.arange(n, dtype=torch.float64)
    return torch.complex(torch.full_like(index_N, -0.5), math.pi * index_N)


def s4d_inv(n: int) -> Tensor:
    """-1/2 + i (2n / pi) (2n / (2m + 1) - 1) for m < n: what LegS's spectrum of size 2n tends to."""
    index_N = torch.arange(n, dtype=torch.float64)
    return torch.complex(torch.full_like(index_N, -0.5), 2 * n / math.pi * (2 * n / (2 * index_N + 1) - 1))
