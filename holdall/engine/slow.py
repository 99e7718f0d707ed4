"""The definition of generation: one row at a time, every token by a call of the model.

The engine (holdall/engine/fast.py) gives the same pieces, whatever else it runs beside them.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from holdall import settings
from holdall.contract import StateError
from holdall.engine import sampling
from holdall.engine.request import NOT_FINITE, Finish, Piece, Request, Sampling, Token, Usage
from holdall.engine.sampling import Occurrences
from holdall.engine.session import CHUNK, Reader, Session, check_tokens, misfit_of, read
from holdall.engine.text import Writer
from holdall.model import Model
from holdall.settings import NonNegativeInt, PositiveInt
from holdall.text.tokenizers import Tokenizer


def generate(model: Model, tokenizer: Tokenizer, request: Request, *, ticket: int = 0) -> Iterator[Piece]:
    """The pieces of a request, one token each, text after text.

    Raises ValueError, naming the field, for a request that cannot be done: see `checked`.
    """
    prompt = checked(request, model, tokenizer)
    session, of_prompt = read_prompt(model, request)
    before = 0 if request.session is None else request.session.past.count
    for index in range(request.n):
        asked = numbered(request.sampling, index)
        writer, text, now = Writer(tokenizer, session.past.recent, asked), list[int](), session
        finish: Finish = "length" if asked.max_tokens == 0 else ""
        usage = Usage(before + len(prompt), before, 0)
        shown = of_prompt if index == 0 else ()
        if finish:
            kept = now if request.keep else None
            yield Piece(
                ticket=ticket, index=index, text="", tokens=(), finish=finish, usage=usage, prompt=shown,
                session=kept,
            )  # fmt: skip
        while not finish:
            token = next_token(now, asked, tokenizer.vocab, prompt, text)
            text.append(token.id)
            piece, finish = writer.add(token.id)
            if not finish or request.keep:
                now = read(model, [token.id], now)
            usage = usage._replace(completion=len(text))
            kept = now if finish and request.keep else None
            yield Piece(
                ticket=ticket, index=index, text=piece, tokens=(token,), finish=finish, usage=usage,
                prompt=shown, session=kept,
            )  # fmt: skip
            shown = ()


def next_token(
    session: Session, asked: Sampling, vocab: int, prompt: Sequence[int] = (), text: Sequence[int] = ()
) -> Token:
    """What is drawn after a session, among the first `vocab` tokens.

    Raises ValueError if the logits are NaN or infinite.
    """
    logits_1V = session.logits_V[None]
    chosen = sampling.settings_of([asked], logits_1V.device)
    occurrences = occurrences_of(asked, vocab, prompt, text, logits_1V.device)
    token_1 = sampling.draw(
        logits_1V[:, :vocab], torch.tensor([session.past.count], device=logits_1V.device), chosen,
        filters=sampling.needs_filters(asked), occurrences=occurrences,
    )  # fmt: skip
    if int(token_1) < 0:
        raise ValueError(NOT_FINITE)
    if asked.logprobs is None:
        return Token(int(token_1))
    return sampling.with_logprobs(logits_1V, token_1, asked.logprobs)[0]


def occurrences_of(
    asked: Sampling, vocab: int, prompt: Sequence[int], text: Sequence[int], device: torch.device
) -> Occurrences | None:
    """What penalties and biases of one row need; None if it has none."""
    if not sampling.needs_occurrences(asked):
        return None
    prompt_V = torch.zeros(vocab, dtype=torch.bool, device=device)
    prompt_V[[token for token in prompt if token < vocab]] = True
    count_V = torch.bincount(torch.tensor(text, dtype=torch.long, device=device), minlength=vocab).int()
    bias_V = torch.zeros(vocab, device=device)
    for token, bias in asked.logit_bias:
        bias_V[token] = bias
    return Occurrences(prompt_V[None], count_V[None], bias_V[None])


def numbered(asked: Sampling, index: int) -> Sampling:
    """The sampling of a request's text `index`: a seed counts on, and one without gets one."""
    seed = secrets.randbits(63) if asked.seed is None else (asked.seed + index) % 2**63
    return replace(asked, seed=seed)


