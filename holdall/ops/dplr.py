"""State spaces with a transition matrix that is diagonal less one of rank one, diag(lambda) - p p^*: S4's.

    h_t = e h_{t-1} - g 2 Re(r . h_{t-1}) + sum_i b_i x_ti        y_t = Re(c . h_t)

Modes are complex and come in conjugate pairs, of which one is kept: so the product of any two vectors is
twice a real part, and a mode feels the others through one real number only. A step costs O(N). The fast form
cuts time into short chunks: the kernel as a triangular matrix within a chunk, the state handed on as real and
imaginary parts.

Without that one number a step is diagonal, and its powers are those of e. So it is taken for what it is, a
feedback: with M the step, u any vector and k(v, u)_j = v . e^j u, of which S shifts by a step,

    f(u)_j = 2 Re(r . M^j u)                solves f(u) + S k(r, g) * f(u) = k(r, u), a triangular system
    c . M^j u = k(c, u)_j - (S k(c, g) * f(u))_j                what Re(c . h) rings with
    M^j u = e^j u - (S e^. g * f(u))_j      v M^j = v e^j - (S (v . M^. g) * r e^.)_j

and no power of a matrix is ever multiplied with another.

Letters: x_ti input i and y_t the output of token t, h_t the state, e the diagonal of a step, g and r its
rank-one term, b_i and c input and output map, M the step, S a shift, u and v any vectors, j a power, f and k
what u makes them. Of shapes: B row, T time, G chunks, J
time within a chunk, I inputs per channel, D channels, N modes, R = 2N their parts, S time of one piece,
M = B G, X = J I, O outputs of the diagonal step.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.ops.ssm import as_complex

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Complex, Float

CHUNK = 64
"""Tokens per chunk: about as many as a state has parts, so that no share of the work outweighs the others."""


class Transition(NamedTuple):
    """h -> e h - g 2 Re(r . h), for each channel."""

    e_DN: Tensor
    g_DN: Tensor
    r_DN: Tensor

    def __call__(self, h_XDN: Tensor) -> Tensor:
        return self.e_DN * h_XDN - self.g_DN * (2 * (self.r_DN * h_XDN).sum(-1, keepdim=True).real)


def dplr_bilinear(
    dt_D1: Float[Tensor, "d 1"],
    lambda_DN: Complex[Tensor, "d n"],
    p_DN: Complex[Tensor, "d n"],
    b_DN: Complex[Tensor, "d n"],
) -> tuple[Transition, Complex[Tensor, "d n"]]:
    """h' = (diag(lambda) - p p^*) h + b x by the trapezoidal rule: the transition, and what multiplies x.

    With m the diagonal of (1 - dt / 2 lambda)^-1, the identity of Woodbury gives (1 - dt / 2 A)^-1 =
    diag(m) - k m p p^* m with k = dt / 2 / (1 + dt / 2 p^* m p), and the transition is twice that, less 1.
    """
    half_D1 = 0.5 * dt_D1
    m_DN = 1 / (1 - half_D1 * lambda_DN)
    r_DN = p_DN.conj() * m_DN
    g_DN = 2 * half_D1 / (1 + half_D1 * 2 * (r_DN * p_DN).sum(-1, keepdim=True).real) * m_DN * p_DN
    in_DN = dt_D1 * (m_DN * b_DN - g_DN * (r_DN * b_DN).sum(-1, keepdim=True).real)
    return Transition((1 + half_D1 * lambda_DN) * m_DN, g_DN, r_DN), in_DN


def dplr_ssm_loop(
    x_BTID: Float[Tensor, "b t i d"],
    transition: Transition,
    b_IDN: Complex[Tensor, "i d n"],
    c_DN: Complex[Tensor, "d n"],
    h_BDN2: Float[Tensor, "b d n 2"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n 2"]]:
    """The definition, in the dtype of the state; returns y_BTD in that of x, and the last state."""
    h_BDN = as_complex(h_BDN2)
    ys = []
    for x_BID in x_BTID.to(h_BDN2.dtype).unbind(1):
        h_BDN = transition(h_BDN) + (b_IDN * x_BID[..., None]).sum(1)
        ys.append((c_DN * h_BDN).real.sum(-1))
    return torch.stack(ys, dim=1).to(x_BTID.dtype), torch.view_as_real(h_BDN)


def dplr_ssm(
    x_BTID: Float[Tensor, "b t i d"],
    transition: Transition,
    b_IDN: Complex[Tensor, "i d n"],
    c_DN: Complex[Tensor, "d n"],
    h_BDN2: Float[Tensor, "b d n 2"] | None,
    *,
    chunk: int = CHUNK,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n 2"] | None]:
    """The same in chunks, O(T (C + N)) for each channel; a single token is one step of the loop, O(N).

    None is a state of zeros. Where no state comes in or is wanted, up to two chunks of tokens are one, for
    which nothing but the kernel is computed. Tables are made in fp64. `form` is "parallel" or "loop", which
    is the definition.
    """
    rows, total, _, channels = x_BTID.shape
    dtype, loop = c_DN.real.dtype, form == "loop"
    alone = not loop and h_BDN2 is None and not want_state and total <= 2 * chunk
    if h_BDN2 is None and not alone:
        h_BDN2 = c_DN.real.new_zeros(rows, channels, c_DN.shape[1], 2)
    if (loop or total == 1) and h_BDN2 is not None:
        y_BTD, h_BDN2 = dplr_ssm_loop(x_BTID, transition, b_IDN, c_DN, h_BDN2)
        return y_BTD, h_BDN2 if want_state else None
    x_DBTI = x_BTID.to(dtype).permute(3, 0, 1, 2)
    feedback = _Feedback(transition, b_IDN, c_DN, total if alone else min(total, chunk))
    kernel_DIJ = feedback.kernel().to(dtype)
    if alone or h_BDN2 is None:
        return _as_tokens(_within(x_DBTI.flatten(2), kernel_DIJ), x_BTID.dtype), None
    g_DJR, r_DJR = feedback.turning()
    after_DJIR, ring_DRJ = feedback.after(g_DJR).to(dtype), feedback.ring(r_DJR).to(dtype).mT
    # a copy: products of matrices round differently where these do not lie as torch lays them, as from a file
    h_DRB = h_BDN2.flatten(2).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    rest = total % chunk
    ys = []
    for x_DBSI, size in ((x_DBTI[:, :, : total - rest], chunk), (x_DBTI[:, :, total - rest :], rest)):
        if not x_DBSI.shape[2]:
            continue
        x_DMX = x_DBSI.unflatten(2, (-1, size)).flatten(1, 2).flatten(2)
        added_DMR = x_DMX @ after_DJIR[:, :size].flip(1).flatten(1, 2)
        power_DRR = feedback.power(size, g_DJR, r_DJR).to(dtype)
        before = []
        for added_DBR in added_DMR.unflatten(1, (rows, -1)).unbind(2):
            before.append(h_DRB.mT)
            h_DRB = torch.baddbmm(added_DBR.mT, power_DRR, h_DRB)
        y_DMJ = _within(x_DMX, kernel_DIJ[..., :size])
        y_DMJ = y_DMJ + torch.stack(before, dim=2).flatten(1, 2) @ ring_DRJ[..., :size]
        ys.append(y_DMJ.reshape(-1, rows, x_DBSI.shape[2]))
    y_BTD = _as_tokens(torch.cat(ys, dim=2), x_BTID.dtype)
    return y_BTD, h_DRB.permute(2, 0, 1).contiguous().unflatten(2, (-1, 2)) if want_state else None


def _within(x_DMX: Tensor, kernel_DIJ: Tensor) -> Tensor:
    """Outputs of a chunk from its own inputs, (D, M, J)."""
    return x_DMX @ _toeplitz(kernel_DIJ).permute(0, 3, 1, 2).flatten(1, 2)


def _as_tokens(y_DBT: Tensor, dtype: torch.dtype) -> Tensor:
    return y_DBT.permute(1, 2, 0).to(dtype, memory_format=torch.contiguous_format)


class _Feedback:
    """Powers M^j of the step for j up to a length, in fp64, of each channel."""

    def __init__(self, transition: Transition, b_IDN: Tensor, c_DN: Tensor, length: int) -> None:
        e_DN, g_DN, r_DN = (u_DN.to(torch.complex128) for u_DN in transition)
        self.b_IDN, c_DN = b_IDN.to(torch.complex128), c_DN.to(torch.complex128)
        self.g_DN = g_DN
        e_DJN = torch.ones_like(e_DN)[:, None]
        while e_DJN.shape[1] <= length:
            e_DJN, e_DN = torch.cat((e_DJN, e_DJN * e_DN[:, None]), dim=1), e_DN * e_DN
        self.e_DJN = e_DJN[:, : length + 1]
        self.reads_ODN = torch.stack((c_DN, 2 * r_DN))
        inputs_IDN = torch.cat((self.b_IDN, g_DN[None]))
        # of c and r with each b and, last, g, as if there were no feedback
        pairs_DROI = _parts((self.reads_ODN[:, None] * inputs_IDN).conj()).permute(2, 3, 0, 1)
        from_c_DJI, from_r_DJI = (
            (_parts(self.e_DJN[:, :length]) @ pairs_DROI.flatten(2)).unflatten(2, (2, -1)).unbind(2)
        )
        self.fed_back_DJI = torch.linalg.solve_triangular(
            _later(from_r_DJI[..., -1]), from_r_DJI, upper=False, unitriangular=True
        )
        self.answers_DJI = from_c_DJI - _later(from_c_DJI[..., -1]) @ self.fed_back_DJI

    def kernel(self) -> Tensor:
        """c M^j b of each input, (D, I, J)."""
        return self.answers_DJI[..., :-1].mT

    def turning(self) -> tuple[Tensor, Tensor]:
        """e^j g as parts, and 2 r e^j as what parts of a state are multiplied with, (D, J, R)."""
        e_DJN, (_, r_DN) = self.e_DJN[:, :-1], self.reads_ODN
        return _parts(e_DJN * self.g_DN[:, None]), _parts((e_DJN * r_DN[:, None]).conj())

    def after(self, g_DJR: Tensor) -> Tensor:
        """M^j b, (D, J, I, R)."""
        inputs = []
        for b_DN, fed_back_DJ in zip(self.b_IDN, self.fed_back_DJI.unbind(-1), strict=False):
            alone_DJR = _parts(self.e_DJN[:, :-1] * b_DN[:, None])
            inputs.append(torch.baddbmm(alone_DJR, _later(fed_back_DJ), g_DJR, alpha=-1))
        return torch.stack(inputs, dim=2)

    def ring(self, r_DJR: Tensor) -> Tensor:
        """c M^(j + 1), (D, J, R)."""
        alone_DJR = _parts((self.e_DJN[:, 1:] * self.reads_ODN[0][:, None]).conj())
        return torch.baddbmm(alone_DJR, _toeplitz(self.answers_DJI[..., -1]), r_DJR, alpha=-1)

    def power(self, count: int, g_DJR: Tensor, r_DJR: Tensor) -> Tensor:
        """M^count, (D, R, R)."""
        r_DJR, fed_back_DJ = r_DJR[:, :count], self.fed_back_DJI[:, :count, -1]
        r_DJR = torch.baddbmm(r_DJR, _later(fed_back_DJ), r_DJR, alpha=-1)
        basis_RN = as_complex(
            torch.eye(r_DJR.shape[2], dtype=r_DJR.dtype, device=r_DJR.device).unflatten(1, (-1, 2))
        )
        alone_DRR = _parts(basis_RN * self.e_DJN[:, count, None]).mT
        return torch.baddbmm(alone_DRR, g_DJR[:, :count].flip(1).mT, r_DJR, alpha=-1)


def _toeplitz(series_XJ: Tensor) -> Tensor:
    """series_(j - i) in row j and column i, zero above the diagonal, (X, J, J)."""
    size = series_XJ.shape[-1]
    return F.pad(series_XJ, (size - 1, 0)).unfold(-1, size, 1).flip(-1)


def _later(series_XJ: Tensor) -> Tensor:
    """`_toeplitz` a step later: series_(j - i - 1), zero on the diagonal too."""
    return _toeplitz(F.pad(series_XJ[..., :-1], (1, 0)))


def _parts(u_XN: Tensor) -> Tensor:
    """Complex numbers as twice as many real ones."""
    return torch.view_as_real(u_XN.resolve_conj()).flatten(-2)
