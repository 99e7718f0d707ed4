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
LEGEND = "each in several formats;\nbar: down to what must have\nbeen sent, with 95% confidence"
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
    lines = sum(len(_words(label).split("\n")) for label in models)
    height = max(SIZE[1], 1.6 + 0.165 * lines)  # that of the legend
    figure = style.blank((SIZE[0], height), dpi=DPI)
    axes = figure.add_axes((0.105, 0.55 / height, 0.585, 1 - 0.79 / height))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(low, high)
    lowest = min(max(point.at_least_bits, LEAST) for point in points)
    bottom = min(low, 2.0 ** math.floor(math.log2(lowest)))
    axes.set_ylim(bottom, top)
    ends = [low, high]
    for index, (label, found) in enumerate(models.items()):
        _draw_model(axes, label, found, style.look(index))
    # what the lines mean stands in the legend: how much room there is beside the diagonal depends on the data
    for entropy in sorted({point.entropy_bits for point in points}):
        line = axes.axhline(entropy, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    line.set_label("all there is to say")
    axes.fill_between(ends, ends, [top] * 2, color=SHADE, linewidth=0, zorder=0.5, gid="impossible",
                      label="impossible: more\nconveyed than sent")  # fmt: skip
    axes.plot(ends, ends, color=MUTED, linewidth=1, zorder=1.5)
    for axis, ticks in (
        (axes.xaxis, style.state_ticks(low, high, 6)),
        (axes.yaxis, style.state_ticks(bottom, top)),
    ):
        axis.set_ticks(ticks, [_text(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("Bits of the message: states of all layers (log scale)")
    axes.set_ylabel("Bits conveyed, at least (log scale)")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=7.5, labelcolor=INK,
                alignment="left", title=LEGEND, title_fontsize=7)  # fmt: skip
    return figure


def _words(label: str) -> str:
    """A label on lines that fit into the legend, none of which ends within "f = 16"."""
    return "\n".join(textwrap.wrap(label.replace(" = ", "\u00a0=\u00a0"), LABEL))


def _text(bits: float) -> str:
    """A tick, of which the least is for less as well."""
    return f"≤ {bits:g}" if bits == LEAST else f"{bits:g}" if bits < 1 else f"{bits:,.0f}"


def _draw_model(axes: Any, label: str, found: Sequence[Conveyed], look: style.Look) -> None:
    shown = sorted(found, key=lambda point: (point.message_bits, point.conveyed_bits))
    sent = [point.message_bits for point in shown]
    conveyed = [max(point.conveyed_bits, LEAST) for point in shown]
    for x, y, point in zip(sent, conveyed, shown, strict=True):
        axes.plot([x, x], [max(point.at_least_bits, LEAST), y], color=look.colour, linewidth=1.1, zorder=2.5)
    axes.plot(sent, conveyed, label=_words(label), gid=f"model:{label}", linewidth=1, alpha=0.9, zorder=3,
              clip_on=False, **{**marker(look, "full"), "linestyle": "-"})  # fmt: skip
