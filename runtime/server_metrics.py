"""The server's numbers for Prometheus. Imported by the server alone: it needs prometheus_client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .scheduler import Job, Scheduler

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts what the scheduler tells; in a registry of its own, so that two servers in one process are two."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._ttft = Histogram(
            "moedge_time_to_first_token_seconds", "Waiting included.", registry=registry, buckets=_SECONDS
        )
        self._itl = Histogram(
            "moedge_inter_token_latency_seconds", "Between two tokens.", registry=registry, buckets=_SECONDS
        )
        self._batch = Histogram("moedge_batch_size", "Texts in a round of steps.", registry=registry, buckets=_TEXTS)
        self._prompt = Counter("moedge_prompt_tokens", "Tokens of prompts that were begun.", registry=registry)
        self._made = Counter("moedge_generated_tokens", "Tokens generated.", registry=registry)
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
        self._made.inc()
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
