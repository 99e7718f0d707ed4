"""The command line: `holdall frontier`, `recipe`, `bits`, `report`, `zoo`, `laws`, `soundness`, `matrix`;
`data`, `train`, `generate`, `chat`, `serve`, `eval`, `convert`, `export`, `recall`, `suite`; `theory`.

Heavy modules are imported only after the arguments have been parsed, so that help is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from holdall import flags
from holdall.commands import theory, typed_command
from holdall.commands.loading import Loading
from holdall.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Range,
    Seed,
)
from holdall.training.options import PretrainOptions

app = tyro.extras.SubcommandApp()
Axis = Literal["bytes", "bits", "elements"]


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Register a command; its numbers must be in the ranges that its signature declares."""
    return app.command(flags.checked(function))


TrainFlags = flags.flags_of(
    PretrainOptions,
    leave_out=("data_hash",),
    called={"context_len": "context"},
    default="(the preset's, else {})",
)
NOT_GIVEN = TrainFlags()
AS_IT_IS = Loading()


@command
def frontier(
    recipe: Annotated[str, tyro.conf.Positional] = "quick",
    *,
    add: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    task: str | None = None,
    pairs: tuple[PositiveInt, ...] = (),
    length: tuple[PositiveInt, ...] = (),
    passes: PositiveInt | None = None,
    vocab: PositiveInt | None = None,
    width: tuple[PositiveInt, ...] = (),
    depth: PositiveInt | None = None,
    mlp: PositiveInt | None = None,
    steps: PositiveInt | None = None,
    rates: tuple[PositiveFloat, ...] = (),
    seeds: PositiveInt = 1,
    dry_run: bool = False,
    out: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: PositiveInt | None = None,
    family: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    minutes: NonNegativeFloat | None = None,
    precision: Precision | None = None,
    weights: bool = True,
    on: Literal["here", "ray"] = "here",
    axis: Axis | None = None,
    by_hand: bool = False,
) -> int:
    """Train the models of a recipe and plot their recall against their state size in bytes.

    Stop it at any time; the same command resumes. A mixer of your own, by --load or --add, is trained at the
    recipe's widths, depth, task and rates, and shown among models that are finished in the folder or were
    published with Holdall: only what is neither is trained.

    Args:
        recipe: quick (a dozen models, minutes), another name (`holdall recipe list`), or a Python file of
            your own (`holdall recipe new` writes one).
        add: one more registered mixer, as NAME or NAME:option=value,option=value.
        load: a mixer file of your own, whose mixers are added.
        task: the recipe's task: mqar, induction-heads or associative-recall for quick.
        pairs: key-value pairs of the rows, one number or several.
        length: tokens of the rows, one number for all or one for each number of pairs.
        passes: how often a row's pairs, or its two sets, are read before it is asked for them.
        vocab: tokens of the vocabulary.
        width: widths of the models.
        depth: layers of the models.
        mlp: width of an MLP in each layer, as a multiple of the model's width.
        steps: training steps.
        rates: learning rates to try; the best counts.
        seeds: seeds per learning rate; more can be added to the same folder later.
        dry_run: train nothing; print models, parameters, bytes of state, what is finished, and the time that
            the others would take.
        out: the folder for runs and results; by default runs/RECIPE.
        device: where to train; auto takes a GPU if there is one.
        workers: runs that are trained in parallel; by default one per core, or per GPU.
        family: train only the models of this family now.
        minutes: stop within this time, with exit status 75; the same command resumes. 0 only collects
            finished runs, also those that were trained elsewhere and copied into the folder's runs.
        precision: precision of training, instead of the recipe's.
        weights: save the trained weights.
        on: here; or ray, on all machines of a Ray cluster that see the folder. Without Ray, any number of
            these commands share a folder.
        axis: what the picture counts state in; bytes by default.
        by_hand: show models built by hand too, which need no training (`holdall theory list`); of MQAR.
    """
    from holdall.commands import sweeps as shown

    settings = {
        "task": task, "pairs": pairs, "length": length, "passes": passes, "vocab": vocab, "width": width,
        "depth": depth, "mlp": mlp, "steps": steps, "rates": rates,
    }  # fmt: skip
    return shown.frontier(
        recipe,
        out,
        add,
        load,
        seeds,
        {name: value for name, value in settings.items() if value},
        device,
        precision,
        dry_run,
        command=typed_command(),
        workers=workers,
        families=family,
        minutes=minutes,
        keep_weights=weights,
        on=on,
        axis=axis,
        by_hand=by_hand,
    )


