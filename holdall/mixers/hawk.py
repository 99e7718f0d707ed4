"""Hawk: a real-gated linear recurrent unit (RG-LRU) behind a short convolution; Griffin's recurrent block.

    [u | x] = W_in X + b            x = shortconv_4(x)
    i_t = sigmoid(W_i x_t + b_i)    r_t = sigmoid(W_r x_t + b_r)        W_i, W_r block-diagonal, H blocks
    a_t = exp(-8 r_t softplus(a_param))
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t         h_0 = i_0 x_0   the first token is not scaled
    y_t = W_out (gelu_tanh(u_t) * h_t) + b

Letters: X and y input and output; u_t a gate; x the recurrence's input; i_t and r_t gates of input and decay
at token t; a_t the decay; h_t the state; W_* learned maps, two of them of H blocks; b and b_* their biases;
shortconv_4 a causal convolution of 4 taps.

De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
2024, arXiv 2402.19427.
Weights map onto recurrentgemma's RecurrentBlock: linear_y and linear_x are the rows of `in_proj`, in that
order, linear_out is `out_proj`, conv_1d.w and .b are `conv_weight_EW` (transposed) and `conv_bias_E`,
rg_lru.input_gate and .a_gate are the two entries of `gate_weight_GHIJ` and `gate_bias_GHJ`.
Deviations:
- a^8 is drawn uniformly from [0.9, 0.999], as the paper says; the released code draws a from there, a^2
  uniformly;
- that code bounds the derivative of the square root, whose argument 1 - a^2 is often rounded to zero in bf16.
  Here the argument is -expm1(2 log a) at full relative precision, and the gates' gradients are finite without
  a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.contract.forms import plain
from holdall.ops.diagonal_scan import CHUNK, diagonal_scan
from holdall.ops.short_conv import short_conv
from holdall.settings import NonNegativeInt, PositiveInt, Range


class HawkState(NamedTuple):
    """The inputs that the convolution still needs, the recurrent state, and how many tokens were read."""

    conv_BPE: Tensor
    h_BE: Tensor
    seen_B: Tensor


@register(
    "hawk",
    family="gated recurrence",
    paper=Paper(
        title="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
        authors="De et al.",
        year=2024,
        arxiv="2402.19427",
    ),
    state="EW + 1",
    training="NE(D + E/H)",
    inference="E(D + E/H)",
)
@dataclass(frozen=True, kw_only=True)
class HawkConfig(MixerConfig):
    """Real-gated linear recurrent unit behind a short convolution, Griffin's recurrent block."""

    lru_width: NonNegativeInt = 0
    """Channels of the recurrence, E; 0 for the model's width."""
    heads: PositiveInt = 4
    """Blocks of the gates' block-diagonal projections, H."""
    kernel: Annotated[int, Range(least=2)] = 4
    """Taps of the short convolution, W."""
    chunk: PositiveInt = CHUNK
    """Tokens per chunk of the scan: chunks run in parallel, the tokens of a chunk one after another."""

    forms = ("loop", "parallel", "kernel")
    variants = ({}, {"lru_width": 12, "heads": 2, "kernel": 3, "chunk": 16})

    def validate(self) -> None:
        if self.inner % self.heads:
            raise ValueError(f"lru_width {self.inner} is not a multiple of heads {self.heads}")

    @property
    def inner(self) -> int:
        return self.lru_width or self.width

    def build(self) -> Hawk:
        return Hawk(self)


class Hawk(Mixer):
    config: HawkConfig
    state_type = HawkState
    own_init = True

    def __init__(self, config: HawkConfig) -> None:
        super().__init__(config)
        width, inner, heads = config.width, config.inner, config.heads
        block = inner // heads
        self.in_proj = nn.Linear(width, 2 * inner)
        self.conv_weight_EW = nn.Parameter((0.01 / config.kernel) ** 0.5 * torch.randn(inner, config.kernel))
        self.conv_bias_E = nn.Parameter(torch.zeros(inner))
        self.gate_weight_GHIJ = nn.Parameter(block**-0.5 * torch.randn(2, heads, block, block))
        self.gate_bias_GHJ = nn.Parameter(torch.zeros(2, heads, block))
        # softplus(a_param) is -log(a) where a^8 is uniform: with a gate of 1/2, memories of 20 to 2000 tokens
        minus_log_a = -torch.empty(inner).uniform_(0.9, 0.999).log() / 8
        self.a_param_E = nn.Parameter(torch.log(torch.expm1(minus_log_a)))
        self.out_proj = nn.Linear(inner, width)
        with torch.no_grad():
            for layer in (self.in_proj, self.out_proj):
                layer.weight.normal_(std=layer.in_features**-0.5)
                layer.bias.zero_()

    def forward(
        self,
        x_BTD: Tensor,
        state: HawkState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, HawkState | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        dtype, new = state.h_BE.dtype, x_BTD.shape[1]
        u_BTE, x_BTE = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTE, conv_BPE = short_conv(
            x_BTE, self.conv_weight_EW, self.conv_bias_E, state.conv_BPE, form=plain(self.form)
        )
        x_BTHI = x_BTE.unflatten(-1, (self.config.heads, -1))
        gate_GBTHJ = torch.einsum("bthi,ghij->gbthj", x_BTHI, self.gate_weight_GHIJ).to(dtype)
        # the gates decide what is forgotten over thousands of tokens: not in bf16
        gate_GBTHJ = (gate_GBTHJ + self.gate_bias_GHJ[:, None, None].to(dtype)).sigmoid()
        input_BTE, forget_BTE = gate_GBTHJ.flatten(-2).unbind(0)
        log_a_BTE = -8 * forget_BTE * F.softplus(self.a_param_E.to(dtype))
        # the square root's slope is infinite at zero, where a gate that underflows ends up
        scale_BTE = (-torch.expm1(2 * log_a_BTE)).clamp(min=torch.finfo(dtype).tiny).sqrt()
        first_BT = state.seen_B[:, None] + torch.arange(new, device=x_BTD.device) == 0
        scale_BTE = scale_BTE.masked_fill(first_BT[..., None], 1.0)
        a_BTE, b_BTE = log_a_BTE.exp(), scale_BTE * input_BTE * x_BTE
        h_BTE = diagonal_scan(a_BTE, b_BTE, state.h_BE, chunk=self.config.chunk, form=self.form)
        y_BTD = self.out_proj((F.gelu(u_BTE, approximate="tanh") * h_BTE).to(x_BTD.dtype))
        # a copy of the last state: a view would keep those of all tokens in memory
        return y_BTD, HawkState(conv_BPE, h_BTE[:, -1].clone(), state.seen_B + new) if want_state else None

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> HawkState:
        config = self.config
        return HawkState(
            torch.zeros(batch, config.kernel - 1, config.inner, dtype=dtype, device=device),
            torch.zeros(batch, config.inner, dtype=recurrent_dtype(dtype), device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return self.config.inner * self.config.kernel + 1
