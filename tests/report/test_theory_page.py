"""The page of recall by hand: steps, choices, the slider, offline, in light and dark and on a phone."""

import json
import re
from pathlib import Path

import pytest

from holdall.report import theory

TITLES = ["Attention", "Window and linear attention", "BaseConv by shifts"]


@pytest.fixture(scope="module")
def html() -> str:
    return theory.render()


@pytest.fixture
def visit(open_file, html: str, tmp_path: Path):
    def open_page(**options):
        path = tmp_path / "theory.html"
        path.write_text(html, encoding="utf-8")
        return open_file(path, **options)

    return open_page


def test_the_page_holds_all_steps_and_is_small(html: str) -> None:
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])
    assert [walk["title"] for walk in data["walks"]] == TITLES
    assert [len(walk["steps"]) for walk in data["walks"]] == [5, 6, 7]
    assert [question["distance"] for question in data["questions"]] == [4, 10, 12, 18]
    kinds = {token["kind"]: token["text"] for token in data["tokens"]}
    assert kinds["key"].isalpha()
    assert kinds["value"].isdecimal()
    assert len(html) < 400_000


@pytest.mark.browser
def test_buttons_and_arrow_keys_step_through_a_construction(visit) -> None:
    page = visit()
    place, title = page.locator("#place"), page.locator("#words h2")
    assert place.text_content() == "1 of 5"
    assert page.locator("#back").is_disabled()
    assert page.locator("#arcs path").count() == 0
    page.locator("#next").click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert (place.text_content(), title.text_content()) == ("4 of 5", "Layer 2: look for the same token")
    assert page.locator("#arcs path.found").count() == 4
    assert page.locator("#asked .right").count() == 0
    page.keyboard.press("ArrowRight")
    assert page.locator("#next").is_disabled()
    assert page.locator("#asked .right").count() == 4
    page.keyboard.press("ArrowLeft")
    assert place.text_content() == "4 of 5"


@pytest.mark.browser
def test_a_choice_keeps_the_row_and_shows_what_belongs_to_it(visit) -> None:
    page = visit()
    row = page.locator("#row button").all_text_contents()
    for k, title in enumerate(TITLES):
        page.get_by_role("button", name=title, exact=True).click()
        assert page.locator(".choose [aria-pressed=true]").all_text_contents() == [title]
        assert page.locator("#row button").all_text_contents() == row
        assert page.locator("#reachlabel").is_visible() == (k == 2)
        assert page.locator("#curvebox").is_visible() == (k == 2)
    page.get_by_role("button", name=TITLES[1]).click()
    while page.locator("#words h2").text_content() != "Layer 2 reads a line":
        page.keyboard.press("ArrowRight")
    assert page.locator("#table tr").count() == 15
    asked = page.locator("#row .question")
    for k in range(4):
        asked.nth(k).click()
        assert page.locator("#table tr.read th").text_content() == asked.nth(k).text_content()


@pytest.mark.browser
def test_the_slider_puts_questions_out_of_reach(visit) -> None:
    page = visit()
    page.get_by_role("button", name=TITLES[2]).click()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    for reach, right in ((23, 4), (12, 3), (11, 2), (3, 0)):
        page.locator("#reach").fill(str(reach))
        assert page.locator("#asked .right").count() == right
        assert page.locator("#arcs path.missed").count() == 4 - right
        assert page.locator("#counts dd").first.text_content().startswith(str(10 * (1 + 2 * reach)))
        assert page.locator("#heat").evaluate("canvas => canvas.height") == 10 * (1 + 2 * reach)
        assert page.locator("#reachsays").text_content().startswith(f"{reach}: ")
    page.locator("#reach").focus()
    page.keyboard.press("ArrowRight")  # moves the slider, not the step
    assert page.locator("#place").text_content() == "7 of 7"
    assert page.locator("#asked .right").count() == 1


@pytest.mark.browser
def test_the_matrix_shows_the_chosen_question_s_row(visit) -> None:
    page = visit()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    pixel = """([t, j]) => {
      const pen = Object.assign(document.createElement("canvas"), {width: 24, height: 24})
        .getContext("2d", {willReadFrequently: true});
      pen.drawImage(document.querySelector("#grid"), 0, 0);
      return [...pen.getImageData(j, t, 1, 1).data].slice(0, 3);
    }"""
    assert page.evaluate(pixel, [8, 5]) == pytest.approx([0, 114, 178], abs=3)
    assert page.evaluate(pixel, [8, 20]) == [255, 255, 255]  # the future
    frame, box = page.locator(".grid i"), page.locator("#grid").bounding_box()
    page.locator("#row .question").nth(3).click()
    assert frame.bounding_box()["y"] == pytest.approx(box["y"] + 20 / 24 * box["height"], abs=1)


@pytest.mark.browser
def test_it_follows_the_dark_and_fits_a_phone(visit) -> None:
    page = visit(color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    page.set_viewport_size({"width": 390, "height": 800})
    for title in TITLES:
        page.get_by_role("button", name=title, exact=True).click()
        for _ in range(7):
            assert page.evaluate("() => document.documentElement.scrollWidth") == 390
            page.keyboard.press("ArrowRight")
        for _ in range(7):
            page.keyboard.press("ArrowLeft")
