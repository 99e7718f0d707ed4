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
