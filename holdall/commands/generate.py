"""The command `holdall generate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdall import language_model
from holdall.adapters import hazy
from holdall.commands import printable
from holdall.commands.loading import Loading

STDIN = "-"


def generate(
    run: str,
    prompt: str,
    options: Mapping[str, Any],
    session: Path | None,
    save_session: Path | None,
    loading: Loading,
    *,
    jrt_padding: int | None = None,
) -> int:
    """Print how a model continues a prompt, or a session; returns the exit status.

    Args:
        options: the fields of `holdall.engine.Sampling`.
        session, save_session: the files of what was read before, and of what was read in the end.
        jrt_padding: the token that a short prompt is padded with, as the published JRT-RNN models read it:
            its tokens alone, without one that begins a document.
    """
    if session is not None and jrt_padding is not None:
        raise ValueError("--jrt-padding pads a prompt that begins a text, and --session continues one")
    loading.load_mixers()
    if not prompt and " " in run and not Path(run).exists():
        raise ValueError(f"name the run before the prompt: holdall generate {language_model.DEFAULT} '{run}'")
    model = loading.model(run)
    text = _read_stdin() if prompt == STDIN else prompt
    terminal = sys.stdout.isatty()

    def show(piece: str) -> None:
        # a model may say anything, but not steer the terminal; a file gets its very words
        sys.stdout.write(printable(piece) if terminal else piece)
        sys.stdout.flush()

    before = None if session is None else model.load_session(session)
    if jrt_padding is not None:
        ids = model.tokenizer.encode_batch([text])[0].tolist()
        before, text = hazy.read_padded(model.model, ids, pad=jrt_padding), ""
    try:
        for piece in model.stream(text, session=before, keep=save_session is not None, **options):
            if piece.text:
                show(piece.text)
            if piece.session is not None and save_session is not None:
                model.save_session(piece.session, save_session)
    finally:
        if terminal:
            show("\n")
    return 0


def _read_stdin() -> str:
    """All of stdin, without the new line that a shell puts at its end."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin is not UTF-8 ({error})") from None
