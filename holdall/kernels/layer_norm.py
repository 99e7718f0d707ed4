"""Layer norm and RMS norm on a GPU, for one model or for a population, each member with its own weights.

    u = (x - mean x) / sqrt(var x + eps)        y = w u + b
    dx = (g - mean g - u mean(g u)) / sqrt(var x + eps),  g = w dy        dw = sum_n dy u        db = sum_n dy

RMS norm has neither b nor the means of x and g, and the mean of x^2 for the variance.

Memory traffic: forward reads x and writes y, backward reads x and dy and writes dx; mean and variance are
recomputed from x, which is read anyway. 4 x 65,536 rows of width 128 in bf16 are 67 MB per tensor: 0.045 and
0.067 ms at 3.0 TB/s. Under `vmap` PyTorch multiplies, adds and sums in separate passes, and its kernel uses
one thread block per row, most of whose threads are idle at such widths: 0.7 ms in all.

Behind a residual stream, r' = r + x and y = norm(r') are one kernel, which has no gradients: it reads r and x
and writes r' and y, in decoding with r in fp32 and x in bf16 4 + 2 + 4 + 2 bytes an element. PyTorch's sum,
weight's cast, norm and result's cast are four kernels and 26 bytes an element. 128 rows of 1792 are 2.8 MB,
1 us: launches are what is saved, 3 of 4, twice a layer.

A program has a tile of rows. In the backward it loops over several tiles and accumulates its part of dw and
db; a second reduction over programs completes them, without atomics, so that results are deterministic.

Letters: M members (1 outside of `vmap`), N rows, D width, Q programs.
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

MAX_WIDTH = 8192
"""Largest width: a row is in the registers of one program."""
TILE = 2048
"""Elements per tile, at least one row."""
PROGRAMS = 1024
"""Programs of the backward pass, all members together: enough to fill a GPU, few enough to sum over."""


def kernel_refusal(width: int) -> str:
    """Why there is no kernel for rows of this width; empty if there is one."""
    return f"the kernel takes a width of at most {MAX_WIDTH}, not {width}" if width > MAX_WIDTH else ""


def layer_norm(
    x: Float[Tensor, "*b d"],
    weight_D: Float[Tensor, "d"],
    bias_D: Float[Tensor, "d"],
    eps: float,
    dtype: torch.dtype,
) -> Float[Tensor, "*b d"]:
    """What `torch.nn.functional.layer_norm` gives along the last dimension, in `dtype`.

    Tensors may be of different dtypes; statistics and sums are in fp32.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(x, weight_D, bias_D)
    return _forward(x.reshape(1, -1, x.shape[-1]), weight_D[None], bias_D[None], eps, dtype).view(x.shape)


