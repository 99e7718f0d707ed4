"""`holdall matrix`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from holdall import environment, mixers
from holdall.adapters import foreign
from holdall.analysis import gallery
from holdall.analysis.matrix import inputs, matrices_of_model, matrix_of
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
    model: str | None = None,
    layers: Sequence[int] = (),
    text: Path | None = None,
) -> int:
    """The command `holdall matrix`; returns 1 if some mixer has no matrix, after computing all others."""
    specs = dict.fromkeys(names)
    for file in load:
        mixers.load(file)
    if model is not None:
        if names or text is None:
            raise ValueError("--model draws the layers of a trained model for a text: give --text, no mixers")
        result = _of_model(model, layers, text, length, heads, jacobian, command)
        return _show(result, out, dark)
    if layers or text is not None:
        raise ValueError("--layer and --text are for the layers of a trained model: give --model")
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
    return _show(result, out, dark)


def _of_model(
    name: str, layers: Sequence[int], path: Path, length: int, heads: int, jacobian: bool, command: str
) -> gallery.Gallery:
    """The matrices of a trained model's layers, four spread evenly by default, for a text's beginning."""
    with busy(f"loading {name}"):
        model = foreign.load_any(name)
    count = len(model.config.layers)
    depths = list(layers) or sorted({round(i * (count - 1) / 3) for i in range(4)})
    if wrong := [depth for depth in depths if depth >= count]:
        raise ValueError(f"there is no layer {wrong[0]}: {name} has layers 0 to {count - 1}")
    ids = model.tokenizer.encode_batch([path.read_text("utf-8")])[0].tolist()
    ids = [model.tokenizer.begin, *ids][:length]
    if len(ids) < 4:
        raise ValueError(f"{path} has {len(ids) - 1} tokens; a matrix needs at least 3")
    with busy("computing matrices"):
        found = matrices_of_model(
            model.model, torch.tensor([ids]), depths, shown=heads, jacobian=jacobian
        )  # fmt: skip
    return gallery.Gallery(
        command=command,
        length=len(ids),
        width=model.config.width,
        input=f"the beginning of {path.name}, read by {name}",
        tokens=tuple(model.tokenizer.pieces(ids)),
        matrices=tuple(found),
        failures={},
        environment=environment.describe("cpu", torch.get_num_threads()),
    )


def _show(result: gallery.Gallery, out: Path, dark: bool) -> int:
    if result.matrices:
        console.print(_matrix_table(result))
    for label, reason in result.failures.items():
        console.print(f"{label} has no matrix: {reason}", soft_wrap=True)
    written = gallery.save(result, out)
    for path in (*(matrices.write(out, out, dark=dark) if result.matrices else []), *written):
        console.print(f"  {path}", soft_wrap=True)
    return 1 if result.failures else 0


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
