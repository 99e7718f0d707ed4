"""Questions from files: what each line asks, in which order, and errors that name file, line and form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evals.rows import ROWS, written

from holdall.evals import documents, suites
from holdall.files import RunError


def asked(folder: Path, name: str, ending: str = ".jsonl") -> list[documents.Question]:
    path = written(folder, name, ROWS[name], ending)
    assert documents.find(folder, suites.named(name)) == path
    return list(documents.questions(suites.named(name), path))


def test_attributes_take_turns(tmp_path: Path) -> None:
    """The first question of every document comes before the second of any; each document begins elsewhere."""
    found = asked(tmp_path, "fda")
    assert [one.id for one in found] == [
        "K0 regulatory_class", "K1 Made by", "K2 Analyte(s)",
        "K0 Made by", "K1 Analyte(s)", "K2 regulatory_class",
    ]  # fmt: skip
    assert [one.golds for one in found[:3]] == [("Class II",), ("ames labs",), ("Glucose", "Urea")]
    assert found[0].asked == "regulatory class"
    assert all(one.is_key and one.context.endswith("Urea. ") for one in found)


@pytest.mark.parametrize("ending", documents.ENDINGS)
def test_answers_of_one_character_or_of_elsewhere_are_left_out(tmp_path: Path, ending: str) -> None:
    (found,) = asked(tmp_path, "squad", ending)
    assert found == ("a", "Normandy is in France.", "Where?", ("France",), False)


def test_spans_and_numbers_that_occur(tmp_path: Path) -> None:
    found = asked(tmp_path, "drop")
    assert [(one.id, one.golds) for one in found] == [("a", ("Bears", "They")), ("b", ("24",))]


def test_pairs_are_written_as_json_of_a_line_each(tmp_path: Path) -> None:
    (found,) = asked(tmp_path, "kv_retrieval")
    assert found.context == '{"k1": "v1",\n "k2": "v2"}'
    assert (found.asked, found.golds) == ("k2", ("v2",))


def test_every_task_with_a_file_has_a_reader() -> None:
    of_files = {task.of for task in suites.tasks_of(["recall", "recall-twice", "kv"])}
    assert of_files == set(documents.READERS)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"id": "a"', "line 2 of .*squad.jsonl is damaged: it is not JSON"),
        ("[1]", "line 2 of .*squad.jsonl is damaged: it does not hold a JSON object"),
        (
            {"id": "a", "context": "b", "question": "c"},
            "line 2 of .*: it has no 'answers'. squad reads {\"id\"",
        ),
        ({"id": 1, "context": "b", "question": "c", "answers": []}, "line 2 of .*: 'id' is '1'"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = written(tmp_path, "squad", [ROWS["squad"][0], row])
    with pytest.raises(RunError, match=said):
        list(documents.questions(suites.named("squad"), path))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.xz"])
def test_a_file_that_ends_early_is_named(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, "squad", ROWS["squad"] * 50, ending)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match=rf"squad{ending} is damaged.* Get it again"):
        list(documents.questions(suites.named("squad"), path))


def test_what_is_missing_says_where_it_goes_and_its_form(tmp_path: Path) -> None:
    task = suites.named("nq_twice")
    assert documents.find(tmp_path, task) is None
    assert documents.missing(tmp_path, task) == (
        f'nq_twice needs nq.jsonl (or .jsonl.gz, .jsonl.xz) in {tmp_path}: a line for each document, {{"id", '
        '"context", "question", "answers": [ANSWER, ...]}'
    )
    assert "that you name by --data" in documents.missing(None, task)
