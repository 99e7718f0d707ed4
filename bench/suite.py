"""Seventeen small language models on one corpus, trained alike and compared token by token.

    python -m bench.suite --data data/featured                  what is not there yet, on all GPUs
    python -m bench.suite --data data/featured --minutes 9      a piece of it; the same command goes on
    python -m bench.suite --collect                             what is there: results, table, figures

Every family of holdall/recipes/presets.py has 15 million parameters without embeddings and reads the same
105 million tokens in the same order: 1,600 steps of 64 rows of 1,024. Of some families three learning rates
are tried over 300 steps, with a schedule of that length, and the best is taken; the others have 2e-3.

Each run is `holdall train` in a process of its own, two at a time on a GPU, and `holdall recall` afterwards;
both go on where they stopped. Learning rates are tried in runs/tried, models stand in runs/whole, where runs
at further learning rates may be put beside them: the best validation loss counts.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from holdall import runs
from holdall.analysis.recall import Scores, find, gap, table
from holdall.pretrain import PretrainConfig
from holdall.recipes.presets import FAMILIES
from holdall.report import recall as recalls
from holdall.report import recall_curves
from holdall.report.recall import share_text

SIZE, REFERENCE = "15m", "attention"
STEPS, TRIED_STEPS = 1600, 300
RATES, RATE = (2e-3, 4e-3, 1e-3), 2e-3
TRIED = ("rwkv", "mamba", "hyena", "attention", "based")
DRAWN = ("attention", "based", "mamba", "rwkv", "conv-attention", "hyena", "base-conv", "linear-attention")
"""Lines of the figure of curves; of all 17 nobody could tell one from another."""
THRESHOLD, RARE = 1250, 4
"""The published threshold, of 10 billion tokens of training text, and the same share of 29 million."""
SHAPE = {"context": 1024, "batch": 64, "micro-batch": 64, "warmup": 100, "evaluate-every": 400}
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "attention": (9.44, 1.98, 10.62),
    "long-conv": (13.13, 13.27, 13.12),
    "hyena": (10.38, 4.81, 11.00),
    "h3": (10.07, 3.83, 10.75),
    "rwkv": (9.79, 3.82, 10.51),
}
"""Zoology (arXiv 2312.04927), table 1: perplexity of all tokens, of recall hits and of the others, at 355
million parameters after 10 billion tokens of the Pile."""

console = Console()


@dataclass(frozen=True)
class Job:
    """A model to train."""

    family: str
    rate: float
    steps: int

    def folder(self, out: Path) -> Path:
        kind = "tried" if self.steps == TRIED_STEPS else "whole"
        return out / "runs" / kind / f"{self.family}-lr{self.rate:g}"


def jobs(out: Path, families: Sequence[str]) -> Iterator[Job]:
    """What is still to be trained and can be: a family of TRIED only when its learning rates were."""
    for rate, family in itertools.product(RATES, TRIED):
        job = Job(family, rate, TRIED_STEPS)
        if family in families and not _done(job.folder(out)):
            yield job
    for family in families:
        rate = best_rate(family, out) if family in TRIED else RATE
        if rate is not None and not models(family, out):
            yield Job(family, rate, STEPS)


def _done(folder: Path) -> bool:
    return (folder / "result.json").exists()


def _loss(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text())["valid_loss"]


def best_rate(family: str, out: Path) -> float | None:
    """The learning rate with the lowest validation loss; None until all were tried."""
    tried = {rate: Job(family, rate, TRIED_STEPS).folder(out) for rate in RATES}
    return min(tried, key=lambda rate: _loss(tried[rate])) if all(map(_done, tried.values())) else None


def models(family: str, out: Path) -> list[Path]:
    """The folders of a family's models that are trained and scored, the best first."""
    folders = (out / "runs" / "whole").glob(f"{family}-lr*")
    return sorted((f for f in folders if _done(f) and (f / "recall.json").exists()), key=_loss)


# ------------------------------------------------------------------------------------------------- training


