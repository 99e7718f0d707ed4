"""The table of suites, and the YAML files that stand for its tasks in lm-eval."""

from __future__ import annotations

import pytest

from holdall.evals import harness, needles, prompts, suites
from holdall.evals.scoring import contains, of_answer

TASKS = suites.tasks_of(list(suites.SUITES))


def test_every_task_has_a_yaml_file_and_every_file_a_task() -> None:
    paths = {path.stem: path for path in harness.TASKS.rglob("*.yaml")}
    assert set(paths) == {task.name for task in TASKS}
    for name, path in paths.items():
        lines = path.read_text().splitlines()
        assert f"task: {name}" in lines
        assert any(line.startswith("metadata: {version: ") for line in lines), name


def test_every_task_says_what_it_stands_for_and_how_it_differs() -> None:
    for task in TASKS:
        assert task.stands_for, task.name
        assert task.differs, task.name
        assert bool(task.form) == (task.file is not None)


def test_recall_twice_shows_the_documents_of_recall() -> None:
    once, twice = suites.SUITES["recall"], suites.SUITES["recall-twice"]
    assert [(task.of, task.file, task.reads) for task in twice] == [
        (task.name, task.file, 2) for task in once
    ]
    assert {task.reads for task in once} == {1}


def test_answers_show_the_documents_of_recall() -> None:
    for name, reads in (("answers", 1), ("answers-twice", 2)):
        of = [(task.of, task.file, task.reads, task.metric) for task in suites.SUITES[name]]
        assert of == [(task.name, task.file, reads, "nats") for task in suites.SUITES["recall"]]


def test_the_score_of_an_answer() -> None:
    assert of_answer({}, [(-2.5, True)]) == {"nats": 2.5, "acc": 1.0}
    assert of_answer({}, [(-0.25, False)]) == {"nats": 0.25, "acc": 0.0}


def test_every_task_of_documents_has_a_form_and_every_needle_a_kind() -> None:
    assert {task.of for task in suites.tasks_of(["recall", "recall-twice", "kv"])} == set(prompts.FORMS)
    assert {task.name for task in suites.SUITES["needles"]} == set(needles.KINDS)


def test_suites_and_single_tasks_are_named_in_any_mixture() -> None:
    assert [task.name for task in suites.tasks_of(["nq", "kv", "nq"])] == ["nq", "kv_retrieval"]
    assert suites.suite_of("nq_twice") == "recall-twice"
    with pytest.raises(ValueError, match=r"no suite or task 'recal'\. Did you mean 'recall'"):
        suites.tasks_of(["recal"])
    with pytest.raises(
        ValueError, match=r"'x'\. Suites: recall, recall-twice, .*docs/evals.md lists their tasks$"
    ):
        suites.tasks_of(["x"])
    with pytest.raises(ValueError, match="no task 'recall'"):
        suites.named("recall")


@pytest.mark.parametrize(
    ("output", "golds", "right"),
    [
        (" france, of course", ["France"], 1),
        ("Fran", ["France"], 0),
        ("the second", ["first", "second"], 1),
        ("abc", ["a.c"], 0),  # an answer is no pattern
        ("a.c", ["A.C"], 1),
        ("", ["x"], 0),
    ],
)
def test_contains(output: str, golds: list[str], right: int) -> None:
    assert contains(output, golds) == right
