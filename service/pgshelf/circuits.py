"""The circuits of a process: requests and the worker share what they learn of a provider that is away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import sqlalchemy
from prometheus_client import Counter, Gauge

from pgshelf.breaker import Breaker, CircuitOpen
from pgshelf.embedders import (
    Embedder,
    EmbedderAway,
    EmbedderError,
    ModelUnknown,
    TextRefused,
    TextsRefused,
)
from pgshelf.rerankers import ModelUnknown as RerankModelUnknown
from pgshelf.rerankers import RefusedToRank, Reranker, RerankerError, RerankerUnavailable
from pgshelf.settings import Settings


class Kind(msgspec.Struct, frozen=True):
    """A kind of provider: what it is called, and how its calls end."""

    name: str
    answers: tuple[type[Exception], ...]  # the provider is there, and refuses what was asked
    failures: type[Exception]
    away: Callable[[str, float], Exception]  # what is raised while the circuit is open: a message, seconds to wait


EMBEDDER = Kind("embedder", (TextRefused, TextsRefused, ModelUnknown), EmbedderError, EmbedderAway)
RERANKER = Kind("reranker", (RefusedToRank, RerankModelUnknown), RerankerError, RerankerUnavailable)


class Asked(msgspec.Struct, frozen=True):
    """Who is asked, and has a circuit: not a provider, for a model that fails shall not keep others from theirs."""

    kind: Kind
    provider: str
    model: str
    dimension: int | None = None  # numbers per vector, of an embedder


OPEN = Gauge(
    "pgshelf_circuits_open",
    "Processes that leave an embedder or reranker alone because it keeps failing.",
    ["provider", "model"],
    multiprocess_mode="livesum",
)
OPENED = Counter(
    "pgshelf_circuits_opened", "Times that a process began to leave an embedder or reranker alone.", ["provider"]
)
# by the pool of the application: one process may run several
_circuits: WeakKeyDictionary[sqlalchemy.Engine, dict[Asked, Breaker]] = WeakKeyDictionary()


def embedder(asked: Embedder) -> Asked:
    """An embedder, as `guarded` takes it."""
    return Asked(EMBEDDER, asked.provider, asked.model, asked.dimension)


def reranker(asked: Reranker) -> Asked:
    """A reranker, as `guarded` takes it."""
    return Asked(RERANKER, asked.provider, asked.model)


@contextlib.contextmanager
def guarded(engine: sqlalchemy.Engine, settings: Settings, asked: Asked) -> Iterator[None]:
    """Around a call of a provider, to note how it ends; while the circuit is open its `kind.away` is raised."""
    circuits = _circuits.setdefault(engine, {})
    if asked not in circuits:
        circuits[asked] = _made(settings, asked)
    circuit, kind = circuits[asked], asked.kind
    try:
        probe = circuit.enter()
    except CircuitOpen as error:
        raise kind.away(str(error), error.retry_after) from None
    try:
        yield
    except kind.answers:
        circuit.succeeded()
        raise
    except kind.failures as error:
        circuit.failed(probe, getattr(error, "retry_after", None))
        raise
    except BaseException:  # cancelled, or a bug: says nothing of the provider
        circuit.left(probe)
        raise
    circuit.succeeded()


def _made(settings: Settings, asked: Asked) -> Breaker:
    gauge, counter = OPEN.labels(asked.provider, asked.model), OPENED.labels(asked.provider)

    def changed(is_open: bool) -> None:
        gauge.set(is_open)
        counter.inc(is_open)

    name = f'the {asked.kind.name} "{asked.provider}" with the model "{asked.model}"'
    return Breaker(name, settings.circuit_failures, settings.circuit_wait, changed=changed)


def away(engine: sqlalchemy.Engine) -> list[dict[str, Any]]:
    """The embedders that are not to be asked now, as parts of what libraries say of theirs."""
    return [
        {"provider": asked.provider, "model": asked.model, "dimension": asked.dimension}
        for asked, circuit in _circuits.get(engine, {}).items()
        if asked.kind is EMBEDDER and circuit.remaining()
    ]


def is_away(engine: sqlalchemy.Engine, asked: Embedder) -> bool:
    """Whether an embedder has been failing for everybody."""
    circuit = _circuits.get(engine, {}).get(embedder(asked))
    return circuit is not None and circuit.is_open
