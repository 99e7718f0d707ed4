"""S5: one diagonal state space from all channels to all channels, computed by a scan, with a gate.

    h_t = exp(dt A) h_{t-1} + B' u_t          P complex modes, each with its own step dt = exp(log_step)
    s_t = 2 Re(C h_t) + D * u_t               without the 2 if modes do not stand for conjugate pairs
    B' = (exp(dt A) - 1) / A * B  (zoh)       or dt / (1 - dt A / 2) * B, exp(dt A) replaced by
                                              (1 + dt A / 2) / (1 - dt A / 2)  (bilinear)
    half_glu1:  y = gelu(s) * sigmoid(W gelu(s) + b)          half_glu2:  y = s * sigmoid(W gelu(s) + b)
    full_glu:   y = (W_1 gelu(s) + b_1) * sigmoid(W gelu(s) + b)           gelu:  y = gelu(s)

Letters: u_t and y input and output of token t; h_t the P modes; s_t what is read out of them; A their rates;
B and B' the input map in continuous time and per step; C the read-out; D a skip; dt a mode's step size; W and
W_1 learned maps; b and b_1 their biases.

B is (P, D), C (D, P). Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling",
2022, arXiv 2208.04933.
Weights map onto the official JAX module by name (A_re, A_im are Lambda_re, Lambda_im; log_step loses its last
dimension; gate and out_proj are out2 and out1, their kernels transposed). Its SequenceLayer also has the norm
and the residual, which are part of the model here.
Deviations:
- the real parts of A are kept below -1e-4 unless `clip_eigs` is off; the official code recommends that for
  unbounded sequences, but has it off by default;
- of its initialisations of C only the default is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops import hippo, ssm
from holdall.ops.diagonal_scan import steady_scan
from holdall.settings import PositiveInt


class S5State(NamedTuple):
    """The modes, real and imaginary part."""

    h_BP2: Tensor


@register(
    "s5",
    family="state space",
    paper=Paper(
        title="Simplified State Space Layers for Sequence Modeling",
        authors="Smith, Warrington, Linderman",
        year=2022,
        arxiv="2208.04933",
    ),
    state="n or 2n",
    training="ND(n + D)",
    inference="D(n + D)",
)
@dataclass(frozen=True, kw_only=True)
class S5Config(MixerConfig):
    """One state space with many inputs and outputs, diagonal from HiPPO-LegS on."""

    state: PositiveInt = 256
    """State size, n."""
    blocks: PositiveInt = 8
    """HiPPO matrices, of size n / blocks, that the modes are initialised from."""
    conj_sym: bool = True
    """Whether there are n / 2 modes that stand for conjugate pairs, or n free ones."""
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    """How a step is discretised: "zoh" (zero-order hold, the input is constant during it) or "bilinear"."""
    activation: Literal["half_glu1", "half_glu2", "full_glu", "gelu"] = "half_glu1"
    """Gate behind the state space; the module's docstring has the formulas."""
    clip_eigs: bool = True
    """Whether the real parts of A are kept below -1e-4, so that no mode grows."""
    chunk: PositiveInt = 64
    """Tokens per chunk of the scan: chunks run in parallel, the tokens of a chunk one after another."""

    forms = ("loop", "parallel", "kernel")
    variants = (
        {"state": 16, "blocks": 2, "chunk": 16},
        {"state": 6, "blocks": 1, "conj_sym": False, "discretisation": "bilinear", "activation": "full_glu",
         "clip_eigs": False},
    )  # fmt: skip

    def validate(self) -> None:
        if self.state % (self.blocks * (1 + self.conj_sym)):
            pairs = ", of pairs of modes" * self.conj_sym
            raise ValueError(f"state {self.state} is not made of {self.blocks} equal blocks{pairs}")

    @property
    def modes(self) -> int:
        """Complex numbers in the state, P."""
        return self.state // (1 + self.conj_sym)

    def build(self) -> S5:
        return S5(self)


