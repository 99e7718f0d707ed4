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
import stat
import tempfile
from pathlib import Path

from holdall import files
from holdall.text.corpus import Corpus, open_corpus
from holdall.text.files import TextError
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import Bytes

TEXT = Path(__file__).with_name("default.jsonl.xz")
VALID = 0.15
"""The share of chapters for validation."""
CONTENT = "f49832cad929b17ac8d3a5c6a439ef072db2ca0346132eab230ef8fe1e3f5e18"
"""The content hash of the corpus, by which one that lies in a cache is known."""


def default_corpus(cache: Path | None = None) -> Corpus:
    """The embedded text as bytes; its shards are made on first use, in a folder below `cache`.

    By default that is the user's cache folder, $XDG_CACHE_HOME/holdall or ~/.cache/holdall, or where that
    cannot be written one for temporary files, which nobody else may write. Any number of processes may ask at
    once. Raises RunError if the folder cannot be written, or belongs to somebody else.
    """
    if cache is not None:
        return _below(cache)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return _below(_private(home / "holdall"))
    except files.RunError:  # a home that is missing or read-only, as in many containers
        return _below(_private(Path(tempfile.gettempdir()) / f"holdall-{os.getuid()}", shared=True))


def _private(folder: Path, *, shared: bool = False) -> Path:
    """A folder, made for its user alone. In a place that all share, raises RunError unless it is that."""
    with files.explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    if shared and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise TextError(
            f"{folder} is not a folder of yours alone: somebody else may write there. Remove it, or set "
            "XDG_CACHE_HOME to a folder that you can write"
        )
    return folder


def _below(cache: Path) -> Corpus:
    folder = cache / f"text-{hashlib.sha256(TEXT.read_bytes()).hexdigest()[:12]}-{VALID:g}"
    with files.explained(cache), contextlib.suppress(TextError):  # which says: not made yet, or damaged
        return _known(folder)
    with files.locked(cache, patience=60):
        try:  # another process may have made it meanwhile
            return _known(folder)
        except TextError:
            making = folder.with_name(f".{folder.name}")
            with files.explained(cache):
                for left in (making, folder):
                    _remove(left)
                write_corpus([TEXT], making, Bytes(), valid=VALID, command="holdall train")
                making.rename(folder)
            return _known(folder)


def _known(folder: Path) -> Corpus:
    """The corpus in a folder, all of it read. Raises TextError unless it is the embedded text."""
    corpus = open_corpus(folder, verify=True)
    if corpus.content_hash != CONTENT:
        raise TextError(f"{folder} holds another text than the embedded one; remove it")
    return corpus


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
