"""Recall as curves: perplexity by how far back a bigram was last, and by how often training has it.

Left, recall hits by distance: a model that recalls is flat, one that forgets rises. Right, all repeated
bigrams by training count: what is frequent is known by heart, and models agree there. Below, how many times
the reference's perplexity that is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from holdall.analysis.recall import Curve, Scores, check_same, curve
from holdall.report import style
from holdall.report.paper import DPI, rc

FEWEST = 30
"""A bin of fewer tokens is left out: its mean says little."""
AXES = {
    "distance": "Recall hits: tokens since the bigram was last seen",
    "frequency": "Repeated bigrams: times in the training text",
}
LIGHT = ("#ffffff", "#222222", "#6b6b6b", "#e4e4e4")
DARK = ("#15171a", "#e6e6e3", "#9da2a8", "#2d3137")


def save(
    runs: Sequence[Scores], threshold: int, to: BytesIO, *, dark: bool = False, command: str = ""
) -> None:
    """Write the curves as PNG, with the command that made it in its metadata."""
    save_figure(draw(runs, threshold, dark=dark), to, command)


def save_figure(figure: Any, to: BytesIO, command: str) -> None:
    """Write a figure of recall as PNG, with the command that made it in its metadata."""
    figure.canvas.print_png(to, metadata={"Software": "Holdall", "Description": command})


def draw(runs: Sequence[Scores], threshold: int, *, dark: bool = False) -> Any:
    """The curves as a matplotlib Figure; the first run is the reference. Lines have their labels as gid.

    Raises RunError unless all runs scored the same text.
    """
    for run in runs[1:]:
        check_same(runs[0], run)
    with looks(dark) as (ground, _, muted):
        return _draw(runs, threshold, ground, muted)


@contextlib.contextmanager
def looks(dark: bool) -> Iterator[tuple[str, str, str]]:
    """Matplotlib's settings for the figures of recall; yields the colours of ground, ink, what is muted."""
    import matplotlib

    ground, ink, muted, line = DARK if dark else LIGHT
    colours = {"edgecolor": muted, "labelcolor": ink}
    with matplotlib.rc_context(
        rc()
        | {f"axes.{name}": colour for name, colour in colours.items()}
        | {f"{axis}tick.{part}": c for axis in "xy" for part, c in (("color", muted), ("labelcolor", ink))}
        | {"text.color": ink, "grid.color": line, "axes.facecolor": ground}
    ):
        yield ground, ink, muted


def _draw(runs: Sequence[Scores], threshold: int, ground: str, muted: str) -> Any:
    down = 1 if len(runs) == 1 else 2
    letters = max(len(cut(run.label)) for run in runs)
    across = min(len(runs), int(7.0 / (0.45 + 0.065 * letters)))
    legend = 0.2 * -(-len(runs) // across) + 0.12
    width, height = 7.8, 0.62 + legend + 2.25 * down
    figure = style.blank((width, height), dpi=DPI, ground=ground)
    panels = figure.subplots(down, 2, sharex="col", sharey="row", squeeze=False)
    figure.subplots_adjust(
        left=0.085,
        right=0.985,
        bottom=0.5 / height,
        top=1 - (legend + 0.12) / height,
        wspace=0.06,
        hspace=0.1,
    )
    for column, by in enumerate(AXES):
        curves = [_known(curve(run, by, threshold)) for run in runs]
        for index, (run, found) in enumerate(zip(runs, curves, strict=True)):
            _line(panels[0, column], index, run.label, found.low, np.exp(found.nll))
            if down == 2:
                _line(panels[1, column], index, run.label, found.low, np.exp(found.nll - curves[0].nll))
        for axes in panels[:, column]:
            _set_scales(axes, by, threshold, muted)
        panels[-1, column].set_xlabel(AXES[by])
    panels[0, 0].set_ylabel("Perplexity")
    if down == 2:
        panels[1, 0].set_ylabel(f"times that of {cut(runs[0].label)}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, [cut(label) for label in labels], loc="upper left", bbox_to_anchor=(0.075, 0.995),
        ncol=across, frameon=False, fontsize=7.8, handlelength=1.9, handletextpad=0.5, columnspacing=1.4,
        borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _known(found: Curve) -> Curve:
    """The curve without bins of too few tokens; which these are is the same for all runs."""
    return Curve(*(part[found.tokens >= FEWEST] for part in found))


def _line(axes: Any, index: int, label: str, x: np.ndarray, y: np.ndarray) -> None:
    look = style.look(index)
    axes.plot(
        np.maximum(x, 0.5), y, color=look.colour, marker=look.marker, markersize=4, linewidth=1.2,
        label=label, gid=label,
    )  # fmt: skip


def _set_scales(axes: Any, by: str, threshold: int, muted: str) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(5) if high / low < 8 else LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    if by == "frequency":  # zero has no place on this axis: it stands at a half
        axes.axvline(threshold, color=muted, linewidth=0.8, linestyle=(0, (4, 2)), gid="threshold")
        axes.set_xlim(0.4, None)
    last = axes.get_xlim()[1]
    ticks = [2.0**k for k in range(0, 64, 2) if 2.0**k <= last]
    axes.xaxis.set_major_locator(FixedLocator([0.5, *ticks[1:]] if by == "frequency" else ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: "0" if value < 1 else _count(value))


def cut(label: str, most: int = 28) -> str:
    """A label as figures have room for it."""
    return label if len(label) <= most else label[: most - 1] + "…"


def _count(value: float) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if value >= size:
            return f"{value / size:.0f}{unit}"
    return f"{value:.0f}"
