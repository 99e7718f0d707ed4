"""From text to tokens and back: bytes, which need no file, or any file of the `tokenizers` library.

Every document ends with one end-of-text token. For bytes it is 256, so that there are 257 tokens; a file that
has no such token of its own gets one behind its last.

A tokenizer belongs to the tokens that it made: a corpus keeps a copy of its file (holdall/text/shards.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdall import files
from holdall.text.files import TextError, read_regular
from holdall.text.sources import needed

END = "<|endoftext|>"
"""How the end of a document is shown."""
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""What tokenizer files call the end of a text, the best first."""
PUBLISHED = {"gpt2": ("openai-community/gpt2", "gpt2"), "gpt-neox": ("EleutherAI/gpt-neox-20b",)}
"""Names that stand for files on the Hugging Face hub."""
FILE = "tokenizer.json"
LARGEST = 1 << 24
"""Ids are below; no vocabulary comes near, and a damaged one would ask for a model of that many rows."""


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

        What looks like a special token in a text is encoded as the text that it is: neither the end nor
        another special token comes out of a text.
        """

    @abstractmethod
    def cut(self, data: bytes | bytearray, start: int) -> int:
        """The first place at or behind `start` where a text in UTF-8 can be cut: the tokens of what is before
        and of what is behind are those of the whole. Its length if there is none.
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
    try:
        if path.is_dir():
            path /= FILE
        there = path.exists()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror or error}") from error
    if not there:
        path = _published(name)
    shown = path.stem if path.name != FILE else path.absolute().parent.name
    file = read_regular(path, follow=True)
    return Filed(file, name if name in PUBLISHED else files.encodable(shown), str(path))


