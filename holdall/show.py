"""What the commands do and show in a terminal: live progress, tables, errors in one line."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from holdall import mixers, recipes, runs
from holdall import report as reports
from holdall.analysis import gallery
from holdall.analysis.matrix import inputs, matrix_of
from holdall.analysis.soundness import LENGTHS, drift, length_for
from holdall.contract import Entry, bytes_per_row
from holdall.frontier import OutOfTime, Point, SweepConfig, Watcher, planned, run_sweep
from holdall.model import Precision
from holdall.recipes import quick
from holdall.report import matrix as matrices
from holdall.report import zoo as zoo_pages
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


OUT_OF_TIME = 75
"""Exit status where a time limit ended a command: sysexits.h's "try again later"."""


def frontier(
    recipe: str,
    out: Path,
    add: Sequence[str],
    load: Sequence[Path],
    seeds: int,
    device: str,
    precision: Precision | None,
    *,
    command: str,
    minutes: float | None = None,
    **options: Any,
) -> int:
    """The command `holdall frontier`; returns the exit status. Options are those of `run_sweep`."""
    until = None if minutes is None else time.monotonic() + 60 * minutes
    try:
        sweeps = _with_additions(recipes.sweeps(recipe, seeds), add, load)
        if precision is not None:
            sweeps = tuple(_in_precision(sweep, precision) for sweep in sweeps)
        device = _resolve_device(device)
    except USER_ERRORS as error:
        return _fail(error)
    folders = [out / sweep.part if sweep.part else out for sweep in sweeps]
    options = {"command": command, "device": device, "plugins": load, **options}
    codes = []
    for sweep, folder in zip(sweeps, folders, strict=True):
        left = None if until is None else max(0.0, until - time.monotonic()) / 60
        codes.append(_frontier(sweep, folder, minutes=left, **options))
        if codes[-1] not in (0, OUT_OF_TIME):
            return codes[-1]
    if len(sweeps) > 1 and all((folder / "results.jsonl").stat().st_size for folder in folders):
        for path in reports.write_widths(folders, out):
            console.print(f"  {path}")
    return max(codes)


def _frontier(sweep: SweepConfig, out: Path, *, device: str, **options: Any) -> int:
    """One sweep of a recipe; returns the exit status."""
    view, code = _FrontierView(sweep, out, device), 0
    try:
        with view:
            run_sweep(sweep, out, device=device, watcher=Watcher(view.progress, view.finished), **options)
    except KeyboardInterrupt:
        console.print(f"Stopped. Everything so far is in {out}; the same command goes on from here.")
        return 130
    except OutOfTime as stopped:
        console.print(f"Time is up: {stopped}. Everything so far is in {out}; the same command goes on.")
        code = OUT_OF_TIME
    except (RunError, ValueError) as error:
        return _fail(error)
    if view.lines:
        view.print_table()
        for path in reports.write([out], out):
            console.print(f"  {path}")
    return code


def _in_precision(sweep: SweepConfig, precision: Precision) -> SweepConfig:
    points = [
        dataclasses.replace(point, train=dataclasses.replace(point.train, precision=precision))
        for point in sweep.points
    ]
    return dataclasses.replace(sweep, points=tuple(points))


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
    label, config = mixers.configured(wanted, quick.WIDTH)
    return quick.point(label, config.name, config, seeds)


def _resolve_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("no CUDA device is available here; use --device cpu")
    return "cuda" if device != "cpu" and available else "cpu"


