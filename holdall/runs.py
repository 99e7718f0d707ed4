"""Run folders: everything that a run leaves, written so that a crash loses nothing (holdall/files.py).

config.json         complete, defaults included
environment.json    versions, device, threads, commit
metrics.jsonl       one line per evaluation
*.safetensors       checkpoints; nothing that Holdall loads is ever a pickle
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from holdall.files import RunError, append_line, read_lines, write_json

__all__ = [
    "Background", "RunError", "Stopped", "append_line", "commit", "cores", "environment", "follow_parent",
    "read_lines", "write_json",
]  # fmt: skip
"""What others use of a run folder; holdall/files.py reads and writes its files."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Training was asked to stop; its state is in the run folder."""


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
