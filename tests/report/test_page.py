"""The page: what it holds as text, and what a reader's browser makes of it, offline."""

import json
import re

import pytest

from holdall.report import write
from holdall.report.data import load
from holdall.report.page import render

ATTACK = """<img src=x onerror="document.title = 'attacked'">"""


@pytest.fixture
def nasty(make_sweep, line):
    lines = [line(ATTACK + ", </script>{{data}}", 2048, 0.5, family=ATTACK, options={ATTACK: ATTACK})]
    lines += [line("b &amp; c", 4096, 0.7, more=ATTACK), line("d", 1024, None)]
    return make_sweep("nasty", lines, recipe=ATTACK, command=ATTACK)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def test_page_names_everything_that_was_recorded(sweep):
    page = render(load([sweep]))
    assert "holdall frontier quick --out runs/sweep" in page
    assert "1,000 rows of 64 tokens with 16 pairs; each answer is one of 256 values" in page
    assert "<dt>device</dt><dd>cpu, 2 threads</dd>" in page
    assert not re.search(r"\{\{\w+\}\}", page.replace(re.search(r"<script>.*?</script>", page, re.S)[0], ""))
    first = dict(data_of(page)["marks"][0]["detail"])
    written = json.loads((sweep / "results.jsonl").read_text().splitlines()[0])
    assert list(first) == [key.replace("_", " ") for key in written]
    assert first["accuracy by difficulty"] == "4 = 1, 16 = 0.95"


def test_page_says_what_was_asked_and_how_hard_it_was(make_sweep, line):
    test = [{"vocab": 10, "length": 20, "difficulty": 20, "rows": 9, "values": 4, "questions": 1}]
    runs = [line("a", 64, 0.5, difficulty="tokens", accuracy_by_difficulty={"20": 0.5})]
    page = render(load([make_sweep("s", runs, test=test, task="induction <heads>", difficulty="tokens")]))
    said = "is induction &lt;heads&gt;. Accuracy is the share of right answers, 20 tokens."
    assert f"<strong>The task</strong> {said}" in page
    assert "<li>9 rows of 20 tokens; each answer is one of 4 values</li>" in page
    assert '<button type="button">20 tokens</button>' in page
    assert "MQAR" not in page


def test_page_tells_of_diverged_models_and_torn_lines(make_sweep, line):
    runs = [line("a", 64, 0.5), line("b", 64, None)]
    page = render(load([make_sweep("s", runs, tail='{"label')]))
    assert "b (width 64) diverged at every learning rate." in page
    assert "it is torn" in page
    assert page.count(">diverged</td>") == 1


def test_seeds_share_a_point_and_keep_their_rows(make_sweep, line):
    runs = [line("a", 64, accuracy, seed=seed) for seed, accuracy in enumerate((0.4, 0.6, 0.8))]
    page = render(load([make_sweep("s", runs)]))
    content = data_of(page)
    (trace,) = [trace for trace in content["traces"] if trace.get("meta") == "models"]
    assert trace["y"] == [pytest.approx(0.6)]
    assert trace["error_y"]["array"] == pytest.approx([0.2])
    assert trace["error_y"]["arrayminus"] == pytest.approx([0.2])
    assert page.count('<tr data-mark="0">') == 3
    detail = dict(content["marks"][0]["detail"])
    assert detail["3 seeds"] == "mean 60.00%, from 40.00% to 80.00%"
    assert detail["seed"] == "0 | 1 | 2"


def test_no_text_is_read_as_markup(nasty):
    page = render(load([nasty]))
    assert "<img" not in page.split("</style>")[1].replace(
        re.search(r"<script>.*?</script>", page, re.S)[0], ""
    )
    assert data_of(page)["marks"][0]["title"].endswith("</script>{{data}}")


def test_the_strip_has_a_panel_per_family_and_a_line_per_model(sweep, make_sweep, line):
    page = render(load([sweep]))
    figures = re.findall(r"<figure style.*?</figure>", page, re.S)
    assert len(figures) == 6
    window = next(figure for figure in figures if "sliding window" in figure or "window" in figure)
    assert window.count("<polyline") == 3
    assert "<title>window, w = 16 at 0.003: 47.0%</title>" in window
    assert "<title>window, w = 16 at 0.01: 42.3%</title>" in window
    assert "its mark at the best rate, that of the picture above" in page
    assert '<p class="muted" id="spread">1 seed: no spread known; --seeds 3 adds two.</p>' in page
    single = render(load([make_sweep("single", [line("a", 64, 0.5), line("b", 64, 0.6)])]))
    assert "<figure" not in single
    assert (
        "polyline"
        not in single.replace(re.search(r"<script>.*?</script>", single, re.S)[0], "").split("</style>")[1]
    )


