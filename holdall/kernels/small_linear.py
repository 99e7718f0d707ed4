"""A linear map with few weights, in fp32 for inputs of any dtype, with or without log sigmoid after it.

    l = W x + b        y = c log sigmoid(l)  or  y = l
    dl = c (1 - sigmoid(l)) dy  or  dy        dx = W^T dl        dW = sum_n dl x^T        db = sum_n dl

Decays, gates and step sizes are such maps: a few outputs, or a rank of 16, which need more precision than
bf16 has. As a matrix product, dW is a few tiles that each sum over all tokens, 32 x 32 in fp32 or 16 x 16 in
bf16: 2.1 and 0.7 ms for 4 x 65,536 tokens. Here each program loops over some of the tokens, and a second
reduction over programs completes dW and db, without atomics, so that results are deterministic.

Memory traffic: x is read and y written, backward x and dy read and dx written. 262,144 tokens of 128 channels
in bf16 are 67 MB: 0.03 and 0.06 ms at 2.45 TB/s; from 16 to 64 in fp32 the larger part is y, 67 MB too.

Products of bf16 are exact in fp32. In products of bf16 with dl, which is fp32, dl is split into two bf16
parts, 16 bits of it: an error of 2^-17, while dx and dW are rounded at 2^-9.

Letters: M members (1 outside of `vmap`), N tokens, D channels, E outputs, Q programs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import cdiv, register_batch_vmap
from holdall.kernels.language import dot, narrow
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

MAX_WEIGHTS = 8192
"""Most weights that a program can hold; with more, PyTorch's product is used, which has enough tiles."""
BLOCK = 64
PROGRAMS = 1056
"""Programs of the backward pass, all members together: eight per multiprocessor of an H100."""


def widened_linear(x: Float[Tensor, "*b d"], weight_ED: Float[Tensor, "e d"]) -> Float[Tensor, "*b e"]:
    """x W^T in fp32; if a program cannot hold the weights, of a product in the dtype of x."""
    return small_linear(x, weight_ED) if _fits(weight_ED) else F.linear(x, weight_ED).float()


def _fits(weight_ED: Tensor) -> bool:
    """Whether a program can hold these weights."""
    outputs, channels = weight_ED.shape
    return _padded(channels) * _padded(outputs) <= MAX_WEIGHTS


def small_linear(
    x: Float[Tensor, "*b d"],
    weight_ED: Float[Tensor, "e d"],
    bias_E: Float[Tensor, "e"] | None = None,
    *,
    log_sigmoid: bool = False,
    scale: float = 1.0,
) -> Float[Tensor, "*b e"]:
    """`torch.nn.functional.linear` in fp32; with a scale, `scale` times its log sigmoid.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(x, weight_ED, bias_E)
    outputs = weight_ED.shape[0]
    if not _fits(weight_ED):
        y = F.linear(x.float(), weight_ED.float(), None if bias_E is None else bias_E.float())
        return scale * F.logsigmoid(y) if log_sigmoid else y
    bias = None if bias_E is None else bias_E[None]
    y = _forward(x.reshape(1, -1, x.shape[-1]), weight_ED.to(x.dtype)[None], bias, scale * log_sigmoid)
    return y.view(*x.shape[:-1], outputs)


@torch.library.custom_op("holdall::small_linear_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The map; with a scale other than 0, scale times its log sigmoid."""
    members, rows, outputs = *x.shape[:2], weight.shape[1]
    y_MNE = torch.empty((members, rows, outputs), device=x.device)
    if y_MNE.numel():
        _forward_kernel[cdiv(rows, BLOCK), members](
            x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), y_MNE,
            rows, scale, LOG_SIGMOID=scale != 0, **_config(x, outputs),
        )  # fmt: skip
    return y_MNE


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[1]), dtype=torch.float32)


