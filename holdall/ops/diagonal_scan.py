"""Diagonal recurrences: every channel has a state of its own that decays and takes in.

    h_t = a_t h_{t-1} + b_t                          steady: the same a at every t

The fast form cuts time into chunks and runs all chunks side by side, step by step: T / C + C steps instead of
T, and only ever products of decays, never a quotient, so nothing overflows however much is forgotten.

Letters: h_t the state after token t, a_t its decay, b_t what it takes in. Of shapes: B row, T time, G chunks,
C time within a chunk, X any channels.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.running import cumprod

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Inexact

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
    form: str = "parallel",
) -> Inexact[Tensor, "b t *x"]:
    """The states after each token, chunks side by side. `form` is "loop", "parallel" or "kernel"."""
    if form == "kernel":
        return kernel_of(diagonal_scan)(a_BTX, b_BTX, h_BX)
    total = a_BTX.shape[1]
    if form == "loop" or total <= chunk:
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
    form: str = "parallel",
) -> Inexact[Tensor, "b t *x"]:
    """`diagonal_scan` of decays that do not depend on time: one chunk's powers serve all chunks and rows."""
    if form == "kernel":
        return kernel_of(steady_scan)(log_a_X, b_BTX, h_BX)
    total = b_BTX.shape[1]
    if form == "loop" or total <= chunk:
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
