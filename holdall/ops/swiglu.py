"""SwiGLU: y = a silu(g), the two halves of one projection [a | g] (Shazeer, 2020, arXiv 2002.05202)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def swiglu(projected: Float[Tensor, "*b e"], *, form: str = "parallel") -> Float[Tensor, "*b i"]:
    """a silu(g) of [a | g], half as wide.

    Args:
        form: "parallel" is PyTorch's; "kernel" is one kernel each way, in fp32 within.
    """
    if form == "kernel":
        return kernel_of(swiglu)(projected)
    a, gate = projected.chunk(2, dim=-1)
    return a * F.silu(gate)
