"""What the figure and the page share: one look per family, bytes in words, ticks, short labels."""

from __future__ import annotations

import functools
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdall.report.data import Axis, Model, Sweep, families, is_series

# Okabe and Ito's colours for the colour-blind, the light ones darkened to carry on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A8408F", "#D39200", "#4BA6E0", "#757575")

# One shape each: (Matplotlib, Plotly, a letter for tables). All can be filled or open.
SHAPES = (
    ("o", "circle", "●"),
    ("s", "square", "■"),
    ("^", "triangle-up", "▲"),
    ("D", "diamond", "◆"),
    ("v", "triangle-down", "▼"),
    ("P", "cross", "✚"),
    ("X", "x", "✖"),
    ("*", "star", "★"),
    ("p", "pentagon", "⬟"),
    ("h", "hexagon", "⬢"),
    ("<", "triangle-left", "◀"),
    (">", "triangle-right", "▶"),
)

# What was built by hand, in its family's colour: the same shape for all, open, and no family's.
BY_HAND = ("d", "diamond-tall-open", "◊")
BY_HAND_TEXT = "by hand, not trained"

# One fill for each sweep on the same picture: (Matplotlib, Plotly's suffix, the latter in words).
FILLS = (
    ("full", "", "filled"),
    ("none", "-open", "open"),
    ("left", "-dot", "dotted"),
    ("top", "-open-dot", "open with a dot"),
)


def blank(size: tuple[float, float], *, dpi: int, ground: str = "white") -> Any:
    """An empty matplotlib Figure of (width, height) in inches, which a notebook shows as it is.

    Pyplot's would be shown only there, and by a global switch; these need neither.
    """
    return _figure_type()(figsize=size, dpi=dpi, facecolor=ground)


@functools.cache
def _figure_type() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Drawn(Figure):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            FigureCanvasAgg(self)

        def _repr_png_(self) -> bytes:
            """What notebooks ask an object for."""
            file = io.BytesIO()
            self.canvas.print_png(file)  # type: ignore[attr-defined]
            return file.getvalue()

    return Drawn


@dataclass(frozen=True)
class Look:
    """How a family is drawn, whatever the medium."""

    colour: str
    marker: str
    symbol: str
    glyph: str


def look(index: int) -> Look:
    """The look of the family at `index`: colour and shape move together, so each is a key to itself."""
    return Look(COLOURS[index % len(COLOURS)], *SHAPES[index % len(SHAPES)])


def by_hand_colour(sweeps: Sequence[Sweep], family: str) -> str:
    """The colour of a family's models that were built by hand: its own; "" where none of it was trained."""
    trained = {model.family for sweep in sweeps for model in sweep.models}
    return look(families(sweeps).index(family)).colour if family in trained else ""


