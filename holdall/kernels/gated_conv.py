"""A short causal convolution times a gate, forward and backward, as one kernel each way.

    c_t = b + sum_{i < W} w_i x_{t - W + 1 + i}        y_t = f(c_t) h(g_t) [+ x_t]

f and h are SiLU or the identity; x before the first token is the incoming past. Backward, with c_t
recomputed:

    dc_t = dy_t h(g_t) f'(c_t)              dg_t = dy_t f(c_t) h'(g_t)
    dx_s = sum_j w_{W-1-j} dc_{s+j} [+ dy_s] [+ gradient of the final past, if s is among the last W - 1]
    dw_i = sum_t dc_t x_{t-W+1+i}           db = sum_t dc_t

Memory traffic per token and channel: forward reads x and g and writes y; backward reads x, g and dy and
writes dx and dg: 8 elements in all, since taps and biases stay on the chip. 8 rows of 2048 tokens with 3584
channels (width 1792, expansion 4) in bf16: 0.94 GB, 0.31 ms at 3.0 TB/s.

The projection before it is a matrix product that cuBLAS runs at full speed. Fusing the two would save one
read of x and g (0.08 of 0.31 ms, beside 2.8 ms of products), but our own product would have to run within 10%
of cuBLAS and exchange W - 1 tokens between its tiles, and the backward needs x and g in memory anyway. Only
the projection's bias is included: adding it here is free, and its gradient, a sum over dx and dg, is computed
in the loop below, while PyTorch reads both again (another 0.08 ms).

Forward, one program has a tile of tokens and channels; the W - 1 tokens before it are in the L1 cache.
Backward, a thread loops from the end to the start of a chunk of tokens with the last W values of x and of dc
in registers, so that each element is read once and each SiLU computed once; only the W - 1 tokens after the
chunk are computed twice. A program has several chunks in parallel and sums its dw and db over them; a second
reduction over programs completes the gradients of the parameters, without atomics, so that results are
deterministic.

Letters: M member of a population (1 outside of `vmap`), B row, T new tokens, P = W - 1 past ones, or slots of
a ring, D channels, W taps, E channels of the projection: D, or 2 D if x is its first half.
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
from holdall.kernels.language import narrow, wait_for_inputs
from holdall.ops.derivatives import once_differentiable
from holdall.ops.gated_conv import Silu, beside_ring

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float, Int

MAX_TAPS = 8
"""Most taps: their window is in registers."""


# ---------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, x, mask):
    tl.store(pointer, narrow(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _append(values, value):
    return values + (value,)


@triton.jit
def _per_channel(pointer, offsets, mask):
    """A parameter per channel as a row; 0 if it is absent."""
    if pointer is None:
        return tl.zeros_like(offsets).to(tl.float32)[None, :]
    else:
        return _load(pointer + offsets, mask)[None, :]


@triton.jit
def _add_bias(x, bias_pointer, bias, where):
    """Add the bias, except to past values of x, which include it, and to masked ones, which stay zero."""
    if bias_pointer is None:
        return x
    else:
        return x + tl.where(where, bias, 0.0)


STRIDES = ["x_m", "x_b", "x_t", "gate_m", "gate_b", "gate_t", "dy_m", "dy_b", "dy_t"]
"""In units of ALIGN, so that the compiler knows that they are multiples; they depend on the length."""


@triton.jit(do_not_specialize=["B", "T", "P", *STRIDES[:6]])
def _forward_kernel(
    x_ptr, gate_ptr, x_bias_ptr, gate_bias_ptr, weight_ptr, bias_ptr, past_ptr, seen_ptr, y_ptr, next_ptr,
    x_m, x_b, x_t, gate_m, gate_b, gate_t, bias_m,
    B, T, D, P,
    ALIGN: tl.constexpr, W: tl.constexpr,
    SILU_CONV: tl.constexpr, SILU_GATE: tl.constexpr, SKIP: tl.constexpr,
    INPLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPPED)
    blocks_d, blocks_t = tl.cdiv(D, BLOCK_D), tl.cdiv(T, BLOCK_T)
    block_t = tl.program_id(0) // blocks_d % blocks_t
    row = (tl.program_id(0) // blocks_d // blocks_t).to(tl.int64)
    m, b = row // B, row % B
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    real_d = d < D
    t = (block_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    x_ptr += (m * x_m + b * x_b + t * x_t) * ALIGN + d[None, :]
    gate_ptr += (m * gate_m + b * gate_b + t * gate_t) * ALIGN + d[None, :]
    x_back = x_t.to(tl.int64) * ALIGN
    past_ptr += row * P * D + d[None, :]
    next_ptr += row * P * D + d[None, :]
    if seen_ptr is not None:  # in a ring of P slots the token at position p is in slot p mod P
        seen = tl.load(seen_ptr + row)
        origin = tl.maximum(seen, 0) + P
    x_bias = _per_channel(x_bias_ptr, m * bias_m + d, real_d)
    gate_bias = _per_channel(gate_bias_ptr, m * bias_m + d, real_d)

    c = tl.zeros((BLOCK_T, BLOCK_D), tl.float32) + _per_channel(bias_ptr, m * D + d, real_d)
    for tap in tl.static_range(W):
        s = t - (W - 1 - tap)
        new = (s >= 0) & (s < T) & real_d[None, :]
        x = _add_bias(_load(x_ptr - (W - 1 - tap) * x_back, new), x_bias_ptr, x_bias, new)
        if (tap < W - 1) & (block_t == 0):
            if seen_ptr is None:
                slot = s + W - 1
            else:
                slot = (origin + s) % P
            x += _load(past_ptr + slot * D, (s < 0) & real_d[None, :])
        c += x * _load(weight_ptr + (m * D + d) * W + tap, real_d)[None, :]

    real = (t < T) & real_d[None, :]
    g = _add_bias(_load(gate_ptr, real), gate_bias_ptr, gate_bias, real)
    y = c * tl.sigmoid(c) if SILU_CONV else c
    y *= g * tl.sigmoid(g) if SILU_GATE else g
    if SKIP:
        y += x
    if seen_ptr is not None:  # a row that gave back more than it had
        y = tl.where(seen < 0, float("nan"), y)
    _store(y_ptr + (row * T + t) * D + d[None, :], y, real)

    first = T - (W - 1)  # the token at which the next past starts
    if seen_ptr is not None:
        _store(next_ptr + (origin + t) % P * D, x, real)
    elif block_t * BLOCK_T + BLOCK_T > first:
        p = tl.arange(0, BLOCK_P)[:, None]
        stays = (p < -first) & real_d[None, :]
        kept = _load(past_ptr + (p + T) * D, stays)
        if INPLACE:
            tl.debug_barrier()  # all threads must have read the past before it is overwritten
        _store(next_ptr + p * D, kept, stays)
        _store(next_ptr + (t - first) * D, x, real & (t >= first))


@triton.jit
def _pull(dy, c, g, SILU_CONV: tl.constexpr, SILU_GATE: tl.constexpr):
    """Gradients of c and g from that of f(c) h(g)."""
    to_c, to_g = dy, dy
    if SILU_CONV:
        sigmoid = tl.sigmoid(c)
        to_g *= c * sigmoid
        to_c *= sigmoid + c * sigmoid * (1 - sigmoid)
    else:
        to_g *= c
    if SILU_GATE:
        sigmoid = tl.sigmoid(g)
        to_c *= g * sigmoid
        to_g *= sigmoid + g * sigmoid * (1 - sigmoid)
    else:
        to_c *= g
    return to_c, to_g


@triton.jit
def _convolve(window, taps, bias, W: tl.constexpr):
    """c_t from the last W values of x, newest first."""
    c = window[0] * taps[W - 1] + bias
    for j in tl.static_range(1, W):
        c += window[j] * taps[W - 1 - j]
    return c


@triton.jit(do_not_specialize=["B", "T", "chunk", "chunks", *STRIDES])
def _backward_kernel(
    x_ptr, gate_ptr, x_bias_ptr, gate_bias_ptr, weight_ptr, bias_ptr, past_ptr, dy_ptr, dnext_ptr,
    dx_ptr, dgate_ptr, dpast_ptr, sums_ptr,
    x_m, x_b, x_t, gate_m, gate_b, gate_t, bias_m, dy_m, dy_b, dy_t, dx_t, dgate_t,
    B, T, D, chunk, chunks,
    ALIGN: tl.constexpr, W: tl.constexpr,
    SILU_CONV: tl.constexpr, SILU_GATE: tl.constexpr, SKIP: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    blocks_d, blocks_q = tl.cdiv(D, BLOCK_D), tl.cdiv(B * chunks, ROWS)
    block_q = tl.program_id(0) // blocks_d % blocks_q
    m = (tl.program_id(0) // blocks_d // blocks_q).to(tl.int64)
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    real_d = d < D
    q = block_q * ROWS + tl.arange(0, ROWS)[:, None]
    b = (q // chunks).to(tl.int64)
    live = (q < B * chunks) & real_d[None, :]
    t0 = q % chunks * chunk
    first = T - (W - 1)  # the token at which the next past starts

    # the rows of the chunks' last tokens; offsets are relative to them
    last = t0 + chunk - 1
    x_ptr += (m * x_m + b * x_b + last.to(tl.int64) * x_t) * ALIGN + d[None, :]
    gate_ptr += (m * gate_m + b * gate_b + last.to(tl.int64) * gate_t) * ALIGN + d[None, :]
    dy_ptr += (m * dy_m + b * dy_b + last.to(tl.int64) * dy_t) * ALIGN + d[None, :]
    dx_ptr += ((m * B + b) * T + last) * dx_t + d[None, :]
    if dgate_ptr is not None:
        dgate_ptr += ((m * B + b) * T + last) * dgate_t + d[None, :]
    past_ptr += (m * B + b) * (W - 1) * D + d[None, :]
    dpast_ptr += (m * B + b) * (W - 1) * D + d[None, :]
    dnext_ptr += (m * B + b) * (W - 1) * D + d[None, :]
    x_back, gate_back, dy_back = (
        x_t.to(tl.int64) * ALIGN,
        gate_t.to(tl.int64) * ALIGN,
        dy_t.to(tl.int64) * ALIGN,
    )
    dx_back, dgate_back = dx_t.to(tl.int64), dgate_t.to(tl.int64)
    latest = tl.max(last)
    x_bias = _per_channel(x_bias_ptr, m * bias_m + d, real_d)
    gate_bias = _per_channel(gate_bias_ptr, m * bias_m + d, real_d)
    bias = _per_channel(bias_ptr, m * D + d, real_d)

    zero = tl.zeros((ROWS, BLOCK_D), tl.float32)
    taps, window, dcs, dws = (), (), (), ()
    for tap in tl.static_range(W):
        taps = _append(taps, _load(weight_ptr + (m * D + d) * W + tap, real_d)[None, :])
        dws = _append(dws, zero)
    dbias, dx_bias, dgate_bias = zero, zero, zero

    # at token t: window is x_t, x_{t-1}, ... and dcs is dc_{t+W-1}, ..., dc_t
    for j in tl.static_range(W - 1):
        new = live & (last + (W - 1 - j) < T)
        x = _load(x_ptr + (W - 1 - j) * x_back, new)
        window = _append(window, _add_bias(x, x_bias_ptr, x_bias, new))
        dcs = _append(dcs, zero)
    for j in tl.static_range(W - 1):  # dc of the tokens last + W - 1 - j after the chunk
        new = live & (last - j < T)
        x = _add_bias(_load(x_ptr - j * x_back, new), x_bias_ptr, x_bias, new)
        window = _append(window, x)
        here = live & (last + (W - 1 - j) < T)
        g = _load(gate_ptr + (W - 1 - j) * gate_back, here)
        g = _add_bias(g, gate_bias_ptr, gate_bias, here)
        dy = _load(dy_ptr + (W - 1 - j) * dy_back, here)
        dc, dg = _pull(dy, _convolve(window, taps, bias, W), g, SILU_CONV, SILU_GATE)
        dcs = _append(dcs, dc)[1:]
        window = window[1:]

    for block in range(0, chunk, UNROLL):
        xs, gates, dys = (), (), ()  # all loads are issued before the first is waited for
        for u in tl.static_range(UNROLL):
            i = block + u
            here = live & (last - i < T)
            new = live & (last - i >= W - 1) & (last - i - (W - 1) < T)
            dys = _append(dys, tl.load(dy_ptr - i * dy_back, mask=here, other=0.0))
            gates = _append(gates, tl.load(gate_ptr - i * gate_back, mask=here, other=0.0))
            xs = _append(xs, tl.load(x_ptr - (i + W - 1) * x_back, mask=new, other=0.0))
        for u in tl.static_range(UNROLL):
            i = block + u
            t = last - i
            s = t - (W - 1)
            here = live & (t < T)
            x = _add_bias(xs[u].to(tl.float32), x_bias_ptr, x_bias, live & (s >= 0) & (s < T))
            if i + W > chunk:
                x += _load(past_ptr + (s + W - 1) * D, live & (s < 0))
            window = _append(window, x)
            g = _add_bias(gates[u].to(tl.float32), gate_bias_ptr, gate_bias, here)
            dy = dys[u].to(tl.float32)
            dc, dg = _pull(dy, _convolve(window, taps, bias, W), g, SILU_CONV, SILU_GATE)
            dcs = _append(dcs, dc)
            dx = dc * taps[W - 1]
            for tap in tl.static_range(W - 1):
                dx += dcs[tap] * taps[tap]
            if SKIP:
                dx += dy
            if latest - i >= first:
                dx += _load(dnext_ptr + (t - first) * D, here & (t >= first))
            _store(dx_ptr - i * dx_back, dx, here)
            if dgate_ptr is not None:
                _store(dgate_ptr - i * dgate_back, dg, here)
            sums = ()
            for tap in tl.static_range(W):
                sums = _append(sums, dws[tap] + dc * window[W - 1 - tap])
            dws = sums
            if bias_ptr is not None:
                dbias += dc
            if x_bias_ptr is not None:
                dx_bias += dx
            if gate_bias_ptr is not None:
                dgate_bias += dg
            window = window[1:]
            dcs = dcs[1:]

    for k in tl.static_range(1, W):  # the past's tokens s = -1, -2, ...
        dpast = zero
        for tap in tl.static_range(W - k):
            dpast += dcs[tap + k - 1] * taps[tap]
        starts = live & (t0 == 0)
        if -k >= first:
            dpast += _load(dnext_ptr + (-k - first) * D, starts)
        _store(dpast_ptr + (W - 1 - k) * D, dpast, starts)

    sums_ptr += (m * blocks_q + block_q) * SUMS * D + d
    for tap in tl.static_range(W):
        tl.store(sums_ptr + tap * D, tl.sum(dws[tap], 0), mask=real_d)
    sums_ptr += W * D
    if bias_ptr is not None:
        tl.store(sums_ptr, tl.sum(dbias, 0), mask=real_d)
        sums_ptr += D
    if x_bias_ptr is not None:
        tl.store(sums_ptr, tl.sum(dx_bias, 0), mask=real_d)
        sums_ptr += D
    if gate_bias_ptr is not None:
        tl.store(sums_ptr, tl.sum(dgate_bias, 0), mask=real_d)


# --------------------------------------------------------------------------------------- the configurations


def _block_d(channels: int) -> int:
    return min(128, triton.next_power_of_2(channels))


def forward_config(channels: int, length: int) -> dict[str, int]:
    """Tokens and channels of a program's tile, and its warps: 16 elements per thread, 4 for one token."""
    block_d = _block_d(channels)
    if length == 1:
        return {"BLOCK_T": 1, "BLOCK_D": block_d, "num_warps": 1}
    return {"BLOCK_T": 1024 // block_d, "BLOCK_D": block_d, "num_warps": 2}


def backward_config(channels: int) -> dict[str, int]:
    """Chunks and channels of a program, 4 per thread, and tokens that are loaded together."""
    block_d = _block_d(channels)
    return {"ROWS": 512 // block_d, "BLOCK_D": block_d, "UNROLL": 4, "num_warps": 4}


def chunk_length(
    members: int, batch: int, length: int, channels: int, taps: int, config: dict[str, int]
) -> int:
    """Tokens per thread: many, unless that would leave a part of the GPU idle."""
    chunk = 128
    while chunk > 16:
        programs = members * cdiv(batch * cdiv(length, chunk), config["ROWS"])
        if programs * cdiv(channels, config["BLOCK_D"]) >= 512:
            break
        chunk //= 2
    # at least as long as the past, so that only the first chunk reads it
    return cdiv(max(min(chunk, length), taps - 1), config["UNROLL"]) * config["UNROLL"]


# ------------------------------------------------------------------------------------ the custom operations


def _strided(x: Tensor) -> Tensor:
    """x, copied unless its channels are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """16 if all strides are multiples of it, else 1; and the strides divided by it."""
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    align = 1 if any(stride % 16 for stride in strides) else 16
    return align, [stride // align for stride in strides]


def _branches(x: Tensor | None, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Views of x and the gate."""
    if x is None:
        x, projected = projected.chunk(2, dim=-1)
    return _strided(x), _strided(projected)


def _biases(x: Tensor | None, projection_bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """The projection's bias for x and for the gate, and the stride between members."""
    if projection_bias is None:
        return None, None, 0
    projection_bias = projection_bias.contiguous()
    halves = projection_bias.chunk(2, dim=-1) if x is None else (None, projection_bias)
    return *halves, projection_bias.stride(0)


def _launch_forward(
    x: Tensor | None, projected: Tensor, projection_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    past: Tensor, after: Tensor, silu: str, skip: bool, seen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    x_MBTD, gate_MBTD = _branches(x, projected)
    y_MBTD = torch.empty(x_MBTD.shape, dtype=x_MBTD.dtype, device=x_MBTD.device)
    biases = _biases(x, projection_bias)
    launch_forward(
        x_MBTD, gate_MBTD, *biases, weight, bias, past, after, y_MBTD, silu=silu, skip=skip, seen=seen
    )
    return y_MBTD


def launch_forward(
    x_MBTD: Tensor, gate_MBTD: Tensor, x_bias: Tensor | None, gate_bias: Tensor | None, bias_m: int,
    weight: Tensor, bias: Tensor | None, past: Tensor, after: Tensor, y_MBTD: Tensor,
    *, silu: str, skip: bool = False, seen: Tensor | None = None,
) -> None:  # fmt: skip
    """Write y and the next past. Channels of x and gate must be contiguous, all other tensors contiguous.

    seen: the past is a ring, in which what is new is written where it is: no more tokens than it has slots
    beside the last W - 1, which others read.
    """
    M, B, T, D = x_MBTD.shape
    W = weight.shape[-1]
    if y_MBTD.numel() == 0:
        return
    config = forward_config(D, T)
    grid = (M * B * cdiv(T, config["BLOCK_T"]) * cdiv(D, config["BLOCK_D"]),)
    align, strides = _strides(x_MBTD, gate_MBTD)
    _forward_kernel[grid](
        x_MBTD, gate_MBTD, x_bias, gate_bias, weight, bias,
        past, seen, y_MBTD, after, *strides, bias_m, B, T, D, past.shape[-2],
        ALIGN=align, W=W, SILU_CONV=silu != "none", SILU_GATE=silu == "both", SKIP=skip,
        INPLACE=past is after, BLOCK_P=triton.next_power_of_2(W - 1), **config, **overlapped(y_MBTD.device),
    )  # fmt: skip


@torch.library.custom_op("holdall::gated_conv_forward", mutates_args=())
def _forward(
    x: Tensor | None, projected: Tensor, projection_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    past: Tensor, silu: str, skip: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    after = torch.empty(past.shape, dtype=past.dtype, device=past.device)
    past = past.contiguous()
    return _launch_forward(x, projected, projection_bias, weight, bias, past, after, silu, skip), after


@_forward.register_fake
def _(x, projected, projection_bias, weight, bias, past, silu, skip):
    y = projected.new_empty(
        (*projected.shape[:3], past.shape[-1]), dtype=(projected if x is None else x).dtype
    )
    return y, past.new_empty(past.shape)


@torch.library.custom_op("holdall::gated_conv_inplace", mutates_args=("past",))
def _inplace(
    x: Tensor | None, projected: Tensor, projection_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    past: Tensor, silu: str, skip: bool,
) -> Tensor:  # fmt: skip
    return _launch_forward(x, projected, projection_bias, weight, bias, past, past, silu, skip)


@_inplace.register_fake
def _(x, projected, projection_bias, weight, bias, past, silu, skip):
    return _forward(x, projected, projection_bias, weight, bias, past, silu, skip)[0]


@once_differentiable()
@torch.library.custom_op("holdall::gated_conv_backward", mutates_args=())
def _backward(
    x: Tensor | None, projected: Tensor, projection_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    past: Tensor, dy: Tensor, dafter: Tensor, silu: str, skip: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty if it is half of the projection), of the projection and of the past; and, in
    fp32 per channel, of the parameters, (M, K, D): taps, then those biases that exist."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    x_MBTD, gate_MBTD = _branches(x, projected)
    dx, dprojected, dpast, dparameters = _backward_outputs(x, projected, projection_bias, weight, bias, past)
    if x_MBTD.numel() == 0:
        return dx, dprojected, dafter.clone(), dparameters.zero_()
    dx_MBTD, dgate_MBTD = _branches(None if x is None else dx, dprojected)
    biases = _biases(x, projection_bias)
    launch_backward(
        x_MBTD, gate_MBTD, *biases, weight, bias, past.contiguous(), _strided(dy), dafter.contiguous(),
        dx_MBTD, dgate_MBTD, dpast, dparameters, silu=silu, skip=skip,
    )  # fmt: skip
    return dx, dprojected, dpast, dparameters


def launch_backward(
    x_MBTD: Tensor, gate_MBTD: Tensor, x_bias: Tensor | None, gate_bias: Tensor | None, bias_m: int,
    weight: Tensor, bias: Tensor | None, past: Tensor, dy_MBTD: Tensor, dafter: Tensor,
    dx_MBTD: Tensor, dgate_MBTD: Tensor | None, dpast: Tensor, dparameters_MKD: Tensor,
    *, silu: str, skip: bool = False,
) -> None:  # fmt: skip
    """Write the gradients, that of the gate only if needed. Tokens of dx and dgate must have one stride."""
    M, B, T, D = x_MBTD.shape
    config = backward_config(D)
    chunk = chunk_length(M, B, T, D, weight.shape[-1], config)
    chunks = cdiv(T, chunk)
    programs = cdiv(B * chunks, config["ROWS"])
    K = dparameters_MKD.shape[1]
    sums_MQKD = torch.empty((M, programs, K, D), dtype=torch.float32, device=x_MBTD.device)
    align, strides = _strides(x_MBTD, gate_MBTD, dy_MBTD)
    _backward_kernel[(M * programs * cdiv(D, config["BLOCK_D"]),)](
        x_MBTD, gate_MBTD, x_bias, gate_bias, weight, bias,
        past, dy_MBTD, dafter, dx_MBTD, dgate_MBTD, dpast, sums_MQKD,
        *strides[:6], bias_m, *strides[6:],
        dx_MBTD.stride(2), 0 if dgate_MBTD is None else dgate_MBTD.stride(2), B, T, D, chunk, chunks,
        ALIGN=align, W=weight.shape[-1], SILU_CONV=silu != "none", SILU_GATE=silu == "both", SKIP=skip,
        SUMS=K, **config,
    )  # fmt: skip
    torch.sum(sums_MQKD, 1, out=dparameters_MKD)


def _backward_outputs(
    x: Tensor | None, projected: Tensor, projection_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    past: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    D, W = weight.shape[1:]
    rows = W + (bias is not None) + (projection_bias is not None) * (2 if x is None else 1)
    return (
        projected.new_empty((projected.shape[0], 0)) if x is None else x.new_empty(x.shape),
        projected.new_empty(projected.shape),
        past.new_empty(past.shape),
        weight.new_empty((weight.shape[0], rows, D), dtype=torch.float32),
    )


@_backward.register_fake
def _(x, projected, projection_bias, weight, bias, past, dy, dafter, silu, skip):
    return _backward_outputs(x, projected, projection_bias, weight, bias, past)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu, ctx.skip = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
    x, projected, projection_bias, weight, bias, past = ctx.saved_tensors
    dx, dprojected, dpast, dparameters = _backward(
        x, projected, projection_bias, weight, bias, past, dy, dafter, ctx.silu, ctx.skip
    )
    W = weight.shape[-1]
    dweight = dparameters[:, :W].transpose(1, 2).to(weight.dtype)
    dbias = dprojection_bias = None
    if bias is not None:
        dbias = dparameters[:, W].to(bias.dtype)
    if projection_bias is not None:
        dprojection_bias = dparameters[:, W + (bias is not None) :].view(projection_bias.shape)
        dprojection_bias = dprojection_bias.to(projection_bias.dtype)
    return None if x is None else dx, dprojected, dprojection_bias, dweight, dbias, dpast, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


@_inplace.register_vmap
def _(info, in_dims, *args):
    *tensors, past, silu, skip = (
        fold(arg, dim, info.batch_size) if isinstance(arg, Tensor) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    )
    y, after = _forward(*tensors, past, silu, skip)
    args[5].movedim(in_dims[5], 0).copy_(unfold(after, info.batch_size))
    return unfold(y, info.batch_size), 0


# -------------------------------------------------------------------------------------- the public function


@torch.library.custom_op("holdall::gated_conv_ring", mutates_args=("ring",))
def _into_ring(
    x: Tensor | None, projected: Tensor, projection_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    ring: Tensor, seen: Tensor, silu: str, skip: bool,
) -> Tensor:  # fmt: skip
    return _launch_forward(
        x, projected, projection_bias, weight, bias, ring, ring, silu, skip, seen=seen.contiguous()
    )


@_into_ring.register_fake
def _(x, projected, projection_bias, weight, bias, ring, seen, silu, skip):
    return _forward(x, projected, projection_bias, weight, bias, ring, silu, skip)[0]


def kernel_refusal(taps: int) -> str:
    """Why there is no kernel for this many taps; empty if there is one."""
    return "" if 2 <= taps <= MAX_TAPS else f"the kernel takes filters of 2 to {MAX_TAPS} taps, not {taps}"


def gated_conv(
    input_BTD: Float[Tensor, "b t d"] | None,
    projected_BTE: Float[Tensor, "b t e"],
    projection_bias_E: Float[Tensor, "e"] | None,
    weight_DW: Float[Tensor, "d w"],
    bias_D: Float[Tensor, "d"] | None,
    past_BPD: Float[Tensor, "b p d"],
    seen_B: Int[Tensor, "b"] | None = None,
    *,
    silu: Silu = "none",
    skip: bool = False,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p d"]]:
    """The kernel form of `holdall.ops.gated_conv.gated_conv`, which documents the arguments.

    Tensors may have different dtypes: sums are in fp32, y has the dtype of the convolution's input, the next
    past that of the past. With `inplace`, and without gradients, short calls overwrite the past. A few tokens
    beside a ring, without gradients, are one launch.
    """
    forms.require_kernel(input_BTD, projected_BTE, weight_DW, past_BPD)
    if why := kernel_refusal(weight_DW.shape[-1]):
        raise forms.KernelError(why)
    tensors = [None if t is None else t[None] for t in (
        input_BTD, projected_BTE, projection_bias_E, weight_DW, bias_D, past_BPD
    )]  # fmt: skip
    if seen_B is not None:
        if torch.is_grad_enabled() or projected_BTE.shape[1] > past_BPD.shape[1] - weight_DW.shape[1] + 1:
            return beside_ring(
                gated_conv, input_BTD, projected_BTE, projection_bias_E, weight_DW, bias_D, past_BPD, seen_B,
                silu=silu, skip=skip, inplace=inplace,
            )  # fmt: skip
        ring_BPD = (
            past_BPD
            if inplace and past_BPD.is_contiguous()
            else past_BPD.clone(memory_format=torch.contiguous_format)
        )
        return _into_ring(*tensors[:-1], ring_BPD[None], seen_B, silu, skip)[0], ring_BPD
    few = projected_BTE.shape[1] <= forward_config(weight_DW.shape[0], projected_BTE.shape[1])["BLOCK_T"]
    if inplace and few and past_BPD.is_contiguous() and not torch.is_grad_enabled():
        return _inplace(*tensors, silu, skip)[0], past_BPD
    y_MBTD, after_MBPD = _forward(*tensors, silu, skip)
    return y_MBTD[0], after_MBPD[0]
