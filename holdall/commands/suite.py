"""`holdall suite`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from holdall import recipes
from holdall.commands import OUT_OF_TIME, console
from holdall.report import suite as reports
from holdall.sweeps import OutOfTime, run_suite


def suite(
    recipe: str,
    data: Path | None,
    out: Path,
    families: Sequence[str],
    minutes: float | None,
    workers: int | None,
    device: str,
    weights: bool,
    licence: str,
    *,
    command: str,
) -> int:
    """The command `holdall suite`; returns the exit status."""
    config, published = recipes.suite(recipe)
    code = 0
    if minutes != 0:
        if data is None:
            raise ValueError("--data names the corpus to train on; `holdall data` makes one")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no GPU here; --device cpu trains all the same, for weeks")
        try:
            failed = run_suite(
                config, out, data=data, command=command, device=device, workers=workers, families=families,
                minutes=minutes, keep_weights=weights, report=_say,
            )  # fmt: skip
            code = 1 if failed else 0
        except KeyboardInterrupt:
            _say(f"Stopped. Everything so far is in {out}; the same command resumes it.")
            return 130
        except OutOfTime as stopped:
            _say(f"Time is up: {stopped}. Everything so far is in {out}; the same command resumes it.")
            code = OUT_OF_TIME
    try:
        table = reports.write(
            config, out, published=published, data=data, licence=licence, command=command, report=_say
        )
    except reports.NotTrainedError as error:
        if minutes == 0:
            raise
        _say(f"nothing to compare yet: {error}")
        return code
    _say(table)
    return code


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