def checked(request: Request, model: Model, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt of a request that can be done; ValueError, naming the field, for one that cannot."""
    vocab, asked = tokenizer.vocab, request.sampling
    settings.check("n", request.n, PositiveInt)
    if request.prompt_logprobs is not None:
        settings.check("prompt_logprobs", request.prompt_logprobs, NonNegativeInt)
        if model.prefix and request.session is None:
            raise ValueError(
                f"prompt_logprobs: the first {model.prefix} tokens of a prompt see each other in this model, "
                "so that none is predicted: read them first, and ask for those of a prompt after that session"
            )
    if not request.prompt and request.session is None:
        raise ValueError(
            "prompt is empty: give at least one token, such as the tokenizer's end of a document"
        )
    try:
        check_tokens(request.prompt, model.config.vocab)
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    for field, tokens in (
        ("logit_bias", [t for t, _ in asked.logit_bias]),
        ("stop_tokens", asked.stop_tokens),
    ):
        for token in tokens:
            if not 0 <= token < vocab:
                raise ValueError(f"{field} names token {token}, and the tokenizer has 0 to {vocab - 1}")
    positions = model.config.positions
    read_before = 0 if request.session is None else request.session.past.count
    total = read_before + len(request.prompt) + asked.max_tokens
    if positions and total > positions:
        raise ValueError(
            f"prompt and max_tokens are {total} tokens together, and the model has {positions} positions"
        )
    if request.session is not None and (why := misfit_of(request.session, model)):
        raise StateError(f"session: {why}")
    return tuple(request.prompt)


# --------------------------------------------------------------------------------------------- the prompt


def read_prompt(
    model: Model, request: Request, start: Session | None = None, *, chunk: int = CHUNK
) -> tuple[Session, tuple[Token, ...]]:
    """The session after a request's prompt, and the prompt's tokens where log-probabilities were asked for.

    Args:
        start: what has been read already: the request's session, with some of the prompt or without.
    """
    start = start or request.session
    before = 0 if request.session is None else request.session.past.count
    done = 0 if start is None else start.past.count - before
    if done and request.prompt_logprobs is not None:
        raise ValueError("log-probabilities of a prompt need all of it to be read")
    reader = PromptReader(
        model, request.prompt[done:], start, chunk=chunk, marks=[mark - done for mark in request.marks],
        logprobs=request.prompt_logprobs,
    )  # fmt: skip
    while not reader.done:
        reader.step()
    return reader.session(), tuple(reader.tokens)


class PromptReader(Reader):
    """Reads a prompt and, on demand, gives the log-probability of each of its tokens.

    Attributes:
        tokens: the prompt's tokens read so far, if their log-probabilities were asked for.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        start: Session | None,
        *,
        chunk: int = CHUNK,
        marks: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> None:
        """`logprobs`: how many of the likeliest tokens to give of each of the prompt's; None for nothing."""
        super().__init__(model, prompt, start, chunk=chunk, marks=marks)
        self.logprobs, self.tokens = logprobs, list[Token]()

    def _note(self, h_TD: Tensor, tokens: Sequence[int]) -> None:
        """Each token by the logits before it: `logits_V` is still what the piece before ended with."""
        if self.logprobs is None:
            return
        before_TV = self.model.logits(h_TD[:-1]).float()
        if self.logits_V is None:
            self.tokens.append(Token(tokens[0]))
            tokens = tokens[1:]
        else:
            before_TV = torch.cat((self.logits_V[None], before_TV))
        if tokens:
            token_T = torch.tensor(tokens, device=before_TV.device)
            self.tokens += sampling.with_logprobs(before_TV, token_T, self.logprobs)
