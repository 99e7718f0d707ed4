"""Gated DeltaNet: the delta rule with a data-dependent decay per head, which can clear the state.

    [q | k | v] = silu(shortconv_4(W x))        q, k of unit length per head        beta = sigmoid(W_beta x)
    S' = w_t S_{t-1}                            w_t = exp(-exp(A_log) softplus(W_a x + dt_bias))
    S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T                          o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (RMSNorm_head(o_t) * weight * silu(W_g x))

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; K dimensions of
a key; beta the strength of a write; w_t the decay; A_log and dt_bias its learned scale and bias; S a head's
state (K, V); o what is read out of it; W, W_beta, W_a, W_g, W_o learned maps; shortconv_4 a causal
convolution of 4 taps.

Decay, beta, value and state are per value head; if there are more value heads than heads, neighbouring ones
share a query and a key. Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
2024, arXiv 2412.06464; it is the linear layer of Qwen3-Next and Olmo Hybrid. `negative_eigenvalues` doubles
beta (Grazzi et al., 2024, arXiv 2411.12537).
Weights map onto flash-linear-attention's GatedDeltaNet: q_proj, k_proj, v_proj are the rows of `qkv`, in that
order, q_conv1d, k_conv1d, v_conv1d (without their middle dimension) those of `conv_weight_EW`, a_proj and
b_proj those of `ab_proj`; g_proj is `gate_proj`, o_norm.weight `norm_weight_V`, o_proj `out_proj`.
Deviations:
- exp(A_log) is drawn from [1e-4, 16] instead of [0, 16], whose logarithm is unbounded;
- convolutions start as torch's do, while that library's language model draws them from N(0, 0.02) too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, recurrent_dtype, register
from holdall.ops import delta_rule, hippo, replay, short_conv
from holdall.ops.gated_rms_norm import norm_heads
from holdall.ops.recent import ConvReplayState, recent_conv, replay_behind_conv
from holdall.ops.small_linear import widened
from holdall.ops.unit_heads import unit_heads
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Range


class GatedDeltaNetState(NamedTuple):
    """The inputs that the short convolution still needs, and what is held under the keys."""

    conv_BPE: Tensor
    s_BHKV: Tensor


@register(
    "gated-delta-net",
    family="delta rule",
    paper=Paper(
        title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
        authors="Yang, Kautz, Hatamizadeh",
        year=2024,
        arxiv="2412.06464",
    ),
    state="eGK²+(2H+eG)K(W-1)",
    training="NK(HD + eG(D + K))",
    inference="K(HD + eG(D + K))",
)
@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(MixerConfig):
    """The delta rule with a data-dependent decay per head, as in Qwen3-Next."""

    heads: PositiveInt = 2
    """Number of query and key heads, H."""
    head_dim: NonNegativeInt = 0
    """Dimensions of a head's queries and keys, K; 0 for width / heads."""
    value_ratio: PositiveInt = 2
    """Value dimensions per key dimension, e."""
    value_heads: NonNegativeInt = 0
    """Number of value heads, G; 0 for as many as `heads`."""
    kernel: Annotated[int, Range(least=2)] = 4
    """Taps of the short convolution, W."""
    gate: bool = True
    """Whether a SiLU gate multiplies the normalised output."""
    negative_eigenvalues: bool = False
    """Double beta, to the range [0, 2], so that a token can reverse what the state holds."""
    eps: NonNegativeFloat = 1e-5
    """Epsilon of the RMS norm of each head's output."""
    chunk: PositiveInt = delta_rule.CHUNK
    """Tokens per chunk, whose updates of the state are solved together as one triangular system."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"head_dim": 4, "value_heads": 4, "kernel": 3, "replay": 2},
        {"head_dim": 8, "value_ratio": 1, "value_heads": 4, "gate": False, "negative_eigenvalues": True},
    )

    def validate(self) -> None:
        if self.value_heads % self.heads:
            raise ValueError(f"value_heads {self.value_heads} is not a multiple of heads {self.heads}")
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}: give a head_dim")

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def states(self) -> int:
        return self.value_heads or self.heads

    @property
    def sizes(self) -> list[int]:
        """Channels of all queries, keys and values."""
        return [self.heads * self.key_dim] * 2 + [self.states * self.value_ratio * self.key_dim]

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return (
            super().kernel_refusal(device, dtype)
            or delta_rule.kernel_refusal(self.key_dim)
            or short_conv.kernel_refusal(self.kernel)
            or (replay.kernel_refusal(self.key_dim) if self.replay else "")
        )

    def build(self) -> GatedDeltaNet:
        return GatedDeltaNet(self)


class GatedDeltaNet(Mixer):
    config: GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.state_type = ConvReplayState if config.replay else GatedDeltaNetState  # type: ignore[misc]
        self.rollback_limit, self.rollback_rounds = config.replay, config.replay > 0
        width, inner, bound = config.width, sum(config.sizes), config.kernel**-0.5
        values = config.sizes[-1]
        self.qkv = nn.Linear(width, inner, bias=False)
        self.conv_weight_EW = nn.Parameter(torch.empty(inner, config.kernel).uniform_(-bound, bound))
        self.ab_proj = nn.Linear(width, 2 * config.states, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.states).uniform_(1e-4, 16).log())
        self.dt_bias = nn.Parameter(hippo.step_size_bias(config.states))
        self.norm_weight_V = nn.Parameter(torch.ones(values // config.states))
        self.gate_proj = nn.Linear(width, values, bias=False) if config.gate else None
        self.out_proj = nn.Linear(values, width, bias=False)

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
            self.qkv(x_BTD), self.conv_weight_EW, None, state, silu=True, inplace=inplace, form=self.form
        )
        q, k, v = unit_heads(qkv_BTE, config.heads, config.key_dim, config.key_dim**-0.5, form=self.form)
        q = replay.of_each_head(q, config.states)
        v = v.unflatten(-1, (config.states, -1))
        # decay and step decide what is kept over thousands of tokens: not in bf16
        a_BTH, beta_BTH = widened(self.ab_proj, x_BTD, form=self.form).chunk(2, dim=-1)
        log_w_BTH = -self.A_log.to(dtype).exp() * F.softplus(a_BTH + self.dt_bias.to(dtype))
        beta_BTH = beta_BTH.sigmoid() * (2 if config.negative_eigenvalues else 1)
        after: State | None
        if config.replay:
            o_BTHV, after = replay_behind_conv(
                q, k, v, state, conv_BPE, log_w_BTH, beta_BTH, replay=config.replay, chunk=config.chunk,
                fresh=fresh, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
        else:
            o_BTHV, s_BHKV = delta_rule.delta_rule(
                q, replay.of_each_head(k, config.states), v, beta_BTH, state.s_BHKV, log_w_BTH,
                chunk=config.chunk, form=self.form, inplace=inplace,
            )  # fmt: skip
            after = GatedDeltaNetState(conv_BPE, s_BHKV) if want_state else None
        gate_BTE = None if self.gate_proj is None else self.gate_proj(x_BTD)
        y_BTE = norm_heads(o_BTHV, self.norm_weight_V, config.eps, gate_BTE, form=self.form)
        return self.out_proj(y_BTE), after

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config = self.config
        value_dim, past = config.value_ratio * config.key_dim, config.kernel - 1 + config.replay
        conv_BPE = torch.zeros(batch, past, sum(config.sizes), dtype=dtype, device=device)
        if config.replay:
            state = replay.empty_replay(
                batch, config.states, config.key_dim, value_dim, config.replay, key_groups=config.heads,
                decays=1, corrects=True, dtype=dtype, device=device,
            )  # fmt: skip
            return ConvReplayState(*state, conv_BPE)
        s_BHKV = torch.zeros(
            batch, config.states, config.key_dim, value_dim, dtype=recurrent_dtype(dtype), device=device
        )
        return GatedDeltaNetState(conv_BPE, s_BHKV)

    def state_elements(self, context_len: int) -> int:
        config = self.config
        if config.replay:
            return replay.elements_with_ring(self)
        held = config.states * config.value_ratio * config.key_dim**2
        return held + (config.kernel - 1) * sum(config.sizes)

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
