"""Hyena between its projections on a GPU, for short rows, whose convolutions are matrix products.

    s = shortconv(u + b_in), split into x_0 .. x_{n-1}, v
    z_o = x_{n-1-o} v_o      v_{o+1} = M_o z_o      y = x_0 v_{n-1}      for o = 0 .. n - 2, from v_0 = v

with each long filter as the Toeplitz matrix M of its taps, whose first tap includes the skip d. The long
convolutions are batched products on tensor cores in the dtype of the activations, with sums in fp32. The
short ones and the gates are one kernel here, which computes s from u where it is needed, without storing it.

Memory traffic, in elements per token and channel for n = 2: gate of v 3, product 2, gate of c 3; backward 5,
4, and 5. 262,144 tokens of 128 channels in bf16 (67 MB): 8 and 14 passes, 0.6 ms at 2.5 TB/s. PyTorch stores
s, multiplies, adds the skip, splits and concatenates in separate passes, half of them strided, since its
product is channels-first and everything else channels-last: some 90 passes.

A program has a channel and tiles of rows and times; the W - 1 tokens before a tile are in the L1 cache. In
the backward it sums gradients of taps and biases over its tiles, and a second reduction over programs
completes them, without atomics, so that results are deterministic.

Letters: M members (1 outside of `vmap`), D width, U = (n + 1) D channels, E = (n - 1) D long filters, B row,
T and S times, W taps, Q programs of a channel.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract.forms import require_kernel
from holdall.kernels import alignment, cdiv, channels_first, register_batch_vmap
from holdall.kernels.language import append, narrow
from holdall.kernels.toeplitz import convolve, pull_on_matrix, toeplitz
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

FORWARD = {"BLOCK_B": 32, "BLOCK_T": 64, "num_warps": 4}
BACKWARD = {"BLOCK_B": 16, "BLOCK_T": 64, "num_warps": 8}
"""Rows and times of a tile."""
TILES_EACH = 8
"""Tiles per program in the backward pass."""


def hyena(
    x_BTD: Float[Tensor, "b t d"],
    in_weight_UD: Float[Tensor, "u d"],
    in_bias_U: Float[Tensor, "u"],
    short_weight_UW: Float[Tensor, "u w"],
    short_bias_U: Float[Tensor, "u"],
    filter_LE: Float[Tensor, "l e"],
    skip_E: Float[Tensor, "e"],
    out_weight_DD: Float[Tensor, "d d"],
    out_bias_D: Float[Tensor, "d"],
) -> Float[Tensor, "b t d"]:
    """Whole short rows: long convolutions and their skips as products with one matrix each.

    Raises KernelError if no kernel can run on these tensors.
    """
    filter_LE = torch.cat((filter_LE[:1] + skip_E, filter_LE[1:]))
    u_UBT = channels_first.into_channels(x_BTD, in_weight_UD)
    matrices_ETS = toeplitz(filter_LE.T, u_UBT.dtype)
    y_DBT = gated_convolutions(u_UBT, in_bias_U, short_weight_UW, short_bias_U, matrices_ETS)
    return channels_first.out_of_channels(y_DBT, out_weight_DD, out_bias_D)


def gated_convolutions(
    u_UBT: Float[Tensor, "u b t"],
    input_bias_U: Float[Tensor, "u"],
    weight_UW: Float[Tensor, "u w"],
    bias_U: Float[Tensor, "u"],
    matrices_ETS: Float[Tensor, "e t t"],
) -> Float[Tensor, "d b t"]:
    """Everything between Hyena's projections, from an empty state.

    Args:
        u_UBT: output of the first projection without its bias, input_bias_U.
        weight_UW, bias_U: parameters of the short convolution.
        matrices_ETS: long filters and skips as matrices (holdall/kernels/toeplitz.py), in the order
            in which they are used, each of D channels.

    Raises KernelError if no kernel can run on these tensors.
    """
    require_kernel(u_UBT, input_bias_U, weight_UW, bias_U, matrices_ETS)
    return _forward(u_UBT[None], input_bias_U[None], weight_UW[None], bias_U[None], matrices_ETS[None])[0][0]


@torch.library.custom_op("holdall::hyena_forward", mutates_args=())
def _forward(
    u: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y; and for the backward the input and output of every long convolution."""
    call = _Call(u, input_bias, weight, bias, matrices)
    y, gated, convolved = call.outputs()
    if not u.numel():
        return y, gated, convolved
    value = None
    for o in range(call.order - 1):
        into = call.part(gated, o)
        call.gate(call.order - 1 - o, value, into)
        value = call.part(convolved, o)
        convolve(into, call.part(matrices, o), value)
    call.gate(0, value, y)
    return y, gated, convolved


