"""The recall-memory frontier as a figure for a paper: accuracy against the size of the state.

Matplotlib is used through its objects alone (no pyplot), so that a figure leaves nothing behind in the
process. Its types are `Any` here because it is imported only when a figure is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from holdall.report import floor, strip, style
from holdall.report.data import BY_HAND, Model, Sweep, by_construction, families, is_series, pareto
from holdall.report.paper import DPI, INK, MUTED, PALE, RING, SHADE, by_hand_marker, darker, marker, rc

SIZE = (7.0, 4.55)
"""Inches, without the strip of learning rates and a footer of more than a line."""
LEFT, BOTTOM, WIDTH, FOOTER_LINE = 0.7, 0.57, 6.125, 0.115  # inches
CEILING = 1.06  # accuracy at the top edge: full marks need room for their labels

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


def save(sweeps: Sequence[Sweep], path: Path) -> None:
    """Write the figure to `path` as PNG, with the commands that made its sweeps in its metadata."""
    commands = "; ".join(sweep.command for sweep in sweeps if sweep.command)
    # not savefig, which would crop or scale as a reader's own Matplotlib settings say
    draw(sweeps).canvas.print_png(path, metadata={"Software": "Holdall", "Description": commands})


def draw(sweeps: Sequence[Sweep]) -> Any:
    """The figure as a matplotlib Figure. Artists carry a gid that says what they are:

    floor, pareto, chance, label, footer, family:<name> for the marks of a family's models, published:<name>
    for those that were not trained here, and by hand:<name> for those that were not trained at all. The first
    axes are the frontier's; the others are those of the strip of learning rates (holdall/report/strip.py).
    """
    import matplotlib

    with matplotlib.rc_context(rc()):
        return _draw(sweeps)


def _draw(sweeps: Sequence[Sweep]) -> Any:
    from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter

    footer = _footer(sweeps)
    below = FOOTER_LINE * (len(footer) - 1)  # inches under the strip
    bottom = BOTTOM + below + strip.height(sweeps)
    width, height = SIZE[0], SIZE[1] - BOTTOM + bottom
    figure = style.blank((width, height), dpi=DPI, ground="white")
    axes = figure.add_axes((LEFT / width, bottom / height, WIDTH / width, 3.44 / height))
    questions = sweeps[0].questions
    axis = sweeps[0].axis
    low, high = style.state_range(sweeps, floor.state_for_all(questions, axis.bits))

    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_ylim(0, CEILING)
    axes.xaxis.set_major_locator(FixedLocator(style.state_ticks(low, high)))
    axes.xaxis.set_major_formatter(lambda value, _: style.state_text(axis, value))
    axes.xaxis.set_minor_locator(FixedLocator(style.state_ticks(low, high, most=64)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    for side in (axes.xaxis, axes.yaxis):
        # ticks are made when first asked for: ask here, where the font is set
        side.get_major_ticks()
        side.get_minor_ticks()
    axes.set_xlabel(f"{style.axis_text(sweeps[0])}, all layers (log scale)")
    axes.set_ylabel(f"Recall accuracy, {style.difficulties_text(sweeps[0])}")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

    lines = [
        *_draw_floor(axes, questions, low, axis.bits, style.all_causal(sweeps)),
        *_draw_models(axes, sweeps),
        *_draw_by_hand(axes, sweeps),
        *_draw_pareto(axes, sweeps, high),
    ]
    _draw_legend(figure, axes, sweeps)
    _draw_footer(figure, footer)
    strip.draw(figure, sweeps, (LEFT, 0.2 + below, WIDTH))
    lines += _draw_gap(axes, sweeps, low)
    _draw_labels(axes, sweeps, lines)
    return figure


def _draw_floor(axes: Any, questions: floor.Questions, low: float, bits: int, all_causal: bool) -> list[Any]:
    """Shade what no causal model can do, and draw guessing where it can be told from zero.

    all_causal: whether the text need not say for which models that is.
    """
    state, best = floor.curve(questions, low, bits)
    axes.fill_between(state, best, CEILING, color=SHADE, linewidth=0, zorder=0.5)
    (line,) = axes.plot(state, best, color=MUTED, linewidth=1, zorder=1.5, gid="floor")
    muted = {"color": MUTED, "fontsize": 7.5, "style": "italic", "gid": "floor label"}
    text = "Impossible:" if all_causal else "Impossible for\ncausal models:"
    text += "\nfewer bits than\nthe answers need"
    axes.text(0.012, 0.975, text, transform=axes.transAxes, va="top", **muted)
    chance = floor.guessing(questions)
    if chance < 0.02:
        return [line]
    guess = axes.axhline(chance, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), gid="chance")
    muted["gid"] = "chance label"
    axes.text(
        0.995, chance, "guessing", transform=axes.get_yaxis_transform(), ha="right", va="bottom", **muted
    )
    return [line, guess]


def _draw_models(axes: Any, sweeps: Sequence[Sweep]) -> list[Any]:
    """Each family's models with their seeds' spread; a line by rising state where they are one mixer's."""
    lines = []
    for fill, sweep in zip(style.FILLS, sweeps, strict=False):
        for index, family in enumerate(families(sweeps)):
            look = style.look(index)
            members = sorted(
                (m for m in sweep.models if m.drawn and m.family == family),
                key=lambda m: (m.state, m.accuracy),
            )
            state, accuracy = [m.state for m in members], [m.accuracy for m in members]
            for member in members:
                if member.high > member.low:
                    axes.plot(
                        [member.state] * 2,
                        [member.low, member.high],
                        color=look.colour,
                        linewidth=1.1,
                        zorder=2.5,
                        gid="spread",
                    )
            if is_series(members):
                (line,) = axes.plot(
                    state,
                    accuracy,
                    color=look.colour,
                    linewidth=1.1,
                    alpha=0.55,
                    linestyle="-" if sweep is sweeps[0] else ":",
                    zorder=2,
                )
                lines.append(line)
            # markers apart from their line, which may be pale; a marker is where it was not trained here
            for published in (False, True):
                shown = [m for m in members if bool(m.published) == published]
                axes.plot(
                    [m.state for m in shown], [m.accuracy for m in shown], linestyle="none", zorder=3,
                    gid=f"published:{family}" if published else f"family:{family}",
                    alpha=PALE if published else None, **marker(look, fill[0]),
                )  # fmt: skip
            if broken := [m for m in members if m.broken]:
                axes.plot(
                    [m.state for m in broken], [m.accuracy for m in broken], linestyle="none",
                    gid="broken", zorder=3.5, **RING,
                )  # fmt: skip
    return lines