class Suite:
    """Trains what is left, a thread for each process that may run at once."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.lock = asked, threading.Lock()
        self.taken: set[Job] = set()
        self.running = 0
        self.until = time.monotonic() + 60 * asked.minutes

    def run(self) -> None:
        gpus = [str(g) for g in range(torch.cuda.device_count())] or [""]
        slots = gpus * self.asked.at_once
        with ThreadPoolExecutor(len(slots)) as pool:
            try:
                for working in [pool.submit(self._work, gpu) for gpu in slots]:
                    working.result()
            except BaseException:  # Ctrl-C reaches the processes by itself; nothing more is started
                self.until = 0.0
                raise

    def _take(self) -> Job | None:
        with self.lock:
            left = [job for job in jobs(self.asked.out, self.asked.families) if job not in self.taken]
            if left:
                self.taken.add(left[0])
                self.running += 1
        return left[0] if left else None

    def _work(self, gpu: str) -> None:
        while time.monotonic() < self.until:
            job = self._take()
            if job is None:
                if not self.running:  # nothing that could make more work
                    return
                time.sleep(1)
                continue
            try:
                self._train(job, gpu)
            finally:
                with self.lock:
                    self.running -= 1

    def _train(self, job: Job, gpu: str) -> None:
        asked, folder, began = self.asked, job.folder(self.asked.out), time.monotonic()
        shape = {**SHAPE, "steps": job.steps, "learning-rate": f"{job.rate:g}"}
        options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        status, said = self._holdall(
            gpu, "train", f"{job.family}-{SIZE}", "--data", str(asked.data), *options, "--out", str(folder)
        )
        if status == 0 and job.steps == STEPS:
            status, said = self._holdall(gpu, "recall", str(folder), "--out", str(folder / "recall"))
        if status == 0 and (asked.no_weights or job.steps == TRIED_STEPS):
            for path in folder.glob("*.safetensors"):
                path.unlink()
        end = f"ended with {status}: {said}"
        if status == 0:
            perplexity = json.loads((folder / "result.json").read_text())["valid_perplexity"]
            end = f"perplexity {perplexity:.2f}, {time.monotonic() - began:.0f} s"
        left = len(list(jobs(asked.out, asked.families)))
        what = f"{folder.parent.name} {job.family} at {job.rate:g} on {f'GPU {gpu}' if gpu else 'the CPU'}"
        console.print(f"{what}: {end}; {left} to go or going", markup=False, highlight=False, soft_wrap=True)

    def _holdall(self, gpu: str, *words: str) -> tuple[int, str]:
        """Run a command of Holdall until it ends or time is up; its status and the end of what it said."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "COLUMNS": "150"}
        program = [sys.executable, "-c", "from holdall.cli import main; main()", *words]
        left = None if math.isinf(self.until) else max(0.0, self.until - time.monotonic())
        with subprocess.Popen(
            program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                said, _ = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                said, _ = process.communicate()
        return process.returncode, " ".join(said.split())[-300:]


# ------------------------------------------------------------------------------------------------ collecting


def collect(out: Path, command: str) -> list[Scores]:
    """Write results.jsonl, the slices and the figures of what is there; the scores, the reference first."""
    lines = []
    for folder in sorted((out / "runs").glob("*/*-lr*")):
        if _done(folder):
            about = {name: json.loads((folder / f"{name}.json").read_text()) for name in FILES}
            config = about["config"]
            lines.append(
                {
                    "kind": folder.parent.name,
                    "family": folder.name.rpartition("-lr")[0],
                    **{
                        key: config[key] for key in ("learning_rate", "steps", "batch", "context_len", "seed")
                    },
                    "data_hash": config["data_hash"],
                    **about["result"],
                    "environment": about["environment"],
                }
            )
    runs.write_atomically(out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    scored = []
    for family in FAMILIES:
        for folder in models(family, out)[:1]:
            if (scores := find(folder)) is not None:
                scored.append(replace(scores, label=family))
    scored.sort(key=lambda run: (run.label != REFERENCE, run.nll.mean()))
    if not scored or scored[0].label != REFERENCE:
        raise runs.RunError(f"{out} has no {REFERENCE} that was scored, to which all others are compared")
    for threshold, folder in ((THRESHOLD, out), (RARE, out / f"threshold-{RARE}")):
        recalls.write(scored, folder, threshold=threshold, command=command)
        picture = io.BytesIO()
        recall_curves.save([run for run in scored if run.label in DRAWN], threshold, picture, command=command)
        runs.write_atomically(folder / "recall.png", picture.getvalue())
    return scored


FILES = ("config", "result", "environment")


def state_numbers(folder: Path) -> int:
    """How many numbers a model carries from token to token, after a whole context."""
    config = PretrainConfig.from_dict(json.loads((folder / "config.json").read_text()))
    return sum(layer.build().state_elements(config.context_len) for layer in config.model.layers)


def markdown(scored: Sequence[Scores], out: Path) -> str:
    """The table as README files have it."""
    head = (
        "family", "state", "learning rate", "all", "hits", "other", "hits right", "behind", "of it hits",
        f"of it hits, at most {RARE} times", "published: all / hits / other",
    )  # fmt: skip
    rows = [head, ("---", *["---:"] * (len(head) - 1))]
    for run in scored:
        line, first = table(run, THRESHOLD), run is scored[0]
        behind, rare = (gap(run, scored[0], threshold) for threshold in (THRESHOLD, RARE))
        (folder, *_) = models(run.label, out)
        right = line["hits"]["accuracy"]
        assert right is not None
        rows.append(
            (
                f"`{run.label}`",
                f"{state_numbers(folder) / 1e3:,.0f}k",
                folder.name.rpartition("-lr")[2],
                *(f"{line[name]['perplexity']:.2f}" for name in ("all", "hits", "other")),
                f"{right:.1%}",
                *(["", "", ""] if first else [
                    f"{behind.gap:.3f}",
                    f"{share_text(behind.share)} ({share_text(behind.low)} to {share_text(behind.high)})",
                    share_text(rare.share),
                ]),
                " / ".join(f"{number:.2f}" for number in PUBLISHED.get(run.label, ())),
            )
        )  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="the corpus, a folder that `holdall data` made")
    parser.add_argument("--out", type=Path, default=Path("results/lm-suite"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on later")
    parser.add_argument("--family", action="append", dest="families", choices=list(FAMILIES))
    parser.add_argument("--at-once", type=int, default=2, help="processes on a GPU")
    parser.add_argument("--no-weights", action="store_true", help="keep what a model says, not the model")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    asked = parser.parse_args()
    asked.families = asked.families or list(FAMILIES)
    if not asked.collect:
        if asked.data is None:
            parser.error("--data names the corpus to train on; `holdall data` makes one")
        Suite(asked).run()
    words = ["python -m bench.suite", *([f"--data {asked.data.name}"] if asked.data else ["--collect"])]
    try:
        scored = collect(asked.out, " ".join(words))
    except runs.RunError as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(scored, asked.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
