"""The command group `holdall theory`: one function per subcommand, with its arguments.

What a subcommand computes and prints is in a file of its own, `theory_<topic>.py`, imported when it runs, so
that help is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from holdall import flags
from holdall.settings import NonNegativeInt, PositiveInt, Range, Seed

app = tyro.extras.SubcommandApp()
ABOUT = "Theorems that run: circuits as BaseConv, models built by hand, messages, and lower bounds."


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Register a subcommand; its numbers must be in the ranges that its signature declares."""
    return app.command(flags.checked(function))


@command
def primitives(*, out: Path = Path("primitives.png"), dark: bool = False) -> int:
    """Draw what a layer of BaseConv can do by hand: shift, filter, write, multiply, and what each costs.

    Args:
        out: the picture.
        dark: draw on a dark background.
    """
    from holdall.commands import theory_circuits as shown

    return shown.primitives(out, dark)


@command
def circuit(
    function: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py:FUNCTION")],
    *,
    inputs: PositiveInt,
    channels: PositiveInt = 1,
    low: Annotated[int, Range()] = -8,
    high: Annotated[int, Range()] = 8,
    compiler: Literal["auto", "circuit", "formula"] = "auto",
    rows: PositiveInt = 200,
    seed: Seed = 0,
    show: NonNegativeInt = 8,
    out: Path | None = None,
) -> int:
    """Compile a Python function of integers into layers of BaseConv, run them, and compare with the function.

    The function takes a list of numbers (with --channels, a list of lists), and returns one or several. It
    may add, subtract, multiply and raise to powers; loops are unrolled. The layers run in fp64, and every
    output is compared with Python's integers; the exit status is 1 if one differs.

    Args:
        function: a Python file and a function in it, as my.py:f.
        inputs: tokens that the function takes.
        channels: numbers of a token.
        low: the least value of an input.
        high: the largest value of an input; bounds on all that is computed follow from these two.
        compiler: circuit takes any function, in 2 depth + 3 layers; formula takes one that reads everything
            once, in depth + 2; auto takes formula where it can.
        rows: random rows to compare.
        seed: of the rows.
        show: products and named forms to print.
        out: a picture of what each layer does to each channel.
    """
    from holdall.commands import theory_circuits as shown

    return shown.circuit(function, inputs, channels, low, high, compiler, rows, seed, show, out)


@command
def sort(
    *,
    pairs: tuple[PositiveInt, ...] = (2, 4, 8),
    rows: PositiveInt = 200,
    run: bool = True,
    seed: Seed = 0,
) -> int:
    """Compile associative recall, by sorting and by comparing all pairs; count products, layers and errors.

    A row has as many questions as pairs, and keys and values of log2(2 pairs) bits. The circuits are
    evaluated in integers; then they are compiled into layers of BaseConv, which run in fp64. The exit status
    is 1 if an answer is wrong.

    Args:
        pairs: pairs of a row, one number or several.
        rows: random rows to answer.
        run: compile and run the circuits; without, they are only evaluated. By sorting, 16 pairs take
            303 layers.
        seed: of the rows.
    """
    from holdall.commands import theory_circuits as shown

    return shown.sort(pairs, rows, run, seed)


# -------------------------------------------------------------------------------------- models built by hand


def _list(*, vocab: PositiveInt = 64, length: PositiveInt = 64) -> int:
    """List the models built by hand: what each theorem says, and its layers, width and state.

    Args:
        vocab: tokens of the vocabulary for which they are built.
        length: tokens of a row.
    """
    from holdall.commands import theory_by_hand as shown

    return shown.show(vocab, length)


app.command(name="list")(flags.checked(_list))


@command
def mqar(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    vocab: PositiveInt = 256,
    length: PositiveInt = 64,
    pairs: PositiveInt = 8,
    rows: PositiveInt = 64,
    seed: Seed = 0,
    precision: Literal["fp64", "fp32"] = "fp64",
) -> int:
    """Have models built by hand answer rows of MQAR: accuracy, width and state, without any training.

    Args:
        names: constructions (`holdall theory list`), each as NAME or NAME:option=value,option=value; by
            default all that can be built for these rows.
        vocab: tokens of the vocabulary.
        length: tokens of a row.
        pairs: key-value pairs of a row, each of which is asked for once.
        rows: how many rows.
        seed: of the rows.
        precision: of weights and activations.
    """
    from holdall.commands import theory_by_hand as shown

    return shown.mqar(names, vocab, length, pairs, rows, seed, precision)


@command
def frontier(folder: Annotated[Path, tyro.conf.Positional] = Path("runs/quick")) -> int:
    """Put models built by hand on the picture of a sweep: what training leaves on the table.

    They answer the sweep's own test rows. Stop it at any time; the same command resumes.

    Args:
        folder: a folder written by `holdall frontier`, of a recipe with MQAR.
    """
    from holdall.commands import theory_by_hand as shown

    return shown.frontier(folder)


@command
def page(*, out: Path = Path("theory.html")) -> int:
    """Write a page that steps through recall by hand, token by token: attention, a table, and shifts.

    Args:
        out: the page, which opens offline.
    """
    from holdall.commands import theory_by_hand as shown

    return shown.page(out)