def _draw_by_hand(axes: Any, sweeps: Sequence[Sweep]) -> list[Any]:
    """What was built by hand, each family's by rising state: in its colour, in a mark of no family."""
    lines = []
    for family in families(sweeps):
        colour = style.by_hand_colour(sweeps, family) or INK
        for members in (each for sweep in sweeps for each in by_construction(sweep, family)):
            (line,) = axes.plot(
                [m.state for m in members], [m.accuracy for m in members], color=colour, linewidth=0.8,
                alpha=0.6, linestyle=(0, (1, 1.5)), zorder=2,
            )  # fmt: skip
            lines.append(line)
            mark = by_hand_marker(colour)
            axes.plot(*line.get_data(), linestyle="none", zorder=3.2, gid=f"{BY_HAND}:{family}", **mark)
    return lines


def _draw_pareto(axes: Any, sweeps: Sequence[Sweep], high: float) -> list[Any]:
    frontier = pareto(model for sweep in sweeps for model in sweep.models)
    if not frontier:
        return []
    state = [*(model.state for model in frontier), high]
    accuracy = [*(model.accuracy for model in frontier), frontier[-1].accuracy]
    dashes = {"linewidth": 0.9, "linestyle": (0, (4, 2))}
    return list(axes.step(state, accuracy, where="post", color=INK, zorder=1.8, gid="pareto", **dashes))


