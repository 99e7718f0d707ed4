"""What a training loop needs of a synthetic task: batches by step number, and test segments.

A *segment* is a number of rows of one length and difficulty. What the difficulty is called is the task's own:
pairs in MQAR, tokens in induction heads. A batch never mixes segments, so that its rows have one length and
one number of questions. The order is a pure function of (seed, step): a run that was stopped resumes with
exactly the batch that it would have seen.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from holdall.contract import Config, did_you_mean
from holdall.settings import PositiveFloat, PositiveInt, Seed
from holdall.tasks.information import Asked
from holdall.tasks.mqar import MQAR
from holdall.tasks.set_disjointness import Answer, Distribution, SetDisjointness
from holdall.tasks.single_query import AssociativeRecall, InductionHeads, SingleQuery


class Questions(NamedTuple):
    """Rows with where they are asked something, and the answers. B rows, N tokens, Q questions a row."""

    tokens_BN: Tensor
    at_BQ: Tensor
    answer_BQ: Tensor


@dataclass(frozen=True, kw_only=True)
class Segment(Config):
    """Rows of one length and difficulty."""

    length: PositiveInt
    """Tokens of a row's context."""
    rows: PositiveInt
    """The number of rows."""


@dataclass(frozen=True, kw_only=True)
class MQARSegment(Segment):
    """Rows of MQAR: their difficulty is the number of key-value pairs."""

    pairs: PositiveInt
    """Key-value pairs of a row, each of which is asked for once."""


@dataclass(frozen=True, kw_only=True)
class SetSegment(Segment):
    """Rows of set disjointness: their difficulty is the size of the set that is read first.

    Its `length` is that of one read; `SetSegment.of(first, second, rows)` adds it up.
    """

    first: PositiveInt
    """Tokens of the set that is read first."""
    second: PositiveInt
    """Tokens of the set that is read after it."""

    @classmethod
    def of(cls, first: int, second: int, rows: int) -> SetSegment:
        """So many rows of sets of these sizes."""
        return cls(length=first + second + 3, rows=rows, first=first, second=second)

    def validate(self) -> None:
        if self.length != (length := self.first + self.second + 3):
            raise ValueError(
                f"length {self.length} is not {length}, that of sets of {self.first} and {self.second} "
                "tokens and three more: take SetSegment.of(first, second, rows)"
            )


@runtime_checkable
class Rows(Protocol):
    """What a task draws: B rows of N tokens with Q questions each, as `Questions` or under these names."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def answers(self) -> Tensor: ...


@runtime_checkable
class Task(Protocol):
    """What draws rows, with the positions and the answers of their questions."""

    @property
    def values(self) -> int:
        """The possible answers to a question."""
        ...

    def generate(self, rows: int, seed: int) -> Rows | Questions:
        """Draw rows; the seed and the task's settings alone decide them."""
        ...


D = TypeVar("D", bound="DataConfig")
_kinds: dict[str, type[DataConfig]] = {}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Base of the tasks' data: segments to train and to test on."""

    vocab: PositiveInt
    """Tokens of the task's vocabulary."""
    train: tuple[Segment, ...]
    """What is trained on."""
    test: tuple[Segment, ...]
    """What accuracies are taken on; the score is their mean."""
    seed: Seed = 0
    """The seed of the rows: all runs of a sweep see the same; training and test rows never share a stream."""

    kind: ClassVar[str]
    """The task's name in files."""
    difficulty: ClassVar[str]
    """What a segment's difficulty counts, as a plural: the tag of accuracies in results and reports."""

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

    @property
    @abstractmethod
    def about(self) -> str:
        """What the task asks, in a sentence or two for a report."""

    @abstractmethod
    def tag(self, segment: Segment) -> int:
        """The difficulty of a segment: how many of what `difficulty` names."""

    @abstractmethod
    def questions_per_row(self, segment: Segment) -> int:
        """How many questions a test row asks: what a state must answer for."""

    def asked(self, segment: Segment) -> Asked:
        """What a causal model's state must answer for, from which bounds on its bits follow.

        By default distinct answers, one to each of a row's questions.
        """
        return Asked(self.questions_per_row(segment), self.task(segment).values)

    def trained_on(self, rows: Questions) -> Questions:
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
        plain = dict(updated(plain))
        kind = plain.pop("kind", getattr(cls, "kind", "mqar"))
        if kind not in _kinds:
            raise TypeError(f"unknown task '{kind}'. {did_you_mean(kind, _kinds)}")
        owner = _kinds[kind]
        if not issubclass(owner, cls):
            raise TypeError(f"'{kind}' is not a {cls.__name__}")
        return super(DataConfig, owner).from_dict(plain)

    def test_settings(self) -> dict[str, Any]:
        """All that decides the test rows, as plain JSON values."""
        return {name: value for name, value in self.to_dict().items() if name not in ("train", "loss")}

    def build(self, device: torch.device | None = None) -> TaskData:
        return TaskData(self, device)


