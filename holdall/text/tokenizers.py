"""From text to tokens and back: bytes, which need no file, or any file of the `tokenizers` library.

Every document ends with one end-of-text token. For bytes it is 256, so that there are 257 tokens; a file that
has no such token of its own gets one behind its last.

A tokenizer belongs to the tokens that it made: a corpus keeps a copy of its file (holdall/text/shards.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdall.text.sources import TextError, needed

END = "<|endoftext|>"
"""How the end of a document is shown."""
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""What tokenizer files call the end of a text, the best first."""
PUBLISHED = {"gpt2": ("openai-community/gpt2", "gpt2"), "gpt-neox": ("EleutherAI/gpt-neox-20b",)}
"""Names that stand for files on the Hugging Face hub."""
FILE = "tokenizer.json"


class Tokenizer(ABC):
    """A map from text to token ids and back.

    Attributes:
        name: as it is shown.
        vocab: how many ids there are, the end of text included.
        end: the id of the end of a text.
    """

    name: str
    vocab: int
    end: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without an end; uint16, or uint32 if the vocabulary needs it.

        What looks like a special token in a text is encoded as the text that it is.
        """

    @abstractmethod
    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """What each token stands for; a token that is part of a character shows its bytes, as in \\xe2."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; bytes that are no UTF-8 become the replacement character."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest that holds every id."""
        return np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    @property
    def file(self) -> bytes:
        """What a corpus must keep to rebuild it; empty if nothing."""
        return b""


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a user names: "bytes", "gpt2", "gpt-neox", or the path of a tokenizer file.

    Raises TextError, which says where a file can come from.
    """
    if name == "bytes":
        return Bytes()
    path = Path(name)
    if path.is_dir():
        path /= FILE
    if not path.exists():
        path = _published(name)
    shown = path.stem if path.name != FILE else path.absolute().parent.name
    return Filed(path.read_bytes(), name if name in PUBLISHED else shown, str(path))


def from_manifest(described: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a corpus, from what its manifest says and the file beside it."""
    if described["kind"] == "bytes":
        return Bytes()
    path = folder / FILE
    return Filed(path.read_bytes(), described["name"], str(path))


def _published(name: str) -> Path:
    """The file of a published tokenizer, from the hub's cache or the hub."""
    wayout = f"Give the path of its file: --tokenizer path/to/{FILE}, or --tokenizer bytes"
    if name not in PUBLISHED:
        raise TextError(f"there is no tokenizer '{name}' and no such file. {wayout}, gpt2 or gpt-neox")
    hub = needed("huggingface_hub")
    for repository in PUBLISHED[name]:
        cached = hub.try_to_load_from_cache(repository, FILE)
        if isinstance(cached, str):
            return Path(cached)
    try:
        return Path(hub.hf_hub_download(PUBLISHED[name][0], FILE))
    except Exception as error:  # of many libraries below; whatever it is, the user can do without the hub
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise TextError(f"cannot get {name} from the Hugging Face hub ({reason}). {wayout}") from error


class Bytes(Tokenizer):
    """The bytes of UTF-8, and 256 for the end of a text."""

    name, vocab, end = "bytes", 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        return [END if i == self.end else _shown(bytes([i])) for i in map(int, ids)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        end = END.encode()
        return b"".join(end if i == self.end else bytes([i]) for i in map(int, ids)).decode(errors="replace")

    def describe(self) -> dict[str, Any]:
        return {"kind": self.name, "name": self.name, "vocab": self.vocab, "end": self.end, "sha256": ""}


class Filed(Tokenizer):
    """A file of the `tokenizers` library, which is imported when something is encoded or decoded."""

    def __init__(self, file: bytes, name: str, path: str) -> None:
        self._file, self.name = file, name
        try:
            self._parsed: dict[str, Any] = json.loads(file)
            model, added = self._parsed["model"], self._parsed.get("added_tokens") or []
            vocab = model["vocab"]
            known = dict(vocab) if isinstance(vocab, dict) else {word: i for i, (word, _) in enumerate(vocab)}
            known |= {token["content"]: token["id"] for token in added}
            self.vocab = max(known.values()) + 1
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(
                f"{path} is no file of the tokenizers library ({type(error).__name__}: {error}); "
                f"such a file is mostly called {FILE}"
            ) from error
        self.end = next((known[word] for word in ENDS if word in known), self.vocab)
        self.vocab = max(self.vocab, self.end + 1)

    @property
    def file(self) -> bytes:
        return self._file

    @functools.cached_property
    def _tokenizer(self) -> Any:
        made = needed("tokenizers").Tokenizer.from_str(self._file.decode())
        made.no_truncation()  # files keep both from whoever used them last
        made.no_padding()
        made.encode_special_tokens = True  # a text that mentions <|endoftext|> does not end there
        return made

    @functools.cached_property
    def _of_bytes(self) -> bool:
        """Whether tokens are bytes written as letters, as GPT-2's are."""
        decoder = self._parsed.get("decoder") or {}
        return any(each.get("type") == "ByteLevel" for each in (decoder, *decoder.get("decoders", ())))

    @functools.cached_property
    def _divisible(self) -> bool:
        """Whether `_cut` changes no token: words are split as by GPT-2, and edges of a text do not matter."""
        split = json.dumps(self._parsed.get("pre_tokenizer"))
        as_gpt_2 = '"ByteLevel"' in split and '"use_regex": false' not in split
        changed = (self._parsed.get("normalizer") or {"type": None})["type"]
        return as_gpt_2 and changed in (None, "NFC", "NFD", "NFKC", "NFKD", "Lowercase")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [list(_cut(text)) if self._divisible else [text] for text in texts]
        flat = [part for each in parts for part in each]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encoded).ids, dtype=self.dtype) for _ in each]) for each in parts
        ]

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        return [self._piece(int(i)) for i in ids]

    def _piece(self, i: int) -> str:
        if i == self.end:
            return END
        word: str | None = self._tokenizer.id_to_token(i)
        if word is None:  # ids between a vocabulary and the size that its model was given
            return f"<{i}>"
        letters = _bytes_of_letters()
        if self._of_bytes and all(letter in letters for letter in word):
            return _shown(bytes(letters[letter] for letter in word))
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", word)
        return _shown(bytes.fromhex(byte[1])) if byte else word.replace("\u2581", " ")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        runs = np.split(ids, np.flatnonzero(ids == self.end))
        first, *rest = [[int(i) for i in run if i != self.end] for run in runs]
        texts = (self._tokenizer.decode(run, skip_special_tokens=False) for run in (first, *rest))
        return END.join(texts)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._file).hexdigest()
        return {"kind": "file", "name": self.name, "vocab": self.vocab, "end": self.end, "sha256": digest}


CUT = 1 << 18
"""Letters after which a text is cut where it can be: the library's memory grows with the longest one."""


_BETWEEN = re.compile(r" (?=[^\W\d_])")


def _cut(text: str) -> Iterator[str]:
    """Parts of a long text, each but the first beginning with a space and a letter.

    There GPT-2's pattern, which splits text into words before they are encoded, splits too, so that the
    tokens are those of the whole.
    """
    start = 0
    while found := _BETWEEN.search(text, start + CUT):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2): those that print stand for
    themselves, the others, in order, for the letters from 256 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _shown(piece: bytes) -> str:
    """Bytes as text if they are whole characters, else escaped."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece.decode(errors="backslashreplace")


def encode_alone() -> None:
    """Keep the library from threads of its own: whoever calls this is one process of several."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
