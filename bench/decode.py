"""Decoding on a GPU: tokens a millisecond of the engine's recorded step, beside the limit that bytes set.

    python -m bench.decode                          the table: models, batch sizes, tokens cached
    python -m bench.decode --profile MODEL ROWS..  the kernels of one step, the longest first

Blocks in bf16, states and caches as each mixer has them, random weights, vocabulary 50,257, greedy. The limit
is what a step cannot do without: all weights but the embedding's read once, each row's recurrent state read
and written, its windows and caches read; over the card's own copy bandwidth, measured in the same run.

    engine     the step that the engine replays, its drawing included
    eager      the same step, called from Python
    HF         transformers' generate of a Llama of the size, static cache (where asked for)

Letters: B rows, S tokens cached.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import gpu, show
from holdall.contract import is_reserved
from holdall.engine import EngineConfig, Request, Sampling
from holdall.engine.fast import Engine, _Job, _Row
from holdall.engine.session import read
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig
from holdall.ops.attention import KeyValueCache
from holdall.ops.replay import ReplayState, ScaledReplayState
from holdall.precision import compute_in
from holdall.recipes.presets import preset
from holdall.text.tokenizers import Bytes

VOCAB, BATCHES, SECONDS = 50_257, (1, 8, 32, 128, 512), 1.0
CASES = (
    *(("based-1b", rows, 0) for rows in BATCHES),
    *(("based-1b, replay", rows, 0) for rows in BATCHES),
    *(("based-1b, replay fp16", rows, 0) for rows in BATCHES),
    *(("mamba-1b", rows, 0) for rows in BATCHES),
    *(("attention-1b, 8 kv heads", rows, 1024) for rows in BATCHES[:-1]),
    *(("attention-1b, 8 kv heads", 8, cached) for cached in (16_384, 65_536)),
)


def config(name: str) -> ModelConfig:
    """A preset; "NAME, 8 kv heads", "NAME, replay" and "NAME, replay fp16" change its layers."""
    base, _, change = name.partition(", ")
    model, options = preset(base, VOCAB), {AttentionConfig: {}, TaylorConfig: {}}
    if change.startswith("replay"):
        options[TaylorConfig] = {"replay": 16, "state_dtype": "fp16" if change.endswith("fp16") else "fp32"}
    elif change:
        options[AttentionConfig] = {"kv_heads": int(change.split()[0])}
    layers = (dataclasses.replace(layer, **options.get(type(layer), {})) for layer in model.layers)
    return dataclasses.replace(model, layers=tuple(layers))


def build(name: str) -> Model:
    with torch.device("cuda"):
        model = config(name).build()
    return compute_in(torch.bfloat16, model).eval()


def engine_of(model: Model, rows: int, cached: int) -> Engine:
    """An engine all of whose rows are writing, after so many tokens."""
    limit = EngineConfig(rows=rows, max_context=cached + 4096, fixed=True)
    engine, session = Engine(model, Bytes(), limit), read(model, [5])
    asked = Request(prompt=(5,), sampling=Sampling(max_tokens=1 << 40, temperature=0, ignore_end=True))
    engine._rows = [_Row(_Job(i, asked, 0), 0, Bytes(), session.past) for i in range(rows)]
    engine.buffers.put(0, engine._rows[0], session)
    for row in range(1, rows):
        engine.buffers.move(0, row)
    for state in engine.buffers.states:
        if is_reserved(state) and cached:
            for count in ("filled_B", "seen_B"):
                getattr(state, count).fill_(cached)
    return engine


def least_bytes(model: Model, rows: int, cached: int) -> float:
    """What a step moves at least."""
    weights = sum(p.numel() * p.element_size() for p in model.blocks.parameters())
    head = model.head_weight.numel() * 2
    total = weights + head
    for mixer in model.mixers:
        start = mixer.init_state(
            1, dtype=model.block_dtype, device=torch.device("meta"), capacity=max(cached, 1)
        )
        total += rows * _moved(start)
    return total


def _moved(start: Any) -> float:
    """Bytes of one row's state that a step reads and writes at least."""
    bytes_of = {name: t.numel() * t.element_size() for name, t in zip(start._fields, start, strict=True)}
    if isinstance(start, ReplayState | ScaledReplayState):
        ring = bytes_of["k_BSHK"] + bytes_of["v_BSHV"]
        every = start.k_BSHK.shape[1] // 2  # tokens between two writes of the sums, which read half the ring
        return (bytes_of["s_BHFV"] + bytes_of["z_BHF"]) * (1 + 1 / every) + ring * 0.75
    # of caches one slot is written, of windows the same; all else is replaced
    written = not is_reserved(start) and not isinstance(start, KeyValueCache)
    return sum(bytes_of.values()) * (2 if written else 1)


