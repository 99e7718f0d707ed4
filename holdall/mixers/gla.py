"""Gated linear attention: linear attention with a data-dependent decay per key dimension.

    q, k, v = W_q x, W_k x, W_v x        log a_t = logsigmoid(W_2 W_1 x_t + b) / tau        per key dimension
    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t / sqrt(K)
    y = W_o (w * RMSNorm_head(o) * silu(W_g x))

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; K and V their
dimensions; a_t the decays; tau the temperature of their logarithms; S a head's state; o what is read out of
it; W_* learned maps; b a bias; w the norm's weight.

Per head S is (K, V); w (V) is shared by the heads. With a `kernel`, q, k and v first pass through a short
causal convolution with that many taps and silu. Yang, Wang, Shen, Panda, Kim, "Gated Linear Attention
Transformers with Hardware-Efficient Training", 2023, arXiv 2312.06635.
Weights map onto flash-linear-attention's layer: q_proj, k_proj, v_proj, g_proj are the rows of `qkvg`, in
that order; gk_proj.0 and .1 are `gate_down` and `gate_up`; g_norm_swish_gate.weight is `norm_weight_V`;
o_proj is `out_proj`; q_conv1d, k_conv1d, v_conv1d, without their middle dimension, are the rows of
`conv_weight_EW`.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, readout_dtype, recurrent_dtype, register
from holdall.contract.forms import plain
from holdall.ops import linear_attention, replay
from holdall.ops.gated_rms_norm import gated_rms_norm
from holdall.ops.recent import ConvReplayState, recent_conv, replay_behind_conv
from holdall.ops.small_linear import small
from holdall.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Range


class GLAState(NamedTuple):
    """The decayed sum of k v^T."""

    s_BHKV: Tensor


class GLAConvState(NamedTuple):
    """The decayed sum of k v^T, and the q, k and v that the short convolution still needs."""

    s_BHKV: Tensor
    conv_BPE: Tensor


@register(
    "gla",
    family="linear attention",
    paper=Paper(
        title="Gated Linear Attention Transformers with Hardware-Efficient Training",
        authors="Yang, Wang, Shen, Panda, Kim",
        year=2023,
        arxiv="2312.06635",
    ),
    state="abD²/H+(2a+b)D(W-1)",
    training="ND²(1 + b/H)",
    inference="D²(1 + b/H)",
)
@dataclass(frozen=True, kw_only=True)
class GLAConfig(MixerConfig):
    """Linear attention with a data-dependent decay per key dimension."""

    heads: PositiveInt = 4
    """Number of heads, H."""
    key_ratio: PositiveFloat = 0.5
    """Key dimensions of all heads together per model dimension, a."""
    value_ratio: PositiveFloat = 1.0
    """Value dimensions of all heads together per model dimension, b."""
    gate_rank: PositiveInt = 16
    """Rank of the projection that gives the decays."""
    tau: PositiveFloat = 16.0
    """Temperature: the logarithms of the decays are divided by it."""
    kernel: Annotated[int, Range(least=2, zero="no convolution")] = 0
    """Taps of the short convolution of q, k and v, W; 0 for no convolution, which counts as W = 1 in the
    state's size.
    """
    eps: NonNegativeFloat = 1e-5
    """Epsilon of the RMS norm of each head's output."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {"gate_rank": 3},
        {"heads": 2, "kernel": 3, "replay": 2},
        {"heads": 2, "key_ratio": 0.75, "value_ratio": 2.0, "tau": 1.0, "kernel": 4},
    )

    def validate(self) -> None:
        for name in ("key_ratio", "value_ratio"):
            dims = getattr(self, name) * self.width
            if not (dims >= 1 and dims % self.heads == 0):
                raise ValueError(f"{name} * width = {dims:g} is not a multiple of heads {self.heads}")

    @property
    def keys(self) -> int:
        return int(self.key_ratio * self.width)

    @property
    def values(self) -> int:
        return int(self.value_ratio * self.width)

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        sizes = self.keys // self.heads, self.values // self.heads
        return (
            super().kernel_refusal(device, dtype)
            or linear_attention.kernel_refusal(*sizes, dtype, decay_per_key=True)
            or (replay.kernel_refusal(sizes[0]) if self.replay else "")
        )

    def build(self) -> GLA:
        return GLA(self)


