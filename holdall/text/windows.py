"""The order of training windows: a seeded shuffle that nobody has to remember.

Tokens are cut into windows end to end; each gives `context_len` inputs and, one further, as many targets:

    tokens        0 1 2 3 4 5 6 7 8 9        context_len = 3
    window 0      0 1 2 3                    inputs 0 1 2, targets 1 2 3
    window 1            3 4 5 6              the last token of one is the first of the next: every token but
    window 2                  6 7 8 9        the very first is a target once in an epoch

Which window comes at which place of an epoch is a keyed permutation, worked out for the places that are asked
for and for no others. So it costs nothing to start anywhere, takes no memory however many windows there are,
and is the same for any number of workers, devices and versions of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
"""Of the Feistel network. Four make a permutation that looks random; the rest is margin."""


@dataclass(frozen=True)
class Order:
    """The windows of each training step.

    tokens: how many there are, all documents end to end. context_len: inputs of a window, N.
    Raises ValueError if not even one window fits.
    """

    tokens: int
    context_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.context_len < 1:
            raise ValueError(f"context_len {self.context_len} is not positive")
        if self.windows < 1:
            raise ValueError(
                f"{self.tokens} tokens do not fill one window of {self.context_len} and its last target: "
                "take more text or a shorter context"
            )

    @property
    def windows(self) -> int:
        """Windows in an epoch."""
        return max(0, self.tokens - 1) // self.context_len

    def rows(self, step: int, batch: int) -> np.ndarray:
        """Where the windows of a step start, for its whole batch over all devices: (batch,) int64.

        Row r of all steps together is window r of all epochs end to end, so that a device takes the rows of
        its own and a change of the batch changes no order.
        """
        if step < 0 or batch < 1:
            raise ValueError(f"step {step} is negative or batch {batch} is not positive")
        row_B = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
        epoch_B, place_B = np.divmod(row_B, np.uint64(self.windows))
        return _permuted(place_B, self.windows, _key(self.seed, epoch_B)).astype(np.int64) * self.context_len


def _permuted(place_B: np.ndarray, size: int, key_B: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. size - 1 for each key, at the given places; all uint64.

    A Feistel network permutes the next power of four, of which a quarter at least is below `size`. Whatever
    lands above is sent through once more until it lands below (Black and Rogaway, 2002, cycle walking).
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out_B = place_B.copy()
    walking = np.ones(len(place_B), dtype=bool)
    while walking.any():
        left, right, key = out_B[walking] >> half, out_B[walking] & mask, key_B[walking]
        for round_ in range(ROUNDS):
            mixed = _mix(right ^ _mix(key + np.uint64(round_)))
            left, right = right, left ^ (mixed >> (np.uint64(64) - half))
        out_B[walking] = left << half | right
        walking = out_B >= size
    return out_B


def _key(seed: int, epoch_B: np.ndarray) -> np.ndarray:
    return _mix(_mix(np.full_like(epoch_B, seed & 0xFFFF_FFFF_FFFF_FFFF)) ^ epoch_B)


def _mix(x: np.ndarray) -> np.ndarray:
    """64 bits to 64 bits, each of which depends on all: splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
