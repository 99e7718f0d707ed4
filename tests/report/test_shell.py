"""What makes every page: values are escaped as they are filled in, and nothing is left out in silence."""

import json
import math
import re
from typing import Any

import pytest
from jinja2 import UndefinedError

from holdall.report import shell

ATTACK = """</script><img src=x onerror="document.title = 'attacked'">{{ data }}"""


def page(data: Any = "", **values: Any) -> str:
    """The page of matrices, which shows a command and the reasons of failures."""
    filled = {"lede": "", "failures": [], "command": "", "side": 8, **values}
    return shell.render("matrix.html", data={"matrices": [], "text": data}, **filled)


def test_values_are_inert_wherever_they_stand() -> None:
    made = page(ATTACK, command=ATTACK, lede=ATTACK, failures=[(ATTACK, ATTACK)])
    assert "<img" not in made
    assert made.count("</script>") == 2  # the data's and the program's own
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', made)
    assert data
    assert json.loads(data[1])["text"] == ATTACK


def test_what_a_template_names_must_be_given() -> None:
    with pytest.raises(UndefinedError, match="'lede' is undefined"):
        shell.render("matrix.html", data={"matrices": []}, failures=[], command="", side=8)


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        page(math.nan)


@pytest.mark.parametrize("name", ["page.html", "recall.html", "matrix.html"])
def test_pages_fetch_nothing(name: str) -> None:
    templates = shell._environment().loader
    assert templates
    for part in (name, "base.html"):
        source, *_ = templates.get_source(shell._environment(), part)
        assert "http:" not in source
        assert "https:" not in source
