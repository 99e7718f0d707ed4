"""The RMS norm of tokens or heads, with a gate before or after it.

    u = y silu(z)        out = w u / sqrt(mean u^2 + eps)            or, with the gate after the norm,
                         out = w y / sqrt(mean y^2 + eps) silu(z)

Letters: y what is normalised, z the gate, u the gated y, w the weight, eps a small number. Of shapes: B row,
T time, H heads, V value dim, E channels.
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


def gated_rms_norm(
    y: Float[Tensor, "*b e"],
    z: Float[Tensor, "*b e"],
    weight_E: Float[Tensor, "e"],
    eps: float,
    *,
    after: bool = False,
    form: str = "parallel",
) -> Float[Tensor, "*b e"]:
    """Over the last dimension, in at least fp32 within, in the dtype of y without.

    Args:
        z: what the gate is silu of.
        after: whether the gate comes after the norm.
    """
    if form == "kernel":
        return kernel_of(gated_rms_norm)(y, z, weight_E, eps, after=after)
    dtype = torch.promote_types(y.dtype, torch.float32)
    u, gate = y.to(dtype), F.silu(z.to(dtype))
    if not after:
        u = u * gate
    u = F.rms_norm(u, u.shape[-1:], eps=eps) * weight_E
    return (u * gate if after else u).to(y.dtype)


def norm_heads(
    o_BTHV: Float[Tensor, "b t h v"],
    weight_V: Float[Tensor, "v"],
    eps: float,
    gate_BTE: Float[Tensor, "b t h*v"] | None,
    *,
    form: str = "parallel",
) -> Float[Tensor, "b t h*v"]:
    """RMS norm of each head, times silu of the gate if there is one; all heads' channels side by side.

    In the dtype of o, to which the plain forms round the norm and the gate each for itself.
    """
    if form == "kernel":
        return kernel_of(norm_heads)(o_BTHV, weight_V, eps, gate_BTE)
    y_BTE = F.rms_norm(o_BTHV, o_BTHV.shape[-1:], weight_V, eps).flatten(2)
    return y_BTE if gate_BTE is None else y_BTE * F.silu(gate_BTE)
