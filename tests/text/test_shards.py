"""Shards: the same bits for any number of workers and after any end, refused by name when they changed."""

import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers

from holdall import files
from holdall.text import Corpus, TextError, Tokenizer, encoding, open_corpus, shards, sources, write_corpus
from holdall.text.corpus import FORMAT, content_hash
from holdall.text.files import seal
from holdall.text.tokenizers import END, Bytes, Filed

TEXTS = [
    f"document {i}: " + f"{hashlib.sha256(str(i).encode()).hexdigest()} " * (i % 7 + 1) for i in range(200)
]
SMALL: dict[str, Any] = {"valid": 0.1, "shard_tokens": 10_000}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_BYTES", 2_000)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 2_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl.xz"
    lines = [json.dumps({"text": text, "title": f"Title {i}", "id": i}) for i, text in enumerate(TEXTS)]
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in (".lock", "manifest.json")
    }


def texts(corpus: Corpus, split: str) -> list[str]:
    tokens = getattr(corpus, split)
    ends = [*tokens.documents[1:], len(tokens)]
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in zip(tokens.documents, ends, strict=True)]


def words(count: int = 66_000) -> Filed:
    """A vocabulary too large for 16 bits, whose text knows no end."""
    vocab = {"?": 0, **{f"w{i}": i for i in range(1, count)}, "document": count}
    made = LibraryTokenizer(models.WordLevel(vocab, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return Filed(made.to_str().encode(), "words", "words.json")


# ------------------------------------------------------------------------------------------------ reading


def test_every_document_comes_back_once_with_its_end_and_what_is_known_of_it(
    tmp_path: Path, source: Path
) -> None:
    corpus = write_corpus([source], tmp_path / "out", Bytes(), **SMALL)
    both = {split: texts(corpus, split) for split in ("train", "valid")}
    assert sorted(both["train"] + both["valid"]) == sorted(text + END for text in TEXTS)
    assert both["train"] == [text + END for text in TEXTS if text + END in both["train"]]  # in order
    assert 5 < len(both["valid"]) < 40
    assert len(corpus.manifest["train"]["shards"]) > 3
    for split, found in both.items():
        tokens = getattr(corpus, split)
        for index, text in enumerate(found):
            number = TEXTS.index(text.removesuffix(END))
            about = {"id": str(number), "title": f"Title {number}", "source": f"texts.jsonl.xz:{number + 1}"}
            assert tokens.about(index) == about
    assert corpus.vocab == 257
    assert open_corpus(tmp_path / "out", verify=True).content_hash == corpus.content_hash


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("|".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_BYTES", 2_000)
        return write_corpus([folder / "a.txt"], folder / "out", Bytes(), separator="|", **SMALL)


@given(st.data())
def test_slices_run_across_shards_as_those_of_one_array(corpus: Corpus, data: st.DataObject) -> None:
    whole = np.concatenate([np.load(path) for path in sorted(corpus.folder.glob("train-?????.npy"))])
    assert len(corpus.train) == len(whole)
    bound = st.none() | st.integers(-len(whole) - 9, len(whole) + 9)
    where = slice(data.draw(bound), data.draw(bound))
    assert corpus.train[where].dtype == np.int64
    assert np.array_equal(corpus.train[where], whole[where])


def test_positions_lead_to_their_documents(corpus: Corpus) -> None:
    tokens = corpus.train
    assert tokens.documents[0] == 0
    assert (np.diff(tokens.documents) > 0).all()
    for index, start in enumerate(tokens.documents.tolist()):
        assert tokens.document_of(start) == index
        assert start == 0 or tokens[start - 1 : start].tolist() == [256]
        assert tokens.document_of(max(0, start - 1)) == max(0, index - 1)
    assert tokens.document_of(len(tokens) - 1) == len(tokens.documents) - 1
    for wrong in (-1, len(tokens)):
        with pytest.raises(IndexError, match="outside of"):
            tokens.document_of(wrong)
    with pytest.raises(IndexError, match="outside of"):
        tokens.about(len(tokens.documents))
    with pytest.raises(ValueError, match="without a step"):
        tokens[::2]


def test_a_tokenizer_s_file_travels_with_its_tokens(tmp_path: Path, source: Path) -> None:
    corpus = write_corpus([source], tmp_path / "out", words(), **SMALL)
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    corpus = open_corpus(moved, verify=True)
    assert corpus.manifest["dtype"] == "uint32"
    assert corpus.train[:1].tolist() == [66_000]
    assert corpus.tokenizer.end == 66_001 == corpus.vocab - 1
    assert texts(corpus, "train")[0].startswith("document")
    (moved / "tokenizer.json").write_bytes(
        (moved / "tokenizer.json").read_bytes().replace(b"w65999", b"v65999")
    )
    with pytest.raises(TextError, match=r"tokenizer\.json was altered"):
        open_corpus(moved, verify=True)


# ------------------------------------------------------------------------------------- always the same bits


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, source: Path) -> None:
    alone = write_corpus([source], tmp_path / "alone", Bytes(), workers=1, **SMALL)
    many = write_corpus([source], tmp_path / "many", Bytes(), workers=3, **SMALL)
    assert alone.content_hash == many.content_hash
    assert contents(tmp_path / "alone") == contents(tmp_path / "many")


def gpt_like() -> Filed:
    """GPT-2's kind, with a vocabulary of bytes."""
    alphabet = {each: i for i, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = LibraryTokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Filed(made.to_str().encode(), "small", "small.json")


def few_words() -> Filed:
    return words(100)


@pytest.mark.parametrize(("made", "shard_tokens"), [(Bytes, 50), (gpt_like, 9_000), (few_words, 700)])
def test_pieces_of_long_documents_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[], Tokenizer], shard_tokens: int
) -> None:
    """Nor where a part ends: with 50 tokens that is wherever a batch does, and never in front of a piece."""
    folder = tmp_path / "books"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:20]):
        (folder / f"{i}.txt").write_bytes(
            text.encode() * (30 if i % 3 else 1) + (b"\xff" if i % 7 == 4 else b"")
        )
    (folder / "blank.txt").write_text("\u3000 " * 3000)
    (folder / "lines.jsonl").write_text(json.dumps({"text": "of a line " * 1000}))
    settings: dict[str, Any] = {"valid": 0.3, "shard_tokens": shard_tokens}
    whole = write_corpus([folder], tmp_path / "whole", made(), **settings)
    assert whole.manifest["left_out"] == {"bad UTF-8": 3, "empty": 1}
    assert len(whole.manifest["train"]["shards"]) > 2
    monkeypatch.setattr(sources, "PIECE_BYTES", 2_500)
    monkeypatch.setattr(sources, "CHUNK", 1_000)
    calls: list[int] = []
    pieces = write_corpus(
        [folder], tmp_path / "pieces", made(), **settings, on_progress=lambda p: calls.append(1)
    )
    assert made is few_words or len(calls) > 40
    write_corpus([folder], tmp_path / "many", made(), **settings, workers=1 + (made is gpt_like))

    def stop(progress: shards.Progress) -> None:
        if progress.tokens - progress.tokens_before > (2_000 if made is few_words else 20_000):
            raise Stop

    while not (tmp_path / "cut" / "manifest.json").exists():
        with contextlib.suppress(Stop):
            write_corpus([folder], tmp_path / "cut", made(), **settings, on_progress=stop)
    assert pieces.content_hash == whole.content_hash
    for name in ("pieces", "many", "cut"):
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
        manifest = open_corpus(tmp_path / name, verify=True).manifest
        assert manifest["examples"] == whole.manifest["examples"]
        assert manifest["left_out"] == whole.manifest["left_out"]


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress)])
def test_a_long_document_takes_little_more_memory_than_its_tokens(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1 << 20)
    size = 12_000_000
    (tmp_path / f"a.txt{ending}").write_bytes(
        pack(b"one line of a text that is as long as forty.\n" * (size // 45))
    )
    tracemalloc.start()
    write_corpus([tmp_path / f"a.txt{ending}"], tmp_path / "out", Bytes(), valid=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * size


class Stop(Exception):  # noqa: N818
    pass


def test_stopped_anywhere_it_goes_on_to_the_same_bits(tmp_path: Path, source: Path) -> None:
    whole = write_corpus([source], tmp_path / "whole", Bytes(), **SMALL)
    calls: list[int] = []
    write_corpus([source], tmp_path / "count", Bytes(), **SMALL, on_progress=lambda p: calls.append(p.tokens))
    assert len(calls) > 20

    def stop(progress: shards.Progress) -> None:
        if progress.tokens - progress.tokens_before > 15_000:  # in the second part after every start
            raise Stop

    starts = 0
    while not (tmp_path / "cut" / "manifest.json").exists():
        starts += 1
        assert starts < 20
        try:
            write_corpus([source], tmp_path / "cut", Bytes(), **SMALL, on_progress=stop)
        except Stop:
            assert not (tmp_path / "cut" / "manifest.json").exists()
            with pytest.raises(TextError, match="is not finished: run its `holdall data` command again"):
                open_corpus(tmp_path / "cut")
    assert starts > 3
    assert open_corpus(tmp_path / "cut", verify=True).content_hash == whole.content_hash
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


SCRIPT = """
import sys, time
from pathlib import Path
from holdall.text import encoding, shards
from holdall.text.tokenizers import Bytes
if __name__ == "__main__":
    shards.BATCH_BYTES = encoding.BATCH_BYTES = 2000
    slow = lambda progress: time.sleep(0.01)
    source, out = map(Path, sys.argv[1:])
    shards.write_corpus([source], out, Bytes(), workers=2, valid=0.1, shard_tokens=10_000, on_progress=slow)
"""


PROCESSES = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


@PROCESSES
def test_killed_at_any_moment_the_same_command_gives_the_same_bits(tmp_path: Path, source: Path) -> None:
    whole = write_corpus([source], tmp_path / "whole", Bytes(), **SMALL)
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "cut")]
    for kill in range(3):
        process = subprocess.Popen(command)
        wait_for(lambda kill=kill: len(list((tmp_path / "cut").glob("part-*"))) > kill)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(workers) >= 3  # two that encode, and Python's own tracker of resources
        wait_for(lambda workers=workers: not any(Path(f"/proc/{each}").exists() for each in workers))
    assert not (tmp_path / "cut" / "manifest.json").exists()
    subprocess.run(command, check=True)
    assert open_corpus(tmp_path / "cut", verify=True).content_hash == whole.content_hash
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.full
@PROCESSES
def test_a_user_s_interrupt_ends_all_processes_without_their_tracebacks(tmp_path: Path, source: Path) -> None:
    script = SCRIPT.replace("time.sleep(0.01)", "time.sleep(0.5)")
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "cut")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "cut" / "part-00000.json").exists())
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert told.count("Traceback") == 1  # the script's own, which a command answers with a sentence
    wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in workers))


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_what_a_crash_left_half_written_is_cleared_away(tmp_path: Path, source: Path) -> None:
    with pytest.raises(Stop):
        write_corpus([source], tmp_path / "out", Bytes(), **SMALL, on_progress=raise_stop_late)
    out = tmp_path / "out"
    assert (out / "part-00001.json").exists()
    for name in ("train-00009.npy", "part-00009.json", ".train-00003.npy.17.tmp"):
        (out / name).write_text("torn")
    (out / "train-notes.txt").write_text("mine")
    corpus = write_corpus([source], out, Bytes(), **SMALL)
    there = set(os.listdir(out)) - {".lock", "manifest.json"}
    assert there == {*corpus.manifest["files"], "train-notes.txt"}


