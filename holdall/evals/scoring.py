"""Whether an output holds an answer: the metric `contains` of lm-eval's fda, swde and squad_completion."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def place_of(word: str, text: str) -> int:
    """Where a word first occurs in a text, in upper or lower case, as a character's place; -1 if nowhere."""
    found = re.search(re.escape(word), text, re.IGNORECASE)
    return -1 if found is None else found.start()


def occurs(word: str, text: str) -> bool:
    """Whether a word occurs in a text, in upper or lower case."""
    return place_of(word, text) >= 0


def contains(output: str, golds: Iterable[str]) -> int:
    """1 if any of the answers occurs in an output, in upper or lower case, else 0."""
    return int(any(occurs(gold, output) for gold in golds))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
    """The metric of a document of the recall suites, as the harness asks for it."""
    return {"contains": contains(results[0], doc["golds"])}


def first_gold(doc: Mapping[str, Any]) -> str:
    """The text whose likelihood is asked for: the first of the right answers, behind a space.

    Prompts end in a colon, and of a log-likelihood lm-eval puts no `target_delimiter` before the target.
    """
    return f" {doc['golds'][0]}"


def of_answer(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The metrics of a document of the suites of answers: minus the log-likelihood of the answer, in nats,
    and whether greedy generation would write it."""
    log_likelihood, greedy = results[0]
    return {"nats": -log_likelihood, "acc": float(greedy)}
