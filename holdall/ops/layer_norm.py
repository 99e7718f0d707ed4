"""Layer norm along the last dimension: y = w (x - mean x) / sqrt(var x + eps) + b."""

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
