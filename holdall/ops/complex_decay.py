"""Linear attention whose decay is a complex number per head and token: the state shrinks, and turns.

    S_t = exp(l_t) u_t S_{t-1} + k_t v_t^T        y_t = q_t^T Re(S_t)        |u_t| = 1

Complex numbers are kept as pairs (re, im) in a last dimension of 2.

Letters: q_t, k_t, v_t query, key and value of token t, S_t the state, l_t the log and u_t the direction of
its decay, y_t the output. Of shapes: B row, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.ops.linear_attention import linear_attention
from holdall.ops.ssm import as_complex

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def complex_decay_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHKV2: Float[Tensor, "b h k v 2"],
    log_decay_BTH: Float[Tensor, "b t h"],
    turn_BTH2: Float[Tensor, "b t h 2"],
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v 2"]]:
    """The definition; arguments and results as in `complex_decay`."""
    dtype = s_BHKV2.dtype
    a_BTH = log_decay_BTH.to(dtype).exp() * torch.view_as_complex(turn_BTH2.to(dtype).contiguous())
    s_BHKV = as_complex(s_BHKV2)
    ys = []
    for t in range(q_BTHK.shape[1]):
        q_BHK, k_BHK, v_BHV = (u[:, t].to(dtype) for u in (q_BTHK, k_BTHK, v_BTHV))
        s_BHKV = a_BTH[:, t, :, None, None] * s_BHKV + k_BHK[..., :, None] * v_BHV[..., None, :]
        ys.append(torch.einsum("bhk,bhkv->bhv", q_BHK, s_BHKV.real))
    return torch.stack(ys, dim=1).to(v_BTHV.dtype), torch.view_as_real(s_BHKV)


def complex_decay(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    s_BHKV2: Float[Tensor, "b h k v 2"] | None,
    log_decay_BTH: Float[Tensor, "b t h"],
    turn_BTH2: Float[Tensor, "b t h 2"],
    *,
    chunk: int = 32,
    want_state: bool = True,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v 2"] | None]:
    """Chunk by chunk as linear attention with real decay and twice the features. O(T (C (K + V) + K V)).

    Let U_t be the product of a chunk's turns up to t. Seen from a frame that turns along, the state S_t / U_t
    does not turn: keys k [Re 1/U, -Im 1/U] build its real and its negative imaginary part, and queries
    q [Re U, Im U] read it. At a chunk's end it is turned back, and nothing adds up over more than a chunk.

    Args:
        s_BHKV2: the incoming state; None if nothing was read yet.
        log_decay_BTH, turn_BTH2: log of the decay's magnitude, at most 0, and its direction, of length 1.
        chunk: tokens per chunk. A turn's gradient is a difference of two sums over the rest of its chunk:
            where little is remembered, more cancels in a larger chunk, and in fp32 the gradient shows it.
        want_state: whether the state after the last token is needed.

    Returns:
        y_BTHV in the dtype of v, and the next state in at least fp32, or None where not asked for.
    """
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    # split, not sliced: the gradient of a slice is as long as all of it, which chunk by chunk is quadratic
    inputs = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, turn_BTH2)
    chunks = list(zip(*(x.split(chunk, dim=1) for x in inputs), strict=True))
    ys = []
    for number, (q_BCHK, k_BCHK, v_BCHV, log_decay_BCH, turn_BCH2) in enumerate(chunks, 1):
        re_BCH, im_BCH = _products(turn_BCH2)
        square_BCH = re_BCH.square() + im_BCH.square()
        q, k = (
            torch.cat([u * part[..., None].to(dtype) for part in (re, im)], dim=-1)
            for u, re, im in (
                (q_BCHK, re_BCH, im_BCH),
                (k_BCHK, re_BCH / square_BCH, im_BCH / square_BCH),
            )
        )
        along = None
        if s_BHKV2 is not None:
            along = torch.cat((s_BHKV2[..., 0], -s_BHKV2[..., 1]), dim=2)
        y_BTHV, along, _ = linear_attention(
            q, k, v_BCHV.to(dtype), along, None, log_decay_BCH,
            chunk=chunk, want_state=want_state or number < len(chunks),
        )  # fmt: skip
        ys.append(y_BTHV)
        if along is not None:
            re_BHKV, minus_im_BHKV = along.chunk(2, dim=2)
            re, im = (u[:, -1, :, None, None].to(dtype) for u in (re_BCH, im_BCH))
            back = re * re_BHKV + im * minus_im_BHKV, im * re_BHKV - re * minus_im_BHKV
            s_BHKV2 = torch.stack(back, dim=-1)
    return torch.cat(ys, dim=1).to(v_BTHV.dtype), s_BHKV2 if want_state else None


def _products(turn_BTH2: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the products of all turns up to each token, by doubling.

    In fp64, which these few numbers can afford: two of them make the angle between two tokens, and in fp32
    that of neighbours would carry the rounding of all turns since the chunk's start.
    """
    re, im = turn_BTH2.double().unbind(-1)
    reach = 1
    while reach < turn_BTH2.shape[1]:
        before_re = F.pad(re[:, :-reach], (0, 0, reach, 0), value=1)
        before_im = F.pad(im[:, :-reach], (0, 0, reach, 0))
        re, im = re * before_re - im * before_im, re * before_im + im * before_re
        reach *= 2
    return re, im
