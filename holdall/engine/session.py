"""What a model has read of one text, as a value: a session can be forked, saved, moved and resumed.

    session = read(model, tokens)                    the states, and the logits of the next token
    longer = read(model, more, session)              the first one is as it was
    save_session(session, path, model=fingerprint)   resume tomorrow, on another machine

A text is read in pieces on a fixed grid: from position p in the largest power of two that divides p, that is
at most `chunk`, and that ends within the text. So 107 tokens at a chunk of 32 are 32 + 32 + 32 + 8 + 2 + 1.
Where a text is cut depends on where reading starts and ends alone, so that neither a schedule nor what was
read beside it can change a bit; and who resumes at a grid point cuts as if nothing had been read before.

Where tokens at the start see each other (`Model.prefix`, P), the first piece is the first P of the tokens
that are given at first, or all of them if they are fewer; the grid begins behind it. What was read then
depends on how many these were, and so do a session's hashes.

Letters: T tokens, V vocabulary, B batch row, P tokens of a prefix.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from holdall.contract import (
    POSITION_FIELDS,
    Position,
    State,
    StateError,
    join_rows,
    misfit,
    read_states,
    save_states,
)
from holdall.model import Model
from holdall.ops.begun import begun

CHUNK = 512
"""Tokens of the largest piece, and between two points of the grid."""
RECENT = 8
"""How many of the last tokens are kept beside the hash, so that text can be decoded from here on."""


@dataclass(frozen=True, slots=True)
class Past:
    """Which tokens were read, in constant memory: a hash of those up to the last grid point, and the rest."""

    count: int = 0
    """How many."""
    grid: bytes = b""
    """The hash of those before the last point of the grid; before the first what `beginning` gives."""
    tail: tuple[int, ...] = ()
    """Those after it, fewer than CHUNK."""
    recent: tuple[int, ...] = ()
    """The last RECENT of all."""

    @classmethod
    def beginning(cls, prefix: int = 0) -> Past:
        """The past of nothing, before a first piece whose tokens see each other, so many of them."""
        return cls(grid=chained(b"", (-prefix,)) if prefix else b"")

    def after(self, tokens: Sequence[int]) -> Past:
        """The past with more tokens at its end."""
        grid, tail = self.grid, (*self.tail, *tokens)
        while len(tail) >= CHUNK:
            grid, tail = chained(grid, tail[:CHUNK]), tail[CHUNK:]
        recent = (*self.recent, *tokens)[-RECENT:]
        return Past(self.count + len(tokens), grid, tail, recent)

    def padded(self, padding: int) -> Past:
        """As if so many of the first tokens were padding, which is not what they are as text."""
        return replace(self, grid=chained(self.grid, (-1, padding))) if padding else self

    @property
    def key(self) -> str:
        """What identifies these tokens: equal for equal ones, and for no others."""
        return chained(self.grid, (self.count, *self.tail)).hex()


def chained(grid: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a hash and the tokens after it."""
    return hashlib.blake2b(grid + struct.pack(f"<{len(tokens)}q", *tokens), digest_size=16).digest()


class Session(NamedTuple):
    """What was read of one text.

    states: of one row, one per layer, without room.
    logits_V: of the next token, fp32.
    past: which tokens were read.
    """

    states: list[State]
    logits_V: Tensor
    past: Past

    @property
    def nbytes(self) -> int:
        """Bytes of states and logits."""
        tensors = [self.logits_V, *(tensor for state in self.states for tensor in state)]
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device | str) -> Session:
        """The session with its tensors on a device."""
        states = [type(state)(*(tensor.to(device) for tensor in state)) for state in self.states]
        return Session(states, self.logits_V.to(device), self.past)


def pieces(start: int, stop: int, chunk: int = CHUNK, *, prefix: int = 0) -> Iterator[int]:
    """The sizes of the pieces in which tokens from position `start` up to `stop` are read.

    Args:
        prefix: tokens from position 0 that are one piece.

    Raises ValueError if the chunk is no power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"a chunk is a power of two, not {chunk}")
    if prefix and not start:
        start = min(prefix, stop)
        yield start
    while start < stop:
        size = min(chunk, start & -start or chunk)
        while start + size > stop:
            size //= 2
        yield size
        start += size


def read(
    model: Model, tokens: Sequence[int], session: Session | None = None, *, chunk: int = CHUNK
) -> Session:
    """Read tokens after what a session has read, or from the beginning; the session stays as it was.

    Raises ValueError if there is nothing to read, a token is not of the model's vocabulary, or the text grows
    longer than the learned positions; StateError if the session is another model's.
    """
    if not len(tokens) and session is None:
        raise ValueError("there is nothing to read: give at least one token")
    check_tokens(tokens, model.config.vocab)
    reader = Reader(model, tokens, session, chunk=chunk)
    while not reader.done:
        reader.step()
    return reader.session()


class Reader:
    """Reads tokens piece by piece, so that others can be served between two pieces.

    Attributes:
        at: how many of these tokens were read.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int],
        start: Session | None,
        *,
        chunk: int = CHUNK,
        marks: Sequence[int] = (),
    ) -> None:
        """`marks`: numbers of these tokens after which a piece is to end, beside those of the grid; none
        within a prefix.

        Raises ValueError, naming the layer, if the model cannot read in pieces.
        """
        self.model, self.given = model, tuple(tokens)
        prefix = min(model.prefix, len(self.given)) if start is None else 0
        self.states: list[State] | None = None if start is None else start.states
        self.logits_V: Tensor | None = None if start is None else start.logits_V
        self.past = Past.beginning(prefix) if start is None else start.past
        ends = {0, len(self.given), *(mark for mark in marks if max(prefix, 1) <= mark < len(self.given))}
        before = self.past.count
        cuts = (
            pieces(before + a, before + b, chunk, prefix=prefix) for a, b in itertools.pairwise(sorted(ends))
        )
        self.sizes = [*itertools.chain(*cuts)][::-1]
        self.at, self._own = 0, False

    @property
    def done(self) -> bool:
        return not self.sizes

    def step(self) -> None:
        """Read the next piece."""
        now = self.given[self.at : self.at + self.sizes.pop()]
        self._read(now)
        self.past, self.at = self.past.after(now), self.at + len(now)

    @torch.no_grad()
    def _read(self, tokens: Sequence[int]) -> None:
        """Have the states and the logits after a piece."""
        now_1T = torch.tensor([tokens], device=self.model.device)
        # a session's states are left alone; those that come of them are this reader's, until it gives them
        with begun(self.states is not None):
            h_1TD, self.states = self.model.hidden(now_1T, self.states, inplace=self._own)
        self._own = True
        self._note(h_1TD[0], tokens)
        self.logits_V = self.model.logits(h_1TD[0, -1]).float()

    def _note(self, h_TD: Tensor, tokens: Sequence[int]) -> None:
        """For those who want to know more of a piece than its end."""

    def session(self) -> Session:
        """What was read up to here."""
        assert self.states is not None
        assert self.logits_V is not None
        self._own = False
        return Session(self.states, self.logits_V, self.past)

    def alike(self, other: Reader) -> bool:
        """Whether the next pieces of both can be read together: of one size, after states of equal shapes."""
        same_kind = type(self) is type(other) and self.sizes[-1:] == other.sizes[-1:]
        return same_kind and self._shapes == other._shapes

    @property
    def _shapes(self) -> list[torch.Size]:
        return [tensor.shape for state in self.states or () for tensor in state]


