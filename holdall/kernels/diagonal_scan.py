"""The diagonal scan, h_t = a_t h_{t-1} + b_t per channel: real or complex, with a per token or constant.

A program has BLOCK channels of one row, one channel per lane, and loops over tiles of TILE tokens, which it
loads at once and processes in registers. The gradient runs backwards: with dh_t the incoming gradient of h_t,
and s_t the gradient that h_t passes on to h_{t-1},

    g_t = dh_t + s_{t+1}     s_t = conj(a_t) g_t     grad b_t = g_t     grad a_t = g_t conj(h_{t-1})

A constant ("steady") a is read once, and its gradient is summed over time in registers and over rows by
torch.sum, without atomics, so that results are deterministic. If rows and channels are too few to fill the
GPU, time is also cut into segments: a first launch computes the product of each segment's a and its final
state from a zero start, and the programs of the second start from those of the segments before theirs.

The kernel is memory-bound. In fp32, per token and channel: a, b and h forward, 12 bytes; a, h, dh and the
gradients of a and b backward, 20; for 1024 rows of 256 tokens and 256 channels 0.27 and 0.45 ms at 3 TB/s. If
a is constant, 8 and 12; if complex, twice as many; with segments a and b, or a and dh, are read twice.

Letters: B row, T time, X channels, G groups of rows with an a of their own (the members of a population),
S segments, J tokens of a tile.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import cdiv, register_batch_vmap
from holdall.kernels.language import add_up, append, join_tokens, narrow, prepend, split_tokens
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Inexact

TILE = 16
CONFIG = {"BLOCK": 32, "num_warps": 1, "num_stages": 1}
ENOUGH = 2048
"""Number of programs that fill a GPU."""
LEAST = 8
"""Fewest tiles per segment."""


# ---------------------------------------------------------------------------------------------- on the device


@triton.jit
def _times(a, b, COMPLEX: tl.constexpr):
    """A product of complex values, each a pair of tensors; the second is ignored if values are real."""
    if COMPLEX:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
    else:
        return a[0] * b[0], b[1]


@triton.jit
def _plus(a, b, COMPLEX: tl.constexpr):
    if COMPLEX:
        return a[0] + b[0], a[1] + b[1]
    else:
        return a[0] + b[0], a[1]


@triton.jit
def _decayed(a, low, h, STEADY: tl.constexpr, COMPLEX: tl.constexpr):
    """a h; a constant a has two parts, since its rounding error would accumulate over tokens."""
    if STEADY:
        return _plus(_times(a, h, COMPLEX), _times(low, h, COMPLEX), COMPLEX)
    else:
        return _times(a, h, COMPLEX)


@triton.jit
def _conj(a, COMPLEX: tl.constexpr):
    if COMPLEX:
        return a[0], -a[1]
    else:
        return a


@triton.jit
def _read(ptrs, ok, one, COMPLEX: tl.constexpr):
    """Load values; a complex one has 64 bits in memory. Masked values are 0, or 1 if `one`."""
    if COMPLEX:
        bits = tl.load(ptrs, mask=ok, other=0x3F800000 if one else 0)
        re, im = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        return re.to(tl.float32, bitcast=True), im.to(tl.float32, bitcast=True)
    else:
        x = tl.load(ptrs, mask=ok, other=1.0 if one else 0.0).to(tl.float32)
        return x, tl.zeros_like(x)


@triton.jit
def _write(ptrs, x, ok, COMPLEX: tl.constexpr):
    if COMPLEX:
        re, im = x[0].to(tl.int32, bitcast=True), x[1].to(tl.int32, bitcast=True)
        tl.store(ptrs, (im.to(tl.int64) << 32) | (re.to(tl.int64) & 0xFFFFFFFF), mask=ok)
    else:
        tl.store(ptrs, narrow(x[0], ptrs.dtype.element_ty), mask=ok)


@triton.jit
def _read_tile(ptr, stride, x_X, ok_JX, one, TILE: tl.constexpr, LEVELS: tl.constexpr, COMPLEX: tl.constexpr):
    re_JX, im_JX = _read(ptr + (tl.arange(0, TILE)[:, None] * stride + x_X[None, :]), ok_JX, one, COMPLEX)
    return split_tokens(re_JX, TILE, LEVELS), split_tokens(im_JX, TILE, LEVELS)


@triton.jit
def _write_tile(ptr, stride, x_X, ok_JX, x, TILE: tl.constexpr, LEVELS: tl.constexpr, COMPLEX: tl.constexpr):
    ptrs = ptr + (tl.arange(0, TILE)[:, None] * stride + x_X[None, :])
    _write(ptrs, (join_tokens(x[0], TILE, LEVELS), join_tokens(x[1], TILE, LEVELS)), ok_JX, COMPLEX)


@triton.jit
def _whose(channels, segments, BLOCK: tl.constexpr):
    """Row, segment and channels of a program; the row has 64 bits, since offsets are multiples of it."""
    pid, blocks = tl.program_id(0), tl.cdiv(channels, BLOCK)
    x_X = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    return (pid // blocks // segments).to(tl.int64), pid // blocks % segments, x_X < channels, x_X


NUMBERS = ["time", "channels", "group", "segments", "tiles"]
"""Arguments without specialisation, so that another length or width does not recompile the kernel."""


@triton.jit(do_not_specialize=NUMBERS)
def _ends_kernel(
    a_ptr, low_ptr, b_ptr, ends_ptr, kept_ptr, time, channels, group, segments, tiles,
    REVERSE: tl.constexpr, STEADY: tl.constexpr, COMPLEX: tl.constexpr,
    TILE: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Final state of a segment from a zero start, and the product of its a; in reverse, of the gradients.

    Those of the last segment are not used forward, and multiplied by zero in reverse, so that tokens beyond
    the end do not matter.
    """
    row, segment, inside_X, x_X = _whose(channels, segments, BLOCK)
    zero_X = tl.zeros((BLOCK,), tl.float32)
    h_X, kept_X, a_X, low_X = (zero_X, zero_X), (zero_X + 1, zero_X), (zero_X, zero_X), (zero_X, zero_X)
    if STEADY:
        a_X = _read(a_ptr + row // group * channels + x_X, inside_X, False, COMPLEX)
        low_X = _read(low_ptr + row // group * channels + x_X, inside_X, False, COMPLEX)
        if REVERSE:
            a_X, low_X = _conj(a_X, COMPLEX), _conj(low_X, COMPLEX)
    count = tl.minimum(tiles, tl.cdiv(time, TILE) - segment * tiles)
    for i in range(count):
        start = (segment * tiles + (count - 1 - i if REVERSE else i)).to(tl.int64) * TILE
        at = (row * time + start) * channels
        ok_JX = (tl.arange(0, TILE) < time - start)[:, None] & inside_X[None, :]
        bs = _read_tile(b_ptr + at, channels, x_X, ok_JX, False, TILE, LEVELS, COMPLEX)
        many_a = bs
        if not STEADY:
            many_a = _read_tile(a_ptr + at, channels, x_X, ok_JX, True, TILE, LEVELS, COMPLEX)
        if REVERSE:
            for j in tl.static_range(TILE - 1, -1, -1):
                if not STEADY:
                    a_X = _conj((many_a[0][j], many_a[1][j]), COMPLEX)
                h_X = _decayed(a_X, low_X, _plus(h_X, (bs[0][j], bs[1][j]), COMPLEX), STEADY, COMPLEX)
                kept_X = _decayed(a_X, low_X, kept_X, STEADY, COMPLEX)
        else:
            for j in tl.static_range(TILE):
                if not STEADY:
                    a_X = (many_a[0][j], many_a[1][j])
                h_X = _plus(_decayed(a_X, low_X, h_X, STEADY, COMPLEX), (bs[0][j], bs[1][j]), COMPLEX)
                kept_X = _decayed(a_X, low_X, kept_X, STEADY, COMPLEX)
    at_X = (row * segments + segment) * channels + x_X
    _write(ends_ptr + at_X, h_X, inside_X, COMPLEX)
    _write(kept_ptr + at_X, kept_X, inside_X, COMPLEX)


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    a_ptr, low_ptr, b_ptr, start_ptr, ends_ptr, kept_ptr, h_ptr, time, channels, group, segments, tiles,
    STEADY: tl.constexpr, COMPLEX: tl.constexpr,
    TILE: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, inside_X, x_X = _whose(channels, segments, BLOCK)
    h_X = _read(start_ptr + row * channels + x_X, inside_X, False, COMPLEX)
    for i in range(segment):  # the state before this segment, from the ends of those before it
        at_X = (row * segments + i) * channels + x_X
        kept_X = _read(kept_ptr + at_X, inside_X, False, COMPLEX)
        end_X = _read(ends_ptr + at_X, inside_X, False, COMPLEX)
        h_X = _plus(_times(kept_X, h_X, COMPLEX), end_X, COMPLEX)
    a_X, low_X = h_X, h_X
    if STEADY:
        a_X = _read(a_ptr + row // group * channels + x_X, inside_X, False, COMPLEX)
        low_X = _read(low_ptr + row // group * channels + x_X, inside_X, False, COMPLEX)
    for i in range(tl.minimum(tiles, tl.cdiv(time, TILE) - segment * tiles)):
        start = (segment * tiles + i).to(tl.int64) * TILE
        at = (row * time + start) * channels
        ok_JX = (tl.arange(0, TILE) < time - start)[:, None] & inside_X[None, :]
        bs = _read_tile(b_ptr + at, channels, x_X, ok_JX, False, TILE, LEVELS, COMPLEX)
        many_a = bs
        if not STEADY:
            many_a = _read_tile(a_ptr + at, channels, x_X, ok_JX, True, TILE, LEVELS, COMPLEX)
        res, ims = (), ()
        for j in tl.static_range(TILE):
            if not STEADY:
                a_X = (many_a[0][j], many_a[1][j])
            h_X = _plus(_decayed(a_X, low_X, h_X, STEADY, COMPLEX), (bs[0][j], bs[1][j]), COMPLEX)
            res, ims = append(res, h_X[0]), append(ims, h_X[1])
        _write_tile(h_ptr + at, channels, x_X, ok_JX, (res, ims), TILE, LEVELS, COMPLEX)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_kernel(
    a_ptr, low_ptr, h_ptr, first_ptr, dh_ptr, ends_ptr, kept_ptr, da_ptr, db_ptr, dfirst_ptr,
    time, channels, group, segments, tiles,
    STEADY: tl.constexpr, COMPLEX: tl.constexpr,
    TILE: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, segment, inside_X, x_X = _whose(channels, segments, BLOCK)
    before, zero_X = row * segments * channels, tl.zeros((BLOCK,), tl.float32)
    s_X, da_X, lost_X = (zero_X, zero_X), (zero_X, zero_X), (zero_X, zero_X)
    for i in range(segments - 1 - segment):
        at_X = before + (segments - 1 - i) * channels + x_X
        end_X = _read(ends_ptr + at_X, inside_X, False, COMPLEX)
        s_X = _plus(_times(_read(kept_ptr + at_X, inside_X, False, COMPLEX), s_X, COMPLEX), end_X, COMPLEX)
    a_X, low_X, h_first_X = da_X, da_X, _read(first_ptr + row * channels + x_X, inside_X, False, COMPLEX)
    if STEADY:
        a_X = _conj(_read(a_ptr + row // group * channels + x_X, inside_X, False, COMPLEX), COMPLEX)
        low_X = _conj(_read(low_ptr + row // group * channels + x_X, inside_X, False, COMPLEX), COMPLEX)
    count = tl.minimum(tiles, tl.cdiv(time, TILE) - segment * tiles)
    for i in range(count):
        start = (segment * tiles + count - 1 - i).to(tl.int64) * TILE
        at = (row * time + start) * channels
        t_J = start + tl.arange(0, TILE)
        ok_JX = (t_J < time)[:, None] & inside_X[None, :]
        dhs = _read_tile(dh_ptr + at, channels, x_X, ok_JX, False, TILE, LEVELS, COMPLEX)
        # the states before each token; that before the first token is handled below
        past_JX = ok_JX & (t_J > 0)[:, None]
        hs = _read_tile(h_ptr + at - channels, channels, x_X, past_JX, False, TILE, LEVELS, COMPLEX)
        many_a = dhs
        if not STEADY:
            many_a = _read_tile(a_ptr + at, channels, x_X, ok_JX, True, TILE, LEVELS, COMPLEX)
        db_re, db_im, da_re, da_im = (), (), (), ()
        tile_da_X = (zero_X, zero_X)
        for j in tl.static_range(TILE - 1, -1, -1):
            if not STEADY:
                a_X = _conj((many_a[0][j], many_a[1][j]), COMPLEX)
            h_X = (hs[0][j], hs[1][j])
            if j == 0:
                is_first = start == 0
                h_X = (tl.where(is_first, h_first_X[0], h_X[0]), tl.where(is_first, h_first_X[1], h_X[1]))
            g_X = _plus((dhs[0][j], dhs[1][j]), s_X, COMPLEX)
            s_X = _decayed(a_X, low_X, g_X, STEADY, COMPLEX)
            db_re, db_im = prepend(g_X[0], db_re), prepend(g_X[1], db_im)
            at_a_X = _times(g_X, _conj(h_X, COMPLEX), COMPLEX)
            if STEADY:
                tile_da_X = _plus(tile_da_X, at_a_X, COMPLEX)
            else:
                da_re, da_im = prepend(at_a_X[0], da_re), prepend(at_a_X[1], da_im)
        if STEADY:  # a sum over thousands of tokens
            re_X, lost_re_X = add_up(da_X[0], tile_da_X[0], lost_X[0])
            im_X, lost_im_X = add_up(da_X[1], tile_da_X[1], lost_X[1])
            da_X, lost_X = (re_X, im_X), (lost_re_X, lost_im_X)
        _write_tile(db_ptr + at, channels, x_X, ok_JX, (db_re, db_im), TILE, LEVELS, COMPLEX)
        if not STEADY:
            _write_tile(da_ptr + at, channels, x_X, ok_JX, (da_re, da_im), TILE, LEVELS, COMPLEX)
    if STEADY:
        _write(da_ptr + before + segment * channels + x_X, da_X, inside_X, COMPLEX)
    if segment == 0:
        _write(dfirst_ptr + row * channels + x_X, s_X, inside_X, COMPLEX)


# ----------------------------------------------------------------------------------------------- on the host


def diagonal_scan(
    a_BTX: Inexact[Tensor, "b t *x"], b_BTX: Inexact[Tensor, "b t *x"], h_BX: Inexact[Tensor, "b *x"]
) -> Inexact[Tensor, "b t *x"]:
    """The states after each token, as `holdall.ops.diagonal_scan` has them, in the widest dtype of the three.

    Raises:
        KernelError: no kernel can run on these tensors.
    """
    return _scan(a_BTX, None, b_BTX, h_BX)


def steady_scan(
    log_a_X: Inexact[Tensor, "*x"], b_BTX: Inexact[Tensor, "b t *x"], h_BX: Inexact[Tensor, "b *x"]
) -> Inexact[Tensor, "b t *x"]:
    """`holdall.ops.diagonal_scan.steady_scan`, likewise."""
    dtype = functools.reduce(torch.promote_types, (log_a_X.dtype, b_BTX.dtype, h_BX.dtype))
    forms.require_kernel(*(torch.view_as_real(u) if u.is_complex() else u for u in (log_a_X, b_BTX, h_BX)))
    exact_X = log_a_X.to(torch.complex128 if log_a_X.is_complex() else torch.float64).exp()
    a_X = exact_X.to(torch.complex64 if log_a_X.is_complex() else torch.float32)
    return _scan(a_X, (exact_X - a_X).detach().to(a_X.dtype), b_BTX, h_BX).to(dtype)


def _scan(a: Tensor, low: Tensor | None, b: Tensor, h: Tensor) -> Tensor:
    """Run the scan; `low` is the rounding error of a constant a."""
    dtype, shape = functools.reduce(torch.promote_types, (a.dtype, b.dtype, h.dtype)), b.shape
    if dtype.is_complex:
        a, b, h = (torch.view_as_real(u.to(dtype)) for u in (a, b, h))
        low = None if low is None else torch.view_as_real(low.to(dtype))
    forms.require_kernel(a, b, h)
    a = a.reshape(*shape[:2], -1) if low is None else a.reshape(1, -1)
    low = None if low is None else low.reshape(1, -1)
    h_BTX = _forward(a, low, b.reshape(*shape[:2], -1), h.reshape(len(h), -1), dtype.is_complex)
    return torch.view_as_complex(h_BTX.reshape(*shape, 2)) if dtype.is_complex else h_BTX.reshape(shape)


def segments(rows: int, time: int, channels: int) -> tuple[int, int]:
    """Number of segments that time is cut into, and the tiles of each; depends on shapes alone.

    One if rows and channels fill the GPU, otherwise as many as do, of at least LEAST tiles each.
    """
    tiles, programs = cdiv(time, TILE), rows * cdiv(channels, CONFIG["BLOCK"])
    length = cdiv(tiles, max(1, min(cdiv(ENOUGH, programs), tiles // LEAST)))
    return cdiv(tiles, length), length


class _Call:
    """Arguments that the launches of a call share. A constant a is (G, X), one for every group of rows."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.rows, time, channels = b.shape
        self.segments, tiles = segments(*b.shape)
        self.numbers = (time, channels, self.rows // a.shape[0], self.segments, tiles)
        self.how = {
            "STEADY": a.ndim == 2, "COMPLEX": b.dtype == torch.int64, "TILE": TILE,
            "LEVELS": TILE.bit_length() - 1, **CONFIG,
        }  # fmt: skip
        self.grid = (self.rows * self.segments * cdiv(channels, CONFIG["BLOCK"]),)

    def ends(self, a: Tensor, low: Tensor, b: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """Final states and products of all segments; empty if there is only one."""
        dtype = b.dtype if b.dtype == torch.int64 else torch.float32
        ends, kept = (b.new_empty(self.rows, self.segments, b.shape[-1], dtype=dtype) for _ in range(2))
        if self.segments > 1:
            _ends_kernel[self.grid](a, low, b, ends, kept, *self.numbers, REVERSE=reverse, **self.how)
        return ends, kept


def _numbers(is_complex: bool, a: Tensor, low: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Tensors for the kernels: contiguous channels, complex values as one of 64 bits. An absent low part is
    not read."""
    tensors = a, a if low is None else low, *tensors
    return [u.contiguous().view(torch.int64) if is_complex else u.contiguous() for u in tensors]


@torch.library.custom_op("holdall::diagonal_scan_forward", mutates_args=())
def _forward(a: Tensor, low: Tensor | None, b: Tensor, h: Tensor, is_complex: bool) -> Tensor:
    """The states after each token. Complex values are pairs of real ones."""
    out = _forward_fake(a, low, b, h, is_complex)
    a, low, b, h, states = _numbers(is_complex, a, low, b, h, out)
    call = _Call(a, b)
    ends, kept = call.ends(a, low, b, reverse=False)
    _forward_kernel[call.grid](a, low, b, h, ends, kept, states, *call.numbers, **call.how)
    return out


@_forward.register_fake
def _forward_fake(a: Tensor, low: Tensor | None, b: Tensor, h: Tensor, is_complex: bool) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (a.dtype, b.dtype, h.dtype))
    return b.new_empty(b.shape, dtype=dtype)


@once_differentiable()
@torch.library.custom_op("holdall::diagonal_scan_backward", mutates_args=())
def _backward(
    a: Tensor, low: Tensor | None, h: Tensor, out: Tensor, dout: Tensor, is_complex: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, of b in the dtype of the states, and of h."""
    grads = da, db, dh = _backward_fake(a, low, h, out, dout, is_complex)
    a, low, h, out, dout, *into = _numbers(is_complex, a, low, h, out, dout, *grads)
    call = _Call(a, out)
    ends, kept = call.ends(a, low, dout, reverse=True)
    if a.ndim == 2:
        into[0] = sums = torch.empty_like(ends)
    _backward_kernel[call.grid](a, low, out, h, dout, ends, kept, *into, *call.numbers, **call.how)
    if a.ndim == 2:
        da = sums.view(torch.float32).unflatten(0, (len(a), -1)).sum((1, 2)).to(da.dtype)
    return da, db, dh


@_backward.register_fake
def _backward_fake(
    a: Tensor, low: Tensor | None, h: Tensor, out: Tensor, dout: Tensor, is_complex: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), out.new_empty(out.shape), h.new_empty(h.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, low, b, h, ctx.is_complex = inputs
    ctx.save_for_backward(a, low, h, output)
    ctx.b_dtype = b.dtype


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    a, low, h, out = ctx.saved_tensors
    da, db, dh = _backward(a, low, h, out, dout, ctx.is_complex)
    return da, None, db.to(ctx.b_dtype), dh, None


_forward.register_autograd(_gradients, setup_context=_save)
register_batch_vmap(_forward)
register_batch_vmap(_backward)
