"""What the kernels share on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from holdall import forms

INTERPRETED = tl.constexpr(forms.interpreted())


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in fp32, with fp32 operands as they are, not rounded to tf32.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers, so there it gets fp32.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to another dtype, to the nearest; by hand in the interpreter, which cuts digits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def append(values, value):
    return values + (value,)


@triton.jit
def prepend(value, values):
    return (value,) + values


@triton.jit
def split_tokens(x_JX, TOKENS: tl.constexpr, LEVELS: tl.constexpr):
    """The 2^LEVELS tokens of a tile (J, X) as a tuple: registers renamed, where time lies within a thread."""
    CHANNELS: tl.constexpr = x_JX.shape[1]
    parts = append((), tl.trans(x_JX))
    for level in tl.static_range(LEVELS):
        evens, odds = (), ()
        for i in tl.static_range(1 << level):
            part = parts[i]
            if level < LEVELS - 1:
                part = tl.reshape(part, (CHANNELS, TOKENS >> (level + 1), 2))
            even, odd = tl.split(part)
            evens, odds = append(evens, even), append(odds, odd)
        parts = evens + odds
    return parts


@triton.jit
def join_tokens(parts, TOKENS: tl.constexpr, LEVELS: tl.constexpr):
    """The inverse of `split_tokens`."""
    CHANNELS: tl.constexpr = parts[0].shape[0]
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(TOKENS >> (level + 1)):
            pair = tl.join(parts[i], parts[i + (TOKENS >> (level + 1))])
            pairs = append(pairs, tl.reshape(pair, (CHANNELS, 2 << level)))
        parts = pairs
    return tl.trans(parts[0])
