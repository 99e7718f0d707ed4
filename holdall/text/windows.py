"""The order of training windows: a seeded shuffle that is computed, not stored.

Tokens are cut into consecutive windows, each of `context_len` inputs and as many targets, one token later:

    tokens        0 1 2 3 4 5 6 7 8 9        context_len = 3
    window 0      0 1 2 3                    inputs 0 1 2, targets 1 2 3
    window 1            3 4 5 6              the last target of a window is the first input of the next: every
    window 2                  6 7 8 9        token but the first is a target once per epoch

The window at each place of an epoch is given by a keyed permutation, computed only for the places that are
needed. So training can start anywhere at no cost, memory does not grow with the number of windows, and the
order is the same for any number of workers and devices and any version of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
"""Rounds of the Feistel network. Four suffice for a pseudorandom permutation; the rest is margin."""


@dataclass(frozen=True)
class Order:
    """The windows of each training step. Raises ValueError if not even one window fits."""

    tokens: int
    """Number of tokens, all documents concatenated."""
    context_len: int
    """Inputs per window, N."""
    seed: int
    """Seed of the shuffle."""

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
        """First tokens of the windows of a step, for its whole batch over all devices: (batch,) int64.

        Rows are numbered through all steps, and windows through all epochs: row r is window r. So a device
        takes its own rows, and the batch size does not change the order.
        """
        if step < 0 or batch < 1:
            raise ValueError(f"step {step} is negative or batch {batch} is not positive")
        row_B = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
        epoch_B, place_B = np.divmod(row_B, np.uint64(self.windows))
        return _permuted(place_B, self.windows, _key(self.seed, epoch_B)).astype(np.int64) * self.context_len


def _permuted(place_B: np.ndarray, size: int, key_B: np.ndarray) -> np.ndarray:
    """A permutation of 0 .. size - 1 for each key, at the given places; all uint64.

    A Feistel network permutes the numbers below the next power of four, at least a quarter of which are below
    `size`. Results above are permuted again until they fall below (cycle walking, Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out_B = place_B.copy()
    walking = np.ones(len(place_B), dtype=bool)
    while walking.any():
        left, right, key = out_B[walking] >> half, out_B[walking] & mask, key_B[walking]
        for round_ in range(ROUNDS):
            mixed = mix(right ^ mix(key + np.uint64(round_)))
            left, right = right, left ^ (mixed >> (np.uint64(64) - half))
        out_B[walking] = left << half | right
        walking = out_B >= size
    return out_B


def _key(seed: int, epoch_B: np.ndarray) -> np.ndarray:
    return mix(mix(np.full_like(epoch_B, seed & 0xFFFF_FFFF_FFFF_FFFF)) ^ epoch_B)


def mix(x: np.ndarray) -> np.ndarray:
    """Mixes 64 bits so that each output bit depends on all input bits: splitmix64 (Steele et al., 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