def _draw_gap(axes: Any, sweeps: Sequence[Sweep], low: float) -> list[Any]:
    """An arrow from the floor to the frontier, above every model of as few bytes: nothing else lies there."""
    found = floor.gap(sweeps[0].questions, (m for sweep in sweeps for m in sweep.models), sweeps[0].axis.bits)
    if found is None or found[1] < 60 or found[0].state / found[1] < low:
        return []  # too short to be drawn with its text, or it would start outside
    model, times = found
    ends = [model.state / times * 1.12, model.state / 1.35]
    axes.annotate(
        "",
        xy=(ends[0], model.accuracy),
        xytext=(ends[1], model.accuracy),
        arrowprops={"arrowstyle": "<->", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
    )
    axes.text(
        (ends[0] * ends[1]) ** 0.5,
        model.accuracy - 0.015,
        f"{style.gap_text(times)} the bits that its answers need",
        ha="center",
        va="top",
        fontsize=7.5,
        color=MUTED,
        style="italic",
        gid="gap label",
    )
    return list(axes.plot(ends, [model.accuracy] * 2, alpha=0))


def _draw_legend(figure: Any, axes: Any, sweeps: Sequence[Sweep]) -> None:
    """Above the axes, where no point can be: families and the two lines, then which fill is which sweep."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn = {model.family for sweep in sweeps for model in sweep.models if model.drawn}
    by_hand = {model.family for sweep in sweeps for model in sweep.by_hand if model.drawn}
    handles: list[Any] = [
        Line2D([], [], linewidth=1.1, label=family, **marker(style.look(index), "full"))
        if family in drawn
        else Line2D([], [], linewidth=0.8, linestyle=(0, (1, 1.5)), label=family, **by_hand_marker(INK))
        for index, family in enumerate(families(sweeps))
        if family in drawn | by_hand
    ]
    handles.append(
        Line2D(
            [],
            [],
            color=INK,
            linewidth=0.9,
            linestyle=(0, (4, 2)),
            label=f"best for its {sweeps[0].axis.unit}",
        )
    )
    below = "below the floor" if style.all_causal(sweeps) else "below the floor of causal models"
    handles.append(Patch(facecolor=SHADE, edgecolor=MUTED, linewidth=0.8, label=below))
    models = [model for sweep in sweeps for model in sweep.models if model.drawn]
    if any(model.published for model in models):
        pale = marker(style.Look(INK, *style.SHAPES[0]), "full")
        handles.append(Line2D([], [], linewidth=0, alpha=PALE, label="not trained here", **pale))
    if by_hand:
        open_mark = by_hand_marker(INK)
        handles.append(Line2D([], [], linewidth=0, label=style.BY_HAND_TEXT, **open_mark))
    if any(model.broken for model in models):
        handles.append(Line2D([], [], linewidth=0, label="breaks a law", **{**RING, "markersize": 8}))
    renderer = figure.canvas.get_renderer()
    for most in range(6, 0, -1):  # as many columns as there is room for
        legend = _legend(figure, handles, sweeps, most)
        if most == 1 or legend.get_window_extent(renderer).x1 <= figure.bbox.width:
            break
        legend.remove()
    # the axes give way to as many rows as there are
    bottom = legend.get_window_extent(renderer).y0 / figure.bbox.height
    left, base, width, _ = axes.get_position().bounds
    axes.set_position((left, base, width, bottom - 0.01 - base))


def _legend(figure: Any, handles: list[Any], sweeps: Sequence[Sweep], most: int) -> Any:
    """The legend in even rows of at most so many, and a row for which fill is which sweep."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    count = -(-len(handles) // most)
    columns = -(-len(handles) // count)
    rows = [handles[k * columns : (k + 1) * columns] for k in range(count)]
    if len(sweeps) > 1:
        dashes: list[Any] = ["-", ":", ":", ":"]
        grey = style.Look(INK, *style.SHAPES[0])
        rows.append(
            [
                Line2D([], [], linewidth=1.1, linestyle=dash, label=sweep.name, **marker(grey, fill[0]))
                for fill, dash, sweep in zip(style.FILLS, dashes, sweeps, strict=False)
            ]
        )
    blank = Patch(alpha=0, label=" ")
    columns = max(map(len, rows))
    grid = [row + [blank] * (columns - len(row)) for row in rows]
    return figure.legend(
        handles=[row[column] for column in range(columns) for row in grid],  # Matplotlib fills by column
        loc="upper left",
        bbox_to_anchor=(0.092, 0.995),
        ncol=columns,
        frameon=False,
        fontsize=7.8,
        handlelength=1.9,
        handletextpad=0.5,
        columnspacing=1.5,
        borderaxespad=0,
    )


def _footer(sweeps: Sequence[Sweep]) -> list[str]:
    """Lines: what bars are, where models that were not trained here were, which have no place and why."""
    models = [model for sweep in sweeps for model in sweep.models]
    sources = dict.fromkeys(model.published for model in models if model.published)
    words = [style.spread_text(sweeps)]
    words += [f"Not trained here but published with Holdall: {'; '.join(sources)}."] if sources else []
    missing = dict.fromkeys(model.label for model in models if "state_size" in model.broken)
    words += [f"Not drawn, as its state is not what it reports: {', '.join(missing)}."] if missing else []
    missing = dict.fromkeys(model.label for model in models if model.state_bytes and not model.state)
    unit = sweeps[0].axis.unit
    words += [f"Not drawn, as nothing counts its {unit}: {', '.join(missing)}."] if missing else []
    return [line for each in words for line in textwrap.wrap(each, 150)]


def _draw_footer(figure: Any, lines: Sequence[str]) -> None:
    for place, line in enumerate(reversed(lines)):
        y = (0.036 + FOOTER_LINE * place) / figure.get_figheight()
        figure.text(0.012, y, line, fontsize=6.3, color=MUTED, gid="footer")


def _draw_labels(axes: Any, sweeps: Sequence[Sweep], lines: Sequence[Any]) -> None:
    """Write each model's short label beside its point where it touches nothing; else leave it out.

    Tries places around the point, near before far. A place must be inside the axes and clear of points,
    spreads and labels, nearer to its own point than to any other, and cross no line; on the frontier, where
    a name matters most, it may cross one.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    halo = [withStroke(linewidth=1.8, foreground="white")]  # keeps a text legible on a line it must cross
    renderer = axes.figure.canvas.get_renderer()
    point = DPI / 72  # one typographic point in pixels
    inside = axes.get_window_extent(renderer).padded(-2 * point)
    paths = [line.get_transform().transform_path(line.get_path()) for line in lines]
    taken: list[Box] = [
        tuple(t.get_window_extent(renderer).padded(point).extents.tolist()) for t in axes.texts
    ]
    places: dict[Model, tuple[float, float]] = {}
    for sweep in sweeps:
        for model in (m for m in (*sweep.models, *sweep.by_hand) if m.drawn):
            x, y = axes.transData.transform((model.state, model.accuracy)).tolist()
            _, bottom = axes.transData.transform((model.state, model.low)).tolist()
            _, top = axes.transData.transform((model.state, model.high)).tolist()
            places[model] = (x, y)
            taken.append((x - 3.5 * point, bottom - 3.5 * point, x + 3.5 * point, top + 3.5 * point))

    # the frontier speaks first, then by state from left to right
    frontier = set(pareto(model for model in places if not model.by_hand))
    labels = style.short_labels(sweeps)
    for model in sorted(places, key=lambda m: (m not in frontier, m.state, -m.accuracy)):
        if not labels.get(model):
            continue
        text = axes.text(
            0,
            0,
            labels[model],
            transform=None,
            fontsize=6.8,
            color=darker(_colour_of(sweeps, model)),
            path_effects=halo,
            zorder=4,
            gid="label",
        )
        width, height = text.get_window_extent(renderer).size.tolist()
        options = []
        for order, (x, y) in enumerate(_around(*places[model], width, height, point)):
            box = (x - point, y - point / 2, x + width + point, y + height + point / 2)
            fits = inside.x0 <= box[0] and inside.y0 <= box[1] and box[2] <= inside.x1 and box[3] <= inside.y1
            if not fits or any(_overlap(box, other) for other in taken):
                continue
            if (
                min(places, key=lambda other: (_distance(box, places[other]), other is not model))
                is not model
            ):
                continue
            area = Bbox.from_extents(*box)
            crossings = sum(path.intersects_bbox(area, filled=False) for path in paths)
            if crossings <= (model in frontier):
                options.append((crossings, order, (x, y), box))
        if not options:
            text.remove()
            continue
        _, _, (x, y), box = min(options)
        text.set_position((x, y))
        taken.append(box)


def _colour_of(sweeps: Sequence[Sweep], model: Model) -> str:
    if model.by_hand:
        return style.by_hand_colour(sweeps, model.family) or INK
    return style.look(families(sweeps).index(model.family)).colour


def _around(x: float, y: float, width: float, height: float, point: float) -> Iterable[tuple[float, float]]:
    """Lower left corners, in pixels, for a text of this size around (x, y), in order of preference."""
    for gap in (5 * point, 8 * point, 11 * point):
        slant = 0.6 * gap
        yield x - width / 2, y + gap - point
        yield x + gap, y - height / 2
        yield x - width / 2, y - gap + point - height
        yield x - gap - width, y - height / 2
        yield x + slant, y + slant
        yield x - slant - width, y + slant
        yield x + slant, y - slant - height
        yield x - slant - width, y - slant - height


def _distance(box: Box, point: tuple[float, float]) -> float:
    """From a point to the nearest place of a box."""
    x, y = point
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
