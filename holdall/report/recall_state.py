"""How well each model recalls on real text, and from how much: perplexity on hits by size of state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdall.analysis.recall import Carried
from holdall.report import recall_curves as curves
from holdall.report import style
from holdall.report.paper import DPI
from holdall.report.recall_gaps import COLOURS

APART = 0.034
"""Share of the figure's height between one label and the next."""


def draw(runs: Mapping[str, tuple[Carried, float]], context_len: int, *, dark: bool = False) -> Any:
    """State and perplexity on hits, by label, as a matplotlib Figure.

    Hollow are those whose state grows with every token.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

    with curves.looks(dark) as (ground, _, muted):
        figure = style.blank((7.8, 4.6), dpi=DPI, ground=ground)
        axes = figure.add_axes((0.075, 0.115, 0.915, 0.815))
        for grows, name in ((False, "a state of fixed size"), (True, "grows with the context")):
            those = [(state.elements, hits) for state, hits in runs.values() if state.grows == grows]
            axes.plot(
                *zip(*those, strict=True) if those else ([], []), "o", label=name, color=COLOURS["hits"],
                markerfacecolor=ground if grows else None, markersize=6, markeredgewidth=1.4,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the last label
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda value, _: _count(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(MaxNLocator(5) if high / low < 8 else LogLocator(10, (1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"Numbers that are carried from token to token, after {context_len:,}")
        axes.set_ylabel("Perplexity on recall hits")
        write_labels(axes, {label: (state.elements, hits) for label, (state, hits) in runs.items()}, muted)
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.065, 0.995), ncol=2, frameon=False, fontsize=7.8,
            handletextpad=0.3, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
        return figure


def write_labels(axes: Any, places: dict[str, tuple[float, float]], muted: str) -> None:
    """Right of each point, moved down from those above that are in the way, with a line to its point then."""
    to_share = axes.transAxes.inverted()
    shares = {label: to_share.transform(axes.transData.transform(place)) for label, place in places.items()}
    written: list[tuple[float, float, float]] = []
    for label, (x, y) in sorted(shares.items(), key=lambda item: -item[1][1]):
        left, width, height = x + 0.013, 0.0078 * len(curves.cut(label)), y
        while any(
            abs(height - other) < APART and left < end and start < left + width
            for start, end, other in written
        ):
            height -= APART / 4
        written.append((left, left + width, height))
        moved = y - height > APART / 2
        axes.annotate(
            curves.cut(label), (x, y), (left + 0.012 * moved, height), "axes fraction", "axes fraction",
            va="center", fontsize=7.8, gid=label,
            arrowprops={"arrowstyle": "-", "color": muted, "linewidth": 0.5} if moved else None,
        )  # fmt: skip


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
