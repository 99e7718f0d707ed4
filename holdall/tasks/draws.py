"""What generators of synthetic tasks draw from: whole numbers, with and without repetition, and quickly."""

from __future__ import annotations

import numpy as np


def check_whole(name: str, number: int, least: int) -> None:
    """Raise TypeError unless `number` is an int, ValueError if it is less than `least`; both name it."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name} must be an int, got {number!r}")
    if number < least:
        raise ValueError(f"{name} {number} is less than {least}")


def uniform(
    rng: np.random.Generator, count: int, size: int | tuple[int, int], vocab: int | None = None
) -> np.ndarray:
    """Uniform whole numbers below count; in 16 bits if the vocabulary fits (or count): less to move."""
    return rng.integers(count, size=size, dtype=np.uint16 if (vocab or count) <= 1 << 16 else np.int64)


def distinct(rng: np.random.Generator, rows: int, draws: int, count: int) -> np.ndarray:
    """(rows, draws) numbers below count, int64: each row uniform over all ordered choices without repetition.

    Draws with repetition, then again what repeats an earlier draw of its row, until nothing does. That is
    exactly uniform: which draws are made again depends only on which are equal, so renaming the numbers by a
    permutation renames the result and leaves its probability as it was; and some permutation takes any choice
    of distinct numbers to any other, so all are equally likely.
    """
    if 2 * draws > count:  # most numbers are taken, and drawing again would rarely hit a free one
        return rng.permuted(np.tile(np.arange(count), (rows, 1)), axis=1)[:, :draws]
    bits = draws.bit_length()
    small: type[np.signedinteger] = np.int32 if count << bits < 1 << 31 else np.int64
    drawn_BK = uniform(rng, count, (rows, draws)).astype(small)
    open_rows, draw_K = np.arange(rows), np.arange(draws, dtype=small)
    while True:
        # number and draw in one: sorted, equal numbers are neighbours and the earliest draw comes first
        both = drawn_BK[open_rows] << bits | draw_K
        both.sort(axis=1)
        number = both >> bits
        again = number[:, 1:] == number[:, :-1]
        row, column = np.divmod(np.flatnonzero(again), max(1, draws - 1))
        if not len(row):
            return drawn_BK
        drawn_BK[open_rows[row], both[row, column + 1] & ((1 << bits) - 1)] = uniform(rng, count, len(row))
        open_rows = open_rows[np.unique(row)]
