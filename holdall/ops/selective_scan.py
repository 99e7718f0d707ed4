"""The selective scan: a diagonal state space whose steps, inputs and outputs depend on the token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t . C_t

and what Mamba puts around it:  dt = softplus(raw + bias),  y <- (y + skip x) silu(z).

Letters: x_t and y_t input and output of token t, h_t the state, dt_t the step size, A rates, B_t and C_t
input and output map, z the gate. Of shapes: B row, T time, G chunks, C time within a chunk, D channels, N
state per channel.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.diagonal_scan import CHUNK, diagonal_scan_loop

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

LOG2_E = 1 / math.log(2)


def selective_scan(
    input_BTD: Float[Tensor, "b t d"],
    dt_BTD: Float[Tensor, "b t d"],
    a_DN: Float[Tensor, "d n"],
    b_BTN: Float[Tensor, "b t n"],
    c_BTN: Float[Tensor, "b t n"],
    h_BDN: Float[Tensor, "b d n"],
    *,
    dt_bias_D: Float[Tensor, "d"] | None = None,
    skip_D: Float[Tensor, "d"] | None = None,
    z_BTD: Float[Tensor, "b t d"] | None = None,
    chunk: int = CHUNK,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """The scan, in the dtype of the state.

    Args:
        input_BTD: x.
        dt_BTD: the step sizes; with `dt_bias_D` the input of softplus, before the bias is added.
        skip_D: y += skip x.
        z_BTD: then y *= silu(z).
        chunk: tokens that are taken one after another, all chunks side by side. The kernel has its own.
        inplace: the new state may overwrite the old one: the parallel form does so for up to a chunk of
            tokens, the kernel for one. Not for training.
        form: "loop", "parallel" or "kernel".

    Returns:
        y_BTD in the dtype of x, and the last state.
    """
    if form == "kernel":
        return kernel_of(selective_scan)(
            input_BTD, dt_BTD, a_DN, b_BTN, c_BTN, h_BDN,
            dt_bias_D=dt_bias_D, skip_D=skip_D, z_BTD=z_BTD, inplace=inplace,
        )  # fmt: skip
    if dt_bias_D is not None:
        dt_BTD = F.softplus(dt_BTD.to(h_BDN.dtype) + dt_bias_D.to(h_BDN.dtype))
    if form == "loop":
        y_BTD, h_BDN = selective_scan_loop(input_BTD, dt_BTD, a_DN, b_BTN, c_BTN, h_BDN)
    else:
        y_BTD, h_BDN = selective_scan_chunks(
            input_BTD, dt_BTD, a_DN, b_BTN, c_BTN, h_BDN, chunk=chunk, inplace=inplace
        )
    if skip_D is not None:
        y_BTD = torch.addcmul(y_BTD, input_BTD, skip_D.to(y_BTD.dtype))
    return y_BTD if z_BTD is None else y_BTD * F.silu(z_BTD), h_BDN


def selective_scan_loop(
    x_BTD: Float[Tensor, "b t d"],
    dt_BTD: Float[Tensor, "b t d"],
    a_DN: Float[Tensor, "d n"],
    b_BTN: Float[Tensor, "b t n"],
    c_BTN: Float[Tensor, "b t n"],
    h_BDN: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """The definition of the scan itself; returns y_BTD in the dtype of x, and the last state."""
    dtype = h_BDN.dtype
    ys = []
    for x_BD, dt_BD, b_BN, c_BN in zip(
        *(u.to(dtype).unbind(1) for u in (x_BTD, dt_BTD, b_BTN, c_BTN)), strict=True
    ):
        decay_BDN = (dt_BD[..., None] * a_DN.to(dtype)).exp()
        h_BDN = decay_BDN * h_BDN + (dt_BD * x_BD)[..., None] * b_BN[:, None]
        ys.append(torch.einsum("bdn,bn->bd", h_BDN, c_BN))
    return torch.stack(ys, dim=1).to(x_BTD.dtype), h_BDN


def selective_scan_chunks(
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
