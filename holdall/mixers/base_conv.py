"""BaseConv: a convolution gated by a linear projection, the simplest of the gated convolutions.

    short:  c_t = b + sum_{i < W} w_i x_{t - W + 1 + i}        y = act(c) * act(W x + b_p) + x
    long:   c_t = x_t + sum_{j <= t} h_{t-j} x_j,   h(t) = MLP(positional features of t / (L - 1))

Arora et al., "Zoology", 2023, arXiv 2312.04927. Weights map one to one onto Zoology's BaseConv, whose input
is added inside the mixer. Deviations: none up to `max_length` L; beyond it, where Zoology stops with an
error, the filter's features go on along the same functions of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, register
from holdall.ops import conv


class ConvState(NamedTuple):
    """The inputs that later outputs still need, oldest first: W - 1 of them, or all for a long filter."""

    past_BPD: Tensor


@register(
    "base-conv",
    family="convolution",
    paper=Paper(
        title="Zoology: Measuring and Improving Recall in Efficient Language Models",
        authors="Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré",
        year=2023,
        arxiv="2312.04927",
    ),
    state="(W-1)D or ND",
    training="ND(W + D)",
    inference="D(W + D) or ND",
)
@dataclass(frozen=True, kw_only=True)
class BaseConvConfig(MixerConfig):
    """Gated convolution with a short filter, or a long implicit one.

    filter: "short" has `kernel` taps; "long" is as long as the context and comes out of a small MLP, whose
        time runs from 0 to 1 over `max_length` tokens.
    """

    filter: Literal["short", "long"] = "short"
    kernel: int = 3
    max_length: int = 1024
    hidden: int = 16
    activation: Literal["none", "silu"] = "none"

    variants = ({}, {"activation": "silu", "kernel": 5}, {"filter": "long", "max_length": 64})

    def validate(self) -> None:
        if self.kernel < 2 or self.max_length < 2:
            raise ValueError(f"kernel {self.kernel} and max_length {self.max_length} must be at least 2")

    def build(self) -> BaseConv:
        return BaseConv(self)


class ImplicitFilter(nn.Module):
    """h(t) for t = 0 .. length - 1 from an MLP of [t / (L - 1), cos w t, -sin w t], w = 2e-4 pi / L."""

    def __init__(self, width: int, hidden: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.fc1, self.fc2 = nn.Linear(3, hidden), nn.Linear(hidden, width)

    def forward(self, length: int) -> Tensor:
        z_L3 = conv.filter_features(length, self.max_length, 1, self.fc1.weight)
        hidden_LH = F.relu(F.linear(z_L3, self.fc1.weight.to(z_L3.dtype), self.fc1.bias.to(z_L3.dtype)))
        return F.linear(hidden_LH, self.fc2.weight.to(z_L3.dtype), self.fc2.bias.to(z_L3.dtype))


class BaseConv(Mixer):
    config: BaseConvConfig
    state_type = ConvState

    def __init__(self, config: BaseConvConfig) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.width, config.width)
        self.long = config.filter == "long"
        if self.long:
            self.filter = ImplicitFilter(config.width, config.hidden, config.max_length)
            self.convolve = conv.long_conv_loop if self.form == "loop" else conv.long_conv
        else:
            bound = config.kernel**-0.5  # as torch's Conv1d with one channel per group
            self.weight_DW = nn.Parameter(torch.empty(config.width, config.kernel).uniform_(-bound, bound))
            self.bias_D = nn.Parameter(torch.empty(config.width).uniform_(-bound, bound))
            self.convolve_short = conv.short_conv_loop if self.form == "loop" else conv.short_conv

    def forward(
        self, x_BTD: Tensor, state: ConvState | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, ConvState | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        if self.long:
            filter_LD = self.filter(state.past_BPD.shape[1] + x_BTD.shape[1])
            c_BTD, past_BPD = self.convolve(x_BTD, filter_LD, state.past_BPD)
            c_BTD = c_BTD + x_BTD
        else:
            c_BTD, past_BPD = self.convolve_short(x_BTD, self.weight_DW, self.bias_D, state.past_BPD)
        gate_BTD = self.projection(x_BTD)
        if self.config.activation == "silu":
            c_BTD, gate_BTD = F.silu(c_BTD), F.silu(gate_BTD)
        return torch.addcmul(x_BTD, c_BTD, gate_BTD), ConvState(past_BPD) if want_state else None

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> ConvState:
        past = 0 if self.long else self.config.kernel - 1
        return ConvState(torch.zeros(batch, past, self.config.width, dtype=dtype, device=device))

    def state_elements(self, context_len: int) -> int:
        return (context_len if self.long else self.config.kernel - 1) * self.config.width
