"""Hyena: long implicit convolutions between gates.

    u = shortconv_3(W_in x + b), split into x_0 .. x_{n-1}, v
    for i = n - 1 .. 1:  v <- x_i * v;  v <- h_o conv v + d_o v,  o = n - 1 - i
    y = W_out (x_0 * v) + b
    h(t) = MLP_sin([t, cos w t, -sin w t]) * exp(-t |delta|),  t from 0 to 1 over max_length tokens

Letters: x and y input and output; u their projection; x_0 to x_{n-1} the n gates; i one of them; v what they
gate; h_o the long filter of use o; d_o its skip; t time; w frequencies; delta the filters' decay rates; W_in
and W_out learned maps; b biases; shortconv_3 a causal convolution of 3 taps.

Poli et al., "Hyena Hierarchy", 2023, arXiv 2302.10866. It has no recurrence of fixed size: the state is the
inputs of all long convolutions and grows with the context.
Weights map onto safari's standalone HyenaOperator: gates are applied from the last to the first, and filters
h and skips d are in the order o of their use, o slowest; Zoology's order-2 Hyena is the same with the blocks
of x_0 and x_1 swapped.
Deviations:
- the features of time are fixed, while both learn them (pos_emb.z, with a learning rate of 1e-5) starting
  from these;
- beyond `max_length` the filter is the same function of time.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, register
from holdall.ops.hyena import between_projections, hyena
from holdall.ops.linear import is_plain, wide
from holdall.ops.long_conv import filter_features
from holdall.settings import PositiveFloat, PositiveInt, Range


class HyenaState(NamedTuple):
    """The last two inputs of the short convolution, and all inputs of the long ones."""

    short_BPU: Tensor
    long_BPE: Tensor


@register(
    "hyena",
    family="convolution",
    paper=Paper(
        title="Hyena Hierarchy: Towards Larger Convolutional Language Models",
        authors="Poli et al.",
        year=2023,
        arxiv="2302.10866",
    ),
    state="(n-1)ND + 2(n+1)D",
    training="ND log N",
    inference="ND",
)
@dataclass(frozen=True, kw_only=True)
class HyenaConfig(MixerConfig):
    """Implicit long convolutions between gates."""

    order: Annotated[int, Range(least=2)] = 2
    """Number of gates, n."""
    max_length: Annotated[int, Range(least=2)] = 1024
    """Tokens over which the filters' time runs from 0 to 1."""
    hidden: PositiveInt = 16
    """Hidden width of the MLP that generates the filters."""
    bands: PositiveInt = 1
    """Number of frequencies of the sines and cosines of time that the MLP reads."""
    sine_frequency: PositiveFloat = 1.0
    """Initial frequency of the MLP's sine activations."""

    forms = ("loop", "parallel", "kernel")
    variants = ({}, {"order": 3, "max_length": 64, "bands": 2})

    def build(self) -> Hyena:
        return Hyena(self)


class HyenaFilter(nn.Module):
    """The filters of all long convolutions, (length, channels), under a window that decays per channel."""

    def __init__(self, channels: int, config: HyenaConfig) -> None:
        super().__init__()
        self.max_length, self.bands = config.max_length, config.bands
        sizes = [1 + 2 * config.bands, config.hidden, config.hidden, config.hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        # one vector of frequencies for all layers, held once: a sine module listed after each layer would be
        # one module under three names, which torch.func.functional_call does not put back as it was
        self.frequency_H = nn.Parameter(torch.full((config.hidden,), config.sine_frequency))
        self.last = nn.Linear(config.hidden, channels, bias=False)

    def forward(self, length: int) -> Tensor:
        z_LH = time_LZ = filter_features(length, self.max_length, self.bands, self.frequency_H)
        dtype = time_LZ.dtype
        for layer in self.hidden:
            z_LH = torch.sin(self.frequency_H.to(dtype) * wide(layer, z_LH, dtype))
        h_LE = wide(self.last, z_LH, dtype)
        # the window falls to 1/100 between 0.3 and 1.5 times max_length
        fall = -math.log(1e-2)
        delta_E = torch.linspace(fall / 1.5, fall / 0.3, h_LE.shape[1], dtype=dtype, device=h_LE.device)
        return h_LE * torch.exp(-time_LZ[:, :1] * delta_E)


class Hyena(Mixer):
    config: HyenaConfig
    state_type = HyenaState

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        width, long_channels = config.width, (config.order - 1) * config.width
        channels = (config.order + 1) * width
        self.in_proj = nn.Linear(width, channels)
        self.short_weight_UW = nn.Parameter(torch.empty(channels, 3).uniform_(-(3**-0.5), 3**-0.5))
        self.short_bias_U = nn.Parameter(torch.empty(channels).uniform_(-(3**-0.5), 3**-0.5))
        self.filter = HyenaFilter(long_channels, config)
        self.skip_E = nn.Parameter(torch.randn(long_channels))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x_BTD: Tensor,
        state: HyenaState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, HyenaState | None]:
        length = x_BTD.shape[1] + (0 if state is None else state.long_BPE.shape[1])
        if not (is_plain(self.in_proj) and is_plain(self.out_proj)):
            between_BTD, past = between_projections(
                self.in_proj(x_BTD), self.short_weight_UW, self.short_bias_U, self.filter(length),
                self.skip_E, state, width=x_BTD.shape[2], inplace=inplace, want_state=want_state,
                form=self.form,
            )  # fmt: skip
            return self.out_proj(between_BTD), None if past is None else HyenaState(*past)
        y_BTD, past = hyena(
            x_BTD, self.in_proj.weight, self.in_proj.bias, self.short_weight_UW, self.short_bias_U,
            self.filter(length), self.skip_E, self.out_proj.weight, self.out_proj.bias,
            state, inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        return y_BTD, HyenaState(*past) if past is not None else None

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> HyenaState:
        width, order = self.config.width, self.config.order
        return HyenaState(
            torch.zeros(batch, 2, (order + 1) * width, dtype=dtype, device=device),
            torch.zeros(batch, 0, (order - 1) * width, dtype=dtype, device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return ((self.config.order - 1) * context_len + 2 * (self.config.order + 1)) * self.config.width
