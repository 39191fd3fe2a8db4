"""What the server counts, for Prometheus. Every server has its own registry, so that tests do not share counts."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .keys import Keys

LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


class Metrics:
    """Counters, gauges and histograms of one server. No label grows with what clients send."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "coda_responses",
            "Responses by path and status: 499 where the client left before the end, also of a stream; a stream that "
            "ends with an error counts with its status",
            ["path", "status"],
            registry=self.registry,
        )
        self.caller_responses = Counter(
            "coda_caller_responses",
            "Responses by the name of the key that was shown, and status",
            ["caller", "status"],
            registry=self.registry,
        )
        self.latency_s = Histogram(
            "coda_response_seconds",
            "Time from a request's arrival to the end of its answer",
            ["path"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.queue_s = Histogram(
            "coda_queue_seconds",
            "Time that an answer waited for a place among those being denoised",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.first_text_s = Histogram(
            "coda_first_text_seconds",
            "Time from an answer's arrival in the queue to its first final text",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.step_s = Histogram(
            "coda_step_seconds", "Time of one step of all rows", buckets=STEP_BUCKETS_S, registry=self.registry
        )
        self.tokens = Counter("coda_answer_tokens", "Tokens of finished answers", registry=self.registry)
        self.forwards = Counter("coda_forwards", "Forward passes of the model", registry=self.registry)
        self.batch_size = Histogram(
            "coda_batch_size", "Answers denoised together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.rejected = Counter("coda_rejected", "Requests refused for a full queue", registry=self.registry)
        self.cancelled = Counter("coda_cancelled", "Answers cancelled before their end", registry=self.registry)
        self.failed = Counter(
            "coda_failed", "Answers that failed, by the code of the error", ["code"], registry=self.registry
        )
        self._keys_file = Gauge(
            "coda_keys_file_valid",
            "0 while API_KEYS_FILE cannot be used and the keys of before hold",
            registry=self.registry,
        )
        self._waiting = Gauge("coda_queue_size", "Answers that wait for the model", registry=self.registry)
        self._running = Gauge("coda_running", "Answers being denoised", registry=self.registry)

    def watch(self, *, num_waiting: Callable[[], int], num_running: Callable[[], int]) -> None:
        """Read the two gauges from an engine whenever they are asked for."""
        self._waiting.set_function(num_waiting)
        self._running.set_function(num_running)

    def watch_keys(self, keys: Keys) -> None:
        """Read the state of the file of keys whenever it is asked for."""
        self._keys_file.set_function(lambda: keys.is_file_valid)

    def render(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)
