"""The command line: `holdall frontier`, `report`, `zoo`, `soundness`, `matrix`.

Nothing heavy is imported before a command is known to be well-formed, so that help is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

app = tyro.extras.SubcommandApp()


@app.command
def frontier(
    recipe: Annotated[str, tyro.conf.Positional] = "quick",
    *,
    out: Path | None = None,
    add: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    load: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    seeds: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    workers: int | None = None,
    family: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    minutes: float | None = None,
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
    from holdall import show

    return show.frontier(
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


@app.command
def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path | None = None,
) -> int:
    """Remake the figure and the page of one or several sweeps, from their folders alone.

    Args:
        folders: folders that `holdall frontier` left, several are drawn over each other; or one that
            `holdall matrix` left.
        out: where picture and page go; the first folder by default.
    """
    from holdall import show

    return show.report(folders, out)


@app.command
def zoo(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    width: int = 1024,
    context: int = 2048,
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
    from holdall import show

    return show.zoo(name, width, context, load) if results is None else show.zoo_page(results, page, load)


@app.command
def soundness(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    out: Path = Path("runs/zoo"),
    width: int = 64,
    length: int | None = None,
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
    from holdall import show

    return show.soundness(names, out, width, length, load)


@app.command
def matrix(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    *,
    length: int = 64,
    width: int = 32,
    input: Literal["random", "repeats", "constant"] = "random",
    scale: float = 2.0,
    heads: int = 1,
    jacobian: bool = False,
    seed: int = 0,
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
    from holdall import show

    return show.matrix(
        names, length, width, input, scale, heads, jacobian, seed, load, out, dark, command=_command()
    )


def _command() -> str:
    return " ".join(["holdall", *sys.argv[1:]])


def main() -> None:
    """Run the command line; errors that a user can mend are one line and exit with 2."""
    try:
        code = app.cli(prog="holdall", description="Measure language models whose memory does not grow.")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
