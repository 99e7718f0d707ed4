"""Softmax attention over a cache of keys and values, full or within a sliding window.

    y_t = sum_j p_tj v_j,   p_tj = softmax_j(scale q_t . k_j) over the visible j <= t

Every token at position t sees positions 0 .. t, or in a window of w the last w, itself included.

Letters: B row, T new tokens, S slots of the cache, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens that a row has read.

    Full attention: the last `seen` of the S slots, oldest first; rows that have read less than the
    longest row beside them have empty slots in front. In a window of w tokens: a ring of w - 1 slots,
    position p in slot p mod (w - 1). `seen_B` counts a row's tokens.
    """

    k_BSHK: Tensor
    v_BSHV: Tensor
    seen_B: Tensor


def empty_cache(
    batch: int, slots: int, heads: int, key_dim: int, value_dim: int, *, dtype: torch.dtype,
    device: torch.device | None = None,
) -> KeyValueCache:  # fmt: skip
    """A cache of a row that has read nothing; `slots` is 0 for full attention, w - 1 for a window."""
    return KeyValueCache(
        torch.zeros(batch, slots, heads, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, slots, heads, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )


def _attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attention with a mask that broadcasts to (B, H, T, S), or causal from the first token if None."""
    y_BHTV = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSHK.transpose(1, 2),
        v_BSHV.transpose(1, 2),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
    )
    return y_BHTV.transpose(1, 2)


# ------------------------------------------------------------------------------------------------- full


def full_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    cache: KeyValueCache,
    *,
    scale: float,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache]:
    """The definition: remember each token's key and value, look back at all of them."""
    k_BSHK, v_BSHV, seen_B = cache
    ys = []
    for t in range(q_BTHK.shape[1]):
        k_BSHK = torch.cat((k_BSHK, k_BTHK[:, t : t + 1]), dim=1)
        v_BSHV = torch.cat((v_BSHV, v_BTHV[:, t : t + 1]), dim=1)
        seen_B = seen_B + 1
        score_BHS = scale * torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], k_BSHK)
        p_BHS = score_BHS.masked_fill(_empty(k_BSHK, seen_B)[:, None], -torch.inf).softmax(-1)
        ys.append(torch.einsum("bhs,bshv->bhv", p_BHS, v_BSHV))
    return torch.stack(ys, dim=1), KeyValueCache(k_BSHK, v_BSHV, seen_B)


def full_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    cache: KeyValueCache,
    *,
    scale: float,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache]:
    """All pairs at once, by PyTorch's own scaled dot product attention. O(T (S + T))."""
    past, new = cache.k_BSHK.shape[1], q_BTHK.shape[1]
    k_BSHK = torch.cat((cache.k_BSHK, k_BTHK), dim=1)
    v_BSHV = torch.cat((cache.v_BSHV, v_BTHV), dim=1)
    seen_B = cache.seen_B + new
    visible = None
    if past:
        slot_S = torch.arange(past + new, device=q_BTHK.device)
        visible = ((slot_S <= slot_S[past:, None]) & ~_empty(k_BSHK, seen_B)[:, None])[:, None]
    return _attend(q_BTHK, k_BSHK, v_BSHV, visible, scale), KeyValueCache(k_BSHK, v_BSHV, seen_B)


def _empty(k_BSHK: Tensor, seen_B: Tensor) -> Tensor:
    """Which slots in front a row never filled, (B, S)."""
    slots = k_BSHK.shape[1]
    return torch.arange(slots, device=seen_B.device) < slots - seen_B[:, None]


# ----------------------------------------------------------------------------------------------- window


def window_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    cache: KeyValueCache,
    *,
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache]:
    """The definition: look at the ring and at the token itself, then overwrite the oldest slot."""
    k_BSHK, v_BSHV, seen_B = cache
    slot_S = torch.arange(window - 1, device=q_BTHK.device)
    ys = []
    for t in range(q_BTHK.shape[1]):
        score_BHS = torch.einsum("bhk,bshk->bhs", q_BTHK[:, t], torch.cat((k_BSHK, k_BTHK[:, t, None]), 1))
        filled_BS = F.pad(slot_S < seen_B[:, None], (0, 1), value=True)
        p_BHS = (scale * score_BHS).masked_fill(~filled_BS[:, None], -torch.inf).softmax(-1)
        ys.append(torch.einsum("bhs,bshv->bhv", p_BHS, torch.cat((v_BSHV, v_BTHV[:, t, None]), 1)))
        oldest_BS11 = (slot_S == (seen_B % (window - 1))[:, None])[:, :, None, None]
        k_BSHK = torch.where(oldest_BS11, k_BTHK[:, t, None], k_BSHK)
        v_BSHV = torch.where(oldest_BS11, v_BTHV[:, t, None], v_BSHV)
        seen_B = seen_B + 1
    return torch.stack(ys, dim=1), KeyValueCache(k_BSHK, v_BSHV, seen_B)


