"""The text that comes with Holdall, so that a model can be trained with nothing else at hand.

"Pride and Prejudice" by Jane Austen (1775-1817), first published in 1813 and in the public domain: all 61
chapters, each a document, 0.7 million bytes. People and places come back again and again, which a model has
to recall. A paragraph is a line; marks of emphasis are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from holdall import runs
from holdall.text.corpus import Corpus, open_corpus
from holdall.text.files import TextError
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import Bytes

TEXT = Path(__file__).with_name("default.jsonl.xz")
VALID = 0.15
"""The share of chapters for validation."""


def default_corpus(cache: Path | None = None) -> Corpus:
    """The embedded text as bytes; its shards are made on first use, in a folder below `cache`.

    By default that is the user's cache folder, $XDG_CACHE_HOME/holdall or ~/.cache/holdall, or where that
    cannot be written one for temporary files. Any number of processes may ask at once. Raises RunError if
    the folder cannot be written.
    """
    if cache is not None:
        return _below(cache)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return _below(home / "holdall")
    except runs.RunError:  # a home that is missing or read-only, as in many containers
        return _below(Path(tempfile.gettempdir()) / f"holdall-{os.getuid()}")


def _below(cache: Path) -> Corpus:
    folder = cache / f"text-{hashlib.sha256(TEXT.read_bytes()).hexdigest()[:12]}-{VALID:g}"
    with runs.explained(cache), contextlib.suppress(TextError):  # which says: not made yet, or damaged
        return open_corpus(folder)
    with runs.locked(cache, patience=60):
        try:  # another process may have made it meanwhile
            return open_corpus(folder)
        except TextError:
            making = folder.with_name(f".{folder.name}")
            with runs.explained(cache):
                for left in (making, folder):
                    shutil.rmtree(left, ignore_errors=True)
                write_corpus([TEXT], making, Bytes(), valid=VALID, command="holdall train")
                making.rename(folder)
            return open_corpus(folder)
