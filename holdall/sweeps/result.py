"""A line of results.jsonl: what a model is, how much state it carries and how much it recalls."""

from __future__ import annotations

from typing import Any

from holdall.model import ModelConfig, seeded
from holdall.sweeps.config import Job, SweepConfig
from holdall.tasks.information import recall_bits


def result_line(job: Job, sweep: SweepConfig, result: dict[str, Any]) -> dict[str, Any]:
    """The line of one member of a run, from its result.

    recall_bits are those that the hardest segment proves: a state that answers one segment need not answer
    all at once, so bits of different segments do not add up.
    """
    model, data = job.point.train.model, job.point.train.data
    state_bytes, parameters = measure(model, sweep.context_len)
    accuracies = result["accuracy_by_difficulty"]
    bits = max(
        (
            recall_bits(data.questions_per_row(segment), data.task(segment).values, accuracies[tag])
            for segment in data.test
            if (tag := str(data.tag(segment))) in accuracies
        ),
        default=0.0,
    )
    mixer = model.layers[-1]
    return {
        "label": job.point.label,
        "family": job.point.family,
        "mixer": mixer.name,
        "options": mixer.options(),
        "width": model.width,
        "layers": [layer.name for layer in model.layers],
        "form": result["forms"][-1],
        "precision": job.point.train.precision,
        "parameters": parameters,
        "state_bytes": state_bytes,
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


def measure(model: ModelConfig, context_len: int) -> tuple[int, int]:
    """The state of one row after `context_len` tokens in bytes, and the parameters: both counted."""
    with seeded(0):
        built = model.build()
    return built.state_bytes(context_len), built.parameter_count()
