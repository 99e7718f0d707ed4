"""The table of complexities, promised beside measured, and a picture of attention whole and in blocks.

Matplotlib's types are `Any` here because it is imported only when a figure is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdall import files, mixers
from holdall.report import style
from holdall.report.paper import DPI, INK, MUTED, marker, rc
from holdall.theory.complexity import ATTENTIONS, Cost, growth, promised, slope

SIZE = (7.4, 3.3)
HEAD = (
    "mixer", "reading N: promised", "operations", "with gradients", "time", "memory", "memory, trained",
    "depth", "one more: promised", "operations", "time", "state: promised", "measured",
)  # fmt: skip
"""Columns of the table. All but the names and what is promised are exponents of N."""

Costs = Mapping[str, Sequence[Cost]]
"""By name, each in the order of lengths."""


def by_name(costs: Iterable[Cost]) -> dict[str, list[Cost]]:
    """Costs as the table and the picture take them."""
    found: dict[str, list[Cost]] = {}
    for cost in costs:
        found.setdefault(cost.name, []).append(cost)
    return {name: sorted(of_name, key=lambda cost: cost.length) for name, of_name in found.items()}


def rows(costs: Costs) -> list[list[str]]:
    """The table's rows, families of mixers together, attention in three ways last."""
    order = [name for members in mixers.families().values() for name in members]
    shown = [name for name in (*order, *ATTENTIONS) if name in costs]
    return [_row(name, costs[name]) for name in shown]


def _row(name: str, costs: Sequence[Cost]) -> list[str]:
    lengths = [cost.length for cost in costs]

    def counted(field: str) -> str:
        return _text(growth(lengths, [getattr(cost, field) for cost in costs]))

    def measured(field: str) -> str:
        return _text(slope(lengths, [getattr(cost, field) for cost in costs]))

    entry = None if name in ATTENTIONS else mixers.entry(name)
    formulas = ("4 N²D", "", "") if entry is None else (entry.training, entry.inference, entry.state)
    whole, one, state = (_promise(formula) for formula in formulas)
    return [
        name, whole, counted("operations"), counted("trained_operations"), measured("seconds"),
        measured("peak_bytes"), measured("trained_bytes"), counted("depth"),
        one, counted("step_operations"), measured("step_seconds"), state, counted("state"),
    ]  # fmt: skip


def _promise(formula: str) -> str:
    return f"{formula}: {promised(formula):g}" if formula else ""


def _text(exponent: float) -> str:
    return "" if math.isnan(exponent) else f"{exponent:.2f}".replace("-0.00", "0.00")


def markdown(costs: Costs) -> str:
    """The table as Markdown."""
    lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *rows(costs)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(costs: Costs, path: Path, *, command: str = "") -> Path:
    """Write the picture as PNG, with the command that made it in its metadata."""
    files.make_folder(path.parent)
    with files.replacing(path) as unfinished:
        draw(costs).canvas.print_png(unfinished, metadata={"Software": "Holdall", "Description": command})
    return path


def draw(costs: Costs) -> Any:
    """Memory and time of attention, whole, in blocks and by PyTorch, as a matplotlib Figure.

    Lines carry a gid, <field>:<name>. Raises ValueError where none of the three was measured.
    """
    import matplotlib

    shown = {name: costs[name] for name in ATTENTIONS if name in costs}
    if not shown:
        raise ValueError(f"there is nothing to draw: none of {', '.join(ATTENTIONS)} was measured")
    with matplotlib.rc_context(rc()):
        figure = style.blank(SIZE, dpi=DPI)
        for place, field, words, scale in (
            (0, "peak_bytes", "Memory beside inputs, MiB", 2.0**20),
            (1, "seconds", "Seconds", 1.0),
        ):
            axes = figure.add_axes((0.085 + 0.5 * place, 0.15, 0.395, 0.69))
            _draw(axes, shown, field, words, scale)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(shown), frameon=False, labelcolor=INK)
        return figure


def _draw(axes: Any, costs: Costs, field: str, words: str, scale: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    for index, (name, of_name) in enumerate(costs.items()):
        points = [(cost.length, getattr(cost, field) / scale) for cost in of_name]
        points = [(length, value) for length, value in points if value > 0]
        if points:
            x, y = zip(*points, strict=True)
            look = {**marker(style.look(index), "full"), "linestyle": "-"}
            axes.plot(x, y, label=name, gid=f"{field}:{name}", linewidth=1.2, **look)
    if not axes.lines:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("Tokens, N (log scale)")
    axes.set_ylabel(words)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