def test_points_of_the_strip_lead_to_the_rows_of_the_table(make_sweep, line):
    """And where several seeds share a point, to all of them."""
    runs = [
        line("a", 64, accuracy, seed=seed, learning_rate=rate)
        for rate, pair in ((0.001, (0.4, 0.6)), (0.01, (0.3, None)))
        for seed, accuracy in enumerate(pair)
    ]
    page = render(load([make_sweep("s", runs)]))
    content, rates = (
        data_of(page),
        re.findall(r'<g data-mark="(\d+)"><title>(.*?)</title>(.*?)</g>', page, re.S),
    )
    assert [title for _, title, _ in rates] == [
        "a at 0.001: 50.0%, 40.0% to 60.0%", "a at 0.01: 30.0% (1 of 2 seeds diverged)"
    ]  # fmt: skip
    (best, _, _), (other, _, crossed) = rates
    assert best == "0"
    assert "×" in crossed
    details = [dict(content["marks"][int(mark)]["detail"]) for mark in (best, other)]
    assert details[0]["2 seeds"] == "mean 50.00%, from 40.00% to 60.00%"
    assert details[1]["2 seeds"] == "1 diverged; 30.00% is that of the other"
    assert [detail["learning rate"] for detail in details] == ["0.001", "0.01"]


@pytest.fixture
def visit(open_file, tmp_path):
    """Opens the report of sweep folders."""

    def open_page(*folders, **options):
        page = open_file(write(folders, tmp_path / "out")[1], **options)
        page.wait_for_selector("#chart .scatterlayer .trace")
        return page

    return open_page


# Points are counted in the browser's own drawing, and looked up through Plotly's axes.
POINTS = "() => document.querySelectorAll('#chart .scatterlayer path.point').length"
PIXEL = """([x, y]) => {
  const {xaxis, yaxis} = chart._fullLayout, box = chart.getBoundingClientRect();
  return [box.x + xaxis._offset + xaxis.l2p(Math.log10(x)), box.y + yaxis._offset + yaxis.l2p(y)];
}"""


def eventually(page, script, expected):
    """Asks until the answer is the expected one: Plotly draws when it finds the time.

    Playwright's own wait_for_function would need the page to allow eval, which it does not.
    """
    for _ in range(50):
        if page.evaluate(script) == expected:
            return
        page.wait_for_timeout(100)
    assert page.evaluate(script) == expected


@pytest.mark.browser
def test_page_opens_offline_and_draws_every_model(visit, sweep):
    page = visit(sweep)
    assert page.evaluate(POINTS) == len(load([sweep])[0].models) == 10
    # Plotly ignores what it does not know. Its other findings are settings that wait for their switch.
    faults = page.evaluate("() => Plotly.validate(chart.data, chart.layout) || []")
    assert [fault["msg"] for fault in faults if fault["code"] in ("schema", "value", "object", "array")] == []


@pytest.mark.browser
def test_pointing_at_a_model_shows_all_of_it(visit, sweep):
    page = visit(sweep)
    for model in load([sweep])[0].models:
        page.mouse.move(5, 5)
        page.mouse.move(*page.evaluate(PIXEL, [model.state_bytes, model.accuracy]))
        page.wait_for_selector(f"#card h2:text-is('{model.label}')")
        keys, values = (
            page.locator("#card dt").all_text_contents(),
            page.locator("#card dd").all_text_contents(),
        )
        shown, written = dict(zip(keys, values, strict=True)), model.best[0].line
        assert set(shown) == {key.replace("_", " ") for key in written}
        assert shown["state bytes"] == f"{model.state_bytes:,}"
        assert shown["learning rate"] == "0.003"
        assert shown["layers"] == "base-conv, taylor"
        assert page.locator("#chart .hoverlayer .hovertext").count() == 1


@pytest.mark.browser
def test_point_and_row_mark_each_other(visit, sweep):
    page = visit(sweep)
    ring = "() => [chart.data.at(-1).x[0], chart.data.at(-1).y[0]]"
    page.mouse.click(*page.evaluate(PIXEL, [10_240, 0.8]))
    page.wait_for_selector("tr.selected")
    assert page.locator("tr.selected td:first-child button").all_text_contents() == ["Mamba, N = 16"]
    assert page.evaluate(ring) == [10_240, 0.8]
    page.get_by_role("button", name="ELU+1").press("Enter")
    assert page.locator("tr.selected td:first-child button").all_text_contents() == ["ELU+1"]
    assert page.evaluate(ring) == [4672, 0.31]
    assert page.locator("#card h2").text_content() == "ELU+1"
    # the ring is drawn, not only known
    assert page.evaluate(POINTS) == 11


