"""Sweeps: many small models on one task, and where each lands on the recall-memory frontier.

A sweep is a list of points, each a population of one architecture. Its folder holds

    config.json     the whole sweep, its test segments and the command that made it
    environment.json
    results.jsonl   one line per model and learning rate, in the sweep's order, as models finish
    runs/           one run folder per population
    frontier.png, frontier.html, table.md    made from the above alone (holdall.report)

Stopped in any way, the same call goes on where it was. On a CPU every member of a population is its own run,
one thread each, as many at once as there are cores: small models gain nothing from a second thread. On GPUs
the learning rates of a seed are one run, one at once on each, and another process compiles what comes next.
More seeds can be asked for later.

What is finished is known by `runs` alone. So a sweep can be made in pieces, by time or by family, on several
machines: put the pieces' `runs` into one folder, and the next call there, or one with no time to train
anything, gathers all of them into results.jsonl.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdall import environment, errors, files, mixers, processes, settings
from holdall.contract import Config, did_you_mean
from holdall.files import RunError
from holdall.model import ModelConfig, seeded
from holdall.settings import NonNegativeFloat, PositiveInt
from holdall.tasks.data import DataConfig, Segment
from holdall.tasks.information import recall_bits
from holdall.training.flops import flops_per_token
from holdall.training.populations import Progress, Stopped, TrainConfig, finished, train


@dataclass(frozen=True, kw_only=True)
class Point(Config):
    """One architecture of a sweep. Points of one family share a colour in every figure."""

    label: str
    family: str
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """A sweep: points that are tested on the same rows, so that they belong into one picture.

    recipe: the name under which `holdall frontier` knows it. part: which of a recipe's sweeps, if several.
    """

    recipe: str
    points: tuple[Point, ...]
    part: str = ""

    @property
    def data(self) -> DataConfig:
        """The task of all points."""
        return self.points[0].train.data

    @property
    def context_len(self) -> int:
        """Tokens of the longest test row: after these a model's state is counted."""
        return max(self.data.row_length(segment) for segment in self.data.test)

    def validate(self) -> None:
        if not self.points:
            raise ValueError("a sweep needs at least one point")
        for point in self.points:
            if _test_of(point.train.data) != _test_of(self.data):
                raise ValueError(f"'{point.label}' is tested on other rows than '{self.points[0].label}'")
        seen: set[str] = set()
        for job in self.jobs(together=True):
            if job.folder in seen:
                raise ValueError(
                    f"two points would share the run folder '{job.folder}': give them other labels"
                )
            seen.add(job.folder)

    def jobs(self, *, together: bool) -> list[Job]:
        """What is trained: each point's learning rates as one population per seed, or each member alone."""
        whole = [
            Job(dataclasses.replace(point, train=dataclasses.replace(point.train, seeds=(seed,))), True)
            for point in self.points
            for seed in point.train.seeds
        ]
        return whole if together else [alone for job in whole for alone in job.alone()]

    @property
    def families(self) -> list[str]:
        """The families of its points, in order."""
        return list(dict.fromkeys(point.family for point in self.points))


def _test_of(data: DataConfig) -> dict[str, Any]:
    """What decides the test rows."""
    return {name: value for name, value in data.to_dict().items() if name not in ("train", "practise")}


