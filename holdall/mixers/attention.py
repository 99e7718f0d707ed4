"""Softmax attention, the mixer whose recall all others are measured against.

    q, k, v = W_q x, W_k x, W_v x (+ b), H heads
    y_t = W_o [ sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j ] + b

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762. Weights map one to one onto Zoology's
MHA (and, with rotary 0.5 and no bias, flash-attention's): `qkv` holds the rows of q, k and v in that order.
Deviations: none (Zoology masks with -10000, which is zero after the softmax).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, register
from holdall.ops import attention
from holdall.ops.attention import KeyValueCache
from holdall.ops.rotary import rotate, standard_frequencies


@register(
    "attention",
    paper=Paper(title="Attention Is All You Need", authors="Vaswani et al.", year=2017, arxiv="1706.03762"),
    state="2ND + 1",
    training="N²D",
    inference="ND",
)
@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Softmax attention over everything read so far.

    rotary: share of each head's dimensions that rotary positions turn; 0 for none, 1 for all.
    """

    heads: int = 1
    rotary: float = 0.0
    rotary_base: float = 10000.0
    bias: bool = True

    variants = ({}, {"heads": 2, "rotary": 0.5, "bias": False})

    def validate(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 <= self.rotary <= 1:
            raise ValueError(f"rotary {self.rotary} is a share of the head's dimensions, between 0 and 1")

    def build(self) -> Attention:
        return Attention(self)


class QKV(nn.Module):
    """Queries, keys and values of all heads from one product, turned by their positions."""

    def __init__(self, width: int, heads: int, rotary: float, rotary_base: float, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.turned, self.rotary_base = int(rotary * (width // heads)) // 2 * 2, rotary_base

    def forward(self, x_BTD: Tensor, seen_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.turned:
            frequency_F = standard_frequencies(self.turned, self.rotary_base, x_BTD)
            position_BT = seen_B[:, None] + torch.arange(x_BTD.shape[1], device=x_BTD.device)
            q, k = rotate(q, position_BT, frequency_F), rotate(k, position_BT, frequency_F)
        return q, k, v


class Attention(Mixer):
    config: AttentionConfig
    state_type = KeyValueCache

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.project = QKV(config.width, config.heads, config.rotary, config.rotary_base, config.bias)
        self.out_proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.attend = attention.full_attention_loop if self.form == "loop" else attention.full_attention

    def forward(
        self,
        x_BTD: Tensor,
        state: KeyValueCache | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, KeyValueCache | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = self.project(x_BTD, state.seen_B)
        y_BTHV, after = self.attend(q, k, v, state, scale=q.shape[-1] ** -0.5)
        return self.out_proj(y_BTHV.flatten(2)), after if want_state else None

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> KeyValueCache:
        head_dim = self.config.width // self.config.heads
        return attention.empty_cache(
            batch, 0, self.config.heads, head_dim, head_dim, dtype=dtype, device=device
        )

    def state_elements(self, context_len: int) -> int:
        return 2 * context_len * self.config.width + 1
