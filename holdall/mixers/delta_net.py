"""DeltaNet: linear attention whose state is corrected towards each new value instead of summing values.

    [q | k | v] = silu(shortconv_4(W x))        q, k of unit length per head        beta = sigmoid(W_beta x)
    S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T                o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (g * RMSNorm_head(o_t))           g a learned weight, or weight * silu(W_g x) with `gate`

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of a head; K their
dimensions; beta the strength of a write; S a head's state (K, V); o what is read out of it; W, W_beta, W_g,
W_o learned maps; g the norm's weight; shortconv_4 a causal convolution of 4 taps.

Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
2024, arXiv 2406.06484; the rule is that of Schlag, Irie, Schmidhuber, "Linear Transformers Are Secretly Fast
Weight Programmers", 2021, arXiv 2102.11174, whose keys are `key_map` "elu1" with kernel 0: q and k are
elu(u) + 1, divided by their sum; v has its silu. `negative_eigenvalues` doubles beta, so that a token can
reverse what the state holds (Grazzi et al., 2024, arXiv 2411.12537).
Weights map onto flash-linear-attention's DeltaNet: q_proj, k_proj, v_proj are the rows of `qkv`, in that
order, q_conv1d, k_conv1d, v_conv1d (without their middle dimension) those of `conv_weight_EW`; b_proj is
`beta_proj`, g_proj `gate_proj`, o_norm.weight `norm_weight_V`, o_proj `out_proj`.
Deviations:
- convolutions start as torch's do: initialised as small as the other weights, they would make the values of a
  small model vanish below the norm's epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, recurrent_dtype, register
from holdall.contract.forms import plain
from holdall.ops import delta_rule, replay, short_conv
from holdall.ops.gated_rms_norm import norm_heads
from holdall.ops.linear_attention import elu_plus_one
from holdall.ops.recent import ConvReplayState, recent_conv, replay_behind_conv
from holdall.ops.small_linear import widened
from holdall.ops.unit_heads import unit_heads
from holdall.settings import NonNegativeFloat, PositiveInt, Range


class DeltaNetState(NamedTuple):
    """The inputs that the short convolution still needs, and what is held under the keys."""

    conv_BPE: Tensor
    s_BHKV: Tensor


@register(
    "delta-net",
    family="delta rule",
    paper=Paper(
        title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        authors="Yang et al.",
        year=2024,
        arxiv="2406.06484",
    ),
    state="D²/H + 3D(W - 1)",
    training="ND²(1 + 1/H)",
    inference="D²(1 + 1/H)",
)
@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(MixerConfig):
    """Linear attention with the delta rule: what a key holds is moved towards its new value."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    key_map: Literal["silu", "elu1"] = "silu"
    """Map of queries and keys: "silu" then unit length, or "elu1" then unit sum (Schlag et al.)."""
    kernel: Annotated[int, Range(least=2, zero="no convolution")] = 4
    """Taps of the short convolution, W; 0 for no convolution."""
    gate: bool = False
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
        {"heads": 4, "kernel": 3, "replay": 2},
        {"heads": 4, "key_map": "elu1", "kernel": 0, "gate": True, "negative_eigenvalues": True, "chunk": 8},
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return (
            super().kernel_refusal(device, dtype)
            or delta_rule.kernel_refusal(self.width // self.heads)
            or short_conv.kernel_refusal(self.kernel)
            or (replay.kernel_refusal(self.width // self.heads) if self.replay else "")
        )

    def build(self) -> DeltaNet:
        return DeltaNet(self)


class DeltaNet(Mixer):
    config: DeltaNetConfig

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config)
        self.state_type = ConvReplayState if config.replay else DeltaNetState  # type: ignore[misc]
        self.rollback_limit, self.rollback_rounds = config.replay, config.replay > 0
        width = config.width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        if config.kernel:
            bound = config.kernel**-0.5
            self.conv_weight_EW = nn.Parameter(torch.empty(3 * width, config.kernel).uniform_(-bound, bound))
        self.beta_proj = nn.Linear(width, config.heads, bias=False)
        self.norm_weight_V = nn.Parameter(torch.ones(width // config.heads))
        self.gate_proj = nn.Linear(width, width, bias=False) if config.gate else None
        self.out_proj = nn.Linear(width, width, bias=False)

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
        q, k, v, conv_BPE = self._heads(self.qkv(x_BTD), state, recurrent_dtype(x_BTD.dtype), inplace)
        # in bf16 a beta near 1 would leave up to 1/256 of what is to be replaced
        beta_BTH = widened(self.beta_proj, x_BTD, form=self.form).sigmoid()
        if config.negative_eigenvalues:
            beta_BTH = 2 * beta_BTH
        after: State | None
        if config.replay:
            o_BTHV, after = replay_behind_conv(
                q, k, v, state, conv_BPE, None, beta_BTH, replay=config.replay, chunk=config.chunk,
                fresh=fresh, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
        else:
            o_BTHV, s_BHKV = delta_rule.delta_rule(
                q, k, v, beta_BTH, state.s_BHKV, chunk=config.chunk, form=self.form, inplace=inplace
            )
            after = DeltaNetState(conv_BPE, s_BHKV) if want_state else None
        gate_BTD = None if self.gate_proj is None else self.gate_proj(x_BTD)
        y_BTD = norm_heads(o_BTHV, self.norm_weight_V, config.eps, gate_BTD, form=self.form)
        return self.out_proj(y_BTD), after

    def _heads(
        self, qkv_BTE: Tensor, state: Any, dtype: torch.dtype, inplace: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, and the inputs that the convolution needs next."""
        config, size = self.config, self.config.width // self.config.heads
        unit, form, conv_BPE = config.key_map == "silu", self.form, state.conv_BPE
        if config.kernel:
            qkv_BTE, conv_BPE = recent_conv(
                qkv_BTE, self.conv_weight_EW, None, state, silu=unit, inplace=inplace, form=form
            )
        elif unit:
            # SiLU is a pass of its own here, and unit vectors stay wide until the rule rounds them
            qkv_BTE, form = F.silu(qkv_BTE), plain(form)
        if unit:
            q, k, v_BTD = unit_heads(qkv_BTE, config.heads, size, size**-0.5, form=form)
            return q, k, v_BTD.unflatten(-1, (config.heads, -1)), conv_BPE
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in qkv_BTE.chunk(3, dim=-1))
        q, k = (elu_plus_one(u.to(dtype)) for u in (q, k))
        q, k = (u / u.sum(-1, keepdim=True).clamp(min=1e-6) for u in (q, k))
        return q * size**-0.5, k, F.silu(v), conv_BPE

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config, size = self.config, self.config.width // self.config.heads
        past = config.kernel - 1 + config.replay if config.kernel else 0
        conv_BPE = torch.zeros(batch, past, 3 * config.width, dtype=dtype, device=device)
        if config.replay:
            state = replay.empty_replay(
                batch, config.heads, size, size, config.replay, corrects=True, dtype=dtype, device=device
            )
            return ConvReplayState(*state, conv_BPE)
        s_BHKV = torch.zeros(batch, config.heads, size, size, dtype=recurrent_dtype(dtype), device=device)
        return DeltaNetState(conv_BPE, s_BHKV)

    def state_elements(self, context_len: int) -> int:
        if self.config.replay:
            return replay.elements_with_ring(self)
        width = self.config.width
        return width**2 // self.config.heads + 3 * width * max(self.config.kernel - 1, 0)

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
