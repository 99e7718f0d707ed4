"""Associative recall as a circuit: by comparing all pairs with all questions, or by sorting.

    all pairs   answer_q = sum_k value_k prod_j (1 - x - y + 2 x y),   x and y bits j of key k and question q
    sorting     records (key, kind, index, value) of pairs (kind 0) and questions (kind 1) are sorted by key
                and kind, so that a pair stands just before its questions; a scan carries its value over
                them; they are sorted back by index

Inputs are bits, of K pairs and then Q questions, each of whose keys is in exactly one pair; outputs are the
answers. All pairs take K Q (2 b - 1 + m) products at depth 2 + ceil(log2 b); sorting n = K + Q records takes
O(n (b + m) log^2 n) at depth O(log b log^2 n). For K = Q = 2 to 64 and keys of log2 n bits, all pairs are
smaller, for 128 sorting is; all pairs are always less deep. So `all_pairs` is what to use, and `by_sorting`
what the theorem is about.

Letters: x and y bits; k and q count pairs and questions, j bits; K pairs, Q questions, b bits of a key, m
of a value, n records. Of shapes: B rows, N tokens, D bits of a token, M bits of all answers.

Source: "parallel binary search" of Arora et al., "Zoology", 2023, arXiv 2312.04927, theorem 4.4; the network
is Batcher's bitonic sort (1968), the scan that of Hillis and Steele (1986).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdall.contract import Config
from holdall.settings import PositiveInt
from holdall.tasks.mqar import MQAR, Batch
from holdall.theory.circuits import Circuit, Symbol

Bits = list[Any]
"""Symbols, or the integers 0 and 1; the most significant first."""


@dataclass(frozen=True, kw_only=True)
class Recall(Config):
    """Pairs of keys and values, then questions: rows of K keys and values in turn, and Q keys, as bits."""

    pairs: PositiveInt = 4
    """Pairs of a row, K; their keys are distinct."""
    questions: PositiveInt = 4
    """Questions of a row, Q."""
    key_bits: PositiveInt = 3
    """Bits of a key, b."""
    value_bits: PositiveInt = 3
    """Bits of a value, m."""

    def validate(self) -> None:
        if self.pairs > 2**self.key_bits:
            raise ValueError(
                f"{self.pairs} pairs need distinct keys, and there are {2**self.key_bits} of key_bits "
                f"{self.key_bits}: raise key_bits to {(self.pairs - 1).bit_length()}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a row, N: a key, its value, the next key and so on, then the questions."""
        return 2 * self.pairs + self.questions

    @property
    def bits(self) -> int:
        """Bits of a token, D; of a shorter key or value the last are zero."""
        return max(self.key_bits, self.value_bits)

    def inputs(self) -> tuple[list[tuple[Bits, Bits]], list[Bits]]:
        """The pairs (key, value) and the questions of a new circuit, as symbols."""
        tokens = [self._padded(token) for token in Circuit.inputs(self.tokens, self.bits, low=0, high=1)]
        return (
            [
                (key[: self.key_bits], value[: self.value_bits])
                for key, value in zip(
                    tokens[0 : 2 * self.pairs : 2], tokens[1 : 2 * self.pairs : 2], strict=True
                )
            ],
            [token[: self.key_bits] for token in tokens[2 * self.pairs :]],
        )

    def rows(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random rows (B, N, D), and the bits of the answers, (B, Q m), in the order of the outputs; int64.

        Keys are distinct, values and questions independent and uniform.
        """
        rng = torch.Generator().manual_seed(seed)
        keys_BV = torch.rand(count, 2**self.key_bits, generator=rng).argsort(dim=1)
        keys_BK = keys_BV[:, : self.pairs]
        values_BK = torch.randint(2**self.value_bits, (count, self.pairs), generator=rng)
        asked_BQ = torch.randint(self.pairs, (count, self.questions), generator=rng)
        return self._encoded(keys_BK, values_BK, keys_BK.gather(1, asked_BQ), values_BK.gather(1, asked_BQ))

    def rows_of(self, task: MQAR, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of rows of MQAR: its pairs, and its questions in reading order, without what lies between.

        Raises ValueError for a task of other sizes.
        """
        wanted = (task.pairs, task.pairs, (task.keys).bit_length(), (task.values - 1).bit_length())
        if wanted != (self.pairs, self.questions, self.key_bits, self.value_bits):
            raise ValueError(f"rows of {task} have pairs, questions and bits {wanted}")
        head_BN, first = batch.tokens[:, : 2 * task.pairs], task.vocab // 2
        return self._encoded(
            head_BN[:, ::2], head_BN[:, 1::2] - first, batch.tokens.gather(1, batch.positions),
            batch.answers - first,
        )  # fmt: skip

    def _encoded(
        self, keys_BK: Tensor, values_BK: Tensor, asked_BQ: Tensor, answers_BQ: Tensor
    ) -> tuple[Tensor, Tensor]:
        pairs_BND = torch.stack(
            (self._bits(keys_BK, self.key_bits), self._bits(values_BK, self.value_bits)), dim=2
        ).flatten(1, 2)
        x_BND = torch.cat((pairs_BND, self._bits(asked_BQ, self.key_bits)), dim=1)
        return x_BND, self._bits(answers_BQ, self.value_bits)[..., : self.value_bits].flatten(1)

    def _bits(self, numbers: Tensor, bits: int) -> Tensor:
        """The bits of numbers, the most significant first, padded to those of a token."""
        bits_D = numbers[..., None] >> torch.arange(bits - 1, -1, -1) & 1
        return torch.nn.functional.pad(bits_D, (0, self.bits - bits))

    @staticmethod
    def _padded(token: Any) -> Bits:
        return token if isinstance(token, list) else [token]


def all_pairs(recall: Recall) -> Circuit:
    """Every question compared with every key: K Q (2 b - 1 + m) products, depth 2 + ceil(log2 b)."""
    pairs, questions = recall.inputs()
    return Circuit.of([_answer(pairs, question) for question in questions])


def _answer(pairs: Sequence[tuple[Bits, Bits]], question: Bits) -> Bits:
    matches = [_all([1 - x - y + 2 * x * y for x, y in zip(key, question, strict=True)]) for key, _ in pairs]
    values = zip(*(value for _, value in pairs), strict=True)
    return [sum(match * bit for match, bit in zip(matches, bits, strict=True)) for bits in values]


def _all(bits: Bits) -> Any:
    """Their product, as a tree."""
    if len(bits) == 1:
        return bits[0]
    half = len(bits) // 2
    return _all(bits[:half]) * _all(bits[half:])


def by_sorting(recall: Recall) -> Circuit:
    """Pairs and questions sorted together, values carried over, and sorted back.

    Records are padded to a power of two by constants, which cost nothing where they meet each other.
    """
    pairs, questions = recall.inputs()
    padding = 2 ** (recall.pairs + recall.questions - 1).bit_length() - recall.pairs - recall.questions
    width = max(1, (recall.pairs + recall.questions + padding - 1).bit_length())
    keys = [*(key for key, _ in pairs), *questions, *[[1] * recall.key_bits] * padding]
    kinds = [0] * recall.pairs + [1] * (recall.questions + padding)
    values = [*(value for _, value in pairs), *[[0] * recall.value_bits] * (recall.questions + padding)]
    records = [
        [*key, kind, *(index >> bit & 1 for bit in range(width - 1, -1, -1)), *value]
        for index, (key, kind, value) in enumerate(zip(keys, kinds, values, strict=True))
    ]
    records = bitonic_sort(records, recall.key_bits + 1)
    kind, index = recall.key_bits, slice(recall.key_bits + 1, recall.key_bits + 1 + width)
    carried = segmented_scan(
        [1 - record[kind] for record in records], [record[index.stop :] for record in records]
    )
    records = [[*record[index], *value] for record, value in zip(records, carried, strict=True)]
    records = bitonic_sort(records, width)
    return Circuit.of([record[width:] for record in records[recall.pairs : recall.pairs + recall.questions]])


# --------------------------------------------------------------------------------------------- networks


def bit(number: Any) -> Any:
    """A number that is known to be 0 or 1, on a wire of its own; constants stay as they are."""
    return number.within(0, 1) if isinstance(number, Symbol) else number


def greater(xs: Bits, ys: Bits) -> Any:
    """Whether the number x is greater than the number y, a bit: a product per bit, and a tree above them.

    Of every bit, or stretch of bits, greater and equal: (g, e) before (g', e') are (g + e g', e e').
    """
    above = [x * (1 - y) for x, y in zip(xs, ys, strict=True)]
    equal = [bit(1 + x - y - 2 * g) for x, y, g in zip(xs, ys, above, strict=True)]
    return _decided(above, equal, wanted=False)[0]


def _decided(above: Bits, equal: Bits, *, wanted: bool) -> tuple[Any, Any]:
    """Greater, and if wanted equal, of a stretch of bits."""
    if len(above) == 1:
        return above[0], equal[0]
    half = len(above) // 2  # the lower half is the longer: it needs no "equal" to go with it
    high, same = _decided(above[:half], equal[:half], wanted=True)
    low, rest = _decided(above[half:], equal[half:], wanted=wanted)
    return bit(high + same * low), same * rest if wanted else None


def bitonic_sort(records: Sequence[Bits], key: int) -> list[Bits]:
    """The records by their first `key` bits, ascending. Their number is a power of two (ValueError)."""
    records, count = [list(record) for record in records], len(records)
    if count & (count - 1):
        raise ValueError(f"{count} records: a bitonic network sorts a power of two")
    for low, high in _exchanges(count):
        one, other = records[low], records[high]
        swap = greater(one[:key], other[:key])
        moves = [swap * (y - x) for x, y in zip(one, other, strict=True)]
        records[low] = [bit(x + move) for x, move in zip(one, moves, strict=True)]
        records[high] = [bit(y - move) for y, move in zip(other, moves, strict=True)]
    return records


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    """The comparators of the network, in order: the smaller record goes to the first place of each."""
    block = 2
    while block <= count:
        step = block // 2
        while step:
            for place in (place for place in range(count) if not place & step):
                yield (place, place + step) if not place & block else (place + step, place)
            step //= 2
        block *= 2


def segmented_scan(starts: Bits, values: Sequence[Bits]) -> list[Bits]:
    """Of each record the value of the last one, itself included, that starts a segment.

    (f, v) before (f', v') are (f + f' - f f', v' + (1 - f') v), in ceil(log2 n) rounds. Values of records
    that start none are zero.
    """
    flags, values = list(starts), list(values)
    step = 1
    while step < len(flags):
        later = range(step, len(flags))
        carried = [
            [bit(new + (1 - flags[i]) * old) for old, new in zip(values[i - step], values[i], strict=True)]
            for i in later
        ]
        joined = [bit(flags[i - step] + flags[i] - flags[i - step] * flags[i]) for i in later]
        values[step:], flags[step:] = carried, joined
        step *= 2
    return values


def wrong_rows(circuit: Circuit, x_BND: Tensor, answers_BM: Tensor) -> int:
    """Rows in which an output of the circuit, in integers, is not the answer's."""
    columns = [[x_BND[:, n, d].numpy() for d in range(circuit.d)] for n in range(circuit.n)]
    outputs = circuit.evaluate(columns if circuit.d > 1 else [column for (column,) in columns])
    y_BM = torch.stack([torch.as_tensor(output).expand(len(x_BND)) for output in outputs], dim=1)
    return int((y_BM != answers_BM).any(dim=1).sum())
