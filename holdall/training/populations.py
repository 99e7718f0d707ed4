"""The training loop: one model, or a population of one architecture in a single batched pass.

A *population* is every pair of a learning rate and a seed. Its members start from their own seed, see their
own order of the same rows and have their own AdamW; they share only the arithmetic, so each ends where it
would have ended alone. A member stops when it reaches the wanted accuracy, or when its loss is no number.

Everything that decides a result is in the config; the state of a run is the step number, the members'
weights and AdamW's moments. The run folder holds them, and the same call goes on from there to the bit.

Letters: P members that still train, B rows, N tokens, Q questions a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from holdall import checkpoints, environment, files, settings
from holdall.contract import Config
from holdall.files import RunError
from holdall.model import Model, ModelConfig, Precision, repeatable, seeded
from holdall.settings import Betas, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Seed, Share
from holdall.tasks.data import DataConfig, Questions, TaskData, updated
from holdall.training.chassis import Background, Stopped
from holdall.training.stacked import Member, Population, loss, right


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A population: one model, one task, and each learning rate with each seed.

    batch: rows per step. epochs: passes over the training rows.
    schedule: learning rate along a cosine to zero, moved at every step or, as Zoology does, every epoch.
    warmup: steps over which the learning rate first rises.
    evaluate_every: steps between tests; 0 for once per epoch.
    stop_at: a member is done once its accuracy on the test rows is at least this; 0 to never stop early.
    precision: what a pass computes in, see holdall/model.py; "bf16" is meant for GPUs.
    """

    model: ModelConfig
    data: DataConfig
    learning_rates: tuple[PositiveFloat, ...]
    seeds: tuple[Seed, ...] = (0,)
    batch: PositiveInt = 256
    epochs: PositiveInt = 1
    schedule: Literal["step", "epoch"] = "step"
    warmup: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    betas: Betas = (0.9, 0.999)
    evaluate_every: NonNegativeInt = 0
    stop_at: Share = 0.99
    precision: Precision = "fp32"

    def validate(self) -> None:
        if not self.learning_rates or not self.seeds:
            raise ValueError("a population needs at least one learning rate and one seed")
        if len(set(self.members)) != len(self.members):
            raise ValueError(
                f"a member occurs twice in learning rates {self.learning_rates}, seeds {self.seeds}"
            )
        if self.model.vocab < self.data.vocab:
            raise ValueError(
                f"the model's vocab {self.model.vocab} is smaller than the task's {self.data.vocab}"
            )
        if 0 < self.model.positions < self.data.longest:
            raise ValueError(
                f"the model has {self.model.positions} positions, the task rows of {self.data.longest} tokens"
            )

    @property
    def members(self) -> tuple[tuple[float, int], ...]:
        """(learning rate, seed) of each member."""
        return tuple((rate, seed) for seed in self.seeds for rate in self.learning_rates)


@dataclass(frozen=True)
class Progress:
    """How far a population is: for whoever draws the bars."""

    step: int
    steps: int
    loss: float
    accuracy: float
    """Of the best member, at the last test."""


CHECKPOINT_SECONDS = 20.0
TOKENS_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 18}
"""Of a test, all members together: what fits into a CPU's cache, and what fills a GPU."""


