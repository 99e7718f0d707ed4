"""What docstrings claim about official code is held by tests that say so: no claim without a test.

A mixer's docstring ends with two sections: how official weights map onto its own ("Weights"), and what it
computes otherwise ("Deviations"). Each is one claim, or a list with one claim per line that starts with "- ".
The test that holds a claim names its file and its opening words:

    @pytest.mark.claim("mixers/mamba.py", "Weights", "the recurrent state is fp32")

So a new claim without a test is red here, and so is the removal of a test, or of a claim that a test names.
The mixers of the package are checked, and any other of its files with such sections; files of --load are not.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdall

PACKAGE = Path(holdall.__file__).parent
TESTS = Path(__file__).parent
MIXERS = [path for path in sorted((PACKAGE / "mixers").glob("*.py")) if path.name != "__init__.py"]
SECTION = re.compile(r"^(?=(?:Weights|Deviations)\b)", re.MULTILINE)


def claims_of(docstring: str) -> list[str]:
    """Each claim in one line: the items of a section that lists some, any other section as a whole."""
    found = []
    for section in SECTION.split(docstring)[1:]:
        head, *items = re.split(r"^- ", section, flags=re.MULTILINE)
        found += [" ".join(claim.split()) for claim in items or [head]]
    return found


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def package_claims() -> dict[str, list[str]]:
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if SECTION.search(path.read_text("utf-8"))]
    return {path.relative_to(PACKAGE).as_posix(): claims_of(docstring_of(path)) for path in paths}


def marks_of(source: str) -> Iterator[tuple[str, str, list[str]]]:
    """Test, file and opening words of every claim mark."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.claim":
                    file, *words = (ast.literal_eval(argument) for argument in decorator.args)
                    yield node.name, file, words


def all_marks() -> list[tuple[str, str, list[str]]]:
    sources = [path.read_text("utf-8") for path in sorted(TESTS.rglob("*.py"))]
    return [mark for source in sources if "pytest.mark.claim(" in source for mark in marks_of(source)]


def faults(claims: dict[str, list[str]], marks: list[tuple[str, str, list[str]]]) -> list[str]:
    """Claims that no test holds, and marks that name no claim or more than one."""
    held, found = set(), []
    for test, file, words in marks:
        for opening in words:
            named = [claim for claim in claims.get(file, []) if claim.startswith(opening)]
            held.update((file, claim) for claim in named)
            if len(named) != 1:
                found.append(f"{test} holds {opening!r}, which opens {len(named)} claims of holdall/{file}")
    for file, of_file in claims.items():
        for claim in of_file:
            if (file, claim) not in held:
                found.append(
                    f"holdall/{file} claims {claim!r}, and no test holds it: mark one with "
                    f"@pytest.mark.claim({file!r}, {claim[:30]!r}), or leave the claim out"
                )
    return found


def test_every_claim_is_held_by_a_test_and_every_mark_names_a_claim() -> None:
    found = faults(package_claims(), all_marks())
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", MIXERS, ids=lambda path: path.stem)
def test_every_mixer_says_what_deviates(path: Path) -> None:
    """After the sections nothing follows, and before them nothing is said of official code."""
    before, *sections = SECTION.split(docstring_of(path))
    assert any(section.startswith("Deviations") for section in sections), "'Deviations: none.' is a claim too"
    assert "official" not in before
    for section in sections:
        assert "\n\n" not in section.strip(), "a section ends the docstring"


DOCSTRING = """A mixer.

Weights map onto another's.
Deviations:
- the state is smaller;
- the state has
  other units.
"""
SOURCE = """
@pytest.mark.claim("mixers/a.py", "Weights")
@pytest.mark.claim("mixers/a.py", "the state is", "the state has other")
def test_a(): ...
"""


def test_a_claim_without_a_test_and_a_mark_without_a_claim_are_found() -> None:
    claims = {"mixers/a.py": claims_of(DOCSTRING)}
    assert claims["mixers/a.py"][1:] == ["the state is smaller;", "the state has other units."]
    assert not faults(claims, list(marks_of(SOURCE)))
    for word in ("Weights", "the state is", "the state has other"):
        other = "the state is" if word == "Weights" else "Weights"
        (fault,) = faults(claims, list(marks_of(SOURCE.replace(f'"{word}"', f'"{other}"'))))
        assert word in fault
        assert "no test holds it" in fault
    for word, count in (("the state", 2), ("no state", 0)):
        fault, *_ = faults(claims, list(marks_of(SOURCE.replace("Weights", word))))
        assert f"opens {count} claims" in fault
