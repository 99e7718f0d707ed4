"""The selective scan, fused with Mamba's operations around it, in one launch each way.

    dt_t = softplus(raw_t + bias)        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
    y_t = (C_t . h_t + skip x_t) silu(z_t)

Bias, skip and z are optional; without a bias, raw is dt itself. The (B, T, D, N) tensors of decays and states
are never stored. A program has BLOCK channels of one row: lanes are channels, and it loops over time and the
N states of a channel. Tokens are in tiles of TILE, whose dt, dt x and y stay in registers while n loops over
the states:

    for n: for t in tile: h = exp2(dt_t A_n log2 e) h + (dt_t x_t) B_tn,   y_t += C_tn h

(for fp32 inputs with a longer, accurate exponential) and h_n passes from tile to tile through memory. These
are the states that the backward needs: it loops over the tiles from last to first, recomputes h within each
from the state at its start, and then, with q_t the gradient of y before gate and skip, and s_t the gradient
that h_t passes on to h_{t-1},

    g_t = C_tn q_t + s_{t+1}        s_t = exp(dt_t A_n) g_t        w_t = s_t h_{t-1}
    grad dt_t = sum_n A_n w_t + x_t sum_n g_t B_tn     grad x_t = dt_t sum_n g_t B_tn + skip q_t
    grad A_n = sum_t dt_t w_t       grad B_tn = sum_d g_t dt_t x_t        grad C_tn = sum_d h_t q_t

The sums over channels are across lanes: the 2 TILE sums of one n are folded into each other, half of the
lanes continuing with one sum and half with another, until each lane has a complete one (`_fold`). (With the
first part on tensor cores, by products with ones, they take fewer instructions and 6 to 13% more time.)
Partial sums of programs are added in a fixed order, without atomics, so that results are deterministic.

If rows and channels are too few to fill the GPU, time is also cut into segments (`segments`): a first launch
computes the final state of every segment from a zero start, and the programs of the second start from the
final states and total decays of the segments before theirs. That costs one more exponential.

Limits: one exponential per token, channel and state each way, of which a multiprocessor computes 16 per
clock, 132 x 16 x 1.755 GHz = 3.7e12 per second on an H100. For 4 x 256 rows of 256 tokens, 256 channels and
16 states that is 0.29 ms each way. In all there are 13 instructions forward and 34 backward, of which 8 are
sums across channels and 7 are needed once per token and channel: 0.47 and 1.2 ms at 128 lanes per clock.
Bytes per token and channel in bf16: forward x, dt, z, y and 4 N / TILE of states, 16 in all, or 0.36 ms;
backward x, dt, z, dy, three gradients, the states, and 8 N / BLOCK of partial sums, written and read, 30 in
all, or 0.67 ms.

Letters: B row, T time, D channels, N state per channel, G groups of rows with parameters of their own (the
members of a population), S segments, K tiles, J tokens of a tile.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import cdiv, fold, overlapped, register_batch_vmap, unfold
from holdall.kernels.language import (
    LN_2,
    LOG2_E,
    append,
    exp,
    exp2,
    join_tokens,
    narrow,
    prepend,
    sigmoid,
    softplus,
    split_tokens,
    wait_for_inputs,
)
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

LANES = tl.constexpr(32)

TILE = 8
"""Tokens per tile, at most 16: twice as many sums over channels are folded into 32 lanes."""
FORWARD = {"BLOCK": 32, "num_warps": 1, "num_stages": 1, "maxnreg": 64}
BACKWARD = {"BLOCK": 32, "num_warps": 1, "num_stages": 1, "maxnreg": 128}
"""Channels per program, one per lane of its warp, and registers per lane: few enough that each scheduler of a
multiprocessor has at least 4 warps, without spilling."""
STEP = {"BLOCK": 128, "num_warps": 4, "num_stages": 1}
"""Channels of a program for one token: 16 states of 128 are 8 KB, which its threads ask for all at once."""
ENOUGH = 1024
"""Number of programs that fill a GPU: 8 per multiprocessor."""
LEAST = 16
"""Fewest tiles per segment: the states at its ends cost no more than a few of its tokens."""


# ---------------------------------------------------------------------------------------------- on the device


@triton.jit
def _decay(dt, a, EXACT: tl.constexpr):
    """exp(dt A); a is A if EXACT, as for fp32 inputs, else A log2 e."""
    if EXACT:
        return exp(dt * a, True)
    else:
        return exp2(dt * a)


@triton.jit
def _load(ptrs, ok):
    return tl.load(ptrs, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _load_dt(ptrs, ok, bias, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """The step size; zero beyond the last token or channel, where the state must not change."""
    dt = _load(ptrs, ok)
    if SOFTPLUS:
        dt = tl.where(ok, softplus(dt + bias, EXACT), 0.0)
    return dt


@triton.jit
def _tile(start_ptr, STRIDE: tl.constexpr, d_D, TILE: tl.constexpr):
    return start_ptr + (tl.arange(0, TILE)[:, None] * STRIDE + d_D[None, :])


@triton.jit
def _known(left, inside_D, TILE: tl.constexpr):
    """Mask of a tile's tokens and channels."""
    return (tl.arange(0, TILE) < left)[:, None] & inside_D[None, :]


@triton.jit
def _pair(bits):
    """B_tn and C_tn, which are adjacent: one load of 64 bits for all lanes."""
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _of_state(ptr, n, channels, d_D, ok_D):
    return tl.load(ptr + (n * channels + d_D), mask=ok_D, other=0.0)