def updated(plain: Any) -> Any:
    """A task's data in the form of this version, from plain JSON values that any version wrote.

    Before, segments of all tasks had pairs, and `loss` was called "practise". Whatever is not such data is
    returned as it is.
    """
    if not isinstance(plain, Mapping) or plain.get("kind") != "single-query" or "practise" not in plain:
        return plain
    data = {"loss" if name == "practise" else name: value for name, value in plain.items()}
    for part in ("train", "test"):
        if isinstance(segments := data.get(part), list) and all(isinstance(s, Mapping) for s in segments):
            data[part] = [{name: s[name] for name in s if name != "pairs"} for s in segments]
    return data


ABOUT_MQAR = (
    "multi-query associative recall (MQAR): a model reads a list of key–value pairs and is later shown each "
    "key again. It must answer with the value that stood beside it"
)


@dataclass(frozen=True, kw_only=True)
class MQARData(DataConfig):
    """Multi-query associative recall."""

    train: tuple[MQARSegment, ...]
    test: tuple[MQARSegment, ...]
    power: PositiveFloat = 0.01
    """The exponent of the power law of the gaps between a pair and its question; 1 is uniform."""
    filler: Literal["zero", "random", "key-free"] = "random"
    """What stands between the questions (holdall/tasks/mqar.py)."""
    passes: PositiveInt = 1
    """How often the pairs are read before anything is asked; each pass more makes a row longer by
    two tokens a pair than its segment says.
    """

    kind = "mqar"
    difficulty = "pairs"

    @property
    def about(self) -> str:
        if self.passes == 1:
            return ABOUT_MQAR
        return f"{ABOUT_MQAR}. It reads the list {self.passes} times before it is asked anything"

    def row_length(self, segment: MQARSegment) -> int:  # type: ignore[override]
        return segment.length + 2 * segment.pairs * (self.passes - 1)

    def tag(self, segment: MQARSegment) -> int:  # type: ignore[override] # its segments are these
        return segment.pairs

    def task(self, segment: MQARSegment) -> MQAR:  # type: ignore[override]
        return MQAR(
            vocab=self.vocab,
            length=self.row_length(segment),
            pairs=segment.pairs,
            power=self.power,
            filler=self.filler,
            passes=self.passes,
        )

    def questions_per_row(self, segment: MQARSegment) -> int:  # type: ignore[override]
        return segment.pairs