def rms_norm(
    x: Float[Tensor, "*b d"], weight_D: Float[Tensor, "d"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*b d"]:
    """`torch.nn.functional.rms_norm` along the last dimension, with output in `dtype`.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(x, weight_D)
    return _forward(x.reshape(1, -1, x.shape[-1]), weight_D[None], None, eps, dtype).view(x.shape)


def add_norm(
    r: Float[Tensor, "*b d"],
    x: Float[Tensor, "*b d"],
    weight_D: Float[Tensor, "d"],
    bias_D: Float[Tensor, "d"] | None,
    eps: float,
    dtype: torch.dtype,
    *,
    inplace: bool = False,
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d"]]:
    """The kernel form of `holdall.ops.layer_norm.add_norm`, which documents the arguments; no gradients.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(r, x, weight_D, bias_D)
    if inplace and r.is_contiguous():
        return r, _add_inplace(r, x, weight_D, bias_D, eps, dtype)
    return _add(r, x, weight_D, bias_D, eps, dtype)


@torch.library.custom_op("holdall::layer_norm_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer norm; RMS norm if there is no bias."""
    x_MND, y_MND = x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    (members, rows, width), config = x.shape, _config(x.shape[2])
    if x.numel():
        _forward_kernel[cdiv(rows, config["BLOCK"]), members](
            x_MND, weight.contiguous(), bias, y_MND, rows, eps, WIDTH=width, **config
        )
    return y_MND


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@once_differentiable()
@torch.library.custom_op("holdall::layer_norm_backward", mutates_args=())
def _backward(x: Tensor, weight: Tensor, dy: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """dx, and dw and db in fp32, (M, 2, D)."""
    x_MND, dx_MND = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (members, rows, width), config = x.shape, _config(x.shape[2])
    if not x.numel():
        return dx_MND, torch.zeros((members, 2, width), device=x.device)
    tiles = cdiv(rows, config["BLOCK"])
    tiles_each = cdiv(tiles, max(1, PROGRAMS // members))
    programs = cdiv(tiles, tiles_each)
    sums_MQ2D = torch.empty((members, programs, 2, width), device=x.device)
    _backward_kernel[programs, members](
        x_MND, weight.contiguous(), dy.contiguous(), dx_MND, sums_MQ2D, rows, tiles_each, eps,
        WIDTH=width, CENTRED=centred, **config,
    )  # fmt: skip
    return dx_MND, sums_MQ2D.sum(1)


@_backward.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2, x.shape[2]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, sums_M2D = _backward(x, weight, dy, ctx.eps, ctx.bias_dtype is not None)
    dbias = None if ctx.bias_dtype is None else sums_M2D[:, 1].to(ctx.bias_dtype)
    return dx, sums_M2D[:, 0].to(weight.dtype), dbias, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


def _launch_add(
    r: Tensor, x: Tensor, sum_: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Writes the sum, contiguous, which may be r itself; returns its norm."""
    y, width = torch.empty(r.shape, dtype=dtype, device=r.device), r.shape[-1]
    r_ND, x_ND = _rows(r), _rows(x)
    if r.numel():
        config = _config(width)
        _add_kernel[(cdiv(len(r_ND), config["BLOCK"]),)](
            r_ND, x_ND, sum_, weight.contiguous(), None if bias is None else bias.contiguous(), y,
            r_ND.stride(0), x_ND.stride(0), len(r_ND), eps, WIDTH=width, **config, **overlapped(r.device),
        )  # fmt: skip
    return y


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D) where it is, if its rows have one stride and lie each in one piece."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()


@torch.library.custom_op("holdall::add_norm", mutates_args=())
def _add(
    r: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    sum_ = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    return sum_, _launch_add(r, x, sum_, weight, bias, eps, dtype)


@_add.register_fake
def _(
    r: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return r.new_empty(r.shape), r.new_empty(r.shape, dtype=dtype)


@torch.library.custom_op("holdall::add_norm_inplace", mutates_args=("r",))
def _add_inplace(
    r: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    return _launch_add(r, x, r, weight, bias, eps, dtype)


@_add_inplace.register_fake
def _(r: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return r.new_empty(r.shape, dtype=dtype)


def _config(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "BLOCK": max(1, TILE // padded), "num_warps": 4 if padded <= 2048 else 8}


@triton.jit
def _normalised(x_ptr, at, here, real_d, eps, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    """A tile of u, zero where masked, and each row's 1 / sqrt(var + eps)."""
    return _normalise(tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32), real_d, eps, WIDTH, CENTRED)


@triton.jit
def _normalise(x, real_d, eps, WIDTH: tl.constexpr, CENTRED: tl.constexpr):
    if CENTRED:
        x = tl.where(real_d, x - tl.sum(x, 1)[:, None] / WIDTH, 0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps)
    return x * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def _add_kernel(
    r_ptr, x_ptr, sum_ptr, weight_ptr, bias_ptr, y_ptr, r_row, x_row, rows, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    row = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    d = tl.arange(0, PADDED)
    real_d = (d < WIDTH)[None, :]
    here = (row < rows) & real_d
    at = row * WIDTH + d[None, :]
    r = tl.load(r_ptr + row * r_row + d[None, :], mask=here, other=0.0).to(tl.float32)
    r += tl.load(x_ptr + row * x_row + d[None, :], mask=here, other=0.0).to(tl.float32)
    rounded = narrow(r, sum_ptr.dtype.element_ty)
    tl.debug_barrier()  # the sum may overwrite r: all threads must have read before the first writes
    tl.store(sum_ptr + at, rounded, mask=here)
    u, _ = _normalise(rounded.to(tl.float32), real_d, eps, WIDTH, bias_ptr is not None)
    y = u * tl.load(weight_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, PADDED)
    real_d = d[None, :] < WIDTH
    here = (row[:, None] < rows) & real_d
    at = (member * rows + row[:, None]) * WIDTH + d[None, :]
    u, _ = _normalised(x_ptr, at, here, real_d, eps, WIDTH, bias_ptr is not None)
    weight = tl.load(weight_ptr + member * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    y = u * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + member * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows", "tiles_each"])
def _backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, sums_ptr, rows, tiles_each, eps,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, PADDED)
    real_d = d[None, :] < WIDTH
    weight = tl.load(weight_ptr + member * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    dw, db = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK, PADDED), tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(rows, BLOCK))):
        row = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        here = (row[:, None] < rows) & real_d
        at = (member * rows + row[:, None]) * WIDTH + d[None, :]
        u, scale = _normalised(x_ptr, at, here, real_d, eps, WIDTH, CENTRED)
        dy = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        g = dy * weight[None, :]
        away = u * (tl.sum(g * u, 1)[:, None] / WIDTH)
        if CENTRED:
            away += tl.sum(g, 1)[:, None] / WIDTH
        tl.store(dx_ptr + at, narrow((g - away) * scale[:, None], dx_ptr.dtype.element_ty), mask=here)
        dw += dy * u
        db += dy
    sums_ptr += (member * tl.num_programs(0) + tl.program_id(0)) * 2 * WIDTH + d
    tl.store(sums_ptr, tl.sum(dw, 0), mask=d < WIDTH)
    tl.store(sums_ptr + WIDTH, tl.sum(db, 0), mask=d < WIDTH)
