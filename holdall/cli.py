"""The command line: `holdall frontier`, `holdall report`, `holdall zoo`.

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
) -> int:
    """Train the models of a recipe and show where each lands: recall against bytes of state.

    Stop it at any time; the same command goes on from where it was.

    Args:
        recipe: quick (a dozen models, minutes), zoology-figure2 or based-figure2 (as published).
        out: the folder that it leaves; runs/RECIPE by default.
        add: one more registered mixer for the quick recipe, as NAME or NAME:option=value,option=value.
        load: a mixer file of your own; every mixer that it registers joins the quick recipe.
        seeds: how many seeds for every learning rate.
        device: where to train; auto takes a GPU if there is one.
        workers: processes that train at once; by default one per core.
    """
    from holdall import show

    return show.frontier(
        recipe, out or Path("runs") / recipe, add, load, seeds, device, workers, command=_command()
    )


@app.command
def report(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    out: Path | None = None,
) -> int:
    """Remake the figure and the page of one or several sweeps, from their folders alone.

    Args:
        folders: folders that `holdall frontier` left; several are drawn over each other.
        out: where frontier.png and frontier.html go; the first folder by default.
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
) -> int:
    """List every sequence mixer with its state and its costs; or describe one.

    Args:
        name: a mixer to describe in full.
        width: model width at which the bytes of state are counted.
        context: tokens after which they are counted.
        load: a mixer file of your own to list too.
    """
    from holdall import show

    return show.zoo(name, width, context, load)


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