class S5(Mixer):
    config: S5Config
    state_type = S5State
    own_init = True

    def __init__(self, config: S5Config) -> None:
        super().__init__(config)
        width, size = config.width, config.state
        block = size // config.blocks
        a_K, _, _, v_NK = hippo.legs(block)
        if config.conj_sym:  # half of them, below the real axis
            a_K, v_NK = a_K[: block // 2], v_NK[:, : block // 2]
        a_P, v_NP = a_K.repeat(config.blocks), torch.block_diag(*[v_NK] * config.blocks)
        # as seen from the modes: B real and C complex, all entries of variance 1 / n
        b_ND, c_re_ND, c_im_ND = _truncated_normal(size, 3 * width).double().chunk(3, dim=1)
        b_PD, c_DP = v_NP.mH @ b_ND.to(v_NP.dtype), torch.complex(c_re_ND.T, c_im_ND.T) @ v_NP
        self.A_re, self.A_im = (nn.Parameter(part.float().clone()) for part in (a_P.real, a_P.imag))
        self.B, self.C = (nn.Parameter(torch.view_as_real(m).float().clone()) for m in (b_PD, c_DP))
        self.D = nn.Parameter(torch.randn(width))
        self.log_step = nn.Parameter(hippo.log_step_sizes(config.modes))
        self.gate = None if config.activation == "gelu" else _dense(width)
        self.out_proj = _dense(width) if config.activation == "full_glu" else None

    def discretized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The logarithm of what a step multiplies each mode by, (P,), and B', (P, D)."""
        a_re, a_im, log_step, b = (p.to(dtype) for p in (self.A_re, self.A_im, self.log_step, self.B))
        a_P = torch.complex(a_re.clamp(max=-1e-4) if self.config.clip_eigs else a_re, a_im)
        discretize = ssm.zoh if self.config.discretisation == "zoh" else ssm.bilinear
        log_a_1P, gain_1P = discretize(log_step.exp()[None], a_P[None])
        return log_a_1P[0], gain_1P.mT * torch.view_as_complex(b)

    def forward(
        self, x_BTD: Tensor, state: S5State | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, S5State | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        dtype = recurrent_dtype(x_BTD.dtype)
        log_a_P, b_PD = self.discretized(dtype)
        u_BTD, h_BP = x_BTD.to(dtype), ssm.as_complex(state.h_BP2)
        # products of parts, which autocast may round: there are no complex numbers of two bfloat16
        bu_BTP = torch.complex(*((u_BTD @ part.T).to(dtype) for part in (b_PD.real, b_PD.imag)))
        h_BTP = steady_scan(log_a_P, bu_BTP, h_BP, chunk=self.config.chunk, form=self.form)
        c_DP2 = self.C.to(dtype) * (1 + self.config.conj_sym)
        s_BTD = h_BTP.real @ c_DP2[..., 0].T - h_BTP.imag @ c_DP2[..., 1].T
        s_BTD = torch.addcmul(s_BTD, u_BTD, self.D.to(dtype)).to(x_BTD.dtype)
        after = S5State(torch.view_as_real(h_BTP[:, -1]).clone()) if want_state else None
        return self.activate(s_BTD), after

    def activate(self, s_BTD: Tensor) -> Tensor:
        g_BTD = F.gelu(s_BTD, approximate="tanh")
        if self.gate is None:
            return g_BTD
        gate_BTD = self.gate(g_BTD).sigmoid()
        if self.out_proj is not None:
            return self.out_proj(g_BTD) * gate_BTD
        return (s_BTD if self.config.activation == "half_glu2" else g_BTD) * gate_BTD

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> S5State:
        return S5State(torch.zeros(batch, self.config.modes, 2, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.modes


def _truncated_normal(fan_in: int, columns: int) -> Tensor:
    """flax's lecun_normal, (fan_in, columns): a normal cut at two deviations, of variance 1 / fan_in."""
    std = fan_in**-0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(torch.empty(fan_in, columns), std=std, a=-2 * std, b=2 * std)


def _dense(width: int) -> nn.Linear:
    """A linear layer as flax initialises it."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.copy_(_truncated_normal(width, width).T)
    nn.init.zeros_(layer.bias)
    return layer
