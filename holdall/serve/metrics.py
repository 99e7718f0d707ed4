"""Prometheus metrics under vLLM's names, so that dashboards that are there fit.

What the engine counts is read from its stats when somebody asks. Times are taken in its thread, when a token
is known to the host, and are of texts, of which a request has n. A text that is not cancelled takes the sum
of its queue, prefill and decode times. `vllm:kv_cache_usage_perc` is the share of rows in use: a row's state
never grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from holdall.engine.fast import Stats
from holdall.engine.request import Piece
from holdall.serve.loop import Stream

REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""vLLM's words for why a text ended."""
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
"""Seconds."""
STEP_TOKENS = tuple(1 << power for power in range(15))
"""Tokens of a step."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        """`stats` gives the engine's; it is called from the thread that scrapes."""
        self.registry = CollectorRegistry()
        self.model, self._stats = model, stats
        self._last: dict[
            tuple[int, int], tuple[float, float]
        ] = {}  # first and last token, by ticket and text
        self._texts: dict[int, int] = {}  # how many texts have not ended, by ticket
        self.prompt = self.cached = 0
        self.registry.register(self)
        names = ["model_name"]
        self.ended = Counter(
            "vllm:request_success", "Texts that ended.", [*names, "finished_reason"], registry=self.registry
        )
        self.refused = Counter(
            "vllm:admission_rejections", "Requests refused for a full queue.", names, registry=self.registry
        ).labels(model)
        for reason in REASONS.values():
            self.ended.labels(model, reason)  # 0 from the beginning

        def seconds(name: str, about: str) -> Histogram:
            histogram = Histogram(f"vllm:{name}", about, names, registry=self.registry, buckets=BUCKETS)
            return histogram.labels(model)

        self.queue = seconds("request_queue_time_seconds", "From the request until its prompt is begun.")
        self.prefill = seconds("request_prefill_time_seconds", "From there to the first token, or the end.")
        self.first = seconds("time_to_first_token_seconds", "From the request to its first token.")
        self.between = seconds("inter_token_latency_seconds", "From one token to the next.")
        self.mean = seconds("request_time_per_output_token_seconds", "The same, mean of a text.")
        self.whole = seconds("e2e_request_latency_seconds", "From the request to the end of a text.")
        self.writing = seconds("request_decode_time_seconds", "From the first token to the last.")
        about = "Tokens of prompts and texts in one step of the engine."
        self.step_tokens = Histogram(
            "vllm:iteration_tokens_total", about, names, registry=self.registry, buckets=STEP_TOKENS
        ).labels(model)
        self._tokens = 0  # of all steps so far

    def watch(self, stream: Stream, piece: Piece) -> None:
        """Note a piece; called in the engine's thread."""
        now, text = time.perf_counter(), (piece.ticket, piece.index)
        if piece.ticket not in self._texts:
            self._texts[piece.ticket] = stream.requests[stream.tickets.index(piece.ticket)].n
            self.prompt += piece.usage.prompt
            self.cached += piece.usage.cached
        if text not in self._last and not math.isnan(piece.admitted):  # its first piece, or it has no tokens
            self.queue.observe(piece.admitted - stream.began)
            if piece.finish != "cancelled":
                self.prefill.observe(now - piece.admitted)
        if piece.tokens:
            if text in self._last:
                first, last = self._last[text]
                self.between.observe(now - last)
            else:
                first = now
                self.first.observe(now - stream.began)
            self._last[text] = first, now
        if piece.finish:
            self._texts[piece.ticket] -= 1
            if not self._texts[piece.ticket]:
                del self._texts[piece.ticket]
            self.ended.labels(self.model, REASONS[piece.finish]).inc()
            self.whole.observe(now - stream.began)
            first, last = self._last.pop(text, (now, now))
            self.writing.observe(last - first)
            if piece.usage.completion > 1:
                self.mean.observe((last - first) / (piece.usage.completion - 1))

    def stepped(self, stats: Stats) -> None:
        """Note a step, after its pieces; called in the engine's thread."""
        tokens = stats.read_tokens + stats.tokens
        self.step_tokens.observe(tokens - self._tokens)
        self._tokens = tokens

    def collect(self) -> Iterator[Metric]:
        """What the engine counts; prometheus-client calls this."""
        stats, labels = self._stats(), ["model_name"]
        gauges = {
            "vllm:num_requests_running": ("Texts written, prompts read.", stats.running + stats.reading),
            "vllm:num_requests_waiting": ("Requests that wait.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("Share of rows in use, 0 to 1.", stats.running / stats.rows),
            "holdall:row_state_bytes": ("State of one row.", stats.row_bytes),
            "holdall:state_bytes": ("State of all rows, allocated.", stats.state_bytes),
        }  # fmt: skip
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(name, about, labels=labels)
            gauge.add_metric([self.model], value)
            yield gauge
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts and of sessions before them.", self.prompt),
            "vllm:prompt_tokens_cached": ("Of these, tokens that needed no reading.", self.cached),
            "vllm:prefix_cache_queries": ("The same as prompt_tokens.", self.prompt),
            "vllm:prefix_cache_hits": ("The same as prompt_tokens_cached.", self.cached),
            "vllm:generation_tokens": ("Tokens of texts.", stats.tokens),
            "vllm:spec_decode_num_draft_tokens": ("Tokens guessed for texts.", stats.drafted),
            "vllm:spec_decode_num_accepted_tokens": ("Of these, tokens of texts.", stats.accepted),
            # a text keeps its row until it ends: there is nothing to preempt it for
            "vllm:num_preemptions": ("Rows taken from texts: never.", 0),
            "holdall:steps": ("Steps of the engine.", stats.steps),
        }
        for name, (about, value) in counters.items():
            counter = CounterMetricFamily(name, about, labels=labels)
            counter.add_metric([self.model], value)
            yield counter

    def page(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
