"""Layer norm and RMS norm along the last dimension, alone or behind the sum of a residual stream.

y = w (x - mean x) / sqrt(var x + eps) + b          y = w x / sqrt(mean x^2 + eps)

Letters: x and y input and output, w weight, b bias, eps a small number.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def kernel_refusal(width: int) -> str:
    """Why there is no kernel for rows of this width; empty if there is one."""
    return kernel_of(kernel_refusal)(width)


def layer_norm(
    x: Float[Tensor, "*b d"],
    weight_D: Float[Tensor, "d"],
    bias_D: Float[Tensor, "d"],
    eps: float,
    dtype: torch.dtype,
    *,
    form: str = "parallel",
) -> Float[Tensor, "*b d"]:
    """The norm of x, rounded to `dtype`.

    Args:
        form: "parallel" is PyTorch's, in the dtype of x within; "kernel" is one kernel each way, in fp32
            within, where members of a population have weights of their own.
    """
    if form == "kernel":
        return kernel_of(layer_norm)(x, weight_D, bias_D, eps, dtype)
    return F.layer_norm(x, x.shape[-1:], weight_D.to(x.dtype), bias_D.to(x.dtype), eps).to(dtype)


def rms_norm(
    x: Float[Tensor, "*b d"],
    weight_D: Float[Tensor, "d"],
    eps: float,
    dtype: torch.dtype,
    *,
    form: str = "parallel",
) -> Float[Tensor, "*b d"]:
    """The RMS norm of x, rounded to `dtype`; forms as in `layer_norm`."""
    if form == "kernel":
        return kernel_of(rms_norm)(x, weight_D, eps, dtype)
    return F.rms_norm(x, x.shape[-1:], weight_D.to(x.dtype), eps).to(dtype)


def add_norm(
    r: Float[Tensor, "*b d"],
    x: Float[Tensor, "*b d"],
    weight_D: Float[Tensor, "d"],
    bias_D: Float[Tensor, "d"] | None,
    eps: float,
    dtype: torch.dtype,
    *,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """The sum r + x in the dtype of r, and the sum's norm in `dtype`: an RMS norm where there is no bias.

    Args:
        x: may be of a narrower dtype than r.
        inplace: r is given away, and the sum is in its memory; the plain form leaves it alone.
        form: "parallel" adds, then norms; "kernel" does both in one pass, without gradients.
    """
    if form == "kernel":
        return kernel_of(add_norm)(r, x, weight_D, bias_D, eps, dtype, inplace=inplace)
    r = r + x
    if bias_D is None:
        return r, rms_norm(r, weight_D, eps, dtype)
    return r, layer_norm(r, weight_D, bias_D, eps, dtype)
