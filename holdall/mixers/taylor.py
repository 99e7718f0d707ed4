"""Based's linear attention: exp(q . k) to second order, for which a state of fixed size is enough.

    phi(u) = [1, u / f^(1/4), (u (x) u) / sqrt(2 f)]    phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(f)
    S_t = S_{t-1} + phi(k_t) v_t^T                      z_t = z_{t-1} + phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + eps) ]

with q, k of f dimensions per head. Arora et al., "Simple linear attention language models balance the
recall-throughput tradeoff", 2024, arXiv 2402.18668.
Weights map one to one onto Based's and Zoology's proj_q, proj_k, proj_v (rows of `qkv`, in that order), and
Based's out_proj or Zoology's proj_o.
Deviations:
- the map keeps the symmetric half of the second order: the same outputs from 1 + f + f (f + 1) / 2 features,
  153 instead of 273 at f = 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from holdall.contract import MixerConfig, Paper, register
from holdall.mixers.linear_attention import LinearAttention
from holdall.ops.linear_attention import FEATURE_MAPS, kernel_refusal
from holdall.settings import NonNegativeFloat, PositiveInt


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
    """Taylor linear attention (Based): exp to second order."""

    feature_dim: PositiveInt = 16
    """Dimensions of a head's queries and keys, f: F = 1 + f + f (f + 1) / 2 features."""
    heads: PositiveInt = 1
    """Number of heads, H."""
    eps: NonNegativeFloat = 1e-12
    """Added to the normaliser that outputs are divided by."""
    chunk: PositiveInt = 128
    """Tokens per chunk: the output within a chunk is computed over all pairs of tokens (quadratic), and the
    state is built at chunk boundaries only.
    """
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the sum of phi(k) v^T between calls; "fp32" means at least that. "bf16" halves the state, and
    every call rounds it, so that outputs depend on where calls end: the contribution of a token is lost where
    it is less than 1/512 of the sum. Outputs err by about 1% after 256 tokens one by one, and where values
    have a non-zero mean by 27% after 1024 (holdall/kernels/taylor_step.py). A prompt read in one call is
    rounded once.
    """

    feature_map: ClassVar[str] = "taylor"
    normalise: ClassVar[bool] = True
    bias: ClassVar[bool] = False
    forms = ("loop", "parallel", "kernel")
    variants = ({"feature_dim": 4, "chunk": 16}, {"heads": 2})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or kernel_refusal(
            self.feature_dim, self.width // self.heads, dtype, feature_map=FEATURE_MAPS[self.feature_map]
        )

    def build(self) -> LinearAttention:
        return LinearAttention(self)