@command
def recipe(
    action: Annotated[Literal["list", "new"], tyro.conf.Positional] = "list",
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = "my-recipe",
) -> int:
    """List the recipes of `holdall frontier`; or write a commented one of your own, which runs as it is.

    Args:
        action: list, or new.
        name: for new, the recipe's name; my-recipe is written to my_recipe.py.
    """
    from holdall.commands import recipe as shown

    return shown.new(name) if action == "new" else shown.show()


@command
def bits(
    folder: Annotated[Path, tyro.conf.Positional] = Path("runs/quick"),
    *,
    format: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    every: PositiveInt = 1,
    seed: Seed = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    out: Path | None = None,
) -> int:
    """Store the states of a sweep's trained models in fewer bits, and plot recall against bits of state.

    Nothing is trained. Each model, at its best learning rate, reads the sweep's test with its state rounded
    to a format after every token; scales and counters are counted too. Stop it at any time; the same command
    resumes.

    Args:
        folder: a folder written by `holdall frontier`, with the trained weights.
        format: fp32, bf16, fp16, fp8, int8, int4, int2 or int1, or one with +stochastic or +feedback, as
            int4+feedback (repeatable); by default the first six, and int8 and int4 rounded in each way.
        every: tokens that are read between one rounding of the state and the next.
        seed: of stochastic rounding.
        device: where to run; auto takes a GPU if there is one.
        load: a mixer file of your own that the sweep was trained with.
        out: the folder for figure, page and table; by default bits in the sweep's folder.
    """
    from holdall.commands import bits as shown

    return shown.bits(
        folder, out or folder / "bits", format, every, seed, device, load, command=typed_command()
    )


@command
def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    out: Path | None = None,
    axis: Axis | None = None,
    samples: PositiveInt | None = None,
) -> int:
    """Make figure, page and table of one or several sweeps again, from their folders alone.

    Args:
        folders: folders written by `holdall frontier`, several of which are drawn in one figure; or one
            written by `holdall matrix` or `holdall eval`.
        out: the folder for figure and page; by default the first folder.
        axis: what the picture counts state in; by default what the first folder's picture does.
        samples: of an evaluation, questions per task whose prompts and answers are on the page; by default
            the first 200.
    """
    from holdall.commands import sweeps as shown

    return shown.report(folders, out, axis, samples)


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
    """List all sequence mixers with state size and costs; or describe one; or write the zoo's page.

    Args:
        name: a mixer to describe in full, with all its options.
        width: model width at which bytes of state are counted.
        context: tokens after which bytes of state are counted.
        load: a mixer file of your own to include.
        results: a folder written by `holdall frontier zoo`: write the page with the results of all mixers.
        page: the file for that page.
    """
    from holdall.commands import zoo as shown

    return shown.zoo(name, width, context, load) if results is None else shown.zoo_page(results, page, load)


@command
def laws(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    json: bool = False,
) -> int:
    """Hold mixers to the laws: splits, causality, rows, states, gradients, dtypes, compilation; in words.

    The exit status is 1 if a law is broken. The same as tests, in more dtypes:
    pytest --pyargs holdall.testing.laws --load FILE

    Args:
        names: mixer files of your own, or names of registered mixers.
        json: print a list of verdicts as JSON instead.
    """
    from holdall.commands import laws as shown

    return shown.laws(names, json)


