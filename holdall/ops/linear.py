"""The linear maps that models are made of, and SwiGLU behind one: y = x W^T + b, or a silu(g) of [a | g].

Reading a text is a few large products, which PyTorch's libraries run near the limit. Writing it is the same
maps of a few rows, in each step, where reading the weights is all there is to do: see
holdall/kernels/linear.py.

Letters: x and y input and output, W and b weight and bias, a and g two halves of the projection. Of shapes: D
inputs, E outputs (of SwiGLU half of them, I).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import forms
from holdall.contract.forms import kernel_of
from holdall.ops.swiglu import swiglu

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

FEW = 64
"""Most rows for which the kernel is faster than PyTorch's product (results/bench.md)."""


def linear(
    x: Float[Tensor, "*b d"],
    weight_ED: Float[Tensor, "e d"],
    bias_E: Float[Tensor, "e"] | None = None,
    *,
    gated: bool = False,
    form: str = "auto",
) -> Float[Tensor, "*b _"]:
    """x W^T + b, or with `gated` SwiGLU of that, half as wide.

    Args:
        form: "parallel" is PyTorch's product; "kernel" has no gradients; "auto" takes it for a few rows of 16
            bits on a GPU where no gradients are wanted.
    """
    if form == "auto":
        form = "kernel" if forms.fused(x, weight_ED, bias_E) and _few(x, weight_ED) else "parallel"
    if form == "kernel":
        return kernel_of(linear)(x, weight_ED, bias_E, gated=gated)
    y = F.linear(x, weight_ED, bias_E)
    if not gated:
        return y
    return swiglu(y, form="kernel" if forms.fused(y, gradients=True) else "parallel")


def _few(x: Tensor, weight_ED: Tensor) -> bool:
    return x.element_size() == 2 and x.dtype == weight_ED.dtype and 0 < x.numel() <= FEW * x.shape[-1]


class Linear(nn.Linear):
    """PyTorch's module, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
