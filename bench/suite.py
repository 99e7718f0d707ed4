"""Seventeen small language models on one corpus, trained alike and compared token by token.

    python -m bench.suite --data data/featured                  what is not there yet, on all GPUs
    python -m bench.suite --data data/featured --minutes 9      a piece of it; the same command goes on
    python -m bench.suite --collect                             what is there: results, table, figures

Every family of holdall/recipes/presets.py has 15 million parameters without embeddings and reads the same
105 million tokens in the same order: 1,600 steps of 64 rows of 1,024. Of some families three learning rates
are tried over 300 steps, with a schedule of that length, and the best is taken; the others have 2e-3.

Each run is `holdall train` in a process of its own, two at a time on a GPU, and `holdall recall` afterwards;
both go on where they stopped, and what they print is in log.txt of the run's folder. Learning rates are tried
in runs/tried, models stand in runs/whole, where runs at further learning rates may be put beside them: the
best validation loss counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from holdall import files
from holdall.analysis.recall import THRESHOLD, Scores, find
from holdall.recipes.presets import FAMILIES
from holdall.report import recall as recalls
from holdall.report import table as tables
from holdall.text import open_corpus

SIZE, REFERENCE, SHOWN = "15m", "attention", "based"
STEPS, TRIED_STEPS = 1600, 300
RATES, RATE = (2e-3, 4e-3, 1e-3), 2e-3
TRIED = ("rwkv", "mamba", "hyena", "attention", "based")
DRAWN = ("attention", "based", "mamba-2", "griffin", "rwkv", "conv-attention", "hyena")
"""Lines of the figure of curves, as many as it has colours."""
SHAPE = {
    "context": 1024,
    "batch": 64,
    "micro-batch": 64,
    "warmup": 100,
    "evaluate-every": 400,
    "evaluate-rows": 317,
}
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "attention": (9.44, 1.98, 10.62),
    "long-conv": (13.13, 13.27, 13.12),
    "hyena": (10.07, 3.83, 10.75),
    "h3": (10.38, 4.81, 11.00),
    "rwkv": (9.79, 3.82, 10.51),
}
"""Zoology (arXiv 2312.04927), table 1: perplexity of all tokens, of recall hits and of the others, at about
355 million parameters after PUBLISHED_TOKENS of the Pile."""
PUBLISHED_TOKENS = 10e9
FILES = ("config", "result", "environment")

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
    return (folder / "result.json").exists() or (folder / DIVERGED).exists()


DIVERGED = "diverged.txt"
"""In the folder of a learning rate that was too high, with what `holdall train` said."""


def _loss(folder: Path) -> float:
    if not (folder / "result.json").exists():
        return math.inf
    return files.read_json(folder / "result.json")["valid_loss"]


def best_rate(family: str, out: Path) -> float | None:
    """The learning rate with the lowest validation loss; None until all were tried, or if all diverged."""
    tried = {rate: Job(family, rate, TRIED_STEPS).folder(out) for rate in RATES}
    best = min(tried, key=lambda rate: _loss(tried[rate]))
    return best if all(map(_done, tried.values())) and _loss(tried[best]) < math.inf else None


def models(family: str, out: Path) -> list[Path]:
    """The folders of a family's models that are trained and scored, the best first."""
    folders = (out / "runs" / "whole").glob(f"{family}-lr*")
    return sorted((f for f in folders if _loss(f) < math.inf and (f / "recall.json").exists()), key=_loss)


# ------------------------------------------------------------------------------------------------- training


