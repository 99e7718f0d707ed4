"""The interactive frontier: Plotly's traces and layout as plain dictionaries, and what can be pointed at.

Values of keys that end in "color" may name a CSS variable ("--ink"), which the page resolves, so that one
chart serves a light and a dark page. Plotly reads a little mark-up in texts: every label is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from holdall.report import floor, style
from holdall.report.data import (
    BY_HAND,
    Axis,
    Model,
    Rate,
    Run,
    Sweep,
    by_construction,
    families,
    is_series,
    pareto,
)

CEILING = 1.06  # accuracy at the top edge, as in the figure
HOVER = {"hovertemplate": "%{text}<extra></extra>"}
SILENT = {"type": "scatter", "hoverinfo": "skip", "showlegend": False}


class Marks:
    """Everything that can be pointed at: a model, or runs whose learning rate does not count.

    A mark is {x, y, title, detail}; its place in `all` is what the chart's points and the table's rows share.
    """

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}

    def model(self, model: Model) -> int:
        return self._place(model, model, model.accuracy, model.best or model.runs, model.seeds)

    def run(self, model: Model, run: Run) -> int:
        return self._place(run, model, run.accuracy, [run], 1)

    def rate(self, model: Model, rate: Rate) -> int:
        """Of a model at a learning rate: the model itself where the rate counts."""
        if rate.counts:
            return self.model(model)
        return (
            self._place(rate, model, rate.accuracy, rate.runs, len(rate.runs))
            if len(rate.runs) > 1
            else self.run(model, rate.runs[0])
        )

    def _place(self, owner: object, model: Model, accuracy: float, runs: Sequence[Run], seeds: int) -> int:
        if id(owner) not in self._places:
            drawn = model.state > 0 and not math.isnan(accuracy)
            x, y = (model.state, accuracy) if drawn else (None, None)
            self._places[id(owner)] = len(self.all)
            self.all.append({"x": x, "y": y, "title": model.label, "detail": _detail(runs, seeds)})
        return self._places[id(owner)]


def _detail(runs: Sequence[Run], seeds: int) -> list[tuple[str, str]]:
    """Every key of the runs' lines; where seeds differ, their values side by side.

    seeds: how many were tried, those that diverged and have no run here among them.
    """
    detail = []
    if seeds > 1:
        detail.append((f"{seeds} seeds", _seeds_text([r.accuracy for r in runs if not r.diverged], seeds)))
    for key in dict.fromkeys(key for run in runs for key in run.line):
        values = dict.fromkeys(style.value_text(run.line.get(key)) for run in runs)
        detail.append((key.replace("_", " "), " | ".join(values)))
    return detail


def _seeds_text(converged: Sequence[float], seeds: int) -> str:
    """The mean of the seeds that converged, and how many did not."""
    if not converged:
        return "all diverged"
    mean = math.fsum(converged) / len(converged)
    extremes = f"from {min(converged):.2%} to {max(converged):.2%}"
    if len(converged) == seeds:
        return f"mean {mean:.2%}, {extremes}"
    diverged = f"{seeds - len(converged)} diverged"
    if len(converged) == 1:
        return f"{diverged}; {mean:.2%} is that of the other"
    return f"{diverged}; mean of the other {len(converged)} {mean:.2%}, {extremes}"


def traces(sweeps: Sequence[Sweep], marks: Marks) -> list[dict[str, Any]]:
    """Plotly's traces from the back to the front. Those of models have meta "models", those of other
    learning rates "other" (hidden at first), those built by hand "by hand"; the last is the ring around what
    is selected."""
    found = [*_floor(sweeps), _steps(sweeps)]
    named: set[str] = set()  # a family is in the legend once, and its entry there hides it in every sweep
    for place, sweep in enumerate(sweeps):
        for index, family in enumerate(families(sweeps)):
            look, suffix = style.look(index), style.FILLS[place][1]
            shared = {
                "type": "scatter",
                "legendgroup": family,
                "name": escape(family),
                "showlegend": family not in named,
                "marker": {"color": look.colour, "symbol": look.symbol + suffix, "size": 10},
                "line": {"color": look.colour, "width": 1.3, "dash": "dot" if place else "solid"},
            }
            members = [model for model in sweep.models if model.family == family and model.state]
            models = _models(members, marks, shared, sweep.axis)
            found += models + _other_rates(members, marks, shared, sweep.axis)
            named |= {family} if models else set()
            colour = style.by_hand_colour(sweeps, family) or "--ink"
            by_hand = _by_hand(sweep, marks, {**shared, "showlegend": family not in named}, family, colour)
            found += by_hand
            named |= {family} if by_hand else set()
    if any(trace.get("meta") == BY_HAND for trace in found):
        found.append(_by_hand_key())
    ring = {"symbol": "circle-open", "size": 20, "color": "--ink", "line": {"width": 1.6}}
    return [*found, {**SILENT, "x": [], "y": [], "mode": "markers", "marker": ring}]


def _floor(sweeps: Sequence[Sweep]) -> list[dict[str, Any]]:
    low, _ = style.state_range(sweeps, _all_answers(sweeps))
    state, best = floor.curve(sweeps[0].questions, low, sweeps[0].axis.bits)
    texts = [
        f"{style.state_text(sweeps[0].axis, count)}: no causal model can exceed {accuracy:.1%}"
        for count, accuracy in zip(state, best, strict=True)
    ]
    shade = {
        **SILENT,
        "x": [*state, state[-1], low],
        "y": [*best, CEILING, CEILING],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": "--shade",
    }
    line = {
        **HOVER,
        "type": "scatter",
        "name": "information floor" if style.all_causal(sweeps) else "information floor of causal models",
        "x": state,
        "y": best,
        "text": texts,
        "mode": "lines",
        "line": {"color": "--muted", "width": 1.2, "simplify": False},  # its kinks are true
    }
    return [shade, line]


def _steps(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    """The frontier as a staircase, drawn on to the right edge."""
    _, high = style.state_range(sweeps, _all_answers(sweeps))
    frontier = pareto(model for sweep in sweeps for model in sweep.models)
    return {
        **SILENT,
        "showlegend": True,
        "name": f"best for its {sweeps[0].axis.unit}",
        "x": [*(model.state for model in frontier), *([high] if frontier else [])],
        "y": [*(model.accuracy for model in frontier), *(model.accuracy for model in frontier[-1:])],
        "mode": "lines",
        "line": {"color": "--ink", "width": 1.2, "dash": "5px,3px", "shape": "hv"},
    }


def _models(
    members: Sequence[Model], marks: Marks, shared: dict[str, Any], axis: Axis
) -> list[dict[str, Any]]:
    drawn = sorted((m for m in members if m.drawn), key=lambda m: (m.state, m.accuracy))
    if not drawn:
        return []
    spread = {
        "type": "data",
        "symmetric": False,
        "array": [m.high - m.accuracy for m in drawn],
        "arrayminus": [m.accuracy - m.low for m in drawn],
        "visible": any(m.high > m.low for m in drawn),
        "thickness": 1.2,
        "width": 0,
    }
    return [
        {
            **shared,
            **HOVER,
            "meta": "models",
            "x": [m.state for m in drawn],
            "y": [m.accuracy for m in drawn],
            "customdata": [marks.model(m) for m in drawn],
            "text": [_hover(axis, m.label, m.accuracy, m.state, _remarks(m)) for m in drawn],
            "mode": "lines+markers" if is_series(drawn) else "markers",
            "marker": {
                **shared["marker"],
                "opacity": [0.4 if m.published else 1 for m in drawn],
                "line": {"color": "#C1121F", "width": [3 if m.broken else 0 for m in drawn]},
            },
            "error_y": spread,
        }
    ]


def _by_hand(
    sweep: Sweep, marks: Marks, shared: dict[str, Any], family: str, colour: str
) -> list[dict[str, Any]]:
    """A family's models that were built by hand: a trace for each construction, in marks of their own."""
    found, axis = [], sweep.axis
    for drawn in by_construction(sweep, family):
        found.append(
            {
                **shared,
                **HOVER,
                "meta": BY_HAND,
                "x": [m.state for m in drawn],
                "y": [m.accuracy for m in drawn],
                "customdata": [marks.model(m) for m in drawn],
                "text": [
                    _hover(axis, m.label, m.accuracy, m.state, f"<br>{style.BY_HAND_TEXT}") for m in drawn
                ],
                "mode": "lines+markers",
                "marker": {
                    "color": colour,
                    "symbol": style.BY_HAND[1],
                    "size": 12,
                    "line": {"width": 1.6},
                },
                "line": {"color": colour, "width": 1, "dash": "dot"},
            }
        )
        shared = {**shared, "showlegend": False}
    return found


