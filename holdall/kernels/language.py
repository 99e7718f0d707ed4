"""Device functions that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from holdall.contract import forms

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # of Triton before 3.3
    gdc_launch_dependents = gdc_wait = None

INTERPRETED = tl.constexpr(forms.interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693359375)  # few enough bits that its integer multiples are exact in fp32
LN_2_LOW = tl.constexpr(-2.12194440e-4)
ROUND = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding and subtracting it rounds to an integer in fp32


@triton.jit
def wait_for_inputs(OVERLAPPED: tl.constexpr):
    """To be called before a kernel reads or writes memory: see `holdall.kernels.overlapped`."""
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def dot(a, b, acc=None):
    """a @ b + acc in fp32; fp32 operands are not rounded to tf32.

    Triton's interpreter multiplies the bits of bfloat16 as integers, so operands are cast to fp32 there.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to another dtype, rounding to nearest; by hand in the interpreter, which truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_rows(pointer, offsets, valid, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows at these offsets; zero if not valid, and beyond the size of a row."""
    d = tl.arange(0, BLOCK)
    mask = valid[:, None] & (d < SIZE)[None, :]
    return tl.load(pointer + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, offsets, valid, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    mask = valid[:, None] & (d < SIZE)[None, :]
    tl.store(
        pointer + offsets[:, None] + d[None, :], narrow(x.to(tl.float32), pointer.dtype.element_ty), mask=mask
    )


@triton.jit
def plus_product(acc, a, b, one):
    """acc + a @ b. `one` is 1: it prevents the compiler from fusing the addition, which in fp32 would add
    thousands of terms to acc one by one; sums of whole blocks are more accurate."""
    if a.dtype == tl.float32:
        return acc + dot(a, b) * one
    return dot(a, b, acc)


@triton.jit
def attend_block(q, k, v, visible, scale, top, total, acc, one):
    """A running softmax (maximum, sum, weighted values) after one more block of keys; scale is in base 2."""
    score = dot(q, tl.trans(k)) * scale
    score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = plus_product(acc * shrink[:, None], narrow(p, v.dtype), v, one)
    return higher, total, acc


@triton.jit
def add_up(total, more, lost):
    """One step of Kahan summation: the sum, and the rounding error for the next step."""
    more += lost
    after = total + more
    return after, more - (after - total)


@triton.jit
def exp2(x):
    """2^x in one instruction, flushing results below 2^-126 to zero; tl.exp2 cannot, and takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(x):
    """1 / x for x near one, up to the last bit or two; a general division takes eight times as long."""
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """e^x for x up to about 80; if EXACT, accurate to the last bit or two, at the cost of more instructions.

    exp(x) = 2^k exp(f) with the integer k that minimises |f|; f is computed without rounding.
    """
    if EXACT:
        k = (x * LOG2_E + ROUND) - ROUND
        f = (x - k * LN_2_HIGH) - k * LN_2_LOW
        series = 1 / 24 + f * (1 / 120 + f * (1 / 720 + f * (1 / 5040)))
        return exp2(k) * (1 + f * (1 + f * (1 / 2 + f * (1 / 6 + f * series))))
    else:
        return exp2(x * LOG2_E)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        x = tl.maximum(x, -80.0)
    return reciprocal(1 + exp(-x, EXACT))


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """max(x, 0) + log(1 + u) with u = exp(-|x|), which is in [0, 1].

    log(1 + u) / u is approximated by the best polynomial of degree 9, with a relative error of 5e-9.
    """
    u = exp(tl.maximum(-tl.abs(x), -88.0), EXACT)
    series = 0.106036551 + u * (-0.0569595248 + u * (0.0198514555 + u * -0.00324402284))
    series = 0.333299637 + u * (-0.249541342 + u * (0.196759403 + u * (-0.153055936 + u * series)))
    return tl.maximum(x, 0.0) + u * (1 + u * (-0.499999017 + u * series))


@triton.jit
def append(values, value):
    return values + (value,)


@triton.jit
def prepend(value, values):
    return (value,) + values


@triton.jit
def split_tokens(x_JX, TOKENS: tl.constexpr, LEVELS: tl.constexpr):
    """The 2^LEVELS tokens of a tile (J, X) as a tuple; free if time is within a thread's registers."""
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
