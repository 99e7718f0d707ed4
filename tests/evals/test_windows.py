"""The part of a document that is shown: by the rule, token by token, and always with an answer in it."""

from __future__ import annotations

import random

import pytest

from holdall.evals import windows
from holdall.evals.documents import Question
from holdall.evals.harness import codec_of
from holdall.evals.scoring import occurs
from holdall.text.tokenizers import Bytes

BYTES = codec_of(Bytes())


class Words(windows.Codec):
    """A tokenizer of words and the spaces before them, with one id for each place."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        words = [f" {word}" if place else word for place, word in enumerate(text.split(" "))] if text else []
        ids = []
        for word in words:
            if word not in self.known:
                self.known.append(word)
            ids.append(self.known.index(word))
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.known[number] for number in ids)


def document(count: int, answer: int, *, key: int | None = None) -> str:
    words = [f"w{place}" for place in range(count)]
    words[answer] = "answer"
    if key is not None:
        words[key] = "key"
    return " ".join(words)


class Counted(Words):
    """The same, which keeps what it encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.encoded.append(text)
        return super().encode(text)


def test_a_document_is_encoded_once_and_its_windows_are_the_same() -> None:
    text, counted = document(200, 150, key=40), Counted()
    asked = [Question("", text, asked, ("answer",), is_key=True) for asked in ("key", "w100", "key")]
    plain = [windows.around(question, 100, Words()) for question in asked]
    remembered = windows.Remembered(counted)
    assert [windows.around(question, 100, remembered) for question in asked] == plain
    assert len({shown.first for shown in plain if shown}) == 1 + (plain[0] != plain[1])
    assert counted.encoded.count(text) == 1
    assert len(counted.encoded) == len(set(counted.encoded))  # of what stands before a place, too
    other = document(200, 10)
    shown = windows.around(Question("", other, "", ("answer",)), 100, remembered)
    assert shown == windows.around(Question("", other, "", ("answer",)), 100, Words())


def test_ids_beyond_two_bytes_are_kept() -> None:
    text = "".join(map(chr, range(0x10000, 0x10100))) + "answer"

    class Characters(windows.Codec):
        def encode(self, text: str) -> list[int]:
            return [ord(one) for one in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    shown = windows.around(Question("", text, "", ("answer",)), 100, Characters())
    assert shown is not None
    assert shown.text == text[231:281]


@pytest.mark.parametrize(
    ("answer", "first", "end"),
    # 50 of 100 tokens are shown, 25 of them before the answer
    [(0, 0, 50), (10, 0, 50), (24, 0, 50), (100, 75, 125), (190, 165, 200), (199, 174, 200)],
)
def test_half_stands_before_the_answer_and_the_rest_after(answer: int, first: int, end: int) -> None:
    # the text before a word ends in a space, which this tokenizer counts as a word: so the place is one later
    question = Question("", document(200, answer), "", ("answer",))
    shown = windows.around(question, 100, Words())
    late = answer > 0
    first, end = (max(0, first + late) if first else max(0, answer + late - 25)), end
    assert shown is not None
    assert (shown.first, shown.truncated) == (first, True)
    assert shown.end == min(200, first + 50)
    assert "answer" in shown.text.split()


def test_a_short_document_is_shown_whole() -> None:
    text = " \nA naïve answer.\n"
    shown = windows.around(Question("", text, "", ("ANSWER",)), 100, BYTES)
    assert shown == ("A naïve answer.", 0, 16, False)


def test_the_name_of_an_attribute_counts_where_it_is_near() -> None:
    """The earliest of name and answer decides, unless the answer would not be shown."""
    near = Question("", document(200, 100, key=80), "key", ("answer",), is_key=True)
    shown = windows.around(near, 100, Words())
    assert shown is not None
    assert (shown.first, shown.end) == (81 - 25, 81 + 25)
    far = windows.around(near._replace(context=document(200, 100, key=3)), 100, Words())
    assert far is not None
    assert (far.first, far.end) == (101 - 25, 101 + 25)
    no_key = windows.around(near._replace(is_key=False), 100, Words())
    assert no_key is not None
    assert no_key.first == 101 - 25


def test_the_earliest_of_several_answers_decides() -> None:
    words = document(200, 150).split(" ")
    words[60] = "OTHER"
    shown = windows.around(Question("", " ".join(words), "", ("answer", "other")), 100, Words())
    assert shown is not None
    assert shown.first == 61 - 25


def test_characters_are_never_divided() -> None:
    text = "é" * 100 + "answer" + "é" * 100
    for window in range(100, 140):
        shown = windows.around(Question("", text, "", ("answer",)), window, BYTES)
        assert shown is not None
        assert set(shown.text) <= set("éanswer")
        assert windows.REPLACEMENT not in shown.text
        assert 0 <= (shown.end - shown.first) - len(shown.text.encode()) <= 2


def test_the_answer_is_in_every_window() -> None:
    draw = random.Random(0)
    for _ in range(200):
        length = draw.randint(1, 400)
        text = "".join(draw.choices("abc é€.\n", k=length))
        place = draw.randint(0, length)
        context = text[:place] + "Answer 42" + text[place:]
        question = Question("", context, draw.choice("ab€"), ("answer 42",), is_key=draw.random() < 0.5)
        shown = windows.around(question, draw.randint(100, 300), BYTES)
        assert shown is not None
        assert occurs("answer 42", shown.text)
        assert shown.truncated == (shown.text != context.strip())


def test_an_answer_longer_than_what_is_shown_behind_its_beginning_is_left_out() -> None:
    assert windows.around(Question("", "b" * 80 + "a" * 30 + "b" * 80, "", ("a" * 30,)), 100, BYTES) is None
