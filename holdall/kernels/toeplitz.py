"""Filters as Toeplitz matrices on a GPU, and convolutions of short rows as products with them.

    M_ts = h_{t - s} for s <= t, else 0        dh_j = sum_t dM_{t, t - j}

512 filters of 256 taps are 67 MB of bf16, which cuBLAS may read several times: 0.03 ms to write, and half of
that to read the lower half of dM, whose diagonals are summed in fp32 in order of time. PyTorch's `unfold` and
`flip` copy the matrix, and their backward passes copy it twice and add by index arithmetic.

Letters: N filters, L taps, T and S times, M members, E channels, B row.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import alignment, cdiv, register_batch_vmap
from holdall.kernels.language import narrow
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

BLOCK = 64
"""Rows and columns of a tile."""


def toeplitz(filter_NL: Float[Tensor, "n l"], dtype: torch.dtype) -> Float[Tensor, "n l l"]:
    """M_ts = h_{t - s} of each filter, in `dtype`. Gradients are summed in fp32.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(filter_NL)
    return _forward(filter_NL, dtype)


def convolve(x_MEBS: Tensor, m_METS: Tensor, y_MEBT: Tensor) -> None:
    """y_t = sum_s M_ts x_s per member and channel, written into y; each member's part is contiguous."""
    for x_EBS, m_ETS, y_EBT in zip(x_MEBS, m_METS, y_MEBT, strict=True):
        torch.bmm(x_EBS, m_ETS.mT, out=y_EBT)


def pull_on_matrix(dy_MEBT: Tensor, x_MEBS: Tensor) -> Tensor:
    """The gradient of M, (M, E, T, S), from that of y = M x."""
    dm = torch.bmm(dy_MEBT.flatten(0, 1).mT, x_MEBS.flatten(0, 1))
    return dm.unflatten(0, dy_MEBT.shape[:2])


@torch.library.custom_op("holdall::toeplitz_forward", mutates_args=())
def _forward(filters: Tensor, dtype: torch.dtype) -> Tensor:
    count, length = filters.shape
    m_NTS = torch.empty((count, length, length), dtype=dtype, device=filters.device)
    if m_NTS.numel():
        blocks, align = cdiv(length, BLOCK), alignment(length)
        _forward_kernel[(count * blocks * blocks,)](
            filters.contiguous(), m_NTS, length // align, ALIGN=align, BLOCK=BLOCK, num_warps=4
        )
    return m_NTS


@_forward.register_fake
def _(filters: Tensor, dtype: torch.dtype) -> Tensor:
    return filters.new_empty((*filters.shape, filters.shape[1]), dtype=dtype)


@once_differentiable()
@torch.library.custom_op("holdall::toeplitz_backward", mutates_args=())
def _backward(dm: Tensor) -> Tensor:
    """The sums of the diagonals, (N, L), in fp32."""
    count, length = dm.shape[:2]
    sums_NL = torch.empty((count, length), dtype=torch.float32, device=dm.device)
    if sums_NL.numel():
        align = alignment(length)
        _backward_kernel[(count * cdiv(length, BLOCK),)](
            dm.contiguous(), sums_NL, length // align, ALIGN=align, BLOCK_J=BLOCK, BLOCK_T=32, num_warps=4
        )
    return sums_NL


@_backward.register_fake
def _(dm: Tensor) -> Tensor:
    return dm.new_empty(dm.shape[:2], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _gradients(ctx: Any, dm: Tensor) -> tuple[Tensor, None]:
    return _backward(dm).to(ctx.dtype), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(h_ptr, m_ptr, length, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    length *= ALIGN
    blocks = tl.cdiv(length, BLOCK)
    n = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    t = tl.program_id(0) // blocks % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    s = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = (t < length) & (s < length)
    m = tl.load(h_ptr + n * length + t - s, mask=here & (s <= t), other=0.0).to(tl.float32)
    tl.store(m_ptr + (n * length + t) * length + s, narrow(m, m_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["length"])
def _backward_kernel(
    dm_ptr, sums_ptr, length, ALIGN: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_T: tl.constexpr
):
    length *= ALIGN
    blocks = tl.cdiv(length, BLOCK_J)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_J
    j = first + tl.arange(0, BLOCK_J)
    total = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    for start in range(first, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)[:, None]
        at = (n * length + t) * length + t - j[None, :]
        total += tl.load(dm_ptr + at, mask=(t < length) & (j[None, :] <= t), other=0.0).to(tl.float32)
    tl.store(sums_ptr + n * length + j, tl.sum(total, 0), mask=j < length)