BLOCK = 128
"""Least queries per block of a window: smaller blocks cost more in overhead than they save in products."""


def window_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t h k"],
    v_BTHV: Float[Tensor, "b t h v"],
    cache: KeyValueCache | None,
    *,
    window: int,
    scale: float,
    inplace: bool = False,
    want_state: bool = True,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache | None]:
    """Blocks of queries, each against its own keys and the w - 1 before it. O(T (w + block)).

    The ring, in order of time, is put in front of the new keys; then block i of C queries sees keys
    i C .. i C + C + w - 2 of that row, and within every block the visible ones are the same band.
    `cache` None stands for an empty one, and a single block then has no ring in front of it at all.
    """
    batch, new, heads, key_dim = k_BTHK.shape
    back, block, device = window - 1, min(max(window - 1, BLOCK), new), q_BTHK.device
    count, front = -(-new // block), back
    if cache is None:
        front = 0 if count == 1 else back
        k_BSHK, v_BSHV = (F.pad(u, (0, 0, 0, 0, front, 0)) for u in (k_BTHK, v_BTHV))
    else:
        k_BSHK = torch.cat((_in_order(cache.k_BSHK, cache.seen_B), k_BTHK), dim=1)
        v_BSHV = torch.cat((_in_order(cache.v_BSHV, cache.seen_B), v_BTHV), dim=1)
    slot_S = torch.arange(block + front, device=device)
    lag_CS = torch.arange(block, device=device)[:, None] + front - slot_S
    visible = (lag_CS >= 0) & (lag_CS <= back)
    if front:  # slots that were never filled
        seen_B = torch.zeros(1, dtype=torch.long, device=device) if cache is None else cache.seen_B
        filled_BGS = torch.arange(0, count * block, block, device=device)[:, None] + slot_S
        filled_BGS = filled_BGS >= front - seen_B[:, None, None]
        visible = (visible & filled_BGS[:, :, None]).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    def blocks(x_BSHK: Tensor, size: int) -> Tensor:
        """(B, S, H, K) to overlapping blocks, folded into the batch: (B * count, size, H, K)."""
        x_BSHK = F.pad(x_BSHK, (0, 0, 0, 0, 0, count * block - new))
        return x_BSHK if count == 1 else x_BSHK.unfold(1, size, block).movedim(-1, 2).flatten(0, 1)

    y = _attend(
        blocks(q_BTHK, block), blocks(k_BSHK, block + front), blocks(v_BSHV, block + front), visible, scale
    )
    y_BTHV = y.unflatten(0, (batch, count)).flatten(1, 2)[:, :new]
    if not want_state:
        return y_BTHV, None
    if cache is None:
        cache = empty_cache(batch, back, heads, key_dim, v_BTHV.shape[-1], dtype=k_BTHK.dtype, device=device)
    kept = min(new, back)
    slot_BS = (cache.seen_B[:, None] + torch.arange(new - kept, new, device=device)) % back
    ring_k = _write(cache.k_BSHK, slot_BS, k_BTHK[:, new - kept :], inplace)
    ring_v = _write(cache.v_BSHV, slot_BS, v_BTHV[:, new - kept :], inplace)
    return y_BTHV, KeyValueCache(ring_k, ring_v, cache.seen_B + new)


def _in_order(ring_BSHK: Tensor, seen_B: Tensor) -> Tensor:
    """A ring's slots from the oldest to the newest; slots never filled come first."""
    slots = ring_BSHK.shape[1]
    oldest_first_BS = (seen_B[:, None] + torch.arange(slots, device=seen_B.device)) % slots
    return ring_BSHK.take_along_dim(oldest_first_BS[:, :, None, None], dim=1)


def _write(ring_BSHK: Tensor, slot_BS: Tensor, x_BSHK: Tensor, inplace: bool) -> Tensor:
    """Put new entries into their slots of a ring, in the caller's memory or in a copy."""
    index = slot_BS[:, :, None, None].expand(x_BSHK.shape)
    if inplace:
        return ring_BSHK.scatter_(1, index, x_BSHK)
    return ring_BSHK.scatter(1, index, x_BSHK)
