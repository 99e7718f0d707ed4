"""Tokens to text as they come: whole characters only, and none of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from holdall.engine.request import Finish, Sampling
from holdall.text.tokenizers import Tokenizer


class Decoder:
    """Turns tokens into text as they come, in whole characters.

    A token is decoded beside a few before it, since what stands between them may depend on both, and text is
    held back while it may be the beginning of a character, of which three bytes at most can be there.
    """

    BESIDE, PART = 8, "\ufffd"
    """How many tokens are decoded beside a new one, and what bytes that are not UTF-8 are decoded to."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-self.BESIDE :])
        self.shown = tokenizer.decode(self.ids)

    def add(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        held = min(3, len(text) - len(text.rstrip(self.PART)))
        certain = text[: len(text) - held]
        if not certain.startswith(self.shown):  # some decoders change what they gave before
            return ""
        new = certain[len(self.shown) :]
        self.shown = certain
        if not held:
            self.ids = self.ids[-self.BESIDE :]
            self.shown = self.tokenizer.decode(self.ids)
        return new

    def rest(self) -> str:
        """What is still held back, when no more tokens come."""
        return self.tokenizer.decode(self.ids)[len(self.shown) :]


class Writer:
    """The text of one row: adds token after token, and says when and why the text ends.

    Text that may be the beginning of a stop string is held back until it is one, or none.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], sampling: Sampling) -> None:
        """`before`: the last tokens that were read before the text, as many as there are or RECENT."""
        self.decoder = Decoder(tokenizer, before)
        self.ends = {*sampling.stop_tokens, *(() if sampling.ignore_end else (tokenizer.end,))}
        self.stops = tuple(filter(None, sampling.stop))
        self.max_tokens, self.count, self.held = sampling.max_tokens, 0, ""

    def add(self, token: int) -> tuple[str, Finish]:
        """The new text that is certain, and why the text ends with it, if it does.

        A token that ends the text has none itself, and a stop string is not part of it.
        """
        self.count += 1
        if token in self.ends:
            return self.rest(), "stop"
        self.held += self.decoder.add(token)
        text, stopped = self._certain()
        if stopped:
            return text, "stop"
        if self.count >= self.max_tokens:
            end, stopped = self._last()
            return text + end, "stop" if stopped else "length"
        return text, ""

    def rest(self) -> str:
        """What is held back, when no more tokens come; a stop string still ends it."""
        return self._last()[0]

    def _last(self) -> tuple[str, bool]:
        self.held += self.decoder.rest()
        text, stopped = self._certain()
        if not stopped:
            text, self.held = text + self.held, ""
        return text, stopped

    def _certain(self) -> tuple[str, bool]:
        """Takes what is certain of the held text; and whether a stop string follows it."""
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            text, self.held = self.held[: min(found)], ""
            return text, True
        hold = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        text, self.held = self.held[: len(self.held) - hold], self.held[len(self.held) - hold :]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are a beginning of the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
