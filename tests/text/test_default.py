"""The text that comes with Holdall: whole, clean, and there at once."""

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from holdall.files import RunError
from holdall.text import default_corpus, open_corpus, write_corpus
from holdall.text.default import TEXT
from holdall.text.tokenizers import Bytes

CHAPTERS = [json.loads(line) for line in lzma.decompress(TEXT.read_bytes()).splitlines()]


def test_the_novel_is_whole() -> None:
    assert [chapter["id"] for chapter in CHAPTERS] == [str(number) for number in range(1, 62)]
    assert [chapter["title"] for chapter in CHAPTERS] == [
        f"Pride and Prejudice, chapter {number}" for number in range(1, 62)
    ]
    assert CHAPTERS[0]["text"].startswith(
        "Chapter 1\n\nIt is a truth universally acknowledged, that a single man"
    )
    assert CHAPTERS[-1]["text"].endswith("into Derbyshire, had been the means of uniting them.\n")
    words = Counter(re.findall(r"\w+", " ".join(chapter["text"] for chapter in CHAPTERS)))
    assert 120_000 < words.total() < 125_000
    for name, count in (("Elizabeth", 600), ("Darcy", 400), ("Bingley", 300), ("Pemberley", 50)):
        assert words[name] > count  # what recurs is there to be recalled


def test_it_is_clean() -> None:
    for chapter in CHAPTERS:
        assert set(chapter) == {"id", "title", "text"}
        text = chapter["text"]
        assert text.isascii()
        assert not re.search(
            r"gutenberg|copyright|licen[cs]e agreement|http|ebook|[_*<>\[\]{}\t]|  ", text, re.I
        )
        paragraphs = text.removesuffix("\n").split("\n\n")
        assert all(paragraph and "\n" not in paragraph for paragraph in paragraphs)


def test_it_opens_and_is_made_once(tmp_path: Path) -> None:
    corpus = default_corpus(tmp_path)
    assert (corpus.vocab, corpus.tokenizer.name) == (257, "bytes")
    assert corpus.manifest["left_out"] == {}
    both = [*corpus.train.documents, *corpus.valid.documents]
    assert len(both) == 61
    assert 40_000 < len(corpus.valid) < 80_000
    assert len(corpus.train) + len(corpus.valid) == sum(len(chapter["text"]) + 1 for chapter in CHAPTERS)
    assert corpus.tokenizer.decode(corpus.train[:20]) == "Chapter 1\n\nIt is a t"
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    made = (folder / "manifest.json").stat().st_mtime_ns
    assert default_corpus(tmp_path).content_hash == corpus.content_hash
    assert (folder / "manifest.json").stat().st_mtime_ns == made


def test_a_damaged_copy_is_made_anew(tmp_path: Path) -> None:
    corpus = default_corpus(tmp_path)
    shard = corpus.folder / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert default_corpus(tmp_path).content_hash == corpus.content_hash
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [corpus.folder.name]


def test_what_somebody_else_left_in_its_place_is_not_taken(tmp_path: Path) -> None:
    corpus = default_corpus(tmp_path)
    (tmp_path / "b.txt").write_text("another text")
    other = write_corpus([tmp_path / "b.txt"], tmp_path / "other", Bytes(), valid=0.0)
    shutil.rmtree(corpus.folder)
    shutil.copytree(other.folder, corpus.folder)
    assert default_corpus(tmp_path).content_hash == corpus.content_hash
    for elsewhere in (other.folder, tmp_path / "nowhere"):
        shutil.rmtree(corpus.folder)
        corpus.folder.symlink_to(elsewhere)
        assert default_corpus(tmp_path).content_hash == corpus.content_hash
        assert not corpus.folder.is_symlink()
    assert open_corpus(other.folder, verify=True).content_hash == other.content_hash
    shard = corpus.folder / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"x\0")  # of the right size
    assert default_corpus(tmp_path).train[0:9].tolist() == corpus.train[0:9].tolist()
    assert open_corpus(corpus.folder, verify=True)


def test_a_folder_that_all_share_must_be_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / f"holdall-{os.getuid()}"
    assert default_corpus().folder.parent == mine
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)
    with pytest.raises(RunError, match=rf"{mine.name} is not a folder of yours alone.*XDG_CACHE_HOME"):
        default_corpus()
    mine.chmod(0o700)
    elsewhere = mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(elsewhere)
    with pytest.raises(RunError, match="not a folder of yours alone"):
        default_corpus()
    mine.unlink()
    elsewhere.rename(mine)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    mine.rename(tmp_path / f"holdall-{uid + 1}")
    with pytest.raises(RunError, match="not a folder of yours alone"):
        default_corpus()


def test_it_never_changes(tmp_path: Path) -> None:
    """A run that is resumed must find the tokens that it was trained on."""
    assert default_corpus(tmp_path).content_hash[:16] == "f49832cad929b17a"


def test_processes_that_start_together_all_get_it(tmp_path: Path) -> None:
    code = "import sys, pathlib, holdall.text as text; text.default_corpus(pathlib.Path(sys.argv[1]))"
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=100) for process in started] == [0, 0, 0]


def test_the_user_s_cache_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_corpus().folder.parent == tmp_path / "holdall"


def test_without_a_home_that_can_be_written_it_is_there_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tmp_path in default_corpus().folder.parents
    with pytest.raises(RunError, match="cannot write"):  # what is asked for by name is used or refused
        default_corpus(tmp_path / "file" / "cache")
