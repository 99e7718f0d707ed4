"""A formula's letters are explained where it stands, in a paragraph "Letters: ..." of the same docstring.

Every mixer's, one by one: names of one letter, Greek ones and those in the registry's formulas of state and
costs, where N is tokens and D the width and an option's docstring may name its own letter. Of holdall/ops
and holdall/theory, which name their shapes' letters too, every file with a formula.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import holdall
from holdall import mixers
from holdall.settings import field_docs

PACKAGE = Path(holdall.__file__).parent
MODULES = [
    path
    for room in ("mixers", "ops", "theory")
    for path in sorted((PACKAGE / room).glob("*.py"))
    if path.name != "__init__.py"
]
GREEK = ["alpha", "beta", "gamma", "eps", "theta", "Lambda", "lambda", "mu", "phi", "psi", "sigma", "tau"]
ARTICLE = r"\ba (?!the |its |their |and )(?=[a-z]{2,})"
"""As in "a gate", which is no letter; "a the decay" is one."""
NOT_LETTERS = r"\^(?:T|\*)|\bexp\b|(?<=[\d.])e-?\d+"
"""Transposes; and exponents of a power of ten."""


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def formulas_of(docstring: str) -> str:
    """The indented lines."""
    return "\n".join(line for line in docstring.splitlines() if line.startswith("    "))


def letters_in(formula: str) -> set[str]:
    """Names of one letter and Greek ones, without what is below and above them: of W_o and k~_t, W and k."""
    formula = re.sub(ARTICLE, "", re.sub(NOT_LETTERS, "", formula))
    names = (name.partition("_")[0] for name in re.findall(r"(?<![\w.'])[A-Za-z]\w*", formula))
    return {name for name in names if (len(name) == 1 and name.isalpha()) or name in GREEK}


def explained_in(text: str) -> set[str]:
    """The names in a sentence, as in formulas."""
    found = re.findall(r"(?<![\w.'])[A-Za-z]\w*", re.sub(ARTICLE, "", text))
    return {name.partition("_")[0] for name in found} | set(found)


def paragraph_of(docstring: str) -> str:
    """What comes after "Letters:", up to the next empty line; empty if there is no such paragraph."""
    found = re.search(r"\bLetters: (.*?)(?:\n\n|\Z)", docstring, flags=re.DOTALL)
    return found[1] if found else ""


def unexplained(docstring: str, *, formulas: str = "", elsewhere: str = "") -> list[str]:
    """The letters of formulas, those beside the docstring's own too, that its paragraph does not name."""
    known = explained_in(paragraph_of(docstring)) | explained_in(elsewhere)
    return sorted(letters_in(formulas_of(docstring) + "\n" + formulas) - known)


@pytest.mark.quick
@pytest.mark.parametrize("name", mixers.names())
def test_the_letters_of_a_mixer_s_formulas_are_explained(name: str) -> None:
    entry = mixers.entry(name)
    costs = " ".join((entry.state, entry.training, entry.inference))
    costs = re.sub(r"or|min|log", " ", costs)
    options = " ".join(field_docs(entry.config).values())
    docstring = docstring_of(PACKAGE.parent / entry.file)
    assert formulas_of(docstring), "the docstring has no formula"
    assert not unexplained(docstring), "a letter of the docstring's formulas"
    elsewhere = options + " N tokens at width D"
    assert not unexplained(docstring, formulas=" ".join(re.findall("[A-Za-z]", costs)), elsewhere=elsewhere)


@pytest.mark.quick
@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_with_a_formula_explains_letters(path: Path) -> None:
    docstring = docstring_of(path)
    if re.search(r"\S = \S", formulas_of(docstring)) or re.search(r"^y = ", docstring, flags=re.M):
        assert not unexplained(docstring)


DOCSTRING = """A mixer.

    h_t = a_t h_{t-1} + phi(x_t)        k~ a kind of key
    y = W_o (h, 1e-6, S^T)

Letters: x_t and y input and output of token t, h_t the state, a_t its decay, phi a map, k~ a key, S another
state, W_o a learned map.

Elsewhere b is a bias.
"""


def test_a_letter_that_is_explained_nowhere_is_found() -> None:
    assert unexplained(DOCSTRING) == []
    assert unexplained(DOCSTRING.replace("a_t its decay, ", "")) == ["a"]
    assert unexplained(DOCSTRING.replace("phi a map", "a map")) == ["phi"]
    assert unexplained(DOCSTRING.replace("y = W_o (h", "y = W_o (b * h")) == ["b"]
    assert unexplained(DOCSTRING, formulas="F D", elsewhere="Features, F.") == ["D"]
    assert unexplained(DOCSTRING.replace("Letters: ", "")) == ["S", "W", "a", "h", "k", "phi", "t", "x", "y"]
