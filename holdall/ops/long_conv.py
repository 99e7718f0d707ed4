"""Long causal convolutions along the sequence, one filter per channel, as long as the context.

    y_t = sum_{j <= t} h_{t - j} x_j

Letters: x_j and y_t input and output of tokens j and t, h the filter. Of shapes: B row, T new tokens, D
channels, L taps, P past tokens.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def filter_features(length: int, max_length: int, bands: int, like: Tensor) -> Tensor:
    """What an implicit filter's MLP sees of each time t: [t / (L - 1), cos w_f t, -sin w_f t], (length, Z).

    w_f = 2 pi f / L for `bands` values of f from 1e-4 to bands - 1. On the device of `like`, and in at least
    fp32: in bf16 the times of a long filter would run into each other.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    t_L1 = torch.arange(length, device=like.device, dtype=dtype)[:, None]
    band_F = torch.linspace(1e-4, bands - 1, bands, device=like.device, dtype=dtype)
    turn_LF = 2 * math.pi / max_length * t_L1 * band_F
    return torch.cat((t_L1 / (max_length - 1), turn_LF.cos(), -turn_LF.sin()), dim=-1)


def long_conv_loop(
    x_BTD: Float[Tensor, "b t d"], filter_LD: Float[Tensor, "l d"], past_BPD: Float[Tensor, "b p d"]
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p+t d"]]:
    """The definition. The filter has at least P + T taps, the first for the current token.

    Sums run in the filter's dtype, which may be wider than the tokens'.
    """
    ys = []
    for t in range(x_BTD.shape[1]):
        past_BPD = torch.cat((past_BPD, x_BTD[:, t : t + 1]), dim=1)
        seen_BPD = past_BPD.to(filter_LD.dtype)
        ys.append(torch.einsum("bpd,pd->bd", seen_BPD, filter_LD[: past_BPD.shape[1]].flip(0)))
    return torch.stack(ys, dim=1).to(x_BTD.dtype), past_BPD


def long_conv(
    x_BTD: Float[Tensor, "b t d"],
    filter_LD: Float[Tensor, "l d"],
    past_BPD: Float[Tensor, "b p d"],
    *,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p+t d"]]:
    """By the Fourier transform, O((P + T) log (P + T)); a single token is one dot product, O(P).

    The transform is long enough that nothing wraps around. It runs in at least fp32. Short rows on a GPU are
    products with the filter's Toeplitz matrix, in the dtype of x. `form` is "loop" or "parallel".
    """
    if form == "loop":
        return long_conv_loop(x_BTD, filter_LD, past_BPD)
    new = x_BTD.shape[1]
    seen_BSD = torch.cat((past_BPD, x_BTD), dim=1)
    length = seen_BSD.shape[1]
    filter_LD = filter_LD[:length]
    dtype = torch.promote_types(filter_LD.dtype, torch.float32)
    if new == 1:
        # a product and a sum: as a small matrix product per channel it takes a CPU five times as long
        y_BD = (seen_BSD * filter_LD.to(dtype).flip(0)).sum(1)
        return y_BD[:, None].to(x_BTD.dtype), seen_BSD
    if x_BTD.is_cuda and length <= BY_PRODUCTS:
        return toeplitz_conv(seen_BSD, filter_LD, new), seen_BSD
    size = fast_size(2 * length - 1)
    # channels before time: a transform along the last, contiguous dimension is the fast one
    spectrum_BDF = torch.fft.rfft(seen_BSD.to(dtype).transpose(1, 2), n=size)
    spectrum_DF = torch.fft.rfft(filter_LD.to(dtype).T, n=size)
    y_BDS = torch.fft.irfft(spectrum_BDF * spectrum_DF, n=size)[:, :, length - new : length]
    return y_BDS.transpose(1, 2).to(x_BTD.dtype), seen_BSD


BY_PRODUCTS = 512
"""Up to so many tokens a GPU's tensor cores do all pairs in less time than transforms, which go through
memory a dozen times in fp32, take for anything."""


def toeplitz_conv(
    seen_BSD: Float[Tensor, "b s d"], filter_LD: Float[Tensor, "l d"], new: int
) -> Float[Tensor, "b t d"]:
    """The outputs of the last `new` tokens by one matrix product per channel, O(T S): M_ts = h_{t - s}."""
    length = seen_BSD.shape[1]
    # every window of zeros and the filter after them is a row of M, from its end
    padded_DW = F.pad(filter_LD[:length].to(seen_BSD.dtype).T, (length - 1, 0))
    m_DTS = padded_DW.unfold(-1, length, 1)[:, length - new :].flip(-1)
    return torch.einsum("dts,bsd->btd", m_DTS, seen_BSD)


def fast_size(least: int) -> int:
    """The next power of two: a length that every Fourier library handles fast and evenly."""
    return 1 << max(least - 1, 1).bit_length()
