"""Mamba: a diagonal state space whose step size, input and output maps depend on the token.

    [x | z] = W_in u          x = silu(shortconv_4(x))        [dt | B | C] = W_x x
    dt = softplus(W_dt dt + b)      h_t = exp(dt A) h_{t-1} + dt B_t x_t      y_t = C_t . h_t + D x_t
    out = W_out (y * silu(z))

Letters: u and out input and output; x and z two halves of a projection; y_t the state space's output at token
t; h_t its state, n numbers per channel; dt the step size; B and C input and output map; A = -exp(A_log)
learned rates; D a skip; W_in, W_x, W_dt, W_out learned maps; b a bias; shortconv_4 a causal convolution of 4
taps.

Gu, Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.
With `inner_norm`, Falcon Mamba's, dt, B and C are each divided by their root mean square before they are used
(Zuo et al., "Falcon Mamba: The First Competitive Attention-free 7B Language Model", 2024, arXiv 2410.05355).
Weights have the names and shapes of mamba_ssm's module (conv1d.weight without its middle dimension).
Deviations:
- the convolution's state has the 3 inputs that are needed, the official one 4;
- the recurrent state is fp32 for weights of any dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import hippo, short_conv
from holdall.ops.diagonal_scan import CHUNK
from holdall.ops.kept import Kept
from holdall.ops.linear import Linear, is_plain, linear
from holdall.ops.selective_scan import selective_scan
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Range


class MambaState(NamedTuple):
    """The inputs that the short convolution still needs, and the state space's state."""

    conv_BPE: Tensor
    h_BEN: Tensor


@register(
    "mamba",
    family="state space",
    paper=Paper(
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        authors="Gu, Dao",
        year=2023,
        arxiv="2312.00752",
    ),
    state="eD(n + W - 1)",
    training="ND(D + n)",
    inference="D(D + n)",
)
@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Selective state space behind a short convolution."""

    state: PositiveInt = 16
    """State size per channel, n."""
    expand: PositiveInt = 2
    """Inner channels per model channel, e."""
    kernel: Annotated[int, Range(least=2)] = 4
    """Taps of the short convolution, W."""
    dt_rank: NonNegativeInt = 0
    """Rank of the projection to the step sizes; 0 for width / 16, rounded up."""
    bias: bool = False
    """Whether the first and the last projection have biases."""
    inner_norm: bool = False
    """Whether dt, B and C each pass an RMS norm without weights, as in Falcon Mamba."""
    eps: NonNegativeFloat = 1e-6
    """Epsilon of these norms."""
    chunk: PositiveInt = CHUNK
    """Tokens per chunk of the scan in plain PyTorch: chunks run in parallel, the tokens of a chunk one after
    another.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"state": 4, "expand": 1, "dt_rank": 3, "chunk": 16},
        {"state": 4, "dt_rank": 3, "bias": True, "inner_norm": True, "eps": 1e-3, "chunk": 16},
    )

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.width / 16)

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or short_conv.kernel_refusal(self.kernel)

    def build(self) -> Mamba:
        return Mamba(self)


class Mamba(Mixer):
    config: MambaConfig
    state_type = MambaState
    own_init = True

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        inner, bound = config.expand * config.width, config.kernel**-0.5
        self.in_proj = Linear(config.width, 2 * inner, bias=config.bias)
        self.conv_weight_EW = nn.Parameter(torch.empty(inner, config.kernel).uniform_(-bound, bound))
        self.conv_bias_E = nn.Parameter(torch.empty(inner).uniform_(-bound, bound))
        self.x_proj = nn.Linear(inner, config.rank + 2 * config.state, bias=False)
        self.dt_proj = nn.Linear(config.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, config.state + 1).log().repeat(inner, 1))
        self.decays = Kept()
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, config.width, bias=config.bias)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(config.rank**-0.5), config.rank**-0.5)
            self.dt_proj.bias.copy_(hippo.step_size_bias(inner))

    def forward(
        self,
        x_BTD: Tensor,
        state: MambaState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, MambaState | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        x_BTE, z_BTE = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTE, conv_BPE = short_conv.short_conv(
            x_BTE, self.conv_weight_EW, self.conv_bias_E, state.conv_BPE, silu=True,
            inplace=inplace, form=self.form,
        )  # fmt: skip
        raw_BTE, b_BTN, c_BTN, dt_bias_E = self._projected(x_BTE)
        dtype = recurrent_dtype(x_BTD.dtype)
        a_EN = self.decays.of(self.A_log, lambda log: -log.to(dtype).exp())
        y_BTE, h_BEN = selective_scan(
            x_BTE, raw_BTE, a_EN, b_BTN, c_BTN, state.h_BEN, dt_bias_D=dt_bias_E, skip_D=self.D,
            z_BTD=z_BTE, chunk=self.config.chunk, inplace=inplace, form=self.form,
        )  # fmt: skip
        return self.out_proj(y_BTE), MambaState(conv_BPE, h_BEN) if want_state else None

    def _projected(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What softplus makes step sizes of, B and C; and a bias, to be added to the first in a wider dtype.

        Step sizes decide what is forgotten over thousands of tokens, and so are not in bf16.
        """
        config = self.config
        if plain := is_plain(self.x_proj) and is_plain(self.dt_proj):
            # a norm counts the zeros of a filled projection too
            fill = self.form == "kernel" and x_BTE.shape[1] > 1 and not config.inner_norm
            down_FE, up_ER, sizes = self._narrow_projections(fill=fill)
            dt_BTR, b_BTN, c_BTN, _ = linear(x_BTE, down_FE).split(sizes, dim=-1)
        else:
            dt_BTR, b_BTN, c_BTN = self.x_proj(x_BTE).split([config.rank, config.state, config.state], dim=-1)
        if config.inner_norm:
            dt_BTR, b_BTN, c_BTN = (
                F.rms_norm(u, u.shape[-1:], eps=config.eps) for u in (dt_BTR, b_BTN, c_BTN)
            )
        if plain:
            return linear(dt_BTR, up_ER), b_BTN, c_BTN, self.dt_proj.bias
        return self.dt_proj(dt_BTR), b_BTN, c_BTN, torch.zeros_like(self.D)

    def _narrow_projections(self, *, fill: bool) -> tuple[Tensor, Tensor, list[int]]:
        """Weights of the products with rank and states, and the sizes of dt, B, C and nothing in the first.

        To fill is to add zeros up to a multiple of 8 numbers: in bf16 the fast kernels for products want rows
        that begin at multiples of 16 bytes. One token's product is too small for that to matter.
        """
        config, down_FE, up_ER = self.config, self.x_proj.weight, self.dt_proj.weight
        ranks, states = (-config.rank % 8, -2 * config.state % 8) if fill else (0, 0)
        if ranks:
            up_ER = F.pad(up_ER, (0, ranks))
        if ranks or states:
            steps, others = down_FE.split([config.rank, 2 * config.state])
            down_FE = torch.cat((F.pad(steps, (0, 0, 0, ranks)), F.pad(others, (0, 0, 0, states))))
        return down_FE, up_ER, [config.rank + ranks, config.state, config.state, states]

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> MambaState:
        config = self.config
        inner = config.expand * config.width
        return MambaState(
            torch.zeros(batch, config.kernel - 1, inner, dtype=dtype, device=device),
            torch.zeros(batch, inner, config.state, dtype=recurrent_dtype(dtype), device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return self.config.expand * self.config.width * (self.config.state + self.config.kernel - 1)
