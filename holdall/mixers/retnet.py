"""RetNet's multi-scale retention: linear attention with a fixed decay per head.

    gamma_h = 1 - 2^(-5 - h)     S_n = gamma S_{n-1} + k_n v_n^T     o_n = q_n S_n / sqrt(sum_{j<=n} gamma^j)
    y = W_o (silu(W_g x) * RMSNorm_head(o))

Letters: x and y input and output; n and j tokens; q, k, v queries, keys and values of head h; gamma its
decay; S its state; o what is read out of it; W_g and W_o learned maps.

Before, q and k of K dimensions are rotated by rotary positions (interleaved pairs, angles
10000^-linspace(0, 1, K / 2)) and k is scaled by 1 / sqrt(K). Sun et al., "Retentive Network", 2023, arXiv
2307.08621.
Weights:
- map onto torchscale's module: q_proj, k_proj, v_proj, g_proj are the rows of `qkvg`, in that order;
- flash-linear-attention's layer is this one with angles "standard" and not `scaled`; its pairs are K / 2
  apart and its norm has a weight, which belongs into `out_proj`: holdall/adapters/fla.py.
Deviations:
- torchscale's parallel form also divides each row by clamp(sum |A|, 1, 5e4), detached, and its recurrent form
  does not, so the two disagree; the norm that follows cancels any such scale up to its epsilon. Here no form
  has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, readout_dtype, recurrent_dtype, register
from holdall.ops import linear_attention, replay
from holdall.ops.rotary import rotate, standard_frequencies
from holdall.settings import NonNegativeFloat, PositiveInt, Range


class RetNetState(NamedTuple):
    """The decayed sum of k v^T, and how many tokens a row has read."""

    s_BHKV: Tensor
    seen_B: Tensor


@register(
    "retnet",
    family="linear attention",
    paper=Paper(
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        authors="Sun et al.",
        year=2023,
        arxiv="2307.08621",
    ),
    state="rD²/H + 1",
    training="ND²(1 + r/H)",
    inference="D²(1 + r/H)",
)
@dataclass(frozen=True, kw_only=True)
class RetNetConfig(MixerConfig):
    """Multi-scale retention: linear attention with a fixed decay per head."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    value_ratio: PositiveInt = 2
    """Value dimensions per model dimension, r."""
    eps: NonNegativeFloat = 1e-6
    """Epsilon of the RMS norm of each head's output."""
    angles: Literal["inclusive", "standard"] = "inclusive"
    """Angles of the rotary positions: "inclusive" for 10000^-linspace(0, 1, K / 2), whose last is 1e-4;
    "standard" for the usual 10000^(-2i / K), as flash-linear-attention has them.
    """
    scaled: bool = True
    """Whether o is divided by sqrt(sum_{j<=n} gamma^j) before its norm, which undoes it but for its epsilon;
    flash-linear-attention does not divide.
    """
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""
    replay: Annotated[int, Range(least=1, zero="no ring")] = 0
    """Tokens between two writes of the state, L; 0 writes it with every token. What the last 2 L tokens add
    is then carried in a ring, and the last L tokens can be rolled back: docs/replay.md.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"heads": 4, "chunk": 16, "replay": 3},
        {"heads": 4, "value_ratio": 1, "chunk": 16},
        {"angles": "standard", "scaled": False},
    )

    def validate(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of twice the heads {self.heads}")

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        sizes = self.width // self.heads, self.value_ratio * self.width // self.heads
        return (
            super().kernel_refusal(device, dtype)
            or linear_attention.kernel_refusal(*sizes, dtype)
            or (replay.kernel_refusal(sizes[0]) if self.replay else "")
        )

    def build(self) -> RetNet:
        return RetNet(self)


class RetNet(Mixer):
    config: RetNetConfig
    own_init = True

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.state_type = replay.ReplayState if config.replay else RetNetState  # type: ignore[misc]
        self.rollback_limit = config.replay
        width, values = config.width, config.value_ratio * config.width
        self.sizes = [width, width, values, values]
        self.qkvg = nn.Linear(width, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(values, width, bias=False)
        with torch.no_grad():
            for rows in self.qkvg.weight.split(self.sizes):
                nn.init.xavier_uniform_(rows, gain=2**-2.5)
            nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        config, new = self.config, x_BTD.shape[1]
        fresh = state is None
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v, gate_BTE = self.qkvg(x_BTD).split(self.sizes, dim=-1)
        v = v.to(readout_dtype(self.form, x_BTD.dtype))
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in (q, k, v))
        position_BT = state.seen_B[:, None] + torch.arange(new, device=x_BTD.device)
        dtype, device = recurrent_dtype(x_BTD.dtype), x_BTD.device
        frequency_F = self._frequencies(k)
        log_gamma_H = torch.log1p(-(2.0 ** (-5 - torch.arange(config.heads, dtype=dtype, device=device))))
        q = rotate(q, position_BT, frequency_F, interleaved=True)
        k = rotate(k, position_BT, frequency_F, interleaved=True) * k.shape[-1] ** -0.5
        log_decay_BTH = log_gamma_H.expand(x_BTD.shape[0], new, -1)
        after: State | None
        if config.replay:
            o_BTHV, after = replay.replay_attention(
                q, k, v, state, log_decay_BTH, replay=config.replay, chunk=config.chunk,
                fresh=fresh, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
        else:
            o_BTHV, s_BHKV, _ = linear_attention.linear_attention(
                q, k, v, None if fresh else state.s_BHKV, None, log_decay_BTH,
                chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
            )  # fmt: skip
            after = None if s_BHKV is None or not want_state else RetNetState(s_BHKV, state.seen_B + new)
        if config.scaled:
            # sum of gamma^j over j = 0 .. n
            total_BTH = torch.expm1((position_BT[..., None] + 1) * log_gamma_H) / torch.expm1(log_gamma_H)
            o_BTHV = o_BTHV * total_BTH.rsqrt()[..., None].to(o_BTHV.dtype)
        o_BTHV = F.rms_norm(o_BTHV, o_BTHV.shape[-1:], eps=config.eps).to(x_BTD.dtype)
        return self.out_proj(F.silu(gate_BTE) * o_BTHV.flatten(2)), after

    def _frequencies(self, k_BTHK: Tensor) -> Tensor:
        """Radians per token of each pair of a head's dimensions, (K / 2,)."""
        size = k_BTHK.shape[-1]
        if self.config.angles == "standard":
            return standard_frequencies(size, 10000.0, k_BTHK)
        exponent_F = torch.linspace(0, 1, size // 2, dtype=torch.float64, device=k_BTHK.device)
        return 10000.0**-exponent_F

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        config, key_dim = self.config, self.config.width // self.config.heads
        sizes = config.heads, key_dim, config.value_ratio * key_dim
        if config.replay:
            return replay.empty_replay(batch, *sizes, config.replay, decays=1, dtype=dtype, device=device)
        s_BHKV = torch.zeros(batch, *sizes, dtype=recurrent_dtype(dtype), device=device)
        return RetNetState(s_BHKV, torch.zeros(batch, dtype=torch.long, device=device))

    def state_elements(self, context_len: int) -> int:
        if self.config.replay:
            return replay.elements_with_ring(self)
        return self.config.value_ratio * self.config.width**2 // self.config.heads + 1

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return replay.take_back(state, count_B, self.owner, inplace=inplace)
