"""What RWKV-7 does before and after its delta rule.

    beside      z_t = [x_t | x_{t-1}]
    prepare     kk = u / sqrt(|u|^2 + e_k), u = k_k k'    a = sigmoid(a0 + l_a)
                log w = -e^(-1/2) sigmoid(w0 + l_w)       k = k' (1 + (a - 1) k_a)
                and what the rule reads: r, log w, k, v, -a kk, kk
    toward      v = v' + (v_first - v') sigmoid(v0 + l_v)
    finish      y = g (w n + b + (r . (r_k k)) v)        n = (o - mean o) / sqrt(var o + eps) per head

Letters: x_t the input of token t, z_t what maps read, r, k, v receptance (query), key and value, k' the key
before it is scaled, v' the value before it is mixed with v_first, the first layer's, kk the removal key, u
what it is made of, a the strength of removal, w the decay, g the gate, a0, w0 and v0 biases, l_a, l_w and l_v
what is added to them, k_k, k_a, r_k learned vectors, e Euler's number, o what the rule reads out, n its norm,
w and b in the last line the norm's weight and bias, eps and e_k small numbers, e_k mostly 0, y the output. Of
shapes: B row, T time, D channels, H heads, K dims of a head.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


LEAST_LOG_DECAY = -math.exp(-0.5)
"""What log w is above."""


def beside(
    x_BTD: Float[Tensor, "b t d"], last_BD: Float[Tensor, "b d"], *, form: str = "parallel"
) -> Float[Tensor, "b t 2*d"]:
    """Each token beside the one before it, `last_BD` before the first."""
    if form == "kernel":
        return kernel_of(beside)(x_BTD, last_BD)
    before_BTD = torch.cat((last_BD[:, None].to(x_BTD.dtype), x_BTD[:, :-1]), dim=1)
    return torch.cat((x_BTD, before_BTD), dim=-1)


def prepare(
    rkv_BTE: Float[Tensor, "b t e"],
    w_BTD: Float[Tensor, "b t d"],
    a_BTD: Float[Tensor, "b t d"],
    w0_D: Float[Tensor, "d"],
    a0_D: Float[Tensor, "d"],
    k_k_D: Float[Tensor, "d"],
    k_a_D: Float[Tensor, "d"],
    heads: int,
    key_eps: float = 0.0,
    *,
    form: str = "parallel",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """r, log w, k, v, -a kk and kk, each (B, T, H, K).

    All but r are in at least fp32, since decay and removal decide what is kept over thousands of tokens; the
    kernel rounds all but log w to the dtype of r.

    Args:
        rkv_BTE: r, k' and v side by side.
        w_BTD, a_BTD: what w0 and a0 are added to.
        key_eps: added to the squared length of u; with 0 a length below 1e-12 counts as that.
    """
    if form == "kernel":
        return kernel_of(prepare)(rkv_BTE, w_BTD, a_BTD, w0_D, a0_D, k_k_D, k_a_D, heads, key_eps)
    dtype = torch.promote_types(rkv_BTE.dtype, torch.float32)
    r, k, v = rkv_BTE.chunk(3, dim=-1)
    w = w_BTD.to(dtype) + w0_D.to(dtype)
    a = (a_BTD.to(dtype) + a0_D.to(dtype)).sigmoid()
    kk = k.to(dtype) * k_k_D.to(dtype)
    k = k * (1 + (a - 1) * k_a_D.to(dtype))
    r, w, k, v, a, kk = (u.unflatten(-1, (heads, -1)) for u in (r, w, k, v.to(dtype), a, kk))
    if key_eps:
        kk = kk * (kk.square().sum(-1, keepdim=True) + key_eps).rsqrt()
    else:
        kk = F.normalize(kk, dim=-1)
    return r, LEAST_LOG_DECAY * w.sigmoid(), k, v, -a * kk, kk


def toward(
    v_BTHK: Float[Tensor, "b t h k"],
    first_BTD: Float[Tensor, "b t h*k"],
    mix_BTD: Float[Tensor, "b t h*k"],
    v0_D: Float[Tensor, "h*k"],
) -> Float[Tensor, "b t h k"]:
    """Values mixed with the first layer's, channel by channel: the value residual.

    In at least fp32 within, in the dtype of v without.

    Args:
        mix_BTD: what v0 is added to.
    """
    dtype, split = torch.promote_types(v_BTHK.dtype, torch.float32), v_BTHK.shape[2:]
    mix_BTHK = (mix_BTD.to(dtype) + v0_D.to(dtype)).sigmoid().unflatten(-1, split)
    return torch.lerp(v_BTHK.to(dtype), first_BTD.to(dtype).unflatten(-1, split), mix_BTHK).to(v_BTHK.dtype)


def finish(
    o_BTHK: Float[Tensor, "b t h k"],
    r_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHK: Float[Tensor, "b t h k"],
    g_BTD: Float[Tensor, "b t h*k"],
    weight_D: Float[Tensor, "h*k"],
    bias_D: Float[Tensor, "h*k"],
    r_k_HK: Float[Tensor, "h k"],
    eps: float,
    *,
    form: str = "parallel",
) -> Float[Tensor, "b t h*k"]:
    """What the normalised output and the bonus of the token itself are together, behind the gate.

    In at least fp32 within, in the dtype of g without.
    """
    if form == "kernel":
        return kernel_of(finish)(o_BTHK, r_BTHK, k_BTHK, v_BTHK, g_BTD, weight_D, bias_D, r_k_HK, eps)
    dtype = torch.promote_types(g_BTD.dtype, torch.float32)
    n_BTHK = F.layer_norm(o_BTHK, o_BTHK.shape[-1:], eps=eps)
    y_BTD = torch.addcmul(bias_D.to(dtype), n_BTHK.flatten(2), weight_D.to(dtype))
    bonus_BTHK = (r_BTHK * k_BTHK * r_k_HK.to(dtype)).sum(-1, keepdim=True) * v_BTHK
    return (g_BTD * (y_BTD + bonus_BTHK.flatten(2))).to(g_BTD.dtype)
