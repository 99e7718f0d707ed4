"""Two models on the same text: the page of passages in a browser, the curves, and the command for them."""

import io
import itertools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import save_file

import holdall
from holdall.analysis import recall as slices
from holdall.analysis.recall import Predictions, Scores
from holdall.commands import guarded
from holdall.commands import recall as shown
from holdall.files import RunError
from holdall.language_model import LanguageModel
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.model import ModelConfig, seeded
from holdall.report import recall_gaps, recall_state
from holdall.report.recall import OUTCOMES, legible, outcomes, render, share_text
from holdall.report.recall_curves import DARK, LIGHT, draw, save
from holdall.text import write_corpus
from holdall.text.tokenizers import Bytes
from holdall.training.language_models import PretrainConfig

ATTACK = """<img src=x onerror="document.title = 'attacked'"></script>{{data}}"""
FIRST, SECOND = "say ab\ncd ab say", "€ ab <i> ab say ab"
IDS = [*FIRST.encode(), Bytes.end, *SECOND.encode()]  # 16 + 1 + 20 tokens
N = 18


class Valid:
    """Two documents in two windows: the second window begins inside of the second document."""

    documents = np.array([0, len(FIRST) + 1])

    def __init__(self, title: str) -> None:
        self.title = title

    def document_of(self, position: int) -> int:
        return int(position > len(FIRST))

    def about(self, index: int) -> dict[str, str]:
        return {"source": "a.txt:1", **({"title": self.title, "licence": "CC0"} if index else {})}


def corpus_of(title: str = "On ab") -> SimpleNamespace:
    return SimpleNamespace(valid=Valid(title), tokenizer=Bytes())


def made(label: str, right_WN: np.ndarray, nll: tuple[float, float], **more) -> Scores:
    """A run that is right there, with these losses where it is right and where it is wrong."""
    start_W, tokens_WX = slices.windows_of(np.array(IDS), N)
    true_WN = tokens_WX[:, 1:]
    log_prob = -np.where(right_WN, *nll).astype(np.float32)
    top = np.stack(
        [np.where(right_WN, true_WN, ord("Q")), *(np.full_like(true_WN, ord(c)) for c in "R\nS")], -1
    )
    top = np.concatenate([top, np.where(right_WN, 300, true_WN)[..., None]], -1)  # 300 is no token of bytes
    logs = np.broadcast_to(np.log([0.5, 0.2, 0.1, 0.05, 0.0001]), top.shape).astype(np.float16)
    about = {"corpus": "c" * 64, "context_len": N, "windows": 2, "of_windows": 2, "train_tokens": 12345}
    return Scores(
        label=label,
        about={**about, "parameters": 7},
        start_W=start_W,
        tokens_WX=tokens_WX,
        distance_WN=slices.distances(tokens_WX, Bytes.end),
        count_WN=np.where(true_WN == ord("y"), 9999, 3),
        predictions=Predictions(log_prob, np.where(right_WN, 0, 4).astype(np.int32), top, logs),
        **more,
    )


@pytest.fixture
def pair() -> tuple[Scores, Scores]:
    """A is right wherever a bigram is repeated; B at spaces too, and not at "b"."""
    tokens_WX = slices.windows_of(np.array(IDS), N)[1]
    again = slices.distances(tokens_WX, Bytes.end) > 0
    a = made("alpha", again, (0.1, 2.0))
    b = made("beta", (again & (tokens_WX[:, 1:] != ord("b"))) | (tokens_WX[:, 1:] == 32), (0.1, 3.0))
    return a, b


def page_of(pair, corpus=None, **options) -> str:
    return render(
        *pair, corpus or corpus_of(), **{"threshold": 1250, "command": "holdall recall a b", **options}
    )


# ---------------------------------------------------------------------------------------------- as a text


def test_pair_has_something_of_everything(pair):
    a, b = pair
    assert a.tokens_WX.shape == (2, N + 1)
    who_WN, slice_WN = outcomes(a, b), slices.slice_of(a.distance_WN, a.count_WN)
    assert {(k, w) for k, w in zip(slice_WN.flat, who_WN.flat, strict=True)} >= {
        (0, 0),
        (0, 1),
        (2, 2),
        (2, 3),
    }
    assert [OUTCOMES[w] for w in (who_WN[0, 0], who_WN[0, 2], who_WN[0, 10])] == [
        "both wrong", "only B right", "only A right"
    ]  # fmt: skip


