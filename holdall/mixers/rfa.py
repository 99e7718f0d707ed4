"""Random Feature Attention: linear attention with random Fourier features, and an optional decay gate.

    u^ = u / (|u| + 1e-3)        W_h = R_h diag(sigma_h) / tau        phi(u) = [sin(W_h u^), cos(W_h u^)] / 10
    S_t = S_{t-1} + phi(k_t) v_t^T         gated (RFA-Gate): S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T
    z_t = z_{t-1} + phi(k_t)                                 z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / max(phi(q_t) . z_t, floor) ]         g_t = sigmoid(w_g . x_t + b_g), per head

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of head h; u either of the
first two; u^ of unit length; W_h its frequencies; R_h and sigma_h what they are made of; tau the temperature;
phi features; S and z the state of a head; g_t its gate; w_g, b_g and W_o learned.

R_h: P Gaussian rows per head, drawn once. phi(q) . phi(k) estimates P / 100 exp(-|q^ - k^|^2 / (2 tau^2)),
the softmax weights of unit vectors, whose norms cancel. Peng, Pappas, Yogatama, Schwartz, Smith, Kong,
"Random Feature Attention", 2021, arXiv 2103.02143.
Weights map onto the official CausalAttention: q_proj, k_proj, v_proj are the rows of `qkv`, in that order;
sigma, without its middle dimension, is sigma_HK; random_matrices is rows_HPK.
Deviations:
- the official code draws R from a pool of 500 for every training batch; here it is drawn once and stored with
  the weights;
- it has no gate, which is from the paper; gated sums are averages with phi(q) . z <= P / 100, for which the
  official floor of 1 would be too high: with the gate the floor is a tenth of that bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.linear_attention import linear_attention
from holdall.settings import NonNegativeFloat, PositiveFloat, PositiveInt

SCALE = 0.1
NORM_EPS = 1e-3


class RfaState(NamedTuple):
    """The sum of phi(k) v^T, and the sum of phi(k) that the output is divided by."""

    s_BHFV: Tensor
    z_BHF: Tensor


@register(
    "rfa",
    family="linear attention",
    paper=Paper(
        title="Random Feature Attention",
        authors="Peng et al.",
        year=2021,
        arxiv="2103.02143",
    ),
    state="2P(D + H)",
    training="ND(D + P)",
    inference="D(D + P)",
)
@dataclass(frozen=True, kw_only=True)
class RfaConfig(MixerConfig):
    """Linear attention with random Fourier features of unit vectors (RFA), gated by option."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    frequencies: PositiveInt = 64
    """Random frequencies per head, P; each gives a sine and a cosine."""
    tau: PositiveFloat = 1.0
    """Temperature of the kernel that the features estimate."""
    gate: bool = False
    """Whether the state decays by a gate per head and token (RFA-Gate)."""
    floor: NonNegativeFloat = 0.0
    """Lower bound of what outputs are divided by; 0 for the default, 1 without the gate and P / 1000 with it.
    """
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""

    variants = ({"frequencies": 12, "chunk": 16, "tau": 0.8}, {"frequencies": 8, "heads": 4, "gate": True})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def resolved_floor(self) -> float:
        return self.floor or (0.1 * SCALE**2 * self.frequencies if self.gate else 1.0)

    def build(self) -> Rfa:
        return Rfa(self)


class Rfa(Mixer):
    config: RfaConfig
    state_type = RfaState
    own_init = True

    def __init__(self, config: RfaConfig) -> None:
        super().__init__(config)
        width, head_dim = config.width, config.width // config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.gate = nn.Linear(width, config.heads) if config.gate else None
        self.sigma_HK = nn.Parameter(torch.ones(config.heads, head_dim))
        self.register_buffer("rows_HPK", torch.randn(config.heads, config.frequencies, head_dim))
        with torch.no_grad():
            for weight in (*self.qkv.weight.split(width), self.out_proj.weight):
                nn.init.xavier_uniform_(weight, gain=2**-0.5)
            nn.init.zeros_(self.out_proj.bias)

    def features(self, u_BTHK: Tensor) -> Tensor:
        """(B, T, H, K) to (B, T, H, 2P), in the dtype that sums are kept in."""
        dtype = recurrent_dtype(u_BTHK.dtype)
        u_BTHK = u_BTHK.to(dtype)
        u_BTHK = u_BTHK / (torch.linalg.vector_norm(u_BTHK, dim=-1, keepdim=True) + NORM_EPS)
        u_BTHK = u_BTHK * self.sigma_HK.to(dtype) / self.config.tau
        angle_BTHP = torch.einsum("bthk,hpk->bthp", u_BTHK, self.rows_HPK.to(dtype))
        return SCALE * torch.cat((angle_BTHP.sin(), angle_BTHP.cos()), dim=-1)

    def forward(
        self,
        x_BTD: Tensor,
        state: RfaState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, RfaState | None]:
        config = self.config
        q, k, v_BTHV = (u.unflatten(-1, (config.heads, -1)) for u in self.qkv(x_BTD).chunk(3, dim=-1))
        q_BTHF, k_BTHF, log_decay_BTH = self.features(q), self.features(k), None
        if self.gate is not None:
            gate_BTH = self.gate(x_BTD).to(k_BTHF.dtype)
            # 1 - g is sigmoid(-gate), with all its digits where g is close to 1
            log_decay_BTH, k_BTHF = F.logsigmoid(gate_BTH), k_BTHF * torch.sigmoid(-gate_BTH)[..., None]
        s_BHFV: Tensor | None
        y_BTHV, s_BHFV, z_BHF = linear_attention(
            q_BTHF, k_BTHF, v_BTHV, state and state.s_BHFV, state and state.z_BHF, log_decay_BTH,
            normalise=True, floor=config.resolved_floor, chunk=config.chunk,
            inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        after = None
        if want_state and s_BHFV is not None and z_BHF is not None:
            after = RfaState(s_BHFV, z_BHF)
        return self.out_proj(y_BTHV.flatten(2)), after

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> RfaState:
        config = self.config
        sizes = (batch, config.heads, 2 * config.frequencies, config.width // config.heads)
        s_BHFV = torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device)
        return RfaState(s_BHFV, s_BHFV[..., 0].clone())

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.frequencies * (self.config.width + self.config.heads)
