"""Recall against state: each model read once, and an arrow to where it is after reading twice.

Across are the bytes that a model carries at the end of what it reads; of attention, whose cache grows, those
after the window and, read twice, after two windows. Up is the mean over tasks of recall.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from holdall.report import chart, recall_curves, recall_state, style
from holdall.report.evals_data import Evaluation, Interval
from holdall.report.paper import DPI

APART = 0.012
"""Share of the axis between models with the same state, which would cover one another."""
NEAR = 0.02
"""Share of the picture's side below which two points are one, and between zero and the picture's edge."""
MOST_NAMES = 6
"""Tasks that a sentence names one by one."""
MOST_LABELS = 9
"""Models whose names have room beside their points in the figure; more are listed at its side."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model at one number of readings."""

    reads: int
    state: int
    tokens: int
    """How many were read when it had that state."""
    mean: Interval


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model in the picture."""

    name: str
    index: int
    """Its place in the table, which chooses its look."""
    grows: bool
    points: tuple[Point, ...]
    shift: float = 1.0
    """By which its states are multiplied in the picture: 1 unless others have the same."""

    @property
    def places(self) -> list[tuple[float, float]]:
        """Where its points are drawn."""
        return [(point.state * self.shift, point.mean.value) for point in self.points]


def drawn(evaluation: Evaluation, suite: str) -> list[Drawn]:
    """The models whose state and mean over a suite are known."""
    found = []
    for index, model in enumerate(evaluation.models):
        points = []
        for reads in (1, 2):
            tokens = evaluation.window * reads
            state, mean = model.state_bytes(tokens), evaluation.mean(model, reads, suite)
            if state and mean is not None:
                interval = evaluation.interval(model, reads, suite)
                points.append(
                    Point(
                        reads=reads, state=state, tokens=tokens,
                        mean=interval or Interval(mean, math.nan, math.nan),
                    )
                )  # fmt: skip
        if points:
            found.append(Drawn(name=model.name, index=index, grows=model.grows, points=tuple(points)))
    return _side_by_side(found)


def _side_by_side(models: Sequence[Drawn]) -> list[Drawn]:
    """The same with models of equal state moved apart."""
    if not models:
        return []
    low, high = _range(models)
    step = (high / low) ** APART
    groups: dict[tuple[int, ...], list[Drawn]] = {}
    for model in models:
        groups.setdefault(tuple(sorted({point.state for point in model.points})), []).append(model)
    shifts = {
        model.index: step ** (place - (len(group) - 1) / 2)
        for group in groups.values()
        for place, model in enumerate(group)
    }
    return [dataclasses.replace(model, shift=shifts[model.index]) for model in models]


def not_drawn(evaluation: Evaluation, suite: str) -> list[str]:
    """Why models of the table are not in the picture, a sentence each."""
    there = {model.index for model in drawn(evaluation, suite)}
    reasons = []
    for index, model in enumerate(evaluation.models):
        if index not in there and evaluation.compared(suite):
            lacks_mean = all(evaluation.mean(model, reads, suite) is None for reads in (1, 2))
            why = (
                "lacks scores that the mean is taken over"
                if lacks_mean
                else "has no counted state at this window"
            )
            reasons.append(f"{model.name} is not in the picture: it {why}.")
    return reasons


def mean_text(evaluation: Evaluation, suite: str) -> str:
    """What the mean is taken over, in words."""
    names = [task.name for task in evaluation.compared(suite)]
    text = names[0] if len(names) == 1 else f"mean over {', '.join(names[:-1])} and {names[-1]}"
    if len(names) > MOST_NAMES:
        text = f"mean over {len(names)} tasks"
    left = [task.name for task in evaluation.recall_tasks(suite) if task.name not in names]
    return text + (f", which all models have so far (without {', '.join(left)})" if left else "")


def what(evaluation: Evaluation, suite: str) -> str:
    """What the mean of a suite is of."""
    metric = evaluation.compared(suite)[0].metric
    others = {"nats": "Nats per right answer", "acc": "Answers that are the likeliest text"}
    return "Recall" if metric == "contains" else others.get(metric, metric)


def _title(evaluation: Evaluation, suite: str) -> str:
    """What stands beside the axis of recall."""
    compared = evaluation.compared(suite)
    over = f"mean over {len(compared)} tasks" if len(compared) > 1 else compared[0].name
    better = " (lower is better)" if evaluation.lower_is_better(suite) else ""
    return f"{what(evaluation, suite)}, {over}{better}"


def axis_text(evaluation: Evaluation, models: Sequence[Drawn]) -> str:
    """What stands below the axis of states."""
    window, last = evaluation.window, max(p.reads for model in models for p in model.points)
    twice = f", read twice after {2 * window:,}" if last == 2 else ""
    return f"State per sequence after {window:,} tokens{twice}"


# -------------------------------------------------------------------------------------------- interactive


def traces(models: Sequence[Drawn], *, share: bool = True) -> list[dict[str, Any]]:
    """Plotly's traces: of each model its arrow, hidden and shown with it, and its points.

    share: whether means are shares, to be written in per cent.
    """
    found: list[dict[str, Any]] = []
    for model in models:
        look = style.look(model.index)
        x, y = map(list, zip(*model.places, strict=True))
        shared = {"type": "scatter", "legendgroup": f"model {model.index}"}
        if _moves(model, models, share):
            found.append(
                {
                    **shared,
                    **chart.SILENT,
                    "x": x,
                    "y": y,
                    "mode": "lines+markers",
                    "line": {"color": look.colour, "width": 1.4},
                    "marker": {
                        "symbol": ["circle", "arrow"], "size": [0, 9], "angleref": "previous",
                        "standoff": [0, 6], "color": look.colour,
                    },
                }
            )  # fmt: skip
        bars = [p.mean for p in model.points]
        known = [not math.isnan(bar.low) for bar in bars]
        found.append(
            {
                **shared,
                **chart.HOVER,
                "name": chart.escape(model.name),
                "x": x,
                "y": y,
                "customdata": [[model.index, p.reads] for p in model.points],
                "text": [_hover(model, p, share) for p in model.points],
                "mode": "markers",
                "marker": {
                    "color": look.colour,
                    "symbol": look.symbol + ("-open" if model.grows else ""),
                    "size": [7 if p.reads == 1 and len(x) == 2 else 11 for p in model.points],
                    "line": {"width": 1.6 if model.grows else 0, "color": look.colour},
                },
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [bar.high - bar.value if k else 0 for bar, k in zip(bars, known, strict=True)],
                    "arrayminus": [
                        bar.value - bar.low if k else 0 for bar, k in zip(bars, known, strict=True)
                    ],
                    "visible": any(known),
                    "thickness": 1,
                    "width": 0,
                },
            }
        )
    return found


def layout(evaluation: Evaluation, suite: str, models: Sequence[Drawn]) -> dict[str, Any]:
    """Plotly's layout, as that of the frontier."""
    low, high = _range(models)
    share = evaluation.is_share(suite)
    ticks = style.state_ticks(low, high, 8)
    return chart.plain_layout(
        (low, high), ticks, [style.bytes_text(tick) for tick in ticks],
        title=axis_text(evaluation, models), view=suite,
        y={"range": _ends(models, share), "tickformat": ".0%" if share else ".4~g"},
        y_title=_title(evaluation, suite),
    )  # fmt: skip


