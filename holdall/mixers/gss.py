"""GSS: a state space on few channels, between a gate and an expansion.

    u = gelu(W_u x)      v = LayerNorm(gelu(W_v x))
    h_t = exp(A) h_{t-1} + (exp(A) - 1) / A v_t        s_t = Re(C h_t) + D * v_t
    y = W_o [u * W_g s] + b

Letters: x_t and y_t input and output of token t; u a gate; v what the state space reads, R = D / r channels;
h_t its n complex modes; s_t what is read out of them; A the modes' rates; C the read-out; D a skip; W_*
learned maps; b a bias.

A = -exp(A_real) + i exp(A_imag) are n modes that the channels of v share, each with its own state; C is
(R, n) for R = D / r channels. There is no step size and no B, and no mode stands for a conjugate pair.
Mehta, Gupta, Cutkosky, Neyshabur, "Long Range Language Modeling via Gated State Spaces", 2022, arXiv
2206.13947. The authors published pseudocode, which gated-state-spaces-pytorch follows.
Weights map onto that package's GSS: to_u.0 and to_v.0 are the rows of `uv`, in that order; dss holds norm,
Lambda_real and Lambda_imag (A_real and A_imag), C_real and C_imag (C's last dimension) and param_D; to_gate
and to_out are `gate` and `out_proj`. Its first LayerNorm and its residual are part of the model here; the
LayerNorm on v is part of the mixer.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import ssm
from holdall.settings import PositiveInt


class GSSState(NamedTuple):
    """The modes of each channel of v, as (re, im)."""

    h_BRN2: Tensor


@register(
    "gss",
    family="state space",
    paper=Paper(
        title="Long Range Language Modeling via Gated State Spaces",
        authors="Mehta, Gupta, Cutkosky, Neyshabur",
        year=2022,
        arxiv="2206.13947",
    ),
    state="2nD/r",
    training="ND(eD + n/r)",
    inference="D(eD + n/r)",
)
@dataclass(frozen=True, kw_only=True)
class GSSConfig(MixerConfig):
    """Diagonal state space with modes that all channels share, on few channels, behind a wide gate."""

    modes: PositiveInt = 512
    """Complex modes per channel of v, n."""
    reduce: PositiveInt = 4
    """Model channels per channel of v, r."""
    expand: PositiveInt = 4
    """Channels of the gate per model channel, e."""
    imag_exp: bool = True
    """Whether the modes' frequencies are exp(A_imag), as in the paper's pseudocode, or A_imag itself."""
    chunk: PositiveInt = ssm.CHUNK
    """Tokens per Fourier transform; the state carries the past from one chunk to the next."""

    variants = ({"modes": 8}, {"modes": 5, "reduce": 2, "expand": 1, "imag_exp": False, "chunk": 16})

    def validate(self) -> None:
        if self.width % self.reduce:
            raise ValueError(f"width {self.width} is not a multiple of reduce {self.reduce}")

    def build(self) -> GSS:
        return GSS(self)


class GSS(Mixer):
    config: GSSConfig
    state_type = GSSState

    def __init__(self, config: GSSConfig) -> None:
        super().__init__(config)
        reduced, expanded = config.width // config.reduce, config.width * config.expand
        self.sizes = [expanded, reduced]
        self.uv = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.norm = nn.LayerNorm(reduced)
        self.A_real = nn.Parameter(torch.randn(config.modes))
        self.A_imag = nn.Parameter(torch.randn(config.modes))
        self.C = nn.Parameter(torch.randn(reduced, config.modes, 2))
        self.D = nn.Parameter(torch.randn(reduced))
        self.gate = nn.Linear(reduced, expanded, bias=False)
        self.out_proj = nn.Linear(expanded, config.width)

    def forward(
        self, x_BTD: Tensor, state: GSSState | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, GSSState | None]:
        u_BTE, v_BTR = F.gelu(self.uv(x_BTD)).split(self.sizes, dim=-1)
        v_BTR = self.norm(v_BTR)
        dtype = recurrent_dtype(x_BTD.dtype)
        a_imag_N = self.A_imag.to(dtype)
        frequency_N = a_imag_N.exp() if self.config.imag_exp else a_imag_N
        a_1N = torch.complex(-self.A_real.to(dtype).exp(), frequency_N)[None]
        b_1N, c_RN = torch.expm1(a_1N) / a_1N, torch.view_as_complex(self.C.to(dtype))
        s_BTR, h_BRN2 = ssm.diagonal_ssm(
            v_BTR, a_1N, b_1N, c_RN, None if state is None else state.h_BRN2,
            chunk=self.config.chunk, want_state=want_state, form=self.form,
        )  # fmt: skip
        s_BTR = torch.addcmul(s_BTR, v_BTR, self.D.to(v_BTR.dtype))
        return self.out_proj(self.gate(s_BTR) * u_BTE), None if h_BRN2 is None else GSSState(h_BRN2)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> GSSState:
        shape = (batch, self.config.width // self.config.reduce, self.config.modes, 2)
        return GSSState(torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return self.config.width // self.config.reduce * self.config.modes * 2
