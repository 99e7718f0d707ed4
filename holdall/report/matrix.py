"""Mixing matrices side by side, as a picture for a talk and as a page that opens offline.

Both are drawn from the folder that `holdall matrix` leaves, in the same colours: blue takes from a token,
orange takes its negative, the root of the size says how much, and the ground is nothing at all. A matrix's
full colour is `reference`, so that one large entry does not hide all others.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from holdall import files
from holdall.analysis.gallery import Gallery, MixingMatrix, load
from holdall.files import RunError
from holdall.report import shell, style

__all__ = ["write"]

DPI = 200

# From minus one over zero to one; the page holds the same.
LIGHT = ("#6e2600", "#d55e00", "#f4ad73", "#ffffff", "#79bde6", "#0072b2", "#00335c")
DARK = ("#ffe4cf", "#ef7d2b", "#7e3606", "#15171a", "#0b527f", "#45a5e6", "#dcf1ff")


def write(folder: Path, out: Path, *, dark: bool = False) -> list[Path]:
    """Write matrix.png and matrix.html into `out` from the data in `folder`; return their paths.

    dark: the picture's ground is dark, for slides; the page follows its reader's settings anyway.

    Raises RunError, naming the folder, where there is nothing to draw from.
    """
    gallery = load(folder)
    if not gallery.matrices:
        raise RunError(f"{folder} holds no matrix to draw")
    files.make_folder(out)
    page = render(gallery).encode()
    written: list[Path] = []
    makers: dict[str, Callable[[Path], Any]] = {
        "matrix.png": lambda path: save_picture(gallery, path, dark=dark),
        "matrix.html": lambda path: path.write_bytes(page),
    }
    for name, make in makers.items():
        with files.replacing(out / name) as unfinished:
            make(unfinished)
        written.append(out / name)
    return written


def reference(values: np.ndarray) -> float:
    """The size that gets the full colour: only 1% of the entries that are there are larger."""
    sizes = np.abs(values)
    there = sizes[sizes > 1e-9 * sizes.max()]
    return float(np.quantile(there, 0.99)) if there.size else 1.0


def caption(matrix: MixingMatrix) -> str:
    """What a picture's second line says."""
    parts = [
        matrix.of,
        *(["Toeplitz"] if matrix.is_toeplitz else []),
        *([] if matrix.causal else ["not causal"]),
    ]
    return " · ".join(parts)


def rank_caption(matrix: MixingMatrix) -> str:
    """What a picture's third line says."""
    if matrix.rank is None:
        return "rank not computed"
    return f"rank {matrix.rank} of {matrix.full_rank}, {matrix.rank_1} to 1%"


# ---------------------------------------------------------------------------------------------- picture


def save_picture(gallery: Gallery, path: Path, *, dark: bool = False) -> None:
    """Write the picture as PNG, with the command that made it in its metadata."""
    description = {"Software": "Holdall", "Description": gallery.command}
    draw(gallery, dark=dark).canvas.print_png(path, metadata=description)


def draw(gallery: Gallery, *, dark: bool = False) -> Any:
    """The picture as a matplotlib Figure; axes carry as gid the label of the mixer that they show."""
    import matplotlib

    from holdall.report.paper import rc

    with matplotlib.rc_context(rc()):
        return _draw(
            gallery, DARK if dark else LIGHT, *(("#e6e6e3", "#9da2a8") if dark else ("#222222", "#6b6b6b"))
        )


def columns(count: int) -> int:
    """Columns for so many pictures: all in one row if they are few, else about as wide as a slide."""
    rows = 1 if count <= 6 else round(math.sqrt(count / 2.2))
    return math.ceil(count / rows)