def _hover(model: Drawn, point: Point, share: bool) -> str:
    mean, write = point.mean, ("{:.1%}" if share else "{:.2f}").format
    interval = "" if math.isnan(mean.low) else f" ({write(mean.low)} to {write(mean.high)})"
    unit = "" if share else " nats"
    growing = ", growing with what is read" if model.grows else ""
    return (
        f"<b>{chart.escape(model.name)}</b>, read {'once' if point.reads == 1 else 'twice'}"
        f"<br>{write(mean.value)}{unit}{interval}"
        f"<br>{style.bytes_text(point.state)} after {point.tokens:,} tokens{growing}"
    )


def _range(models: Sequence[Drawn]) -> tuple[float, float]:
    states = [point.state for model in models for point in model.points]
    return min(states) / 2, max(states) * 2


def _moves(model: Drawn, models: Sequence[Drawn], share: bool) -> bool:
    """Whether a model's two points are far enough apart for an arrow between them."""
    if len(model.points) < 2:
        return False
    (x, y), (to_x, to_y) = model.places
    (left, right), (low, high) = _range(models), _ends(models, share)
    return math.hypot(math.log(to_x / x) / math.log(right / left), (to_y - y) / (high - low)) > NEAR


def _ends(models: Sequence[Drawn], share: bool) -> tuple[float, float]:
    """The ends of the axis of means: shares begin at zero, below which a mark has room, and others near the
    least."""
    ends = [v for m in models for p in m.points for v in p.mean if not math.isnan(v)]
    if share:
        high = min(1.06, max(ends) * 1.08 or 1.06)
        return -NEAR * high, high
    room = 0.08 * (max(ends) - min(ends)) or 1.0
    return max(0.0, min(ends) - room), max(ends) + room


