"""Linformer: attention to r learned mixtures of all keys, whose weights depend on position alone.

    K~ = sum_t e_t k_t^T     V~ = sum_t f_t v_t^T      e_t, f_t: rows of E and F, (max_length, r)
    y_t = W_o [ sum_{i < r} softmax_i(q_t . K~_i / sqrt(K)) V~_i ] + b,   H heads, which share E and F

Letters: y_t output of token t; q, k, v queries, keys and values of a head; K their dimensions; e_t and f_t
the weights of token t in r mixtures; E and F the matrices of these weights, one row per position, which all H
heads share; K~ and V~ these mixtures; i one of the mixtures; W_o a learned map; b its bias.

Wang, Li, Khabsa, Fang, Ma, "Linformer: Self-Attention with Linear Complexity", 2020, arXiv 2006.04768. K~ and
V~ are sums over tokens, which are carried from call to call in r D elements each. But it is not causal: every
output depends on sums over the whole sequence, later tokens included, so it cannot be used in a language
model.
Weights map onto lucidrains' LinformerSelfAttention: to_q, to_k, to_v are the rows of `qkv`, in that order,
proj_k is `e_LR`, proj_v `f_LR`, to_out `out_proj`; its share_kv is `shared` with equal rows for k and v.
Positions beyond `max_length` are an error, as there.
Deviations:
- an output sees its whole call and all earlier calls; the published operator is one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import (
    Mixer,
    MixerConfig,
    Paper,
    count_on,
    none_read,
    recurrent_dtype,
    register,
)
from holdall.contract.room import advanced, is_reserved
from holdall.settings import PositiveInt


class LinformerState(NamedTuple):
    """The mixtures of keys and of values so far, and how many tokens a row has read, as in `Position`."""

    k_BRHK: Tensor
    v_BRHK: Tensor
    seen_B: Tensor
    read_BT0: Tensor


@register(
    "linformer",
    family="softmax attention",
    paper=Paper(
        title="Linformer: Self-Attention with Linear Complexity",
        authors="Wang, Li, Khabsa, Fang, Ma",
        year=2020,
        arxiv="2006.04768",
    ),
    state="2rD + 1",
    training="ND(r + D)",
    inference="D(r + D)",
    causal=False,
)
@dataclass(frozen=True, kw_only=True)
class LinformerConfig(MixerConfig):
    """Attention to a few learned mixtures of all keys; bidirectional, as published."""

    rank: PositiveInt = 32
    """Mixtures of keys, r."""
    heads: PositiveInt = 1
    """Number of heads, H."""
    max_length: PositiveInt = 1024
    """Number of positions with learned mixing weights; a longer sequence is an error."""
    shared: bool = False
    """Whether values are mixed with the weights of the keys, F = E."""

    # as long as the longest of the laws
    export_sizes = ("rows", "tokens")
    variants = (
        {"rank": 3, "heads": 2, "max_length": 100_000},
        {"rank": 2, "max_length": 100_000, "shared": True},
    )

    def validate(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build(self) -> Linformer:
        return Linformer(self)


class Linformer(Mixer):
    config: LinformerConfig
    state_type = LinformerState
    fills_slots = True
    refusals = {  # noqa: RUF012
        "causal": "every output sees all tokens of its call, those behind it too",
        "splits": "an output sees the tokens behind it only if they are in the same call",
        "gradients_through_state": "it compares several calls with one, which are not the same",
    }

    def __init__(self, config: LinformerConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        bound = config.rank**-0.5
        self.e_LR = nn.Parameter(torch.empty(config.max_length, config.rank).uniform_(-bound, bound))
        if not config.shared:
            self.f_LR = nn.Parameter(torch.empty(config.max_length, config.rank).uniform_(-bound, bound))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,  # with room or without
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, Any]:
        config, new = self.config, x_BTD.shape[1]
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        limit = config.max_length
        position = count_on(state, new, limit, f"linformer has max_length {limit}")
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, config.heads, -1)).unbind(2)
        position_BT = state.seen_B[:, None] + torch.arange(new, device=x_BTD.device)
        if is_reserved(state):  # nothing refuses there what lies beyond
            position_BT = position_BT.clamp(max=limit - 1)
        e_BTR = F.embedding(position_BT, self.e_LR)
        f_BTR = e_BTR if config.shared else F.embedding(position_BT, self.f_LR)
        mix = _mix_loop if self.form == "loop" else _mix
        k_BRHK, v_BRHK = mix(e_BTR, k, state.k_BRHK), mix(f_BTR, v, state.v_BRHK)
        score_BHTR = torch.einsum("bthk,brhk->bhtr", q.to(k_BRHK.dtype) * q.shape[-1] ** -0.5, k_BRHK)
        y_BTHK = torch.einsum("bhtr,brhk->bthk", score_BHTR.softmax(-1), v_BRHK).to(x_BTD.dtype)
        after = LinformerState(k_BRHK, v_BRHK, *position)
        if is_reserved(state):
            after = advanced(state, after, new)
        return self.out_proj(y_BTHK.flatten(2)), after if want_state else None

    def init_state(
        self,
        batch: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> LinformerState:
        config = self.config
        if capacity is not None and capacity > config.max_length:
            raise ValueError(
                f"a capacity of {capacity} tokens, but linformer has max_length {config.max_length}"
            )
        nothing = torch.zeros(
            batch,
            config.rank,
            config.heads,
            config.width // config.heads,
            dtype=recurrent_dtype(dtype),
            device=device,
        )
        return LinformerState(nothing, nothing.clone(), *none_read(batch, device))

    def state_elements(self, context_len: int) -> int:
        return 2 * self.config.rank * self.config.width + 1


def _mix_loop(weight_BTR: Tensor, u_BTHK: Tensor, sum_BRHK: Tensor) -> Tensor:
    """The definition: each token adds its part to every mixture."""
    for t in range(u_BTHK.shape[1]):
        part = torch.einsum("br,bhk->brhk", *(u[:, t].to(sum_BRHK.dtype) for u in (weight_BTR, u_BTHK)))
        sum_BRHK = sum_BRHK + part
    return sum_BRHK


def _mix(weight_BTR: Tensor, u_BTHK: Tensor, sum_BRHK: Tensor) -> Tensor:
    """All tokens in one product."""
    wide = sum_BRHK.dtype
    return sum_BRHK + torch.einsum("btr,bthk->brhk", weight_BTR.to(wide), u_BTHK.to(wide))
