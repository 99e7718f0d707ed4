"""DSS: the first diagonal state spaces; channels share modes, each with its own time scales.

    Lambda = -exp(Lambda_log_neg_re) + i Lambda_im      N modes for all channels, no conjugate pairs
    z = exp(log_dt_0) Re Lambda + i exp(log_dt_1) Im Lambda      each channel's rates of decay and oscillation
    h_t = exp(z) h_{t-1} + (exp(z) - 1) / Lambda u_t      y_t = Re(W . h_t) + D u_t
    out = W_out GELU(y) + bias

Letters: u_t and out input and output of token t; y_t the state space's output; h_t its N = n complex modes;
Lambda their continuous rates; z those of one channel per step; log_dt_0 and log_dt_1 its two time scales; i
the imaginary unit; W a channel's read-out; D its skip; W_out a learned map.

Gupta, Gu, Berant, "Diagonal State Spaces are as Effective as Structured State Spaces", 2022, arXiv
2203.14343: their DSS-exp.
Weights have the names and shapes of ag1988/dss's module with version "exp", except for the first dimension of
D and W, which has size one there, and for output_linear, which is `out_proj`.
Deviations:
- DSS-softmax is refused. It divides each mode by the sum of its powers over the whole kernel, so all outputs
  depend on the final length of the sequence, and it has no recurrence of fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import hippo, ssm
from holdall.settings import PositiveInt


class DSSState(NamedTuple):
    """The modes of each channel's state space, as (re, im)."""

    h_BDN2: Tensor


@register(
    "dss",
    family="state space",
    paper=Paper(
        title="Diagonal State Spaces are as Effective as Structured State Spaces",
        authors="Gupta, Gu, Berant",
        year=2022,
        arxiv="2203.14343",
    ),
    state="2nD",
    training="ND(D + n)",
    inference="D(D + n)",
)
@dataclass(frozen=True, kw_only=True)
class DSSConfig(MixerConfig):
    """Diagonal state space with modes shared by all channels, each with its own time scales."""

    modes: PositiveInt = 64
    """Complex modes per channel, n: two real numbers of state each."""
    version: str = "exp"
    """The version of the paper's two that has a recurrence, "exp"."""
    chunk: PositiveInt = ssm.CHUNK
    """Tokens per Fourier transform; the state carries the past from one chunk to the next."""

    variants = ({}, {"modes": 3, "chunk": 16})

    def validate(self) -> None:
        if self.version == "softmax":
            raise ValueError(
                "version 'softmax' normalises over the length of the kernel: outputs depend on the final "
                "length of the text, and there is no recurrence. Use version 'exp'"
            )
        if self.version != "exp":
            raise ValueError(f"dss has no version '{self.version}', only 'exp'")

    def build(self) -> DSS:
        return DSS(self)


class DSS(Mixer):
    config: DSSConfig
    state_type = DSSState
    own_init = True

    def __init__(self, config: DSSConfig) -> None:
        super().__init__(config)
        lambda_N = hippo.skew_hippo(config.modes)
        # both paces of a channel start as one
        self.log_dt = nn.Parameter(hippo.log_step_sizes(config.width, 1).repeat(1, 2))
        self.Lambda_log_neg_re = nn.Parameter((-lambda_N.real).log().float())
        self.Lambda_im = nn.Parameter(lambda_N.imag.float())
        self.W = nn.Parameter(torch.randn(config.width, config.modes, 2))
        self.D = nn.Parameter(torch.randn(config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(
        self,
        x_BTD: Tensor,
        state: DSSState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, DSSState | None]:
        dtype = recurrent_dtype(x_BTD.dtype)
        re_N, im_N = -self.Lambda_log_neg_re.to(dtype).exp(), self.Lambda_im.to(dtype)
        pace_D2 = self.log_dt.to(dtype).exp()
        log_a_DN = torch.complex(pace_D2[:, :1] * re_N, pace_D2[:, 1:] * im_N)
        b_DN = torch.expm1(log_a_DN) / torch.complex(re_N, im_N)
        c_DN = ssm.as_complex(self.W.to(dtype))
        y_BTD, h_BDN2 = ssm.diagonal_ssm(
            x_BTD, log_a_DN, b_DN, c_DN, None if state is None else state.h_BDN2,
            chunk=self.config.chunk, want_state=want_state, form=self.form,
        )  # fmt: skip
        y_BTD = torch.addcmul(y_BTD, x_BTD, self.D.to(x_BTD.dtype))
        return self.out_proj(F.gelu(y_BTD)), None if h_BDN2 is None else DSSState(h_BDN2)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> DSSState:
        shape = (batch, self.config.width, self.config.modes, 2)
        return DSSState(torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.width * self.config.modes