@dataclass(frozen=True)
class Job:
    """One run of a sweep, of one seed."""

    point: Point
    together: bool

    def alone(self) -> list[Job]:
        """Each learning rate of a population as a run of its own."""
        train = self.point.train
        singles = [dataclasses.replace(train, learning_rates=(rate,)) for rate in train.learning_rates]
        return [Job(dataclasses.replace(self.point, train=single), together=False) for single in singles]

    @property
    def steps(self) -> int:
        """Of the training, if it does not end early."""
        train = self.point.train
        return train.epochs * sum(-(-segment.rows // train.batch) for segment in train.data.train)

    @property
    def operations(self) -> float:
        """Of all its steps and tests, counted; a test is a pass without the backward one."""
        train = self.point.train
        every = train.evaluate_every or max(1, self.steps // train.epochs)
        passes: list[tuple[Segment, float]] = [(segment, train.epochs) for segment in train.data.train]
        passes += [(segment, max(1, self.steps // every) / 3) for segment in train.data.test]
        return len(train.members) * sum(
            times * segment.rows * length * _flops(train.model, length)
            for segment, times in passes
            if (length := train.data.row_length(segment))
        )

    @property
    def title(self) -> str:
        """For people: the label, the learning rate if there is one alone, the seed if it is not the first."""
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


# -------------------------------------------------------------------------------------------- one result


def result_line(job: Job, sweep: SweepConfig, result: dict[str, Any]) -> dict[str, Any]:
    """A line of results.jsonl: what the model is, what it carries, what it recalls.

    recall_bits are those that the hardest segment proves: a state that answers one segment need not answer
    all at once, so bits of different segments do not add up.
    """
    model, data = job.point.train.model, job.point.train.data
    carried, parameters = measure(model, sweep.context_len)
    by_pairs = result["accuracy_by_pairs"]
    bits = max(
        (
            recall_bits(
                data.questions_per_row(segment), data.task(segment).values, by_pairs[str(segment.pairs)]
            )
            for segment in data.test
            if str(segment.pairs) in by_pairs
        ),
        default=0.0,
    )
    special = model.layers[-1]
    return {
        "label": job.point.label,
        "family": job.point.family,
        "mixer": special.name,
        "options": special.options(),
        "width": model.width,
        "layers": [layer.name for layer in model.layers],
        "form": result["forms"][-1],
        "precision": job.point.train.precision,
        "parameters": parameters,
        "state_bytes": carried,
        "context_len": sweep.context_len,
        "accuracy": result["accuracy"],
        "accuracy_by_pairs": by_pairs,
        "learning_rate": result["learning_rate"],
        "seed": result["seed"],
        "steps": result["steps"],
        "stopped": result["stopped"],
        "rows": result["rows"],
        "seconds": result["seconds"],
        "recall_bits": round(bits, 2),
        "recall_efficiency": bits / (8 * carried),
        "run": f"runs/{job.folder}",
        "weights": result["weights"],
    }


@functools.lru_cache(maxsize=4096)
def _flops(model: ModelConfig, length: int) -> float:
    with seeded(0):
        return flops_per_token(model.build(), length)


def measure(model: ModelConfig, context_len: int) -> tuple[int, int]:
    """Bytes of state that one row carries after `context_len` tokens, and parameters: both counted."""
    with seeded(0):
        built = model.build()
    return built.state_bytes(context_len), built.parameter_count()


# -------------------------------------------------------------------------------------------- the sweep


@dataclass(frozen=True)
class Watcher:
    """What a sweep tells whoever is looking; each function gets the job's index first."""

    progress: Callable[[int, Progress], None] = lambda index, progress: None
    finished: Callable[[int, list[dict[str, Any]]], None] = lambda index, lines: None


class OutOfTime(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The time that a sweep was given is over; all its runs have written their checkpoints."""


def run_sweep(
    sweep: SweepConfig,
    out: Path,
    *,
    command: str,
    device: str = "cpu",
    workers: int | None = None,
    plugins: Sequence[Path] = (),
    families: Sequence[str] = (),
    minutes: float | None = None,
    together: bool | None = None,
    keep_weights: bool = True,
    watcher: Watcher | None = None,
) -> list[dict[str, Any]]:
    """Run a sweep, or go on with it, and return the lines of its results.jsonl.

    Args:
        out: the sweep's folder.
        command: what the user typed, kept in config.json.
        workers: runs that train at once, each in a process; None for one per core, or per GPU.
        plugins: mixer files of the user's own that the sweep's mixers come from.
        families: train only these now; what is finished of the others counts all the same.
        minutes: stop in time for this to hold, whatever is finished by then; None for no limit.
        together: whether a population is one run; None for "on a GPU".
        keep_weights: whether runs keep their trained weights.

    Raises:
        ValueError: the sweep has no such family.
        RunError: the folder cannot be written, is in use, or holds another sweep; or a worker died.
        OutOfTime: something is still to be trained.
        KeyboardInterrupt: after every run has written its checkpoint.
    """
    for family in families:
        if family not in sweep.families:
            raise ValueError(f"unknown family '{family}'. {did_you_mean(family, sweep.families)}")
    if minutes is not None:
        settings.check("minutes", minutes, NonNegativeFloat)
    together = device != "cpu" if together is None else together
    workers = at_once(device, workers)
    watcher = watcher or Watcher()
    with files.locked(out), contextlib.ExitStack() as stack:
        jobs = planned(sweep, out, together=together)
        folders = [out / "runs" / job.folder for job in jobs]
        stack.enter_context(_claimed(out, sweep, command, device, folders))
        lines: dict[int, list[dict[str, Any]]] = {}

        def enter(index: int, result: list[dict[str, Any]]) -> None:
            lines[index] = [result_line(jobs[index], sweep, member) for member in result]
            watcher.finished(index, lines[index])

        for index, (job, folder) in enumerate(zip(jobs, folders, strict=True)):
            if (result := finished(job.point.train, folder)) is not None:
                enter(index, result)
        _write_results(out, lines)
        wanted = [i for i, job in enumerate(jobs) if not families or job.point.family in families]
        left = [index for index in wanted if index not in lines]
        places = {index: place for place, index in enumerate(in_order(jobs))}
        left.sort(key=places.__getitem__)
        with (
            _Pool(min(workers, max(len(left), 1)), device, plugins, watcher, minutes) as pool,
            pool.compiling_ahead([jobs[index].point.train for index in left]),
        ):
            for index, result in pool.results({i: (jobs[i], folders[i]) for i in left}, keep_weights):
                enter(index, result)
                _write_results(out, lines)
        if missing := set(left) - set(lines):
            raise OutOfTime(f"{len(missing)} of {len(wanted)} runs are not finished")
    return [line for index in sorted(lines) for line in lines[index]]


def in_order(jobs: Sequence[Job]) -> list[int]:
    """The order in which jobs are trained: first one of each model, then another of each, and so on.

    Of these the longest first, so that none is left alone at the end. After the first round the speed of
    every model is known, and with it how long the rest takes.
    """
    rounds: Counter[str] = Counter()
    keys = []
    for job in jobs:
        model = f"{job.point.label} {job.point.train.model.width}"
        keys.append((rounds[model], -job.operations))
        rounds[model] += 1
    return sorted(range(len(jobs)), key=keys.__getitem__)


def at_once(device: str, workers: int | None = None) -> int:
    """How many runs train at once: one per core, or per GPU, where it is not said."""
    if workers is not None:
        settings.check("workers", workers, PositiveInt)
        return workers
    return torch.cuda.device_count() if device == "cuda" else environment.cores()


def planned(sweep: SweepConfig, out: Path, *, together: bool) -> list[Job]:
    """The runs of a sweep in its folder; a population that was trained as one, on a GPU, stays one."""
    found: list[Job] = []
    for job in sweep.jobs(together=True):
        whole = together or (out / "runs" / job.folder / "result.json").exists()
        found += [job] if whole else job.alone()
    return found


OTHER = "Restore it from a copy, or choose another folder with --out."


@contextlib.contextmanager
def _claimed(
    out: Path, sweep: SweepConfig, command: str, device: str, folders: Sequence[Path]
) -> Iterator[None]:
    """The folder says which sweep it holds; not what it said before, if none of its runs could begin.

    So a sweep that is refused leaves its folder to the corrected command.
    """
    path = out / "config.json"
    before = files.read_bytes(path, OTHER) if path.exists() else None
    begun = {folder for folder in folders if (folder / "config.json").exists()}
    _claim(out, sweep, command, device)
    try:
        yield
    except OutOfTime:
        raise
    except BaseException:
        now = {folder for folder in folders if (folder / "config.json").exists()}
        if before is None and not now:
            for name in ("config.json", "environment.json", "results.jsonl"):
                (out / name).unlink(missing_ok=True)
        elif before is not None and now == begun:
            files.write_atomically(path, before)
        raise


def _claim(out: Path, sweep: SweepConfig, command: str, device: str) -> None:
    """Write what this sweep is, or check that the folder holds the same one, perhaps with fewer seeds."""
    path, plain = out / "config.json", sweep.to_dict()
    if path.exists():
        held = files.read_json(path, OTHER).get("points")
        if held == plain["points"]:
            return
        try:
            said = _difference(held, plain["points"])
        except (AttributeError, KeyError, TypeError) as error:
            raise files.damaged(path, f"its points are none ({error!r})", OTHER) from error
        if said:
            raise RunError(f"{out} holds another sweep ({said}); choose another folder with --out")
        for point, wanted in zip(held, plain["points"], strict=True):
            if missing := set(point["train"]["seeds"]) - set(wanted["train"]["seeds"]):
                raise RunError(
                    f"{out} holds the same sweep with more seeds, {sorted(missing)} too; give at least "
                    f"--seeds {max(missing) + 1}, or choose another folder with --out"
                )
    about = {
        "recipe": " ".join(filter(None, (sweep.recipe, sweep.part))),
        "command": command,
        "context_len": sweep.context_len,
        "test": [
            {
                "vocab": sweep.data.vocab,
                "values": sweep.data.task(segment).values,
                "questions": sweep.data.questions_per_row(segment),
                **segment.to_dict(),
            }
            for segment in sweep.data.test
        ],
    }
    files.write_json(out / "environment.json", environment.describe(device, 1))
    files.write_json(path, {**about, "points": plain["points"]})


def _difference(held: Any, wanted: Any) -> str:
    """Where the points of two sweeps differ, but for seeds: by their labels, not by their places."""

    def labelled(points: Any) -> dict[str, Any]:
        found = {}
        for point in points or ():
            train = {name: value for name, value in point["train"].items() if name != "seeds"}
            found[f"{point['label']}, width {train['model']['width']}"] = {**point, "train": train}
        return found

    held, wanted = labelled(held), labelled(wanted)
    missing = [f"without '{name}' there" for name in wanted if name not in held]
    missing += [f"without '{name}' here" for name in held if name not in wanted]
    both = [name for name in wanted if name in held]
    if not missing and list(held) != list(wanted):
        missing = ["its models in another order"]
    named = {name: held[name] for name in both}, {name: wanted[name] for name in both}
    return settings.listed(missing + settings.differences(*named))


def _write_results(out: Path, lines: dict[int, list[dict[str, Any]]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for i in sorted(lines) for line in lines[i])
    files.write_atomically(out / "results.jsonl", text.encode())


class _Pool:
    """The processes that train, and the thread that passes on what they say."""

    def __init__(
        self, workers: int, device: str, plugins: Sequence[Path], watcher: Watcher, minutes: float | None
    ) -> None:
        context = processes.context()
        self.stop, self.queue, free = context.Event(), context.Queue(), context.Queue()
        self.context, self.devices = context, devices(device, workers)
        self.plugins = [str(path) for path in plugins]
        for name in self.devices:
            free.put(name)
        self.executor = concurrent.futures.ProcessPoolExecutor(
            workers,
            mp_context=context,
            initializer=_start_process,
            initargs=(self.queue, self.stop, free, self.plugins),
        )
        self.watcher = watcher
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.interrupted = False
        # what is left at the end is for the last steps and for writing checkpoints
        self.limit = None if minutes is None else max(0.0, 60 * minutes - min(15.0, 6 * minutes))

    def __enter__(self) -> _Pool:
        self.listener.start()
        if self.limit is not None:
            self.timer = threading.Timer(self.limit, self.stop.set)
            self.timer.daemon = True
            if self.limit:
                self.timer.start()
            else:
                self.stop.set()
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.limit is not None:
            self.timer.cancel()
        self.executor.shutdown(cancel_futures=True)
        self.queue.put(None)
        self.listener.join()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.before)

    def _interrupt(self, *_: object) -> None:
        """Ctrl-C asks the workers to stop and write their checkpoints; pressed again, it is the usual one.

        Not an exception at once: that could surface anywhere, in code that swallows it too.
        """
        self.interrupted = True
        self.stop.set()
        signal.signal(signal.SIGINT, self.before)

    def results(
        self, jobs: dict[int, tuple[Job, Path]], keep_weights: bool
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield (index, results) as runs finish; those that were stopped are left out."""
        futures = {
            self.executor.submit(
                _work, index, job.point.train.to_dict(), job.together, str(folder), keep_weights
            ): index
            for index, (job, folder) in jobs.items()
        }
        for future in concurrent.futures.as_completed(futures):
            if self.interrupted:
                raise KeyboardInterrupt
            try:
                if result := future.result():
                    yield futures[future], result
            except concurrent.futures.process.BrokenProcessPool:
                raise RunError(
                    "a training process died, most likely for want of memory; the same command goes on from "
                    "the last checkpoints (fewer at once with --workers)"
                ) from None
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"the GPU has too little memory for what trains at once ({error}); the same command goes "
                    "on from the last checkpoints (fewer at once with --workers)"
                ) from error

    @contextlib.contextmanager
    def compiling_ahead(self, configs: Sequence[TrainConfig]) -> Iterator[None]:
        """Meanwhile a process on each GPU compiles its share of the models that do not train at once."""
        gpus = list(dict.fromkeys(name for name in self.devices if name.startswith("cuda")))
        if self.stop.is_set() or not gpus:
            yield
            return
        short = [config.to_dict() for config in to_compile(configs, len(self.devices))]
        with tempfile.TemporaryDirectory(prefix="holdall-") as folder:
            compiling = [
                self.context.Process(
                    target=compile_ahead, daemon=True,
                    args=(short[at :: len(gpus)], str(Path(folder) / str(at)), gpu, self.plugins),
                )
                for at, gpu in enumerate(gpus[: len(short)])
            ]  # fmt: skip
            for process in compiling:
                process.start()
            try:
                yield
            finally:
                for process in compiling:
                    process.kill()  # nothing of what it does is kept, but for what it has compiled
                    process.join()

    def _listen(self) -> None:
        while (said := self.queue.get()) is not None:
            self.watcher.progress(*said)


def devices(device: str, workers: int) -> list[str]:
    """The device of each worker: a machine's GPUs in turn."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{index % count}" if count else device for index in range(workers)]


_worker: dict[str, Any] = {}
"""What this process was started with."""


def _start_process(queue: Any, stop: Any, free: Any, plugins: list[str]) -> None:
    device = free.get()
    _join_in(device, plugins)
    keep_freed_memory()
    _worker.update(queue=queue, stop=stop, device=device)


def _join_in(device: str, plugins: Sequence[str]) -> None:
    """What every process of a sweep begins with."""
    processes.follow_parent()
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    for plugin in plugins:
        mixers.load(Path(plugin))


def _work(
    index: int, plain: dict[str, Any], together: bool, folder: str, keep_weights: bool
) -> list[dict[str, Any]]:
    """Train one run; nothing if it was stopped."""
    stop, said = _worker["stop"], _worker["queue"]
    if stop.is_set():
        return []
    try:
        return train(
            TrainConfig.from_dict(plain),
            Path(folder),
            device=_worker["device"],
            together=together,
            keep_weights=keep_weights,
            on_progress=lambda progress: said.put((index, progress)),
            should_stop=stop.is_set,
        )
    except Stopped:
        return []
    except Exception as error:
        if errors.is_refusal(error):  # where it was raised is known here only
            raise RunError(f"{Path(folder).name}: {errors.message(error)}") from error
        raise


def to_compile(configs: Sequence[TrainConfig], workers: int) -> list[TrainConfig]:
    """Short trainings of all models but those that train at once, in order."""
    short = [_shortened(config) for config in configs]
    return [each for each in dict.fromkeys(short) if each not in short[:workers]]


def _shortened(config: TrainConfig) -> TrainConfig:
    """One step at every length and one test, with few rows, which need little of the GPU's memory."""
    few = min(config.batch, 32)

    def shorter(segments: Sequence[Segment]) -> tuple[Segment, ...]:
        return tuple(dataclasses.replace(segment, rows=min(segment.rows, few)) for segment in segments)

    data = dataclasses.replace(config.data, train=shorter(config.data.train), test=shorter(config.data.test))
    seeds = tuple(range(len(config.seeds)))  # whichever they are, the kernels are the same
    return dataclasses.replace(config, data=data, seeds=seeds, batch=few, epochs=1, evaluate_every=0)


def compile_ahead(
    configs: Sequence[dict[str, Any]], folder: str, device: str, plugins: Sequence[str]
) -> None:
    """Train these in folders under this one, for what that leaves in Triton's cache; a process of its own.

    A width's first training waits some ten seconds for its kernels, and the GPU with it. What goes wrong here
    goes wrong there as well, and is told there.
    """
    os.nice(10)  # those that train come first
    _join_in(device, plugins)
    for index, plain in enumerate(configs):
        with contextlib.suppress(Exception):
            config = TrainConfig.from_dict(plain)
            train(config, Path(folder) / str(index), device=device, keep_weights=False)
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of giving it back to the system.

    Every step frees and takes the same large buffers. By default glibc maps each of them anew, and the
    kernel fills the pages with zeros first: a third of a step's time on a CPU. Elsewhere this does nothing.
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # the option numbers of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