# ------------------------------------------------------------------------------------------------- figure


def picture(
    evaluation: Evaluation, suite: str, models: Sequence[Drawn], command: str, *, dark: bool = False
) -> bytes:
    """The same as PNG, for a README."""
    file = BytesIO()
    recall_curves.save_figure(draw(evaluation, suite, models, dark=dark), file, command)
    return file.getvalue()


def draw(evaluation: Evaluation, suite: str, models: Sequence[Drawn], *, dark: bool = False) -> Any:
    """The same as a matplotlib Figure. Points have their model's name as gid."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    share = evaluation.is_share(suite)
    with recall_curves.looks(dark) as (ground, _, muted):
        figure = style.blank((7.8, 4.6), dpi=DPI, ground=ground)
        labelled = len(models) <= MOST_LABELS
        axes = figure.add_axes((0.075, 0.115, 0.915 if labelled else 0.665, 0.815))
        low, high = _range(models)
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** (0.12 * labelled))  # room for the last label
        axes.set_ylim(*_ends(models, share))
        for model in models:
            _draw_model(axes, model, ground, moves=_moves(model, models, share))
        ticks = style.state_ticks(low, high, 8)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: style.bytes_text(value))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if share else f"{value:.4g}")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(axis_text(evaluation, models))
        axes.set_ylabel(_title(evaluation, suite))
        if labelled:
            recall_state.write_labels(axes, {m.name: m.places[-1] for m in models}, muted)
        else:
            _list_models(figure, models, ground)
        _legend(figure, models, muted, ground)
        return figure


def _draw_model(axes: Any, model: Drawn, ground: str, *, moves: bool) -> None:
    look = style.look(model.index)
    face = ground if model.grows else look.colour
    ends = model.places
    if moves:
        axes.annotate(
            "", ends[1], ends[0],
            arrowprops={"arrowstyle": "-|>", "color": look.colour, "linewidth": 1.1, "shrinkB": 4.5},
        )  # fmt: skip
    for point, (x, y) in zip(model.points, ends, strict=True):
        if not math.isnan(point.mean.low):
            axes.plot([x, x], [point.mean.low, point.mean.high], color=look.colour, linewidth=0.6, alpha=0.6)
        axes.plot(
            [x], [y], marker=look.marker, markersize=4 if point.reads == 1 and len(ends) == 2 else 6.5,
            color=look.colour, markerfacecolor=face, markeredgewidth=1.1, linestyle="none", gid=model.name,
        )  # fmt: skip


def _list_models(figure: Any, models: Sequence[Drawn], ground: str) -> None:
    """The names at the side, the best on top."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], linestyle="none", marker=style.look(m.index).marker, color=style.look(m.index).colour,
            markerfacecolor=ground if m.grows else style.look(m.index).colour, markersize=5.5,
            label=recall_curves.cut(m.name),
        )
        for m in models
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.75, 0.94), frameon=False,
        fontsize=min(7.8, 175 / len(models)), handletextpad=0.3, borderaxespad=0.2,
    )  # fmt: skip


def _legend(figure: Any, models: Sequence[Drawn], muted: str, ground: str) -> None:
    """What the marks mean; models are named beside their points."""
    from matplotlib.lines import Line2D

    sizes = [("read once", 4), ("read twice", 6.5)] if any(len(m.points) == 2 for m in models) else []
    marks = [(text, size, muted) for text, size in sizes]
    marks += [("state grows with what is read", 6.5, ground)] if any(m.grows for m in models) else []
    shared: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": muted}
    handles = [
        Line2D([], [], markersize=size, markerfacecolor=face, label=text, **shared)
        for text, size, face in marks
    ]
    if handles:
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.065, 0.995), ncol=3, frameon=False,
            fontsize=7.8, handletextpad=0.3, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
