"""How fast MQAR rows are made, and in how much memory, beside the published algorithm.

    python -m bench.generator

Every case runs in a process of its own, so that its peak of memory is its own: the growth from just before
the rows are made to the most that the process ever held. The last line is one JSON document.

Letters as in holdall.tasks.mqar: N tokens of a row, K pairs.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import show
from holdall.tasks.mqar import FILLERS, MQAR

SHAPES = ((64, 4), (1024, 256))
ROWS = 100_000
PUBLISHED_ROWS = 500
REPEATS = 3

CASES = [
    *((length, pairs, filler, "fast", ROWS) for length, pairs in SHAPES for filler in FILLERS),
    *((length, pairs, "random", "published", PUBLISHED_ROWS) for length, pairs in SHAPES),
]


def measure(length: int, pairs: int, filler: str, algorithm: str, rows: int) -> dict[str, Any]:
    """Make the rows REPEATS times; the first time counts for memory too."""
    task = MQAR(length=length, pairs=pairs, filler=filler)
    # what is loaded or set up once is not the rows'
    task.generate(1)
    seconds, growth = [], 0.0
    before = _resident_mb()
    for repeat in range(REPEATS):
        start = time.perf_counter()
        if algorithm == "fast":
            batch = task.generate(rows, seed=repeat)
        else:
            batch = task.generate_published(rows, repeat, torch.Generator().manual_seed(repeat))
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            growth = _peak_mb() - before
        del batch
    return {
        "length": length,
        "pairs": pairs,
        "filler": filler,
        "algorithm": algorithm,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "rows_per_second": round(rows / statistics.median(seconds)),
        "rows_per_second_best": round(rows / min(seconds)),
        "peak_growth_mb": round(growth),
    }


def run() -> list[dict[str, Any]]:
    """One result per case; `times_published` compares with the published algorithm at the same shape."""
    results = []
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            results.append(fresh.submit(measure, *case).result())
    published = {r["length"]: r["rows_per_second"] for r in results if r["algorithm"] == "published"}
    for result in results:
        result["times_published"] = round(result["rows_per_second"] / published[result["length"]], 1)
    return results


def table(results: list[dict[str, Any]]) -> Table:
    columns = {
        "N": "length",
        "K": "pairs",
        "filler": "filler",
        "algorithm": "algorithm",
        "rows": "rows",
        "rows/s": "rows_per_second",
        "x publ.": "times_published",
        "peak MB": "peak_growth_mb",
    }
    drawn = Table(title=f"MQAR rows, median of {REPEATS}, {results[0]['threads']} threads")
    for title in columns:
        drawn.add_column(title, justify="left" if title in ("filler", "algorithm") else "right")
    for result in results:
        cells = (result[key] for key in columns.values())
        drawn.add_row(*(f"{cell:,}" if not isinstance(cell, str) else cell for cell in cells))
    return drawn


def _resident_mb() -> float:
    """What the process holds now; where the system does not tell, the most it held so far."""
    return _proc_status("VmRSS") or _peak_mb()


def _peak_mb() -> float:
    """The most that this process ever held, in 10**6 bytes."""
    # Linux hands ru_maxrss down from the parent process, so ask for the process's own mark where there is one
    unit = 1 if sys.platform == "darwin" else 1024
    return _proc_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _proc_status(name: str) -> float | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:")), None)


def main() -> None:
    show("generator", run(), table)


if __name__ == "__main__":
    main()
