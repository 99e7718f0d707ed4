"""H3: keys through a shift, their products with values through a diagonal state space, read by queries.

    [q | k | v] = W x        k~ = shift(k)        m_ij = memory(k~_i v_j)        y_j = sum_i q_i m_ij

per head, i and j < r, each state space with a skip of its own.

Letters: x and y_j input and output, q, k, v queries, keys and values, k~ shifted keys, i and j dimensions of
a head, m_ij the memory of key i and value j, W a learned map. Of shapes: B row, T time, D width, H heads, K
and V keys and values of a head (r of each), N modes, L taps of the shift, P past tokens, M rows of a head's
products.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of, plain
from holdall.ops import ssm
from holdall.ops.long_conv import BY_PRODUCTS, long_conv

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Complex, Float


def kernel_refusal(head_dim: int) -> str:
    """Why there is no kernel for this head dimension; empty if there is one."""
    return kernel_of(kernel_refusal)(head_dim)


def h3(
    input_BTD: Float[Tensor, "b t d"],
    qkv_weight_ED: Float[Tensor, "3*d d"],
    qkv_bias_E: Float[Tensor, "3*d"],
    shift_DL: Float[Tensor, "d l"],
    shift_skip_D: Float[Tensor, "d"],
    memory: tuple[Complex[Tensor, "h n"], Complex[Tensor, "h n"], Complex[Tensor, "h n"]],
    memory_skip_H: Float[Tensor, "h"],
    out_weight_DD: Float[Tensor, "d d"],
    out_bias_D: Float[Tensor, "d"],
    past_BPD: Float[Tensor, "b l-1 d"] | None,
    h_BKVHN2: Float[Tensor, "b r r h n 2"] | None,
    *,
    chunk: int = ssm.CHUNK,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b l-1 d"] | None, Float[Tensor, "b r r h n 2"] | None]:
    """Projections included, since on a GPU they change the layout for products along time.

    Args:
        shift_DL: what the shift convolves with, in the dtype to compute in.
        memory: log_a, b and c of the diagonal state space of each head, as in `ssm.diagonal_ssm`.
        past_BPD, h_BKVHN2: inputs that the shift still needs, and the modes; None if nothing was read yet.
        chunk: tokens per Fourier transform.
        want_state: whether the state after the last token is needed.
        form: "loop", "parallel" or "kernel", which there is for whole rows of up to `BY_PRODUCTS` tokens;
            others are the library's transforms.

    Returns:
        y_BTD, and the next past and modes.
    """
    fresh = h_BKVHN2 is None
    if form == "kernel" and fresh and not want_state and input_BTD.shape[1] <= BY_PRODUCTS:
        y_BTD = kernel_of(h3)(
            input_BTD, qkv_weight_ED, qkv_bias_E, shift_DL, shift_skip_D, memory, memory_skip_H,
            out_weight_DD, out_bias_D,
        )  # fmt: skip
        return y_BTD, None, None
    read_BTD, past_BPD, h_BKVHN2 = between_projections(
        F.linear(input_BTD, qkv_weight_ED, qkv_bias_E), shift_DL, shift_skip_D, memory, memory_skip_H,
        past_BPD, h_BKVHN2, chunk=chunk, want_state=want_state, form=form,
    )  # fmt: skip
    return F.linear(read_BTD, out_weight_DD, out_bias_D), past_BPD, h_BKVHN2


def between_projections(
    qkv_BTE: Tensor,
    shift_DL: Tensor,
    shift_skip_D: Tensor,
    memory: tuple[Tensor, Tensor, Tensor],
    memory_skip_H: Tensor,
    past_BPD: Tensor | None,
    h_BKVHN2: Tensor | None,
    *,
    chunk: int = ssm.CHUNK,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `h3` does between its projections, of whatever maps they are."""
    rows, width, heads = qkv_BTE.shape[0], qkv_BTE.shape[2] // 3, len(memory_skip_H)
    head_dim, dtype = width // heads, shift_DL.dtype
    if past_BPD is None:
        past_BPD = qkv_BTE.new_zeros(rows, shift_DL.shape[1] - 1, width)
    if h_BKVHN2 is None and form == "loop":
        modes = memory[0].shape[1]
        h_BKVHN2 = qkv_BTE.new_zeros(rows, head_dim, head_dim, heads, modes, 2, dtype=dtype)
    q_BTD, k_BTD, v_BTD = qkv_BTE.to(dtype).chunk(3, dim=-1)
    k_BTD, past_BPD = shift(k_BTD, shift_DL, shift_skip_D, past_BPD, form)
    q_BTKH, k_BTKH, v_BTVH = (u.unflatten(-1, (heads, head_dim)).mT for u in (q_BTD, k_BTD, v_BTD))
    kv_BTKVH = k_BTKH[:, :, :, None] * v_BTVH[:, :, None]
    m_BKVTH, h_BKVHN2 = remember(kv_BTKVH, memory, memory_skip_H, h_BKVHN2, chunk, want_state, form)
    # a product and a sum: as tiny matrix products, one per token and head, it takes a GPU 50 times longer
    y_BTVH = (q_BTKH[:, :, :, None] * m_BKVTH.permute(0, 3, 1, 2, 4)).sum(2)
    return y_BTVH.flatten(2).to(qkv_BTE.dtype), past_BPD, h_BKVHN2


def shift(
    k_BTD: Tensor, shift_DL: Tensor, skip_D: Tensor, past_BPD: Tensor, form: str = "parallel"
) -> tuple[Tensor, Tensor]:
    """The keys as the shift's state space puts them out, and its inputs after them."""
    new = k_BTD.shape[1]
    # as a state can have hundreds of slots, the shift is a job for a long convolution
    y_BTD, seen_BSD = long_conv(
        k_BTD, F.pad(shift_DL, (0, new - 1)).T, past_BPD.to(k_BTD.dtype), form=plain(form)
    )
    after_BPD = seen_BSD[:, new:].to(past_BPD.dtype, copy=True)
    return torch.addcmul(y_BTD, k_BTD, skip_D.to(k_BTD.dtype)), after_BPD


def remember(
    kv_BTKVH: Tensor,
    memory: tuple[Tensor, Tensor, Tensor],
    skip_H: Tensor,
    h_BKVHN2: Tensor | None,
    chunk: int = ssm.CHUNK,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Tensor, Tensor | None]:
    """The diagonal state space of each head, all of whose products are rows to it."""
    sizes = (-1, *kv_BTKVH.shape[2:4])
    kv_MTH = kv_BTKVH.permute(0, 2, 3, 1, 4).flatten(0, 2)
    h_MHN2: Tensor | None = None if h_BKVHN2 is None else h_BKVHN2.flatten(0, 2)
    if form == "loop":
        assert h_MHN2 is not None
        y_MTH, h_MHN2 = ssm.diagonal_ssm_loop(kv_MTH, *memory, h_MHN2)
    else:
        y_MTH, h_MHN2 = ssm.diagonal_ssm(kv_MTH, *memory, h_MHN2, chunk=chunk, want_state=want_state)
    y_MTH = torch.addcmul(y_MTH, kv_MTH, skip_H.to(kv_BTKVH.dtype))
    return y_MTH.unflatten(0, sizes), None if h_MHN2 is None else h_MHN2.unflatten(0, sizes)
