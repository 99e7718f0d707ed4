"""ReBased: linear attention with a learned parabola in place of Based's Taylor series.

    q = LayerNorm(W_q x), k = LayerNorm(W_k x), each over all heads at once, with weight and bias
    a_tj = (q_t . k_j / sqrt(K))^2 = phi(q_t) . phi(k_j)
    phi(u) = [u_i^2, sqrt(2) u_i u_j for i < j] / sqrt(K)
    y_t = W_o [ sum_{j<=t} a_tj v_j / (sum_{j<=t} a_tj + 1e-12) ]

Letters: x_t and y_t input and output of token t; j tokens up to t; q, k, v queries, keys and values of a
head; K dimensions of a query; u either of the first two; i and j its dimensions; phi features; a_tj the
weight of token j; W_* learned maps.

Aksenov, Balagansky, Lo Cicero Vaina, Shaposhnikov, Gorbatovski, Gavrilov, "Linear Transformers with Learnable
Kernel Functions are Better In-Context Models", 2024, arXiv 2402.10644.
Weights map onto the official ReBased: proj_q, proj_k, proj_v are the rows of `qkv`, in that order, proj_o is
out_proj, and ln_q and ln_k have their names. (flash-linear-attention's port normalises every head
separately, queries and keys with the same weights.)
Deviations:
- the state keeps the symmetric half of the squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, recurrent_dtype, register
from holdall.ops import replay
from holdall.ops.linear_attention import FEATURE_MAPS, linear_attention
from holdall.settings import NonNegativeFloat, PositiveInt, Range

SQUARES = FEATURE_MAPS["quadratic"]
EPS = 1e-12


class RebasedState(NamedTuple):
    """The sum of phi(k) v^T, and the sum of phi(k) that the output is divided by."""

    s_BHFV: Tensor
    z_BHF: Tensor


@register(
    "rebased",
    family="linear attention",
    paper=Paper(
        title="Linear Transformers with Learnable Kernel Functions are Better In-Context Models",
        authors="Aksenov et al.",
        year=2024,
        arxiv="2402.10644",
    ),
    state="F(D + H)",
    training="ND(D + F)",
    inference="D(D + F)",
)
@dataclass(frozen=True, kw_only=True)
class RebasedConfig(MixerConfig):
    """Linear attention with the square of normed, scaled and shifted queries and keys (ReBased)."""

    heads: PositiveInt = 1
    """Number of heads, H."""
    feature_dim: PositiveInt = 16
    """Dimensions of a head's queries and keys, f: F = f (f + 1) / 2 features."""
    eps: NonNegativeFloat = 1e-5
    """Epsilon of the layer norms of queries and keys."""
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    variants = ({"feature_dim": 4, "heads": 2, "chunk": 16}, {"feature_dim": 3, "chunk": 16, "replay": 2})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build(self) -> Rebased:
        return Rebased(self)


class Rebased(Mixer):
    config: RebasedConfig

    def __init__(self, config: RebasedConfig) -> None:
        super().__init__(config)
        self.state_type = replay.ReplayState if config.replay else RebasedState  # type: ignore[misc]
        self.rollback_limit = config.replay
        inner = config.heads * config.feature_dim
        self.sizes = [inner, inner, config.width]
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=False)
        self.ln_q, self.ln_k = (nn.LayerNorm(inner, eps=config.eps) for _ in range(2))
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        config = self.config
        q, k, v = self.qkv(x_BTD).split(self.sizes, dim=-1)
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in (self.ln_q(q), self.ln_k(k), v))
        after: State | None = None
        if config.replay:
            y_BTHV, after = replay.replay_attention(
                q, k, v, state, replay=config.replay, feature_map=SQUARES, normalise=True, eps=EPS,
                chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
        else:
            y_BTHV, s_BHFV, z_BHF = linear_attention(
                q, k, v, *(state or (None, None)), feature_map=SQUARES, normalise=True, eps=EPS,
                chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
            if want_state and s_BHFV is not None and z_BHF is not None:
                after = RebasedState(s_BHFV, z_BHF)
        return self.out_proj(y_BTHV.flatten(2)), after

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config, features = self.config, SQUARES.size(self.config.feature_dim)
        if config.replay:
            return replay.empty_replay(
                batch, config.heads, config.feature_dim, config.width // config.heads, config.replay,
                feature_map=SQUARES, normalise=True, dtype=dtype, device=device,
            )  # fmt: skip
        sizes = (batch, config.heads, features, config.width // config.heads)
        s_BHFV = torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device)
        return RebasedState(s_BHFV, s_BHFV[..., 0].clone())

    def state_elements(self, context_len: int) -> int:
        if self.config.replay:
            return replay.elements_with_ring(self)
        return SQUARES.size(self.config.feature_dim) * (self.config.width + self.config.heads)

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
