"""Based's linear attention: exp(q . k) to second order, for which a state of fixed size is enough.

    phi(u) = [1, u / f^(1/4), (u (x) u) / sqrt(2 f)]    phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(f)
    S_t = S_{t-1} + phi(k_t) v_t^T                      z_t = z_{t-1} + phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + eps) ]

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; f dimensions of
the first two; u either of them; phi their features; (x) the outer product; s a scaled product; S and z the
state of a head, h of H; c an option; eps a small number; W_o a learned map.

Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", 2024, arXiv
2402.18668. Two options are from the Based model of Arora et al., "Just read twice", 2024, arXiv 2407.05483,
which has both: with `decay` c, head h of 0 .. H - 1 forgets

    S_t = (1 - 2^-(c + h)) S_{t-1} + phi(k_t) v_t^T        and z_t, the normaliser, nothing;

with `decay_proj`, head h's quotient is multiplied by w_h . x_t, before W_o.
Weights map one to one onto Based's and Zoology's proj_q, proj_k, proj_v (rows of `qkv`, in that order), and
Based's out_proj or Zoology's proj_o; `decay_proj` has its original's name.
Deviations:
- the map keeps the symmetric half of the second order: the same outputs from 1 + f + f (f + 1) / 2 features,
  153 instead of 273 at f = 16.
With `replay` the state is read with every token, written with every L-th, and can be rolled back:
holdall/ops/replay.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from holdall.contract import MixerConfig, Paper, recurrent_dtype, register
from holdall.mixers.linear_attention import LinearAttention, ReplayedLinearAttention
from holdall.ops.linear_attention import FEATURE_MAPS, kernel_refusal, linear_attention
from holdall.ops.replay import replay_attention
from holdall.settings import NonNegativeFloat, PositiveInt, Range


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
    state_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the sum of phi(k) v^T between calls; "fp32" means at least that. "bf16" and "fp16" halve the
    state, and every call rounds it, so that outputs depend on where calls end: in bf16 the contribution of a
    token is lost where it is less than 1/512 of the sum. Outputs err by about 1% after 256 tokens one by one,
    and where values have a non-zero mean by 27% after 1024 (holdall/kernels/taylor_step.py). With `replay`
    only calls that write the sum round it. "fp16" needs `replay`, and has a power of two per head: with 16 it
    errs by 0.2% after 4096 tokens (docs/replay.md). A prompt read in one call is rounded once.
    """

    decay: Annotated[float, Range(above=0, zero="no decay")] = 0.0
    """Forgetting, c: with each token head h of 0 .. H - 1 keeps a share 1 - 2^-(c + h) of its sum of
    phi(k) v^T, but all of its normaliser; 0 for none. It has no kernel.
    """
    decay_proj: bool = False
    """Whether each head's output is multiplied by a projection of the token to one number per head."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. The last 2 L tokens' keys and
    values are then carried in a ring; steps read the state and write it once in L of them, and the last L
    tokens can be rolled back. 16 suits a GPU.
    """

    feature_map: ClassVar[str] = "taylor"
    normalise: ClassVar[bool] = True
    bias: ClassVar[bool] = False
    forms = ("loop", "parallel", "kernel")
    variants = (
        {"feature_dim": 4, "chunk": 16},
        {"heads": 2},
        {"feature_dim": 3, "replay": 1},
        {"feature_dim": 4, "heads": 2, "chunk": 16, "replay": 4},
        {"feature_dim": 4, "heads": 2, "chunk": 16, "decay": 3.0, "decay_proj": True},
        {"feature_dim": 3, "heads": 2, "chunk": 16, "decay": 1.5, "replay": 2},
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.state_dtype == "fp16" and not self.replay:
            raise ValueError("state_dtype 'fp16' needs replay, 16 say: without it, take 'bf16' or 'fp32'")
        if self.state_dtype == "fp16" and self.decay:
            raise ValueError("state_dtype 'fp16' has no decay: take 'bf16' or 'fp32' with it")

    @property
    def has_kernel(self) -> bool:
        return not self.decay

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.decay:
            return f"the kernel's sums keep all that they hold, and decay = {self.decay} forgets"
        return super().kernel_refusal(device, dtype) or kernel_refusal(
            self.feature_dim, self.width // self.heads, dtype, feature_map=FEATURE_MAPS[self.feature_map]
        )

    def build(self) -> LinearAttention:
        if self.decay or self.decay_proj:
            return ReplayedDecayedTaylor(self) if self.replay else DecayedTaylor(self)
        return ReplayedLinearAttention(self) if self.replay else LinearAttention(self)


class DecayedTaylor(LinearAttention):
    """Sums that decay over a normaliser that does not, times a projection of the token.

    The normaliser phi(q) . z is a sum like the other, of ones instead of values.
    """

    config: TaylorConfig

    def __init__(self, config: TaylorConfig) -> None:
        super().__init__(config)
        self.decay_proj = decay_proj(config)

    def _attend(
        self, x_BTD: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any, **how: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config = self.config
        if not config.decay:
            y_BTHV, s_BHFV, z_BHF = super()._attend(x_BTD, q, k, v, state, **how)
            return scaled(y_BTHV, self.decay_proj, x_BTD), s_BHFV, z_BHF
        s_BHFV, z_BHF = state or (None, None)
        z_BHF1 = None if z_BHF is None else z_BHF[..., None]
        how |= {"feature_map": self.feature_map, "chunk": config.chunk, "form": self.form}
        wide_BTHV = v.to(recurrent_dtype(v.dtype))  # the quotient may fit into fp16 where the sum does not
        y_BTHV, s_BHFV, _ = linear_attention(q, k, wide_BTHV, s_BHFV, None, log_decay(config, v), **how)
        norm_BTH1, z_BHF1, _ = linear_attention(q, k, ones(v), z_BHF1, **how)
        y_BTHV = scaled((y_BTHV / (norm_BTH1 + config.eps)).to(v.dtype), self.decay_proj, x_BTD)
        return y_BTHV, s_BHFV, None if z_BHF1 is None else z_BHF1[..., 0]


class ReplayedDecayedTaylor(ReplayedLinearAttention):
    """`DecayedTaylor` with a ring of its last tokens. What decays and what are ones need not be carried."""

    config: TaylorConfig

    def __init__(self, config: TaylorConfig) -> None:
        super().__init__(config)
        self.decay_proj = decay_proj(config)

    def _replay(
        self, x_BTD: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any, **how: Any
    ) -> tuple[Tensor, Any]:
        config = self.config
        if not config.decay:
            y_BTHV, after = super()._replay(x_BTD, q, k, v, state, **how)
            return scaled(y_BTHV, self.decay_proj, x_BTD), after
        if state is None and how["want_state"]:
            state = self.init_state(len(v), dtype=v.dtype, device=v.device)
        of_values = of_ones = None
        if state is not None:
            none_BH0, ring_BSHV = state.z_BHF[..., :0], state.v_BSHV
            log_decay_BSH1 = log_decay(config, ring_BSHV)[..., None].clone()  # which is written into
            of_values = state._replace(z_BHF=none_BH0, log_decay_BSHX=log_decay_BSH1)
            of_ones = state._replace(s_BHFV=state.z_BHF[..., None], z_BHF=none_BH0, v_BSHV=ones(ring_BSHV))
        options: dict[str, Any] = {
            "replay": config.replay, "feature_map": self.feature_map, "chunk": config.chunk, "form": self.form
        }  # fmt: skip
        # not in place, since the other one reads the same ring; what it writes there is the same
        norm_BTH1, ones_after = replay_attention(
            q, k, ones(v), of_ones, want_state=how["want_state"], **options
        )
        wide_BTHV = v.to(recurrent_dtype(v.dtype))
        y_BTHV, after = replay_attention(q, k, wide_BTHV, of_values, log_decay(config, v), **how, **options)
        y_BTHV = scaled((y_BTHV / (norm_BTH1 + config.eps)).to(v.dtype), self.decay_proj, x_BTD)
        if after is None or ones_after is None:
            return y_BTHV, None
        return y_BTHV, after._replace(z_BHF=ones_after.s_BHFV[..., 0], log_decay_BSHX=state.log_decay_BSHX)


def decay_proj(config: TaylorConfig) -> nn.Linear | None:
    return nn.Linear(config.width, config.heads, bias=False) if config.decay_proj else None


def scaled(y_BTHV: Tensor, projection: nn.Module | None, x_BTD: Tensor) -> Tensor:
    """Each head times what the projection makes of the token."""
    return y_BTHV if projection is None else y_BTHV * projection(x_BTD)[..., None]


def log_decay(config: TaylorConfig, like_BTHV: Tensor) -> Tensor:
    """The same log decay of a head for every token, (B, T, H), as wide as sums are."""
    wide = recurrent_dtype(like_BTHV.dtype)
    head_H = torch.arange(config.heads, dtype=wide, device=like_BTHV.device)
    return torch.log1p(-(2.0 ** -(config.decay + head_H))).expand(like_BTHV.shape[:3])


def ones(like_BTHV: Tensor) -> Tensor:
    """Values of one dimension, (B, T, H, 1), as wide as sums are."""
    return like_BTHV.new_ones(*like_BTHV.shape[:3], 1, dtype=recurrent_dtype(like_BTHV.dtype))
