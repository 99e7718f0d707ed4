"""General tasks: rows of the files that llm-foundry published, asked exactly as lm-eval 0.4.13 asks them.

    lambada                   the last word of a passage, which only the whole passage gives away
    hellaswag, copa           how a description continues
    piqa, arc_*, openbookqa   the answer to a question among two to four
    boolq                     yes or no, of a passage
    winogrande                which of two names is meant: two contexts, one continuation

A model is asked for log-likelihoods only: `pairs` gives the contexts and continuations of a document. What
the files have otherwise than lm-eval's own data sets is put right here, by one function for each file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from holdall.evals import documents
from holdall.evals.suites import Task
from holdall.files import RunError
from holdall.text.files import check, is_text

Doc = dict[str, Any]
"""A document as lm-eval's task has it: `query`, `choices` and `gold`; or, where contexts differ, `contexts`,
`continuation` and `gold`; or `context` and `target` where there is nothing to choose."""
DELIMITER = " "
"""What lm-eval puts before a choice."""

SECOND_SENTENCE = re.compile(r"^.*[.!?][^\w\s]* +(?=\S)", re.DOTALL)
"""Up to the beginning of the last sentence."""
CONNECTOR = re.compile(r",(?= (?:because|therefore)$)")


# ------------------------------------------------------------------------------- rows as lm-eval's documents


def lambada(row: Mapping[str, Any]) -> Doc:
    """The form "openai": the target is a space and what follows the text's last space."""
    context, _, word = f"{row['context']} {row['continuation']}".rpartition(" ")
    return {"context": context, "target": f" {word}"}


def hellaswag(row: Mapping[str, Any]) -> Doc:
    """Captions of videos end amid a sentence, of which the file does not capitalise the first letter."""
    query = row["query"]
    if query[-1] not in ".!?" and (first := SECOND_SENTENCE.match(query)) is not None:
        query = first[0] + query[first.end() :].capitalize()
    return _choose(_cleaned(query), map(_cleaned, row["choices"]), row)


def _cleaned(text: str) -> str:
    """A text without marks in brackets, which its source, WikiHow, left there."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def piqa(row: Mapping[str, Any]) -> Doc:
    """The file's questions end with a line break."""
    return _choose(f"{row['query'].removesuffix(chr(10))}\nAnswer:", row["choices"], row)


def arc(row: Mapping[str, Any]) -> Doc:
    """Questions of fewer than four choices have their first choice twice in the file."""
    choices = list(dict.fromkeys(row["choices"]))
    doc = _choose(f"{row['query']}\nAnswer:", choices, row)
    return {**doc, "gold": choices.index(row["choices"][row["gold"]])}


def openbookqa(row: Mapping[str, Any]) -> Doc:
    """The beginning of a sentence, or a question, as it is."""
    return _choose(row["query"], row["choices"], row)


def boolq(row: Mapping[str, Any]) -> Doc:
    """The passage is not announced; the choices are "no" and "yes"."""
    return _choose(f"{row['query'].removeprefix('Passage: ')}\nAnswer:", row["choices"], row)


def copa(row: Mapping[str, Any]) -> Doc:
    """No comma before "because" and "therefore"; choices have a space of their own besides lm-eval's."""
    choices = (f" {choice[0].lower()}{choice[1:]}" for choice in row["choices"])
    return _choose(CONNECTOR.sub("", row["query"]), choices, row)


def winogrande(row: Mapping[str, Any]) -> Doc:
    """The sentence up to one of two names, and what follows the name."""
    continuation = row["continuation"].strip()
    return {"contexts": list(row["context_options"]), "continuation": continuation, "gold": row["gold"]}


def _choose(query: str, choices: Any, row: Mapping[str, Any]) -> Doc:
    return {"query": query, "choices": list(choices), "gold": row["gold"]}


# --------------------------------------------------------------------------------------------- the tasks


def _filled(value: Any) -> bool:
    return is_text(value) and bool(value)


class Form(NamedTuple):
    """How the rows of a task's file become documents."""

    document: Callable[[Mapping[str, Any]], Doc]
    row: Mapping[str, Any]
    """What a row must have, as `check` takes it."""
    options: str = ""
    """The field whose entries `gold` counts; empty where there is nothing to choose."""


def _index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


CHOICES: dict[str, Any] = {"query": _filled, "choices": [_filled], "gold": _index}
FORMS: dict[str, Form] = {
    "lambada": Form(lambada, {"context": _filled, "continuation": _filled}),
    "hellaswag": Form(hellaswag, CHOICES, "choices"),
    "piqa": Form(piqa, CHOICES, "choices"),
    "arc_easy": Form(arc, CHOICES, "choices"),
    "arc_challenge": Form(arc, CHOICES, "choices"),
    "winogrande": Form(
        winogrande,
        {"context_options": [_filled], "continuation": _filled, "gold": _index},
        "context_options",
    ),
    "openbookqa": Form(openbookqa, CHOICES, "choices"),
    "boolq": Form(boolq, CHOICES, "choices"),
    "copa": Form(copa, CHOICES, "choices"),
}
"""By the name of a task."""


def document(task: str, row: Mapping[str, Any]) -> Doc:
    """A row of a task's file as lm-eval's document. Raises ValueError for a row of another form."""
    form = FORMS[task]
    check(row, form.row)
    if form.options and not row["gold"] < len(row[form.options]):
        raise ValueError(f"gold = {row['gold']} is none of its {len(row[form.options])} {form.options}")
    return form.document(row)


def pairs(doc: Doc) -> list[tuple[str, str]]:
    """What a model is asked of a document: contexts, and the continuation whose log-likelihood is wanted."""
    if "target" in doc:
        return [(doc["context"], doc["target"])]
    if "contexts" in doc:
        return [(context, f"{DELIMITER}{doc['continuation']}") for context in doc["contexts"]]
    return [(doc["query"], f"{DELIMITER}{choice}") for choice in doc["choices"]]


def rows(task: Task, data: Path | None) -> Iterator[Doc]:
    """The documents of a task's file, with the numbers of their lines as `id`.

    Raises RunError, which says which file is missing or which line has another form.
    """
    path = None if data is None else documents.find(data, task)
    if path is None:
        raise RunError(documents.missing(data, task))
    for number, row in documents.read_rows(path):
        try:
            yield {"id": str(number), **document(task.name, row)}
        except ValueError as error:
            raise RunError(f"line {number} of {path}: {error}. {task.name} reads {task.form}") from error
