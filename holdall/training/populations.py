"""Training of small models on a synthetic task: one model, or a population of one architecture in one pass.

A *population* is every pair of a learning rate and a seed. Its members start from their own seed, see their
own order of the same rows and have their own AdamW; they share only the arithmetic, so each ends where it
would have ended alone. A member stops when it reaches the wanted accuracy, or its loss is NaN or infinite.

Everything that decides a result is in the config; the state of a run is the step, the members' weights and
AdamW's moments. The run folder (holdall/training/chassis.py) holds them, and the same call resumes from there
bit-exactly.

Letters: P members that still train, B rows, N tokens, Q questions a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from holdall import checkpoints, files
from holdall.contract import Config
from holdall.model import Model, ModelConfig, repeatable, seeded
from holdall.precision import choose_forms, dtype_of
from holdall.settings import (
    Betas,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Seed,
    Share,
)
from holdall.tasks.data import DataConfig, Questions, TaskData
from holdall.training import schedule
from holdall.training.chassis import TRAIN_AGAIN, RunFolder, RunState, Stopped, Tensors
from holdall.training.optimizer import MOMENTS, moments
from holdall.training.stacked import Member, Population, loss, right


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A population: one model, one task, and each learning rate with each seed."""

    model: ModelConfig
    """The architecture that all members have."""
    data: DataConfig
    """The task that they train on and are tested on."""
    learning_rates: tuple[PositiveFloat, ...]
    """Peak learning rates; each is trained with each seed."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the initial weights and of the order of the rows."""
    batch: PositiveInt = 256
    """Rows per step, for each member."""
    epochs: PositiveInt = 1
    """Passes over the training rows."""
    schedule: Literal["step", "epoch"] = "step"
    """When the learning rate moves along its cosine to zero: at every step or, as in Zoology, every epoch."""
    warmup: NonNegativeInt = 0
    """Steps over which the learning rate first rises linearly; 0 for none."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay, of all parameters."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    evaluate_every: NonNegativeInt = 0
    """Steps between tests; 0 for once per epoch."""
    stop_at: Share = 0.99
    """A member stops once its accuracy on the test rows is at least this; 0 to never stop early."""
    precision: Precision = "fp32"
    """What a pass computes in (holdall/precision.py); "bf16" is meant for GPUs."""

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
    """Progress of a population, for progress bars."""

    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """The lowest loss of the members at this step, in nats."""
    accuracy: float
    """Accuracy of the best member at the last test."""


CHECKPOINT_SECONDS = 20.0
TOKENS_AT_ONCE = {"cpu": 1 << 15, "cuda": 1 << 18}
"""Tokens of one pass of a test, all members together: what fits into a CPU's cache, and what fills a GPU."""


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
    """Train a population, or resume it, and return one result per member.

    Args:
        folder: the run folder; made if needed. If it holds a checkpoint of the same config, training resumes
            from there, and if it holds results, they are returned.
        together: whether members share one batched pass; None for "on a GPU": one member fills two cores.
        keep_weights: whether the run folder keeps the trained weights, one file per member.
        on_progress: called a few times a second at most.
        should_stop: called before every step; True writes a checkpoint and raises Stopped.
        checkpoint_seconds: between checkpoints: the most work that a crash loses.

    Raises:
        RunError: the folder cannot be written, is in use, or holds another config.
        Stopped: should_stop returned True.
    """
    device = torch.device(device)
    together = device.type != "cpu" if together is None else together
    with files.locked(folder), repeatable(device), own_stream(device):
        if (done := finished(config, folder)) is not None:
            return done
        trainer = Trainer(config, folder, device, together, keep_weights)
        results = trainer.run(on_progress, should_stop, checkpoint_seconds)
        files.write_json(trainer.folder.result, results)
        trainer.folder.checkpoint.unlink(missing_ok=True)
        return results


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream of its own, backward passes included: the default one cannot be captured."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)), torch.autograd.set_multithreading_enabled(False):
        yield


