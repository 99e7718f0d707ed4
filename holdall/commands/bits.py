"""`holdall bits`: what a sweep's trained models recall from states in fewer bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from holdall import environment, files, mixers
from holdall import report as reports
from holdall.commands import busy, console, resolve_device
from holdall.contract import Format
from holdall.report import data
from holdall.report.style import state_text
from holdall.sweeps.bits import lines_in_formats

FORMATS = (
    *("fp32", "bf16", "fp16", "fp8", "int8", "int4"),
    *("int8+stochastic", "int4+stochastic", "int8+feedback", "int4+feedback"),
)
"""What is measured where the user names nothing."""
KEPT = ("context_len", "task", "difficulty", "test")
"""What the folder says of the test, as the sweep's own does."""
MEASURED = "measured.jsonl"
"""Each line as soon as it is measured, with what it is of, so that nothing is measured twice."""


def bits(
    folder: Path,
    out: Path,
    formats: Sequence[str],
    every: int,
    seed: int,
    device: str,
    load: Sequence[Path],
    *,
    command: str,
) -> int:
    """The command `holdall bits`; returns the exit status."""
    wanted = [Format.parse(text) for text in formats or FORMATS]
    for file in load:
        mixers.load(file)
    (sweep,), device = data.load([folder]), resolve_device(device)
    held = files.read_json(folder / "config.json", data.AGAIN)
    about = {"recipe": f"{sweep.name} in bits", "command": command, "axis": "bits"}
    widths = len({model.width for model in sweep.models}) > 1
    chosen = [
        (f"{model.label}, d = {model.width}" if widths else model.label, run.line)
        for model in sweep.models
        for run in model.best
    ]
    lines = []
    with files.locked(out), busy() as say:
        kept = files.read_lines(out / MEASURED)
        done = {_key(entry["of"]): entry["line"] for entry in kept if {"of", "line"} <= entry.keys()}
        for place, (name, line) in enumerate(chosen):
            how: dict[str, Any] = {"name": name, "every": every, "seed": seed, "device": device}
            # a run that was trained again has another line
            asked = {format: {**how, "format": str(format), "run": line} for format in wanted}
            left = [format for format, of in asked.items() if _key(of) not in done]
            for format, measured in zip(left, lines_in_formats(folder, line, left, **how), strict=True):
                files.append_line(out / MEASURED, {"of": asked[format], "line": measured})
                done[_key(asked[format])] = measured
                say(f"{measured['label']} ({place + 1} of {len(chosen)} models)")
            lines += [done[_key(of)] for of in asked.values()]
            if not console.is_terminal:
                last = state_text(data.AXES["bits"], 8 * lines[-1]["state_bytes"])
                console.print(f"[{place + 1}/{len(chosen)}] {name}: down to {last}", soft_wrap=True)
        files.write_json(out / "environment.json", environment.describe(device, 1))
        files.write_json(out / "config.json", {**about, **{key: held[key] for key in KEPT if key in held}})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write_atomically(out / "results.jsonl", text.encode())
    for rounding in dict.fromkeys(format.rounding for format in wanted):
        console.print(_table(rounding, lines))
    for path in reports.write([out], out):
        console.print(f"  {path}", soft_wrap=True)
    return 0


def _key(of: Mapping[str, Any]) -> str:
    return json.dumps(of, sort_keys=True)


def _table(rounding: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    """Recall of each model in each format that was rounded in one way; of several seeds, a row each."""
    scores: dict[tuple[str, int], dict[str, str]] = {}
    for line in lines:
        if (format := Format.parse(line["format"])).rounding == rounding:
            row = scores.setdefault((line["family"], line["seed"]), {})
            row[format.name] = f"{line['accuracy']:.1%}"
    names = dict.fromkeys(name for row in scores.values() for name in row)
    table = Table(title=f"recall, {rounding}", title_justify="left", box=box.SIMPLE)
    table.add_column("model", overflow="fold")  # numbers are never cut
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for (label, seed), row in scores.items():
        table.add_row(f"{label}, seed {seed}" if seed else label, *(row[name] for name in names))
    return table
