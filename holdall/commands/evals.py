"""The command `holdall eval`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from holdall.commands import TELL_SECONDS, Words, busy, console, resolve_device
from holdall.commands.loading import Loading
from holdall.evals import documents, general, harness, suites
from holdall.evals.folder import EvalConfig, Result, ResultsFolder
from holdall.evals.models import check_there, open_model
from holdall.evals.run import Plan, Subject
from holdall.evals.run import evaluate as ask
from holdall.evals.windows import Remembered
from holdall.files import RunError
from holdall.report import evals as pages
from holdall.report.style import bytes_text
from holdall.text.sources import needed


def evaluate(
    models: Sequence[str],
    names: Sequence[str],
    tasks: Sequence[str],
    config: EvalConfig,
    data: Path | None,
    include: Path | None,
    out: Path,
    batch: int,
    dry_run: bool,
    loading: Loading,
    *,
    command: str,
) -> int:
    """Score language models on suites of Holdall's and tasks of lm-eval; returns the exit status.

    Args:
        models: folders, files, names or addresses.
        names: suites, or single tasks of them; with no tasks either, all suites whose files are there.
        tasks: tasks of lm-eval.
        data: the folder of the suites' files.
        include: a folder of tasks of your own, as YAML.
        out: the results folder.
    """
    if out.suffix == ".json" or out.is_file():
        raise ValueError(f"--out {out} must be a folder: it gets samples and scores of all models")
    if data is not None and not data.is_dir():
        raise RunError(f"there is no folder {data}: --data names the folder of the suites' files")
    chosen = suites.tasks_of(names or ([] if tasks else list(suites.SUITES)))
    plan = Plan(config=config, tasks=tuple(chosen), others=tuple(tasks), data=data, include=include)
    lacking = plan.missing()
    if not names:
        there = [task for task in chosen if task not in lacking]
        plan = Plan(config=config, tasks=tuple(there), others=tuple(tasks), data=data, include=include)
    elif lacking and not dry_run:
        others = [task.name for task in chosen if task not in lacking]
        runs = (
            f"--suite {' '.join(others or ['needles'])} {'has all it needs' if others else 'needs no files'}"
        )
        raise RunError(f"{_missing(lacking, data)}. {runs}")
    for name in models:  # before the first is asked, which may take hours
        check_there(name)
    loading.load_mixers()
    device: Any = resolve_device(loading.device)
    loading = dataclasses.replace(loading, device=device)
    if dry_run:
        for name in models:
            with busy(f"{name}: reading documents"):
                planned = _planned(_opened(name, loading), plan)
            console.print(planned)
        if lacking:
            console.print(f"{_missing(lacking, data)}.", soft_wrap=True)
        return 0
    needed("lm_eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = ResultsFolder(out)
    lines: list[Result] = []
    view = _View()
    try:
        with view:
            for name in models:
                one = _opened(name, loading)
                device = str(loading.device)
                folder.claim(config, _suites(names, plan), plan.names(), command=command, device=device)
                view.model(one.name)
                lines += ask(
                    one, plan, folder, batch=batch, on_task=view.task, on_answers=view.answers,
                    on_result=view.result,
                )  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"Stopped. All answers so far are in {out}; the same command resumes.", soft_wrap=True)
        _write_pages(out)
        return 130
    except Exception:
        if view.finished:  # else the folder is as it was
            _write_pages(out)
        raise
    console.print(_table(lines, folder, config.window))
    _write_pages(out)
    if names and data is None:
        console.print("Further suites read files: `holdall eval --dry-run` lists them.", soft_wrap=True)
    elif lacking and not names:
        console.print(f"Not all suites were asked: {_missing(lacking, data)}.", soft_wrap=True)
    return 0


def _write_pages(out: Path) -> None:
    """The page, picture and table of what is finished, if anything is."""
    for path in pages.write(out) if (out / "results.jsonl").exists() else []:
        console.print(f"  {path}", soft_wrap=True)


def _opened(name: str, loading: Loading) -> Subject:
    """A model to evaluate, and what is to be known of how it is run."""
    one = open_model(
        name, device=resolve_device(loading.device), dtype=loading.precision, checkpoint=loading.checkpoint
    )
    if one.note:
        console.print(one.note, soft_wrap=True)
    return one


def _suites(names: Sequence[str], plan: Plan) -> list[str]:
    """The suites that tasks are of, in their order."""
    return list(dict.fromkeys(suites.suite_of(task.name) for task in plan.tasks))


def _missing(lacking: Sequence[suites.Task], data: Path | None) -> str:
    """Which files tasks lack, in which folder, and where it is written what they hold."""
    names = list(dict.fromkeys(f"{task.file}{documents.ENDINGS[0]}" for task in lacking))
    pages = {"docs/general-tasks.md" if task.name in general.FORMS else "docs/evals.md" for task in lacking}
    are = "files are" if len(names) > 1 else "a file is"
    return (
        f"{are} missing {documents.place(data)}: {', '.join(names)} (or {', '.join(documents.ENDINGS[1:])}); "
        f"for where to get them and what a line holds see {' and '.join(sorted(pages))}"
    )


# ------------------------------------------------------------------------------------------------- shown


def _planned(one: Subject, plan: Plan) -> Table:
    """What a model would be asked. Raises ValueError if the window is too small."""
    plan.check_window(one.codec)
    table = Table(box=box.SIMPLE_HEAD, title=f"{one.name}: {one.tokenizer} tokens", title_justify="left")
    table.add_column("task")
    for head in ("questions", "cut to the window", "tokens each", "tokens"):
        table.add_column(head, justify="right")
    codec = Remembered(one.codec)
    for task in plan.tasks:
        if task in plan.missing():
            table.add_row(task.name, "file missing", "", "", "")
            continue
        config = plan.config
        rows = list(
            harness.rows(
                task, codec, data=plan.data, window=config.window, seed=config.seed, limit=config.limit
            )
        )
        tokens = sum(row.tokens for row in rows)
        cut = sum(row.truncated for row in rows)
        each = tokens // max(len(rows), 1)
        table.add_row(task.name, f"{len(rows):,}", f"{cut:,}", f"{each:,}", f"{tokens:,}")
    for name in plan.others:
        table.add_row(name, "as lm-eval has them", "", "", "")
    return table


def _table(lines: Sequence[Result], folder: ResultsFolder, window: int) -> Table:
    """A row for each task and model: the score read once and twice, with 95% intervals, beside the state that
    is carried after the window's tokens."""
    about = folder.models()
    twice = any(line.reads == 2 for line in lines)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("task", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=10)
    units = {suites.unit_text(line.unit, line.metric) for line in lines}
    shared = f", {min(units)}" if len(units) == 1 else ""
    heads = [name + shared for name in (("once", "twice") if twice else ("score",))]
    for head in ("state", *heads, "asked"):
        table.add_column(head, justify="right", no_wrap=True)
    # one file is asked in two ways, as recall and as answers, whose metrics differ
    pairs: dict[tuple[str, str, str], dict[int, Result]] = {}
    order = list(dict.fromkeys((one.metric, one.of) for one in lines))
    for line in sorted(lines, key=lambda line: order.index((line.metric, line.of))):
        pairs.setdefault((line.of, line.metric, line.model), {})[line.reads or 1] = line
    for (task, _, model), by_reads in pairs.items():
        state = about.get(model, {}).get("state_bytes", {}).get(str(window))
        some = next(iter(by_reads.values()))
        kind = some.metric if some.metric != "contains" else "" if shared else "%"
        name = f"{task} ({kind})" if kind else task
        scores = [_score(by_reads.get(reads)) for reads in ((1, 2) if twice else (1,))]
        size = "" if state is None else bytes_text(state)
        table.add_row(name, model, size, *scores, f"{some.count:,}")
    return table