@triton.jit
def _whose(segments, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Row, segment and channels of a program; the row has 64 bits, since offsets are multiples of it."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    d_D = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside_D = d_D < CHANNELS
    if CHANNELS % BLOCK == 0:
        inside_D = tl.full((BLOCK,), True, tl.int1)
    return (pid // BLOCKS // segments).to(tl.int64), pid // BLOCKS % segments, d_D, inside_D


@triton.jit
def _start_segment(
    state_ptr, start_ptr, ends_ptr, totals_ptr, a_ptr, d_D, ok_D, channels, size, first, count,
    STEP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The state before a segment, from the initial one and the ends of the `count` segments before it."""
    for n in range(size):
        a_D = tl.load(a_ptr + (n * channels + d_D), mask=ok_D, other=0.0)
        h_D = tl.load(start_ptr + (d_D * size + n), mask=ok_D, other=0.0)
        for i in range(count):
            segment = first + i * STEP
            total_D = tl.load(totals_ptr + (segment * channels + d_D), mask=ok_D, other=0.0)
            end_D = tl.load(ends_ptr + ((segment * size + n) * channels + d_D), mask=ok_D, other=0.0)
            h_D = _decay(total_D, a_D, EXACT) * h_D + end_D
        tl.store(state_ptr + (n * channels + d_D), h_D, mask=ok_D)


NUMBERS = [
    "time", "size", "group", "segments", "tiles", "all_tiles", "slots", "rows", "x_row", "dt_row", "z_row",
    "dy_row", "out_row",
]  # fmt: skip
"""Arguments without specialisation, so that another batch or length does not recompile the kernel. Widths are
constants, whose strides become part of the instructions: address arithmetic was a fifth of them."""


@triton.jit(do_not_specialize=NUMBERS)
def _ends_kernel(
    x_ptr, dt_ptr, a_ptr, pairs_ptr, bias_ptr, z_ptr, dy_ptr, ends_ptr, totals_ptr,
    time, size, group, segments, tiles, all_tiles,
    x_row, dt_row, z_row, dy_row,
    X_TIME: tl.constexpr, DT_TIME: tl.constexpr, Z_TIME: tl.constexpr, DY_TIME: tl.constexpr,
    CHANNELS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Final state of a segment from a zero start, and the sum of its dt; in reverse, of the gradients."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row, segment, d_D, inside_D = _whose(segments, CHANNELS, BLOCK)
    a_ptr += row // group * size * CHANNELS
    ends_ptr += (row * segments + segment) * size * CHANNELS
    zero_D = tl.zeros((BLOCK,), tl.float32)
    bias_D = _load(bias_ptr + row // group * CHANNELS + d_D, inside_D) if SOFTPLUS else zero_D
    for n in range(size):
        tl.store(ends_ptr + (n * CHANNELS + d_D), zero_D, mask=inside_D)
    total_D = zero_D
    count = tl.minimum(tiles, all_tiles - segment * tiles)
    for i in range(count):
        tile = (segment * tiles + (count - 1 - i if REVERSE else i)).to(tl.int64)
        start = tile * TILE
        ok_JD = _known(time - start, inside_D, TILE)
        dt_ptrs = _tile(dt_ptr + row * dt_row + start * DT_TIME, DT_TIME, d_D, TILE)
        dt_JD = _load_dt(dt_ptrs, ok_JD, bias_D[None, :], SOFTPLUS, EXACT)
        if REVERSE:
            u_JD = _load(_tile(dy_ptr + row * dy_row + start * DY_TIME, DY_TIME, d_D, TILE), ok_JD)
            if GATE:
                z_JD = _load(_tile(z_ptr + row * z_row + start * Z_TIME, Z_TIME, d_D, TILE), ok_JD)
                u_JD *= z_JD * sigmoid(z_JD, EXACT)
        else:
            u_JD = dt_JD * _load(_tile(x_ptr + row * x_row + start * X_TIME, X_TIME, d_D, TILE), ok_JD)
        total_D += tl.sum(dt_JD, axis=0)
        dts, us = split_tokens(dt_JD, TILE, LEVELS), split_tokens(u_JD, TILE, LEVELS)
        tl.debug_barrier()
        pair_ptr = pairs_ptr + (row * all_tiles + tile) * size * TILE
        a_next = _of_state(a_ptr, 0, CHANNELS, d_D, inside_D)
        h_next = _of_state(ends_ptr, 0, CHANNELS, d_D, inside_D)
        first_next = tl.load(pair_ptr)
        for n in range(size):
            a_D, h_D, first, m = a_next, h_next, first_next, tl.minimum(n + 1, size - 1)
            a_next = _of_state(a_ptr, m, CHANNELS, d_D, inside_D)
            h_next = _of_state(ends_ptr, m, CHANNELS, d_D, inside_D)
            first_next = tl.load(pair_ptr + m * TILE)
            if REVERSE:
                for j in tl.static_range(TILE - 1, -1, -1):
                    _, c = _pair(tl.load(pair_ptr + (n * TILE + j)) if j > 0 else first)
                    h_D = _decay(dts[j], a_D, EXACT) * (h_D + us[j] * c)
            else:
                for j in tl.static_range(TILE):
                    b, _ = _pair(tl.load(pair_ptr + (n * TILE + j)) if j > 0 else first)
                    h_D = _decay(dts[j], a_D, EXACT) * h_D + us[j] * b
            tl.store(ends_ptr + (n * CHANNELS + d_D), h_D, mask=inside_D)
    tl.store(totals_ptr + (row * segments + segment) * CHANNELS + d_D, total_D, mask=inside_D)


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    x_ptr, dt_ptr, a_ptr, pairs_ptr, h_ptr, bias_ptr, skip_ptr, z_ptr, ends_ptr, totals_ptr,
    y_ptr, last_ptr, states_ptr,
    time, size, group, segments, tiles, all_tiles, slots,
    x_row, dt_row, z_row, out_row,
    X_TIME: tl.constexpr, DT_TIME: tl.constexpr, Z_TIME: tl.constexpr, CHANNELS: tl.constexpr,
    SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row, segment, d_D, inside_D = _whose(segments, CHANNELS, BLOCK)
    a_ptr += row // group * size * CHANNELS
    states_ptr += (row * segments + segment) * slots * size * CHANNELS
    zero_D = tl.zeros((BLOCK,), tl.float32)
    bias_D = _load(bias_ptr + row // group * CHANNELS + d_D, inside_D) if SOFTPLUS else zero_D
    skip_D = _load(skip_ptr + row // group * CHANNELS + d_D, inside_D) if SKIP else zero_D
    _start_segment(
        states_ptr, h_ptr + row * CHANNELS * size, ends_ptr + row * segments * size * CHANNELS,
        totals_ptr + row * segments * CHANNELS, a_ptr, d_D, inside_D, CHANNELS, size, 0, segment, 1,
        EXACT,
    )  # fmt: skip
    count = tl.minimum(tiles, all_tiles - segment * tiles)
    for i in range(count):
        tile = (segment * tiles + i).to(tl.int64)
        start = tile * TILE
        ok_JD = _known(time - start, inside_D, TILE)
        x_JD = _load(_tile(x_ptr + row * x_row + start * X_TIME, X_TIME, d_D, TILE), ok_JD)
        dt_ptrs = _tile(dt_ptr + row * dt_row + start * DT_TIME, DT_TIME, d_D, TILE)
        dt_JD = _load_dt(dt_ptrs, ok_JD, bias_D[None, :], SOFTPLUS, EXACT)
        dts, us = split_tokens(dt_JD, TILE, LEVELS), split_tokens(dt_JD * x_JD, TILE, LEVELS)
        ys = split_tokens(x_JD * skip_D[None, :], TILE, LEVELS)
        next_ptr = states_ptr + size * CHANNELS if KEEP else states_ptr
        # a thread reads its own writes; the barrier prevents reordering by the compiler
        tl.debug_barrier()
        pair_ptr = pairs_ptr + (row * all_tiles + tile) * size * TILE
        a_next = _of_state(a_ptr, 0, CHANNELS, d_D, inside_D)
        h_next = _of_state(states_ptr, 0, CHANNELS, d_D, inside_D)
        first_next = tl.load(pair_ptr)
        for n in tl.range(0, size, loop_unroll_factor=2):
            # prefetch for the next n: loading one of its pairs fetches the whole cache line
            a_D, h_D, first, m = a_next, h_next, first_next, tl.minimum(n + 1, size - 1)
            a_next = _of_state(a_ptr, m, CHANNELS, d_D, inside_D)
            h_next = _of_state(states_ptr, m, CHANNELS, d_D, inside_D)
            first_next = tl.load(pair_ptr + m * TILE)
            sums = ()
            for j in tl.static_range(TILE):
                b, c = _pair(tl.load(pair_ptr + (n * TILE + j)) if j > 0 else first)
                h_D = _decay(dts[j], a_D, EXACT) * h_D + us[j] * b
                sums = append(sums, ys[j] + h_D * c)
            ys = sums
            tl.store(next_ptr + (n * CHANNELS + d_D), h_D, mask=inside_D)
        states_ptr = next_ptr
        y_JD = join_tokens(ys, TILE, LEVELS)
        if GATE:
            z_JD = _load(_tile(z_ptr + row * z_row + start * Z_TIME, Z_TIME, d_D, TILE), ok_JD)
            y_JD *= z_JD * sigmoid(z_JD, EXACT)
        y_ptrs = _tile(y_ptr + row * out_row + start * CHANNELS, CHANNELS, d_D, TILE)
        tl.store(y_ptrs, narrow(y_JD, y_ptr.dtype.element_ty), mask=ok_JD)
    if segment == segments - 1:
        tl.debug_barrier()
        for n in range(size):
            h_D = tl.load(states_ptr + (n * CHANNELS + d_D), mask=inside_D, other=0.0)
            tl.store(last_ptr + (row * CHANNELS + d_D) * size + n, h_D, mask=inside_D)


@triton.jit
def _lanes(x_D, BLOCK: tl.constexpr):
    """Sums of the channels that share a lane; the lane index as five dimensions of size two."""
    return tl.sum(tl.reshape(x_D, (BLOCK // LANES, 2, 2, 2, 2, 2)), axis=0)


@triton.jit
def _fold(low, high, lane, AXIS: tl.constexpr):
    """Sums over a pair of lanes: one lane gets that of `low`, the other that of `high`.

    Each sends its neighbour the value that the neighbour adds: one exchange for two sums.
    """
    first = (lane >> (4 - AXIS)) & 1 == 0
    kept, sent = tl.where(first, low, high), tl.where(first, high, low).to(tl.int32, bitcast=True)
    # the neighbour's bits: the XOR of both, without one's own
    received = tl.xor_sum(sent, axis=AXIS, keep_dims=True) ^ sent
    return kept + received.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=NUMBERS)
def _backward_kernel(
    x_ptr, dt_ptr, a_ptr, pairs_ptr, bias_ptr, skip_ptr, z_ptr, states_ptr, dy_ptr, dlast_ptr, ends_ptr,
    totals_ptr, dx_ptr, ddt_ptr, dz_ptr, dpairs_ptr, carry_ptr, da_ptr, dbias_ptr, dskip_ptr, dh_ptr,
    time, size, group, segments, tiles, all_tiles, slots, rows,
    x_row, dt_row, z_row, dy_row, out_row,
    X_TIME: tl.constexpr, DT_TIME: tl.constexpr, Z_TIME: tl.constexpr, DY_TIME: tl.constexpr,
    CHANNELS: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    row, segment, d_D, inside_D = _whose(segments, CHANNELS, BLOCK)
    part = row * segments + segment
    a_ptr += row // group * size * CHANNELS
    states_ptr += part * slots * size * CHANNELS
    carry_ptr += part * size * CHANNELS
    da_ptr += part * size * CHANNELS
    zero_D = tl.zeros((BLOCK,), tl.float32)
    bias_D = _load(bias_ptr + row // group * CHANNELS + d_D, inside_D) if SOFTPLUS else zero_D
    skip_D = _load(skip_ptr + row // group * CHANNELS + d_D, inside_D) if SKIP else zero_D
    dbias_D, dskip_D = zero_D, zero_D
    _start_segment(
        carry_ptr, dlast_ptr + row * CHANNELS * size, ends_ptr + row * segments * size * CHANNELS,
        totals_ptr + row * segments * CHANNELS, a_ptr, d_D, inside_D, CHANNELS, size, segments - 1,
        segments - 1 - segment, -1, EXACT,
    )  # fmt: skip
    for n in range(size):
        tl.store(da_ptr + (n * CHANNELS + d_D), zero_D, mask=inside_D)
    lane = tl.reshape(tl.arange(0, LANES), (2, 2, 2, 2, 2))
    dpairs_ptr += (
        (tl.program_id(0) % ((CHANNELS + BLOCK - 1) // BLOCK) * rows + row) * all_tiles * size * (2 * TILE)
    )
    count = tl.minimum(tiles, all_tiles - segment * tiles)
    for i in range(count):
        tile = (segment * tiles + count - 1 - i).to(tl.int64)
        start = tile * TILE
        state_ptr = states_ptr + (tile - segment * tiles) * size * CHANNELS
        ok_JD = _known(time - start, inside_D, TILE)
        x_JD = _load(_tile(x_ptr + row * x_row + start * X_TIME, X_TIME, d_D, TILE), ok_JD)
        dt_ptrs = _tile(dt_ptr + row * dt_row + start * DT_TIME, DT_TIME, d_D, TILE)
        dt_JD = _load_dt(dt_ptrs, ok_JD, bias_D[None, :], SOFTPLUS, EXACT)
        q_JD = _load(_tile(dy_ptr + row * dy_row + start * DY_TIME, DY_TIME, d_D, TILE), ok_JD)
        if GATE:
            z_JD = _load(_tile(z_ptr + row * z_row + start * Z_TIME, Z_TIME, d_D, TILE), ok_JD)
            q_JD *= z_JD * sigmoid(z_JD, EXACT)
        dts, us = split_tokens(dt_JD, TILE, LEVELS), split_tokens(dt_JD * x_JD, TILE, LEVELS)
        qs, ys = split_tokens(q_JD, TILE, LEVELS), split_tokens(x_JD * skip_D[None, :], TILE, LEVELS)
        ws, gs = (), ()
        for _ in tl.static_range(TILE):
            ws, gs = append(ws, zero_D), append(gs, zero_D)
        tl.debug_barrier()
        pair_ptr = pairs_ptr + (row * all_tiles + tile) * size * TILE
        a_next = _of_state(a_ptr, 0, CHANNELS, d_D, inside_D)
        h_next = _of_state(state_ptr, 0, CHANNELS, d_D, inside_D)
        s_next = _of_state(carry_ptr, 0, CHANNELS, d_D, inside_D)
        first_next = tl.load(pair_ptr)
        for n in tl.range(0, size, loop_unroll_factor=2):
            a_D, h_D, s_D, first, m = a_next, h_next, s_next, first_next, tl.minimum(n + 1, size - 1)
            a_next = _of_state(a_ptr, m, CHANNELS, d_D, inside_D)
            h_next = _of_state(state_ptr, m, CHANNELS, d_D, inside_D)
            s_next = _of_state(carry_ptr, m, CHANNELS, d_D, inside_D)
            first_next = tl.load(pair_ptr + m * TILE)
            da_D = _of_state(da_ptr, n, CHANNELS, d_D, inside_D)
            hs, decays, new_ys = append((), h_D), (), ()
            for j in tl.static_range(TILE):
                b, c = _pair(tl.load(pair_ptr + (n * TILE + j)) if j > 0 else first)
                decay_D = _decay(dts[j], a_D, EXACT)
                h_D = decay_D * h_D + us[j] * b
                hs, decays = append(hs, h_D), append(decays, decay_D)
                new_ys = append(new_ys, ys[j] + h_D * c if GATE else zero_D)
            ys = new_ys
            new_ws, new_gs, sums = (), (), ()
            for j in tl.static_range(TILE - 1, -1, -1):
                b, c = _pair(tl.load(pair_ptr + (n * TILE + j)) if j > 0 else first)
                g_D = qs[j] * c + s_D
                s_D = decays[j] * g_D
                w_D = s_D * hs[j]
                da_D += dts[j] * w_D
                new_ws, new_gs = prepend(ws[j] + a_D * w_D, new_ws), prepend(gs[j] + g_D * b, new_gs)
                both = _fold(_lanes(g_D * us[j], BLOCK), _lanes(hs[j + 1] * qs[j], BLOCK), lane, 0)
                sums = prepend(both, sums)
            ws, gs = new_ws, new_gs
            for level in tl.static_range(1, LEVELS + 1):
                merged = ()
                for j in tl.static_range(TILE >> level):
                    merged = append(merged, _fold(sums[j], sums[j + (TILE >> level)], lane, level))
                sums = merged
            whole = sums[0]  # type: ignore[misc] # which takes it for empty
            for level in tl.static_range(LEVELS + 1, 5):
                whole = tl.sum(whole, axis=level, keep_dims=True)
            sum_ptrs = dpairs_ptr + (tile * size + n) * (2 * TILE) + tl.arange(0, 2 * TILE)
            tl.store(sum_ptrs, tl.reshape(whole, (2 * TILE,)))
            tl.store(carry_ptr + (n * CHANNELS + d_D), s_D, mask=inside_D)
            tl.store(da_ptr + (n * CHANNELS + d_D), da_D, mask=inside_D)
        # read again, to save registers
        x_JD = _load(_tile(x_ptr + row * x_row + start * X_TIME, X_TIME, d_D, TILE), ok_JD)
        g_JD = join_tokens(gs, TILE, LEVELS)
        ddt_JD = join_tokens(ws, TILE, LEVELS) * (1.0 if EXACT else LN_2) + x_JD * g_JD
        dx_JD = join_tokens(dts, TILE, LEVELS) * g_JD
        here = row * out_row + start * CHANNELS
        if SOFTPLUS:
            dt_ptrs = _tile(dt_ptr + row * dt_row + start * DT_TIME, DT_TIME, d_D, TILE)
            ddt_JD *= sigmoid(_load(dt_ptrs, ok_JD) + bias_D[None, :], EXACT)
            dbias_D += tl.sum(tl.where(ok_JD, ddt_JD, 0.0), axis=0)
        if SKIP:
            q_JD = join_tokens(qs, TILE, LEVELS)
            dx_JD += skip_D[None, :] * q_JD
            dskip_D += tl.sum(q_JD * x_JD, axis=0)
        if GATE:
            z_JD = _load(_tile(z_ptr + row * z_row + start * Z_TIME, Z_TIME, d_D, TILE), ok_JD)
            dy_JD = _load(_tile(dy_ptr + row * dy_row + start * DY_TIME, DY_TIME, d_D, TILE), ok_JD)
            open_JD = sigmoid(z_JD, EXACT)
            dz_JD = dy_JD * join_tokens(ys, TILE, LEVELS) * open_JD * (1 + z_JD * (1 - open_JD))
            dz_ptrs = _tile(dz_ptr + here, CHANNELS, d_D, TILE)
            tl.store(dz_ptrs, narrow(dz_JD, dz_ptr.dtype.element_ty), mask=ok_JD)
        dx_ptrs = _tile(dx_ptr + here, CHANNELS, d_D, TILE)
        ddt_ptrs = _tile(ddt_ptr + here, CHANNELS, d_D, TILE)
        tl.store(dx_ptrs, narrow(dx_JD, dx_ptr.dtype.element_ty), mask=ok_JD)
        tl.store(ddt_ptrs, narrow(ddt_JD, ddt_ptr.dtype.element_ty), mask=ok_JD)
    if SOFTPLUS:
        tl.store(dbias_ptr + part * CHANNELS + d_D, dbias_D, mask=inside_D)
    if SKIP:
        tl.store(dskip_ptr + part * CHANNELS + d_D, dskip_D, mask=inside_D)
    if segment == 0:
        tl.debug_barrier()
        for n in range(size):
            s_D = tl.load(carry_ptr + (n * CHANNELS + d_D), mask=inside_D, other=0.0)
            tl.store(dh_ptr + (row * CHANNELS + d_D) * size + n, s_D, mask=inside_D)


@triton.jit(do_not_specialize=["time", "size", "all_tiles", "b_row", "b_time", "c_row", "c_time"])
def _pack_kernel(
    b_ptr, c_ptr, pairs_ptr, time, size, all_tiles, b_row, b_time, c_row, c_time,
    STATES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's B and C in fp32, as pairs of 64 bits, (N, J); zero beyond the last token."""
    row, start = (tl.program_id(0) // all_tiles).to(tl.int64), tl.program_id(0) % all_tiles * TILE
    n_N, t_J = tl.arange(0, STATES), (start + tl.arange(0, TILE)).to(tl.int64)
    ok_NJ = (n_N < size)[:, None] & (t_J < time)[None, :]
    b_NJ = _load(b_ptr + row * b_row + (t_J[None, :] * b_time + n_N[:, None]), ok_NJ)
    c_NJ = _load(c_ptr + row * c_row + (t_J[None, :] * c_time + n_N[:, None]), ok_NJ)
    low_NJ = b_NJ.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    high_NJ = c_NJ.to(tl.int32, bitcast=True).to(tl.int64) << 32
    ptrs = pairs_ptr + tl.program_id(0).to(tl.int64) * size * TILE
    ptrs += n_N[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(ptrs, low_NJ | high_NJ, mask=(n_N < size)[:, None])


@triton.jit(do_not_specialize=["time", "size", "all_tiles", "rows", "blocks"])
def _unpack_kernel(
    sums_ptr, db_ptr, dc_ptr, time, size, all_tiles, rows, blocks, STATES: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The gradients of B and C, summed over blocks of channels in order."""
    row, start = (tl.program_id(0) // all_tiles).to(tl.int64), tl.program_id(0) % all_tiles * TILE
    n_N, t_J = tl.arange(0, STATES), (start + tl.arange(0, TILE)).to(tl.int64)
    ok_NJ = (n_N < size)[:, None] & (t_J < time)[None, :]
    db_NJ = tl.zeros((STATES, TILE), tl.float32)
    dc_NJ = tl.zeros((STATES, TILE), tl.float32)
    ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * size * (2 * TILE)
    ptrs += n_N[:, None] * (2 * TILE) + tl.arange(0, TILE)[None, :]
    stride = rows + tl.zeros((), tl.int64)
    for _ in range(blocks):
        db_NJ += tl.load(ptrs, mask=ok_NJ, other=0.0)
        dc_NJ += tl.load(ptrs + TILE, mask=ok_NJ, other=0.0)
        ptrs += stride * all_tiles * size * (2 * TILE)
    where_NJ = (row * time + t_J)[None, :] * size + n_N[:, None]
    tl.store(db_ptr + where_NJ, narrow(db_NJ, db_ptr.dtype.element_ty), mask=ok_NJ)
    tl.store(dc_ptr + where_NJ, narrow(dc_NJ, dc_ptr.dtype.element_ty), mask=ok_NJ)


@triton.jit(do_not_specialize=["channels", "size", "group", "x_row", "dt_row", "z_row", "b_row", "c_row"])
def _step_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, h_ptr, bias_ptr, skip_ptr, z_ptr, y_ptr, next_ptr,
    channels, size, group, x_row, dt_row, z_row, b_row, c_row,
    SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(channels, BLOCK)
    row, d_D, n_N = pid // blocks, pid % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    member, inside_D, ok_N = row // group, d_D < channels, n_N < size
    ok_DN, at_DN = inside_D[:, None] & ok_N[None, :], d_D[:, None] * size + n_N[None, :]
    h_DN = tl.load(h_ptr + row * channels * size + at_DN, mask=ok_DN, other=0.0)
    a_DN = tl.load(a_ptr + member * channels * size + at_DN, mask=ok_DN, other=0.0).to(tl.float32)
    b_N = tl.load(b_ptr + row * b_row + n_N, mask=ok_N, other=0.0).to(tl.float32)
    c_N = tl.load(c_ptr + row * c_row + n_N, mask=ok_N, other=0.0).to(tl.float32)
    x_D = _load(x_ptr + row * x_row + d_D, inside_D)
    bias_D = tl.zeros((BLOCK,), tl.float32)
    if SOFTPLUS:
        bias_D = _load(bias_ptr + member * channels + d_D, inside_D)
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    dt_D = _load_dt(dt_ptr + row * dt_row + d_D, inside_D, bias_D, SOFTPLUS, EXACT)
    h_DN = exp(dt_D[:, None] * a_DN, EXACT) * h_DN + (dt_D * x_D)[:, None] * b_N[None, :]
    tl.store(next_ptr + row * channels * size + at_DN, h_DN, mask=ok_DN)
    y_D = tl.sum(h_DN * c_N[None, :], axis=1)
    if SKIP:
        y_D += x_D * _load(skip_ptr + member * channels + d_D, inside_D)
    if GATE:
        z_D = _load(z_ptr + row * z_row + d_D, inside_D)
        y_D *= z_D * sigmoid(z_D, EXACT)
    tl.store(y_ptr + row * channels + d_D, narrow(y_D, y_ptr.dtype.element_ty), mask=inside_D)


# ----------------------------------------------------------------------------------------------- on the host


def selective_scan(
    x_BTD: Float[Tensor, "b t d"],
    dt_BTD: Float[Tensor, "b t d"],
    a_DN: Float[Tensor, "d n"],
    b_BTN: Float[Tensor, "b t n"],
    c_BTN: Float[Tensor, "b t n"],
    h_BDN: Float[Tensor, "b d n"],
    *,
    dt_bias_D: Float[Tensor, "d"] | None = None,
    skip_D: Float[Tensor, "d"] | None = None,
    z_BTD: Float[Tensor, "b t d"] | None = None,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """`holdall.ops.selective_scan.selective_scan`, fused with Mamba's operations around it.

    Args:
        dt_BTD: the step sizes; with `dt_bias_D` the input of softplus without the bias.
        skip_D: y += skip x.
        z_BTD: then y *= silu(z).
        inplace: for a single token, update the state in place. Not for training.

    Returns:
        y_BTD in the dtype of x, and the last state, fp32.

    Raises:
        KernelError: no kernel can run on these tensors.
    """
    forms.require_kernel(x_BTD, dt_BTD, b_BTN, c_BTN, h_BDN, z_BTD)
    a_GDN, *rest = (None if p is None else p[None] for p in (a_DN, dt_bias_D, skip_D))
    if x_BTD.shape[1] > 1 or torch.is_grad_enabled():
        keep = torch.is_grad_enabled()
        return _forward(x_BTD, dt_BTD, a_GDN, b_BTN, c_BTN, h_BDN, *rest, z_BTD, keep)[:2]
    if inplace:
        return _step_inplace(x_BTD, dt_BTD, a_GDN, b_BTN, c_BTN, h_BDN, *rest, z_BTD), h_BDN
    return _step(x_BTD, dt_BTD, a_GDN, b_BTN, c_BTN, h_BDN, *rest, z_BTD)


def segments(rows: int, time: int, channels: int) -> tuple[int, int]:
    """Number of segments that time is cut into, and the tiles of each.

    One if rows and channels fill the GPU, otherwise as many as fill it twice, of at least LEAST tiles each.
    It depends on shapes alone, so that the same call is bit-identical on any GPU.
    """
    tiles, programs = cdiv(time, TILE), rows * cdiv(channels, 32)
    count = 1 if programs >= ENOUGH else min(cdiv(2 * ENOUGH, programs), tiles // LEAST)
    length = cdiv(tiles, max(count, 1))
    return cdiv(tiles, length), length


class _Call:
    """Arguments that the launches of a call share; every group of rows has its own parameters."""

    def __init__(
        self, x: Tensor, dt: Tensor, a: Tensor, bias: Tensor | None, skip: Tensor | None, z: Tensor | None
    ) -> None:
        self.x, self.dt = _rows(x), _rows(dt)
        a = a.float() if x.dtype == torch.float32 else a.float() * LOG2_E.value  # see _decay
        self.a_GND = a.mT.contiguous()
        # absent tensors are not read, but a pointer is needed
        self.z = self.x if z is None else _rows(z)
        self.bias, self.skip = (self.a_GND if p is None else p.contiguous() for p in (bias, skip))
        self.rows, self.time, self.channels = x.shape
        self.groups, self.size = a.shape[0], a.shape[-1]
        self.segments, self.tiles = segments(*x.shape)
        self.all_tiles = cdiv(self.time, TILE)
        self.numbers = (
            self.time, self.size, self.rows // self.groups, self.segments, self.tiles, self.all_tiles,
        )  # fmt: skip
        self.row_strides = tuple(u.stride(0) for u in (self.x, self.dt, self.z))
        self.how = {
            "X_TIME": self.x.stride(1), "DT_TIME": self.dt.stride(1), "Z_TIME": self.z.stride(1),
            "CHANNELS": self.channels, "SOFTPLUS": bias is not None, "GATE": z is not None, "TILE": TILE,
            "LEVELS": TILE.bit_length() - 1,
        }  # fmt: skip

    def grid(self, config: dict[str, int]) -> tuple[int]:
        return (self.rows * self.segments * cdiv(self.channels, config["BLOCK"]),)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def ends(self, pairs: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Final states and sums of dt of all segments, with dy in reverse; empty if there is only one."""
        ends = self.empty(self.rows, self.segments, self.size, self.channels)
        totals = self.empty(self.rows, self.segments, self.channels)
        if self.segments > 1:
            read = self.x if dy is None else dy
            _ends_kernel[self.grid(FORWARD)](
                self.x, self.dt, self.a_GND, pairs, self.bias, self.z, read, ends, totals,
                *self.numbers, *self.row_strides, read.stride(0),
                DY_TIME=read.stride(1), REVERSE=dy is not None, **self.how, **FORWARD,
            )  # fmt: skip
        return ends, totals


def _rows(x: Tensor) -> Tensor:
    """x, copied unless channels are contiguous; tokens may have the stride of a wider layer."""
    rows, time, channels = x.shape
    if x.stride(-1) == 1 and (channels <= x.stride(1) <= x.stride(0) or rows == 1 < time):
        return x
    return x.contiguous()


@torch.library.custom_op("holdall::selective_scan_forward", mutates_args=())
def _forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last state and, for the backward, the tiles' states and the pairs of B and C."""
    call = _Call(x, dt, a, bias, skip, z)
    slots = call.tiles + 1 if keep else 1
    y, last = x.new_empty(x.shape), call.empty(*h.shape)
    states = call.empty(call.rows, call.segments, slots, call.size, call.channels)
    b, c = (u if u.stride(-1) == 1 else u.contiguous() for u in (b, c))
    pairs = x.new_empty(call.rows, call.all_tiles, call.size, TILE, dtype=torch.int64)
    _pack_kernel[(call.rows * call.all_tiles,)](
        b, c, pairs, call.time, call.size, call.all_tiles, *b.stride()[:2], *c.stride()[:2],
        STATES=triton.next_power_of_2(call.size), TILE=TILE, num_warps=1,
    )  # fmt: skip
    ends, totals = call.ends(pairs)
    _forward_kernel[call.grid(FORWARD)](
        call.x, call.dt, call.a_GND, pairs, h.contiguous(), call.bias, call.skip, call.z, ends, totals,
        y, last, states, *call.numbers, slots, *call.row_strides, y.stride(0),
        SKIP=skip is not None, KEEP=keep, **call.how, **FORWARD,
    )  # fmt: skip
    return (y, last, states, pairs) if keep else (y, last, _nothing(x), _nothing(x))


@_forward.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, last = x.new_empty(x.shape), x.new_empty(h.shape, dtype=torch.float32)
    if not keep:
        return y, last, _nothing(x), _nothing(x)
    count, tiles = segments(*x.shape)
    states = x.new_empty(x.shape[0], count, tiles + 1, a.shape[-1], x.shape[2], dtype=torch.float32)
    return y, last, states, x.new_empty(len(x), cdiv(x.shape[1], TILE), a.shape[-1], TILE, dtype=torch.int64)


def _nothing(x: Tensor) -> Tensor:
    """An empty tensor in place of None, which custom operations cannot return."""
    return x.new_empty(x.shape[0], 0, dtype=torch.float32)


@once_differentiable()
@torch.library.custom_op("holdall::selective_scan_backward", mutates_args=())
def _backward(
    x: Tensor, dt: Tensor, a: Tensor, pairs: Tensor, bias: Tensor | None, skip: Tensor | None,
    z: Tensor | None, states: Tensor, dy: Tensor, dlast: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, a, b, c, h, bias, skip and z; those of b and c in `dtype`."""
    call, dy = _Call(x, dt, a, bias, skip, z), _rows(dy)
    rows, count, size, channels = call.rows, call.segments, call.size, call.channels
    dx, ddt, da, db, dc, dh, dbias, dskip, dz = _backward_fake(
        x, dt, a, pairs, bias, skip, z, states, dy, dlast, dtype
    )
    blocks = cdiv(channels, BACKWARD["BLOCK"])
    carry, da_parts = (call.empty(rows, count, size, channels) for _ in range(2))
    dbias_parts, dskip_parts = (call.empty(rows, count, channels) for _ in range(2))
    dpairs = call.empty(blocks, rows, call.all_tiles, size, 2, TILE)
    ends, totals = call.ends(pairs, dy)
    _backward_kernel[call.grid(BACKWARD)](
        call.x, call.dt, call.a_GND, pairs, call.bias, call.skip, call.z, states, dy, dlast.contiguous(),
        ends, totals, dx, ddt, dz, dpairs, carry, da_parts, dbias_parts, dskip_parts, dh,
        *call.numbers, states.shape[2], rows, *call.row_strides, dy.stride(0), dx.stride(0),
        DY_TIME=dy.stride(1), SKIP=skip is not None, **call.how, **BACKWARD,
    )  # fmt: skip
    _unpack_kernel[(rows * call.all_tiles,)](
        dpairs, db, dc, call.time, size, call.all_tiles, rows, blocks,
        STATES=triton.next_power_of_2(size), TILE=TILE, num_warps=1,
    )  # fmt: skip
    da = da_parts.unflatten(0, (call.groups, -1)).sum((1, 2)).mT.contiguous().to(a.dtype)
    dbias, dskip = (
        d if p is None else parts.unflatten(0, (call.groups, -1)).sum((1, 2)).to(p.dtype)
        for d, p, parts in ((dbias, bias, dbias_parts), (dskip, skip, dskip_parts))
    )
    return dx, ddt, da, db, dc, dh, dbias, dskip, dz


@_backward.register_fake
def _backward_fake(
    x: Tensor, dt: Tensor, a: Tensor, pairs: Tensor, bias: Tensor | None, skip: Tensor | None,
    z: Tensor | None, states: Tensor, dy: Tensor, dlast: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, ddt, da = (u.new_empty(u.shape) for u in (x, dt, a))
    db, dc = (x.new_empty(*x.shape[:2], a.shape[-1], dtype=dtype) for _ in range(2))
    dh = x.new_empty(dlast.shape, dtype=torch.float32)
    dbias, dskip = (_nothing(a) if p is None else p.new_empty(p.shape) for p in (bias, skip))
    return dx, ddt, da, db, dc, dh, dbias, dskip, _nothing(x) if z is None else z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, a, b, c, h, bias, skip, z, _ = inputs
    ctx.save_for_backward(x, dt, a, bias, skip, z, *output[2:])
    ctx.dtypes = b.dtype, c.dtype, h.dtype
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, a, bias, skip, z, states, pairs = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    if dlast is None:
        dlast = x.new_zeros(x.shape[0], x.shape[2], a.shape[-1], dtype=torch.float32)
    b_type, c_type, h_type = ctx.dtypes
    dx, ddt, da, db, dc, dh, dbias, dskip, dz = _backward(
        x, dt, a, pairs, bias, skip, z, states, dy, dlast, torch.promote_types(b_type, c_type)
    )
    return (
        dx, ddt, da, db.to(b_type), dc.to(c_type), dh.to(h_type), None if bias is None else dbias,
        None if skip is None else dskip, None if z is None else dz, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_save)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


def _one_step(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None, new: Tensor,
) -> Tensor:  # fmt: skip
    """Write the next state to `new`, which may be h itself, and return y."""
    (rows, _, channels), size = x.shape, a.shape[-1]
    flags = {"SOFTPLUS": bias is not None, "SKIP": skip is not None, "GATE": z is not None}
    x, dt, b, c, a = *map(_rows, (x, dt, b, c)), a.contiguous()
    z = x if z is None else _rows(z)
    bias, skip = (a if p is None else p.contiguous() for p in (bias, skip))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _step_kernel[(rows * cdiv(channels, STEP["BLOCK"]),)](
        x, dt, a, b, c, h.contiguous(), bias, skip, z, y, new,
        channels, size, rows // a.shape[0], *(u.stride(0) for u in (x, dt, z, b, c)),
        STATES=triton.next_power_of_2(size), **flags, **STEP, **overlapped(x.device),
    )  # fmt: skip
    return y


@torch.library.custom_op("holdall::selective_scan_step", mutates_args=())
def _step(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new = torch.empty_like(h, dtype=torch.float32, memory_format=torch.contiguous_format)
    return _one_step(x, dt, a, b, c, h, bias, skip, z, new), new


@_step.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), h.new_empty(h.shape, dtype=torch.float32)


register_batch_vmap(_step)


@torch.library.custom_op("holdall::selective_scan_step_inplace", mutates_args=("h",))
def _step_inplace(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None,
) -> Tensor:  # fmt: skip
    if h.is_contiguous() and h.dtype == torch.float32:
        return _one_step(x, dt, a, b, c, h, bias, skip, z, h)
    y, new = _step(x, dt, a, b, c, h, bias, skip, z)
    h.copy_(new)
    return y


@_step_inplace.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor, bias: Tensor | None,
    skip: Tensor | None, z: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


@_step_inplace.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    folded = [
        fold(arg, dim, info.batch_size) if isinstance(arg, Tensor) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    y, new = _step(*folded)
    args[5].movedim(in_dims[5], 0).copy_(unfold(new, info.batch_size))
    return unfold(y, info.batch_size), 0
