"""What a process of a sweep does: train one run after another, on a core or a GPU of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from holdall import errors, mixers, processes
from holdall.files import RunError
from holdall.training.populations import Stopped, TrainConfig, train

_worker: dict[str, Any] = {}
"""What this process was started with: the queue of its progress, the event that stops it, its device."""


def start(progress: Any, stop: Any, free_devices: Any, plugins: Sequence[str]) -> None:
    """The initializer of a worker: take a device and keep it."""
    device = free_devices.get()
    set_up(device, plugins)
    keep_freed_memory()
    _worker.update(progress=progress, stop=stop, device=device)


def set_up(device: str, plugins: Sequence[str]) -> None:
    """What every process of a sweep begins with; plugins are the user's own files."""
    processes.follow_parent()
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    for plugin in plugins:
        mixers.run_file(Path(plugin))


def work(
    index: int, config: dict[str, Any], together: bool, folder: str, keep_weights: bool
) -> list[dict[str, Any]]:
    """Train the run `index` of a sweep; returns its results, none if it was stopped."""
    stop, progress = _worker["stop"], _worker["progress"]
    if stop.is_set():
        return []
    try:
        return train(
            TrainConfig.from_dict(config),
            Path(folder),
            device=_worker["device"],
            together=together,
            keep_weights=keep_weights,
            on_progress=lambda now: progress.put((index, now)),
            should_stop=stop.is_set,
        )
    except Stopped:
        return []
    except Exception as error:
        if errors.is_refusal(error):  # only this process knows which run it was
            raise RunError(f"{Path(folder).name}: {errors.message(error)}") from error
        raise


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of returning it to the system.

    Every step frees and takes the same large buffers. By default glibc maps each of them again, and the
    kernel fills the pages with zeros first: a third of a step's time on a CPU. Only Linux has the options.
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # the option numbers of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
