"""What Mamba-2 does between its two projections: a convolution, a scan with one decay per head, a gated norm.

    [x B C] = silu(shortconv(x B C))        dt = softplus(dt + b)        A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t
    out = w * RMSNorm(y * silu(z))                      each group of channels by itself

Letters: x_t, B_t, C_t value, key and query of token t, z its gate, dt the step size, b its bias, A the rate
of a head, S_t the state, D the skip, y_t the output, w the norm's weight. Of shapes: B row, T time, F
channels of the first projection, C convolved channels, W taps, P past tokens, E inner channels, H heads, V
dims of a head, G groups, N state.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of, plain
from holdall.contract.mixer import readout_dtype
from holdall.ops.linear_attention import linear_attention
from holdall.ops.recent import ConvReplayState, recent_conv, replay_behind_conv
from holdall.ops.replay import of_each_head
from holdall.ops.short_conv import short_conv

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


class Sizes(NamedTuple):
    """The parts of the first projection's output: z (E), x (E), B and C (G, N), dt (H)."""

    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of z, of the convolution's input, of dt, and of the padding."""
        sizes = [self.inner, self.channels, self.heads]
        z, xbc, dt, rest = projected.split([*sizes, projected.shape[-1] - sum(sizes)], dim=-1)
        return z, xbc, dt, rest


def kernel_refusal(head_dim: int, state: int, taps: int) -> str:
    """Why there is no kernel for these sizes; empty if there is one."""
    return kernel_of(kernel_refusal)(head_dim, state, taps)


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
    sizes: Sizes,
    eps: float,
    *,
    chunk: int = 128,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t e"], Float[Tensor, "b w-1 c"], Float[Tensor, "b h n v"] | None]:
    """What the second projection reads, and the states of convolution and scan.

    Args:
        projected_BTF: z, x, B, C and dt; columns behind them are not read.
        past_BPC: the inputs of the convolution before these.
        s_BHNV: the incoming state of the scan; None if nothing was read yet.
        eps: of the norm.
        chunk: tokens whose pairs are computed at once. The kernel has its own.
        inplace: `s_BHNV` may be overwritten; the kernel leaves it alone.
        want_state: whether the state after the last token is needed; the kernel gives it in any case.
        form: "loop", "parallel" or "kernel".

    Returns:
        The output in the dtype of the projection, and the two states, that of the scan in at least fp32.
    """
    if form == "kernel":
        return kernel_of(mamba_2)(
            projected_BTF, conv_weight_CW, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_weight_E, past_BPC,
            s_BHNV, sizes, eps,
        )  # fmt: skip
    z_BTE, xbc_BTC, dt_BTH, _ = sizes.parts(projected_BTF)
    xbc_BTC, past_BPC = short_conv(xbc_BTC, conv_weight_CW, conv_bias_C, past_BPC, silu=True, form=form)
    q_BTHN, k_BTGN, v_BTHV, x_BTHV, log_decay_BTH = _scanned(xbc_BTC, dt_BTH, dt_bias_H, A_log_H, sizes)
    y_BTHV, s_BHNV, _ = linear_attention(
        q_BTHN, of_each_head(k_BTGN, sizes.heads), v_BTHV, s_BHNV, None, log_decay_BTH,
        chunk=chunk, inplace=inplace, want_state=want_state, form=form,
    )  # fmt: skip
    y_BTE = _gated(y_BTHV, x_BTHV, z_BTE, D_H, norm_weight_E, sizes, eps)
    return y_BTE.to(projected_BTF.dtype), past_BPC, s_BHNV


def replayed_mamba_2(
    projected_BTF: Float[Tensor, "b t f"],
    conv_weight_CW: Float[Tensor, "c w"],
    conv_bias_C: Float[Tensor, "c"],
    dt_bias_H: Float[Tensor, "h"],
    A_log_H: Float[Tensor, "h"],
    D_H: Float[Tensor, "h"],
    norm_weight_E: Float[Tensor, "e"],
    state: ConvReplayState,
    sizes: Sizes,
    eps: float,
    *,
    replay: int,
    chunk: int = 128,
    inplace: bool = False,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t e"], ConvReplayState]:
    """`mamba_2` whose state is written with every L-th token; arguments also as in `replay_attention`.

    In the kernel form the scan has one, and what stands around it is plain PyTorch.
    """
    dtype = readout_dtype(form, projected_BTF.dtype)
    z_BTE, xbc_BTC, dt_BTH, _ = sizes.parts(projected_BTF)
    xbc_BTC, conv_BPC = recent_conv(
        xbc_BTC, conv_weight_CW, conv_bias_C, state, silu=True, inplace=inplace, form=plain(form)
    )
    q_BTHN, k_BTGN, v_BTHV, x_BTHV, log_decay_BTH = _scanned(xbc_BTC, dt_BTH, dt_bias_H, A_log_H, sizes)
    y_BTHV, after = replay_behind_conv(
        q_BTHN, k_BTGN, v_BTHV.to(dtype), state, conv_BPC, log_decay_BTH,
        replay=replay, chunk=chunk, inplace=inplace, form=form,
    )  # fmt: skip
    y_BTE = _gated(y_BTHV, x_BTHV, z_BTE, D_H, norm_weight_E, sizes, eps)
    return y_BTE.to(projected_BTF.dtype), after


def _scanned(
    xbc_BTC: Tensor, dt_BTH: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys of each group, values, x, and log decays; all but queries and keys in at least fp32."""
    dtype = torch.promote_types(xbc_BTC.dtype, torch.float32)
    each = sizes.groups * sizes.state
    x_BTE, b_BTE, c_BTE = xbc_BTC.split([sizes.inner, each, each], dim=-1)
    k_BTGN, q_BTGN = (u.unflatten(-1, (sizes.groups, sizes.state)) for u in (b_BTE, c_BTE))
    # the step sizes decide what is forgotten over thousands of tokens: not in bf16
    dt_BTH = F.softplus(dt_BTH.to(dtype) + dt_bias_H.to(dtype))
    log_decay_BTH = -A_log_H.to(dtype).exp() * dt_BTH
    x_BTHV = x_BTE.unflatten(-1, (sizes.heads, -1)).to(dtype)
    v_BTHV = dt_BTH[..., None] * x_BTHV
    return of_each_head(q_BTGN, sizes.heads), k_BTGN, v_BTHV, x_BTHV, log_decay_BTH


def _gated(
    y_BTHV: Tensor,
    x_BTHV: Tensor,
    z_BTE: Tensor,
    D_H: Tensor,
    norm_weight_E: Tensor,
    sizes: Sizes,
    eps: float,
) -> Tensor:
    """The scan's output with the skip, gated and normalised, in at least fp32."""
    dtype = x_BTHV.dtype
    y_BTHV = torch.addcmul(y_BTHV.to(dtype), x_BTHV, D_H.to(dtype)[:, None])
    y_BTGE = (y_BTHV.flatten(2) * F.silu(z_BTE.to(dtype))).unflatten(-1, (sizes.groups, -1))
    return F.rms_norm(y_BTGE, y_BTGE.shape[-1:], eps=eps).flatten(2) * norm_weight_E