def _by_hand_key() -> dict[str, Any]:
    """What their mark means, in the legend."""
    return {
        "type": "scatter",
        "name": style.BY_HAND_TEXT,
        "x": [None],
        "y": [None],
        "mode": "markers",
        "marker": {"color": "--ink", "symbol": style.BY_HAND[1], "size": 12, "line": {"width": 1.6}},
    }


def _other_rates(
    members: Sequence[Model], marks: Marks, shared: dict[str, Any], axis: Axis
) -> list[dict[str, Any]]:
    others = [(m, run) for m in members for run in m.runs if run not in m.best and not run.diverged]
    if not others:
        return []
    return [
        {
            **shared,
            **HOVER,
            "meta": "other",
            "visible": False,
            "showlegend": False,
            "x": [run.state for _, run in others],
            "y": [run.accuracy for _, run in others],
            "customdata": [marks.run(m, run) for m, run in others],
            "text": [
                _hover(axis, run.label, run.accuracy, run.state, f"<br>learning rate {run.learning_rate:g}")
                for _, run in others
            ],
            "mode": "markers",
            "marker": {**shared["marker"], "size": 6, "opacity": 0.45},
        }
    ]


def _remarks(model: Model) -> str:
    """What is to be known of a model beside its place."""
    remarks = [f"breaks {law}" for law in model.broken] + [f"refuses {law}" for law in model.refused]
    remarks += [f"published with Holdall, {model.published}"] if model.published else []
    return "".join(f"<br>{escape(remark)}" for remark in remarks)


