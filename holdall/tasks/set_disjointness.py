"""Set disjointness: a row shows a set A and then a set B, and asks for the token that both have.

    SetDisjointness(vocab=16, first=2, second=4).generate(1, seed=0):  "[" begins the input, "|" divides the
    sets, "?" is the question

     [ 10 14  | 15 11  8 14  ?  -> 14, the only token of both

Letters: B rows, N tokens of a row, A and B the first set and the second, |A| and |B| their sizes, V the
vocabulary, U the tokens that can be elements, p how often the input is read.

What a causal model carries over the "|" must say of A whatever B may ask for. So it needs more state where
the large set comes first, and the order of the same two sets decides how hard a row is. A model that reads
the input a second time (`reads` = 2, "just read twice"), or that sees all of it at every token, can choose
the small one.

Tokens 0 .. 3 are special, of which 0 never occurs; all others are elements. Two forms of the answer:

    element   the one token that is in both sets
    yes-no    whether there is such a token: token 5 for yes, 4 for no, in half of the rows each. Elements
              then begin at 6

and two distributions:

    random    A is uniform over the ordered choices of |A| elements. One of its tokens, uniform, is in B; the
              other tokens of B are uniform over those that A has not. This is the published distribution
    blocked   the elements are divided into consecutive blocks of |B| tokens. A has one token, uniform, of
              each of its |A| blocks, in random order; B is one of these blocks, shuffled. For yes-no there
              are 2 |A| blocks, and A has a token of one block of each two. B is any of the blocks

On blocked rows, B is an index and A what it points into: |A| independent symbols of an alphabet of |B| (of
two for yes-no), any of which may be asked for, so that Fano's inequality bounds the state of every causal
model (holdall/tasks/information.py). It also bounds it on random rows, with fewer symbols: draw m disjoint
sets of |B| tokens at random, give A one token of each and |A| - m from elsewhere, and let B be any of the
sets. A and B together are then distributed as on random rows, and B is again an index into m independent
symbols. It takes m (|B| - 1) + |A| <= U elements, or m (2 |B| - 1) + |A| for yes-no; `symbols` is the largest
such m.

With `reads` = p, the whole input stands p times in the row, from "[" to "?", and the last "?" is the
question.

Source: Arora, Timalsina, Singhal, Spector, Eyuboglu, Zhao, Rao, Rudra, Ré, "Just read twice: closing the
recall gap for recurrent language models", 2024, arXiv 2407.05483, section 3 and its published generator,
whose draws `generate_published` makes. The yes-no form and the blocked distribution are of its lower bound.

    python -m holdall.tasks.set_disjointness      prints a row of each kind
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdall.contract import Config
from holdall.settings import PositiveInt, Range
from holdall.tasks.draws import check_whole, distinct
from holdall.tasks.information import Asked, index_bits
from holdall.tasks.single_query import Batch

BEGIN, DIVIDE, ASK = 1, 2, 3
NO, YES = 4, 5
NAMES = {BEGIN: "[", DIVIDE: "|", ASK: "?"}

BLOCK = 1 << 18
"""Tokens drawn from one generator; part of what a seed means."""

Answer = Literal["element", "yes-no"]
Distribution = Literal["random", "blocked"]


class NotPublishedError(ValueError):
    """The published generator has no such option."""


class Tags(NamedTuple):
    """What makes each question hard; int64, (B, 1) each."""

    first: Tensor
    """|A|, the size of the set that is read first."""
    second: Tensor
    """|B|, the size of the other."""
    short_first: Tensor
    """1 where the first set is the smaller one, else 0."""
    distance: Tensor
    """Tokens from the common element in A, where it was last read, to the question; -1 where there is none.
    """


@dataclass(frozen=True, kw_only=True)
class SetDisjointness(Config):
    """The task; see the module's docstring for an example, the distributions and the paper.

    Raises TypeError for a wrong type and ValueError for settings that do not fit, each naming the field.
    """

    vocab: Annotated[int, Range(least=6)] = 2048
    """V, all tokens, of which the first few are special."""
    first: PositiveInt = 4
    """|A|, the tokens of the set that is read first."""
    second: PositiveInt = 16
    """|B|, the tokens of the set that is read after it."""
    reads: PositiveInt = 1
    """How often the whole input is read, p: 2 is "just read twice"."""
    answer: Answer = "element"
    """What is asked for: the common "element", or whether there is one, "yes-no"."""
    distribution: Distribution = "random"
    """Which sets there are: "random", as published, or "blocked", an index problem."""

    def validate(self) -> None:
        if (needed := self._needed()) > self.elements:
            way = "pairs of blocks" if self._pairs else "blocks"
            why = (
                f"{self.first} {way} of {self.second} tokens"
                if self.distribution == "blocked"
                else f"sets of {self.first} and {self.second} tokens"
            )
            raise ValueError(
                f"vocab {self.vocab} has {self.elements} elements, fewer than the {needed} that {why} take: "
                f"raise vocab to {needed + self.special}, or lower first or second"
            )

    def _needed(self) -> int:
        """The elements that the two sets take."""
        if self.distribution == "blocked":
            return self.first * self.second * (2 if self._pairs else 1)
        return self.first + self.second - (0 if self._pairs else 1)

    @property
    def _pairs(self) -> bool:
        return self.answer == "yes-no"

    @property
    def special(self) -> int:
        """The tokens that are no elements: those below the first element."""
        return YES + 1 if self._pairs else ASK + 1

    @property
    def elements(self) -> int:
        """U, the number of tokens that can be elements."""
        return self.vocab - self.special

    @property
    def values(self) -> int:
        """The answers that remain to one who has read B alone."""
        return 2 if self._pairs else self.second

    @property
    def symbols(self) -> int:
        """m, the independent symbols that B is an index into; see the module's docstring."""
        if self.distribution == "blocked":
            return self.first
        each = 2 * self.second - 1 if self._pairs else self.second - 1
        free = self.elements - self.first
        # one symbol needs no other sets: whatever B is, it alone says nothing about its answer
        return max(1, min(self.first, free // each if each else self.first))

    @property
    def asked(self) -> Asked:
        """What the state of a causal model must answer for.

        After one read, B is an index into `symbols` independent symbols. What a model carries into the last
        read of B may have been chosen for that B, which it has seen before: then the bound is what remains to
        be said of B's one answer, whatever the sets. (The state of p reads is of the order of
        min(|A|, |B|) / p, proposition 3.1 of the paper, without a constant that could be drawn.)
        """
        return Asked(self.symbols if self.reads == 1 else 1, self.values, distinct=False)

    @property
    def input_length(self) -> int:
        """Tokens of one read."""
        return self.first + self.second + 3

    @property
    def row_length(self) -> int:
        """N, the tokens that a model reads."""
        return self.reads * self.input_length

    def generate(self, rows: int, seed: int = 0) -> Batch:
        """Draw rows; the seed and the settings alone decide them.

        Nothing global is read or changed, and the first n of m rows are the rows of `generate(n)`. Rows of
        another number of reads have the same sets.

        Args:
            rows: B, at least 1.
            seed: at least 0, of any size.

        Raises:
            TypeError, ValueError: rows or seed is not such a number.
        """
        check_whole("rows", rows, 1)
        check_whole("seed", seed, 0)
        block = max(1, BLOCK // self.input_length)
        draw = self._draw_blocked if self.distribution == "blocked" else self._draw_random
        drawn = [draw(np.random.default_rng([seed, index]), block) for index in range(-(-rows // block))]
        first_BA, second_BB, answer_B1 = (np.concatenate(part)[:rows] for part in zip(*drawn, strict=True))
        return self._written(first_BA, second_BB, answer_B1)

    def _draw_random(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, B and the answers, (rows, 1), of random sets."""
        shared = 0 if self._pairs else 1
        drawn = self.special + distinct(rng, rows, self.first + self.second - shared, self.elements)
        first_BA, others = drawn[:, : self.first], drawn[:, self.first :]
        common_B1 = np.take_along_axis(first_BA, rng.integers(self.first, size=(rows, 1)), axis=1)
        place_B1 = rng.integers(self.second, size=(rows, 1))
        if not self._pairs:
            # B's other tokens are exchangeable: the one that stood there moves to the end
            second_BB = np.concatenate((others, common_B1), axis=1)
            last_B1 = np.take_along_axis(second_BB, place_B1, axis=1)
            second_BB[:, -1:] = last_B1
            np.put_along_axis(second_BB, place_B1, common_B1, axis=1)
            return first_BA, second_BB, common_B1
        meet_B1 = rng.integers(2, size=(rows, 1))
        second_BB = others.copy()
        there_B1 = np.take_along_axis(second_BB, place_B1, axis=1)
        np.put_along_axis(second_BB, place_B1, np.where(meet_B1, common_B1, there_B1), axis=1)
        return first_BA, second_BB, NO + meet_B1

    def _draw_blocked(self, rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, B and the answers, (rows, 1), of blocks."""
        of_block_BA = np.tile(np.arange(self.first), (rows, 1))
        if self._pairs:
            of_block_BA = 2 * of_block_BA + rng.integers(2, size=of_block_BA.shape)
        in_block_BA = rng.integers(self.second, size=of_block_BA.shape)
        first_BA = self.special + self.second * of_block_BA + in_block_BA
        asked_B1 = rng.integers(self.first, size=(rows, 1))
        common_B1 = np.take_along_axis(first_BA, asked_B1, axis=1)
        block_B1 = np.take_along_axis(of_block_BA, asked_B1, axis=1)
        answer_B1 = common_B1
        if self._pairs:
            meet_B1 = rng.integers(2, size=(rows, 1))
            block_B1 = np.where(meet_B1, block_B1, block_B1 ^ 1)  # the other one of the pair
            answer_B1 = NO + meet_B1
        block_BB = self.special + self.second * block_B1 + np.arange(self.second)
        return rng.permuted(first_BA, axis=1), rng.permuted(block_BB, axis=1), answer_B1

    def _written(self, first_BA: np.ndarray, second_BB: np.ndarray, answer_B1: np.ndarray) -> Batch:
        """The rows of these sets."""
        rows = len(first_BA)
        begin, divide, ask = (np.full((rows, 1), token) for token in (BEGIN, DIVIDE, ASK))
        one_read = np.concatenate((begin, first_BA, divide, second_BB, ask), axis=1)
        tokens_BN = torch.from_numpy(np.tile(one_read, (1, self.reads)).astype(np.int64))
        answers_B1 = torch.from_numpy(answer_B1.astype(np.int64))
        return Batch(tokens_BN, torch.full_like(answers_B1, self.row_length - 1), answers_B1)

    def generate_published(self, rows: int, seed: int = 0) -> Batch:
        """Draw, one by one, what the published generator draws for this seed; slow.

        It takes A from one half of the elements and B from the other, both drawn anew for each row, and
        writes one token of A over one of B. That is the random distribution, as long as the sets fit.

        Args:
            rows: B, at least 1.
            seed: 0 .. 2**32 - 1.

        Raises:
            NotPublishedError: the answer "yes-no", the "blocked" distribution, or sets that are too large.
            TypeError, ValueError: rows or seed is not such a number.
        """
        check_whole("rows", rows, 1)
        check_whole("seed", seed, 0)
        half = self.vocab // 2
        if self._pairs or self.distribution == "blocked":
            raise NotPublishedError('only random sets whose common element is asked for were published: '
                                    'take answer "element" and distribution "random"')  # fmt: skip
        if self.first > half or self.second > self.elements - half:
            raise NotPublishedError(
                f"the published generator takes at most {half} tokens for the first set and "
                f"{self.elements - half} for the second: lower first and second, or raise vocab"
            )
        if seed >= 1 << 32:
            raise ValueError(f"seed {seed} is more than NumPy's legacy generator takes: at most 2**32 - 1")
        rng = np.random.RandomState(seed)
        firsts, seconds, answers = [], [], []
        for _ in range(rows):
            shuffled = rng.permutation(np.arange(self.special, self.vocab))
            first = rng.choice(shuffled[:half], self.first, replace=False)
            second = rng.choice(shuffled[half:], self.second, replace=False)
            common = first[rng.randint(self.first)]
            second[rng.randint(self.second)] = common
            firsts.append(first)
            seconds.append(second)
            answers.append([common])
        return self._written(np.stack(firsts), np.stack(seconds), np.array(answers))

    # ---------------------------------------------------------------------------------------- reading rows

    def sets(self, tokens_BN: Tensor) -> tuple[Tensor, Tensor]:
        """The two sets of each row, (B, |A|) and (B, |B|), as they stand in its first read."""
        start = self.first + 2
        return tokens_BN[:, 1 : start - 1], tokens_BN[:, start : start + self.second]

    def oracle(self, tokens_BN: Tensor) -> Tensor:
        """The answers, (B, 1), found in the tokens alone: what a perfect model computes."""
        first_BA, second_BB = self.sets(tokens_BN)
        meets_BA = (first_BA[:, :, None] == second_BB[:, None, :]).any(2)
        if self._pairs:
            return NO + meets_BA.any(1, keepdim=True).long()
        return first_BA.gather(1, meets_BA.int().argmax(1, keepdim=True))

    def tags(self, batch: Batch) -> Tags:
        """The difficulty of each question, read from the tokens."""
        first_BA, second_BB = self.sets(batch.tokens)
        meets_BA = (first_BA[:, :, None] == second_BB[:, None, :]).any(2)
        place_B1 = (self.row_length - self.input_length) + 1 + meets_BA.int().argmax(1, keepdim=True)
        first_B1, second_B1 = (torch.full_like(batch.answers, size) for size in (self.first, self.second))
        distance_B1 = torch.where(meets_BA.any(1, keepdim=True), batch.positions - place_B1, -1)
        return Tags(first_B1, second_B1, (first_B1 < second_B1).long(), distance_B1)


def drawing(batch: Batch, row: int = 0) -> str:
    """One row as a line of text, its answer behind an arrow."""
    answer = int(batch.answers[row])
    is_element = bool((batch.tokens[row] == answer).any())
    said = f"{answer}, the only token of both" if is_element else "yes" if answer == YES else "no"
    tokens = [NAMES.get(token, str(token)) for token in batch.tokens[row].tolist()]
    return " ".join(f"{token:>2}" for token in tokens) + f"  -> {said}"


def main() -> None:
    """Print a row of each kind, and the bits that a causal model's state needs for those of the paper."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for task in (
        SetDisjointness(vocab=16, first=2, second=4),
        SetDisjointness(vocab=16, first=4, second=2, reads=2),
        SetDisjointness(vocab=16, first=2, second=4, distribution="blocked"),
        SetDisjointness(vocab=16, first=2, second=4, answer="yes-no"),
    ):
        console.print(f"{task}\n{drawing(task.generate(1))}\n", highlight=False, soft_wrap=True)
    shares = (0.5, 0.9, 1.0)
    table = Table(title="Bits that any causal model's state must hold to answer so many questions right")
    for name in ("distribution", "first", "second", *(f"{share:.0%}" for share in shares)):
        table.add_column(name, justify="right")
    distributions: tuple[Distribution, ...] = ("random", "blocked")
    for distribution in distributions:
        for first, second in ((4, 16), (16, 4), (16, 768), (768, 16)):
            vocab = 2048 if distribution == "random" else first * second + 4
            task = SetDisjointness(vocab=vocab, first=first, second=second, distribution=distribution)
            bits = (index_bits(task.symbols, task.values, share) for share in shares)
            table.add_row(distribution, str(first), str(second), *(f"{count:,.1f}" for count in bits))
    console.print(table)


if __name__ == "__main__":
    main()
