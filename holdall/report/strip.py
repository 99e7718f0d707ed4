"""Under the frontier: accuracy against learning rate, since what wins may hang on the rate that was tried.

One small panel per family, all with the same axes: fifty lines on one panel could not be told apart. A thin
line is a model; its family's mark stands at the rate that counts, as high as in the picture above.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from holdall.report import style
from holdall.report.data import Model, Sweep, families, has_rates
from holdall.report.paper import INK, MUTED, PALE, darker, marker

PER_ROW = 12
"""Panels side by side."""
PANEL, TITLE, TICKS, CAPTION = 0.72, 0.3, 0.16, 0.17
"""Heights in inches: of a panel, the family's name above it, the rates below it, and the words below all."""
TEXT = 6.3
"""Points."""


def height(sweeps: Sequence[Sweep]) -> float:
    """Inches that the strip needs; 0 if no model was trained at several rates, and there is none."""
    rows = -(-len(panels(sweeps)) // PER_ROW)
    return rows * (TITLE + PANEL + TICKS) + CAPTION if has_rates(sweeps) else 0.0


def draw(figure: Any, sweeps: Sequence[Sweep], place: tuple[float, float, float]) -> None:
    """Draw the strip, if there is one, into a Matplotlib figure.

    Panels are axes with gid rates:<family>. In them lines have the gid rate, marks chosen, bars spread, and
    the crosses of seeds that diverged, diverged.

    Args:
        place: left and lower edge and width, in inches.
    """
    if not has_rates(sweeps):
        return
    names, (left, bottom, width) = panels(sweeps), place
    columns = -(-len(names) // -(-len(names) // PER_ROW))  # even rows
    pitch = width / columns
    full_width, full_height = figure.get_figwidth(), figure.get_figheight()
    top = bottom + height(sweeps)
    for index, family in enumerate(names):
        row, column = divmod(index, columns)
        base = top - (row + 1) * (TITLE + PANEL + TICKS) + TICKS
        x = left + column * pitch
        box = (x / full_width, base / full_height, 0.9 * pitch / full_width, PANEL / full_height)
        axes = figure.add_axes(box, gid=f"rates:{family}")
        _frame(axes, learning_rates(sweeps), labelled=column == 0, narrow=pitch < 0.8)
        look = style.look(families(sweeps).index(family))
        _title(axes, family, look, pitch)
        for order, (fill, sweep) in enumerate(zip(style.FILLS, sweeps, strict=False)):
            for model in sweep.models:
                if model.drawn and model.family == family:
                    _draw_model(axes, model, look, fill[0], dotted=order > 0)
    figure.text(
        (left + width / 2) / full_width, bottom / full_height, caption(sweeps),
        ha="center", va="bottom", fontsize=7.2, color=INK, gid="rates caption",
    )  # fmt: skip


def panels(sweeps: Sequence[Sweep]) -> list[str]:
    """The families that have a panel: those on the picture."""
    drawn = {model.family for sweep in sweeps for model in sweep.models if model.drawn}
    return [family for family in families(sweeps) if family in drawn]


def learning_rates(sweeps: Sequence[Sweep]) -> list[float]:
    """All learning rates of models on the picture, from low to high."""
    models = [model for sweep in sweeps for model in sweep.models if model.drawn]
    return sorted({rate.learning_rate for model in models for rate in model.by_rate})


def caption(sweeps: Sequence[Sweep]) -> str:
    """What lines, marks and crosses are."""
    models = [model for sweep in sweeps for model in sweep.models if model.drawn]
    words = "Recall by learning rate (log scale): a line per model, its mark at the best rate"
    words += " of each seed" if max(model.seeds for model in models) > 1 else ", that of the picture above"
    return words + ("; × diverged" if any(run.diverged for model in models for run in model.runs) else "")


def _frame(axes: Any, rates: Sequence[float], *, labelled: bool, narrow: bool) -> None:
    """Axes without data: the same for all panels, of which the first in a row names the accuracies."""
    from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter

    margin = (rates[-1] / rates[0]) ** (0.1 if narrow else 0.17)
    axes.set_xscale("log")
    axes.set_xlim(rates[0] / margin, rates[-1] * margin)
    axes.set_ylim(-0.07, 1.07)
    axes.xaxis.set_major_locator(FixedLocator([rates[0], rates[-1]]))
    axes.xaxis.set_minor_locator(FixedLocator(rates[1:-1]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}".removeprefix("0"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %") if labelled else NullFormatter())
    axes.tick_params(labelsize=TEXT, length=2, pad=1.5)
    axes.tick_params(axis="y", length=2 if labelled else 0)
    if narrow:  # or the last rate runs into the first of the next panel
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(axes: Any, family: str, look: style.Look, pitch: float) -> None:
    """The family's name above its panel, in two lines where it needs them."""
    letters = max(4, int(pitch / 0.05))
    lines = textwrap.wrap(family, letters, max_lines=2, placeholder="…")
    axes.set_title("\n".join(lines), fontsize=TEXT, color=darker(look.colour), pad=3, linespacing=0.95)


def _draw_model(axes: Any, model: Model, look: style.Look, fill: str, *, dotted: bool) -> None:
    pale = PALE if model.published else 1.0
    tried = [rate for rate in model.by_rate if rate.converged]
    x, y = [rate.learning_rate for rate in tried], [rate.accuracy for rate in tried]
    axes.plot(
        x, y, color=look.colour, linewidth=0.7, linestyle=":" if dotted else "-", alpha=0.75 * pale,
        marker=".", markersize=2.2, zorder=2, gid="rate",
    )  # fmt: skip
    for rate in tried:
        if rate.high > rate.low:
            axes.plot(
                [rate.learning_rate] * 2, [rate.low, rate.high], color=look.colour, linewidth=0.9, alpha=pale,
                zorder=2.5, gid="spread",
            )  # fmt: skip
    chosen = [rate for rate in tried if rate.counts]
    mark = marker(look, fill)
    mark |= {"markersize": 0.62 * mark["markersize"], "markeredgewidth": 0.3 if fill == "full" else 0.8}
    axes.plot(
        [rate.learning_rate for rate in chosen], [rate.accuracy for rate in chosen], linestyle="none",
        alpha=pale, zorder=3, gid="chosen", **mark,
    )  # fmt: skip
    lost = [rate.learning_rate for rate in model.by_rate if len(rate.converged) < len(rate.runs)]
    axes.plot(
        lost, [0.0] * len(lost), linestyle="none", marker="x", markersize=3, markeredgewidth=0.8,
        color=MUTED, zorder=3.5, clip_on=False, gid="diverged",
    )  # fmt: skip
