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
from collections.abc import Iterable, Sequence
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

    def encode_batch(self, texts: Sequence[str], /) -> Sequence[Sequence[int]]:
        """The ids of each of several texts: one by one, where a tokenizer cannot encode them on all cores."""
        return [self.encode(text) for text in texts]

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
        self._ids: dict[str, np.ndarray] = {}
        self._before: dict[tuple[str, int], int] = {}

    def encode(self, text: str, /) -> Sequence[int]:
        """The ids of a text, which are not kept."""
        return self._codec.encode(text)

    def encode_batch(self, texts: Sequence[str], /) -> Sequence[Sequence[int]]:
        """The ids of each of several texts, which are not kept."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids."""
        return self._codec.decode(ids)

    def remember(self, places: Iterable[tuple[str, int]]) -> None:
        """Encode documents, and each as far as a character's place, at once; what is known is left out."""
        whole: dict[str, str] = {}
        before: dict[tuple[str, int], str] = {}
        for context, place in places:
            key = key_of(context)
            if key not in self._ids:
                whole[key] = context
            if (key, place) not in self._before:
                before[key, place] = context[:place]
        if whole or before:
            encoded = iter(self._codec.encode_batch([*whole.values(), *before.values()]))
            for key, ids in zip(whole, encoded, strict=False):
                small = max(ids, default=0) < 1 << 16
                self._ids[key] = np.array(ids, dtype=np.uint16 if small else np.uint32)
            for at, ids in zip(before, encoded, strict=True):
                self._before[at] = len(ids)

    def cut(self, context: str, place: int) -> tuple[np.ndarray, int]:
        """The ids of a document, and how many it has before a character's place: those of the text before."""
        self.remember([(context, place)])
        key = key_of(context)
        return self._ids[key], self._before[key, place]


def key_of(context: str) -> str:
    """What a document is known by: half of its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(context.encode(errors="surrogatepass")).hexdigest()[:32]


def cut(context: str, place: int, keep: int, codec: Remembered) -> Cut:
    """At most `keep` tokens of a document: half of them before a character's place, the rest from there on.

    A character whose bytes are divided between tokens at an edge is left out.
    """
    ids, at = codec.cut(context, place)
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
    return around_each([question], window, codec)[0]


def around_each(questions: Sequence[Question], window: int, codec: Codec) -> list[Cut | None]:
    """The same of several questions, whose documents are encoded at once."""
    remembered = codec if isinstance(codec, Remembered) else Remembered(codec)
    places = [_places(question) for question in questions]
    # of most of them the first place will do
    remembered.remember(
        [(each.context.strip(), first) for each, (first, *_) in zip(questions, places, strict=True)]
    )
    return [_around(*each, window, remembered) for each in zip(questions, places, strict=True)]


def _around(question: Question, places: Sequence[int], window: int, codec: Remembered) -> Cut | None:
    """The part around the first place by which an answer is shown."""
    for place in places:
        shown = cut(question.context.strip(), place, window - ANSWER_TOKENS, codec)
        if any(occurs(gold, shown.text) for gold in question.golds):
            return shown
    return None


def _places(question: Question) -> list[int]:
    """Where a window may be taken, in order: around the name that is asked for, then around the answer."""
    context = question.context.strip()
    places = [_earliest(context, question.golds)]
    if question.is_key:
        places.insert(0, _earliest(context, (*question.golds, question.asked)))
    return places


def _earliest(context: str, words: Sequence[str]) -> int:
    """Where the first of some words begins, in upper or lower case."""
    return min(place for word in words if (place := place_of(word, context)) >= 0)
