"""Linear attention on a GPU: with decay by flash-linear-attention, with the Taylor map by kernels of our own.

For the Taylor map, see holdall/kernels/taylor.py and, for one token without gradients, taylor_step.py; for
the package, holdall/kernels/fla.py. Memory traffic there: q, k, v and y once, and each chunk's state, K V
elements per 64 tokens, unless it stays in registers: without decay or with one per head, forward and backward
are one kernel each and move q, k, v (and y's gradient) once, the backward twice. A decay per key dimension
takes three kernels forward and eight backward, and in fp32 is as large as q and k together in bf16.
Operations per head: 2 T C (K + V) + 4 T K V, C = 64.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdall.contract.forms import KernelError
from holdall.kernels import fla, taylor
from holdall.kernels.taylor_step import taylor_step
from holdall.ops.linear_attention import FEATURE_MAPS, IDENTITY, FeatureMap

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float

TAYLOR = FEATURE_MAPS["taylor"]


def kernel_refusal(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    *,
    feature_map: FeatureMap = IDENTITY,
    decay_per_key: bool = False,
) -> str:
    """Why there is no kernel for such heads, map and decay; empty if there is one."""
    if feature_map == TAYLOR:
        return taylor.refusal(key_dim, value_dim, dtype)
    if feature_map != IDENTITY:
        return "there are kernels for the Taylor map and for none, but for no other map"
    return fla.refusal(key_dim if decay_per_key else 0)


def linear_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"] | None,
    z_BHF: Float[Tensor, "b h f"] | None = None,
    log_decay: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    feature_map: FeatureMap = IDENTITY,
    normalise: bool = False,
    eps: float = 1e-12,
    floor: float | None = None,
    inplace: bool = False,
    want_state: bool = True,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h f v"] | None, Float[Tensor, "b h f"] | None]:
    """Without a feature map and normaliser, or with the Taylor map, normalised and without decay.

    Matrix products are in the dtype of v, to which q and k are cast; decay and state are fp32. The incoming
    state is overwritten only by a single token of the Taylor map.

    Raises:
        KernelError: there is no kernel for these arguments; or the package is missing or unknown.
    """
    if feature_map == TAYLOR and normalise and log_decay is None and floor is None:
        return _taylor(q_BTHK, k_BTHK, v_BTHV, s_BHFV, z_BHF, eps, inplace, want_state)
    each_key = log_decay is not None and log_decay.ndim == 4
    fla.require(q_BTHK, k_BTHK, v_BTHV, s_BHFV, key_dim=q_BTHK.shape[-1] if each_key else 0)
    if feature_map != IDENTITY or normalise or z_BHF is not None:
        raise KernelError(
            "flash-linear-attention has no feature maps and no normaliser here; form 'parallel' has both"
        )
    rule = "decay per key" if each_key else "decay per head"
    inputs = fla.Inputs(q_BTHK, k_BTHK, v_BTHV, log_decay=log_decay, s_BHKV=s_BHFV)
    y_BTHV, s_BHFV = fla.apply(rule, inputs, want_state)
    return y_BTHV, s_BHFV, None


def absorb(
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHFV: Float[Tensor, "b h f v"] | None,
    z_BHF: Float[Tensor, "b h f"] | None,
    *,
    feature_map: FeatureMap,
) -> tuple[Float[Tensor, "b h f v"], Float[Tensor, "b h f"]]:
    """With the Taylor map alone. Raises KernelError with another, or where no kernel can run."""
    if feature_map != TAYLOR:
        raise KernelError("the kernel has the Taylor map alone; form 'parallel' has all")
    return taylor.absorb(k_BTHK, v_BTHV, s_BHFV, z_BHF)


def _taylor(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    s_BHFV: Tensor | None,
    z_BHF: Tensor | None,
    eps: float,
    inplace: bool,
    want_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One token is a step of the recurrence, unless gradients are wanted, which the step has none of."""
    if q_BTHK.shape[1] > 1 or _wants_gradient(q_BTHK, k_BTHK, v_BTHV, s_BHFV, z_BHF):
        return taylor.taylor_attention(q_BTHK, k_BTHK, v_BTHV, s_BHFV, z_BHF, eps=eps, want_state=want_state)
    if s_BHFV is None or z_BHF is None:
        (rows, _, heads, key_dim), value_dim = k_BTHK.shape, v_BTHV.shape[-1]
        s_BHFV = v_BTHV.new_zeros(rows, heads, TAYLOR.size(key_dim), value_dim, dtype=torch.float32)
        z_BHF = s_BHFV[..., 0].clone()
    return taylor_step(q_BTHK, k_BTHK, v_BTHV, s_BHFV, z_BHF, eps=eps, inplace=inplace)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
