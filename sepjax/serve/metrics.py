"""What /metrics tells, under the names that dashboards of other servers know, behind `sepjax:`.

Each number has the label `model_name`, as theirs have: one Prometheus watches several servers.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

if TYPE_CHECKING:
    from sepjax.serve.worker import Worker

_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_EACH = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """One server's; each has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._worker: Worker | None = None
        self._first = _Times(("time_to_first_token_seconds",), "From a request to its first token", _FIRST)
        names = "time_per_output_token_seconds", "inter_token_latency_seconds"  # older and newer dashboards
        self._each = _Times(names, "Between two tokens of an answer", _EACH)
        self._registry.register(self._first)
        self._registry.register(self._each)
        about = "From a request to the end of its answer"
        self._whole = Histogram("sepjax:e2e_request_latency_seconds", about, buckets=_WHOLE, registry=self._registry)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, read now or before")
        self._cached = self._counter("prompt_tokens_cached", "Tokens of prompts that a saved row had read before")
        self._generated = self._counter("generation_tokens", "Tokens of answers")
        name = "sepjax:request_success"
        self._ended = Counter(name, "Choices that have ended", ["finished_reason"], registry=self._registry)

    def watch(self, worker: "Worker") -> None:
        """Adds what is asked of the worker when somebody looks."""
        self._worker = worker
        self._gauge("num_requests_running", "Choices that have a row").set_function(lambda: worker.num_running)
        self._gauge("num_requests_waiting", "Choices that wait").set_function(lambda: worker.num_waiting)
        self._gauge("cache_slots_held", "Entries in the caches of running rows").set_function(lambda: sum(worker.held))
        about = "The same by where they stand: the first tokens, what is kept out of the past, the newest"
        zones = Gauge("sepjax:cache_slots_held_by_zone", about, ["zone"], registry=self._registry)
        for number, zone in enumerate(("sinks", "kept", "recent")):
            zones.labels(zone).set_function(lambda number=number: worker.held[number])

        def size() -> float:
            return 0.0 if worker.slots is None else float(worker.slots.cache_bytes)

        kept = "Conversations that later requests can go on from"
        self._gauge("conversations_kept", kept).set_function(lambda: len(worker.conversations or ()))
        size_of = "Bytes of the host's memory for them"
        self._gauge("conversations_bytes", size_of).set_function(lambda: getattr(worker.conversations, "nbytes", 0))
        on_device = "Bytes of the device's memory for them"
        self._gauge("conversations_device_bytes", on_device).set_function(
            lambda: getattr(worker.conversations, "device_nbytes", 0)
        )
        self._gauge("cache_bytes", "Bytes of the caches of all rows, whatever they hold").set_function(size)
        self._registry.register(_Launches(worker))

    def tokens(self, first: Sequence[float], each: Sequence[tuple[float, int]]) -> None:
        """The tokens of one step: seconds from requests to their first ones, and between others, and of how many."""
        self._first.observe([(seconds, 1) for seconds in first])
        self._each.observe(each)

    def begun(self, prompt: int, cached: int) -> None:
        """A choice has a row: tokens of its prompt, and how many of them are not read again."""
        self._prompt.inc(prompt)
        self._cached.inc(cached)

    def ended(self, reason: str | None, seconds: float, generated: int) -> None:
        """A choice has come to its end for a reason, or (None) was broken off."""
        self._generated.inc(generated)
        if reason is not None:
            self._ended.labels(reason).inc()
            self._whole.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus's format; empty until the model is there."""
        served = self._worker and self._worker.served
        return generate_latest(_Named(self._registry, served.name)) if served else b""

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"sepjax:{name}", about, registry=self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"sepjax:{name}", about, registry=self._registry)


class _Named:
    """What a registry has, with the model's name at each number."""

    def __init__(self, registry: CollectorRegistry, name: str):
        self._registry, self._name = registry, name

    def collect(self) -> Iterator[Metric]:
        """For `generate_latest`."""
        for family in self._registry.collect():
            family.samples = [x._replace(labels={"model_name": self._name, **x.labels}) for x in family.samples]
            yield family


class _Times:
    """A histogram that takes many numbers at once: there are tens of thousands of tokens a second."""

    def __init__(self, names: tuple[str, ...], about: str, buckets: tuple[float, ...]):
        self._names, self._about, self._buckets = names, about, np.array(buckets)
        self._counts, self._sum = np.zeros(len(buckets) + 1), 0.0

    def observe(self, found: Sequence[tuple[float, int]]) -> None:
        """Seconds, and how often; by one thread."""
        if found:
            seconds, times = np.array(found).T
            places = np.searchsorted(self._buckets, seconds)
            self._counts = self._counts + np.bincount(places, times, len(self._counts))
            self._sum += float(seconds @ times)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        names = [*map(str, self._buckets.tolist()), "+Inf"]
        buckets = list(zip(names, np.cumsum(self._counts).astype(float).tolist(), strict=True))
        for name in self._names:
            yield HistogramMetricFamily(f"sepjax:{name}", self._about, buckets=buckets, sum_value=self._sum)


class _Launches:
    """What the device was asked for, launch by launch (`sepjax.generation.slot_pace.Pace`)."""

    def __init__(self, worker: "Worker"):
        self._worker = worker

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For the registry."""
        slots = self._worker.slots
        for name, field, about in (
            ("launches", "launches", "Times that the device was asked for prompts to be read and steps to be made"),
            ("launch_steps", "steps", "Steps that were asked for"),
            ("launch_tokens", "tokens", "Tokens that rows drew in these steps"),
            ("launch_rows_to_be_read", "waiting", "Rows that had something left to read, summed over the launches"),
            ("launch_seconds_before_steps", "seconds_before", "Until rows had begun and prompts were read"),
            ("launch_seconds_steps", "seconds_steps", "Then until the steps were made"),
        ):
            value = 0.0 if slots is None else float(getattr(slots.pace, field))
            yield CounterMetricFamily(f"sepjax:{name}", about, value=value)
