"""A compiled circuit in one picture: what each layer of BaseConv does to each of its channels.

A row for each layer, a column for each channel, input on the left. Colour is what is done: written,
multiplied, shifted, or kept for a later layer; a channel that no later layer reads is blank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from holdall import files
from holdall.report import style
from holdall.report.paper import INK, MUTED
from holdall.theory.compile import Compiled
from holdall.theory.primitives import Layer

__all__ = ["draw", "uses", "write"]

DPI = 200
UNUSED, KEPT, WRITTEN, MULTIPLIED, SHIFTED = range(5)
LOOKS = {
    UNUSED: ("holds nothing that is read later", "#ffffff"),
    KEPT: ("kept for a later layer", "#d6e8f4"),
    WRITTEN: ("written", "#0072B2"),
    MULTIPLIED: ("multiplied", "#D55E00"),
    SHIFTED: ("shifted to the last token", "#009E73"),
}
"""What a cell means, and its colour."""
KINDS = {"affine": WRITTEN, "product": MULTIPLIED, "shift": SHIFTED}


def uses(compiled: Compiled) -> np.ndarray:
    """What each layer does to each channel, (layers, width): UNUSED, KEPT, WRITTEN, MULTIPLIED or SHIFTED.

    Read from the layers' weights alone, from the last back: a channel is in use where a later layer, or a
    head, reads what it holds.
    """
    wanted = {channel for head in compiled.heads for channel in head.weights}
    table = np.full((len(compiled.stack.layers), compiled.stack.width), UNUSED)
    for row, layer in reversed(list(enumerate(compiled.stack.layers))):
        for channel in wanted:
            table[row, channel] = KINDS.get(layer.primitives.get(channel, ""), KEPT)
        wanted = {source for channel in wanted for source in _read(layer, channel)}
    return table


def _read(layer: Layer, channel: int) -> set[int]:
    """The channels that a channel's new content depends on."""
    sources = dict(layer.gate.get(channel, {}))
    if layer.primitives.get(channel) == "affine":  # which takes its old content away
        sources[channel] = sources.get(channel, 0.0) + 1.0
        return {source for source, weight in sources.items() if weight}
    return {channel, *sources}


def write(path: Path, compiled: Compiled, title: str, *, command: str = "") -> Path:
    """Write the picture as PNG, with the command that made it in its metadata."""
    files.make_folder(path.parent)
    metadata = {"Software": "Holdall", "Description": command}
    with files.replacing(path) as unfinished:
        draw(compiled, title).canvas.print_png(unfinished, metadata=metadata)
    return path


def draw(compiled: Compiled, title: str) -> Any:
    """The picture as a matplotlib Figure; its axes have the gid circuit."""
    import matplotlib

    from holdall.report.paper import rc

    with matplotlib.rc_context(rc()):
        return _draw(compiled, title)


def _draw(compiled: Compiled, title: str) -> Any:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    table, report = uses(compiled), compiled.report()
    layers, width = table.shape
    # inches: cells as large as a page of 7 by 7 allows, and not larger than they need be
    cell = min(0.24, 7 / width, 7 / layers)
    size = (max(5.6, width * cell + 1.1), max(1.0, layers * cell) + 1.75)
    figure = style.blank(size, dpi=DPI)
    left, top = 0.6, size[1] - 0.85

    def text(x: float, y: float, words: str, **more: Any) -> None:
        figure.text(x / size[0], y / size[1], words, va="top", **{"color": INK, **more})

    text(0.2, size[1] - 0.15, title, fontsize=11, fontweight="bold")
    below = (
        f"{report.size:,} products, depth {report.depth}: {report.layers} layers, {report.width:,} channels, "
        f"{report.nonzeros:,} weights that are not zero"
    )
    text(0.2, size[1] - 0.4, below, fontsize=7.5, color=MUTED)
    place = (left, top - layers * cell, width * cell, layers * cell)
    axes = figure.add_axes([part / size[k % 2] for k, part in enumerate(place)], gid="circuit")
    colours = ListedColormap([colour for _, colour in LOOKS.values()])
    edges = (-0.5, width - 0.5, layers + 0.5, 0.5)
    axes.imshow(table, cmap=colours, vmin=0, vmax=len(LOOKS) - 1, interpolation="nearest", aspect="auto",
                extent=edges)  # fmt: skip
    axes.axvline(compiled.circuit.d - 0.5, color=MUTED, linewidth=0.6, linestyle=":")
    axes.xaxis.set_major_locator(_whole(8))
    axes.yaxis.set_major_locator(_whole(10))
    axes.set_xlabel("channel", fontsize=7.5, labelpad=2)
    axes.set_ylabel("layer", fontsize=7.5, labelpad=2)
    axes.tick_params(length=2, labelsize=6.4, pad=2)
    for spine in axes.spines.values():
        spine.set(color=MUTED, linewidth=0.5)
    handles = [
        Patch(facecolor=colour, edgecolor=MUTED, linewidth=0.4, label=label)
        for label, colour in LOOKS.values()
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.15 / size[0], 0.06 / size[1]),
        ncols=3,
        frameon=False,
        fontsize=6.8,
        handlelength=1.1,
        columnspacing=1.2,
        borderaxespad=0,
    )
    return figure


def _whole(most: int) -> Any:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, min_n_ticks=1)