def train(
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    together: bool | None = None,
    keep_weights: bool = True,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> list[dict[str, Any]]:
    """Train a population, or go on with it, and return one result per member.

    Args:
        folder: the run folder; made if needed. If it holds a checkpoint of the same config, training goes on
            from there, and if it holds results, they are returned.
        together: whether members share one batched pass; None for "on a GPU": two cores are full with one.
        keep_weights: whether the run folder keeps the trained weights, one file per member.
        on_progress: called a few times a second at most.
        should_stop: asked before every step; True writes a checkpoint and raises Stopped.
        checkpoint_seconds: at most so much work is lost to a crash.

    Raises:
        RunError: the folder cannot be written, is in use, or holds another config.
        Stopped: should_stop said so.
    """
    device = torch.device(device)
    together = device.type != "cpu" if together is None else together
    with files.locked(folder), repeatable(device), own_stream(device):
        if (done := finished(config, folder)) is not None:
            return done
        run = Trainer(config, folder, device, together, keep_weights)
        results = run.run(on_progress, should_stop, checkpoint_seconds)
        files.write_json(folder / "result.json", results)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return results


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream of its own, backward passes included: the default one cannot be recorded."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)), torch.autograd.set_multithreading_enabled(False):
        yield


def finished(config: TrainConfig, folder: Path) -> list[dict[str, Any]] | None:
    """The results that a run folder holds, None if it has not ended there.

    Raises RunError if the folder holds another config.
    """
    _check(folder, config)
    if not (done := folder / "result.json").exists():
        return None
    way_out = "Remove it, and the same command makes it again."
    found = files.read_json(done, way_out, list)
    results = [
        MemberResult.checked(_updated(each, config.data), f"result {index} in {done}", way_out)
        for index, each in enumerate(found)
    ]
    if [(each.learning_rate, each.seed) for each in results] != list(config.members):
        raise files.damaged(done, "it is of other learning rates or seeds", way_out)
    return [each.to_dict() for each in results]


def _updated(member: Any, data: DataConfig) -> Any:
    """A member of result.json or of a checkpoint in the form of this version.

    Before, the difficulty of every task was called pairs.
    """
    if not isinstance(member, Mapping) or "accuracy_by_pairs" not in member:
        return member
    accuracies = member["accuracy_by_pairs"]
    tags = dict.fromkeys(str(data.tag(segment)) for segment in data.test)
    if data.difficulty != "pairs" and isinstance(accuracies, Mapping) and len(accuracies) == len(tags):
        accuracies = dict(zip(tags, accuracies.values(), strict=True))
    kept = {name: value for name, value in member.items() if name != "accuracy_by_pairs"}
    return {**kept, "accuracy_by_difficulty": accuracies}


OTHER = "Restore it from a copy, or choose another folder."


def _check(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds this run; RunError if it holds another."""
    path = folder / "config.json"
    if not path.exists():
        return False
    plain = {name: updated(value) for name, value in files.read_json(path, OTHER).items()}
    held = TrainConfig.checked(plain, path, OTHER)  # fields that an earlier version lacked get their defaults
    if said := settings.differ(held.to_dict(), config.to_dict()):
        raise RunError(
            f"{folder} holds a run with another config (in {path.name}, {said}); choose another folder"
        )
    return True


def _claim(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """Write what this run is, if the folder does not say so yet.

    After the first step, before anything else is written: a run that is refused earlier leaves its folder to
    the corrected command.
    """
    if not _check(folder, config):
        files.write_json(
            folder / "environment.json", environment.describe(str(device), torch.get_num_threads())
        )
        files.write_json(folder / "config.json", config.to_dict())


@functools.lru_cache(maxsize=1)
def _rows(config: DataConfig, device: torch.device) -> TaskData:
    """The task's rows, made once for all runs of this process."""
    data = config.build(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other runs' streams will read them
    return data


Ending = Literal["", "accuracy", "diverged", "end"]


@dataclass(frozen=True, kw_only=True)
class MemberResult(Config):
    """What result.json says of a member, once a run has ended."""

    learning_rate: PositiveFloat
    seed: Seed
    accuracy: Share | None
    """On the test rows; None where training diverged."""
    accuracy_by_difficulty: dict[str, Share]
    """On the test rows of each difficulty, by the task's tag."""
    steps: NonNegativeInt
    rows: NonNegativeInt
    """Read in training."""
    stopped: Ending
    """By what training ended."""
    seconds: NonNegativeFloat
    """Of training, over all calls, all members together."""
    forms: tuple[str, ...]
    """Which form of each layer's mixer ran."""
    weights: str | None
    """The file that has the trained weights."""

    def validate(self) -> None:
        if not all(tag.isdecimal() for tag in self.accuracy_by_difficulty):
            raise ValueError(f"accuracy_by_difficulty is by numbers, not {list(self.accuracy_by_difficulty)}")


@dataclass(frozen=True, kw_only=True)
class MemberState(Config):
    """What a checkpoint says of a member beside its tensors; the fields are those of Member."""

    stopped: Ending
    steps: NonNegativeInt
    accuracy: Share
    accuracy_by_difficulty: dict[str, Share]


@dataclass(frozen=True, kw_only=True)
class RunState(Config):
    """What a checkpoint says beside its tensors."""

    step: NonNegativeInt
    seconds: NonNegativeFloat
    """Of training, over all calls."""
    members: tuple[MemberState, ...]
    metrics_bytes: NonNegativeInt
    """Of metrics.jsonl at this step; what is behind is written again."""


class Trainer:
    """A population in training."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        together: bool,
        keep_weights: bool = True,
    ) -> None:
        self.config, self.folder, self.device, self.together = config, folder, device, together
        self.keep_weights, self.metrics = keep_weights, folder / "metrics.jsonl"
        self.data = _rows(config.data, device)
        self.members = [self._member(rate, seed) for rate, seed in config.members]
        self.population: Population | None = None
        self.step = 0
        self.seconds = 0.0
        self.epoch_steps = self.data.steps_per_epoch(config.batch)
        self.steps = config.epochs * self.epoch_steps
        self.writer = Background()
        self._resume()

    def _member(self, rate: float, seed: int) -> Member:
        with seeded(seed):
            model = self.config.model.build()
        model = model.to(self.device)
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(),
            # a step that is recorded and replayed finds the rate where it lies on the device
            lr=torch.tensor(rate, device=self.device) if on_gpu else rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        return Member(rate, seed, model, optimizer)

    # ------------------------------------------------------------------------------------------ the loop

    def run(
        self,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_seconds: float,
    ) -> list[dict[str, Any]]:
        try:
            self._train(on_progress, should_stop, checkpoint_seconds)
            self.writer.wait()
        finally:
            self.writer.close()
        if self.keep_weights:
            for index, member in enumerate(self.members):
                self._write_weights(self.folder / f"model-{index}.safetensors", member)
        return [self._result(index, member) for index, member in enumerate(self.members)]

    def _train(
        self,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_seconds: float,
    ) -> None:
        started = saved = told = time.monotonic()
        earlier, loss, claimed = self.seconds, math.nan, False
        every = self.config.evaluate_every or self.epoch_steps
        while self.step < self.steps and (alive := [m for m in self.members if not m.stopped]):
            now = time.monotonic()
            self.seconds = earlier + now - started
            if should_stop():
                if self.step:
                    self._save()
                    self.writer.wait()
                raise Stopped
            if self.step and now - saved > checkpoint_seconds:
                self._save()
                saved = now
            losses_P = self.train_step(alive)
            if not claimed:
                _claim(self.folder, self.config, self.device)
                claimed = True
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                self._test(alive, losses_P)
            if now - told > 0.3:
                told, loss = now, float(losses_P.min())
                best = max(member.accuracy for member in self.members)
                on_progress(Progress(self.step, self.steps, loss, best))
        self.seconds = earlier + time.monotonic() - started

    def train_step(self, alive: Sequence[Member]) -> Tensor:
        """One step of every member that still trains; returns their losses, (P,), until the next step."""
        share = self._schedule()
        for member in alive:
            member.set_rate(member.learning_rate * share)
            member.steps = self.step + 1
        if self.together:
            return self._together(alive).step(self.step)
        losses = []
        for member in alive:
            batch = self.data.batch(member.seed, self.step, self.config.batch)
            losses.append(
                loss(member.model, dict(member.model.named_parameters()), batch, self.config.precision)
            )
            losses[-1].backward()
            member.optimizer.step()
            member.optimizer.zero_grad()
        return torch.stack(losses).detach()

    def _together(self, alive: Sequence[Member]) -> Population:
        """These members as one; made anew where one has left since."""
        if self.population is None or self.population.members != alive:
            self.population = None  # its memory first
            self.population = Population(
                alive,
                self.data,
                self.config.batch,
                self.config.precision,
                record=self.device.type == "cuda",
            )
        return self.population

    def _schedule(self) -> float:
        """The share of the learning rate at this step."""
        if self.config.schedule == "epoch":
            share = (self.step // self.epoch_steps) / self.config.epochs
        else:
            share = self.step / self.steps
        rise = min(1.0, (self.step + 1) / self.config.warmup) if self.config.warmup else 1.0
        return rise * 0.5 * (1 + math.cos(math.pi * share))

    def _test(self, alive: Sequence[Member], losses_P: Tensor) -> None:
        """Score the members that still train, and let those go that are done."""
        losses = losses_P.tolist()
        tags = [str(self.config.data.tag(segment)) for segment in self.config.data.test]
        for member, loss_now, scores in zip(alive, losses, self._accuracies(alive), strict=True):
            if math.isfinite(loss_now):
                by_tag: dict[str, list[float]] = {}
                for tag, score in zip(tags, scores, strict=True):
                    by_tag.setdefault(tag, []).append(score)
                member.accuracy = sum(scores) / len(scores)
                member.accuracy_by_difficulty = {tag: sum(s) / len(s) for tag, s in by_tag.items()}
            else:
                member.stopped, member.accuracy, member.accuracy_by_difficulty = "diverged", 0.0, {}
            if not member.stopped and 0 < self.config.stop_at <= member.accuracy:
                member.stopped = "accuracy"
            elif not member.stopped and self.step == self.steps:
                member.stopped = "end"
            line = {
                "step": self.step,
                "learning_rate": member.learning_rate,
                "seed": member.seed,
                "loss": loss_now if math.isfinite(loss_now) else None,
                "accuracy": member.accuracy,
                "accuracy_by_difficulty": member.accuracy_by_difficulty,
                "seconds": round(self.seconds, 3),
            }
            files.append_line(self.metrics, line)

    def _accuracies(self, alive: Sequence[Member]) -> list[list[float]]:
        """The accuracy of each member on each test segment."""
        tokens = TOKENS_AT_ONCE[self.device.type]
        if self.together:
            return self._together(alive).accuracies(tokens)
        return [
            [accuracy(member.model, segment, self.config.precision, tokens) for segment in self.data.test]
            for member in alive
        ]

    def _result(self, index: int, member: Member) -> dict[str, Any]:
        return MemberResult(
            learning_rate=member.learning_rate,
            seed=member.seed,
            accuracy=None if member.stopped == "diverged" else member.accuracy,
            accuracy_by_difficulty=member.accuracy_by_difficulty,
            steps=member.steps,
            rows=self.data.rows_before(member.steps, self.config.batch),
            stopped=member.stopped,  # type: ignore[arg-type]
            seconds=round(self.seconds, 3),
            forms=tuple(mixer.form for mixer in member.model.mixers),
            weights=f"model-{index}.safetensors" if self.keep_weights else None,
        ).to_dict()

    # ---------------------------------------------------------------------------------------- checkpoints

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the run's state, by name."""
        for index, member in enumerate(self.members):
            weights = dict(member.model.named_parameters())
            for name, tensor in member.model.state_dict().items():
                yield f"{index}.{name}", tensor
                if name not in weights:  # a buffer
                    continue
                weight = weights[name]
                moments = member.optimizer.state[weight]
                if not moments:  # AdamW makes them at its first step
                    moments["step"] = torch.zeros((), device=self.device)
                    moments["exp_avg"] = torch.zeros_like(weight)
                    moments["exp_avg_sq"] = torch.zeros_like(weight)
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    yield f"{index}.{name}.{key}", moments[key]

    def _save(self) -> None:
        """Begin to write a checkpoint: what it holds is copied now, the file is made by another thread."""
        self.writer.wait()
        fields = [field.name for field in dataclasses.fields(MemberState)]
        members = tuple(MemberState(**{name: getattr(m, name) for name in fields}) for m in self.members)
        state = RunState(
            step=self.step,
            seconds=self.seconds,
            members=members,
            metrics_bytes=files.size_on_disk(self.metrics),
        )
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors()
        }
        copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        self.writer.do(self._write, tensors, {"state": json.dumps(state.to_dict())}, copied)

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, str], copied: Any) -> None:
        """Write a checkpoint: the other thread's part. It waits for the copy alone, not for later steps."""
        if copied is not None:
            copied.synchronize()
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        checkpoints.write(self.folder / "checkpoint.safetensors", tensors, metadata)

    def _resume(self) -> None:
        """Return to the last checkpoint; lines of metrics written after it will be written again."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            self.metrics.unlink(missing_ok=True)
            return
        with checkpoints.opened(path, "Remove it to start this run again.") as file:
            where = f"the header of {path}"
            plain = files.parse_json(file.about.get("state", ""), where, file.way_out)
            if isinstance(plain.get("members"), list):
                plain["members"] = [_updated(member, self.config.data) for member in plain["members"]]
            state = RunState.checked(plain, where, file.way_out)
            if state.step > self.steps or len(state.members) != len(self.members):
                raise file.damaged(f"it is of step {state.step:,} of {len(state.members)} members")
            file.fill(dict(self._tensors()))
        self.step, self.seconds = state.step, state.seconds
        for member, saved in zip(self.members, state.members, strict=True):
            for field in dataclasses.fields(saved):
                setattr(member, field.name, getattr(saved, field.name))
        if lost := files.shorten(self.metrics, state.metrics_bytes):
            warnings.warn(
                f"{self.metrics} lacks {lost:,} bytes that were there at step {self.step:,}", stacklevel=2
            )

    def _write_weights(self, path: Path, member: Member) -> None:
        """All that makes the model what it is: parameters, and what was drawn and stays."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in member.model.state_dict().items()}
        metadata = {"config": json.dumps(self.config.model.to_dict())}
        checkpoints.write(path, tensors, metadata)


@torch.no_grad()
def accuracy(model: Model, questions: Questions, precision: Precision, tokens_at_once: int) -> float:
    """The share of questions that a model answers right."""
    weights, hits = dict(model.named_parameters()), 0
    rows = max(1, tokens_at_once // questions.tokens_BN.shape[1])
    for part in zip(*(tensor.split(rows) for tensor in questions), strict=True):
        hits += int(right(model, weights, Questions(*part), precision).sum())
    return hits / questions.answer_BQ.numel()