@pytest.mark.browser
def test_table_sorts_by_number_both_ways(visit, make_sweep, line):
    sizes = {"a": 900, "b": 12_000, "c": 1024, "d": 2_000_000, "e": 88}
    runs = [line(name, size, 0.5) for name, size in sizes.items()] + [line("f", 500, None, seconds=None)]
    page = visit(make_sweep("s", runs))
    names = page.locator("tbody tr td:first-child button")
    state = page.get_by_role("columnheader", name="State")
    assert state.get_attribute("aria-sort") is None
    state.get_by_role("button").press("Enter")
    assert names.all_text_contents() == ["e", "f", "a", "c", "b", "d"]
    assert state.get_attribute("aria-sort") == "ascending"
    state.get_by_role("button").click()
    assert names.all_text_contents() == ["d", "b", "c", "a", "f", "e"]
    assert state.get_attribute("aria-sort") == "descending"
    # what has no number is last both ways, and only one column claims to be sorted
    for _ in range(2):
        page.get_by_role("columnheader", name="Seconds").get_by_role("button").click()
        assert names.all_text_contents()[-1] == "f"
    assert page.locator("th[aria-sort]").count() == 1
    page.get_by_role("columnheader", name="Model").get_by_role("button").click()
    assert names.all_text_contents() == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.browser
def test_switch_shows_all_learning_rates(visit, sweep):
    page = visit(sweep)
    shown = "() => [...document.querySelectorAll('tbody tr')].filter(row => row.offsetHeight > 0).length"
    assert page.evaluate(shown) == 10
    page.get_by_label("Show all learning rates").check()
    assert page.evaluate(shown) == 20
    eventually(page, POINTS, 20)
    page.get_by_label("Show all learning rates").uncheck()
    assert page.evaluate(shown) == 10
    eventually(page, POINTS, 10)


@pytest.mark.browser
def test_the_strip_is_drawn_and_marks_its_model_everywhere(visit, sweep):
    page = visit(sweep)
    assert page.locator(".rates svg polyline").count() == 10
    for box in map(lambda each: each.bounding_box(), page.locator(".rates figure").all()):
        assert box["width"] > 100
        assert box["height"] > 60
    target = page.locator(".rates figure", has_text="Mamba").locator("g[data-mark] g[data-mark]")
    spot = target.filter(has_text="Mamba, N = 16 at 0.003").locator(".target").bounding_box()
    middle = (spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
    page.mouse.move(*middle)
    page.wait_for_selector("#card h2:text-is('Mamba, N = 16')")
    page.mouse.click(*middle)
    assert page.locator("tr.selected td:first-child button").all_text_contents() == ["Mamba, N = 16"]
    assert page.evaluate("() => [chart.data.at(-1).x[0], chart.data.at(-1).y[0]]") == [10_240, 0.8]
    assert page.locator(".curve.selected").count() == 1
    page.get_by_role("button", name="ELU+1").first.press("Enter")
    assert page.locator(".curve.selected title").first.text_content().startswith("ELU+1")
    page.set_viewport_size({"width": 400, "height": 800})
    eventually(page, "() => document.documentElement.scrollWidth", 400)


@pytest.mark.browser
def test_legend_hides_a_family(visit, sweep):
    page = visit(sweep)
    page.locator("#chart .legend .traces", has_text="window").locator(".legendtoggle").click()
    eventually(page, POINTS, 7)


@pytest.mark.browser
def test_labels_are_inert(visit, nasty):
    page = visit(nasty)
    label = load([nasty])[0].models[0].label
    page.mouse.move(*page.evaluate(PIXEL, [2048, 0.5]))
    page.wait_for_selector("#chart .hoverlayer .hovertext")
    page.wait_for_timeout(200)
    assert page.locator("#card h2").text_content() == label
    assert page.locator("#chart .hoverlayer").text_content().startswith(label)
    assert page.locator("tbody tr:first-child td:first-child button").text_content() == label
    page.get_by_label("Show all learning rates").check()
    assert page.locator("img").count() == 0
    assert page.title() != "attacked"
    assert page.title().startswith("The recall-memory frontier: <img")


@pytest.mark.browser
def test_page_fits_a_phone_and_the_dark(visit, sweep):
    light = visit(sweep)
    ink = light.evaluate("() => chart.layout.font.color")
    dark = visit(sweep, color_scheme="dark")
    assert dark.evaluate("() => chart.layout.font.color") != ink
    assert dark.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    light.set_viewport_size({"width": 400, "height": 800})
    light.wait_for_function(
        "() => document.documentElement.scrollWidth == 400 && chart._fullLayout.width <= 400"
    )


@pytest.mark.browser
def test_two_sweeps_share_a_chart(visit, sweep, make_sweep, line):
    second = make_sweep("second", [line("Taylor, f = 4", 4412, 0.6), line("GLA", 3000, 0.5)], recipe="again")
    page = visit(sweep, second)
    assert page.evaluate(POINTS) == 12
    symbols = page.evaluate(
        "() => chart.data.filter(t => t.name == 'Taylor' && t.meta == 'models').map(t => t.marker.symbol)"
    )
    assert len(symbols) == 2
    assert symbols[1] == symbols[0] + "-open"
    assert page.locator("tbody tr:not(.other) td:nth-child(2)").all_text_contents().count("again") == 2
    legend = page.locator("#chart .legend .legendtext").all_text_contents()
    assert legend.count("Taylor") == 1
    assert "GLA" in legend
    page.locator("#chart .legend .traces", has_text="Taylor").locator(".legendtoggle").click()
    eventually(page, POINTS, 9)
