"""Run folders: everything that a run leaves, written so that a crash loses nothing.

config.json         complete, defaults included
environment.json    versions, device, threads, commit
metrics.jsonl       one line per evaluation
*.safetensors       checkpoints; nothing that Holdall loads is ever a pickle
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any


class RunError(Exception):
    """Something about a run that its user can mend; the message says how."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Training was asked to stop; its state is in the run folder."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a RunError that names the path, the reason and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot write {path}: {reason}. Free some space or make the folder writable, then give the same "
            "command again: it goes on from the last checkpoint. Or choose another folder with --out."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what was written replaces the file at `path` in one step.

    A reader, or a crash, finds the old content or the new, nothing between.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader, or a crash, finds the old content or the new, nothing between."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line. A crash can tear only the last line, which `read_lines` skips."""
    with explained(path), path.open("ab") as file:
        file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())
        file.flush()


class Background:
    """Another thread that does one thing at a time, such as writing a checkpoint, while training goes on."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._doing: concurrent.futures.Future[None] | None = None

    def do(self, function: Callable[..., None], *args: Any) -> None:
        """Begin with it, once what was begun before is done; raises what went wrong with that."""
        self.wait()
        self._doing = self._thread.submit(function, *args)

    def wait(self) -> None:
        """Until it is done; raises what went wrong with it."""
        if self._doing is not None:
            doing, self._doing = self._doing, None
            doing.result()

    def close(self) -> None:
        self._thread.shutdown()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; a torn last line is left out. Empty if there is no file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = 10.0) -> Iterator[None]:
    """Hold a run folder for this process alone; it is created if needed.

    The lock falls with the process, however that ends. Raises RunError if another process keeps the folder
    for longer than `patience` seconds.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RunError(
                        f"{folder} is in use by another run; wait for it or choose --out"
                    ) from None
                time.sleep(0.1)
        yield


def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, hardware and commit, as environment.json holds them."""
    versions: dict[str, Any] = {}
    if device.startswith("cuda"):
        import torch

        versions = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for name in ("holdall", "torch", "numpy", "triton", "lightning-fabric"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        **versions,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "threads": threads,
        "cores": cores(),
        "commit": commit(),
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the source tree that Holdall runs from, with "+" if it was changed; None outside git."""
    where = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=where, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def follow_parent() -> None:
    """Of a process that another one started to work for it: leave Ctrl-C to it, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group; the parent says what to do
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end_with_parent() -> None:
        parent.join()  # returns when the parent is gone, kill -9 included
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
