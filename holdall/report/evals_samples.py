"""What models answered, packed for the page: a compressed block per task, opened when it is looked at.

A prompt is stored once, however many models read the same; of a long one the parts around the answers are
stored. Scores are those of all documents, texts those of the first ones alone.

Letters: N documents, of which the first S have their texts stored.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from holdall.report.evals_data import Evaluation, Samples, Task

SAMPLES = 200
"""Documents of each task whose texts are on the page, unless a reader asks for more."""
LONGEST = 24_000
"""Characters of a prompt that are stored; of a longer one only parts."""
START, AROUND, END = 2_000, 3_000, 4_000
"""Characters of these parts: at the start, on either side of the first answers, and at the end."""


def pack(evaluation: Evaluation, task: Task, samples: int = SAMPLES) -> dict[str, Any]:
    """A task as the page has it: who answered, and a block of base64 over deflate over JSON.

    The block's columns are those of "columns": the score of each document, null where the model has not
    answered it, and the cells of the first `samples` documents. Its "about" has a number for each text.
    """
    columns = [
        (index, reads, model.samples[task, reads])
        for index, model in enumerate(evaluation.models)
        for reads in evaluation.readings(task)
        if (task, reads) in model.samples
    ]
    documents = list(dict.fromkeys(document for *_, column in columns for document in column.right))
    shown = documents[:samples]
    texts = _Once()
    targets: dict[str, list[str]] = {}
    cells = [_cells(column, shown, targets, texts) for *_, column in columns]
    block = {
        "documents": [[document, targets.get(document, [])] for document in shown],
        "texts": list(texts.places),
        "about": _numbered(columns, documents),
        "scores": [[column.right.get(document) for document in documents] for *_, column in columns],
        "cells": cells,
    }
    data = json.dumps(block, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return {
        "name": evaluation.text(task, 0),
        "unit": task.unit,
        "metric": task.metric,
        "lower": task.lower_is_better,
        "documents": len(documents),
        "shown": len(shown),
        "columns": [[index, reads, len(column.right)] for index, reads, column in columns],
        "block": base64.b64encode(zlib.compress(data)).decode(),
    }


def _numbered(columns: Sequence[tuple[int, int, Samples]], documents: Sequence[str]) -> list[int]:
    """The text that each question is about, as a number from 0."""
    known = {document: key for *_, column in columns for document, key in column.texts.items()}
    texts = _Once()
    return [texts.place(known.get(document, document)) for document in documents]


class _Once:
    """Texts, each with a number of its own."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))


def _cells(
    column: Samples, shown: Sequence[str], targets: dict[str, list[str]], texts: _Once
) -> list[dict[str, Any] | None]:
    """A cell per document: what one model made of it; None where it has not answered yet."""
    answers = dict(column.read(shown))
    cells: list[dict[str, Any] | None] = []
    for document in shown:
        answer = answers.get(document)
        if answer is None:
            cells.append(None)
            continue
        golds = _golds(answer)
        targets.setdefault(document, golds)
        cell: dict[str, Any] = {"prompt": texts.place(fold(str(answer.get("prompt", "")), golds))}
        cell |= _about(answer)
        if isinstance(answer.get("choices"), list):
            cell["choices"] = [str(choice) for choice in answer["choices"]]
            cell["logprobs"] = [_finite(value) for value in answer.get("logprobs") or ()]
            cell["gold"] = _gold(answer)
        cells.append(cell)
    return cells


def _about(answer: dict[str, Any]) -> dict[str, Any]:
    """What was written and how much was read, as far as the folder says it in the form that it has."""
    about: dict[str, Any] = {}
    output, tokens, window = (answer.get(name) for name in ("output", "tokens", "window"))
    if output is not None:
        about["output"] = str(output)
    if isinstance(tokens, int):
        about["tokens"] = tokens
    if isinstance(window, list) and len(window) == 2 and all(isinstance(end, int) for end in window):
        about["window"] = window
    if answer.get("truncated"):
        about["truncated"] = True
    return about


def _golds(answer: dict[str, Any]) -> list[str]:
    """The answers that count as right, as text."""
    target = answer.get("target")
    if (place := _gold(answer)) is not None:
        target = str(answer["choices"][place]).strip()
    return [str(gold) for gold in (target if isinstance(target, list) else [target]) if gold is not None]


def _gold(answer: dict[str, Any]) -> int | None:
    """Which of the choices is right, if there are some and it is said by its place or its text."""
    choices, gold = answer.get("choices"), answer.get("gold")
    if not isinstance(choices, list):
        return None
    if isinstance(gold, str):
        gold = next((k for k, choice in enumerate(choices) if str(choice).strip() == gold.strip()), None)
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _finite(value: Any) -> float | None:
    """For JSON, which has no other numbers; to three digits, which is what the page shows."""
    return round(float(value), 3) if isinstance(value, int | float) and abs(value) < 1e9 else None


def fold(prompt: str, golds: Iterable[str]) -> str:
    """A long prompt without most of what is far from its ends and its answers; what was cut is said so."""
    if len(prompt) <= LONGEST:
        return prompt
    keep = [(0, START), (len(prompt) - END, len(prompt))]
    for gold in golds:
        if gold and (found := re.search(re.escape(gold), prompt, re.IGNORECASE)):
            keep.append((max(0, found.start() - AROUND), min(len(prompt), found.end() + AROUND)))
    parts, last = [], 0
    for start, end in sorted(keep):
        if start > last:
            parts.append(f"\n[… {start - last:,} characters are not on this page …]\n")
        parts.append(prompt[max(start, last) : end])
        last = max(last, end)
    return "".join(parts)
