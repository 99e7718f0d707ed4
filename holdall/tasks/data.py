"""What a training loop needs of a synthetic task: batches by step number, and test segments.

A *segment* is a number of rows of one length and difficulty. A batch never mixes segments, so that its rows
have one length and one number of questions. The order is a pure function of (seed, step): a run that was
stopped goes on with exactly the batch that it would have seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdall.contract import Config
from holdall.tasks.mqar import MQAR


class Questions(NamedTuple):
    """Rows with where they are asked something, and the answers. B rows, N tokens, Q questions a row."""

    tokens_BN: Tensor
    at_BQ: Tensor
    answer_BQ: Tensor


@dataclass(frozen=True, kw_only=True)
class Segment(Config):
    """So many rows of one length with one number of key-value pairs."""

    length: int
    pairs: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class MQARData(Config):
    """Multi-query associative recall: segments to train and to test on.

    seed: of the rows; training and test rows never share a stream. All runs of a sweep see the same rows.
    """

    vocab: int
    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    power: float = 0.01
    filler: Literal["zero", "random", "key-free"] = "random"
    seed: int = 0

    def validate(self) -> None:
        if not self.train or not self.test:
            raise ValueError("both train and test need at least one segment")
        for segment in (*self.train, *self.test):
            self.task(segment)  # raises if the pairs do not fit

    def task(self, segment: Segment) -> MQAR:
        return MQAR(
            vocab=self.vocab,
            length=segment.length,
            pairs=segment.pairs,
            power=self.power,
            filler=self.filler,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest row of any segment."""
        return max(segment.length for segment in (*self.train, *self.test))

    def build(self, device: torch.device | None = None) -> TaskData:
        return TaskData(self, device)


class TaskData:
    """The rows of a task's segments, made once, on the device that trains."""

    def __init__(self, config: MQARData, device: torch.device | None = None) -> None:
        self.config = config
        streams = np.random.SeedSequence(config.seed).generate_state(len(config.train) + len(config.test))
        made = [
            self._make(segment, int(stream), device)
            for segment, stream in zip((*config.train, *config.test), streams, strict=True)
        ]
        self.train, self.test = made[: len(config.train)], made[len(config.train) :]

    def _make(self, segment: Segment, seed: int, device: torch.device | None) -> Questions:
        batch = self.config.task(segment).generate(segment.rows, seed=seed)
        questions = Questions(batch.tokens, batch.positions, batch.answers)
        return Questions(*(tensor.to(device) for tensor in questions))

    def steps_per_epoch(self, batch: int) -> int:
        """Batches in which every training row is seen once; the last of a segment may be smaller."""
        return sum(-(-len(segment.tokens_BN) // batch) for segment in self.train)

    def batch(self, seed: int, step: int, batch: int) -> Questions:
        """The rows of one training step: a fresh shuffle in each epoch.

        Which segment a step takes does not depend on the seed: at every step all members of a population
        have batches of one shape.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch))
        which, part = self._plan(epoch, batch)[index]
        rows = self._shuffle(seed, epoch, which)[part * batch : (part + 1) * batch]
        return Questions(*(tensor[rows.to(tensor.device)] for tensor in self.train[which]))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the rows
    def _plan(self, epoch: int, batch: int) -> list[tuple[int, int]]:
        """(segment, which part of its rows) of each step of an epoch."""
        steps = [
            (which, part)
            for which, segment in enumerate(self.train)
            for part in range(-(-len(segment.tokens_BN) // batch))
        ]
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(steps))
        return [steps[i] for i in order]

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one entry per segment and member of a population
    def _shuffle(self, seed: int, epoch: int, which: int) -> Tensor:
        rng = np.random.default_rng([seed, epoch, which])
        return torch.from_numpy(rng.permutation(len(self.train[which].tokens_BN)))
