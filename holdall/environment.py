"""The environment of a run: versions, hardware, threads and commit, as written to environment.json."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def describe(device: str, threads: int) -> dict[str, Any]:
    """Versions, hardware, threads and commit; the content of environment.json."""
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
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """The commit of the source tree that Holdall runs from, with "+" if it was modified; None outside git."""
    where = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=where, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None
