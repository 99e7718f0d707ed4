"""The suites of `holdall eval --suite`: their tasks, the file of each, what it stands for and how it differs.

Absolute scores are those of the files named here, not those of the papers: what can be compared with a paper
is the order of models and the gain from reading twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdall.contract import closest, did_you_mean

Unit = Literal["share", "nats", ""]
"""What a metric counts: a "share" of right answers, shown in percent; "nats"; or "" for any other number."""


def unit_text(unit: str, metric: str) -> str:
    """A `Unit` in words: "%" for shares, and the metric's own name where it has none."""
    return "%" if unit == "share" else unit or metric


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of a suite; `tasks/` has a YAML file of the same name for the harness."""

    name: str
    """As in `results.jsonl`, and the `task` of its YAML file."""
    file: str | None
    """The file of its documents, without .jsonl, .jsonl.gz or .jsonl.xz; None if they are drawn."""
    form: str
    """The fields of a line of its file, as an error and the documentation show them."""
    stands_for: str
    """The published set."""
    differs: str
    """How its documents and prompts differ from that set."""
    metric: str = "contains"
    """The metric that stands in tables, by the harness's name; others of the YAML file stand beside it."""
    unit: Unit = "share"
    """What that metric counts."""
    reads: int | None = None
    """How often a prompt shows the document; None where that is no question."""
    of: str = ""
    """The task that shows the same documents once, by which both are paired; by default the task itself."""
    windowed: bool = True
    """Whether documents are cut to the window."""

    def __post_init__(self) -> None:
        if not self.of:
            object.__setattr__(self, "of", self.name)

    def twice(self) -> Task:
        """The task that shows the same documents twice."""
        return dataclasses.replace(self, name=f"{self.name}_twice", reads=2)

    def likelihood(self) -> Task:
        """The task that asks how likely the answer is to a model, in place of having it write one."""
        return dataclasses.replace(
            self, name=f"{self.name}_answer", metric="nats", unit="nats", differs=LIKELIHOOD
        )


LIKELIHOOD = "the same prompts; how likely the first right answer is, not whether a text holds it"
"""How the tasks of answers differ from those of recall."""
CLOZE = "questions in place of clozes, asked as 'Question: ...' and 'Answer:' on a line of its own"
RECALL = (
    Task(
        name="fda",
        file="fda510k",
        form='{"id", "text", "attributes": {KEY: [VALUE, ...]}}',
        stands_for="FDA of Based and Just read twice (1,102 documents)",
        differs="other 510(k) summaries; two attributes of each document, in turn, whose values occur in it; "
        "any value of an attribute that has several is right",
        reads=1,
    ),
    Task(
        name="swde",
        file="swde_books",
        form='{"id", "text", "attributes": {KEY: [VALUE, ...]}}',
        stands_for="SWDE of Based and Just read twice (1,111 documents)",
        differs="pages of one book shop, not of films and universities; two attributes of each page, in turn",
        reads=1,
    ),
    Task(
        name="squad",
        file="squad",
        form='{"id", "context", "question", "answers": [ANSWER, ...]}',
        stands_for="SQuAD completion of Based and Just read twice (2,984 documents)",
        differs=CLOZE,
        reads=1,
    ),
    Task(
        name="nq",
        file="nq",
        form='{"id", "context", "question", "answers": [ANSWER, ...]}',
        stands_for="NQ of Just read twice (3,157 documents of 8,858 tokens)",
        differs=f"the passage with the answer (about 500 characters), not the page; {CLOZE}",
        reads=1,
    ),
    Task(
        name="drop",
        file="drop_contrast",
        form='{"id", "context", "question", "answer": {"spans": [SPAN, ...], "number": NUMBER}}',
        stands_for="DROP of Just read twice (2,084 documents)",
        differs=f"the contrast set; spans and numbers that occur in the passage, no dates; {CLOZE}",
        reads=1,
    ),
)
"""Answers that stand in a document, which is shown once."""

FOUNDRY = "the rows that llm-foundry published, asked as lm-eval 0.4.13 asks its own"
"""How the general tasks differ from lm-eval's, where nothing else is said."""
QUERY = '{"query", "choices": [CHOICE, ...], "gold": NUMBER}'


def _general(
    name: str, stands_for: str, *, metric: str = "acc", form: str = QUERY, differs: str = FOUNDRY
) -> Task:
    """A task whose file has its name, and whose rows are asked whole."""
    return Task(
        name=name, file=name, form=form, stands_for=stands_for, differs=differs, metric=metric, windowed=False
    )


