"""From text to tokens and back: bytes, which need no file, or any file of the `tokenizers` library.

Every document ends with one end-of-text token. For bytes its id is 256, so that the vocabulary is 257; a file
without such a token gets one after its last id.

A tokenizer belongs to the tokens that it made and to the models that read them: a corpus keeps a copy of its
file (holdall/text/shards.py), and so does the folder of a model (holdall/language_model.py), where bytes too
have a `tokenizer.json` that the `tokenizers` library reads.
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
"""Names of the end-of-text token in tokenizer files, in order of preference."""
PUBLISHED = {"gpt2": ("openai-community/gpt2", "gpt2"), "gpt-neox": ("EleutherAI/gpt-neox-20b",)}
"""Short names of tokenizers, with their repositories on the Hugging Face hub."""
FILE = "tokenizer.json"
LARGEST = 1 << 24
"""Upper bound of ids. No real vocabulary is near it; a damaged one would need an embedding of that size."""


class Tokenizer(ABC):
    """A map from text to token ids and back.

    Attributes:
        name: its name in listings and manifests.
        vocab: the number of ids, the end-of-text token included.
        end: the id of the end-of-text token.
        begin: the id that a model reads before a document; here `end`, but some models have another.
    """

    name: str
    vocab: int
    end: int

    @property
    def begin(self) -> int:
        return self.end

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without an end token; uint16, or uint32 if the vocabulary needs it.

        A special token's name in a text is encoded as ordinary text: no text gives an end token or another
        special token.
        """

    @abstractmethod
    def cut(self, data: bytes | bytearray, start: int) -> int:
        """The first byte position from `start` on at which text in UTF-8 can be cut without changing its
        tokens; its length if there is none.
        """

    @abstractmethod
    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token; a token that is a part of a character is shown as bytes, as in \\xe2."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of tokens; bytes that are not UTF-8 become the replacement character."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned dtype, of uint16 and uint32, that holds every id."""
        return np.dtype("<u2" if self.vocab <= 1 << 16 else "<u4")

    @property
    def file(self) -> bytes:
        """The content of its file, which a corpus keeps a copy of; empty if it has none."""
        return b""

    @abstractmethod
    def to_json(self) -> bytes:
        """Its file for the `tokenizers` library, which gives the same ids; what a model's folder keeps."""


def tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name: "bytes", "gpt2", "gpt-neox", or the path of a tokenizer file.

    Raises TextError, which says how to get a file.
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
    label = path.stem if path.name != FILE else path.absolute().parent.name
    file = read_regular(path, follow=True)
    return Filed(file, name if name in PUBLISHED else files.encodable(label), str(path))


def from_manifest(described: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer of a corpus, from its description in the manifest and its file. Raises TextError."""
    if described["kind"] == "bytes":
        return Bytes()
    path = folder / FILE
    made = _filed(read_regular(path), described["name"], path, described)
    if made.describe() != dict(described):
        raise TextError(f"{path} was altered: it is not the tokenizer that made these tokens")
    return made


def from_model_folder(folder: Path, described: Mapping[str, Any] | None, way_out: str) -> Tokenizer:
    """The tokenizer of a model, from `tokenizer.json` in its folder.

    described: what its checkpoint says of it (`describe`), None if nothing.

    Raises TextError, which names the file, if it is missing, or no tokenizer, or not the one described.
    """
    path = folder / FILE
    try:
        file = read_regular(path)
        kind = None if described is None else described.get("kind")
        if kind == "bytes" or (kind is None and _is_of_bytes(file)):
            made: Tokenizer = Bytes()
            altered = not _is_of_bytes(file)
        else:
            name = folder.absolute().name if described is None else str(described.get("name"))
            made, altered = _filed(file, files.encodable(name), path, described or {}), False
        if altered or (described is not None and made.describe() != dict(described)):
            raise TextError(f"{path} was altered: it is not the tokenizer that the model was trained with")
    except TextError as error:
        raise TextError(f"{str(error).rstrip('.')}. {way_out}") from error
    return made


def _filed(file: bytes, name: str, path: Path, described: Mapping[str, Any]) -> Filed:
    """The tokenizer of a file, with the ends that its description names where they are not the usual."""
    made = Filed(file, name, str(path))
    ends = described.get("end", made.end), described.get("begin")
    return made if ends == (made.end, None) else Filed(file, name, str(path), end=ends[0], begin=ends[1])


def _is_of_bytes(file: bytes) -> bool:
    """Whether a file is the one that stands for bytes, however its JSON is laid out and whatever other
    programs add to a text."""
    try:
        return bool({**files.loads(file), "post_processor": None} == files.loads(Bytes().to_json()))
    except (ValueError, TypeError):
        return False


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
    except Exception as error:  # any of several libraries' errors; the user can do without the hub
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise TextError(f"cannot get {name} from the Hugging Face hub ({reason}). {wayout}") from error


class Bytes(Tokenizer):
    """The bytes of UTF-8, and 256 for the end of text."""

    name, vocab, end = "bytes", 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def cut(self, data: bytes | bytearray, start: int) -> int:
        # a character has at most three continuation bytes
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

    def to_json(self) -> bytes:
        """A vocabulary of the 256 bytes, in GPT-2's letters for them, without merges."""
        # texts are not split into words, and no space is put in front
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        end = {
            "id": self.end, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }  # fmt: skip
        letters = sorted(_bytes_of_letters().items(), key=lambda pair: pair[1])
        file = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end],
            "normalizer": None,
            "pre_tokenizer": as_bytes,
            "post_processor": None,
            "decoder": as_bytes,
            "model": {"type": "BPE", "vocab": dict(letters), "merges": []},
        }
        return (json.dumps(file, indent=1, ensure_ascii=False) + "\n").encode()


