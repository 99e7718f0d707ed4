"""Set disjointness by the order of its sets: which segments a panel is of, its points, and its floors."""

import json
import math

import pytest

from holdall.report import orders, write
from holdall.report.data import load
from holdall.tasks.information import best_accuracy

SIZES = ((4, 16), (4, 64), (16, 4), (64, 4))
SYMBOLS = {(4, 16): 4, (4, 64): 3, (16, 4): 16, (64, 4): 40}


def accuracies(short: float, first_long: float, second_long: float) -> dict[str, float]:
    return {"4": short, "16": first_long, "64": second_long}


@pytest.fixture
def sets(make_sweep, line):
    """Two families of two states each, at two rates and two seeds."""
    lines = []
    for family, mixer in (("causal", "taylor"), ("whole", "prefix-linear-attention")):
        for state, share in ((1024, 0.5), (8192, 0.8)):
            for rate in (0.001, 0.01):
                for seed in (0, 1):
                    long = share if family == "whole" else share - 0.2
                    short = share - 0.1 * seed - (0.05 if rate == 0.01 else 0)
                    # of the long sets the higher rate is the better one
                    off = (0.1, -0.1) if rate == 0.01 else (0.0, -0.2)
                    lines.append(
                        line(
                            f"{family}, f = {state}", state, short, family=family, mixer=mixer, seed=seed,
                            learning_rate=rate,
                            accuracy_by_difficulty=accuracies(short, long + off[0], long + off[1]),
                        )
                    )  # fmt: skip
    test = [
        {
            "vocab": 256, "length": first + second + 3, "rows": 300, "difficulty": first, "values": second,
            "questions": SYMBOLS[first, second], "distinct": False, "first": first, "second": second,
        }
        for first, second in SIZES
    ]  # fmt: skip
    return make_sweep("sets", lines, test=test, difficulty="tokens of the first set", context_len=71)


def points(axes, family):
    (found,) = [each for each in axes.lines if each.get_gid() == f"family:{family}"]
    return dict(zip(*(values.tolist() for values in found.get_data()), strict=True))


def test_each_panel_is_of_its_own_segments_at_their_own_best_rate(sets):
    (sweep,) = load([sets])
    short, long = orders.orders(sweep)
    assert [segment.sets for segment in short.segments] == [(4, 16), (4, 64)]
    assert [segment.sets for segment in long.segments] == [(16, 4), (64, 4)]
    first, second, difference = orders.draw(sweep).axes
    assert points(first, "causal") == pytest.approx({1024: 0.5, 8192: 0.8})  # seed 0 at the lower rate
    assert points(first, "whole") == pytest.approx({1024: 0.5, 8192: 0.8})
    assert points(second, "causal") == pytest.approx({1024: 0.3, 8192: 0.6})  # the higher rate: +0.1 and -0.1
    assert points(second, "whole") == pytest.approx({1024: 0.5, 8192: 0.8})
    assert points(difference, "causal") == pytest.approx({1024: 0.2, 8192: 0.2})
    assert points(difference, "whole") == pytest.approx({1024: 0.0, 8192: 0.0}, abs=1e-12)
    spreads = [line.get_data()[1].tolist() for line in first.lines if line.get_gid() == "spread"]
    assert spreads == [pytest.approx([share - 0.1, share]) for share in (0.5, 0.8)] * 2


