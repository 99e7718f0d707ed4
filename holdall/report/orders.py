"""Accuracy against state for each order of two sets: as in figure 2 of "Just read twice".

    short set first | long set first | by how much the first of both is better

What a causal model must carry from the first set to the second grows with the first, so that its two panels
differ; a model that sees the whole input at every token can look for the short set's tokens in either order.
As in the paper a point is the best of all learning rates and seeds, for each panel by itself. Its bar reaches
to the worst of the seeds, each at its best rate.

Each panel has the information floor of its own order, and that of long sets the floor of short ones as well.
They hold for causal models; where a sweep reads the sets several times, they are the lower ones of such rows
(holdall/tasks/set_disjointness.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from holdall.report import floor, style
from holdall.report.data import Model, Run, Segment, Sweep, families
from holdall.report.paper import DPI, INK, MUTED, PALE, SHADE, marker, rc
from holdall.tasks.information import Asked

SIZE = (7.4, 3.1)  # inches
CEILING = 1.06


class Order(NamedTuple):
    """The test segments in which the first set is the smaller one, or those in which it is the larger."""

    title: str
    segments: tuple[Segment, ...]

    @property
    def questions(self) -> list[Asked]:
        """What the information floor of these segments depends on."""
        return [Asked(s.questions, s.values, s.distinct) for s in self.segments]

    def state_for_all(self, bits: int) -> float:
        """The state from which on the floor allows every answer; 0 where sets of one token are the answer."""
        return floor.state_for_all(self.questions, bits)

    def accuracy(self, run: Run) -> float:
        """A run's mean over these segments; NaN where it diverged, or was not tested on one of them."""
        # accuracies are kept by difficulty, each the mean of its segments: as often as there are such
        found = [run.by_difficulty.get(segment.difficulty, math.nan) for segment in self.segments]
        return math.nan if run.diverged else math.fsum(found) / len(found)

    def best(self, model: Model) -> tuple[float, float] | None:
        """The best accuracy of a model's runs, and that of its worst seed; None where no run has one."""
        seeds: dict[int, float] = {}
        for run in model.runs:
            if not math.isnan(accuracy := self.accuracy(run)):
                seeds[run.seed] = max(accuracy, seeds.get(run.seed, 0.0))
        return (max(seeds.values()), min(seeds.values())) if seeds else None


def orders(sweep: Sweep) -> tuple[Order, Order]:
    """The test segments whose short set comes first, and those whose long one does; equal sets in neither."""
    pairs = [(segment, segment.sets) for segment in sweep.segments if segment.sets]
    short = tuple(segment for segment, (first, second) in pairs if first < second)
    long = tuple(segment for segment, (first, second) in pairs if first > second)
    return Order("Short set first", short), Order("Long set first", long)


def has_orders(sweep: Sweep) -> bool:
    """Whether a sweep was tested on two sets in both orders."""
    return all(order.segments for order in orders(sweep))


def save(sweep: Sweep, path: Path) -> None:
    """Write the panels to `path` as PNG, with the command that made the sweep in its metadata."""
    draw(sweep).canvas.print_png(path, metadata={"Software": "Holdall", "Description": sweep.command})


def draw(sweep: Sweep) -> Any:
    """The three panels as a matplotlib Figure. Artists carry a gid that says what they are:

    floor, other floor, chance, spread, zero, and family:<name> for the points of a family.
    """
    import matplotlib

    with matplotlib.rc_context(rc()):
        return _draw(sweep)