class Filed(Tokenizer):
    """A file of the `tokenizers` library, which is imported on the first encoding or decoding.

    Text is encoded by a copy of the tokenizer whose special tokens are renamed, see `_disguised`. Raises
    TextError, possibly as late as on first use, if it is no such file or the library cannot use it.
    """

    def __init__(
        self, file: bytes, name: str, path: str, *, end: int | None = None, begin: int | None = None
    ) -> None:
        """`end` and `begin` are ids in the file; by default a token that is named so, and as `end`."""
        self._file, self.name, self._path = file, name, path
        try:
            self._parsed: dict[str, Any] = files.loads(file)
            known = _ids(self._parsed)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(
                f"{path} is not a file of the tokenizers library ({type(error).__name__}: {error}); "
                f"such a file is usually called {FILE}. Get it again, or give another one"
            ) from error
        self.vocab = max(known.values()) + 1
        # the unknown token must not end a document; with byte-level tokens nothing is unknown
        unknown = None if self._of_bytes else self._parsed["model"].get("unk_token")
        self._end_word = next((word for word in ENDS if word in known and word != unknown), "")
        self.end = known.get(self._end_word, self.vocab) if self._end_word else self.vocab
        self.vocab = max(self.vocab, self.end + 1)
        words = {i: word for word, i in known.items()}
        for what, given in (("end", end), ("begin", begin)):
            if given is not None and (isinstance(given, bool) or given not in words):
                raise TextError(f"{path} has no token with the id {given!r}, the {what} of a document")
        if end is not None:
            self._end_word, self.end = words[end], end
        self._begin = self.end if begin is None else begin

    @property
    def begin(self) -> int:
        return self._begin

    @property
    def file(self) -> bytes:
        return self._file

    def to_json(self) -> bytes:
        return self._file

    def with_ends(self, *, end: int | None, begin: int | None) -> Filed:
        """The same file with other ends of documents: ids in it, or None as when it is made."""
        return Filed(self._file, self.name, self._path, end=end, begin=begin)

    @contextlib.contextmanager
    def _library(self, what: str) -> Iterator[None]:
        """Turn anything that the library raises, Rust panics included, into a TextError."""
        try:
            yield
        except (TextError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            reason = str(error).strip().partition("\n")[0]
            raise TextError(
                f"{self._path} {what} ({reason}). Get it again, or give another tokenizer"
            ) from error

    def _load(self, file: str) -> Any:
        with self._library("is not a file that the tokenizers library can use"):
            library_tokenizer = needed("tokenizers").Tokenizer.from_str(file)
            library_tokenizer.no_truncation()  # files store the last user's settings of both
            library_tokenizer.no_padding()
            library_tokenizer.encode_special_tokens = True  # <|endoftext|> in a text is text
            return library_tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer that decodes."""
        return self._load(self._file.decode())

    @functools.cached_property
    def _encoder(self) -> tuple[Any, np.ndarray, int | None]:
        """The tokenizer that encodes; the ids that a text may give, (vocab,) bool; the id for all others."""
        words = {token["content"] for token in self._parsed.get("added_tokens") or [] if token.get("special")}
        words |= {self._end_word} - {""}
        with self._library("is not a file that the tokenizers library can use"):
            encoder = self._load(json.dumps(_disguised(self._parsed, words)))
        ids = encoder.get_vocab(with_added_tokens=True)
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
            return encoder, may_come, unknown
        return encoder, may_come, None

    @functools.cached_property
    def _of_bytes(self) -> bool:
        """Whether the tokenizer is byte-level: tokens are bytes written as letters, as in GPT-2."""
        decoder = self._parsed.get("decoder") or {}
        return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ())))

    @functools.cached_property
    def _cuts(self) -> re.Pattern[bytes] | None:
        """A pattern of the positions at which a text may be cut; None if it may not be cut anywhere.

        It may where words are split as by GPT-2 and nothing else looks across the cut: GPT-2's pattern, which
        splits text into words before they are encoded, splits wherever white space follows something else.
        """
        split = self._parsed.get("pre_tokenizer") or {}
        kinds = [split] if split.get("type") != "Sequence" else split.get("pretokenizers", [])
        levels = [part for part in kinds if part.get("type") == "ByteLevel" and part.get("use_regex", True)]
        others = [part for part in kinds if part.get("type") not in ("ByteLevel", "Digits")]
        changed = (self._parsed.get("normalizer") or {}).get("type")
        # added tokens are matched before the text is split, and may span a cut
        added = self._parsed.get("added_tokens") or []
        across = [token for token in added if token.get("rstrip") or re.search(r"\S\s", token["content"])]
        if len(levels) != 1 or others or across or changed not in UNCHANGED_BY_CUTS:
            return None
        # the tokenizer adds a space before a part that does not begin with one
        at = rb" " if levels[0].get("add_prefix_space", True) else rb"[ \n]"
        return re.compile(rb"[!-~\x80-\xff](?=" + at + rb")")

    def cut(self, data: bytes | bytearray, start: int) -> int:
        if self._cuts is None:
            return len(data)
        for match in self._cuts.finditer(data, max(0, start - 1)):
            place = match.end()
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
            for (index, _), encoding in zip(group, encoded, strict=True):
                ids = np.array(encoding.ids, dtype=self.dtype)
                allowed = may_come[ids]
                if not allowed.all():  # the text contains even the new name of a special token
                    ids = (
                        ids[allowed] if stand_in is None else np.where(allowed, ids, ids.dtype.type(stand_in))
                    )
                out[index].append(ids)
        return [
            parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])
            for parts in out
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
        if word is None:  # an id that padding of the vocabulary added
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
        about = {"kind": "file", "name": self.name, "vocab": self.vocab, "end": self.end, "sha256": digest}
        return about if self.begin == self.end else {**about, "begin": self.begin}


CUT = 1 << 18
"""Bytes after which a text is cut if possible: the library's memory grows with the longest text."""
GROUP = 1 << 20
"""Characters per call of the library, whose memory per token is many times that of an id."""
UNCHANGED_BY_CUTS = (None, "NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def _groups(parts: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    letters = 0
    for part in parts:
        group.append(part)
        letters += len(part[1])
        if letters >= GROUP:
            yield group
            group, letters = [], 0
    if group:
        yield group


def _ids(parsed: dict[str, Any]) -> dict[str, int]:
    """The id of each token of a tokenizer file. Raises ValueError, KeyError or TypeError if one is wrong."""
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        _check_parts(parsed.get(key), key)
    vocab = parsed["model"]["vocab"]
    if isinstance(vocab, dict):
        words = vocab
    else:  # a Unigram model: words and their scores
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
    """Raise ValueError unless a component of a tokenizer file is missing, or it and its parts have types."""
    if part is None:
        return
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"its {key} has no type")
    for within in ("normalizers", "pretokenizers", "decoders"):
        if within in part:
            for component in part[within]:
                _check_parts(component, key)


def _disguise(word: str) -> str:
    return f"\0{word}\0"


def _disguised(parsed: dict[str, Any], words: set[str]) -> dict[str, Any]:
    """A tokenizer file that finds none of `words`, its special tokens, in any text, whatever kind it is.

    They are renamed wherever text is compared with them: in the model's vocabulary and among the added
    tokens. So every other token keeps its id and its score. Merges that would give one of them are removed.
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
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [a, b] for a, b in pairs if a not in words and b not in words and a + b[prefix:] not in words
        ]
    if model.get("dropout"):  # random merges, for training tokenizers
        model["dropout"] = None
    added = [
        {**token, "content": new[token["content"]], "special": True} if token["content"] in words else token
        for token in parsed.get("added_tokens") or []
    ]
    return {**parsed, "model": model, "added_tokens": added}


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary (GPT-2's) stands for.

    Printable bytes are written as themselves, the others, in order, as the letters from code point 256 on.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _shown(piece: bytes) -> str:
    """Bytes as text if they are complete characters, escaped otherwise."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return piece.decode(errors="backslashreplace")


def encode_alone() -> None:
    """Disable the library's own threads; to be called in each of several worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
