"""The command `holdall chat`: write a text together with a model, line by line.

A base model knows no chat format, so there is none. There is one text: what you type is appended to it as it
stands, and the model continues it until --max-tokens, a --stop or the end of the document. With a model that
was trained on dialogues, type the marks of its dialogues and stop at yours: with --stop "You:" the text
already ends with "You:" when it is your turn.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdall import errors
from holdall.commands import printable
from holdall.commands.loading import Loading
from holdall.engine.request import Sampling
from holdall.engine.session import Session, read
from holdall.language_model import LanguageModel
from holdall.report.style import bytes_text

HELP = r"""What you type is appended to the text as it stands, and the model continues it.
  an empty line     the model continues from where it is
  ... \             a backslash at the end of a line: a line break, and more to type
  //...             a text that begins with a slash
  Ctrl-C            stop the model; the text so far counts
  /save FILE        write the text's state to a file
  /load FILE        continue from a state file
  /fork             copy the text, and continue in the copy; /fork N goes to text N
  /undo             take back the last thing typed and its continuation
  /state            bytes and tokens, beside a Transformer's
  /help, /quit      this list; the end (or Ctrl-D)
"""
UNDO = 100
"""How often /undo can go back; each step keeps a state."""

Write = Callable[[str], object]


@dataclass
class Text:
    """One text: where it is now, and where it was before each exchange.

    session: None if nothing was read yet.
    """

    session: Session | None = None
    before: deque[Session | None] = field(default_factory=lambda: deque(maxlen=UNDO))

    def move(self, session: Session) -> None:
        self.before.append(self.session)
        self.session = session


class Chat:
    """The texts of one chat, and what each line that is typed does to them.

    Attributes:
        texts: all texts; `/fork` adds one.
        at: the index of the text that is written.
    """

    def __init__(self, model: LanguageModel, options: Mapping[str, Any], write: Write) -> None:
        """`options`: the fields of `Sampling`; `write` is called with everything that is to be shown."""
        self.model, self.options, self.write = model, options, write
        self.texts, self.at = [Text()], 0
        self.own = set[Path]()  # files that may be written again
        self.commands: dict[str, Callable[[str], object]] = {
            "save": self.save, "load": self.load, "fork": self.fork, "undo": self.undo, "state": self.state,
            "help": lambda _: write(HELP),
        }  # fmt: skip

    @property
    def text(self) -> Text:
        return self.texts[self.at]

    def line(self, typed: str) -> bool:
        """Do what a line says; returns whether the chat continues. An error that a user can fix is shown."""
        if not typed.startswith("/") or typed.startswith("//"):
            self._guarded(lambda: self.exchange(typed.removeprefix("/")))
            return True
        name, _, argument = typed[1:].partition(" ")
        if name == "quit":
            return False
        command = self.commands.get(name)
        if command is None:
            self.note(f"there is no command /{name}; /help lists them, and a text begins with // for a slash")
        else:
            self._guarded(lambda: command(argument.strip()))
        return True

    def exchange(self, typed: str) -> None:
        """Append what was typed and let the model continue.

        Raises ValueError if the model cannot read on, or its logits are NaN or infinite.
        """
        model, session = self.model, self.text.session
        drawn, after, ends_line = list[int](), None, True
        try:
            for piece in model.stream(typed, session=session, keep=True, **self.options):
                drawn += (token.id for token in piece.tokens)
                if piece.text:
                    self.write(printable(piece.text))
                    ends_line = piece.text.endswith("\n")
                after = piece.session
        except KeyboardInterrupt:
            ends_line = False  # the terminal has written ^C
            after = read(model.model, drawn, model.read(typed, session)) if drawn else None
        finally:
            if not ends_line:
                self.write("\n")
        if after is None:
            self.note("stopped before the model wrote anything: the text is as it was")
            return
        self.text.move(after)
        if drawn and drawn[-1] == model.tokenizer.end:
            self.note("the model ended the document here; what comes next begins another")

    def note(self, words: str) -> None:
        """Show something that is not part of the text."""
        self.write(printable(f"[{words}]") + "\n")

    # ---------------------------------------------------------------------------------------- commands

    def save(self, name: str) -> None:
        """Write the text's state; over a file only if it was this chat's before."""
        session, path = self._begun(), self._path("save", name)
        if path.exists() and path.resolve() not in self.own:
            raise ValueError(f"{path} is there already: choose another name, or remove it first")
        self.model.save_session(session, path)
        self.own.add(path.resolve())
        self.note(f"saved {self._size(session)} to {path}")

    def load(self, name: str) -> None:
        """Continue from a state file; /undo returns to where the text was."""
        path = self._path("load", name)
        session = self.model.load_session(path)
        self.own.add(path.resolve())
        self.text.move(session)
        end = self.model.tokenizer.decode(list(session.past.recent))
        self.note(f"loaded {self._size(session)} from {path}; the text ends with {end!r}")

    def fork(self, number: str) -> None:
        """Copy the text and go to the copy; or go to the text of a number."""
        if not number:
            # sessions are values: nothing is copied, and neither text can change the other's
            now = self.text
            self.texts.append(Text(now.session, now.before.copy()))
            self.at = len(self.texts) - 1
        elif number.isdecimal() and 1 <= int(number) <= len(self.texts):
            self.at = int(number) - 1
        else:
            raise ValueError(f"there is no text {number}, but 1 to {len(self.texts)}")
        self.note(f"this is text {self.at + 1} of {len(self.texts)}, after {_tokens(self._count())}")

    def undo(self, _: str = "") -> None:
        """Go back to before the last exchange or /load."""
        if not self.text.before:
            raise ValueError("there is nothing to undo")
        self.text.session = self.text.before.pop()
        self.note(f"back to {_tokens(self._count())}")

    def state(self, _: str = "") -> None:
        """Show the bytes of the state, and those that a Transformer's cache would have by now."""
        session, config = self._begun(), self.model.config
        ours, layers = state_bytes(session), len(config.layers)
        size = self.model.model.block_dtype.itemsize
        cache = layers * 2 * config.width * size * session.past.count
        self.note(
            f"{self._size(session)}. A Transformer of this size would hold {bytes_text(cache)} by now, "
            f"{cache / max(ours, 1):.2g} times as much: {layers} layers x 2 x {config.width} wide x {size} B "
            f"x {_tokens(session.past.count)}, with multi-head attention"
        )

    # ----------------------------------------------------------------------------------------- helpers

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            if not errors.is_refusal(error):
                raise
            self.note(errors.message(error))

    def _begun(self) -> Session:
        if self.text.session is None:
            raise ValueError("the text is empty: type something first")
        return self.text.session

    def _count(self) -> int:
        return 0 if self.text.session is None else self.text.session.past.count

    def _path(self, command: str, name: str) -> Path:
        if not name:
            raise ValueError(f"name a file: /{command} FILE")
        return Path(name).expanduser()

    def _size(self, session: Session) -> str:
        return f"{_tokens(session.past.count)} in {bytes_text(state_bytes(session))} of state"


