"""Whatever happens to a file of a corpus, it is refused by its name or nothing comes out differently."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from mutations import MUTANTS, check, mutants
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from holdall.text import Corpus, encoding, open_corpus, tokenizer, write_corpus
from holdall.text.files import seal

TEXT = "the ship left the harbour at noon with tea and bread for the sailors"
WORDS = TEXT.split()


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


# -------------------------------------------------------------------------------------------- their outcomes


def content(corpus: Corpus) -> list[Any]:
    """All that somebody may read of a corpus."""
    out: list[Any] = [corpus.content_hash, corpus.vocab, corpus.manifest["left_out"]]
    for tokens in (corpus.train, corpus.valid):
        out += [tokens[0 : len(tokens)].tolist(), tokens.documents.tolist()]
        out += [tokens.about(index) for index in range(len(tokens.documents))]
        out.append(corpus.tokenizer.decode(tokens[0:9]))
    return out


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
