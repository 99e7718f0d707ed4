"""Models built by hand on a sweep's picture: what could be had from so much state, beside what was trained.

They answer the sweep's own test rows, in fp32 as trained models do, and their states are counted as those of
trained models are. Their lines stand in a file of their own, `by_hand.jsonl`, and say "kind": "by hand", so
that nothing takes them for trained ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from holdall import files
from holdall.contract import bytes_per_row
from holdall.sweeps.result import proven_bits
from holdall.tasks.data import DataConfig, MQARData, TaskData
from holdall.theory.by_hand import ByHandConfig, HandBuilt, constructions, right

FILE = "by_hand.jsonl"
"""Beside results.jsonl."""
KIND = "by hand"
"""As holdall/report/data.py reads it, without PyTorch."""
MOST_OPERATIONS = 2e13
"""Of one model on all test rows: minutes on a few cores."""


def add(
    folder: Path,
    watch: Callable[[str, int, int], None] = lambda label, done, total: None,
    finished: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, str]:
    """Evaluate the constructions on a sweep folder's test rows, and write their lines into the folder.

    Lines that are there already are kept, so that a call that was stopped can be made again; a folder
    without `by_hand.jsonl` starts afresh.

    Args:
        folder: of `run_sweep`.
        watch: called with a model's label, the rows that it has answered, and all rows.
        finished: called with each line, those that were there too.

    Returns:
        Why the others cannot be built for these rows, by label.

    Raises:
        RunError: there is no such folder, or its config.json is damaged.
        ValueError: the sweep's task is not MQAR.
    """
    sweep = files.read_json(folder / "config.json")
    try:
        points = sweep["points"]
        data = DataConfig.from_dict(points[0]["train"]["data"])
        families = {_kind_of(point["train"]["model"]["layers"][-1]): point["family"] for point in points}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise files.damaged(folder / "config.json", f"it holds no points ({error!r})") from None
    data = check_task(data)
    path, refused = folder / FILE, dict[str, str]()
    lines = {line["label"]: line for line in files.read_lines(path)}
    only_tests = [dataclasses.replace(segment, rows=1) for segment in data.train]
    # with as many training segments as before, test rows are those of the sweep
    rows = TaskData(dataclasses.replace(data, train=tuple(only_tests)))
    for config in configs(data, refused):
        if config.label not in lines:
            model = config.build(torch.float32)
            if (operations := _operations(model, rows)) > MOST_OPERATIONS:
                refused[config.label] = (
                    f"its dense layers of width {model.report().width:,} would take {operations:.0e} "
                    f"operations on these rows, more than {MOST_OPERATIONS:.0e}; take fewer or shorter rows"
                )
                continue
            lines[config.label] = _line(config, model, data, rows, families, watch)
            text = "".join(json.dumps(line) + "\n" for line in lines.values())
            files.write_atomically(path, text.encode())
        finished(lines[config.label])
    return refused


def check_task(data: DataConfig) -> MQARData:
    """The data of a sweep, if it is of MQAR; ValueError otherwise."""
    if isinstance(data, MQARData):
        return data
    raise ValueError(f"models built by hand answer MQAR (holdall frontier quick), not the task {data.kind}")


def configs(data: MQARData, refused: dict[str, str]) -> Iterator[ByHandConfig]:
    """All constructions at all their sizes that can be built for these rows.

    refused: gets the reasons why the others cannot, by label or, where there is none yet, by name.
    """
    rows = {"vocab": data.vocab, "length": max(data.row_length(segment) for segment in data.test)}
    for name, construction in constructions().items():
        labels = set()
        for options in construction.sizes:
            try:
                config = construction.from_dict({**rows, **options})
            except ValueError as error:
                words = ", ".join(f"{option} = {value}" for option, value in options.items())
                refused[f"{name} by hand, {words}"] = str(error)
                continue
            if config.label not in labels and config.useful:
                labels.add(config.label)
                yield config


def _line(
    config: ByHandConfig,
    model: HandBuilt,
    data: MQARData,
    rows: TaskData,
    families: Mapping[tuple[str, str], str],
    watch: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The line of a construction: the keys of results.jsonl, without those of a training."""
    total, before = sum(len(part.tokens_BN) for part in rows.test), 0
    scores, by_tag = [], dict[str, list[float]]()
    for segment, part in zip(data.test, rows.test, strict=True):
        start = before

        def seen(done: int, _: int, start: int = start) -> None:
            watch(config.label, start + done, total)

        right_BK = right(model, part, seen)
        scores.append(float(right_BK.double().mean()))
        by_tag.setdefault(str(data.tag(segment)), []).append(scores[-1])
        before += len(right_BK)
    accuracies = {tag: sum(each) / len(each) for tag, each in by_tag.items()}
    mixer = model.layers[-1].config
    context_len, report = config.length, model.report()
    bits, state_bytes = proven_bits(data, accuracies), _bytes(model, context_len)
    return {
        "label": config.label,
        "family": families.get(_kind_of(mixer.to_dict()), mixer.name.replace("-", " ")),
        "kind": KIND,
        "construction": config.name,
        "mixer": mixer.name,
        "options": {
            name: value for name, value in config.to_dict().items() if name not in ("vocab", "length")
        },
        "width": report.width,
        "layers": [layer.config.name for layer in model.layers],
        "form": model.layers[-1].form,
        "precision": "fp32",
        "parameters": report.parameters,
        "non_zeros": report.non_zeros,
        "state_bytes": state_bytes,
        "state_elements": report.state_elements,
        "used_state": report.used_state,
        "context_len": context_len,
        "accuracy": sum(scores) / len(scores),
        "difficulty": data.difficulty,
        "accuracy_by_difficulty": accuracies,
        "learning_rate": None,
        "seed": 0,
        "recall_bits": round(bits, 2),
        "recall_efficiency": bits / (8 * state_bytes),
    }


def _kind_of(layer: Mapping[str, Any]) -> tuple[str, str]:
    """Which trained models a construction is shown with, from a layer's config: mixer and feature map."""
    return layer["name"], layer.get("feature_map", "")


def _operations(model: HandBuilt, rows: TaskData) -> float:
    """Multiplications and additions of the layers' dense maps on all test rows, roughly."""
    weights = sum(weight.numel() for weight in model.layers.parameters())
    return 2.0 * weights * sum(part.tokens_BN.numel() for part in rows.test)


@torch.no_grad()
def _bytes(model: HandBuilt, context_len: int) -> int:
    """Of one row's state after so many tokens, counted."""
    _, states = model(torch.zeros(1, context_len, dtype=torch.long))
    return sum(map(bytes_per_row, states))
