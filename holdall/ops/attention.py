"""Softmax attention over a cache of keys and values, full or within a sliding window.

    y_t = sum_j p_tj v_j,   p_tj = softmax_j(scale q_t . k_j) over the visible j <= t

Every token at position t sees positions 0 .. t, or in a window of w the last w, itself included. Keys and
values may have fewer heads G than the queries' H: each then serves H / G neighbouring ones (Ainslie et al.,
"GQA", 2023, arXiv 2305.13245), and the cache holds those G alone.

Letters: B row, T new tokens, S slots of the cache, H heads (of queries; G of keys and
values, where they differ), K key dim, V value dim, C tokens of a block.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.room import fill

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Int


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
    heads_first = (q_BTHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHV.transpose(1, 2))
    batched = torch._C._functorch.is_batchedtensor
    if not torch.compiler.is_compiling() and any(map(batched, heads_first)):
        return _OverMembers.apply(*heads_first, visible, scale).transpose(1, 2)
    return _scaled_dot_product(*heads_first, visible, scale).transpose(1, 2)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )


class _OverMembers(torch.autograd.Function):
    """Attention under `vmap`: the members become more batch rows.

    PyTorch's own rule takes only the slowest of its implementations, which holds all pairs in memory. What
    the rule below does is differentiated as usual, so that this function never runs by itself.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        raise NotImplementedError("only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise NotImplementedError("only under vmap")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        *heads_first, visible, scale = args
        members = info.batch_size

        def fold(x: Tensor, dim: int | None) -> Tensor:
            return (x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        q, k, v = map(fold, heads_first, in_dims)
        if visible is not None and (in_dims[3] is not None or (visible.ndim == 4 and visible.shape[0] > 1)):
            visible = fold(visible, in_dims[3])
        return _scaled_dot_product(q, k, v, visible, scale).unflatten(0, (members, -1)), 0


def _for_heads(x_BSGK: Tensor, heads: int) -> Tensor:
    """Keys or values, each of their heads as often as there are heads of queries that it serves."""
    own = x_BSGK.shape[2]
    return x_BSGK if own == heads else x_BSGK.repeat_interleave(heads // own, dim=2)


# ------------------------------------------------------------------------------------------------- full


def full_attention_loop(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    cache: KeyValueCache,
    *,
    scale: float,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache]:
    """The definition: remember each token's key and value, look back at all of them."""
    k_BSHK, v_BSHV, seen_B = cache
    heads = q_BTHK.shape[2]
    ys = []
    for t in range(q_BTHK.shape[1]):
        k_BSHK = torch.cat((k_BSHK, k_BTHK[:, t : t + 1]), dim=1)
        v_BSHV = torch.cat((v_BSHV, v_BTHV[:, t : t + 1]), dim=1)
        seen_B = seen_B + 1
        # in fp16 a score can be too large, which the softmax of them would bring back
        score_BHS = scale * torch.einsum(
            "bhk,bshk->bhs", _wide(q_BTHK[:, t]), _wide(_for_heads(k_BSHK, heads))
        )
        p_BHS = score_BHS.masked_fill(_empty(k_BSHK, seen_B)[:, None], -torch.inf).softmax(-1)
        ys.append(torch.einsum("bhs,bshv->bhv", p_BHS.to(v_BSHV.dtype), _for_heads(v_BSHV, heads)))
    return torch.stack(ys, dim=1), KeyValueCache(k_BSHK, v_BSHV, seen_B)


def full_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
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


def reserved_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    k_BSHK: Float[Tensor, "b s g k"],
    v_BSHV: Float[Tensor, "b s g v"],
    seen_B: Int[Tensor, "b"],
    filled_B: Int[Tensor, "b"],
    *,
    scale: float,
    inplace: bool = False,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b s g k"], Float[Tensor, "b s g v"]]:
    """The same beside slots of which the first `filled` of a row are filled, the last `seen` of them by it.

    The new keys and values go into the next ones, in place or in a copy, and all slots are looked at: O(T S).
    Returns y_BTHV, keys and values. See holdall/contract/room.py.
    """
    k_BSHK, v_BSHV = (
        fill(slots, new, filled_B, inplace=inplace) for slots, new in ((k_BSHK, k_BTHK), (v_BSHV, v_BTHV))
    )
    slot_S, t = (torch.arange(n, device=filled_B.device) for n in (k_BSHK.shape[1], q_BTHK.shape[1]))
    visible_BTS = slot_S <= (filled_B[:, None] + t)[..., None]
    visible_BTS = visible_BTS & (slot_S >= (filled_B - seen_B)[:, None, None])
    return _attend(q_BTHK, k_BSHK, v_BSHV, visible_BTS[:, None], scale), k_BSHK, v_BSHV


def _empty(k_BSHK: Tensor, seen_B: Tensor) -> Tensor:
    """Which slots in front a row never filled, (B, S)."""
    slots = k_BSHK.shape[1]
    return torch.arange(slots, device=seen_B.device) < slots - seen_B[:, None]


# -------------------------------------------------------------------------------------- full, in blocks


def blockwise_attention(
    q_BTHK: Float[Tensor, "b t h k"],
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    cache: KeyValueCache,
    *,
    scale: float,
    block: int = 256,
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache]:
    """Full attention in memory linear in the length: FlashAttention's algorithm, and as exact.

    Blocks of queries meet blocks of keys one after another; a running maximum and a running sum make the
    softmax of all of them. Only its logarithm is kept for the way back, which makes each block's
    probabilities again. O(T (S + T)) operations, O(S + T) memory. Dao et al., 2022, arXiv 2205.14135.
    """
    past, new = cache.k_BSHK.shape[1], q_BTHK.shape[1]
    k_BSHK = torch.cat((cache.k_BSHK, k_BTHK), dim=1)
    v_BSHV = torch.cat((cache.v_BSHV, v_BTHV), dim=1)
    seen_B = cache.seen_B + new
    # rows without the slots in front that only longer rows fill; without a past there are none
    unfilled_BS = _empty(k_BSHK, seen_B) if past else None
    heads_k, heads_v = (_for_heads(x_BSHK, q_BTHK.shape[2]).transpose(1, 2) for x_BSHK in (k_BSHK, v_BSHV))
    y_BHTV, _ = _Blockwise.apply(q_BTHK.transpose(1, 2), heads_k, heads_v, unfilled_BS, scale, block)
    return y_BHTV.transpose(1, 2), KeyValueCache(k_BSHK, v_BSHV, seen_B)


class _Blockwise(torch.autograd.Function):
    """Blocks of keys are cut so that the new ones match the blocks of queries: `_cuts`.

    Nobody needs a gradient of the softmax's logarithm but a second derivative, in which it and y are what the
    backward pass depends on beside its inputs. With it the backward pass is differentiable as it stands, at
    the memory of all pairs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, unfilled_BS: Tensor | None, scale: float, block: int
    ) -> tuple[Tensor, Tensor]:
        ys, logs = [], []
        queries, keys = _cuts(q_BHTK.shape[2], k_BHSK.shape[2], block)
        for i, (start, stop) in enumerate(queries):
            q_BHCK = scale * _wide(q_BHTK[:, :, start:stop])
            # from its own block backwards: there every query sees a key, itself, so that the running maximum
            # is a number from the first block on
            top_BHC1 = torch.full_like(q_BHCK[..., :1], -torch.inf)
            sum_BHC1 = torch.zeros_like(top_BHC1)
            y_BHCV: Any = 0
            for own, (first, last) in reversed(_before(i, queries, keys)):
                score_BHCS = _scores(q_BHCK, k_BHSK, unfilled_BS, own, first, last)
                most_BHC1 = torch.maximum(top_BHC1, score_BHCS.amax(-1, keepdim=True))
                shrink_BHC1, p_BHCS = torch.exp(top_BHC1 - most_BHC1), torch.exp(score_BHCS - most_BHC1)
                sum_BHC1 = sum_BHC1 * shrink_BHC1 + p_BHCS.sum(-1, keepdim=True)
                y_BHCV = y_BHCV * shrink_BHC1 + p_BHCS @ _wide(v_BHSV[:, :, first:last])
                top_BHC1 = most_BHC1
            ys.append((y_BHCV / sum_BHC1).to(q_BHTK.dtype))
            logs.append(top_BHC1 + torch.log(sum_BHC1))
        return torch.cat(ys, dim=2), torch.cat(logs, dim=2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.block = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad_y_BHTV: Tensor, grad_log_BHT1: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BHSK, v_BHSV, unfilled_BS, y_BHTV, log_BHT1 = ctx.saved_tensors
        queries, keys = _cuts(q_BHTK.shape[2], k_BHSK.shape[2], ctx.block)
        grads_q: list[Any] = []
        grads_k: dict[int, Any] = {first: 0 for first, _ in keys}
        grads_v: dict[int, Any] = {first: 0 for first, _ in keys}
        for i, (start, stop) in enumerate(queries):
            q_BHCK = ctx.scale * _wide(q_BHTK[:, :, start:stop])
            up_BHCV, y_BHCV = _wide(grad_y_BHTV[:, :, start:stop]), _wide(y_BHTV[:, :, start:stop])
            mean_BHC1 = (up_BHCV * y_BHCV).sum(-1, keepdim=True) - grad_log_BHT1[:, :, start:stop]
            grads_q.append(0)
            for own, (first, last) in _before(i, queries, keys):
                score_BHCS = _scores(q_BHCK, k_BHSK, unfilled_BS, own, first, last)
                p_BHCS = torch.exp(score_BHCS - log_BHT1[:, :, start:stop])
                grads_v[first] = grads_v[first] + p_BHCS.mT @ up_BHCV
                grad_BHCS = p_BHCS * (up_BHCV @ _wide(v_BHSV[:, :, first:last]).mT - mean_BHC1)
                grads_q[-1] = grads_q[-1] + grad_BHCS @ _wide(k_BHSK[:, :, first:last])
                grads_k[first] = grads_k[first] + grad_BHCS.mT @ q_BHCK
            grads_q[-1] = (ctx.scale * grads_q[-1]).to(q_BHTK.dtype)
        grad_k_BHSK = torch.cat(list(grads_k.values()), dim=2).to(k_BHSK.dtype)
        grad_v_BHSV = torch.cat(list(grads_v.values()), dim=2).to(v_BHSV.dtype)
        return torch.cat(grads_q, dim=2), grad_k_BHSK, grad_v_BHSV, None, None, None


def _cuts(new: int, slots: int, block: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Blocks of queries, and blocks of keys of which the last ones are those of the queries."""
    past = slots - new
    queries = [(start, min(start + block, new)) for start in range(0, new, block)]
    old = [(max(stop - block, 0), stop) for stop in range(past, 0, -block)]
    return queries, old[::-1] + [(past + start, past + stop) for start, stop in queries]


def _before(i: int, queries: list, keys: list[tuple[int, int]]) -> list[tuple[bool, tuple[int, int]]]:
    """The blocks of keys that the i-th block of queries sees, and whether each is its own."""
    count = len(keys) - len(queries) + i + 1
    return [(j == count - 1, keys[j]) for j in range(count)]


def _scores(
    q_BHCK: Tensor, k_BHSK: Tensor, unfilled_BS: Tensor | None, own: bool, first: int, last: int
) -> Tensor:
    """Scores of a block of scaled queries on a block of keys, -inf where a query does not see the key."""
    score_BHCS = q_BHCK @ _wide(k_BHSK[:, :, first:last]).mT
    if own:
        c = torch.arange(last - first, device=q_BHCK.device)
        score_BHCS = score_BHCS.masked_fill(c > c[:, None], -torch.inf)
    if unfilled_BS is not None:
        score_BHCS = score_BHCS.masked_fill(unfilled_BS[:, None, None, first:last], -torch.inf)
    return score_BHCS


def _wide(x: Tensor) -> Tensor:
    """Sums over thousands of tokens, and scores, are kept in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------- window


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
    heads, slot_S = q_BTHK.shape[2], torch.arange(window - 1, device=q_BTHK.device)
    ys = []
    for t in range(q_BTHK.shape[1]):
        seen_k, seen_v = (
            _for_heads(torch.cat((old, new[:, t, None]), dim=1), heads)
            for old, new in ((k_BSHK, k_BTHK), (v_BSHV, v_BTHV))
        )
        score_BHS = torch.einsum("bhk,bshk->bhs", _wide(q_BTHK[:, t]), _wide(seen_k))
        filled_BS = F.pad(slot_S < seen_B[:, None], (0, 1), value=True)
        p_BHS = (scale * score_BHS).masked_fill(~filled_BS[:, None], -torch.inf).softmax(-1)
        ys.append(torch.einsum("bhs,bshv->bhv", p_BHS.to(seen_v.dtype), seen_v))
        oldest_BS11 = (slot_S == (seen_B % (window - 1))[:, None])[:, :, None, None]
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
) -> tuple[Float[Tensor, "b t h v"], KeyValueCache | None]:
    """Blocks of queries, each against its own keys and the w - 1 before it. O(T (w + block)).

    The ring, in order of time, is put in front of the new keys; then block i of C queries sees keys
    i C .. i C + C + w - 2 of that row, and within every block the visible ones are the same band.
    `cache` None stands for an empty one, and a single block then has no ring in front of it at all.
    """
    batch, new = k_BTHK.shape[:2]
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
    return y_BTHV, next_ring(cache, k_BTHK, v_BTHV, window=window, inplace=inplace) if want_state else None


def next_ring(
    cache: KeyValueCache | None,
    k_BTHK: Float[Tensor, "b t g k"],
    v_BTHV: Float[Tensor, "b t g v"],
    *,
    window: int,
    inplace: bool = False,
) -> KeyValueCache:
    """The ring after these tokens, of which it keeps the last w - 1; `cache` None is an empty one."""
    batch, new, heads, key_dim = k_BTHK.shape
    back, device = window - 1, k_BTHK.device
    if cache is None:
        cache = empty_cache(batch, back, heads, key_dim, v_BTHV.shape[-1], dtype=k_BTHK.dtype, device=device)
    kept = min(new, back)
    slot_BS = (cache.seen_B[:, None] + torch.arange(new - kept, new, device=device)) % back
    ring_k = _write(cache.k_BSHK, slot_BS, k_BTHK[:, new - kept :], inplace)
    ring_v = _write(cache.v_BSHV, slot_BS, v_BTHV[:, new - kept :], inplace)
    return KeyValueCache(ring_k, ring_v, cache.seen_B + new)


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
