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
    EmbedderUnavailable,
    ModelUnknown,
    TextRefused,
    TextsRefused,
)
from pgshelf.settings import Settings

ANSWERS = (TextRefused, TextsRefused, ModelUnknown)  # the provider is there, and refuses what was asked
OPEN = Gauge(
    "pgshelf_circuits_open",
    "Processes that leave an embedder alone because it keeps failing.",
    ["provider", "model"],
    multiprocess_mode="livesum",
)
OPENED = Counter("pgshelf_circuits_opened", "Times that a process began to leave an embedder alone.", ["provider"])
Identity = tuple[str, str, int]
# by the pool of the application: one process may run several
_circuits: WeakKeyDictionary[AsyncEngine, dict[Identity, Breaker]] = WeakKeyDictionary()


def _identity(embedder: Embedder) -> Identity:
    # not the provider alone: a library whose model fails shall not keep others from theirs
    return embedder.provider, embedder.model, embedder.dimension


def _circuit(engine: AsyncEngine, settings: Settings, embedder: Embedder) -> Breaker:
    circuits = _circuits.setdefault(engine, {})
    identity = _identity(embedder)
    if identity not in circuits:
        name = f'the embedder "{embedder.provider}" with the model "{embedder.model}"'
        circuits[identity] = Breaker(name, settings.circuit_failures, settings.circuit_wait, changed=_count(embedder))
    return circuits[identity]


def _count(embedder: Embedder) -> Callable[[bool], None]:
    gauge, counter = OPEN.labels(embedder.provider, embedder.model), OPENED.labels(embedder.provider)

    def changed(is_open: bool) -> None:
        gauge.set(is_open)
        counter.inc(is_open)

    return changed


@contextlib.contextmanager
def guarded(engine: AsyncEngine, settings: Settings, embedder: Embedder) -> Iterator[None]:
    """Around a call of a provider, to note how it ends; while the circuit is open, EmbedderAway instead."""
    circuit = _circuit(engine, settings, embedder)
    try:
        probe = circuit.enter()
    except CircuitOpen as error:
        raise EmbedderAway(str(error), error.retry_after) from None
    try:
        yield
    except ANSWERS:
        circuit.succeeded()
        raise
    except EmbedderError as error:
        circuit.failed(probe, error.retry_after if isinstance(error, EmbedderUnavailable) else None)
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
