"""RWKV-7's operations before and after its delta rule: three kernels each way.

    beside      z_t = [x_t | x_{t-1}]
    prepare     kk = u / |u|, u = k_k k', |u| = sqrt(u . u + e_k), where e_k, a small number, is mostly 0
                a = sigmoid(a0 + l_a)           log w = -e^(-1/2) sigmoid(w0 + l_w)
                k = k' (1 + (a - 1) k_a)        and the inputs of the rule: r, log w, k, v, -a kk, kk
    finish      y = g (w n + b + (r . (r_k k)) v)        n = (o - mean o) / sqrt(var o + eps) per head

The token shift's interpolations are not computed: a linear map of x_t + m (x_{t-1} - x_t) is a linear map of
z_t with weights [W (1 - m) | W m], so that one product gives r, k', v and the low ranks of decay, removal and
gate.

Backward of prepare, with sums over tokens, from the gradients of kk, A = -a kk and the others:

    dl_w = -e^(-1/2) s (1 - s) dlog w,  s = sigmoid(w0 + l_w)            dw0 = sum dl_w
    dl_a = a (1 - a) (k' k_a dk - kk dA)        da0 = sum dl_a           dk_a = sum k' (a - 1) dk
    du = (e - kk (kk . e)) / |u|,  e = dkk - a dA                        dk_k = sum k' du
    dk' = (1 + (a - 1) k_a) dk + k_k du

and of finish, with t the factor that g multiplies, dt = g dy and c = r . (r_k k):

    dg = t dy    dv = c dt    dc = v . dt    dr = dc r_k k    dk = dc r_k r    dr_k = sum dc r k
    dw = sum dt n    db = sum dt    do = (h - mean h - n mean(h n)) / sqrt(var o + eps),  h = w dt

Memory traffic, in tensors of the size of x: beside 3 and 3, prepare 12 and 17 (log w is fp32), finish 6 and
11. 262,144 tokens of 128 channels in bf16 are 67 MB per tensor, 52 of them 1.4 ms at 2.45 TB/s; separate
passes, half of them in fp32, move some 300.

Programs that compute gradients of parameters loop over some tokens of a head each, and a second reduction
completes the sums, without atomics, so that results are deterministic.

Letters: M members (1 outside of `vmap`), B row, T time, N tokens, D channels, H heads, K dims of a head,
Q programs.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import cdiv, register_batch_vmap
from holdall.kernels.language import narrow
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

TILE = 1024
"""Elements per tile, at least one head of one token."""
PROGRAMS = 2112
"""Programs that compute gradients of parameters, in all: 16 per multiprocessor of an H100."""
DECAY = tl.constexpr(math.exp(-0.5))
"""The strongest decay: log w is never below its negative."""


# ------------------------------------------------------------------------------------------------- beside


def beside(x_BTD: Float[Tensor, "b t d"], last_BD: Float[Tensor, "b d"]) -> Float[Tensor, "b t 2*d"]:
    """Each token concatenated with the previous one; `last_BD` precedes the first.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(x_BTD, last_BD)
    return _beside(x_BTD, last_BD.to(x_BTD.dtype))


@torch.library.custom_op("holdall::rwkv_7_beside", mutates_args=())
def _beside(x: Tensor, last: Tensor) -> Tensor:
    rows, length, width = x.shape
    z = x.new_empty(rows, length, 2 * width)
    if z.numel():
        config = _config(width)
        _beside_kernel[(cdiv(rows * length, config["BLOCK"]),)](
            x.contiguous(), last.contiguous(), z, rows, length, D=width, **config
        )
    return z


@_beside.register_fake
def _(x: Tensor, last: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], 2 * x.shape[2])


