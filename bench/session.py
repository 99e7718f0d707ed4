"""One session of a million tokens: what it holds and takes at its beginning and at its end, on a CPU.

    python -m bench session

The model that comes with Holdall reads 2^20 tokens of the bundled text, over and over, through one session,
2^15 at a time; after the first 2^17 and after the last it also writes 300 tokens. Times are the process' CPU
time of one thread, medians; memory is what the process holds; a Transformer of the model's depth and width
would hold keys and values in fp32.
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

TOTAL, CALL, EARLY, WRITTEN = 1 << 20, 1 << 15, 1 << 17, 300


def run() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    model, text = holdall.load(), default_corpus().train
    ids = np.resize(text[: len(text)], TOTAL).tolist()
    session, milliseconds = None, list[float]()
    for start in range(0, TOTAL, CALL):
        began = time.process_time()
        session = read(model.model, ids[start : start + CALL], session)
        milliseconds.append(1e3 * (time.process_time() - began) / CALL)
        if session.past.count in (EARLY, TOTAL):
            recent = milliseconds[-EARLY // CALL :]
            yield measure(model, session, statistics.median(recent))


def measure(model: LanguageModel, session: Session, reading_ms: float) -> dict[str, Any]:
    """What a session costs where it is now."""
    times, began = list[float](), time.process_time()
    for _ in model.stream("", session=session, max_tokens=WRITTEN, ignore_end=True, seed=0):
        now = time.process_time()
        times.append(1e3 * (now - began))
        began = now
    with TemporaryDirectory() as folder:
        model.save_session(session, Path(folder) / "session.safetensors")
        size = (Path(folder) / "session.safetensors").stat().st_size
    width, layers = model.config.width, len(model.config.layers)
    return {
        "tokens": session.past.count,
        "reading_ms_per_token": round(reading_ms, 4),
        "writing_ms_per_token": round(statistics.median(times), 3),
        "session_bytes": session.nbytes,
        "file_bytes": size,
        "process_bytes": resident(),
        "transformer_bytes": session.past.count * layers * 2 * width * 4,
    }


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