def test_table_is_of_all_windows_and_adds_up(pair):
    page, (a, b) = page_of(pair, passages=1, length=3), pair
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    cells = {name: re.findall(r"<td>(.*?)</td>", row) for name, row in rows}
    assert list(cells) == ["all tokens", "recall hits", "other repeated bigrams", "the rest"]
    lines, behind = slices.table(a, 1250), b.nll - a.nll
    hits = slices.slice_of(a.distance_WN, a.count_WN) == 0
    assert [cells[name][0] for name in cells] == [str(lines[k]["tokens"]) for k in ("all", *slices.SLICES)]
    assert cells["recall hits"][2] == f"{math.exp(a.nll[hits].mean()):.2f}" == "1.11"
    assert cells["recall hits"][4] == f"{behind[hits].sum() / behind.sum():.0%}"
    assert sum(int(cells[name][0]) for name in list(cells)[1:]) == 2 * N
    assert cells["recall hits"][6] == f"{(b.right[hits] == 0).mean():.1%}"
    assert f"A is <strong>alpha</strong>, perplexity {lines['all']['perplexity']:.2f}; B is" in page
    assert not re.search(r"\{\{\w+\}\}", page)
    assert "12,345 tokens of training" in page


def test_no_text_is_read_as_markup(pair):
    runs = [replace(run, label=ATTACK) for run in pair]
    page = page_of(runs, corpus_of(ATTACK), licence=ATTACK, command=ATTACK)
    assert "<img src=x" not in page
    assert page.count("</script>") == 2


def test_what_cannot_be_seen_is_made_visible():
    assert legible("a\n\tb\r\x00\u200b\x1b é") == "a↵\n⇥\tb␍\\x00\\u200b\\x1b é"
    assert share_text(0.824) == "82%"
    assert share_text(-0.05) == "−5%"
    assert share_text(float("nan")) == share_text(400) == share_text(None) == "–"


def test_who_is_ahead_is_said_so(pair):
    a, b = pair
    page = page_of((b, a))
    lead = re.search(r"B is ahead by ([\d.]+) nats a token; on the hits ahead by (\d\.\d+)", page)
    assert lead is not None
    hits_WN = a.distance_WN > 0
    assert float(lead[1]) == pytest.approx((b.nll - a.nll).mean(), abs=6e-4)
    assert float(lead[2]) == pytest.approx(((b.nll - a.nll) * hits_WN).mean(), abs=6e-4)


def test_quoted_is_exactly_what_does_not_lie_within(pair):
    for length in (1, 5, 9, N):
        page = page_of(pair, length=length)
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
        for passage, distance_N in zip(data["passages"], pair[0].distance_WN, strict=True):
            shown = distance_N[N - length :].tolist()
            assert passage["first"] == N - length + 1
            places = [str(i) for i, distance in enumerate(shown) if distance and i - distance - 1 < 0]
            assert list(passage["earlier"]) == places


def test_documents_are_named_where_they_begin(pair):
    def documents(**options):
        page = page_of(pair, **options)
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
        return [passage["documents"] for passage in data["passages"]]

    begins = len(FIRST) + 1 - 1  # the end of the first, and the window's first token is not shown
    assert documents(licence="mine") == [
        [[0, "document 1", True, "mine"], [begins, "On ab", False, "CC0"]], [[0, "On ab", True, "CC0"]]
    ]  # fmt: skip
    assert documents(length=2, passages=1) == [[[0, "On ab", False, "CC0"]]]


def test_page_of_other_text_is_refused(pair):
    with pytest.raises(RunError, match="same text"):
        page_of((pair[0], replace(pair[1], tokens_WX=pair[1].tokens_WX[:1])))


# -------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def visit(open_file, tmp_path):
    def open_page(*args, context=None, **options):
        path = tmp_path / "recall.html"
        path.write_text(page_of(*args, **options), encoding="utf-8")
        return open_file(path, **(context or {}))

    return open_page


def token(page, index: int):
    return page.locator(".t").nth(index)


def detail(page) -> str:
    return page.locator("#detail").inner_text()


