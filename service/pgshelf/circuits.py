"""The circuits of a process: requests and the worker share what they learn of a provider that is away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import Counter, Gauge
from sqlalchemy.ext.asyncio import AsyncEngine

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

ANSWERS = (TextRefused, TextsRefused, ModelUnknown)  # the provider is there, and refuses what was asked
RERANKERS_ANSWERS = (RefusedToRank, RerankModelUnknown)
OPEN = Gauge(
    "pgshelf_circuits_open",
    "Processes that leave an embedder or reranker alone because it keeps failing.",
    ["provider", "model"],
    multiprocess_mode="livesum",
)
OPENED = Counter(
    "pgshelf_circuits_opened", "Times that a process began to leave an embedder or reranker alone.", ["provider"]
)
Identity = tuple[str, str, int]
# by the pool of the application: one process may run several
_circuits: WeakKeyDictionary[AsyncEngine, dict[Identity, Breaker]] = WeakKeyDictionary()
_of_rerankers: WeakKeyDictionary[AsyncEngine, dict[str, Breaker]] = WeakKeyDictionary()


def _identity(embedder: Embedder) -> Identity:
    # not the provider alone: a library whose model fails shall not keep others from theirs
    return embedder.provider, embedder.model, embedder.dimension


def _made(settings: Settings, kind: str, provider: str, model: str) -> Breaker:
    gauge, counter = OPEN.labels(provider, model), OPENED.labels(provider)

    def changed(is_open: bool) -> None:
        gauge.set(is_open)
        counter.inc(is_open)

    name = f'the {kind} "{provider}" with the model "{model}"'
    return Breaker(name, settings.circuit_failures, settings.circuit_wait, changed=changed)


@contextlib.contextmanager
def guarded(engine: AsyncEngine, settings: Settings, embedder: Embedder) -> Iterator[None]:
    """Around a call of a provider, to note how it ends; while the circuit is open, EmbedderAway instead."""
    circuits, identity = _circuits.setdefault(engine, {}), _identity(embedder)
    if identity not in circuits:
        circuits[identity] = _made(settings, "embedder", embedder.provider, embedder.model)
    with _around(circuits[identity], ANSWERS, EmbedderError, EmbedderAway):
        yield


@contextlib.contextmanager
def guarded_reranker(engine: AsyncEngine, settings: Settings, reranker: Reranker) -> Iterator[None]:
    """The same around a call of a reranker; while its circuit is open, RerankerUnavailable instead."""
    circuits = _of_rerankers.setdefault(engine, {})
    if reranker.model not in circuits:
        circuits[reranker.model] = _made(settings, "reranker", reranker.provider, reranker.model)
    with _around(circuits[reranker.model], RERANKERS_ANSWERS, RerankerError, RerankerUnavailable):
        yield


@contextlib.contextmanager
def _around(
    circuit: Breaker,
    answers: tuple[type[Exception], ...],
    failures: type[Exception],
    away: Callable[[str, float], Exception],
) -> Iterator[None]:
    try:
        probe = circuit.enter()
    except CircuitOpen as error:
        raise away(str(error), error.retry_after) from None
    try:
        yield
    except answers:
        circuit.succeeded()
        raise
    except failures as error:
        circuit.failed(probe, getattr(error, "retry_after", None))
        raise
    except BaseException:  # cancelled, or a bug: says nothing of the provider
        circuit.left(probe)
        raise
    circuit.succeeded()


def away(engine: AsyncEngine) -> list[dict[str, Any]]:
    """The embedders that are not to be asked now, as parts of what libraries say of theirs."""
    names = ("provider", "model", "dimension")
    circuits = _circuits.get(engine, {})
    return [dict(zip(names, identity, strict=True)) for identity, circuit in circuits.items() if circuit.remaining()]


def is_away(engine: AsyncEngine, embedder: Embedder) -> bool:
    """Whether an embedder has been failing for everybody."""
    circuit = _circuits.get(engine, {}).get(_identity(embedder))
    return circuit is not None and circuit.is_open
