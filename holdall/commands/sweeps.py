"""`holdall frontier`, live, and `holdall report`."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from holdall import mixers, recipes
from holdall import report as reports
from holdall.commands import OUT_OF_TIME, Words, busy, console, resolve_device, theory_by_hand
from holdall.commands.laws import short_verdicts
from holdall.files import RunError
from holdall.report import data
from holdall.report import evals as evaluations
from holdall.report import matrix as matrices
from holdall.report.style import PUBLISHED, bytes_text, marked
from holdall.settings import Precision
from holdall.sweeps import (
    OutOfTime,
    Remaining,
    SweepConfig,
    Watcher,
    at_once,
    cluster,
    in_order,
    in_words,
    plan,
    planned,
    run_sweep,
    with_added,
)
from holdall.sweeps.by_hand import check_task
from holdall.training.populations import Progress as TrainProgress


def frontier(
    recipe: str,
    out: Path | None,
    add: Sequence[str],
    load: Sequence[Path],
    seeds: int,
    settings: Mapping[str, Any],
    device: str,
    precision: Precision | None,
    dry_run: bool,
    *,
    command: str,
    minutes: float | None = None,
    axis: str | None = None,
    by_hand: bool = False,
    **options: Any,
) -> int:
    """The command `holdall frontier`; returns the exit status. Options are those of `run_sweep`."""
    until = None if minutes is None else time.monotonic() + 60 * minutes
    added = _added(add, load)
    make = recipes.function(recipe)
    sweeps = recipes.call(make, recipe, seeds, **settings)
    out = out or Path("runs") / sweeps[0].recipe
    if precision is not None:
        sweeps = tuple(_in_precision(sweep, precision) for sweep in sweeps)
    sweeps = tuple(with_added(sweep, added) for sweep in sweeps)
    if "steps" in settings:
        _say_rounded(sweeps, settings["steps"])
    if by_hand:
        for sweep in sweeps:
            check_task(sweep.data)
    device = resolve_device(device)
    if options.get("on") == "ray":
        options["workers"] = options.get("workers") or cluster.at_once(device)
    folders = [out / sweep.part if sweep.part else out for sweep in sweeps]
    # where mixers are added, the recipe's own models are there to be compared with, not to be trained again
    options = {"device": device, "published": bool(added), **options}
    if dry_run:
        options = {name: options[name] for name in ("device", "published", "workers", "families")}
        return _dry_run(sweeps, folders, **options)
    own_files = [*([Path(recipe)] if recipes.is_file(recipe) else []), *load]
    options |= {"command": command, "plugins": own_files, "laws": _laws_of(sweeps, added)}
    codes = []
    for sweep, folder in zip(sweeps, folders, strict=True):
        left = None if until is None else max(0.0, until - time.monotonic()) / 60
        codes.append(_frontier(sweep, folder, axis=axis, by_hand=by_hand, minutes=left, **options))
        if codes[-1] not in (0, OUT_OF_TIME):
            return codes[-1]
    if len(sweeps) > 1 and all((folder / "results.jsonl").stat().st_size for folder in folders):
        for path in reports.write_widths(folders, out):
            console.print(f"  {path}", soft_wrap=True)
    if max(codes) == 0:
        console.print(_spread(seeds, command, more="seeds" in recipes.takes(make)), soft_wrap=True)
    return max(codes)


def _spread(seeds: int, command: str, *, more: bool) -> str:
    """What is known of the spread over seeds, and the command that adds some to the same folder."""
    if seeds > 1:
        return (
            f"spread: each point is the mean of {seeds} seeds, its bar reaches from the lowest to the highest"
        )
    said = "spread: not known of one seed"
    again = re.sub(r"\s--seeds[= ]\S+", "", command)
    return f"{said}; two more, and bars in the picture: {again} --seeds 3" if more else said


def _frontier(
    sweep: SweepConfig, out: Path, *, device: str, axis: str | None, by_hand: bool, **options: Any
) -> int:
    """One sweep of a recipe; returns the exit status."""
    view = _FrontierView(sweep, out, device, options.get("workers"), options.get("families", ()))
    watcher = Watcher(view.progress, view.finished, view.others)
    code = 0
    try:
        with view:
            run_sweep(sweep, out, device=device, watcher=watcher, **options)
        if by_hand:
            theory_by_hand.add_to(out)
    except KeyboardInterrupt:
        console.print(f"Stopped. Everything so far is in {out}; the same command resumes it.", soft_wrap=True)
        return 130
    except OutOfTime as stopped:
        text = f"Time is up: {stopped}. Everything so far is in {out}; the same command resumes it."
        console.print(text, soft_wrap=True)
        code = OUT_OF_TIME
    if view.lines:
        view.print_table()
        for path in reports.write([out], out, axis):
            console.print(f"  {path}", soft_wrap=True)
    return code


def _in_precision(sweep: SweepConfig, precision: Precision) -> SweepConfig:
    """The sweep with this precision instead of the recipe's."""
    points = [
        dataclasses.replace(point, train=dataclasses.replace(point.train, precision=precision))
        for point in sweep.points
    ]
    return dataclasses.replace(sweep, points=tuple(points))