@torch.no_grad()
def step_together(readers: Sequence[Reader]) -> None:
    """Read the next piece of each of some readers that are `alike`, in one call of the model."""
    if len(readers) == 1:
        readers[0].step()
        return
    model, states = readers[0].model, None
    now = [reader.given[reader.at : reader.at + reader.sizes.pop()] for reader in readers]
    if readers[0].states is not None:
        each = zip(*(reader.states for reader in readers if reader.states is not None), strict=True)
        states = [join_rows(rows) for rows in each]
    with begun(states is not None):
        h_BTD, after = model.hidden(torch.tensor(now, device=model.device), states, inplace=True)
    logits_BV = model.logits(h_BTD[:, -1]).float()
    assert after is not None
    for row, (reader, tokens) in enumerate(zip(readers, now, strict=True)):
        reader._note(h_BTD[row], tokens)
        # of its own: what the others read is not kept in memory with it
        reader.states = [type(state)(*(t[row : row + 1].clone() for t in state)) for state in after]
        reader.logits_V, reader._own = logits_BV[row].clone(), True
        reader.past, reader.at = reader.past.after(tokens), reader.at + len(tokens)


def check_tokens(tokens: Sequence[int], vocab: int) -> None:
    """Raise ValueError, naming the first, if a token is not of the vocabulary."""
    for at, token in enumerate(tokens):
        if not 0 <= token < vocab:
            raise ValueError(f"token {at} is {token}, where the model's vocabulary is 0 to {vocab - 1}")


def misfit_of(session: Session, model: Model) -> str:
    """Why a session cannot be one of a model; empty if it can."""
    kinds = [(mixer.state_type, mixer.state_fields(model.block_dtype), mixer.owner) for mixer in model.mixers]
    if model.position_embed is not None:
        kinds.append((Position, POSITION_FIELDS, "a model with learned positions"))
    if not session.past.count:
        return "nothing was read"
    if len(session.states) != len(kinds):
        return f"it has {len(session.states)} states, where the model has {len(kinds)}"
    device, vocab = session.logits_V.device, model.config.vocab
    if session.logits_V.shape != (vocab,):
        return f"logits_V has shape {tuple(session.logits_V.shape)}, where the model's vocabulary is {vocab}"
    for layer, (state, (kind, fields, owner)) in enumerate(zip(session.states, kinds, strict=True)):
        if why := misfit(state, kind, fields, owner, rows=1, device=device, layer=f" of layer {layer}"):
            return why
    return ""


# ------------------------------------------------------------------------------------------------- files


def save_session(session: Session, path: Path, *, model: str) -> None:
    """Write a session to a file of its own; `model` is the fingerprint of the model that read it.

    Raises OSError if the file cannot be written; the one of before is then still there.
    """
    past = {**asdict(session.past), "grid": session.past.grid.hex()}
    save_states(
        session.states, path, model=model, tokens_read=[session.past.count],
        beside={"logits_V": session.logits_V}, about={"past": json.dumps(past)},
    )  # fmt: skip


def load_session(path: Path, model: Model, *, fingerprint: str) -> Session:
    """Read what `save_session` wrote, for the model that read it, onto its device.

    Raises StateError if the file is another model's or holds no session, and RunError if it is damaged.
    """
    states, beside, file = read_states(path, model.mixers, model=fingerprint)
    if "past" not in file.about or "logits_V" not in beside:
        raise StateError(f"{path} holds states, but no session: it lacks the logits of the next token")
    past = json.loads(file.about["past"])
    known = Past(past["count"], bytes.fromhex(past["grid"]), tuple(past["tail"]), tuple(past["recent"]))
    return Session(states, beside["logits_V"], known).to(model.device)
