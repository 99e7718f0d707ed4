"""What the commands do and show in a terminal: live progress, tables, errors in one line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from holdall import mixers, recipes
from holdall import report as reports
from holdall.contract import MixerConfig, bytes_per_row
from holdall.frontier import Point, SweepConfig, Watcher, run_sweep
from holdall.recipes import quick
from holdall.report.style import bytes_text
from holdall.runs import RunError
from holdall.train import Progress as TrainProgress

console = Console(highlight=False)
USER_ERRORS = (RunError, KeyError, TypeError, ValueError, FileNotFoundError)
"""What a user can cause and mend; anything else is a fault of Holdall and keeps its traceback."""


def _fail(error: Exception) -> int:
    message = error.args[0] if isinstance(error, KeyError) else str(error)
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/] {message}")
    return 2


# --------------------------------------------------------------------------------------------- frontier


def frontier(
    recipe: str,
    out: Path,
    add: Sequence[str],
    load: Sequence[Path],
    seeds: int,
    device: str,
    workers: int | None,
    *,
    command: str,
) -> int:
    """The command `holdall frontier`; returns the exit status."""
    try:
        sweeps = _with_additions(recipes.sweeps(recipe, seeds), add, load)
        device = _resolve_device(device)
    except USER_ERRORS as error:
        return _fail(error)
    for sweep in sweeps:
        folder = out / sweep.part if sweep.part else out
        if code := _frontier(sweep, folder, load, device, workers, command):
            return code
    return 0


def _frontier(
    sweep: SweepConfig, out: Path, load: Sequence[Path], device: str, workers: int | None, command: str
) -> int:
    """One sweep of a recipe; returns the exit status."""
    view = _FrontierView(sweep, out, device)
    try:
        with view:
            run_sweep(
                sweep,
                out,
                command=command,
                device=device,
                workers=workers,
                plugins=load,
                watcher=Watcher(view.progress, view.finished),
            )
    except KeyboardInterrupt:
        console.print(f"Stopped. Everything so far is in {out}; the same command goes on from here.")
        return 130
    except RunError as error:
        return _fail(error)
    view.print_table()
    for path in reports.write([out], out):
        console.print(f"  {path}")
    return 0


def _with_additions(
    sweeps: tuple[SweepConfig, ...], add: Sequence[str], load: Sequence[Path]
) -> tuple[SweepConfig, ...]:
    """The sweeps and, in the quick recipe, the user's own points."""
    wanted = [name for file in load for name in mixers.load(file)] + list(add)
    if not wanted:
        return sweeps
    sweep = sweeps[0]
    if sweep.recipe != "quick":
        raise ValueError(f"mixers can be added to the quick recipe, not to {sweep.recipe}")
    points = [_added_point(each, len(sweep.points[0].train.seeds)) for each in wanted]
    return (dataclasses.replace(sweep, points=(*points, *sweep.points)),)


def _added_point(wanted: str, seeds: int) -> Point:
    """A point of the quick recipe from "NAME" or "NAME:option=value,option=value"."""
    name, _, text = wanted.partition(":")
    entry = mixers.entry(name)
    options = {}
    for part in filter(None, text.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"'{wanted}': write options as option=value, joined by commas")
        options[option] = _parsed(value)
    config: MixerConfig = entry.configure(**{"width": quick.WIDTH, **options})
    label = ", ".join([name, *(f"{option} = {value}" for option, value in options.items())])
    return quick.point(label, name, config, seeds)