@pytest.mark.browser
def test_every_token_is_there_in_its_colour(visit, pair):
    page, (a, b) = visit(pair), pair
    tokens = page.locator(".t")
    assert tokens.count() == 2 * N
    classes = tokens.evaluate_all("spans => spans.map(span => span.className)")
    slice_WN = slices.slice_of(a.distance_WN, a.count_WN)
    for name, who, kind in zip(classes, outcomes(a, b).flat, slice_WN.flat, strict=True):
        assert name.split() == ["t", f"t{who}", *(["hit"] if kind == 0 else [])]
    assert page.locator("article h3").all_inner_texts() == ["document 1, continued", "On ab, continued CC0"]
    assert page.locator(".starts").all_inner_texts() == ["On ab CC0"]
    texts = tokens.evaluate_all("spans => spans.map(span => span.textContent)")
    assert texts[:9] == ["a", "y", " ", "a", "b", "↵", "c", "d", " "]
    assert texts[15:18] == ["<|endoftext|>", "\\xe2", "\\x82"]  # predicted from the token before
    # the line ends after its mark
    assert page.locator(".text").first.inner_text().startswith("ay ab↵\ncd ab say")
    looks = tokens.evaluate_all(
        "spans => spans.map(s => [s.classList[1], getComputedStyle(s).backgroundColor,"
        " getComputedStyle(s).textDecorationLine + getComputedStyle(s).textDecorationStyle])"
    )
    by_class = {name: (colour, line) for name, colour, line in looks}
    assert len({colour for colour, _ in by_class.values()}) == 4
    assert len({line for _, line in by_class.values()}) == 4  # told apart without colours too


@pytest.mark.browser
def test_pointing_tells_what_both_expected_and_where_it_was(visit, pair):
    page = visit(pair)
    # window 0: s|ay ab\ncd ab say: the second "b" is token 10 of those shown, 6 after the first
    token(page, 10).hover()
    said = detail(page)
    assert "only A right" in said
    assert "a recall hit: last seen 6 tokens before; training has its bigram 3 times" in said
    seen = page.locator(".t.seen").evaluate_all("spans => spans.map(span => span.place)")
    assert seen == [3, 4]
    assert page.locator("#tops caption").all_inner_texts() == ["A alpha 90%, first", "B beta 5.0%, number 5"]
    rows = page.locator("#tops table").nth(0).locator("tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["b", "50%"], ["R", "20%"], ["↵", "10%"], ["S", "5.0%"], ["<300>", "1·10⁻⁴"]
    ]  # fmt: skip
    assert page.locator("#tops tr.true td:first-child").all_inner_texts() == ["b", "b"]
    token(page, 0).hover()
    assert "both wrong" in detail(page)
    assert "a new bigram" in detail(page)
    assert page.locator(".t.seen").count() == 0


@pytest.mark.browser
def test_of_two_runs_that_kept_unequally_many_the_fewer_are_shown(visit, pair):
    a, b = pair
    said = b.predictions._replace(
        top=b.predictions.top[..., :1], top_log_prob=b.predictions.top_log_prob[..., :1]
    )
    for runs in ((a, replace(b, predictions=said)), (replace(b, predictions=said), a)):
        page = visit(runs)
        token(page, 3).hover()
        assert page.locator("#tops tr").count() == 2


@pytest.mark.browser
def test_what_was_before_the_passage_is_quoted(visit, pair):
    page = visit(pair, length=4)
    a = pair[0]
    assert page.locator(".t").count() == 8
    token(page, 0).hover()  # the "y" of the last "say"
    assert "another repeated bigram: last seen 13 tokens before; training has its bigram 9,999" in detail(
        page
    )
    assert page.locator("#detail q").text_content() == "… say ab↵\ncd  …"
    assert page.locator("#detail mark").text_content() == "ay"
    # window 1 ends in "y ab": its last "b" was seen 7 before, in "ab say ab"
    assert a.distance_WN[1, -1] == 7
    token(page, 7).hover()
    assert page.locator(".t.seen").count() == 0
    assert page.locator("#detail q").text_content() == "… ab <i> ab say ab …"
    assert page.locator("#detail mark").inner_text() == "ab"


