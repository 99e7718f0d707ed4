"""Induction heads and associative recall: one question at the end of each row.

    InductionHeads(vocab=12, length=14).generate(1, seed=0):  "=>" is the trigger, "?" the question

    8  6  5  2  3  0  0  0  1  8  6 =>  5  6 =>?  -> 5, the token after the first =>

    AssociativeRecall(vocab=10, length=8).generate(1, seed=0):  keys 0 .. 3, values 4 .. 7

    3  5  1  6  0  7  2  6 =>  0?  -> 7, the value that stood after that key

Letters: B rows, N tokens of a row that a model reads.

Both use a vocabulary of V tokens, of which V - 2 is the trigger "=>" and V - 1 stands for nothing; these
two never answer. Induction heads: `length` tokens uniform over 0 .. V - 3; at a uniform place but the last
two, one is replaced by the trigger; the trigger follows once more, and asks for the token after the first.
Associative recall: the lower half of 0 .. V - 3 are keys, the upper half values. A row gives each key a
value, uniform and with repetition, shows `length` / 2 pairs whose keys are uniform with repetition, then
the trigger and a key that was shown, uniform among those; the question is its value. The latest pair of a
key and its first agree.

Published settings, to which the numbers of the H3 paper belong: induction heads with V = 20, length 30 (a
guess among the V - 2 answers is right in 5.6%, reported as 5%), associative recall with V = 10, length 20
(25%).

Source: Fu, Dao, Saab, Thomas, Rudra, Ré, "Hungry Hungry Hippos", 2022, arXiv 2212.14052, section 3.1; the
distribution is that of safari's generator. Not kept: its removal of duplicate rows.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdall.contract import Config
from holdall.settings import PositiveInt, Range

BLOCK = 4096
"""Rows drawn from one generator; part of what a seed means."""


class Tags(NamedTuple):
    """What makes each question hard; int64, (B, 1) each."""

    distance: Tensor
    """Tokens from what is asked for, where it last stood, to the question."""
    shown: Tensor
    """How often what is asked for was shown before."""


class Batch(NamedTuple):
    """Rows and their one question each, int64: tokens (B, N), positions and answers (B, 1)."""

    tokens: Tensor
    positions: Tensor
    answers: Tensor

    def content_hash(self) -> str:
        """The sha256 of all three, in hex; the same on every machine."""
        digest = hashlib.sha256()
        for column in self:
            digest.update(f"int64 {tuple(column.shape)}\n".encode())
            digest.update(column.contiguous().cpu().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class SingleQuery(Config):
    """Base of the two tasks: `length` tokens of context, then a question.

    Raises TypeError for a wrong type and ValueError for inconsistent settings; both name the field.
    """

    vocab: PositiveInt
    """V, all tokens, of which the last two never answer."""
    length: PositiveInt
    """Tokens of the context, before the question."""

    @property
    def trigger(self) -> int:
        """The token written "=>"."""
        return self.vocab - 2

    @property
    @abstractmethod
    def values(self) -> int:
        """The number of possible answers."""

    @property
    @abstractmethod
    def row_length(self) -> int:
        """N, the tokens that a model reads: the context and what asks."""

    @abstractmethod
    def _draw(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """Rows with their answer as one more token at the end, (rows, N + 1)."""

    @abstractmethod
    def oracle(self, tokens_BN: Tensor) -> Tensor:
        """The answers, (B, 1), found in the tokens alone: what a perfect model computes."""

    def generate(self, rows: int, seed: int = 0) -> Batch:
        """Draw rows; seed and settings alone decide them, and the first n of m rows are those of generate(n).

        Raises ValueError unless rows is at least 1 and seed at least 0.
        """
        if rows < 1 or seed < 0:
            raise ValueError(f"rows {rows} must be at least 1 and seed {seed} at least 0")
        blocks = [
            self._draw(np.random.default_rng([seed, block]), BLOCK) for block in range(-(-rows // BLOCK))
        ]
        drawn_BN = torch.from_numpy(np.concatenate(blocks)[:rows].astype(np.int64))
        tokens_BN, answers_B1 = drawn_BN.split([self.row_length, 1], dim=1)
        return Batch(
            tokens_BN.contiguous(), torch.full_like(answers_B1, self.row_length - 1), answers_B1.contiguous()
        )

    def tags(self, batch: Batch) -> Tags:
        """The difficulty of each question, read from the tokens."""
        asks_B1 = batch.tokens.gather(1, batch.positions)
        earlier_BN = (batch.tokens == asks_B1) & (torch.arange(self.row_length) < batch.positions)
        last_B1 = (earlier_BN * torch.arange(self.row_length)).amax(1, keepdim=True)
        return Tags(batch.positions - last_B1, earlier_BN.sum(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class InductionHeads(SingleQuery):
    """The token after the trigger's first occurrence, asked for by its second; see the module."""

    vocab: Annotated[int, Range(least=4)] = 20
    length: Annotated[int, Range(least=3)] = 30

    @property
    def values(self) -> int:
        return self.vocab - 2

    @property
    def row_length(self) -> int:
        return self.length + 1

    def _draw(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        tokens = rng.integers(self.vocab - 2, size=(rows, self.length))
        place = rng.integers(self.length - 2, size=(rows, 1))
        answer = np.take_along_axis(tokens, place + 1, axis=1)
        np.put_along_axis(tokens, place, self.trigger, axis=1)
        return np.concatenate((tokens, np.full((rows, 1), self.trigger), answer), axis=1)

    def oracle(self, tokens_BN: Tensor) -> Tensor:
        first_B1 = (tokens_BN == self.trigger).int().argmax(1, keepdim=True)
        return tokens_BN.gather(1, first_B1 + 1)


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(SingleQuery):
    """The value of one key among pairs that were shown; see the module."""

    vocab: Annotated[int, Range(least=6)] = 10
    length: Annotated[int, Range(least=2)] = 20

    def validate(self) -> None:
        if self.vocab % 2:
            raise ValueError(f"vocab {self.vocab} must be even: two keys, two values, two more")
        if self.length % 2:
            raise ValueError(f"length {self.length} must be even: pairs take two tokens")

    @property
    def values(self) -> int:
        return self.vocab // 2 - 1

    @property
    def row_length(self) -> int:
        return self.length + 2

    def _draw(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        pairs = self.length // 2
        value_of = self.values + rng.integers(self.values, size=(rows, self.values))
        keys = rng.integers(self.values, size=(rows, pairs))
        shown = np.zeros((rows, self.values), bool)
        np.put_along_axis(shown, keys, True, axis=1)
        # of the keys that were shown, each is asked for as often as the others, however often it was shown
        asked = np.where(shown, rng.random((rows, self.values)), -1.0).argmax(1)[:, None]
        context = np.stack((keys, np.take_along_axis(value_of, keys, axis=1)), axis=2).reshape(rows, -1)
        trigger = np.full((rows, 1), self.trigger)
        return np.concatenate((context, trigger, asked, np.take_along_axis(value_of, asked, axis=1)), axis=1)

    def oracle(self, tokens_BN: Tensor) -> Tensor:
        found_BN = tokens_BN[:, : self.length] == tokens_BN[:, -1:]
        return tokens_BN.gather(1, found_BN.int().argmax(1, keepdim=True) + 1)


def drawing(task: SingleQuery, batch: Batch, row: int = 0) -> str:
    """One row as a line of text, its answer behind an arrow."""
    tokens = ["=>" if token == task.trigger else str(token) for token in batch.tokens[row].tolist()]
    return " ".join(f"{token:>2}" for token in tokens) + f"?  -> {int(batch.answers[row])}"


def main() -> None:
    """Print a row of each task."""
    from rich.console import Console

    for task in (InductionHeads(), AssociativeRecall()):
        Console().print(f"{task}\n{drawing(task, task.generate(1))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
