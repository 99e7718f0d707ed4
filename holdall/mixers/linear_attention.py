"""Linear attention: exp(q . k) replaced by phi(q) . phi(k), so that a state of fixed size is enough.

    S_t = S_{t-1} + phi(k_t) v_t^T          z_t = z_{t-1} + phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + eps) ]

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; phi their
features; S and z the state of a head; eps a small number; W_o a learned map.

Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", 2020, arXiv 2006.16236: phi(u) = elu(u) + 1.
The other maps here have no parameters either; taylor.py, performer.py, hedgehog.py and others have their own.
Weights:
- fast-transformers' query, key and value projections are the rows of `qkv`, in that order, and its output
  projection `out_proj`; `bias=True`, eps 1e-6;
- Zoology's proj_q, proj_k, proj_v likewise, and its proj_o; no bias, eps 1e-12, its pos_elu is elu1, its
  SquaredMap square.
Deviations:
- both always normalise. With map "identity" the normaliser is a sum of signed terms and can be close to zero,
  so `normalise=False` should be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from holdall.contract import Mixer, MixerConfig, Paper, State, recurrent_dtype, register
from holdall.ops.linear import Linear
from holdall.ops.linear_attention import FEATURE_MAPS, linear_attention
from holdall.ops.replay import (
    ReplayState,
    ScaledReplayState,
    elements_with_ring,
    empty_replay,
    replay_attention,
    take_back,
)
from holdall.settings import NonNegativeFloat, PositiveInt, Range

if TYPE_CHECKING:
    from holdall.mixers.taylor import TaylorConfig


class LinearState(NamedTuple):
    """The sum of phi(k) v^T."""

    s_BHFV: Tensor


class NormalisedState(NamedTuple):
    """The sum of phi(k) v^T, and the sum of phi(k) that the output is divided by."""

    s_BHFV: Tensor
    z_BHF: Tensor


@register(
    "linear-attention",
    family="linear attention",
    paper=Paper(
        title="Transformers are RNNs",
        authors="Katharopoulos, Vyas, Pappas, Fleuret",
        year=2020,
        arxiv="2006.16236",
    ),
    state="F(D + H)",
    training="NFD",
    inference="FD",
)
@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(MixerConfig):
    """Linear attention with a feature map without parameters: elu1, relu, square or identity."""

    feature_map: Literal["elu1", "relu", "square", "identity"] = "elu1"
    """Map of queries and keys, without parameters: "elu1" is elu(u) + 1, "square" is u²."""
    feature_dim: PositiveInt = 16
    """Dimensions of a head's queries and keys, F."""
    heads: PositiveInt = 1
    """Number of heads, H."""
    normalise: bool = True
    """Whether outputs are divided by the normaliser phi(q) . z."""
    eps: NonNegativeFloat = 1e-12
    """Added to the normaliser that outputs are divided by."""
    chunk: PositiveInt = 128
    """Tokens per chunk: the output within a chunk is computed over all pairs of tokens (quadratic), and the
    state is built at chunk boundaries only.
    """
    bias: bool = False
    """Whether the projections have biases."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    state_dtype: ClassVar[str] = "fp32"
    variants = (
        {"heads": 2, "chunk": 16},
        {"feature_dim": 4, "heads": 2, "chunk": 16, "replay": 2},
        {"feature_map": "relu", "normalise": False, "chunk": 32},
        {"feature_map": "square", "bias": True},
        {"feature_map": "identity", "normalise": False},
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build(self) -> LinearAttention:
        return ReplayedLinearAttention(self) if self.replay else LinearAttention(self)


class LinearAttention(Mixer):
    """Built by the configs of this file and of taylor.py, which differ in the map."""

    config: LinearAttentionConfig | TaylorConfig

    def __init__(self, config: LinearAttentionConfig | TaylorConfig) -> None:
        super().__init__(config)
        self.feature_map = FEATURE_MAPS[config.feature_map]
        self.state_type = NormalisedState if config.normalise else LinearState  # type: ignore[misc]
        self.sizes = [config.heads * config.feature_dim] * 2 + [config.width]
        self.qkv = Linear(config.width, sum(self.sizes), bias=config.bias)
        self.out_proj = Linear(config.width, config.width, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, State | None]:
        config = self.config
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in self.qkv(x_BTD).split(self.sizes, dim=-1))
        y_BTHV, *after = self._attend(x_BTD, q, k, v, state, inplace=inplace, want_state=want_state)
        kept = None
        if want_state:
            kept = self._rounded(self.state_type(*(tensor for tensor in after if tensor is not None)))
        return self.out_proj(y_BTHV.flatten(2)), kept

    def _attend(
        self, x_BTD: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any, **how: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the heads give, (B, T, H, V), and the sums after it; `how` is of the op, by name."""
        config = self.config
        return linear_attention(
            q, k, v, *(state or (None, None)), feature_map=self.feature_map, normalise=config.normalise,
            eps=config.eps, chunk=config.chunk, form=self.form, **how,
        )  # fmt: skip

    def _rounded(self, state: State) -> State:
        """The state to carry: s alone in bf16, since z counts the tokens."""
        if self.config.state_dtype == "fp32":
            return state
        return state._replace(s_BHFV=state[0].to(torch.bfloat16))  # type: ignore[attr-defined]

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config, dtype = self.config, recurrent_dtype(dtype)
        features = self.feature_map.size(config.feature_dim)
        sums = torch.zeros(
            batch, config.heads, features, config.width // config.heads, dtype=dtype, device=device
        )
        return self._rounded(
            NormalisedState(sums, sums[..., 0].clone()) if config.normalise else LinearState(sums)
        )

    def state_elements(self, context_len: int) -> int:
        features = self.feature_map.size(self.config.feature_dim)
        return features * (self.config.width + self.config.heads * self.config.normalise)


class ReplayedLinearAttention(LinearAttention):
    """Linear attention with a ring of its last tokens: holdall/ops/replay.py."""

    def __init__(self, config: LinearAttentionConfig | TaylorConfig) -> None:
        super().__init__(config)
        self.state_type = ScaledReplayState if config.state_dtype == "fp16" else ReplayState  # type: ignore[misc]
        self.rollback_limit = config.replay

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, Any]:
        config = self.config
        if state is None and want_state and config.state_dtype != "fp32":
            state = self.init_state(len(x_BTD), dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in self.qkv(x_BTD).split(self.sizes, dim=-1))
        y_BTHV, after = self._replay(x_BTD, q, k, v, state, inplace=inplace, want_state=want_state)
        return self.out_proj(y_BTHV.flatten(2)), after

    def _replay(
        self, x_BTD: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any, **how: Any
    ) -> tuple[Tensor, Any]:
        """What the heads give, (B, T, H, V), and the state after it; `how` is of the op, by name."""
        config = self.config
        return replay_attention(
            q, k, v, state, replay=config.replay, feature_map=self.feature_map, normalise=config.normalise,
            eps=config.eps, chunk=config.chunk, form=self.form, **how,
        )  # fmt: skip

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config = self.config
        state = empty_replay(
            batch, config.heads, config.feature_dim, config.width // config.heads, config.replay,
            feature_map=self.feature_map, normalise=config.normalise, dtype=dtype, device=device,
        )  # fmt: skip
        if config.state_dtype == "fp16":
            exponent_BH = torch.zeros(batch, config.heads, dtype=torch.int32, device=device)
            return ScaledReplayState(state.s_BHFV.half(), *state[1:], exponent_BH)
        return self._rounded(state)

    def state_elements(self, context_len: int) -> int:
        return elements_with_ring(self)

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return take_back(state, count_B, self.owner, inplace=inplace)
