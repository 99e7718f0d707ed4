"""RWKV-7 "Goose": a delta rule with a decay per key channel and a separate removal key.

    z_t = x_t + m_z (x_{t-1} - x_t)  for each of z = r, w, k, v, a, g           the token shift; x_{-1} = 0
    r, k', v = W_r r_t, W_k k_t, W_v v_t        log w = -e^(-1/2) sigmoid(w0 + tanh(w_t w1) w2)
    a = sigmoid(a0 + a_t a1 a2)     g = sigmoid(g_t g1) g2      kk = k_k k' / |k_k k'| per head
    k = k' (1 + (a - 1) k_a)    v = v + (v_first - v) sigmoid(v0 + v_t v1 v2)  from the second layer on
    S_t = diag(w) S_{t-1} - (a kk) (kk^T S_{t-1}) + k v^T       o_t = S_t^T r
    y_t = W_o [ g (GroupNorm_head(o_t) + (sum_head r k r_k) v) ]

Letters: x_t and y_t input and output of token t; m_z how much of z is of the token before it; r, k, v, g
receptances (queries), keys, values and gates; v_first the first layer's values; w the decay; a the strength
of removal and kk its key; w0, a0, v0 biases; w1, w2, a1, a2, v1, v2, g1, g2 low-rank maps; k_k, k_a, r_k
learned vectors; S a head's state; o what is read out of it; e Euler's number; W_* learned maps.

Peng et al., "RWKV-7 "Goose" with Expressive Dynamic State Evolution", 2025, arXiv 2503.14456. Channel mixing
is an MLP, not part of the mixer. The published initialisation depends on the layer (options `layer` and
`layers`), and sets W_o to zero: outputs are zero until W_o, which alone has a gradient at the start, has
changed.
The value residual v0 to v2 (option `value_rank`) reads v_first, which a model of several such layers hands
down from the first of them within one call. In the first, or in a layer that stands alone, v_first is v.
Weights map one to one onto RWKV-LM's RWKV_Tmix_x070: receptance, key, value, output (`out_proj`), w0 to w2,
a0 to a2, v0 to v2, g1, g2, k_k, k_a, r_k; x_r, x_w, x_k, x_v, x_a, x_g are the rows of `mix_ZD`, ln_x is
`norm_weight_D`, `norm_bias_D`. The state is (key, value), the official one (value, key).
Deviations:
- by default there is no value residual, so every layer is like the official first one;
- the epsilon of GroupNorm is 1e-5 times the head size (option `eps`), which is the official 64e-5 at its head
  size of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.mixers.rwkv_4 import depths, mix_start, ramp, shift
from holdall.ops.delta_rule import CHUNK, generalised_delta_rule, kernel_refusal
from holdall.ops.linear import is_plain
from holdall.ops.rwkv_7 import LEAST_LOG_DECAY, beside, finish, prepare, toward
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range


class RWKV7State(NamedTuple):
    """The last token, and what is held under the keys."""

    last_BD: Tensor
    s_BHKV: Tensor


@register(
    "rwkv-7",
    family="delta rule",
    paper=Paper(
        title='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        authors="Peng et al.",
        year=2025,
        arxiv="2503.14456",
    ),
    state="D²/H + D",
    training="ND(D + R)",
    inference="D(D + R)",
)
@dataclass(frozen=True, kw_only=True)
class RWKV7Config(MixerConfig):
    """RWKV-7's time mixing, a delta rule whose removal key differs from the key that is written."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    decay_rank: NonNegativeInt = 0
    """Rank of the projection that gives the decays, R; 0 for the published 2.5 sqrt(width), rounded to a
    multiple of 32.
    """
    a_rank: NonNegativeInt = 0
    """Rank of the projection that gives the removal strength a; 0 for the published 2.5 sqrt(width), rounded
    to a multiple of 32.
    """
    gate_rank: NonNegativeInt = 0
    """Rank of the projection that gives the output gate; 0 for the published 5 sqrt(width), rounded to a
    multiple of 32.
    """
    value_rank: NonNegativeInt = 0
    """Rank of the projection that says how much of a value is the first layer's; 0 for none of it."""
    eps: PositiveFloat = 1e-5
    """Epsilon of the norm of each head's outputs, per channel of a head: it is added times the head size."""
    key_eps: NonNegativeFloat = 0.0
    """What is added to the squared length of a removal key before it is divided by that length; 0 as
    published, 1e-6 in flash-linear-attention's fused kernel.
    """
    layer: NonNegativeInt = 0
    """Index of this layer in the model, from 0; the published initialisation depends on it."""
    layers: PositiveInt = 1
    """Number of layers in the model, for the initialisation alone."""
    chunk: Annotated[int, Range(least=1, most=16)] = CHUNK
    """Tokens per chunk, at most 16, whose updates of the state are solved together as one triangular system.
    """

    forms = ("loop", "parallel", "kernel")
    variants = (
        {},
        {"heads": 1, "decay_rank": 3, "a_rank": 4, "gate_rank": 5, "layer": 1, "layers": 3, "chunk": 8},
        {"value_rank": 3, "eps": 1e-3, "key_eps": 1e-2, "layer": 2, "layers": 3},
    )

    def validate(self) -> None:
        if self.width % self.heads or self.width == self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}, by 2 or more")
        if not self.layer < self.layers:
            raise ValueError(f"layer {self.layer} is none of {self.layers}, counted from 0")

    @property
    def ranks(self) -> tuple[int, int, int]:
        small, large = (max(32, 32 * round(factor * self.width**0.5 / 32)) for factor in (2.5, 5.0))
        return self.decay_rank or small, self.a_rank or small, self.gate_rank or large

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        if refusal := super().kernel_refusal(device, dtype):
            return refusal
        if dtype == torch.float16:
            return "it reads the state out in fp16, which overflows before the norm: take bfloat16"
        return kernel_refusal(self.width // self.heads)

    def build(self) -> RWKV7:
        return RWKV7(self)


def low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Zeros down, a scaled orthogonal matrix up: at the start, what comes out is the same for every token."""
    up_RD = nn.init.orthogonal_(torch.empty(rank, width), gain=0.1 * max(1.0, rank / width) ** 0.5)
    return nn.Parameter(torch.zeros(width, rank)), nn.Parameter(up_RD)


class RWKV7(Mixer):
    config: RWKV7Config
    state_type = RWKV7State
    own_init = True

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.reads_shared = config.value_rank > 0
        width, heads = config.width, config.heads
        deep, shallow = depths(config.layer, config.layers)
        powers = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        self.mix_ZD = nn.Parameter(torch.stack([1 - mix_start(width, p * shallow) for p in powers]))
        centred_D, across_D = ramp(width) - 0.5, (2 * ramp(width // heads) - 1).repeat(heads)
        zigzag_D = across_D * across_D.abs()
        self.w0 = nn.Parameter(-5.5 + 6 * ramp(width) ** (1 + deep**0.3) + 2.5 * zigzag_D)
        self.a0 = nn.Parameter(-0.19 + 0.3 * zigzag_D + 0.4 * centred_D)
        (self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2) = (
            low_rank(width, rank) for rank in config.ranks
        )
        self.k_k = nn.Parameter(0.71 - 0.1 * centred_D)
        self.k_a = nn.Parameter(torch.full((width,), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, width // heads), -0.04))
        self.receptance, self.key, self.value, self.out_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        for layer, gain in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5), (self.out_proj, 0)):
            nn.init.uniform_(layer.weight, -gain * width**-0.5, gain * width**-0.5)
        self.norm_weight_D = nn.Parameter(torch.full((width,), ((config.layer + 1) / config.layers) ** 0.7))
        self.norm_bias_D = nn.Parameter(torch.zeros(width))
        if config.value_rank:
            self.v0 = nn.Parameter(0.73 - 0.4 * centred_D)
            self.v1, self.v2 = low_rank(width, config.value_rank)

    def forward(
        self,
        x_BTD: Tensor,
        state: RWKV7State | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
        shared_BTD: Tensor | None = None,
    ) -> tuple[Tensor, RWKV7State | None]:
        """As `Mixer.forward`; `shared_BTD` is the first layer's values, v_first."""
        if shared_BTD is not None and not self.config.value_rank:
            raise ValueError(
                "rwkv-7 mixes its values with the first layer's if value_rank is above 0, and it is 0"
            )
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        # one product for all maps makes its weights first, which a few tokens do not pay for
        at_once = self.form == "kernel" and x_BTD.shape[:2].numel() >= 4 * self.config.width
        at_once = at_once and all(map(is_plain, (self.receptance, self.key, self.value)))
        rkv, w, a, g, *mix = (self._mapped_at_once if at_once else self._mapped)(x_BTD, state.last_BD)
        w, a, g = w.tanh() @ self.w2, a @ self.a2, g.sigmoid() @ self.g2
        r, log_w, k, v, a, removal = prepare(
            rkv, w, a, self.w0, self.a0, self.k_k, self.k_a, self.config.heads, self.config.key_eps,
            form=self.form,
        )  # fmt: skip
        if mix:
            first_BTD = v.flatten(2) if shared_BTD is None else shared_BTD  # its own are the first
            v = toward(v, first_BTD, mix[0] @ self.v2, self.v0)
        o_BTHV, s_BHKV = generalised_delta_rule(
            r, k, v, a, removal, state.s_BHKV, log_w,
            least_log_decay=LEAST_LOG_DECAY, chunk=self.config.chunk, inplace=inplace, form=self.form,
        )  # fmt: skip
        eps = self.config.eps * o_BTHV.shape[-1]
        y_BTD = finish(
            o_BTHV, r, k, v, g, self.norm_weight_D, self.norm_bias_D, self.r_k, eps, form=self.form
        )
        after = RWKV7State(x_BTD[:, -1].clone(), s_BHKV) if want_state else None
        return self.out_proj(y_BTD), after

    def shared(self, x_BTD: Tensor, state: RWKV7State | None = None) -> Tensor:
        """Its values, before they are mixed with any: the v_first of later layers."""
        if state is None:
            last_BD = x_BTD.new_zeros(x_BTD.shape[0], x_BTD.shape[2])
        else:
            last_BD = state.last_BD
        return self.value(torch.lerp(x_BTD, shift(x_BTD, last_BD), self.mix_ZD[3]))

    def _mapped(self, x_BTD: Tensor, last_BD: Tensor) -> tuple[Tensor, ...]:
        """r, k' and v side by side, the low ranks of decay, removal and gate, and of a value residual."""
        before_BTD = shift(x_BTD, last_BD)
        r, w, k, v, a, g = torch.lerp(x_BTD, before_BTD, self.mix_ZD[:, None, None]).unbind(0)
        rkv = torch.cat((self.receptance(r), self.key(k), self.value(v)), dim=-1)
        return rkv, w @ self.w1, a @ self.a1, g @ self.g1, *([v @ self.v1] if self.config.value_rank else [])

    def _mapped_at_once(self, x_BTD: Tensor, last_BD: Tensor) -> tuple[Tensor, ...]:
        """The same by one product: W (x + m (x' - x)) = [W (1 - m) | W m] [x | x']."""
        r, w, k, v, a, g = self.mix_ZD.unbind(0)
        maps = [
            (self.receptance.weight, r), (self.key.weight, k), (self.value.weight, v),
            (self.w1.T, w), (self.a1.T, a), (self.g1.T, g),
        ]  # fmt: skip
        if self.config.value_rank:
            maps.append((self.v1.T, v))
        # only what is multiplied is rounded
        weight_ED = torch.cat([weight.float() for weight, _ in maps])
        mix_ED = torch.cat([mix_D.float().expand_as(weight) for weight, mix_D in maps])
        both = torch.cat((weight_ED * (1 - mix_ED), weight_ED * mix_ED), dim=1).to(x_BTD.dtype)
        z_BTE = F.linear(beside(x_BTD, last_BD, form=self.form), both)
        return z_BTE.split((3 * self.config.width, *(len(weight) for weight, _ in maps[3:])), dim=-1)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> RWKV7State:
        width, heads = self.config.width, self.config.heads
        size = (batch, heads, width // heads, width // heads)
        return RWKV7State(
            torch.zeros(batch, width, dtype=dtype, device=device),
            torch.zeros(size, dtype=recurrent_dtype(dtype), device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return self.config.width**2 // self.config.heads + self.config.width