class GLA(Mixer):
    config: GLAConfig

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(config)
        keys, values = config.keys, config.values
        self.state_type = GLAConvState if config.kernel else GLAState  # type: ignore[misc]
        if config.replay:
            self.state_type = ConvReplayState if config.kernel else replay.ReplayState  # type: ignore[misc]
        self.rollback_limit = config.replay
        self.sizes = [keys, keys, values]
        self.qkvg = nn.Linear(config.width, sum(self.sizes) + values, bias=False)
        self.gate_down = nn.Linear(config.width, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, keys)
        self.norm_weight_V = nn.Parameter(torch.ones(values // config.heads))
        self.out_proj = nn.Linear(values, config.width, bias=False)
        if config.kernel:
            weight_EW = torch.empty(sum(self.sizes), config.kernel)
            self.conv_weight_EW = nn.Parameter(
                weight_EW.uniform_(-(config.kernel**-0.5), config.kernel**-0.5)
            )

    def forward(
        self, x_BTD: Tensor, state: Any = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, State | None]:
        config, fresh = self.config, state is None
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        conv_BPE: Tensor | None = None
        qkv_BTE, gate_BTE = self.qkvg(x_BTD).split([sum(self.sizes), config.values], dim=-1)
        if config.kernel:
            qkv_BTE, conv_BPE = recent_conv(
                qkv_BTE, self.conv_weight_EW, None, state, silu=True, inplace=inplace, form=plain(self.form)
            )
        log_decay_BTE = self._log_decay(self.gate_down(x_BTD))
        qkv_BTE = qkv_BTE.to(readout_dtype(self.form, x_BTD.dtype))
        q, k, v, log_decay_BTHK = (
            u.unflatten(-1, (config.heads, -1)) for u in (*qkv_BTE.split(self.sizes, dim=-1), log_decay_BTE)
        )
        q = q * q.shape[-1] ** -0.5
        after: State | None = None
        if config.replay:
            o_BTHV, after = replay_behind_conv(
                q, k, v, state, conv_BPE, log_decay_BTHK,
                replay=config.replay, fresh=fresh, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
        else:
            o_BTHV, s_BHKV, _ = linear_attention.linear_attention(
                q, k, v, None if fresh else state.s_BHKV, None, log_decay_BTHK,
                inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
            if want_state and s_BHKV is not None:
                after = GLAState(s_BHKV) if conv_BPE is None else GLAConvState(s_BHKV, conv_BPE)
        gate_BTHV = gate_BTE.unflatten(-1, (config.heads, -1))
        y_BTHV = gated_rms_norm(o_BTHV, gate_BTHV, self.norm_weight_V, config.eps, after=True, form=self.form)
        return self.out_proj(y_BTHV.flatten(2).to(x_BTD.dtype)), after

    def _log_decay(self, low_BTR: Tensor) -> Tensor:
        """What is forgotten adds up over thousands of tokens: not in bf16."""
        return small(self.gate_up, low_BTR, log_sigmoid=True, divisor=self.config.tau, form=self.form)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config = self.config
        sizes = config.heads, config.keys // config.heads, config.values // config.heads
        sums: Any
        made: Any = self.state_type
        if config.replay:
            sums = replay.empty_replay(
                batch, *sizes, config.replay, decays=sizes[1], dtype=dtype, device=device
            )
        else:
            sums = (torch.zeros(batch, *sizes, dtype=recurrent_dtype(dtype), device=device),)
        if not config.kernel:
            return made(*sums)
        past = config.kernel - 1 + config.replay
        return made(*sums, torch.zeros(batch, past, sum(self.sizes), dtype=dtype, device=device))

    def state_elements(self, context_len: int) -> int:
        config = self.config
        if config.replay:
            return replay.elements_with_ring(self)
        past = max(config.kernel - 1, 0) * sum(self.sizes)
        return config.keys * config.values // config.heads + past

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
