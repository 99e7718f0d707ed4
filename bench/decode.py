"""Decoding on a GPU: tokens a millisecond of the engine's recorded step, beside the limit that bytes set.

    python -m bench.decode                          the table: models, batch sizes, tokens cached
    python -m bench.decode --cpu                    models of 15 million weights, on this machine's CPU
    python -m bench.decode --profile MODEL ROWS..  the kernels of one step, the longest first

Blocks in bf16, states and caches as each mixer has them, random weights, vocabulary 50,257, greedy. The limit
is what a step cannot do without: all weights but the embedding's read once, each row's recurrent state read
and written, its windows and caches read; over the card's own copy bandwidth, measured in the same run.

    engine     the step that the engine replays, its drawing included
    eager      the same step, called from Python
    generate   transformers' generate of a Llama of the shape of "llama-1b", in bf16

Beside the table: how long a prompt waits for its first token while all other rows write, and how long it
holds them up. "llama-1b" is a Transformer of the shape of Llama 3.2 1B: 8 heads of keys and values of 64.

Letters: B rows, S tokens cached.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
from holdall.precision import compute_in
from holdall.recipes.presets import preset
from holdall.text.tokenizers import Bytes

VOCAB, BATCHES, SECONDS, ROOM = 50_257, (1, 8, 32, 128, 512), 0.3, 512
CASES = (
    *(("based-1b", rows, 0) for rows in BATCHES),
    *(("based-1b, replay", rows, 0) for rows in BATCHES),
    *(("based-1b, replay fp16", rows, 0) for rows in BATCHES),
    *(("mamba-1b", rows, 0) for rows in BATCHES),
    *(("based-1b", 128, cached) for cached in (1024, 16_384, 131_072, 1_048_576)),
    *(("llama-1b", rows, 1024) for rows in BATCHES),
    *(("llama-1b", rows, cached) for rows, cached in ((32, 16_384), (8, 65_536))),
    *(("attention-1b", rows, 1024) for rows in BATCHES[:-1]),
    *(("attention-1b", rows, cached) for rows, cached in ((8, 16_384), (1, 65_536))),
)
LLAMA = {"width": 2048, "mlp": 8192, "layers": 16, "heads": 32, "kv_heads": 8}


def config(name: str) -> ModelConfig:
    """A preset, with its Taylor layers changed by "NAME, replay" and "NAME, replay fp16"; or "llama-1b"."""
    base, _, change = name.partition(", ")
    if base == "llama-1b":
        heads = {key: LLAMA[key] for key in ("heads", "kv_heads")}
        layer = AttentionConfig(width=LLAMA["width"], rotary=1.0, bias=False, **heads)
        return dataclasses.replace(
            preset("attention-1b", VOCAB),
            width=layer.width,
            mlp=LLAMA["mlp"],
            layers=(layer,) * LLAMA["layers"],
        )
    model = preset(base, VOCAB)
    if not change:
        return model
    how = {"replay": 16, "state_dtype": "fp16" if change.endswith("fp16") else "fp32"}
    layers = (
        dataclasses.replace(layer, **how) if isinstance(layer, TaylorConfig) else layer
        for layer in model.layers
    )
    return dataclasses.replace(model, layers=tuple(layers))


def build(name: str) -> Model:
    with torch.device("cuda"):
        model = config(name).build()
    return compute_in(torch.bfloat16, model).eval()


def engine_of(model: Model, rows: int, cached: int) -> Engine:
    """An engine all of whose rows are writing, after so many tokens."""
    limit = EngineConfig(rows=rows, max_context=cached + ROOM, fixed=True)
    engine, session = Engine(model, Bytes(), limit), read(model, [5])
    asked = Request(prompt=(5,), sampling=Sampling(max_tokens=1 << 40, temperature=0, ignore_end=True))
    engine._rows = [_Row(_Job(i, asked, 0), 0, Bytes(), session.past) for i in range(rows)]
    engine.buffers.put(0, engine._rows[0], session)
    for row in range(1, rows):
        engine.buffers.move(0, row)
    for state in engine.buffers.states:
        for count in ("filled_B", "seen_B"):
            # the ring of a replayed state has only been read by the one token there was
            if cached and hasattr(state, count) and not has_ring(state):
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


def has_ring(state: Any) -> bool:
    """Whether sums are written only with every L-th token: holdall/ops/replay.py."""
    return hasattr(state, "summed_B")


def _moved(start: Any) -> float:
    """Bytes of one row's state that a step reads and writes at least."""
    bytes_of = {name: t.numel() * t.element_size() for name, t in zip(start._fields, start, strict=True)}
    if has_ring(start):
        ring = bytes_of["k_BSGK"] + bytes_of["v_BSHV"] + bytes_of["log_decay_BSHX"]
        every = start.k_BSGK.shape[1] // 2  # tokens between two writes of the sums, which read half the ring
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
            last.drawn.token_BT.tolist()  # as the engine does: a step late
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


