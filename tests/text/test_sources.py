"""Documents from files: every kind, whole or by name refused."""

import gzip
import json
import lzma
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdall.text import sources
from holdall.text.sources import BadRecord, Source, TextError, find, parse, records
from holdall.text.tokenizers import Bytes

LINES = [json.dumps({"text": f"text {i} é", "id": i}) for i in range(50)]


def zst(data: bytes) -> bytes:
    library = pytest.importorskip("zstandard", reason="the extra text is not installed")
    return library.ZstdCompressor(write_checksum=True).compress(data)  # as the program zstd does


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zst,
}


def datas(path: Path, separator: str = "", after: int = 0) -> list[bytes]:
    found, _ = find([path])
    return [record.data for record in records(found, after=(0, after), separator=separator)]


@pytest.mark.parametrize("packed", PACK)
def test_lines_are_read_from_every_kind_of_file(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    half = len(LINES) // 2
    # two streams in one file, as `cat a.gz b.gz` makes them; blank lines and a missing last new line
    parts = ["\n".join(LINES[:half]) + "\n\n", "\n".join(LINES[half:])]
    path.write_bytes(b"".join(PACK[packed](part.encode()) for part in parts))
    assert [data.decode() for data in datas(path)] == LINES
    found, ignored = find([path])
    assert [record.number for record in records(found)] == [*range(1, half + 1), *range(half + 2, 52)]
    assert ignored == 0


@pytest.mark.parametrize("packed", [name for name in PACK if name])
def test_a_truncated_or_damaged_file_is_refused_by_name(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.jsonl{packed}"
    noise = "\n".join(json.dumps({"text": os.urandom(40).hex()}) for _ in range(50))
    whole = PACK[packed](noise.encode())
    for share in (0.05, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(TextError, match=rf"a\.jsonl{packed} is (truncated|damaged).*leave it out"):
            datas(path)
    path.write_bytes(whole[:100] + bytes(byte ^ 0x55 for byte in whole[100:400]) + whole[400:])
    with pytest.raises(TextError, match=r"is (truncated|damaged)"):
        datas(path)


@pytest.mark.parametrize("chunk", [16, sources.CHUNK])
@pytest.mark.parametrize("packed", [name for name in PACK if name])
def test_zeros_behind_a_stream_are_padding_and_nothing_else_is(
    tmp_path: Path, packed: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    path = tmp_path / f"a.jsonl{packed}"
    half = [PACK[packed](("\n".join(part) + "\n").encode()) for part in (LINES[:25], LINES[25:])]
    for zeros in (4, 512, 1000):
        path.write_bytes(half[0] + bytes(zeros) + half[1] + bytes(zeros))
        assert [data.decode() for data in datas(path)] == LINES
    for zeros in (0, 4, 1000):
        for garbage in (b"garbage that is no stream " * 9, b"\x5d\0\0\x80\0" + b"\xff" * 99):
            path.write_bytes(half[0] + bytes(zeros) + garbage)
            with pytest.raises(TextError, match=rf"a\.jsonl{packed} is (truncated|damaged).*leave it out"):
                datas(path)


@pytest.mark.parametrize("packed", [name for name in PACK if name])
def test_few_packed_bytes_never_become_many_at_once(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](b"one line after the other\n" * 800_000))  # 20 MB of them in few kB
    sizes = [len(chunk) for chunk in sources._chunks(path, lambda count: None)]
    assert sum(sizes) == 20_000_000
    assert max(sizes) < 20 * sources.CHUNK


@given(
    st.binary(max_size=60) | st.text("aé🦊 \n\ufeff").map(str.encode), st.integers(1, 9), st.integers(1, 30)
)
def test_a_long_document_comes_in_pieces_that_are_the_whole(data: bytes, size: int, chunk: int) -> None:
    read = (data[start : start + chunk] for start in range(0, len(data), chunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_chunks", lambda path, on_bytes: read)
        patch.setattr(sources, "PIECE_BYTES", size)
        source = Source(path=Path("a.txt"), size=0, modified=0)
        found = list(records([source], cut=Bytes().cut))
    data = data.removeprefix(b"\xef\xbb\xbf") if chunk > 2 else data
    assert b"".join(record.data for record in found) == data
    assert [record.ends for record in found] == [False] * (len(found) - 1) + [True]
    assert [record.start for record in found] == [
        sum(len(r.data) for r in found[:i]) for i in range(len(found))
    ]
    assert max(len(record.data) for record in found[:-1]) <= size + chunk + 4 if len(found) > 1 else True
    if not found[0].is_whole:
        hashed = sources.new_draw()
        hashed.update(data)
        assert found[-1].drawn == sources.draw(hashed)
    whole, pieces = [], []
    for said, parts in ((whole, [(data, 0)]), (pieces, [(record.data, record.start) for record in found])):
        for part, start in parts:
            try:
                sources.decode(part, start)
            except BadRecord as error:
                said.append(error.detail)
    assert whole == pieces[:1]


@given(
    st.lists(st.text("ab|=é\n", max_size=9), min_size=1, max_size=8),
    st.sampled_from(["|", "=|=", "==", "é\n", "\n\n", "\n=\n", "\r\n|"]),
    st.integers(1, 7),
    st.booleans(),
)
def test_a_separator_is_found_wherever_the_file_is_cut_and_whatever_ends_its_lines(
    texts: list[str], separator: str, chunk: int, returns: bool
) -> None:
    separator_there = separator.replace("\r\n", "\n")
    whole = separator_there.join(texts).encode()
    parts = whole.split(separator_there.encode())
    if returns:
        whole, parts = whole.replace(b"\n", b"\r\n"), [part.replace(b"\n", b"\r\n") for part in parts]
    read = (whole[start : start + chunk] for start in range(0, len(whole), chunk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_chunks", lambda path, on_bytes: read)
        source = Source(path=Path("a.txt"), size=0, modified=0)
        found = list(records([source], separator=separator))
    assert [record.data for record in found] == [part for part in parts if part.strip()]
    assert any(record.undivided for record in found) == (len(parts) == 1 and bool(found))


def test_a_plain_text_file_is_one_document_unless_something_parts_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo<|end|>three\r\n<|end|>\n")
    assert datas(path) == [b"one\n\ntwo<|end|>three\r\n<|end|>\n"]
    assert datas(path, "<|end|>") == [b"one\n\ntwo", b"three\r\n"]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert datas(tmp_path / "empty.txt") == [b""]


def test_reading_goes_on_behind_any_record(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"{name}": {i}}}\n' for i in range(4)))
    found, _ = find([tmp_path])
    whole = list(records(found))
    assert len(whole) == 12
    for index, record in enumerate(whole):
        read = []
        rest = records(found, after=(record.file, record.number), on_bytes=read.append)
        assert list(rest) == whole[index + 1 :]
        assert sum(read) == sum(source.size for source in found)


def test_folders_are_searched_in_order_and_other_files_counted(tmp_path: Path) -> None:
    for name in ("b/1.txt.gz", "b/2.jsonl.xz", "a.md", "picture.png", ".hidden/x.txt", "b/.y.txt", "c.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found, ignored = find([tmp_path])
    assert [str(each.path.relative_to(tmp_path)) for each in found] == [
        "a.md", "b/1.txt.gz", "b/2.jsonl.xz", "c.JSONL",
    ]  # fmt: skip
    assert [each.is_json for each in found] == [False, False, True, True]
    assert ignored == 1
    assert [each.path.name for each in find([tmp_path], without=tmp_path / "b")[0]] == ["a.md", "c.JSONL"]
    assert find([tmp_path / "picture.png"])[0][0].path.name == "picture.png"  # what is named is read


def test_links_are_followed_once_and_end(tmp_path: Path) -> None:
    books, other = tmp_path / "books", tmp_path / "other"
    for name in ("a.txt", "deep/b.txt"):
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / name).write_text(name)
    (other / "deeper").mkdir(parents=True)
    (other / "deeper" / "c.txt").write_text("c")
    (books / "more").symlink_to(other)
    (books / "again").symlink_to(other)
    (books / "deep" / "up").symlink_to(books)
    (books / "self").symlink_to(books / "self")
    (other / "there").symlink_to(books / "deep")
    found, ignored = find([books])
    assert sorted(each.path.resolve() for each in found) == [
        books / "a.txt", books / "deep" / "b.txt", other / "deeper" / "c.txt",
    ]  # fmt: skip
    assert found == sorted(found, key=lambda source: source.path)
    assert ignored == 1  # the link to itself


def test_what_cannot_be_read_is_refused_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("a")

    def bind(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)

    monkeypatch.chdir(books)  # its path may not be long
    odd: dict[str, Callable[[Path], None]] = {
        "pipe.txt": os.mkfifo,
        "gone.jsonl.gz": lambda path: path.symlink_to("nowhere"),
        "device.txt": lambda path: path.symlink_to("/dev/zero"),
        "bound.txt": bind,
    }
    for name, make in odd.items():
        make(books / name)
        for place in (books, books / name):
            with pytest.raises(TextError, match=rf"{name} is (a broken link|not a readable file|neither)"):
                find([place])
        source = Source(path=books / name, size=0, modified=0)
        with pytest.raises(TextError, match=rf"{name}"):  # it may have come later
            list(records([source]))
        (books / name).unlink()
        make(books / name.partition(".")[0])  # what does not call itself a text is counted
        assert find([books])[1] == 1
        (books / name.partition(".")[0]).unlink()


@pytest.mark.parametrize("name", ["shut/b.txt", "shut", "b.txt"])
def test_what_may_not_be_read_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shut").mkdir()
    for file in ("a.txt", "b.txt", "shut/b.txt"):
        (tmp_path / file).write_text(file)
    listdir, access = os.listdir, os.access

    def refuse(path: Path) -> list[str]:  # whoever runs the tests may be allowed to read everything
        if path == tmp_path / name:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / name and access(path, mode))
    with pytest.raises(TextError, match=f"cannot read .*{name}: Permission denied.*name the files"):
        find([tmp_path])


def test_a_file_for_validation_is_for_nothing_else(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    found, _ = find([tmp_path, tmp_path / "b.txt"], [tmp_path / "a.txt"])
    assert [(each.path.name, each.valid) for each in found] == [("b.txt", False), ("a.txt", True)]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.txt is neither a file nor a folder"):
        find([tmp_path / "nowhere.txt"])
    with pytest.raises(TextError, match=r"holds no text: no \.jsonl"):
        find([tmp_path])


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b'{"text": "caf\xe9"}', "bad UTF-8", "byte 14"),
        (b'{"text": "\\ud800"}', "bad UTF-8", "surrogate"),
        (b'{"text": "half', "broken JSON", "Unterminated string"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON", "Extra data"),
        (b"[" * 200_000, "broken JSON", ""),
        (b'["text"]', "broken JSON", "not an object"),
        (b'{"title": "a", "body": "b"}', "no text", "no 'text' among the fields title, body"),
        (b'{"text": null}', "no text", "no 'text'"),
        (b'{"text": " \\n"}', "empty", ""),
    ],
)
def test_a_record_that_is_no_document_is_told_with_the_reason(data: bytes, reason: str, detail: str) -> None:
    with pytest.raises(BadRecord, match=f"^{reason}$") as found:
        parse(data, is_json=True, text_field="text")
    assert detail in found.value.detail


def test_documents_keep_their_text_to_the_letter_and_what_is_said_of_them() -> None:
    line = json.dumps({"id": 7, "title": "Ünder", "content": " a\r\n\u2028b\0", "text": "not this"}).encode()
    document = parse(line, is_json=True, text_field="content")
    assert document.text == " a\r\n\u2028b\0"
    assert document.about == {"id": "7", "title": "Ünder"}
    assert parse(b"{not json}", is_json=False, text_field="").text == "{not json}"
    with pytest.raises(BadRecord, match="bad UTF-8"):
        parse(b"\xff", is_json=False, text_field="")


def test_zst_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(TextError, match="zstandard: pip install zstandard"):
        datas(tmp_path / "a.txt.zst")
