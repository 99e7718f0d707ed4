"""The prompts of every form, whole strings of worked documents."""

from __future__ import annotations

import pytest

from holdall.evals import prompts, suites

LETTER = "\nDevice: Glucose Meter X.\nSubmitted by Ames Labs.\n"
PASSAGE = "The Normans gave their name to Normandy, a region in France."

WORKED = [
    ("key", LETTER, "submitter", 1, "Device: Glucose Meter X.\nSubmitted by Ames Labs. Submitter:"),
    (
        "key",
        LETTER,
        "submitter",
        2,
        "Information about Submitter. Device: Glucose Meter X.\nSubmitted by Ames Labs.\n"
        "Device: Glucose Meter X.\nSubmitted by Ames Labs. Submitter:",
    ),
    # what the document ends with is not asked twice
    ("key", "By Ames Labs.\nSUBMITTER:submitter:", "submitter", 1, "By Ames Labs. Submitter:"),
    (
        "passage",
        PASSAGE,
        "Where is Normandy?",
        1,
        "The Normans gave their name to Normandy, a region in France.\nQuestion: Where is Normandy?\nAnswer:",
    ),
    (
        "passage",
        PASSAGE,
        "Where is Normandy?",
        2,
        "Where is Normandy? The Normans gave their name to Normandy, a region in France.\n"
        "The Normans gave their name to Normandy, a region in France.\nQuestion: Where is Normandy?\nAnswer:",
    ),
    (
        "question",
        PASSAGE,
        "where is normandy",
        1,
        "The Normans gave their name to Normandy, a region in France. Question: where is normandy\nAnswer:",
    ),
    (
        "question",
        PASSAGE,
        "where is normandy",
        2,
        "where is normandy The Normans gave their name to Normandy, a region in France.\n"
        "The Normans gave their name to Normandy, a region in France. Question: where is normandy\nAnswer:",
    ),
    (
        "kv",
        '{"a": "1",\n "b": "2"}',
        "b",
        None,
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"a": "1",\n "b": "2"}\n\nKey: "b"\nCorresponding value:',
    ),
]


@pytest.mark.parametrize(("form", "context", "asked", "reads", "wanted"), WORKED)
def test_a_worked_prompt(form: str, context: str, asked: str, reads: int | None, wanted: str) -> None:
    assert prompts.prompt(form, context, asked, reads) == wanted


def test_every_form_is_worked() -> None:
    asked = {
        (prompts.FORMS[task.of], task.reads or 1)
        for task in suites.tasks_of(list(suites.SUITES))
        if task.of in prompts.FORMS
    }
    assert asked == {(form, reads or 1) for form, _, _, reads, _ in WORKED}
    assert asked == set(prompts._FORMS)


def test_a_form_that_is_not_shown_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt of the form 'kv' that shows a document 2 times"):
        prompts.prompt("kv", "{}", "a", 2)
