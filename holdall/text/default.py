"""The bundled text, so that a model can be trained without any other data.

"Pride and Prejudice" by Jane Austen (1775-1817), first published in 1813 and in the public domain: all 61
chapters, one document each, 0.7 million bytes. People and places recur throughout, so that there is something
to recall. A paragraph is a line; emphasis marks are removed.
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
"""Share of the chapters used for validation."""
CONTENT = "f49832cad929b17ac8d3a5c6a439ef072db2ca0346132eab230ef8fe1e3f5e18"
"""Content hash of the corpus; a cached copy must have it."""


def default_corpus(cache: Path | None = None) -> Corpus:
    """The bundled text, tokenized as bytes; its shards are made on first use, in a folder below `cache`.

    By default that is the user's cache folder, $XDG_CACHE_HOME/holdall or ~/.cache/holdall, or if that is not
    writable a folder of the user's own among the temporary files. Safe to call from several processes at
    once. Raises RunError if the folder cannot be written, or belongs to another user.
    """
    if cache is not None:
        return _below(cache)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        return _below(_private(home / "holdall"))
    except files.RunError:  # a home that is missing or read-only, as in many containers
        return _below(_private(Path(tempfile.gettempdir()) / f"holdall-{os.getuid()}", shared=True))


def _private(folder: Path, *, shared: bool = False) -> Path:
    """Create a folder that only its user can write. If `shared`, raises RunError unless it is that."""
    with files.explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    mode = status.st_mode
    if shared and (not stat.S_ISDIR(mode) or status.st_uid != os.getuid() or mode & 0o022):
        raise TextError(
            f"{folder} is not a folder of yours alone: other users may write there. Remove it, or set "
            "XDG_CACHE_HOME to a folder that you can write"
        )
    return folder


def _below(cache: Path) -> Corpus:
    folder = cache / f"text-{hashlib.sha256(TEXT.read_bytes()).hexdigest()[:12]}-{VALID:g}"
    with files.explained(cache), contextlib.suppress(TextError):  # not made yet, or damaged
        return _known(folder)
    with files.locked(cache, patience=60):
        try:  # another process may have made it meanwhile
            return _known(folder)
        except TextError:
            making = folder.with_name(f".{folder.name}")
            with files.explained(cache):
                for outdated in (making, folder):
                    _remove(outdated)
                write_corpus([TEXT], making, Bytes(), valid=VALID, command="holdall train")
                making.rename(folder)
            return _known(folder)


def _known(folder: Path) -> Corpus:
    """The corpus in a folder, fully verified. Raises TextError unless it is the bundled text."""
    corpus = open_corpus(folder, verify=True)
    if corpus.content_hash != CONTENT:
        raise TextError(f"{folder} holds another text than the bundled one; remove it")
    return corpus


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
