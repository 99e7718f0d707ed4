"""Recall by hand with gated convolutions: the width decides how far back they can look.

A BaseConv layer filters each channel by itself, and multiplies it by a sum of channels *of the same token*
(holdall/theory/primitives.py). To compare the current token with that of s tokens ago, the latter must first
be brought here, into channels of its own: as many copies as there are distances. Each of S distances gets a
copy of the key, shifted by s, and a copy of the value, shifted by s - 1:

    shifts          e_s,i = sum_j key_s,i,j cur_i,j      digit i is equal      m_s = prod_i e_s,i
                    y = sum_s m_s value_s                                      layers 2 + ceil(log2 2p)
    two layers      m_s = sum_j (key_s,j cur_j + cur_j) - 1                    one-hot codes alone
                    y = sum_s (m_s value_s + cur) - S cur                      layers 2

A question is answered if and only if its key stands at most S tokens before it. All numbers are whole, so
nothing is rounded.

Letters: s one of S distances; p the digits of a code, i one of them, j one of a digit's values; e_s,i and m_s
whether that digit, or all, of the token s back equals the current token's; key_s and value_s codes of earlier
tokens; cur that of the current one; y the answer's code.

Arora et al., "Zoology", 2023, arXiv 2312.04927, theorem 4.5; layers for p-hot codes: Arora et al., "Just read
twice", 2024, arXiv 2407.05483, remark G.11, whose bound floor(log2 2p) these meet with one or two to spare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdall.settings import NonNegativeInt
from holdall.tasks.mqar import Batch
from holdall.theory.by_hand import WIDEST, ByHandConfig, HandBuilt, base_of, bits_of, construction, p_hot
from holdall.theory.primitives import Layer


class Copies:
    """Which channel is what: the current token's code, then S copies of the key and S of the value."""

    def __init__(self, shifts: int, digits: int, base: int) -> None:
        code = digits * base
        self.shifts, self.width = shifts, code * (1 + 2 * shifts)
        self.now = list(range(code))
        keys_and_values = torch.arange(code, self.width).view(2, shifts, digits, base)
        self.key_SPJ, self.value_SPJ = (part.tolist() for part in keys_and_values)

    def each(self, copies_SPJ: list[list[list[int]]]) -> Iterator[tuple[int, list[int]]]:
        """The distance s of each copy, and its channels."""
        for place, copy_PJ in enumerate(copies_SPJ):
            yield place + 1, [channel for digit_J in copy_PJ for channel in digit_J]


