"""Tokens to text as they come: whole characters, stop strings, and why a text ends."""

from __future__ import annotations

import random

import pytest

from holdall.engine.request import Sampling
from holdall.engine.text import Decoder, Writer
from holdall.text.tokenizers import Bytes

END = Bytes().end


def test_bytes_that_are_no_text_are_shown_when_that_is_certain() -> None:
    decoder = Decoder(Bytes(), [256])
    assert decoder.add(0xFF) == ""
    assert decoder.add(ord("a")) == "\ufffda"
    assert [decoder.add(byte) for byte in "é".encode()] == ["", "é"]
    assert [decoder.add(0xE2) for _ in range(6)] == ["", "", "", "\ufffd", "\ufffd", "\ufffd"]
    assert decoder.rest() == "\ufffd\ufffd\ufffd"


def written(text: str, **options: object) -> tuple[list[str], str, int]:
    """The pieces of a text of bytes, why it ends, and after how many tokens."""
    writer, pieces = Writer(Bytes(), [END], Sampling(**{"max_tokens": 1000, **options})), list[str]()  # type: ignore[arg-type]
    for count, token in enumerate([*text.encode(), END], 1):
        piece, finish = writer.add(token)
        pieces.append(piece)
        if finish:
            return pieces, finish, count
    raise AssertionError("it never ends")


@pytest.mark.parametrize("stops", [(), ("\n\n",), ("aba", "b"), ("aab", "abab", "ö"), ("日本",), ("",)])
def test_a_text_ends_before_its_first_stop_string(stops: tuple[str, ...]) -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("aabbö日本\n") for _ in range(draw.randrange(30)))
        pieces, finish, count = written(text, stop=stops)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop and stop in text]
        # the one that is whole first; of those that end together, the longest
        last, first = min(ends, default=(len(text), len(text)))
        assert "".join(pieces) == text[:first]
        assert finish == "stop"
        assert count == len(text[:last].encode()) + (not ends)


def test_nothing_is_held_back_that_cannot_become_a_stop_string() -> None:
    pieces, _, _ = written("a stone. stop", stop=("stop",))
    assert pieces[:9] == ["a", " ", "", "", "sto", "", "", "", ""] or pieces[3:6] == ["", "", "ston"]
    assert "".join(pieces) == "a stone. "


@pytest.mark.parametrize(
    ("options", "finish", "count"),
    [
        ({}, "stop", 4),
        ({"max_tokens": 3}, "length", 3),
        ({"max_tokens": 4}, "stop", 4),
        ({"stop_tokens": (ord("b"),)}, "stop", 2),
        ({"ignore_end": True, "max_tokens": 4}, "length", 4),
    ],
)
def test_why_a_text_ends(options: dict[str, object], finish: str, count: int) -> None:
    pieces, why, after = written("abc", **options)
    assert (why, after) == (finish, count)
    shown = "abc"[: 1 if "stop_tokens" in options else 3] + "<|endoftext|>" * ("ignore_end" in options)
    assert "".join(pieces) == shown


def test_what_was_held_back_comes_when_the_text_ends() -> None:
    assert "".join(written("a st", stop=("stop",))[0]) == "a st"
    assert "".join(written("a stx", stop=("stop",), max_tokens=4)[0]) == "a st"
    assert written("é", max_tokens=1)[0] == ["\ufffd"]
