"""The command line: `holdall frontier`, `report`, `zoo`, `soundness`, `matrix`; `data`, `train`, `recall`.

Nothing heavy is imported before a command is known to be well-formed, so that help is instant.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from holdall import settings
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed

app = tyro.extras.SubcommandApp()


Yes = Annotated[
    bool | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=0,
        metavar="",
        instance_from_str=lambda words: True,
        is_instance=lambda value: value in (True, None),
        str_from_instance=lambda value: [],
    ),
]
"""A flag without a value beside a default that depends on the machine."""


def command(function: Callable[..., int]) -> Callable[..., int]:
    """A command whose numbers are those that its signature declares (holdall/settings.py)."""
    kinds = typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> int:
        given = inspect.signature(function).bind(*args, **options).arguments
        for name, value in given.items():
            settings.check(f"--{name.replace('_', '-')}", value, kinds[name])
        return function(*args, **options)

    return app.command(checked)


@command
def frontier(
    recipe: Annotated[str, tyro.conf.Positional] = "quick",
    *,
    out: Path | None = None,
    add: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    seeds: PositiveInt = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: PositiveInt | None = None,
    family: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    minutes: NonNegativeFloat | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    weights: bool = True,
) -> int:
    """Train the models of a recipe and show where each lands: recall against bytes of state.

    Stop it at any time; the same command goes on from where it was.

    Args:
        recipe: quick (a dozen models, minutes), zoology-figure2 or based-figure2 (as published).
        out: the folder that it leaves; runs/RECIPE by default.
        add: one more registered mixer for the quick recipe, as NAME or NAME:option=value,option=value.
        load: a mixer file of your own; every mixer that it registers joins the quick recipe.
        seeds: how many seeds for every learning rate; with more of them later the same folder goes on.
        device: where to train; auto takes a GPU if there is one.
        workers: runs that train at once; by default one per core, or per GPU.
        family: train only the models of this family now (repeatable).
        minutes: stop within so many; 75 is then the exit status, and the same command goes on. 0 only
            gathers what is finished, also what was trained elsewhere and copied into the folder's runs.
        precision: what training computes in, instead of what the recipe says.
        weights: keep the trained weights.
    """
    from holdall.commands import sweeps as shown

    return shown.frontier(
        recipe,
        out or Path("runs") / recipe,
        add,
        load,
        seeds,
        device,
        precision,
        command=_command(),
        workers=workers,
        families=family,
        minutes=minutes,
        keep_weights=weights,
    )


@command
def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    out: Path | None = None,
) -> int:
    """Remake figure, page and table of one or several sweeps, from their folders alone.

    Args:
        folders: folders that `holdall frontier` left, several are drawn over each other; or one that
            `holdall matrix` left.
        out: where picture and page go; the first folder by default.
    """
    from holdall.commands import sweeps as shown

    return shown.report(folders, out)


@command
def zoo(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    width: PositiveInt = 1024,
    context: PositiveInt = 2048,
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    results: Path | None = None,
    page: Path = Path("zoo.md"),
) -> int:
    """List every sequence mixer with its state and its costs; or describe one; or write the zoo's page.

    Args:
        name: a mixer to describe in full.
        width: model width at which the bytes of state are counted.
        context: tokens after which they are counted.
        load: a mixer file of your own to list too.
        results: a folder that `holdall frontier zoo` left: write the page of what all mixers reached there.
        page: where that page goes.
    """
    from holdall.commands import zoo as shown

    return shown.zoo(name, width, context, load) if results is None else shown.zoo_page(results, page, load)


@command
def soundness(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    out: Path = Path("runs/zoo"),
    width: PositiveInt = 64,
    length: PositiveInt | None = None,
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
) -> int:
    """Measure how far each mixer drifts from fp64: over 100,000 tokens in fp32, over 16,384 in bf16.

    Stop it at any time; the same command goes on from where it was.

    Args:
        names: mixers, each as NAME or NAME:option=value,option=value; by default all of them.
        out: the folder that gets soundness.jsonl.
        width: model width.
        length: tokens to read in either dtype, instead of those.
        load: a mixer file of your own; its mixers join.
    """
    from holdall.commands import zoo as shown

    return shown.soundness(names, out, width, length, load)


@command
def matrix(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    length: Annotated[int, Range(least=4)] = 64,
    width: PositiveInt = 32,
    input: Literal["random", "repeats", "constant"] = "random",
    scale: NonNegativeFloat = 2.0,
    heads: Annotated[int, Range(least=1, most=4)] = 1,
    jacobian: bool = False,
    seed: Seed = 0,
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    out: Path = Path("runs/matrix"),
    dark: bool = False,
) -> int:
    """Draw the matrix that each mixer applies along the sequence, all mixers side by side.

    Mixers are freshly initialised. Where a mixer is linear in its values the matrix is exact, and checked;
    else it is the norm of the whole mixer's Jacobian.

    Args:
        names: mixers, each as NAME or NAME:option=value,option=value; by default all of them.
        length: tokens, N.
        width: model width of mixers and input.
        input: random (all tokens unlike), repeats (a row of associative recall from few tokens: who looks at
            equal tokens?) or constant (one token again and again: what position alone does).
        scale: standard deviation of the input's numbers; larger ones make attention sharper.
        heads: heads or channels to show of each mixer, up to 4.
        jacobian: take the whole mixer's Jacobian even where the exact matrix is known.
        seed: of input and weights.
        load: a mixer file of your own; its mixers join.
        out: the folder that gets matrix.png, matrix.html, matrix.json and matrix.npz.
        dark: draw matrix.png on a dark ground.
    """
    from holdall.commands import matrix as shown

    return shown.matrix(
        names, length, width, input, scale, heads, jacobian, seed, load, out, dark, command=_command()
    )


@command
def data(
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    out: Path,
    tokenizer: str = "bytes",
    valid: Annotated[float, Range(least=0, below=1)] | Path = 0.01,
    text_field: str = "text",
    separator: str = "",
    strict: bool = False,
    workers: PositiveInt | None = None,
    check: bool = False,
) -> int:
    """Turn text into token shards that `holdall train --data` reads.

    Stop it at any time; the same command goes on from where it was.

    Args:
        sources: files and folders: plain text, or JSON lines (.jsonl, .ndjson, .json), also compressed (.xz,
            .gz, .zst).
        out: the folder that gets the shards.
        tokenizer: bytes (no file needed), gpt2, gpt-neox, or the path of a file of the tokenizers library.
        valid: the share of documents for validation, drawn by a hash of their text; or a file or folder that
            holds them.
        text_field: where JSON lines keep their text.
        separator: what parts the documents of a plain text file, for example "<|endoftext|>", with \\n for a
            new line; each file is one document by default.
        strict: end at bad UTF-8 and broken JSON, which are otherwise counted, reported and left out.
        workers: processes that encode; by default one per core.
        check: make nothing, but read all of `out` and compare it with the hashes in its manifest.
    """
    from holdall.commands import data as shown

    return shown.data(
        sources, out, tokenizer, valid, text_field, separator, strict, workers, check, command=_command()
    )


@command
def train(
    preset: Annotated[str, tyro.conf.Positional] = "based-mini",
    *,
    data: Path | None = None,
    out: Path | None = None,
    pattern: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    width: PositiveInt | None = None,
    depth: PositiveInt | None = None,
    mlp: NonNegativeInt | None = None,
    context: PositiveInt | None = None,
    batch: PositiveInt | None = None,
    micro_batch: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    learning_rate: PositiveFloat | None = None,
    warmup: NonNegativeInt | None = None,
    weight_decay: NonNegativeFloat | None = None,
    clip: NonNegativeFloat | None = None,
    seed: Seed = 0,
    precision: Literal["fp32", "bf16"] | None = None,
    compile: Yes = None,
    no_compile: tyro.conf.FlagCreatePairsOff[bool] = False,
    recompute: bool = False,
    in_order: bool = True,
    evaluate_every: PositiveInt | None = None,
    evaluate_rows: PositiveInt | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    devices: PositiveInt = 1,
    nodes: PositiveInt = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.UseAppendAction] = (),
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
) -> int:
    """Train a language model on text; with no arguments a small Based model on the text that comes along.

    Stop it at any time, or let it crash; the same command goes on from the last checkpoint, to the bit on the
    same device and count.

    Args:
        preset: based-mini (minutes on two cores), based-360m, based-1b, attention-360m, attention-1b,
            mamba-360m, mamba-1b, or FAMILY-15m and FAMILY-40m for 17 families (docs/training.md).
        data: a folder of token shards that `holdall data` left; by default the embedded text, as bytes.
        out: the run folder; runs/PRESET by default.
        pattern: instead of a preset, mixers that take turns (repeatable), each as NAME or
            NAME:option=value,option=value.
        width: of a pattern's model, 256 by default.
        depth: layers of a pattern's model; the pattern once, or 4, by default.
        mlp: inner width of the MLPs in a pattern's model, twice the width by default; 0 for none.
        context: tokens of a row.
        batch: rows of a step, over all devices.
        micro_batch: rows of one pass on one device; a step's passes add up.
        steps: training steps.
        learning_rate: its highest, after the warm-up; it ends at a tenth of it.
        warmup: steps over which it rises.
        weight_decay: of matrices and the embedding.
        clip: largest norm of a step's gradient; 0 for any.
        seed: of weights and order.
        precision: of a pass; by default bf16 on a GPU and fp32 on a CPU. Weights stay fp32.
        compile: blocks by torch.compile; by default on a GPU.
        no_compile: on a GPU too, run blocks as they are written.
        recompute: run each block twice and keep less (activation checkpointing).
        in_order: on a GPU, add in a fixed order, so that the same run gives the same bits; without it
            attention over long rows is faster.
        evaluate_every: steps between evaluations on the validation text.
        evaluate_rows: rows of an evaluation.
        device: where to train; auto takes a GPU if there is one.
        devices: how many of them on each node.
        nodes: machines; each starts the same command, by SLURM or with torchrun's environment variables, and
            sees the run folder.
        strategy: ddp has the whole model on each device, fsdp shares it out; auto is ddp.
        log: also to TensorBoard (in the run folder) or Weights & Biases.
        load: a mixer file of your own that the pattern uses.
    """
    from holdall.commands import train as shown

    if compile and no_compile:
        raise ValueError("--compile and --no-compile were both given")
    changes = {
        "context_len": context,
        "batch": batch,
        "micro_batch": micro_batch,
        "steps": steps,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "seed": seed,
        "precision": precision,
        "compile": False if no_compile else compile,
        "recompute": recompute,
        "evaluate_every": evaluate_every,
        "evaluate_rows": evaluate_rows,
    }
    shape = {"width": width, "depth": depth, "mlp": mlp}
    return shown.train(
        preset, data, out, pattern, shape, changes, device, devices, nodes, strategy, log, load, in_order
    )


@command
def recall(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    out: Path = Path("runs/recall"),
    which: Literal["best", "last", "model"] | None = None,
    rows: PositiveInt | None = None,
    context: PositiveInt | None = None,
    threshold: NonNegativeInt = 1250,
    passages: PositiveInt = 40,
    length: PositiveInt = 512,
    licence: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    dark: bool = False,
) -> int:
    """Show which tokens of real text language models recall: perplexity by slice; of two, a page of passages.

    Recall hits complete two tokens in a row that were there before in the same context and that are rare in
    training. What a model says is kept in its run folder. Stop it at any time; the same command goes on.

    Args:
        runs: folders that `holdall train` left, all on one corpus; gaps are those to the first.
        out: the folder that gets slices.json, recall.png, gaps.png, state.png and, of two runs, recall.html.
        which: the checkpoint; by default the end's, else the best, else the last.
        rows: windows of the validation text to score, spread evenly; by default all.
        context: tokens of a window; by default the shortest that one of the runs was trained on.
        threshold: a bigram that the training text has more often is no recall hit.
        passages: how many the page shows.
        length: tokens of each passage.
        licence: of the text, for the page, where the corpus does not say it.
        device: where to run the models; auto takes a GPU if there is one.
        load: a mixer file of your own that a run was trained with.
        dark: draw on a dark ground.
    """
    from holdall.commands import recall as shown

    return shown.recall(
        runs,
        out,
        which,
        rows,
        context,
        threshold,
        passages,
        length,
        licence,
        device,
        load,
        dark,
        command=_command(),
    )


def _command() -> str:
    return " ".join(["holdall", *sys.argv[1:]])


def main() -> None:
    """Run the command line. What a user can mend ends in one line and exit status 2 (holdall/errors.py)."""
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _run() -> Any:
    """The exit status."""
    from holdall import commands

    try:
        about = "Measure and train language models whose memory does not grow."
        return commands.guarded(lambda: app.cli(prog="holdall", description=about))
    except SystemExit as end:  # after help, or arguments that do not parse
        return end.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    main()