def _draw(sweep: Sweep) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    short, long = orders(sweep)
    figure = style.blank(SIZE, dpi=DPI, ground="white")
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.085, right=0.99, bottom=0.235, top=0.79, wspace=0.3)
    full = [order.state_for_all(sweep.axis.bits) for order in (short, long)]
    low, high = style.state_range([sweep], min(filter(None, full)))  # both floors, down to where they are low
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator(style.state_ticks(low, high, most=5)))
        axes.xaxis.set_major_formatter(lambda value, _: style.state_text(sweep.axis, value))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    names = families([sweep])
    for axes, order in zip(panels, (short, long), strict=False):
        axes.set_ylim(0, CEILING)
        axes.set_title(f"{order.title}\n{_sizes(order)}", fontsize=8, color=INK)
        _draw_floor(axes, order, short if order is long else None, low, sweep.axis.bits)
        for index, family in enumerate(names):
            _draw_family(axes, sweep, family, style.look(index), order)
    panels[0].set_ylabel("Accuracy")
    panels[2].set_title("Short set first\nminus long set first", fontsize=8, color=INK)
    # the digits that a tick has: without decimals, small differences are "0 %" at several of them
    panels[2].yaxis.set_major_formatter(
        lambda value, _: f"{100 * value:.3g} %".replace("-", "\N{MINUS SIGN}")
    )
    panels[2].axhline(0, color=MUTED, linewidth=0.8, gid="zero")
    for index, family in enumerate(names):
        _draw_difference(panels[2], sweep, family, style.look(index), short, long)
    handles: list[Any] = [
        Line2D([], [], linewidth=1.1, label=family, **marker(style.look(index), "full"))
        for index, family in enumerate(names)
    ]
    handles.append(Patch(facecolor=SHADE, edgecolor=MUTED, label="impossible for a causal model"))
    handles.append(Line2D([], [], color=MUTED, linestyle=(0, (4, 2)), label="the same, short set first"))
    figure.legend(
        handles=handles, loc="upper center", ncol=len(handles), frameon=False, fontsize=7.5,
        handlelength=1.9, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    figure.supxlabel(f"{style.axis_text(sweep)}, all layers (log scale)", fontsize=8.5, color=INK, y=0.065)
    figure.text(0.012, 0.015, _footer(sweep), fontsize=6.3, color=MUTED, gid="footer")
    return figure


def _sizes(order: Order) -> str:
    """The sizes of the sets: "4 to 16, then 32 to 256 tokens"."""
    parts = []
    for place in (0, 1):
        sizes = sorted({segment.sets[place] for segment in order.segments if segment.sets})
        parts.append(f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}")
    return f"{parts[0]}, then {parts[1]} tokens"


def _draw_floor(axes: Any, order: Order, other: Order | None, low: float, bits: int) -> None:
    """Shade what no causal model can do in this order; a dashed line for the other order."""
    if order.state_for_all(bits):
        state, best = floor.curve(order.questions, low, bits)
        axes.fill_between(state, best, CEILING, color=SHADE, linewidth=0, zorder=0.5)
        axes.plot(state, best, color=MUTED, linewidth=1, zorder=1.5, gid="floor")
    if other is not None and other.state_for_all(bits):
        state, best = floor.curve(other.questions, low, bits)
        axes.plot(
            state, best, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1.5, gid="other floor"
        )  # fmt: skip
    if (chance := floor.guessing(order.questions)) >= 0.02:
        axes.axhline(chance, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), gid="chance")


def _members(sweep: Sweep, family: str) -> list[Model]:
    return sorted((m for m in sweep.models if m.drawn and m.family == family), key=lambda m: m.state)


def _draw_family(axes: Any, sweep: Sweep, family: str, look: style.Look, order: Order) -> None:
    """A family's models by rising state, with a bar down to the worst seed."""
    found = [(m, best) for m in _members(sweep, family) if (best := order.best(m)) is not None]
    for model, (high, low) in found:
        if high > low:
            axes.plot(
                [model.state] * 2, [low, high], color=look.colour, linewidth=1.1, zorder=2.5, gid="spread"
            )
    _draw_points(axes, [m for m, _ in found], [high for _, (high, _) in found], family, look)


def _draw_difference(
    axes: Any, sweep: Sweep, family: str, look: style.Look, short: Order, long: Order
) -> None:
    """By how much a family's models do better with the short set first."""
    models, differences = [], []
    for model in _members(sweep, family):
        if (one := short.best(model)) is not None and (other := long.best(model)) is not None:
            models.append(model)
            differences.append(one[0] - other[0])
    _draw_points(axes, models, differences, family, look)


def _draw_points(
    axes: Any, models: Sequence[Model], y: Sequence[float], family: str, look: style.Look
) -> None:
    pale = bool(models) and all(model.published for model in models)
    axes.plot(
        [model.state for model in models], y, linewidth=0.9, zorder=3, gid=f"family:{family}",
        alpha=PALE if pale else None, **marker(look, "full"),
    )  # fmt: skip


def _footer(sweep: Sweep) -> str:
    seeds = max((model.seeds for model in sweep.models), default=1)
    rates = "learning rates" if seeds == 1 else f"learning rates and {seeds} seeds"
    bars = "" if seeds == 1 else " Bars reach to the worst seed, at its best rate."
    return f"Each point is the best of its {rates}, for each panel by itself.{bars} Dotted: guessing."


__all__ = ["Order", "draw", "has_orders", "orders", "save"]
