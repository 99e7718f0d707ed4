"""What requests may say, in OpenAI's words and vLLM's for what OpenAI does not have.

Types are strict: "5" is no number. Fields that are not named here are ignored, since clients send some that
only mean something elsewhere (`user`, `store`, `metadata`); one that would change the answer and cannot be
had is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Text = Annotated[str, Field(max_length=1 << 24)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    """Whether a last chunk says how many tokens were read and written."""


class Asked(Strict):
    """What both kinds of completion have."""

    model: str | None = None
    """The name that /v1/models gives; without one, the model that there is."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """How many texts; the prompt is read once."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    """Of the draws: the same seed gives the same text, whatever else the server does."""
    stop: str | Annotated[list[str | None], Field(max_length=64)] | None = None
    """Texts at which generation stops; they are not part of the answer."""
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    """Token ids at which generation stops."""
    ignore_eos: bool | None = None
    """Whether generation goes on after the end of a document."""
    stream: bool | None = None
    """Whether the text comes piece by piece, as server-sent events."""
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """What logits are divided by; 0 takes the likeliest token; 1 by default."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """Draw among the k likeliest tokens; 0 or -1 for all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """What is added to logits, by token id."""
    session: str | None = None
    """The name of a session that goes on, or begins, with this request; one text only."""

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) < 10):
                raise ValueError(f"{key[:20]!r} is no token id")
        return bias

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions | None, info: Any) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("is only for stream = true")
        return options


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: str | list[Id] | list[str] | list[list[Id]]
    """One prompt or several, as texts or token ids. A text begins a document; ids are read as they are."""
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """The most tokens to generate; 16 by default."""
    echo: bool | None = None
    """Whether the answer begins with the prompt, and its log-probabilities if they are asked for."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Give each token's log-probability, and those of so many of the likeliest."""
    best_of: int | None = None
    """Refused unless it is n: nothing is ranked."""
    suffix: str | None = None
    """Refused: the model only writes on."""

    @field_validator("best_of")
    @classmethod
    def _nothing_is_ranked(cls, best_of: int | None, info: Any) -> int | None:
        if best_of is not None and best_of != (info.data.get("n") or 1):
            raise ValueError("is not supported: ask for n texts and choose among them")
        return best_of

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, suffix: str | None) -> str | None:
        if suffix:
            raise ValueError("is not supported: the model only continues a text")
        return suffix


class Part(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """What somebody said."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    role: Annotated[str, Field(min_length=1, max_length=64)]
    """system, user, assistant, or whatever the template knows."""
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1 << 14)]
    """The conversation; with a session, only what is new of it."""
    max_completion_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """The most tokens to generate."""
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """An older name of max_completion_tokens."""
    logprobs: bool | None = None
    """Whether to give each token's log-probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to give beside it."""
    response_format: ResponseFormat | None = None
    """Plain text only."""
    tools: list[Any] | None = None
    """Refused unless empty."""

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise ValueError("is not supported: the model calls no tools")
        return tools

    @field_validator("top_logprobs")
    @classmethod
    def _beside_logprobs(cls, top: int | None, info: Any) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("needs logprobs = true")
        return top


class TokenizeRequest(Strict):
    """POST /tokenize."""

    model: str | None = None
    prompt: Text
    add_special_tokens: bool | None = None
    """Whether the end-of-document token stands before it, as in /v1/completions; true by default."""


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Id], Field(max_length=1 << 20)]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: Error


def first_error(errors: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """The field and the words of pydantic's errors, which lists one for each type that a field may have."""
    worst = errors[0]
    path = [str(part) for part in worst["loc"] if part not in ("body", "path", "query")]
    if worst["type"] == "json_invalid":
        return None, f"the body is not JSON: {worst.get('ctx', {}).get('error', worst['msg'])}"
    if not path:
        return None, "the body is not a JSON object; send one with Content-Type: application/json"
    same = [error for error in errors if error["loc"][1:2] == worst["loc"][1:2]]
    says = "; or ".join(dict.fromkeys(_says(error) for error in same[:4]))
    return path[0], f"{path[0]}: {says}"


def _says(error: Mapping[str, Any]) -> str:
    says = str(error["msg"]).removeprefix("Value error, ")
    where = [str(part) for part in error["loc"][2:] if isinstance(part, int) or str(part).isidentifier()]
    return f"{'.'.join(where)}: {says}" if where and error["type"] == "missing" else says
