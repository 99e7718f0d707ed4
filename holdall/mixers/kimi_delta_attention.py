"""Kimi Delta Attention: Gated DeltaNet with a decay per key dimension.

    [q | k | v] = silu(shortconv_4(W x))        q, k of unit length per head        beta = sigmoid(W_beta x)
    S' = diag(w_t) S_{t-1}                      w_t = exp(-exp(A_log) softplus(W_f2 W_f1 x + dt_bias))
    S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T                          o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (RMSNorm_head(o_t) * weight * sigmoid(W_g2 W_g1 x))

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; K dimensions of
each; beta the strength of a write; w_t the decays, A_log and dt_bias their learned scale and bias; S a head's
state (K, K); o what is read out of it; W and W_* learned maps; shortconv_4 a causal convolution of 4 taps.

A_log is a scalar per head, dt_bias one per head and key dimension; W_f1 and W_g1 have as many rows as a head
has dimensions. Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025, arXiv
2510.26692. `negative_eigenvalues` doubles beta (Grazzi et al., 2024, arXiv 2411.12537).
Weights map onto the released model's and transformers' layer: q_proj, k_proj, v_proj are the rows of `qkv`,
in that order, the convolutions (without their middle dimension) those of `conv_weight_EW`; f_a_proj and
f_b_proj are `decay_proj`'s 0 and 1, dt_bias and A_log (flat) those here, g_a_proj and g_b_proj `gate_proj`'s;
b_proj is `beta_proj`, o_norm.weight `norm_weight_V`, o_proj `out_proj`.
Deviations:
- flash-linear-attention's layer, unlike those, has a bias after W_g2; here there is none;
- convolutions start as torch's do, while that library's language model draws them from N(0, 0.02) too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, recurrent_dtype, register
from holdall.contract.forms import plain
from holdall.ops import delta_rule, hippo, replay
from holdall.ops.recent import ConvReplayState, recent_conv, replay_behind_conv
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Range


class KimiDeltaState(NamedTuple):
    """The inputs that the short convolution still needs, and what is held under the keys."""

    conv_BPE: Tensor
    s_BHKV: Tensor


@register(
    "kimi-delta-attention",
    family="delta rule",
    paper=Paper(
        title="Kimi Linear: An Expressive, Efficient Attention Architecture",
        authors="Kimi Team",
        year=2025,
        arxiv="2510.26692",
    ),
    state="HK² + 3HK(W - 1)",
    training="NHK(D + K)",
    inference="HK(D + K)",
)
@dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig(MixerConfig):
    """The delta rule with a data-dependent decay per key dimension, as in Kimi Linear."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    head_dim: NonNegativeInt = 0
    """Dimensions of a head's keys and values, K, and the rank of the gates' projections; 0 for width / heads.
    """
    kernel: Annotated[int, Range(least=2)] = 4
    """Taps of the short convolution, W."""
    negative_eigenvalues: bool = False
    """Double beta, to the range [0, 2], so that a token can reverse what the state holds."""
    eps: NonNegativeFloat = 1e-5
    """Epsilon of the RMS norm of each head's output."""
    chunk: Annotated[int, Range(least=1, most=16)] = delta_rule.CHUNK
    """Tokens per chunk, at most 16, whose updates of the state are solved together as one triangular system.
    """
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"head_dim": 4, "kernel": 3, "replay": 2},
        {"heads": 3, "head_dim": 8, "kernel": 3, "negative_eigenvalues": True, "chunk": 8},
    )

    def validate(self) -> None:
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: give a head_dim")

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return (
            super().kernel_refusal(device, dtype)
            or delta_rule.kernel_refusal(self.key_dim)
            or (replay.kernel_refusal(self.key_dim) if self.replay else "")
        )

    def build(self) -> KimiDeltaAttention:
        return KimiDeltaAttention(self)


class KimiDeltaAttention(Mixer):
    config: KimiDeltaConfig

    def __init__(self, config: KimiDeltaConfig) -> None:
        super().__init__(config)
        self.state_type = ConvReplayState if config.replay else KimiDeltaState  # type: ignore[misc]
        self.rollback_limit, self.rollback_rounds = config.replay, config.replay > 0
        width, rank, bound = config.width, config.key_dim, config.kernel**-0.5
        inner = config.heads * config.key_dim
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.conv_weight_EW = nn.Parameter(torch.empty(3 * inner, config.kernel).uniform_(-bound, bound))
        self.beta_proj = nn.Linear(width, config.heads, bias=False)
        self.decay_proj, self.gate_proj = (
            nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, inner, bias=False))
            for _ in range(2)
        )
        self.A_log = nn.Parameter(torch.empty(config.heads).uniform_(1, 16).log())
        self.dt_bias_HK = nn.Parameter(hippo.step_size_bias(config.heads, config.key_dim))
        self.norm_weight_V = nn.Parameter(torch.ones(config.key_dim))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        config, fresh = self.config, state is None
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        dtype = recurrent_dtype(x_BTD.dtype)
        qkv_BTE, conv_BPE = recent_conv(
            self.qkv(x_BTD), self.conv_weight_EW, None, state, silu=True, inplace=inplace,
            form=plain(self.form),
        )  # fmt: skip
        q, k, v = qkv_BTE.unflatten(-1, (3, config.heads, -1)).unbind(2)
        q, k = delta_rule.unit_length(q), delta_rule.unit_length(k)
        # decay and step decide what is kept over thousands of tokens: not in bf16
        f_BTHK = self.decay_proj(x_BTD).to(dtype).unflatten(-1, (config.heads, -1))
        log_w_BTHK = -self.A_log.to(dtype).exp()[:, None] * F.softplus(f_BTHK + self.dt_bias_HK.to(dtype))
        beta_BTH = self.beta_proj(x_BTD).to(dtype).sigmoid() * (2 if config.negative_eigenvalues else 1)
        q = q * config.key_dim**-0.5
        after: State | None
        if config.replay:
            o_BTHV, after = replay_behind_conv(
                q, k, v, state, conv_BPE, log_w_BTHK, beta_BTH, replay=config.replay, chunk=config.chunk,
                fresh=fresh, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
        else:
            o_BTHV, s_BHKV = delta_rule.delta_rule(
                q, k, v, beta_BTH, state.s_BHKV, log_w_BTHK,
                chunk=config.chunk, inplace=inplace, form=self.form,
            )  # fmt: skip
            after = KimiDeltaState(conv_BPE, s_BHKV) if want_state else None
        o_BTHV = F.rms_norm(o_BTHV, o_BTHV.shape[-1:], self.norm_weight_V, config.eps)
        y_BTD = self.out_proj(o_BTHV.flatten(2) * self.gate_proj(x_BTD).sigmoid())
        return y_BTD, after

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config, heads, size = self.config, self.config.heads, self.config.key_dim
        past = config.kernel - 1 + config.replay
        conv_BPE = torch.zeros(batch, past, 3 * heads * size, dtype=dtype, device=device)
        if config.replay:
            state = replay.empty_replay(
                batch,
                heads,
                size,
                size,
                config.replay,
                decays=size,
                corrects=True,
                dtype=dtype,
                device=device,
            )
            return ConvReplayState(*state, conv_BPE)
        s_BHKV = torch.zeros(batch, heads, size, size, dtype=recurrent_dtype(dtype), device=device)
        return KimiDeltaState(conv_BPE, s_BHKV)

    def state_elements(self, context_len: int) -> int:
        if self.config.replay:
            return replay.elements_with_ring(self)
        heads, size, kernel = self.config.heads, self.config.key_dim, self.config.kernel
        return heads * size**2 + 3 * heads * size * (kernel - 1)

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
