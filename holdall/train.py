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
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from holdall import runs
from holdall.contract import Config
from holdall.model import Model, ModelConfig
from holdall.ops.cross_entropy import linear_cross_entropy
from holdall.runs import RunError
from holdall.tasks.data import DataConfig, Questions, TaskData


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A population: one model, one task, and each learning rate with each seed.

    batch: rows per step. epochs: passes over the training rows.
    schedule: learning rate along a cosine to zero, moved at every step or, as Zoology does, every epoch.
    warmup: steps over which the learning rate first rises.
    evaluate_every: steps between tests; 0 for once per epoch.
    stop_at: a member is done once its accuracy on the test rows is at least this; 0 to never stop early.
    """

    model: ModelConfig
    data: DataConfig
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    batch: int = 256
    epochs: int = 1
    schedule: Literal["step", "epoch"] = "step"
    warmup: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    evaluate_every: int = 0
    stop_at: float = 0.99

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
        if min(self.learning_rates) <= 0 or self.batch < 1 or self.epochs < 1 or self.evaluate_every < 0:
            raise ValueError(
                f"learning rates {self.learning_rates}, batch {self.batch} and epochs {self.epochs} must be "
                f"positive, evaluate_every {self.evaluate_every} not negative"
            )

    @property
    def members(self) -> tuple[tuple[float, int], ...]:
        """(learning rate, seed) of each member."""
        return tuple((rate, seed) for seed in self.seeds for rate in self.learning_rates)


@dataclass
class Member:
    """One model of a population, and how far it is."""

    learning_rate: float
    seed: int
    model: Model
    optimizer: torch.optim.AdamW
    stopped: str = ""
    """Empty while it trains; then "accuracy", "diverged" or "end"."""
    steps: int = 0
    accuracy: float = 0.0
    accuracy_by_pairs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far a population is: for whoever draws the bars."""

    step: int
    steps: int
    loss: float
    accuracy: float
    """Of the best member, at the last test."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Training was asked to stop; its state is in the run folder."""


CHECKPOINT_SECONDS = 20.0


