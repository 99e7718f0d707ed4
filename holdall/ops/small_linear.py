"""Linear maps with few weights, for decays, gates and steps, which want more digits than bf16 has.

Letters: B row, T time, R rank, D channels read, E outputs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract.forms import kernel_of
from holdall.ops.linear import is_plain, wide

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def small_linear(
    x: Float[Tensor, "*b d"],
    weight_ED: Float[Tensor, "e d"],
    bias_E: Float[Tensor, "e"] | None = None,
    *,
    log_sigmoid: bool = False,
    divisor: float = 1.0,
    form: str = "parallel",
) -> Float[Tensor, "*b e"]:
    """x W^T + b of tensors taken in at least fp32; or its log sigmoid over `divisor`."""
    if form == "kernel":
        return kernel_of(small_linear)(x, weight_ED, bias_E, log_sigmoid=log_sigmoid, scale=1 / divisor)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))
    return F.logsigmoid(y) / divisor if log_sigmoid else y


def widened_linear(
    x: Float[Tensor, "*b d"], weight_ED: Float[Tensor, "e d"], *, form: str = "parallel"
) -> Float[Tensor, "*b e"]:
    """x W^T in at least fp32, of a product in the dtype of x, which rounds it; the kernel does not."""
    if form == "kernel":
        return kernel_of(widened_linear)(x, weight_ED)
    return F.linear(x, weight_ED).to(torch.promote_types(x.dtype, torch.float32))


def small(
    layer: nn.Module, x: Tensor, *, log_sigmoid: bool = False, divisor: float = 1.0, form: str = "parallel"
) -> Tensor:
    """`small_linear` by a layer, or by what a user put in its place."""
    if is_plain(layer):
        weight_ED, bias_E = layer.weight, layer.bias
        return small_linear(x, weight_ED, bias_E, log_sigmoid=log_sigmoid, divisor=divisor, form=form)
    y = wide(layer, x, torch.promote_types(x.dtype, torch.float32))
    return F.logsigmoid(y) / divisor if log_sigmoid else y


def widened(layer: nn.Module, x: Tensor, *, form: str = "parallel") -> Tensor:
    """`widened_linear` by a layer, or by what a user put in its place."""
    if is_plain(layer):
        return widened_linear(x, layer.weight, form=form)
    return layer(x).to(torch.promote_types(x.dtype, torch.float32))
