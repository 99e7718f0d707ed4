"""SwiGLU on a GPU, one kernel each way, for one model or for a population.

    y = a silu(g)    da = dy silu(g)    dg = dy a silu'(g),   silu'(g) = s + g s (1 - s),   s = sigmoid(g)

Memory traffic in elements per y: forward reads a and g and writes y, 3, where PyTorch's two kernels move 5;
backward reads a, g and dy and writes da and dg, 5, and needs nothing kept but [a | g]. A step of 128 rows
with 3584 channels in bf16 moves 2.8 MB, 1 us: launches are what is saved there.

Letters: N rows, E = 2 I channels of the projection, I of the output.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import cdiv, overlapped, register_batch_vmap
from holdall.kernels.language import narrow, wait_for_inputs
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

BLOCK = 1024
"""Elements of a program: 8 per thread, 16 bytes in bf16."""


def swiglu(projected: Float[Tensor, "*b e"]) -> Float[Tensor, "*b i"]:
    """The kernel form of `holdall.ops.swiglu.swiglu`.

    Raises KernelError if no kernel can run on this tensor.
    """
    require_kernel(projected)
    y_NI = _forward(projected.reshape(-1, projected.shape[-1]))
    return y_NI.view(*projected.shape[:-1], y_NI.shape[-1])


def _in_rows(x_NE: Tensor) -> Tensor:
    """x, copied unless each row lies in one piece."""
    return x_NE if x_NE.stride(1) == 1 else x_NE.contiguous()


def _grid(x_NE: Tensor) -> tuple[int]:
    return (x_NE.shape[0] * cdiv(x_NE.shape[1] // 2, BLOCK),)


@torch.library.custom_op("holdall::swiglu_forward", mutates_args=())
def _forward(x: Tensor) -> Tensor:
    x_NE, inner = _in_rows(x), x.shape[1] // 2
    y_NI = torch.empty((x.shape[0], inner), dtype=x.dtype, device=x.device)
    if y_NI.numel():
        _forward_kernel[_grid(x_NE)](x_NE, y_NI, x_NE.stride(0), inner, BLOCK=BLOCK, **overlapped(x.device))
    return y_NI


@_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@once_differentiable("the same model off the GPU")
@torch.library.custom_op("holdall::swiglu_backward", mutates_args=())
def _backward(x: Tensor, dy: Tensor) -> Tensor:
    x_NE, dy_NI = _in_rows(x), _in_rows(dy)
    dx_NE = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx_NE.numel():
        _backward_kernel[_grid(x_NE)](
            x_NE, dy_NI, dx_NE, x_NE.stride(0), dy_NI.stride(0), x.shape[1] // 2, BLOCK=BLOCK
        )
    return dx_NE


@_backward.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return _backward(x, dy)


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


@triton.jit
def _block(inner, BLOCK: tl.constexpr):
    """A program's row, its channels, and which of these there are."""
    blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, i, i < inner


@triton.jit
def _halves(x_ptr, i, inner, here):
    a = tl.load(x_ptr + i, mask=here, other=0.0).to(tl.float32)
    return a, tl.load(x_ptr + inner + i, mask=here, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(x_ptr, y_ptr, x_row, inner, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr):
    wait_for_inputs(OVERLAPPED)
    row, i, here = _block(inner, BLOCK)
    a, g = _halves(x_ptr + row * x_row, i, inner, here)
    y = a * (g * tl.sigmoid(g))
    tl.store(y_ptr + row * inner + i, narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _backward_kernel(x_ptr, dy_ptr, dx_ptr, x_row, dy_row, inner, BLOCK: tl.constexpr):
    row, i, here = _block(inner, BLOCK)
    a, g = _halves(x_ptr + row * x_row, i, inner, here)
    dy = tl.load(dy_ptr + row * dy_row + i, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    da, dg = dy * (g * sigmoid), dy * a * (sigmoid + g * sigmoid * (1 - sigmoid))
    dx_ptr += row * (2 * inner) + i
    tl.store(dx_ptr, narrow(da, dx_ptr.dtype.element_ty), mask=here)
    tl.store(dx_ptr + inner, narrow(dg, dx_ptr.dtype.element_ty), mask=here)
