"""Linear attention with decay on a GPU, by flash-linear-attention: see holdall/kernels/fla.py.

Memory traffic: q, k, v and y once, and each chunk's state, K V elements per 64 tokens, unless it stays in
registers: without decay or with one per head, forward and backward are one kernel each and move q, k, v (and
y's gradient) once, the backward twice. A decay per key dimension takes three kernels forward and eight
backward, and in fp32 is as large as q and k together in bf16. Operations per head: 2 T C (K + V) + 4 T K V,
C = 64.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor

from holdall.contract.forms import KernelError
from holdall.kernels import fla
from holdall.ops.linear_attention import IDENTITY, FeatureMap

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


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
    chunk: int = fla.CHUNK,
    inplace: bool = False,
    want_state: bool = True,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h f v"] | None, Float[Tensor, "b h f"] | None]:
    """`holdall.ops.linear_attention.linear_attention` without feature map and normaliser.

    Matrix products are in the dtype of v, to which q and k are cast; decay and state are fp32. The chunk
    length is the package's, and the incoming state is not overwritten.

    Raises:
        KernelError: the package is missing or unknown, or it has no kernel for these arguments.
    """
    each_key = log_decay is not None and log_decay.ndim == 4
    fla.require(q_BTHK, k_BTHK, v_BTHV, s_BHFV, key_dim=q_BTHK.shape[-1] if each_key else 0)
    if feature_map is not IDENTITY or normalise or z_BHF is not None:
        raise KernelError(
            "flash-linear-attention has no feature maps and no normaliser here; form 'parallel' has both"
        )
    rule = "decay per key" if each_key else "decay per head"
    inputs = fla.Inputs(q_BTHK, k_BTHK, v_BTHV, log_decay=log_decay, s_BHKV=s_BHFV)
    y_BTHV, s_BHFV = fla.apply(rule, inputs, want_state)
    return y_BTHV, s_BHFV, None
