"""The documentation site: built strictly, asking nobody for anything, with a search that needs no server."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdall import mixers

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: make docs"
)
SHOWN = ["index.html", "docs/zoo.html", "docs/states.html", "reference/holdall.contract.html",
         "holdall/mixers/taylor.py.html"]  # fmt: skip


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    done = build(ROOT, made)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return made


def test_a_page_of_the_repository_is_a_page_of_the_site(site: Path) -> None:
    for page in (*ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")):
        path = page.relative_to(ROOT).with_suffix(".html")
        made = site / path.with_name(path.name.replace("README", "index"))
        assert made.is_file(), page
        (title,) = re.findall(r"<h1[^>]*>(.+?)<a class=.headerlink", made.read_text())
        assert html.unescape(title) == page.read_text().partition("\n")[0].removeprefix("# "), page


def test_each_mixer_has_a_page_with_its_equations_and_its_source(site: Path) -> None:
    zoo = (site / "docs" / "zoo.html").read_text()
    files = [path for path in (ROOT / "holdall" / "mixers").glob("*.py") if path.stem != "__init__"]
    assert len(files) == len(mixers.names())
    for file in files:
        assert f'href="../holdall/mixers/{file.name}.html"' in zoo, file
        page = (site / "holdall" / "mixers" / f"{file.name}.html").read_text()
        assert "Letters: " in page
        assert 'id="source"' in page


def test_the_reference_documents_what_is_public(site: Path) -> None:
    from holdall import contract, states

    for module in (contract, states):
        page = (site / "reference" / f"{module.__name__}.html").read_text()
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in page, name


def test_no_page_takes_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "passages.html":  # a page of results, with a test of its own
            continue
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (page, tag)


@pytest.mark.browser
def test_a_browser_asks_nobody_and_complains_of_nothing(site: Path, browser: Any) -> None:
    for path in SHOWN:
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            asked: list[str] = []
            said: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto((site / path).as_uri())
            assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
            assert said == [], path
            beyond = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert beyond <= 0, f"{path} is {beyond} pixels wider than a screen of {width}"
            page.close()


@pytest.mark.browser
def test_the_search_works_without_a_server(site: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / "index.html").as_uri())
    page.wait_for_selector(".md-search__input")
    page.keyboard.press("s")
    page.keyboard.type("hedgehog")
    page.wait_for_selector(".md-search-result__link", timeout=20_000)
    found = page.locator(".md-search-result__link").evaluate_all("links => links.map(a => a.href)")
    assert any("holdall/mixers/hedgehog.py.html" in link for link in found)
    page.close()


@pytest.mark.full
@pytest.mark.parametrize("link", ["(no-such-page.md)", "(zoo.md#no-such-section)", "(../holdall/none.py)"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, link: str) -> None:
    root = tmp_path / "repository"
    for name in ("docs", "results", "tools", "examples", "holdall"):
        left_out = shutil.ignore_patterns("__pycache__", "runs", "published", "pretrained")
        shutil.copytree(ROOT / name, root / name, ignore=left_out)
    for file in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(file, root)
    page = root / "docs" / "states.md"
    page.write_text(page.read_text() + f"\n[nowhere]{link}\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "'docs/states.md'" in warning
    assert link.strip("()") in warning
