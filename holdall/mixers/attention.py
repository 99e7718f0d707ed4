"""Softmax attention, the reference for the recall of all other mixers.

    q, k, v = W_q x, W_k x, W_v x (+ b), H heads
    y_t = W_o [ sum_{j <= t} softmax_j(q_t . k_j / sqrt(K)) v_j ] + b

Letters: x_t and y_t input and output of token t; j tokens up to t; q_t, k_t, v_t queries, keys and values of
each of H heads; K their dimensions; W_* learned maps; b biases.

Options of released models: heads of another size than D / H; RMS norms of q and k before they are turned; a
gate, W_o [ ... * sigmoid(W_g x_t) ]; frequencies of long contexts.

Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762.
Weights map one to one onto Zoology's MHA (and, with rotary 0.5 and no bias, flash-attention's): `qkv` has the
rows of q, k and v in that order.
Deviations: none (Zoology masks with -10000, which is zero after the softmax).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdall.contract import Mixer, MixerConfig, Paper, State, forms, register
from holdall.contract.rollback import LISTED, without_last
from holdall.contract.room import is_reserved
from holdall.ops import attention
from holdall.ops.attention import KeyValueCache
from holdall.ops.layer_norm import rms_norm
from holdall.ops.linear import Linear
from holdall.ops.rotary import check_scaling, rotary_dims, rotate_both
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share

QKNorm = Literal["", "head", "all"]


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """What softmax attention has, whatever it looks at."""

    heads: PositiveInt = 1
    """Number of query heads, H."""
    kv_heads: NonNegativeInt = 0
    """Number of key and value heads, G; 0 for as many as `heads`. Each serves H / G query heads."""
    head_dim: NonNegativeInt = 0
    """Elements of a head, K; 0 for D / H."""
    rotary: Share = 0.0
    """Share of each head's dimensions that rotary positions turn: 0 for none, 1 for all."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rotary_scaling: tuple[PositiveFloat, ...] = ()
    """How they are lowered for longer contexts: () for not at all; (factor,) divides all by it; (factor, low,
    high, context) is Llama 3.1's, which divides those of pairs that turn less than `low` times within so many
    tokens and none that turn more than `high` times."""
    bias: bool | Literal["qkv", "out"] = True
    """Whether the projections have biases; "qkv" for those of queries, keys and values (and the gate) only,
    "out" for the output projection only."""
    qk_norm: QKNorm = ""
    """RMS norm of queries and keys: "" for none, "head" over each head, with one weight for all heads, "all"
    over all heads together."""
    qk_norm_eps: NonNegativeFloat = 1e-6
    """Epsilon of these norms."""
    gate: bool = False
    """Whether a sigmoid of a projection of its own gates each element before the output projection."""

    def validate(self) -> None:
        check_heads(self.width, self.heads, self.rotary, self.kv_heads, self.head_dim)
        check_scaling(self.rotary_scaling)

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.width // self.heads


