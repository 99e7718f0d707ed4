"""A sweep's folder: which sweep it holds, which of its runs are there, and its results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from holdall import environment, files, settings
from holdall.files import RunError
from holdall.sweeps.config import Job, Point, SweepConfig
from holdall.sweeps.published import model_of
from holdall.tasks.data import DataConfig

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
def claimed(out: Path, sweep: SweepConfig, command: str, device: str, runs: Sequence[Path]) -> Iterator[None]:
    """Write into the folder which sweep it holds; undo that if an error ends it before any run has begun.

    So a sweep that is refused leaves its folder to the corrected command. Models that the folder holds and
    the sweep does not stay there: they were added by an earlier call.
    Raises RunError if the folder holds another sweep, or the same one with more seeds.
    """
    path = out / "config.json"
    before = files.read_bytes(path, OTHER) if path.exists() else None
    begun_before = _begun(runs)
    _claim(out, sweep, command, device)
    try:
        yield
    except OutOfTime:
        raise
    except BaseException:
        begun = _begun(runs)
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
                "values": data.task(segment).values,
                "questions": data.questions_per_row(segment),
                "difficulty": data.tag(segment),
                **segment.to_dict(),
            }
            for segment in data.test
        ],
    }
    files.write_json(out / "environment.json", environment.describe(device, 1))
    files.write_json(path, {**about, "points": [*points, *kept]})


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
    """The lines of results.jsonl that are of models which an earlier call added to the folder."""
    ours = {(point.label, point.train.model.width) for point in sweep.points}
    lines = files.read_lines(out / "results.jsonl", OTHER)
    return [line for line in lines if (line.get("label"), line.get("width")) not in ours]


def write_results(out: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write results.jsonl."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_atomically(out / "results.jsonl", text.encode())
