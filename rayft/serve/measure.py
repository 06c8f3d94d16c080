"""`/metrics`: vLLM's names where it has them, with the label `adapter`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rayft.serve.backend import ReplicaState
from rayft.serve.record import Record

MOST_NAMES = 100
"""Adapters with a label of their own: those that were asked for first. All others count as `other`."""
OTHER = "other"
_OWN = ("model_name", "adapter")

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_NUMBERS = (1, 2, 5, 10, 20, 50, 100)


class Measure:
    """All numbers of one server. The token counters are the sums of what `usage` says."""

    def __init__(self, most_names: int = MOST_NAMES) -> None:
        self.base = ""
        """Name of the base, vLLM's label `model_name`; set before the first request ends."""
        self._most = most_names
        self._names: set[str] = set()
        self._states: Sequence[ReplicaState] = ()
        self._running: Sequence[str] = ()
        self.registry = CollectorRegistry()
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("prompt_tokens_cached", "Tokens of prompts that came from the prefix cache")
        self._generated = self._counter("generation_tokens", "Tokens of answers")
        self._success = self._counter("request_success", "Answers that ended", "finished_reason")
        self._refused = self._counter("admission_rejections", "Requests that were refused for now", "reason", own=False)
        self._failed = Counter(
            "rayft:request_errors", "Requests that failed, by HTTP status", ["status"], registry=self.registry
        )
        self._hits = Counter(
            "rayft:response_cache_hits", "Requests answered from the response cache", registry=self.registry
        )
        self._seconds = self._histogram("e2e_request_latency_seconds", "Time of a request", _SECONDS)
        self._queued = self._histogram("request_queue_time_seconds", "Before the first step of a request", _SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "Of streams", _SECONDS)
        self._gap = self._histogram("inter_token_latency_seconds", "Time between chunks of a stream", _SECONDS)
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Mean over a stream", _SECONDS)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of a request's answers", _TOKENS)
        self._n = self._histogram("request_params_n", "Answers that a request asks for", _NUMBERS)
        self._most_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request", _TOKENS)
        self.registry.register(_Replicas(self))

    def add(self, record: Record) -> None:
        """Count a request that has ended."""
        if record.status in (429, 503):
            self._refused.labels(record.error or "").inc()
        if record.status != 200:
            self._failed.labels(str(record.status)).inc()
            return
        own = (self.base, self.label(record.name))
        self._prompt.labels(*own).inc(record.prompt_tokens)
        self._cached.labels(*own).inc(record.cached_tokens)
        self._generated.labels(*own).inc(record.completion_tokens)
        for reason in record.finish_reasons:
            self._success.labels(*own, reason).inc()
        self._hits.inc(record.from_cache)
        self._seconds.labels(*own).observe(record.seconds)
        if record.queued is not None:
            self._queued.labels(*own).observe(record.queued)
        self._prompts.labels(*own).observe(record.prompt_tokens)
        self._answers.labels(*own).observe(record.completion_tokens)
        self._n.labels(*own).observe(record.answers)
        if record.max_tokens is not None:
            self._most_tokens.labels(*own).observe(record.max_tokens)
        if record.first_token is not None:
            self._first.labels(*own).observe(record.first_token)
            each = record.completion_tokens / record.answers - 1
            if each > 0:
                self._per_token.labels(*own).observe((record.seconds - record.first_token) / each)
        gaps = self._gap.labels(*own)
        for gap in record.gaps:
            gaps.observe(gap)

    def label(self, name: str) -> str:
        """The value of `adapter` for a name."""
        if name not in self._names:
            if len(self._names) >= self._most:
                return OTHER
            self._names.add(name)
        return name

    def text(self, states: Sequence[ReplicaState], running: Iterable[str]) -> bytes:
        """What Prometheus reads. running: names of requests that are being answered."""
        self._states = states
        self._running = sorted({self.label(name) for name in running if name != self.base})
        return generate_latest(self.registry)

    def gauges(self) -> Iterator[Metric]:
        """The engines as they are now, by replica."""
        now: dict[str, tuple[str, Sequence[float | None]]] = {
            "vllm:num_requests_running": ("Requests in the batch", [s.running for s in self._states]),
            "vllm:num_requests_waiting": ("Requests that wait", [s.waiting for s in self._states]),
            "vllm:kv_cache_usage_perc": ("Share of the cache in use", [s.kv_cache_usage for s in self._states]),
            "rayft:queued_tokens": ("Tokens of prompts that wait", [s.queued_tokens for s in self._states]),
            "rayft:loaded_adapters": ("Adapters on the device", [len(s.loaded) for s in self._states]),
            "rayft:cached_adapters": ("Adapters in host memory", [len(s.cached) for s in self._states]),
            "rayft:memory_bytes": ("Resident bytes of the process", [s.memory for s in self._states]),
            "rayft:gpu_memory_bytes": ("Bytes on the device", [s.gpu_memory for s in self._states]),
        }
        for name, (help, values) in now.items():
            gauge = GaugeMetricFamily(name, help, labels=["model_name", "engine"])
            for state, value in zip(self._states, values, strict=True):
                if value is not None:
                    gauge.add_metric([self.base, state.id], value)
            yield gauge
        since_start: dict[str, tuple[str, Sequence[int]]] = {
            "vllm:num_preemptions": ("Requests that gave their place back", [s.preemptions for s in self._states]),
            "vllm:prefix_cache_queries": ("Tokens of prompts", [s.prompt_tokens for s in self._states]),
            "vllm:prefix_cache_hits": ("Of these, from the prefix cache", [s.cached_tokens for s in self._states]),
            "rayft:steps": ("Forward passes", [s.steps for s in self._states]),
        }
        for name, (help, counts) in since_start.items():
            counter = CounterMetricFamily(name, help, labels=["model_name", "engine"])
            for state, number in zip(self._states, counts, strict=True):
                counter.add_metric([self.base, state.id], number)
            yield counter
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of the requests that are being answered",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        if self._states:
            # One process has many replicas behind it and does not know in which one a request waits.
            info.add_metric([str(max(s.max_loras for s in self._states)), ",".join(self._running), ""], time.time())
        yield info

    def _counter(self, name: str, help: str, *labels: str, own: bool = True) -> Counter:
        return Counter(f"vllm:{name}", help, [*(_OWN if own else ()), *labels], registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", help, _OWN, buckets=buckets, registry=self.registry)


class _Replicas:
    """A collector of prometheus_client."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure

    def collect(self) -> Iterator[Metric]:
        return self._measure.gauges()

    def describe(self) -> list[Metric]:
        return []
