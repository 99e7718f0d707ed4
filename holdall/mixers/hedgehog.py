"""Hedgehog: linear attention with a learned feature map that is as spiky as softmax.

    phi(u) = max([softmax(u W_h), softmax(-u W_h)], 1e-12)        W_h: one per head, for queries and for keys
    S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + 1e-12) ]

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; u either of the
first two; phi their features; S and z the state of a head; W_* learned maps.

Zhang, Bhatia, Kumbong, Re, "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
2024, arXiv 2402.04347. The two softmaxes, each over a head's features, are separate, as in the paper and in
LoLCATs. The maps are initialised to the identity.
Weights: feature_map_q.mlp.layer and feature_map_k.mlp.layer of LoLCATs are map_q_HKF and map_k_HKF; the rows
of `qkv` are q_proj, k_proj and v_proj, in that order.
Deviations:
- LoLCATs turns queries and keys by rotary positions before the map, like the softmax attention that it
  replaces; here there are no positions;
- flash-linear-attention takes one softmax over both halves, after doubling the map's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.linear_attention import linear_attention
from holdall.settings import NonNegativeInt, PositiveInt

EPS = 1e-12


class HedgehogState(NamedTuple):
    """The sum of phi(k) v^T, and the sum of phi(k) that the output is divided by."""

    s_BHFV: Tensor
    z_BHF: Tensor


@register(
    "hedgehog",
    family="linear attention",
    paper=Paper(
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        authors="Zhang, Bhatia, Kumbong, Ré",
        year=2024,
        arxiv="2402.04347",
    ),
    state="2f(D + H)",
    training="ND(D + f)",
    inference="D(D + f)",
)
@dataclass(frozen=True, kw_only=True)
class HedgehogConfig(MixerConfig):
    """Linear attention with a learned feature map that mimics softmax."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    feature_dim: NonNegativeInt = 0
    """Outputs of a head's feature map before the two softmaxes, f: 2f features. 0 for the head's dimensions,
    D / H.
    """
    bias: bool = False
    """Whether the projections have biases."""
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""

    variants = ({"chunk": 16}, {"heads": 4, "feature_dim": 3, "bias": True})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def resolved_feature_dim(self) -> int:
        return self.feature_dim or self.width // self.heads

    def build(self) -> Hedgehog:
        return Hedgehog(self)


def hedgehog_features(u_BTHK: Tensor, map_HKF: Tensor) -> Tensor:
    """(B, T, H, K) to (B, T, H, 2F): what each head's map makes of it, from above and from below."""
    u_BTHF = torch.einsum("bthk,hkf->bthf", u_BTHK, map_HKF)
    return torch.cat((u_BTHF.softmax(-1), (-u_BTHF).softmax(-1)), dim=-1).clamp(min=EPS)


class Hedgehog(Mixer):
    config: HedgehogConfig
    state_type = HedgehogState

    def __init__(self, config: HedgehogConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out_proj = nn.Linear(config.width, config.width, bias=config.bias)
        identity_KF = torch.eye(config.width // config.heads, config.resolved_feature_dim)
        self.map_q_HKF = nn.Parameter(identity_KF.repeat(config.heads, 1, 1))
        self.map_k_HKF = nn.Parameter(identity_KF.repeat(config.heads, 1, 1))

    def forward(
        self,
        x_BTD: Tensor,
        state: HedgehogState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, HedgehogState | None]:
        config, dtype = self.config, recurrent_dtype(x_BTD.dtype)
        q, k, v_BTHV = (u.unflatten(-1, (config.heads, -1)) for u in self.qkv(x_BTD).chunk(3, dim=-1))
        q_BTHF = hedgehog_features(q.to(dtype), self.map_q_HKF.to(dtype))
        k_BTHF = hedgehog_features(k.to(dtype), self.map_k_HKF.to(dtype))
        s_BHFV: Tensor | None
        y_BTHV, s_BHFV, z_BHF = linear_attention(
            q_BTHF, k_BTHF, v_BTHV, *(state or (None, None)), normalise=True, eps=EPS,
            chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        after = None
        if want_state and s_BHFV is not None and z_BHF is not None:
            after = HedgehogState(s_BHFV, z_BHF)
        return self.out_proj(y_BTHV.flatten(2)), after

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> HedgehogState:
        config = self.config
        sizes = (batch, config.heads, 2 * config.resolved_feature_dim, config.width // config.heads)
        s_BHFV = torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device)
        return HedgehogState(s_BHFV, s_BHFV[..., 0].clone())

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.resolved_feature_dim * (self.config.width + self.config.heads)