@_forward.register_fake
def _(
    u: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, matrices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _Call(u, input_bias, weight, bias, matrices).outputs()


@once_differentiable()
@torch.library.custom_op("holdall::hyena_backward", mutates_args=())
def _backward(
    u: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, matrices: Tensor,
    gated: Tensor, convolved: Tensor, dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u and of the matrices; and, in fp32, of taps, bias and input bias, (M, U, W + 2)."""
    call = _Call(u, input_bias, weight, bias, matrices)
    du, sums = torch.empty_like(call.u), call.sums()
    if not u.numel():
        return du, torch.zeros_like(matrices), sums.zero_()
    dgated = dy.contiguous()
    dmatrices: list[Tensor] = []
    for o in reversed(range(call.order - 1)):
        dconvolved = torch.empty_like(dgated)
        call.gate_backward(call.order - 2 - o, call.part(convolved, o), dgated, du, dconvolved, sums)
        dmatrices.insert(0, pull_on_matrix(dconvolved, call.part(gated, o)))
        dgated = torch.empty_like(dconvolved)
        convolve(dconvolved, call.part(matrices, o).mT, dgated)
    call.gate_backward(call.order - 1, None, dgated, du, None, sums)
    return du, dmatrices[0] if len(dmatrices) == 1 else torch.cat(dmatrices, 1), sums


@_backward.register_fake
def _(u, input_bias, weight, bias, matrices, gated, convolved, dy):
    call = _Call(u, input_bias, weight, bias, matrices)
    return u.new_empty(u.shape), matrices.new_empty(matrices.shape), call.sums()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
    _, input_bias, weight, bias, *_ = ctx.saved_tensors
    du, dmatrices, sums = _backward(*ctx.saved_tensors, dy)
    taps, of_bias, of_input_bias = sums.split((weight.shape[2], 1, 1), dim=2)
    return (
        du,
        of_input_bias.squeeze(2).to(input_bias.dtype),
        taps.to(weight.dtype),
        of_bias.squeeze(2).to(bias.dtype),
        dmatrices,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


class _Call:
    """The tensors of a call, and the kernels launched on them."""

    def __init__(self, u: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, matrices: Tensor) -> None:
        self.members, channels, self.batch, self.length = u.shape
        self.width = (channels - matrices.shape[1]) // 2
        self.order = channels // self.width - 1
        self.align = alignment(self.length)
        self.u, self.taps = u.contiguous(), weight.shape[2]
        self.weights = input_bias.contiguous(), weight.contiguous(), bias.contiguous()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        each = (self.batch, self.length)
        y = self.u.new_empty((self.members, self.width, *each))
        gated = self.u.new_empty((self.members, (self.order - 1) * self.width, *each))
        return y, gated, torch.empty_like(gated)

    def sums(self) -> Tensor:
        return self.u.new_empty((*self.u.shape[:2], self.taps + 2), dtype=torch.float32)

    def part(self, x: Tensor, i: int) -> Tensor:
        """The i-th block of D channels of a split or, in order of use, of a long convolution."""
        return x[:, i * self.width : (i + 1) * self.width]

    def gate(self, i: int, value: Tensor | None, into: Tensor) -> None:
        """into = x_i value; v without a value."""
        tiles = cdiv(self.batch, FORWARD["BLOCK_B"]) * cdiv(self.length, FORWARD["BLOCK_T"])
        into_channels = into.stride(0) // (self.batch * self.length)
        _forward_kernel[(self.members * self.width * tiles,)](
            self.u, *self.weights, value, into, (self.order - 1) * self.width, into_channels,
            self.batch, self.length // self.align, self.width, i, self.order,
            ALIGN=self.align, W=self.taps, **FORWARD,
        )  # fmt: skip

    def gate_backward(
        self, i: int, value: Tensor | None, dy: Tensor, du: Tensor, dvalue: Tensor | None, sums: Tensor
    ) -> None:
        """The gradients of the i-th block of channels and of value; of v without a value."""
        tiles = cdiv(self.batch, BACKWARD["BLOCK_B"]) * cdiv(self.length, BACKWARD["BLOCK_T"])
        programs = cdiv(tiles, TILES_EACH)
        sums_MDQXK = sums.new_empty((self.members, self.width, programs, 2, self.taps + 2))
        _backward_kernel[(self.members * self.width * programs,)](
            self.u, *self.weights, value, dy, du, dvalue, sums_MDQXK, (self.order - 1) * self.width,
            self.batch, self.length // self.align, self.width, i, self.order, programs,
            ALIGN=self.align, W=self.taps, TILES=TILES_EACH, **BACKWARD,
        )  # fmt: skip
        self.part(sums, i).copy_(sums_MDQXK[:, :, :, 0].sum(2))
        if value is None:
            self.part(sums, self.order).copy_(sums_MDQXK[:, :, :, 1].sum(2))


# ---------------------------------------------------------------------------------------------- the kernels

SIZES = ["batch", "length", "width", "i", "order"]
"""`length` is in units of ALIGN, so that the compiler knows that it is a multiple."""


@triton.jit
def _window(u_ptr, input_bias_ptr, channel, b, t, batch, length, first: tl.constexpr, COUNT: tl.constexpr):
    """A channel's inputs at t + first, t + first + 1, ... as a tuple; zero outside the row."""
    u_ptr += channel * batch * length
    input_bias = tl.load(input_bias_ptr + channel).to(tl.float32)
    window = ()
    for k in tl.static_range(COUNT):
        s = t + (first + k)
        here = (b < batch) & (s >= 0) & (s < length)
        u = tl.load(u_ptr + b * length + s, mask=here, other=0.0).to(tl.float32)
        window = append(window, tl.where(here, u + input_bias, 0.0))
    return window


@triton.jit
def _taps(weight_ptr, channel, W: tl.constexpr):
    taps = ()
    for tap in tl.static_range(W):
        taps = append(taps, tl.load(weight_ptr + channel * W + tap).to(tl.float32))
    return taps


@triton.jit
def _convolve(window, first: tl.constexpr, taps, bias, W: tl.constexpr):
    s = window[first] * taps[0] + bias
    for tap in tl.static_range(1, W):
        s += window[first + tap] * taps[tap]
    return s


@triton.jit(do_not_specialize=["value_channels", "y_channels", *SIZES])
def _forward_kernel(
    u_ptr, input_bias_ptr, weight_ptr, bias_ptr, value_ptr, y_ptr, value_channels, y_channels,
    batch, length, width, i, order,
    ALIGN: tl.constexpr, W: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    length *= ALIGN
    blocks_b, blocks_t = tl.cdiv(batch, BLOCK_B), tl.cdiv(length, BLOCK_T)
    row = tl.program_id(0) // blocks_t // blocks_b
    m, d = (row // width).to(tl.int64), row % width
    b = tl.program_id(0) // blocks_t % blocks_b * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    t = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    here = (b < batch) & (t < length)

    channel = (m * (order + 1) + i) * width + d
    window = _window(u_ptr, input_bias_ptr, channel, b, t, batch, length, 1 - W, W)
    y = _convolve(window, 0, _taps(weight_ptr, channel, W), tl.load(bias_ptr + channel).to(tl.float32), W)
    if value_ptr is None:
        channel = (m * (order + 1) + order) * width + d
        window = _window(u_ptr, input_bias_ptr, channel, b, t, batch, length, 1 - W, W)
        bias = tl.load(bias_ptr + channel).to(tl.float32)
        y *= _convolve(window, 0, _taps(weight_ptr, channel, W), bias, W)
    else:
        value_ptr += (m * value_channels + d) * batch * length
        y *= tl.load(value_ptr + b * length + t, mask=here, other=0.0).to(tl.float32)
    y_ptr += (m * y_channels + d) * batch * length
    tl.store(y_ptr + b * length + t, narrow(y, y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _add_sums(sums, pulled, du, window, W: tl.constexpr):
    """Add to the gradients of taps, bias and input bias, given those of the short convolution and of u."""
    more = ()
    for tap in tl.static_range(W):
        more = append(more, sums[tap] + pulled * window[tap])
    return append(append(more, sums[W] + pulled), sums[W + 1] + du)


@triton.jit(do_not_specialize=["value_channels", *SIZES, "programs"])
def _backward_kernel(
    u_ptr, input_bias_ptr, weight_ptr, bias_ptr, value_ptr, dy_ptr, du_ptr, dvalue_ptr, sums_ptr,
    value_channels, batch, length, width, i, order, programs,
    ALIGN: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    length *= ALIGN
    row = tl.program_id(0) // programs
    m, d = (row // width).to(tl.int64), row % width
    of_gate, of_v = (m * (order + 1) + i) * width + d, (m * (order + 1) + order) * width + d
    gate_taps, gate_bias = _taps(weight_ptr, of_gate, W), tl.load(bias_ptr + of_gate).to(tl.float32)
    v_taps, v_bias = _taps(weight_ptr, of_v, W), tl.load(bias_ptr + of_v).to(tl.float32)
    dy_ptr += (m * width + d) * batch * length
    if value_ptr is not None:
        value_ptr += (m * value_channels + d) * batch * length
    gate_sums, v_sums, zero = (), (), tl.zeros((BLOCK_B, BLOCK_T), tl.float32)
    for _ in tl.static_range(W + 2):
        gate_sums, v_sums = append(gate_sums, zero), append(v_sums, zero)

    blocks_t = tl.cdiv(length, BLOCK_T)
    first = tl.program_id(0) % programs * TILES
    for tile in range(first, tl.minimum(first + TILES, tl.cdiv(batch, BLOCK_B) * blocks_t)):
        b = tile // blocks_t * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
        t = tile % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        here = (b < batch) & (t < length)
        # inputs of the short convolutions that read t
        gate_window = _window(u_ptr, input_bias_ptr, of_gate, b, t, batch, length, 1 - W, 2 * W - 1)
        if value_ptr is None:
            v_window = _window(u_ptr, input_bias_ptr, of_v, b, t, batch, length, 1 - W, 2 * W - 1)
        to_u_gate, to_u_v = tl.zeros_like(zero), tl.zeros_like(zero)
        for tap in tl.static_range(
            W
        ):  # with which the token W - 1 - tap after t reads t; the last is t itself
            then = t + (W - 1 - tap)
            later = (b < batch) & (then < length)
            dy = tl.load(dy_ptr + b * length + then, mask=later, other=0.0).to(tl.float32)
            if value_ptr is None:
                value = _convolve(v_window, W - 1 - tap, v_taps, v_bias, W)
            else:
                value = tl.load(value_ptr + b * length + then, mask=later, other=0.0).to(tl.float32)
            to_gate = dy * value
            to_value = dy * _convolve(gate_window, W - 1 - tap, gate_taps, gate_bias, W)
            to_u_gate += to_gate * gate_taps[tap]
            to_u_v += to_value * v_taps[tap]

        at = b * length + t
        into = du_ptr + of_gate * batch * length + at
        tl.store(into, narrow(to_u_gate, du_ptr.dtype.element_ty), mask=here)
        gate_sums = _add_sums(gate_sums, to_gate, tl.where(here, to_u_gate, 0.0), gate_window, W)
        if value_ptr is None:
            into = du_ptr + of_v * batch * length + at
            tl.store(into, narrow(to_u_v, du_ptr.dtype.element_ty), mask=here)
            v_sums = _add_sums(v_sums, to_value, tl.where(here, to_u_v, 0.0), v_window, W)
        else:
            into = dvalue_ptr + (m * width + d) * batch * length + at
            tl.store(into, narrow(to_value, dvalue_ptr.dtype.element_ty), mask=here)

    sums_ptr += tl.program_id(0).to(tl.int64) * (2 * W + 4)
    for k in tl.static_range(W + 2):
        tl.store(sums_ptr + k, tl.sum(tl.sum(gate_sums[k], 1), 0))
        if value_ptr is None:
            tl.store(sums_ptr + W + 2 + k, tl.sum(tl.sum(v_sums[k], 1), 0))
