"""Recall by hand with attention, linear attention and Taylor features.

All three are two layers: the first puts each token's predecessor beside it, so that a value stands beside its
key; the second looks for the current token among those predecessors and returns what stood beside the match.

    attention           y_t = sum_j softmax_j(beta q_t . k_j) v_j     q_t = code(u_t), k_j = code(u_{j-1}),
    linear attention    y_t = sum_j (q_t . k_j) v_j                   v_j = code(u_j)
    Taylor              y_t = sum_j (1 + s + s^2 / 2) v_j / norm      s = q_t . k_j / sqrt(f)

The previous token comes from a short convolution (`BaseConv` of two taps), or from a window of two tokens:
there queries and keys are constant vectors which rotary positions turn, so that the score depends on the
distance alone. The fastest pair turns by 1 radian per token; keys stand one step ahead, so that with
sharpness b the previous token scores b and the current one b cos 1. At b = 60, exp(-60 (1 - cos 1)) = 1e-12
of the wrong token is left; at the default of 2000 it underflows to zero, and the previous token is exact.

Letters: t and j tokens of a row; u_t the token itself; q_t, k_j, v_j, y_t queries, keys, values and outputs;
beta and b sharpness; s a scaled product; f dimensions of a key's code.

Attention recalls at a width that does not grow with the row: Arora et al., "Zoology", 2023, arXiv 2312.04927,
proposition 4.3. The Taylor map: Arora et al., 2024, arXiv 2402.18668.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.settings import NonNegativeInt, PositiveFloat, PositiveInt
from holdall.tasks.mqar import Batch
from holdall.theory.by_hand import (
    WIDEST,
    ByHandConfig,
    HandBuilt,
    bits_of,
    blank,
    construction,
    random_signs,
    signs,
)


def previous_by_convolution(width: int, channels: slice) -> Any:
    """A BaseConv of two taps that shifts these channels by one token, and keeps the others.

    A channel that is shifted has taps 1 at lag 1 and -1 at lag 0, which takes away the residual, and gate 1.
    """
    layer = blank(BaseConvConfig(width=width, kernel=2))
    layer.weight_DW[channels, 0], layer.weight_DW[channels, 1] = 1.0, -1.0
    layer.projection.bias[channels] = 1.0
    return layer


def previous_by_window(width: int, source: slice, target: slice, keep: slice, sharpness: float) -> Any:
    """A window of two tokens: head 0 copies the previous token's `source` to `target`, head 1 keeps `keep`.

    The first token of a row has no predecessor: its window holds itself alone, which is what it copies.
    """
    head_dim = max(source.stop - source.start, keep.stop - keep.start)
    head_dim += head_dim % 2  # rotary positions turn pairs
    layer = blank(SlidingWindowConfig(width=width, window=2, heads=2, head_dim=head_dim, rotary=1.0))
    weight_HED, bias_HE = (part.view(3, 2, head_dim, -1) for part in layer.project.qkv.parameters())
    half = head_dim // 2  # the first pair, which turns by 1 radian per token, is dimensions 0 and half
    bias_HE[0, :, 0] = sharpness * head_dim**0.5  # queries, against the scale of scores
    bias_HE[1, 0, 0], bias_HE[1, 0, half] = math.cos(1.0), math.sin(1.0)
    bias_HE[1, 1, 0] = 1.0
    out_DHE = layer.out_proj.weight.view(width, 2, head_dim)
    for head, (taken, put) in enumerate(((source, target), (keep, keep))):
        for index, (here, there) in enumerate(zip(_each(taken), _each(put), strict=True)):
            weight_HED[2, head, index, here] = 1.0
            out_DHE[there, head, index] = 1.0
    return layer


def _each(channels: slice) -> range:
    return range(channels.start, channels.stop)


# ------------------------------------------------------------------------------------------- attention


@construction(
    "attention",
    claim="One attention head answers every question of rows of any length at width 2 log2 V: the width does "
    "not grow with the row, its state does.",
)
@dataclass(frozen=True, kw_only=True)
class AttentionByHand(ByHandConfig):
    """Softmax attention from each token's code to those of all previous tokens.

    Codes are f = ceil(log2 V) signs, twice side by side, so the width is 2 f. A match scores b, and any other
    token at most b (1 - 2 / f); with b = (f / 2) ln(N f) + 2 all N others together weigh less than the match
    by more than the decision needs.
    """

    @property
    def sharpness(self) -> float:
        """b, the score of a match."""
        features = bits_of(self.vocab)
        return features / 2 * math.log(self.length * features) + 2

    def build(self, dtype: torch.dtype = torch.float64) -> HandBuilt:
        code_VF = signs(self.vocab)
        features = code_VF.shape[1]
        width, first, second = 2 * features, slice(0, features), slice(features, 2 * features)
        recall = blank(AttentionConfig(width=width, head_dim=features))
        q_FD, k_FD, v_FD = recall.project.qkv.weight.view(3, features, width)
        same_FF = torch.eye(features)
        q_FD[:, first] = same_FF * self.sharpness / features**0.5
        k_FD[:, second], v_FD[:, first] = same_FF, same_FF
        recall.out_proj.weight[first] = same_FF
        return HandBuilt(
            self,
            torch.cat((code_VF, code_VF), dim=1).to(dtype),
            [previous_by_convolution(width, second), recall],
            torch.cat((code_VF, torch.zeros_like(code_VF)), dim=1).to(dtype),
        )

    def used_state(self, context_len: int) -> int:
        return (2 * context_len + 1) * bits_of(self.vocab)  # keys and values, and the last token's code


# ------------------------------------------------------------------------------------ linear attention


@construction(
    "linear-attention",
    claim="Linear attention with one-hot keys holds a table with a line per key: every answer is exact, from "
    "a state of V/2 log2 V numbers, whatever the length of the row and the number of pairs.",
)
@dataclass(frozen=True, kw_only=True)
class LinearAttentionByHand(ByHandConfig):
    """A window of two tokens, then linear attention with the identity map and no normaliser.

    A key is one-hot over F lines of a table, a value is the f signs of its number; all tokens that are no key
    or no value map to zeros. The table is cut into as many heads as fit into the width, so that the state has
    hardly more elements than the table. With fewer lines than keys, keys whose numbers agree modulo F share
    a line, whose values are added up.
    """

    lines: NonNegativeInt = 0
    """Lines of the table, F; 0 for one per key."""
    previous: Literal["window", "convolution"] = "window"
    """What brings the previous token: a window of two tokens with rotary positions, or a convolution."""
    sharpness: PositiveFloat = 2000.0
    """b, the score that the window's head gives to the previous token."""

    sizes = tuple({"lines": lines} for lines in (4, 8, 16, 32, 64, 0))

    @property
    def resolved_lines(self) -> int:
        return self.lines or max(2, self.vocab // 2)

    @property
    def label(self) -> str:
        return f"linear attention by hand, F = {self.resolved_lines}"

    @property
    def useful(self) -> bool:
        return not self.lines or self.lines < self.vocab // 2

    @property
    def width(self) -> int:
        """Two one-hot keys and a value's code, rounded up to whole heads of that code's size."""
        features = bits_of(self.vocab)
        return features * -(-(2 * self.resolved_lines + features) // features)

    def validate(self) -> None:
        if self.width > WIDEST:
            raise ValueError(
                f"one-hot keys of vocab {self.vocab} need width {self.width}, more than {WIDEST}: lower "
                f"vocab, or give lines, at most {(WIDEST - 2 * bits_of(self.vocab)) // 2}"
            )

    def build(self, dtype: torch.dtype = torch.float64) -> HandBuilt:
        lines, features, width = self.resolved_lines, bits_of(self.vocab), self.width
        before, now = slice(0, lines), slice(lines, 2 * lines)
        code = slice(2 * lines, 2 * lines + features)
        embedding_VD = torch.zeros(self.vocab, width)
        keys, values = torch.arange(1, self.vocab // 2), torch.arange(self.vocab // 2, self.vocab)
        embedding_VD[keys, lines + keys % lines] = 1.0
        embedding_VD[values, code] = signs(self.vocab)[values]
        if self.previous == "window":
            keep = slice(now.start, code.stop)
            shifted = previous_by_window(width, now, before, keep, self.sharpness)
        else:
            embedding_VD[:, before] = embedding_VD[:, now]
            shifted = previous_by_convolution(width, before)
        heads = width // features
        per_head = -(-lines // heads)
        recall = blank(
            LinearAttentionConfig(
                width=width, heads=heads, feature_dim=per_head, feature_map="identity", normalise=False
            )
        )
        q_ED, k_ED, v_ED = recall.qkv.weight.split(recall.sizes)
        for line in range(lines):  # line l of the table is feature l of all heads' together
            q_ED[line, now.start + line] = k_ED[line, before.start + line] = 1.0
        same_FF = torch.eye(features)
        v_ED.view(heads, features, width)[:, :, code] = same_FF
        recall.out_proj.weight.view(width, heads, features)[code] = same_FF[:, None]
        head_VD = torch.zeros(self.vocab, width)
        head_VD[:, code] = embedding_VD[:, code]
        return HandBuilt(self, embedding_VD.to(dtype), [shifted, recall], head_VD.to(dtype))

    def used_state(self, context_len: int) -> int:
        return self.resolved_lines * (bits_of(self.vocab) + 1)  # the table, and the last token's key

    def promised(self, rows: Batch) -> Tensor | None:
        return super().promised(rows) if self.resolved_lines >= self.vocab // 2 else None


# ---------------------------------------------------------------------------------------------- Taylor


@construction(
    "taylor",
    claim="Taylor features of random codes hold about f^2 dv / (6 ln V) pairs, from a state of f (f + 1) / 2 "
    "by dv numbers; at a quarter of that and f = 16, 95 of 100 answers are right.",
)
@dataclass(frozen=True, kw_only=True)
class TaylorByHand(ByHandConfig):
    """A convolution of two taps, then Based's Taylor features of random codes.

    Keys are f random signs, scaled so that the second order of 1 + s + s^2 / 2 outweighs the others; values
    are dv random signs. A match weighs f times as much as another pair does on average, and K such pairs add
    noise of variance 3 K / (f^2 dv) to the score of each of V tokens: the largest of V such is as large as
    the answer's own at K = f^2 dv / (6 ln V).
    """

    feature_dim: PositiveInt = 16
    """Signs of a key's code, f."""
    value_dim: PositiveInt = 64
    """Signs of a value's code, dv."""
    seed: NonNegativeInt = 0
    """Of the codes."""

    sizes = tuple(
        {"feature_dim": f, "value_dim": v} for f, v in ((4, 16), (4, 32), (8, 32), (8, 64), (16, 64))
    )

    @property
    def label(self) -> str:
        return f"Taylor by hand, f = {self.feature_dim}, dv = {self.value_dim}"

    @property
    def most_pairs(self) -> float:
        """K_max = f^2 dv / (6 ln V): the pairs at which the noise is as large as the answer."""
        return self.feature_dim**2 * self.value_dim / (6 * math.log(self.vocab))

    def build(self, dtype: torch.dtype = torch.float64) -> HandBuilt:
        f, values = self.feature_dim, self.value_dim
        width = 2 * f + values
        before, now, code = slice(0, f), slice(f, 2 * f), slice(2 * f, width)
        is_key_V1 = (torch.arange(self.vocab) < self.vocab // 2)[:, None]
        key_VF = random_signs(self.vocab, f, self.seed) * is_key_V1
        value_VE = random_signs(self.vocab, values, self.seed + 1) * ~is_key_V1
        key_VF[0] = 0.0  # filler
        recall = blank(TaylorConfig(width=width, feature_dim=f))
        q_FD, k_FD, v_ED = recall.qkv.weight.split(recall.sizes)
        same_FF = torch.eye(f)
        # a product of signs is a whole number up to f: times 1000, its square outweighs all else
        q_FD[:, now], k_FD[:, before] = 1000.0 * same_FF, same_FF
        v_ED[code, code] = torch.eye(values)
        recall.out_proj.weight.copy_(torch.eye(width))
        head_VD = torch.cat((torch.zeros(self.vocab, 2 * f), value_VE), dim=1)
        return HandBuilt(
            self,
            torch.cat((key_VF, key_VF, value_VE), dim=1).to(dtype),
            [previous_by_convolution(width, before), recall],
            head_VD.to(dtype),
        )

    def used_state(self, context_len: int) -> int:
        f = self.feature_dim
        return (1 + f + f * (f + 1) // 2) * self.value_dim + f  # the sums, and the last token's key

    def promised(self, rows: Batch) -> Tensor | None:
        return None

    def remark(self, rows: Batch, right_BK: Tensor) -> str:
        pairs = rows.places.shape[1]
        return (
            f"K_max = f^2 dv / (6 ln V) = {self.most_pairs:,.0f} pairs, and {pairs:,} are "
            f"{pairs / self.most_pairs:.2g} of that; at 1/4 and f = 16, 95% are right"
        )
