"""A line of results.jsonl: what a model is, how much state it carries and how much it recalls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from holdall import mixers
from holdall.contract import bytes_per_row, elements_per_row
from holdall.model import ModelConfig, seeded
from holdall.sweeps.config import Job, SweepConfig
from holdall.tasks.data import DataConfig
from holdall.tasks.information import recall_bits


def result_line(job: Job, sweep: SweepConfig, result: dict[str, Any]) -> dict[str, Any]:
    """The line of one member of a run, from its result."""
    model, data = job.point.train.model, job.point.train.data
    state_bytes, state_elements, parameters = measure(model, sweep.context_len)
    accuracies = result["accuracy_by_difficulty"]
    bits = proven_bits(data, accuracies)
    mixer = model.layers[-1]
    return {
        "label": job.point.label,
        "family": job.point.family,
        "mixer": mixer.name,
        "options": mixer.options(),
        "width": model.width,
        "layers": [layer.name for layer in model.layers],
        "causal": all(mixers.entry(layer.name).causal for layer in model.layers),
        "form": result["forms"][-1],
        "precision": job.point.train.precision,
        "parameters": parameters,
        "state_bytes": state_bytes,
        "state_elements": state_elements,
        "context_len": sweep.context_len,
        "accuracy": result["accuracy"],
        "difficulty": data.difficulty,
        "accuracy_by_difficulty": accuracies,
        "learning_rate": result["learning_rate"],
        "seed": result["seed"],
        "steps": result["steps"],
        "stopped": result["stopped"],
        "rows": result["rows"],
        "seconds": result["seconds"],
        "recall_bits": round(bits, 2),
        "recall_efficiency": bits / (8 * state_bytes),
        "run": f"runs/{job.folder}",
        "weights": result["weights"],
    }


def proven_bits(data: DataConfig, accuracies: Mapping[str, float]) -> float:
    """The least bits of state that these accuracies, by the task's tag of difficulty, need.

    They are those of the hardest difficulty: a state that answers one segment need not answer all at once, so
    bits of different segments do not add up. Of segments of one difficulty, whose mean accuracy is known, one
    at least reached that mean: the bits are those of the easiest.
    """
    proven: dict[str, float] = {}
    for segment in data.test:
        if (tag := str(data.tag(segment))) in accuracies:
            questions, values, distinct = data.asked(segment)
            bits = recall_bits(questions, values, accuracies[tag], distinct)
            proven[tag] = min(bits, proven.get(tag, bits))
    return max(proven.values(), default=0.0)


@torch.no_grad()
def measure(model: ModelConfig, context_len: int) -> tuple[int, int, int]:
    """Bytes and elements of one row's state after `context_len` tokens, and the parameters: all counted."""
    with seeded(0):
        built = model.build()
    _, states = built.hidden(torch.zeros(1, context_len, dtype=torch.long))
    assert states is not None
    return sum(map(bytes_per_row, states)), sum(map(elements_per_row, states)), built.parameter_count()
