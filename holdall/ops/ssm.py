"""Diagonal state spaces that do not change with time: each channel's past as a sum of damped oscillations.

    h_t = exp(log_a) h_{t-1} + b x_t        y_t = Re sum_n c_n h_tn

Modes are complex, inputs and outputs real; where modes stand for conjugate pairs, c holds the factor 2. Seen
as a convolution, y = K * x with K_l = Re sum_n c_n b_n exp(l log_a_n). The fast form cuts time into chunks: a
Fourier transform within each, and the state handed from one to the next.

On powers: rounded to fp32, the angle of exp(l log_a) is off by up to l / 2 units in the last place. So every
power is one product of two, exp(J i log_a) exp(j log_a) with l = J i + j, from two tables of about sqrt(C)
entries each, which are small enough for fp64. And a sum over modes of such products is a matrix product of
the tables: no tensor of D N C elements is ever made.

Letters: x_t and y_t input and output of token t, h_t the state, a what a step multiplies a mode by, b and c
input and output map, n a mode, K_l the kernel at lag l. Of shapes: B row, T time, G chunks, C time within a
chunk, I coarse and J fine steps of it, D channels, N modes, S time of one piece, F frequencies, M whatever is
multiplied at once.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.ops.long_conv import fast_size

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Complex, Float

CHUNK = 1024
"""Tokens per Fourier transform; what the modes cost beside it, per token, hardly depends on it."""


def as_complex(pairs: Float[Tensor, "*x 2"]) -> Complex[Tensor, "*x"]:
    """Pairs (re, im) as complex numbers.

    A copy: a view crashes the process where pairs from a file do not lie as complex numbers have to.
    """
    return torch.complex(pairs[..., 0], pairs[..., 1])


def zoh(dt_DN: Float[Tensor, "#d #n"], a_DN: Complex[Tensor, "#d n"]) -> tuple[Tensor, Tensor]:
    """h' = a h + b x over a time dt, x held: returns log_a = dt a, and what b is to be multiplied by."""
    log_a_DN = dt_DN * a_DN
    return log_a_DN, torch.expm1(log_a_DN) / a_DN


def bilinear(dt_DN: Float[Tensor, "#d #n"], a_DN: Complex[Tensor, "#d n"]) -> tuple[Tensor, Tensor]:
    """The same by the trapezoidal rule: log (1 + z) / (1 - z) with z = dt a / 2, and dt / (1 - z)."""
    z_DN = 0.5 * dt_DN * a_DN
    x_DN, y_DN = z_DN.real, z_DN.imag
    # the decay is a small difference of two large numbers, |1 + z|^2 - |1 - z|^2 = 4 Re z
    decay_DN = 0.5 * torch.log1p(4 * x_DN / ((1 - x_DN).square() + y_DN.square()))
    angle_DN = torch.atan2(y_DN, 1 + x_DN) + torch.atan2(y_DN, 1 - x_DN)
    return torch.complex(decay_DN, angle_DN), dt_DN / (1 - z_DN)


