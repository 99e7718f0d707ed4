"""Accuracy against model width, one panel per sequence length: as in Zoology's figure 2.

A recipe of several sweeps leaves one folder per length; here they stand side by side. A width that solves one
length and not the next shows a mixer that must grow with the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdall.report import style
from holdall.report.data import Model, Sweep, families
from holdall.report.paper import DPI, INK, MUTED, PALE, RING, marker, rc

PANEL = (2.35, 2.5)  # inches


def has_widths(sweeps: Sequence[Sweep]) -> bool:
    """Whether any family of these sweeps comes in several widths, so that there is something to draw."""
    return any(
        len({model.width for model in sweep.models if model.family == family}) > 1
        for sweep in sweeps
        for family in families([sweep])
    )


def save(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write the panels to `path` as PNG, with the commands that made the sweeps in its metadata."""
    commands = "; ".join(dict.fromkeys(sweep.command for sweep in sweeps if sweep.command))
    draw(sweeps).canvas.print_png(path, metadata={"Software": "Holdall", "Description": commands})


def draw(sweeps: Sequence[Sweep]) -> Any:
    """The panels as a matplotlib Figure, by rising length; lines carry the gid family:<name>."""
    import matplotlib

    with matplotlib.rc_context(rc()):
        return _draw(sorted(sweeps, key=lambda sweep: sweep.context_len))


def _draw(sweeps: Sequence[Sweep]) -> Any:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    count, names = len(sweeps), families(sweeps)
    figure = style.blank((0.75 + PANEL[0] * count, PANEL[1] + 0.9), dpi=DPI, ground="white")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.72 / figure.get_figwidth(), right=0.99, bottom=0.2, top=0.847, wspace=0.08)
    widths = sorted({model.width for sweep in sweeps for model in sweep.models})
    for axes, sweep in zip(panels, sweeps, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xlim(widths[0] / 1.25, widths[-1] * 1.25)
        axes.set_ylim(-0.03, 1.05)
        axes.xaxis.set_major_locator(FixedLocator(widths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        tested = style.difficulties_text(sweep)
        axes.set_title(f"N = {sweep.context_len:,}, {tested}", fontsize=8.5, color=INK)
        for family in names:
            _line(axes, sweep, family, style.look(names.index(family)))
    panels[0].set_ylabel("Recall accuracy")
    sources = dict.fromkeys(m.published for sweep in sweeps for m in sweep.models if m.published)
    if sources:
        pale = f"pale: published, {'; '.join(sources)}"
        figure.text(0.01, 0.01, pale, fontsize=6, color=MUTED, gid="published")
    figure.text(
        0.99, 0.01, style.spread_text(sweeps), fontsize=6, color=MUTED, ha="right", gid="spread text"
    )  # fmt: skip
    figure.supxlabel("Model width", fontsize=8.5, color=INK, y=0.055)
    handles = {line.get_label(): line for axes in panels for line in axes.lines if line.get_label()[0] != "_"}
    figure.legend(
        handles=[handles[name] for name in names if name in handles],
        loc="upper center", ncol=min(len(handles), 3 + 2 * count), frameon=False, fontsize=7.8,
        handlelength=1.9, handletextpad=0.5, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _line(axes: Any, sweep: Sweep, family: str, look: style.Look) -> None:
    """One family's best accuracy at each width, with the spread of its seeds."""
    best: dict[int, Model] = {}
    for model in sweep.models:
        rival = best.get(model.width)
        if model.family == family and model.best and (not rival or model.accuracy > rival.accuracy):
            best[model.width] = model
    found = [best[width] for width in sorted(best)]
    if not found:
        return
    x = [model.width for model in found]
    axes.plot(
        x, [model.accuracy for model in found], linewidth=1.2, label=family, gid=f"family:{family}",
        zorder=3, alpha=PALE if all(model.published for model in found) else None, **marker(look, "full"),
    )  # fmt: skip
    if broken := [model for model in found if model.broken]:
        axes.plot(
            [model.width for model in broken], [model.accuracy for model in broken], linestyle="none",
            gid="broken", zorder=3.5, **RING,
        )  # fmt: skip
    if any(model.high > model.low for model in found):
        axes.fill_between(
            x, [model.low for model in found], [model.high for model in found],
            color=look.colour, alpha=0.15, linewidth=0, gid="spread", zorder=2,
        )  # fmt: skip


__all__ = ["draw", "has_widths", "save"]