def _added(add: Sequence[str], load: Sequence[Path]) -> list[str]:
    """The mixers to add: those named, and of the loaded ones those that are not named, as they are."""
    named = {text.partition(":")[0] for text in add}
    loaded = [name for file in load for name in mixers.load(file)]
    return [*add, *(name for name in loaded if name not in named)]


def _laws_of(sweeps: Sequence[SweepConfig], added: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Which laws the added mixers break or refuse, by label; what they break is printed before they train."""
    width = min(point.train.model.width for sweep in sweeps for point in sweep.points)
    # with the options that were given: lengths that were fitted to the task's rows are shorter than the laws'
    configs = dict(mixers.configured(text, width) for text in added)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for label, config in configs.items():
        with busy(f"holding {label} to the short laws"):
            verdicts = short_verdicts(config)
        for verdict in verdicts:
            if verdict.status in ("broken", "refused"):
                found.setdefault(label, {}).setdefault(verdict.status, {})[verdict.law.name] = verdict.says
                style = "bold red" if verdict.status == "broken" else "yellow"
                line = Text.assemble((f"{label} {'breaks' if style == 'bold red' else 'refuses'}", style))
                console.print(line, Text(f" {verdict.law.name}: {verdict.says}"), sep="", soft_wrap=True)
        if "broken" in found.get(label, {}):
            console.print(
                f"It is trained all the same, and marked; holdall laws has all of them, {label}'s too."
            )
    return found


def _dry_run(sweeps: Sequence[SweepConfig], folders: Sequence[Path], *, device: str, **options: Any) -> int:
    """Print what would be trained, and how long it would take."""
    total = 0.0
    for sweep, folder in zip(sweeps, folders, strict=True):
        with busy("timing a few steps of each model"):
            models, seconds = plan(sweep, folder, device=device, **options)
        total += seconds
        jobs = sum(model.finished + model.published + model.left for model in models)
        console.print(_header(sweep, jobs, device, folder), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("model", overflow="fold")  # numbers are never cut
        for column in ("width", "params", "state", "done", "publ.", "left", "s"):
            table.add_column(column, justify="right", no_wrap=True)
        for model in models:
            table.add_row(
                model.point.label,
                str(model.point.train.model.width),
                f"{model.parameters:,}",
                bytes_text(model.state_bytes),
                *(str(runs or "-") for runs in (model.finished, model.published, model.left)),
                f"{model.seconds:,.0f}" if model.left else "-",
            )
        console.print(table)
    console.print(
        f"Nothing was trained. It would take {in_words(total) or 'no time'}".replace(" left", "") + "."
    )
    return 0


class _FrontierView:
    """The live view of a sweep: progress bars, and a table that fills as models finish.

    Without a terminal, a line per run that has finished.
    """

    def __init__(
        self, sweep: SweepConfig, out: Path, device: str, workers: int | None, families: Sequence[str]
    ) -> None:
        self.sweep, self.jobs = sweep, planned(sweep, out, together=device != "cpu")
        order = in_order(self.jobs)
        self.places = {index: place for place, index in enumerate(order)}
        self.remaining = Remaining(
            [self.jobs[index].model for index in order],
            [self.jobs[index].operations for index in order],
            at_once(device, workers),
        )
        for index, job in enumerate(self.jobs):
            if families and job.point.family not in families:
                self.remaining.leave_out(self.places[index])
        self.bars = Progress(
            Words("{task.description}", justify="right"),
            BarColumn(),
            Words("{task.fields[status]}"),
            TimeElapsedColumn(),
            Words("{task.fields[left]}"),
            console=console,
        )
        self.header = _header(sweep, len(self.jobs), device, out)
        self.total = self.bars.add_task("all", total=len(self.jobs), status="", left="")
        self.tasks: dict[int, TaskID] = {}
        self.shares = [0.0] * len(self.jobs)
        self.lines: list[dict[str, Any]] = []
        self.done = 0
        self.live = Live(self._view(), console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> _FrontierView:
        console.print(self.header, soft_wrap=True)
        if console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self.live.stop()

    def progress(self, index: int, progress: TrainProgress) -> None:
        if index not in self.tasks:
            title = self.jobs[index].title
            self.tasks[index] = self.bars.add_task(title, total=progress.steps, status="", left="")
        status = f"loss {progress.loss:.3f}  recall {progress.accuracy:.1%}"
        place = self.places[index]
        self.remaining.progress(place, progress.step / progress.steps)
        left = in_words(self.remaining.seconds_of(place))
        self.bars.update(self.tasks[index], completed=progress.step, status=status, left=left)
        self.shares[index] = progress.step / progress.steps
        self._update_total()

    def others(self, lines: list[dict[str, Any]]) -> None:
        self.lines += lines

    def finished(self, index: int, lines: list[dict[str, Any]]) -> None:
        self.lines += lines
        self.done += 1
        if (
            not lines or "published" in lines[0]
        ):  # the time that it took elsewhere says nothing about this machine
            self.remaining.leave_out(self.places[index])
            self.shares[index] = 1.0
            self._update_total()
            return
        steps = max(line["steps"] for line in lines)
        share = min(1.0, steps / self.jobs[index].steps)
        self.remaining.finished(self.places[index], share, max(line["seconds"] for line in lines))
        self.shares[index] = 1.0
        if index in self.tasks:
            self.bars.remove_task(self.tasks.pop(index))
        self._update_total()
        if console.is_terminal:
            self.live.update(self._view())
        else:
            (model,) = data.grouped(map(data.run_of, lines))  # a run is of one seed
            best = (model.best or model.runs)[0].line
            status = f"recall {_percent(best['accuracy'])} from {bytes_text(best['state_bytes'])}"
            status += f", {best['steps']} steps, {best['seconds']:.0f} s, {_pace(lines)} rows/s"
            left = in_words(self.remaining.seconds()) if self.done < len(self.jobs) else ""
            status += f"; {left}" if left else ""
            console.print(f"[{self.done}/{len(self.jobs)}] {self.jobs[index].title}: {status}")

    def _update_total(self) -> None:
        left = in_words(self.remaining.seconds()) if self.done < len(self.jobs) else ""
        status = f"{self.done} of {len(self.jobs)} done"
        self.bars.update(self.total, completed=sum(self.shares), status=status, left=left)

    def _view(self) -> Group:
        return Group(*([self._table()] if self.lines else []), self.bars)

    def print_table(self) -> None:
        console.print(self._table())

    def _table(self) -> Table:
        """Each model at its best learning rate so far, the mean of its seeds, in order of state.

        Where the terminal is too narrow for all difficulties, the lowest go first: most models solve those.
        """
        models = sorted(data.grouped(map(data.run_of, self.lines)), key=lambda model: model.state_bytes)
        tags = sorted({tag for model in models for tag in model.by_difficulty})
        unbounded = console.options.update(max_width=1000)
        for left_out in range(len(tags) + 1):
            table = self._columns(models, tags[left_out:])
            if console.measure(table, options=unbounded).maximum <= console.width:
                break
        captions = ["table.md has all columns"] if left_out else []
        for source in dict.fromkeys(model.published for model in models if model.published):
            captions.append(f"†: {PUBLISHED}: {source}")
        table.caption, table.caption_justify = "\n".join(captions) or None, "left"
        return table

    def _columns(self, models: Sequence[data.Model], tags: Sequence[int]) -> Table:
        widths = len({model.width for model in models}) > 1
        seeds = ", mean over seeds" if any(len(model.best) > 1 for model in models) else ""
        title = f"recall by {models[0].runs[0].difficulty} at the best learning rate{seeds}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("model", overflow="fold")  # numbers are never cut
        scores = ("recall", *map(str, tags))
        for column in (*(["width"] if widths else []), "state", *scores, "lr", "s"):
            table.add_column(column, justify="right", no_wrap=True)
        for model in models:
            seconds = model.mean("seconds")
            table.add_row(
                marked(model),
                *([str(model.width)] if widths else []),
                bytes_text(model.state_bytes),
                Text(_percent(model.accuracy), "bold"),
                *(_percent(model.by_difficulty.get(tag)) for tag in tags),
                ", ".join(f"{rate:.2g}" for rate in model.learning_rates) or "-",
                "-" if seconds is None else f"{seconds:.0f}",
            )
        return table


def _say_rounded(sweeps: Sequence[SweepConfig], asked: int) -> None:
    """Say how many steps are trained where a recipe cannot train as many as asked for."""
    for sweep in sweeps:
        if steps := sorted({job.steps for job in sweep.jobs(together=True)} - {asked}):
            console.print(
                f"{sweep.recipe}: --steps {asked} is rounded to {' and '.join(map(str, steps))}, so that "
                "each part of the training data has as many rows, in whole epochs.",
                soft_wrap=True,
            )


def _header(sweep: SweepConfig, runs: int, device: str, out: Path) -> Text:
    """What a sweep trains, where, in which form and precision."""
    name, gpus, models = device, torch.cuda.device_count(), len(sweep.points)
    if device == "cuda":
        name = f"{f'{gpus} x ' if gpus > 1 else ''}{torch.cuda.get_device_name()}"
    layers = [layer for point in sweep.points for layer in point.train.model.layers]
    forms = sorted({layer.resolved_form(torch.device(device)) for layer in layers})
    precisions = sorted({point.train.precision for point in sweep.points})
    count = f"{models} models, {runs} runs" if runs > models else f"{runs} models"
    about = f": {count} on {name}, form {' and '.join(forms)}, {' and '.join(precisions)}, in {out}"
    return Text.assemble((sweep.recipe, "bold"), about)


def _pace(lines: list[dict[str, Any]]) -> str:
    """Rows per second of a run, all its members together."""
    return f"{sum(line['rows'] for line in lines) / max(lines[0]['seconds'], 1e-3):,.0f}"


def _percent(score: float | None) -> str:
    return "-" if score is None or math.isnan(score) else f"{score:.1%}"


def report(
    folders: Sequence[Path], out: Path | None, axis: str | None = None, samples: int | None = None
) -> int:
    """The command `holdall report`."""
    if not folders:
        raise ValueError("name at least one folder: holdall report FOLDER [FOLDER ...]")
    if any((folder / "matrix.json").exists() for folder in folders):
        if len(folders) > 1:
            raise ValueError("mixing matrices are drawn from one folder at a time")
        written = matrices.write(folders[0], out or folders[0])
    elif any(evaluations.is_evaluation(folder) for folder in folders):
        if len(folders) > 1:
            raise ValueError(
                "evaluations are shown from one folder at a time; `holdall eval MODEL MODEL --out FOLDER` "
                "puts several models into one"
            )
        written = evaluations.write(folders[0], out, **({} if samples is None else {"samples": samples}))
    else:
        for folder in folders:
            # a sweep has results.jsonl itself, or in a folder for each of its parts
            if not any(any(folder.glob(pattern)) for pattern in ("results.jsonl", "*/results.jsonl")):
                there = (
                    f"{folder} holds nothing to report" if folder.is_dir() else f"there is no folder {folder}"
                )
                raise RunError(
                    f"{there}; name one that `holdall frontier`, `holdall matrix` or `holdall eval` wrote"
                )
        written = reports.write(folders, out or folders[0], axis)
    for path in written:
        console.print(f"  {path}", soft_wrap=True)
    return 0
