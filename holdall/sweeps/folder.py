"""A sweep's folder: which sweep it holds, which of its runs are there, and its results."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdall import environment, files, settings
from holdall.files import RunError
from holdall.sweeps.config import Job, Point, SweepConfig
from holdall.sweeps.published import Published, model_of
from holdall.sweeps.result import result_line
from holdall.tasks.data import DataConfig, Segment
from holdall.training.populations import Progress, finished

OTHER = "Restore it from a copy, or choose another folder with --out."


class OutOfTime(Exception):  # noqa: N818 - not an error: it was asked for
    """The time limit of a sweep ended it; every run has written its checkpoint."""


def planned(sweep: SweepConfig, out: Path, *, together: bool) -> list[Job]:
    """The runs of a sweep in its folder; a population that was trained as one, on a GPU, stays one."""
    jobs: list[Job] = []
    for job in sweep.jobs(together=True):
        whole = together or (out / "runs" / job.folder / "result.json").exists()
        jobs += [job] if whole else job.alone()
    return jobs


@contextlib.contextmanager
def claimed(
    out: Path,
    sweep: SweepConfig,
    jobs: Sequence[Job],
    command: str,
    device: str,
    *,
    come_with: Published | None = None,
    laws: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Runs]:
    """Write into the folder which sweep it holds; undo that if an error ends it before any run has begun.

    So a sweep that is refused leaves its folder to the corrected command. Models that the folder holds and
    the sweep does not stay there: they were added by an earlier call.
    Raises RunError if the folder holds another sweep, or the same one with more seeds.
    """
    path = out / "config.json"
    claim = functools.partial(_claim, out, sweep, command, device)
    runs = Runs(sweep, out, jobs, claim, come_with=come_with, laws=laws)
    with files.locked(out):
        before = files.read_bytes(path, OTHER) if path.exists() else None
        begun_before = _begun(runs.folders)
        runs.claim()
    try:
        yield runs
    except OutOfTime:
        raise
    except BaseException:
        with files.locked(out):
            begun = _begun(runs.folders)
            if before is None and not begun:
                for name in ("config.json", "environment.json", "results.jsonl"):
                    (out / name).unlink(missing_ok=True)
            elif before is not None and begun == begun_before:
                files.write_atomically(path, before)
        raise


def _begun(runs: Sequence[Path]) -> set[Path]:
    """The run folders whose training has begun."""
    return {folder for folder in runs if (folder / "config.json").exists()}


def _claim(out: Path, sweep: SweepConfig, command: str, device: str) -> None:
    """Write what this sweep is, and keep what the folder holds besides."""
    path, points, data = out / "config.json", sweep.to_dict()["points"], sweep.data
    recipe = " ".join(filter(None, (sweep.recipe, sweep.part)))
    kept: list[Any] = []
    if path.exists():
        held = files.read_json(path, OTHER)
        kept = _check(out, held, recipe, points, sweep)
        if held.get("points") == [*points, *kept]:
            return
    about = {
        "recipe": recipe,
        "command": command,
        "context_len": sweep.context_len,
        "task": data.about,
        "difficulty": data.difficulty,
        "test": [
            {
                "vocab": data.vocab,
                **_asked(data, segment),
                "difficulty": data.tag(segment),
                **segment.to_dict(),
            }
            for segment in data.test
        ],
    }
    files.write_json(out / "environment.json", environment.describe(device, 1))
    files.write_json(path, {**about, "points": [*points, *kept]})


def _asked(data: DataConfig, segment: Segment) -> dict[str, Any]:
    """What a report draws the information floor of a test segment from."""
    questions, values, distinct = data.asked(segment)
    return {"values": values, "questions": questions, **({} if distinct else {"distinct": False})}


def _check(out: Path, held: Any, recipe: str, wanted: Any, sweep: SweepConfig) -> list[Any]:
    """The points in a folder that are not wanted, as they stand there.

    Raises RunError unless those that are wanted are the same there, perhaps with fewer seeds, and the others
    are tested on the same rows.
    """
    ours, there, kept = {model_of(point): point for point in wanted}, {}, []
    try:
        for point in held.get("points") or ():
            if model_of(point) in ours:
                # parsed, so that a folder of an earlier version has the form and the defaults of this one
                there[model_of(point)] = Point.from_dict(point).to_dict()
            else:
                kept.append(point)  # not parsed: its mixer need not be loaded
        different = _difference(there, {model: ours[model] for model in there})
        if not different and held.get("recipe", recipe) != recipe:
            different = f"the recipe is {held['recipe']!r}, not {recipe!r}"
        if not different and not there and kept:
            rows = DataConfig.from_dict(kept[0]["train"]["data"]).test_settings()
            different = settings.differ(rows, sweep.data.test_settings())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise files.damaged(out / "config.json", f"its points are none ({error!r})", OTHER) from error
    if different:
        raise RunError(f"{out} holds another sweep ({different}); choose another folder with --out")
    for model, point in there.items():
        if missing := set(point["train"]["seeds"]) - set(ours[model]["train"]["seeds"]):
            raise RunError(
                f"{out} holds the same sweep with more seeds, {sorted(missing)} too; give at least "
                f"--seeds {max(missing) + 1}, or choose another folder with --out"
            )
    return kept


def _difference(held: Any, wanted: Any) -> str:
    """Where the models of two sweeps differ, apart from seeds."""

    def labelled(points: Any) -> dict[str, Any]:
        found = {}
        for (label, width), point in points.items():
            train = {name: value for name, value in point["train"].items() if name != "seeds"}
            found[f"{label}, width {width}"] = {**point, "train": train}
        return found

    return settings.listed(settings.differences(labelled(held), labelled(wanted)))


def other_lines(out: Path, sweep: SweepConfig) -> list[dict[str, Any]]:
    """The lines of results.jsonl that are of models which other calls added to the folder."""
    ours = {(point.label, point.train.model.width) for point in sweep.points}
    lines = files.read_lines(out / "results.jsonl", OTHER)
    return [line for line in lines if (line.get("label"), line.get("width")) not in ours]


class Runs:
    """The runs of a sweep in its folder, whoever trains them: which are finished, and how far the others are.

    What is finished is written into results.jsonl, also what other processes train there: each of them writes
    all. One that runs the same sweep with fewer seeds leaves that to the others.

    Args:
        claim: writes what the sweep is, as `claimed` did, should another process have undone that.
        come_with: runs that were published, which stand for those that the folder has not.
        laws: by label, which laws a model's mixer breaks or refuses, as kept in its lines.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        out: Path,
        jobs: Sequence[Job],
        claim: Callable[[], None],
        *,
        come_with: Published | None = None,
        laws: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.sweep, self.out, self.claim, self.come_with, self.laws = sweep, out, claim, come_with, laws or {}
        self.jobs, self.folders = list(jobs), [out / "runs" / job.folder for job in jobs]
        self.lines: dict[int, list[dict[str, Any]]] = {}
        """The lines of each finished run, by its place in the sweep."""
        self._written = False
        self._seen: dict[int, int] = {}

    def gather(self) -> dict[int, list[dict[str, Any]]]:
        """The lines of the runs that have finished since the last call; with them results.jsonl is written.

        Raises RunError if one of them is of another sweep, or damaged.
        """
        before = set(self.lines)
        self._read()
        if self.lines.keys() - before or not self._written:
            with files.locked(self.out):
                self._read()  # what came while this process waited
                self._write()
            self._written = True
        return {index: self.lines[index] for index in sorted(self.lines.keys() - before)}

    def _read(self) -> None:
        for index, (job, folder) in enumerate(zip(self.jobs, self.folders, strict=True)):
            if index in self.lines or (self._written and not (folder / "result.json").exists()):
                continue  # which runs the folders hold was checked the first time
            lines: list[dict[str, Any]] | None = None
            if (results := finished(job.point.train, folder)) is not None:
                lines = [result_line(job, self.sweep, result) for result in results]
            elif self.come_with is not None:
                lines = self.come_with.of(job)
            if lines is not None:
                verdict = self.laws.get(job.point.label)
                self.lines[index] = [{**line, "laws": verdict} for line in lines] if verdict else lines

    def _write(self) -> None:
        path = self.out / "config.json"
        if not path.exists():
            self.claim()
        held = files.read_json(path, OTHER).get("points") or ()
        if all(point in held for point in self.sweep.to_dict()["points"]):
            lines = [line for index in sorted(self.lines) for line in self.lines[index]]
            lines += other_lines(self.out, self.sweep)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            files.write_atomically(self.out / "results.jsonl", text.encode())

    def moved(self) -> Iterator[tuple[int, Progress]]:
        """The runs that have been tested since the last call, and what they were then."""
        for index, (job, folder) in enumerate(zip(self.jobs, self.folders, strict=True)):
            if index in self.lines or not (path := folder / "metrics.jsonl").exists():
                continue
            before, self._seen[index] = self._seen.get(index), path.stat().st_size
            if before not in (None, self._seen[index]) and (lines := files.read_lines(path)):
                step, loss = lines[-1]["step"], lines[-1]["loss"]
                best = max(line["accuracy"] for line in lines if line["step"] == step)
                yield index, Progress(step, job.steps, math.nan if loss is None else loss, best)
