"""The recall-memory frontier as one HTML file that opens offline: chart, table and where it came from.

The template beside this file holds all HTML, CSS and JavaScript; this module fills it in. Every text is
escaped once: here for HTML, in chart.py for Plotly's own mark-up, and in the JSON that the page carries by
writing "<" as an escape, so that no label can end a script.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from holdall.report import chart, floor, style
from holdall.report.data import Run, Sweep, families

TEMPLATE = Path(__file__).with_name("page.html")


def save(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write the page to `path`: about 5 MB, nearly all of it Plotly's own program."""
    path.write_text(render(sweeps), encoding="utf-8")


def render(sweeps: Sequence[Sweep]) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    marks = chart.Marks()
    parts = {
        "title": escape("The recall-memory frontier: " + ", ".join(sweep.name for sweep in sweeps)),
        "lede": _lede(sweeps),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for sweep in sweeps for note in sweep.notes),
        "mean": escape(style.pairs_text(sweeps[0])),
        "context_len": f"{sweeps[0].context_len:,}",
        "head": _head(sweeps),
        "rows": _rows(sweeps, marks),
        "made": "".join(map(_made, sweeps)),
        "plotly": get_plotlyjs(),
    }
    content = {"traces": chart.traces(sweeps, marks), "layout": chart.layout(sweeps), "marks": marks.all}
    parts["data"] = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # one pass, so that nothing that is filled in is ever read as a template itself
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _lede(sweeps: Sequence[Sweep]) -> str:
    counts = " and ".join(f"{len(sweep.models)} models of “{escape(sweep.name)}”" for sweep in sweeps)
    text = f"How much can a model recall, from how many bytes of state? {counts}."
    if len(sweeps) > 1:
        fills = zip(style.FILLS, sweeps, strict=False)
        text += (
            f" The points of {', '.join(f'“{escape(sweep.name)}” are {fill[2]}' for fill, sweep in fills)}."
        )
    found = floor.gap(sweeps[0].questions, (model for sweep in sweeps for model in sweep.models))
    if found is None:
        return text
    model, times = found
    return (
        f"{text} On the frontier, <strong>{escape(model.label)}</strong> recalls "
        f"<strong>{model.accuracy:.1%}</strong> from <strong>{style.bytes_text(model.state_bytes)}</strong>: "
        f"{style.gap_text(times)} the bits that its answers need."
    )


def _head(sweeps: Sequence[Sweep]) -> str:
    texts = [("Model", "text"), *([("Sweep", "text")] if len(sweeps) > 1 else []), ("Options", "options")]
    numbers = ["Width", "Parameters", "State", "Accuracy", *(f"{pairs} pairs" for pairs in _pairs(sweeps))]
    numbers += ["Recall bits", "Efficiency", "Learning rate", "Seed", "Steps", "Seconds"]
    columns = [*texts, *((name, "number") for name in numbers)]
    return "".join(
        f'<th scope="col" class="{kind}"><button type="button">{name}</button></th>' for name, kind in columns
    )


def _rows(sweeps: Sequence[Sweep], marks: chart.Marks) -> str:
    """A row per run: each model's best learning rates, then its others, which the switch shows."""
    rows = []
    for sweep in sweeps:
        for model in sweep.models:
            # a model that diverged everywhere is still one visible row
            counts = list(model.best or model.runs[:1])
            others = [run for run in model.runs if run not in counts]
            rows += [_row(sweeps, sweep, run, f'data-mark="{marks.model(model)}"') for run in counts]
            rows += [
                _row(sweeps, sweep, run, f'data-mark="{marks.run(model, run)}" class="other"')
                for run in others
            ]
    return "\n".join(rows)


def _row(sweeps: Sequence[Sweep], sweep: Sweep, run: Run, attributes: str) -> str:
    look, line = style.look(families(sweeps).index(run.family)), run.line
    glyph = f'<span class="glyph" style="color:{look.colour}" aria-hidden="true">{look.glyph}</span>'
    label, name = escape(run.label), escape(sweep.name)
    options = escape(style.value_text(line["options"])) if line.get("options") else ""
    cells = [
        f'<td data-value="{label}">{glyph}<button type="button">{label}</button></td>',
        f'<td data-value="{name}">{name}</td>' if len(sweeps) > 1 else "",
        f'<td class="options" title="{options}" data-value="{options}">{options}</td>',
        _number(run.width, "{}"),
        _number(line.get("parameters"), "{:,.0f}"),
        _number(run.state_bytes, style.bytes_text(run.state_bytes)),
        _share(run.accuracy, "diverged"),
        *(_share(run.by_pairs.get(pairs, math.nan), "") for pairs in _pairs(sweeps)),
        _number(line.get("recall_bits"), "{:,.1f}"),
        _number(line.get("recall_efficiency"), "{:.3%}"),
        _number(run.learning_rate, "{:.4g}"),
        _number(run.seed, "{}"),
        _number(line.get("steps"), "{:,.0f}"),
        _number(line.get("seconds"), "{:,.1f}"),
    ]
    return f"<tr {attributes}>{''.join(cells)}</tr>"


def _number(value: Any, text: str) -> str:
    """A cell that sorts by its number. What is missing, or no number, stays empty and sorts last."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return '<td class="number" data-value=""></td>'
    return f'<td class="number" data-value="{value!r}">{text.format(value)}</td>'


def _share(accuracy: float, missing: str) -> str:
    if math.isnan(accuracy):
        return f'<td class="number" data-value="">{missing}</td>'
    share = f"{accuracy:.1%}"
    return f'<td class="number share" style="--share:{share}" data-value="{accuracy!r}">{share}</td>'


def _pairs(sweeps: Sequence[Sweep]) -> list[int]:
    return sorted(
        {pairs for sweep in sweeps for model in sweep.models for run in model.runs for pairs in run.by_pairs}
    )


def _made(sweep: Sweep) -> str:
    command = (
        f'<div class="command"><code>{escape(sweep.command)}</code><button type="button">Copy</button></div>'
    )
    test = "".join(
        f"<li>{part.rows:,} rows of {part.length:,} tokens with {part.pairs:,} key–value pairs; "
        f"each answer is one of {part.values:,} values</li>"
        for part in sweep.segments
    )
    environment = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(style.value_text(value))}</dd>"
        for key, value in sweep.environment.items()
    )
    return (
        f'{command if sweep.command else ""}<div class="made">'
        f"<div><h3>Test of “{escape(sweep.name)}”</h3><ul>{test}</ul></div>"
        f"<div><h3>Environment</h3><dl>{environment or '<dd>not recorded</dd>'}</dl></div></div>"
    )
