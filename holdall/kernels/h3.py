"""H3 between its projections on a GPU, for short rows, whose state spaces are matrix products.

    k~ = M_shift k        m_ij = M_memory (k~_i v_j)        y_j = sum_i q_i m_ij        per head, i and j < r

with each state space as the Toeplitz matrix of its kernel, its skip on the diagonal: products on tensor cores
in the dtype of the activations with sums in fp32. Memory traffic, in elements per token and channel with r
keys and values per head: the shift 4 (the bias of k is added before it), the outer product 2 + r, its
convolution 2 r, reading 2 + r; backward 2 + 2 r, 4 r, 4 + r, 4 and 3 for the sums of the biases. At r = 2,
262,144 tokens of 128 channels in bf16 (67 MB): 16 and 29 passes, 1.2 ms at 2.5 TB/s. FFTs in fp32 of rows
twice as long, complex products and layout changes take some 200 such passes.

All tensors are channels-first (holdall/kernels/channels_first.py), so that both state spaces are batched
products of contiguous matrices and the two kernels here access memory contiguously: a program has a head and
some tokens.

Letters: M members (1 outside of `vmap`), D channels, H heads, R keys and values of each, B row, T and S
times, C = 3 D channels of q, k and v, X = B T tokens.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import KernelError, require_kernel
from holdall.kernels import alignment, cdiv, channels_first, register_batch_vmap
from holdall.kernels.language import append, narrow
from holdall.kernels.toeplitz import convolve, pull_on_matrix, toeplitz
from holdall.ops.derivatives import once_differentiable
from holdall.ops.ssm import diagonal_kernel

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

MAX_HEAD_DIM = 8
"""Largest r: a program has r keys and r values of its tokens in registers."""
BLOCK = 1024
"""Tokens per program; a quarter of it if r > 4."""


def kernel_refusal(head_dim: int) -> str:
    """Why there is no kernel for this head dimension; empty if there is one."""
    return (
        "" if head_dim <= MAX_HEAD_DIM else f"the kernel takes head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
    )


def h3(
    x_BTD: Float[Tensor, "b t d"],
    qkv_weight_ED: Float[Tensor, "3*d d"],
    qkv_bias_E: Float[Tensor, "3*d"],
    shift_DL: Float[Tensor, "d l"],
    shift_skip_D: Float[Tensor, "d"],
    memory: tuple[Tensor, Tensor, Tensor],
    memory_skip_H: Float[Tensor, "h"],
    out_weight_DD: Float[Tensor, "d d"],
    out_bias_D: Float[Tensor, "d"],
) -> Float[Tensor, "b t d"]:
    """Whole short rows: both state spaces as products with the matrices of their kernels.

    Raises KernelError if no kernel can run on these tensors, or for this head dimension.
    """
    length = x_BTD.shape[1]
    shift_DL = F.pad(shift_DL, (0, max(length - shift_DL.shape[1], 0)))[:, :length]
    memory_HL = diagonal_kernel(*memory, length)
    qkv_CBT = channels_first.into_channels(x_BTD, qkv_weight_ED)
    matrices = (
        toeplitz(torch.cat((kernel[:, :1] + skip[:, None], kernel[:, 1:]), dim=1), qkv_CBT.dtype)
        for kernel, skip in ((shift_DL, shift_skip_D), (memory_HL, memory_skip_H))
    )
    y_DBT = remember(qkv_CBT, qkv_bias_E, *matrices)
    return channels_first.out_of_channels(y_DBT, out_weight_DD, out_bias_D)


def remember(
    qkv_CBT: Float[Tensor, "c b t"],
    bias_C: Float[Tensor, "c"],
    shift_DTS: Float[Tensor, "d t t"],
    memory_HTS: Float[Tensor, "h t t"],
) -> Float[Tensor, "d b t"]:
    """What queries read from the memory of shifted keys and values, from an empty state.

    Args:
        qkv_CBT: queries, keys and values without their bias, bias_C; channel h r + i of each is dimension i
            of head h.
        shift_DTS, memory_HTS: the state spaces with their skips as matrices (holdall/kernels/toeplitz.py).

    Returns:
        y, value i of head h in channel i H + h.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(qkv_CBT, bias_C, shift_DTS, memory_HTS)
    if why := kernel_refusal(shift_DTS.shape[0] // memory_HTS.shape[0]):
        raise KernelError(why)
    return _forward(qkv_CBT[None], bias_C[None], shift_DTS[None], memory_HTS[None])[0][0]


@torch.library.custom_op("holdall::h3_forward", mutates_args=())
def _forward(
    qkv: Tensor, bias: Tensor, shift: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; and for the backward k~, its products with v, and the outputs of the memory."""
    qkv, bias = qkv.contiguous(), bias.contiguous()
    y, shifted, products, recalled = _outputs(qkv, memory)
    if not qkv.numel():
        return y, shifted, products, recalled
    convolve(_biased_keys(qkv, bias), shift, shifted)
    grid, sizes = _launch(qkv, memory)
    _outer_kernel[grid](qkv, bias, shifted, products, **sizes)
    convolve(products.flatten(2, 4), memory, recalled.flatten(2, 4))
    _read_kernel[grid](qkv, bias, recalled, y, **sizes)
    return y, shifted, products, recalled


def _outputs(qkv: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (members, channels, batch, length), heads = qkv.shape, memory.shape[1]
    width = channels // 3
    each, dim = (members, width, batch, length), width // heads
    pairs = (members, heads, dim, dim, batch, length)
    return qkv.new_empty(each), qkv.new_empty(each), qkv.new_empty(pairs), qkv.new_empty(pairs)


@_forward.register_fake
def _(qkv: Tensor, bias: Tensor, shift: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(qkv, memory)


@once_differentiable()
@torch.library.custom_op("holdall::h3_backward", mutates_args=())
def _backward(
    qkv: Tensor, bias: Tensor, shift: Tensor, memory: Tensor,
    shifted: Tensor, products: Tensor, recalled: Tensor, dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the inputs."""
    qkv, bias = qkv.contiguous(), bias.contiguous()
    dqkv = torch.empty_like(qkv)
    if not qkv.numel():
        return dqkv, torch.zeros_like(bias), torch.zeros_like(shift), torch.zeros_like(memory)
    grid, sizes = _launch(qkv, memory)
    drecalled = torch.empty_like(recalled)
    _read_backward_kernel[grid](qkv, bias, recalled, dy.contiguous(), dqkv, drecalled, **sizes)
    dmemory = pull_on_matrix(drecalled.flatten(2, 4), products.flatten(2, 4))
    dproducts = torch.empty_like(products)
    convolve(drecalled.flatten(2, 4), memory.mT, dproducts.flatten(2, 4))
    dshifted = torch.empty_like(shifted)
    _outer_backward_kernel[grid](qkv, bias, shifted, dproducts, dqkv, dshifted, **sizes)
    dshift = pull_on_matrix(dshifted, _biased_keys(qkv, bias))
    convolve(dshifted, shift.mT, dqkv.chunk(3, dim=1)[1])
    return dqkv, dqkv.flatten(2).sum(2, dtype=torch.float32).to(bias.dtype), dshift, dmemory


@_backward.register_fake
def _(qkv, bias, shift, memory, shifted, products, recalled, dy):
    return tuple(each.new_empty(each.shape) for each in (qkv, bias, shift, memory))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    return _backward(*ctx.saved_tensors, dy)


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


def _biased_keys(qkv: Tensor, bias: Tensor) -> Tensor:
    return qkv.chunk(3, dim=1)[1] + bias.chunk(3, dim=1)[1][..., None, None].to(qkv.dtype)


def _launch(qkv: Tensor, memory: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the constants of all kernels."""
    (members, channels, batch, length), heads = qkv.shape, memory.shape[1]
    tokens, align, dim = batch * length, alignment(batch * length), channels // 3 // heads
    block = BLOCK if dim <= 4 else BLOCK // 4
    sizes = {
        "tokens": tokens // align,
        "heads": heads,
        "R": dim,
        "ALIGN": align,
        "BLOCK": block,
        "num_warps": 4,
    }
    return (members * heads * cdiv(tokens, block),), sizes


# ---------------------------------------------------------------------------------------------- the kernels

SIZES = ["tokens", "heads"]
"""`tokens` are in units of ALIGN, so that the compiler knows that they are a multiple."""


@triton.jit
def _place(tokens, heads, BLOCK: tl.constexpr):
    """Member, head and tokens of a program."""
    blocks = tl.cdiv(tokens, BLOCK)
    member = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    return member, head, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _rows(pointer, first, stride, x, tokens, R: tl.constexpr):
    """R channels of these tokens as a tuple, fp32."""
    rows = ()
    for i in tl.static_range(R):
        row = tl.load(pointer + (first + i * stride) * tokens + x, mask=x < tokens, other=0.0)
        rows = append(rows, row.to(tl.float32))
    return rows


@triton.jit
def _biased(qkv_ptr, bias_ptr, first, x, tokens, R: tl.constexpr):
    """R channels of q, k or v, with their biases."""
    rows = ()
    for i in tl.static_range(R):
        row = tl.load(qkv_ptr + (first + i) * tokens + x, mask=x < tokens, other=0.0).to(tl.float32)
        rows = append(rows, row + tl.load(bias_ptr + first + i).to(tl.float32))
    return rows


@triton.jit
def _store(pointer, row, value, x, tokens):
    value = narrow(value, pointer.dtype.element_ty)
    tl.store(pointer + row * tokens + x, value, mask=x < tokens)


@triton.jit(do_not_specialize=SIZES)
def _outer_kernel(
    qkv_ptr, bias_ptr, shifted_ptr, products_ptr, tokens, heads,
    R: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens *= ALIGN
    m, h, x = _place(tokens, heads, BLOCK)
    k = _rows(shifted_ptr, (m * heads + h) * R, 1, x, tokens, R)
    v = _biased(qkv_ptr, bias_ptr, ((m * 3 + 2) * heads + h) * R, x, tokens, R)
    for i in tl.static_range(R):
        for j in tl.static_range(R):
            _store(products_ptr, ((m * heads + h) * R + i) * R + j, k[i] * v[j], x, tokens)


@triton.jit(do_not_specialize=SIZES)
def _outer_backward_kernel(
    qkv_ptr, bias_ptr, shifted_ptr, dproducts_ptr, dqkv_ptr, dshifted_ptr, tokens, heads,
    R: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens *= ALIGN
    m, h, x = _place(tokens, heads, BLOCK)
    k = _rows(shifted_ptr, (m * heads + h) * R, 1, x, tokens, R)
    of_v = ((m * 3 + 2) * heads + h) * R
    v = _biased(qkv_ptr, bias_ptr, of_v, x, tokens, R)
    dv = ()
    for _ in tl.static_range(R):
        dv = append(dv, tl.zeros((BLOCK,), tl.float32))
    for i in tl.static_range(R):
        dproducts = _rows(dproducts_ptr, ((m * heads + h) * R + i) * R, 1, x, tokens, R)
        dk = tl.zeros((BLOCK,), tl.float32)
        sums = ()
        for j in tl.static_range(R):
            dk += dproducts[j] * v[j]
            sums = append(sums, dv[j] + dproducts[j] * k[i])
        dv = sums
        _store(dshifted_ptr, (m * heads + h) * R + i, dk, x, tokens)
    for j in tl.static_range(R):
        _store(dqkv_ptr, of_v + j, dv[j], x, tokens)


@triton.jit(do_not_specialize=SIZES)
def _read_kernel(
    qkv_ptr, bias_ptr, recalled_ptr, y_ptr, tokens, heads,
    R: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens *= ALIGN
    m, h, x = _place(tokens, heads, BLOCK)
    q = _biased(qkv_ptr, bias_ptr, (m * 3 * heads + h) * R, x, tokens, R)
    for j in tl.static_range(R):
        recalled = _rows(recalled_ptr, (m * heads + h) * R * R + j, R, x, tokens, R)
        y = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(R):
            y += q[i] * recalled[i]
        _store(y_ptr, (m * R + j) * heads + h, y, x, tokens)


@triton.jit(do_not_specialize=SIZES)
def _read_backward_kernel(
    qkv_ptr, bias_ptr, recalled_ptr, dy_ptr, dqkv_ptr, drecalled_ptr, tokens, heads,
    R: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens *= ALIGN
    m, h, x = _place(tokens, heads, BLOCK)
    of_q, of_pairs = (m * 3 * heads + h) * R, (m * heads + h) * R * R
    q = _biased(qkv_ptr, bias_ptr, of_q, x, tokens, R)
    dy = _rows(dy_ptr, m * R * heads + h, heads, x, tokens, R)
    for i in tl.static_range(R):
        recalled = _rows(recalled_ptr, of_pairs + i * R, 1, x, tokens, R)
        dq = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(R):
            dq += dy[j] * recalled[j]
            _store(drecalled_ptr, of_pairs + i * R + j, q[i] * dy[j], x, tokens)
        _store(dqkv_ptr, of_q + i, dq, x, tokens)
