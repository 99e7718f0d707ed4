"""The figure for papers: right numbers in the artists, and texts that touch nothing."""

import json
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from holdall import files, mixers, report
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.recipes import quick
from holdall.report import chart, figure, floor, style
from holdall.report.data import NOT_CAUSAL, families, load, pareto
from holdall.report.table import render
from holdall.sweeps.config import Point
from holdall.sweeps.result import measure
from holdall.tasks.information import answer_bits, best_accuracy


def artists(drawn, gid):
    return [artist for artist in drawn.axes[0].get_children() if artist.get_gid() == gid]


def results(folder):
    return files.read_lines(folder / "results.jsonl")


def boxes(drawn, gid):
    renderer = drawn.canvas.get_renderer()
    return [(artist, artist.get_window_extent(renderer)) for artist in artists(drawn, gid)]


def text_of(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG, whose checksums are checked on the way."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    texts, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", png, at + 8 + length)[0]
        if kind == b"tEXt":
            key, _, value = body.partition(b"\0")
            texts[key.decode()] = value.decode("latin-1")
        at += 12 + length
    assert kind == b"IEND"
    return texts


@pytest.fixture
def crowd(make_sweep, line):
    """Eighty models of many families on a small part of the plane, three seeds each: a fight for room."""
    lines = []
    for k in range(80):
        state, accuracy = 2000 + 977 * k % 30_000, 0.2 + 0.6 * ((k * 37) % 80) / 80
        for seed in (0, 1, 2):
            label = f"family {k % 17}, size = {k}"
            lines.append(line(label, state, accuracy + 0.01 * seed, width=64 * (1 + k % 2), seed=seed))
    return make_sweep("crowd", lines)