def _hover(axis: Axis, label: str, accuracy: float, state: int, more: str = "") -> str:
    return f"<b>{escape(label)}</b><br>{accuracy:.1%} from {style.state_text(axis, state)}{more}"


def layout(sweeps: Sequence[Sweep]) -> dict[str, Any]:
    """Plotly's layout: the same axes as the figure's."""
    low, high = style.state_range(sweeps, _all_answers(sweeps))
    ticks = style.state_ticks(low, high)
    whom = "Impossible:" if style.all_causal(sweeps) else "Impossible<br>for causal<br>models:"
    impossible = {
        "text": f"<i>{whom}<br>fewer bits<br>than the<br>answers need</i>",
        "font": {"size": 11, "color": "--muted"},
        "xref": "paper",
        "yref": "paper",
        "x": 0.01,
        "y": 0.98,
        "xanchor": "left",
        "yanchor": "top",
        "align": "left",
        "showarrow": False,
    }
    return {
        **plain_layout(
            (low, high), ticks, [style.state_text(sweeps[0].axis, tick) for tick in ticks],
            title=style.axis_text(sweeps[0]), view="the reader's own view",
            y={"range": [0, CEILING], "tickvals": [0, 0.2, 0.4, 0.6, 0.8, 1], "tickformat": ".0%"},
            y_title="Recall accuracy",
        ),
        "annotations": [impossible],
    }  # fmt: skip


def plain_layout(
    states: tuple[float, float],
    ticks: Sequence[float],
    labels: Sequence[str],
    *,
    title: str,
    view: str,
    y: dict[str, Any],
    y_title: str,
) -> dict[str, Any]:
    """Plotly's layout of a picture over states on a log scale, in a page's own colours.

    Args:
        states: the ends of the x-axis.
        ticks, labels: where it is marked, and the words there.
        title: of the x-axis.
        view: what stays the reader's own view as long as it is the same: zoom, and what is hidden.
        y, y_title: of the y-axis, its range and ticks, and its title.
    """
    axis = {"linecolor": "--muted", "tickcolor": "--muted", "ticks": "outside", "zeroline": False}
    return {
        "uirevision": view,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--ink", "size": 12},
        "hoverlabel": {"bgcolor": "--paper", "bordercolor": "--muted", "font": {"color": "--ink"}},
        "margin": {"l": 58, "r": 16, "t": 10, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": {
            **axis,
            "type": "log",
            "range": [math.log10(end) for end in states],
            "tickvals": ticks,
            "ticktext": labels,
            "tickangle": 0,
            "showgrid": False,
            "title": {"text": f"{title} (log scale)"},
        },
        "yaxis": {**axis, **y, "gridcolor": "--line", "title": {"text": y_title}},
    }


def _all_answers(sweeps: Sequence[Sweep]) -> float:
    """The state from which on every answer may be right."""
    return floor.state_for_all(sweeps[0].questions, sweeps[0].axis.bits)


def escape(text: str) -> str:
    """For Plotly's mark-up, which knows tags and a few entities, but not those of quotes."""
    return html.escape(text, quote=False)
