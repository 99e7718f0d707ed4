"""A mixer of your own in one file: linear attention that forgets, head by head, when a token says so.

    S_t = a_t S_{t-1} + k_t v_t^T        a_t = sigmoid(w_a . x_t + b_a), one number per head
    y_t = W_o S_t^T q_t                  q_t, k_t of unit length, v_t = W_v x_t

Letters: x_t and y_t input and output of token t; q_t, k_t, v_t query, key and value of a head; a_t how much
of the past it keeps; S_t its state; w_a, b_a, W_v, W_o learned.

    python examples/own_mixer.py                              what this page shows
    holdall laws examples/own_mixer.py                        every law, in words
    holdall zoo fading-sum --load examples/own_mixer.py       its options and its state
    holdall frontier quick --load examples/own_mixer.py       where it lands among the others

It prints that reading in pieces gives what reading at once gives, that the state does not grow, and how long
each head remembers before anything was learned.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdall
from holdall import states
from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.linear_attention import linear_attention
from holdall.settings import PositiveInt


class FadingState(NamedTuple):
    """The fading sum of keys times values."""

    s_BHKV: Tensor


@register(
    "fading-sum",
    paper=Paper(title="An example", authors="The Holdall authors", year=2026),
    state="D²/H",
    training="ND²(1 + 1/H)",
    inference="D²(1 + 1/H)",
)
@dataclass(frozen=True, kw_only=True)
class FadingConfig(MixerConfig):
    """Linear attention with one gate per head that says how much of the past is kept."""

    heads: PositiveInt = 4
    """Number of heads, H."""

    variants = ({}, {"heads": 1})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be split into {self.heads} heads")

    def build(self) -> "FadingSum":
        return FadingSum(self)


class FadingSum(Mixer):
    state_type = FadingState

    def __init__(self, config: FadingConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.keep = nn.Linear(config.width, config.heads, bias=False)
        # heads start with memories of 4 to 256 tokens, so that some forget and some do not
        memory_H = torch.logspace(2, 8, config.heads, base=2)
        self.keep_bias_H = nn.Parameter(torch.logit(1 - 1 / memory_H))
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        state: FadingState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, FadingState | None]:
        q, k, v = (u.unflatten(-1, (self.config.heads, -1)) for u in self.qkv(x_BTD).chunk(3, dim=-1))
        log_keep_BTH = F.logsigmoid(self.keep(x_BTD) + self.keep_bias_H)
        y_BTHV, s_BHKV, _ = linear_attention(
            F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, state and state.s_BHKV, None, log_keep_BTH,
            inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        return self.out_proj(y_BTHV.flatten(2)), None if s_BHKV is None else FadingState(s_BHKV)

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> FadingState:
        heads, size = self.config.heads, self.config.width // self.config.heads
        sizes = (batch, heads, size, size)
        return FadingState(torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device))

    def state_elements(self, context_len: int) -> int:
        return self.config.width**2 // self.config.heads


def main() -> None:
    torch.manual_seed(0)
    mixer = holdall.build("fading-sum", width=64)
    x_BTD = torch.randn(1, 1000, 64)

    whole, _ = mixer(x_BTD)
    state, pieces = None, []
    for piece in x_BTD.split([700, 299, 1], dim=1):
        y_BTD, state = mixer(piece, state)
        pieces.append(y_BTD)
        print(f"{piece.shape[1]:4} more tokens, then {states.bytes_per_row(state):,} bytes of state")
    print(f"in pieces or at once: outputs differ by {(torch.cat(pieces, dim=1) - whole).abs().max():.0e}")

    print("memory of each head in tokens:", *(f"{1 / (1 - a):.0f}" for a in mixer.keep_bias_H.sigmoid()))


if __name__ == "__main__":
    main()