def test_png_has_the_size_of_a_paper_column_and_says_what_made_it(sweep, tmp_path):
    figure.save(load([sweep]), tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    texts = text_of(png)
    width, height = struct.unpack_from(">II", png, 16)
    assert width == 1400
    assert 1050 < height < 1200  # with the strip of learning rates
    assert texts["Description"] == "holdall frontier quick --out runs/sweep"


def test_a_notebook_shows_a_picture_as_it_was_drawn(sweep, tmp_path):
    drawn = figure.draw(load([sweep]))
    shown = drawn._repr_png_()
    text_of(shown)  # checks every chunk
    assert struct.unpack_from(">II", shown, 16) == tuple(round(size) for size in drawn.bbox.size)


def test_every_picture_is_one_that_a_notebook_shows():
    for path in Path(report.__file__).parent.glob("*.py"):
        assert ("Figure(" in path.read_text().replace("(Figure)", "")) is False, path.name


def test_every_family_is_drawn_where_its_models_are(sweep):
    sweeps = load([sweep])
    drawn = figure.draw(sweeps)
    looks = set()
    for family in families(sweeps):
        (points,) = artists(drawn, f"family:{family}")
        members = sorted((m.state_bytes, m.accuracy) for m in sweeps[0].models if m.family == family)
        assert list(zip(*points.get_data(), strict=True)) == members
        looks.add((points.get_color(), points.get_marker()))
    assert len(looks) == len(families(sweeps)) == 6
    named = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert set(families(sweeps)) < named


def test_looks_differ_for_as_many_families_as_anyone_has():
    looks = {(style.look(k).colour, style.look(k).marker) for k in range(84)}
    assert len(looks) == 84


def test_floor_is_the_best_accuracy_of_any_model(sweep):
    (line,) = artists(figure.draw(load([sweep])), "floor")
    state, accuracy = line.get_data()
    for count, height in list(zip(state, accuracy, strict=True))[::20]:
        best = [best_accuracy(pairs, 256, 8 * count) for pairs in (4, 16)]
        assert height == pytest.approx(sum(best) / 2, abs=1e-9)
    # sixteen values of eight bits, drawn without replacement, need a little less than sixteen bytes
    assert state[-1] == answer_bits(16, 256) / 8
    assert 15.8 < state[-1] < 16
    assert accuracy[-1] == pytest.approx(1)
    assert accuracy[-2] < 1


def test_axis_shows_floor_and_models_honestly(sweep):
    axes = figure.draw(load([sweep])).axes[0]
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log"
    assert low < 16 < 40_292 < high
    assert axes.get_ylim()[0] == 0
    labels = {tick: axes.xaxis.get_major_formatter()(tick) for tick in axes.get_xticks()}
    assert labels[16] == "16 B"
    assert labels[4096] == "4 KiB"


@pytest.mark.parametrize(
    ("axis", "times", "bits", "four_thousand", "below"),
    [
        ("bits", 8, 1, "4 Kibit", "Bits of state per sequence"),
        ("elements", 0.25, 64, "4,096", "Elements of state per sequence"),
    ],
)
def test_state_can_be_counted_in_bits_and_in_elements(
    sweep, make_sweep, axis, times, bits, four_thousand, below, tmp_path
):
    lines = [{**each, "state_elements": each["state_bytes"] // 4} for each in results(sweep)]
    sweeps = load([make_sweep("sweep", lines)], axis)
    drawn = figure.draw(sweeps)
    axes = drawn.axes[0]
    (points,) = artists(drawn, "family:attention")
    assert points.get_data()[0] == [times * 33_024]
    (line,) = artists(drawn, "floor")
    assert line.get_data()[0][-1] == pytest.approx(answer_bits(16, 256) / bits)  # no unit holds more
    count, height = (values[100] for values in line.get_data())
    best = [best_accuracy(pairs, 256, bits * count) for pairs in (4, 16)]
    assert height == pytest.approx(sum(best) / 2, abs=1e-9)
    (steps,) = artists(drawn, "pareto")
    assert list(steps.get_data()[0])[:-1] == [times * m.state_bytes for m in pareto(sweeps[0].models)]
    assert axes.xaxis.get_major_formatter()(4096) == four_thousand
    assert axes.get_xlabel().startswith(below)
    assert f"best for its {axis}" in [text.get_text() for text in drawn.legends[0].get_texts()]
    layout, marks = chart.layout(sweeps), chart.Marks()
    traces = chart.traces(sweeps, marks)
    (attention,) = [t for t in traces if t.get("name") == "attention" and t.get("meta") == "models"]
    assert attention["x"] == [times * 33_024]
    assert layout["xaxis"]["title"]["text"].startswith(below)
    report.write([tmp_path / "sweep"], tmp_path / "out", axis)
    assert f"from how many {axis} of state?" in (tmp_path / "out" / "frontier.html").read_text()


def test_a_folder_says_what_its_picture_counts(sweep, make_sweep):
    lines = results(sweep)
    folder = make_sweep("sweep", lines, axis="bits")
    assert load([folder])[0].axis.unit == "bits"
    assert load([folder], "bytes")[0].axis.unit == "bytes"
    why = "no line of .* counts elements, and config.json does not hold the model; its `holdall frontier`"
    with pytest.raises(RunError, match=why):
        load([folder], "elements")
    damaged = make_sweep("damaged", lines, axis="acres")
    with pytest.raises(RunError, match=r"config.json is damaged: its axis is 'acres'"):
        load([damaged])


@pytest.mark.quick
def test_elements_that_lines_do_not_count_are_those_of_the_models(make_sweep, line, tmp_path):
    """Lines of before hold bytes alone. A model that is another one now has no place, and is named."""
    mixers = {"attention": AttentionConfig(width=8), "ELU + 1": LinearAttentionConfig(width=8, feature_dim=4)}
    task = quick.data(pairs=(4, 16), vocab=512)
    points = [quick.point(name, name, mixer, task=task).to_dict() for name, mixer in mixers.items()]
    sizes = {
        name: measure(Point.from_dict(p).train.model, 96) for name, p in zip(mixers, points, strict=True)
    }
    lines = [line(name, sizes[name][0], 0.5, width=8) for name in mixers]
    lines += [line("gone", 2048, 0.6, width=8), line("changed", 64, 0.7, width=8)]
    changed = {**points[0], "label": "changed"}
    gone = json.loads(json.dumps({**points[0], "label": "gone"}))
    gone["train"]["model"]["layers"][-1]["name"] = "gone-mixer"
    folder = make_sweep("old", lines, points=[*points, gone, changed], context_len=96)
    (sweep,) = load([folder], "elements")
    assert [model.state for model in sweep.models] == [sizes[name][1] for name in mixers] + [0, 0]
    assert [model.drawn for model in sweep.models] == [True, True, False, False]
    gone, changed = sweep.notes
    assert re.match(
        r"gone \(width 8\) has no place on an axis of elements: .*cannot be built.*gone-mixer", gone
    )
    carries = f"the model carries {sizes['attention'][0]:,} bytes in this version, not 64."
    assert changed.startswith("changed (width 8) has no place on an axis of elements")
    assert changed.endswith(carries)
    footer = [text.get_text() for text in figure.draw([sweep]).texts if text.get_gid() == "footer"]
    assert "Not drawn, as nothing counts its elements: gone, changed." in footer
    assert all(model.drawn for model in load([folder])[0].models)


@pytest.mark.parametrize("name", ["quick", "zoo"])
def test_published_lines_have_a_place_on_an_axis_of_elements(name):
    (sweep,) = load([Path(__file__).parents[2] / "results" / name], "elements")
    assert all(model.drawn for model in sweep.models)
    for model in sweep.models:
        assert model.state_bytes / 8 <= model.state <= model.state_bytes  # of 1 to 8 bytes each


def test_staircase_is_the_frontier(sweep):
    sweeps = load([sweep])
    drawn = figure.draw(sweeps)
    (steps,) = artists(drawn, "pareto")
    frontier = [(m.state_bytes, m.accuracy) for m in pareto(sweeps[0].models)]
    assert steps.get_drawstyle() == "steps-post"
    assert list(zip(*steps.get_data(), strict=True)) == [
        *frontier,
        (drawn.axes[0].get_xlim()[1], frontier[-1][1]),
    ]


def test_spread_of_seeds_is_a_whisker(make_sweep, line):
    lines = [line("a", 1024, 0.4, seed=0), line("a", 1024, 0.6, seed=1), line("b", 2048, 0.7)]
    drawn = figure.draw(load([make_sweep("s", lines)]))
    (whisker,) = artists(drawn, "spread")
    assert [list(part) for part in whisker.get_data()] == [[1024, 1024], [0.4, 0.6]]
    (point,) = artists(drawn, "family:a")
    assert list(point.get_ydata()) == [0.5]


@pytest.mark.parametrize("chosen", ["sweep", "crowd"])
def test_texts_touch_nothing_and_stay_inside(chosen, request):
    sweeps = load([request.getfixturevalue(chosen)])
    drawn = figure.draw(sweeps)
    axes, renderer = drawn.axes[0], drawn.canvas.get_renderer()
    texts = [pair for gid in ("label", "floor label", "gap label") for pair in boxes(drawn, gid)]
    assert len(boxes(drawn, "label")) >= 7
    inside = axes.get_window_extent(renderer)
    for k, (text, box) in enumerate(texts):
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 < box.y1 <= inside.y1, text
        for other, other_box in texts[:k]:
            assert not box.overlaps(other_box), (text, other)
        for model in (m for m in sweeps[0].models if m.drawn):
            for height in (model.low, model.accuracy, model.high):
                x, y = axes.transData.transform((model.state_bytes, height))
                assert not box.padded(3).contains(x, y), (text, model.label)
    lines = [part for part in axes.lines if part.get_linestyle() != "None" and part.get_gid() != "spread"]
    paths = [part.get_transform().transform_path(part.get_path()) for part in lines]
    for text, box in boxes(drawn, "label"):
        assert sum(path.intersects_bbox(box, filled=False) for path in paths) <= 1, text
    legend, page = drawn.legends[0].get_window_extent(renderer), drawn.bbox
    assert legend.y0 > inside.y1
    for box in (legend, axes.get_tightbbox(renderer)):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1


def test_labels_say_what_the_legend_does_not(sweep, make_sweep, line):
    texts = sorted(text.get_text() for text in artists(figure.draw(load([sweep])), "label"))
    assert texts == ["N = 16", "N = 4", "f = 16", "f = 4", "w = 16", "w = 4", "w = 8"]
    wide = [line("a, f = 2", 64 * w, w / 300, width=w) for w in (64, 128)] + [
        line("c$x$", 512, 0.9, family="d")
    ]
    labels = artists(figure.draw(load([make_sweep("w", wide)])), "label")
    assert not any(text.get_parse_math() for text in labels)
    texts = sorted(text.get_text() for text in labels)
    assert texts == ["c$x$", "f = 2, d = 128", "f = 2, d = 64"]


def test_overlaid_sweeps_are_filled_and_open(sweep, make_sweep, line):
    second = make_sweep("second", [line("Taylor, f = 4", 4412, 0.6), line("GLA", 3000, 0.5)], recipe="again")
    drawn = figure.draw(load([sweep, second]))
    first, other = artists(drawn, "family:Taylor")
    assert (first.get_fillstyle(), other.get_fillstyle()) == ("full", "none")
    assert first.get_color() == other.get_color()
    named = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert {"quick", "again", "GLA"} < set(named)


def test_guessing_is_drawn_where_it_can_be_seen(make_sweep, line):
    lines = [line("a", 64, 0.5)]
    assert not artists(figure.draw(load([make_sweep("many", lines)])), "chance")
    few = [{"vocab": 16, "length": 16, "pairs": 2, "rows": 100}]
    (chance,) = artists(figure.draw(load([make_sweep("few", lines, test=few)])), "chance")
    assert list(chance.get_ydata()) == [1 / 8, 1 / 8]


def test_nothing_to_draw_is_still_a_figure(make_sweep, line, tmp_path):
    sweeps = load([make_sweep("s", [line("a", 64, None)])])
    figure.save(sweeps, tmp_path / "empty.png")
    drawn = figure.draw(sweeps)
    assert artists(drawn, "floor")
    assert not artists(drawn, "pareto")


def test_importing_the_room_is_light():
    program = "import sys, holdall.report; print([m for m in ('matplotlib', 'plotly') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("together", [True, False])
def test_a_line_joins_one_mixers_models_and_never_several_mixers(make_sweep, line, together):
    sizes = (2000, 4000, 8000)
    mixers = ["taylor"] * 3 if together else ["gla", "retnet", "linear-attention"]
    lines = [
        line(f"{name}, {size}" if together else name, size, 0.5, family="linear attention", mixer=name)
        for name, size in zip(mixers, sizes, strict=True)
    ]
    sweeps = load([make_sweep("several", lines)])
    joined = [drawn for drawn in figure.draw(sweeps).axes[0].lines if list(drawn.get_xdata()) == list(sizes)]
    assert [drawn.get_linestyle() for drawn in joined if drawn.get_linestyle() != "None"] == ["-"] * together
    # where a family is several mixers the legend's name says nothing of any one, not even of its namesake
    if not together:
        assert set(style.short_labels(sweeps).values()) == set(mixers)


def test_the_legend_stays_within_the_picture(make_sweep, line):
    """However long names are; six columns are the most."""
    for name in (
        "A",
        "sliding window",
        "a family whose name is long",
        "a family with a name as long as a sentence",
    ):
        lines = [line(f"{name} {k}, size = 1", 2000 * (k + 1), 0.1 * k, width=64) for k in range(9)]
        drawn = figure.draw(load([make_sweep(f"legend {len(name)}", lines)]))
        (legend,) = drawn.legends
        drawn.canvas.draw()  # which is when texts get their places
        assert max(text.get_window_extent().x1 for text in legend.get_texts()) <= drawn.bbox.width, name


def test_the_floor_says_for_which_models_it_holds(make_sweep, line):
    causal = line("a", 1024, 0.9)
    free = line("b", 512, 0.95, layers=["base-conv", "prefix-linear-attention"])
    for lines, all_causal in (
        ([causal], True),
        ([causal, free], False),
        ([causal, {**free, "causal": True}], True),
    ):
        sweeps = load([make_sweep("s", lines)])
        drawn = figure.draw(sweeps)
        texts = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert ("below the floor" in texts) == all_causal
        assert ("below the floor of causal models" in texts) != all_causal
        (label,) = [text.get_text() for text in drawn.axes[0].texts if text.get_gid() == "floor label"]
        assert ("for\ncausal models" in label) != all_causal
        (name,) = [
            each["name"]
            for each in chart.traces(sweeps, chart.Marks())
            if "information" in each.get("name", "")
        ]
        assert name.endswith("of causal models") != all_causal
        found = floor.gap(sweeps[0].questions, sweeps[0].models)
        assert found is not None
        assert found[0].label == ("b" if len(lines) == 2 and all_causal else "a")
        notes = [note for note in sweeps[0].notes if "not causal" in note]
        assert [note.endswith("not causal: b.") for note in notes] == [True] * (not all_causal)
        assert ("Not causal" in render(sweeps)) != all_causal


def test_old_lines_are_judged_by_the_mixers_that_are_not_causal():
    assert {name for name in mixers.names() if not mixers.entry(name).causal} == NOT_CAUSAL
