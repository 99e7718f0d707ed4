"""RWKV-4's channel mixing: an MLP that sees the token before, too, behind a gate.

    z_t = m_z x_t + (1 - m_z) x_{t-1}   for each of z = k, r      the token shift; x_{-1} = 0
    y_t = sigmoid(W_r r_t) * W_v relu(W_k k_t)^2

Letters: x_t and y_t input and output of token t; z either of k, which the MLP reads, and r, which its gate
reads; m_z the share of the present token in it; W_* learned maps.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, arXiv 2305.13048. A model of RWKV has it
after each time mixing, behind a norm and beside a residual of its own. Here it is a layer, since the token
before is a state; it remembers nothing else. Without the gate it is RWKV-7's (arXiv 2503.14456). The
published initialisation depends on the layer (options `layer` and `layers`), and sets W_v and W_r to zero.
Weights map one to one onto RWKV-LM's RWKV_ChannelMix: key, value and receptance; time_mix_k and time_mix_r
are the rows of `time_mix_ZD`.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, register
from holdall.mixers.rwkv_4 import depths, mix_start, shift
from holdall.settings import NonNegativeInt, PositiveInt


class ChannelMixState(NamedTuple):
    """The last token."""

    last_BD: Tensor


@register(
    "rwkv-channel-mix",
    family="gated recurrence",
    paper=Paper(
        title="RWKV: Reinventing RNNs for the Transformer Era",
        authors="Peng et al.",
        year=2023,
        arxiv="2305.13048",
    ),
    state="D",
    training="ND(D + I)",
    inference="D(D + I)",
)
@dataclass(frozen=True, kw_only=True)
class RWKVChannelMixConfig(MixerConfig):
    """RWKV's channel mixing, an MLP of a token and the one before it."""

    hidden: NonNegativeInt = 0
    """Hidden width, I; 0 for four times the model's."""
    gate: bool = True
    """Whether outputs are multiplied by the receptance, which RWKV-7 does without."""
    layer: NonNegativeInt = 0
    """Index of this layer in the model, from 0, a time mixing and the channel mixing after it counted as one;
    the published initialisation depends on it."""
    layers: PositiveInt = 1
    """Number of such layers in the model, for the initialisation alone."""

    variants = ({}, {"hidden": 12, "gate": False, "layer": 1, "layers": 3})

    def validate(self) -> None:
        if not self.layer < self.layers:
            raise ValueError(f"layer {self.layer} is none of {self.layers}, counted from 0")

    def build(self) -> RWKVChannelMix:
        return RWKVChannelMix(self)


class RWKVChannelMix(Mixer):
    config: RWKVChannelMixConfig
    state_type = ChannelMixState
    own_init = True

    def __init__(self, config: RWKVChannelMixConfig) -> None:
        super().__init__(config)
        width, hidden = config.width, config.hidden or 4 * config.width
        _, shallow = depths(config.layer, config.layers)
        start_D = mix_start(width, shallow)
        self.time_mix_ZD = nn.Parameter(torch.stack([start_D] * (1 + config.gate)))
        self.key = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(hidden, width, bias=False)
        self.receptance = nn.Linear(width, width, bias=False) if config.gate else None
        nn.init.orthogonal_(self.key.weight, max(1.0, hidden / width) ** 0.5)
        for silent in filter(None, (self.value, self.receptance)):
            nn.init.zeros_(silent.weight)

    def forward(
        self,
        x_BTD: Tensor,
        state: ChannelMixState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, ChannelMixState | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        if self.form == "loop":
            tokens = [state.last_BD, *x_BTD.unbind(1)]
            y_BTD = torch.stack([self._mixed(*pair) for pair in pairwise(tokens)], dim=1)
        else:
            y_BTD = self._mixed(shift(x_BTD, state.last_BD), x_BTD)
        return y_BTD, ChannelMixState(x_BTD[:, -1].clone()) if want_state else None

    def _mixed(self, before: Tensor, x: Tensor) -> Tensor:
        """Of tokens and those before them."""
        mix_Z = (mix_D.expand_as(x) for mix_D in self.time_mix_ZD)
        k, *r = (torch.lerp(before, x, mix) for mix in mix_Z)
        y = self.value(F.relu(self.key(k)).square())
        return y if self.receptance is None else self.receptance(r[0]).sigmoid() * y

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> ChannelMixState:
        return ChannelMixState(torch.zeros(batch, self.config.width, dtype=dtype, device=device))

    def state_elements(self, context_len: int) -> int:
        return self.config.width
