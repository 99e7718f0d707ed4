"""`holdall theory complexity`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table

from holdall import environment, files, mixers
from holdall.commands import console, resolve_device, typed_command
from holdall.contract import did_you_mean
from holdall.files import RunError
from holdall.report import complexity as report
from holdall.settings import differ
from holdall.theory.complexity import ATTENTIONS, LENGTHS, Cost, measure

LINES = "results.jsonl"
SETTINGS = "settings.json"


def complexity(
    names: Sequence[str], lengths: Sequence[int], width: int, device: str, timed: bool, out: Path
) -> int:
    """The command `holdall theory complexity`; returns the exit status."""
    lengths = sorted(set(lengths or LENGTHS))
    ratios = {later / length for length, later in itertools.pairwise(lengths)}
    if len(lengths) < 3 or len(ratios) > 1:
        raise ValueError(
            f"--lengths {' '.join(map(str, lengths))}: give three or more, each as many times the one "
            f"before, such as {' '.join(map(str, LENGTHS))}"
        )
    known = [*mixers.names(), *ATTENTIONS]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no mixer '{name}'. {did_you_mean(name, known)}")
    device = resolve_device(device).partition(":")[0]
    wanted = [(name, length) for name in names or known for length in lengths]
    with files.locked(out):
        _claim(out / SETTINGS, {"width": width, "device": device, "timed": timed})
        costs = {(cost.name, cost.length): cost for cost in _read(out / LINES)}
        left = [one for one in wanted if one not in costs]
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(left))
            for name, length in left:
                progress.update(bar, description=f"{name}, {length:,} tokens")
                costs[name, length] = measure(name, length, width=width, device=device, timed=timed)
                files.append_line(out / LINES, _plain(costs[name, length]))
                progress.advance(bar)
        files.write_json(out / "environment.json", environment.describe(device, torch.get_num_threads()))
        shown = report.by_name(costs[one] for one in wanted)
        files.write_atomically(out / "table.md", report.markdown(shown).encode())
        written = [out / "table.md"]
        if any(name in shown for name in ATTENTIONS):
            written.append(report.write(shown, out / "attention.png", command=typed_command()))
    _print(shown, lengths)
    for path in written:
        console.print(f"  {path}", soft_wrap=True)
    return 0


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write what the folder's costs are of. Raises RunError if they are of something else."""
    if path.exists() and (different := differ(files.read_json(path), settings)):
        raise RunError(
            f"{path.parent} holds measurements with other settings ({different}); choose another folder with "
            "--out"
        )
    files.write_json(path, settings)


def _plain(cost: Cost) -> dict[str, Any]:
    """Without what was not measured."""
    return {
        name: value
        for name, value in dataclasses.asdict(cost).items()
        if not (isinstance(value, float) and math.isnan(value))
    }


def _read(path: Path) -> list[Cost]:
    if not path.exists():
        return []
    try:
        return [Cost(**line) for line in files.read_lines(path)]
    except TypeError as error:
        raise files.damaged(path, error, "Choose another folder with --out.") from error


def _print(costs: report.Costs, lengths: Sequence[int]) -> None:
    console.print(
        f"\n  Exponents of N, from {lengths[-3]:,} to {lengths[-1]:,} tokens: promised, then operations, "
        "those with\n  gradients, time, memory and depth of reading N tokens; one more token; the state."
    )
    heads = ("N tokens", "ops", "trained", "time", "memory", "depth", "one more", "ops", "state", "is")
    table = Table("", *heads, box=box.SIMPLE_HEAD, padding=(0, 1))
    for row in report.rows(costs):
        name, whole, ops, trained, seconds, memory, _, depth, one, step, _, state, found = (
            text.rpartition(": ")[2] for text in row
        )
        table.add_row(name, whole, ops, trained, seconds, memory, depth, one, step, state, found)
    console.print(table)
