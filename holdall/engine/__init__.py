"""Generation: sessions of one row, a store of them, and an engine that runs many rows together.

    request.py    what is asked of the engine and what it gives: Sampling, Request, Piece
    sampling.py   from logits to the next token
    session.py    what a model has read, as a value: fork it, save it, resume it
    slow.py       the definition of generation, one row at a time
    fast.py       the engine: rows in fixed buffers, held to slow.py token by token
    drafts.py     speculative decoding of one row: the text of slow.py in fewer calls
    lookup.py     guesses for many rows on their device, for the engine's drafts
    beam.py       the likeliest texts, several at a time
    store.py      sessions by what they have read, under a limit of bytes
    text.py       tokens to text as they come: whole characters, stop strings

It needs a model, a tokenizer and the model's fingerprint, not how they were loaded.
"""

from holdall.engine.fast import Engine, EngineConfig, Stats
from holdall.engine.request import Piece, QueueFullError, Request, Sampling, Token, Usage
from holdall.engine.session import Past, Session, load_session, read, save_session
from holdall.engine.store import StateStore, StoreConfig

__all__ = [
    "Engine", "EngineConfig", "Past", "Piece", "QueueFullError", "Request", "Sampling", "Session",
    "StateStore", "Stats", "StoreConfig", "Token", "Usage", "load_session", "read", "save_session",
]  # fmt: skip
