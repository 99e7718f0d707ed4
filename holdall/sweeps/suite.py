"""A suite: small language models on one corpus, trained alike so that they can be compared token by token.

Of some families several learning rates are tried over few steps, with a schedule of that length, and the best
is taken for the whole training; the others have one that is given. A suite's folder holds

    config.json     the whole suite and the command that made it
    runs/tried/     a run folder per family and learning rate that was tried
    runs/whole/     a run folder per model: FAMILY-lrRATE
    results.jsonl, slices.json, figures      made from the above alone (holdall.report.suite)

Each run is `holdall train` and then `holdall recall` in a process of its own, as a user would type them: a
crash ends one run alone, and any run can be repeated by hand. What they print is in log.txt of the run's
folder. Stopped in any way, the same call resumes. Runs at further learning rates may be put into runs/whole
by hand: the best validation loss of a family counts.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from holdall import files, settings
from holdall.contract import Config, did_you_mean
from holdall.files import RunError
from holdall.settings import NonNegativeInt, PositiveFloat, PositiveInt
from holdall.sweeps.folder import OTHER, OutOfTime

DIVERGED = "diverged.txt"
"""In the folder of a learning rate that was too high, with the end of what `holdall train` printed."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(Config):
    """Which language models are trained, and how; the corpus is named when the suite is run."""

    recipe: str
    """The name under which `holdall suite` knows it."""
    families: tuple[str, ...]
    """The models; FAMILY-SIZE is a preset of `holdall train`."""
    size: str
    """The size of all of them."""
    reference: str
    """The family that all are compared with."""
    tried: tuple[str, ...]
    """Families for which the learning rates are tried."""
    tried_rates: tuple[PositiveFloat, ...]
    """The learning rates to try, the likeliest first."""
    tried_steps: PositiveInt
    """Training steps of a trial."""
    learning_rate: PositiveFloat
    """Of the families whose learning rates are not tried."""
    steps: PositiveInt
    """Training steps of a model."""
    context: PositiveInt
    """Tokens of a row."""
    batch: PositiveInt
    """Rows of a step."""
    micro_batch: PositiveInt
    """Rows of one pass; a step's passes add up."""
    warmup: NonNegativeInt
    """Steps over which the learning rate rises."""
    evaluate_every: PositiveInt
    """Steps between evaluations on the validation text."""
    evaluate_rows: PositiveInt
    """Rows of an evaluation."""


@dataclass(frozen=True)
class SuiteRun:
    """One training of a suite: a learning rate that is tried, or a whole model."""

    kind: Literal["tried", "whole"]
    family: str
    learning_rate: float

    def folder(self, out: Path) -> Path:
        """Its run folder within the suite's."""
        return out / "runs" / self.kind / f"{self.family}-lr{self.learning_rate:g}"


def runs_left(config: SuiteConfig, out: Path, families: Sequence[str]) -> Iterator[SuiteRun]:
    """The runs that can be trained now, in order: a whole model only once its learning rate is known."""
    for rate, family in itertools.product(config.tried_rates, config.tried):
        run = SuiteRun("tried", family, rate)
        if family in families and not _is_tried(run.folder(out)):
            yield run
    for family in families:
        best = best_rate(config, family, out) if family in config.tried else config.learning_rate
        if best is not None and not models(family, out):
            yield SuiteRun("whole", family, best)


def _is_tried(folder: Path) -> bool:
    return (folder / "result.json").exists() or (folder / DIVERGED).exists()


def valid_loss(folder: Path) -> float:
    """The validation loss that a run ended with, in nats per token; infinite if it has not ended."""
    if not (folder / "result.json").exists():
        return math.inf
    loss: float = files.read_json(folder / "result.json")["valid_loss"]
    return loss


def best_rate(config: SuiteConfig, family: str, out: Path) -> float | None:
    """The learning rate with the lowest validation loss; None until all were tried, or if all diverged."""
    tried = {rate: SuiteRun("tried", family, rate).folder(out) for rate in config.tried_rates}
    best = min(tried, key=lambda rate: valid_loss(tried[rate]))
    return best if all(map(_is_tried, tried.values())) and valid_loss(tried[best]) < math.inf else None


def models(family: str, out: Path) -> list[Path]:
    """The run folders of a family's models that are trained and scored, the best first."""
    folders = (out / "runs" / "whole").glob(f"{family}-lr*")
    scored = (f for f in folders if valid_loss(f) < math.inf and (f / "recall.json").exists())
    return sorted(scored, key=valid_loss)


# -------------------------------------------------------------------------------------------------- running