@pytest.mark.browser
def test_disagreements_are_found_by_keys_and_buttons(visit, pair):
    page, (a, b) = visit(pair), pair
    places = np.flatnonzero(a.right != b.right).tolist()
    assert len(places) > 5
    count = page.locator("#count")
    assert count.inner_text() == f"{len(places)} disagreements"
    at = "() => document.activeElement.place"
    for k, place in enumerate([*places, places[0]]):
        page.keyboard.press("n")
        assert page.evaluate(at) == place
        assert count.inner_text() == f"{k % len(places) + 1} of {len(places)} disagreements"
        assert page.locator(".t.at").evaluate("span => span.place") == place
    page.keyboard.press("p")
    assert page.evaluate(at) == places[-1]
    page.get_by_role("button", name="Previous disagreement").click()
    assert page.evaluate(at) == places[-2]
    page.get_by_role("button", name="Next disagreement").click()
    assert page.evaluate(at) == places[-1]
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(at) == places[-1] - 1
    assert OUTCOMES[outcomes(a, b).flat[places[-1] - 1]] in detail(page)


@pytest.mark.browser
def test_focus_holds_a_token_and_pointing_returns_to_it(visit, pair):
    page = visit(pair)
    for _ in range(30):  # by the tab key alone: checkboxes, buttons, then one token of all
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.place") is not None:
            break
    assert page.evaluate("() => document.activeElement.place") == 0
    page.keyboard.press("ArrowRight")
    held = detail(page)
    token(page, 10).hover()
    assert detail(page) != held
    page.mouse.move(2, 2)
    assert detail(page) == held
    assert page.locator(".t[tabindex='0']").count() == 1


@pytest.mark.browser
def test_filters_leave_others_pale_and_steps_follow_them(visit, pair):
    page, (a, b) = visit(pair), pair
    slice_WN, who_WN = slices.slice_of(a.distance_WN, a.count_WN), outcomes(a, b)

    def off():
        return page.locator(".t.off").evaluate_all("spans => spans.map(span => span.place)")

    assert off() == []
    page.get_by_label("the rest").uncheck()
    page.get_by_label("other repeated").uncheck()
    assert off() == np.flatnonzero(slice_WN > 0).tolist()
    page.keyboard.press("n")
    wanted = np.flatnonzero((slice_WN == 0) & ((who_WN == 1) | (who_WN == 2))).tolist()
    assert page.evaluate("() => document.activeElement.place") == wanted[0]
    page.get_by_label("only A").uncheck()
    assert off() == np.flatnonzero((slice_WN > 0) | (who_WN == 1)).tolist()
    page.get_by_label("only B").uncheck()
    assert page.locator("#count").inner_text() == "no disagreements"
    page.keyboard.press("n")  # nothing to go to
    assert float(token(page, off()[0]).evaluate("span => getComputedStyle(span).opacity")) < 1


# of letters on the ground of all that has one of the four colours, as WCAG counts it
CONTRASTS = """() => [...document.querySelectorAll(".t0, .t1, .t2, .t3")].map(each => {
  const part = c => c <= 10 ? c / 3294.6 : ((c / 255 + .055) / 1.055) ** 2.4;
  const light = text => {
    const [r, g, b] = text.match(/\\d+/g).map(Number).map(part);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const style = getComputedStyle(each), [x, y] = [light(style.color), light(style.backgroundColor)];
  return (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
})"""


@pytest.mark.browser
def test_page_follows_the_dark_and_fits_a_phone(visit, pair):
    page = visit(pair)
    source = "() => document.querySelector('picture img').currentSrc.length"
    light = page.evaluate(source)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    for _ in range(50):  # the browser takes the other picture when it finds the time
        if page.evaluate(source) != light:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(source) != light
    assert min(page.evaluate(CONTRASTS)) > 4.5
    page.emulate_media(color_scheme="light")
    assert min(page.evaluate(CONTRASTS)) > 4.5
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    page.keyboard.press("n")
    box, panel = page.locator(".t.at").bounding_box(), page.locator("#detail").bounding_box()
    assert box["y"] + box["height"] < panel["y"]  # what is shown is not hidden by what is said of it
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390


@pytest.mark.browser
def test_names_and_titles_are_inert(visit, pair):
    page = visit([replace(run, label=ATTACK) for run in pair], corpus_of(ATTACK), command=ATTACK)
    assert page.locator(".starts").inner_text().startswith(ATTACK)
    token(page, 10).hover()
    assert ATTACK in detail(page)
    assert page.locator("img").count() == 1
    assert "attacked" not in page.title().replace(ATTACK, "")


# ------------------------------------------------------------------------------------------------- curves


