"""Monarch matrices: products of two block-diagonal matrices with a permutation between, and what they can do.

    dft:   X[k] = sum_n exp(-2 pi i n k / N) x[n]   with N = P Q, n = Q n1 + n2, k = k1 + P k2
           a[k1, n2] = sum_n1 exp(-2 pi i n1 k1 / P) x[n1, n2]                  Q blocks, all alike
           X[k1, k2] = sum_n2 exp(-2 pi i n2 (k1 + P k2) / N) a[k1, n2]         P blocks
    conv:  y_t = sum_{j <= t} h_{t - j} x_j = idft(dft(h) dft(x)), on twice the length, half of it zeros

Everything is a matrix product, so that hardware made for those runs it near its peak, at O(N^1.5) operations
where the fast Fourier transform needs O(N log N). Letters: x and X a sequence of N = P Q elements and its
transform, n = Q n1 + n2 and k = k1 + P k2 their indices, i the imaginary unit, a the transform within blocks,
h_j a filter's tap j, y_t its output for token t. Of shapes: B row, T new tokens, P past tokens, D channels;
inside, R rows of Q tokens each; halves K = R + 1 of the P = 2 R first frequencies.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Shaped


def monarch_multiply(
    x: Shaped[Tensor, "*b n"], first_KQP: Shaped[Tensor, "k q p"], second_LSR: Shaped[Tensor, "l s r"]
) -> Shaped[Tensor, "*b m"]:
    """The general product: K blocks of (Q, P), a transposition, L blocks of (S, R); K P numbers to S L.

    Input K P is read block by block; the K Q numbers between are dealt out to the L second blocks in turn,
    and the result takes one number from each of those in turn.
    """
    between_KQ = torch.einsum("kqp,...kp->...kq", first_KQP, x.unflatten(-1, (first_KQP.shape[0], -1)))
    dealt_RL = between_KQ.flatten(-2).unflatten(-1, (second_LSR.shape[2], -1))
    return torch.einsum("lsr,...rl->...sl", second_LSR, dealt_RL).flatten(-2)


class _DFT(NamedTuple):
    """The factors of a real transform of N = 2 R Q numbers of which the second half are zeros.

    Frequencies k1 > R are the conjugates of others, so only K = R + 1 of the 2 R are ever computed.
    """

    cos_KR: Tensor
    sin_KR: Tensor
    twiddle_KQ: Tensor
    last_QQ: Tensor


def _dft(rows: int, q: int, dtype: torch.dtype, device: torch.device) -> _DFT:
    """Angles are reduced while they are whole numbers: in fp32 large ones would have lost their digits."""
    k1_K = torch.arange(rows + 1, device=device)[:, None]
    n1_R, n2_Q = torch.arange(rows, device=device), torch.arange(q, device=device)

    def turn(whole: Tensor, period: int) -> Tensor:
        return (whole % period).to(dtype) * (-2 * math.pi / period)

    first_KR = turn(k1_K * n1_R, 2 * rows)
    twiddle_KQ, last_QQ = turn(k1_K * n2_Q, 2 * rows * q), turn(n2_Q[:, None] * n2_Q, q)
    return _DFT(
        first_KR.cos(),
        first_KR.sin(),
        torch.complex(twiddle_KQ.cos(), twiddle_KQ.sin()),
        torch.complex(last_QQ.cos(), last_QQ.sin()),
    )


def _spectrum(x_BDS: Tensor, dft: _DFT) -> Tensor:
    """(.., R Q) real to (.., K, Q) complex, frequency k1 + 2 R k2 at [k1, k2]."""
    x_RQ = x_BDS.unflatten(-1, (dft.cos_KR.shape[1], -1))
    a_KQ = torch.complex(dft.cos_KR @ x_RQ, dft.sin_KR @ x_RQ)
    return (a_KQ * dft.twiddle_KQ) @ dft.last_QQ


def _signal(spectrum_KQ: Tensor, dft: _DFT) -> Tensor:
    """The inverse, (.., K, Q) complex to the first R Q of the N real numbers."""
    half, q = spectrum_KQ.shape[-2:]
    a_KQ = (spectrum_KQ @ dft.last_QQ.conj()) * dft.twiddle_KQ.conj()
    # all but the first and the last of the frequencies k1 stand for their conjugates too
    twice_K1 = torch.full((half, 1), 2.0, dtype=dft.cos_KR.dtype, device=dft.cos_KR.device)
    twice_K1[0], twice_K1[-1] = 1.0, 1.0
    share_K1 = twice_K1 / (2 * (half - 1) * q)
    return ((share_K1 * dft.cos_KR).T @ a_KQ.real + (share_K1 * dft.sin_KR).T @ a_KQ.imag).flatten(-2)


def monarch_conv(
    x_BTD: Float[Tensor, "b t d"], filter_LD: Float[Tensor, "l d"], past_BPD: Float[Tensor, "b p d"]
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p+t d"]]:
    """`long_conv` through Monarch matrices, O((P + T)^1.5); a single token is one dot product, O(P).

    Blocks are as near to square as the length allows. It runs in at least fp32.
    """
    new = x_BTD.shape[1]
    seen_BSD = torch.cat((past_BPD, x_BTD), dim=1)
    length = seen_BSD.shape[1]
    filter_LD = filter_LD[:length]
    dtype = torch.promote_types(filter_LD.dtype, torch.float32)
    if new == 1:
        y_BD = torch.einsum("bsd,sd->bd", seen_BSD.to(dtype), filter_LD.to(dtype).flip(0))
        return y_BD[:, None].to(x_BTD.dtype), seen_BSD
    q = math.isqrt(2 * length - 1) + 1
    rows = -(-length // q)
    dft, spare = _dft(rows, q, dtype, x_BTD.device), (0, rows * q - length)
    x_BDF = _spectrum(F.pad(seen_BSD.to(dtype).transpose(1, 2), spare), dft)
    h_DF = _spectrum(F.pad(filter_LD.to(dtype).T, spare), dft)
    y_BDS = _signal(x_BDF * h_DF, dft)[..., length - new : length]
    return y_BDS.transpose(1, 2).to(x_BTD.dtype), seen_BSD
