"""The recall-memory frontier as one HTML file that opens offline: chart, table and where it came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdall.report import chart, floor, shell, strip, style
from holdall.report.data import BY_HAND, Model, Run, Sweep, families, has_rates


def save(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write the page to `path`: about 5 MB, nearly all of it Plotly's own program."""
    path.write_text(render(sweeps), encoding="utf-8")


def render(sweeps: Sequence[Sweep]) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    marks = chart.Marks()
    rows = _rows(sweeps, marks)  # the table's rows are numbered first
    return shell.render(
        "page.html",
        data={"traces": chart.traces(sweeps, marks), "layout": chart.layout(sweeps), "marks": marks.all},
        sweeps=[_about(sweep, fill[2]) for sweep, fill in zip(sweeps, style.FILLS, strict=False)],
        gap=_gap(sweeps),
        panels=_panels(sweeps, marks),
        panels_caption=strip.caption(sweeps) if has_rates(sweeps) else "",
        spread=style.spread_text(sweeps),
        unit=sweeps[0].axis.unit,
        notes=[note for sweep in sweeps for note in sweep.notes],
        task=sweeps[0].task,
        mean=style.difficulties_text(sweeps[0]),
        context_len=f"{sweeps[0].context_len:,}",
        columns=_columns(sweeps),
        rows=rows,
        plotly=get_plotlyjs(),
    )


def _about(sweep: Sweep, fill: str) -> dict[str, Any]:
    """What the page says of a sweep beside its models."""
    return {
        "name": sweep.name,
        "models": len(sweep.models),
        "fill": fill,
        "command": sweep.command,
        "test": [
            f"{part.rows:,} rows of {part.length:,} tokens"
            f"{f' with {part.difficulty:,} {sweep.difficulty}' if part.difficulty != part.length else ''}; "
            f"each answer is one of {part.values:,} values"
            for part in sweep.segments
        ],
        "environment": [(key, style.value_text(value)) for key, value in sweep.environment.items()],
    }


def _gap(sweeps: Sequence[Sweep]) -> dict[str, str] | None:
    """How far the frontier is from the floor, in words; None where nothing is drawn."""
    found = floor.gap(sweeps[0].questions, (m for sweep in sweeps for m in sweep.models), sweeps[0].axis.bits)
    if found is None:
        return None
    model, times = found
    return {
        "label": model.label,
        "accuracy": f"{model.accuracy:.1%}",
        "state": style.state_text(sweeps[0].axis, model.state),
        "times": style.gap_text(times),
    }


# ---------------------------------------------------------------------------------------- learning rates

LEFT, RIGHT, TOP, BOTTOM = 6.0, 94.0, 6.0, 56.0
"""Where a panel of 100 by 62 has its first and last rate, 100% and 0%."""


def _panels(sweeps: Sequence[Sweep], marks: chart.Marks) -> list[dict[str, Any]]:
    """The strip of learning rates (holdall/report/strip.py), a panel per family; none with one rate each."""
    if not has_rates(sweeps):
        return []
    rates = strip.learning_rates(sweeps)
    return [
        {
            "family": family,
            "look": style.look(families(sweeps).index(family)),
            "ends": [f"{rates[0]:.2g}", f"{rates[-1]:.2g}"],
            "models": [
                _curve(model, marks, rates, dotted=place > 0)
                for place, sweep in enumerate(sweeps)
                for model in sweep.models
                if model.drawn and model.family == family
            ],
        }
        for family in strip.panels(sweeps)
    ]


def _curve(model: Model, marks: chart.Marks, rates: Sequence[float], *, dotted: bool) -> dict[str, Any]:
    """A model's line in its panel, with what each of its points is of and says."""
    span = math.log(rates[-1] / rates[0])
    points = []
    for rate in model.by_rate:
        x = LEFT + (RIGHT - LEFT) * math.log(rate.learning_rate / rates[0]) / span
        low, y, high = (
            BOTTOM if math.isnan(share) else BOTTOM + (TOP - BOTTOM) * share
            for share in (rate.low, rate.accuracy, rate.high)
        )
        says = f"{rate.accuracy:.1%}" if rate.converged else "diverged"
        says += f", {rate.low:.1%} to {rate.high:.1%}" if rate.high > rate.low else ""
        points.append(
            {
                "x": f"{x:.2f}",
                "y": f"{y:.2f}",
                "low": f"{low:.2f}",
                "high": f"{high:.2f}",
                "counts": rate.counts,
                "diverged": len(rate.converged) < len(rate.runs),
                "converged": bool(rate.converged),
                "mark": marks.rate(model, rate),
                "says": f"{model.label} at {rate.learning_rate:.2g}: {says}",
            }
        )
    return {
        "mark": marks.model(model),
        "line": " ".join(f"{point['x']},{point['y']}" for point in points if point["converged"]),
        "points": points,
        "pale": bool(model.published),
        "dotted": dotted,
    }


