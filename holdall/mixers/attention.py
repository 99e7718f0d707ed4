"""Softmax attention, the reference for the recall of all other mixers.

    q, k, v = W_q x, W_k x, W_v x (+ b), H heads
    y_t = W_o [ sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j ] + b

Letters: x_t and y_t input and output of token t; j tokens up to t; q_t, k_t, v_t queries, keys and values of
each of H heads; K their dimensions; W_* learned maps; b biases.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.
Weights map one to one onto Zoology's MHA (and, with rotary 0.5 and no bias, flash-attention's): `qkv` has the
rows of q, k and v in that order.
Deviations: none (Zoology masks with -10000, which is zero after the softmax).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, forms, register
from holdall.contract.rollback import LISTED, without_last
from holdall.contract.room import is_reserved
from holdall.ops import attention
from holdall.ops.attention import KeyValueCache
from holdall.ops.linear import Linear
from holdall.ops.rotary import rotary_dims, rotate_both
from holdall.settings import NonNegativeInt, PositiveFloat, PositiveInt, Share


@register(
    "attention",
    family="softmax attention",
    paper=Paper(title="Attention Is All You Need", authors="Vaswani et al.", year=2017, arxiv="1706.03762"),
    state="2NDG/H + 1",
    training="N²D",
    inference="ND",
    quadratic=True,
)
@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Softmax attention over everything read so far."""

    heads: PositiveInt = 1
    """Number of query heads, H."""
    kv_heads: NonNegativeInt = 0
    """Number of key and value heads, G; 0 for as many as `heads`. Each serves H / G query heads."""
    rotary: Share = 0.0
    """Share of each head's dimensions that rotary positions turn: 0 for none, 1 for all."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    bias: bool = True
    """Whether the projections have biases."""
    block: PositiveInt = 256
    """Queries and keys per block of the form "blockwise": FlashAttention's algorithm in plain PyTorch, whose
    memory is linear in the length. The form "parallel" is PyTorch's own attention, and "kernel" the same but
    for steps over a state with a capacity, which have a kernel.
    """

    forms = ("loop", "blockwise", "parallel", "kernel")
    variants = (
        {},
        {"heads": 4, "kv_heads": 2, "rotary": 0.5, "bias": False},
        {"form": "blockwise", "heads": 2, "block": 16},
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        rotary_dims(self.width // self.heads, self.rotary)
        kv_heads = getattr(self, "kv_heads", 0)  # mixers without this option check theirs here too
        if kv_heads and self.heads % kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {kv_heads}")

    @property
    def has_kernel(self) -> bool:
        # wider heads train as fast without, so strict does not insist on one
        return self.width // self.heads <= attention.MAX_HEAD_DIM

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or attention.kernel_refusal(self.width // self.heads)

    def build(self) -> Attention:
        return Attention(self)


class QKV(nn.Module):
    """Queries, keys and values of all heads from one product, turned by their positions."""

    def __init__(
        self, width: int, heads: int, rotary: float, rotary_base: float, bias: bool, kv_heads: int = 0
    ) -> None:
        super().__init__()
        self.heads = [heads, kv_heads or heads, kv_heads or heads]
        self.head_dim = width // heads
        self.qkv = Linear(width, sum(self.heads) * self.head_dim, bias=bias)
        self.rotary_dims, self.rotary_base = rotary_dims(self.head_dim, rotary), rotary_base

    def forward(self, x_BTD: Tensor, seen_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.rotary_dims:
            form = "kernel" if forms.fused(q, k, seen_B) else "parallel"
            q, k = rotate_both(q, k, seen_B, self.rotary_dims, self.rotary_base, form=form)
        return q, k, v


class Attention(Mixer):
    config: AttentionConfig
    state_type = KeyValueCache
    rollback_limit = LISTED

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.project = QKV(
            config.width, config.heads, config.rotary, config.rotary_base, config.bias, config.kv_heads
        )
        self.out_proj = Linear(config.width, config.width, bias=config.bias)
        forms: dict[str, Callable[..., tuple[Tensor, KeyValueCache]]] = {
            "loop": attention.full_attention_loop,
            "blockwise": functools.partial(attention.blockwise_attention, block=config.block),
            "parallel": attention.full_attention,
            "kernel": attention.full_attention,
        }
        # a move to another device changes the form at most between the last two
        self.attend = forms[self.form]
        self.fills_slots = self.form in ("parallel", "kernel")

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,  # with room or without
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, Any]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = self.project(x_BTD, state.seen_B)
        scale, after = q.shape[-1] ** -0.5, None
        if is_reserved(state):
            y_BTHV, *slots = attention.reserved_attention(
                q, k, v, *state, scale=scale, inplace=inplace, form=self.form
            )
            new, counts = x_BTD.shape[1], (state.seen_B, state.filled_B)
            after = type(state)(*slots, *(count.add_(new) if inplace else count + new for count in counts))
        else:
            y_BTHV, after = self.attend(q, k, v, state, scale=scale)
        return self.out_proj(y_BTHV.flatten(2)), after if want_state else None

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> KeyValueCache:
        heads, head_dim = self.project.heads[1], self.project.head_dim
        return attention.empty_cache(batch, 0, heads, head_dim, head_dim, dtype=dtype, device=device)

    def state_elements(self, context_len: int) -> int:
        return 2 * context_len * self.project.heads[1] * self.project.head_dim + 1

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return without_last(state, ("k_BSHK", "v_BSHV"), count_B, self.owner, inplace=inplace)
