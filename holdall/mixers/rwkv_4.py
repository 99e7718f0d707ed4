"""RWKV-4's time mixing: a mean of all values, weighted by key and age, gated by a receptance.

    z_t = m_z x_t + (1 - m_z) x_{t-1}   for each of z = k, v, r      the token shift; x_{-1} = 0
    k, v, r = W_k k_t, W_v v_t, sigmoid(W_r r_t)        w = -exp(time_decay)        u = time_first
    y_t = W_o [ r (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t)
                / (sum_{i<t} e^{(t-1-i) w + k_i}     + e^{u + k_t}) ]

Letters: x_t and y_t input and output of token t; m_z how much of z is of the token itself; k, v, r keys,
values and receptances; e Euler's number; i earlier tokens; w the log decay and u the bonus of a channel; W_*
learned maps.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, arXiv 2305.13048. Channel mixing is an
MLP, not part of the mixer. The published initialisation depends on the layer (options `layer` and `layers`),
and sets W_k, W_r and W_o to zero: outputs are zero until W_o, which alone has a gradient at the start, has
changed.
Weights map one to one onto RWKV-LM's RWKV_TimeMix: key, value, receptance, output (`out_proj`), time_decay,
time_first; time_mix_k, time_mix_v and time_mix_r are the rows of `time_mix_ZD`.
Deviations:
- the state has two elements per channel, the official one three. Those are p, q and o, where p e^o and q e^o
  are the two sums over the past; here they are the quotient m = p / q and the log l = o + log q.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.diagonal_scan import CHUNK
from holdall.ops.wkv import NOTHING, wkv, wkv_loop
from holdall.settings import NonNegativeInt, PositiveInt


class RWKV4State(NamedTuple):
    """The last token, the weighted mean of all values, and the log of the weight of all of them."""

    last_BD: Tensor
    m_BD: Tensor
    l_BD: Tensor


@register(
    "rwkv-4",
    family="gated recurrence",
    paper=Paper(
        title="RWKV: Reinventing RNNs for the Transformer Era",
        authors="Peng et al.",
        year=2023,
        arxiv="2305.13048",
    ),
    state="3D",
    training="ND²",
    inference="D²",
)
@dataclass(frozen=True, kw_only=True)
class RWKV4Config(MixerConfig):
    """RWKV-4's time mixing, a mean of all values weighted by key and age."""

    layer: NonNegativeInt = 0
    """Index of this layer in the model, from 0; the published initialisation depends on it."""
    layers: PositiveInt = 1
    """Number of layers in the model, for the initialisation alone."""
    chunk: PositiveInt = CHUNK
    """Tokens per chunk of the scan: chunks run in parallel, the tokens of a chunk one after another."""

    variants = ({}, {"layer": 1, "layers": 3, "chunk": 16})

    def validate(self) -> None:
        if not self.layer < self.layers:
            raise ValueError(f"layer {self.layer} is none of {self.layers}, counted from 0")

    def build(self) -> RWKV4:
        return RWKV4(self)


def ramp(size: int) -> Tensor:
    """From 0 to 1 over the channels, both included."""
    return torch.arange(size) / max(size - 1, 1)


def zigzag(size: int) -> Tensor:
    """0, 1, -1, 0, 1, -1, ... over the channels."""
    return (torch.arange(size) + 1) % 3 - 1.0


def depths(layer: int, layers: int) -> tuple[float, float]:
    """How deep a layer is, from 0 to 1 (included), and from 1 down to nearly 0."""
    return layer / max(layers - 1, 1), 1 - layer / layers


def mix_start(width: int, power: float) -> Tensor:
    """The share of a token beside the one before it: none in the first channel, nearly all in the last."""
    return (torch.arange(width) / width) ** power


def shift(x_BTD: Tensor, last_BD: Tensor) -> Tensor:
    """The token before each; a copy of the last one is all that a state needs for it."""
    return torch.cat((last_BD[:, None], x_BTD[:, :-1]), dim=1)


class RWKV4(Mixer):
    config: RWKV4Config
    state_type = RWKV4State
    own_init = True

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__(config)
        width = config.width
        deep, shallow = depths(config.layer, config.layers)
        k_D, r_D = mix_start(width, shallow), mix_start(width, 0.5 * shallow)
        self.time_mix_ZD = nn.Parameter(torch.stack((k_D, k_D + 0.3 * deep, r_D)))
        self.time_decay = nn.Parameter(-5 + 8 * ramp(width) ** (0.7 + 1.3 * deep))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag(width))
        self.key, self.value, self.receptance, self.out_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        for layer in (self.key, self.receptance, self.out_proj):
            nn.init.zeros_(layer.weight)
        nn.init.orthogonal_(self.value.weight)
        self.wkv = wkv_loop if self.form == "loop" else functools.partial(wkv, chunk=config.chunk)

    def forward(
        self,
        x_BTD: Tensor,
        state: RWKV4State | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, RWKV4State | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        k_BTD, v_BTD, r_BTD = torch.lerp(shift(x_BTD, state.last_BD), x_BTD, self.time_mix_ZD[:, None, None])
        dtype = state.m_BD.dtype
        y_BTD, m_BD, l_BD = self.wkv(
            self.key(k_BTD), self.value(v_BTD), -self.time_decay.to(dtype).exp(), self.time_first, *state[1:]
        )
        y_BTD = self.out_proj(self.receptance(r_BTD).sigmoid() * y_BTD)
        return y_BTD, RWKV4State(x_BTD[:, -1].clone(), m_BD, l_BD) if want_state else None

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> RWKV4State:
        size, wide = (batch, self.config.width), recurrent_dtype(dtype)
        return RWKV4State(
            torch.zeros(size, dtype=dtype, device=device),
            torch.zeros(size, dtype=wide, device=device),
            torch.full(size, NOTHING, dtype=wide, device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return 3 * self.config.width
