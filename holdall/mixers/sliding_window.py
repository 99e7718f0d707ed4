"""Sliding-window attention: softmax attention over the last w tokens.

    y_t = W_o [ sum_{t - w < j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j ] + b

Letters: y_t output of token t; j tokens up to t; w the window; q, k, v queries, keys and values of a head; K
their dimensions; W_o a learned map; b its bias.

Beltagy, Peters, Cohan, "Longformer", 2020, arXiv 2004.05150. `window` includes the token itself, so the
state has the w - 1 tokens before it. Options of released models as in `attention`.
Weights:
- Zoology's SlidingAttn, of one head, as those of `attention`; its `block_size` b is window b + 1;
- Based's SlidingAttention, with rotary 1 and no bias: Wqkv is `qkv`; its `window_size` s, which its code
  halves, is window s / 2 + 1;
- recurrentgemma's LocalAttentionBlock (Griffin) of window_size s is window s + 1 with kv_heads 1, rotary 0.5
  and bias "out"; proj_q, proj_k and proj_v are the rows of `qkv`, in that order, and proj_final is
  `out_proj`.
Deviations: none.
With `replay` the state has L more tokens, and can be rolled back: holdall/contract/rollback.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from holdall.contract import Mixer, Paper, State, register
from holdall.contract.rollback import lowered, read_on
from holdall.mixers.attention import QKV, HeadsConfig, gate_and_output, gated_output
from holdall.ops import attention
from holdall.ops.attention import KeyValueCache
from holdall.ops.window_attention import kernel_refusal, window_attention
from holdall.settings import Range


@register(
    "sliding-window",
    family="softmax attention",
    paper=Paper(
        title="Longformer: The Long-Document Transformer",
        authors="Beltagy, Peters, Cohan",
        year=2020,
        arxiv="2004.05150",
    ),
    state="2(w-1)DG/H + 1",
    training="NwD",
    inference="wD",
)
@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(HeadsConfig):
    """Softmax attention over the last `window` tokens."""

    window: Annotated[int, Range(least=2)] = 16
    """Tokens that an output sees, its own included, w."""
    replay: Annotated[int, Range(least=1, zero="none")] = 0
    """Tokens that can be rolled back, L: so many more are carried. Outputs and weights are the same."""

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"heads": 2, "rotary": 1.0, "bias": False, "window": 5},
        {"heads": 4, "kv_heads": 2, "rotary": 0.5, "bias": "out"},
        {"heads": 2, "kv_heads": 1, "rotary": 1.0, "window": 5, "replay": 3},
        {"window": 65},
        {"heads": 2, "kv_heads": 1, "head_dim": 6, "rotary": 1.0, "rotary_scaling": (4.0,), "qk_norm": "all",
         "gate": True, "window": 5},
    )  # fmt: skip

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or kernel_refusal(self.resolved_head_dim)

    def build(self) -> SlidingWindow:
        return SlidingWindow(self)


class LongerRing(NamedTuple):
    """With `replay`: a ring of w - 1 + L slots, and how many tokens can be taken back."""

    k_BSHK: Tensor
    v_BSHV: Tensor
    seen_B: Tensor
    spare_B: Tensor


class SlidingWindow(Mixer):
    config: SlidingWindowConfig

    def __init__(self, config: SlidingWindowConfig) -> None:
        super().__init__(config)
        self.state_type = LongerRing if config.replay else KeyValueCache  # type: ignore[misc]
        self.rollback_limit = config.replay
        self.project = QKV.of(config)
        self.gate, self.out_proj = gate_and_output(config)

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, Any]:
        replay = self.config.replay
        if state is None and replay and want_state:
            state = self.init_state(len(x_BTD), dtype=x_BTD.dtype, device=x_BTD.device)
        seen_B = torch.zeros(1, dtype=torch.long, device=x_BTD.device) if state is None else state.seen_B
        q, k, v = self.project(x_BTD, seen_B)
        window, scale = self.config.window, q.shape[-1] ** -0.5
        y_BTHV, ring = window_attention(
            q, k, v, None if state is None else KeyValueCache(*state[:3]), window=window, scale=scale,
            inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        y_BTD = self.out_proj(gated_output(y_BTHV.flatten(2), x_BTD, self.gate))
        if ring is None or not want_state:
            return y_BTD, None
        if not replay:
            return y_BTD, ring
        return y_BTD, LongerRing(*ring, read_on(state.spare_B, x_BTD.shape[1], replay, inplace=inplace))

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config, heads, head_dim = self.config, self.project.heads[1], self.project.head_dim
        slots = config.window - 1 + config.replay
        ring = attention.empty_cache(batch, slots, heads, head_dim, head_dim, dtype=dtype, device=device)
        return LongerRing(*ring, torch.zeros_like(ring.seen_B)) if config.replay else ring

    def state_elements(self, context_len: int) -> int:
        slots, counts = self.config.window - 1 + self.config.replay, 1 + (self.config.replay > 0)
        return 2 * slots * self.project.heads[1] * self.project.head_dim + counts

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        k_BSHK, v_BSHV, seen_B, spare_B = state
        if not inplace:
            k_BSHK, v_BSHV = k_BSHK.clone(), v_BSHV.clone()
        return LongerRing(k_BSHK, v_BSHV, *lowered(seen_B, spare_B, count_B, self.owner))