def state_bytes(session: Session) -> int:
    """Bytes of a session's states, counted from their tensors, without the logits that are kept beside."""
    return session.nbytes - session.logits_V.nbytes


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"


def converse(chat: Chat, ask: Callable[[str], str], *, prompt: str = "> ") -> None:
    """Read lines by `ask`, as `input` does, and do what they say, until /quit or the end of the input."""
    while True:
        try:
            typed = ask(prompt)
            while typed.endswith("\\"):
                typed = f"{typed[:-1]}\n{ask('.' * len(prompt.rstrip()) + ' ' if prompt else '')}"
        except (EOFError, KeyboardInterrupt):
            if prompt:
                chat.write("\n")
            return
        if not chat.line(typed):
            return


def chat(
    run: str,
    session: Path | None,
    options: Mapping[str, Any],
    loading: Loading,
    ask: Callable[[str], str] = input,
) -> int:
    """Chat with a model until the input ends; returns the exit status.

    Args:
        session: a state file that is continued if it is there, and written at the end.
        options: the fields of `holdall.engine.Sampling`.
    """
    loading.load_mixers()
    Sampling(**options)  # a mistake is named before the model is loaded
    model = loading.model(run)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    chat = Chat(model, options, write)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        net = model.model
        chat.note(f"{net.parameter_count():,} parameters on {net.device}; /help lists the commands")
    if session is not None and session.exists():
        chat.load(str(session))
        chat.text.before.clear()
    elif session is not None and not session.absolute().parent.is_dir():
        raise ValueError(f"--session {session}: there is no folder {session.parent}")
    try:
        converse(chat, ask, prompt="> " if terminal else "")
    finally:
        if session is not None and chat.text.session is not None:
            chat.own.add(session.resolve())
            chat.save(str(session))
    return 0
