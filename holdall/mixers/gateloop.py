"""GateLoop: linear attention with a data-dependent complex decay per head.

    q, k, v = W_q x, W_k x, W_v x        c_t = W_a x_t + b, complex        a_t = sigmoid(|c_t|) c_t / |c_t|
    S_t = a_t S_{t-1} + k_t v_t^T        o_t = q_t^T Re(S_t)
    y = W_o (o * silu(W_g x))

Letters: x_t and y_t input and output of token t; q, k, v queries, keys and values of each of H heads; K and V
their dimensions; c_t a complex number and a_t the decay made of it; S a head's state; o what is read out of
it; W_* learned maps; b a bias.

Per head a_t is one complex number and S a complex (K, V) matrix; with one channel per head this is the
diagonal recurrence. Katsch, "GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling", 2023,
arXiv 2311.01927.
Weights map onto the GateLoopedAttention of the package gateloop-transformer: to_qkv, then to_gates.0, are the
rows of `qkvg`; to_a.0 is `transition`, whose rows 2h and 2h + 1 give the real and imaginary part for head h;
to_out is `out_proj`. (The paper's own repository has a real-valued recurrence only.)
Deviations:
- the package scales the gradient of c by 0.9, which acts as a learning rate; here it is not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.complex_decay import complex_decay, complex_decay_loop
from holdall.ops.linear import wide
from holdall.settings import PositiveInt


class GateLoopState(NamedTuple):
    """The decayed and turned sum of k v^T; the last dimension is the real and the imaginary part."""

    s_BHKV2: Tensor


@register(
    "gateloop",
    family="linear attention",
    paper=Paper(
        title="GateLoop: Fully Data-Controlled Linear Recurrence for Sequence Modeling",
        authors="Katsch",
        year=2023,
        arxiv="2311.01927",
    ),
    state="2D²/H",
    training="ND²(1 + 1/H)",
    inference="D²(1 + 1/H)",
)
@dataclass(frozen=True, kw_only=True)
class GateLoopConfig(MixerConfig):
    """Linear attention with a data-dependent complex decay per head."""

    heads: PositiveInt = 4
    """Number of heads, each with one complex gate per token and a state of (width / heads)² complex numbers.
    """
    chunk: PositiveInt = 32
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""

    variants = ({"chunk": 16}, {"heads": 16})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build(self) -> GateLoop:
        return GateLoop(self)


class GateLoop(Mixer):
    config: GateLoopConfig
    state_type = GateLoopState
    own_init = True

    def __init__(self, config: GateLoopConfig) -> None:
        super().__init__(config)
        self.qkvg = nn.Linear(config.width, 4 * config.width, bias=False)
        self.transition = nn.Linear(config.width, 2 * config.heads)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        state: GateLoopState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, GateLoopState | None]:
        config, dtype = self.config, recurrent_dtype(x_BTD.dtype)
        q, k, v, gate_BTE = self.qkvg(x_BTD).to(dtype).chunk(4, dim=-1)
        q, k, v = (u.unflatten(-1, (config.heads, -1)) for u in (q, k, v))
        # turns and decays add up over many tokens: not in bf16
        c_BTE = wide(self.transition, x_BTD, dtype)
        log_decay_BTH, turn_BTH2 = _gates(c_BTE.unflatten(-1, (config.heads, 2)))
        s_BHKV2: Tensor | None
        if self.form == "loop":
            start = state or self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
            o_BTHV, s_BHKV2 = complex_decay_loop(q, k, v, start.s_BHKV2, log_decay_BTH, turn_BTH2)
        else:
            o_BTHV, s_BHKV2 = complex_decay(
                q, k, v, None if state is None else state.s_BHKV2, log_decay_BTH, turn_BTH2,
                chunk=config.chunk, want_state=want_state,
            )  # fmt: skip
        y_BTE = (o_BTHV.flatten(2) * F.silu(gate_BTE)).to(x_BTD.dtype)
        after = None if s_BHKV2 is None or not want_state else GateLoopState(s_BHKV2)
        return self.out_proj(y_BTE), after

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> GateLoopState:
        each = self.config.width // self.config.heads
        sizes = batch, self.config.heads, each, each, 2
        return GateLoopState(torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.width**2 // self.config.heads


def _gates(c_BTH2: Tensor) -> tuple[Tensor, Tensor]:
    """log sigmoid(|c|) and c / |c|; where c is zero its direction is 1, and no gradient flows."""
    re, im = c_BTH2.unbind(-1)
    nothing = (re == 0) & (im == 0)
    re = torch.where(nothing, 1.0, re)
    length = torch.hypot(re, im)
    turn_BTH2 = torch.stack((re / length, im / length), dim=-1)
    return F.logsigmoid(length.masked_fill(nothing, 0.0)), turn_BTH2
