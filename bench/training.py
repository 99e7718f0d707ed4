"""Training on MQAR beside the loop that a user would write: all logits at all positions.

    python -m bench.training

Two layers of width 64, vocabulary 8192, batches of 256 rows, at N = 64, K = 4 and N = 256, K = 16. Three
ways, each in processes of its own:

    plain     one process, all cores: hidden states of all tokens, logits of all tokens, cross-entropy that
              ignores all but the answers, AdamW; the loop of most repositories, Zoology's among them
    one run   holdall.training.populations on one model, all cores
    sweep     the same as `holdall frontier` runs it: as many models at once as cores, one thread each;
              rows of all models together

`ceiling` is the rate at which the matrix products of a step, counted by PyTorch's flop counter, would run at
the speed of one large product on the same cores; `share` is the part of it that was reached.

Letters: B rows, N tokens, K pairs.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from bench import show
from holdall import environment
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.sweeps.worker import keep_freed_memory
from holdall.tasks.data import MQARData, MQARSegment
from holdall.tasks.mqar import NOTHING_ASKED
from holdall.training.populations import TrainConfig, Trainer

WIDTH, VOCAB, BATCH, SECONDS = 64, 8192, 256, 6.0
SHAPES = ((64, 4), (256, 16))
MIXERS: dict[str, MixerConfig] = {
    "attention": AttentionConfig(width=WIDTH),
    "Taylor, f = 16": TaylorConfig(width=WIDTH, feature_dim=16),
    "Mamba, n = 16": MambaConfig(width=WIDTH),
}


def config(mixer: str, length: int, pairs: int) -> TrainConfig:
    segment = MQARSegment(length=length, pairs=pairs, rows=8 * BATCH)
    return TrainConfig(
        model=ModelConfig(vocab=VOCAB, width=WIDTH, layers=after_conv(MIXERS[mixer])),
        data=MQARData(vocab=VOCAB, train=(segment,), test=(segment,)),
        learning_rates=(0.003,),
        batch=BATCH,
        epochs=10_000,
    )


def plain_loop(model: Model, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """What a user would write; yields after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    while True:
        for tokens_BN, targets_BN in batches:
            logits_BNV, _ = model(tokens_BN)
            loss = F.cross_entropy(logits_BNV.flatten(0, 1), targets_BN.flatten(), ignore_index=NOTHING_ASKED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def holdall_loop(trainer: Trainer) -> Any:
    """The steps of holdall.training.populations, without its tests and checkpoints; yields after each."""
    while True:
        trainer.train_step(trainer.members)
        trainer.step += 1
        yield


def _steps(way: str, mixer: str, length: int, pairs: int, folder: str) -> Any:
    run = config(mixer, length, pairs)
    if way != "plain":
        return holdall_loop(Trainer(run, Path(folder), torch.device("cpu"), together=False))
    task = run.data.task(run.data.train[0]).generate(8 * BATCH)
    return plain_loop(
        run.model.build(), list(zip(task.tokens.split(BATCH), task.targets.split(BATCH), strict=True))
    )


def _measure(way: str, mixer: str, length: int, pairs: int, threads: int, start: Any, answers: Any) -> None:
    """Rows per second of one process: the median over its steps, after two that warm up."""
    torch.set_num_threads(threads)
    if way != "plain":
        keep_freed_memory()
    with TemporaryDirectory() as folder:
        steps = _steps(way, mixer, length, pairs, folder)
        next(steps), next(steps)
        start.wait()
        times, until = [], time.perf_counter() + SECONDS
        while time.perf_counter() < until or len(times) < 3:
            before = time.perf_counter()
            next(steps)
            times.append(time.perf_counter() - before)
    quantiles = statistics.quantiles(times, n=10)
    answers.put([BATCH / t for t in (statistics.median(times), quantiles[8], quantiles[0])])


def measure(way: str, mixer: str, length: int, pairs: int) -> dict[str, Any]:
    """One way to train one model; in the sweep's way, one model per core at once."""
    cores = environment.cores()
    processes, threads = (cores, 1) if way == "sweep" else (1, cores)
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_measure, args=(way, mixer, length, pairs, threads, start, answers))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    rates = [sum(rate) for rate in zip(*(answers.get() for _ in workers), strict=True)]
    for worker in workers:
        worker.join()
    ceiling = peak_flops(cores) / flops_per_row(mixer, length, pairs, everywhere=way == "plain")
    return {
        "way": way,
        "mixer": mixer,
        "length": length,
        "pairs": pairs,
        "rows_per_second": round(rates[0]),
        "slow_decile": round(rates[1]),
        "fast_decile": round(rates[2]),
        "ceiling": round(ceiling),
        "share": round(rates[0] / ceiling, 3),
    }


def flops_per_row(mixer: str, length: int, pairs: int, *, everywhere: bool) -> float:
    """Operations of the matrix products of one training step, per row."""
    with TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
        next(_steps("plain" if everywhere else "one run", mixer, length, pairs, folder))
    return counter.get_total_flops() / BATCH


def peak_flops(threads: int) -> float:
    """Operations per second of one large matrix product in fp32."""
    torch.set_num_threads(threads)
    a = torch.randn(2048, 2048)
    times = []
    for _ in range(6):
        before = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - before)
    return 2 * 2048**3 / min(times)


def run() -> list[dict[str, Any]]:
    """Measure everything, the ways of one model side by side in time."""
    results = []
    for length, pairs in SHAPES:
        for mixer in MIXERS:
            ways = [measure(way, mixer, length, pairs) for way in ("plain", "one run", "sweep")]
            for way in ways:
                way["times_plain"] = round(way["rows_per_second"] / ways[0]["rows_per_second"], 1)
            results += ways
    return results


def table(results: list[dict[str, Any]]) -> Table:
    """The results as people read them."""
    shown = Table(title=f"training, rows/s; width {WIDTH}, vocabulary {VOCAB}, batch {BATCH}, fp32")
    for column in (
        "model",
        "N",
        "K",
        "way",
        "rows/s",
        "slow..fast decile",
        "times plain",
        "ceiling",
        "share",
    ):
        shown.add_column(column, justify="left" if column in ("model", "way") else "right")
    for r in results:
        shown.add_row(
            r["mixer"],
            str(r["length"]),
            str(r["pairs"]),
            r["way"],
            f"{r['rows_per_second']:,}",
            f"{r['slow_decile']:,}..{r['fast_decile']:,}",
            f"{r['times_plain']:.1f}",
            f"{r['ceiling']:,}",
            f"{r['share']:.0%}",
        )
    return shown


def main() -> None:
    show("training", run(), table)


if __name__ == "__main__":
    main()
