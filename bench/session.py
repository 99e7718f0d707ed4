"""One session of a million tokens: what it holds and takes at its beginning and at its end, on a CPU.

    python -m bench session

The model that comes with Holdall reads 2^20 tokens of the bundled text, over and over, through one session.
From what it was after the first 2^15 and from what it is after the last, by turns, it then reads 2^12 tokens
more and writes 200. Times are the process' CPU time of one thread, medians of the turns; memory is what the
process holds at that point; a Transformer of the model's depth and width would hold keys and values in fp32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.table import Table

import holdall
from bench import show
from holdall.engine import Session, read
from holdall.language_model import LanguageModel
from holdall.text.default import default_corpus

TOTAL, CALL, MORE, WRITTEN, TURNS = 1 << 20, 1 << 15, 1 << 12, 200, 9


def run() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    model, text = holdall.load(), default_corpus().train
    ids = np.resize(text[: len(text)], TOTAL).tolist()
    sessions, held = list[Session](), list[int]()
    session = None
    for start in range(0, TOTAL, CALL):
        session = read(model.model, ids[start : start + CALL], session)
        if start in (0, TOTAL - CALL):
            sessions.append(session)
            held.append(resident())
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(TURNS):
        for which, each in enumerate(sessions):
            for what, function, count in (("reading", reads, MORE), ("writing", writes, WRITTEN)):
                began = time.process_time()
                function(model, each, ids)
                taken = 1e3 * (time.process_time() - began) / count
                times.setdefault((what, which), []).append(taken)
    width, layers = model.config.width, len(model.config.layers)
    for which, each in enumerate(sessions):
        with TemporaryDirectory() as folder:
            model.save_session(each, Path(folder) / "session.safetensors")
            size = (Path(folder) / "session.safetensors").stat().st_size
        yield {
            "tokens": each.past.count,
            "reading_ms_per_token": round(statistics.median(times["reading", which]), 4),
            "writing_ms_per_token": round(statistics.median(times["writing", which]), 3),
            "session_bytes": each.nbytes,
            "file_bytes": size,
            "process_bytes": held[which],
            "transformer_bytes": each.past.count * layers * 2 * width * 4,
        }


def reads(model: LanguageModel, session: Session, ids: Sequence[int]) -> None:
    read(model.model, ids[:MORE], session)


def writes(model: LanguageModel, session: Session, ids: Sequence[int]) -> None:
    for _ in model.stream("", session=session, max_tokens=WRITTEN, ignore_end=True, seed=0):
        pass


def resident() -> int:
    """Bytes of memory that this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def table(results: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="based-mini, one session, one CPU thread")
    columns = {
        "tokens": "tokens", "reading, ms a token": "reading_ms_per_token",
        "writing, ms a token": "writing_ms_per_token", "session, bytes": "session_bytes",
        "its file": "file_bytes", "process": "process_bytes", "a Transformer's cache": "transformer_bytes",
    }  # fmt: skip
    for title in columns:
        shown.add_column(title, justify="right")
    for line in results:
        shown.add_row(*(f"{line[key]:,}" for key in columns.values()))
    return shown


def main() -> None:
    show("session", list(run()), table)


if __name__ == "__main__":
    main()