def first_token(name: str, *, rows: int = 128, prompt: int = 2048) -> dict[str, Any]:
    """How long a prompt waits for its first token while all other rows write, and they for it."""
    model = build(name)
    engine = Engine(model, Bytes(), EngineConfig(rows=rows))
    engine.warm_up()
    asked = Sampling(max_tokens=1 << 40, ignore_end=True)
    for seed in range(rows - 1):
        engine.submit(Request(prompt=(seed % 250,), sampling=dataclasses.replace(asked, seed=seed)))
    while engine.stats().running < rows - 1:
        engine.step()

    def timed(steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - began))
        return times

    usual = sorted(timed(200))[100]
    given = tuple(i % 250 for i in range(prompt))
    ticket, began, slowest, came = (
        engine.submit(Request(prompt=given, sampling=asked)),
        time.perf_counter(),
        0.0,
        False,
    )
    while not came:
        now = time.perf_counter()
        came = any(piece.ticket == ticket and piece.tokens for piece in engine.step())
        slowest = max(slowest, 1e3 * (time.perf_counter() - now))
    return {
        "model": name, "first token of": prompt, "beside": rows - 1,
        "milliseconds": 1e3 * (time.perf_counter() - began), "step_ms": usual, "slowest_step_ms": slowest,
    }  # fmt: skip


def generate(rows: int, cached: int = 1024, new: int = 64) -> dict[str, Any]:
    """transformers' generate, as its users call it: tokens a millisecond after the prompt has been read."""
    import transformers

    shape = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=LLAMA["width"], intermediate_size=LLAMA["mlp"],
        num_hidden_layers=LLAMA["layers"], num_attention_heads=LLAMA["heads"],
        num_key_value_heads=LLAMA["kv_heads"], tie_word_embeddings=True, max_position_embeddings=2 * cached,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(shape).to(torch.bfloat16).eval()
    prompt = torch.randint(VOCAB, (rows, cached), device="cuda")

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    each = (seconds(new + 1) - seconds(1)) / new
    return {"model": "transformers' generate, llama-1b", "rows": rows, "cached": cached,
            "milliseconds": 1e3 * each, "tokens_per_ms": rows / each / 1e3}  # fmt: skip


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
        eager = (name, rows, cached) in (("based-1b", 1, 0), ("based-1b", 128, 0))
        how = functools.partial(measure, name, model, rows, cached, limit.bandwidth, eager=eager)
        result = _or_why({"model": name, "rows": rows, "cached": cached}, how)
        outcome = result.get("failed") or f"{result['tokens_per_ms']:.2f} tokens/ms"
        progress.print(f"{name}, {rows} rows, {cached:,} cached: {outcome}", highlight=False)
        yield result
        torch.cuda.empty_cache()
    model = None
    for rows in (1, 128):
        yield _or_why({"model": "transformers' generate", "rows": rows}, functools.partial(generate, rows))
        torch.cuda.empty_cache()
    for name in ("based-1b", "mamba-1b"):
        yield _or_why({"model": name, "first token of": 2048}, functools.partial(first_token, name))


def _or_why(what: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measured()
    except Exception as error:
        return {**what, "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}


def on_cpu() -> Iterator[dict[str, Any]]:
    """Texts of models of 15 million weights, in fp32, as an engine writes them on all cores of a CPU."""
    for name, rows in itertools.product(("based-15m", "mamba-15m", "attention-15m"), (1, 8)):
        torch.manual_seed(0)
        model = preset(name, VOCAB).build().eval()
        engine = Engine(model, Bytes(), EngineConfig(rows=rows, max_context=1024 + ROOM))
        asked = Sampling(max_tokens=ROOM - 1, temperature=0, ignore_end=True)
        for _ in range(rows):
            engine.submit(Request(prompt=tuple(i % 250 for i in range(1024)), sampling=asked))
        while engine.stats().running < rows:
            engine.step()
        times = []
        for _ in range(200):
            began = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - began)
        each = statistics.median(times)
        yield {
            "model": name, "rows": rows, "cached": 1024, "milliseconds": 1e3 * each,
            "tokens_per_ms": rows / each / 1e3, "row_bytes": engine.buffers.row_bytes,
        }  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="decoding, vocabulary 50,257")
    columns = ("model", "rows", "cached", "ms a step", "tokens/ms", "limit", "share", "eager", "MB a row")
    for column in columns:
        shown.add_column(column, justify="left" if column == "model" else "right")

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for line in results:
        if "first token of" in line:
            prompt, rows, slowest = (
                line["first token of"],
                line.get("beside", 0) + 1,
                line.get("slowest_step_ms", 0),
            )
            name = f"{line['model']}, to the first token of a prompt; slowest step meanwhile {slowest:.0f} ms"
        else:
            name, rows, prompt = line["model"], line["rows"], line.get("cached", 0)
        if "failed" in line:
            shown.add_row(name, str(rows), f"{prompt:,}", line["failed"])
            continue
        row, speed = line.get("row_bytes"), line.get("tokens_per_ms")
        shown.add_row(
            name, str(rows), f"{prompt:,}", f"{line['milliseconds']:.2f}", cell(speed, ".3g"),
            cell(line.get("limit_tokens_per_ms"), ".3g"), cell(line.get("share"), ".0%"),
            cell(line.get("eager_tokens_per_ms"), ".3g"), cell(row and row / 1e6, ".1f"),
        )  # fmt: skip
    return shown


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decode")
    parser.add_argument("--profile", nargs="+", metavar=("MODEL", "ROWS"))
    parser.add_argument("--cpu", action="store_true")
    asked = parser.parse_args()
    if asked.cpu:
        show("decode on a CPU", list(on_cpu()), table)
        return
    if asked.profile:
        name, *sizes = asked.profile
        model = build(name)
        for rows in map(int, sizes):
            engine = engine_of(model, rows, 1024)
            engine.buffers.launch(engine._rows)  # compiles and records
            step = functools.partial(engine.buffers.launch, engine._rows)
            Console(width=140).print(gpu.profile(f"{name}, {rows} rows", step, top=40))
        return
    show("decode", list(run()), table)


if __name__ == "__main__":
    main()
