"""A sweep's folder: which sweep it holds, which of its runs are there, and its results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdall import environment, files, settings
from holdall.files import RunError
from holdall.sweeps.config import Job, Point, SweepConfig

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

    So a sweep that is refused leaves its folder to the corrected command.
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
    """Write what this sweep is, or check that the folder holds the same one, perhaps with fewer seeds."""
    path, points, data = out / "config.json", sweep.to_dict()["points"], sweep.data
    if path.exists():
        held = files.read_json(path, OTHER).get("points")
        if held == points:
            return
        _check(out, held, points)
    about = {
        "recipe": " ".join(filter(None, (sweep.recipe, sweep.part))),
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
    files.write_json(path, {**about, "points": points})


def _check(out: Path, held: Any, wanted: Any) -> None:
    """Raise RunError unless the points in a folder are those of the sweep, perhaps with fewer seeds."""
    try:
        # parsed, so that a folder of an earlier version has the form and the defaults of this one
        held = [Point.from_dict(point).to_dict() for point in held or ()]
        different = _difference(held, wanted)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise files.damaged(out / "config.json", f"its points are none ({error!r})", OTHER) from error
    if different:
        raise RunError(f"{out} holds another sweep ({different}); choose another folder with --out")
    for there, here in zip(held, wanted, strict=True):
        if missing := set(there["train"]["seeds"]) - set(here["train"]["seeds"]):
            raise RunError(
                f"{out} holds the same sweep with more seeds, {sorted(missing)} too; give at least "
                f"--seeds {max(missing) + 1}, or choose another folder with --out"
            )


def _difference(held: Any, wanted: Any) -> str:
    """Where the points of two sweeps differ, apart from seeds, matched by label and not by position."""

    def labelled(points: Any) -> dict[str, Any]:
        found = {}
        for point in points:
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


def write_results(out: Path, lines: Mapping[int, list[dict[str, Any]]]) -> None:
    """Write results.jsonl: the lines of each run, by the run's place in the sweep."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for i in sorted(lines) for line in lines[i])
    files.write_atomically(out / "results.jsonl", text.encode())