# ---------------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Cell:
    """A number of the table: its text, and the value that its column is sorted by."""

    text: str = ""
    value: int | float | str = ""
    """Empty if there is no value; sorted last."""
    share: bool = False
    """Whether it is drawn as a bar, too."""


def _columns(sweeps: Sequence[Sweep]) -> list[dict[str, str]]:
    texts = [("Model", "text"), *([("Sweep", "text")] if len(sweeps) > 1 else []), ("Options", "options")]
    numbers = [
        "Width",
        "Parameters",
        "State",
        "Accuracy",
        *(f"{tag} {sweeps[0].difficulty}" for tag in _tags(sweeps)),
    ]
    numbers += ["Recall bits", "Efficiency", "Learning rate", "Seed", "Steps", "Seconds"]
    return [{"name": name, "kind": kind} for name, kind in (*texts, *((name, "number") for name in numbers))]


def _rows(sweeps: Sequence[Sweep], marks: chart.Marks) -> list[dict[str, Any]]:
    """A row per run: each model's best learning rates, then its others, which the switch shows."""
    rows = []
    for sweep in sweeps:
        for model in sweep.models:
            # a model that diverged everywhere is still one visible row
            counts = list(model.best or model.runs[:1])
            others = [run for run in model.runs if run not in counts]
            rows += [_row(sweeps, sweep, run, marks.model(model), other=False) for run in counts]
            rows += [_row(sweeps, sweep, run, marks.run(model, run), other=True) for run in others]
        for model in sweep.by_hand:
            row = _row(sweeps, sweep, model.runs[0], marks.model(model), other=False)
            colour = style.by_hand_colour(sweeps, model.family) or "var(--ink)"
            rows.append({**row, "glyph": style.BY_HAND[2], "colour": colour})
    return rows


def _row(sweeps: Sequence[Sweep], sweep: Sweep, run: Run, mark: int, *, other: bool) -> dict[str, Any]:
    line, look = run.line, style.look(families(sweeps).index(run.family))
    return {
        "mark": mark,
        "other": other,
        "glyph": look.glyph,
        "colour": look.colour,
        "label": run.label,
        "sweep": sweep.name,
        "options": style.value_text(line["options"]) if line.get("options") else "",
        "cells": [
            _number(run.width, "{}"),
            _number(line.get("parameters"), "{:,.0f}"),
            Cell(style.bytes_text(run.state_bytes), run.state_bytes),
            _share(run.accuracy, "diverged"),
            *(_share(run.by_difficulty.get(tag, math.nan), "") for tag in _tags(sweeps)),
            _number(line.get("recall_bits"), "{:,.1f}"),
            _number(line.get("recall_efficiency"), "{:.3%}"),
            *(
                [Cell(BY_HAND), Cell()]
                if line.get("kind") == BY_HAND
                else [_number(run.learning_rate, "{:.4g}"), _number(run.seed, "{}")]
            ),
            _number(line.get("steps"), "{:,.0f}"),
            _number(line.get("seconds"), "{:,.1f}"),
        ],
    }


def _number(value: Any, text: str) -> Cell:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Cell()
    return Cell(text.format(value), value)


def _share(accuracy: float, missing: str) -> Cell:
    return Cell(missing) if math.isnan(accuracy) else Cell(f"{accuracy:.1%}", accuracy, share=True)


def _tags(sweeps: Sequence[Sweep]) -> list[int]:
    """The difficulties at which any model was tested."""
    runs = (run for sweep in sweeps for model in (*sweep.models, *sweep.by_hand) for run in model.runs)
    return sorted({tag for run in runs for tag in run.by_difficulty})
