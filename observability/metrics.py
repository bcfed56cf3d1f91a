"""The router's Prometheus metrics. One object owns one registry; nothing is registered globally.

Times are in seconds. Per-worker gauges are read from the router when Prometheus asks, so that a worker
that is gone leaves no stale series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .records import Place, RequestRecord, SequenceRecord, WorkerSample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bounds in seconds. ITL and TPOT sit between a millisecond and seconds, TTFT and e2e up to minutes.
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BYTES = tuple(float(4**n * 1024) for n in range(12))
_PLACE = ("pool", "worker")


class Metrics:
    """All series of one router, prefixed `baton_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter("baton_requests", "Requests that ended.", ["outcome"], registry=registry)
        self._prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of ended requests.", registry=registry)
        self._output_tokens = Counter("baton_output_tokens", "Tokens that reached the router.", _PLACE, registry=registry)
        self._cached_tokens = Counter("baton_cached_tokens", "Prompt tokens found in a prefix cache.", registry=registry)
        self._attempts = Counter("baton_attempts", "Attempts placed on workers.", registry=registry)
        self._retries = Counter("baton_retries", "Attempts that replaced an earlier one.", ["reason"], registry=registry)
        self._lost = Counter("baton_workers_lost", "Workers declared dead.", _PLACE, registry=registry)
        self._e2e = Histogram("baton_e2e_seconds", "Arrival to last token.", buckets=_LONG, registry=registry)
        self._ttft = Histogram("baton_ttft_seconds", "Arrival to first token.", _PLACE, buckets=_LONG, registry=registry)
        self._stages = Histogram(
            "baton_stage_seconds",
            "Stages of a sequence: queue + prefill = TTFT, then handoff and first_decode up to the second token.",
            ["stage", *_PLACE],
            buckets=_LONG,
            registry=registry,
        )
        self._tpot = Histogram("baton_tpot_seconds", "(Last - first token) / (n - 1).", _PLACE, buckets=_SHORT, registry=registry)
        self._gaps = _Gaps("baton_itl_seconds", "Gap between tokens.", _SHORT)
        registry.register(self._gaps)
        self._known: dict[tuple[Histogram, str, Place], Histogram] = {}
        self._token_series: dict[Place, tuple[Counter, _GapSeries]] = {}
        handoff = ["transport"]
        self._handoff_bytes = Histogram(
            "baton_handoff_bytes", "KV bytes of one handoff.", handoff, buckets=_BYTES, registry=registry
        )
        self._handoff_seconds = Histogram(
            "baton_handoff_seconds",
            "Wall time of the pushes, to their acknowledgement.",
            handoff,
            buckets=_SHORT,
            registry=registry,
        )
        self._handoff_exposed = Histogram(
            "baton_handoff_exposed_seconds",
            "First token sampled to the receiver's acknowledgement.",
            handoff,
            buckets=_SHORT,
            registry=registry,
        )
        self._active = Gauge("baton_requests_active", "Requests in the router.", registry=registry)
        self._pending = Gauge("baton_requests_pending", "Sequences that were never placed on a worker.", registry=registry)
        self._ready = Gauge("baton_ready", "1 when the router serves.", registry=registry)

    def observe_cluster(
        self,
        active: Callable[[], int],
        pending: Callable[[], int],
        ready: Callable[[], bool],
        workers: Callable[[], Sequence[WorkerSample]],
    ) -> None:
        """Say where the gauges read their values from. Called once, when the router is put together."""
        self._active.set_function(active)
        self._pending.set_function(pending)
        self._ready.set_function(lambda: float(ready()))
        self.registry.register(_WorkerCollector(workers))

    def request_ended(self, record: RequestRecord) -> None:
        """Count one request and observe the times of its sequences."""
        self._requests.labels(record.outcome).inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        for sequence in record.sequences:
            self._cached_tokens.inc(sequence.cached_tokens)
            if sequence.stages.ttft is not None:
                self._observe_sequence(sequence, sequence.stages.ttft)

    def tokens(self, place: Place, num_tokens: int, gap: float | None) -> None:
        """`num_tokens` tokens of one sequence arrived, `gap` seconds after the ones before (None: they are the first)."""
        self.step(place, num_tokens, {} if gap is None else {gap / num_tokens: num_tokens})

    def step(self, place: Place, num_tokens: int, gaps: Mapping[float, int]) -> None:
        """`num_tokens` tokens of any number of sequences arrived together; `gaps` counts the gaps of each length."""
        series = self._token_series.get(place)
        if series is None:  # looking labels up costs more than counting
            counter = self._output_tokens.labels(place.pool, place.worker)
            series = self._token_series[place] = counter, self._gaps.series(place)
        series[0].inc(num_tokens)
        for gap, count in gaps.items():
            series[1].observe(gap, count)

    def attempt(self, retry_reason: str | None) -> None:
        """An attempt was placed; `retry_reason` says why the one before ended, None for the first."""
        self._attempts.inc()
        if retry_reason is not None:
            self._retries.labels(retry_reason).inc()

    def handoff(self, transport: str, num_bytes: int, seconds: float, exposed: float) -> None:
        self._handoff_bytes.labels(transport).observe(num_bytes)
        self._handoff_seconds.labels(transport).observe(seconds)
        self._handoff_exposed.labels(transport).observe(exposed)

    def worker_lost(self, place: Place) -> None:
        self._lost.labels(place.pool, place.worker).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _observe_sequence(self, record: SequenceRecord, ttft: float) -> None:
        stages = record.stages
        first = record.first or Place("", "")
        rest = record.rest or first
        for series, name, seconds, place in (
            (self._ttft, "", ttft, first),
            (self._stages, "queue", stages.queue, first),
            (self._stages, "prefill", stages.prefill, first),
            (self._stages, "handoff", stages.handoff, rest),
            (self._stages, "first_decode", stages.first_decode, rest),
            (self._tpot, "", stages.tpot, rest),
        ):
            if seconds is not None:
                self._series(series, name, place).observe(seconds)
        self._e2e.observe(stages.total)

    def _series(self, histogram: Histogram, stage: str, place: Place) -> Histogram:
        """The series of a worker, kept because looking labels up costs more than counting."""
        key = (histogram, stage, place)
        series = self._known.get(key)
        if series is None:
            labels = (stage, place.pool, place.worker) if stage else (place.pool, place.worker)
            series = self._known[key] = histogram.labels(*labels)
        return series


class _GapSeries:
    """One histogram, counted in plain numbers: a step's equal gaps at once, which prometheus_client can only take singly."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, gap: float, count: int) -> None:
        self._counts[bisect_left(self._bounds, gap)] += count
        self._sum += gap * count

    def add_to(self, family: HistogramMetricFamily, place: Place) -> None:
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(map(float, self._counts)), strict=True))
        family.add_metric([place.pool, place.worker], buckets, self._sum)


class _Gaps(Collector):
    """The histograms of all places."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._help = help_text
        self._bounds = bounds
        self._series: dict[Place, _GapSeries] = {}

    def series(self, place: Place) -> _GapSeries:
        return self._series.setdefault(place, _GapSeries(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=_PLACE)
        for place, series in self._series.items():
            series.add_to(family, place)
        yield family


_WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerSample], float | None]], ...] = (
    ("baton_worker_up", "1 when connected and in good health.", lambda s: float(s.up)),
    ("baton_worker_assigned", "Attempts that the router has placed there.", lambda s: s.assigned),
    ("baton_worker_waiting", "Sequences that hold no blocks yet.", lambda s: s.waiting),
    ("baton_worker_running", "Sequences that run.", lambda s: s.running),
    ("baton_worker_free_blocks", "Blocks that can be allocated.", lambda s: s.free_blocks),
    ("baton_worker_blocks", "Blocks of the KV pool.", lambda s: s.total_blocks),
    ("baton_worker_quarantined_blocks", "Blocks that a lost worker might still write.", lambda s: s.quarantined_blocks),
    ("baton_worker_tickets", "Tickets alive, at either end.", lambda s: s.tickets),
    ("baton_worker_step", "Number of the last step started.", lambda s: s.step),
    ("baton_worker_heartbeat_age_seconds", "Time since the last heartbeat.", lambda s: s.heartbeat_age),
)


class _WorkerCollector(Collector):
    """Per-worker gauges, made from fresh samples at every scrape."""

    def __init__(self, workers: Callable[[], Sequence[WorkerSample]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        samples = self._workers()
        for name, help_text, read in _WORKER_GAUGES:
            family = GaugeMetricFamily(name, help_text, labels=_PLACE)
            for sample in samples:
                value = read(sample)
                if value is not None:
                    family.add_metric([sample.place.pool, sample.place.worker], value)
            yield family
