"""Accuracy against width: a panel per sweep, and right numbers in the artists."""

import pytest

from holdall.files import RunError
from holdall.report import widths, write, write_widths
from holdall.report.data import load_each


@pytest.fixture
def recipe(make_sweep, line, tmp_path):
    """Two lengths of a recipe: attention solves both, a convolution the longer one with more width only."""
    for length, needed in ((32, 64), (16, 32)):
        lines = []
        for width in (16, 32, 64):
            for seed in (0, 1):
                solved = 1.0 if width >= needed else 0.3 + 0.1 * seed
                lines.append(line("attention", 100 * width, 0.99, width=width, seed=seed))
                lines.append(line("BaseConv", 10 * width, solved, width=width, seed=seed))
        make_sweep(f"recipe-N{length}", lines, context_len=length)
    return [tmp_path / "recipe-N32", tmp_path / "recipe-N16"]


def lines_of(axes, gid):
    return [line for line in axes.lines if line.get_gid() == gid]


def test_panels_go_from_short_to_long_and_hold_each_family_at_each_width(recipe):
    drawn = widths.draw(load_each(recipe))
    assert [axes.get_title().partition(",")[0] for axes in drawn.axes] == ["N = 16", "N = 32"]
    for axes, conv in zip(drawn.axes, ([0.35, 1.0, 1.0], [0.35, 0.35, 1.0]), strict=True):
        (attention,), (base_conv,) = (lines_of(axes, f"family:{name}") for name in ("attention", "BaseConv"))
        assert list(attention.get_xdata()) == list(base_conv.get_xdata()) == [16, 32, 64]
        assert list(attention.get_ydata()) == pytest.approx([0.99] * 3)
        assert list(base_conv.get_ydata()) == pytest.approx(conv)
        assert attention.get_color() != base_conv.get_color()
        spread = [artist for artist in axes.collections if artist.get_gid() == "spread"]
        assert len(spread) == 1  # of the seeds that differ
    assert {text.get_text() for text in drawn.legends[0].get_texts()} == {"attention", "BaseConv"}
    (spread,) = (text.get_text() for text in drawn.texts if text.get_gid() == "spread text")
    assert spread == "2 seeds: each point is their mean, its bar reaches from the lowest to the highest."


def test_texts_lie_within_the_figure_and_apart(recipe):
    drawn = widths.draw(load_each(recipe))
    renderer = drawn.canvas.get_renderer()
    whole = drawn.bbox
    boxes = [drawn.legends[0].get_window_extent(renderer)]
    boxes += [text.get_window_extent(renderer) for text in drawn.texts if text.get_text()]
    boxes += [axes.title.get_window_extent(renderer) for axes in drawn.axes]
    for box in boxes:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    for k, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:k])


def test_a_folder_of_sweeps_is_drawn_as_panels(recipe, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for folder in recipe:
        folder.rename(whole / folder.name)
    (path,) = write([whole], tmp_path / "shown")
    assert path == tmp_path / "shown" / "widths.png"
    assert path.stat().st_size > 10_000


def test_one_width_needs_no_panels(sweep, tmp_path):
    assert write_widths([sweep], tmp_path) == []


def test_a_folder_without_sweeps_is_named(tmp_path):
    with pytest.raises(RunError, match="holds no config"):
        write([tmp_path], tmp_path)
