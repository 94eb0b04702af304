"""What /metrics tells, under the names that dashboards of other servers know, behind `sepjax:`."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from sepjax.server.worker import Worker

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_EACH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """One server's; each has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._first = self._histogram("time_to_first_token_seconds", "From a request to its first token", _FIRST)
        self._each = self._histogram("time_per_output_token_seconds", "Between two tokens of an answer", _EACH)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request to the end of its answer", _WHOLE)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, read now or before")
        self._cached = self._counter("prompt_tokens_cached", "Tokens of prompts that a saved row had read before")
        self._generated = self._counter("generation_tokens", "Tokens of answers")
        name = "sepjax:request_success"
        self._ended = Counter(name, "Choices that have ended", ["finished_reason"], registry=self._registry)

    def watch(self, worker: "Worker") -> None:
        """Adds what is asked of the worker when somebody looks."""
        self._gauge("num_requests_running", "Choices that have a row").set_function(lambda: worker.num_running)
        self._gauge("num_requests_waiting", "Choices that wait").set_function(lambda: worker.num_waiting)
        self._gauge("cache_slots_held", "Entries in the caches of running rows").set_function(lambda: worker.held)

        def size() -> float:
            return 0.0 if worker.slots is None else float(worker.slots.cache_bytes)

        kept = "Conversations that later requests can go on from"
        self._gauge("conversations_kept", kept).set_function(lambda: len(worker.conversations or ()))
        size_of = "Bytes of the host's memory for them"
        self._gauge("conversations_bytes", size_of).set_function(lambda: getattr(worker.conversations, "nbytes", 0))
        self._gauge("cache_bytes", "Bytes of the caches of all rows, whatever they hold").set_function(size)

    def token(self, seconds: float, *, is_first: bool) -> None:
        """One token, so many seconds after the request or the token before."""
        (self._first if is_first else self._each).observe(seconds)

    def ended(self, reason: str, seconds: float, prompt: int, generated: int) -> None:
        """One choice has ended."""
        self._ended.labels(reason).inc()
        self._whole.observe(seconds)
        self._prompt.inc(prompt)
        self._generated.inc(generated)

    def cached(self, tokens: int) -> None:
        """So many tokens of a prompt were not read again."""
        self._cached.inc(tokens)

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sepjax:{name}", about, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"sepjax:{name}", about, registry=self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"sepjax:{name}", about, registry=self._registry)
