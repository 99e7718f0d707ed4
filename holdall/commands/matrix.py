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
    """The command `holdall matrix`; returns 1 if some mixer has no matrix, after computing all others."""
    specs = dict.fromkeys(names)
    for file in load:
        mixers.load(file)
    for spec in specs:  # check the user's input before computing anything
        mixers.configured(spec, width)
    settings: dict[str, Any] = {"length": length, "kind": input, "scale": scale, "seed": seed, "shown": heads}
    computed: list[gallery.MixingMatrix] = []
    failures: dict[str, str] = {}
    specs = specs or dict.fromkeys(name for members in mixers.families().values() for name in members)
    with busy() as say:
        for spec in specs:
            say(f"{spec} ({len(computed) + len(failures) + 1} of {len(specs)})")
            try:
                label, config = mixers.configured(spec, width)
                computed.append(matrix_of(config, label=label, jacobian=jacobian, **settings))
            except Exception as error:  # an error of one mixer does not stop the others; it is printed below
                failures[spec] = f"{type(error).__name__}: {error}".partition("\n")[0]
    kind = {
        "random": "random input",
        "repeats": "associative recall from few tokens",
        "constant": "one token repeated",
    }
    result = gallery.Gallery(
        command=command,
        length=length,
        width=width,
        input=f"{kind[input]}, scale {scale:g}",
        tokens=inputs(input, length, width, seed=seed).names,
        matrices=tuple(computed),
        failures=failures,
        environment=environment.describe("cpu", torch.get_num_threads()),
    )
    if computed:
        console.print(_matrix_table(result))
    for label, reason in failures.items():
        console.print(f"{label} has no matrix: {reason}", soft_wrap=True)
    written = gallery.save(result, out)
    for path in (*(matrices.write(out, out, dark=dark) if computed else []), *written):
        console.print(f"  {path}", soft_wrap=True)
    return 1 if failures else 0


def _matrix_table(result: gallery.Gallery) -> Table:
    wide = console.width >= 100
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        caption="Rank: of the block M[N/2:, :N/2], by which the second half of the sequence depends on the "
        "first, out of the largest possible; in a recurrence all of it passes through the state. To 1%: the "
        "lowest rank within 1% of that block. Ranks are the largest of all heads or channels; a Jacobian's "
        "is of all state elements together."
        + " Small: entries below 1/1000 of the largest in their row."
        * wide,
        caption_justify="left",
    )
    table.add_column("mixer")
    for column in ("matrix", *(["of"] if wide else [])):
        table.add_column(column, no_wrap=True)
    for column in ("rank", "to 1%", "state", "Toeplitz", "causal", *(["small"] if wide else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for matrix in result.matrices:
        table.add_row(
            matrix.label,
            matrix.kind,
            *([matrix.source or "the whole mixer"] if wide else []),
            "-" if matrix.rank is None else f"{matrix.rank}/{matrix.full_rank}",
            "-" if matrix.rank_1 is None else str(matrix.rank_1),
            str(matrix.state),
            "yes" if matrix.is_toeplitz else f"{matrix.toeplitz:.0%} off",
            "yes" if matrix.causal else "no",
            *([f"{matrix.sparsity:.0%}"] if wide else []),
        )
    return table
