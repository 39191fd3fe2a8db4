"""What the server counts, for Prometheus. Every server has its own registry, so that tests do not share counts."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "coda_responses", "Responses by path and status", ["path", "status"], registry=self.registry
        )
        self.latency_s = Histogram(
            "coda_response_seconds",
            "Time from a request's arrival to the end of its answer",
            ["path"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.tokens = Counter("coda_answer_tokens", "Tokens of finished answers", registry=self.registry)
        self.forwards = Counter("coda_forwards", "Forward passes of batches", registry=self.registry)
        self.batch_size = Histogram(
            "coda_batch_size", "Answers denoised together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.rejected = Counter("coda_rejected", "Requests refused for a full queue", registry=self.registry)
        self.cancelled = Counter("coda_cancelled", "Answers cancelled before their end", registry=self.registry)
        self._waiting = Gauge("coda_queue_size", "Answers that wait for the model", registry=self.registry)
        self._running = Gauge("coda_running", "Answers being denoised", registry=self.registry)

    def watch(self, *, num_waiting: Callable[[], int], num_running: Callable[[], int]) -> None:
        """Read the two gauges from an engine whenever they are asked for."""
        self._waiting.set_function(num_waiting)
        self._running.set_function(num_running)

    def render(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)