def from_manifest(described: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a corpus, from what its manifest says and the file beside it. Raises TextError."""
    if described["kind"] == "bytes":
        return Bytes()
    path = folder / FILE
    made = Filed(read_regular(path), described["name"], str(path))
    if made.describe() != dict(described):
        raise TextError(f"{path} was altered: it is not the tokenizer that made these tokens")
    return made


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

    def cut(self, data: bytes | bytearray, start: int) -> int:
        # a character has at most three bytes behind its first; a fourth is no part of one
        for place in range(start, min(start + 3, len(data))):
            if data[place] & 0xC0 != 0x80:
                return place
        return min(start + 3, len(data))

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        return [END if i == self.end else _shown(bytes([i])) for i in map(int, ids)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        end = END.encode()
        return b"".join(end if i == self.end else bytes([i]) for i in map(int, ids)).decode(errors="replace")

    def describe(self) -> dict[str, Any]:
        return {"kind": self.name, "name": self.name, "vocab": self.vocab, "end": self.end, "sha256": ""}


class Filed(Tokenizer):
    """A file of the `tokenizers` library, which is imported when something is encoded or decoded.

    Text is encoded by a copy of the file in which the special tokens have other names, see `_disguised`.
    Raises TextError, also later, if it is no such file or the library cannot use it.
    """

    def __init__(self, file: bytes, name: str, path: str) -> None:
        self._file, self.name, self._path = file, name, path
        try:
            self._parsed: dict[str, Any] = files.loads(file)
            known = _ids(self._parsed)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(
                f"{path} is no file of the tokenizers library ({type(error).__name__}: {error}); "
                f"such a file is mostly called {FILE}. Get it anew, or give another one"
            ) from error
        self.vocab = max(known.values()) + 1
        # what is unknown must not end a document; where tokens are bytes, nothing is unknown
        unknown = None if self._of_bytes else self._parsed["model"].get("unk_token")
        self._end_word = next((word for word in ENDS if word in known and word != unknown), "")
        self.end = known.get(self._end_word, self.vocab) if self._end_word else self.vocab
        self.vocab = max(self.vocab, self.end + 1)

    @property
    def file(self) -> bytes:
        return self._file

    @contextlib.contextmanager
    def _library(self, what: str) -> Iterator[None]:
        """Turn whatever the library raises, a panic of its Rust included, into a TextError."""
        try:
            yield
        except (TextError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            reason = str(error).strip().partition("\n")[0]
            raise TextError(
                f"{self._path} {what} ({reason}). Get it anew, or give another tokenizer"
            ) from error

    def _load(self, file: str) -> Any:
        with self._library("is no file that the tokenizers library can use"):
            made = needed("tokenizers").Tokenizer.from_str(file)
            made.no_truncation()  # files keep both from whoever used them last
            made.no_padding()
            made.encode_special_tokens = True  # a text that mentions <|endoftext|> does not end there
            return made

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """For what is decoded."""
        return self._load(self._file.decode())

    @functools.cached_property
    def _encoder(self) -> tuple[Any, np.ndarray, int | None]:
        """What encodes; which ids may come of a text, (vocab,) bool; and what stands in for the others."""
        words = {each["content"] for each in self._parsed.get("added_tokens") or [] if each.get("special")}
        words |= {self._end_word} - {""}
        with self._library("is no file that the tokenizers library can use"):
            made = self._load(json.dumps(_disguised(self._parsed, words)))
        ids = made.get_vocab(with_added_tokens=True)
        special = {ids[_disguise(word)] for word in words if _disguise(word) in ids}
        others = {i for word, i in ids.items() if i not in special}
        if max(others | special, default=0) >= self.vocab or self.end in others:
            raise TextError(
                f"{self._path} gives its added tokens other ids than the tokenizers library does; load it "
                "with the library and save it again"
            )
        model = self._parsed["model"]
        unknown = model.get("unk_id")
        if unknown is None:
            word = model.get("unk_token")
            unknown = ids.get(_disguise(word) if word in words else word)
        may_come = np.ones(self.vocab, dtype=bool)
        may_come[[*special, self.end]] = False
        if unknown is not None and unknown != self.end:
            may_come[unknown] = True
            return made, may_come, unknown
        return made, may_come, None

    @functools.cached_property
    def _of_bytes(self) -> bool:
        """Whether tokens are bytes written as letters, as GPT-2's are."""
        decoder = self._parsed.get("decoder") or {}
        return any(each.get("type") == "ByteLevel" for each in (decoder, *decoder.get("decoders", ())))

    @functools.cached_property
    def _cuts(self) -> re.Pattern[bytes] | None:
        """What a text may be cut behind, if at all: words are split as by GPT-2, and edges do not matter.

        GPT-2's pattern, which splits text into words before they are encoded, splits wherever white space
        follows something else.
        """
        split = self._parsed.get("pre_tokenizer") or {}
        kinds = [split] if split.get("type") != "Sequence" else split.get("pretokenizers", [])
        levels = [each for each in kinds if each.get("type") == "ByteLevel" and each.get("use_regex", True)]
        others = [each for each in kinds if each.get("type") not in ("ByteLevel", "Digits")]
        changed = (self._parsed.get("normalizer") or {}).get("type")
        # tokens that are looked for in the text before it is split, and may lie across a cut
        added = self._parsed.get("added_tokens") or []
        across = [each for each in added if each.get("rstrip") or re.search(r"\S\s", each["content"])]
        if len(levels) != 1 or others or across or changed not in UNCHANGED_BY_CUTS:
            return None
        # a space is put in front of a part that does not begin with one
        at = rb" " if levels[0].get("add_prefix_space", True) else rb"[ \n]"
        return re.compile(rb"[!-~\x80-\xff](?=" + at + rb")")

    def cut(self, data: bytes | bytearray, start: int) -> int:
        if self._cuts is None:
            return len(data)
        for found in self._cuts.finditer(data, max(0, start - 1)):
            place = found.end()
            before = data[max(0, place - 4) : place].decode(errors="ignore")[-1:]
            if place >= start and (before.isalnum() or "!" <= before <= "~"):
                return place
        return len(data)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        tokenizer, may_come, stand_in = self._encoder
        out: list[list[np.ndarray]] = [[] for _ in texts]
        for group in _groups((index, part) for index, text in enumerate(texts) for part in self._parts(text)):
            with self._library("is a tokenizer that cannot encode a document"):
                encoded = tokenizer.encode_batch_fast([part for _, part in group], add_special_tokens=False)
            for (index, _), each in zip(group, encoded, strict=True):
                ids = np.array(each.ids, dtype=self.dtype)
                allowed = may_come[ids]
                if not allowed.all():  # a text that has even the disguise of a special token
                    ids = (
                        ids[allowed] if stand_in is None else np.where(allowed, ids, ids.dtype.type(stand_in))
                    )
                out[index].append(ids)
        return [
            np.concatenate([np.empty(0, self.dtype), *each]) if len(each) != 1 else each[0] for each in out
        ]

    def _parts(self, text: str) -> Iterator[str]:
        if len(text) <= CUT or self._cuts is None:
            yield text
            return
        data, start = text.encode(), 0
        while start < len(data):
            place = self.cut(data, start + CUT)
            yield data[start:place].decode()
            start = place

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        return [self._piece(int(i)) for i in ids]

    def _piece(self, i: int) -> str:
        if i == self.end:
            return END
        word: str | None = self._tokenizer.id_to_token(i) if 0 <= i < self.vocab else None
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
        with self._library("is a tokenizer that cannot decode"):
            texts = [self._tokenizer.decode(run, skip_special_tokens=False) for run in (first, *rest)]
        return END.join(texts)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._file).hexdigest()
        return {"kind": "file", "name": self.name, "vocab": self.vocab, "end": self.end, "sha256": digest}


