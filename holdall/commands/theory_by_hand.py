"""`holdall theory list`, `mqar`, `frontier` and `page`: models built by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from holdall import files
from holdall import report as reports
from holdall.commands import Words, console, resolve_device
from holdall.report import theory as pages
from holdall.report.style import bytes_text
from holdall.settings import field_docs
from holdall.sweeps import by_hand as points
from holdall.tasks.mqar import MQAR
from holdall.theory import by_hand

COUNTS = ("layers", "width", "params", "non-zero", "state", "used")
NOTES = (
    "params: of embedding, layers and head. non-zero: weights of the layers. state: elements of a row's "
    "state, counted; used: those that carry something."
)


def show(vocab: int, length: int) -> int:
    """The command `holdall theory list`."""
    for name, construction in by_hand.constructions().items():
        console.print(Text(name, "bold"))
        console.print(f"  {construction.claim}")
        try:
            report = construction(vocab=vocab, length=length).build().report()
            says = (
                f"at vocab {vocab:,} and length {length:,}: {report.layers} layers of width "
                f"{report.width:,}, {report.state_elements:,} elements of state, {report.used_state:,} used"
            )
        except ValueError as error:
            says = f"not at vocab {vocab:,} and length {length:,}: {error}"
        console.print(f"  {says}", style="dim")
        docs = field_docs(construction)
        for field in dataclasses.fields(construction):
            if field.name not in ("vocab", "length"):
                words = " ".join(docs[field.name].split())
                console.print(f"    {field.name} = {field.default}: {words}", style="dim")
    console.print("holdall theory mqar NAME runs one; holdall theory page explains three of them.")
    return 0


def mqar(
    names: Sequence[str],
    vocab: int,
    length: int,
    pairs: int,
    rows: int,
    seed: int,
    precision: str,
    device: str,
) -> int:
    """The command `holdall theory mqar`."""
    task = MQAR(vocab=vocab, length=length, pairs=pairs, filler="key-free")
    wanted = {name: by_hand.configured(name, vocab=vocab, length=length) for name in names}
    device = resolve_device(device)
    refused = {}
    for name in () if names else by_hand.constructions():
        try:
            wanted[name] = by_hand.configured(name, vocab=vocab, length=length)
        except ValueError as error:
            refused[name] = str(error)
    batch = task.generate(rows, seed=seed)
    says = (
        f"{rows:,} rows of {length:,} tokens with {pairs:,} pairs, vocab {vocab:,}; {precision}, no training"
    )
    table = Table(title=says, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for column in (*COUNTS, "recall"):
        table.add_column(column, justify="right", no_wrap=True)
    remarks = []
    with _bars() as bars:
        for name, config in wanted.items():
            at = bars.add_task(name, total=rows)

            def done(count: int, _: int, at: TaskID = at) -> None:
                bars.update(at, completed=count)

            model = config.build(getattr(torch, precision.replace("fp", "float"))).to(device)
            right_BK = by_hand.right(model, batch, done)
            bars.remove_task(at)
            report, accuracy = model.report(), float(right_BK.double().mean())
            counts = [report.layers, report.width, report.parameters, report.non_zeros]
            counts += [report.state_elements, report.used_state]
            table.add_row(name, *(f"{count:,}" for count in counts), Text(f"{accuracy:.2%}", "bold"))
            remarks.append(f"{name}: {config.remark(batch, right_BK)}")
    console.print(table)
    console.print(NOTES, style="dim")
    for remark in (*remarks, *(f"{name}: not built: {why}" for name, why in refused.items())):
        console.print(remark, soft_wrap=True)
    return 0


def frontier(folder: Path) -> int:
    """The command `holdall theory frontier`."""
    try:
        add_to(folder)
    except KeyboardInterrupt:
        console.print(
            f"Stopped. Everything so far is in {folder}; the same command resumes it.", soft_wrap=True
        )
        return 130
    for path in reports.write([folder], folder):
        console.print(f"  {path}", soft_wrap=True)
    return 0


def add_to(folder: Path) -> None:
    """Evaluate the constructions on a sweep's test rows, into its folder, and print their table."""
    if not (folder / "config.json").exists():
        raise files.RunError(
            f"{folder} is no sweep folder; name one made by holdall frontier, or make it with "
            f"holdall frontier quick --by-hand --out {folder}"
        )
    table = Table(title="recall by hand, not trained", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for column in ("width", "state", "recall"):
        table.add_column(column, justify="right", no_wrap=True)
    with _bars() as bars:
        at = bars.add_task("", total=None)
        lines: list[dict[str, Any]] = []
        refused = points.add(
            folder,
            lambda label, done, total: bars.update(at, description=label, completed=done, total=total),
            lines.append,
        )
    for line in sorted(lines, key=lambda line: line["state_bytes"]):
        state, recall = bytes_text(line["state_bytes"]), Text(f"{line['accuracy']:.1%}", "bold")
        table.add_row(line["label"], f"{line['width']:,}", state, recall)
    console.print(table)
    for label, why in refused.items():
        console.print(f"{label}: not built: {why}", soft_wrap=True)


def page(out: Path) -> int:
    """The command `holdall theory page`."""
    files.make_folder(out.parent)
    with files.replacing(out) as unfinished:
        pages.save(unfinished)
    console.print(f"  {out}", soft_wrap=True)
    return 0


def _bars() -> Progress:
    return Progress(
        Words("{task.description}", justify="right"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
