"""Performer: linear attention with random features whose expected products are exp(q . k).

    u = K^(-1/4) q,  w = K^(-1/4) k       P: F orthogonal random rows of dimension K with Gaussian norms
    phi(q_t) = exp(P u_t - |u_t|^2 / 2 - max_f (P u_t)_f) + e
    phi_t(k_j) = exp(P w_j - |w_j|^2 / 2 - M_t) + e            M_t = max over i <= t and f of (P w_i)_f
    a_tj = phi(q_t) . phi_t(k_j)
    y_t = W_o [ sum_{j<=t} a_tj v_j / (sum_{j<=t} a_tj + d sum_f phi(q_t)_f) ]

(FAVOR+), with e = 1e-4 and d = 1e-6 sqrt(F). Kernel "relu", the generalised attention of the paper, has
phi(u) = relu(P u) + 1e-3 for both and d = 1e-6. Choromanski et al., "Rethinking Attention with Performers",
2020, arXiv 2009.14794.

The state is A = sum_j exp(P w_j - |w_j|^2 / 2 - M_t) v_j^T, rescaled by exp(M_{t-1} - M_t) when the maximum
grows, and sum_j v_j for the term with e; a 1 appended to every v_j gives the divisor by the same sums.

Letters: y_t output of token t; i and j tokens; f one of F features; q, k, v queries, keys and values of a
head; K their dimensions; u and w scaled queries and keys; P the random rows; phi features; M_t the largest
exponent so far; a_tj the weight of token j; e and d small numbers; A a sum over tokens; W_o a learned map.

Weights map onto performer-pytorch's SelfAttention: to_q, to_k, to_v are the rows of `qkv`, in that order,
to_out is out_proj, and fast_attention.projection_matrix is projection_FK.
Deviations:
- performer-pytorch (and the original) take M over the whole sequence, the future included, and since e is not
  rescaled with it, early outputs depend on later tokens. Here y_t is the output of their code for the first t
  tokens;
- their rows of P are not uniformly distributed (see orthogonal_rows), so their estimate of exp(q . k) is
  biased;
- they can redraw P during training; here it is drawn once and stored with the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.linear_attention import linear_attention
from holdall.ops.running import cumsum
from holdall.settings import NonNegativeInt, PositiveInt

KEY_EPS = {"softmax": 1e-4, "relu": 1e-3}
SUM_EPS = 1e-6


class FavorState(NamedTuple):
    """A with its divisor in the last column, the sum of (v, 1), and the maximum M."""

    s_BHFV: Tensor
    total_BHV: Tensor
    peak_BH: Tensor


class ReluState(NamedTuple):
    """The sum of phi(k) (v, 1)^T."""

    s_BHFV: Tensor


@register(
    "performer",
    family="linear attention",
    paper=Paper(
        title="Rethinking Attention with Performers",
        authors="Choromanski et al.",
        year=2020,
        arxiv="2009.14794",
    ),
    state="F(D + H) + D + 2H",
    training="ND(D + F)",
    inference="D(D + F)",
)
@dataclass(frozen=True, kw_only=True)
class PerformerConfig(MixerConfig):
    """Linear attention with positive orthogonal random features for softmax (FAVOR+), or their ReLU."""

    kernel: Literal["softmax", "relu"] = "softmax"
    """Kernel that the features estimate: "softmax" (FAVOR+), or "relu" (generalised attention), with a state
    of F (D + H).
    """
    heads: PositiveInt = 2
    """Number of heads, H."""
    features: NonNegativeInt = 0
    """Random features per head, F; 0 for K log K, where K = D / H is the head dimension."""
    bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""

    variants = ({"features": 12, "chunk": 16, "bias": True}, {"kernel": "relu", "heads": 1, "chunk": 32})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def resolved_features(self) -> int:
        head_dim = self.width // self.heads
        return self.features or max(1, int(head_dim * math.log(head_dim)))

    def build(self) -> Performer:
        return Performer(self)


def orthogonal_rows(rows: int, dim: int) -> Tensor:
    """Random rows with the lengths of Gaussian ones, orthogonal to each other within every block of `dim`."""
    blocks = []
    for _ in range(math.ceil(rows / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim))
        # Householder's Q has a diagonal of one sign, which biases the estimate; this makes it uniform
        blocks.append((q * r.diagonal().sign()).T)
    return torch.randn(rows, dim).norm(dim=1, keepdim=True) * torch.cat(blocks)[:rows]


class Performer(Mixer):
    config: PerformerConfig

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        self.state_type = FavorState if config.kernel == "softmax" else ReluState  # type: ignore[misc]
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out_proj = nn.Linear(config.width, config.width)
        rows = orthogonal_rows(config.resolved_features, config.width // config.heads)
        self.register_buffer("projection_FK", rows)

    def forward(
        self,
        x_BTD: Tensor,
        state: FavorState | ReluState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, FavorState | ReluState | None]:
        config, dtype, fresh = self.config, recurrent_dtype(x_BTD.dtype), state is None
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = (u.unflatten(-1, (config.heads, -1)).to(dtype) for u in self.qkv(x_BTD).chunk(3, dim=-1))
        v_BTHV = F.pad(v, (0, 1), value=1.0)
        q_BTHK, k_BTHK = (u * u.shape[-1] ** -0.25 for u in (q, k))
        q_BTHF, k_BTHF = (u @ self.projection_FK.to(dtype).T for u in (q_BTHK, k_BTHK))
        eps, log_decay_BTH, peak_BTH = KEY_EPS[config.kernel], None, None
        if isinstance(state, FavorState):
            # learning does not reach for the maxima: they are there to scale, and cancel but for e
            q_peak_BTH1 = q_BTHF.detach().amax(-1, keepdim=True)
            q_BTHF = (q_BTHF - q_peak_BTH1 - q_BTHK.square().sum(-1, keepdim=True) / 2).exp() + eps
            peak_BTH = torch.maximum(k_BTHF.amax(-1).cummax(dim=1).values, state.peak_BH[:, None])
            before_BTH = torch.cat((state.peak_BH[:, None], peak_BTH[:, :-1]), dim=1)
            log_decay_BTH = (before_BTH - peak_BTH).detach()
            k_peak_BTH1 = peak_BTH.detach()[..., None]
            k_BTHF = (k_BTHF - k_peak_BTH1 - k_BTHK.square().sum(-1, keepdim=True) / 2).exp()
        else:
            q_BTHF, k_BTHF = F.relu(q_BTHF) + eps, F.relu(k_BTHF) + eps
        s_BHFV: Tensor | None
        o_BTHV, s_BHFV, _ = linear_attention(
            q_BTHF, k_BTHF, v_BTHV, None if fresh else state.s_BHFV, None, log_decay_BTH,
            chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        q_sum_BTH1, sum_eps = q_BTHF.sum(-1, keepdim=True), SUM_EPS
        after: FavorState | ReluState | None = None
        if isinstance(state, FavorState) and peak_BTH is not None:
            total_BTHV = state.total_BHV[:, None] + cumsum(v_BTHV, 1)
            o_BTHV, sum_eps = o_BTHV + eps * q_sum_BTH1 * total_BTHV, SUM_EPS * q_BTHF.shape[-1] ** 0.5
            if want_state and s_BHFV is not None:
                after = FavorState(s_BHFV, total_BTHV[:, -1].clone(), peak_BTH[:, -1].clone())
        elif want_state and s_BHFV is not None:
            after = ReluState(s_BHFV)
        y_BTHK = o_BTHV[..., :-1] / (o_BTHV[..., -1:] + sum_eps * q_sum_BTH1)
        return self.out_proj(y_BTHK.flatten(2).to(x_BTD.dtype)), after

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> FavorState | ReluState:
        config, dtype = self.config, recurrent_dtype(dtype)
        head_dim, features = config.width // config.heads, config.resolved_features
        s_BHFV = torch.zeros(batch, config.heads, features, head_dim + 1, dtype=dtype, device=device)
        if config.kernel == "relu":
            return ReluState(s_BHFV)
        peak_BH = torch.full((batch, config.heads), -torch.inf, dtype=dtype, device=device)
        return FavorState(s_BHFV, s_BHFV[:, :, 0].clone(), peak_BH)

    def state_elements(self, context_len: int) -> int:
        config = self.config
        total_and_peak = config.width + 2 * config.heads if config.kernel == "softmax" else 0
        return config.resolved_features * (config.width + config.heads) + total_and_peak
