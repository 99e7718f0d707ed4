"""BaseConv: a convolution gated by a linear projection, the simplest of the gated convolutions.

    short:  c_t = b + sum_{i < W} w_i x_{t - W + 1 + i}        y = act(c) * act(W x + b_p) + x
    long:   c_t = x_t + sum_{j <= t} h_{t-j} x_j,   h(t) = MLP(positional features of t / (L - 1))
    expand: [u | g] = W_in x + b_in,   c_t = sum_{i < W} w_i u_{t - W + 1 + i},   y = W_out (silu(c) * g) + b

Arora et al., "Zoology", 2023, arXiv 2312.04927; and, expanded, the gated convolution of the Based language
models, Arora et al., 2024, arXiv 2402.18668.
Weights:
- Zoology's BaseConv, short: its convolution's weight (D, 1, W) and bias are `weight_DW` and `bias_D`, and the
  input is added inside the mixer;
- Zoology's BaseConv, long: its filter's two linear layers are `filter.fc1` and `filter.fc2`;
- Based's BaseConv: in_proj, out_proj, and conv.conv.weight (D, 1, W) as `weight_DW`. It has no residual.
Deviations:
- beyond `max_length` L, where Zoology stops with an error, the filter's features continue as the same
  functions of time;
- of the W inputs in Based's state the oldest is never used again, and ours holds the other W - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, register
from holdall.ops import conv, gated_conv
from holdall.settings import PositiveInt, Range


class ConvState(NamedTuple):
    """What the filter has read and still needs, oldest first: W - 1 inputs, or all for a long filter."""

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
    activation: "silu" on both factors.
    expand: None is Zoology's. A number E is Based's, 4 in its language models: a projection to E times the
        width, half of it convolved (a short filter, then SiLU, always), half the gate, and another one back.
        The state is E / 2 times as large.
    """

    filter: Literal["short", "long"] = "short"
    kernel: Annotated[int, Range(least=2)] = 3
    max_length: Annotated[int, Range(least=2)] = 1024
    hidden: PositiveInt = 16
    activation: Literal["none", "silu"] = "none"
    expand: PositiveInt | None = None

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"activation": "silu", "kernel": 5},
        {"filter": "long", "max_length": 64},
        {"expand": 4},
    )

    @property
    def channels(self) -> int:
        """The convolution's."""
        return self.width if self.expand is None else self.expand * self.width // 2

    def validate(self) -> None:
        if self.expand is None:
            return
        if self.expand * self.width % 2:
            raise ValueError(f"expand {self.expand} times width {self.width} is not an even number")
        if self.filter == "long" or self.activation != "none":
            raise ValueError(
                "expand has a short filter and its own SiLU: leave filter and activation at their defaults"
            )

    @property
    def has_kernel(self) -> bool:
        return self.filter == "short"

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.filter == "long":
            return "there is a kernel for the short filter only"
        if refusal := super().kernel_refusal(device, dtype):
            return refusal
        from holdall.kernels import gated_conv as kernel

        return kernel.refusal(self.kernel)

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
        channels = config.channels
        if config.expand is None:
            self.projection = nn.Linear(config.width, config.width)
        else:
            self.in_proj = nn.Linear(config.width, 2 * channels)
            self.out_proj = nn.Linear(channels, config.width)
        self.long = config.filter == "long"
        if self.long:
            self.filter = ImplicitFilter(config.width, config.hidden, config.max_length)
        else:
            bound = config.kernel**-0.5  # as torch's Conv1d with one channel per group
            self.weight_DW = nn.Parameter(torch.empty(channels, config.kernel).uniform_(-bound, bound))
            self.bias_D = (
                nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if config.expand is None else None
            )

    def forward(
        self, x_BTD: Tensor, state: ConvState | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, ConvState | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        if self.long:
            y_BTD, past_BPD = self._long(x_BTD, state.past_BPD)
        else:
            y_BTD, past_BPD = self._short(x_BTD, state.past_BPD, inplace)
        return y_BTD, ConvState(past_BPD) if want_state else None

    def _long(self, x_BTD: Tensor, past_BPD: Tensor) -> tuple[Tensor, Tensor]:
        convolve = conv.long_conv_loop if self.form == "loop" else conv.long_conv
        filter_LD = self.filter(past_BPD.shape[1] + x_BTD.shape[1])
        c_BTD, past_BPD = convolve(x_BTD, filter_LD, past_BPD)
        c_BTD, gate_BTD = c_BTD + x_BTD, self.projection(x_BTD)
        if self.config.activation == "silu":
            c_BTD, gate_BTD = F.silu(c_BTD), F.silu(gate_BTD)
        return torch.addcmul(x_BTD, c_BTD, gate_BTD), past_BPD

    def _short(self, x_BTD: Tensor, past_BPD: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        expanded = self.config.expand is not None
        projection, bias_E = self.in_proj if expanded else self.projection, None
        if self.form == "kernel":
            from holdall.kernels.gated_conv import gated_conv as convolve

            # which adds the bias itself, and has the sum that is its gradient for nothing
            projected_BTE, bias_E = F.linear(x_BTD, projection.weight), projection.bias
        else:
            convolve = gated_conv.gated_conv_loop if self.form == "loop" else gated_conv.gated_conv
            projected_BTE = projection(x_BTD)
        y_BTD, past_BPD = convolve(
            None if expanded else x_BTD, projected_BTE, bias_E, self.weight_DW, self.bias_D, past_BPD,
            silu="conv" if expanded else "both" if self.config.activation == "silu" else "none",
            skip=not expanded, inplace=inplace,
        )  # fmt: skip
        return self.out_proj(y_BTD) if expanded else y_BTD, past_BPD

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> ConvState:
        past = 0 if self.long else self.config.kernel - 1
        return ConvState(torch.zeros(batch, past, self.config.channels, dtype=dtype, device=device))

    def state_elements(self, context_len: int) -> int:
        return (context_len if self.long else self.config.kernel - 1) * self.config.channels
