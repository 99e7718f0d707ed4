"""A sweep's trained models with their states in fewer bits: lines like those of results.jsonl.

A model in a format is a point of its own: its label names the format, its family is the model, and its state
is counted from what is stored. So figure, page and table of a sweep (holdall/report) show them as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdall import files
from holdall.analysis.bits import accuracy, state_bits
from holdall.contract import Format
from holdall.files import RunError
from holdall.model import Model
from holdall.precision import compute_in, dtype_of
from holdall.sweeps.result import proven_bits
from holdall.tasks.data import DataConfig, TaskData
from holdall.training.populations import TrainConfig, trained


def lines_in_formats(
    folder: Path,
    line: Mapping[str, Any],
    formats: Sequence[Format],
    *,
    name: str,
    every: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Any]]:
    """One line for each format, of the run that a line of the sweep in `folder` is of.

    Args:
        name: of the model.
        every: tokens that are read between one rounding of the state and the next.
        seed: of stochastic rounding.

    Raises:
        RunError: the folder has no weights of the run, or damaged ones.
        ValueError: the model cannot read a row in pieces.
    """
    if not formats:
        return
    model, config = trained_model(folder, line, device)
    data, rows = config.data, _test_rows(config.data, torch.device(device))
    for format in formats:
        by_tag: dict[str, list[float]] = {}
        for segment, questions in zip(data.test, rows.test, strict=True):
            score = accuracy(model, questions, format, every=every, seed=seed)
            by_tag.setdefault(str(data.tag(segment)), []).append(score)
        scores = {tag: sum(found) / len(found) for tag, found in by_tag.items()}
        bits, proven = state_bits(model, line["context_len"], format), proven_bits(data, scores)
        yield {
            **line,
            "label": f"{name}, {format}",
            "family": name,
            "format": str(format),
            "every": every,
            "state_bytes": bits // 8,
            "accuracy": sum(map(sum, by_tag.values())) / len(data.test),
            "accuracy_by_difficulty": scores,
            "recall_bits": round(proven, 2),
            "recall_efficiency": proven / bits,
            "run": f"{line['run']} in {format}",
        }


def trained_model(
    folder: Path, line: Mapping[str, Any], device: torch.device | str = "cpu"
) -> tuple[Model, TrainConfig]:
    """The trained model of a line of the sweep in `folder`, in the precision of its training, and its config.

    Raises RunError if the folder has no weights of the run, or damaged ones.
    """
    run = files.inside(folder, str(line["run"]))
    if not line.get("weights"):
        raise RunError(f"{run} has no trained weights; `holdall frontier` keeps them without --no-weights")
    way_out = "Restore it from a copy."
    config = TrainConfig.checked(files.read_json(run / "config.json", way_out), run / "config.json", way_out)
    model = trained(files.inside(run, str(line["weights"])), device)
    if (dtype := dtype_of(config.precision)) is not None:
        model = compute_in(dtype, model)
    return model, config


@functools.lru_cache(maxsize=1)
def _test_rows(data: DataConfig, device: torch.device) -> TaskData:
    """The test's rows, as in training; hardly any for training, whose number does not change the test's."""
    few = tuple(dataclasses.replace(segment, rows=1) for segment in data.train)
    return dataclasses.replace(data, train=few).build(device)
