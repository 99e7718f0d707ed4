"""The gated short convolution of LFM2: a gate before a convolution of a few taps, and one after it.

    [b | c | x] = W_in u (+ bias)        z_t = sum_{i < W} w_i (b * x)_{t - W + 1 + i} (+ bias)
    y = W_out (c * z) (+ bias)

Letters: u and y input and output, of token t in z_t; b and c what the two gates multiply by, x what they
gate; z the convolution of W taps w_i; W_in and W_out learned maps; i a tap.

Nothing else: no activation, so that y is of third degree in u. Liquid AI, "LFM2 Technical Report", 2025,
arXiv 2511.23404. The state has the W - 1 last values of b * x.
Weights map one to one onto Lfm2ShortConv of `transformers`: in_proj, out_proj, and conv.weight (D, 1, W) and
conv.bias as `weight_DW` and `bias_D`.
Deviations:
- of the W values in the official state the oldest is never used again; ours has the other W - 1.
With `replay` the state has L more values, and can be rolled back: holdall/contract/rollback.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, register
from holdall.contract.rollback import lowered, read_on
from holdall.mixers.base_conv import ConvState, ReplayedConvState
from holdall.ops import gated_conv
from holdall.ops.linear import Linear
from holdall.settings import Range


@register(
    "gated-short-conv",
    family="convolution",
    paper=Paper(title="LFM2 Technical Report", authors="Liquid AI", year=2025, arxiv="2511.23404"),
    state="(W-1)D",
    training="ND(W + D)",
    inference="D(W + D)",
)
@dataclass(frozen=True, kw_only=True)
class GatedShortConvConfig(MixerConfig):
    """Short convolution between two gates, as in LFM2."""

    kernel: Annotated[int, Range(least=2)] = 3
    """Taps of the convolution, W."""
    bias: bool = False
    """Whether both projections and the convolution have biases."""
    replay: Annotated[int, Range(least=1, zero="none")] = 0
    """Tokens that can be rolled back, L: so many more values are carried. Outputs are the same."""

    export_sizes = ("rows", "tokens")
    forms = ("loop", "parallel", "kernel")
    variants = ({}, {"kernel": 7, "bias": True}, {"kernel": 4, "replay": 3})

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or gated_conv.kernel_refusal(self.kernel)

    def build(self) -> GatedShortConv:
        return GatedShortConv(self)


class GatedShortConv(Mixer):
    config: GatedShortConvConfig

    def __init__(self, config: GatedShortConvConfig) -> None:
        super().__init__(config)
        self.state_type = ReplayedConvState if config.replay else ConvState  # type: ignore[misc]
        self.rollback_limit = config.replay
        width, bound = config.width, config.kernel**-0.5  # as torch's Conv1d with one channel per group
        self.in_proj = Linear(width, 3 * width, bias=config.bias)
        self.weight_DW = nn.Parameter(torch.empty(width, config.kernel).uniform_(-bound, bound))
        self.bias_D = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if config.bias else None
        self.out_proj = Linear(width, width, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, state: Any = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, Any]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        replay, new = self.config.replay, x_BTD.shape[1]
        b_BTD, c_BTD, u_BTD = self.in_proj(x_BTD).chunk(3, dim=-1)
        z_BTD, past_BPD = gated_conv.gated_conv(
            b_BTD * u_BTD, c_BTD, None, self.weight_DW, self.bias_D,
            state.past_BPD, state.seen_B if replay else None, inplace=inplace, form=self.form,
        )  # fmt: skip
        y_BTD = self.out_proj(z_BTD)
        if not want_state:
            return y_BTD, None
        if not replay:
            return y_BTD, ConvState(past_BPD)
        seen_B = state.seen_B.add_(new) if inplace else state.seen_B + new
        return y_BTD, ReplayedConvState(
            past_BPD, seen_B, read_on(state.spare_B, new, replay, inplace=inplace)
        )

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        past = self.config.kernel - 1 + self.config.replay
        past_BPD = torch.zeros(batch, past, self.config.width, dtype=dtype, device=device)
        if not self.config.replay:
            return ConvState(past_BPD)
        counts = (torch.zeros(batch, dtype=torch.long, device=device) for _ in range(2))
        return ReplayedConvState(past_BPD, *counts)

    def state_elements(self, context_len: int) -> int:
        past = self.config.kernel - 1 + self.config.replay
        return past * self.config.width + 2 * (self.config.replay > 0)

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        past_BPD, seen_B, spare_B = state
        ring_BPD = past_BPD if inplace else past_BPD.clone()
        return ReplayedConvState(ring_BPD, *lowered(seen_B, spare_B, count_B, self.owner))