def _parsed(value: str) -> Any:
    """The number or truth value that a text means, or the text itself."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value.lower(), value)


def _resolve_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("no CUDA device is available here; use --device cpu")
    return "cuda" if device != "cpu" and available else "cpu"


class _FrontierView:
    """The live picture of a sweep: bars for what trains, a table that fills as models finish."""

    def __init__(self, sweep: SweepConfig, out: Path, device: str) -> None:
        self.sweep, self.jobs = sweep, sweep.jobs(together=device != "cpu")
        self.bars = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        count, device_name = len(self.jobs), torch.cuda.get_device_name() if device == "cuda" else "cpu"
        points = (
            f"{len(sweep.points)} models, {count} runs" if count > len(sweep.points) else f"{count} models"
        )
        forms = sorted({layer.resolved_form for point in sweep.points for layer in point.train.model.layers})
        self.header = (
            f"[bold]{sweep.recipe}[/]: {points} on {device_name}, form {' and '.join(forms)}, in {out}"
        )
        self.whole = self.bars.add_task("all", total=count, says="")
        self.tasks: dict[int, TaskID] = {}
        self.shares = [0.0] * count
        self.lines: list[dict[str, Any]] = []
        self.done = 0
        self.live = Live(self._picture(), console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> _FrontierView:
        console.print(self.header)
        if console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self.live.stop()

    def progress(self, index: int, progress: TrainProgress) -> None:
        if index not in self.tasks:
            self.tasks[index] = self.bars.add_task(self.jobs[index].title, total=progress.steps, says="")
        says = f"loss {progress.loss:.3f}  recall {progress.accuracy:.1%}"
        self.bars.update(self.tasks[index], completed=progress.step, says=says)
        self.shares[index] = progress.step / progress.steps
        self._tell_whole()

    def finished(self, index: int, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        self.done += 1
        self.shares[index] = 1.0
        if index in self.tasks:
            self.bars.remove_task(self.tasks.pop(index))
        self._tell_whole()
        if console.is_terminal:
            self.live.update(self._picture())
        else:
            best = max(lines, key=_accuracy)
            says = f"recall {_percent(best['accuracy'])} from {bytes_text(best['state_bytes'])}"
            says += f", {best['steps']} steps, {best['seconds']:.0f} s"
            console.print(f"[{self.done}/{len(self.jobs)}] {self.jobs[index].title}: {says}", markup=False)

    def _tell_whole(self) -> None:
        self.bars.update(self.whole, completed=sum(self.shares), says=f"{self.done} of {len(self.jobs)} done")

    def _picture(self) -> Group:
        return Group(*([self._table()] if self.lines else []), self.bars)

    def print_table(self) -> None:
        console.print(self._table())

    def _table(self) -> Table:
        """Each model at its best learning rate so far, in order of state."""
        best: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.lines:
            key = (line["label"], line["width"])
            if key not in best or _accuracy(line) > _accuracy(best[key]):
                best[key] = line
        widths = len({width for _, width in best}) > 1
        pairs = sorted({int(k) for line in best.values() for k in line["accuracy_by_pairs"]})
        table = Table(title="recall at the best learning rate", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("model", no_wrap=True)
        scores = ("recall", *(f"K={k}" for k in pairs))
        for column in (*(["width"] if widths else []), "state", *scores, "lr", "s"):
            table.add_column(column, justify="right", no_wrap=True)
        for line in sorted(best.values(), key=lambda line: line["state_bytes"]):
            table.add_row(
                line["label"],
                *([str(line["width"])] if widths else []),
                bytes_text(line["state_bytes"]),
                f"[bold]{_percent(line['accuracy'])}[/]",
                *(_percent(line["accuracy_by_pairs"].get(str(k))) for k in pairs),
                f"{line['learning_rate']:.2g}",
                f"{line['seconds']:.0f}",
            )
        return table


def _accuracy(line: dict[str, Any]) -> float:
    """For ordering: a diverged run is below every other."""
    return -1.0 if line["accuracy"] is None else line["accuracy"]


def _percent(score: float | None) -> str:
    return "-" if score is None or math.isnan(score) else f"{score:.1%}"


# ------------------------------------------------------------------------------------------ report, zoo


def report(folders: Sequence[Path], out: Path | None) -> int:
    """The command `holdall report`."""
    try:
        for path in reports.write(folders, out or folders[0]):
            console.print(f"  {path}")
    except USER_ERRORS as error:
        return _fail(error)
    return 0


def zoo(name: str | None, width: int, context: int, load: Sequence[Path]) -> int:
    """The command `holdall zoo`."""
    try:
        for file in load:
            mixers.load(file)
        if name is not None:
            console.print(str(mixers.entry(name)), markup=False, soft_wrap=True)
            return 0
    except USER_ERRORS as error:
        return _fail(error)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        caption=f"State: elements that one layer carries per row, and the bytes of them, counted after N = "
        f"{context} tokens at width D = {width} with bf16 activations. Costs of N tokens at once and of one "
        "more, in O-notation. `holdall zoo NAME` tells the letters, the paper and the options.",
        caption_justify="left",
    )
    wide = console.width >= 100
    for column in ("mixer", *(["paper"] if wide else []), "year", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for column in ("training", "one token", "causal"):
        table.add_column(column)
    for each in mixers.names():
        entry = mixers.entry(each)
        table.add_row(
            each,
            *([entry.paper.authors.split(",")[0]] if wide else []),
            str(entry.paper.year),
            entry.state,
            bytes_text(_state_bytes(entry.configure(width=width), context)),
            entry.training,
            entry.inference,
            "yes" if entry.causal else "no",
        )
    console.print(table)
    return 0


@torch.no_grad()
def _state_bytes(config: MixerConfig, context: int) -> int:
    """Bytes of a mixer's state after really reading that many tokens."""
    mixer = config.build().to(torch.bfloat16)
    _, state = mixer(torch.zeros(1, context, config.width, dtype=torch.bfloat16))
    return bytes_per_row(state)
