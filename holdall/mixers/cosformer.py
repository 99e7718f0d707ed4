"""cosFormer: linear attention over ReLU features, weighted so that near tokens count more.

    theta_i = pi / 2 * min(i, M) / M, i = 1, 2, ...      phi_i(u) = [relu(u) sin theta_i, relu(u) cos theta_i]
    phi_i(q) . phi_j(k) = relu(q) . relu(k) cos(theta_i - theta_j)
    S_i = S_{i-1} + phi_i(k_i) v_i^T        z_i = z_{i-1} + phi_i(k_i)
    y_i = W_o [ phi_i(q_i)^T S_i / max(phi_i(q_i) . z_i, 1e-6) ]

Letters: x_t and y_t input and output of token t; i and j tokens; q, k, v queries, keys and values of a head;
u either of the first two; phi_i their features; theta_i a position as an angle; S and z the state of a head;
W_o a learned map; M tokens (`max_length`).

Qin et al., "cosFormer: Rethinking Softmax in Attention", 2022, arXiv 2202.08791.
Weights map onto the official CosformerAttention's q_proj, k_proj, v_proj (rows of `qkv`, in that order) and
out_proj.
Deviations:
- in the official code M is the length of the current sequence, so that outputs change when tokens are
  appended and there is no recurrence; here M is `max_length`, fixed, and the two agree on sequences of that
  length;
- beyond M, where cos(theta_i - theta_j), and with it the divisor, would become negative, positions stay at M:
  those tokens have weight 1 for each other, and earlier ones the weight that they have from position M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register
from holdall.ops.linear_attention import linear_attention
from holdall.settings import PositiveInt

FLOOR = 1e-6


class CosformerState(NamedTuple):
    """The sums of phi(k) v^T and of phi(k), and how many tokens a row has read."""

    s_BHFV: Tensor
    z_BHF: Tensor
    seen_B: Tensor


@register(
    "cosformer",
    family="linear attention",
    paper=Paper(
        title="cosFormer: Rethinking Softmax in Attention",
        authors="Qin et al.",
        year=2022,
        arxiv="2202.08791",
    ),
    state="2D²/H + 2D + 1",
    training="ND²(1 + 1/H)",
    inference="D²(1 + 1/H)",
)
@dataclass(frozen=True, kw_only=True)
class CosformerConfig(MixerConfig):
    """Linear attention over ReLU features, reweighted by the cosine of the distance."""

    heads: PositiveInt = 2
    """Number of heads, H."""
    max_length: PositiveInt = 512
    """Distance over which the weight of a token falls from 1 to 0, M; best the length of the training
    sequences.
    """
    chunk: PositiveInt = 128
    """Tokens per chunk: all pairs of tokens within a chunk, and the state from one chunk to the next."""

    variants = ({"chunk": 16}, {"heads": 1, "max_length": 48})

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build(self) -> Cosformer:
        return Cosformer(self)


class Cosformer(Mixer):
    config: CosformerConfig
    state_type = CosformerState

    def __init__(self, config: CosformerConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(
        self,
        x_BTD: Tensor,
        state: CosformerState | None = None,
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, CosformerState | None]:
        config, dtype, fresh, new = self.config, recurrent_dtype(x_BTD.dtype), state is None, x_BTD.shape[1]
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v_BTHV = (u.unflatten(-1, (config.heads, -1)) for u in self.qkv(x_BTD).chunk(3, dim=-1))
        position_BT = state.seen_B[:, None] + torch.arange(1, new + 1, device=x_BTD.device)
        # whole numbers up to there: angles are exact to rounding however long the text is
        share_BT = position_BT.clamp(max=config.max_length).to(dtype) / config.max_length
        theta_BT11 = (math.pi / 2 * share_BT)[..., None, None]
        turn = (theta_BT11.sin(), theta_BT11.cos())
        q_BTHF, k_BTHF = (torch.cat([F.relu(u).to(dtype) * part for part in turn], dim=-1) for u in (q, k))
        s_BHFV: Tensor | None
        sums = (None, None) if fresh else (state.s_BHFV, state.z_BHF)
        y_BTHV, s_BHFV, z_BHF = linear_attention(
            q_BTHF, k_BTHF, v_BTHV, *sums, normalise=True, floor=FLOOR,
            chunk=config.chunk, inplace=inplace, want_state=want_state, form=self.form,
        )  # fmt: skip
        after = None
        if want_state and s_BHFV is not None and z_BHF is not None:
            after = CosformerState(s_BHFV, z_BHF, state.seen_B + new)
        return self.out_proj(y_BTHV.flatten(2)), after

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> CosformerState:
        heads, head_dim = self.config.heads, self.config.width // self.config.heads
        sizes = (batch, heads, 2 * head_dim, head_dim)
        s_BHFV = torch.zeros(sizes, dtype=recurrent_dtype(dtype), device=device)
        return CosformerState(
            s_BHFV, s_BHFV[..., 0].clone(), torch.zeros(batch, dtype=torch.long, device=device)
        )

    def state_elements(self, context_len: int) -> int:
        width = self.config.width
        return 2 * width**2 // self.config.heads + 2 * width + 1
