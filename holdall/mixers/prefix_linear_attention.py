"""Prefix linear attention (JRT-RNN): the prompt is read bidirectionally, the rest causally.

    k~, v~ = W_k~ x, W_v~ x  of the first E tokens        q, k, v = W_q x, W_k x, W_v x  of all tokens
    S_t = sum_{i < E} phi(k~_i) v~_i^T + sum_{j <= t} phi(k_j) v_j^T
    z_t = sum_{i < E} phi(k~_i) + sum_{j <= t} phi(k_j)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + eps) ]

at every t, also within the prefix, whose tokens therefore see all of it. They enter twice, once with each
pair of projections. After the prefix this is linear attention with one state, S and z. Arora et al., "Just
read twice: closing the recall gap for recurrent language models", 2024, arXiv 2407.05483. The prefix is the
first min(E, T) tokens of a row's first call, which has T tokens. All later calls are causal, even if the
first one was shorter than E.

Letters: x and y_t input and output of token t; i and j tokens; q, k, v queries, keys and values of a head; k~
and v~ those of the prefix; E its tokens; phi features; S and z the state of a head; eps a small number; W_*
learned maps.

Weights map one to one onto the official module: proj_q, proj_k, proj_v are the rows of `qkv`, proj_k_enc,
proj_v_enc those of `prefix_kv`, in that order.
Deviations:
- the Taylor map keeps the symmetric half of the second order: the same outputs from fewer features;
- rows of different lengths are separate calls, whose states are joined: no mask of padding is needed. The
  official one, for prompts padded to E tokens, is `padding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.begun import all_begun
from holdall.ops.linear import Linear
from holdall.ops.linear_attention import FEATURE_MAPS, absorb, kernel_refusal, linear_attention
from holdall.settings import NonNegativeFloat, PositiveInt


class PrefixState(NamedTuple):
    """The sum of phi(k) v^T, the sum of phi(k), and how many tokens a row has read."""

    s_BHFV: Tensor
    z_BHF: Tensor
    seen_B: Tensor


@register(
    "prefix-linear-attention",
    family="linear attention",
    paper=Paper(
        title="Just read twice: closing the recall gap for recurrent language models",
        authors="Arora et al.",
        year=2024,
        arxiv="2407.05483",
    ),
    state="F(D + H) + 1",
    training="(N + E)FD",
    inference="FD",
    causal=False,
)
@dataclass(frozen=True, kw_only=True)
class PrefixLinearAttentionConfig(MixerConfig):
    """Linear attention that reads a prefix bidirectionally, with its own keys and values (JRT-RNN)."""

    prefix: PositiveInt = 64
    """Tokens at the start of a row's first call that every token sees, E; all of that call if it has fewer.
    """
    feature_map: Literal["taylor", "elu1"] = "taylor"
    """Map of queries and keys: "taylor" is exp to second order, "elu1" is elu(u) + 1."""
    feature_dim: PositiveInt = 16
    """Dimensions of a head's queries and keys before the map, f. After it there are F features:
    1 + f + f (f + 1) / 2 for taylor, f for elu1.
    """
    heads: PositiveInt = 1
    """Number of heads, H."""
    eps: NonNegativeFloat = 1e-12
    """Added to the normaliser that outputs are divided by."""
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""

    forms = ("loop", "parallel", "kernel")
    variants = (
        {"prefix": 12, "feature_dim": 4, "heads": 2, "chunk": 8},
        {"prefix": 40, "feature_map": "elu1", "chunk": 32},
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def has_kernel(self) -> bool:
        return self.feature_map == "taylor"

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.feature_map != "taylor":
            return f"the kernel has the Taylor map alone, not {self.feature_map}"
        return super().kernel_refusal(device, dtype) or kernel_refusal(
            self.feature_dim, self.width // self.heads, dtype, feature_map=FEATURE_MAPS[self.feature_map]
        )

    def build(self) -> PrefixLinearAttention:
        return PrefixLinearAttention(self)


class PrefixLinearAttention(Mixer):
    config: PrefixLinearAttentionConfig
    state_type = PrefixState
    refusals: ClassVar[Mapping[str, str]] = {
        "causal": "every token of the prefix sees all of the prefix: that is what the prefix is for",
        "splits": "a cut inside the prefix ends it there, since its tokens see no later call; any cut after "
        "the prefix changes nothing",
    }

    def __init__(self, config: PrefixLinearAttentionConfig) -> None:
        super().__init__(config)
        self.feature_map = FEATURE_MAPS[config.feature_map]
        self.prefix = config.prefix
        keys = config.heads * config.feature_dim
        self.sizes = [keys, keys, config.width]
        self.qkv = Linear(config.width, sum(self.sizes), bias=False)
        self.prefix_kv = Linear(config.width, keys + config.width, bias=False)
        self.out_proj = Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        state: PrefixState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
        padding: int = 0,
    ) -> tuple[Tensor, PrefixState | None]:
        """As any mixer; `padding` tokens at the start of this call have zeros for both keys, as the official
        mask has it: each still adds its values, with the weight of a product that is zero."""
        config, phi = self.config, self.feature_map
        fresh = state is None
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in self.qkv(x_BTD).split(self.sizes, dim=-1))
        if padding:
            k = _without(k, padding)
        s_BHFV, z_BHF, _ = state
        # rows that have read something have had their prefix
        if fresh:
            s_BHFV, z_BHF = self._prefix(x_BTD, padding)
        elif not all_begun():
            first_B = (state.seen_B == 0).to(s_BHFV.dtype)
            of_prefix_BHFV, of_prefix_BHF = self._prefix(x_BTD, padding)
            s_BHFV = torch.addcmul(s_BHFV, of_prefix_BHFV, first_B[:, None, None, None])
            z_BHF = torch.addcmul(z_BHF, of_prefix_BHF, first_B[:, None, None])
        y_BTHV, after_BHFV, after_BHF = linear_attention(
            q, k, v, s_BHFV, z_BHF, feature_map=phi, normalise=True, eps=config.eps,
            chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        after = None
        if want_state and after_BHFV is not None and after_BHF is not None:
            after = PrefixState(after_BHFV, after_BHF, state.seen_B + x_BTD.shape[1])
        return self.out_proj(y_BTHV.flatten(2)), after

    def _prefix(self, x_BTD: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        """The sums of the prefix, which is the beginning of this call."""
        config = self.config
        parts = self.prefix_kv(x_BTD[:, : config.prefix]).split(self.sizes[1:], dim=-1)
        k, v = (u.unflatten(-1, (config.heads, -1)) for u in parts)
        if padding:
            k = _without(k, padding)
        return absorb(k, v, None, None, feature_map=self.feature_map, chunk=config.chunk, form=self.form)

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> PrefixState:
        config = self.config
        features = self.feature_map.size(config.feature_dim)
        sizes = batch, config.heads, features, config.width // config.heads
        s_BHFV = torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device)
        seen_B = torch.zeros(batch, dtype=torch.long, device=device)
        return PrefixState(s_BHFV, torch.zeros_like(s_BHFV[..., 0]), seen_B)

    def state_elements(self, context_len: int) -> int:
        features = self.feature_map.size(self.config.feature_dim)
        return features * (self.config.width + self.config.heads) + 1


def _without(k_BTHK: Tensor, padding: int) -> Tensor:
    """Keys, the first of which are zero."""
    return F.pad(k_BTHK[:, padding:], (0, 0, 0, 0, padding, 0))
