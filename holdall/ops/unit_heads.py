"""Queries, keys and values out of one projection, with queries and keys of unit length per head.

    q = c u_q r_q        k = u_k r_k        v = u_v        r = 1 / sqrt(|u|^2 + eps) per head and token

Letters: u_q, u_k, u_v the parts of the projection, q, k, v what comes of them, r their inverse lengths, c the
scale of queries, eps a small number. Of shapes: B row, T time, E channels of the projection, H heads, K key
dim, V channels of all values.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.ops.delta_rule import unit_length

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def unit_heads(
    qkv_BTE: Float[Tensor, "b t e"], heads: int, key_dim: int, scale: float, *, form: str = "parallel"
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t h k"], Float[Tensor, "b t v"]]:
    """q of length `scale` and k of unit length, each of `heads` heads, and what is left, which is v.

    q and k are in at least fp32; the kernel rounds them to the dtype of the projection.
    """
    if form == "kernel":
        return kernel_of(unit_heads)(qkv_BTE, heads, key_dim, scale)
    keys = heads * key_dim
    q_BTE, k_BTE, v_BTV = qkv_BTE.split([keys, keys, qkv_BTE.shape[-1] - 2 * keys], dim=-1)
    q_BTHK, k_BTHK = (unit_length(u.unflatten(-1, (heads, key_dim))) for u in (q_BTE, k_BTE))
    return q_BTHK * scale, k_BTHK, v_BTV