class Suite:
    """Trains what is left, a thread for each process that may run at once."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.lock = asked, threading.Lock()
        self.taken: set[Job] = set()
        self.failed: list[Job] = []
        self.running = 0
        self.until = time.monotonic() + 60 * asked.minutes

    def run(self) -> None:
        asked = self.asked
        gpus = visible_gpus() if asked.device == "cuda" else [""]
        done = sum(bool(models(family, asked.out)) for family in asked.families)
        where = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}" if asked.device == "cuda" else "the CPU"
        say(
            f"{len(asked.families)} families, {done} of them done; on {where}, {asked.at_once} runs at once "
            f"on each; in {asked.out}"
        )
        with ThreadPoolExecutor(len(gpus) * asked.at_once) as pool:
            try:
                working = [pool.submit(self._work, gpu) for gpu in gpus * asked.at_once]
                for each in as_completed(working):
                    each.result()
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
        what = f"{folder.parent.name} {job.family} at {job.rate:g} on {f'GPU {gpu}' if gpu else 'the CPU'}"
        say(f"{what}: begins")
        shape = {**SHAPE, "steps": job.steps, "learning-rate": f"{job.rate:g}", "device": asked.device}
        options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        name = f"{job.family}-{SIZE}"
        status = self._holdall(gpu, folder, "train", name, "--data", str(asked.data), *options)
        whole = job.steps == STEPS
        if status == 0 and whole and time.monotonic() < self.until:
            status = self._holdall(
                gpu, folder, "recall", str(folder), "--device", asked.device, out=folder / "recall"
            )
        if status == 0 and (not whole or (asked.no_weights and models(job.family, asked.out))):
            for path in folder.glob("*.safetensors"):
                path.unlink()
        said = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        if status == 0:
            perplexity = math.exp(_loss(folder))
            end = f"perplexity {perplexity:.2f}, {time.monotonic() - began:.0f} s"
        elif time.monotonic() >= self.until:
            end = "stopped; the same command goes on from there"
        elif not whole and any("training diverged" in line for line in said):
            end = "diverged"
            files.write_atomically(folder / DIVERGED, "\n".join(said[-5:]).encode())
        else:
            end = f"failed, see {folder / 'log.txt'}: {' '.join(said[-1:])[:200]}"
            self.failed.append(job)
        left = len(list(jobs(asked.out, asked.families)))
        say(f"{what}: {end}; {left} to go or going")

    def _holdall(self, gpu: str, folder: Path, *words: str, out: Path | None = None) -> int:
        """Run a command of Holdall until it ends or time is up; its status."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "COLUMNS": "150"}
        program = [sys.executable, "-c", "from holdall.cli import main; main()", *words]
        left = None if math.isinf(self.until) else max(0.0, self.until - time.monotonic())
        folder.mkdir(parents=True, exist_ok=True)
        with (
            (folder / "log.txt").open("a") as log,
            subprocess.Popen(
                [*program, "--out", str(out or folder)], env=environment, stdout=log, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                return process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                return process.wait()


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names those that this process may use."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------ collecting


def collect(asked: argparse.Namespace, command: str) -> str:
    """Write results.jsonl, slices and figures of what is there; returns the table as README files have it.

    Raises RunError, before anything is written, if the family that all are compared with is not there.
    """
    out, found = asked.out, {}
    for family in FAMILIES:
        for folder in models(family, out):
            if (scores := find(folder)) is not None:
                found[family] = folder, replace(scores, label=family)
                break
            say(f"{folder} has no recall.npz that can be read: left out")
    if REFERENCE not in found:
        raise files.RunError(
            f"{out} has no {REFERENCE} that was trained and scored, to which all others are compared"
        )
    scored = [scores for _, scores in found.values()]
    scored.sort(key=lambda run: (run.label != REFERENCE, run.nll.mean()))
    for threshold, folder in ((THRESHOLD, out), (rare := rarer(scored[0]), out / f"threshold-{rare}")):
        recalls.write(scored, folder, threshold=threshold, drawn=DRAWN, command=command)
    if asked.licence and asked.data and SHOWN in found:
        page = recalls.render(
            scored[0], found[SHOWN][1], open_corpus(asked.data), threshold=THRESHOLD, passages=8, length=128,
            licence=asked.licence, command=command,
        )  # fmt: skip
        files.write_atomically(out / "passages.html", page.encode())
    lines = [result_of(folder) for folder in sorted((out / "runs").glob("*/*-lr*"))]
    text = "".join(json.dumps(line) + "\n" for line in lines if line)
    files.write_atomically(out / "results.jsonl", text.encode())
    return markdown(out, rare, {family: folder for family, (folder, _) in found.items()})


def rarer(scores: Scores) -> int:
    """The published threshold as the same share of this training text."""
    return max(1, round(THRESHOLD * scores.about["train_tokens"] / PUBLISHED_TOKENS))


def result_of(folder: Path) -> dict[str, object] | None:
    """A run's line of results.jsonl."""
    if _loss(folder) == math.inf:
        return None
    config, result, environment = (files.read_json(folder / f"{name}.json") for name in FILES)
    return {
        "kind": folder.parent.name,
        "family": folder.name.rpartition("-lr")[0],
        **{key: config[key] for key in ("learning_rate", "steps", "batch", "context_len", "seed")},
        "data_hash": config["data_hash"],
        **result,
        "environment": environment,
    }


def markdown(out: Path, rare: int, folders: dict[str, Path]) -> str:
    """The table of what `recalls.write` left for both thresholds."""
    usual, rarely = (
        files.read_json(folder / "slices.json")["runs"] for folder in (out, out / f"threshold-{rare}")
    )
    head = (
        "family", "state", "learning rate", "all", "hits", "other", "hits right", "behind", "on hits",
        "of it hits", f"of it hits, at most {rare} times", "published: all / hits / other",
    )  # fmt: skip
    rows = []
    for run, rare_run in zip(usual, rarely, strict=True):
        label, line, behind = run["label"], run["slices"], run["gap"]
        right = line["hits"]["accuracy"]
        rows.append(
            (
                f"`{label}`",
                f"{run['state']['numbers'] / 1e3:,.0f}k",
                folders[label].name.rpartition("-lr")[2],
                *(recalls.perplexity_text(line[name]["perplexity"]) for name in ("all", "hits", "other")),
                "–" if right is None else f"{right:.1%}",
                *([""] * 4 if behind is None else [
                    *(f"{behind[part]:.3f}".replace("-", "−") for part in ("gap", "hits")),
                    recalls.interval_text(behind["share"], behind["low"], behind["high"]),
                    recalls.share_text(rare_run["gap"]["share"]),
                ]),
                " / ".join(f"{number:.2f}" for number in PUBLISHED.get(label, ())),
            )
        )  # fmt: skip
    return tables.markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="the corpus, a folder that `holdall data` made")
    parser.add_argument("--out", type=Path, default=Path("runs/lm-suite"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on later")
    parser.add_argument(
        "--family", action="append", dest="families", choices=list(FAMILIES), help="only these"
    )
    parser.add_argument("--at-once", type=int, default=2, help="runs at once on a GPU (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU would take weeks")
    parser.add_argument("--no-weights", action="store_true", help="keep what a model says, not the model")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--licence", help="of the corpus' text; with --data, passages.html shows some of it")
    asked = parser.parse_args()
    asked.families = asked.families or list(FAMILIES)
    failed: list[Job] = []
    if not asked.collect:
        if asked.data is None:
            parser.error("--data names the corpus to train on; `holdall data` makes one")
        if asked.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no GPU here; --device cpu trains all the same, for weeks")
        suite = Suite(asked)
        try:
            suite.run()
        except KeyboardInterrupt:
            say("Stopped. What is done is kept; the same command goes on from there.")
            return 130
        failed = suite.failed
    try:
        print(collect(asked, shlex.join(["python", "-m", "bench.suite", *sys.argv[1:]])))
    except files.RunError as error:
        print(f"nothing to compare yet: {error}", file=sys.stderr)
        return 1 if asked.collect or failed else 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
