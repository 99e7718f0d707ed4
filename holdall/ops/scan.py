"""Diagonal recurrences: every channel has a state of its own that decays and takes in.

    diagonal:    h_t = a_t h_{t-1} + b_t                          steady: the same a at every t
    selective:   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t      y_t = h_t . C_t

The fast forms cut time into chunks and run all chunks side by side, step by step: T / C + C steps instead of
T, and only ever products of decays, never a quotient, so nothing overflows however much is forgotten.

Letters: B row, T time, G chunks, C time within a chunk, X any channels, D channels, N state per channel.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.ops.running import cumprod

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Inexact

LOG2_E = 1 / math.log(2)
CHUNK = 256
"""Steps per chunk: training sequences up to here are spared the second pass."""


def diagonal_scan_loop(
    a_BTX: Inexact[Tensor, "b t *x"], b_BTX: Inexact[Tensor, "b t *x"], h_BX: Inexact[Tensor, "b *x"]
) -> Inexact[Tensor, "b t *x"]:
    """The definition; returns the states after each token, h_BTX. X stands for any number of dimensions."""
    hs = []
    for a_BX, b_BX in zip(a_BTX.unbind(1), b_BTX.unbind(1), strict=True):
        h_BX = a_BX * h_BX + b_BX
        hs.append(h_BX)
    return torch.stack(hs, dim=1)


def diagonal_scan(
    a_BTX: Inexact[Tensor, "b t *x"],
    b_BTX: Inexact[Tensor, "b t *x"],
    h_BX: Inexact[Tensor, "b *x"],
    *,
    chunk: int = CHUNK,
) -> Inexact[Tensor, "b t *x"]:
    """The same, chunks side by side."""
    total = a_BTX.shape[1]
    if total <= chunk:
        return diagonal_scan_loop(a_BTX, b_BTX, h_BX)
    spare = -total % chunk
    pads = (0, 0) * (a_BTX.ndim - 2) + (0, spare)
    a_BGCX = F.pad(a_BTX, pads, value=1).unflatten(1, (-1, chunk))
    b_BGCX = F.pad(b_BTX, pads).unflatten(1, (-1, chunk))
    rows, chunks = a_BGCX.shape[:2]
    zero = torch.zeros_like(b_BGCX[:, :, 0])
    # each chunk as if nothing came before it, then what did come before, decayed
    alone_BGCX = diagonal_scan_loop(
        a_BGCX.flatten(0, 1), b_BGCX.flatten(0, 1), zero.flatten(0, 1)
    ).unflatten(0, (rows, chunks))  # fmt: skip
    kept_BGCX = cumprod(a_BGCX, 2)
    after_BGX = diagonal_scan_loop(kept_BGCX[:, :, -1], alone_BGCX[:, :, -1], h_BX)
    before_BGX = torch.cat((h_BX[:, None], after_BGX[:, :-1]), dim=1)
    h_BGCX = torch.addcmul(alone_BGCX, kept_BGCX, before_BGX[:, :, None])
    return h_BGCX.flatten(1, 2)[:, :total]


def steady_scan(
    log_a_X: Inexact[Tensor, "*x"],
    b_BTX: Inexact[Tensor, "b t *x"],
    h_BX: Inexact[Tensor, "b *x"],
    *,
    chunk: int = 64,
) -> Inexact[Tensor, "b t *x"]:
    """`diagonal_scan` of decays that do not depend on time: one chunk's powers serve all chunks and rows."""
    total = b_BTX.shape[1]
    if total <= chunk:
        return diagonal_scan_loop(log_a_X.exp().expand_as(b_BTX), b_BTX, h_BX)
    b_BGCX = F.pad(b_BTX, (0, 0) * (b_BTX.ndim - 2) + (0, -total % chunk)).unflatten(1, (-1, chunk))
    lag_C = torch.arange(1, chunk + 1, device=h_BX.device, dtype=log_a_X.real.dtype)
    kept_CX = (lag_C.reshape(-1, *[1] * log_a_X.ndim) * log_a_X).exp()
    b_MCX = b_BGCX.flatten(0, 1)
    alone_MCX = diagonal_scan_loop(kept_CX[0].expand_as(b_MCX), b_MCX, torch.zeros_like(b_MCX[:, 0]))
    alone_BGCX = alone_MCX.unflatten(0, b_BGCX.shape[:2])
    last_BGX = alone_BGCX[:, :, -1]
    after_BGX = diagonal_scan_loop(kept_CX[-1].expand_as(last_BGX), last_BGX, h_BX)
    before_BGX = torch.cat((h_BX[:, None], after_BGX[:, :-1]), dim=1)
    h_BGCX = torch.addcmul(alone_BGCX, kept_CX, before_BGX[:, :, None])
    return h_BGCX.flatten(1, 2)[:, :total]


