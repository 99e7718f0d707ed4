"""Repeat attention: softmax attention whose output is nonzero only where a token recurs.

    a_t = causal multi-head softmax attention of x at t, as in `attention`
    y_t = a_t  if the token at t occurred before in its row,  0  otherwise

Letters: x and y_t input and output of token t; a_t attention's output.

The hand-written rule of Arora et al., "Zoology", 2023, arXiv 2312.04927, before they learn one: recall needs
attention only where something recurs; the rest is left to the convolution before it. Token ids decide, and
are part of the state. All outputs are computed here and those of new tokens set to zero; a kernel could skip
them. There is no published code of this rule: the paper describes it in words.
Weights map as those of `attention`.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, register
from holdall.contract.room import advanced, fill, in_order, is_reserved
from holdall.mixers.attention import QKV, check_heads
from holdall.ops import attention
from holdall.ops.attention import KeyValueCache
from holdall.settings import PositiveFloat, PositiveInt, Share


class RepeatState(NamedTuple):
    """A cache as of `attention`, and 1 + the id of each token read, 0 where there was none."""

    k_BSHK: Tensor
    v_BSHV: Tensor
    seen_B: Tensor
    id_BS: Tensor


@register(
    "repeat-attention",
    family="softmax attention",
    paper=Paper(
        title="Zoology: Measuring and Improving Recall in Efficient Language Models",
        authors="Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré",
        year=2023,
        arxiv="2312.04927",
    ),
    state="N(2D + 1) + 1",
    training="N²D",
    inference="ND",
    quadratic=True,
)
@dataclass(frozen=True, kw_only=True)
class RepeatAttentionConfig(MixerConfig):
    """Softmax attention, written only where the token occurred before in its row."""

    heads: PositiveInt = 1
    """Number of heads, H."""
    rotary: Share = 0.0
    """Share of each head's dimensions that rotary positions turn: 0 for none, 1 for all."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    bias: bool = True
    """Whether the projections have biases."""

    variants = ({"heads": 2, "rotary": 0.5},)

    def validate(self) -> None:
        check_heads(self.width, self.heads, self.rotary)

    def build(self) -> RepeatAttention:
        return RepeatAttention(self)


def repeats_loop(tokens_BT: Tensor, id_BS: Tensor) -> Tensor:
    """The definition: whether each token is among those before it, `id_BS` and then the earlier new ones."""
    again = []
    for t in range(tokens_BT.shape[1]):
        now_B1 = tokens_BT[:, t : t + 1] + 1
        again.append((id_BS == now_B1).any(1))
        id_BS = torch.cat((id_BS, now_B1), dim=1)
    return torch.stack(again, dim=1)


def repeats(tokens_BT: Tensor, id_BS: Tensor) -> Tensor:
    """By sorting, O((S + T) log (S + T)): all but the first of each run of equal ids are repeats."""
    id_BS = torch.cat((id_BS, tokens_BT + 1), dim=1)
    order_BS = id_BS.argsort(dim=1, stable=True)
    sorted_BS = id_BS.take_along_dim(order_BS, dim=1)
    first_B1 = torch.zeros_like(sorted_BS[:, :1], dtype=torch.bool)
    again_BS = torch.cat((first_B1, sorted_BS[:, 1:] == sorted_BS[:, :-1]), dim=1)
    return again_BS.take_along_dim(order_BS.argsort(dim=1), dim=1)[:, id_BS.shape[1] - tokens_BT.shape[1] :]


class RepeatAttention(Mixer):
    config: RepeatAttentionConfig
    state_type = RepeatState
    reads_tokens = True

    def __init__(self, config: RepeatAttentionConfig) -> None:
        super().__init__(config)
        self.project = QKV(config.width, config.heads, config.rotary, config.rotary_base, config.bias)
        self.out_proj = nn.Linear(config.width, config.width, bias=config.bias)
        loop = self.form == "loop"
        self.fills_slots = not loop
        self.attend = attention.full_attention_loop if loop else attention.full_attention
        self.repeats = repeats_loop if loop else repeats

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,  # with room or without
        *,
        inplace: bool = False,
        want_state: bool = True,
        tokens_BT: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        if tokens_BT is None:
            raise ValueError("repeat-attention needs the tokens' ids: pass tokens_BT, as holdall.model does")
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = self.project(x_BTD, state.seen_B)
        id_BS, id_BT, scale = state.id_BS, tokens_BT + 1, q.shape[-1] ** -0.5
        if is_reserved(state):
            k_BSHK, v_BSHV, seen_B, _, filled_B = state
            y_BTHV, *slots = attention.reserved_attention(
                q, k, v, k_BSHK, v_BSHV, seen_B, filled_B, scale=scale, inplace=inplace
            )
            again_BT = self.repeats(tokens_BT, in_order(id_BS, filled_B))
            id_BS = fill(id_BS, id_BT, filled_B, inplace=inplace)
            after = advanced(state, (*slots, seen_B + id_BT.shape[1], id_BS), id_BT.shape[1])
        else:
            y_BTHV, cache = self.attend(q, k, v, KeyValueCache(*state[:3]), scale=scale)
            again_BT = self.repeats(tokens_BT, id_BS)
            after = RepeatState(*cache, torch.cat((id_BS, id_BT), dim=1))
        y_BTD = self.out_proj(y_BTHV.flatten(2)).masked_fill(~again_BT[..., None], 0.0)
        return y_BTD, after if want_state else None

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> RepeatState:
        heads, head_dim = self.config.heads, self.config.width // self.config.heads
        cache = attention.empty_cache(batch, 0, heads, head_dim, head_dim, dtype=dtype, device=device)
        return RepeatState(*cache, torch.zeros(batch, 0, dtype=torch.long, device=device))

    def state_elements(self, context_len: int) -> int:
        return context_len * (2 * self.config.width + 1) + 1
