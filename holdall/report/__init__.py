"""Tables, figures and pages, made from sweep folders alone.

from holdall.report import write
write([Path("runs/quick")], Path("runs/quick"))     # frontier.png, frontier.html and table.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from holdall import files
from holdall.files import RunError
from holdall.report import figure, orders, page, table, widths
from holdall.report.data import Sweep, load, load_each
from holdall.report.style import FILLS

__all__ = ["write", "write_widths"]


def write(folders: Sequence[Path], out: Path, axis: str | None = None) -> list[Path]:
    """Write frontier.png, frontier.html and table.md into `out`, from sweeps in `folders`; return the paths.

    Cheap enough to call after every trained model, and a reader never sees half a file. Several sweeps
    share one picture if they took the same test: the first is filled, the others are open or marked. A sweep
    on two sets in both orders gets orders.png as well (holdall/report/orders.py). A folder that holds the
    sweeps of a recipe's parts gets widths.png, as `write_widths` does.
    axis: what state is counted in: bytes, bits or elements; by default what the first folder says.

    Raises RunError, naming the folder and the way out, where there is nothing to draw from.
    """
    if len(folders) == 1 and (parts := _parts(folders[0])):
        return write_widths(parts, out)
    if len(folders) > len(FILLS):
        raise RunError(
            f"{len(folders)} sweeps on one picture cannot be told apart; name at most {len(FILLS)}"
        )
    sweeps = load(folders, axis)
    made = {"frontier.png": figure.save, "frontier.html": page.save, "table.md": table.save}
    if len(sweeps) == 1 and orders.has_orders(sweeps[0]):
        made["orders.png"] = lambda sweeps, path: orders.save(sweeps[0], path)
    return [_save(sweeps, save, out / name) for name, save in made.items()]


def write_widths(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write widths.png into `out`: accuracy against width, a panel per sweep; nothing if all have one width.

    Raises as `write`.
    """
    sweeps = load_each(folders)
    return [_save(sweeps, widths.save, out / "widths.png")] if widths.has_widths(sweeps) else []


def _parts(folder: Path) -> list[Path]:
    """The sweep folders within a folder that is none itself."""
    if (folder / "config.json").exists() or not folder.is_dir():
        return []
    return sorted(
        path.parent for path in folder.glob("*/config.json") if (path.parent / "results.jsonl").exists()
    )


def _save(sweeps: Sequence[Sweep], save: Callable[[Sequence[Sweep], Path], None], target: Path) -> Path:
    files.make_folder(target.parent)
    with files.replacing(target) as unfinished:
        save(sweeps, unfinished)
    return target
