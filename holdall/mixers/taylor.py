"""Based's linear attention: exp(q . k) to second order, for which a state of fixed size is enough.

    phi(u) = [1, u / f^(1/4), (u (x) u) / sqrt(2 f)]    phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(f)
    S_t = S_{t-1} + phi(k_t) v_t^T                      z_t = z_{t-1} + phi(k_t)
    y_t = W_o [ phi(q_t)^T S_t / (phi(q_t) . z_t + eps) ]

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; f dimensions of
the first two; u either of them; phi their features; (x) the outer product; s a scaled product; S and z the
state of a head; eps a small number; W_o a learned map.

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
    phi(k) v^T, but all of its normaliser; 0 for none. It has no kernel and no ring.
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
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.state_dtype == "fp16" and not self.replay:
            raise ValueError("state_dtype 'fp16' needs replay, 16 say: without it, take 'bf16' or 'fp32'")
        if self.replay and (self.decay or self.decay_proj):
            raise ValueError("replay has no decay and no decay_proj: take replay 0 with them")

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
            return DecayedTaylor(self)
        return ReplayedLinearAttention(self) if self.replay else LinearAttention(self)


class DecayedTaylor(LinearAttention):
    """Sums that decay over a normaliser that does not, times a projection of the token."""

    config: TaylorConfig

    def __init__(self, config: TaylorConfig) -> None:
        super().__init__(config)
        self.decay_proj = nn.Linear(config.width, config.heads, bias=False) if config.decay_proj else None

    def _attend(
        self, x_BTD: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Any, **how: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config = self.config
        if config.decay:
            y_BTHV, s_BHFV, z_BHF = self._decayed(q, k, v, *(state or (None, None)), **how)
        else:
            y_BTHV, s_BHFV, z_BHF = super()._attend(x_BTD, q, k, v, state, **how)
        if self.decay_proj is not None:
            y_BTHV = y_BTHV * self.decay_proj(x_BTD)[..., None]
        return y_BTHV, s_BHFV, z_BHF

    def _decayed(
        self, q: Tensor, k: Tensor, v: Tensor, s_BHFV: Tensor | None, z_BHF: Tensor | None, **how: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The quotient of two sums: of values, which decays, and of ones, which is phi(q) . z."""
        config, wide = self.config, recurrent_dtype(v.dtype)
        options: dict[str, Any] = {
            "feature_map": self.feature_map, "chunk": config.chunk, "form": self.form, **how
        }  # fmt: skip
        head_H = torch.arange(config.heads, dtype=wide, device=v.device)
        log_decay_BTH = torch.log1p(-(2.0 ** -(config.decay + head_H))).expand(v.shape[:3])
        ones_BTH1 = v.new_ones(*v.shape[:3], 1, dtype=wide)
        z_BHF1 = None if z_BHF is None else z_BHF[..., None]
        y_BTHV, s_BHFV, _ = linear_attention(q, k, v, s_BHFV, None, log_decay_BTH, **options)
        norm_BTH1, z_BHF1, _ = linear_attention(q, k, ones_BTH1, z_BHF1, **options)
        y_BTHV = (y_BTHV / (norm_BTH1 + config.eps)).to(v.dtype)
        return y_BTHV, s_BHFV, None if z_BHF1 is None else z_BHF1[..., 0]