def many(label: str, factor: float) -> Scores:
    random = np.random.default_rng(0)
    run = made(label, np.zeros((2, N), bool), (1.0, 1.0))
    distance = 2 ** random.integers(0, 8, (20, 400)).astype(np.int32) * (random.random((20, 400)) < 0.7)
    nll = (0.5 + 0.1 * factor * np.log2(np.maximum(distance, 1))).astype(np.float32)
    return Scores(
        label=label,
        about=run.about,
        start_W=np.arange(20),
        tokens_WX=np.zeros((20, 401), np.int32),
        distance_WN=distance,
        count_WN=random.integers(0, 5000, (20, 400)) * (random.random((20, 400)) < 0.8),
        predictions=Predictions(-nll, np.zeros((20, 400), np.int32), *[np.zeros((20, 400, 5))] * 2),
    )


def test_curves_show_perplexity_and_how_many_times_the_reference():
    from matplotlib.colors import to_rgba

    figure = draw([many("near", 0), many("far", 2)], 1250)
    perplexity, counts, times, _ = figure.axes
    lines = {line.get_gid(): line for line in perplexity.lines}
    assert lines["far"].get_xdata().tolist() == [1, 2, 4, 8, 16, 32, 64, 128]
    assert lines["far"].get_ydata() == pytest.approx(np.exp(0.5 + 0.2 * np.arange(8)), rel=1e-5)
    ratios = {line.get_gid(): line.get_ydata() for line in times.lines}
    assert ratios["near"] == pytest.approx(1)
    assert ratios["far"] == pytest.approx(np.exp(0.2 * np.arange(8)), rel=1e-5)
    (threshold,) = [line for line in counts.lines if line.get_gid() == "threshold"]
    assert threshold.get_xdata()[0] == 1250
    assert {line.get_gid(): line.get_xdata()[0] for line in counts.lines}["far"] == 0.5  # none in training
    assert figure.get_facecolor() == to_rgba(LIGHT[0])
    assert draw([many("a", 0)], 1250, dark=True).get_facecolor() == to_rgba(DARK[0])
    assert len(draw([many("a", 0)], 1250).axes) == 2


def test_curves_of_seventeen_runs_stay_inside_and_tell_the_command():
    figure = draw([many(f"a model with a long name, number {k}", k / 9) for k in range(17)], 1250)
    renderer, page = figure.canvas.get_renderer(), figure.bbox
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    for axes in figure.axes:
        place = axes.get_tightbbox(renderer)
        assert page.x0 <= place.x0 < place.x1 <= page.x1
        assert page.y0 <= place.y0 < place.y1 <= box.y0
    picture = io.BytesIO()
    save([many("a", 0)], 1250, picture, command="holdall recall a")
    assert b"Description\0holdall recall a" in picture.getvalue()


# --------------------------------------------------------------------------------------------------- gaps


def test_the_parts_of_a_bar_add_up_to_the_gap():
    first, far = many("first", 0), many("far", 2)
    better = replace(
        far, label="better", predictions=far.predictions._replace(log_prob=far.predictions.log_prob.copy())
    )
    better.predictions.log_prob[far.distance_WN == 0] += 3.0  # where nothing is repeated
    found = {run.label: recall_gaps.parts(run, first, 1250) for run in (far, better)}
    for run in (far, better):
        gap = float((run.nll - first.nll).mean())
        assert sum(found[run.label].values()) == pytest.approx(gap)
    assert found["far"]["rest"] == pytest.approx(0)
    assert found["far"]["hits"] > found["far"]["repeated"] / 3 > 0
    assert found["better"]["rest"] < 0 < found["better"]["hits"] == found["far"]["hits"]

    figure = recall_gaps.draw([first, far, better], 1250)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["better", "far"]
    bars = {group.get_label(): group.patches for group in axes.containers}
    assert bars["the rest"][0].get_x() + bars["the rest"][0].get_width() == pytest.approx(
        found["better"]["rest"]
    )
    assert bars["recall hits"][1].get_width() == pytest.approx(found["far"]["hits"])
    assert axes.lines[0].get_xdata() == pytest.approx(
        [sum(found[name].values()) for name in ("better", "far")]
    )
    assert "behind first" in axes.get_xlabel()


def test_bars_of_seventeen_runs_stay_inside():
    runs = [many(f"a model with a long name, number {k}", k / 9) for k in range(17)]
    for figure in (recall_gaps.draw(runs, 1250), recall_gaps.draw(runs[:2], 1250, dark=True)):
        renderer, page = figure.canvas.get_renderer(), figure.bbox
        box, place = (
            figure.legends[0].get_window_extent(renderer),
            figure.axes[0].get_tightbbox(renderer),
        )
        assert page.x0 <= place.x0 < place.x1 <= page.x1
        assert page.y0 <= place.y0 < place.y1 <= box.y0 < box.y1 <= page.y1