def test_each_panel_has_the_floor_of_its_order_and_the_second_that_of_the_first_too(sets):
    (sweep,) = load([sets])
    first, second, _ = orders.draw(sweep).axes

    def floors(axes, gid):
        return [line.get_data() for line in axes.lines if line.get_gid() == gid]

    ((state, best),) = floors(first, "floor")
    for x, y in zip(state[::40], best[::40], strict=True):
        mean = (best_accuracy(4, 16, 8 * x, False) + best_accuracy(3, 64, 8 * x, False)) / 2
        assert y == pytest.approx(mean, abs=1e-12)
    assert state[-1] == pytest.approx(max(4 * 4, 3 * 6) / 8)
    ((state, best),) = floors(second, "floor")
    assert state[-1] == pytest.approx(max(16 * 2, 40 * 2) / 8)
    assert not floors(first, "other floor")
    ((other, _),) = floors(second, "other floor")
    assert other[-1] == pytest.approx(18 / 8)
    assert best[len(best) // 2] < 1
    for axes in (first, second):  # the smaller floor, too, is in sight
        assert axes.get_xlim()[0] < 18 / 8 / 8


def test_sets_of_one_token_that_is_the_answer_have_no_floor(sets, make_sweep, line):
    config = json.loads((sets / "config.json").read_text())
    alone = {**config["test"][2], "values": 1, "second": 1, "length": 20}
    config["test"] = [*config["test"][:2], alone]
    lines = [line("x", 64, 0.9, accuracy_by_difficulty={"4": 0.9, "16": 0.9})]
    (sweep,) = load([make_sweep("alone", lines, **config)])
    first, second, _ = orders.draw(sweep).axes
    assert [bool([line for line in axes.lines if line.get_gid() == "floor"]) for axes in (first, second)] == [
        True, False
    ]  # fmt: skip


def test_a_model_that_diverged_or_was_not_tested_everywhere_has_no_point(sets, make_sweep, line):
    (sweep,) = load([sets])
    short, long = orders.orders(sweep)
    (model, *_) = sweep.models
    assert short.best(model) == pytest.approx((0.5, 0.4))
    partly = {"4": 0.9, "16": 0.9}
    runs = [line("x", 64, 0.9, accuracy_by_difficulty=partly), line("y", 64, None)]
    (partial,) = load([make_sweep("partial", runs, **json.loads((sets / "config.json").read_text()))])
    x, y = partial.models
    assert short.best(x) == (0.9, 0.9)
    assert long.best(x) is None
    assert short.best(y) is None
    assert len(orders.draw(partial).axes) == 3
    assert math.isnan(long.accuracy(x.runs[0]))


def test_only_a_sweep_of_two_orders_gets_the_picture(sets, sweep, tmp_path):
    names = {path.name for path in write([sets], tmp_path / "sets")}
    assert names == {"frontier.png", "frontier.html", "table.md", "orders.png"}
    assert (tmp_path / "sets" / "orders.png").stat().st_size > 10_000
    assert "orders.png" not in {path.name for path in write([sweep], tmp_path / "other")}


def test_texts_lie_within_the_figure_and_apart(sets):
    (sweep,) = load([sets])
    drawn = orders.draw(sweep)
    renderer = drawn.canvas.get_renderer()
    boxes = [drawn.legends[0].get_window_extent(renderer)]
    boxes += [text.get_window_extent(renderer) for text in drawn.texts if text.get_text()]
    boxes += [axes.title.get_window_extent(renderer) for axes in drawn.axes]
    for box in boxes:
        assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1
        assert drawn.bbox.y0 <= box.y0 < box.y1 <= drawn.bbox.y1
    for k, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:k])


def test_small_differences_have_ticks_that_differ(make_sweep, line):
    lines = [
        line("a", state, 0.5, accuracy_by_difficulty={"4": 0.5 + more, "16": 0.5})
        for state, more in ((1024, 0.012), (8192, -0.006))
    ]
    test = [
        {
            "vocab": 256, "length": 23, "rows": 300, "difficulty": first, "values": second,
            "questions": first, "distinct": False, "first": first, "second": second,
        }
        for first, second in ((4, 16), (16, 4))
    ]  # fmt: skip
    drawn = orders.draw(load([make_sweep("near", lines, test=test)])[0])
    drawn.draw_without_rendering()
    ticks = [tick.get_text() for tick in drawn.axes[2].get_yticklabels()]
    assert len(set(ticks)) == len(ticks)
