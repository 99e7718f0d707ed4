"""Multi-query associative recall (MQAR): a row shows key-value pairs, then asks for the value of every key.

    MQAR(vocab=32, length=24, pairs=3, filler="zero").generate(1, seed=0), with "." for nothing:

            key val key val key val ask   . ask   .   .   .   .   . ask   .   .   .   .   .   .   .   .   .
    tokens   10  22   1  17   3  20   3   .   1   .   .   .   .   .  10   .   .   .   .   .   .   .   .   .
    targets   .   .   .   .   .   .  20   .  17   .   .   .   .   .  22   .   .   .   .   .   .   .   .   .

Letters: B rows, N tokens of a row, K pairs (and so questions) of a row, p passes over the pairs, M = N - 2Kp
tokens after the pairs.

Of a vocabulary of V tokens, the keys are K distinct ones of 1 .. V//2 - 1 and the values K distinct ones of
V//2 .. V - 1, both uniform. The M tokens after the pairs hold `space` = M // 2 slots of two tokens, and key i
is asked for at the start of its own slot. For one key after the other, a slot is drawn among those left:
slot g = 1 .. space with probability proportional to a * g**(a - 1), a = `power`. With a = 0.01 most questions
come soon, as repeated bigrams of real text do, and those for the first pairs soonest. The target of a
question is its value. All other tokens after the pairs are filler:

    zero       token 0, which is neither a key nor a value
    random     uniform over the whole vocabulary, the published default. It can repeat a key before its
               question (1.5 of 64 questions at N = 1024), followed by any token. The answer is still the
               value in the pair, the key's first occurrence; a model that trusts the latest one errs
    key-free   uniform over all tokens but the row's own keys. Each key is seen twice, once before its value
               and once as the question, so nothing is ambiguous. Values stay allowed as filler: no question
               asks for one, and where one follows a question, that key is not asked for again

With `passes` = p, the pairs are read p times, one pass after the other, before anything is asked. `length`
counts all passes: with 2K (p - 1) tokens more, a row is the same as with one pass, but for these tokens.

    MQAR(vocab=32, length=30, pairs=3, passes=2, filler="zero").generate(1, seed=0), up to the first question:

            key val key val key val key val key val key val ask
    tokens   10  22   1  17   3  20  10  22   1  17   3  20   3

This follows "Just read twice" (arXiv 2407.05483), which repeats the context: when a model reads the pairs
again, it knows all keys. Questions come once, after the last pass, so that no number of passes lowers the
bits that a state needs.

Source: Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré, "Zoology: Measuring and Improving Recall in
Efficient Language Models", 2023, arXiv 2312.04927. `MQAR.generate` draws from that distribution quickly;
`MQAR.generate_published` reproduces the published draws exactly.

    python -m holdall.tasks.mqar      prints one row, and how many bits a state needs
"""

from __future__ import annotations

import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdall.contract import Config, did_you_mean
from holdall.settings import PositiveFloat, PositiveInt
from holdall.tasks.draws import check_whole, distinct, uniform

NOTHING_ASKED = -100
"""Target of tokens that are not questions; PyTorch's cross-entropy ignores it by default."""

FILLERS = ("zero", "random", "key-free")


class NotPublishedError(ValueError):
    """The published generator has no such option."""


# ------------------------------------------------------------------------------------------------- rows


class Tags(NamedTuple):
    """The difficulty of each question; int64, (B, K) each, in the order of `Batch.positions`."""

    distance: Tensor
    """Tokens from the key in its pair, where it was last read, to the question."""
    place: Tensor
    """Which pair of the row is asked for: 0 is the first, which most others may have overwritten since."""
    pairs: Tensor
    """K, the same for all rows of a batch, for slicing several batches together."""
    repeats: Tensor
    """How often filler showed the key between the pairs and the question; always 0 unless it is "random"."""


class _Columns(NamedTuple):
    tokens: Tensor
    positions: Tensor
    places: Tensor


