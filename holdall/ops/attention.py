"""Softmax attention over a cache of keys and values, full or within a sliding window.

    y_t = sum_j p_tj v_j,   p_tj = softmax_j(scale q_t . k_j) over the visible j <= t

Every token at position t sees positions 0 .. t, or in a window of w the last w, itself included. Keys and
values may have fewer heads G than the queries' H: each then serves H / G neighbouring ones (Ainslie et al.,
"GQA", 2023, arXiv 2305.13245), and the cache holds those G alone.

Letters: q_t, k_j, v_j query, key and value of tokens t and j, p_tj the weight of j, y_t the output. Of
shapes: B row, T new tokens, S slots of the cache, H heads (of queries; G of keys and values, where they
differ), K key dim, V value dim, C tokens of a block.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract.forms import kernel_of
from holdall.contract.room import fill

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # pytest checks the shapes; nothing else needs jaxtyping
    from jaxtyping import Float, Int


MAX_HEAD_DIM = 256
"""Largest head dimension of the kernel, whose blocks of keys and values fit into shared memory."""


def kernel_refusal(head_dim: int) -> str:
    """Why there is no kernel for heads of this size; empty if there is one."""
    if head_dim > MAX_HEAD_DIM:
        return f"the kernel takes heads of at most {MAX_HEAD_DIM} dimensions, not {head_dim}"
    return ""


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
    form: str = "parallel",
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b s g k"], Float[Tensor, "b s g v"]]:
    """The same beside slots of which the first `filled` of a row are filled, the last `seen` of them by it.

    The new keys and values go into the next ones, in place or in a copy. All slots are looked at, O(T S), but
    by the kernel only those that are filled, for a few tokens without gradients; otherwise it is the plain
    form too. See holdall/contract/room.py.

    Args:
        scale: of the scores.
        inplace: the slots are given away, and the new keys and values are written into them.
        form: "parallel" or "kernel".

    Returns:
        y_BTHV, keys and values.
    """
    if form == "kernel":
        return kernel_of(reserved_attention)(
            q_BTHK, k_BTHK, v_BTHV, k_BSHK, v_BSHV, seen_B, filled_B, scale=scale, inplace=inplace
        )
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
