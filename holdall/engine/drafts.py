"""Speculative decoding: a drafter guesses tokens, and one call of the model reads many of them.

    t  = draw(logits)                    what the model writes next
    h  = model([t, d1 .. dk])            one call; d are guesses of what follows t
    d1 .. da are accepted                as far as each is what is drawn from the logits before it

A draw depends on the logits, the seed and the position alone (holdall/engine/sampling.py). So a text is a
function of the model and the seed, and a guess is right exactly if it is the token that the model draws
there: the text is the same with drafts as without, token by token, at every temperature, whatever was
guessed. Where guesses are accepted by chance (Leviathan et al., arXiv 2211.17192) only its distribution is.
What is left is rounding: a call of many tokens adds in another order than calls of one, and two tokens that
tie to within it may change places.

Guesses that were wrong have been read all the same. A model that can (`rollback_limit`) takes them back;
elsewhere what was right is read again from a copy of the states, in the next call.

Letters: K guesses and one more, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from holdall import settings
from holdall.contract import State
from holdall.engine import sampling as draws
from holdall.engine.request import NOT_FINITE, Sampling, Token
from holdall.engine.sampling import Occurrences, Settings
from holdall.engine.session import Session, check_tokens, read
from holdall.engine.slow import next_token, numbered, occurrences_of
from holdall.engine.text import Writer
from holdall.model import Model
from holdall.ops.running import cumsum
from holdall.settings import NonNegativeInt, PositiveInt
from holdall.text.tokenizers import Tokenizer


@runtime_checkable
class Drafter(Protocol):
    """Guesses how one text continues. A wrong guess costs time and never changes the text."""

    def observe(self, tokens: Sequence[int]) -> None:
        """These tokens follow those observed before: first the prompt, then the text as it comes."""

    def propose(self, most: int) -> list[int]:
        """At most so many tokens that may follow; [] for no guess."""


@dataclass(kw_only=True)
class Drafted:
    """Counts of what drafts were worth; add up over texts by passing the same one again."""

    tokens: int = 0
    """Of the text."""
    calls: int = 0
    """Of the model, after the prompt. Without drafts it is one for each token but the last."""
    proposed: int = 0
    """Tokens guessed."""
    accepted: int = 0
    """Those of them that became tokens of the text."""


@torch.no_grad()
def generate_with_drafts(
    model: Model,
    session: Session,
    sampling: Sampling,
    drafter: Drafter,
    *,
    tokenizer: Tokenizer,
    prompt: Sequence[int] = (),
    most: int = 8,
    drafted: Drafted | None = None,
) -> Iterator[Token]:
    """The tokens that `slow.generate` gives after a session, in fewer calls of the model.

    Args:
        session: what was read, prompt included; it stays as it was.
        drafter: one that has observed nothing; it is shown the prompt, then the text.
        prompt: the tokens at the session's end that are the prompt, to drafter and penalties.
        most: tokens guessed at once; no call reads more than these, and the one before them.
        drafted: counted up.

    Raises ValueError if the logits are NaN or infinite, or for a guess that is no token or longer than asked.
    """
    settings.check("most", most, NonNegativeInt)
    asked, counts = numbered(sampling, 0), drafted or Drafted()
    writer, text = Writer(tokenizer, session.past.recent, asked), list[int]()
    able = model.rollback_limit >= most
    # `before` a call, and after it; `unread` is the end of the text that `states` have not read
    before, states = session.states, session.states
    unread, guess, logits_KV = list[int](), list[int](), session.logits_V[None]
    drafter.observe(prompt)
    while len(text) < asked.max_tokens:
        begin = len(text)
        position = session.past.count + begin
        for token in _drawn(logits_KV, position, guess, asked, tokenizer.vocab, prompt, text):
            counts.accepted += [token.id] == guess[len(text) - begin : len(text) - begin + 1]
            counts.tokens += 1
            text.append(token.id)
            yield token
            if writer.add(token.id)[1]:
                return
        right = len(text) - begin - 1
        if able and right < len(guess):
            states, unread = model.rollback(states, len(guess) - right, inplace=True), []
        else:
            states, unread = rewound(before, states, [*unread, *guess], len(unread) + right)
        unread.append(text[-1])
        drafter.observe(text[begin:])
        room = min(most + 1 - len(unread), asked.max_tokens - len(text) - 1)
        guess = _checked(drafter.propose(room), room, tokenizer.vocab) if room > 0 else []
        given_1T = torch.tensor([[*unread, *guess]], device=model.device)
        # states of this call's own need not be kept where nothing is guessed, or can be taken back
        inplace = (able or not guess) and states is not session.states
        before = states
        h_1TD, after = model.hidden(given_1T, states, inplace=inplace)
        assert after is not None
        states, logits_KV = after, model.logits(h_1TD[0, len(unread) - 1 :]).float()
        counts.calls, counts.proposed = counts.calls + 1, counts.proposed + len(guess)


def rewound(
    before: list[State], after: list[State], tokens: Sequence[int], right: int
) -> tuple[list[State], list[int]]:
    """What to continue from when a call read some tokens and only the first of them are right.

    Args:
        before, after: the states before the call and after it.
        tokens: what it read.
        right: how many of them are of the text.

    Returns:
        The states, and the tokens of the text that they have not read. The next call reads them first, beside
        new guesses, so that being wrong costs no call of its own.
    """
    if right == len(tokens):
        return after, []
    return before, list(tokens[:right])


def _drawn(
    logits_KV: Tensor,
    position: int,
    guess: Sequence[int],
    asked: Sampling,
    vocab: int,
    prompt: Sequence[int],
    text: Sequence[int],
) -> Iterator[Token]:
    """What the model draws at the next position and those after it, up to the first that was not guessed.

    Args:
        logits_KV: after the text, and after each guess.
        position: of the first token drawn.
    """
    device, rows = logits_KV.device, len(logits_KV)
    settings_K = Settings(*(column_1.expand(rows) for column_1 in draws.settings_of([asked], device)))
    token_K = draws.draw(
        logits_KV[:, :vocab], position + torch.arange(rows, device=device), settings_K,
        filters=draws.needs_filters(asked),
        occurrences=_with_guesses(occurrences_of(asked, vocab, prompt, text, device), guess, vocab),
    )  # fmt: skip
    ids = token_K.tolist()
    right = next((at for at, token in enumerate(guess) if token != ids[at]), len(guess))
    ids = ids[: right + 1]
    known = [token for token in ids if token >= 0]
    tokens = [Token(token) for token in known]
    if asked.logprobs is not None and known:
        tokens = draws.with_logprobs(logits_KV[: len(known)], token_K[: len(known)], asked.logprobs)
    yield from tokens
    if len(known) < len(ids):
        raise ValueError(NOT_FINITE)


def _with_guesses(given: Occurrences | None, guess: Sequence[int], vocab: int) -> Occurrences | None:
    """The occurrences before each token that is drawn: row i counts the first i guesses."""
    if given is None:
        return None
    rows, device = len(guess) + 1, given.count_BV.device
    guess_KV = torch.zeros(rows, vocab, dtype=torch.int32, device=device)
    guess_KV[torch.arange(1, rows, device=device), torch.tensor(guess, dtype=torch.long, device=device)] = 1
    counts_KV = given.count_BV + cumsum(guess_KV, 0).int()
    return Occurrences(given.prompt_BV.expand(rows, -1), counts_KV, given.bias_BV.expand(rows, -1))


def _checked(guess: list[int], most: int, vocab: int) -> list[int]:
    """A drafter's guess; ValueError if it is no guess."""
    if len(guess) > most:
        raise ValueError(f"the drafter proposes {len(guess)} tokens where it was asked for at most {most}")
    try:
        check_tokens(guess, vocab)
    except ValueError as error:
        raise ValueError(f"the drafter proposes what is no token: {error}") from None
    return guess