# ------------------------------------------------------------------------------------------------- state


def test_what_a_run_carries_is_that_of_its_model():
    layers = (AttentionConfig(width=16), MambaConfig(width=16), MambaConfig(width=16))
    model = ModelConfig(vocab=260, width=16, layers=layers)
    run = many("a", 0)
    assert slices.carried(run) is None  # which does not say what it is
    for layers, grows in ((model.layers, True), (model.layers[1:], False)):
        config = PretrainConfig(model=replace(model, layers=layers))
        about = {**run.about, "config": config.to_dict()}
        found = slices.carried(replace(run, about=about))
        states = [layer.build().state_elements(run.about["context_len"]) for layer in layers]
        assert found == (sum(states), grows)


def test_states_are_where_they_belong_and_their_labels_apart_and_inside():
    from matplotlib.text import Text

    made = {f"a model of length {k % 5}, {k}": (slices.Carried(4**k + k, k > 3), 60.0 - k) for k in range(8)}
    made |= {f"the same place, {k}": (slices.Carried(500, False), 50.0 + k / 9) for k in range(6)}
    for runs, dark in ((made, False), (dict(list(made.items())[-2:]), True)):
        figure = recall_state.draw(runs, 1024, dark=dark)
        (axes,) = figure.axes
        fixed, growing = (set(zip(*line.get_data(), strict=True)) for line in axes.lines)
        assert fixed == {(state.elements, hits) for state, hits in runs.values() if not state.grows}
        assert growing == {(state.elements, hits) for state, hits in runs.values() if state.grows}
        renderer, page = figure.canvas.get_renderer(), figure.bbox
        figure.draw(renderer)
        # of the words alone: an annotation counts its line too
        boxes = {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}
        assert boxes.keys() == runs.keys()
        for box in boxes.values():
            assert page.x0 <= box.x0 < box.x1 <= page.x1
            assert page.y0 <= box.y0
        for one, other in itertools.combinations(boxes.values(), 2):
            assert not one.overlaps(other)
        assert "after 1,024" in axes.get_xlabel()


# ------------------------------------------------------------------------------------------------- command


@pytest.fixture
def runs_of(tmp_path):
    """A corpus of bytes, and run folders of untrained models as training leaves them."""
    source = tmp_path / "text.jsonl"
    lines = [{"text": f"Number {k} of Bergey.\n" * 9, "title": f"Title {k}"} for k in range(30)]
    source.write_text("\n".join(map(json.dumps, lines)))
    corpus = write_corpus([source], tmp_path / "corpus", Bytes(), valid=0.3)

    def make(name: str, seed: int, layer=AttentionConfig(width=8, rotary=1.0), **more):  # noqa: B008
        model = ModelConfig(vocab=260, width=8, layers=(layer,))
        config = PretrainConfig(
            model=model, data=str(corpus.folder), data_hash=corpus.content_hash, context_len=64, **more
        )
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        with seeded(seed):
            weights = {key: value.contiguous() for key, value in model.build().state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"state": json.dumps({"step": 7})})
        return folder

    return make


def command(*folders, out, **options):
    defaults = {
        "checkpoint": None, "rows": None, "context": None, "threshold": 1250, "passages": 2, "length": 20,
        "licence": "", "device": "cpu", "load": (), "dark": False, "command": "holdall recall",
    }  # fmt: skip
    return guarded(lambda: shown.recall(folders, out, **{**defaults, **options}))


def test_command_compares_runs_from_their_folders(runs_of, tmp_path, monkeypatch, capsys):
    a, b, out = runs_of("a", 0), runs_of("b", 1, steps=9), tmp_path / "out"
    assert command(a, b, out=out, licence="my own text") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "gaps.png",
        "recall.html",
        "recall.png",
        "slices.json",
        "state.png",
    ]
    found = json.loads((out / "slices.json").read_text())
    assert [run["label"] for run in found["runs"]] == ["a", "b"]
    assert found["runs"][1]["step"] == 7
    assert 0 < found["runs"][1]["slices"]["hits"]["share"] < 1
    page = (out / "recall.html").read_text()
    assert "my own text" in page
    assert "Title" in page
    printed = capsys.readouterr().out
    assert "warning: the tokens of this corpus are bytes" in printed
    assert re.search(r"\bb +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d", printed)
    # again, and with more: from what the folders keep, even without weights
    monkeypatch.setattr(slices, "predict", lambda *_: pytest.fail("scored again"))
    (b / "model.safetensors").unlink()
    assert command(b, out=tmp_path / "one", threshold=1) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["recall.png", "slices.json"]
    assert command(a, b, out=out, rows=10**6) == 0
    assert json.loads((a / "recall.json").read_text())["step"] == 7