def finished(config: TrainConfig, folder: Path) -> list[dict[str, Any]] | None:
    """The results that a run folder holds, None if the run has not finished.

    Raises RunError if the folder holds another config, or a damaged result.
    """
    run = _run_folder(config, folder)
    run.holds_run()  # RunError if it is another
    if not run.result.exists():
        return None
    plain = files.read_json(run.result, TRAIN_AGAIN, list)
    results = [
        MemberResult.checked(_updated(result, config.data), f"result {index} in {run.result}", TRAIN_AGAIN)
        for index, result in enumerate(plain)
    ]
    if [(result.learning_rate, result.seed) for result in results] != list(config.members):
        raise files.damaged(run.result, "it is of other learning rates or seeds", TRAIN_AGAIN)
    return [result.to_dict() for result in results]


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


def _run_folder(config: TrainConfig, folder: Path) -> RunFolder:
    def updated(state: dict[str, Any]) -> dict[str, Any]:
        members = state.get("members")
        if not isinstance(members, list):
            return state
        return {**state, "members": [_updated(member, config.data) for member in members]}

    return RunFolder(folder, config, "checkpoint.safetensors", updated=updated)


@functools.lru_cache(maxsize=1)
def _rows(config: DataConfig, device: torch.device) -> TaskData:
    """The task's rows, made once for all runs of this process."""
    data = config.build(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other runs' streams will read them
    return data


Ending = Literal["", "accuracy", "diverged", "end"]
"""Why a member stopped training; empty while it trains."""


@dataclass(frozen=True, kw_only=True)
class MemberResult(Config):
    """What result.json says of a member, once a run has finished."""

    learning_rate: PositiveFloat
    """The member's peak learning rate."""
    seed: Seed
    """The member's seed."""
    accuracy: Share | None
    """Accuracy on the test rows, the mean over test segments; None where training diverged."""
    accuracy_by_difficulty: dict[str, Share]
    """The same for the segments of each difficulty, by the task's tag."""
    steps: NonNegativeInt
    """Steps that the member trained."""
    rows: NonNegativeInt
    """Training rows that it read."""
    stopped: Ending
    """Why training stopped."""
    seconds: NonNegativeFloat
    """Spent training, over all calls, all members together."""
    forms: tuple[str, ...]
    """Which form of each layer's mixer ran."""
    weights: str | None
    """The file of the trained weights in the run folder; None if they were not kept."""

    def validate(self) -> None:
        if not all(tag.isdecimal() for tag in self.accuracy_by_difficulty):
            raise ValueError(f"accuracy_by_difficulty is by numbers, not {list(self.accuracy_by_difficulty)}")


@dataclass(frozen=True, kw_only=True)
class MemberState(Config):
    """What a checkpoint says of a member beside its tensors; the fields are those of Member."""

    stopped: Ending
    """Why it stopped training."""
    steps: NonNegativeInt
    """Steps that it trained."""
    accuracy: Share
    """At the last test."""
    accuracy_by_difficulty: dict[str, Share]
    """At the last test, by the task's tag of difficulty."""


@dataclass(frozen=True, kw_only=True)
class PopulationState(RunState):
    """What a checkpoint says of a population beside its tensors."""

    members: tuple[MemberState, ...]
    """Each member's part."""


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
        self.config, self.device, self.together = config, device, together
        self.keep_weights = keep_weights
        self.folder = _run_folder(config, folder)
        self.data = _rows(config.data, device)
        self.members = [self._member(rate, seed) for rate, seed in config.members]
        self.population: Population | None = None
        self.step = 0
        self.seconds = 0.0
        self.epoch_steps = self.data.steps_per_epoch(config.batch)
        self.steps = config.epochs * self.epoch_steps
        self._resume()

    def _member(self, rate: float, seed: int) -> Member:
        with seeded(seed):
            model = self.config.model.build()
        model = model.to(self.device)
        choose_forms(model, dtype_of(self.config.precision))
        on_gpu = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(),
            # a CUDA graph reads the rate from the device
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
        with self.folder:
            self._train(on_progress, should_stop, checkpoint_seconds)
        if self.keep_weights:
            for index, member in enumerate(self.members):
                self._write_weights(self.folder.path / f"model-{index}.safetensors", member)
        return [self._result(index, member) for index, member in enumerate(self.members)]

    def _train(
        self,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_seconds: float,
    ) -> None:
        started = reported = time.monotonic()
        earlier, loss = self.seconds, math.nan
        every = self.config.evaluate_every or self.epoch_steps
        while self.step < self.steps and (alive := [m for m in self.members if not m.stopped]):
            now = time.monotonic()
            self.seconds = earlier + now - started
            if should_stop():
                if self.step:
                    self._save()
                    self.folder.wait()
                raise Stopped
            if self.step and now - self.folder.saved_at > checkpoint_seconds:
                self._save()
            losses_P = self.train_step(alive)
            self.folder.claim(self.device)
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                self._test(alive, losses_P)
            if now - reported > 0.3:
                reported, loss = now, float(losses_P.min())
                best = max(member.accuracy for member in self.members)
                on_progress(Progress(self.step, self.steps, loss, best))
        self.seconds = earlier + time.monotonic() - started

    def train_step(self, alive: Sequence[Member]) -> Tensor:
        """One step of every member that still trains; returns their losses, (P,), until the next step."""
        factor = self._rate_factor()
        for member in alive:
            member.set_rate(member.learning_rate * factor)
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
        """These members as one; made again where one has left since."""
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

    def _rate_factor(self) -> float:
        """The learning rate at this step, as a share of its peak."""
        if self.config.schedule == "epoch":
            progress = (self.step // self.epoch_steps) / self.config.epochs
        else:
            progress = self.step / self.steps
        return schedule.warmup(self.step, self.config.warmup) * schedule.cosine(progress)

    def _test(self, alive: Sequence[Member], losses_P: Tensor) -> None:
        """Test the members that still train, and stop those that are done."""
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
            self.folder.log(line)

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
                if name in weights:  # it is no buffer
                    state = moments(member.optimizer, weights[name])
                    for key in ("step", *MOMENTS):
                        yield f"{index}.{name}.{key}", state[key]

    def _save(self) -> None:
        """Begin to write a checkpoint: its tensors are copied now, the file is made by another thread."""
        self.folder.wait()  # the copies of the one before are freed first
        fields = [field.name for field in dataclasses.fields(MemberState)]
        members = tuple(MemberState(**{name: getattr(m, name) for name in fields}) for m in self.members)
        state = PopulationState(
            step=self.step,
            seconds=self.seconds,
            members=members,
            metrics_bytes=self.folder.metrics_bytes(),
        )
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._tensors()
        }
        copied = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        self.folder.save(state, functools.partial(self._fetched, tensors, copied))

    def _fetched(self, tensors: Tensors, copied: Any) -> Tensors:
        """The copies, on the CPU. The other thread waits for them alone, not for later steps."""
        if copied is None:
            return tensors
        copied.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _resume(self) -> None:
        """Return to the last checkpoint, if there is one."""
        if (state := self.folder.resume(PopulationState, self.steps, self._fill)) is None:
            return
        self.step, self.seconds = state.step, state.seconds
        for member, saved in zip(self.members, state.members, strict=True):
            for field in dataclasses.fields(saved):
                setattr(member, field.name, getattr(saved, field.name))

    def _fill(self, file: checkpoints.TensorFile, state: PopulationState) -> None:
        if len(state.members) != len(self.members):
            raise file.damaged(f"it is of {len(state.members)} members, not {len(self.members)}")
        file.fill(dict(self._tensors()))

    def _write_weights(self, path: Path, member: Member) -> None:
        """Parameters, and buffers that were drawn and stay."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in member.model.state_dict().items()}
        metadata = {"config": json.dumps(self.config.model.to_dict())}
        checkpoints.write(path, tensors, metadata)


def trained(path: Path, device: torch.device | str = "cpu") -> Model:
    """The model of a file of weights that a run kept.

    Raises RunError if the file is missing, damaged or no such file.
    """
    way_out = "Train the run again: remove its result.json, and give the sweep's command."
    with checkpoints.opened(path, way_out) as file:
        if "config" not in file.about:
            raise file.damaged("its header names no model")
        where = f"the header of {path}"
        plain = files.parse_json(file.about["config"], where, way_out)
        with seeded(0):
            model = ModelConfig.checked(plain, where, way_out).build()
        file.fill(dict(model.state_dict()))
    return model.to(device).eval()


@torch.no_grad()
def accuracy(model: Model, questions: Questions, precision: Precision, tokens_at_once: int) -> float:
    """The share of questions that a model answers correctly."""
    weights, hits = dict(model.named_parameters()), 0
    rows = max(1, tokens_at_once // questions.tokens_BN.shape[1])
    for part in zip(*(tensor.split(rows) for tensor in questions), strict=True):
        hits += int(right(model, weights, Questions(*part), precision).sum())
    return hits / questions.answer_BQ.numel()