# ------------------------------------------------------------------------------------------------- drafters


class NGrams:
    """Guesses what followed the text's last tokens where they were last seen (Saxena, "prompt lookup", 2023).

    The longest of the last tokens' n-grams that was seen before decides. Memory grows by at most as many
    entries of a dict for each token as there are lengths of n-grams.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """Lengths of the n-grams that are looked up, in tokens."""
        settings.check("shortest", shortest, PositiveInt)
        if longest < shortest:
            raise ValueError(f"longest = {longest} must be at least shortest = {shortest}")
        self.longest, self.shortest = longest, shortest
        self.tokens, self.after = list[int](), dict[tuple[int, ...], int]()

    def observe(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for gram in self._last():
                self.after[gram] = len(self.tokens)
            self.tokens.append(token)

    def propose(self, most: int) -> list[int]:
        """A text that repeats itself is continued beyond its end: what is guessed is copied again."""
        at = next((self.after[gram] for gram in self._last() if gram in self.after), None)
        if at is None:
            return []
        period = len(self.tokens) - at
        copied = self.tokens[at : at + most]
        return [copied[i % period] for i in range(most)]

    def _last(self) -> Iterator[tuple[int, ...]]:
        """The n-grams that the text ends with, the longest first."""
        for n in range(min(self.longest, len(self.tokens)), self.shortest - 1, -1):
            yield tuple(self.tokens[-n:])


class SmallerModel:
    """Guesses what another model draws, with the same noise: the nearer the models, the more it is right.

    Its states are values too: those after each guess are kept until it is seen which guesses were right.
    """

    def __init__(
        self, model: Model, sampling: Sampling, *, tokenizer: Tokenizer, session: Session | None = None
    ) -> None:
        """A drafter for texts that are drawn with `sampling`.

        Args:
            session: what this model has read before the first token that it will observe. It has to be as
                many tokens as the large model's session had read, since the noise depends on positions.

        Raises ValueError if draws have noise and the seed is not known, or the model has too few tokens.
        """
        if sampling.seed is None and sampling.temperature > 0:
            raise ValueError("seed is None: a drafter guesses draws only if it knows the seed of their noise")
        if tokenizer.vocab > model.config.vocab:
            raise ValueError(f"the drafter has {model.config.vocab} tokens, the tokenizer {tokenizer.vocab}")
        # which tokens were in the text it could count too, but penalties seldom decide
        self.asked = replace(
            sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logprobs=None
        )
        self.model, self.vocab, self.session = model, tokenizer.vocab, session
        self.guesses: list[tuple[int, Session]] = []
        """Each guess with the session before it."""
        self.full = False
        """Whether the text is longer than the model's learned positions: it guesses no more."""

    def observe(self, tokens: Sequence[int]) -> None:
        known, last = 0, len(self.guesses) - 1
        while known < min(len(tokens), last) and tokens[known] == self.guesses[known][0]:
            known += 1
        if self.guesses:
            self.session, self.guesses = self.guesses[known][1], []
        self.full = self.full or len(tokens) - known > self._room()
        if len(tokens) > known and not self.full:
            self.session = read(self.model, tokens[known:], self.session)

    def propose(self, most: int) -> list[int]:
        self.guesses = []
        now = self.session
        if now is None or self.full:
            return []
        for left in range(int(min(most, self._room() + 1)), 0, -1):
            token = next_token(now, self.asked, self.vocab).id
            self.guesses.append((token, now))
            if left > 1:
                now = read(self.model, [token], now)
        return [token for token, _ in self.guesses]

    def _room(self) -> float:
        """How many more tokens the model can read."""
        count = 0 if self.session is None else self.session.past.count
        return (self.model.config.positions or float("inf")) - count
