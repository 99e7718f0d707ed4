"""Files and folders that somebody else may have made, and processes that end anywhere."""

import contextlib
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from holdall import checkpoints, files
from holdall.files import RunError

SECRET = b"precious\n"
READERS: dict[str, Callable[[Path], object]] = {
    "bytes": files.read_bytes,
    "json": files.read_json,
    "lines": files.read_lines,
    "arrays": files.read_arrays,
    "tensors": lambda path: checkpoints.opened(path).__enter__(),
}
WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: files.write_json(path, {"a": 1}),
    "line": lambda path: files.append_line(path, {"a": 1}),
    "arrays": lambda path: files.write_arrays(path, {"a": [1]}),
    "tensors": lambda path: checkpoints.write(path, {"a": torch.zeros(2)}, {}),
    "shorten": lambda path: files.shorten(path, 3),
    "size": files.size_on_disk,
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("make", [pipe, Path.mkdir, loop], ids=["pipe", "folder", "loop"])
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(
    tmp_path: Path, read: Callable[[Path], object], make: Callable[[Path], None]
) -> None:
    make(tmp_path / "odd")
    with pytest.raises(RunError, match=r"/odd is (a link|not a readable file)|cannot read .*/odd: "):
        read(tmp_path / "odd")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_may_not_be_read_is_refused_by_name(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shut").write_bytes(b"{}\n")

    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match=r"cannot read .*/shut: Permission denied"):
        read(tmp_path / "shut")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_links_are_never_written_through(tmp_path: Path, write: Callable[[Path], object]) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(SECRET)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "file"
    link.symlink_to(victim)
    with contextlib.suppress(RunError):
        write(link)
    assert victim.read_bytes() == SECRET
    link.unlink()
    os.link(victim, link)
    write(link)
    assert victim.read_bytes() == SECRET


def test_a_lock_that_is_a_link_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(SECRET)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(RunError, match=r"\.lock"), files.locked(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_bytes() == SECRET


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/../../b", "link/x", "", "a\0b", "round"])
def test_names_lead_nowhere_but_inside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "round").symlink_to("round")
    with pytest.raises(RunError, match="not inside"):
        files.inside(folder, name)
    assert files.inside(folder, "runs/a") == folder / "runs" / "a"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_allows(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for name in ("json", "line", "arrays", "tensors"):
            WRITERS[name](tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name
    finally:
        os.umask(before)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond this size, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["json", "line", "arrays", "tensors"])
def test_a_full_disk_is_a_clear_error_and_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file"
    WRITERS[name](path)
    content = path.read_bytes()
    refused = pytest.raises(RunError, match=r"cannot write .*file.*(too large|space|I/O).*same command")
    with full_disk(path.stat().st_size - 1 if name != "line" else path.stat().st_size + 3), refused:
        WRITERS[name](path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_a_torn_line_is_left_out_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}]
    files.append_line(path, {"a": 3})
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    path.write_bytes(b"\0" * 70_000)  # no line at all, and more than is read at once
    files.append_line(path, {"a": 4})
    assert files.read_lines(path) == [{"a": 4}]


def test_a_broken_line_is_refused_by_its_number(tmp_path: Path) -> None:
    for broken in (b"{", b"[1]", b"\xff", b"\0\0", b"[" * 10_000):
        (tmp_path / "lines").write_bytes(b'{"a": 1}\n' + broken + b'\n{"a": 2}\n')
        with pytest.raises(RunError, match=r"line 2 of .*/lines is damaged: .*Remove that line"):
            files.read_lines(tmp_path / "lines")


def test_shortening_keeps_whole_lines_and_never_pads(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for size, left, lost in (
        (12, b"{}\n{}\n{}\n{}\n", 0),
        (9, b"{}\n{}\n{}\n", 0),
        (99, b"{}\n{}\n{}\n{}\n", 87),
    ):
        path.write_bytes(b"{}\n" * 4)
        assert files.shorten(path, size) == lost
        assert path.read_bytes() == left
    path.write_bytes(b'{}\n{"a')
    assert files.shorten(path, 20) == 17
    assert path.read_bytes() == b"{}\n"
    path.unlink()
    assert files.shorten(path, 5) == 5
    assert not path.exists()


def test_an_atomic_write_leaves_no_trace(tmp_path: Path) -> None:
    files.write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "value.json") as temporary:
        temporary.write_bytes(bytes(1 // 0))
    assert os.listdir(tmp_path) == ["value.json"]
    assert json.loads((tmp_path / "value.json").read_bytes()) == {"a": 1}


KILLED = """
import os, sys
from pathlib import Path
from holdall import files
with files.replacing(Path(sys.argv[1]) / "last.safetensors") as temporary:
    temporary.write_bytes(b"half a mod")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    start = [sys.executable, "-c", KILLED, str(tmp_path)]
    writers = [
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    writers[0].kill()
    writers[0].communicate()
    assert len(list(tmp_path.glob(".holdall-*.tmp"))) == 2
    (tmp_path / ".last.safetensors.17.tmp").write_bytes(b"of version 0.1")
    with files.locked(tmp_path):
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    writers[1].communicate("", timeout=60)
    assert (tmp_path / "last.safetensors").read_bytes() == b"half a mod"
    assert sorted(os.listdir(tmp_path)) == [".lock", "last.safetensors"]


def test_two_holders_never_share_a_folder(tmp_path: Path) -> None:
    used = pytest.raises(RunError, match="in use by another run")
    with files.locked(tmp_path / "run"), used, files.locked(tmp_path / "run", patience=0.1):
        pass
    began = time.monotonic()
    with files.locked(tmp_path / "run", patience=5):
        assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ({"a": torch.zeros(3)}, r"a is F32 of shape \(2, 3\), where F32 of shape \(3,\) is needed"),
        ({"a": torch.zeros(1, 2, 3)}, r"of shape \(1, 2, 3\) is needed"),
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, "F64"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "no tensor 'b'"),
        ({}, "a tensor 'a'"),
    ],
)
def test_tensors_of_another_model_are_refused_before_any_is_copied(
    tmp_path: Path, targets: dict[str, torch.Tensor], says: str
) -> None:
    checkpoints.write(tmp_path / "file", {"a": torch.ones(2, 3)}, {})
    with checkpoints.opened(tmp_path / "file", "Do this.") as file:
        with pytest.raises(RunError, match=rf"file is damaged: .*{says}.*\. Do this\."):
            file.fill(targets)
        assert not any(target.any() for target in targets.values())
        good = {"a": torch.zeros(2, 3)}
        file.fill(good)
    assert torch.equal(good["a"], torch.ones(2, 3))