@once_differentiable()
@torch.library.custom_op("holdall::small_linear_backward", mutates_args=())
def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dW (M, E, D) and db (M, E) in fp32."""
    (members, rows, channels), outputs = x.shape, weight.shape[1]
    dx_MND = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = cdiv(rows, BLOCK)
    tiles_each = max(1, cdiv(tiles, max(1, PROGRAMS // members)))
    programs = cdiv(tiles, tiles_each)
    dweight_MQED = torch.empty((members, programs, outputs, channels), device=x.device)
    dbias_MQE = torch.empty((members, programs, outputs), device=x.device)
    if dy.numel():
        _backward_kernel[programs, members](
            x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), dy.contiguous(),
            dx_MND, dweight_MQED, dbias_MQE, rows, tiles_each, scale,
            LOG_SIGMOID=scale != 0, **_config(x, outputs),
        )  # fmt: skip
    return dx_MND, dweight_MQED.sum(1), dbias_MQE.sum(1)


@_backward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    sums = weight.new_empty(weight.shape, dtype=torch.float32)
    return x.new_empty(x.shape), sums, sums.new_empty(sums.shape[:2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.scale = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _backward(x, weight, bias, dy, ctx.scale)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _config(x: Tensor, outputs: int) -> dict[str, int]:
    return {
        "D": x.shape[2], "E": outputs, "PADDED_D": _padded(x.shape[2]), "PADDED_E": _padded(outputs),
        "BLOCK": BLOCK, "num_warps": 4 if x.element_size() == 2 else 8, "num_stages": 2,
    }  # fmt: skip


@triton.jit
def _dot_fp32(a, b, dtype: tl.constexpr):
    """a @ b with a in fp32: exact if b is fp32, with the first 16 bits of a if b is bf16."""
    if dtype == tl.bfloat16:
        high = narrow(a, tl.bfloat16)
        low = narrow(a - high.to(tl.float32), tl.bfloat16)
        product = dot(low, b) + dot(high, b)
    else:
        product = dot(a, b.to(tl.float32))
    return product


@triton.jit
def _load_map(
    weight_ptr, bias_ptr, member,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
):  # fmt: skip
    d, e = tl.arange(0, PADDED_D), tl.arange(0, PADDED_E)
    real_ED = (e[:, None] < E) & (d[None, :] < D)
    at_ED = member * E * D + e[:, None] * D + d[None, :]
    weight_ED = tl.load(weight_ptr + at_ED, mask=real_ED, other=0.0)
    bias_E = tl.zeros((PADDED_E,), tl.float32)
    if bias_ptr is not None:
        bias_E += tl.load(bias_ptr + member * E + e, mask=e < E, other=0.0).to(tl.float32)
    return weight_ED, bias_E


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, scale, LOG_SIGMOID: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    weight_ED, bias_E = _load_map(weight_ptr, bias_ptr, member, D, E, PADDED_D, PADDED_E)
    row = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    d, e = tl.arange(0, PADDED_D)[None, :], tl.arange(0, PADDED_E)[None, :]
    x_ND = tl.load(x_ptr + (member * rows + row) * D + d, mask=(row < rows) & (d < D), other=0.0)
    y_NE = dot(x_ND, tl.trans(weight_ED)) + bias_E[None, :]
    if LOG_SIGMOID:
        y_NE = scale * (tl.minimum(y_NE, 0.0) - _log_one_and(tl.exp(-tl.abs(y_NE))))
    tl.store(y_ptr + (member * rows + row) * E + e, y_NE, mask=(row < rows) & (e < E))


@triton.jit
def _log_one_and(x):
    """log(1 + x) for x in [0, 1], accurate for small x: log(u) x / (u - 1) with u = 1 + x rounded."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit(do_not_specialize=["rows", "tiles_each"])
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, tiles_each, scale,
    LOG_SIGMOID: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    weight_ED, bias_E = _load_map(weight_ptr, bias_ptr, member, D, E, PADDED_D, PADDED_E)
    d, e = tl.arange(0, PADDED_D), tl.arange(0, PADDED_E)
    dtype = x_ptr.dtype.element_ty
    dweight_ED, dbias_E = tl.zeros((PADDED_E, PADDED_D), tl.float32), tl.zeros((PADDED_E,), tl.float32)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tl.cdiv(rows, BLOCK))):
        row = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        here_ND, here_NE = (row < rows) & (d[None, :] < D), (row < rows) & (e[None, :] < E)
        at_ND, at_NE = (member * rows + row) * D + d[None, :], (member * rows + row) * E + e[None, :]
        x_ND = tl.load(x_ptr + at_ND, mask=here_ND, other=0.0)
        dl_NE = tl.load(dy_ptr + at_NE, mask=here_NE, other=0.0)
        if LOG_SIGMOID:
            dl_NE *= scale * tl.sigmoid(-dot(x_ND, tl.trans(weight_ED)) - bias_E[None, :])
        dx_ND = _dot_fp32(dl_NE, weight_ED, dtype)
        tl.store(dx_ptr + at_ND, narrow(dx_ND, dtype), mask=here_ND)
        dweight_ED += _dot_fp32(tl.trans(dl_NE), x_ND, dtype)
        dbias_E += tl.sum(dl_NE, 0)
    part = member * tl.num_programs(0) + tl.program_id(0)
    at_ED = (part * E + e[:, None]) * D + d[None, :]
    tl.store(dweight_ptr + at_ED, dweight_ED, mask=(e[:, None] < E) & (d[None, :] < D))
    tl.store(dbias_ptr + part * E + e, dbias_E, mask=e < E)