CUT = 1 << 18
"""Bytes after which a text is cut where it can be: the library's memory grows with the longest one."""
GROUP = 1 << 20
"""Letters that the library gets at once: for each of their tokens it makes much more than the id."""
UNCHANGED_BY_CUTS = (None, "NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def _groups(parts: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    letters = 0
    for each in parts:
        group.append(each)
        letters += len(each[1])
        if letters >= GROUP:
            yield group
            group, letters = [], 0
    if group:
        yield group


def _ids(parsed: dict[str, Any]) -> dict[str, int]:
    """The id of each word of a tokenizer file. Raises ValueError, KeyError or TypeError if one is wrong."""
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        _check_parts(parsed.get(key), key)
    vocab = parsed["model"]["vocab"]
    if isinstance(vocab, dict):
        words = vocab
    else:  # of a Unigram model: words and their scores
        words = {}
        for i, (word, score) in enumerate(vocab):
            if not isinstance(word, str) or not math.isfinite(score):
                raise ValueError(f"word {i} of the vocabulary has no score")
            words.setdefault(word, i)
    known = dict(words)
    for token in parsed.get("added_tokens") or []:
        word = token["content"]
        if not isinstance(word, str) or not word or known.get(word, token["id"]) != token["id"]:
            raise ValueError(f"the added token {word!r} has two ids or no text")
        known[word] = token["id"]
    for word, i in known.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < LARGEST:
            raise ValueError(f"the id of {word!r} is {i!r}")
    if len(set(known.values())) < len(known):
        raise ValueError("two words have one id")
    if not known:
        raise ValueError("its vocabulary is empty")
    return known


def _check_parts(part: Any, key: str) -> None:
    """Raise ValueError unless a part of a tokenizer file has a type and sound parts, or is missing."""
    if part is None:
        return
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"its {key} has no type")
    for within in ("normalizers", "pretokenizers", "decoders"):
        if within in part:
            for each in part[within]:
                _check_parts(each, key)


def _disguise(word: str) -> str:
    return f"\0{word}\0"


def _disguised(parsed: dict[str, Any], words: set[str]) -> dict[str, Any]:
    """A tokenizer file that finds none of `words`, its special tokens, in any text, whatever kind it is.

    Their names are changed wherever a text is compared with them, after it was normalized and split: in the
    vocabulary of the model and among the added tokens, so that every other token keeps its id, and its chance
    to be chosen. What merges into them is left out.
    """
    new = {word: _disguise(word) for word in words}
    model = dict(parsed["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(word, word): i for word, i in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(word, word), score] for word, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [each.split(" ", 1) if isinstance(each, str) else each for each in model["merges"]]
        model["merges"] = [
            [a, b] for a, b in pairs if a not in words and b not in words and a + b[prefix:] not in words
        ]
    if model.get("dropout"):  # tokens by chance, for training tokenizers
        model["dropout"] = None
    added = [
        {**each, "content": new[each["content"]], "special": True} if each["content"] in words else each
        for each in parsed.get("added_tokens") or []
    ]
    return {**parsed, "model": model, "added_tokens": added}


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
