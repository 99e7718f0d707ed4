"""AdamW, as both kinds of training use it: what it decays, and what it remembers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""


def decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay is for: matrices of linear layers, and embeddings."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """AdamW's step and moments of a weight, in place. It makes them at its first step; here they are zeros
    before it, so that a checkpoint can be filled into them."""
    state = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), device=weight.device)
        state |= {key: torch.zeros_like(weight) for key in MOMENTS}
    return state
