"""What the server counts, in Prometheus' form. No prompt, key or name of a caller is in it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("koff_requests", "Requests answered", ["path", "status"], registry=registry)
        self.tokens = Counter("koff_tokens", "Tokens read and made", ["kind"], registry=registry)
        self.running = Gauge("koff_texts_running", "Texts under way", registry=registry)
        self.waiting = Gauge("koff_texts_waiting", "Texts that wait", registry=registry)
        self.memories = Gauge("koff_memories", "Memories that can be asked for", registry=registry)
        self.first = Histogram(
            "koff_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram("koff_request_seconds", "From request to end", buckets=_SECONDS, registry=registry)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