def selective_scan_loop(
    x_BTD: Float[Tensor, "b t d"],
    dt_BTD: Float[Tensor, "b t d"],
    a_DN: Float[Tensor, "d n"],
    b_BTN: Float[Tensor, "b t n"],
    c_BTN: Float[Tensor, "b t n"],
    h_BDN: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """The definition, in the dtype of the state; returns y_BTD in that of x, and the last state."""
    dtype = h_BDN.dtype
    ys = []
    for x_BD, dt_BD, b_BN, c_BN in zip(
        *(u.to(dtype).unbind(1) for u in (x_BTD, dt_BTD, b_BTN, c_BTN)), strict=True
    ):
        decay_BDN = (dt_BD[..., None] * a_DN.to(dtype)).exp()
        h_BDN = decay_BDN * h_BDN + (dt_BD * x_BD)[..., None] * b_BN[:, None]
        ys.append(torch.einsum("bdn,bn->bd", h_BDN, c_BN))
    return torch.stack(ys, dim=1).to(x_BTD.dtype), h_BDN


def selective_scan(
    x_BTD: Float[Tensor, "b t d"],
    dt_BTD: Float[Tensor, "b t d"],
    a_DN: Float[Tensor, "d n"],
    b_BTN: Float[Tensor, "b t n"],
    c_BTN: Float[Tensor, "b t n"],
    h_BDN: Float[Tensor, "b d n"],
    *,
    chunk: int = CHUNK,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """The same, chunks side by side: once for the state that each chunk starts from, once for the outputs.

    With `inplace`, up to a chunk of tokens is written into the memory of the state. Not for training.

    Decays and inputs are made step by step and never held for all of time, (B, T, D, N). Inside, channels
    come last, (N, D), so that every product runs along many contiguous channels.
    """
    dtype, (rows, total, _) = h_BDN.dtype, x_BTD.shape
    u_BTD, dt_BTD, b_BTN, c_BTN = (u.to(dtype) for u in (x_BTD.to(dtype) * dt_BTD, dt_BTD, b_BTN, c_BTN))
    # decays as powers of two: on a CPU torch.exp can take several times as long as torch.exp2
    a_ND, h_BND = a_DN.to(dtype).T * LOG2_E, h_BDN.mT
    if total <= chunk:
        y_BTD, h_BND = _selective_steps(u_BTD, dt_BTD, a_ND, b_BTN, c_BTN, h_BND, inplace=inplace)
        return y_BTD.to(x_BTD.dtype), h_BDN if inplace else h_BND.mT
    spare = -total % chunk  # a step of length dt = 0 leaves the state as it is

    def side_by_side(u_BTX: Tensor) -> Tensor:
        return F.pad(u_BTX, (0, 0, 0, spare)).unflatten(1, (-1, chunk)).flatten(0, 1)

    u_GCD, dt_GCD, b_GCN, c_GCN = map(side_by_side, (u_BTD, dt_BTD, b_BTN, c_BTN))
    nothing_GND = torch.zeros_like(h_BND[:1]).expand(u_GCD.shape[0], -1, -1)
    _, alone_GND = _selective_steps(u_GCD, dt_GCD, a_ND, b_GCN, None, nothing_GND)
    kept_GND = (dt_GCD.sum(1)[:, None] * a_ND).exp2()
    alone, kept = (g.unflatten(0, (rows, -1)) for g in (alone_GND, kept_GND))
    after = diagonal_scan_loop(kept, alone, h_BND)
    before_GND = torch.cat((h_BND[:, None], after[:, :-1]), dim=1).flatten(0, 1)
    y_GCD, _ = _selective_steps(u_GCD, dt_GCD, a_ND, b_GCN, c_GCN, before_GND)
    y_BTD = y_GCD.unflatten(0, (rows, -1)).flatten(1, 2)[:, :total].to(x_BTD.dtype)
    # a copy: a view of the last chunk's state would keep all chunks' states in memory
    return y_BTD, after[:, -1].mT.clone()


def _selective_steps(
    u_BTD: Tensor, dt_BTD: Tensor, a_ND: Tensor, b_BTN: Tensor, c_BTN: Tensor | None, h_BND: Tensor,
    *, inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence with inputs u = dt x and decays 2^(dt A); without C no outputs, only the state."""
    ys = []
    cs = [None] * u_BTD.shape[1] if c_BTN is None else c_BTN.unbind(1)
    # unbind and not an index per step, whose gradient would be a tensor of zeros for all of time, each
    for u_BD, dt_BD, b_BN, c_BN in zip(u_BTD.unbind(1), dt_BTD.unbind(1), b_BTN.unbind(1), cs, strict=True):
        decay_BND = (dt_BD[:, None] * a_ND).exp2()
        if inplace:
            h_BND.mul_(decay_BND).addcmul_(b_BN[..., None], u_BD[:, None])
        else:
            h_BND = torch.addcmul(b_BN[..., None] * u_BD[:, None], decay_BND, h_BND)
        if c_BN is not None:
            ys.append(c_BN[:, None] @ h_BND)
    return torch.cat(ys, dim=1) if ys else u_BTD[:, :0], h_BND
