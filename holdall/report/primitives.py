"""The primitives of BaseConv in one picture: of each an input, the weights that are set, and the output.

One row for each; a cell is a number, blue if positive and orange if negative, as in the pictures of mixing
matrices. Weights are those of channel x alone: the other, z, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdall import files
from holdall.report import style
from holdall.report.matrix import DARK, LIGHT
from holdall.theory.primitives import Example, examples

__all__ = ["draw", "write"]

DPI = 200
CELL, ROW, HEAD, EDGE = 0.27, 0.92, 1.0, 0.3
"""Inches: the side of a cell, the height of a primitive's row, of the picture's head, and its margin."""
COLUMNS = {"input": 2.55, "filter h and bias b": 4.6, "gate P and p": 6.95, "output": 8.2}
"""Where the columns begin, in inches."""
WIDTH = 10.2


def write(path: Path, *, dark: bool = False, command: str = "") -> Path:
    """Write the picture as PNG, with the command that made it in its metadata."""
    files.make_folder(path.parent)
    metadata = {"Software": "Holdall", "Description": command}
    with files.replacing(path) as unfinished:
        draw(dark=dark).canvas.print_png(unfinished, metadata=metadata)
    return path


def draw(*, dark: bool = False) -> Any:
    """The picture as a matplotlib Figure; axes carry as gid the primitive and the column that they show."""
    import matplotlib

    from holdall.report.paper import rc

    with matplotlib.rc_context(rc()):
        return _draw(
            examples(), DARK if dark else LIGHT, *(("#e6e6e3", "#9da2a8") if dark else ("#222222", "#6b6b6b"))
        )


def _draw(shown: Sequence[Example], stops: tuple[str, ...], ink: str, muted: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("cells", stops)
    height = HEAD + ROW * len(shown) + EDGE / 2
    figure = style.blank((WIDTH, height), dpi=DPI, ground=stops[len(stops) // 2])

    def text(x: float, y: float, words: str, **more: Any) -> None:
        figure.text(x / WIDTH, 1 - y / height, words, va="top", **{"color": ink, **more})

    def cells(
        gid: str,
        place: tuple[float, float],
        rows: Sequence[Sequence[float]],
        sides: Sequence[str],
        heads: Sequence[str],
    ) -> None:
        """A matrix of numbers, its upper left corner at `place`, with names of rows and columns."""
        size = (CELL * len(rows[0]), CELL * len(rows))
        box = (place[0] / WIDTH, 1 - (place[1] + size[1]) / height, size[0] / WIDTH, size[1] / height)
        axes = figure.add_axes(box, gid=gid)
        axes.imshow([[tint(value) for value in row] for row in rows],
                    cmap=colours, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")  # fmt: skip
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:g}", ha="center", va="center", fontsize=7,
                          color=ink if value else muted)  # fmt: skip
        axes.set_xticks(range(len(heads)), heads)
        axes.set_yticks(range(len(sides)), sides)
        axes.tick_params(length=0, labelsize=6.4, labelcolor=muted, pad=2, labeltop=True, labelbottom=False)
        for x in range(1, len(rows[0])):
            axes.axvline(x - 0.5, color=muted, linewidth=0.3)
        for spine in axes.spines.values():
            spine.set(color=muted, linewidth=0.5)

    def tint(value: float) -> float:
        """At most as dark as black numbers can be read on."""
        return math.copysign(min(0.5, 0.15 * math.sqrt(abs(value))), value)

    text(EDGE, 0.18, "What a layer of BaseConv does with weights set by hand", fontsize=13, fontweight="bold")
    formula = "y[t] = (b + Σ h[i] x[t - i]) · (P·(x, z)[t] + p) + x[t]; the channel z is kept"
    text(EDGE, 0.45, formula, fontsize=8, color=muted)
    for name, x in COLUMNS.items():
        text(x, 0.68, name, fontsize=7.5, fontweight="bold")
    for place, example in enumerate(shown):
        top = HEAD + ROW * place
        text(EDGE, top + 0.02, example.name, fontsize=9, fontweight="bold")
        text(EDGE, top + 0.2, example.says, fontsize=7)
        count = example.layer.nonzeros
        cost = "no weight: the skip" if not count else f"{count} weight{'s' * (count > 1)} that are not zero"
        text(EDGE, top + 0.35, cost, fontsize=6.4, color=muted)
        taps, row = example.layer.taps.get(0, {}), example.layer.gate.get(0, {})
        lags = range(1 + max([0, *taps]))
        x_TD, y_TD = example.x_TD, example.output()
        tokens = [str(t) for t in range(len(x_TD))]
        panels = {
            "input": (x_TD.T.tolist(), ("x", "z"), tokens),
            "filter h and bias b": (
                [[*(taps.get(lag, 0.0) for lag in lags), example.layer.bias.get(0, 0.0)]],
                ("x",), [*(f"h{lag}" for lag in lags), "b"],
            ),
            "gate P and p": (
                [[row.get(0, 0.0), row.get(1, 0.0), example.layer.gate_bias.get(0, 0.0)]],
                ("x",), ("x", "z", "p"),
            ),
            "output": (y_TD.T.tolist(), ("x", "z"), tokens),
        }  # fmt: skip
        for name, (rows, sides, heads) in panels.items():
            cells(f"{example.name}: {name}", (COLUMNS[name], top), rows, sides, heads)
    return figure
