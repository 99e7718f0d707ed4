"""What a sweep is: points that are tested on the same rows, and the runs that train them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from holdall.contract import Config
from holdall.model import ModelConfig, seeded
from holdall.tasks.data import DataConfig, Segment
from holdall.training.flops import flops_per_token
from holdall.training.populations import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Point(Config):
    """One model of a sweep, at one or more learning rates and seeds."""

    label: str
    """Its name in tables and figures; points that share it differ in width."""
    family: str
    """Points of one family share a colour in every figure."""
    train: TrainConfig
    """The model, its task, the learning rates and the seeds."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """A sweep: points that are tested on the same rows, so that one picture can compare them.

    Raises ValueError without a point, if points are tested on different rows or would share a run folder.
    """

    recipe: str
    """The name under which `holdall frontier` knows it."""
    points: tuple[Point, ...]
    """The models, in the order of the results."""
    part: str = ""
    """Which of a recipe's sweeps this is, where it has several."""
    takes_seeds: bool = False
    """Whether the recipe's user can ask for more seeds, which reports then advise."""

    @property
    def data(self) -> DataConfig:
        """The task of all points."""
        return self.points[0].train.data

    @property
    def context_len(self) -> int:
        """Tokens of the longest test row: the state size is counted after these."""
        return max(self.data.row_length(segment) for segment in self.data.test)

    @property
    def families(self) -> list[str]:
        """The families of its points, in order."""
        return list(dict.fromkeys(point.family for point in self.points))

    def validate(self) -> None:
        if not self.points:
            raise ValueError("a sweep needs at least one point")
        for point in self.points:
            if point.train.data.test_settings() != self.data.test_settings():
                raise ValueError(f"'{point.label}' is tested on other rows than '{self.points[0].label}'")
        seen: set[str] = set()
        for job in self.jobs(together=True):
            if job.folder in seen:
                raise ValueError(
                    f"two points would share the run folder '{job.folder}': give them other labels"
                )
            seen.add(job.folder)

    def jobs(self, *, together: bool) -> list[Job]:
        """The runs: each point's learning rates as one population per seed, or each member alone."""
        populations = [
            Job(dataclasses.replace(point, train=dataclasses.replace(point.train, seeds=(seed,))), True)
            for point in self.points
            for seed in point.train.seeds
        ]
        return populations if together else [single for job in populations for single in job.alone()]


@dataclass(frozen=True)
class Job:
    """One run of a sweep, of one seed."""

    point: Point
    together: bool
    """Whether its learning rates train as one population."""

    def alone(self) -> list[Job]:
        """Each learning rate of a population as a run of its own."""
        train = self.point.train
        singles = [dataclasses.replace(train, learning_rates=(rate,)) for rate in train.learning_rates]
        return [Job(dataclasses.replace(self.point, train=single), together=False) for single in singles]

    @property
    def model(self) -> str:
        """Runs of the same model take the same time per operation."""
        return f"{self.point.label} {self.point.train.model.width}"

    @property
    def title(self) -> str:
        """For progress bars: the label, a single learning rate, and the seed unless it is the first."""
        rate, seed = self.point.train.members[0]
        parts = [self.point.label, *([] if self.together else [f"lr {rate:.2g}"])]
        return ", ".join([*parts, f"seed {seed}"] if seed else parts)

    @property
    def folder(self) -> str:
        """Its folder's name within the sweep's `runs`."""
        rate, seed = self.point.train.members[0]
        parts = [self.point.label, f"width {self.point.train.model.width}"]
        parts += [f"seed {seed}"] if self.together else [f"lr {rate:.3g}", f"seed {seed}"]
        return re.sub(r"[^a-z0-9.+]+", "-", " ".join(parts).lower()).strip("-")

    @property
    def steps(self) -> int:
        """Training steps, if it does not end early."""
        train = self.point.train
        return train.epochs * sum(-(-segment.rows // train.batch) for segment in train.data.train)

    @property
    def operations(self) -> float:
        """FLOPs of all its steps and tests, counted; a test is a step without the backward pass."""
        train = self.point.train
        every = train.evaluate_every or max(1, self.steps // train.epochs)
        passes: list[tuple[Segment, float]] = [(segment, train.epochs) for segment in train.data.train]
        passes += [(segment, max(1, self.steps // every) / 3) for segment in train.data.test]
        return len(train.members) * sum(
            times * segment.rows * length * _flops(train.model, length)
            for segment, times in passes
            if (length := train.data.row_length(segment))
        )


@functools.lru_cache(maxsize=4096)
def _flops(model: ModelConfig, length: int) -> float:
    """FLOPs per token of a training step on rows of this length."""
    with seeded(0):
        return flops_per_token(model.build(), length)


def in_order(jobs: Sequence[Job]) -> list[int]:
    """The order in which jobs are trained: the shortest, so that a first point is there soon; then one of
    each model, then another of each, and so on.

    Within a round the longest first, so that none is left alone at the end. After the first round the speed
    of every model is known, and with it the remaining time.
    """
    rounds: Counter[str] = Counter()
    keys = []
    for job in jobs:
        keys.append((rounds[job.model], -job.operations))
        rounds[job.model] += 1
    shortest = sorted(range(len(jobs)), key=lambda index: (keys[index][0], -keys[index][1]))
    return shortest[:1] + sorted(shortest[1:], key=keys.__getitem__)
