"""Training language models on one GPU, as `holdall train` does: tokens per second, share of peak operations.

    python -m bench.lm            based-360m beside attention-360m, at 2,048 and 16,384 tokens of context
    python -m bench.lm --toy      small models of the same kinds, anywhere: that every part runs
    python -m bench.lm --profile  where the time of a step goes

Steps of 16,384 tokens of random text in bf16, blocks compiled: the pass forward and backward, clipping and
AdamW. The loss is read every ten steps, as `holdall train` reads it, or every second step, for which the GPU
waits. Attention is PyTorch's own. `repeatable` has every sum in a fixed order, as `holdall train` runs so
that a run can be resumed to the bit; `free` lets PyTorch choose. `of peak` counts 6 operations per weight and
the products of softmax attention (holdall/training/flops.py) against what the card's maker promises.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import gpu, show
from holdall.model import ModelConfig, repeatable
from holdall.recipes.presets import preset
from holdall.text.tokenizers import Bytes
from holdall.training.devices import launcher
from holdall.training.flops import flops_per_token, peak_flops
from holdall.training.language_models import REPORT_STEPS, PretrainConfig, Pretrainer

MODELS, CONTEXTS, TOKENS, VOCAB = ("based-360m", "attention-360m"), (2048, 16_384), 16_384, 50_257
READS = (REPORT_STEPS, 2)
"""Steps between two readings of the loss."""
SECONDS, WARM = 8.0, 4


class RandomText:
    """Stands in for a corpus: tokens that nobody can learn, at no cost."""

    vocab, content_hash, folder, tokenizer = VOCAB, "random", Path("random"), Bytes()

    def __init__(self, length: int, vocab: int) -> None:
        self.train = self.valid = np.random.default_rng(0).integers(0, vocab, length)


def toy(model: ModelConfig) -> ModelConfig:
    """The same layers, few and narrow."""
    kinds = list(dict.fromkeys(model.layers))
    layers = tuple(dataclasses.replace(layer, width=64, **_heads(layer)) for layer in kinds)
    return dataclasses.replace(model, vocab=512, width=64, layers=layers, mlp=128)


def _heads(layer: Any) -> dict[str, int]:
    return {"heads": 2} if hasattr(layer, "heads") else {}


@contextlib.contextmanager
def training(name: str, context: int, mode: str, *, small: bool) -> Iterator[Pretrainer]:
    """A model that is being trained on steps of equally many tokens, at any context."""
    model, tokens = preset(name, VOCAB, context_len=context), TOKENS
    if small:
        model, context, tokens = toy(model), context // 32, TOKENS // 32
    fabric = launcher("cuda" if torch.cuda.is_available() else "cpu")
    fabric.launch()
    rows = max(1, tokens // context)
    config = PretrainConfig(
        model=model, context_len=context, batch=rows, micro_batch=rows, precision="bf16", compile=True
    )
    ordered = repeatable(fabric.device) if mode == "repeatable" else contextlib.nullcontext()
    torch.compiler.reset()  # what was compiled for one mode is not for the other
    with TemporaryDirectory() as folder, ordered:
        data: Any = RandomText(64 * rows * context, min(VOCAB, model.vocab))
        trainer = Pretrainer(config, data, Path(folder), fabric)
        yield trainer
        trainer.reader.shutdown(cancel_futures=True)


def measure(name: str, context: int, mode: str, *, small: bool) -> dict[str, Any]:
    """One model at one length, after steps that compile and warm up."""
    with training(name, context, mode, small=small) as trainer:
        began = time.perf_counter()
        for _ in range(WARM):
            trainer.train_step().tolist()
        warm, times = time.perf_counter() - began, list[float]()
        for reads in READS:
            until, taken = time.perf_counter() + (0.5 if small else SECONDS), list[float]()
            while time.perf_counter() < until or len(taken) < 3:
                before = time.perf_counter()
                for _ in range(reads):  # so that the CPU may run ahead
                    loss = trainer.train_step()
                assert math.isfinite(loss.tolist()[0])
                taken.append((time.perf_counter() - before) / reads)
            times.append(statistics.median(taken))
    config, device = trainer.config, trainer.device
    pace, pace_waiting = (config.batch * config.context_len / taken for taken in times)
    peak, flops = peak_flops(device), flops_per_token(trainer.model, config.context_len, config.predictions)
    return {
        "model": name,
        "parameters": trainer.model.parameter_count(),
        "context": config.context_len,
        "rows": config.batch,
        "mode": mode,
        "tokens_per_second": round(pace),
        "tokens_per_second_read_every_2": round(pace_waiting),
        "share_of_peak": None if peak is None else round(pace * flops / peak, 3),
        "gigabytes": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None,
        "warm_up_seconds": round(warm, 1),
        "forms": sorted({f"{mixer.config.name}: {mixer.form}" for mixer in trainer.model.mixers}),
    }


def profile(name: str, context: int) -> Table:
    """The kernels of one step as `holdall train` takes it."""
    with training(name, context, "repeatable", small=False) as trainer:
        return gpu.profile(f"{name}, context {context:,}", trainer.train_step, top=40)


def run(*, small: bool = False) -> Iterator[dict[str, Any]]:
    """All models at all lengths; one that fails says why instead."""
    for context in CONTEXTS:
        for name in MODELS:
            for mode in ("repeatable", "free"):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    result = measure(name, context, mode, small=small)
                except Exception as error:
                    if small:
                        raise
                    why = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
                    result = {"model": name, "context": context, "mode": mode, "failed": why}
                yield result


def table(results: list[dict[str, Any]]) -> Table:
    """The results as people read them."""
    shown = Table(title="pretraining, one device, bf16, compiled")
    for column in (
        "model",
        "context",
        "rows",
        "sums",
        "tokens/s",
        "read every 2",
        "of peak",
        "GB",
        "first steps, s",
    ):
        shown.add_column(column, justify="left" if column in ("model", "sums") else "right")
    for r in results:
        if "failed" in r:
            shown.add_row(r["model"], f"{r['context']:,}", "", r["mode"], r["failed"])
            continue
        shown.add_row(
            r["model"],
            f"{r['context']:,}",
            str(r["rows"]),
            r["mode"],
            f"{r['tokens_per_second']:,}",
            f"{r['tokens_per_second_read_every_2']:,}",
            "-" if r["share_of_peak"] is None else f"{r['share_of_peak']:.1%}",
            "-" if r["gigabytes"] is None else str(r["gigabytes"]),
            str(r["warm_up_seconds"]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="small models, on whatever device there is")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step, the longest first")
    asked = parser.parse_args()
    if not asked.toy and not torch.cuda.is_available():
        parser.error("models of 360 million parameters need a GPU; --toy runs anywhere")
    if asked.profile:
        for name in MODELS:
            Console(width=140).print(profile(name, CONTEXTS[0]))
    else:
        show("lm", list(run(small=asked.toy)), table)


if __name__ == "__main__":
    main()
