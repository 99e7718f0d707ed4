"""Split a projection into q, k and v, with q and k of unit length per head: one kernel each way.

    q = c u_q r_q        k = u_k r_k        v = u_v        r = 1 / sqrt(|u|^2 + eps) per head and token
    du = r (g - u r^2 (u . g)),  g = c dq or dk        du_v = dv

Memory traffic: the projection is read and as much is written; backward reads both again and writes the
gradient. 262,144 tokens of 3 x 128 channels in bf16 are 0.2 GB, so 0.16 ms and 0.25 ms at 2.45 TB/s. PyTorch
squares, sums, scales and rounds in fp32, makes the heads contiguous and concatenates gradients, each in a
pass of its own.

Letters: N tokens, E channels of the projection, H heads, K key dim, V channels of all values.
"""

from __future__ import annotations

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

TILE = 4096
"""Elements per program."""
EPS = 1e-6


def unit_heads(
    qkv_BTE: Float[Tensor, "b t e"], heads: int, key_dim: int, scale: float
) -> tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t h k"], Float[Tensor, "b t v"]]:
    """q of length `scale` and k of unit length, each with `heads` heads, and the rest of the channels, v.

    As `holdall.ops.delta_rule.unit_length`, rounded to the dtype of the projection.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(qkv_BTE)
    return _forward(qkv_BTE, heads, key_dim, scale)


@torch.library.custom_op("holdall::unit_heads_forward", mutates_args=())
def _forward(qkv: Tensor, heads: int, key_dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.contiguous()
    q, k, v = _outputs(qkv, heads, key_dim)
    _launch(_forward_kernel, qkv, (q, k, v), heads, key_dim, scale)
    return q, k, v


@_forward.register_fake
def _(qkv: Tensor, heads: int, key_dim: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(qkv, heads, key_dim)


@once_differentiable()
@torch.library.custom_op("holdall::unit_heads_backward", mutates_args=())
def _backward(qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float) -> Tensor:
    qkv, (heads, key_dim) = qkv.contiguous(), dq.shape[2:]
    dqkv = torch.empty_like(qkv)
    pulled = dq.contiguous(), dk.contiguous(), dv.contiguous(), dqkv
    _launch(_backward_kernel, qkv, pulled, heads, key_dim, scale)
    return dqkv


@_backward.register_fake
def _(qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _outputs(qkv: Tensor, heads: int, key_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, channels = qkv.shape
    q, k = (qkv.new_empty(rows, length, heads, key_dim) for _ in range(2))
    return q, k, qkv.new_empty(rows, length, channels - 2 * heads * key_dim)


def _launch(
    kernel: Any, qkv: Tensor, others: tuple[Tensor, ...], heads: int, key_dim: int, scale: float
) -> None:
    """One program per block of tokens and head of q or k, or as many channels of v."""
    tokens, padded = qkv.shape[0] * qkv.shape[1], triton.next_power_of_2(key_dim)
    values = qkv.shape[2] - 2 * heads * key_dim
    if tokens:
        block = max(1, TILE // padded)
        kernel[cdiv(tokens, block), 2 * heads + cdiv(values, padded)](
            qkv, *others, tokens, scale, EPS=EPS, H=heads, K=key_dim, V=values, PADDED=padded, BLOCK=block
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, _, _, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    (qkv,) = ctx.saved_tensors
    return _backward(qkv, dq, dk, dv, ctx.scale), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


@triton.jit
def _place(
    tokens, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Offsets of a program's tile in the projection, in q or k, and in v; and its mask."""
    piece = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, PADDED)[None, :]
    v = (piece - 2 * H) * PADDED + c
    at = token * (2 * H * K + V) + tl.where(piece < 2 * H, piece * K + c, 2 * H * K + v)
    real = (token < tokens) & tl.where(piece < 2 * H, c < K, v < V)
    return at, token * (H * K) + piece % H * K + c, token * V + v, real


@triton.jit
def _inverse_length(u, EPS: tl.constexpr):
    return 1 / tl.sqrt(tl.sum(u * u, 1)[:, None] + EPS)


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, tokens, scale, EPS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1)
    at, at_qk, at_v, real = _place(tokens, H, K, V, PADDED, BLOCK)
    if piece < 2 * H:
        u = tl.load(qkv_ptr + at, mask=real, other=0.0).to(tl.float32)
        unit = u * _inverse_length(u, EPS)
        if piece < H:
            tl.store(q_ptr + at_qk, narrow(unit * scale, q_ptr.dtype.element_ty), mask=real)
        else:
            tl.store(k_ptr + at_qk, narrow(unit, k_ptr.dtype.element_ty), mask=real)
    else:
        tl.store(v_ptr + at_v, tl.load(qkv_ptr + at, mask=real, other=0.0), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    qkv_ptr, dq_ptr, dk_ptr, dv_ptr, dqkv_ptr, tokens, scale, EPS: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(1)
    at, at_qk, at_v, real = _place(tokens, H, K, V, PADDED, BLOCK)
    if piece < 2 * H:
        u = tl.load(qkv_ptr + at, mask=real, other=0.0).to(tl.float32)
        if piece < H:
            g = tl.load(dq_ptr + at_qk, mask=real, other=0.0).to(tl.float32) * scale
        else:
            g = tl.load(dk_ptr + at_qk, mask=real, other=0.0).to(tl.float32)
        inverse = _inverse_length(u, EPS)
        unit = u * inverse
        du = inverse * (g - unit * tl.sum(unit * g, 1)[:, None])
        tl.store(dqkv_ptr + at, narrow(du, dqkv_ptr.dtype.element_ty), mask=real)
    else:
        tl.store(dqkv_ptr + at, tl.load(dv_ptr + at_v, mask=real, other=0.0), mask=real)
