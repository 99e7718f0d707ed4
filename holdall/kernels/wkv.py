"""RWKV-5's attention on a GPU, by flash-linear-attention's decay per key: see holdall/kernels/fla.py.

    y_t = S_{t-1}^T r_t + (r_t . u k_t) v_t        S_t = diag(e^w) S_{t-1} + k_t v_t^T

S_{t-1} is the state of a linear attention that reads every token one step late, without decay at its first:
S'_t = diag(e^{w_t}) S'_{t-1} + k_{t-1} v_{t-1}^T,  k_{-1} = 0,  w_0 = 0  and  w_t = w  later. So nothing is
divided by powers of a decay, and any decay is safe.

Memory traffic: that of a decay per key dimension (holdall/kernels/linear_attention.py), and r, k, v and y
once more for the bonus.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from holdall.kernels import fla
from holdall.kernels.linear_attention import linear_attention

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def kernel_refusal(key_dim: int) -> str:
    """Why there is no kernel for heads of so many key dimensions; empty if there is one."""
    return fla.refusal(key_dim)


def matrix_wkv(
    r_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    w_HK: Float[Tensor, "h k"],
    u_HK: Float[Tensor, "h k"],
    s_BHKV: Float[Tensor, "b h k v"],
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """`holdall.ops.wkv.matrix_wkv`, with the package's chunk length.

    Matrix products are in the dtype of v; the bonus, decay and state are fp32.

    Raises:
        KernelError: the package is missing or unknown, or it has no kernel for these arguments.
    """
    w_HK, u_HK = w_HK.float(), u_HK.float()
    late_k, late_v = (F.pad(u[:, :-1], (0, 0, 0, 0, 1, 0)) for u in (k_BTHK, v_BTHV))
    w_BTHK = F.pad(w_HK.expand(*k_BTHK.shape[:1], k_BTHK.shape[1] - 1, *w_HK.shape), (0, 0, 0, 0, 1, 0))
    y_BTHV, before_BHKV, _ = linear_attention(r_BTHK, late_k, late_v, s_BHKV, None, w_BTHK)
    assert before_BHKV is not None
    bonus_BTH1 = (r_BTHK.float() * u_HK * k_BTHK.float()).sum(-1, keepdim=True)
    y_BTHV = (y_BTHV + bonus_BTH1 * v_BTHV.float()).to(v_BTHV.dtype)
    last_BHKV = k_BTHK[:, -1, :, :, None].float() * v_BTHV[:, -1, :, None].float()
    return y_BTHV, w_HK.exp()[..., None] * before_BHKV + last_BHKV
