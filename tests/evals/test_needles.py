"""Needles: decided by the seed, within the window, and found by an oracle that reads the prompt."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

import pytest

from holdall.evals import harness, needles, suites
from holdall.evals.windows import ANSWER_TOKENS
from holdall.text.tokenizers import Bytes

CODEC = harness.codec_of(Bytes())


def some(task: str, window: int = 600, seed: int = 0) -> list[needles.Needle]:
    return list(needles.needles(task, window, CODEC, seed=seed, count=12))


@pytest.mark.parametrize("task", needles.KINDS)
def test_an_oracle_finds_every_value(task: str) -> None:
    values = r"[0-9]{7}" if needles.KINDS[task].values == "numbers" else r"[0-9a-f-]{36}"
    depths = set()
    for needle in some(task):
        (asked,) = re.findall(
            r"\nWhat is the special magic (?:number|uuid) for (\S+) mentioned", needle.prompt
        )
        (found,) = re.findall(
            rf"One of the special magic \w+ for {asked} is: ({values})\.(?:\s|$)", needle.prompt, flags=re.M
        )
        assert found == needle.gold
        depths.add(needle.depth)
    assert len(depths) > 6


@pytest.mark.parametrize("task", needles.KINDS)
def test_the_haystack_fills_the_window(task: str) -> None:
    for window in (500, 900):
        for needle in some(task, window):
            tokens = len(CODEC.encode(needle.prompt))
            # a line of noise more, or a word, would be too much
            unit = len(needles.NOISE) + 1 if task == "niah_single_1" else 25
            assert window - ANSWER_TOKENS - unit < tokens <= window - ANSWER_TOKENS


@pytest.mark.parametrize("task", needles.KINDS)
def test_the_seed_decides_everything(task: str) -> None:
    first = some(task)
    random.seed(5)
    assert some(task) == first
    assert list(itertools.islice(needles.needles(task, 600, CODEC), 3)) == first[:3]
    assert not {one.gold for one in some(task, seed=1)} & {one.gold for one in first}


def test_a_worked_needle() -> None:
    needle = some("niah_single_1", 700)[0]
    lines = needle.prompt.split("\n")
    key, value = re.findall(r"for (\S+) is: (\d+)\.", needle.prompt)[0]
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the number afterwards."
    )
    assert sorted(set(lines[1:-1])) == [
        f"One of the special magic numbers for {key} is: {value}.",
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    ]
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? The special magic "
        f"number for {key} mentioned in the provided text is"
    )


def test_the_essay_is_the_bundled_novel() -> None:
    for needle in some("niah_single_2"):
        body = needle.prompt.split("\n")[1]
        hay = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", body).split()
        novel = " ".join(needles._essay() * 2)
        assert " ".join(hay) in novel


def test_a_window_without_room_says_how_large_it_must_be() -> None:
    with pytest.raises(
        ValueError, match=r"niah_single_1: a window of 200 tokens .*at least --window (\d+)"
    ) as error:
        next(needles.needles("niah_single_1", 200, CODEC))
    least = int(re.findall(r"\d+$", str(error.value))[0])
    assert next(needles.needles("niah_single_1", least, CODEC)).prompt


def test_words_are_plain_and_each_once() -> None:
    for words in (needles.ADJECTIVES, needles.NOUNS):
        assert len(set(words)) == len(words)
        assert all(word.isalpha() and word.islower() for word in words)


def test_rows_of_needles_need_no_files() -> None:
    rows: Iterator[harness.Row] = harness.rows(suites.named("niah_single_3"), CODEC, window=500)
    row = next(rows)
    assert row.tokens == len(row.prompt.encode()) <= 450
    assert (row.window, row.truncated) == (None, False)
