"""What the gap of each model to the reference is made of: a bar of the parts that the slices add to it.

A part is the slice's share of all tokens times the difference of its mean nll, so that the parts of a bar,
those to the left of zero counted as less, add up to the gap: the difference in log-perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdall.analysis.recall import SLICES, Scores, check_same, slice_of
from holdall.report import recall_curves as curves
from holdall.report import style
from holdall.report.paper import DPI

NAMES = {"hits": "recall hits", "repeated": "other repeated bigrams", "rest": "the rest"}
COLOURS = {"hits": "#d55e00", "repeated": "#e69f00", "rest": "#8c9299"}


def parts(run: Scores, reference: Scores, threshold: int) -> dict[str, float]:
    """What each slice adds to the gap, in nats a token. Raises RunError unless both scored the same text."""
    check_same(run, reference)
    slice_WN = slice_of(run.distance_WN, run.count_WN, threshold)
    behind_WN = run.nll - reference.nll
    return {name: float(behind_WN[slice_WN == k].sum() / behind_WN.size) for k, name in enumerate(SLICES)}


def draw(runs: Sequence[Scores], threshold: int, *, dark: bool = False) -> Any:
    """The bars as a matplotlib Figure, the smallest gap on top; the first run is the reference."""
    reference, *others = runs
    made = {run.label: parts(run, reference, threshold) for run in others}
    labels = sorted(made, key=lambda label: sum(made[label].values()))
    with curves.looks(dark) as (ground, ink, muted):
        height = 0.95 + 0.24 * len(labels)
        figure = style.blank((7.8, height), dpi=DPI, ground=ground)
        widest = max(len(curves.cut(label)) for label in labels)
        left = min(0.4, 0.03 + 0.0088 * widest)
        axes = figure.add_axes((left, 0.46 / height, 0.985 - left, 1 - 0.8 / height))
        above, below = [0.0] * len(labels), [0.0] * len(labels)
        for name in SLICES:
            sizes = [made[label][name] for label in labels]
            starts = [below[i] if size < 0 else above[i] for i, size in enumerate(sizes)]
            bars = axes.barh(range(len(labels)), sizes, left=starts, height=0.62, color=COLOURS[name])
            bars.set_label(NAMES[name])
            for i, size in enumerate(sizes):
                below[i], above[i] = below[i] + min(size, 0.0), above[i] + max(size, 0.0)
        gaps = [sum(made[label].values()) for label in labels]
        axes.plot(
            gaps, range(len(labels)), "|", color=ink, markersize=11, markeredgewidth=1.6, label="the gap"
        )
        axes.axvline(0, color=muted, linewidth=0.8)
        axes.set_yticks(range(len(labels)), [curves.cut(label) for label in labels])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel(f"Log-perplexity behind {curves.cut(reference.label)}, nats a token")
        figure.legend(
            loc="upper left", bbox_to_anchor=(left - 0.01, 0.995), ncol=4, frameon=False, fontsize=7.8,
            handlelength=1.2, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
        return figure
