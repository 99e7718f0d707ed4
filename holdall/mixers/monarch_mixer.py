"""Monarch Mixer (M2): a gated long convolution in which every product along the sequence is a Monarch matrix.

    [x_1 | x_2 | v] = shortconv_3(W_in u + b)        c = h conv (x_1 v) + d x_1 v
    y = W_out (x_2 c) + b                            or W_out (x_2 c + h' conv u + d' u) + b, with `residual`

Letters: u and y input and output; x_1 and x_2 gates; v what they gate; c the long convolution of it; h and h'
filters; d and d' their skips; W_in and W_out learned maps; b biases; shortconv_3 a causal convolution of 3
taps.

The convolution is M^-1 (M h . M v) with M the Fourier matrix of twice the length, as an order-2 Monarch
matrix: two block-diagonal products and a permutation (ops/monarch.py). Padding h and v with zeros makes it
causal.
h(t) = MLP_sin([t, cos w t, -sin w t]) exp(-t |delta|), Hyena's filter, t from 0 to 1 over max_length tokens.

Fu, Arora, Grogan et al., "Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture", 2023, arXiv
2310.12109. M2's Monarch products along the width are in the MLP half of the block. As in Hyena, the state
grows with the context.
Weights map onto MonarchMixerSequenceMixing: in_linear, short_filter (without its middle dimension),
filter_fn.implicit_filter (layers 0, 2, 4 are `filter.hidden`, layer 6 `filter.last`, and the sines' one
`freq` times hyena_w_mod is `frequency_H`), filter_fn.bias (`skip_D`), filter_fn2 likewise for the residual,
out_linear.
Deviations:
- the features of time are fixed, while M2 learns them (pos_emb.z, with a learning rate of 1e-5) starting from
  these;
- beyond `max_length` the filters are the same functions of time;
- M2-BERT's bidirectional mixer, which adds a filter over later tokens, is not available.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, register
from holdall.mixers.hyena import HyenaConfig, HyenaFilter
from holdall.ops.long_conv import long_conv_loop
from holdall.ops.monarch import monarch_conv
from holdall.ops.short_conv import short_conv
from holdall.settings import PositiveFloat, PositiveInt, Range


class MonarchState(NamedTuple):
    """The last two inputs of the short convolution, and all inputs of the long one."""

    short_BPU: Tensor
    long_BPD: Tensor


class ResidualMonarchState(NamedTuple):
    """The same, and all inputs of the residual convolution."""

    short_BPU: Tensor
    long_BPD: Tensor
    residual_BPD: Tensor


@register(
    "monarch-mixer",
    family="convolution",
    paper=Paper(
        title="Monarch Mixer: A Simple Sub-Quadratic GEMM-Based Architecture",
        authors="Fu et al.",
        year=2023,
        arxiv="2310.12109",
    ),
    state="ND + 6D",
    training="ND(√N + D)",
    inference="ND + D²",
)
@dataclass(frozen=True, kw_only=True)
class MonarchMixerConfig(MixerConfig):
    """Gated long convolution by Monarch matrices, M2's sequence mixer."""

    max_length: Annotated[int, Range(least=2)] = 1024
    """Tokens over which the filters' time runs from 0 to 1."""
    hidden: PositiveInt = 16
    """Hidden width of the MLP that generates the filters."""
    bands: PositiveInt = 1
    """Number of frequencies of the sines and cosines of time that the MLP reads."""
    sine_frequency: PositiveFloat = 10.0
    """Initial frequency of the MLP's sine activations."""
    residual: bool = False
    """Whether a second long convolution, of the mixer's input, is added after the gate, as in M2-BERT."""

    variants = ({}, {"max_length": 64, "bands": 2, "sine_frequency": 1.0, "residual": True})

    @property
    def filter_config(self) -> HyenaConfig:
        return HyenaConfig(
            width=self.width,
            max_length=self.max_length,
            hidden=self.hidden,
            bands=self.bands,
            sine_frequency=self.sine_frequency,
        )

    def build(self) -> MonarchMixer:
        return MonarchMixer(self)


class MonarchMixer(Mixer):
    config: MonarchMixerConfig

    def __init__(self, config: MonarchMixerConfig) -> None:
        super().__init__(config)
        width = config.width
        self.state_type = ResidualMonarchState if config.residual else MonarchState  # type: ignore[misc]
        self.in_proj = nn.Linear(width, 3 * width)
        self.short_weight_UW = nn.Parameter(torch.empty(3 * width, 3).uniform_(-(3**-0.5), 3**-0.5))
        self.short_bias_U = nn.Parameter(torch.empty(3 * width).uniform_(-(3**-0.5), 3**-0.5))
        self.filter = HyenaFilter(width, config.filter_config)
        self.skip_D = nn.Parameter(torch.randn(width))
        if config.residual:
            self.residual_filter = HyenaFilter(width, config.filter_config)
            self.residual_skip_D = nn.Parameter(torch.randn(width))
        self.out_proj = nn.Linear(width, width)
        self.long_conv = long_conv_loop if self.form == "loop" else monarch_conv

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, State | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        short_BPU, *pasts = state
        u_BTU, short_BPU = short_conv(
            self.in_proj(x_BTD), self.short_weight_UW, self.short_bias_U, short_BPU, form=self.form
        )
        gate_BTD, after_BTD, v_BTD = u_BTU.chunk(3, dim=-1)
        length = pasts[0].shape[1] + x_BTD.shape[1]
        v_BTD = v_BTD * gate_BTD
        y_BTD, *kept = self.long_conv(v_BTD, self.filter(length), pasts[0])
        y_BTD = (y_BTD + self.skip_D * v_BTD) * after_BTD
        if self.config.residual:
            r_BTD, past_BPD = self.long_conv(x_BTD, self.residual_filter(length), pasts[1])
            y_BTD = y_BTD + r_BTD + self.residual_skip_D * x_BTD
            kept.append(past_BPD)
        return self.out_proj(y_BTD), self.state_type(short_BPU, *kept) if want_state else None

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        width = self.config.width
        return self.state_type(
            torch.zeros(batch, 2, 3 * width, dtype=dtype, device=device),
            *(
                torch.zeros(batch, 0, width, dtype=dtype, device=device)
                for _ in range(1 + self.config.residual)
            ),
        )

    def state_elements(self, context_len: int) -> int:
        return ((1 + self.config.residual) * context_len + 6) * self.config.width
