"""Finished runs that come with Holdall, so that a new mixer is compared without training the others again.

They are the sweep folders of `results/`, which the package holds as `holdall/published`. A published line
counts for a model only if the folder says that it was trained as this model is now, apart from learning rates
and seeds, which do not change each other's runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdall import files
from holdall.sweeps.config import Job, Point, SweepConfig

FOLDER = Path(__file__).parent.parent / "published"

Key = tuple[str, int, float, int]
"""Label, width, learning rate and seed of a line."""


class Published:
    """The published lines of a sweep; none if there is no folder for it."""

    def __init__(self, sweep: SweepConfig, folder: Path | None = None) -> None:
        folder = folder or FOLDER / sweep.recipe / sweep.part
        self.lines: dict[Key, dict[str, Any]] = {}
        self.models: set[tuple[str, int]] = set()
        """Label and width of those that were trained as they are now."""
        if not (folder / "results.jsonl").exists():
            return
        config, environment = (files.read_json(folder / f"{name}.json") for name in ("config", "environment"))
        held = {model_of(point): point for point in config["points"]}
        wanted = {model_of(point): point for point in sweep.to_dict()["points"]}
        self.models = {model for model, point in wanted.items() if _same(held.get(model), point)}
        source = {"commit": environment.get("commit"), "hardware": hardware(environment)}
        for line in files.read_lines(folder / "results.jsonl"):
            if (line["label"], line["width"]) in self.models:
                key = (line["label"], line["width"], line["learning_rate"], line["seed"])
                self.lines[key] = {**line, "weights": None, "published": source}

    def of(self, job: Job) -> list[dict[str, Any]] | None:
        """The lines of a run's members, as many as there are; None for a model that is to be trained."""
        train = job.point.train
        model = (job.point.label, train.model.width)
        keys = [(*model, *member) for member in train.members]
        return [self.lines[key] for key in keys if key in self.lines] if model in self.models else None


def model_of(point: Mapping[str, Any]) -> tuple[str, int]:
    """Label and width of a point as plain JSON values: what tells the models of a sweep apart."""
    return point["label"], point["train"]["model"]["width"]


def hardware(environment: Mapping[str, Any]) -> str:
    """What a sweep ran on, from its environment.json: the GPU's name, or the number of CPU cores."""
    cores = environment.get("cores")
    return str(environment.get("gpu") or (f"{cores} CPU cores" if cores else "a CPU"))


def _same(held: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Whether a published point is trained as the wanted one, which is in the form of this version."""
    if held is None:
        return False
    try:
        plain = Point.from_dict(held).to_dict()
    except (KeyError, TypeError, ValueError):  # a mixer or an option that is there no longer
        return False
    trains = [dict(point["train"], learning_rates=(), seeds=()) for point in (plain, wanted)]
    return trains[0] == trains[1]