class Batch(_Columns):
    """Rows and their questions, all int64.

        tokens (B, N)      what the model reads
        positions (B, K)   where the questions are, in reading order
        places (B, K)      which pair each of them asks for, counted from 0

    `passes` is how often the pairs are read.

    `answers`, `targets` and `tags` follow from these. They are computed on demand and cached: dense targets
    are as large as the tokens, and not needed if outputs are gathered at `positions`.
    """

    passes: int = 1

    def __new__(cls, tokens: Tensor, positions: Tensor, places: Tensor, passes: int = 1) -> Batch:
        batch = super().__new__(cls, tokens, positions, places)
        batch.passes = passes
        return batch

    @functools.cached_property
    def answers(self) -> Tensor:
        """The values asked for, (B, K), in the order of `positions`."""
        return self.tokens.gather(1, 2 * self.places + 1)

    @functools.cached_property
    def targets(self) -> Tensor:
        """(B, N): the answer at each question's position, -100 where nothing is asked."""
        return torch.full_like(self.tokens, NOTHING_ASKED).scatter_(1, self.positions, self.answers)

    @functools.cached_property
    def tags(self) -> Tags:
        """The difficulty of each question."""
        pairs = self.places.new_tensor(self.places.shape[1]).expand_as(self.places)
        last = 2 * self.places.shape[1] * (self.passes - 1)  # where the last pass begins
        return Tags(self.positions - last - 2 * self.places, self.places, pairs, self._repeats())

    def select(self, rows: slice | Tensor) -> Batch:
        """The batch of these rows."""
        tokens, positions, places = (column[rows] for column in self)
        return Batch(tokens, positions, places, self.passes)

    def content_hash(self) -> str:
        """The sha256 of tokens and targets, their dtype and shape, in hex; the same on every machine."""
        digest = hashlib.sha256()
        for name in ("tokens", "targets"):
            digest.update(f"{name} int64 {tuple(self.tokens.shape)}\n".encode())
            for start in range(0, len(self.tokens), 1024):  # so that no dense targets of all rows are made
                part = getattr(self.select(slice(start, start + 1024)), name)
                digest.update(part.contiguous().cpu().numpy().astype("<i8", copy=False).data)
        return digest.hexdigest()

    def _repeats(self) -> Tensor:
        """How often filler shows each question's key before it, (B, K)."""
        (rows, pairs), context = self.places.shape, 2 * self.places.shape[1]
        start = context * self.passes
        tokens_BN, positions_BK, places_BK = (column.cpu().numpy() for column in self)
        place_BM = _which_key(tokens_BN[:, start:], tokens_BN[:, 0:context:2])
        asked_BK = np.empty_like(positions_BK)  # the position of the question for each pair
        np.put_along_axis(asked_BK, places_BK, positions_BK, axis=1)
        row, column = np.nonzero(place_BM >= 0)
        place = place_BM[row, column]
        earlier = start + column < asked_BK[row, place]
        counts_BK = np.bincount((row * pairs + place)[earlier], minlength=rows * pairs).reshape(rows, pairs)
        return torch.from_numpy(np.take_along_axis(counts_BK, places_BK, axis=1)).to(self.tokens.device)


