"""The server's numbers for Prometheus. Imported by the server alone: it needs prometheus_client."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from .scheduler import Job, Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64)


class _Times(Collector):
    """A histogram of seconds that costs a token little: prometheus_client's takes locks and walks over the buckets for
    each. Written by one thread, read by others."""

    def __init__(self, name: str, documentation: str) -> None:
        self._about = name, documentation
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    @property
    def count(self) -> int:
        return sum(self._counts)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For a registry."""
        limits = [*(str(float(limit)) for limit in _SECONDS), "+Inf"]
        buckets = list(zip(limits, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(*self._about, buckets=buckets, sum_value=self._sum)


class _Made(Collector):
    """Tokens generated: a text's first and those after it."""

    def __init__(self, *times: _Times) -> None:
        self._times = times

    def collect(self) -> Iterator[CounterMetricFamily]:
        made = sum(times.count for times in self._times)
        yield CounterMetricFamily("moedge_generated_tokens", "Tokens generated.", value=made)


class Metrics:
    """Counts what the scheduler tells; in a registry of its own, so that two servers in one process are two."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._ttft = _Times("moedge_time_to_first_token_seconds", "Until it is chosen, waiting included.")
        self._itl = _Times("moedge_inter_token_latency_seconds", "Between the choices of two tokens of a text.")
        for times in (self._ttft, self._itl):
            registry.register(times)
        registry.register(_Made(self._ttft, self._itl))
        self._batch = Histogram("moedge_batch_size", "Texts in a round of steps.", registry=registry, buckets=_TEXTS)
        self._prompt = Counter("moedge_prompt_tokens", "Tokens of prompts whose text began.", registry=registry)
        self._reused = Counter(
            "moedge_prefix_reused_tokens", "Tokens of prompts that needed no computing.", registry=registry
        )
        self._hits = Counter("moedge_prefix_hits", "Texts whose prompt needed less computing.", registry=registry)
        self._texts = Counter("moedge_texts", "Texts by how they ended.", ["reason"], registry=registry)
        self._requests = Counter("moedge_requests", "Answers by status.", ["path", "status"], registry=registry)

    def watch(self, scheduler: Scheduler) -> None:
        """Read the lengths of the queue and of the batch when they are asked for."""
        Gauge("moedge_queue_length", "Texts that wait.", registry=self.registry).set_function(lambda: scheduler.waiting)
        Gauge("moedge_running", "Texts in slots.", registry=self.registry).set_function(lambda: scheduler.running)

    def stepped(self, texts: int) -> None:
        self._batch.observe(texts)

    def token_came(self, job: Job, seconds: float) -> None:
        if len(job.writer.tokens) > 1:
            self._itl.observe(seconds)
            return
        self._ttft.observe(seconds)
        self._prompt.inc(len(job.request.prompt))
        if job.reused_tokens:
            self._hits.inc()
            self._reused.inc(job.reused_tokens)

    def finished(self, job: Job) -> None:
        self._texts.labels(job.writer.finish_reason or "error").inc()

    def answered(self, path: str, status: int) -> None:
        """Count an answer; `path` must be one of few."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
