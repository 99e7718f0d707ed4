"""`holdall theory primitives`, `circuit` and `sort`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from holdall import mixers
from holdall.commands import busy, console, typed_command
from holdall.contract import did_you_mean
from holdall.files import RunError
from holdall.report import circuits
from holdall.report import primitives as picture
from holdall.theory.circuits import Circuit
from holdall.theory.compile import Compiled, compile_circuit, compile_formula, read_twice
from holdall.theory.primitives import examples
from holdall.theory.sorting import Recall, all_pairs, by_sorting, wrong_rows


def primitives(out: Path, dark: bool) -> int:
    """The command `holdall theory primitives`."""
    table = Table("primitive", "computes", "weights", "kernel", box=box.SIMPLE_HEAD, padding=(0, 1))
    for example in examples():
        layer = example.layer
        table.add_row(example.name, example.says, str(layer.nonzeros), str(layer.kernel))
    console.print(table)
    console.print(f"  {picture.write(out, dark=dark, command=typed_command())}", soft_wrap=True)
    return 0


def circuit(
    function: str,
    inputs: int,
    channels: int,
    low: int,
    high: int,
    compiler: str,
    rows: int,
    seed: int,
    show: int,
    out: Path | None,
) -> int:
    """The command `holdall theory circuit`; returns 1 if an output differs."""
    traced = _traced(function, inputs, channels, low, high)
    formula = compiler == "formula" or (compiler == "auto" and not read_twice(traced))
    compiled = compile_formula(traced) if formula else compile_circuit(traced)
    with busy() as say:
        error = compiled.error(compiled.draw(rows, seed), _layers(say, compiled))

    first = traced.n * traced.d
    for wire in range(first, first + min(show, len(traced.gates))):
        console.print(f"  {traced.describe(wire)}", soft_wrap=True)
    if len(traced.gates) > show > 0:
        console.print(f"  ... {len(traced.gates) - show} more (--show)")
    report, depth = compiled.report(), traced.depth
    promise = f"depth + 2 = {depth} + 2" if formula else f"2 depth + 3 = 2 x {depth} + 3"
    registers = report.width_promised - traced.d
    table = Table(box=box.SIMPLE_HEAD, show_header=False, padding=(0, 1))
    for name, value, note in (
        ("products", report.size, f"of {inputs} x {channels} inputs from {low} to {high}"),
        ("depth", depth, "products on the longest path"),
        ("layers", report.layers, f"promised: {promise} = {report.layers_promised}"),
        (
            "width",
            report.width,
            f"promised: {traced.d} of the input + {registers} registers",
        ),
        ("weights that are not zero", report.nonzeros, f"of {report.parameters:,} parameters"),
        ("largest error", error, f"of {rows:,} random rows, in fp64, against Python's integers"),
    ):
        table.add_row(name, f"{value:,}", note)
    console.print(table)
    if out is not None:
        what = f"{function}, a {'formula' if formula else 'circuit'} as layers of BaseConv"
        console.print(f"  {circuits.write(out, compiled, what, command=typed_command())}", soft_wrap=True)
    return 1 if error else 0


def _traced(function: str, inputs: int, channels: int, low: int, high: int) -> Circuit:
    """The circuit of a function in a user's file. Raises RunError with the line of an error in it."""
    name, colon, called = function.rpartition(":")
    if not colon or not name or not called:
        raise ValueError(f"{function!r} names no function: write it as my.py:f")
    file = Path(name)
    module = mixers.run_file(file)
    if not callable(found := getattr(module, called, None)):
        own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"{file} has no function '{called}'. {did_you_mean(called, own)}")
    symbols = Circuit.inputs(inputs, channels, low=low, high=high)
    try:
        return Circuit.of(found(symbols))
    except Exception as error:
        raise RunError(*mixers.failure(file, error)) from error


def sort(pairs: Sequence[int], rows: int, run: bool, seed: int) -> int:
    """The command `holdall theory sort`; returns 1 if an answer is wrong."""
    table = Table(
        *("pairs", "circuit"), box=box.SIMPLE_HEAD, padding=(0, 1), caption_justify="left",
        caption=f"Wrong: rows of {rows:,} with a wrong answer, of the circuit in integers"
        + " and of its layers of BaseConv in fp64." * run,
    )  # fmt: skip
    for column in ("products", "depth", *(("layers", "width", "non-zeros") if run else ()), "wrong"):
        table.add_column(column, justify="right")
    failures = 0
    with busy() as say:
        for count in pairs:
            bits = (2 * count - 1).bit_length()
            recall = Recall(pairs=count, questions=count, key_bits=bits, value_bits=bits)
            x_BND, answers_BM = recall.rows(rows, seed)
            for name, make in (("all pairs", all_pairs), ("by sorting", by_sorting)):
                say(f"{count} pairs, {name}: writing the circuit")
                made = make(recall)
                say(f"{count} pairs, {name}: {made.size:,} products, evaluating")
                wrong = [wrong_rows(made, x_BND, answers_BM)]
                sizes: list[str] = []
                if run:
                    compiled = compile_circuit(made)
                    report = compiled.report()
                    sizes = [f"{value:,}" for value in (report.layers, report.width, report.nonzeros)]
                    y_BM = compiled.run(x_BND, _layers(say, compiled, f"{count} pairs, {name}: "))
                    wrong.append(int((y_BM != answers_BM).any(dim=1).sum()))
                failures += sum(wrong)
                table.add_row(
                    str(count), name, f"{made.size:,}", str(made.depth), *sizes, ", ".join(map(str, wrong))
                )
    console.print(table)
    return 1 if failures else 0


def _layers(say: Callable[[str], None], compiled: Compiled, what: str = "") -> Callable[[int], Any]:
    """Reports which layer runs."""
    return lambda done: say(f"{what}layer {done} of {len(compiled.stack.layers)}")
