"""State spaces with a transition matrix that is diagonal less one of rank one, diag(lambda) - p p^*: S4's.

    h_t = e h_{t-1} - g 2 Re(r . h_{t-1}) + sum_i b_i x_ti        y_t = Re(c . h_t)

Modes are complex and come in conjugate pairs, of which one is kept: so the product of any two vectors is
twice a real part, and a mode feels the others through one real number only. A step costs O(N). The fast form
takes the step as the real matrix that it is, over all real and imaginary parts, and cuts time into short
chunks: powers of the matrix by squaring, the kernel as a triangular matrix within a chunk, the state handed
on.

Letters: x_ti input i and y_t the output of token t, h_t the state, e the diagonal of a step, g and r its
rank-one term, b_i and c input and output map. Of shapes: B row, T time, G chunks, J time within a chunk, I
inputs per channel, D channels, N modes, R = 2N their parts, S time of one piece, M = B G, X = J I.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
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
    h_BDN2: Float[Tensor, "b d n 2"],
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n 2"]]:
    """The same in chunks, O(T (C + N)) for each channel; a single token is one step of the loop, O(N).

    `chunk` is a power of two. Powers are taken in fp64: every squaring doubles the error of the one before.
    """
    rows, total, dtype = *x_BTID.shape[:2], h_BDN2.dtype
    if total == 1:
        return dplr_ssm_loop(x_BTID, transition, b_IDN, c_DN, h_BDN2)
    powers_DRR, after_DJIR, ahead_DJR = _tables(transition, b_IDN, c_DN, min(total, chunk))
    kernel_DIJ = torch.einsum("djir,dr->dij", after_DJIR, ahead_DJR[:, 0]).to(dtype)
    ring_DRJ = (ahead_DJR @ powers_DRR[0]).to(dtype).mT
    after_DJIR, powers_DRR = after_DJIR.to(dtype), [power_DRR.to(dtype) for power_DRR in powers_DRR]

    x_DBTI = x_BTID.to(dtype).permute(3, 0, 1, 2)
    # a copy: products of matrices round differently where these do not lie as torch lays them, as from a file
    h_DRB = h_BDN2.flatten(2).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    rest = total % chunk
    ys = []
    for x_DBSI, size in ((x_DBTI[:, :, : total - rest], chunk), (x_DBTI[:, :, total - rest :], rest)):
        if not x_DBSI.shape[2]:
            continue
        x_DMX = x_DBSI.unflatten(2, (-1, size)).flatten(1, 2).flatten(2)
        added_DMR = x_DMX @ after_DJIR[:, :size].flip(1).flatten(1, 2)
        before = []
        for added_DBR in added_DMR.unflatten(1, (rows, -1)).unbind(2):
            before.append(h_DRB.mT)
            for k, power_DRR in enumerate(powers_DRR):
                if size >> k & 1:
                    h_DRB = power_DRR @ h_DRB
            h_DRB = h_DRB + added_DBR.mT
        lag_JJ = torch.arange(size, device=x_BTID.device) - torch.arange(size, device=x_BTID.device)[:, None]
        within_DJIJ = torch.where(lag_JJ >= 0, kernel_DIJ[..., lag_JJ.clamp(min=0)], 0).transpose(1, 2)
        y_DMJ = x_DMX @ within_DJIJ.flatten(1, 2)
        y_DMJ = y_DMJ + torch.stack(before, dim=2).flatten(1, 2) @ ring_DRJ[..., :size]
        ys.append(y_DMJ.reshape(-1, rows, x_DBSI.shape[2]))
    y_BTD = torch.cat(ys, dim=2).permute(1, 2, 0).to(x_BTID.dtype, memory_format=torch.contiguous_format)
    return y_BTD, h_DRB.permute(2, 0, 1).contiguous().unflatten(2, (-1, 2))


def _tables(
    transition: Transition, b_IDN: Tensor, c_DN: Tensor, length: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """With M the step as a matrix: M, M^2, M^4, ... up to the length, M^j b and c M^j below it; in fp64."""
    transition = Transition(*(u.to(torch.complex128) for u in transition))
    modes, device = c_DN.shape[-1], c_DN.device
    basis_RN2 = torch.eye(2 * modes, dtype=torch.float64, device=device).unflatten(1, (modes, 2))
    step_RDN = transition(as_complex(basis_RN2)[:, None])
    powers_DRR = [_parts(step_RDN).permute(1, 2, 0)]
    after_DJIR = _parts(b_IDN).transpose(0, 1)[:, None]
    ahead_DJR = _parts(c_DN.conj())[:, None]
    while (have := ahead_DJR.shape[1]) < length:
        power_DRR = powers_DRR[-1]
        more_DJIR = (after_DJIR.flatten(1, 2) @ power_DRR.mT).unflatten(1, (have, -1))
        after_DJIR = torch.cat((after_DJIR, more_DJIR), dim=1)
        ahead_DJR = torch.cat((ahead_DJR, ahead_DJR @ power_DRR), dim=1)
        powers_DRR.append(power_DRR @ power_DRR)
    return powers_DRR, after_DJIR, ahead_DJR


def _parts(u_XN: Tensor) -> Tensor:
    """Complex numbers as twice as many real ones, in fp64."""
    return torch.view_as_real(u_XN.to(torch.complex128).resolve_conj()).flatten(-2)
