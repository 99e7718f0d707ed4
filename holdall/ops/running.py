"""Running sums and products, bit-identical in every run on a GPU too.

PyTorch's own, and their gradients, raise an error on a GPU wherever deterministic algorithms are asked for,
as training does. There they are taken by doubling, in log2 N passes: after the i-th, each place holds the sum
(or product) of itself and the 2^i - 1 places before it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cumsum(x: Tensor, dim: int) -> Tensor:
    """`torch.cumsum`."""
    return sums_by_doubling(x, dim) if _refused(x) else x.cumsum(dim)


def cumprod(x: Tensor, dim: int) -> Tensor:
    """`torch.cumprod`."""
    return products_by_doubling(x, dim) if _refused(x) else x.cumprod(dim)


def _refused(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


def sums_by_doubling(x: Tensor, dim: int) -> Tensor:
    count, shift = x.shape[dim], 1
    while shift < count:
        nothing = torch.zeros_like(x.narrow(dim, 0, shift))
        x = x + torch.cat((nothing, x.narrow(dim, 0, count - shift)), dim)
        shift *= 2
    return x


def products_by_doubling(x: Tensor, dim: int) -> Tensor:
    count, shift = x.shape[dim], 1
    while shift < count:
        nothing = torch.ones_like(x.narrow(dim, 0, shift))
        x = x * torch.cat((nothing, x.narrow(dim, 0, count - shift)), dim)
        shift *= 2
    return x