@dataclass(frozen=True, kw_only=True)
class SingleQueryData(DataConfig):
    """Induction heads or associative recall: one question at the end of a row.

    A segment's `length` is that of the context, which is how hard its rows are.
    """

    task_name: Literal["induction-heads", "associative-recall"]
    """Which of the two."""
    loss: Literal["answers", "every token"] = "every token"
    """What is trained on: the answers alone or, as published, every next token of a row."""

    kind = "single-query"
    difficulty = "tokens"

    @property
    def about(self) -> str:
        if self.task_name == "induction-heads":
            return (
                "induction heads: somewhere in a row stands a mark. When it comes again at the end, a model "
                "must answer with the token that followed it"
            )
        return (
            "associative recall: a model reads pairs of a key and its value, some of them several times. It "
            "must answer with the value of the key at the end"
        )

    def tag(self, segment: Segment) -> int:
        return segment.length

    def task(self, segment: Segment) -> SingleQuery:
        task = InductionHeads if self.task_name == "induction-heads" else AssociativeRecall
        return task(vocab=self.vocab, length=segment.length)

    def questions_per_row(self, segment: Segment) -> int:
        return 1

    def row_length(self, segment: Segment) -> int:
        return self.task(segment).row_length

    def trained_on(self, rows: Questions) -> Questions:
        if self.loss == "answers":
            return rows
        following_BN = torch.cat((rows.tokens_BN[:, 1:], rows.answer_BQ), dim=1)
        everywhere_BN = torch.arange(following_BN.shape[1], device=following_BN.device).expand_as(
            following_BN
        )
        return Questions(rows.tokens_BN, everywhere_BN.contiguous(), following_BN)


@dataclass(frozen=True, kw_only=True)
class SetDisjointnessData(DataConfig):
    """Set disjointness: two sets, one after the other, and the token that both have."""

    train: tuple[SetSegment, ...]
    test: tuple[SetSegment, ...]
    reads: PositiveInt = 1
    """How often a row's whole input is read; 2 is "just read twice"."""
    answer: Answer = "element"
    """What is asked for: the common "element", or whether there is one, "yes-no"."""
    distribution: Distribution = "random"
    """Which sets there are: "random", as published, or "blocked" (holdall/tasks/set_disjointness.py)."""

    kind = "set-disjointness"
    difficulty = "tokens of the first set"

    def validate(self) -> None:
        super().validate()
        if all(self.task(segment).values == 1 for segment in self.test):
            raise ValueError("every test row has one token in its second set, which is the answer")
        orders: dict[int, set[bool]] = {}
        for segment in self.test:
            orders.setdefault(segment.first, set()).add(segment.first < segment.second)
        # accuracies are kept by the size of the first set, which must say which of both is the smaller one
        for first, short in orders.items():
            if len(short) > 1:
                raise ValueError(
                    f"a first set of {first} tokens is the smaller one in some test segments and not in "
                    "others, whose accuracies could not be told apart: change one of their sizes"
                )

    @property
    def about(self) -> str:
        asks = (
            "name the token that is in both" if self.answer == "element" else "say whether a token is in both"
        )
        times = "" if self.reads == 1 else f", {self.reads} times over"
        return f"set disjointness: a model reads one set of tokens and then another{times}. It must {asks}"

    def tag(self, segment: SetSegment) -> int:  # type: ignore[override] # its segments are these
        return segment.first

    def task(self, segment: SetSegment) -> SetDisjointness:  # type: ignore[override]
        return SetDisjointness(
            vocab=self.vocab,
            first=segment.first,
            second=segment.second,
            reads=self.reads,
            answer=self.answer,
            distribution=self.distribution,
        )

    def questions_per_row(self, segment: SetSegment) -> int:  # type: ignore[override]
        return 1

    def row_length(self, segment: SetSegment) -> int:  # type: ignore[override]
        return self.task(segment).row_length

    def asked(self, segment: SetSegment) -> Asked:  # type: ignore[override]
        return self.task(segment).asked


class TaskData:
    """The rows of a task's segments, made once, on the device that trains."""

    def __init__(self, config: DataConfig, device: torch.device | None = None) -> None:
        self.config = config
        streams = np.random.SeedSequence(config.seed).generate_state(len(config.train) + len(config.test))
        made = [
            self._make(segment, int(stream), device)
            for segment, stream in zip((*config.train, *config.test), streams, strict=True)
        ]
        self.train = [config.trained_on(rows) for rows in made[: len(config.train)]]
        self.test = made[len(config.train) :]

    def _make(self, segment: Segment, seed: int, device: torch.device | None) -> Questions:
        rows = self.config.task(segment).generate(segment.rows, seed=seed)
        if not isinstance(rows, Questions):
            rows = Questions(rows.tokens, rows.positions, rows.answers)
        return Questions(*(tensor.to(device) for tensor in rows))

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
