"""Compiling the kernels of a sweep's models before their turn comes, in a process beside each GPU's training.

A model's first training waits some ten seconds for its kernels, and the GPU waits with it. Training each
model for a step in another process leaves them in Triton's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from holdall import processes
from holdall.sweeps.worker import set_up
from holdall.tasks.data import Segment
from holdall.training.populations import TrainConfig, train


@contextlib.contextmanager
def compiling_ahead(
    configs: Sequence[TrainConfig], devices: Sequence[str], plugins: Sequence[str]
) -> Iterator[None]:
    """Meanwhile a process on each GPU compiles its share of the models that do not train at once.

    Args:
        configs: what will be trained, in that order. devices: one for each worker.
        plugins: the user's own mixer files.
    """
    gpus = list(dict.fromkeys(name for name in devices if name.startswith("cuda")))
    short = [config.to_dict() for config in to_compile(configs, len(devices))] if gpus else []
    context = processes.context()
    with tempfile.TemporaryDirectory(prefix="holdall-") as folder:
        compiling = [
            context.Process(
                target=compile_share, daemon=True,
                args=(short[at :: len(gpus)], str(Path(folder) / str(at)), gpu, plugins),
            )
            for at, gpu in enumerate(gpus[: len(short)])
        ]  # fmt: skip
        for process in compiling:
            process.start()
        try:
            yield
        finally:
            for process in compiling:
                process.kill()  # only what it has compiled is of use
                process.join()


def to_compile(configs: Sequence[TrainConfig], workers: int) -> list[TrainConfig]:
    """Short trainings of all models but those that train at once, in order."""
    short = [_shortened(config) for config in configs]
    return [config for config in dict.fromkeys(short) if config not in short[:workers]]


def _shortened(config: TrainConfig) -> TrainConfig:
    """One step at every length and one test, with few rows, which need little of the GPU's memory."""
    few = min(config.batch, 32)

    def shorter(segments: Sequence[Segment]) -> tuple[Segment, ...]:
        return tuple(dataclasses.replace(segment, rows=min(segment.rows, few)) for segment in segments)

    data = dataclasses.replace(config.data, train=shorter(config.data.train), test=shorter(config.data.test))
    seeds = tuple(range(len(config.seeds)))  # the kernels are the same for all seeds
    return dataclasses.replace(config, data=data, seeds=seeds, batch=few, epochs=1, evaluate_every=0)


def compile_share(
    configs: Sequence[dict[str, Any]], folder: str, device: str, plugins: Sequence[str]
) -> None:
    """Train these in folders under this one; what runs in the process.

    An error is passed over: the training itself meets it again, and reports it.
    """
    os.nice(10)  # the trainings come first
    set_up(device, plugins)
    for index, config in enumerate(configs):
        with contextlib.suppress(Exception):
            short = TrainConfig.from_dict(config)
            train(short, Path(folder) / str(index), device=device, keep_weights=False)
        torch.cuda.empty_cache()
