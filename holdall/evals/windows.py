"""The part of a document that a prompt shows: so many of the model's tokens around the answer.

As in "Just read twice" (arXiv 2407.05483), in its published code: of a window of N tokens, 50 are left for
the answer. The other K = N - 50 are taken from the document: K/2 before the earliest place where an answer
stands, or the name of the attribute that is asked for, and the rest after it. So the answer is in the window
by construction, and a score says nothing of a whole long document.

One thing differs: where the name stands so far before the answer that the window would lack the answer, the
window is taken around the answer.

Letters: N and K numbers of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from holdall.evals.documents import Question
from holdall.evals.scoring import occurs, place_of

WINDOW = 1024
"""Tokens of a window by default."""
ANSWER_TOKENS = 50
"""Tokens of a window that are left for the answer."""
REPLACEMENT = "\ufffd"


@runtime_checkable  # for shape checks at test time
class Codec(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, /) -> Sequence[int]:
        """The ids of a text, without what a document begins or ends with."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids; bytes that are not UTF-8 become the replacement character."""


class Cut(NamedTuple):
    """A part of a document."""

    text: str
    first: int
    """Its first token, by place in the document, from 0."""
    end: int
    """The token after its last."""
    truncated: bool
    """Whether the document has more."""


class Remembered:
    """A tokenizer that encodes a document once, for all questions and tasks that show it.

    Documents can be a hundred times as long as a window, so that encoding them is most of preparing a task.
    What is kept is two bytes per token of the documents, or four if the vocabulary needs them.

    Args:
        codec: the tokenizer.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: dict[bytes, np.ndarray] = {}
        self._before: dict[tuple[bytes, int], int] = {}

    def encode(self, text: str, /) -> Sequence[int]:
        """The ids of a text, which are not kept."""
        return self._codec.encode(text)

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids."""
        return self._codec.decode(ids)

    def document(self, context: str) -> np.ndarray:
        """The ids of a document."""
        if (key := _key(context)) not in self._ids:
            ids = self._codec.encode(context)
            self._ids[key] = np.array(ids, dtype=np.uint16 if max(ids, default=0) < 1 << 16 else np.uint32)
        return self._ids[key]

    def tokens_before(self, context: str, place: int) -> int:
        """How many ids a document has before a character's place, by those of the text before it."""
        if (key := (_key(context), place)) not in self._before:
            self._before[key] = len(self._codec.encode(context[:place]))
        return self._before[key]


def _key(context: str) -> bytes:
    return hashlib.sha256(context.encode(errors="surrogatepass")).digest()


def cut(context: str, place: int, keep: int, codec: Codec) -> Cut:
    """At most `keep` tokens of a document: half of them before a character's place, the rest from there on.

    A character whose bytes are divided between tokens at an edge is left out.
    """
    remembered = codec if isinstance(codec, Remembered) else Remembered(codec)
    ids = remembered.document(context)
    at = remembered.tokens_before(context, place)
    first = max(0, at - keep // 2)
    end = min(len(ids), first + keep)
    text = codec.decode(ids[first:end].tolist()) if end - first < len(ids) else context
    if first > 0:
        text = text.lstrip(REPLACEMENT)
    if end < len(ids):
        text = text.rstrip(REPLACEMENT)
    return Cut(text, first, end, end - first < len(ids))


def around(question: Question, window: int, codec: Codec) -> Cut | None:
    """The part of a question's document that is shown in a window of so many tokens.

    Returns None if it would hold no answer, which then is longer than half of the window.
    """
    context, keep = question.context.strip(), window - ANSWER_TOKENS
    answer = _earliest(context, question.golds)
    places = [answer]
    if question.is_key:
        places.insert(0, _earliest(context, (*question.golds, question.asked)))
    for place in places:
        shown = cut(context, place, keep, codec)
        if any(occurs(gold, shown.text) for gold in question.golds):
            return shown
    return None


def _earliest(context: str, words: Sequence[str]) -> int:
    """Where the first of some words begins, in upper or lower case."""
    return min(place for word in words if (place := place_of(word, context)) >= 0)