class _FrontierView:
    """The live picture of a sweep: bars for what trains, a table that fills as models finish."""

    def __init__(self, sweep: SweepConfig, out: Path, device: str) -> None:
        self.sweep, self.jobs = sweep, planned(sweep, out, together=device != "cpu")
        self.bars = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        count, device_name, gpus = len(self.jobs), device, torch.cuda.device_count()
        if device == "cuda":
            device_name = f"{f'{gpus} x ' if gpus > 1 else ''}{torch.cuda.get_device_name()}"
        points = (
            f"{len(sweep.points)} models, {count} runs" if count > len(sweep.points) else f"{count} models"
        )
        layers = [layer for point in sweep.points for layer in point.train.model.layers]
        forms = sorted({layer.resolved_form(torch.device(device)) for layer in layers})
        precisions = sorted({point.train.precision for point in sweep.points})
        self.header = (
            f"[bold]{sweep.recipe}[/]: {points} on {device_name}, form {' and '.join(forms)}, "
            f"{' and '.join(precisions)}, in {out}"
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
            says += f", {best['steps']} steps, {best['seconds']:.0f} s, {_pace(lines)} rows/s"
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


def _pace(lines: list[dict[str, Any]]) -> str:
    """Rows per second of a run, all its members together."""
    return f"{sum(line['rows'] for line in lines) / max(lines[0]['seconds'], 1e-3):,.0f}"


def _accuracy(line: dict[str, Any]) -> float:
    """For ordering: a diverged run is below every other."""
    return -1.0 if line["accuracy"] is None else line["accuracy"]


def _percent(score: float | None) -> str:
    return "-" if score is None or math.isnan(score) else f"{score:.1%}"


# ------------------------------------------------------------------------------------------ report, zoo


def report(folders: Sequence[Path], out: Path | None) -> int:
    """The command `holdall report`."""
    try:
        if any((folder / "matrix.json").exists() for folder in folders):
            if len(folders) > 1:
                raise ValueError("mixing matrices are drawn from one folder at a time")
            written = matrices.write(folders[0], out or folders[0])
        else:
            written = reports.write(folders, out or folders[0])
        for path in written:
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
    seeing = [name for name in mixers.names() if not mixers.entry(name).causal]
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        caption=f"State: elements that one layer carries per row, and the bytes of them, counted after N = "
        f"{context} tokens at width D = {width} with bf16 activations. A wider terminal also shows papers "
        "and costs of N tokens at once and of one more. `holdall zoo NAME` tells letters, paper and options. "
        f"Not causal: {', '.join(seeing)}.",
        caption_justify="left",
    )
    costs, papers = console.width >= 105, console.width >= 140
    for column in ("mixer", *(["paper", "year"] if papers else []), "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for column in ("training", "one token") if costs else ():
        table.add_column(column, no_wrap=True)
    for family, members in mixers.families().items():
        table.add_section()
        table.add_row(f"[bold]{family}[/]")
        for entry in map(mixers.entry, members):
            table.add_row(
                entry.name,
                *([entry.paper.authors.split(",")[0], str(entry.paper.year)] if papers else []),
                entry.state,
                bytes_text(_state_bytes(entry, width, context)),
                *([entry.training, entry.inference] if costs else []),
            )
    console.print(table)
    return 0


def zoo_page(results: Path, page: Path, load: Sequence[Path]) -> int:
    """The command `holdall zoo --results`."""
    try:
        for file in load:
            mixers.load(file)
        console.print(f"  {zoo_pages.write(results, page)}")
    except USER_ERRORS as error:
        return _fail(error)
    return 0


def soundness(names: Sequence[str], out: Path, width: int, length: int | None, load: Sequence[Path]) -> int:
    """The command `holdall soundness`."""
    path = out / "soundness.jsonl"
    found: list[dict[str, Any]] = []
    try:
        for file in load:
            mixers.load(file)
        wanted = [(each, mixers.configured(each, width)[1]) for each in names or mixers.names()]
        out.mkdir(parents=True, exist_ok=True)
        done = {
            (line["mixer"], line["dtype"], line["width"], line["length"]): line
            for line in runs.read_lines(path)
        }
    except USER_ERRORS as error:
        return _fail(error)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("mixer")
    for column in ("dtype", "tokens", "error", "late", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = (
        "Error: largest difference from fp64, relative to the largest output; late: of the last tenth."
    )
    table.caption_justify = "left"
    with console.status("") as status:
        for label, config in wanted:
            for dtype in LENGTHS:
                name = str(dtype).removeprefix("torch.")
                status.update(f"{label}, {name} ({len(found) + 1} of {len(LENGTHS) * len(wanted)})")
                line = done.get((label, name, width, length_for(config, dtype, length)))
                if line is None:
                    measured = drift(config, dtype, length=length)
                    line = {"mixer": label, "dtype": name, "width": width, **dataclasses.asdict(measured)}
                    runs.append_line(path, line)
                found.append(line)
                table.add_row(
                    label, name, f"{line['length']:,}", f"{line['error']:.1e}", f"{line['last']:.1e}",
                    f"{line['seconds']:.1f}",
                )  # fmt: skip
    console.print(table)
    console.print(f"  {path}")
    unsound = [line["mixer"] for line in found if not math.isfinite(line["error"])]
    if unsound:
        console.print(f"not finite: {', '.join(unsound)}", markup=False, soft_wrap=True)
    return 1 if unsound else 0


@torch.no_grad()
def _state_bytes(entry: Entry, width: int, context: int) -> int:
    """Bytes of a mixer's state after really reading that many tokens."""
    longest = entry.options.get("max_length", context)
    config = entry.configure(width=width, **({"max_length": context} if longest < context else {}))
    mixer = config.build().to(torch.bfloat16)
    ids = {"tokens_BT": torch.zeros(1, context, dtype=torch.long)} if mixer.reads_tokens else {}
    _, state = mixer(torch.zeros(1, context, width, dtype=torch.bfloat16), **ids)
    return bytes_per_row(state)


# ---------------------------------------------------------------------------------------------- matrix


def matrix(
    names: Sequence[str],
    length: int,
    width: int,
    input: str,
    scale: float,
    heads: int,
    jacobian: bool,
    seed: int,
    load: Sequence[Path],
    out: Path,
    dark: bool,
    *,
    command: str,
) -> int:
    """The command `holdall matrix`; 1 if some mixer has no matrix, which stops no other."""
    wanted = dict.fromkeys(names)
    try:
        for file in load:
            mixers.load(file)
        for each in wanted:  # what a user typed is checked before anything is computed
            mixers.configured(each, width)
        if length < 4 or width < 1 or not 1 <= heads <= 4:
            raise ValueError(
                f"length {length} is below 4, width {width} below 1, or heads {heads} not 1 to 4"
            )
    except USER_ERRORS as error:
        return _fail(error)
    settings: dict[str, Any] = {"length": length, "kind": input, "scale": scale, "seed": seed, "shown": heads}
    found: list[gallery.MixingMatrix] = []
    failures: dict[str, str] = {}
    wanted = wanted or dict.fromkeys(name for members in mixers.families().values() for name in members)
    with console.status("") as status:
        for each in wanted:
            status.update(f"{each} ({len(found) + len(failures) + 1} of {len(wanted)})")
            try:
                label, config = mixers.configured(each, width)
                found.append(matrix_of(config, label=label, jacobian=jacobian, **settings))
            except Exception as error:  # whatever a mixer raises stops no other, and is told below
                failures[each] = f"{type(error).__name__}: {error}".partition("\n")[0]
    kind = {
        "random": "random input",
        "repeats": "associative recall of few tokens",
        "constant": "one token again and again",
    }
    result = gallery.Gallery(
        command=command,
        length=length,
        width=width,
        input=f"{kind[input]}, scale {scale:g}",
        tokens=inputs(input, length, width, seed=seed).names,
        matrices=tuple(found),
        failures=failures,
        environment=runs.environment("cpu", torch.get_num_threads()),
    )
    if found:
        console.print(_matrix_table(result))
    for label, reason in failures.items():
        console.print(f"{label} has no matrix: {reason}", markup=False, soft_wrap=True)
    try:
        written = gallery.save(result, out)
        for path in (*(matrices.write(out, out, dark=dark) if found else []), *written):
            console.print(f"  {path}")
    except USER_ERRORS as error:
        return _fail(error)
    return 1 if failures else 0


def _matrix_table(result: gallery.Gallery) -> Table:
    wide = console.width >= 100
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        caption="Rank: of what the second half of the sequence takes from the first, M[N/2:, :N/2], out of "
        "the largest possible; a recurrence passes all of it through its state. To 1%: the rank that gives "
        "that quarter within 1%. The largest of all heads or channels counts; a Jacobian counts all numbers "
        "of the state together." + " Small: entries below 1/1000 of their row's largest." * wide,
        caption_justify="left",
    )
    table.add_column("mixer")
    for column in ("matrix", *(["of"] if wide else [])):
        table.add_column(column, no_wrap=True)
    for column in ("rank", "to 1%", "state", "Toeplitz", "causal", *(["small"] if wide else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for each in result.matrices:
        table.add_row(
            each.label,
            each.kind,
            *([each.source or "the whole mixer"] if wide else []),
            "-" if each.rank is None else f"{each.rank}/{each.full_rank}",
            "-" if each.rank_1 is None else str(each.rank_1),
            str(each.state),
            "yes" if each.is_toeplitz else f"{each.toeplitz:.0%} off",
            "yes" if each.causal else "no",
            *([f"{each.sparsity:.0%}"] if wide else []),
        )
    return table
