"""Whatever happens to a file of a corpus, it is refused by its name or nothing comes out differently.

Every kind of file is cut, flipped, zeroed, replaced by what is no file, and, if it is JSON, changed in its
values, types, keys and depth. A refusal is a TextError or a RunError that names the file.
"""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from holdall.runs import RunError
from holdall.text import Corpus, encoding, open_corpus, tokenizer, write_corpus
from holdall.text.files import seal

TEXT = "the ship left the harbour at noon with tea and bread for the sailors"
WORDS = TEXT.split()
MUTANTS = 40
"""Of each file."""


def made(kind: str) -> LibraryTokenizer:
    names = [
        "[UNK]",
        "</s>",
        *sorted(set(WORDS)),
        *sorted({letter for word in WORDS for letter in word} - {"a"}),
    ]
    ids = {name: i for i, name in enumerate(names)}
    if kind == "words":
        out = LibraryTokenizer(models.WordLevel(ids, unk_token="[UNK]"))
        out.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "unigram":
        out = LibraryTokenizer(models.Unigram([(name, -float(i)) for name, i in ids.items()], unk_id=0))
        out.pre_tokenizer, out.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        letters = {each: i for i, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        out = LibraryTokenizer(models.BPE({**letters, "th": 256, "the": 257}, [("t", "h"), ("th", "e")]))
        out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        out.decoder = decoders.ByteLevel()
    out.add_special_tokens([AddedToken("</s>", normalized=False)])
    return out


# ------------------------------------------------------------------------------------------------ mutations


def mutants(path: Path, seed: str, count: int = MUTANTS) -> Iterator[str]:
    """Changes `path` again and again, always from what it was; gives a word for each change."""
    whole = path.read_bytes()
    draw = random.Random(seed)
    changes: list[Callable[[], str]] = [lambda change=change: change(path, whole, draw) for change in BYTES]  # type: ignore[misc]
    lines = path.suffix == ".jsonl"
    if path.suffix in (".json", ".jsonl"):
        changes += [lambda change=change: of_json(path, whole, draw, change, lines) for change in VALUES] * 2  # type: ignore[misc]
    for change in [*PLACES, *(draw.choice(changes) for _ in range(count))]:
        said = change(path) if change in PLACES else change()  # type: ignore[call-arg,operator]
        yield f"{path.name}: {said}"
        remove(path)
        path.write_bytes(whole)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def cut(path: Path, whole: bytes, draw: random.Random) -> str:
    path.write_bytes(whole[: draw.randrange(len(whole))])
    return "cut"


def flip(path: Path, whole: bytes, draw: random.Random) -> str:
    at = draw.randrange(len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    return f"flipped at {at}"


def zero(path: Path, whole: bytes, draw: random.Random) -> str:
    first, last = sorted((draw.randrange(len(whole)), draw.randrange(len(whole) + 1)))
    path.write_bytes(whole[:first] + bytes(last - first) + whole[last:])
    return f"zeroed from {first} to {last}"


def double(path: Path, whole: bytes, draw: random.Random) -> str:
    at = draw.randrange(len(whole))
    path.write_bytes(whole + whole[at:])
    return f"doubled from {at}"


BYTES = (cut, flip, zero, double)


def to_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def to_link(path: Path) -> str:
    content = path.read_bytes()
    path.unlink()
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere)
    return "a link"


def to_itself(path: Path) -> str:
    path.unlink()
    path.symlink_to(path)
    return "a link to itself"


def to_pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def to_nothing(path: Path) -> str:
    path.unlink()
    return "gone"


def to_empty(path: Path) -> str:
    path.write_bytes(b"")
    return "empty"


PLACES = (to_folder, to_link, to_itself, to_pipe, to_nothing, to_empty)

ODD = [
    None,
    True,
    -1,
    0,
    1,
    1 << 31,
    1 << 70,
    0.5,
    float("nan"),
    "",
    "../x",
    "\ud800",
    "\x1b[31m",
    [],
    {},
    [[]],
    {"": 0},
]


def of_json(path: Path, whole: bytes, draw: random.Random, change: Callable[..., str], lines: bool) -> str:
    rows = whole.splitlines() if lines else [whole]
    row = draw.randrange(len(rows))
    value = {"": json.loads(rows[row])}  # so that the whole is changed like its parts
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(value)
    said = change(*draw.choice(places), draw)
    rows[row] = json.dumps(value.get("", 0)).replace('"DEEP"', "[" * 50_000).encode()
    path.write_bytes(b"\n".join(rows))
    return said


def odd(value: Any, key: Any, draw: random.Random) -> str:
    value[key] = draw.choice(ODD)
    return f"{key} is {value[key]!r}"


def deep(value: Any, key: Any, draw: random.Random) -> str:
    value[key] = "DEEP"
    return f"{key} is nested"


def gone(value: Any, key: Any, draw: random.Random) -> str:
    del value[key]
    return f"{key} is gone"


def near(value: Any, key: Any, draw: random.Random) -> str:
    if isinstance(value[key], int | float):
        value[key] += draw.choice([-1, 1])
    elif isinstance(value[key], str):
        value[key] += "0"
    elif isinstance(value[key], list):
        value[key] += value[key][:1]
    elif isinstance(value[key], dict):
        value[key]["more"] = 1
    else:
        value[key] = ""
    return f"{key} is a little different"


VALUES = (odd, deep, gone, near)


# -------------------------------------------------------------------------------------------- their outcomes


def content(corpus: Corpus) -> list[Any]:
    """All that somebody may read of a corpus."""
    out: list[Any] = [corpus.content_hash, corpus.vocab, corpus.manifest["left_out"]]
    for tokens in (corpus.train, corpus.valid):
        out += [tokens[0 : len(tokens)].tolist(), tokens.documents.tolist()]
        out += [tokens.about(index) for index in range(len(tokens.documents))]
        out.append(corpus.tokenizer.decode(tokens[0:9]))
    return out


def check(what: str, do: Callable[[], Any], right: Any, name: str) -> bool:
    """Whether it was refused; AssertionError unless it was refused by name, or came out right."""
    refusal = ""
    try:
        found = do()
    except RunError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if refusal:
        assert name in refusal, f"{what}: {refusal}"
        assert refusal.isprintable(), what
    else:
        assert right is None or found == right, what
    return bool(refusal)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(encoding, "BATCH_BYTES", 300)
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=8)), "id": i, "title": f"Title {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"none": 0}]))
    return tmp_path / "a.jsonl"


