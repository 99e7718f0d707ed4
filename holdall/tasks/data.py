"""What a training loop needs of a synthetic task: batches by step number, and test segments.

A *segment* is a number of rows of one length and difficulty. A batch never mixes segments, so that its rows
have one length and one number of questions. The order is a pure function of (seed, step): a run that was
stopped goes on with exactly the batch that it would have seen.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from holdall.contract import Config, did_you_mean
from holdall.settings import PositiveFloat, PositiveInt, Seed
from holdall.tasks.mqar import MQAR
from holdall.tasks.single_query import AssociativeRecall, InductionHeads, SingleQuery


class Questions(NamedTuple):
    """Rows with where they are asked something, and the answers. B rows, N tokens, Q questions a row."""

    tokens_BN: Tensor
    at_BQ: Tensor
    answer_BQ: Tensor


@dataclass(frozen=True, kw_only=True)
class Segment(Config):
    """So many rows of one length with one number of key-value pairs, which is how hard they are."""

    length: PositiveInt
    pairs: PositiveInt
    rows: PositiveInt


Task = MQAR | SingleQuery
"""What draws rows, with the positions and the answers of their questions."""

D = TypeVar("D", bound="DataConfig")
_kinds: dict[str, type[DataConfig]] = {}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Base of the tasks' data: segments to train and to test on.

    seed: of the rows; training and test rows never share a stream. All runs of a sweep see the same rows.
    """

    vocab: PositiveInt
    train: tuple[Segment, ...]
    test: tuple[Segment, ...]
    seed: Seed = 0

    kind: ClassVar[str]
    """The task's name in files."""

    def __init_subclass__(cls) -> None:
        _kinds[cls.kind] = cls

    def validate(self) -> None:
        if not self.train or not self.test:
            raise ValueError("both train and test need at least one segment")
        for segment in (*self.train, *self.test):
            self.task(segment)  # raises if the segment does not fit

    @abstractmethod
    def task(self, segment: Segment) -> Task:
        """What draws this segment's rows."""

    @abstractmethod
    def questions_per_row(self, segment: Segment) -> int:
        """How many questions a test row asks: what a state must answer for."""

    def to_practise(self, rows: Questions) -> Questions:
        """The questions that training rows are trained on: by default their own."""
        return rows

    def row_length(self, segment: Segment) -> int:
        """Tokens that a model reads of a row of this segment."""
        return segment.length

    @property
    def longest(self) -> int:
        """Tokens of the longest row of any segment."""
        return max(self.row_length(segment) for segment in (*self.train, *self.test))

    def to_dict(self) -> dict[str, Any]:
        """All fields and the task's name, so that the dictionary alone tells which data it is."""
        return {"kind": self.kind, **super().to_dict()}

    @classmethod
    def from_dict(cls: type[D], plain: Mapping[str, Any]) -> D:
        """The data of the task that `plain["kind"]` names, whichever class this is called on."""
        plain = dict(plain)
        kind = plain.pop("kind", getattr(cls, "kind", "mqar"))
        if kind not in _kinds:
            raise TypeError(f"unknown task '{kind}'. {did_you_mean(kind, _kinds)}")
        owner = _kinds[kind]
        if not issubclass(owner, cls):
            raise TypeError(f"'{kind}' is not a {cls.__name__}")
        return super(DataConfig, owner).from_dict(plain)

    def test_settings(self) -> dict[str, Any]:
        """All that decides the test rows, as plain JSON values."""
        return {name: value for name, value in self.to_dict().items() if name not in ("train", "practise")}

    def build(self, device: torch.device | None = None) -> TaskData:
        return TaskData(self, device)


@dataclass(frozen=True, kw_only=True)
class MQARData(DataConfig):
    """Multi-query associative recall."""

    power: PositiveFloat = 0.01
    filler: Literal["zero", "random", "key-free"] = "random"

    kind = "mqar"

    def task(self, segment: Segment) -> MQAR:
        return MQAR(
            vocab=self.vocab,
            length=segment.length,
            pairs=segment.pairs,
            power=self.power,
            filler=self.filler,
        )

    def questions_per_row(self, segment: Segment) -> int:
        return segment.pairs


