"""Times in /metrics, by a clock that ticks once a step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from holdall.engine import fast
from holdall.engine.fast import Engine, EngineConfig
from holdall.engine.request import Request, Sampling
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from holdall.serve import loop, metrics
from holdall.serve.loop import Stream
from holdall.serve.metrics import Metrics

VLLM = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "prompt_tokens_total", "prompt_tokens_cached_total",
    "generation_tokens_total", "request_success_total", "num_preemptions_total",
    "admission_rejections_total", "time_to_first_token_seconds_sum", "inter_token_latency_seconds_sum",
    "request_time_per_output_token_seconds_sum", "e2e_request_latency_seconds_sum",
    "request_queue_time_seconds_sum", "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum",
    "iteration_tokens_total_sum",
}  # fmt: skip
"""What vLLM's dashboards read (vLLM 0.33, vllm/v1/metrics/loggers.py)."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Seconds, in its attribute `now`, for engine and server."""
    clock = SimpleNamespace(now=0.0)
    for module in (fast, loop, metrics):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def engine() -> Engine:
    with seeded(0):
        model = ModelConfig(vocab=264, width=8, layers=(TaylorConfig(width=8, feature_dim=2),)).build()
    return Engine(model, Bytes(), EngineConfig(rows=1, chunk=16))


def measured(clock: SimpleNamespace, asked: list[Request], cancelled: int = -1) -> dict[str, float]:
    """The sums and counts after requests that came at once, a second a step; one may be cancelled after 3."""

    async def run() -> None:
        stream = Stream(asked, None)
        stream.tickets += map(running.submit, asked)
        while running.busy:
            clock.now += 1
            if clock.now == 3 and cancelled >= 0:
                running.cancel(stream.tickets[cancelled])
            for piece in running.step():
                shown.watch(stream, piece)
            shown.stepped(running.stats())

    running = engine()
    shown = Metrics("mini", running.stats)
    asyncio.run(run())
    samples = [sample for metric in shown.registry.collect() for sample in metric.samples]
    assert {f"vllm:{name}" for name in VLLM} <= {sample.name for sample in samples}
    named = [sample for sample in samples if sample.name.endswith(("_sum", "_count"))]
    return {sample.name.removeprefix("vllm:"): sample.value for sample in named}


def text(prompt: int, max_tokens: int, n: int = 1) -> Request:
    return Request(
        prompt=(7,) * prompt, sampling=Sampling(max_tokens=max_tokens, seed=0, ignore_end=True), n=n
    )


def test_times_are_those_of_the_steps(clock: SimpleNamespace) -> None:
    """One row: the first text is read in steps 1, 2 and 3, its tokens are known in 4, 5 and 6. Then the
    second is read, and its token known in step 7."""
    found = measured(clock, [text(40, 3), text(4, 1)])
    for name, wanted in {
        "request_queue_time_seconds": [1, 6],
        "request_prefill_time_seconds": [3, 1],
        "time_to_first_token_seconds": [4, 7],
        "request_decode_time_seconds": [2, 0],
        "e2e_request_latency_seconds": [6, 7],
        "inter_token_latency_seconds": [1, 1],
        "request_time_per_output_token_seconds": [1],
        "iteration_tokens_total": [16, 16, 8, 1, 1, 1 + 4, 1],
    }.items():
        assert (found[f"{name}_sum"], found[f"{name}_count"]) == (sum(wanted), len(wanted)), name


def test_a_prompt_that_is_cancelled_was_not_read(clock: SimpleNamespace) -> None:
    found = measured(clock, [text(90, 2)], cancelled=0)
    times = {name: found[f"request_{name}_time_seconds_count"] for name in ("queue", "prefill", "decode")}
    assert times == {"queue": 1, "prefill": 0, "decode": 1}


def test_texts_without_tokens_have_waited_and_been_read(clock: SimpleNamespace) -> None:
    """A prompt that is only scored ends in step 1. The next one is read in steps 2, 3 and 4, and its texts
    are written one after the other; what is cancelled in the queue was never begun."""
    found = measured(clock, [text(3, 0), text(40, 2, n=2), text(5, 9)], cancelled=2)
    for name, wanted in {
        "request_queue_time_seconds": [1, 2, 2],
        "request_prefill_time_seconds": [0, 3, 5],
        "e2e_request_latency_seconds": [1, 6, 8, 3],
        "request_decode_time_seconds": [0, 1, 1, 0],
        "time_to_first_token_seconds": [5, 7],
    }.items():
        assert (found[f"{name}_sum"], found[f"{name}_count"]) == (sum(wanted), len(wanted)), name
