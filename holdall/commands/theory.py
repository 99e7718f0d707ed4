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
from holdall.commands.loading import Loading
from holdall.settings import NonNegativeInt, PositiveInt, Range, Seed

app = tyro.extras.SubcommandApp()
AS_IT_IS = Loading()
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
    device: Literal["auto", "cpu", "cuda"] = "cpu",
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
        device: where to run; auto takes a GPU if there is one, and there its kernels.
    """
    from holdall.commands import theory_by_hand as shown

    return shown.mqar(names, vocab, length, pairs, rows, seed, precision, device)


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


# ------------------------------------------------------------------------------------- messages and floors


@command
def message(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")] = (
        "by-hand:attention",
        "by-hand:taylor",
        "by-hand:linear-attention",
    ),
    *,
    pairs: PositiveInt = 8,
    vocab: Annotated[int | None, Range(least=4)] = None,
    rows: PositiveInt = 32,
    format: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    width: PositiveInt = 64,
    depth: PositiveInt = 2,
    seed: Seed = 0,
    out: Path | None = None,
    loading: Annotated[Loading, tyro.conf.arg(name="")] = AS_IT_IS,
) -> int:
    """Send what a model has read as a message of bytes, and count the bits that a receiver gets out of it.

    The model reads key-value pairs; its states, in each format, are all that a copy of it has to answer every
    key from. No model conveys more bits than it sends.

    Args:
        models: folders written by `holdall frontier`, all of whose trained models are sent; models built by
            hand (`holdall theory list`), as by-hand:NAME or by-hand:NAME:option=value; registered mixers, as
            NAME or NAME:option=value, in a model with random weights, which says next to nothing; or language
            models, as `holdall generate` takes them.
        pairs: key-value pairs of a row, each of which is asked for.
        vocab: tokens of the rows, half of them values; by default those that a model was trained on, 64 for
            models by hand and random weights.
        rows: fresh rows to send.
        format: fp32, bf16, fp16, fp8, int8, int4, int2 or int1, perhaps with +stochastic or +feedback
            (repeatable); by default fp32, bf16, int8, int4, int2 and int1.
        width: width of a mixer's model.
        depth: layers of a mixer's model.
        seed: of the rows and of stochastic rounding.
        out: a picture of bits conveyed against bits sent; the numbers are written beside it, as JSON.
        loading: The fields of Loading.
    """
    from holdall.commands import theory_messages as shown

    return shown.message(models, pairs, vocab, rows, format, width, depth, seed, out, loading)


@command
def index(
    *,
    bits: PositiveInt = 1024,
    features: tuple[PositiveInt, ...] = (64, 256, 1024, 4096),
    one_hot: bool = False,
    rows: PositiveInt = 4,
    format: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    seed: Seed = 0,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    out: Path | None = None,
) -> int:
    """Hold fair bits in a linear attention whose weights are set by hand, and compare with the prediction.

    Args:
        bits: bits to hold, any of which may be asked for.
        features: elements of the state, one number or several.
        one_hot: one feature for each bit, in place of random features.
        rows: rows of so many bits.
        format: what the state is sent in, as in `holdall theory message` (repeatable); by default fp32, and
            int1 for --one-hot. With int1, odd numbers of bits and features leave no ties.
        seed: of rows and features.
        device: where to run; auto takes a GPU if there is one, and there its kernels.
        out: a picture of bits conveyed against bits sent; the numbers are written beside it, as JSON.
    """
    from holdall.commands import theory_messages as shown

    return shown.index(bits, features, one_hot, rows, format, seed, device, out)


@command
def disjointness(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")] = (),
    *,
    first: PositiveInt = 4,
    second: PositiveInt = 64,
    reads: PositiveInt = 2,
    distribution: Literal["blocked", "random"] = "blocked",
    vocab: PositiveInt | None = None,
    features: NonNegativeInt = 48,
    rows: PositiveInt = 64,
    format: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    seed: Seed = 0,
    out: Path | None = None,
    loading: Annotated[Loading, tyro.conf.arg(name="")] = AS_IT_IS,
) -> int:
    """Find the common element of two sets in turns: both orders, up to so many reads, a message at each turn.

    Args:
        models: folders written by `holdall frontier`, whose models were trained on set disjointness; by
            default a model by hand.
        first: elements of the one set.
        second: elements of the other.
        reads: the most reads.
        distribution: random sets, as published; or blocked ones, on which the bound on one read holds.
        vocab: tokens of the vocabulary; by default as few as the sets need, or 1024 for random sets.
        features: random features of the model by hand; 0 for one-hot ones, which make no errors.
        rows: fresh rows.
        format: what states are sent in (repeatable); by default fp32 and int4.
        seed: of the rows and of stochastic rounding.
        out: the numbers, as JSON.
        loading: The fields of Loading.
    """
    from holdall.commands import theory_messages as shown

    sizes = (first, second)
    return shown.disjointness(
        models, sizes, reads, distribution, vocab, features, rows, format, seed, out, loading
    )


@command
def floors(
    *,
    vocab: Annotated[int, Range(least=4)] = 8192,
    length: PositiveInt = 1024,
    pairs: PositiveInt = 64,
    accuracy: Annotated[float, Range(above=0, most=1)] = 1.0,
    digits: PositiveInt = 2,
    width: NonNegativeInt = 0,
    first: PositiveInt = 16,
    second: PositiveInt = 768,
    reads: PositiveInt = 2,
) -> int:
    """List the least state and the fewest layers with which a task can be done, and which of them bite.

    Args:
        vocab: tokens of the vocabulary; half of them are values.
        length: tokens of a row.
        pairs: key-value pairs of a row, each of which is asked for.
        accuracy: the accuracy wanted.
        digits: one-hot digits of a token.
        width: numbers that a token is given as, for the floor of any code; 0 for log2 of the vocabulary.
        first: elements of the set that is read first.
        second: elements of the other set.
        reads: how often both sets are read.
    """
    from holdall.commands import theory_messages as shown

    return shown.floors(
        vocab=vocab, length=length, pairs=pairs, accuracy=accuracy, digits=digits, width=width, first=first,
        second=second, reads=reads,
    )  # fmt: skip


@command
def complexity(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MIXER ...]")] = (),
    *,
    lengths: tuple[PositiveInt, ...] = (),
    width: PositiveInt = 32,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    time: bool = True,
    out: Path = Path("runs/complexity"),
) -> int:
    """Measure what every mixer costs as contexts grow, and fit exponents beside what is promised.

    Counts the operations, the longest chain of them and the memory of reading N tokens, with and without
    gradients, and of one more token; measures seconds; and shows softmax attention whole and in blocks. Stop
    it at any time; the same command resumes.

    Args:
        names: registered mixers, or "attention, whole", "attention, in blocks" and "attention, PyTorch's"; by
            default all.
        lengths: numbers of tokens, each as many times the one before; 1024, 4096 and 16384 by default.
        width: width of the mixers.
        device: a CPU counts; on a GPU memory and seconds are measured, and kernels run, in bf16.
        time: measure seconds too, which say something only on an idle machine.
        out: the folder for the measurements, the table and the picture.
    """
    from holdall.commands import theory_complexity as shown

    return shown.complexity(names, lengths, width, device, time, out)
