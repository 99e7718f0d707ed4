"""`holdall matrix`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from holdall import environment, mixers
from holdall.analysis import gallery
from holdall.analysis.matrix import inputs, matrix_of
from holdall.commands import busy, console
from holdall.report import matrix as matrices


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
    for file in load:
        mixers.load(file)
    for each in wanted:  # what a user typed is checked before anything is computed
        mixers.configured(each, width)
    settings: dict[str, Any] = {"length": length, "kind": input, "scale": scale, "seed": seed, "shown": heads}
    found: list[gallery.MixingMatrix] = []
    failures: dict[str, str] = {}
    wanted = wanted or dict.fromkeys(name for members in mixers.families().values() for name in members)
    with busy() as say:
        for each in wanted:
            say(f"{each} ({len(found) + len(failures) + 1} of {len(wanted)})")
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
        environment=environment.describe("cpu", torch.get_num_threads()),
    )
    if found:
        console.print(_matrix_table(result))
    for label, reason in failures.items():
        console.print(f"{label} has no matrix: {reason}", soft_wrap=True)
    written = gallery.save(result, out)
    for path in (*(matrices.write(out, out, dark=dark) if found else []), *written):
        console.print(f"  {path}", soft_wrap=True)
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
