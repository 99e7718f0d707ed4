"""S4D: a time-invariant diagonal state space per channel, initialised from the spectrum of HiPPO.

    h' = A h + B u      A = -exp(log_A_real) + i A_imag, discretised with the channel's step dt = exp(log_dt)
    y_t = 2 Re(C . h_t) + D u_t      N / 2 modes: of each conjugate pair only one is kept
    out = a * sigmoid(g)      [a | g] = W_out GELU(y) + bias

Letters: u_t and out input and output of token t; y_t the state space's output; h_t its modes; N = n numbers
per channel; A their rates; B the input map; C the read-out; D a skip; dt the step size; i the imaginary unit;
a and g two halves of a projection; W_out a learned map.

Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space Models", 2022, arXiv
2206.11893.
Weights map onto state-spaces/s4's S4Block with mode "diag" and n_ssm the width: inv_dt is `log_dt`, A_real is
`log_A_real`, A_imag is `-A_imag` (it is subtracted there), output_linear.0 is `out_proj`; B, C (pairs re, im)
and D lack their first dimension, of one. The standalone s4d.py has the sign of here, and no B, which is ones.
Deviations:
- the code clips the imaginary parts of LegS's B to 2; these depend on the phases of eigenvectors, which a
  linear algebra library chooses arbitrarily. Here the phases make B real, and nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import hippo, ssm
from holdall.settings import PositiveInt


class S4DState(NamedTuple):
    """The modes of each channel's state space, as (re, im)."""

    h_BDN2: Tensor


@register(
    "s4d",
    family="state space",
    paper=Paper(
        title="On the Parameterization and Initialization of Diagonal State Space Models",
        authors="Gu, Gupta, Goel, Ré",
        year=2022,
        arxiv="2206.11893",
    ),
    state="nD",
    training="ND(D + n)",
    inference="D(D + n)",
)
@dataclass(frozen=True, kw_only=True)
class S4DConfig(MixerConfig):
    """Time-invariant diagonal state space per channel, from HiPPO's spectrum."""

    state: PositiveInt = 64
    """Real numbers of state per channel, n: n / 2 complex modes, each standing for a conjugate pair."""
    init: Literal["lin", "inv", "legs"] = "lin"
    """Initial frequencies of the modes: "lin" (Fourier), "inv" (the limit of LegS's) or "legs" (those of
    HiPPO-LegS, with its B).
    """
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    """How a step is discretised: "zoh" (zero-order hold, the input is constant during it) or "bilinear"."""
    chunk: PositiveInt = ssm.CHUNK
    """Tokens per Fourier transform; the state carries the past from one chunk to the next."""

    variants = ({}, {"state": 8, "init": "legs", "discretisation": "bilinear", "chunk": 16})

    def validate(self) -> None:
        if self.state % 2:
            raise ValueError(f"state {self.state} is not an even number: modes come in conjugate pairs")

    def build(self) -> S4D:
        return S4D(self)


class S4D(Mixer):
    config: S4DConfig
    state_type = S4DState
    own_init = True

    def __init__(self, config: S4DConfig) -> None:
        super().__init__(config)
        width, modes = config.width, config.state // 2
        if config.init == "legs":
            lambda_N, _, b_N, _ = hippo.legs(config.state)
            lambda_N, b_N = lambda_N[modes:], b_N[modes:]
        else:
            lambda_N = hippo.s4d_lin(modes) if config.init == "lin" else hippo.s4d_inv(modes)
            b_N = torch.ones_like(lambda_N)
        self.log_dt = nn.Parameter(hippo.log_step_sizes(width))
        self.log_A_real = nn.Parameter((-lambda_N.real).log().float().repeat(width, 1))
        self.A_imag = nn.Parameter(lambda_N.imag.float().repeat(width, 1))
        self.B = nn.Parameter(torch.view_as_real(b_N).float().repeat(width, 1, 1))
        self.C = nn.Parameter(torch.randn(width, modes, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(width))
        self.out_proj = nn.Linear(width, 2 * width)
        self.discretise = ssm.zoh if config.discretisation == "zoh" else ssm.bilinear

    def forward(
        self,
        x_BTD: Tensor,
        state: S4DState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, S4DState | None]:
        dtype = recurrent_dtype(x_BTD.dtype)
        a_DN = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        log_a_DN, scale_DN = self.discretise(self.log_dt.to(dtype).exp()[:, None], a_DN)
        b_DN = scale_DN * ssm.as_complex(self.B.to(dtype))
        c_DN = 2 * ssm.as_complex(self.C.to(dtype))
        y_BTD, h_BDN2 = ssm.diagonal_ssm(
            x_BTD, log_a_DN, b_DN, c_DN, None if state is None else state.h_BDN2,
            chunk=self.config.chunk, want_state=want_state, form=self.form,
        )  # fmt: skip
        y_BTD = torch.addcmul(y_BTD, x_BTD, self.D.to(x_BTD.dtype))
        y_BTD = F.glu(self.out_proj(F.gelu(y_BTD)), dim=-1)
        return y_BTD, None if h_BDN2 is None else S4DState(h_BDN2)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> S4DState:
        shape = (batch, self.config.width, self.config.state // 2, 2)
        return S4DState(torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return self.config.width * self.config.state
