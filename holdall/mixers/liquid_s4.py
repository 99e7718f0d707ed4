"""Liquid-S4: S4 that also reads products of neighbouring inputs, as if inputs changed the transition.

A liquid state space is x_k = (A + B u_k) x_{k-1} + B u_k, with S4's discretised A and B and the product B x
mode by mode. Unrolled, it is S4 plus one term for every product of several inputs. With its liquid kernel
(C A^l B^p)_l, the paper keeps those of p neighbours, for all p up to a degree P:

    s_p,k = u_k u_{k-1} ... u_{k-p+1}      B^p mode by mode
    kb      y_k = sum_l C A^l (B u_{k-l} + sum_{p=2}^P B^p s_p,k-l) + D u_k
    pb      y_k = sum_l C A^l B u_{k-l} + sum_{p=2}^P C B^p s_p,k + D u_k      the kernel without A: C B^p
    out = a * sigmoid(g)      [a | g] = W_out GELU(y) + bias

Letters: u_k and out input and output of token k; x_k the modes of a channel; y_k what is read out of them; l
lags; A, B, C the discretised state space; D a skip; s_p,k products of p inputs; P the largest p; a and g two
halves of a projection; W_out a learned map.

So kb is S4 with more inputs, and pb is S4 plus a polynomial of the last P inputs; in both cases the state is
S4's and these inputs. Hasani, Lechner, Wang, Chahine, Amini, Rus, "Liquid Structural State-Space Models",
2022, arXiv 2209.12951. `kernel` holds S4's parameters, as in holdall.mixers.s4.
Deviations, from the paper's code and not from its equations:
- there the products are added in reversed order of time, so that outputs see the future; here in order;
- its recurrent step omits the products; here all forms have them;
- its kb multiplies spectra on different grids, which is not a convolution; here it is one;
- its B^p is B^(p-1) times the sum of its modes, without the rank-one term; here it is each mode's power, with
  that term;
- as in the code, pb's kernel is C B^p at lag 0 only: at all lags it would sum over all past products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.mixers.s4 import LegS
from holdall.ops import dplr
from holdall.settings import PositiveInt, Range


class LiquidS4State(NamedTuple):
    """The modes of each channel's state space, as (re, im), and the inputs that more products are made of."""

    h_BDN2: Tensor
    past_BPD: Tensor


@register(
    "liquid-s4",
    family="state space",
    paper=Paper(
        title="Liquid Structural State-Space Models",
        authors="Hasani et al.",
        year=2022,
        arxiv="2209.12951",
    ),
    state="D(n + p - 1)",
    training="ND(D + pn) + n³D",
    inference="D(D + pn)",
)
@dataclass(frozen=True, kw_only=True)
class LiquidS4Config(MixerConfig):
    """S4 that also takes in the products of neighbouring inputs."""

    state: PositiveInt = 64
    """Real numbers of state per channel, n: n / 2 complex modes, each standing for a conjugate pair."""
    degree: Annotated[int, Range(least=2)] = 2
    """Largest number of inputs in a product, P."""
    kernel: Literal["pb", "kb"] = "pb"
    """Where products of inputs go: "pb" adds them to the output at once, "kb" adds them to the state."""
    chunk: PositiveInt = dplr.CHUNK
    """Tokens per chunk, a power of two; the state carries the past from one chunk to the next."""

    variants = ({}, {"state": 6, "degree": 3, "kernel": "kb", "chunk": 16})

    def validate(self) -> None:
        if self.state % 2:
            raise ValueError(f"state {self.state} is not an even number: modes come in conjugate pairs")
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk {self.chunk} is not a power of two")

    def build(self) -> LiquidS4:
        return LiquidS4(self)


class LiquidS4(Mixer):
    config: LiquidS4Config
    state_type = LiquidS4State
    own_init = True

    def __init__(self, config: LiquidS4Config) -> None:
        super().__init__(config)
        self.kernel = LegS(config.width, config.state)
        self.D = nn.Parameter(torch.randn(config.width))
        self.out_proj = nn.Linear(config.width, 2 * config.width)

    def forward(
        self,
        x_BTD: Tensor,
        state: LiquidS4State | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, LiquidS4State | None]:
        degree, new, fresh = self.config.degree, x_BTD.shape[1], state is None
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        dtype = recurrent_dtype(x_BTD.dtype)
        seen_BSD = torch.cat((state.past_BPD, x_BTD), dim=1)
        transition, b_DN, c_DN = self.kernel(dtype)
        products, powers = [x_BTD.to(dtype)], [b_DN]
        for before in range(1, degree):
            first = degree - 1 - before
            products.append(products[-1] * seen_BSD[:, first : first + new].to(dtype))
            powers.append(powers[-1] * b_DN)
        x_BTID, b_IDN = torch.stack(products, dim=2), torch.stack(powers)
        inputs = degree if self.config.kernel == "kb" else 1
        y_BTD, h_BDN2 = dplr.dplr_ssm(
            x_BTID[:, :, :inputs], transition, b_IDN[:inputs], c_DN, None if fresh else state.h_BDN2,
            chunk=self.config.chunk, want_state=want_state, form=self.form,
        )  # fmt: skip
        weight_ID = (c_DN * b_IDN[inputs:]).real.sum(-1)
        y_BTD = (y_BTD + (x_BTID[:, :, inputs:] * weight_ID).sum(2) + self.D.to(dtype) * x_BTD).to(
            x_BTD.dtype
        )
        after = None
        # a copy: a view of the last few tokens would keep all of them in memory as long as the state lives
        if h_BDN2 is not None:
            after = LiquidS4State(h_BDN2, seen_BSD[:, new:].clone())
        return F.glu(self.out_proj(F.gelu(y_BTD)), dim=-1), after

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> LiquidS4State:
        config = self.config
        shape = (batch, config.width, config.state // 2, 2)
        return LiquidS4State(
            torch.zeros(shape, dtype=recurrent_dtype(dtype), device=device),
            torch.zeros(batch, config.degree - 1, config.width, dtype=dtype, device=device),
        )

    def state_elements(self, context_len: int) -> int:
        return self.config.width * (self.config.state + self.config.degree - 1)
