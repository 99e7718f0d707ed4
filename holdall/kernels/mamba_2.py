"""Mamba-2 between its two projections: convolution, scan and gated norm, forward and backward.

With x, B and C from the short convolution, per head, and everything in fp32 except operands of products:

    dt_t = softplus(raw_t + bias)      l_t = -exp(A_log) dt_t
    h_t = exp(l_t) h_{t-1} + dt_t B_t x_t^T        y_t = h_t^T C_t
    out_t = w rms_norm((y_t + D x_t) silu(z_t))

A chunk of tokens starts from h; L_i is the sum of l up to i within it, "last" its last token:

    P_ij = (C_i . B_j) exp(L_i - L_j) dt_j for j <= i, 0 else
    y_i  = sum_j P_ij x_j + exp(L_i) h^T C_i
    h'   = exp(L_last) h + sum_j w_j B_j x_j^T            w_j = dt_j exp(L_last - L_j)

Backward, from the last chunk to the first, with s the gradient of h' and A_ij = dy_i . x_j:

    dP_ij = A_ij exp(L_i - L_j) dt_j                      dC_i = sum_j dP_ij B_j + exp(L_i) h dy_i
    dx_j = sum_i P_ij dy_i + w_j s^T B_j + D dy_j         dB_j = sum_i dP_ij C_i + w_j s x_j
    ds = exp(L_last) s + sum_i exp(L_i) C_i dy_i^T        r_j = B_j . s x_j
    dL_i = sum_j A_ij P_ij - sum_j A_ji P_ji + exp(L_i) C_i . h dy_i - w_i r_i
           [+ exp(L_last) <h, s> + sum_j w_j r_j for the last]
    dl_t = sum_{i >= t} dL_i within the chunk             dA_log = sum_t dl_t l_t
    ddt_j = sum_i A_ij P_ij / dt_j + exp(L_last - L_j) r_j - exp(A_log) dl_j

In fp32 dl_t is computed as the exact sum over the terms that its decay multiplies, without cancellation, and
L is stored in two parts. Differences of cumulative decays are only taken within a chunk. A program has one
head of one row and loops over its chunks with the state in registers. The forward stores the state at the
start of each chunk, in x's dtype, so that the backward is one loop too. dt x, the decays between tokens and
B and C per head are never stored; each head of a group writes a gradient of B and C, and another kernel sums
them. D x is added by the norm's kernel.

Memory traffic per token, C = E + 2 G N: forward the convolution reads and writes C, the scan reads C and
writes E and the states, N E / 32, and the norm reads 3 E and writes E; backward norm 6 E, scan 3 E + 2 G N +
N E / 32 and 4 H N for the heads' gradients of B and C, convolution 3 C. At E = 256, 4 heads and N = 24
(padded to 32) these are 2.4 and 3.9 thousand elements, for 262,144 tokens in bf16 1.3 and 2.0 GB, 0.4 and 0.7
ms at 3.0 TB/s. All gradients are written directly into the gradient of the first projection's output: nothing
is split or concatenated.

Letters: M member of a population (1 outside of `vmap`), B row, T time, F outputs of the first projection,
C channels of the convolution, P past tokens of it, W taps, E inner channels, H heads, G groups, N state, V
channels of a head, Q chunks, R heads of a group.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import cdiv, gated_conv, gated_rms_norm, register_batch_vmap
from holdall.kernels.language import add_up, dot, exp, narrow, softplus
from holdall.ops import mamba_2 as ops
from holdall.ops.derivatives import once_differentiable

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Float

LARGEST = 128 * 64
"""Most elements of a head's state, with dimensions padded to powers of 2: it is in a program's registers."""


class Sizes(ops.Sizes):
    """With what a program makes of them."""

    @property
    def padded(self) -> tuple[int, int]:
        """State and head dimension, padded: products have at least 16 rows and columns."""
        state, dim = (max(16, triton.next_power_of_2(size)) for size in (self.state, self.head_dim))
        return state, dim

    def tile(self, dtype: torch.dtype) -> dict[str, int]:
        """The scan's constants: chunks are shorter in fp32, whose products cannot use tensor cores."""
        state, dim = self.padded
        return {
            "HEADS": self.heads, "DIM": self.head_dim, "GROUPS": self.groups, "STATE": self.state,
            "N": state, "V": dim, "CHUNK": 16 if dtype == torch.float32 else 32,
        }  # fmt: skip

    def config(self, dtype: torch.dtype, *, backward: bool) -> dict[str, int]:
        state, dim = self.padded
        if dtype == torch.float32 or state * dim > 64 * 64:
            return {"num_warps": 8, "num_stages": 1}
        if backward:  # few enough registers for three programs per multiprocessor instead of two
            return {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
        return {"num_warps": 4, "num_stages": 3}


def kernel_refusal(head_dim: int, state: int, taps: int) -> str:
    """Why there is no kernel for these sizes; empty if there is one."""
    if math.prod(Sizes(1, head_dim, 1, state).padded) > LARGEST:
        return f"the kernel takes up to {LARGEST} elements of state per head, not {state} times {head_dim}"
    return gated_conv.kernel_refusal(taps)


def mamba_2(
    projected_BTF: Float[Tensor, "b t f"],
    conv_weight_CW: Float[Tensor, "c w"],
    conv_bias_C: Float[Tensor, "c"],
    dt_bias_H: Float[Tensor, "h"],
    A_log_H: Float[Tensor, "h"],
    D_H: Float[Tensor, "h"],
    norm_weight_E: Float[Tensor, "e"],
    past_BPC: Float[Tensor, "b w-1 c"],
    s_BHNV: Float[Tensor, "b h n v"] | None,
    sizes: ops.Sizes,
    eps: float,
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b w-1 c"], Float[Tensor, "b h n v"]]:
    """The input of the second projection, and the states of convolution and scan, the latter in fp32.

    projected_BTF may have padding columns at its end. Products are in its dtype, sums in fp32.

    Raises:
        KernelError: no kernel can run on these tensors, or for these sizes.
    """
    tensors = (
        projected_BTF, conv_weight_CW, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_E, past_BPC, s_BHNV
    )  # fmt: skip
    forms.require_kernel(*tensors)
    if why := kernel_refusal(sizes.head_dim, sizes.state, conv_weight_CW.shape[-1]):
        raise forms.KernelError(why)
    out, past, s, *_ = _forward(
        *(None if x is None else x[None] for x in tensors), list(sizes), eps, torch.is_grad_enabled()
    )
    return out[0], past[0], s[0]


# ------------------------------------------------------------------------------------ the custom operations


@torch.library.custom_op("holdall::mamba_2_forward", mutates_args=())
def _forward(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, past: Tensor, s: Tensor | None, sizes: list[int], eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, past and state; and, for the backward, the outputs of convolution and scan, the steps, and the
    state at the start of each chunk, (M, 0) if it is not needed."""
    size = Sizes(*sizes)
    projected = projected.contiguous()
    M, B, T, _ = projected.shape
    out, after, s_after, xbc, y, steps, starts = _outputs(projected, past, size, keep)
    z, into_conv, dt, _ = size.parts(projected)
    if T == 0:
        after.copy_(past)
        s_after.zero_() if s is None else s_after.copy_(s)
        return out, after, s_after, xbc, y, steps, starts
    gated_conv.launch_forward(
        into_conv, _open(into_conv), None, None, 0, conv_weight.contiguous(), conv_bias.contiguous(),
        past.contiguous(), after, xbc, silu="conv",
    )  # fmt: skip
    if B:
        tile = size.tile(projected.dtype)
        _steps_kernel[(M * B * cdiv(T, tile["CHUNK"]),)](
            dt, dt_bias.contiguous(), A_log.contiguous(), steps, dt.stride(2), B, T,
            HEADS=size.heads, CHUNK=tile["CHUNK"], PADDED=triton.next_power_of_2(size.heads),
            EXACT=_exact(projected),
        )  # fmt: skip
        _forward_kernel[(M * B * size.heads,)](
            xbc, steps, None if s is None else s.contiguous(), y, s_after,
            starts if keep else None, B, T, **tile,
            **size.config(projected.dtype, backward=False),
        )  # fmt: skip
    out = gated_rms_norm.launch_forward(
        y.flatten(1, 2), z.flatten(1, 2), norm_weight.contiguous(), eps,
        x_MNE=xbc[..., : size.inner].flatten(1, 2), D_MH=D.contiguous(), groups=size.groups,
    ).view(out.shape)  # fmt: skip
    return out, after, s_after, xbc, y, steps, starts


def _exact(x: Tensor) -> bool:
    """Whether cumulative decays are stored in two parts."""
    return x.dtype == torch.float32


def _outputs(projected: Tensor, past: Tensor, size: Sizes, keep: bool) -> tuple[Tensor, ...]:
    M, B, T, _ = projected.shape
    tile = size.tile(projected.dtype)
    kept = (B, cdiv(T, tile["CHUNK"]), size.heads, tile["V"], tile["N"]) if keep else (0,)
    return (
        projected.new_empty((M, B, T, size.inner)),
        torch.empty(past.shape, dtype=past.dtype, device=past.device),
        projected.new_empty((M, B, size.heads, size.state, size.head_dim), dtype=torch.float32),
        projected.new_empty((M, B, T, size.channels)),
        projected.new_empty((M, B, T, size.inner)),
        projected.new_empty((M, B, size.heads, 4 + _exact(projected), T), dtype=torch.float32),
        projected.new_empty((M, *kept)),
    )


def _open(x: Tensor) -> Tensor:
    """A gate of ones for a convolution without one, broadcast over tokens, so that it stays in cache."""
    return x.new_ones(x.shape[-1]).expand(x.shape)


@_forward.register_fake
def _(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, past, s, sizes, eps, keep
):  # fmt: skip
    return _outputs(projected, past, Sizes(*sizes), keep)


@once_differentiable()
@torch.library.custom_op("holdall::mamba_2_backward", mutates_args=())
def _backward(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, past: Tensor, s: Tensor | None, xbc: Tensor, y: Tensor, steps: Tensor,
    starts: Tensor, dout: Tensor, dafter: Tensor | None, ds_after: Tensor | None,
    sizes: list[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the projection, the past and the state, (M, 0) if there was none; and, in fp32, of the
    convolution's taps and bias, (M, W + 1, C), of the norm's weight, (M, E), and of dt_bias, A_log and D,
    (M, 3, H)."""
    size, R = Sizes(*sizes), sizes[0] // sizes[2]
    projected = projected.contiguous()
    M, B, T, _ = projected.shape
    dprojected, dpast, ds, dconv, dnorm, dscan = _gradients_like(projected, conv_weight, past, s, size)
    dafter = torch.zeros(past.shape, dtype=past.dtype, device=past.device) if dafter is None else dafter
    z, into_conv, *_ = size.parts(projected)
    dz, dinto_conv, ddt, drest = size.parts(dprojected)
    if projected.numel() == 0:
        if s is not None:
            ds.zero_() if ds_after is None else ds.copy_(ds_after)
        return dprojected, dafter.clone(), ds, dconv.zero_(), dnorm.zero_(), dscan.zero_()

    dy, dnorm, dD = gated_rms_norm.launch_backward(
        y.flatten(1, 2), z.flatten(1, 2), norm_weight.contiguous(),
        dout.contiguous().flatten(1, 2), dz.flatten(1, 2), eps,
        x_MNE=xbc[..., : size.inner].flatten(1, 2), D_MH=D.contiguous(), groups=size.groups,
    )  # fmt: skip

    dxbc = torch.empty(xbc.shape, dtype=xbc.dtype, device=xbc.device)
    dbc, columns = dxbc[..., size.inner :], 2 * size.groups * size.state
    each_dbc = dbc if R == 1 else dbc.new_empty((M, B, T, R, columns))
    sums_MB2H = torch.empty((M, B, 2, size.heads), dtype=torch.float32, device=xbc.device)
    _backward_kernel[(M * B * size.heads,)](
        xbc, steps, A_log.contiguous(), D.contiguous(), starts, dy,
        None if ds_after is None else ds_after.contiguous(),
        dxbc, ddt, each_dbc, None if s is None else ds, sums_MB2H,
        ddt.stride(2), each_dbc.stride(2), B, T,
        **size.tile(projected.dtype), **size.config(projected.dtype, backward=True),
    )  # fmt: skip
    if R > 1:
        _sum_kernel[(cdiv(M * B * T, 32),)](
            each_dbc, dbc, M * B * T, dbc.stride(2),
            R=R, COLUMNS=columns, PADDED=triton.next_power_of_2(columns), BLOCK=32,
        )  # fmt: skip

    gated_conv.launch_backward(
        into_conv, _open(into_conv), None, None, 0, conv_weight.contiguous(), conv_bias.contiguous(),
        past.contiguous(), dxbc, dafter.contiguous(), dinto_conv, None, dpast, dconv, silu="conv",
    )  # fmt: skip
    drest.zero_()
    assert dD is not None
    dscan = torch.cat((sums_MB2H.sum(1), dD[:, None]), 1)
    return dprojected, dpast, ds, dconv, dnorm, dscan


def _gradients_like(
    projected: Tensor, conv_weight: Tensor, past: Tensor, s: Tensor | None, size: Sizes
) -> tuple[Tensor, ...]:
    M, fp32 = projected.shape[0], torch.float32
    return (
        projected.new_empty(projected.shape),
        past.new_empty(past.shape),
        projected.new_empty((M, 0)) if s is None else s.new_empty(s.shape),
        projected.new_empty((M, conv_weight.shape[-1] + 1, size.channels), dtype=fp32),
        projected.new_empty((M, size.inner), dtype=fp32),
        projected.new_empty((M, 3, size.heads), dtype=fp32),
    )


@_backward.register_fake
def _(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, past, s, xbc, y, steps, starts,
    dout, dafter, ds_after, sizes, eps,
):  # fmt: skip
    return _gradients_like(projected, conv_weight, past, s, Sizes(*sizes))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.sizes, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*tensors, *output[3:])


def _gradients(
    ctx: Any, dout: Tensor | None, dafter: Tensor | None, ds_after: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    *tensors, xbc, y, steps, starts = ctx.saved_tensors
    _, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, _, s = tensors
    dout = torch.zeros_like(y) if dout is None else dout
    dprojected, dpast, ds, dconv, dnorm, dscan = _backward(
        *tensors, xbc, y, steps, starts, dout, dafter, ds_after, ctx.sizes, ctx.eps
    )
    W = conv_weight.shape[-1]
    return (
        dprojected, dconv[:, :W].transpose(1, 2).to(conv_weight.dtype), dconv[:, W].to(conv_bias.dtype),
        dscan[:, 0].to(dt_bias.dtype), dscan[:, 1].to(A_log.dtype), dscan[:, 2].to(D.dtype),
        dnorm.to(norm_weight.dtype), dpast, None if s is None else ds, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_setup_context)
register_batch_vmap(_forward)
register_batch_vmap(_backward)


# --------------------------------------------------------------------------------------------- the kernels


@triton.jit(do_not_specialize=["B", "T"])
def _steps_kernel(
    dt_ptr, dt_bias_ptr, a_log_ptr, steps_ptr, dt_t, B, T,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """For each head of a chunk: dt, the log decays from the chunk's start and to its end, softplus's slope.

    In fp32 also the rounding error of the second: decays between tokens are differences of much larger sums.

    This is a separate kernel, since within the others the compiler would repeat it for every layout.
    """
    chunks = tl.cdiv(T, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    t = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)[:, None]
    head = tl.arange(0, PADDED)
    real = head < HEADS
    here = (t < T) & real[None, :]
    own = row // B * HEADS + head
    bias = tl.load(dt_bias_ptr + own, mask=real, other=0.0).to(tl.float32)[None, :]
    rate = exp(tl.load(a_log_ptr + own, mask=real, other=0.0).to(tl.float32), True)[None, :]
    raw = tl.load(dt_ptr + (row * T + t) * dt_t + head[None, :], mask=here, other=0.0).to(tl.float32) + bias
    dt = tl.where(here, softplus(raw, True), 0.0)
    log_decay = -rate * dt
    steps_ptr += (row * HEADS + head[None, :]) * (5 if EXACT else 4) * T + t
    tl.store(steps_ptr, dt, mask=here)
    if EXACT:
        sums = tl.cumsum(log_decay.to(tl.float64), 0)
        tl.store(steps_ptr + T, sums.to(tl.float32), mask=here)
        tl.store(steps_ptr + 4 * T, (sums - sums.to(tl.float32).to(tl.float64)).to(tl.float32), mask=here)
    else:
        tl.store(steps_ptr + T, tl.cumsum(log_decay, 0), mask=here)
    tl.store(steps_ptr + 2 * T, tl.cumsum(log_decay, 0, reverse=True) - log_decay, mask=here)
    small = exp(-tl.abs(raw), True)
    tl.store(steps_ptr + 3 * T, tl.where(raw < 0, small, 1.0) / (1 + small), mask=here)


@triton.jit
def _steps(steps_ptr, q, T, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """dt, log decay from the chunk's start, in two parts, and decay to its end, and over all of it."""
    t = q * CHUNK + tl.arange(0, CHUNK)
    dt = tl.load(steps_ptr + t, mask=t < T, other=0.0)
    sums = tl.load(steps_ptr + T + tl.minimum(t, T - 1))  # no decay after the end
    low = sums
    if EXACT:
        low = tl.load(steps_ptr + 4 * T + tl.minimum(t, T - 1))
    rest = tl.load(steps_ptr + 2 * T + tl.minimum(t, T - 1))
    last = tl.load(steps_ptr + T + tl.minimum(q * CHUNK + CHUNK, T) - 1)
    return dt, sums, low, exp(rest, EXACT), exp(last, EXACT)


@triton.jit
def _between(sums, low, CHUNK: tl.constexpr, EXACT: tl.constexpr):
    """The decay from token j to token i; 0 if j is later."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    log_decay = sums[:, None] - sums[None, :]
    if EXACT:
        log_decay += low[:, None] - low[None, :]
    return tl.where(i >= j, exp(tl.minimum(log_decay, 0.0), EXACT), 0.0)


@triton.jit(do_not_specialize=["B", "T"])
def _forward_kernel(
    xbc_ptr, steps_ptr, s_ptr, y_ptr, s_after_ptr, starts_ptr, B, T,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = HEADS * DIM + 2 * GROUPS * STATE
    head = tl.program_id(0) % HEADS
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    t, n, v = tl.arange(0, CHUNK), tl.arange(0, N), tl.arange(0, V)
    dtype: tl.constexpr = xbc_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32

    x_at = t[:, None] * CHANNELS + head * DIM + v[None, :]
    b_at = t[:, None] * CHANNELS + HEADS * DIM + head // (HEADS // GROUPS) * STATE + n[None, :]
    y_at = t[:, None] * (HEADS * DIM) + head * DIM + v[None, :]
    s_at = (row * HEADS + head) * STATE * DIM + n[None, :] * DIM + v[:, None]
    s_real = (v < DIM)[:, None] & (n < STATE)[None, :]
    steps_ptr += (row * HEADS + head) * (5 if EXACT else 4) * T
    h = tl.zeros((V, N), tl.float32)
    if s_ptr is not None:
        h += tl.load(s_ptr + s_at, mask=s_real, other=0.0).to(tl.float32)

    chunks = tl.cdiv(T, CHUNK)
    for q in range(chunks):
        token = row * T + q * CHUNK
        ok = t < T - q * CHUNK
        x_ok, b_ok = ok[:, None] & (v < DIM)[None, :], ok[:, None] & (n < STATE)[None, :]
        x = tl.load(xbc_ptr + token * CHANNELS + x_at, mask=x_ok, other=0.0)
        b = tl.load(xbc_ptr + token * CHANNELS + b_at, mask=b_ok, other=0.0)
        c = tl.load(xbc_ptr + token * CHANNELS + GROUPS * STATE + b_at, mask=b_ok, other=0.0)
        dt, sums, low, after, whole = _steps(steps_ptr, q, T, CHUNK, EXACT)
        start = narrow(h, dtype)
        if starts_ptr is not None:
            starts_at = ((row * chunks + q) * HEADS + head) * (N * V) + v[:, None] * N + n[None, :]
            tl.store(starts_ptr + starts_at, start)
        pairs = narrow(dot(c, tl.trans(b)) * _between(sums, low, CHUNK, EXACT) * dt[None, :], dtype)
        y = dot(pairs, x, dot(c, tl.trans(start)) * exp(sums, EXACT)[:, None])
        tl.store(y_ptr + token * (HEADS * DIM) + y_at, narrow(y, dtype), mask=x_ok)
        weighted = narrow(b.to(tl.float32) * (dt * after)[:, None], dtype)
        h = dot(tl.trans(x), weighted, h * whole)
    tl.store(s_after_ptr + s_at, h, mask=s_real)


@triton.jit(do_not_specialize=["B", "T"])
def _backward_kernel(
    xbc_ptr, steps_ptr, a_log_ptr, d_ptr, starts_ptr, dy_ptr, ds_after_ptr,
    dxbc_ptr, ddt_ptr, dbc_ptr, ds_ptr, sums_ptr, ddt_t, dbc_t, B, T,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    N: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = HEADS * DIM + 2 * GROUPS * STATE
    EACH: tl.constexpr = HEADS // GROUPS
    head = tl.program_id(0) % HEADS
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    own = row // B * HEADS + head
    rate = exp(tl.load(a_log_ptr + own).to(tl.float32), True)
    skip = tl.load(d_ptr + own).to(tl.float32)
    t, n, v = tl.arange(0, CHUNK), tl.arange(0, N), tl.arange(0, V)
    dtype: tl.constexpr = xbc_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32

    x_at = t[:, None] * CHANNELS + head * DIM + v[None, :]
    b_at = t[:, None] * CHANNELS + HEADS * DIM + head // EACH * STATE + n[None, :]
    y_at = t[:, None] * (HEADS * DIM) + head * DIM + v[None, :]
    db_at = t[:, None] * dbc_t + (head % EACH * (2 * GROUPS) + head // EACH) * STATE + n[None, :]
    s_at = (row * HEADS + head) * STATE * DIM + n[None, :] * DIM + v[:, None]
    s_real = (v < DIM)[:, None] & (n < STATE)[None, :]
    steps_ptr += (row * HEADS + head) * (5 if EXACT else 4) * T
    ds = tl.zeros((V, N), tl.float32)
    if ds_after_ptr is not None:
        ds += tl.load(ds_after_ptr + s_at, mask=s_real, other=0.0).to(tl.float32)
    # per token; summed over tokens at the end
    dbias, da_log = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    lost_dbias, lost_da_log = dbias, da_log

    chunks = tl.cdiv(T, CHUNK)
    for back in range(chunks):
        q = chunks - 1 - back
        token = row * T + q * CHUNK
        ok = t < T - q * CHUNK
        x_ok, b_ok = ok[:, None] & (v < DIM)[None, :], ok[:, None] & (n < STATE)[None, :]
        x = tl.load(xbc_ptr + token * CHANNELS + x_at, mask=x_ok, other=0.0)
        b = tl.load(xbc_ptr + token * CHANNELS + b_at, mask=b_ok, other=0.0)
        c = tl.load(xbc_ptr + token * CHANNELS + GROUPS * STATE + b_at, mask=b_ok, other=0.0)
        dy = tl.load(dy_ptr + token * (HEADS * DIM) + y_at, mask=x_ok, other=0.0)
        starts_at = ((row * chunks + q) * HEADS + head) * (N * V) + v[:, None] * N + n[None, :]
        start = tl.load(starts_ptr + starts_at)
        dt, sums, low, after, whole = _steps(steps_ptr, q, T, CHUNK, EXACT)
        until, weight = exp(sums, EXACT), dt * after

        between = _between(sums, low, CHUNK, EXACT) * dt[None, :]
        dpairs = dot(dy, tl.trans(x))
        dpairs *= between
        pairs = dot(c, tl.trans(b))
        share = dpairs * pairs
        share_j = tl.sum(share, 0)
        if EXACT:  # the exact sum over the terms that the decay of token i multiplies
            across = tl.cumsum(share, 1) - share
            dlog_decay = tl.sum(tl.where(t[:, None] >= t[None, :], across, 0.0), 0)
        else:
            dlog_decay = tl.cumsum(tl.sum(share, 1) - share_j, 0, reverse=True)
        dpairs, pairs = narrow(dpairs, dtype), narrow(pairs * between, dtype)

        ds_narrow = narrow(ds, dtype)
        dx = dot(b, tl.trans(ds_narrow)) * weight[:, None] + skip * dy.to(tl.float32)
        dx = dot(tl.trans(pairs), dy, dx)
        tl.store(dxbc_ptr + token * CHANNELS + x_at, narrow(dx, dtype), mask=x_ok)

        from_end = dot(x, ds_narrow) * weight[:, None]
        to_end_j = tl.sum(b.to(tl.float32) * from_end, 1)
        share_j += to_end_j
        db = dot(tl.trans(dpairs), c, from_end)
        tl.store(dbc_ptr + token * dbc_t + db_at, narrow(db, dtype), mask=b_ok)

        from_start = dot(dy, start) * until[:, None]
        dc = dot(dpairs, b, from_start)
        tl.store(dbc_ptr + token * dbc_t + GROUPS * STATE + db_at, narrow(dc, dtype), mask=b_ok)

        dlog_decay += tl.cumsum(tl.sum(c.to(tl.float32) * from_start, 1), 0, reverse=True)
        dlog_decay += tl.cumsum(to_end_j, 0) - to_end_j
        dlog_decay += whole * tl.sum(tl.sum(start.to(tl.float32) * ds, 1), 0)
        slope = tl.load(steps_ptr + 3 * T + q * CHUNK + t, mask=ok, other=0.0)
        draw = (share_j / tl.where(dt > 0, dt, 1.0) - rate * dlog_decay) * slope
        if EXACT:
            dbias, lost_dbias = add_up(dbias, draw, lost_dbias)
            da_log, lost_da_log = add_up(da_log, -dlog_decay * rate * dt, lost_da_log)
        else:
            dbias += draw
            da_log -= dlog_decay * rate * dt
        tl.store(ddt_ptr + token * ddt_t + head + t * ddt_t, narrow(draw, dtype), mask=ok)
        weighted = narrow(c.to(tl.float32) * until[:, None], dtype)
        ds = dot(tl.trans(dy), weighted, ds * whole)

    if ds_ptr is not None:
        tl.store(ds_ptr + s_at, ds, mask=s_real)
    sums_ptr += row * 2 * HEADS + head
    tl.store(sums_ptr, tl.sum(dbias, 0))
    tl.store(sums_ptr + HEADS, tl.sum(da_log, 0))


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(
    each_ptr, sum_ptr, rows, sum_t,
    R: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of B and C, summed over the heads of a group in order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    here = (row < rows) & (column < COLUMNS)
    total = tl.zeros((BLOCK, PADDED), tl.float32)
    for r in tl.static_range(R):
        total += tl.load(each_ptr + (row * R + r) * COLUMNS + column, mask=here, other=0.0).to(tl.float32)
    tl.store(sum_ptr + row * sum_t + column, narrow(total, sum_ptr.dtype.element_ty), mask=here)