@once_differentiable()
@torch.library.custom_op("holdall::rwkv_7_beside_backward", mutates_args=())
def _beside_backward(dz: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, width = dz.shape[0], dz.shape[1], dz.shape[2] // 2
    dx, dlast = dz.new_empty(rows, length, width), dz.new_empty(rows, width)
    if dz.numel():
        config = _config(width)
        _beside_backward_kernel[(cdiv(rows * length, config["BLOCK"]),)](
            dz.contiguous(), dx, dlast, rows, length, D=width, **config
        )
    return dx, dlast


@_beside_backward.register_fake
def _(dz: Tensor) -> tuple[Tensor, Tensor]:
    rows, length, width = dz.shape[0], dz.shape[1], dz.shape[2] // 2
    return dz.new_empty(rows, length, width), dz.new_empty(rows, width)


_beside.register_autograd(lambda ctx, dz: _beside_backward(dz))
register_batch_vmap(_beside)
register_batch_vmap(_beside_backward)


@triton.jit(do_not_specialize=["rows", "length"])
def _beside_kernel(
    x_ptr, last_ptr, z_ptr, rows, length, D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    token = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    d = tl.arange(0, PADDED)[None, :]
    here, start = (token < rows * length) & (d < D), token % length == 0
    x = tl.load(x_ptr + token * D + d, mask=here, other=0.0)
    before = tl.load(x_ptr + (token - 1) * D + d, mask=here & (start == 0), other=0.0)
    before += tl.load(last_ptr + token // length * D + d, mask=here & start, other=0.0)
    tl.store(z_ptr + token * (2 * D) + d, x, mask=here)
    tl.store(z_ptr + token * (2 * D) + D + d, before, mask=here)


@triton.jit(do_not_specialize=["rows", "length"])
def _beside_backward_kernel(
    dz_ptr, dx_ptr, dlast_ptr, rows, length, D: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    token = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    d = tl.arange(0, PADDED)[None, :]
    here, t = (token < rows * length) & (d < D), token % length
    dx = tl.load(dz_ptr + token * (2 * D) + d, mask=here, other=0.0).to(tl.float32)
    later = here & (t < length - 1)
    dx += tl.load(dz_ptr + (token + 1) * (2 * D) + D + d, mask=later, other=0.0).to(tl.float32)
    tl.store(dx_ptr + token * D + d, narrow(dx, dx_ptr.dtype.element_ty), mask=here)
    first = here & (t == 0)
    dlast = tl.load(dz_ptr + token * (2 * D) + D + d, mask=first, other=0.0)
    tl.store(dlast_ptr + token // length * D + d, dlast, mask=first)


# ------------------------------------------------------------------------------------------------ prepare


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """r, log w, k, v, -a kk and kk, each (B, T, H, K), log w in fp32 and the others in the dtype of r.

    w0 and a0 are added to w_BTD and a_BTD. Tokens of rkv_BTE may have any stride.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(rkv_BTE, w_BTD, a_BTD, w0_D, a0_D, k_k_D, k_a_D)
    (rows, length, _), channels = rkv_BTE.shape, w_BTD.shape[2]
    weights_4D = torch.stack((w0_D, a0_D, k_k_D, k_a_D))
    found = _prepare(
        *(u.reshape(1, rows * length, -1) for u in (rkv_BTE, w_BTD, a_BTD)), weights_4D[None], heads, key_eps
    )
    r, log_w, k, v, a, kk = (u.view(rows, length, heads, channels // heads) for u in found)
    return r, log_w, k, v, a, kk


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("holdall::rwkv_7_prepare", mutates_args=())
def _prepare(rkv: Tensor, w: Tensor, a: Tensor, weights: Tensor, heads: int, eps: float) -> Six:
    rkv, found = _by_tokens(rkv), _prepared(rkv, w)
    members, tokens, width = w.shape
    if w.numel():
        config = _config(width // heads)
        _prepare_kernel[cdiv(tokens, config["BLOCK"]), heads, members](
            rkv, w.contiguous(), a.contiguous(), weights.contiguous(), *found,
            tokens, rkv.stride(1), eps, D=width, K=width // heads, **config,
        )  # fmt: skip
    return found


@_prepare.register_fake
def _(rkv: Tensor, w: Tensor, a: Tensor, weights: Tensor, heads: int, eps: float) -> Six:
    return _prepared(rkv, w)


@once_differentiable()
@torch.library.custom_op("holdall::rwkv_7_prepare_backward", mutates_args=())
def _prepare_backward(
    rkv: Tensor,
    w: Tensor,
    a: Tensor,
    weights: Tensor,
    dr: Tensor,
    dlog_w: Tensor,
    dk: Tensor,
    dv: Tensor,
    da: Tensor,
    dkk: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first four arguments, the last (M, 4, D) in fp32."""
    rkv = _by_tokens(rkv)
    members, tokens, width = w.shape
    drkv, dw, da_logit = rkv.new_empty(rkv.shape), torch.empty_like(w), torch.empty_like(a)
    if not w.numel():
        return drkv, dw, da_logit, weights.new_zeros(weights.shape, dtype=torch.float32)
    config = _config(width // heads)
    programs, tiles_each = _programs(tokens, heads * members, config["BLOCK"])
    sums_MQ4D = torch.empty((members, programs, 4, width), device=w.device)
    _prepare_backward_kernel[programs, heads, members](
        rkv, *(u.contiguous() for u in (w, a, weights, dr, dlog_w, dk, dv, da, dkk)),
        drkv, dw, da_logit, sums_MQ4D,
        tokens, rkv.stride(1), tiles_each, eps, D=width, K=width // heads, **config,
    )  # fmt: skip
    return drkv, dw, da_logit, sums_MQ4D.sum(1)


@_prepare_backward.register_fake
def _(
    rkv: Tensor,
    w: Tensor,
    a: Tensor,
    weights: Tensor,
    dr: Tensor,
    dlog_w: Tensor,
    dk: Tensor,
    dv: Tensor,
    da: Tensor,
    dkk: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = weights.new_empty(weights.shape, dtype=torch.float32)
    return rkv.new_empty(rkv.shape), w.new_empty(w.shape), a.new_empty(a.shape), sums


def _prepared(rkv: Tensor, w: Tensor) -> Six:
    r, k, v, a, kk = (rkv.new_empty(w.shape) for _ in range(5))
    return r, rkv.new_empty(w.shape, dtype=torch.float32), k, v, a, kk


def _keep_prepare(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _pull_prepare(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    rkv, w, a, weights = ctx.saved_tensors
    drkv, dw, da, dweights = _prepare_backward(rkv, w, a, weights, *grads, ctx.heads, ctx.eps)
    return drkv, dw, da, dweights.to(weights.dtype), None, None


_prepare.register_autograd(_pull_prepare, setup_context=_keep_prepare)
register_batch_vmap(_prepare)
register_batch_vmap(_prepare_backward)


@triton.jit
def _read(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, at, x, mask):
    tl.store(pointer + at, narrow(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _parameter(weights_ptr, number: tl.constexpr, member, c, real, NUMBERS: tl.constexpr, D: tl.constexpr):
    """A parameter of a member, for the channels of a head."""
    return _read(weights_ptr, (member * NUMBERS + number) * D + c, real)[None, :]


@triton.jit
def _removal(k, k_k, eps):
    """u / |u| and 1 / |u|, with |u| as sqrt(u^2 + eps), clamped to at least 1e-12.

    Whatever eps is, the gradient is that of u over a length whose derivative is u / |u|.
    """
    u = k * k_k
    length = tl.sqrt(tl.sum(u * u, 1) + eps)[:, None]
    inverse = 1 / tl.maximum(length, 1e-12)
    return u * inverse, inverse, length > 1e-12


@triton.jit(do_not_specialize=["tokens"])
def _prepare_kernel(
    rkv_ptr, w_ptr, a_ptr, weights_ptr, r_out, log_w_out, k_out, v_out, a_out, kk_out, tokens, stride, eps,
    D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member, k_K = tl.program_id(2).to(tl.int64), tl.arange(0, PADDED)
    real_k, c = k_K < K, tl.program_id(1) * K + k_K
    w0 = _parameter(weights_ptr, 0, member, c, real_k, 4, D)
    a0 = _parameter(weights_ptr, 1, member, c, real_k, 4, D)
    k_k = _parameter(weights_ptr, 2, member, c, real_k, 4, D)
    k_a = _parameter(weights_ptr, 3, member, c, real_k, 4, D)
    token = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    here = (token < tokens) & real_k[None, :]
    at, at_rkv = (member * tokens + token) * D + c[None, :], (member * tokens + token) * stride + c[None, :]
    _write(r_out, at, _read(rkv_ptr, at_rkv, here), here)
    _write(v_out, at, _read(rkv_ptr, at_rkv + 2 * D, here), here)
    k = _read(rkv_ptr, at_rkv + D, here)
    a = tl.sigmoid(_read(a_ptr, at, here) + a0)
    kk, _, _ = _removal(k, k_k, eps)
    _write(log_w_out, at, tl.sigmoid(_read(w_ptr, at, here) + w0) * -DECAY, here)
    _write(k_out, at, k * (1 + (a - 1) * k_a), here)
    _write(a_out, at, -a * kk, here)
    _write(kk_out, at, kk, here)


@triton.jit(do_not_specialize=["tokens", "tiles_each"])
def _prepare_backward_kernel(
    rkv_ptr, w_ptr, a_ptr, weights_ptr, dr_ptr, dlog_w_ptr, dk_ptr, dv_ptr, da_ptr, dkk_ptr,
    drkv_ptr, dw_ptr, da_logit_ptr, sums_ptr, tokens, stride, tiles_each, eps,
    D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member, k_K = tl.program_id(2).to(tl.int64), tl.arange(0, PADDED)
    real_k, c = k_K < K, tl.program_id(1) * K + k_K
    w0 = _parameter(weights_ptr, 0, member, c, real_k, 4, D)
    a0 = _parameter(weights_ptr, 1, member, c, real_k, 4, D)
    k_k = _parameter(weights_ptr, 2, member, c, real_k, 4, D)
    k_a = _parameter(weights_ptr, 3, member, c, real_k, 4, D)
    dw0, da0 = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK, PADDED), tl.float32)
    dk_k, dk_a = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK, PADDED), tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(tokens, BLOCK))):
        token = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        here = (token < tokens) & real_k[None, :]
        at = (member * tokens + token) * D + c[None, :]
        at_k = (member * tokens + token) * stride + D + c[None, :]
        at_rkv = (member * tokens + token) * (3 * D) + c[None, :]
        _write(drkv_ptr, at_rkv, _read(dr_ptr, at, here), here)
        _write(drkv_ptr, at_rkv + 2 * D, _read(dv_ptr, at, here), here)
        s = tl.sigmoid(_read(w_ptr, at, here) + w0)
        dw = s * (s - 1) * DECAY * _read(dlog_w_ptr, at, here)
        _write(dw_ptr, at, dw, here)
        dw0 += dw
        k, dk = _read(rkv_ptr, at_k, here), _read(dk_ptr, at, here)
        a, da = tl.sigmoid(_read(a_ptr, at, here) + a0), _read(da_ptr, at, here)
        kk, inverse, long = _removal(k, k_k, eps)
        da_logit = a * (1 - a) * (k * k_a * dk - kk * da)
        _write(da_logit_ptr, at, da_logit, here)
        da0 += da_logit
        dk_a += k * (a - 1) * dk
        e = _read(dkk_ptr, at, here) - a * da
        du = (e - tl.where(long, kk * tl.sum(kk * e, 1)[:, None], 0.0)) * inverse
        _write(drkv_ptr, at_rkv + D, (1 + (a - 1) * k_a) * dk + k_k * du, here)
        dk_k += k * du
    sums_ptr += (member * tl.num_programs(0) + tl.program_id(0)) * 4 * D
    tl.store(sums_ptr + c, tl.sum(dw0, 0), mask=real_k)
    tl.store(sums_ptr + D + c, tl.sum(da0, 0), mask=real_k)
    tl.store(sums_ptr + 2 * D + c, tl.sum(dk_k, 0), mask=real_k)
    tl.store(sums_ptr + 3 * D + c, tl.sum(dk_a, 0), mask=real_k)


# ------------------------------------------------------------------------------------------------- finish


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
) -> Float[Tensor, "b t h*k"]:
    """The normalised output plus the bonus of the current token, gated.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(o_BTHK, r_BTHK, k_BTHK, v_BTHK, g_BTD, weight_D, bias_D, r_k_HK)
    heads, width = o_BTHK.shape[2], g_BTD.shape[2]
    tensors = (u.reshape(1, -1, width) for u in (o_BTHK, r_BTHK, k_BTHK, v_BTHK, g_BTD))
    weights_3D = torch.stack((weight_D, bias_D, r_k_HK.flatten()))
    return _finish(*tensors, weights_3D[None], heads, eps).view(g_BTD.shape)


@torch.library.custom_op("holdall::rwkv_7_finish", mutates_args=())
def _finish(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor, heads: int, eps: float
) -> Tensor:
    y, (members, tokens, width) = torch.empty(g.shape, dtype=g.dtype, device=g.device), g.shape
    if g.numel():
        config = _config(width // heads)
        _finish_kernel[cdiv(tokens, config["BLOCK"]), heads, members](
            *(u.contiguous() for u in (o, r, k, v, g, weights)), y,
            tokens, eps, D=width, K=width // heads, **config,
        )  # fmt: skip
    return y


@_finish.register_fake
def _(
    o: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weights: Tensor, heads: int, eps: float
) -> Tensor:
    return g.new_empty(g.shape)


@once_differentiable()
@torch.library.custom_op("holdall::rwkv_7_finish_backward", mutates_args=())
def _finish_backward(
    o: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    weights: Tensor,
    dy: Tensor,
    heads: int,
    eps: float,
) -> Six:
    """Gradients of the first six arguments, the last (M, 3, D) in fp32."""
    members, tokens, width = g.shape
    do, dr, dk, dv, dg = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(5))
    if not g.numel():
        return do, dr, dk, dv, dg, weights.new_zeros(weights.shape, dtype=torch.float32)
    config = _config(width // heads)
    programs, tiles_each = _programs(tokens, heads * members, config["BLOCK"])
    sums_MQ3D = torch.empty((members, programs, 3, width), device=g.device)
    _finish_backward_kernel[programs, heads, members](
        *(u.contiguous() for u in (o, r, k, v, g, weights, dy)), do, dr, dk, dv, dg, sums_MQ3D,
        tokens, tiles_each, eps, D=width, K=width // heads, **config,
    )  # fmt: skip
    return do, dr, dk, dv, dg, sums_MQ3D.sum(1)


@_finish_backward.register_fake
def _(
    o: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    weights: Tensor,
    dy: Tensor,
    heads: int,
    eps: float,
) -> Six:
    do, dr, dk, dv, dg = (g.new_empty(g.shape) for _ in range(5))
    return do, dr, dk, dv, dg, weights.new_empty(weights.shape, dtype=torch.float32)


def _keep_finish(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _pull_finish(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    *found, dweights = _finish_backward(*ctx.saved_tensors, dy, ctx.heads, ctx.eps)
    return *found, dweights.to(ctx.saved_tensors[-1].dtype), None, None


_finish.register_autograd(_pull_finish, setup_context=_keep_finish)
register_batch_vmap(_finish)
register_batch_vmap(_finish_backward)


@triton.jit
def _normalised(o, real_k, eps, K: tl.constexpr):
    o = tl.where(real_k[None, :], o - tl.sum(o, 1)[:, None] / K, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(o * o, 1)[:, None] / K + eps))
    return o * scale, scale


@triton.jit(do_not_specialize=["tokens"])
def _finish_kernel(
    o_ptr, r_ptr, k_ptr, v_ptr, g_ptr, weights_ptr, y_ptr, tokens, eps,
    D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member, k_K = tl.program_id(2).to(tl.int64), tl.arange(0, PADDED)
    real_k, c = k_K < K, tl.program_id(1) * K + k_K
    weight = _parameter(weights_ptr, 0, member, c, real_k, 3, D)
    bias = _parameter(weights_ptr, 1, member, c, real_k, 3, D)
    r_k = _parameter(weights_ptr, 2, member, c, real_k, 3, D)
    token = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    here = (token < tokens) & real_k[None, :]
    at = (member * tokens + token) * D + c[None, :]
    n, _ = _normalised(_read(o_ptr, at, here), real_k, eps, K)
    bonus = tl.sum(_read(r_ptr, at, here) * _read(k_ptr, at, here) * r_k, 1)[:, None]
    y = _read(g_ptr, at, here) * (n * weight + bias + bonus * _read(v_ptr, at, here))
    _write(y_ptr, at, y, here)


@triton.jit(do_not_specialize=["tokens", "tiles_each"])
def _finish_backward_kernel(
    o_ptr, r_ptr, k_ptr, v_ptr, g_ptr, weights_ptr, dy_ptr, do_ptr, dr_ptr, dk_ptr, dv_ptr, dg_ptr, sums_ptr,
    tokens, tiles_each, eps,
    D: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member, k_K = tl.program_id(2).to(tl.int64), tl.arange(0, PADDED)
    real_k, c = k_K < K, tl.program_id(1) * K + k_K
    weight = _parameter(weights_ptr, 0, member, c, real_k, 3, D)
    bias = _parameter(weights_ptr, 1, member, c, real_k, 3, D)
    r_k = _parameter(weights_ptr, 2, member, c, real_k, 3, D)
    dweight, dbias = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK, PADDED), tl.float32)
    dr_k = tl.zeros((BLOCK, PADDED), tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(tokens, BLOCK))):
        token = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        here = (token < tokens) & real_k[None, :]
        at = (member * tokens + token) * D + c[None, :]
        n, scale = _normalised(_read(o_ptr, at, here), real_k, eps, K)
        r, k, v = _read(r_ptr, at, here), _read(k_ptr, at, here), _read(v_ptr, at, here)
        dy = _read(dy_ptr, at, here)
        dt = dy * _read(g_ptr, at, here)
        bonus = tl.sum(r * k * r_k, 1)[:, None]
        _write(dg_ptr, at, dy * (n * weight + bias + bonus * v), here)
        _write(dv_ptr, at, dt * bonus, here)
        dbonus = tl.sum(dt * v, 1)[:, None]
        _write(dr_ptr, at, dbonus * k * r_k, here)
        _write(dk_ptr, at, dbonus * r * r_k, here)
        h = dt * weight
        away = tl.sum(h, 1)[:, None] / K + n * (tl.sum(h * n, 1)[:, None] / K)
        _write(do_ptr, at, (h - away) * scale, here)
        dweight += dt * n
        dbias += dt
        dr_k += dbonus * r * k
    sums_ptr += (member * tl.num_programs(0) + tl.program_id(0)) * 3 * D
    tl.store(sums_ptr + c, tl.sum(dweight, 0), mask=real_k)
    tl.store(sums_ptr + D + c, tl.sum(dbias, 0), mask=real_k)
    tl.store(sums_ptr + 2 * D + c, tl.sum(dr_k, 0), mask=real_k)


# -------------------------------------------------------------------------------------------------- shared


def _config(size: int) -> dict[str, int]:
    padded = triton.next_power_of_2(size)
    return {"PADDED": padded, "BLOCK": max(1, TILE // padded), "num_warps": 4}


def _programs(tokens: int, others: int, block: int) -> tuple[int, int]:
    """Programs per head and member, and tiles per program."""
    tiles_each = cdiv(cdiv(tokens, block), max(1, PROGRAMS // others))
    return cdiv(cdiv(tokens, block), tiles_each), tiles_each


def _by_tokens(x_MNE: Tensor) -> Tensor:
    """x, copied unless tokens of all members have one stride and contiguous channels."""
    members, tokens, _ = x_MNE.shape
    apart = x_MNE.stride(0) == tokens * x_MNE.stride(1) or members == 1
    return x_MNE if apart and x_MNE.stride(2) == 1 else x_MNE.contiguous()
