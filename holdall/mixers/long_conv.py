"""Long convolution: one explicit filter per channel, as long as the context.

    y_t = x_t + sum_{j <= t, t - j < L} h_{t - j} x_j          h: L taps per channel, explicit parameters
    with squash s:  h = sign(g) max(|g| - s, 0)                of the parameters g

Letters: x_t and y_t input and output of token t; j tokens up to t; h_j the filter of a channel; L its taps; g
its parameters; s the threshold.

Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", 2023, arXiv 2302.06646, as the
convolution without gates of Zoology's comparison (arXiv 2312.04927).
Weights: the one of Zoology's LongConvolution, `filter`, is transposed here to (taps, channels).
Deviations:
- Zoology's transform is as long as twice the input, so that with a filter longer than the input by more than
  one tap late tokens wrap around to early outputs; here none do;
- the squashed filter is the kernel of Fu et al.'s layer, without their learned skip, GELU and GLU, as in
  Zoology.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.long_conv import long_conv
from holdall.settings import NonNegativeFloat, Range


class LongConvState(NamedTuple):
    """The inputs that later outputs still need, oldest first: all of them, but at most L - 1."""

    past_BPD: Tensor


@register(
    "long-conv",
    family="convolution",
    paper=Paper(
        title="Simple Hardware-Efficient Long Convolutions for Sequence Modeling",
        authors="Fu et al.",
        year=2023,
        arxiv="2302.06646",
    ),
    state="min(N, L-1)D",
    training="ND log N",
    inference="min(N, L)D",
)
@dataclass(frozen=True, kw_only=True)
class LongConvConfig(MixerConfig):
    """Long convolution: an explicit filter per channel."""

    max_length: Annotated[int, Range(least=2)] = 1024
    """Taps of the filter, L; tokens further back than that are not seen."""
    squash: NonNegativeFloat = 0.0
    """Soft threshold that pulls every tap towards zero, s; 0 for Zoology's plain filter. With it the
    parameters are initialised small and decaying along the filter, as published; without it from N(0, 1).
    """

    variants = ({"max_length": 40}, {"max_length": 200, "squash": 0.01})

    def build(self) -> LongConv:
        return LongConv(self)


class LongConv(Mixer):
    config: LongConvConfig
    state_type = LongConvState

    def __init__(self, config: LongConvConfig) -> None:
        super().__init__(config)
        filter_LD = torch.randn(config.max_length, config.width)
        if config.squash:  # channels forget at rates from 1 / L to D / 2L
            time_L1 = torch.arange(config.max_length)[:, None] / config.max_length
            rate_D = (config.width / 2) ** (torch.arange(config.width) / config.width)
            filter_LD = 0.02 * filter_LD * torch.exp(-time_L1 * rate_D)
        self.filter_LD = nn.Parameter(filter_LD)

    def forward(
        self,
        x_BTD: Tensor,
        state: LongConvState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, LongConvState | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        filter_LD = self.filter_LD.to(recurrent_dtype(x_BTD.dtype))
        if self.config.squash:
            filter_LD = F.softshrink(filter_LD, self.config.squash)
        length, taps = state.past_BPD.shape[1] + x_BTD.shape[1], self.config.max_length
        filter_LD = F.pad(filter_LD, (0, 0, 0, max(length - taps, 0)))
        y_BTD, seen_BSD = long_conv(x_BTD, filter_LD, state.past_BPD, form=self.form)
        kept = min(length, taps - 1)
        after = LongConvState(seen_BSD[:, length - kept :].clone()) if want_state else None
        return x_BTD + y_BTD, after

    def init_state(
        self,
        batch: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> LongConvState:
        slots = 0 if capacity is None else self.config.max_length - 1  # which is all that it ever keeps
        return LongConvState(torch.zeros(batch, slots, self.config.width, dtype=dtype, device=device))

    def state_elements(self, context_len: int) -> int:
        return min(context_len, self.config.max_length - 1) * self.config.width
