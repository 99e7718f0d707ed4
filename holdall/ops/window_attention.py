"""Softmax attention within a sliding window: every token sees the last w, itself included.

    y_t = sum_j p_tj v_j,   p_tj = softmax_j(scale q_t . k_j) over j = t - w + 1 .. t

Its cache is a ring of w - 1 slots, with position p in slot p mod (w - 1): see holdall/ops/attention.py. It
may have more slots S, and then has position p in slot p mod S. Outputs depend on the last w tokens all the
same; as many as there are more slots can be taken back by lowering the count.

Letters: q_t, k_j, v_j query, key and value of tokens t and j, p_tj the weight of j, w the window, y_t the
output. Of shapes: B row, T new tokens, S slots of the cache, H heads (of queries; G of keys and values, where
they differ), K key dim, V value dim, C tokens of a block.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.contract.rollback import nan_where_lost
from holdall.ops.attention import KeyValueCache, _attend, _for_heads, _wide, empty_cache

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float


def kernel_refusal(head_dim: int) -> str:
    """Why there is no kernel for heads of this size; empty if there is one."""
    return kernel_of(kernel_refusal)(head_dim)


def window_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    cache: KeyValueCache,
    *,
    window: int,
    scale: float,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache]:
    """The definition: look at the ring and at the token itself, then overwrite the oldest slot."""
    k_BSHK, v_BSHV, seen_B = cache
    heads, slots = q_BTHK.shape[2], k_BSHK.shape[1]
    slot_S = torch.arange(slots, device=q_BTHK.device)
    ys = []
    for t in range(q_BTHK.shape[1]):
        seen_k, seen_v = (
            _for_heads(torch.cat((old, new[:, t, None]), dim=1), heads)
            for old, new in ((k_BSHK, k_BTHK), (v_BSHV, v_BTHV))
        )
        score_BHS = torch.einsum("bhk,bshk->bhs", _wide(q_BTHK[:, t]), _wide(seen_k))
        age_BS = (seen_B[:, None] - 1 - slot_S) % slots
        visible_BS = F.pad(age_BS < seen_B.clamp(max=window - 1)[:, None], (0, 1), value=True)
        p_BHS = (scale * score_BHS).masked_fill(~visible_BS[:, None], -torch.inf).softmax(-1)
        # what was taken back may be infinite or NaN: never times zero
        seen_v = seen_v.masked_fill(~visible_BS[..., None, None], 0.0)
        ys.append(torch.einsum("bhs,bshv->bhv", p_BHS.to(seen_v.dtype), seen_v))
        oldest_BS11 = (slot_S == (seen_B % slots)[:, None])[:, :, None, None]
        k_BSHK = torch.where(oldest_BS11, k_BTHK[:, t, None], k_BSHK)
        v_BSHV = torch.where(oldest_BS11, v_BTHV[:, t, None], v_BSHV)
        seen_B = seen_B + 1
    return torch.stack(ys, dim=1), KeyValueCache(k_BSHK, v_BSHV, seen_B)


BLOCK = 128
"""Least queries per block of a window: smaller blocks cost more in overhead than they save in products."""


def window_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    cache: KeyValueCache | None,
    *,
    window: int,
    scale: float,
    inplace: bool = False,
    want_state: bool = True,
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache | None]:
    """Blocks of queries, each against its own keys and the w - 1 before it. O(T (w + block)).

    The ring, in order of time, is put in front of the new keys; then block i of C queries sees keys
    i C .. i C + C + w - 2 of that row, and within every block the visible ones are the same band.
    `cache` None stands for an empty one, and a single block then has no ring in front of it at all.

    Args:
        window: tokens that each token sees, itself included.
        scale: of the scores.
        inplace: the cache is given away, and the next one is written into its memory.
        want_state: whether the cache after the last token is needed.
        form: "loop", "parallel" or "kernel".
    """
    if form == "kernel":
        return kernel_of(window_attention)(
            q_BTHK, k_BTHK, v_BTHV, cache, window=window, scale=scale, inplace=inplace, want_state=want_state
        )
    if form == "loop":
        if cache is None:
            cache = _empty_ring(k_BTHK, v_BTHV, window - 1)
        y_BTHV, after = window_attention_loop(q_BTHK, k_BTHK, v_BTHV, cache, window=window, scale=scale)
        return nan_where_lost(y_BTHV, cache.seen_B), after
    batch, new = k_BTHK.shape[:2]
    back, block, device = window - 1, min(max(window - 1, BLOCK), new), q_BTHK.device
    count, front = -(-new // block), back
    if cache is None:
        front = 0 if count == 1 else back
        k_BSHK, v_BSHV = (F.pad(u, (0, 0, 0, 0, front, 0)) for u in (k_BTHK, v_BTHV))
    else:
        k_BSHK = torch.cat((_in_order(cache.k_BSHK, cache.seen_B, back), k_BTHK), dim=1)
        v_BSHV = torch.cat((_in_order(cache.v_BSHV, cache.seen_B, back), v_BTHV), dim=1)
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
    if cache is not None and cache.k_BSHK.shape[1] > back:  # then tokens can be taken back, and too many
        y_BTHV = nan_where_lost(y_BTHV, cache.seen_B)
    return y_BTHV, next_ring(cache, k_BTHK, v_BTHV, window=window, inplace=inplace) if want_state else None


def next_ring(
    cache: KeyValueCache | None,
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    *,
    window: int,
    inplace: bool = False,
) -> KeyValueCache:
    """The ring after these tokens, of which it keeps the last; `cache` None is one of w - 1 empty slots."""
    new, device = k_BTHK.shape[1], k_BTHK.device
    if cache is None:
        cache = _empty_ring(k_BTHK, v_BTHV, window - 1)
    slots = cache.k_BSHK.shape[1]
    kept = min(new, slots)
    slot_BS = (cache.seen_B[:, None] + torch.arange(new - kept, new, device=device)) % slots
    ring_k = _write(cache.k_BSHK, slot_BS, k_BTHK[:, new - kept :], inplace)
    ring_v = _write(cache.v_BSHV, slot_BS, v_BTHV[:, new - kept :], inplace)
    return KeyValueCache(ring_k, ring_v, cache.seen_B + new)


def _empty_ring(k_BTHK: Tensor, v_BTHV: Tensor, slots: int) -> KeyValueCache:
    (rows, _, heads, key_dim), value_dim = k_BTHK.shape, v_BTHV.shape[-1]
    return empty_cache(rows, slots, heads, key_dim, value_dim, dtype=k_BTHK.dtype, device=k_BTHK.device)


def narrowed(cache: KeyValueCache, slots: int) -> KeyValueCache:
    """A ring of the last `slots` tokens of one that has more, position p in slot p mod slots."""
    k_BSHK, v_BSHV, seen_B = cache
    newest_B1 = seen_B[:, None] - 1
    position_BS = newest_B1 - (newest_B1 - torch.arange(slots, device=seen_B.device)) % slots
    at_BS11 = (position_BS % k_BSHK.shape[1])[:, :, None, None]
    return KeyValueCache(k_BSHK.take_along_dim(at_BS11, 1), v_BSHV.take_along_dim(at_BS11, 1), seen_B)


def _in_order(ring_BSHK: Tensor, seen_B: Tensor, count: int) -> Tensor:
    """A ring's last `count` tokens from the oldest to the newest; slots never filled come first."""
    slots = ring_BSHK.shape[1]
    oldest_first_BS = (seen_B[:, None] + torch.arange(slots - count, slots, device=seen_B.device)) % slots
    return ring_BSHK.take_along_dim(oldest_first_BS[:, :, None, None], dim=1)


def _write(ring_BSHK: Tensor, slot_BS: Tensor, x_BSHK: Tensor, inplace: bool) -> Tensor:
    """Put new entries into their slots of a ring, in the caller's memory or in a copy."""
    index = slot_BS[:, :, None, None].expand(x_BSHK.shape)
    if inplace:
        return ring_BSHK.scatter_(1, index, x_BSHK)
    return ring_BSHK.scatter(1, index, x_BSHK)