SETTINGS: dict[str, Any] = {"valid": 0.2, "shard_tokens": 150}


def test_a_finished_corpus(tmp_path: Path, source: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(made("words").to_str())
    out = tmp_path / "out"
    right = content(write_corpus([source], out, tokenizer(str(tmp_path / "tokenizer.json")), **SETTINGS))
    refused = tried = 0
    names = ["train-00000.npy", "train-00001.documents.npy", "valid-00000.about.jsonl", "tokenizer.json"]
    for name in [*names, "manifest.json"]:
        for what in mutants(out / name, name):
            done = check(what, lambda: content(open_corpus(out, verify=True)), right, name)
            refused, tried = refused + done, tried + 1
            if not done:
                check(what, lambda: content(open_corpus(out)), right, name)
            with_less = check(what, lambda: open_corpus(out) and None, None, name)  # never another error
            assert done or not with_less, what
    assert refused > 0.9 * tried
    manifest = json.loads((out / "manifest.json").read_text())
    for what in mutants(
        out / "manifest.json", "sealed"
    ):  # whoever alters a manifest may know how it is sealed
        if not what.endswith(("pipe", "folder", "link", "itself", "gone")):
            with contextlib.suppress(ValueError, RecursionError, TypeError):  # no JSON, or no object
                sealed = seal(json.loads((out / "manifest.json").read_text()))
                (out / "manifest.json").write_text(json.dumps(sealed))
        check(what, lambda: content(open_corpus(out, verify=True))[3:], None, "")
    assert json.loads((out / "manifest.json").read_text()) == manifest


class Stop(Exception):  # noqa: N818
    pass


def test_an_unfinished_corpus(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # two hundred corpora are made
    (tmp_path / "tokenizer.json").write_text(made("words").to_str())
    words = tokenizer(str(tmp_path / "tokenizer.json"))
    right = content(write_corpus([source], tmp_path / "whole", words, **SETTINGS))

    def stop(progress: Any) -> None:
        if progress.tokens > 250:
            raise Stop

    with pytest.raises(Stop):
        write_corpus([source], tmp_path / "begun", words, **SETTINGS, on_progress=stop)
    assert (tmp_path / "begun" / "part-00000.json").exists()
    refused = 0
    for name in (
        "plan.json",
        "part-00000.json",
        "train-00000.npy",
        "train-00000.about.jsonl",
        "tokenizer.json",
    ):
        for what in mutants(tmp_path / "begun" / name, name, MUTANTS // 2):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            (tmp_path / "copy").mkdir()
            for path in (tmp_path / "begun").iterdir():
                if path.name == name and not path.is_file():
                    path.rename(tmp_path / "copy" / name)
                elif path.name != ".lock":
                    shutil.copy(path, tmp_path / "copy", follow_symlinks=False)
            refused += check(
                what,
                lambda: content(write_corpus([source], tmp_path / "copy", words, **SETTINGS)),
                right,
                name,
            )
    assert refused > 20


@pytest.mark.parametrize("kind", ["words", "unigram", "bytes"])
def test_a_tokenizer_s_file(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text(made(kind).to_str())
    text = " ".join(WORDS) + " </s> \0</s>\0 é"

    def use() -> None:
        each = tokenizer(str(path))
        (ids,) = each.encode_batch([text])
        assert each.end not in ids
        assert 0 <= each.end < each.vocab <= 1 << 24
        assert ids.max(initial=0) < each.vocab
        assert len(each.pieces(ids)) == len(ids)
        assert each.decode(ids).encode()

    refused = sum(check(what, use, None, "tokenizer.json") for what in mutants(path, kind))
    assert refused > 20
    capfd.readouterr()  # a panic of the library's Rust prints there