def step_seconds(engine: Engine, *, eager: bool = False) -> float:
    """The time of one step, of many that follow each other."""
    buffers = engine.buffers
    buffers.recorded = not eager
    for _ in range(3):
        flight = buffers.launch(engine._rows)
    flight.tokens()
    torch.cuda.synchronize()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        for _ in range(10 if not eager else 2):
            last, flight = flight, buffers.launch(engine._rows)
            last.drawn.token_B.tolist()  # as the engine does: a step late
            done += 1
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / done


def measure(
    name: str, model: Model, rows: int, cached: int, bandwidth: float, *, eager: bool
) -> dict[str, Any]:
    engine = engine_of(model, rows, cached)
    seconds, least = step_seconds(engine), least_bytes(model, rows, cached) / bandwidth
    result = {
        "model": name, "rows": rows, "cached": cached, "milliseconds": 1e3 * seconds,
        "tokens_per_ms": rows / seconds / 1e3, "limit_tokens_per_ms": rows / least / 1e3,
        "share": least / seconds, "row_bytes": engine.buffers.row_bytes,
    }  # fmt: skip
    if eager:
        result["eager_tokens_per_ms"] = rows / step_seconds(engine, eager=True) / 1e3
    return result


@torch.no_grad()
def run(cases: Sequence[tuple[str, int, int]] = CASES) -> Iterator[dict[str, Any]]:
    limit, progress = gpu.ceiling(), Console(stderr=True)
    model: Model | None = None
    built = ""
    for name, rows, cached in cases:
        if model is None or name != built:
            model = None
            torch.cuda.empty_cache()
            model, built = build(name), name
        try:
            result = measure(name, model, rows, cached, limit.bandwidth, eager=rows in (1, 128))
            progress.print(f"{name}, {rows} rows: {result['tokens_per_ms']:.2f} tokens/ms", highlight=False)
            yield result
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            yield {"model": name, "rows": rows, "cached": cached, "failed": why}
        torch.cuda.empty_cache()


def table(results: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="decoding on a GPU, tokens/ms; blocks in bf16, vocabulary 50,257")
    for column in (
        "model",
        "rows",
        "cached",
        "ms a step",
        "tokens/ms",
        "limit",
        "share",
        "eager",
        "MB a row",
    ):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for line in results:
        place = (line["model"], str(line["rows"]), f"{line['cached']:,}")
        if "failed" in line:
            shown.add_row(*place, line["failed"])
            continue
        eager = line.get("eager_tokens_per_ms")
        shown.add_row(
            *place, f"{line['milliseconds']:.2f}", f"{line['tokens_per_ms']:.2f}",
            f"{line['limit_tokens_per_ms']:.1f}", f"{line['share']:.0%}",
            "" if eager is None else f"{eager:.2f}", f"{line['row_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    return shown


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decode")
    parser.add_argument("--profile", nargs="+", metavar=("MODEL", "ROWS"))
    asked = parser.parse_args()
    if asked.profile:
        name, *sizes = asked.profile
        model = build(name)
        for rows in map(int, sizes):
            engine = engine_of(model, rows, 1024)
            engine.buffers.launch(engine._rows)  # compiles and records
            step = functools.partial(engine.buffers.launch, engine._rows)
            table = gpu.profile(f"{name}, {rows} rows", step, top=40)
            Console(width=140).print(table)
        return
    show("decode", list(run()), table)


if __name__ == "__main__":
    main()