def check_heads(width: int, heads: int, rotary: float, kv_heads: int = 0, head_dim: int = 0) -> None:
    """Raise ValueError, naming the way out, where heads do not fit a width, or each other."""
    if not head_dim and width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
    rotary_dims(head_dim or width // heads, rotary)
    if kv_heads and heads % kv_heads:
        raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")


@register(
    "attention",
    family="softmax attention",
    paper=Paper(title="Attention Is All You Need", authors="Vaswani et al.", year=2017, arxiv="1706.03762"),
    state="2NDG/H + 1",
    training="N²D",
    inference="ND",
    quadratic=True,
)
@dataclass(frozen=True, kw_only=True)
class AttentionConfig(HeadsConfig):
    """Softmax attention over everything read so far."""

    block: PositiveInt = 256
    """Queries and keys per block of the form "blockwise": FlashAttention's algorithm in plain PyTorch, whose
    memory is linear in the length. The form "parallel" is PyTorch's own attention, and "kernel" the same but
    for steps over a state with a capacity, which have a kernel.
    """

    export_sizes = ("rows", "tokens")
    forms = ("loop", "blockwise", "parallel", "kernel")
    variants = (
        {},
        {"heads": 4, "kv_heads": 2, "rotary": 0.5, "bias": False},
        {"form": "blockwise", "heads": 2, "block": 16},
        {
            "heads": 3, "head_dim": 6, "rotary": 1.0, "rotary_scaling": (8.0, 0.5, 2.0, 16.0),
            "qk_norm": "head", "gate": True, "bias": "qkv",
        },
    )  # fmt: skip

    @property
    def has_kernel(self) -> bool:
        # wider heads train as fast without, so strict does not insist on one
        return self.resolved_head_dim <= attention.MAX_HEAD_DIM

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return super().kernel_refusal(device, dtype) or attention.kernel_refusal(self.resolved_head_dim)

    def build(self) -> Attention:
        return Attention(self)


class QKV(nn.Module):
    """Queries, keys and values of all heads from one product, turned by their positions."""

    def __init__(
        self,
        width: int,
        heads: int,
        rotary: float,
        rotary_base: float,
        bias: bool,
        kv_heads: int = 0,
        *,
        head_dim: int = 0,
        rotary_scaling: tuple[float, ...] = (),
        qk_norm: QKNorm = "",
        qk_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads = [heads, kv_heads or heads, kv_heads or heads]
        self.head_dim = head_dim or width // heads
        self.qkv = Linear(width, sum(self.heads) * self.head_dim, bias=bias)
        self.rotary_dims = rotary_dims(self.head_dim, rotary)
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        normed = {"": [0, 0], "head": [1, 1], "all": self.heads[:2]}[qk_norm]
        self.q_norm, self.k_norm = (
            nn.RMSNorm(heads * self.head_dim, eps=qk_norm_eps) if heads else None for heads in normed
        )

    @classmethod
    def of(cls, config: HeadsConfig) -> QKV:
        return cls(
            config.width, config.heads, config.rotary, config.rotary_base, config.bias in (True, "qkv"),
            config.kv_heads, head_dim=config.head_dim, rotary_scaling=config.rotary_scaling,
            qk_norm=config.qk_norm, qk_norm_eps=config.qk_norm_eps,
        )  # fmt: skip

    def forward(self, x_BTD: Tensor, seen_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        if self.rotary_dims:
            form = "kernel" if forms.fused(q, k, seen_B) else "parallel"
            scaling = self.rotary_scaling
            q, k = rotate_both(q, k, seen_B, self.rotary_dims, self.rotary_base, scaling, form=form)
        return q, k, v


def _normed(x_BTHK: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Queries or keys, normalised over as many heads as the norm has weights for."""
    x_BTNE = x_BTHK.reshape(*x_BTHK.shape[:2], -1, len(norm.weight))
    return rms_norm(x_BTNE, norm.weight, norm.eps or 0.0, x_BTHK.dtype).view(x_BTHK.shape)


def gate_and_output(config: HeadsConfig) -> tuple[Linear | None, Linear]:
    """The projection of the gate, if there is one, and the output projection."""
    inner = config.heads * config.resolved_head_dim
    gate = Linear(config.width, inner, bias=config.bias in (True, "qkv")) if config.gate else None
    return gate, Linear(inner, config.width, bias=config.bias in (True, "out"))


def gated_output(y_BTE: Tensor, x_BTD: Tensor, gate: nn.Module | None) -> Tensor:
    """y times the sigmoid of the gate that is computed from x; y itself where there is no gate."""
    return y_BTE if gate is None else y_BTE * gate(x_BTD).sigmoid()


class Attention(Mixer):
    config: AttentionConfig
    state_type = KeyValueCache
    rollback_limit = LISTED

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.project = QKV.of(config)
        self.gate, self.out_proj = gate_and_output(config)
        forms: dict[str, Callable[..., tuple[Tensor, KeyValueCache]]] = {
            "loop": attention.full_attention_loop,
            "blockwise": functools.partial(attention.blockwise_attention, block=config.block),
            "parallel": attention.full_attention,
            "kernel": attention.full_attention,
        }
        # a move to another device changes the form at most between the last two
        self.attend = forms[self.form]
        self.fills_slots = self.form in ("parallel", "kernel")

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,  # with room or without
        *,
        inplace: bool = False,
        want_state: bool = True,
    ) -> tuple[Tensor, Any]:
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        q, k, v = self.project(x_BTD, state.seen_B)
        scale, after = q.shape[-1] ** -0.5, None
        if is_reserved(state):
            y_BTHV, *slots = attention.reserved_attention(
                q, k, v, *state, scale=scale, inplace=inplace, form=self.form
            )
            new, counts = x_BTD.shape[1], (state.seen_B, state.filled_B)
            after = type(state)(*slots, *(count.add_(new) if inplace else count + new for count in counts))
        else:
            y_BTHV, after = self.attend(q, k, v, state, scale=scale)
        y_BTE = gated_output(y_BTHV.flatten(2), x_BTD, self.gate)
        return self.out_proj(y_BTE), after if want_state else None

    def init_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> KeyValueCache:
        heads, head_dim = self.project.heads[1], self.project.head_dim
        return attention.empty_cache(batch, 0, heads, head_dim, head_dim, dtype=dtype, device=device)

    def state_elements(self, context_len: int) -> int:
        return 2 * context_len * self.project.heads[1] * self.project.head_dim + 1

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        return without_last(state, ("k_BSHK", "v_BSHV"), count_B, self.owner, inplace=inplace)