def _draw(gallery: Gallery, stops: tuple[str, ...], ink: str, muted: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours, ground = LinearSegmentedColormap.from_list("mixing", stops), stops[len(stops) // 2]
    count = len(gallery.matrices)
    across = columns(count)
    down = math.ceil(count / across)
    # inches: a picture's side, the room of its three lines, gaps, and the head of it all
    side, lines, gap, head, edge = (2.1 if count <= 6 else 1.62), 0.52, 0.2, 0.78, 0.3
    width = max(6.4, 2 * edge + across * (side + gap) - gap)
    height = head + down * (side + lines) + (down - 1) * gap / 2 + edge / 2
    figure = style.blank((width, height), dpi=DPI, ground=ground)
    left = (width - across * (side + gap) + gap) / 2

    def text(x: float, y: float, words: str, room: float = math.inf, **more: Any) -> None:
        """Words at a place in inches, cut where they would leave their room."""
        artist = figure.text(x / width, 1 - y / height, words, va="top", **{"color": ink, **more})
        while (share := artist.get_window_extent().width / DPI / room) > 1:
            words = words[: min(len(words) - 1, int(len(words) / share))].rstrip(" ,·")
            artist.set_text(words + "…")

    text(edge, 0.2, "What each output takes from each token", fontsize=13, fontweight="bold")
    below = f"N = {gallery.length} tokens, {gallery.input}; row t down, column j across"
    text(edge, 0.47, below, fontsize=8, color=muted)
    for place, matrix in enumerate(gallery.matrices):
        x = left + place % across * (side + gap)
        y = head + place // across * (side + lines + gap / 2)
        text(x, y, matrix.label, side + gap / 2, fontsize=9, fontweight="bold")
        text(x, y + 0.17, caption(matrix), side + gap / 2, fontsize=6.4, color=muted)
        text(x, y + 0.295, rank_caption(matrix), side + gap / 2, fontsize=6.4, color=muted)
        for part, (dx, dy, size) in zip(matrix.values_STJ, _tiles(len(matrix.values_STJ), side), strict=True):
            box = (x + dx, height - y - lines + 0.08 - dy - size, size, size)
            axes = figure.add_axes(
                (box[0] / width, box[1] / height, size / width, size / height), gid=matrix.label
            )
            tint = np.sign(part) * np.sqrt(np.minimum(np.abs(part) / reference(matrix.values_STJ), 1))
            axes.imshow(tint, cmap=colours, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(color=muted, linewidth=0.5)
    _draw_key(figure, colours, muted, (width - edge, height - 0.27), (width, height))
    return figure


def _tiles(count: int, side: float) -> list[tuple[float, float, float]]:
    """Where the heads of one mixer go within its square: right, down, size."""
    across = math.ceil(math.sqrt(count))
    gap = 0.05 * (across > 1)
    size = (side - (across - 1) * gap) / across
    return [(k % across * (size + gap), k // across * (size + gap), size) for k in range(count)]


def _draw_key(
    figure: Any, colours: Any, muted: str, corner: tuple[float, float], page: tuple[float, float]
) -> None:
    """The colour scale, its right upper corner given in inches."""
    size = (1.5, 0.09)
    box = (corner[0] - size[0], corner[1] - size[1], *size)
    axes = figure.add_axes(tuple(part / page[k % 2] for k, part in enumerate(box)), gid="key")
    axes.imshow(np.linspace(-1, 1, 255)[None], cmap=colours, aspect="auto")
    axes.set_xticks([0, 127, 254], ["negative", "0", "positive"])
    axes.set_yticks([])
    for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(length=0, labelsize=6.4, labelcolor=muted, pad=2)
    for spine in axes.spines.values():
        spine.set(color=muted, linewidth=0.5)


# ------------------------------------------------------------------------------------------------- page


def render(gallery: Gallery) -> str:
    """The page as text: about 20 KB and the matrices as fp32."""
    return shell.render(
        "matrix.html",
        data=_content(gallery),
        lede=f"{len(gallery.matrices)} sequence mixers, N = {gallery.length} tokens, {gallery.input}.",
        failures=list(gallery.failures.items()),
        command=gallery.command,
        # whole screen pixels for each entry, about as large whatever N is
        side=gallery.length * max(1, round(208 / gallery.length)),
    )


def _content(gallery: Gallery) -> dict[str, Any]:
    return {
        "length": gallery.length,
        "tokens": gallery.tokens,
        "light": LIGHT,
        "dark": DARK,
        "matrices": [
            {
                "label": matrix.label,
                "caption": caption(matrix),
                "rank": rank_caption(matrix),
                "detail": _detail(matrix),
                "heads": [f"{matrix.unit} {place + 1}" if matrix.count > 1 else "" for place in matrix.shown],
                "reference": reference(matrix.values_STJ),
                "values": [
                    base64.b64encode(part.astype("<f4").tobytes()).decode() for part in matrix.values_STJ
                ],
            }
            for matrix in gallery.matrices
        ],
    }


def _detail(matrix: MixingMatrix) -> list[tuple[str, str]]:
    """All that is known of a matrix, for its large view."""
    if matrix.kind == "exact":
        kind = f"exact, of {matrix.source}: rebuilds its output to {matrix.error:.0e}"
    else:
        kind = "Jacobian: the norm of d y_t / d x_j, of the whole mixer"
    beside = [("also mixing", ", ".join(matrix.beside))] if matrix.beside else []
    places = ", ".join(str(place + 1) for place in matrix.shown)
    shown = [("shown", f"{matrix.unit} {places} of {matrix.count}")] if matrix.count > 1 else []
    half = "rank of the lower left quarter"
    return [
        ("matrix", kind),
        *beside,
        *shown,
        (
            half,
            matrix.rank_text if matrix.rank is None else f"{matrix.rank_text}, {matrix.rank_1} to within 1%",
        ),
        ("state there", f"{matrix.state:,} numbers"),
        ("Toeplitz", "yes" if matrix.is_toeplitz else f"no, {matrix.toeplitz:.0%} away"),
        ("causal", "yes" if matrix.causal else "no"),
        ("entries below 1/1000 of their row's largest", f"{matrix.sparsity:.0%}"),
    ]
