"""`holdall serve` under load: ten thousand requests, a fifth of which are abandoned, on a CPU.

    python -m bench serving

The model that comes with Holdall is served by the command in a process of its own, on one thread. Clients ask
for completions of 1 to 16 tokens after 5 to 200 bytes of the bundled text, streaming or not; some close the
connection at the first token, or after a few milliseconds. After each thousand requests, when nothing runs, a
line says what the clients saw, what the process holds, and what /metrics says. Memory for the beginnings of
prompts is full after the first few hundred; from then on the process should not grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import holdall
from bench import show
from holdall.text.default import default_corpus

TOTAL, PART, CLIENTS, ROWS, STORE = 10_000, 1_000, 32, 64, 1 << 26
LONGEST, MOST = 200, 16
"""Bytes of a prompt, tokens of a text."""


def run() -> Iterator[dict[str, Any]]:
    states = holdall.load().model.init_states(ROWS)
    tensors = sum(tensor.nbytes for state in states for tensor in state)
    with served() as (process, url):
        for part in range(TOTAL // PART):
            began = time.perf_counter()
            firsts, wholes, aborted = asyncio.run(asked(url, part))
            taken = time.perf_counter() - began
            found = idle(url)
            yield {
                "requests": (part + 1) * PART,
                "aborted": aborted,
                "requests_per_s": round(PART / taken, 1),
                "first_token_ms": [round(1e3 * share_of(firsts, share), 1) for share in (0.5, 0.99)],
                "whole_ms": [round(1e3 * share_of(wholes, share), 1) for share in (0.5, 0.99)],
                "process_bytes": held(process.pid),
                "rows_in_use": int(found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]),
                "texts_ended": int(
                    sum(v for k, v in found.items() if k.startswith("vllm:request_success_total"))
                ),
                "state_bytes": int(found["holdall:state_bytes"]),
                "tensors_bytes": tensors,
            }


@contextlib.contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and where it is."""
    command = [sys.executable, "-m", "holdall.cli", "serve", "--port", "0", "--rows", str(ROWS)]
    command += ["--store-memory", str(STORE), "--device", "cpu"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_thread) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        try:
            yield process, found[0]
        finally:
            process.terminate()


async def asked(url: str, part: int) -> tuple[list[float], list[float], int]:
    """Seconds to the first token of streams and to the end of whole answers, and how many were abandoned."""
    import httpx2

    text = bytes(default_corpus().train[: 1 << 20].astype("uint8")).decode(errors="ignore")
    firsts, wholes, aborted = list[float](), list[float](), 0
    numbers = iter(range(part * PART, (part + 1) * PART))

    async def client() -> None:
        nonlocal aborted
        async with httpx2.AsyncClient(base_url=url, timeout=300) as http:
            for number in numbers:
                draw = random.Random(number)
                at = draw.randrange(len(text) - LONGEST)
                body = {
                    "prompt": text[at : at + draw.randint(5, LONGEST)], "max_tokens": draw.randint(1, MOST),
                    "seed": number, "stream": draw.random() < 0.5, "ignore_eos": True,
                }  # fmt: skip
                leaves, began = draw.random() < 0.2, time.perf_counter()
                if not body["stream"]:
                    patience = draw.uniform(0.001, 0.05) if leaves else None
                    try:
                        answer = await asyncio.wait_for(http.post("/v1/completions", json=body), patience)
                    except TimeoutError:
                        aborted += 1
                        continue
                    answer.raise_for_status()
                    wholes.append(time.perf_counter() - began)
                    continue
                async with http.stream("POST", "/v1/completions", json=body) as stream:
                    stream.raise_for_status()
                    lines = stream.aiter_lines()
                    await anext(lines)
                    firsts.append(time.perf_counter() - began)
                    if leaves:
                        aborted += 1
                        continue
                    async for _ in lines:
                        pass
                    wholes.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return firsts, wholes, aborted


def idle(url: str) -> dict[str, float]:
    """The samples of /metrics when nothing runs; after a minute, whatever they are."""
    import httpx2

    for _ in range(600):
        lines = [line for line in httpx2.get(f"{url}/metrics").text.splitlines() if line[:1] != "#"]
        found = dict[str, float]()
        for name, value in (line.rsplit(" ", 1) for line in lines):
            key = re.sub(r'\{model_name="[^"]*"\}', "", name)
            found[key] = float(value)
        if not (found["vllm:num_requests_running"] or found["vllm:num_requests_waiting"]):
            break
        time.sleep(0.1)
    return found


def share_of(values: Sequence[float], share: float) -> float:
    """The smallest of the values that so many are not larger than."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def held(pid: int) -> int:
    """Bytes of memory that a process holds (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def table(results: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=f"holdall serve, based-mini, one CPU thread, {CLIENTS} clients")
    heads = "requests|abandoned|a second|first token, ms: p50, p99|whole, ms: p50, p99|process, MB"
    for head in f"{heads}|texts ended|rows in use|state_bytes of /metrics|of tensors".split("|"):
        shown.add_column(head, justify="right")
    for line in results:
        pairs = [", ".join(map(str, line[name])) for name in ("first_token_ms", "whole_ms")]
        shown.add_row(
            f"{line['requests']:,}", str(line["aborted"]), str(line["requests_per_s"]), *pairs,
            f"{line['process_bytes'] / 1e6:.1f}", f"{line['texts_ended']:,}", str(line["rows_in_use"]),
            f"{line['state_bytes']:,}", f"{line['tensors_bytes']:,}",
        )  # fmt: skip
    return shown


def main() -> None:
    show("serving", list(run()), table)


if __name__ == "__main__":
    main()
