"""What is asked of the engine and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from holdall.contract.config import Config
from holdall.engine.session import Session
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, Range, Seed

Finish = Literal["", "stop", "length", "cancelled", "error"]
"""Why a text ended: "" not yet; "stop" at the end of the document or at a stop; "length" at max_tokens;
"cancelled" by `cancel`; "error" where the model's logits are NaN or infinite."""
NOT_FINITE = "the model's logits are NaN or infinite: its weights are, or it diverged"


@dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How tokens are drawn.

    The order is that of vLLM and transformers: penalties and bias, temperature, top_k, top_p, min_p.
    """

    max_tokens: NonNegativeInt = 256
    """The most tokens to generate."""
    temperature: NonNegativeFloat = 1.0
    """What logits are divided by before a token is drawn; 0 takes the likeliest token."""
    top_k: Annotated[int, Range(least=1, zero="all")] = 0
    """Draw among the k likeliest tokens; 0 for all."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Draw among the likeliest tokens that together have at least this probability."""
    min_p: Annotated[float, Range(least=0, most=1)] = 0.0
    """Draw among tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the text so far."""
    presence_penalty: Annotated[float, Range(least=-2, most=2)] = 0.0
    """Subtracted from the logits of tokens in the text so far."""
    frequency_penalty: Annotated[float, Range(least=-2, most=2)] = 0.0
    """Subtracted from a token's logit for each time it is in the text so far."""
    logit_bias: tuple[tuple[NonNegativeInt, Annotated[float, Range(least=-1e30, most=1e30)]], ...] = ()
    """Token ids and what is added to their logits."""
    seed: Seed | None = None
    """Of the draws, which depend on it and on the token's position alone; None for another each time."""
    stop: tuple[str, ...] = ()
    """Texts at which generation stops; they are not part of what is given."""
    stop_tokens: tuple[NonNegativeInt, ...] = ()
    """Token ids at which generation stops, beside the tokenizer's end of a document."""
    ignore_end: bool = False
    """Whether generation continues after the end of a document."""
    logprobs: Annotated[int, Range(least=0, most=20)] | None = None
    """Give each token's log-probability, and those of so many of the likeliest; None for neither."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids, read after `session`'s; may be empty if there is a session.
        sampling: how tokens are drawn.
        n: how many texts; the prompt is read once. Text i of a seed s is drawn with the seed s + i.
        session: what was read before the prompt; None begins a document of its own.
        keep: whether the last Piece of each text has the session after it, in which all tokens of the text
            were read, the one that ended it too. A text that is cancelled has one if it had begun.
        prompt_logprobs: give each prompt token's log-probability, and those of so many of the likeliest.
        marks: numbers of the prompt's tokens, such as the ends of messages, after which what was read so far
            goes into the store; those of the whole prompt and of the text do anyway.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    session: Session | None = None
    keep: bool = False
    prompt_logprobs: int | None = None
    marks: tuple[int, ...] = ()


class Token(NamedTuple):
    """A token of the text, or of the prompt.

    logprob: of the model, before temperature and all else; NaN where it was not asked for, and of the first
        token of a document that nothing was read before.
    top: the likeliest tokens and theirs, the likeliest first, as many as were asked for.
    """

    id: int
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()


class Usage(NamedTuple):
    """Tokens of the prompt, how many of them were in the store or session, and tokens of the text so far."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What one step gives of one text."""

    ticket: int
    """The number that `submit` returned."""
    index: int
    """Which of the request's n texts."""
    text: str
    """New whole characters; "" while they are held back."""
    tokens: tuple[Token, ...]
    """The new tokens, also those whose text is held back."""
    finish: Finish
    """Why the text ended, in its last piece."""
    usage: Usage
    """Up to now."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens, in the first piece of text 0, where their log-probabilities were asked for."""
    session: Session | None = None
    """What was read, in the last piece, where it was asked for."""
    admitted: float = float("nan")
    """When the engine began with the prompt, by time.perf_counter; NaN if it had not."""


class QueueFullError(Exception):
    """As many requests wait as may. Ask again later."""