def forbidden(progress: shards.Progress) -> None:
    raise AssertionError


def raise_stop_late(progress: shards.Progress) -> None:
    if progress.tokens > 25_000:
        raise Stop


def test_a_part_that_is_not_as_it_was_written_is_made_again(tmp_path: Path, source: Path) -> None:
    whole = write_corpus([source], tmp_path / "whole", Bytes(), **SMALL)
    with pytest.raises(Stop):
        write_corpus([source], tmp_path / "begun", Bytes(), **SMALL, on_progress=raise_stop_late)
    victim = tmp_path / "precious"
    victim.write_text("precious")

    known = {"bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}

    def record(change: Callable[[dict[str, Any]], None], sealed: bool) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            path = folder / "part-00000.json"
            part = json.loads(path.read_text())
            change(part)
            path.write_text(json.dumps(seal(part) if sealed else part))

        return write

    def shard(folder: Path) -> None:
        path = folder / "train-00000.npy"
        path.write_bytes(path.read_bytes()[:-2] + b"a\0")

    changes = [
        record(lambda part: part.update(last=[0, 3]), sealed=False),
        record(lambda part: part["shards"]["train"].update(documents=1), sealed=False),
        record(lambda part: part["shards"]["train"]["files"].update({"../precious": known}), sealed=True),
        record(lambda part: part["shards"].update({"../../x": part["shards"]["train"]}), sealed=True),
        record(lambda part: part["shards"]["train"].update(number=1), sealed=True),
        record(lambda part: part.update(last=[7, 3]), sealed=True),
        shard,
        lambda folder: (folder / "part-00000.json").write_text("[" * 100_000),
        lambda folder: (folder / "part-00001.json").unlink(),
    ]  # fmt: skip
    for index, change in enumerate(changes):
        folder = tmp_path / f"changed-{index}"
        shutil.copytree(tmp_path / "begun", folder)
        change(folder)
        assert write_corpus([source], folder, Bytes(), **SMALL).content_hash == whole.content_hash
        assert contents(folder) == contents(tmp_path / "whole")
        assert victim.read_text() == "precious"


def test_a_finished_corpus_is_not_made_again(tmp_path: Path, source: Path) -> None:
    first = write_corpus([source], tmp_path / "out", Bytes(), **SMALL)
    again = write_corpus([source], tmp_path / "out", Bytes(), **SMALL, on_progress=forbidden)
    assert again.content_hash == first.content_hash


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_sources_in_the_same_folder_are_refused(
    tmp_path: Path, source: Path, finished: bool
) -> None:
    stop = {} if finished else {"on_progress": raise_stop_late}
    with contextlib.suppress(Stop):
        write_corpus([source], tmp_path / "out", Bytes(), **SMALL, **stop)
    with pytest.raises(
        TextError, match=r"made with other settings \(valid; .*\); remove it or choose another --out"
    ):
        write_corpus([source], tmp_path / "out", Bytes(), **{**SMALL, "valid": 0.2})
    with pytest.raises(TextError, match=r"other settings \(tokenizer;"):
        write_corpus([source], tmp_path / "out", words(), **SMALL)
    source.write_bytes(lzma.compress(b'{"text": "other"}'))
    with pytest.raises(TextError, match=r"other settings \(sources;"):
        write_corpus([source], tmp_path / "out", Bytes(), **SMALL)


def test_files_of_others_are_never_overwritten(tmp_path: Path, source: Path) -> None:
    (tmp_path / "train-00000.npy").write_text("mine")
    with pytest.raises(TextError, match=r"train-00000\.npy is in the way"):
        write_corpus([source], tmp_path, Bytes(), **SMALL)
    assert (tmp_path / "train-00000.npy").read_text() == "mine"


def test_a_full_disk_is_a_clear_error_and_loses_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_corpus([source], tmp_path / "whole", Bytes(), **SMALL)
    sync, left = os.fsync, iter(range(30))

    def full(descriptor: int) -> None:
        if next(left) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(files.RunError, match=r"out/.*: No space left on device.*same command"):
            write_corpus([source], tmp_path / "out", Bytes(), **SMALL)
    assert (tmp_path / "out" / "part-00000.json").exists()
    assert write_corpus([source], tmp_path / "out", Bytes(), **SMALL).content_hash == whole.content_hash


# ------------------------------------------------------------------------------------------------ the split


def test_the_split_depends_on_each_document_s_text_alone(tmp_path: Path) -> None:
    def held_out(name: str, documents: list[str]) -> set[str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return set(texts(write_corpus([path], tmp_path / name, Bytes(), valid=0.1), "valid"))

    first = held_out("first", TEXTS)
    assert held_out("turned", TEXTS[::-1]) == first
    some = held_out("fewer", TEXTS[:100])
    assert some == {text for text in first if text.removesuffix(END) in TEXTS[:100]}
    assert held_out("twice", TEXTS + TEXTS) == first
    more = set(
        texts(write_corpus([tmp_path / "first.jsonl"], tmp_path / "more", Bytes(), valid=0.2), "valid")
    )
    assert more > first  # a larger share keeps what a smaller one took


def test_a_file_for_validation_is_whole_and_alone_in_it(tmp_path: Path) -> None:
    for name, some in (("train", TEXTS[:50]), ("valid", TEXTS[50:60])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    corpus = write_corpus([tmp_path], tmp_path / "out", Bytes(), valid=[tmp_path / "valid.jsonl"])
    assert texts(corpus, "valid") == [text + END for text in TEXTS[50:60]]
    assert texts(corpus, "train") == [text + END for text in TEXTS[:50]]


def test_no_validation_at_all_can_be_asked_for(tmp_path: Path, source: Path) -> None:
    corpus = write_corpus([source], tmp_path / "out", Bytes(), valid=0)
    assert len(corpus.valid) == len(corpus.valid.documents) == len(corpus.valid[:5]) == 0
    assert len(corpus.train.documents) == len(TEXTS)


def test_too_few_documents_for_the_share_are_an_error_that_names_one_that_does(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree")
    with pytest.raises(
        TextError, match=r"none of 1 documents.*share above 0\.\d+, a file.*--separator"
    ) as found:
        write_corpus([path], tmp_path / "out", Bytes(), valid=0.01)
    with pytest.raises(TextError, match="for validation and none for training"):
        write_corpus([path], tmp_path / "out", Bytes(), valid=0.99)
    least = float(str(found.value).partition("share above ")[2].partition(",")[0])
    with pytest.raises(TextError, match="none of 1"):
        write_corpus([path], tmp_path / "out", Bytes(), valid=least * 0.98)
    assert os.listdir(tmp_path / "out") == [".lock"]  # so that the folder takes the next try
    corpus = write_corpus([path], tmp_path / "out", Bytes(), valid=0.5, separator="\n\n")
    assert len(corpus.train.documents) + len(corpus.valid.documents) == 3
    with pytest.raises(TextError, match="share for validation is 1"):
        write_corpus([path], tmp_path / "out", Bytes(), valid=1.0)


# -------------------------------------------------------------------------------------------- bad records

BAD = [b'{"text": "caf\xe9"}', b'{"text": "torn', b'{"body": "x"}', b'{"text": ""}', b'{"text": "\\udc00"}']


def test_bad_records_are_counted_told_and_kept_out(tmp_path: Path) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:20]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:10], *BAD, *good[10:], *BAD]))
    for workers in (1, 2):
        corpus = write_corpus([path], tmp_path / f"out{workers}", Bytes(), valid=0, workers=workers)
        assert texts(corpus, "train") == [text + END for text in TEXTS[:20]]
        assert corpus.manifest["left_out"] == {"bad UTF-8": 4, "broken JSON": 2, "no text": 2, "empty": 2}
        assert corpus.manifest["examples"][:2] == [
            f"{path}:11: bad UTF-8, byte 14",
            f"{path}:12: broken JSON, Unterminated string starting at: line 1 column 10 (char 9)",
        ]
    for workers in (1, 2):
        with pytest.raises(TextError, match=r"a\.jsonl:11: bad UTF-8, byte 14\. Fix it, or omit --strict"):
            write_corpus([path], tmp_path / "strict", Bytes(), valid=0, strict=True, workers=workers)


