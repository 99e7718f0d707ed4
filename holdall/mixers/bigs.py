"""BiGS: one state space for all channels, with multiplicative gates; causal by default.

    v = gelu(W_v x)      u = gelu(W_u x)      s_t = Re sum_n C_n h_tn + D u_t      h' = A h + u, held for dt
    y = W_o [gelu(W_l c) * v]      c = W_c s,   or, bidirectional,   c = (W_c s) * flip(W_c' s')

where s' is s with its own weights, of flip(x). All maps W have biases. Each channel has its own n modes, but
all share A, C, dt and the scalar D: A = min(A_re, -1e-4) + i A_im, dt = exp(log_step).

Letters: x and y input and output; v and u two maps of x; t time; h_tn mode n of a channel and h' its
derivative; s what is read out of the modes; c the gate made of it; A the modes' rates; C the read-out; D a
skip; dt the step size; W_* learned maps.

Wang, Yan, Gu, Rush, "Pretraining Without Attention", 2022, arXiv 2212.10544.
Weights map onto the official BiGSLayer: dv, dol and do are `v`, `mix` and `out_proj`; du_forward, fs4 (D, and
its kernel's A_re, A_im, C and log_step) and duc_forward are `forwards`, with `u` and `c`; those of the other
direction are `backwards`. Its LayerNorm (eps 1e-12) and residual are part of the model here.
Deviations:
- the published model is bidirectional; the causal one omits the backward factor of c;
- bidirectional, the backward state space reads only the tokens of the call, while the forward one carries its
  state on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import hippo, ssm
from holdall.settings import PositiveInt


class BiGSState(NamedTuple):
    """The modes of each channel, read from left to right, as (re, im)."""

    h_BDN2: Tensor


@register(
    "bigs",
    family="state space",
    paper=Paper(
        title="Pretraining Without Attention",
        authors="Wang, Yan, Gu, Rush",
        year=2022,
        arxiv="2212.10544",
    ),
    state="2nD",
    training="ND(eD + n)",
    inference="D(eD + n)",
)
@dataclass(frozen=True, kw_only=True)
class BiGSConfig(MixerConfig):
    """One diagonal state space for all channels, under multiplicative gates."""

    modes: PositiveInt = 64
    """Complex modes per channel, n."""
    expand: PositiveInt = 4
    """Channels of the gate per model channel, e."""
    bidirectional: bool = False
    """As published, for encoders: a second state space reads the tokens of each call from last to first."""
    chunk: PositiveInt = ssm.CHUNK
    """Tokens per Fourier transform; the state carries the past from one chunk to the next."""

    variants = ({"modes": 4, "chunk": 16}, {"modes": 3, "expand": 1, "bidirectional": True})

    def build(self) -> BiGS:
        return BiGS(self)


class Direction(nn.Module):
    """W_c s of gelu(W_u x): the state space with the maps into and out of it."""

    def __init__(self, config: BiGSConfig, form: str) -> None:
        super().__init__()
        self.form, self.chunk = form, config.chunk
        a_N = hippo.s4d_lin(config.modes)
        self.u = nn.Linear(config.width, config.width)
        self.A_re, self.A_im = (nn.Parameter(part.float().clone()) for part in (a_N.real, a_N.imag))
        self.C = nn.Parameter(torch.randn(config.modes, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(1))
        self.log_step = nn.Parameter(torch.empty(1).uniform_(math.log(0.01), math.log(1.0)))
        self.c = nn.Linear(config.width, config.width)

    def forward(
        self, x_BTD: Tensor, h_BDN2: Tensor | None, want_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        dtype, u_BTD = recurrent_dtype(x_BTD.dtype), F.gelu(self.u(x_BTD))
        a_1N = torch.complex(self.A_re.to(dtype).clamp(max=-1e-4), self.A_im.to(dtype))[None]
        log_a_1N, b_1N = ssm.zoh(self.log_step.to(dtype).exp()[None], a_1N)
        c_1N = torch.view_as_complex(self.C.to(dtype))[None]
        s_BTD, h_BDN2 = ssm.diagonal_ssm(
            u_BTD, log_a_1N, b_1N, c_1N, h_BDN2, chunk=self.chunk, want_state=want_state, form=self.form
        )
        return self.c(torch.addcmul(s_BTD, u_BTD, self.D.to(u_BTD.dtype))), h_BDN2


class BiGS(Mixer):
    config: BiGSConfig
    state_type = BiGSState

    def __init__(self, config: BiGSConfig) -> None:
        super().__init__(config)
        width, inner = config.width, config.expand * config.width
        self.v = nn.Linear(width, inner)
        self.forwards = Direction(config, self.form)
        self.backwards = Direction(config, self.form) if config.bidirectional else None
        self.mix = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)
        if config.bidirectional:
            pieces = "a call reads its own tokens from their end, and cannot know those of the next call"
            self.refusals = {  # type: ignore[misc]
                "causal": "the backward state space reads each call's tokens from their end",
                "splits": pieces,
                "gradients_through_state": pieces,
            }

    def forward(
        self,
        x_BTD: Tensor,
        state: BiGSState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, BiGSState | None]:
        c_BTD, h_BDN2 = self.forwards(x_BTD, None if state is None else state.h_BDN2, want_state)
        if self.backwards is not None:
            back_BTD, _ = self.backwards(x_BTD.flip(1), None)
            c_BTD = c_BTD * back_BTD.flip(1)
        y_BTD = self.out_proj(F.gelu(self.mix(c_BTD)) * F.gelu(self.v(x_BTD)))
        return y_BTD, None if h_BDN2 is None else BiGSState(h_BDN2)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> BiGSState:
        shape = (batch, self.config.width, self.config.modes, 2)
        return BiGSState(torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.modes * self.config.width
