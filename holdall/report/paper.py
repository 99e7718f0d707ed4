"""What figures for papers share: resolution, font, greys, and the marks of families.

Matplotlib's types are `Any` here because it is imported only when a figure is drawn.
"""

from __future__ import annotations

from typing import Any

from holdall.report.style import BY_HAND, Look

DPI = 200
INK, MUTED, SHADE = "#222222", "#6b6b6b", "#eceae4"
PALE = 0.4
"""Opacity of models that were not trained here."""
RING: dict[str, Any] = {
    "marker": "o", "markersize": 11, "fillstyle": "none", "markeredgecolor": "#C1121F", "markeredgewidth": 1.2
}  # fmt: skip
"""Around a mixer that breaks a law."""


def rc() -> Any:
    """A plain sans serif: of three faces with equal widths the first found here, else Matplotlib's own."""
    from matplotlib.font_manager import get_font_names

    present = set(get_font_names())
    face = next((name for name in ("Helvetica", "Arial", "Liberation Sans") if name in present), None)
    return {
        "font.family": [face, "DejaVu Sans"] if face else ["DejaVu Sans"],
        "font.size": 8.5,
        "text.parse_math": False,  # a label may hold a dollar sign
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.minor.width": 0.5,
        "xtick.minor.size": 1.8,
    }


def marker(look: Look, fill: str) -> dict[str, Any]:
    size = {"*": 8.0, "D": 5.0, "s": 5.4, "P": 6.6, "X": 6.2}.get(look.marker, 6.0)
    edge = look.colour if fill != "full" else "white"
    return {
        "marker": look.marker,
        "markersize": size,
        "color": look.colour,
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "markeredgecolor": edge,
        "markeredgewidth": 0.5 if fill == "full" else 1.2,
    }


def by_hand_marker(colour: str) -> dict[str, Any]:
    """Of a model that was built by hand: an open diamond, taller than any family's mark."""
    return {
        "marker": BY_HAND[0], "markersize": 7.5, "color": colour, "fillstyle": "full",
        "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.1,
    }  # fmt: skip


def darker(colour: str) -> tuple[float, ...]:
    """The same hue with a quarter less light: what carries a marker is too pale for small letters."""
    from matplotlib.colors import to_rgb

    return tuple(0.75 * part for part in to_rgb(colour))