def diagonal_ssm_loop(
    x_BTD: Float[Tensor, "b t d"],
    log_a_DN: Complex[Tensor, "#d n"],
    b_DN: Complex[Tensor, "#d n"],
    c_DN: Complex[Tensor, "#d n"],
    h_BDN2: Float[Tensor, "b d n 2"],
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n 2"]]:
    """The definition, in the dtype of the state; returns y_BTD in that of x, and the last state.

    log_a, b and c have the complex dtype that belongs to the state's; one row of them serves all channels.
    """
    a_DN, h_BDN = log_a_DN.exp(), as_complex(h_BDN2)
    ys = []
    for x_BD in x_BTD.to(h_BDN2.dtype).unbind(1):
        h_BDN = a_DN * h_BDN + b_DN * x_BD[..., None]
        ys.append((c_DN * h_BDN).real.sum(-1))
    return torch.stack(ys, dim=1).to(x_BTD.dtype), torch.view_as_real(h_BDN)


def diagonal_ssm(
    x_BTD: Float[Tensor, "b t d"],
    log_a_DN: Complex[Tensor, "#d n"],
    b_DN: Complex[Tensor, "#d n"],
    c_DN: Complex[Tensor, "#d n"],
    h_BDN2: Float[Tensor, "b d n 2"] | None,
    *,
    chunk: int = CHUNK,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n 2"] | None]:
    """The same by Fourier transforms, O(T (log C + N)); a single token is one step of the recurrence, O(N).

    None is a state of zeros. If one chunk holds all tokens and no state comes in or is wanted, nothing but
    the kernel is computed. `form` is "parallel" or "loop", which is the definition.
    """
    total = x_BTD.shape[1]
    if form == "loop" or total == 1:
        if h_BDN2 is None:
            h_BDN2 = log_a_DN.real.new_zeros(x_BTD.shape[0], x_BTD.shape[2], log_a_DN.shape[1], 2)
        y_BTD, h_BDN2 = diagonal_ssm_loop(x_BTD, log_a_DN, b_DN, c_DN, h_BDN2)
        return y_BTD, h_BDN2 if want_state else None
    h_DBN = None if h_BDN2 is None else as_complex(h_BDN2).transpose(0, 1)
    # channels first: each is one matrix product for all rows and chunks, and Fourier likes its dimension last
    x_DBT = x_BTD.to(log_a_DN.real.dtype).permute(2, 0, 1).contiguous()
    rest = total % chunk
    ys = []
    for x_DBS, size, last in (
        (x_DBT[..., : total - rest], chunk, not rest),
        (x_DBT[..., total - rest :], rest, True),
    ):
        if x_DBS.shape[2]:
            x_DBGC, needed = x_DBS.unflatten(2, (-1, size)), want_state or not last
            y_DBGC, h_DBN = _side_by_side(x_DBGC, log_a_DN, b_DN, c_DN, h_DBN, needed)
            ys.append(y_DBGC.flatten(2))
    y_BTD = torch.cat(ys, dim=2).permute(1, 2, 0).to(x_BTD.dtype, memory_format=torch.contiguous_format)
    if h_DBN is None or not want_state:
        return y_BTD, None
    return y_BTD, torch.view_as_real(h_DBN.transpose(0, 1).contiguous())


def diagonal_kernel(
    log_a_DN: Complex[Tensor, "d n"],
    b_DN: Complex[Tensor, "#d n"],
    c_DN: Complex[Tensor, "#d n"],
    length: int,
) -> Float[Tensor, "d l"]:
    """K_l = Re sum_n c_n b_n exp(l log_a_n) for l < length: what `diagonal_ssm` convolves with."""
    return _kernel(b_DN, c_DN, *_tables(log_a_DN, length))[:, :length]


def _side_by_side(
    x_DBGC: Tensor, log_a_DN: Tensor, b_DN: Tensor, c_DN: Tensor, h_DBN: Tensor | None, want_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Whole chunks at once; returns the outputs, and the last state unless nobody needs any."""
    channels, rows, chunks, size = x_DBGC.shape
    fine_DJN, coarse_DIN = tables = _tables(log_a_DN, size)
    fine, coarse = fine_DJN.shape[1] - 1, coarse_DIN.shape[1]

    length = fast_size(2 * size - 1)
    kernel_DF = torch.fft.rfft(_kernel(b_DN, c_DN, *tables)[:, :size], n=length)
    y_DBGC = torch.fft.irfft(torch.fft.rfft(x_DBGC, n=length) * kernel_DF[:, None, None], n=length)[
        ..., :size
    ]
    if h_DBN is None and chunks == 1 and not want_state:
        return y_DBGC, None

    # a chunk's own share of the state after it, sum_l a^(C - 1 - l) b x_l; zeros in front fill up I x J
    x_DMJ = F.pad(x_DBGC, (coarse * fine - size, 0)).reshape(channels, -1, fine)
    backward_DJN = fine_DJN[:, :-1].flip(1)
    part_DMN = torch.complex(x_DMJ @ backward_DJN.real, x_DMJ @ backward_DJN.imag)
    part_DBGIN = part_DMN.unflatten(1, (rows, chunks, coarse)) * coarse_DIN.flip(1)[:, None, None]
    added_DBGN = b_DN[:, None, None] * part_DBGIN.sum(3)
    kept_D1N = _powers(log_a_DN, size, 2)[:, 1:]
    if h_DBN is None:
        h_DBN = torch.zeros_like(added_DBGN[:, :, 0])
        if chunks == 1:
            return y_DBGC, added_DBGN[:, :, 0]
    before = []
    for added_DBN in added_DBGN.unbind(2):
        before.append(h_DBN)
        h_DBN = kept_D1N * h_DBN + added_DBN
    # how the state before a chunk rings on in it, Re sum_n c_n a_n^(l + 1) h_n
    ring_DBGN = c_DN[:, None, None] * torch.stack(before, dim=2)
    ring_DMN = (ring_DBGN[..., None, :] * coarse_DIN[:, None, None]).flatten(1, 3)
    ring_DMJ = _real_product(ring_DMN, fine_DJN[:, 1:])
    return y_DBGC + ring_DMJ.reshape(channels, rows, chunks, -1)[..., :size], h_DBN


def _tables(log_a_DN: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """exp(j log_a) for j <= J and exp(J i log_a) for i < I, with I J >= size."""
    fine = math.isqrt(size - 1) + 1
    return _powers(log_a_DN, 1, fine + 1), _powers(log_a_DN, fine, -(-size // fine))


def _kernel(b_DN: Tensor, c_DN: Tensor, fine_DJN: Tensor, coarse_DIN: Tensor) -> Tensor:
    """The first I J numbers of the kernel, (D, I J)."""
    return _real_product((c_DN * b_DN)[:, None] * coarse_DIN, fine_DJN[:, :-1]).flatten(1)


def _powers(log_a_DN: Tensor, step: int, count: int) -> Tensor:
    """exp(step i log_a) for i < count, (D, I, N), computed in fp64 and rounded once."""
    times_I1 = step * torch.arange(count, dtype=torch.float64, device=log_a_DN.device)[:, None]
    return (log_a_DN.to(torch.complex128)[:, None] * times_I1).exp().to(log_a_DN.dtype)


def _real_product(u_DMN: Tensor, v_DJN: Tensor) -> Tensor:
    """Re sum_n u_n v_n as a product of real matrices, (D, M, J)."""
    return torch.cat((u_DMN.real, -u_DMN.imag), dim=-1) @ torch.cat((v_DJN.real, v_DJN.imag), dim=-1).mT
