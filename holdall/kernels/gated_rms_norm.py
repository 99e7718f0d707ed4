"""RMS norm with a SiLU gate before or after it on a GPU, for one model or for a population.

    v = y [+ D x]
    before    u = v silu(z)    out = w u / r        after    u = v    out = (w u / r) silu(z)
              r = sqrt(mean u^2 + eps)

    g = w dout [silu(z) after]    du = (g - (u / r) mean(g u / r)) / r    dw = sum dout u / r [silu(z) after]
    before    dv = du silu(z)   dz = du v silu'(z)  after    dv = du        dz = dout (w u / r) silu'(z)
    dy = dv     dx = D dv, left to the caller     dD = sum dv x over tokens and the channels of a head

Memory traffic: forward reads y, z and x and writes one tensor; backward reads y, z, x and dout and writes dy
and dz. 4 x 65,536 tokens of 256 channels in bf16 are 134 MB per tensor: 0.18 and 0.27 ms at 3.0 TB/s. In
PyTorch gate, norm and weight are separate passes over fp32 tensors, some 70 elements of 2 bytes for these 10.
D x and D's gradient are computed here in fp32: where D x is most of v, norm and gate hardly depend on D, and
its gradient is a small difference of large values, which would be lost in the rounding of v and dv.

Channels may be in groups, each normalised separately with its own part of w; z, dz and x may be parts of
wider tensors. A program has a tile of tokens of one group. In the backward it loops over several tiles and
accumulates its part of dw and dD, which a second reduction completes, without atomics: deterministic.

Letters: M members (1 outside of `vmap`), N tokens, G groups, D channels of a group, Q programs.
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
from holdall.kernels.layer_norm import PROGRAMS, TILE, rms_norm
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

WARPS = 4


def gated_rms_norm(
    y: Float[Tensor, "*b d"],
    z: Float[Tensor, "*b d"],
    weight_D: Float[Tensor, "d"],
    eps: float,
    *,
    after: bool = False,
) -> Float[Tensor, "*b d"]:
    """weight * rms_norm(y * silu(z)) along the last dimension; weight * rms_norm(y) * silu(z) with `after`.

    Computed in fp32, returned in the dtype of y. Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(y, z, weight_D)
    rows_1ND = (tensor.reshape(1, -1, y.shape[-1]) for tensor in (y, z))
    return _forward(*rows_1ND, weight_D[None], eps, after).view(y.shape)


def norm_heads(
    o_BTHV: Float[Tensor, "b t h v"],
    weight_V: Float[Tensor, "v"],
    eps: float,
    gate_BTE: Float[Tensor, "b t h*v"] | None,
) -> Float[Tensor, "b t h*v"]:
    """RMS norm of each head, times silu of the gate if there is one, in the dtype of o."""
    if gate_BTE is None:
        return rms_norm(o_BTHV, weight_V, eps, o_BTHV.dtype).flatten(2)
    return gated_rms_norm(o_BTHV, gate_BTE.view(o_BTHV.shape), weight_V, eps, after=True).flatten(2)