@dataclass(frozen=True, kw_only=True)
class BaseConvByHand(ByHandConfig):
    """What both constructions take."""

    shifts: NonNegativeInt = 0
    """S, the distances that are looked at: 1 to S tokens back; 0 for all of a row, N - 1."""

    @property
    def resolved_shifts(self) -> int:
        return self.shifts or self.length - 1

    @property
    def useful(self) -> bool:
        return self.resolved_shifts < self.length

    @property
    def resolved_digits(self) -> int:
        """p."""
        return 1

    @property
    def code(self) -> int:
        """Channels of one code: p c^(1/p)."""
        return self.resolved_digits * base_of(self.vocab, self.resolved_digits)

    @property
    def width(self) -> int:
        return self.code * (1 + 2 * self.resolved_shifts)

    def validate(self) -> None:
        if self.length < 2:
            raise ValueError(f"length {self.length} leaves nothing to look back at: take at least 2")
        if self.width > WIDEST:
            most = (WIDEST // self.code - 1) // 2
            ways = [f"shifts, at most {most}"] * (most > 0)
            ways += ["more digits"] * (hasattr(self, "digits") and self.resolved_digits < bits_of(self.vocab))
            raise ValueError(
                f"{self.resolved_shifts} distances need width {self.width}, more than {WIDEST}: lower vocab"
                + (f", or give {', or '.join(ways)}" if ways else "")
            )

    def promised(self, rows: Batch) -> Tensor | None:
        return rows.tags.distance <= self.resolved_shifts

    def _copies(self) -> Copies:
        return Copies(self.resolved_shifts, self.resolved_digits, base_of(self.vocab, self.resolved_digits))


@construction(
    "base-conv",
    claim="A gated convolution needs a copy of key and value for each distance: width k (1 + 2 S) for S "
    "distances, and a question is right if and only if its key is at most S tokens back.",
)
@dataclass(frozen=True, kw_only=True)
class ShiftsByHand(BaseConvByHand):
    """BaseConv by all shifts: shift, compare digit by digit, multiply the digits in a tree, take the value.

    2 + ceil(log2 2p) layers of width k (1 + 2 S), with codes of k = p c^(1/p) numbers.
    """

    digits: NonNegativeInt = 0
    """p, the digits of a code, each one-hot; 1 is one-hot, 0 as many as the token has bits."""

    sizes = tuple({"shifts": shifts} for shifts in (8, 16, 32, 64))

    @property
    def label(self) -> str:
        return f"BaseConv by hand, S = {self.resolved_shifts}"

    @property
    def resolved_digits(self) -> int:
        return self.digits or bits_of(self.vocab)

    def build(self, dtype: torch.dtype = torch.float64) -> HandBuilt:
        at, digits = self._copies(), self.resolved_digits
        bring, compare, take = (Layer(at.width) for _ in range(3))
        for s, copy in at.each(at.key_SPJ):
            bring.shift(copy, s)
            for channel, now in zip(copy, at.now, strict=True):
                compare.product(channel, {now: 1.0})
        tree = []
        left = list(range(digits))  # digits whose channels add up to the product of all that they stand for
        while len(left) > 1:
            tree.append(Layer(at.width))
            for first, second in zip(left[::2], left[1::2], strict=False):
                for key_PJ in at.key_SPJ:
                    for channel in key_PJ[first]:
                        tree[-1].product(channel, dict.fromkeys(key_PJ[second], 1.0))
            left = left[::2]
        for (s, copy), key_PJ in zip(at.each(at.value_SPJ), at.key_SPJ, strict=True):
            if s > 1:
                bring.shift(copy, s - 1)
            for channel in copy:
                take.product(channel, dict.fromkeys(key_PJ[0], 1.0))
        code_VE = p_hot(self.vocab, digits)
        head_VD = code_VE.new_zeros(self.vocab, at.width)
        head_VD[:, -at.shifts * self.code :] = code_VE.repeat(1, at.shifts)
        return _built(self, code_VE, [bring, compare, *tree, take], head_VD, dtype)

    def used_state(self, context_len: int) -> int:
        return min(context_len, self.resolved_shifts) * self.code


@construction(
    "base-conv-two-layers",
    claim="With one-hot codes two layers of gated convolution are enough, and wide: V (1 + 2 S) channels for "
    "S distances.",
)
@dataclass(frozen=True, kw_only=True)
class TwoLayersByHand(BaseConvByHand):
    """BaseConv by two filtered products of one-hot codes: compare, then take the value."""

    sizes = ()  # beside the other one, which is narrower

    @property
    def label(self) -> str:
        return f"BaseConv of two layers by hand, S = {self.resolved_shifts}"

    def build(self, dtype: torch.dtype = torch.float64) -> HandBuilt:
        at = self._copies()
        compare, take = Layer(at.width), Layer(at.width)
        for s, copy in at.each(at.key_SPJ):
            for channel, now in zip(copy, at.now, strict=True):
                compare.filtered_product(channel, _back(s), {now: 1.0})
        for (s, copy), key_PJ in zip(at.each(at.value_SPJ), at.key_SPJ, strict=True):
            for channel in copy:  # key_PJ adds up to one more than the match
                take.filtered_product(channel, _back(s - 1), dict.fromkeys(key_PJ[0], 1.0), -1.0)
        one_hot_VE = p_hot(self.vocab, 1)
        head_VD = one_hot_VE.new_zeros(self.vocab, at.width)
        head_VD[:, -at.shifts * self.code :] = one_hot_VE.repeat(1, at.shifts)
        head_VD[:, at.now] = -at.shifts * one_hot_VE
        return _built(self, one_hot_VE, [compare, take], head_VD, dtype)

    def used_state(self, context_len: int) -> int:
        return 2 * min(context_len, self.resolved_shifts) * self.code


def _back(lag: int) -> list[float]:
    """The taps of a filter that brings what was there `lag` tokens ago."""
    return [0.0] * lag + [1.0]


def _built(
    config: BaseConvByHand, code_VE: Tensor, layers: Sequence[Layer], head_VD: Tensor, dtype: torch.dtype
) -> HandBuilt:
    """The model whose embedding is a token's code, once for each copy."""
    embedding_VD = code_VE.repeat(1, config.width // code_VE.shape[1])
    return HandBuilt(config, embedding_VD.to(dtype), [layer.build() for layer in layers], head_VD.to(dtype))
