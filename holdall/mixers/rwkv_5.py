"""RWKV-5 "Eagle" (version 5.2): linear attention with a decay per key channel, and a bonus for the token.

    z_t = m_z x_t + (1 - m_z) x_{t-1}   for each of z = r, k, v, g     the token shift; x_{-1} = 0
    r, k, v, g = W_r r_t, W_k k_t, W_v v_t, silu(W_g g_t)       w = exp(-exp(time_decay))       u = time_faaaa
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t                   S_t = diag(w) S_{t-1} + k_t v_t^T
    y_t = W_o [ g_t * GroupNorm_H(o_t / 8) ]

Letters: x_t and y_t input and output of token t; m_z how much of z is of the token itself; r, k, v, g
receptances (queries), keys, values and gates; w the decay and u the bonus of a key channel; S a head's state;
o what is read out of it; H heads; W_* learned maps.

Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024, arXiv 2404.05892.
The published initialisation depends on the layer (options `layer` and `layers`), and sets W_o to zero:
outputs are zero until W_o, which has a gradient from the start, has changed.
Weights map one to one onto RWKV-LM's RWKV_Tmix_x052: receptance, key, value, gate, output (`out_proj`), ln_x
(`norm_weight_D`, `norm_bias_D`), time_decay and time_faaaa; time_mix_k, time_mix_v, time_mix_r and time_mix_g
are the rows of `time_mix_ZD`.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, readout_dtype, recurrent_dtype, register
from holdall.mixers.rwkv_4 import depths, mix_start, ramp, shift, zigzag
from holdall.ops.wkv import kernel_refusal, matrix_wkv
from holdall.settings import NonNegativeInt, PositiveInt

NORM_EPS = 64e-5
"""1e-5 beside the variance of o / 8."""


class RWKV5State(NamedTuple):
    """The last token, and the fading sum of k v^T."""

    last_BD: Tensor
    s_BHKV: Tensor


@register(
    "rwkv-5",
    family="linear attention",
    paper=Paper(
        title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
        authors="Peng et al.",
        year=2024,
        arxiv="2404.05892",
    ),
    state="D(K + 1)",
    training="ND(D + K)",
    inference="D(D + K)",
)
@dataclass(frozen=True, kw_only=True)
class RWKV5Config(MixerConfig):
    """RWKV-5 "Eagle": linear attention with a decay per key channel, and a bonus for the current token."""

    head_size: PositiveInt = 64
    """Dimensions of a head's keys and values, K; a narrower model has one head of its width."""
    layer: NonNegativeInt = 0
    """Index of this layer in the model, from 0; the published initialisation depends on it."""
    layers: PositiveInt = 1
    """Number of layers in the model, for the initialisation alone."""
    chunk: PositiveInt = 64
    """Tokens per chunk, a power of two; the state carries the past from one chunk to the next."""

    forms = ("loop", "parallel", "kernel")
    variants = ({}, {"head_size": 4, "layer": 1, "layers": 3, "chunk": 16})

    def validate(self) -> None:
        if self.width % self.key_dim:
            raise ValueError(f"width {self.width} is not a multiple of head_size {self.head_size}")
        if not self.layer < self.layers:
            raise ValueError(f"layer {self.layer} is none of {self.layers}, counted from 0")
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk {self.chunk} is not a power of two")

    @property
    def key_dim(self) -> int:
        return min(self.head_size, self.width)

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or kernel_refusal(self.key_dim)

    def build(self) -> RWKV5:
        return RWKV5(self)


class RWKV5(Mixer):
    config: RWKV5Config
    state_type = RWKV5State
    own_init = True

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__(config)
        width, by_head = config.width, (-1, config.key_dim)
        deep, shallow = depths(config.layer, config.layers)
        k_D, r_D = mix_start(width, shallow), mix_start(width, 0.5 * shallow)
        self.time_mix_ZD = nn.Parameter(torch.stack((k_D, k_D + 0.3 * deep, r_D, r_D)))
        self.time_decay = nn.Parameter((-6 + 5 * ramp(width) ** (0.7 + 1.3 * deep)).unflatten(0, by_head))
        self.time_faaaa = nn.Parameter((deep * (1 - ramp(width)) + 0.1 * zigzag(width)).unflatten(0, by_head))
        self.receptance, self.key, self.value, self.gate, self.out_proj = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        for layer, gain in ((self.receptance, 1), (self.key, 0.1), (self.value, 1), (self.gate, 0.1)):
            nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(self.out_proj.weight)
        self.norm_weight_D = nn.Parameter(torch.full((width,), ((1 + config.layer) / config.layers) ** 0.7))
        self.norm_bias_D = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        x_BTD: Tensor,
        state: RWKV5State | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, RWKV5State | None]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        mixed = torch.lerp(shift(x_BTD, state.last_BD), x_BTD, self.time_mix_ZD[:, None, None])
        layers = (self.key, self.value, self.receptance, self.gate)
        k, v, r, gate_BTD = (layer(z_BTD) for layer, z_BTD in zip(layers, mixed, strict=True))
        k, v, r = (z_BTD.unflatten(-1, (-1, self.config.key_dim)) for z_BTD in (k, v, r))
        v = v.to(readout_dtype(self.form, x_BTD.dtype))
        log_decay_HK = -self.time_decay.to(state.s_BHKV.dtype).exp()
        o_BTHV, s_BHKV = matrix_wkv(
            r, k, v, log_decay_HK, self.time_faaaa, state.s_BHKV,
            chunk=self.config.chunk, inplace=inplace, form=self.form,
        )  # fmt: skip
        o_BTD = F.layer_norm(o_BTHV, o_BTHV.shape[-1:], eps=NORM_EPS).flatten(2).to(x_BTD.dtype)
        o_BTD = torch.addcmul(self.norm_bias_D, o_BTD, self.norm_weight_D)
        y_BTD = self.out_proj(o_BTD * F.silu(gate_BTD))
        return y_BTD, RWKV5State(x_BTD[:, -1].clone(), s_BHKV) if want_state else None

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> RWKV5State:
        width, size = self.config.width, self.config.key_dim
        s_BHKV = torch.zeros(batch, width // size, size, size, dtype=recurrent_dtype(dtype), device=device)
        return RWKV5State(torch.zeros(batch, width, dtype=dtype, device=device), s_BHKV)

    def state_elements(self, context_len: int) -> int:
        return self.config.width * (self.config.key_dim + 1)