@dataclass(frozen=True, kw_only=True)
class SingleQueryData(DataConfig):
    """Induction heads or associative recall: one question at the end of a row.

    practise: train on the answers alone or, as published, on every next token of a row.

    A segment's `length` is that of the context; its `pairs` are the pairs shown, 1 for induction heads.
    """

    task_name: Literal["induction-heads", "associative-recall"]
    practise: Literal["answers", "every token"] = "every token"

    kind = "single-query"

    def task(self, segment: Segment) -> SingleQuery:
        induction = self.task_name == "induction-heads"
        pairs = 1 if induction else segment.length // 2
        if segment.pairs != pairs:
            raise ValueError(
                f"{self.task_name} of length {segment.length} shows {pairs} pairs, not {segment.pairs}"
            )
        return (InductionHeads if induction else AssociativeRecall)(vocab=self.vocab, length=segment.length)

    def questions_per_row(self, segment: Segment) -> int:
        return 1

    def row_length(self, segment: Segment) -> int:
        return self.task(segment).row_length

    def to_practise(self, rows: Questions) -> Questions:
        if self.practise == "answers":
            return rows
        following_BN = torch.cat((rows.tokens_BN[:, 1:], rows.answer_BQ), dim=1)
        everywhere_BN = torch.arange(following_BN.shape[1], device=following_BN.device).expand_as(
            following_BN
        )
        return Questions(rows.tokens_BN, everywhere_BN.contiguous(), following_BN)


class TaskData:
    """The rows of a task's segments, made once, on the device that trains."""

    def __init__(self, config: DataConfig, device: torch.device | None = None) -> None:
        self.config = config
        streams = np.random.SeedSequence(config.seed).generate_state(len(config.train) + len(config.test))
        made = [
            self._make(segment, int(stream), device)
            for segment, stream in zip((*config.train, *config.test), streams, strict=True)
        ]
        self.train = [config.to_practise(rows) for rows in made[: len(config.train)]]
        self.test = made[len(config.train) :]

    def _make(self, segment: Segment, seed: int, device: torch.device | None) -> Questions:
        batch = self.config.task(segment).generate(segment.rows, seed=seed)
        questions = Questions(batch.tokens, batch.positions, batch.answers)
        return Questions(*(tensor.to(device) for tensor in questions))

    def steps_per_epoch(self, batch: int) -> int:
        """Batches in which every training row is seen once; the last of a segment may be smaller."""
        return sum(-(-len(segment.tokens_BN) // batch) for segment in self.train)

    def batch(self, seed: int, step: int, batch: int) -> Questions:
        """The rows of one training step: a fresh shuffle in each epoch."""
        epoch, which, part = self.place(step, batch)
        rows = self.order(seed, epoch, which)[part]
        return Questions(*(tensor[rows.to(tensor.device)] for tensor in self.train[which]))

    def place(self, step: int, batch: int) -> tuple[int, int, slice]:
        """The epoch of a step, its segment, and which part of that segment's order its rows are.

        None of it depends on a seed: at every step all members of a population have batches of one shape.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch))
        which, part = self._plan(epoch, batch)[index]
        return epoch, which, slice(part * batch, (part + 1) * batch)

    def rows_before(self, step: int, batch: int) -> int:
        """How many rows the steps before this one have shown."""
        epoch, index = divmod(step, self.steps_per_epoch(batch))
        sizes = [len(segment.tokens_BN) for segment in self.train]
        begun = [(which, part * batch) for which, part in self._plan(epoch, batch)[:index]]
        return epoch * sum(sizes) + sum(min(batch, sizes[which] - start) for which, start in begun)

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
    def order(self, seed: int, epoch: int, which: int) -> Tensor:
        """The order in which an epoch shows a segment's rows, on the CPU."""
        rng = np.random.default_rng([seed, epoch, which])
        return torch.from_numpy(rng.permutation(len(self.train[which].tokens_BN)))
