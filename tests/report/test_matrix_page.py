"""Mixing matrices as picture and page: the right numbers in the right colours, offline, in light and dark."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from holdall.analysis.gallery import Gallery, MixingMatrix, save
from holdall.files import RunError
from holdall.report.matrix import DARK, LIGHT, columns, draw, reference, render, write

N = 8
ATTACK = """<img src=x onerror="document.title = 'attacked'"></script>{{data}}"""


def made(label: str, values_STJ: np.ndarray, **more) -> MixingMatrix:
    about = {"kind": "exact", "source": "op", "beside": (), "unit": "head", "count": len(values_STJ)}
    about |= {"shown": tuple(range(len(values_STJ))), "causal": True, "toeplitz": 0.5, "rank": 2}
    about |= {"full_rank": 4, "rank_1": 1, "state": 7, "sparsity": 0.25, "error": 1e-16}
    return MixingMatrix(label=label, values_STJ=values_STJ, **{**about, **more})


def gallery_of(*matrices: MixingMatrix, **more) -> Gallery:
    about = {"command": "holdall matrix", "length": N, "width": 4, "input": "random input", "tokens": ()}
    return Gallery(matrices=matrices, **{**about, "failures": {}, "environment": {}, **more})


@pytest.fixture
def trio() -> Gallery:
    """A lower triangle of distinct entries of both signs, four heads, and a Jacobian."""
    numbers_TJ = np.tril(np.arange(1.0, N * N + 1).reshape(N, N)) / N**2
    numbers_TJ[1::2] *= -1
    heads_STJ = np.stack([np.tril(np.full((N, N), k + 1.0)) for k in range(4)])
    return gallery_of(
        made("alpha", numbers_TJ[None], beside=("short_conv",)),
        made("beta, heads = 6", heads_STJ, count=6, toeplitz=0.0),
        made(
            "gamma", np.full((1, N, N), 0.5), kind="jacobian", source="", causal=False, rank=None, rank_1=None
        ),
        tokens=tuple(f"key {t}" for t in range(N)),
        failures={"delta": "ValueError: too wide"},
    )


# ------------------------------------------------------------------------------------------------ picture


def shown(figure, label):
    return [axes.images[0] for axes in figure.axes if axes.get_gid() == label]


def test_picture_shows_every_entry_in_its_colour(trio):
    from matplotlib.colors import to_rgba

    figure = draw(trio)
    (image,) = shown(figure, "alpha")
    values_TJ = trio.matrices[0].values_STJ[0]
    full = reference(values_TJ)
    expected_TJ = np.sign(values_TJ) * np.sqrt(np.minimum(np.abs(values_TJ) / full, 1))
    assert np.allclose(image.get_array(), expected_TJ)
    colour = image.cmap(image.norm(image.get_array()))
    assert np.allclose(colour[0, 7], to_rgba(LIGHT[3]), atol=0.02)  # the future is ground
    assert np.allclose(colour[7, 7], to_rgba(LIGHT[0]), atol=0.02)  # the largest is negative
    assert len(shown(figure, "beta, heads = 6")) == 4
    assert figure.get_facecolor() == to_rgba(LIGHT[3])
    assert draw(trio, dark=True).get_facecolor() == to_rgba(DARK[3])


def test_one_large_entry_does_not_hide_the_others():
    values = np.full((1, 40, 40), 0.1)
    values[0, 0, 0] = 100
    assert reference(values) == pytest.approx(0.1)
    assert reference(np.zeros((1, 4, 4))) == 1.0


@pytest.mark.parametrize("count", [1, 3, 7, 23, 41])
def test_texts_stay_apart_and_inside(count):
    label = "a-mixer-with-a-long-name, and = options, that = are long"
    eye = np.eye(N)[None]
    figure = draw(gallery_of(*(made(f"{k} {label}", eye, toeplitz=0.0, causal=False) for k in range(count))))
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.get_tightbbox(renderer) for axes in figure.axes]
    page = figure.bbox
    for k, box in enumerate(boxes):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        for other in boxes[:k]:
            assert not box.padded(-1).overlaps(other)
    width, height = figure.get_size_inches()
    assert count < 4 or 1 < width / height < 4


def test_rows_of_pictures_are_full():
    for count in range(1, 60):
        across = columns(count)
        rows = -(-count // across)
        assert (rows - 1) * across < count <= rows * across
        assert across * rows - count < rows + across // 2


def test_files_are_written_and_nothing_else(trio, tmp_path):
    save(trio, tmp_path / "data")
    paths = write(tmp_path / "data", tmp_path / "out")
    assert [path.name for path in paths] == ["matrix.png", "matrix.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["matrix.html", "matrix.png"]
    assert b"Description\0holdall matrix" in paths[0].read_bytes()
    save(gallery_of(), tmp_path / "empty")
    with pytest.raises(RunError, match="no matrix to draw"):
        write(tmp_path / "empty", tmp_path / "out")


def test_importing_the_room_is_light():
    program = (
        "import sys, holdall.report.matrix; print([m for m in ('matplotlib', 'torch') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------- page


def test_page_holds_every_number_and_every_word(trio):
    page = render(trio)
    assert not re.search(r"\{\{\w+\}\}", page)
    assert "delta has no matrix: ValueError: too wide" in page
    content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    first, second, third = content["matrices"]
    assert first["caption"] == "exact"
    assert second["caption"] == "exact, 4 of 6 heads · Toeplitz"
    assert third["caption"] == "Jacobian · not causal"
    assert [each["rank"] for each in content["matrices"]] == ["rank 2 of 4, 1 to 1%"] * 2 + [
        "rank not computed"
    ]
    assert second["heads"] == [f"head {k}" for k in (1, 2, 3, 4)]
    detail = dict(map(tuple, first["detail"]))
    assert detail["matrix"] == "exact, of op: rebuilds its output to 1e-16"
    assert detail["also mixing"] == "short_conv"


def test_no_text_is_read_as_markup():
    page = render(gallery_of(made(ATTACK, np.eye(N)[None]), failures={ATTACK: ATTACK}, command=ATTACK))
    assert "<img" not in page


@pytest.fixture
def visit(open_file, tmp_path):
    """Opens the page of a gallery."""

    def open_page(gallery, **options):
        path = tmp_path / "matrix.html"
        path.write_text(render(gallery), encoding="utf-8")
        return open_file(path, **options)

    return open_page


# Read from a copy: of what is read often, a browser would like to know before it is drawn.
PIXEL = """([card, head, t, j]) => {
  const copy = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const pen = copy.getContext("2d", {willReadFrequently: true});
  pen.drawImage(document.querySelectorAll(".card")[card].querySelectorAll("canvas")[head], -j, -t);
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


def rgb(colour: str) -> list[int]:
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]


