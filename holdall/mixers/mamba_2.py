"""Mamba-2: a state space with one data-dependent decay per head, which is linear attention with decay.

    [z | x B C | dt] = W_in u        [x B C] = silu(shortconv_4(x B C))        dt = softplus(dt + b)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        y_t = S_t^T C_t + D x_t        A = -exp(A_log)
    out = W_out (w * RMSNorm(y * silu(z)))

Letters: u and out input and output; z a gate; x, B, C values, keys and queries; dt the step size of a head; b
its bias; S_t a head's state at token t; A its rate; D a skip; y_t what is read out of S; w the norm's weight;
W_in and W_out learned maps; shortconv_4 a causal convolution of 4 taps.

Per head S is (state, head_dim), A and D are scalars; C, B and dt x are queries, keys and values, and the
heads of a group share B and C. Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms
Through Structured State Space Duality", 2024, arXiv 2405.21060.
Weights have the names, orders and shapes of mamba_ssm's Mamba2 (conv1d.weight without its middle dimension;
norm.weight is `norm_weight_E`). Groups are normalised separately, as in Mamba2 and the released models;
mamba_ssm's Mamba2Simple normalises over all channels.
Deviations:
- the convolution's state has the 3 inputs that are needed, the official one 4;
- the recurrent state is fp32 for weights of any dtype;
- it is (state, head_dim), the official one is transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, recurrent_dtype, register
from holdall.ops import hippo, linear_attention, mamba_2, replay
from holdall.ops.linear import is_plain
from holdall.ops.recent import ConvReplayState
from holdall.settings import NonNegativeFloat, PositiveInt, Range


class Mamba2State(NamedTuple):
    """The inputs that the short convolution still needs, and the decayed sum of B (dt x)^T."""

    conv_BPE: Tensor
    s_BHNV: Tensor


@register(
    "mamba-2",
    family="state space",
    paper=Paper(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through "
        "Structured State Space Duality",
        authors="Dao, Gu",
        year=2024,
        arxiv="2405.21060",
    ),
    state="eDn+(W-1)(eD+2gn)",
    training="ND(D + n)",
    inference="D(D + n)",
)
@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Selective state space with one decay per head, computed as linear attention."""

    state: PositiveInt = 128
    """State size per channel, n."""
    expand: PositiveInt = 2
    """Inner channels per model channel, e."""
    head_dim: PositiveInt = 64
    """Channels of a head; where there are fewer inner channels, they are one head."""
    groups: PositiveInt = 1
    """Sets of B and C, g, each shared by heads / g heads."""
    kernel: Annotated[int, Range(least=2)] = 4
    """Taps of the short convolution, W."""
    bias: bool = False
    """Whether the first and the last projection have biases."""
    eps: NonNegativeFloat = 1e-5
    """Epsilon of the RMS norm of the output."""
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {"state": 8, "head_dim": 8, "groups": 2, "chunk": 16},
        {"state": 4, "head_dim": 8, "groups": 2, "kernel": 3, "chunk": 16, "replay": 2},
        {"state": 4, "expand": 1, "head_dim": 8, "bias": True},
    )

    def validate(self) -> None:
        if self.inner % min(self.head_dim, self.inner):
            raise ValueError(f"expand * width = {self.inner} is not a multiple of head_dim {self.head_dim}")
        if self.heads % self.groups:
            raise ValueError(
                f"{self.heads} heads (expand * width / head_dim) are not a multiple of groups {self.groups}"
            )

    @property
    def inner(self) -> int:
        return self.expand * self.width

    @property
    def heads(self) -> int:
        return max(self.inner // self.head_dim, 1)

    @property
    def conv_channels(self) -> int:
        return self.inner + 2 * self.groups * self.state

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        head_dim = self.inner // self.heads
        refusal = super().kernel_refusal(device, dtype) or mamba_2.kernel_refusal(
            head_dim, self.state, self.kernel
        )
        if refusal or not self.replay:
            return refusal
        return linear_attention.kernel_refusal(self.state, head_dim, dtype) or replay.kernel_refusal(
            self.state
        )

    def build(self) -> Mamba2:
        return Mamba2(self)


class Mamba2(Mixer):
    config: Mamba2Config
    own_init = True

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.state_type = ConvReplayState if config.replay else Mamba2State  # type: ignore[misc]
        self.rollback_limit = config.replay
        inner, heads, channels, bound = config.inner, config.heads, config.conv_channels, config.kernel**-0.5
        self.in_proj = nn.Linear(config.width, inner + channels + heads, bias=config.bias)
        self.conv_weight_EW = nn.Parameter(torch.empty(channels, config.kernel).uniform_(-bound, bound))
        self.conv_bias_E = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))
        self.dt_bias = nn.Parameter(hippo.step_size_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight_E = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.width, bias=config.bias)

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        config = self.config
        sizes = mamba_2.Sizes(config.heads, config.inner // config.heads, config.groups, config.state)
        parameters = (
            self.conv_weight_EW, self.conv_bias_E, self.dt_bias, self.A_log, self.D, self.norm_weight_E
        )  # fmt: skip
        if config.replay and (want_state or state is not None):
            if state is None:
                state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
            y_BTE, kept = mamba_2.replayed_mamba_2(
                self.in_proj(x_BTD), *parameters, state, sizes, config.eps, replay=config.replay,
                chunk=config.chunk, inplace=inplace, form=self.form,
            )  # fmt: skip
            return self.out_proj(y_BTE), kept if want_state else None
        conv_BPE = None if state is None else state.conv_BPE
        if conv_BPE is None:
            conv_BPE = x_BTD.new_zeros(x_BTD.shape[0], config.kernel - 1, config.conv_channels)
        if self.form == "kernel" and x_BTD.shape[1] > 1 and is_plain(self.in_proj):
            # filled up to where a GPU's matrix products are fast, which one token's are not
            weight_FD: Tensor = self.in_proj.weight
            bias_F: Tensor | None = self.in_proj.bias
            more = -weight_FD.shape[0] % 16
            bias_F = None if bias_F is None else F.pad(bias_F, (0, more))
            projected_BTF = F.linear(x_BTD, F.pad(weight_FD, (0, 0, 0, more)), bias_F)
        else:
            projected_BTF = self.in_proj(x_BTD)
        y_BTE, conv_BPE, s_BHNV = mamba_2.mamba_2(
            projected_BTF, *parameters, conv_BPE, None if state is None else state.s_BHNV,
            sizes, config.eps, chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        after = None if s_BHNV is None or not want_state else Mamba2State(conv_BPE, s_BHNV)
        return self.out_proj(y_BTE), after

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config = self.config
        past, sizes = config.kernel - 1 + config.replay, (config.state, config.inner // config.heads)
        conv_BPE = torch.zeros(batch, past, config.conv_channels, dtype=dtype, device=device)
        if config.replay:
            state = replay.empty_replay(
                batch, config.heads, *sizes, config.replay, key_groups=config.groups, decays=1,
                dtype=dtype, device=device,
            )  # fmt: skip
            return ConvReplayState(*state, conv_BPE)
        s_BHNV = torch.zeros(batch, config.heads, *sizes, dtype=recurrent_dtype(dtype), device=device)
        return Mamba2State(conv_BPE, s_BHNV)

    def state_elements(self, context_len: int) -> int:
        config = self.config
        if config.replay:
            return replay.elements_with_ring(self)
        return config.inner * config.state + (config.kernel - 1) * config.conv_channels

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