def _score(line: Result | None) -> str:
    """A score with its interval where it has one, a share in percent; empty if there is none."""
    if line is None:
        return ""
    share = line.unit == "share"
    if line.low is None or line.high is None:
        return f"{100 * line.value:.1f}" if share else f"{line.value:.4g}"
    times, digits = (100, 1) if share else (1, 2 if line.high < 10 else 1)
    value, low, high = (f"{times * number:.{digits}f}" for number in (line.value, line.low, line.high))
    return f"{value} [{low},{high}]"


class _View:
    """A progress bar of the task that is asked; if there is no terminal, a line now and then."""

    def __init__(self) -> None:
        self.bars = Progress(
            Words("{task.description}"), BarColumn(), Words("{task.completed} of {task.total} answers"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.name, self.title, self.reported = "", "", time.monotonic()
        self.finished = 0  # tasks

    def __enter__(self) -> _View:
        self.bars.start()
        self.bar = self.bars.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def model(self, name: str) -> None:
        self.name = name

    def task(self, name: str) -> None:
        self.title = f"{self.name}, {name}"
        self.bars.reset(self.bar, total=None, description=f"{self.title}: reading documents")

    def answers(self, done: int, total: int) -> None:
        self.bars.update(self.bar, description=self.title, completed=done, total=total)
        if not console.is_terminal and time.monotonic() - self.reported > TELL_SECONDS:
            self.reported = time.monotonic()
            console.print(f"{self.title}: {done} of {total} answers", soft_wrap=True)

    def result(self, line: Result) -> None:
        """A line for each task that is finished, so that a long run can be followed."""
        self.finished += 1
        unit = suites.unit_text(line.unit, line.metric)
        console.print(
            f"{line.model}, {line.task}: {_score(line)} {unit}, {line.count:,} questions, "
            f"{line.seconds:.0f} s",
            soft_wrap=True,
        )