def bytes_text(count: float | int) -> str:
    """A number of bytes in binary units: state sizes are products of powers of two."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"


def state_text(axis: Axis, count: float | int) -> str:
    """A size of state with its unit; bits as bytes are, since they are eight times these."""
    if axis.unit == "elements":
        return f"{count:,.0f}"
    return bytes_text(count) if axis.unit == "bytes" else bytes_text(count).replace("B", "bit")


def axis_text(sweep: Sweep) -> str:
    """What stands below the axis of states."""
    unit = sweep.axis.unit
    state = "State" if unit == "bytes" else f"{unit.capitalize()} of state"
    return f"{state} per sequence after {sweep.context_len:,} tokens"


def state_ticks(low: float, high: float, most: int = 10) -> list[float]:
    """Powers of 2, 4 or 16 within [low, high]: the finest of them that needs at most `most` ticks."""
    for step in (1, 2, 4, 8):
        first, last = math.ceil(math.log2(low) / step), math.floor(math.log2(high) / step)
        if last - first < most:
            break
    return [2.0 ** (step * k) for k in range(first, last + 1)]


def all_causal(sweeps: Sequence[Sweep]) -> bool:
    """Whether the information floor holds for every model that is drawn."""
    return all(model.causal for sweep in sweeps for model in sweep.models if model.drawn)


def state_range(sweeps: Sequence[Sweep], floor: float) -> tuple[float, float]:
    """The ends of the axis of states: from where the `floor` is low to beyond the largest state."""
    drawn = [model.state for sweep in sweeps for model in (*sweep.models, *sweep.by_hand) if model.drawn]
    powers = [round(math.log2(floor / 16)), *(math.ceil(math.log2(state)) - 2 for state in drawn)]
    return 2.0 ** min(powers), max([floor, *drawn]) * 2.5  # room for a label in any font


def difficulties_text(sweep: Sweep) -> str:
    """The difficulties that the mean accuracy is taken over, in words: "mean over 4, 8 and 16 pairs"."""
    tags, what = sorted({segment.difficulty for segment in sweep.segments}), sweep.difficulty
    if len(tags) == 1:
        return f"{tags[0]} {what}"
    if len(tags) <= 4:
        return f"mean over {', '.join(map(str, tags[:-1]))} and {tags[-1]} {what}"
    return f"mean over {len(tags)} tests of {tags[0]} to {tags[-1]} {what}"


def short_labels(sweeps: Sequence[Sweep]) -> dict[Model, str]:
    """What to write beside each drawn point: all that the legend's family does not already say.

    "taylor, f = 16" becomes "f = 16"; a width is added where a label comes in more than one. A model
    that an earlier sweep has too is left to that sweep: its marker says the rest.
    """
    labels: dict[Model, str] = {}
    seen: set[tuple[str, int]] = set()
    for sweep in sweeps:
        widths = Counter(label for label, _ in {(model.label, model.width) for model in sweep.models})
        for model in (*sweep.models, *sweep.by_hand):
            label, start = model.label, f"{model.family},"
            parts = [label.removeprefix(start) if label.startswith(start) else label.partition(",")[2]]
            parts = [parts[0].strip()]
            alone = is_series(other for other in sweep.models if other.family == model.family)
            if not parts[0] and not (alone and _letters(model.label) == _letters(model.family)):
                parts = [model.label]
            if widths[model.label] > 1:
                parts.append(f"d = {model.width}")
            parts += [f"breaks {law}" for law in model.broken] + [f"refuses {law}" for law in model.refused]
            if model.drawn and (model.label, model.width) not in seen:
                labels[model] = ", ".join(part for part in parts if part)
        seen |= {(model.label, model.width) for model in (*sweep.models, *sweep.by_hand)}
    return labels


def marked(model: Model) -> str:
    """A model's label in a table, with a mark where it is not one trained here that obeys the laws."""
    marks = [f"✗ {law}" for law in model.broken] + [f"refuses {law}" for law in model.refused]
    return " ".join([model.label, *marks, *(["†"] if model.published else [])])


PUBLISHED = "published with Holdall, not trained here"
"""What † means in tables, and a pale mark in pictures."""


def spread_text(sweeps: Sequence[Sweep]) -> str:
    """What is known of the spread over seeds, and how to learn more of it."""
    counts = sorted({model.seeds for sweep in sweeps for model in sweep.models})
    if counts == [1]:
        again = all(sweep.more_seeds for sweep in sweeps)
        return "1 seed: no spread known" + ("; --seeds 3 adds two." if again else ".")
    # a seed that diverged everywhere has no accuracy, and no place in a mean
    some = any(0 < len(model.best) < model.seeds for sweep in sweeps for model in sweep.models)
    mean = "the mean of those that converged" if some else "their mean"
    if len(counts) == 1:
        return f"{counts[0]} seeds: each point is {mean}, its bar reaches from the lowest to the highest."
    return (
        f"{counts[0]} to {counts[-1]} seeds: a point is {mean}, its bar reaches from the lowest to the "
        "highest" + ("; of a model with one seed no spread is known." if counts[0] == 1 else ".")
    )


def gap_text(times: float) -> str:
    """How many times the bits that the answers need, to two digits: more would be false precision."""
    return f"{float(f'{times:.2g}'):,.0f} ×" if times >= 10 else f"{times:.1f} ×"


def value_text(value: Any) -> str:
    """A value of a JSON file as a reader wants it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {value_text(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value is None else str(value)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
