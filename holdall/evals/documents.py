"""Questions about documents, read from JSON lines: plain, .gz or .xz.

Each reader gives one line's questions in a fixed order; a question without an answer that occurs in the
document is left out, since there is nothing to recall.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from holdall import files
from holdall.evals.scoring import occurs
from holdall.evals.suites import Task
from holdall.files import RunError
from holdall.text.files import check, is_text

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz")
"""Of a file of documents, in the order in which they are looked for."""
QUESTIONS = 2
"""Attributes asked of a document that has many: the number of questions is near the published sets'."""


class Question(NamedTuple):
    """A question about a document."""

    id: str
    """Of the document, and of the question where a document has several."""
    context: str
    """The document."""
    asked: str
    """The name of an attribute, a question, or a key."""
    golds: tuple[str, ...]
    """The answers, any of which is right; each occurs in the document, in upper or lower case."""
    is_key: bool = False
    """Whether `asked` is the name of an attribute, which may stand before its value in the document."""


def find(folder: Path, task: Task) -> Path | None:
    """The file of a task's documents in a data folder; None if it is not there."""
    there = (folder / f"{task.file}{ending}" for ending in ENDINGS)
    return next((path for path in there if path.is_file()), None)


def place(folder: Path | None) -> str:
    """The data folder in words."""
    return "in a folder that you name by --data" if folder is None else f"in {folder}"


def missing(folder: Path | None, task: Task) -> str:
    """Which file a task needs, where it goes and in what form, as a sentence."""
    return (
        f"{task.name} needs {task.file}{ENDINGS[0]} (or {ENDINGS[1]}, {ENDINGS[2]}) {place(folder)}: "
        f"a line for each document, {task.form}"
    )


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line, from 1.

    Raises RunError, which names the file or the line, if the file is missing, damaged or holds anything else.
    """
    with files.open_file(path, follow=True) as raw:
        opened: Any = raw
        if path.suffix == ".gz":
            opened = gzip.open(raw)  # noqa: SIM115 - closes nothing that `raw` does not
        elif path.suffix == ".xz":
            opened = lzma.open(raw)  # noqa: SIM115
        lines = iter(opened)
        for number in itertools.count(1):
            try:
                line = next(lines, None)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise files.damaged(path, error or "it ends early", "Get it again.") from error
            if line is None:
                return
            if line.strip():
                yield number, files.parse_json(line, f"line {number} of {path}")


def questions(task: Task, path: Path) -> Iterator[Question]:
    """The questions of a task's file. Raises RunError, which says the form of a line, if one has another."""
    form, reader = READERS[task.of]
    by_document = _each(task, path, form, reader)
    if task.of not in ("fda", "swde"):
        yield from itertools.chain.from_iterable(by_document)
        return
    # the first question of every document before the second of any, so that the first N ask N documents
    documents = list(by_document)
    for turn in range(QUESTIONS):
        yield from (asked[turn] for asked in documents if turn < len(asked))


def _each(
    task: Task, path: Path, form: Any, reader: Callable[[int, Mapping[str, Any]], list[Question]]
) -> Iterator[list[Question]]:
    for document, (number, row) in enumerate(read_rows(path)):
        try:
            check(row, form)
        except ValueError as error:
            raise RunError(f"line {number} of {path}: {error}. {task.name} reads {task.form}") from error
        yield reader(document, row)


def occurring(answers: list[str], context: str) -> tuple[str, ...]:
    """The answers of more than one character that occur in a document, in upper or lower case, each once."""
    return tuple(dict.fromkeys(one for one in answers if len(one) > 1 and occurs(one, context)))


# ---------------------------------------------------------------------------------------------- readers


def _attributes(document: int, row: Mapping[str, Any]) -> list[Question]:
    """`QUESTIONS` of a document's attributes; each document begins with the next, so that all are asked."""
    context = row["text"].partition("Summary of information above...")[0]
    asked = []
    for key, values in row["attributes"].items():
        # values of web pages begin with the colon that follows their names there
        golds = occurring([value.strip().removeprefix(":").strip() for value in values], context)
        if key and golds:
            question = Question(f"{row['id']} {key}", context, key.replace("_", " "), golds, is_key=True)
            asked.append(question)
    first = document % max(len(asked), 1)
    return [*asked[first:], *asked[:first]][:QUESTIONS]


def _answers(document: int, row: Mapping[str, Any]) -> list[Question]:
    golds = occurring([answer.strip() for answer in row["answers"]], row["context"])
    return [Question(row["id"], row["context"], row["question"].strip(), golds)] if golds else []


def _spans(document: int, row: Mapping[str, Any]) -> list[Question]:
    answer = row["answer"]
    return _answers(document, {**row, "answers": [*answer["spans"], answer["number"]]})


def _pairs(document: int, row: Mapping[str, Any]) -> list[Question]:
    """A JSON object with a pair a line."""
    pairs = ",\n ".join(f'"{key}": "{value}"' for key, value in row["ordered_kv_records"])
    return [Question(row["id"], "{" + pairs + "}", row["key"], (row["value"],))]


TEXTS = {"id": is_text, "context": is_text, "question": is_text}
ATTRIBUTES = {"id": is_text, "text": is_text, "attributes": {...: [is_text]}}
READERS: dict[str, tuple[Any, Callable[[int, Mapping[str, Any]], list[Question]]]] = {
    "fda": (ATTRIBUTES, _attributes),
    "swde": (ATTRIBUTES, _attributes),
    "squad": ({**TEXTS, "answers": [is_text]}, _answers),
    "nq": ({**TEXTS, "answers": [is_text]}, _answers),
    "drop": ({**TEXTS, "answer": {"spans": [is_text], "number": is_text}}, _spans),
    "kv_retrieval": (
        {"id": is_text, "ordered_kv_records": [lambda pair: isinstance(pair, list) and len(pair) == 2],
         "key": is_text, "value": is_text},
        _pairs,
    ),
}  # fmt: skip
"""The form of a line, and what reads its questions."""