def test_strict_is_strict_about_what_was_left_out_before_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([BAD[0], *(json.dumps({"text": text}).encode() for text in TEXTS)]))
    with pytest.raises(Stop):
        write_corpus([path], tmp_path / "out", Bytes(), **SMALL, on_progress=raise_stop_late)
    with pytest.raises(TextError, match=r"a\.jsonl:1: bad UTF-8"):
        write_corpus([path], tmp_path / "out", Bytes(), **SMALL, strict=True, on_progress=forbidden)
    write_corpus([path], tmp_path / "out", Bytes(), **SMALL)
    with pytest.raises(TextError, match=r"a\.jsonl:1: bad UTF-8"):
        write_corpus([path], tmp_path / "out", Bytes(), **SMALL, strict=True)


def test_a_wrong_text_field_is_told_at_once_and_the_folder_takes_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"title": "t", "content": text}) + "\n" for text in TEXTS))
    with pytest.raises(
        TextError, match=r"a\.jsonl:1: no text, no 'text' among .*title, content\. .*--text-field"
    ):
        write_corpus([path], tmp_path / "out", Bytes())
    corpus = write_corpus([path], tmp_path / "out", Bytes(), text_field="content", valid=0)
    assert len(corpus.train.documents) == len(TEXTS)


def test_sources_without_any_document_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match=r"no documents; .*a\.txt: bad UTF-8, byte 1"):
        write_corpus([tmp_path / "a.txt"], tmp_path / "out", Bytes())