# ------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True, kw_only=True)
class MQAR(Config):
    """The task; see the module's docstring for an example, the distribution and the paper.

    Raises TypeError for a wrong type and ValueError for settings that do not fit, each naming the field.
    """

    vocab: PositiveInt = 8192
    """V, all tokens: the lower half are keys (but 0), the upper half values."""
    length: PositiveInt = 64
    """N, the tokens of a row; may be odd, then the last one is filler."""
    pairs: PositiveInt = 4
    """K, the pairs of a row, each of which is asked for once."""
    power: PositiveInt | PositiveFloat = 0.01
    """The exponent of the power law of gaps; 1 is uniform."""
    filler: str = "random"
    """What stands where nothing is asked: "zero", "random" or "key-free"."""
    passes: PositiveInt = 1
    """How often the pairs are read, one pass after the other, before anything is asked, p."""

    def validate(self) -> None:
        if self.filler not in FILLERS:
            raise ValueError(f"unknown filler '{self.filler}'. {did_you_mean(self.filler, FILLERS)}")
        each = 2 * self.passes + 2
        if each * self.pairs > self.length:
            takes = "2 tokens" if self.passes == 1 else f"2 tokens in each of {self.passes} passes"
            raise ValueError(
                f"{self.pairs} pairs do not fit into length {self.length}: a pair takes {takes} and its "
                f"question a slot of 2, so {each} * pairs = {each * self.pairs} <= length must hold. "
                + (f"Lower pairs to {most} or raise" if (most := self.length // each) else "Raise")
                + f" length to {each * self.pairs}"
            )
        if self.keys < self.pairs:
            raise ValueError(
                f"vocab {self.vocab} has {max(0, self.keys)} keys (1 .. vocab // 2 - 1), fewer than "
                f"{self.pairs} pairs: raise vocab to {2 * self.pairs + 2} or lower pairs"
            )
        if (self.power - 1) * math.log(self.space) > 700:
            raise ValueError(
                f"power {self.power} makes the last of {self.space} slots likelier than the first by more "
                f"than a float can hold: lower power to {math.floor(1 + 700 / math.log(self.space))}"
            )

    @property
    def keys(self) -> int:
        """The number of possible keys."""
        return self.vocab // 2 - 1

    @property
    def values(self) -> int:
        """The number of possible values."""
        return self.vocab - self.vocab // 2

    @property
    def space(self) -> int:
        """The number of slots in which questions can come."""
        return (self.length - self.context) // 2

    @property
    def context(self) -> int:
        """Tokens of all passes over the pairs, before the first slot."""
        return 2 * self.pairs * self.passes

    @property
    def questions_per_row(self) -> int:
        return self.pairs

    def generate(self, rows: int, seed: int = 0) -> Batch:
        """Draw rows; the seed and the settings alone decide them.

        Nothing global is read or changed. Rows are made in blocks, each with a generator of its own, by as
        many threads as `torch.get_num_threads()` says; their number changes nothing. The same seed gives the
        same rows on every machine, and the first n of m rows are the rows of `generate(n)`. Two fillers
        with one seed have the same pairs and the same questions.

        Args:
            rows: B, at least 1.
            seed: at least 0, of any size.

        Raises:
            TypeError, ValueError: rows or seed is not such a number.
        """
        check_whole("rows", rows, 1)
        check_whole("seed", seed, 0)
        batch = self._room_for(rows)
        # the block is part of what a seed means: other sizes give other rows. This one stays in cache
        block = max(1, (1 << 18) // (self.length - self.context + 2 * self.pairs))
        starts = range(0, rows, block)

        def fill(start: int) -> None:
            rng = np.random.Generator(
                np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(start // block,)))
            )
            self._draw(rng, block, batch.select(slice(start, start + block)))

        workers = min(torch.get_num_threads(), len(starts))
        if workers == 1:
            list(map(fill, starts))
        else:
            with ThreadPoolExecutor(workers) as pool:  # NumPy lets go of the interpreter while it computes
                list(pool.map(fill, starts))
        return batch

    def _room_for(self, rows: int) -> Batch:
        # NumPy asks Linux for huge pages where PyTorch does not: first touching them is eight times quicker
        shapes = (rows, self.length), (rows, self.pairs), (rows, self.pairs)
        tokens, positions, places = (torch.from_numpy(np.empty(shape, np.int64)) for shape in shapes)
        return Batch(tokens, positions, places, self.passes)

    def _draw(self, rng: np.random.Generator, rows: int, into: Batch) -> None:
        """Draw a whole block, and write as many of its rows as there is room for."""
        keys_BK = 1 + distinct(rng, rows, self.pairs, self.keys)
        values_BK = self.vocab // 2 + distinct(rng, rows, self.pairs, self.values)
        # the race: exponential clocks with rates w_g. The next to ring is g with probability w_g / (sum of
        # those still running), so the order in which the clocks ring is that of successive draws. The common
        # factor a of the weights a g**(a - 1) drops out. Where a power function rounds otherwise, two clocks
        # swap only if they ring within 2**-52 of each other: less than once in 10**10 rows
        ring_BS = rng.standard_exponential((rows, self.space))
        ring_BS *= np.arange(1.0, self.space + 1) ** (1 - self.power)
        slots_BK = np.argsort(ring_BS, axis=1)[:, : self.pairs]
        # filler last: what was drawn before it does not depend on it
        filler_BM = self._draw_filler(rng, keys_BK)
        self._write(into, keys_BK, values_BK, slots_BK, filler_BM)

    def _draw_filler(self, rng: np.random.Generator, keys_BK: np.ndarray) -> np.ndarray | int:
        if self.filler == "zero":
            return 0
        size = len(keys_BK), self.length - self.context
        if self.filler == "random":
            return uniform(rng, self.vocab, size)
        # key-free: draw from 0 .. V-K-1, and let V-K+i stand in for key i. All keys are below V-K and the
        # stand-ins are values, so this maps one to one onto the tokens that are no key: exactly uniform
        spare = self.vocab - self.pairs
        filler_BM = uniform(rng, spare, size, vocab=self.vocab)
        place_BM = _which_key(filler_BM, keys_BK)
        hit_BM = place_BM >= 0
        filler_BM[hit_BM] = spare + place_BM[hit_BM]
        return filler_BM

    def _write(
        self,
        into: Batch,
        keys_BK: np.ndarray,
        values_BK: np.ndarray,
        slots_BK: np.ndarray,
        filler_BM: np.ndarray | int,
    ) -> None:
        """Lay out as many rows as there is room for."""
        tokens_BN, positions_BK, places_BK = (column.numpy() for column in into)
        rows, start = len(tokens_BN), self.context
        keys_BK, slots_BK = keys_BK[:rows], slots_BK[:rows]
        tokens_BN[:, 0:start:2] = np.tile(keys_BK, (1, self.passes))
        tokens_BN[:, 1:start:2] = np.tile(values_BK[:rows], (1, self.passes))
        tokens_BN[:, start:] = filler_BM if isinstance(filler_BM, int) else filler_BM[:rows]
        np.put_along_axis(tokens_BN, start + 2 * slots_BK, keys_BK, axis=1)
        # slot and pair in one number: a plain sort is several times quicker than sorting one by the other
        bits = self.pairs.bit_length()
        both_BK = slots_BK << bits | np.arange(self.pairs)
        both_BK.sort(axis=1)
        np.bitwise_and(both_BK, (1 << bits) - 1, out=places_BK)
        np.right_shift(both_BK, bits, out=positions_BK)
        positions_BK *= 2
        positions_BK += start

    def generate_published(
        self, rows: int, seed: int = 0, filler_rng: torch.Generator | None = None
    ) -> Batch:
        """Draw, one by one, what the published generator draws for this seed.

        It takes NumPy's legacy generator, and of it the keys of all rows, then all values, then all gaps.
        Each draw shuffles half the vocabulary, which is slow. Its filler comes from another generator, which
        the caller passes: there, PyTorch's global one in whatever state it happens to be. There is a number
        of passes there too, with which it raises an error for any but one; here it does what it says.

        Args:
            rows: B, at least 1.
            seed: 0 .. 2**32 - 1.
            filler_rng: a CPU generator for filler "random"; moves on by B * N draws.

        Raises:
            NotPublishedError: filler "key-free".
            TypeError, ValueError: rows or seed is not such a number; filler "random" without a generator.
        """
        check_whole("rows", rows, 1)
        check_whole("seed", seed, 0)
        if self.filler == "key-free":
            raise NotPublishedError('filler "key-free" was never published: take "zero" or "random"')
        if self.filler == "random" and filler_rng is None:
            raise ValueError(
                'filler "random" needs filler_rng: the published filler comes from PyTorch, not from the seed'
            )
        if seed >= 1 << 32:
            raise ValueError(f"seed {seed} is more than NumPy's legacy generator takes: at most 2**32 - 1")
        rng = np.random.RandomState(seed)
        weights_S = self.power * np.arange(1.0, self.space + 1) ** (self.power - 1)
        weights_S = weights_S / weights_S.sum()

        def choose(count: int, p: np.ndarray | None = None) -> np.ndarray:
            return np.stack([rng.choice(count, self.pairs, replace=False, p=p) for _ in range(rows)])

        keys_BK = 1 + choose(self.keys)
        values_BK = self.vocab // 2 + choose(self.values)
        slots_BK = choose(self.space, weights_S)
        filler_BM: np.ndarray | int = 0
        if self.filler == "random":
            # drawn for whole rows, and used only where nothing else stands
            filler_BN = torch.randint(self.vocab, (rows, self.length), generator=filler_rng)
            filler_BM = filler_BN[:, self.context :].numpy()
        batch = self._room_for(rows)
        self._write(batch, keys_BK, values_BK, slots_BK, filler_BM)
        return batch


def _which_key(tokens_BM: np.ndarray, keys_BK: np.ndarray) -> np.ndarray:
    """For each token the place of the key that it equals among its row's keys, -1 if it is none: (B, M)."""
    rows, pairs = keys_BK.shape
    width = int(keys_BK.max()) + 2  # one more column, in which all tokens above the largest key are looked up
    together = max(1, (1 << 18) // width)  # rows whose tables fit into cache
    table = np.full(min(rows, together) * width, -1, np.int32)
    place_BM = np.empty(tokens_BM.shape, np.int32)
    for start in range(0, rows, together):
        keys = keys_BK[start : start + together]
        row = np.arange(len(keys))[:, None] * width
        table[row + keys] = np.arange(pairs)
        tokens = row + np.minimum(tokens_BM[start : start + together], width - 1)
        np.take(table, tokens, out=place_BM[start : start + together], mode="clip")  # needs no copy
        table[row + keys] = -1
    return place_BM


# --------------------------------------------------------------------------------------------- a drawing


def drawing(batch: Batch, row: int = 0) -> str:
    """One row as three lines of text: what each token is, the tokens, the targets; "." for nothing."""
    tokens, targets = batch.tokens[row].tolist(), batch.targets[row].tolist()
    context = 2 * batch.places.shape[1] * batch.passes
    roles = ["key", "val"] * (context // 2) + ["."] * (len(tokens) - context)
    for position in batch.positions[row].tolist():
        roles[position] = "ask"
    lines = {
        "": roles,
        "tokens": [str(token or ".") for token in tokens],
        "targets": ["." if target == NOTHING_ASKED else str(target) for target in targets],
    }
    wide = max(3, len(str(max(tokens))))
    return "\n".join(
        f"{name:8}" + " ".join(f"{cell:>{wide}}" for cell in cells) for name, cells in lines.items()
    )


def main() -> None:
    """Print one drawn row, and the bits that a state needs for rows like the papers'."""
    from rich.console import Console
    from rich.table import Table

    from holdall.tasks.information import recall_bits

    console = Console()
    task = MQAR(vocab=32, length=24, pairs=3, filler="zero")
    console.print(f"{task}\n", highlight=False, soft_wrap=True)
    console.print(drawing(task.generate(1)), highlight=False, soft_wrap=True)
    shares = (0.5, 0.9, 1.0)
    table = Table(title="\nBits that any causal model's state must hold to answer so many questions right")
    for name in ("length", "pairs", "values", *(f"{share:.0%}" for share in shares)):
        table.add_column(name, justify="right")
    for each in (task, MQAR(), MQAR(length=256, pairs=64), MQAR(length=1024, pairs=256)):
        bits = (f"{recall_bits(each.pairs, each.values, share):,.1f}" for share in shares)
        table.add_row(str(each.length), str(each.pairs), str(each.values), *bits)
    console.print(table)


if __name__ == "__main__":
    main()