def point(page, card: int, t: int, j: int, head: int = 0, box: str = ".card"):
    """Points at an entry, through the canvas's place on the screen."""
    canvas = page.locator(box).nth(card).locator("canvas.matrix").nth(head)
    canvas.scroll_into_view_if_needed()
    at = canvas.bounding_box()
    page.mouse.move(at["x"] + (j + 0.5) / N * at["width"], at["y"] + (t + 0.5) / N * at["height"])
    return at


@pytest.mark.browser
def test_page_draws_every_mixer_offline(visit, trio):
    page = visit(trio)
    assert page.locator(".card strong").all_text_contents() == ["alpha", "beta, heads = 6", "gamma"]
    assert [page.locator(".card").nth(k).locator("canvas").count() for k in range(3)] == [1, 4, 1]
    assert page.evaluate(PIXEL, [0, 0, 0, 7]) == rgb(LIGHT[3])
    assert page.evaluate(PIXEL, [0, 0, 7, 7]) == rgb(LIGHT[0])
    assert page.evaluate(PIXEL, [1, 3, 7, 0]) == rgb(LIGHT[6])
    # the root of a quarter of the full colour is half way: the stops' second third of the positive side
    quarter = page.evaluate(PIXEL, [1, 0, 7, 0])
    assert quarter == pytest.approx(
        [(a + b) / 2 for a, b in zip(rgb(LIGHT[4]), rgb(LIGHT[5]), strict=True)], abs=2
    )


@pytest.mark.browser
def test_pointing_tells_the_entry_of_all_mixers(visit, trio):
    page = visit(trio)
    at = point(page, 0, 5, 2)
    value = (5 * N + 3) / N**2
    assert page.locator("#at").text_content() == f"t = 5 (key 5), j = 2 (key 2) · alpha: −{value:.3f}"
    values = page.locator(".card .value")
    assert values.all_text_contents() == [f"−{value:.3f}", "1.00", "0.500"]
    # the frame lies around that entry, in every picture
    frame = page.locator(".card").nth(0).locator("i").bounding_box()
    assert frame["x"] + frame["width"] / 2 == pytest.approx(at["x"] + 2.5 / N * at["width"], abs=1)
    assert frame["y"] + frame["height"] / 2 == pytest.approx(at["y"] + 5.5 / N * at["height"], abs=1)
    assert page.locator(".head i:visible").count() == 6
    point(page, 1, 4, 4, head=2)
    assert page.locator("#at").text_content().endswith("beta, heads = 6, head 3: 3.00")
    assert values.nth(1).text_content() == "3.00"
    page.mouse.move(2, 2)
    assert page.locator("#at").text_content() == ""
    assert values.nth(0).text_content() == "rank 2 of 4, 1 to 1%"
    assert page.locator(".head i:visible").count() == 0