def test_a_run_that_reads_a_prefix_twice_is_compared_on_what_is_behind_it(runs_of, tmp_path, capsys):
    layer = PrefixLinearAttentionConfig(width=8, feature_dim=4, prefix=32)
    a, b, out = runs_of("a", 0), runs_of("b", 1, layer), tmp_path / "out"
    assert command(a, b, out=out, length=20) == 0
    found = json.loads((out / "slices.json").read_text())
    windows = found["windows"]
    assert (found["first"], found["context_len"]) == (32, 64)
    assert [run["slices"]["all"]["tokens"] for run in found["runs"]] == [33 * windows] * 2
    assert json.loads((a / "recall.json").read_text())["slices"]["all"]["tokens"] == 64 * windows
    page = " ".join((out / "recall.html").read_text().split())
    assert "only the tokens behind the first 32 are scored, of both models" in page
    assert "only the tokens behind the first 32 are scored" in " ".join(capsys.readouterr().out.split())
    # a passage longer than what is scored begins behind the prefix
    assert command(a, b, out=out, length=512, passages=1) == 0
    page = (out / "recall.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    (passage,) = data["passages"]
    assert passage["first"] == 32
    assert command(b, out=out, context=32) == 2
    assert "the prefix of b, 32 tokens" in " ".join(capsys.readouterr().err.split())
    assert command(a, out=tmp_path / "alone") == 0
    assert json.loads((tmp_path / "alone" / "slices.json").read_text())["first"] == 1


@pytest.mark.parametrize(("prefix", "context"), [(0, 1024), (300, 1024), (700, 1400)])
def test_windows_of_a_saved_model_are_longer_than_its_prefix(runs_of, tmp_path, prefix, context):
    runs_of("a", 0)  # and its corpus
    layer = AttentionConfig(width=8)
    if prefix:
        layer = PrefixLinearAttentionConfig(width=8, feature_dim=2, prefix=prefix)
    model = ModelConfig(vocab=264, width=8, layers=(layer,)).build()
    LanguageModel(model, Bytes()).save(tmp_path / "saved")
    asked = shown._asked(tmp_path / "saved", tmp_path / "corpus", None, tmp_path)
    assert asked.config.context_len == context


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_whole_in_a_narrow_terminal(width, monkeypatch):
    monkeypatch.setattr(shown, "console", Console(width=width, record=True, file=io.StringIO()))
    shown.console.print(
        shown._table([many("attention-lr0.002", 0), many("a-mixer-of-mine-lr0.002", 2)], 1250)
    )
    text = shown.console.export_text()
    assert re.search(r"of it hits\s*\n", text)
    assert re.search(r"\d%( \(\d+% to \d+%\))?\s*\n", text)
    assert ("(" in text.split("Perplexity.")[0]) == (width == 160)  # its interval only where there is room
    assert "better on other tokens" in " ".join(text.split())


def test_command_says_what_is_wrong(runs_of, tmp_path, capsys):
    a, out = runs_of("x/a", 0), tmp_path / "out"

    def error(*folders, **options):
        assert command(*folders, out=out, **options) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "name at least one run" in error()
    assert "named twice" in error(a, a)
    assert "holds no run of a language model" in error(tmp_path)
    assert "choose a smaller --context" in error(a, context=10**6)
    assert "has no checkpoint 'best', but 'model', and there is no recall.json" in error(a, checkpoint="best")
    holdall.load().save(tmp_path / "saved")
    assert "is a saved model, without a corpus to score it on" in error(tmp_path / "saved")
    other = runs_of("y/a", 0)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "data_hash": "0" * 64}))
    assert "not the one that this run is about" in error(a, other)
    assert not out.exists()
    assert shown._labels([a, other]) == ["x/a", "y/a"]