def run_suite(
    config: SuiteConfig,
    out: Path,
    *,
    data: Path,
    command: str = "",
    device: str = "cuda",
    workers: int | None = None,
    families: Sequence[str] = (),
    minutes: float | None = None,
    keep_weights: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> list[SuiteRun]:
    """Train and score the models of a suite that are not there yet; returns the runs that failed.

    Args:
        out: the suite's folder.
        data: the corpus, a folder that `holdall data` made.
        command: what the user typed, kept in config.json.
        device: "cuda", which is all GPUs that this process may use, or "cpu".
        workers: runs that train at once; by default two on each GPU, or one on a CPU.
        families: train only these now; by default all.
        minutes: stop after so long, in the middle of a run too; None for no limit.
        keep_weights: whether a model is kept, or only its results and scores. Trials are never kept.
        report: called with a line at the beginning and the end of each run, from several threads.

    Raises:
        ValueError: the suite has no such family.
        RunError: the folder cannot be written, is in use, or holds another suite.
        OutOfTime: something is still to be trained.
        KeyboardInterrupt: after every run has written its checkpoint.
    """
    for family in families:
        if family not in config.families:
            raise ValueError(f"unknown family '{family}'. {did_you_mean(family, config.families)}")
    with files.locked(out):
        _claim(out, config, command)
        suite = _Suite(config, out, data, device, families or config.families, minutes, keep_weights, report)
        suite.train(workers)
        if len(list(suite.left())) > len(suite.failed):
            missing = sum(not models(family, out) for family in suite.families)
            raise OutOfTime(f"{missing} of {len(suite.families)} models are not finished")
    return suite.failed


def _claim(out: Path, config: SuiteConfig, command: str) -> None:
    """Write which suite the folder holds. Raises RunError if it holds another."""
    path, plain = out / "config.json", config.to_dict()
    if not path.exists():
        files.write_json(path, {"command": command, "suite": plain})
        return
    held = files.read_json(path, OTHER).get("suite")
    if held is None:  # a preset may have the name of a suite, and then the same folder by default
        raise RunError(
            f"{out} holds no suite but something else, a single run say; choose another folder with --out"
        )
    if different := settings.differ(held, plain):
        raise RunError(f"{out} holds another suite ({different}); choose another folder with --out")


class _Suite:
    """Trains what is left, a thread for each process that may run at once."""

    def __init__(
        self,
        config: SuiteConfig,
        out: Path,
        data: Path,
        device: str,
        families: Sequence[str],
        minutes: float | None,
        keep_weights: bool,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.out, self.data, self.device = config, out, data, device
        self.families, self.keep_weights, self.report = families, keep_weights, report
        self.until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.lock = threading.Lock()
        self.taken: set[SuiteRun] = set()
        self.failed: list[SuiteRun] = []
        self.training = 0

    def left(self) -> Iterator[SuiteRun]:
        return runs_left(self.config, self.out, self.families)

    def train(self, workers: int | None) -> None:
        """Train until nothing is left, or time is up."""
        gpus = visible_gpus() if self.device == "cuda" else [""]
        count = workers or (2 * len(gpus) if self.device == "cuda" else 1)
        done = sum(bool(models(family, self.out)) for family in self.families)
        where = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}" if self.device == "cuda" else "the CPU"
        self.report(
            f"{len(self.families)} families, {done} of them done; {count} runs at once on {where}, "
            f"in {self.out}"
        )
        with ThreadPoolExecutor(count) as pool:
            try:
                working = [pool.submit(self._work, gpus[index % len(gpus)]) for index in range(count)]
                for worker in as_completed(working):
                    worker.result()
            except BaseException:  # Ctrl-C reaches the processes by itself; no other is started
                self.until = 0.0
                raise

    def _work(self, gpu: str) -> None:
        """Train one run after another on one GPU."""
        while time.monotonic() < self.until:
            run = self._take()
            if run is None:
                if not self.training:  # nothing trains that could bring more runs
                    return
                time.sleep(1)
                continue
            try:
                self._train(run, gpu)
            finally:
                with self.lock:
                    self.training -= 1

    def _take(self) -> SuiteRun | None:
        with self.lock:
            run = next((run for run in self.left() if run not in self.taken), None)
            if run:
                self.taken.add(run)
                self.training += 1
        return run

    def _train(self, run: SuiteRun, gpu: str) -> None:
        """Train a run and score it, and report how it ended."""
        folder, whole, began = run.folder(self.out), run.kind == "whole", time.monotonic()
        where = f"GPU {gpu}" if gpu else "the CPU"
        name = f"{run.kind} {run.family} at {run.learning_rate:g} on {where}"
        self.report(f"{name}: begins")
        status = self._holdall(gpu, folder, *self._train_command(run), "--out", str(folder))
        if status == 0 and whole and time.monotonic() < self.until:
            scored = ["recall", str(folder), "--device", self.device, "--out", str(folder / "recall")]
            status = self._holdall(gpu, folder, *scored)
        if status == 0 and not (whole and (self.keep_weights or not models(run.family, self.out))):
            for path in folder.glob("*.safetensors"):
                path.unlink()
        printed = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        if status == 0:
            perplexity = math.exp(valid_loss(folder))
            end = f"perplexity {perplexity:.2f}, {time.monotonic() - began:.0f} s"
        elif time.monotonic() >= self.until:
            end = "stopped; the same command resumes it"
        elif not whole and any("training diverged" in line for line in printed):
            end = "diverged"
            files.write_atomically(folder / DIVERGED, "\n".join(printed[-5:]).encode())
        else:
            end = f"failed, see {folder / 'log.txt'}: {' '.join(printed[-1:])[:200]}"
            self.failed.append(run)
        self.report(f"{name}: {end}; {len(list(self.left()))} left, with those that train")

    def _train_command(self, run: SuiteRun) -> list[str]:
        config = self.config
        options: dict[str, Any] = {
            "data": self.data,
            "context": config.context,
            "batch": config.batch,
            "micro-batch": config.micro_batch,
            "warmup": config.warmup,
            "evaluate-every": config.evaluate_every,
            "evaluate-rows": config.evaluate_rows,
            "steps": config.steps if run.kind == "whole" else config.tried_steps,
            "learning-rate": f"{run.learning_rate:g}",
            "device": self.device,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return ["train", f"{run.family}-{config.size}", *words]

    def _holdall(self, gpu: str, folder: Path, *words: str) -> int:
        """Run a command of Holdall until it ends or time is up; returns its exit status."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "COLUMNS": "150"}
        left = None if math.isinf(self.until) else max(0.0, self.until - time.monotonic())
        folder.mkdir(parents=True, exist_ok=True)
        with (
            (folder / "log.txt").open("a") as log,
            subprocess.Popen(
                [sys.executable, "-m", "holdall.cli", *words],
                env=environment, stdout=log, stderr=subprocess.STDOUT,
            ) as process,
        ):  # fmt: skip
            try:
                return process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                return process.wait()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
