"""`holdall zoo` and `holdall soundness`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from holdall import files, mixers
from holdall.analysis.soundness import LENGTHS, drift, length_for
from holdall.commands import busy, console
from holdall.contract import Entry, bytes_per_row
from holdall.model import ModelConfig
from holdall.report import zoo as zoo_pages
from holdall.report.style import bytes_text


def zoo(name: str | None, width: int, context: int, load: Sequence[Path]) -> int:
    """The command `holdall zoo`."""
    for file in load:
        mixers.load(file)
    if name is not None:
        entry = mixers.entry(name)
        console.print(str(entry), soft_wrap=True)
        console.print(_carried(entry, width, context), soft_wrap=True)
        return 0
    not_causal = [name for name in mixers.names() if not mixers.entry(name).causal]
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        caption=f"State: elements per row and layer, and their bytes, counted after N = {context} tokens at "
        f"width D = {width} with bf16 activations. A wider terminal also shows papers and the costs of N "
        "tokens at once and of one more. `holdall zoo NAME` explains the letters and lists paper and "
        f"options. Not causal: {', '.join(not_causal)}.",
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
        table.add_row(Text(family, "bold"))
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
    for file in load:
        mixers.load(file)
    console.print(f"  {zoo_pages.write(results, page)}", soft_wrap=True)
    return 0


def soundness(names: Sequence[str], out: Path, width: int, length: int | None, load: Sequence[Path]) -> int:
    """The command `holdall soundness`."""
    path = out / "soundness.jsonl"
    lines: list[dict[str, Any]] = []
    for file in load:
        mixers.load(file)
    configs = [(spec, mixers.configured(spec, width)[1]) for spec in names or mixers.names()]
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    done = {
        (line["mixer"], line["dtype"], line["width"], line["length"]): line for line in files.read_lines(path)
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("mixer")
    for column in ("dtype", "tokens", "error", "late", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = (
        "Error: largest difference from fp64, relative to the largest output; late: over the last tenth of "
        "the tokens."
    )
    table.caption_justify = "left"
    with busy() as say:
        for label, config in configs:
            for dtype in LENGTHS:
                name = str(dtype).removeprefix("torch.")
                say(f"{label}, {name} ({len(lines) + 1} of {len(LENGTHS) * len(configs)})")
                line = done.get((label, name, width, length_for(config, dtype, length)))
                if line is None:
                    measured = drift(config, dtype, length=length)
                    line = {"mixer": label, "dtype": name, "width": width, **dataclasses.asdict(measured)}
                    files.append_line(path, line)
                lines.append(line)
                table.add_row(
                    label, name, f"{line['length']:,}", f"{line['error']:.1e}", f"{line['last']:.1e}",
                    f"{line['seconds']:.1f}",
                )  # fmt: skip
    console.print(table)
    console.print(f"  {path}", soft_wrap=True)
    unsound = [line["mixer"] for line in lines if not math.isfinite(line["error"])]
    if unsound:
        console.print(f"NaN or infinite: {', '.join(unsound)}", soft_wrap=True)
    return 1 if unsound else 0


def _state_bytes(entry: Entry, width: int, context: int) -> int:
    """Bytes of one row of a mixer's state."""
    return bytes_per_row(_state(entry, width, context))


def _state(entry: Entry, width: int, context: int) -> Any:
    """A mixer's state of one row in bf16 after really reading that many tokens, as a model's only layer."""
    longest = entry.options.get("max_length", context)
    config = entry.configure(width=width, **({"max_length": context} if longest < context else {}))
    model = ModelConfig(vocab=2, width=width, layers=(config,)).build().bfloat16()
    with torch.no_grad():
        _, states = model.hidden(torch.zeros(1, context, dtype=torch.long))
    assert states is not None
    return states[0]


def _carried(entry: Entry, width: int, context: int) -> str:
    """What one row of a mixer with its default options carries, tensor by tensor."""
    state = _state(entry, width, context)
    lines = [
        f"  state of one row after {context} tokens at width {width}, bf16 activations: "
        f"{bytes_text(bytes_per_row(state))}"
    ]
    for name, tensor in state._asdict().items():
        sizes = " x ".join(map(str, tensor.shape[1:])) or "1"
        lines.append(f"    {name}: {sizes}, {str(tensor.dtype).removeprefix('torch.')}")
    return "\n".join(lines)