@pytest.mark.browser
def test_arrow_keys_move_from_entry_to_entry(visit, trio):
    page = visit(trio)
    page.locator(".card canvas").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#at").text_content().startswith("t = 4 (key 4), j = 2 (key 2)")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.locator("#at").text_content().startswith("t = 3 (key 3), j = 3 (key 3)")


@pytest.mark.browser
def test_names_and_kinds_are_found(visit, trio):
    page, names = visit(trio), []
    for words in ("BETA", "jacobian", "exact", "toeplitz heads", "nothing of the kind", ""):
        page.get_by_label("Find").fill(words)
        names.append(page.locator(".card:visible strong").all_text_contents())
        assert page.locator("#none").is_visible() == (not names[-1])
    everything = ["alpha", "beta, heads = 6", "gamma"]
    assert names == [[everything[1]], ["gamma"], everything[:2], [everything[1]], [], everything]


@pytest.mark.browser
def test_colours_can_follow_the_size_itself(visit, trio):
    page = visit(trio)
    page.get_by_label("Colour by").select_option("linear")
    low, high = rgb(LIGHT[3]), rgb(LIGHT[4])
    # a quarter of the size is three quarters of the way to the first of three stops
    expected = [a + 0.75 * (b - a) for a, b in zip(low, high, strict=True)]
    assert page.evaluate(PIXEL, [1, 0, 7, 0]) == pytest.approx(expected, abs=2)
    page.get_by_label("Colour by").select_option("decades")
    assert page.evaluate(PIXEL, [1, 3, 7, 0]) == rgb(LIGHT[6])
    assert page.evaluate(PIXEL, [1, 3, 0, 7]) == low


@pytest.mark.browser
def test_large_view_tells_all_and_goes_on_to_the_next(visit, trio):
    page = visit(trio)
    page.get_by_role("button", name="alpha").click()
    dialog = page.locator("dialog")
    assert dialog.locator("h2").text_content() == "alpha"
    assert dialog.locator("dd").nth(1).text_content() == "short_conv"
    point(page, 0, 6, 1, box="dialog")
    value = (6 * N + 2) / N**2
    assert page.locator("#says").text_content().endswith(f"at j = 1 (key 1): {value:.3f}")
    drawn = """() => {
      const copy = document.createElement("canvas"), pen = copy.getContext("2d", {willReadFrequently: true});
      pen.drawImage(document.querySelector("#row"), 0, 0, copy.width, copy.height);
      return pen.getImageData(0, 0, copy.width, copy.height).data.some(part => part);
    }"""
    assert page.evaluate(drawn)
    page.get_by_role("button", name="Next mixer").click()
    assert dialog.locator("h2").text_content() == "beta, heads = 6"
    assert dialog.locator(".named").all_text_contents() == [f"head {k}" for k in (1, 2, 3, 4)]
    assert not page.evaluate(drawn)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert dialog.locator("h2").text_content() == "gamma"
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


@pytest.mark.browser
def test_page_follows_the_dark_and_fits_a_phone(visit, trio):
    page = visit(trio)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    for _ in range(50):  # it is painted anew when the browser finds the time
        if page.evaluate(PIXEL, [0, 0, 0, 7]) != rgb(LIGHT[3]):
            break
        page.wait_for_timeout(100)
    assert page.evaluate(PIXEL, [0, 0, 0, 7]) == rgb(DARK[3]) == [21, 23, 26]
    assert page.evaluate(PIXEL, [1, 3, 7, 0]) == rgb(DARK[6])
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") == 400
    page.get_by_role("button", name="beta").click()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 400


@pytest.mark.browser
def test_labels_are_inert(visit):
    page = visit(gallery_of(made(ATTACK, np.eye(N)[None], source=ATTACK), failures={ATTACK: ATTACK}))
    assert page.locator(".card strong").text_content() == ATTACK
    point(page, 0, 3, 3)
    page.locator(".card button").click()
    assert page.locator("dialog h2").text_content() == ATTACK
    assert page.locator("img").count() == 0
    assert page.title() == "Mixing matrices of 1 sequence mixers"