@command
def soundness(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    out: Path = Path("runs/zoo"),
    width: PositiveInt = 64,
    length: PositiveInt | None = None,
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
) -> int:
    """Measure each mixer's error relative to fp64: over 100,000 tokens in fp32, over 16,384 in bf16.

    Stop it at any time; the same command resumes.

    Args:
        names: mixers, each as NAME or NAME:option=value,option=value; by default all.
        out: the folder for soundness.jsonl.
        width: model width.
        length: tokens to read in both dtypes, instead of the defaults.
        load: a mixer file of your own, whose mixers are added.
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
    model: str | None = None,
    layer: Annotated[tuple[NonNegativeInt, ...], tyro.conf.UseAppendAction] = (),
    text: Path | None = None,
) -> int:
    """Draw the matrix that each mixer applies along the sequence, all mixers side by side.

    Mixers are freshly initialised; with --model they are the layers of a trained model that reads a text. If
    a mixer is linear in its values, its matrix is exact, and checked; otherwise the norms of the whole
    mixer's Jacobian are drawn.

    Args:
        names: mixers, each as NAME or NAME:option=value,option=value; by default all.
        length: number of tokens, N.
        width: model width of mixers and input.
        input: random (all tokens different), repeats (associative recall from few tokens: which mixers
            attend to equal tokens?) or constant (one token repeated: the effect of position alone).
        scale: standard deviation of the input; larger ones make attention sharper.
        heads: heads or channels to show of each mixer, up to 4.
        jacobian: compute the Jacobian even if a mixer has an exact matrix.
        seed: seed of input and weights.
        load: a mixer file of your own, whose mixers are added.
        out: the folder for matrix.png, matrix.html, matrix.json and matrix.npz.
        dark: draw matrix.png on a dark background.
        model: a trained model, in place of mixers: what `holdall generate` takes.
        layer: a layer of the model, from 0 (repeatable); by default four, evenly spread.
        text: a text file, whose first --length tokens the model reads.
    """
    from holdall.commands import matrix as shown

    return shown.matrix(
        names,
        length,
        width,
        input,
        scale,
        heads,
        jacobian,
        seed,
        load,
        out,
        dark,
        command=typed_command(),
        model=model,
        layers=layer,
        text=text,
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
    """Turn text into token shards for `holdall train --data`.

    Stop it at any time; the same command resumes.

    Args:
        sources: files and folders of plain text or JSON lines (.jsonl, .ndjson, .json), which may be
            compressed (.xz, .gz, .zst).
        out: the folder for the shards.
        tokenizer: bytes (no file needed), gpt2, gpt-neox, or the path of a file of the tokenizers library.
        valid: the share of documents for validation, chosen by a hash of their text; or a file or folder with
            the validation documents.
        text_field: the field of JSON lines that holds the text.
        separator: the string between the documents of a plain text file, for example "<|endoftext|>", with
            \\n for a newline; by default each file is one document.
        strict: stop at bad UTF-8 or broken JSON; by default such records are counted, reported and left out.
        workers: number of processes that encode; by default one per core.
        check: do not write; read all of `out` and compare it with the hashes in its manifest.
    """
    from holdall.commands import data as shown

    return shown.data(
        sources, out, tokenizer, valid, text_field, separator, strict, workers, check, command=typed_command()
    )


@command
def train(
    preset: Annotated[str, tyro.conf.Positional] = "based-mini",
    *,
    out: Path | None = None,
    pattern: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    width: PositiveInt | None = None,
    depth: PositiveInt | None = None,
    mlp: NonNegativeInt | None = None,
    options: Annotated[TrainFlags, tyro.conf.arg(name="")] = NOT_GIVEN,  # type: ignore[valid-type]
    in_order: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    devices: PositiveInt = 1,
    nodes: PositiveInt = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    log: Annotated[tuple[Literal["tensorboard", "wandb"], ...], tyro.conf.UseAppendAction] = (),
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
) -> int:
    """Train a language model on text; with no arguments a small Based model on the bundled text.

    Stop it at any time, or let it crash; the same command resumes from the last checkpoint, bit-exactly on
    the same device and number of devices.

    Args:
        preset: based-mini (minutes on two cores), based-360m, based-1b, jrt-360m, jrt-1b,
            attention-360m, attention-1b, mamba-360m, mamba-1b, or FAMILY-15m and FAMILY-40m for 19 families
            (docs/training.md).
        out: The run folder; runs/PRESET by default.
        pattern: Instead of a preset, mixers that take turns (repeatable), each as NAME or
            NAME:option=value,option=value.
        width: Width of a pattern's model, 256 by default.
        depth: Layers of a pattern's model; the pattern once, or 4, by default.
        mlp: Inner width of the MLPs in a pattern's model, twice the width by default; 0 for none.
        options: The fields of PretrainOptions.
        in_order: On a GPU, use deterministic reductions, so that a resumed run is bit-identical; without them
            attention over long rows is faster.
        device: Where to train; auto takes a GPU if there is one.
        devices: Devices on each node.
        nodes: Machines; each starts the same command, by SLURM or with torchrun's environment variables, and
            sees the run folder.
        strategy: ddp keeps the whole model on each device, fsdp shards it; auto is ddp.
        log: Log to TensorBoard (in the run folder) or Weights & Biases too (repeatable).
        load: A mixer file of your own that the pattern uses (repeatable).
    """
    from holdall.commands import train as shown

    shape = {"width": width, "depth": depth, "mlp": mlp}
    return shown.train(
        preset,
        out,
        pattern,
        shape,
        flags.given(options),
        device,
        devices,
        nodes,
        strategy,
        log,
        load,
        in_order,
    )


@command
def generate(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = "based-mini",
    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = "",
    *,
    max_tokens: NonNegativeInt = 256,
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt = 0,
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0,
    min_p: Annotated[float, Range(least=0, most=1)] = 0.0,
    repetition_penalty: PositiveFloat = 1.0,
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    seed: Seed = 0,
    session: Path | None = None,
    save_session: Path | None = None,
    jrt_padding: NonNegativeInt | None = None,
    loading: Annotated[Loading, tyro.conf.arg(name="")] = AS_IT_IS,
) -> int:
    """Print how a language model continues a text, as it comes; with no arguments a small included one.

    Only the new text goes to stdout. It ends with the document, at a stop string or after --max-tokens.

    Args:
        run: A run folder of `holdall train` or the folder of a saved model; based-mini is included.
        prompt: The text to continue; "-" reads it from stdin, without a new line at its end. With none the
            model begins a document.
        max_tokens: The most tokens to generate.
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest token.
        top_k: Draw among the k likeliest tokens; 0 for all.
        top_p: Draw among the likeliest tokens that together have at least this probability.
        min_p: Draw among tokens that have at least this share of the likeliest one's probability.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that were there.
        stop: A text at which generation stops (repeatable).
        seed: Of the draws.
        session: A file of --save-session, which the prompt and the new text continue.
        save_session: The file for what the model has read and written, to be resumed here or elsewhere.
        jrt_padding: The token with which a prompt that is shorter than the prefix of a JRT-RNN is padded on
            the left, as the published ones are run (220, a space of GPT-2's). By default none is: a shorter
            prompt is all prefix.
        loading: The fields of Loading.
    """
    from holdall.commands import generate as shown

    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "stop": stop, "seed": seed,
    }  # fmt: skip
    return shown.generate(run, prompt, options, session, save_session, loading, jrt_padding=jrt_padding)


@command
def chat(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "based-mini",
    *,
    session: Path | None = None,
    max_tokens: PositiveInt = 256,
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt = 0,
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0,
    min_p: Annotated[float, Range(least=0, most=1)] = 0.0,
    seed: Seed | None = None,
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    loading: Annotated[Loading, tyro.conf.arg(name="")] = AS_IT_IS,
) -> int:
    """Write a text together with a language model, line by line; its state can be forked, saved and resumed.

    What you type is appended to the text as it stands and the model continues it: there is no chat format.
    /help lists the commands.

    Args:
        model: A run folder of `holdall train` or the folder of a saved model; based-mini is included.
        session: A state file: continued if it is there, and written at the end.
        max_tokens: The most tokens that the model writes at a time.
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest token.
        top_k: Draw among the k likeliest tokens; 0 for all.
        top_p: Draw among the likeliest tokens that together have at least this probability.
        min_p: Draw among tokens that have at least this share of the likeliest one's probability.
        seed: Of the draws, which depend on it and on the token's position; by default another each time.
        stop: A text at which the model stops, with \\n for a newline. It is not shown, but is part of the
            text, so that you write what comes after it.
        loading: The fields of Loading.
    """
    from holdall.commands import chat as shown

    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "seed": seed, "stop": tuple(text.replace("\\n", "\n") for text in stop),
    }  # fmt: skip
    return shown.chat(model, session, options, loading)


@command
def serve(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = "based-mini",
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Range(least=0, most=65535)] = 8000,
    name: str | None = None,
    rows: PositiveInt = 64,
    queue: PositiveInt = 1024,
    max_context: PositiveInt | None = None,
    sessions: Path | None = None,
    store_memory: NonNegativeInt = 1 << 30,
    store: Path | None = None,
    replay: NonNegativeInt = 0,
    state_dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    drafts: NonNegativeInt = 0,
    api_key_file: Path | None = None,
    loading: Annotated[Loading, tyro.conf.arg(name="")] = AS_IT_IS,
) -> int:
    """Serve a language model over HTTP with OpenAI's API; with no arguments a small included one.

    Ctrl-C ends it: requests that run have ten seconds to end, and sessions are saved.

    Args:
        run: A run folder of `holdall train` or the folder of a saved model; based-mini is included.
        host: The address to listen at; 0.0.0.0 for every network, and then give a key.
        port: The port; 0 takes a free one.
        name: The model's name in requests; by default its folder's.
        rows: The most texts that are written at the same time.
        queue: The most requests that wait; more are answered with 503.
        max_context: Tokens that a text may have, reserved for each row; for models whose states grow.
        sessions: A folder for named sessions; without one they are lost at the end.
        store_memory: Bytes of memory for the beginnings of prompts that were read, so that they are not read
            again; 0 for none.
        store: A folder for those that leave memory; they are found again after a restart.
        replay: Tokens between two writes of large states, 16 say, and tokens that can be taken back; 0 writes
            with every token.
        state_dtype: What Taylor states are stored in with --replay: docs/replay.md has the errors.
        drafts: Tokens guessed in each step from what a text repeats; the text stays the same. It needs
            --replay of twice as many and one.
        api_key_file: A file with the key that requests must bear; or set HOLDALL_API_KEY.
        loading: The fields of Loading.
    """
    from holdall.commands import serve as shown

    return shown.serve(
        run,
        host,
        port,
        name,
        rows,
        queue,
        max_context,
        sessions,
        store_memory,
        store,
        replay,
        state_dtype,
        drafts,
        api_key_file,
        loading,
    )


@command
def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    out: Path,
    tokenizer: Path | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
) -> int:
    """Write a model of another program as a folder of Holdall's own; docs/checkpoints.md says which.

    generate, chat, serve, eval, export and matrix read such models as they are, too. What of a model cannot
    be represented is refused by the name of its field.

    Args:
        source: A folder as the transformers library writes it (config.json, weights, tokenizer.json), or a
            GGUF file.
        out: The folder to be made.
        tokenizer: A tokenizer.json, if there is none beside the weights.
        dtype: What weights are written in; by default the narrowest dtype of the file's that loses nothing.
    """
    from holdall.commands import convert as shown

    return shown.convert(source, out, tokenizer, dtype)


@command
def recall(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    *,
    out: Path = Path("runs/recall"),
    checkpoint: Annotated[Literal["model", "best", "last"] | None, tyro.conf.arg(aliases=["--which"])] = None,
    rows: PositiveInt | None = None,
    context: PositiveInt | None = None,
    threshold: NonNegativeInt = 1250,
    passages: PositiveInt = 40,
    length: PositiveInt = 512,
    licence: str = "",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    dark: bool = False,
    data: Path | None = None,
) -> int:
    """Measure recall on real text: perplexity by slice and, for two models, a page of passages.

    Recall hits complete a pair of tokens that occurred before in the same context and is rare in the training
    text. Predictions are saved in the run folders. Stop it at any time; the same command resumes.

    Args:
        runs: run folders of `holdall train`, all on one corpus, or with --data folders of saved models or
            of the transformers library; gaps are relative to the first.
        out: the folder for slices.json, recall.png, gaps.png, state.png and, for two runs, recall.html.
        checkpoint: the weights to score; by default the final model, else the best, else the last.
        rows: windows of the validation text to score, evenly spread; by default all.
        context: tokens per window; by default the shortest context that the runs were trained on.
        threshold: a bigram that occurs more often in the training text is not a recall hit.
        passages: number of passages on the page.
        length: tokens per passage.
        licence: licence of the text, for the page, if the corpus does not name it.
        device: where to run the models; auto takes a GPU if there is one.
        load: a mixer file of your own that a run was trained with.
        dark: draw on a dark background.
        data: the corpus, a folder that `holdall data` made with their tokenizer, of models that name none:
            saved, converted, or of the transformers library.
    """
    from holdall.commands import recall as shown

    return shown.recall(
        runs,
        out,
        checkpoint,
        rows,
        context,
        threshold,
        passages,
        length,
        licence,
        device,
        load,
        dark,
        command=typed_command(),
        data=data,
    )


@command
def suite(
    recipe: Annotated[str, tyro.conf.Positional] = "lm-suite",
    *,
    data: Path | None = None,
    out: Path | None = None,
    family: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    minutes: NonNegativeFloat | None = None,
    workers: PositiveInt | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    weights: bool = True,
    licence: str = "",
) -> int:
    """Train small language models of equal size on one corpus and compare which tokens each of them loses.

    Each is trained by `holdall train` and scored by `holdall recall`. Stop it at any time; the same command
    resumes.

    Args:
        recipe: lm-suite (17 families of 15 million parameters: hours on a GPU), or read-twice-15m or
            read-twice-40m (six of 15 or 40 million for reading once and twice: minutes on a GPU).
        data: the corpus, a folder that `holdall data` made.
        out: the folder that it leaves; runs/RECIPE by default.
        family: train only the models of this family now.
        minutes: stop within so many; 75 is then the exit status, and the same command resumes. 0 only
            compares what is finished, also what was trained elsewhere and copied into the folder's runs.
        workers: runs that train at once; by default two on each GPU.
        device: where to train; a CPU would take weeks.
        weights: keep the trained models, not only what they predict.
        licence: of the corpus' text; with it and the corpus, passages.html shows some of the text.
    """
    from holdall.commands import suite as shown

    return shown.suite(
        recipe,
        data,
        out or Path("runs") / recipe,
        family,
        minutes,
        workers,
        device,
        weights,
        licence,
        command=typed_command(),
    )


@command
def export(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = "based-mini",
    *,
    out: Path,
    precision: Annotated[Literal["fp32", "bf16"] | None, tyro.conf.arg(aliases=["--dtype"])] = None,
    layout: Literal["auto", "transformers", "holdall"] = "auto",
    checkpoint: Literal["model", "best", "last"] | None = None,
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
) -> int:
    """Write a language model as a folder that the transformers library opens.

    Models of Mamba or Mamba-2 alone are written in the library's own layout. For others a program has to
    `import holdall.adapters.transformers` first; then AutoModelForCausalLM and AutoTokenizer read the folder.
    generate, chat, serve, eval, matrix and convert read either.

    Args:
        run: A run folder of `holdall train` or the folder of a saved model; based-mini is included.
        out: The folder, which is made.
        precision: What the weights are written in; as they are by default.
        layout: The library's own (transformers), for models of Mamba or Mamba-2 alone; Holdall's for any;
            auto takes the first where it can.
        checkpoint: The weights at the end of training (model), at the lowest validation loss (best) or at the
            last checkpoint (last); by default the first of these that is there.
        load: A mixer file of your own that the model was trained with.
    """
    from holdall.commands import export as shown

    return shown.export(run, out, precision, layout, checkpoint, load)


@command
def eval(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")] = (
        "based-mini",
    ),
    *,
    suite: tuple[str, ...] = (),
    data: Path | None = None,
    tasks: tuple[str, ...] = (),
    window: PositiveInt = 1024,
    limit: Annotated[PositiveInt | None, tyro.conf.arg(aliases=["--examples"])] = None,
    fewshot: NonNegativeInt | None = None,
    seed: Seed = 0,
    batch: PositiveInt = 64,
    include: Path | None = None,
    dry_run: bool = False,
    out: Path = Path("runs/eval"),
    loading: Annotated[Loading, tyro.conf.arg(name="")] = AS_IT_IS,
) -> int:
    """Score language models on what they recall from documents, and on tasks of lm-eval; with no arguments a
    small included one on needles in haystacks, which need no files.

    Stop it at any time; the same command resumes. More models, suites and tasks can be added to the folder
    later.

    Args:
        models: Run folders of `holdall train`, folders of saved models or of the transformers library, GGUF
            files, or addresses of servers such as http://localhost:8000; based-mini is included.
        suite: recall (answers in documents that are shown once), recall-twice (shown twice), answers and
            answers-twice (how likely the right ones are, for small models), general (what a model learned),
            kv, needles, or single tasks of them; by default all whose files are there.
        data: The folder of the suites' documents; --dry-run says which files it lacks, and their form.
        tasks: Names of tasks of lm-eval; `lm_eval ls tasks` lists them.
        window: Tokens of a document that are shown, around the answer, with 50 for the answer.
        limit: The most questions of each task, for a first look.
        fewshot: Examples with answers before each question; by default as each task of lm-eval has it.
        seed: Of documents that are drawn, and of the bootstrap.
        batch: Rows that are read at once. Scores do not depend on it.
        include: A folder of tasks of your own, as YAML files of lm-eval.
        dry_run: Ask nothing; print tasks, questions and tokens, and which files are missing.
        out: The folder for scores and samples.
        loading: The fields of Loading.
    """
    from holdall.commands import evals as shown
    from holdall.evals.folder import EvalConfig

    config = EvalConfig(window=window, limit=limit, seed=seed, fewshot=fewshot)
    return shown.evaluate(
        models, suite, tasks, config, data, include, out, batch, dry_run, loading, command=typed_command()
    )


app.command(theory.app, name="theory", help=theory.ABOUT)


def main() -> None:
    """Run the command line. An error that a user can fix is one line, with exit status 2 (see errors.py)."""
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for example, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _run() -> Any:
    """Parse the arguments and run the command; returns the exit status."""
    from holdall import __version__, commands

    if sys.argv[1:] == ["--version"]:
        print(f"holdall {__version__}")
        return 0
    try:
        about = (
            "Measure, train and serve language models whose memory does not grow. (--version: its version)"
        )
        # None is the value of a flag that is not given; nobody types it
        config = [tyro.conf.DisallowNone]
        return commands.guarded(lambda: app.cli(prog="holdall", description=about, config=config))
    except SystemExit as end:  # after help, or arguments that do not parse
        return end.code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    main()
