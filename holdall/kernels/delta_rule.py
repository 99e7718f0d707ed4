"""The delta rules on a GPU, by flash-linear-attention: see holdall/kernels/fla.py.

Memory traffic: q, k, v, y, the tokens' solved rows (K + V elements each, written and read) and the chunks'
states. Operations per head: 2 T C (3 K + 2 V) + 6 T K V, and C^2 T / 3 for the triangular systems, C = 64.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdall.kernels import fla
from holdall.ops.linear_attention import per_key

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def kernel_refusal(key_dim: int) -> str:
    """Why there is no kernel for heads of so many key dimensions; empty if there is one."""
    return fla.refusal(key_dim)


def delta_rule(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    beta_BTH: Float[Tensor, "b t h"],
    s_BHKV: Float[Tensor, "b h k v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """`holdall.ops.delta_rule.delta_rule`, with the package's chunk length.

    Matrix products are in the dtype of v, to which q and k are cast; beta, decay and state are fp32.

    Raises:
        KernelError: the package is missing or unknown, or it has no kernel for these arguments.
    """
    fla.require(q_BTHK, k_BTHK, v_BTHV, s_BHKV, key_dim=q_BTHK.shape[-1])
    rule = "delta"
    if log_decay is not None:
        if log_decay.ndim == 3 and fla.per_head_is_broken():
            log_decay = log_decay[..., None].expand_as(q_BTHK)
        rule = "delta, decay per head" if log_decay.ndim == 3 else "delta, decay per key"
    inputs = fla.Inputs(q_BTHK, k_BTHK, v_BTHV, beta_BTH=beta_BTH, log_decay=log_decay, s_BHKV=s_BHKV)
    y_BTHV, s_BHKV = fla.apply(rule, inputs)  # type: ignore[assignment]
    return y_BTHV, s_BHKV


def generalised_delta_rule(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    a_BTHK: Float[Tensor, "b t h k"],
    b_BTHK: Float[Tensor, "b t h k"],
    s_BHKV: Float[Tensor, "b h k v"],
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """`holdall.ops.delta_rule.generalised_delta_rule`, as `delta_rule` here; decays are per key dimension."""
    fla.require(q_BTHK, k_BTHK, v_BTHV, s_BHKV, key_dim=q_BTHK.shape[-1])
    if log_decay is None:
        log_decay = torch.zeros_like(q_BTHK, dtype=torch.float32)
    inputs = fla.Inputs(
        q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, None, per_key(log_decay).expand_as(q_BTHK), s_BHKV
    )
    y_BTHV, s_BHKV = fla.apply("generalised delta", inputs)  # type: ignore[assignment]
    return y_BTHV, s_BHKV