GENERAL = (
    _general(
        "lambada",
        "LAMBADA, lm-eval's lambada_openai",
        form='{"context", "continuation": WORD}',
        differs="nothing: the last word, after the last space",
    ),
    _general(
        "hellaswag",
        "HellaSwag, 10,042 rows of validation",
        metric="acc_norm",
        differs=f"{FOUNDRY}; captions are divided at their last full stop",
    ),
    _general("piqa", "PIQA, 1,838 rows of validation"),
    _general(
        "arc_easy", "ARC-Easy, 2,376 rows of test", differs=f"{FOUNDRY}; of a question with five choices four"
    ),
    _general(
        "arc_challenge",
        "ARC-Challenge, 1,172 rows of test",
        metric="acc_norm",
        differs=f"{FOUNDRY}; of a question with five choices four",
    ),
    _general(
        "winogrande",
        "WinoGrande XL, 1,267 rows of validation",
        form='{"context_options": [CONTEXT, CONTEXT], "continuation", "gold": NUMBER}',
    ),
    _general("openbookqa", "OpenBookQA, 500 rows of test", metric="acc_norm"),
    _general(
        "boolq",
        "BoolQ of SuperGLUE, 3,270 rows of validation",
        differs=f"{FOUNDRY}; passages do not begin with their title, as SuperGLUE's do",
    ),
    _general("copa", "COPA of SuperGLUE, 100 rows of validation"),
)
"""Questions about what a model learned: log-likelihoods of continuations, zero-shot."""

SUITES: dict[str, tuple[Task, ...]] = {
    "recall": RECALL,
    "recall-twice": tuple(task.twice() for task in RECALL),
    "answers": tuple(task.likelihood() for task in RECALL),
    "answers-twice": tuple(task.likelihood().twice() for task in RECALL),
    "general": GENERAL,
    "kv": (
        Task(
            name="kv_retrieval",
            file="kv_retrieval_75",
            form='{"id", "ordered_kv_records": [[KEY, VALUE], ...], "key", "value"}',
            stands_for="key-value retrieval of Lost in the middle, near RULER's niah_multikey_3",
            differs="the published 75 pairs of UUIDs; shown whole, whatever the window",
            windowed=False,
        ),
    ),
    "needles": (
        Task(
            name="niah_single_1",
            file=None,
            form="",
            stands_for="RULER's niah_single_1: a word and a number of seven digits in repeated sentences",
            differs="words of our own lists; lengths are those of the window, not 4,096 and more",
        ),
        Task(
            name="niah_single_2",
            file=None,
            form="",
            stands_for="RULER's niah_single_2: a word and a number of seven digits in an essay",
            differs='the bundled "Pride and Prejudice" in place of essays, which based-mini '
            "was trained on; words of our own lists",
        ),
        Task(
            name="niah_single_3",
            file=None,
            form="",
            stands_for="RULER's niah_single_3: a word and a UUID in an essay",
            differs='the bundled "Pride and Prejudice" in place of essays, which based-mini '
            "was trained on; words of our own lists",
        ),
    ),
}


def tasks_of(names: Sequence[str]) -> list[Task]:
    """The tasks of suites, and tasks that are named themselves, each once and in their order.

    Raises ValueError about an unknown name, with the closest one.
    """
    single = {task.name: task for tasks in SUITES.values() for task in tasks}
    chosen: dict[str, Task] = {}
    for name in names:
        if name not in SUITES and name not in single:
            raise ValueError(
                f"there is no suite or task '{name}'. {closest(name, [*SUITES, *single])}"
                f"Suites: {', '.join(SUITES)}; docs/evals.md lists their tasks"
            )
        chosen |= {task.name: task for task in SUITES.get(name, (single.get(name),)) if task is not None}
    return list(chosen.values())


def suite_of(task: str) -> str:
    """The suite that has a task; empty if none has."""
    return next((name for name, tasks in SUITES.items() if task in {one.name for one in tasks}), "")


def named(name: str) -> Task:
    """The task of a name. Raises ValueError about an unknown one, with the closest one."""
    known = {task.name: task for task in tasks_of(list(SUITES))}
    if name not in known:
        raise ValueError(f"there is no task '{name}'. {did_you_mean(name, known)}")
    return known[name]