# ------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path: Path, source: Path) -> Path:
    write_corpus([source], tmp_path / "out", Bytes(), **SMALL, command="holdall data texts --out out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["train-00002.npy", "train-00001.documents.npy", "valid-00000.about.jsonl"])
def test_a_missing_truncated_or_altered_shard_is_refused_by_name(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        TextError, match=rf"{name} is truncated: [\d,]+ bytes, not .*: holdall data texts --out out"
    ):
        open_corpus(folder)
    path.write_bytes(whole + b"0")
    with pytest.raises(TextError, match=f"{name} is altered"):
        open_corpus(folder)
    path.unlink()
    with pytest.raises(TextError, match=f"{name} is missing"):
        open_corpus(folder)
    (folder.parent / "elsewhere").write_bytes(whole)
    path.symlink_to(folder.parent / "elsewhere")  # a folder reads from itself alone
    with pytest.raises(TextError, match=f"{name} is a link; put the file itself there"):
        open_corpus(folder)
    path.unlink()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    open_corpus(folder)  # what only a hash can tell costs reading everything
    with pytest.raises(TextError, match=f"{name} was altered"):
        open_corpus(folder, verify=True)


def test_a_damaged_or_altered_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_text()
    manifest = json.loads(whole)
    assert manifest["format"] == FORMAT
    for text, message in (
        (whole[:100], "is damaged"),
        ("{}", "is damaged"),
        (whole.replace(FORMAT, "holdall-tokens-0"), "has the format holdall-tokens-0"),
        (whole.replace(manifest["train"]["shards"][1]["content"], "0" * 64), "was altered"),
        (whole.replace('"end": 256', '"end": 255'), "was altered"),
    ):
        path.write_text(text)
        with pytest.raises(TextError, match=rf"manifest\.json {message}"):
            open_corpus(folder)
    path.unlink()
    with pytest.raises(TextError, match=r"holds no tokens \(manifest\.json is missing\)"):
        open_corpus(folder)
    with pytest.raises(TextError, match=r"nowhere is not a folder; `holdall data SOURCE\.\.\. --out"):
        open_corpus(folder / "nowhere")


def test_tokens_that_differ_have_another_content_hash_and_where_they_came_from_has_no_part_in_it(
    tmp_path: Path, source: Path
) -> None:
    first = write_corpus([source], tmp_path / "out", Bytes(), **SMALL)
    other = source.rename(tmp_path / "other.jsonl.xz")
    assert write_corpus([other], tmp_path / "moved", Bytes(), **SMALL).content_hash == first.content_hash
    upper = tmp_path / "upper.jsonl"  # other letters in the same places
    upper.write_text("".join(json.dumps({"text": text.upper()}) + "\n" for text in TEXTS))
    lower = write_corpus([other], tmp_path / "lower", Bytes(), valid=0)
    assert write_corpus([upper], tmp_path / "upper", Bytes(), valid=0).content_hash != lower.content_hash
    different = {first.content_hash}
    for index, (settings, tokenizer) in enumerate(
        ((SMALL, words()), ({**SMALL, "valid": 0.0}, Bytes()), ({**SMALL, "text_field": "title"}, Bytes()))
    ):
        different.add(write_corpus([other], tmp_path / f"{index}", tokenizer, **settings).content_hash)
    assert len(different) == 4


def test_counts_are_those_of_the_files_themselves(folder: Path) -> None:
    """Also where whoever altered a manifest made all of its hashes anew, or it is of before it had one."""
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())

    def altered(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        manifest = json.loads(json.dumps(whole))
        change(manifest)
        return manifest

    def count(name: str, by: int) -> Callable[[dict[str, Any]], None]:
        def change(manifest: dict[str, Any]) -> None:
            manifest["train"][name] += by
            manifest["train"]["shards"][0][name] += by

        return change

    for change, message in (
        (count("tokens", -1), r"train-00000\.npy was altered: .* not the"),
        (count("documents", 1), r"train-00000\.documents\.npy was altered: .* not the"),
        (
            lambda manifest: manifest["train"].update(tokens=5),
            r"manifest\.json was altered: the number of tokens of train",
        ),
        (
            lambda manifest: manifest["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
            r"altered: its files",
        ),
        (lambda manifest: manifest["files"].pop("train-00001.about.jsonl"), r"altered: its files"),
        (lambda manifest: manifest.update(dtype="uint8"), r"altered: uint8"),
        (lambda manifest: manifest["tokenizer"].update(name="other"), r"altered: its tokenizer"),
        (lambda manifest: manifest["train"]["shards"].reverse(), r"altered"),
    ):
        manifest = altered(change)
        path.write_text(json.dumps(manifest))
        with pytest.raises(TextError, match=r"manifest\.json was altered: its hashes do not match"):
            open_corpus(folder)
        del manifest["hash"]
        for each in (manifest, seal(manifest)):
            each["content_hash"] = content_hash(each)
            path.write_text(json.dumps(seal(each) if each is not manifest else each))
            with pytest.raises(TextError, match=message):
                open_corpus(folder)
    path.write_text(json.dumps({key: whole[key] for key in whole if key not in ("hash", "undivided")}))
    open_corpus(folder, verify=True)


def test_tokens_and_documents_out_of_range_are_refused_where_they_are_read(folder: Path) -> None:
    corpus = open_corpus(folder)
    for name, kind, at, value in (
        ("train-00001.npy", "<u2", 7, 257),
        ("train-00001.documents.npy", "<i8", 1, 0),
        ("train-00001.documents.npy", "<i8", 0, 1),
        ("train-00001.documents.npy", "<i8", -1, 1 << 40),
        ("train-00001.documents.npy", "<i8", 2, -5),
    ):
        path = folder / name
        whole = path.read_bytes()
        array = np.load(path)
        array[at] = value
        assert array.dtype == kind
        np.save(path, array)
        corpus = open_corpus(folder)
        with pytest.raises(TextError, match=rf"{re.escape(name)} was altered.*: holdall data texts"):
            np.array([corpus.train[0 : len(corpus.train)], *corpus.train.documents], dtype=object)
        path.write_bytes(whole)
    about = folder / "train-00001.about.jsonl"
    first = int(corpus.manifest["train"]["shards"][0]["documents"])
    for change in (b"[1, 2]", b"{}", b'{"source": 3}', b"\xff", b'{"source": "a"}\n{"source": "a"}'):
        whole = about.read_bytes()
        line = whole.splitlines()[0]
        about.write_bytes(whole.replace(line, change + b" " * (len(line) - len(change)), 1))
        with pytest.raises(TextError, match=r"train-00001\.about\.jsonl is damaged"):
            open_corpus(folder).train.about(first)
        about.write_bytes(whole)


def test_names_and_titles_of_any_kind_come_through(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for name in (b"caf\xe9.txt", b"plain.txt", "Ünder.txt".encode()):
        Path(os.fsdecode(os.fsencode(books) + b"/" + name)).write_bytes(b"text of " + name[:3])
    line = {"text": "one", "title": "half \ud83d of a pair", "id": "\x1b[31mred", "\ud83d": 1}
    (books / "a.jsonl").write_text(json.dumps(line) + '\n{"\\ud83d": 1}\n')
    corpus = write_corpus(
        [books], tmp_path / "out", Bytes(), valid=0, separator="|", command="holdall \udce9"
    )
    about = [corpus.train.about(index) for index in range(4)]
    assert about[0] == {"id": "\x1b[31mred", "title": "half \\ud83d of a pair", "source": "a.jsonl:1"}
    assert [each["source"] for each in about[1:]] == ["caf\\xe9.txt:1", "plain.txt:1", "Ünder.txt:1"]
    manifest = (tmp_path / "out" / "manifest.json").read_bytes().decode()
    assert "caf\\\\xe9.txt" in manifest
    assert corpus.manifest["undivided"]["files"] == 3
    assert (
        write_corpus([books], tmp_path / "out", Bytes(), valid=0, separator="|").manifest == corpus.manifest
    )


@pytest.mark.usefixtures("source")
def test_a_corpus_within_its_own_source_folder_does_not_read_itself(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        write_corpus([tmp_path], tmp_path / "out", Bytes(), **SMALL, on_progress=raise_stop_late)
    first = write_corpus([tmp_path], tmp_path / "out", Bytes(), **SMALL)
    again = write_corpus([tmp_path], tmp_path / "out", Bytes(), **SMALL)
    assert again.content_hash == first.content_hash
    assert first.manifest["left_out"] == {}
    assert first.manifest["ignored_files"] == 0


def test_two_processes_never_share_a_folder(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = files.locked
    monkeypatch.setattr(files, "locked", lambda folder: locked(folder, patience=0.2))
    with locked(tmp_path / "out"), pytest.raises(files.RunError, match="in use by another run"):
        write_corpus([source], tmp_path / "out", Bytes(), **SMALL)