def launch_forward(
    y_MNE: Tensor, z_MNE: Tensor, weight_ME: Tensor, eps: float, *, x_MNE: Tensor | None = None,
    D_MH: Tensor | None = None, groups: int = 1, after: bool = False,
) -> Tensor:  # fmt: skip
    """Tensors are contiguous, except z and x: these need contiguous channels and one stride of tokens."""
    out_MNE = torch.empty(y_MNE.shape, dtype=y_MNE.dtype, device=y_MNE.device)
    (members, rows, channels), config = y_MNE.shape, _config(y_MNE.shape[2] // groups)
    if y_MNE.numel():
        _forward_kernel[cdiv(rows, config["BLOCK"]), groups, members](
            y_MNE, z_MNE, x_MNE, D_MH, weight_ME, out_MNE,
            _token_stride(z_MNE), _token_stride(x_MNE), rows, eps,
            DIM=_head_dim(y_MNE, D_MH), WIDTH=channels // groups, AFTER=after, **config,
        )  # fmt: skip
    return out_MNE


def launch_backward(
    y_MNE: Tensor, z_MNE: Tensor, weight_ME: Tensor, dout_MNE: Tensor, dz_MNE: Tensor, eps: float,
    *, x_MNE: Tensor | None = None, D_MH: Tensor | None = None, groups: int = 1, after: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dy, and in fp32 dw, (M, E), and dD. Writes dz, whose tokens have one stride too."""
    dy_MNE = torch.empty(y_MNE.shape, dtype=y_MNE.dtype, device=y_MNE.device)
    (members, rows, channels), config = y_MNE.shape, _config(y_MNE.shape[2] // groups)
    if not y_MNE.numel():
        dD = None if D_MH is None else torch.zeros(D_MH.shape, device=y_MNE.device)
        return dy_MNE, torch.zeros((members, channels), device=y_MNE.device), dD
    tiles = cdiv(rows, config["BLOCK"])
    tiles_each = cdiv(tiles, max(1, PROGRAMS // (members * groups)))
    programs = cdiv(tiles, tiles_each)
    sums_KMQE = torch.empty((1 if D_MH is None else 2, members, programs, channels), device=y_MNE.device)
    _backward_kernel[programs, groups, members](
        y_MNE, z_MNE, x_MNE, D_MH, weight_ME, dout_MNE, dy_MNE, dz_MNE, sums_KMQE,
        *map(_token_stride, (z_MNE, x_MNE, dz_MNE)), rows, tiles_each, eps,
        DIM=_head_dim(y_MNE, D_MH), WIDTH=channels // groups, AFTER=after, **config,
    )  # fmt: skip
    sums_KME = sums_KMQE.sum(2)
    dD = None if D_MH is None else sums_KME[1].unflatten(1, (D_MH.shape[1], -1)).sum(2)
    return dy_MNE, sums_KME[0], dD


def _head_dim(y_MNE: Tensor, D_MH: Tensor | None) -> int:
    return 1 if D_MH is None else y_MNE.shape[2] // D_MH.shape[1]


def _token_stride(x_MNE: Tensor | None) -> int:
    if x_MNE is None:
        return 0
    members, rows, _ = x_MNE.shape
    stride = x_MNE.stride(1) if rows > 1 else x_MNE.stride(0)
    assert x_MNE.stride(2) == 1 or x_MNE.shape[2] == 1
    assert members == 1 or x_MNE.stride(0) == rows * stride
    return stride


@torch.library.custom_op("holdall::gated_rms_norm_forward", mutates_args=())
def _forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, after: bool) -> Tensor:
    return launch_forward(y.contiguous(), z.contiguous(), weight.contiguous(), eps, after=after)


@_forward.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, after: bool) -> Tensor:
    return y.new_empty(y.shape)


@once_differentiable()
@torch.library.custom_op("holdall::gated_rms_norm_backward", mutates_args=())
def _backward(
    y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, eps: float, after: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dz, and dw in fp32."""
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dy, dweight, _ = launch_backward(
        y.contiguous(), z.contiguous(), weight.contiguous(), dout.contiguous(), dz, eps, after=after
    )
    return dy, dz, dweight


@_backward.register_fake
def _(
    y: Tensor, z: Tensor, weight: Tensor, dout: Tensor, eps: float, after: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.after = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    y, z, weight = ctx.saved_tensors
    dy, dz, dweight = _backward(y, z, weight, dout, ctx.eps, ctx.after)
    return dy, dz, dweight.to(weight.dtype), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


def _config(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    return {"PADDED": padded, "BLOCK": max(1, TILE // padded), "num_warps": WARPS if padded <= 2048 else 8}


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalised(y, z, eps, WIDTH: tl.constexpr, AFTER: tl.constexpr):
    """A tile of u / r, each row's 1 / r, and sigmoid(z)."""
    sigmoid = tl.sigmoid(z)
    u = y if AFTER else y * (z * sigmoid)
    scale = 1 / tl.sqrt(tl.sum(u * u, 1) / WIDTH + eps)[:, None]
    return u * scale, scale, sigmoid


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    y_ptr, z_ptr, x_ptr, d_ptr, weight_ptr, out_ptr, z_row, x_row, rows, eps,
    DIM: tl.constexpr, WIDTH: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, groups, member = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, PADDED)
    here = (row < rows) & (d < WIDTH)[None, :]
    at = ((member * rows + row) * groups + group) * WIDTH + d[None, :]
    y = _load(y_ptr + at, here)
    z = _load(z_ptr + (member * rows + row) * z_row + group * WIDTH + d[None, :], here)
    weight = _load(weight_ptr + (member * groups + group) * WIDTH + d, d < WIDTH)
    if x_ptr is not None:
        x = _load(x_ptr + (member * rows + row) * x_row + group * WIDTH + d[None, :], here)
        y += x * _load(d_ptr + ((member * groups + group) * WIDTH + d) // DIM, d < WIDTH)[None, :]
    out, _, sigmoid = _normalised(y, z, eps, WIDTH, AFTER)
    if AFTER:
        out *= z * sigmoid
    tl.store(out_ptr + at, narrow(out * weight[None, :], out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows", "tiles_each"])
def _backward_kernel(
    y_ptr, z_ptr, x_ptr, d_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, sums_ptr,
    z_row, x_row, dz_row, rows, tiles_each, eps,
    DIM: tl.constexpr, WIDTH: tl.constexpr, AFTER: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, groups, member = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, PADDED)
    weight = _load(weight_ptr + (member * groups + group) * WIDTH + d, d < WIDTH)[None, :]
    dw, dskip = tl.zeros((BLOCK, PADDED), tl.float32), tl.zeros((BLOCK, PADDED), tl.float32)
    if x_ptr is not None:
        skip = _load(d_ptr + ((member * groups + group) * WIDTH + d) // DIM, d < WIDTH)[None, :]
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(rows, BLOCK))):
        row = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        here = (row < rows) & (d < WIDTH)[None, :]
        at = ((member * rows + row) * groups + group) * WIDTH + d[None, :]
        y, dout = _load(y_ptr + at, here), _load(dout_ptr + at, here)
        z = _load(z_ptr + (member * rows + row) * z_row + group * WIDTH + d[None, :], here)
        if x_ptr is not None:
            x = _load(x_ptr + (member * rows + row) * x_row + group * WIDTH + d[None, :], here)
            y += x * skip
        normal, scale, sigmoid = _normalised(y, z, eps, WIDTH, AFTER)
        silu, slope = z * sigmoid, sigmoid + z * sigmoid * (1 - sigmoid)
        to_normal = dout * silu if AFTER else dout
        dw += to_normal * normal
        g = to_normal * weight
        du = (g - normal * (tl.sum(g * normal, 1) / WIDTH)[:, None]) * scale
        if AFTER:
            dy, dz = du, dout * weight * normal * slope
        else:
            dy, dz = du * silu, du * y * slope
        if x_ptr is not None:
            dskip += dy * x
        tl.store(dy_ptr + at, narrow(dy, dy_ptr.dtype.element_ty), mask=here)
        dz_at = (member * rows + row) * dz_row + group * WIDTH + d[None, :]
        tl.store(dz_ptr + dz_at, narrow(dz, dz_ptr.dtype.element_ty), mask=here)
    sums_ptr += ((member * tl.num_programs(0) + tl.program_id(0)) * groups + group) * WIDTH + d
    tl.store(sums_ptr, tl.sum(dw, 0), mask=d < WIDTH)
    if x_ptr is not None:
        sums_ptr += tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * groups * WIDTH
        tl.store(sums_ptr, tl.sum(dskip, 0), mask=d < WIDTH)
