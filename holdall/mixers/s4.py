"""S4: a structured state space per channel, initialised as HiPPO-LegS, which stores the past as polynomials.

    h' = A h + B u      A = diag(lambda) - P P^*, lambda = -exp(log_A_real) + i A_imag
    h_t = (1 - dt/2 A)^-1 ((1 + dt/2 A) h_{t-1} + dt B u_t)      the channel's step is dt = exp(log_dt)
    y_t = 2 Re(C . h_t) + D u_t      N / 2 modes: of each conjugate pair only one is kept
    out = a * sigmoid(g)      [a | g] = W_out GELU(y) + bias

Letters: u_t and out input and output of token t; y_t the state space's output; h_t its modes; N = n numbers
per channel; A and B its matrices; lambda and P what A is made of; P^* the conjugate transpose; C the read-
out; D a skip; dt the step size; i the imaginary unit; a and g two halves of a projection; W_out a learned
map; 1 is the identity.

Gu, Goel, Ré, "Efficiently Modeling Long Sequences with Structured State Spaces", 2021, arXiv 2111.00396. By
the Woodbury identity a step is a diagonal minus a rank-one matrix, O(N); see holdall.ops.dplr. The paper
trains with the kernel C dA^l dB of the whole length, computed at roots of unity; here it is needed for chunks
only.

Weights map onto state-spaces/s4's S4Block with mode "dplr" and n_ssm the width: inv_dt is `log_dt`, A_real is
`log_A_real`, A_imag is `-A_imag` (it is subtracted there), output_linear.0 is `out_proj`; B, C, D and P lack
their first dimension, of one. A checkpoint's C is C (1 - dA^L) with L its l_kernel, and must be multiplied by
the inverse.
Deviations:
- the code clips the imaginary parts of the initial B to 2; these depend on the phases of eigenvectors, which
  a linear algebra library chooses arbitrarily. Here B and P start real, and nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import dplr, hippo
from holdall.ops.ssm import as_complex
from holdall.settings import PositiveInt


class S4State(NamedTuple):
    """The modes of each channel's state space, as (re, im)."""

    h_BDN2: Tensor


@register(
    "s4",
    family="state space",
    paper=Paper(
        title="Efficiently Modeling Long Sequences with Structured State Spaces",
        authors="Gu, Goel, Ré",
        year=2021,
        arxiv="2111.00396",
    ),
    state="nD",
    training="ND(D + n) + n³D",
    inference="D(D + n)",
)
@dataclass(frozen=True, kw_only=True)
class S4Config(MixerConfig):
    """Structured state space per channel, diagonal plus rank one, from HiPPO-LegS."""

    state: PositiveInt = 64
    """Real numbers of state per channel, n: n / 2 complex modes, each standing for a conjugate pair."""
    chunk: PositiveInt = dplr.CHUNK
    """Tokens per chunk, a power of two; the state carries the past from one chunk to the next."""

    variants = ({}, {"state": 6, "chunk": 16})

    def validate(self) -> None:
        if self.state % 2:
            raise ValueError(f"state {self.state} is not an even number: modes come in conjugate pairs")
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk {self.chunk} is not a power of two")

    def build(self) -> S4:
        return S4(self)


class LegS(nn.Module):
    """One state space per channel, diagonal plus rank one, that starts as HiPPO-LegS."""

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        lambda_N, p_N, b_N = (u[state // 2 :] for u in hippo.legs(state)[:3])
        p_N2, b_N2 = torch.view_as_real(p_N).float(), torch.view_as_real(b_N).float()
        self.log_dt = nn.Parameter(hippo.log_step_sizes(width))
        self.log_A_real = nn.Parameter((-lambda_N.real).log().float().repeat(width, 1))
        self.A_imag = nn.Parameter(lambda_N.imag.float().repeat(width, 1))
        self.P = nn.Parameter(p_N2.repeat(width, 1, 1))
        self.B = nn.Parameter(b_N2.repeat(width, 1, 1))
        self.C = nn.Parameter(torch.randn(width, state // 2, 2) * 0.5**0.5)

    def forward(self, dtype: torch.dtype) -> tuple[dplr.Transition, Tensor, Tensor]:
        """The discretised transition, what it takes in and what it gives out, b_DN and c_DN."""
        lambda_DN = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        p_DN, b_DN, c_DN = (as_complex(u.to(dtype)) for u in (self.P, self.B, self.C))
        transition, b_DN = dplr.dplr_bilinear(self.log_dt.to(dtype).exp()[:, None], lambda_DN, p_DN, b_DN)
        return transition, b_DN, 2 * c_DN


class S4(Mixer):
    config: S4Config
    state_type = S4State
    own_init = True

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.kernel = LegS(config.width, config.state)
        self.D = nn.Parameter(torch.randn(config.width))
        self.out_proj = nn.Linear(config.width, 2 * config.width)

    def forward(
        self,
        x_BTD: Tensor,
        state: S4State | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, S4State | None]:
        transition, b_DN, c_DN = self.kernel(recurrent_dtype(x_BTD.dtype))
        y_BTD, h_BDN2 = dplr.dplr_ssm(
            x_BTD[:, :, None], transition, b_DN[None], c_DN, None if state is None else state.h_BDN2,
            chunk=self.config.chunk, want_state=want_state, form=self.form,
        )  # fmt: skip
        y_BTD = torch.addcmul(y_BTD, x_BTD, self.D.to(x_BTD.dtype))
        y_BTD = F.glu(self.out_proj(F.gelu(y_BTD)), dim=-1)
        return y_BTD, None if h_BDN2 is None else S4State(h_BDN2)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> S4State:
        shape = (batch, self.config.width, self.config.state // 2, 2)
        return S4State(torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return self.config.width * self.config.state