def train(
    config: TrainConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    together: bool | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> list[dict[str, Any]]:
    """Train a population, or go on with it, and return one result per member.

    Args:
        folder: the run folder; made if needed. If it holds a checkpoint of the same config, training goes on
            from there, and if it holds results, they are returned.
        together: whether members share one batched pass; None for "on a GPU": two cores are full with one.
        on_progress: called a few times a second at most.
        should_stop: asked before every step; True writes a checkpoint and raises Stopped.
        checkpoint_seconds: at most so much work is lost to a crash.

    Raises:
        RunError: the folder cannot be written, is in use, or holds another config.
        Stopped: should_stop said so.
    """
    device = torch.device(device)
    together = device.type != "cpu" if together is None else together
    with runs.locked(folder), repeatable(device):
        _claim(folder, config, device)
        done = folder / "result.json"
        if done.exists():
            return json.loads(done.read_text())
        run = Trainer(config, folder, device, together)
        results = run.run(on_progress, should_stop, checkpoint_seconds)
        runs.write_json(done, results)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return results


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, have PyTorch add in a fixed order, so that the same run gives the same bits.

    By default gathers and embeddings sum gradients in whatever order threads arrive. A CPU needs nothing.
    """
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS promises it only with this
    settings: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory that was never written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


def _claim(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """Write what this run is, or check that the folder holds the same one."""
    path, plain = folder / "config.json", config.to_dict()
    if path.exists():
        if json.loads(path.read_text()) != plain:
            raise RunError(f"{folder} holds a run with another config ({path}); choose another folder")
        return
    runs.write_json(folder / "environment.json", runs.environment(str(device), torch.get_num_threads()))
    runs.write_json(path, plain)


class Trainer:
    """A population in training."""

    def __init__(self, config: TrainConfig, folder: Path, device: torch.device, together: bool) -> None:
        self.config, self.folder, self.device, self.together = config, folder, device, together
        self.data: TaskData = config.data.build(device)
        self.members = [self._member(rate, seed) for rate, seed in config.members]
        self.step = 0
        self.seconds = 0.0
        self.epoch_steps = self.data.steps_per_epoch(config.batch)
        self.steps = config.epochs * self.epoch_steps
        self._resume()

    def _member(self, rate: float, seed: int) -> Member:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.config.model.build().to(self.device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        return Member(rate, seed, model, optimizer)

    # ------------------------------------------------------------------------------------------ the loop

    def run(
        self,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
        checkpoint_seconds: float,
    ) -> list[dict[str, Any]]:
        started = saved = told = time.monotonic()
        earlier, loss = self.seconds, math.nan
        every = self.config.evaluate_every or self.epoch_steps
        while self.step < self.steps and (alive := [m for m in self.members if not m.stopped]):
            now = time.monotonic()
            self.seconds = earlier + now - started
            if should_stop():
                self._save()
                raise Stopped
            if now - saved > checkpoint_seconds:
                self._save()
                saved = now
            losses_P = self.train_step(alive)
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                self._test(alive, losses_P)
            if now - told > 0.3:
                told, loss = now, float(losses_P.min())
                best = max(member.accuracy for member in self.members)
                on_progress(Progress(self.step, self.steps, loss, best))
        self.seconds = earlier + time.monotonic() - started
        for index, member in enumerate(self.members):
            self._write_weights(self.folder / f"model-{index}.safetensors", member)
        return [self._result(index, member) for index, member in enumerate(self.members)]

    def train_step(self, alive: Sequence[Member]) -> Tensor:
        """One step of every member that still trains; returns their losses, (P,)."""
        batches = [self.data.batch(member.seed, self.step, self.config.batch) for member in alive]
        for member in alive:
            for group in member.optimizer.param_groups:
                group["lr"] = member.learning_rate * self._schedule()
        if self.together and len(alive) > 1:
            losses_P = self._losses_together(alive, batches)
            losses_P.sum().backward()
        else:
            losses = []
            for member, batch in zip(alive, batches, strict=True):
                losses.append(_loss(member.model, dict(member.model.named_parameters()), batch))
                losses[-1].backward()
            losses_P = torch.stack(losses)
        for member in alive:
            member.optimizer.step()
            member.optimizer.zero_grad()
            member.steps = self.step + 1
        return losses_P.detach()

    def _losses_together(self, alive: Sequence[Member], batches: Sequence[Questions]) -> Tensor:
        """All members' losses from one pass over stacked weights; stacking sends each its own gradient."""
        model = alive[0].model
        weights = [dict(member.model.named_parameters()) for member in alive]
        stacked = {name: torch.stack([own[name] for own in weights]) for name in weights[0]}
        stacked_batch = Questions(*map(torch.stack, zip(*batches, strict=True)))
        # of PyTorch's attentions only this one can be batched over members on every device, mask included
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(lambda own, batch: _loss(model, own, batch))(stacked, stacked_batch)

    def _schedule(self) -> float:
        """The share of the learning rate at this step."""
        if self.config.schedule == "epoch":
            share = (self.step // self.epoch_steps) / self.config.epochs
        else:
            share = self.step / self.steps
        rise = min(1.0, (self.step + 1) / self.config.warmup) if self.config.warmup else 1.0
        return rise * 0.5 * (1 + math.cos(math.pi * share))

    @torch.no_grad()
    def _test(self, alive: Sequence[Member], losses_P: Tensor) -> None:
        """Score the members that still train, and let those go that are done."""
        for member, loss in zip(alive, losses_P.tolist(), strict=True):
            if math.isfinite(loss):
                by_pairs: dict[str, list[float]] = {}
                for segment, rows in zip(self.config.data.test, self.data.test, strict=True):
                    by_pairs.setdefault(str(segment.pairs), []).append(accuracy(member.model, rows))
                scores = [score for segment in by_pairs.values() for score in segment]
                member.accuracy = sum(scores) / len(scores)
                member.accuracy_by_pairs = {pairs: sum(s) / len(s) for pairs, s in by_pairs.items()}
            else:
                member.stopped, member.accuracy, member.accuracy_by_pairs = "diverged", 0.0, {}
            if not member.stopped and 0 < self.config.stop_at <= member.accuracy:
                member.stopped = "accuracy"
            elif not member.stopped and self.step == self.steps:
                member.stopped = "end"
            line = {
                "step": self.step,
                "learning_rate": member.learning_rate,
                "seed": member.seed,
                "loss": loss if math.isfinite(loss) else None,
                "accuracy": member.accuracy,
                "accuracy_by_pairs": member.accuracy_by_pairs,
                "seconds": round(self.seconds, 3),
            }
            runs.append_line(self.folder / "metrics.jsonl", line)

    def _result(self, index: int, member: Member) -> dict[str, Any]:
        diverged = member.stopped == "diverged"
        return {
            "learning_rate": member.learning_rate,
            "seed": member.seed,
            "accuracy": None if diverged else member.accuracy,
            "accuracy_by_pairs": member.accuracy_by_pairs,
            "steps": member.steps,
            "stopped": member.stopped,
            "seconds": round(self.seconds, 3),
            "weights": f"model-{index}.safetensors",
        }

    # ---------------------------------------------------------------------------------------- checkpoints

    def _tensors(self) -> Iterator[tuple[str, Tensor, Callable[[Tensor], object]]]:
        """Every tensor of the run's state: its name, its value, and how to set it."""
        for index, member in enumerate(self.members):
            for name, weight in member.model.named_parameters():
                yield f"{index}.{name}", weight.data, weight.data.copy_
                moments = member.optimizer.state[weight]
                if not moments:  # AdamW makes them at its first step
                    moments["step"] = torch.zeros((), device=self.device)
                    moments["exp_avg"] = torch.zeros_like(weight)
                    moments["exp_avg_sq"] = torch.zeros_like(weight)
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    yield f"{index}.{name}.{key}", moments[key], moments[key].copy_

    def _save(self) -> None:
        """Write a checkpoint, in one step."""
        members = [
            {key: getattr(m, key) for key in ("stopped", "steps", "accuracy", "accuracy_by_pairs")}
            for m in self.members
        ]
        metrics = self.folder / "metrics.jsonl"
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "members": members,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
        }
        tensors = {name: tensor.contiguous().cpu() for name, tensor, _ in self._tensors()}
        runs.write_atomically(
            self.folder / "checkpoint.safetensors", save(tensors, {"state": json.dumps(state)})
        )

    def _resume(self) -> None:
        """Go back to the last checkpoint; lines of metrics written after it will be written again."""
        path, metrics = self.folder / "checkpoint.safetensors", self.folder / "metrics.jsonl"
        if not path.exists():
            metrics.unlink(missing_ok=True)
            return
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                for name, _, put in self._tensors():
                    put(file.get_tensor(name))
        except SafetensorError as error:
            raise RunError(f"{path} is damaged ({error}); delete it to start this run again") from error
        self.step, self.seconds = state["step"], state["seconds"]
        for member, saved in zip(self.members, state["members"], strict=True):
            for key, value in saved.items():
                setattr(member, key, value)
        if metrics.exists():
            with runs.explained(metrics), metrics.open("r+b") as file:
                file.truncate(state["metrics_bytes"])

    def _write_weights(self, path: Path, member: Member) -> None:
        tensors = {
            name: weight.detach().contiguous().cpu() for name, weight in member.model.named_parameters()
        }
        metadata = {"config": json.dumps(self.config.model.to_dict())}
        runs.write_atomically(path, save(tensors, metadata))


def _loss(model: Model, weights: dict[str, Tensor], batch: Questions) -> Tensor:
    """Mean cross-entropy of the answers; nothing is computed where nothing is asked.

    `functional_call` also where the weights are the model's own: one code path for one and for many.
    """
    h_BQD, _ = functional_call(
        _Hidden(model),
        {f"model.{name}": weight for name, weight in weights.items()},
        (batch.tokens_BN, batch.at_BQ),
    )
    loss, _ = linear_cross_entropy(h_BQD.flatten(0, 1), weights["embed.weight"], batch.answer_BQ.flatten())
    return loss


class _Hidden(torch.nn.Module):
    """A model's `hidden` as a module's forward, which is what functional_call can call."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BN: Tensor, at_BQ: Tensor) -> tuple[Tensor, None]:
        h_BQD, _ = self.model.hidden(tokens_BN, at_BQ=at_BQ, want_states=False)
        return h_BQD, None


@torch.no_grad()
def accuracy(model: Model, questions: Questions, *, tokens_at_once: int = 1 << 15) -> float:
    """The share of questions answered right."""
    right = total = 0
    rows = max(1, tokens_at_once // questions.tokens_BN.shape[1])
    for tokens_BN, at_BQ, answer_BQ in zip(*(tensor.split(rows) for tensor in questions), strict=True):
        logits_BQV, _ = model(tokens_BN, at_BQ=at_BQ, want_states=False)
        right += int((logits_BQV.argmax(-1) == answer_BQ).sum())
        total += answer_BQ.numel()
    return right / total
