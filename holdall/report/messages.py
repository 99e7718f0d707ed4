"""What models convey in one message against the bits of it: no point can lie above the diagonal.

Matplotlib's types are `Any` here because it is imported only when a figure is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdall import files
from holdall.report import style
from holdall.report.paper import DPI, INK, MUTED, SHADE, marker, rc
from holdall.theory.messages import Conveyed

SIZE = (7.4, 4.4)
LABEL = 26
"""Letters in a line of the legend."""
LEAST = 0.25
"""Bits below which a message conveys nothing that could be drawn."""


def write(models: Mapping[str, Sequence[Conveyed]], path: Path, *, command: str = "") -> Path:
    """Write the picture as PNG, with the command that made it in its metadata."""
    files.make_folder(path.parent)
    with files.replacing(path) as unfinished:
        draw(models).canvas.print_png(unfinished, metadata={"Software": "Holdall", "Description": command})
    return path


def draw(models: Mapping[str, Sequence[Conveyed]]) -> Any:
    """The picture as a matplotlib Figure, of each model's messages in all formats.

    Artists carry a gid: impossible, and model:<label> for the line through a model's messages. Raises
    ValueError where there is nothing to draw.
    """
    import matplotlib

    if not any(models.values()):
        raise ValueError("there is no message to draw")
    with matplotlib.rc_context(rc()):
        return _draw(models)


def _draw(models: Mapping[str, Sequence[Conveyed]]) -> Any:
    points = [point for found in models.values() for point in found]
    bits = [max(point.message_bits, 1) for point in points]
    entropy = max(point.entropy_bits for point in points)
    # from where the diagonal can be seen on
    low, high = (
        2.0 ** math.floor(math.log2(min(*bits, entropy)) - 1),
        2.0 ** math.ceil(math.log2(max(bits)) + 0.5),
    )
    top = 2.0 ** math.ceil(math.log2(entropy) + 1)
    figure = style.blank(SIZE, dpi=DPI)
    axes = figure.add_axes((0.09, 0.125, 0.6, 0.82))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(low, high)
    lowest = min(max(point.at_least_bits, LEAST) for point in points)
    bottom = min(low, 2.0 ** math.floor(math.log2(lowest)))
    axes.set_ylim(bottom, top)
    ends = [low, high]
    axes.fill_between(ends, ends, [top] * 2, color=SHADE, linewidth=0, zorder=0.5, gid="impossible",
                      where=[True] * 2)  # fmt: skip
    axes.plot(ends, ends, color=MUTED, linewidth=1, zorder=1.5)
    axes.text(0.02, 0.98, "Impossible:\nmore conveyed than sent", transform=axes.transAxes, va="top",
              color=MUTED, fontsize=7.5, style="italic")  # fmt: skip
    for entropy in sorted({point.entropy_bits for point in points}):
        axes.axhline(entropy, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), gid="all there is to say")
    for index, (label, found) in enumerate(models.items()):
        _draw_model(axes, label, found, style.look(index))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlabel("Bits of the message: states of all layers (log scale)")
    axes.set_ylabel("Bits conveyed, at least (log scale)")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=7.5,
                title="each in several formats,\nbar: 95% lower bound", title_fontsize=7,
                alignment="left", labelcolor=INK)  # fmt: skip
    return figure


def _draw_model(axes: Any, label: str, found: Sequence[Conveyed], look: style.Look) -> None:
    shown = sorted(found, key=lambda point: (point.message_bits, point.conveyed_bits))
    sent = [point.message_bits for point in shown]
    conveyed = [max(point.conveyed_bits, LEAST) for point in shown]
    for x, y, point in zip(sent, conveyed, shown, strict=True):
        axes.plot([x, x], [max(point.at_least_bits, LEAST), y], color=look.colour, linewidth=1.1, zorder=2.5)
    words = "\n".join(textwrap.wrap(label, LABEL))
    axes.plot(sent, conveyed, label=words, gid=f"model:{label}", linewidth=1, alpha=0.9, zorder=3,
              **{**marker(look, "full"), "linestyle": "-"})  # fmt: skip
