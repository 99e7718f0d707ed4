"""Based's linear attention: softmax's exp(q . k) to second order, which a state of fixed size can sum.

    phi(u) = [1, u / f^(1/4), (u (x) u) / sqrt(2 f)]    phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(f)
    S_t = S_{t-1} + phi(k_t) v_t^T                      z_t = z_{t-1} + phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + eps) ]

with q, k of f dimensions per head. Arora et al., "Simple linear attention language models balance the
recall-throughput tradeoff", 2024, arXiv 2402.18668. Weights map one to one onto Based's and Zoology's proj_q,
proj_k, proj_v (rows of `qkv`, in that order) and out_proj.
Deviations: the map keeps the symmetric half of the second order: the same outputs from 1 + f + f (f + 1) / 2
features, 153 and not 273 at f = 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from holdall.contract import MixerConfig, Paper, register
from holdall.mixers.linear_attention import LinearAttention


@register(
    "taylor",
    family="linear attention",
    paper=Paper(
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        authors="Arora et al.",
        year=2024,
        arxiv="2402.18668",
    ),
    state="F(D + H)",
    training="NFD",
    inference="FD",
)
@dataclass(frozen=True, kw_only=True)
class TaylorConfig(MixerConfig):
    """Taylor linear attention (Based): exp to second order.

    feature_dim: dimensions f of a head's queries and keys; the map makes F = 1 + f + f (f + 1) / 2 features.
    chunk: tokens whose pairs are computed at once; up to there the cost is quadratic and no state is built.
    """

    feature_dim: int = 16
    heads: int = 1
    eps: float = 1e-12
    chunk: int = 128

    feature_map: ClassVar[str] = "taylor"
    normalise: ClassVar[bool] = True
    bias: ClassVar[bool] = False
    variants = ({"feature_dim": 4, "chunk": 16}, {"heads": 2})

    def validate(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.feature_dim < 1 or self.chunk < 1:
            raise ValueError(f"feature_dim {self.feature_dim} and chunk {self.chunk} must be positive")

    def build(self) -> LinearAttention:
        return LinearAttention(self)
