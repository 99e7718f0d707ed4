"""The strip of learning rates under a frontier, and what pictures say of the spread over seeds."""

import json
import re

import pytest

from holdall.report import figure, page, strip, style, table
from holdall.report.data import families, load
from holdall.report.paper import PALE

RATES = (0.001, 0.004, 0.016)


def panels(drawn):
    """The panels of the strip by family."""
    return {axes.get_gid().removeprefix("rates:"): axes for axes in drawn.axes[1:]}


def points(axes, gid):
    """The (rate, accuracy) pairs of each artist."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_gid() == gid]


@pytest.fixture
def seeds(make_sweep, line):
    """Two seeds of a Taylor model that prefer different rates; an attention that diverges at the last."""
    table = {0: (0.2, 0.6, 0.4), 1: (0.7, 0.5, None)}
    lines = [
        line("Taylor, f = 4", 1024, share, seed=seed, learning_rate=rate)
        for seed, shares in table.items()
        for rate, share in zip(RATES, shares, strict=True)
    ]
    shares = zip(RATES, (0.9, 1.0, None), strict=True)
    lines += [line("attention", 4096, share, learning_rate=rate) for rate, share in shares]
    return load([make_sweep("seeds", lines)])


def test_a_line_holds_each_rate_and_marks_stand_at_those_that_count(seeds):
    found = panels(figure.draw(seeds))
    assert list(found) == ["Taylor", "attention"]
    taylor = found["Taylor"]
    (curve,) = points(taylor, "rate")
    assert curve == [(0.001, pytest.approx(0.45)), (0.004, pytest.approx(0.55)), (0.016, pytest.approx(0.4))]
    assert points(taylor, "chosen") == [curve[:2]]
    assert points(taylor, "spread") == [[(0.001, 0.2), (0.001, 0.7)], [(0.004, 0.5), (0.004, 0.6)]]
    assert points(taylor, "diverged") == [[(0.016, 0.0)]]
    attention = found["attention"]
    assert points(attention, "rate") == [[(0.001, 0.9), (0.004, 1.0)]]
    assert points(attention, "chosen") == [[(0.004, 1.0)]]
    assert points(attention, "diverged") == [[(0.016, 0.0)]]


def test_a_mark_is_as_high_as_the_point_above(sweep):
    sweeps = load([sweep])
    drawn = figure.draw(sweeps)
    for family, axes in panels(drawn).items():
        (above,) = (line for line in drawn.axes[0].lines if line.get_gid() == f"family:{family}")
        marks = [line for line in axes.lines if line.get_gid() == "chosen"]
        assert sorted(y for mark in marks for y in mark.get_ydata()) == sorted(above.get_ydata())
        for mark in marks:
            assert (mark.get_color(), mark.get_marker()) == (above.get_color(), above.get_marker())
    assert sum(len(points(axes, "rate")) for axes in panels(drawn).values()) == 10


def test_with_one_rate_there_is_no_strip(make_sweep, line):
    lines = [line("a", 1024, 0.5, seed=seed) for seed in (0, 1)] + [line("b", 2048, 0.6, learning_rate=0.1)]
    lines += [line("never drawn", 0, share, learning_rate=share) for share in (0.1, 0.2)]
    sweeps = load([make_sweep("s", lines)])
    drawn = figure.draw(sweeps)
    assert len(drawn.axes) == 1
    assert strip.height(sweeps) == 0
    assert tuple(drawn.get_size_inches()) == figure.SIZE


def test_published_models_are_pale_and_a_second_sweep_is_dotted(make_sweep, line):
    source = {"commit": "abcdef", "hardware": "H200"}
    first = [line("a", 1024, rate * 50, learning_rate=rate, published=source) for rate in RATES]
    second = [line("a", 1024, rate * 40, learning_rate=rate) for rate in RATES]
    folders = [make_sweep("one", first), make_sweep("two", second)]
    (axes,) = panels(figure.draw(load(folders))).values()
    curves = [artist for artist in axes.lines if artist.get_gid() == "rate"]
    marks = [artist for artist in axes.lines if artist.get_gid() == "chosen"]
    assert [curve.get_linestyle() for curve in curves] == ["-", ":"]
    assert [mark.get_alpha() for mark in marks] == [PALE, 1.0]
    assert [mark.get_fillstyle() for mark in marks] == ["full", "none"]


@pytest.mark.parametrize("count", [1, 6, 11, 12, 17, 30])
def test_texts_lie_within_the_figure_and_apart(make_sweep, line, count):
    names = ("attention", "sliding window", "gated recurrence", "kimi-delta-attention", "Gated DeltaNet")
    lines = [
        line(
            f"{names[k % 5]} {k}",
            1000 + 77 * k,
            share if share is None else share + k / 100,
            learning_rate=rate,
            family=f"{names[k % 5]} {k}",
        )
        for k in range(count)
        for rate, share in ((0.001, 0.2), (0.01, 0.4), (0.0316, None))
    ]
    sweeps = load([make_sweep("s", lines)])
    drawn = figure.draw(sweeps)
    drawn.canvas.draw()  # which places the names of axes
    found = panels(drawn)
    assert list(found) == families(sweeps)
    renderer, whole = drawn.canvas.get_renderer(), drawn.bbox
    main = drawn.axes[0]
    texts = [main.xaxis.label, *(text for text in drawn.texts if text.get_text())]
    for axes in found.values():
        texts += [axes.title, *(label for label in axes.get_xticklabels() if label.get_text())]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for k, box in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, texts[k]
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, texts[k]
        for other, text in zip(boxes[:k], texts[:k], strict=True):
            assert not box.overlaps(other), (texts[k], text)
    frames = [axes.get_window_extent(renderer) for axes in found.values()]
    for k, frame in enumerate(frames):
        assert frame.y1 < main.xaxis.label.get_window_extent(renderer).y0
        assert not any(frame.overlaps(other) for other in frames[:k])
        assert not any(frame.overlaps(box) for box in boxes)


@pytest.mark.parametrize(
    ("seeds_of", "command", "says"),
    [
        ((1, 1), "holdall frontier quick", "1 seed: no spread known; --seeds 3 adds two."),
        ((1, 1), "holdall bits runs/quick", "1 seed: no spread known."),
        ((1, 1), "holdall frontier my.py --out runs/a", "1 seed: no spread known."),
        ((3, 3), "holdall frontier quick", "3 seeds: each point is their mean, its bar reaches from"),
        ((2, 3), "holdall frontier quick", "2 to 3 seeds: a point is their mean, its bar reaches from"),
        ((1, 3), "holdall frontier quick", "1 to 3 seeds: a point is their mean, "),
    ],
)
def test_pictures_say_what_their_spread_is(make_sweep, line, seeds_of, command, says):
    lines = [
        line(name, 1024, 0.5 + 0.1 * seed, seed=seed)
        for name, count in zip("ab", seeds_of, strict=True)
        for seed in range(count)
    ]
    sweeps = load([make_sweep("s", lines, command=command)])
    assert style.spread_text(sweeps).startswith(says)
    assert ("of a model with one seed no spread" in style.spread_text(sweeps)) == (seeds_of == (1, 3))
    (footer,) = (text.get_text() for text in figure.draw(sweeps).texts if text.get_gid() == "footer")
    assert footer == style.spread_text(sweeps)


@pytest.mark.parametrize("takes_seeds", [True, False])
def test_more_seeds_are_advised_where_the_recipe_takes_them(make_sweep, line, takes_seeds):
    folder = make_sweep("s", [line("a", 64, 0.5)], command="holdall frontier my.py", takes_seeds=takes_seeds)
    assert ("--seeds" in style.spread_text(load([folder]))) == takes_seeds


def test_a_mean_says_that_a_seed_diverged(make_sweep, line):
    lines = [
        line("a", 1024, accuracy, seed=seed, learning_rate=rate)
        for rate in (0.001, 0.01)
        for seed, accuracy in enumerate((0.4, 0.6, None))
    ]
    lines += [line("b", 2048, None, seed=seed) for seed in range(2)]
    lines += [line("c", 4096, accuracy, seed=seed) for seed, accuracy in enumerate((0.5, None))]
    sweeps = load([make_sweep("s", lines)])
    rendered = page.render(sweeps)
    marks = json.loads(re.search(r'id="data">(.*?)</script>', rendered)[1])["marks"]
    says = {mark["title"]: dict(map(tuple, mark["detail"])) for mark in reversed(marks)}  # models come first
    assert says["a"]["3 seeds"] == "1 diverged; mean of the other 2 50.00%, from 40.00% to 60.00%"
    assert says["b"]["2 seeds"] == "all diverged"
    assert says["c"]["2 seeds"] == "1 diverged; 50.00% is that of the other"
    assert "a at 0.001: 50.0%, 40.0% to 60.0% (1 of 3 seeds diverged)" in rendered
    assert (
        "1 of 3 seeds of a (width 64) diverged at every learning rate; its accuracy is that of the others."
        in (rendered)
    )
    assert "a point is the mean of those that converged" in style.spread_text(sweeps)
    assert "a point is the mean of those that converged" in table.render(sweeps)


def test_a_seed_that_diverged_is_a_seed(make_sweep, line):
    lines = [line("a", 1024, 0.5, seed=0), line("a", 1024, None, seed=1)]
    (model,) = load([make_sweep("s", lines)])[0].models
    assert model.seeds == 2
    assert len(model.best) == 1
