"""From the engine's pieces to OpenAI's objects: choices and chunks, log-probabilities, usage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from holdall.engine.request import Piece, Token, Usage
from holdall.engine.text import Decoder
from holdall.text.tokenizers import Tokenizer

Json = dict[str, Any]
IMPOSSIBLE = -9999.0
"""Stands for a log-probability of -inf, which JSON does not have."""


class Words:
    """The text of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def text(self, token: int) -> str:
        """A part of a character is shown as bytes, as in \\xe2; an id of the padding by its number."""
        return self.tokenizer.pieces([token])[0] if token < self.tokenizer.vocab else f"<{token}>"

    def bytes(self, token: int) -> list[int] | None:
        """The token's bytes in UTF-8; None if they are a part of a character and not known."""
        if token >= self.tokenizer.vocab:
            return None
        text = self.tokenizer.decode([token])
        if Decoder.PART not in text:
            return list(text.encode())
        return [token] if self.tokenizer.name == "bytes" else None


def number(logprob: float) -> float | None:
    """As JSON has it: null for what nothing was read before."""
    if math.isnan(logprob):
        return None
    return max(logprob, IMPOSSIBLE)


class CompletionLogprobs:
    """Log-probabilities as /v1/completions gives them, of one text; where each token stands is counted."""

    def __init__(self, words: Words, before: Sequence[int]) -> None:
        """`before`: the tokens that stand before the first one."""
        self.words, self.decoder, self.offset = words, Decoder(words.tokenizer, before), 0

    def of(self, tokens: Iterable[Token]) -> Json:
        """Of the next tokens. `top_logprobs` has the token's own as well, the same float."""
        given: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text, logprob = self.words.text(token.id), number(token.logprob)
            given["tokens"].append(text)
            given["token_logprobs"].append(logprob)
            given["text_offset"].append(self.offset)
            self.offset += len(self.decoder.add(token.id))
            if logprob is None:
                given["top_logprobs"].append(None)
                continue
            top: dict[str, float] = {}
            for other, value in (*token.top, (token.id, token.logprob)):
                # two tokens may look alike: the likelier one is listed
                name = self.words.text(other)
                top[name] = max(top.get(name, -math.inf), max(value, IMPOSSIBLE))
            given["top_logprobs"].append(top)
        return given


def chat_logprobs(words: Words, tokens: Iterable[Token]) -> Json:
    """Log-probabilities as /v1/chat/completions gives them."""

    def one(token: int, logprob: float) -> Json:
        return {"token": words.text(token), "logprob": number(logprob), "bytes": words.bytes(token)}

    content = [
        {**one(token.id, token.logprob), "top_logprobs": [one(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class Totals:
    """Tokens of all texts of a request, as far as they have come."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], Usage] = {}

    def add(self, request: int, piece: Piece) -> None:
        self._last[request, piece.index] = piece.usage

    def usage(self) -> Json:
        """A prompt counts once, however many texts it has."""
        prompts = {request: usage for (request, _), usage in self._last.items()}.values()
        prompt = sum(usage.prompt for usage in prompts)
        written = sum(usage.completion for usage in self._last.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in prompts)},
        }


class CompletionForm:
    """How /v1/completions gives texts."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, words: Words, prompts: Sequence[tuple[str, Sequence[int], bool]], *, n: int, echo: bool,
        logprobs: bool,
    ) -> None:  # fmt: skip
        """prompts: text, tokens, and whether the first token is one that the server put there."""
        self.words, self.prompts, self.n, self.echo, self.logprobs = words, prompts, n, echo, logprobs
        self._listed: dict[int, CompletionLogprobs] = {}
        self._of_prompt: dict[int, Sequence[Token]] = {}

    def choice(self, request: int, piece: Piece, *, first: bool, chunk: bool) -> Json:
        """What a piece adds to its choice; the first one begins with the prompt if it is echoed."""
        index, (text, ids, added) = request * self.n + piece.index, self.prompts[request]
        if piece.prompt:
            self._of_prompt[request] = piece.prompt[added:]
        shown, tokens = piece.text, piece.tokens
        if first and self.echo:
            shown, tokens = text + shown, (*self._of_prompt.get(request, ()), *tokens)
        logprobs = None
        if self.logprobs:
            if index not in self._listed:
                self._listed[index] = CompletionLogprobs(
                    self.words, () if self.echo else ids[-Decoder.BESIDE :]
                )
            logprobs = self._listed[index].of(tokens)
        return {"index": index, "text": shown, "logprobs": logprobs, "finish_reason": piece.finish or None}

    @staticmethod
    def joined(choice: Json, more: Json) -> None:
        """Add what a later piece gives of the same choice."""
        choice["text"] += more["text"]
        choice["finish_reason"] = more["finish_reason"]
        if choice["logprobs"] is not None:
            for name, values in more["logprobs"].items():
                choice["logprobs"][name] += values

    @staticmethod
    def says_something(choice: Json) -> bool:
        return bool(choice["text"] or choice["finish_reason"] or choice["logprobs"])


class ChatForm:
    """How /v1/chat/completions gives texts."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, words: Words, *, logprobs: bool) -> None:
        self.words, self.logprobs = words, logprobs

    def choice(self, request: int, piece: Piece, *, first: bool, chunk: bool) -> Json:
        """What a piece adds to its choice; the first one says who speaks."""
        said: Json = {"role": "assistant"} if first or not chunk else {}
        said["content"] = piece.text
        if not chunk:
            said["refusal"] = None
        return {
            "index": piece.index,
            "delta" if chunk else "message": said,
            "logprobs": chat_logprobs(self.words, piece.tokens) if self.logprobs else None,
            "finish_reason": piece.finish or None,
        }

    @staticmethod
    def joined(choice: Json, more: Json) -> None:
        """Add what a later piece gives of the same choice."""
        choice["message"]["content"] += more["message"]["content"]
        choice["finish_reason"] = more["finish_reason"]
        if choice["logprobs"] is not None:
            choice["logprobs"]["content"] += more["logprobs"]["content"]

    @staticmethod
    def says_something(choice: Json) -> bool:
        said = choice["delta"]
        return bool(said["content"] or "role" in said or choice["finish_reason"] or choice["logprobs"])


Form = CompletionForm | ChatForm
