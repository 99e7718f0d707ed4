"""A needle in a haystack, after RULER (arXiv 2404.06654): a value to recall among sentences beside the point.

    A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you
    about the number afterwards.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
    One of the special magic numbers for quiet-harbor is: 4829137.
    The grass is green. ...
    What is the special magic number for quiet-harbor mentioned in the provided text? The special magic number
    for quiet-harbor mentioned in the provided text is

The texts are RULER's. A document is drawn from the seed, the task's name and its own number alone, so that it
stays the same whatever else is drawn. The haystack is as large as the window allows, by the model's tokens,
beside the answer's.
"""

from __future__ import annotations

import bisect
import functools
import random
import re
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from holdall.evals.documents import read_rows
from holdall.evals.windows import ANSWER_TOKENS, Codec
from holdall.text import default

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * place / 39) for place in range(40))
"""Percent of a haystack before the needle."""
SENTENCE_ENDS = r"(?<=[.!?])\s+"
SOME = 65
"""Units of haystack from which the size of the whole is estimated."""
DOCUMENTS = 200
"""Documents of a task; RULER has 500."""
ADJECTIVES = """
amber ancient bitter brave bright calm candid clever cold curious damp dark dusty eager early empty fair
faint fierce final gentle glad golden grand hollow honest humble icy idle keen kind late lively lonely loyal
lucky mellow mild modest narrow neat noble odd pale patient plain polite proud quick quiet rapid rare ripe
rough round rusty salty sharp shy silent simple slow smooth sober soft steady still strange sturdy subtle
sunny tall tame tender tidy tiny vast vivid warm weary wild wise young
""".split()  # noqa: SIM905 - a list of words is read as words
NOUNS = """
anchor apple arrow basket beacon bell blanket bridge bucket button candle canyon castle cellar chair cherry
circle clock cloud coast copper cottage cradle crystal desert drum engine feather fence fiddle field forest
fountain garden glacier hammer harbor helmet hill island jacket kettle kitchen ladder lantern lemon library
lighthouse marble market meadow mirror mountain needle ocean orchard oven paddle palace paper pebble pencil
piano pillow pond quarry ribbon river saddle sail shadow shell shovel signal spoon stable statue table
temple thread thunder ticket tower tunnel valley velvet village violin wagon whistle willow window winter
""".split()  # noqa: SIM905 - a list of words is read as words


class Needle(NamedTuple):
    """A document with a value in it, and its question."""

    prompt: str
    gold: str
    depth: int
    """Percent of the haystack before the needle."""


class Kind(NamedTuple):
    """What a task hides, and in what."""

    haystack: str
    """"noise" or "essay"."""
    values: str
    """"numbers" or "uuids"."""


KINDS = {
    "niah_single_1": Kind("noise", "numbers"),
    "niah_single_2": Kind("essay", "numbers"),
    "niah_single_3": Kind("essay", "uuids"),
}


def needles(
    task: str, window: int, codec: Codec, *, seed: int = 0, count: int = DOCUMENTS
) -> Iterator[Needle]:
    """The documents of a task, each with its answer in at most `window` tokens.

    Raises ValueError if a window has no room for the question.
    """
    for value, depth, made in _drawn(task, seed, count):
        yield Needle(_largest(made, task, window, codec), value, depth)


def least_window(task: str, codec: Codec, *, seed: int = 0, count: int = DOCUMENTS) -> int:
    """The fewest tokens of a window that has room for the question and answer of every document of a task."""
    return (
        max(len(codec.encode(made(1))) for made in (each for *_, each in _drawn(task, seed, count)))
        + ANSWER_TOKENS
    )


def _drawn(task: str, seed: int, count: int) -> Iterator[tuple[str, int, Callable[[int], str]]]:
    """Of each document its value, its depth, and what writes its prompt with so many units of haystack."""
    kind = KINDS[task]
    for number in range(count):
        draw = random.Random(f"{seed} {task} {number}")
        value = _value(kind.values, draw)
        key = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
        depth, begin = draw.choice(DEPTHS), draw.random()
        yield value, depth, functools.partial(_written, kind, key, value, depth, begin)


def _value(kind: str, draw: random.Random) -> str:
    if kind == "uuids":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return str(draw.randint(10**6, 10**7 - 1))


def _largest(made: Callable[[int], str], task: str, window: int, codec: Codec) -> str:
    """The prompt with the most units of haystack that leaves room for an answer in the window."""
    room = window - ANSWER_TOKENS

    def tokens(units: int) -> int:
        return len(codec.encode(made(units)))

    if (least := tokens(1)) > room:
        raise ValueError(
            f"{task}: a window of {window} tokens has no room for the question; give at least --window "
            f"{least + ANSWER_TOKENS}"
        )
    # where a straight line through two sizes meets the limit, and from there on in both directions
    per_unit = max((tokens(SOME) - least) / (SOME - 1), 0.01)
    fits = 1 + int((room - least) / per_unit)
    step = 1 + fits // 64
    while fits > 1 and tokens(fits) > room:
        fits, step = max(1, fits - step), 2 * step
    beyond, step = fits + 1, 1 + fits // 64
    while tokens(beyond) <= room:
        fits, beyond, step = beyond, beyond + step, 2 * step
    return made(bisect.bisect_right(range(beyond), room, lo=fits, key=tokens) - 1)


def _written(kind: Kind, key: str, value: str, depth: int, begin: float, units: int) -> str:
    """A prompt with so many units of haystack: lines of noise, or words of an essay from a place."""
    if kind.haystack == "noise":
        hay, between = [NOISE] * units, "\n"
    else:
        words = _essay()
        start = int(begin * len(words))
        hay = re.split(SENTENCE_ENDS, " ".join((words[start:] + words)[:units]))
        between = " "
    hay.insert(len(hay) * depth // 100, f"One of the special magic {kind.values} for {key} is: {value}.")
    name = kind.values[:-1]
    asked = f"special magic {name} for {key} mentioned in the provided text"
    return (
        f"A special magic {name} is hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {name} afterwards.\n{between.join(hay)}\nWhat is the {asked}? The {asked} is"
    )


@functools.cache
def _essay() -> list[str]:
    """The words of the bundled novel."""
    return [word for _, row in read_rows(default.TEXT) for word in row["text"].split()]
