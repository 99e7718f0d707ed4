"""From the messages of a chat to the tokens that the model reads, by a jinja2 template.

The template is `chat_template.jinja` in the model's folder, in the language of transformers' templates: it
sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token` and `raise_exception`. Without one a chat
is written as a plain transcript, which suits models that were trained on text alone:

    User: Who are you?

    Assistant:

and an answer ends where the model begins to write the user's next line. The space
that an answer begins with is not doubled when it comes back in a history: what was read of it is found again.

A template comes with a model, from anywhere, so it runs in jinja2's sandbox. `bos_token` and `eos_token`
become the tokenizer's tokens that begin and end a document, whatever users write: a message cannot contain
them. Names of other special tokens are read as ordinary text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from holdall.serve.schemas import Message
from holdall.text.tokenizers import Tokenizer

FILE = "chat_template.jinja"
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}:"
    "{{ '' if message.content[:1].isspace() else ' ' }}{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""Where an answer ends in a plain transcript."""
LONGEST = 1 << 24
"""Characters of a rendered chat: a template may loop."""


class TemplateError(ValueError):
    """The model's template does not take these messages; the message says why."""


class ChatTemplate:
    """A model's way to write a chat.

    Attributes:
        source: the template.
        stops: texts at which an answer ends, beside those that a request names.
    """

    def __init__(self, source: str | None, tokenizer: Tokenizer) -> None:
        """Raises TemplateError if the source is no template; None takes the plain one."""
        self.source, self.tokenizer = PLAIN if source is None else source, tokenizer
        self.stops = PLAIN_STOPS if source is None else ()
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        sandbox.globals["raise_exception"] = _refuse
        try:
            # the plain template's new lines are its own
            self._template = (
                sandbox if source is not None else sandbox.overlay(trim_blocks=False)
            ).from_string(self.source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"{FILE} is no template: {error}") from error

    @classmethod
    def of_folder(cls, folder: Path | None, tokenizer: Tokenizer) -> ChatTemplate:
        """The template in a model's folder, if there is one."""
        path = None if folder is None else folder / FILE
        return cls(path.read_text("utf-8") if path is not None and path.exists() else None, tokenizer)

    def tokens(self, messages: Sequence[Message], *, begins: bool, answer: bool = True) -> list[int]:
        """What the model reads before its answer; `begins` a document, or goes on with a session.

        Without `answer`, up to the end of the last message only: what the next turn will begin with too, even
        where clients strip from an answer what it began with.

        Raises TemplateError if the template refuses the messages.
        """
        # no message can contain these: they are made after them
        mark = f"\ue000{secrets.token_hex(16)}"
        begin, end = f"{mark}B\ue001", f"{mark}E\ue001"
        said: list[dict[str, Any]] = [
            {**message.model_dump(), "content": message.text} for message in messages
        ]
        try:
            text, length = [], 0
            for part in self._template.generate(
                messages=said, add_generation_prompt=answer, bos_token=begin, eos_token=end
            ):
                length += len(part)
                if length > LONGEST:
                    raise TemplateError(f"the chat has more than {LONGEST:,} characters")
                text.append(part)
        except TemplateError:
            raise
        except Exception as error:  # a template may raise anything
            raise TemplateError(f"the model's chat template refuses these messages: {error}") from error
        whole = "".join(text)
        if not is_text(whole):
            raise TemplateError("messages have half of a surrogate pair, which is no character")
        special = {begin: self.tokenizer.begin, end: self.tokenizer.end}
        parts = re.split(f"({begin}|{end})", whole)  # texts, and the marks between them
        encoded = self.tokenizer.encode_batch(parts[::2])
        tokens = list(map(int, encoded[0]))
        for which, ids in zip(parts[1::2], encoded[1:], strict=True):
            tokens += [special[which], *map(int, ids)]
        if begins and tokens[:1] != [self.tokenizer.begin]:
            tokens.insert(0, self.tokenizer.begin)
        return tokens


def is_text(text: str) -> bool:
    """Whether a string has characters alone: JSON can say half of a surrogate pair, which is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(str(reason))
