"""The linear maps that models are made of, and SwiGLU behind one: y = x W^T + b, or a silu(g) of [a | g].

Reading a text is a few large products, which PyTorch's libraries run near the limit. Writing it is the same
maps of a few rows, in each step, where reading the weights is all there is to do: see
holdall/kernels/linear.py.

Letters: x and y input and output, W and b weight and bias, a and g two halves of the projection. Of shapes: D
inputs, E outputs (of SwiGLU half of them, I).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
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


# What reads a layer's weight past the layer, to fuse or to widen a product, asks first whether the layer is
# its weight: a user may have put another in its place, such as LoRA's, which has the old weight too.


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes x W^T + b of its own weight and bias and does nothing beside."""
    if type(layer) not in (Linear, nn.Linear) or "forward" in vars(layer):  # as accelerate replaces it
        return False
    return not (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def swiglu_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """SwiGLU of what a layer makes of x, half as wide."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias, gated=True)
    y = layer(x)
    return swiglu(y, form="kernel" if forms.fused(y, gradients=True) else "parallel")


def wide(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a layer makes of x in a wider dtype than its own; in its own where it is not plain."""
    if is_plain(layer):
        weight_ED, bias_E = layer.weight.to(dtype), layer.bias
        return F.linear(x.to(dtype), weight_ED, None if bias_E is None else bias_E.to(dtype))
    own = next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype)
    return layer(x.to(own)).to(dtype)
