"""The one place where the parts meet."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psycopg
from litestar import Litestar, Request
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, License, SecurityScheme, Tag
from litestar.router import Router

from pgshelf import (
    __version__,
    access,
    audit,
    batch,
    bodies,
    cache,
    changes,
    chunks,
    documents,
    edge,
    embedder_changes,
    events,
    exports,
    facets,
    filtered_documents,
    health,
    http,
    idempotency,
    imports,
    indexes,
    keys,
    libraries,
    logs,
    metrics,
    openapi,
    pools,
    providers,
    query_cache,
    replicas,
    replication,
    retry,
    search,
    tracing,
    worker,
)
from pgshelf.embedders import embedder_for
from pgshelf.guard import Guard
from pgshelf.settings import Settings

PARENT = "_PGSHELF_PARENT"  # set by `pgshelf serve` to its process id

TAGS = [
    Tag("libraries", "Documents that share an embedder, a dimension and a metric."),
    Tag("documents", "What is stored: written whole, with all chunks, in one transaction."),
    Tag("chunks", "The passages that are searched."),
    Tag("embedders", "Who makes the vectors of a library, and how that is changed while it is searched and written."),
    Tag("indexes", "How a library is searched: exactly, or by an index, which is built while searches go on."),
    Tag("search", "Find the nearest chunks."),
    Tag("cache", "Answers of searches that are kept, and given again while nothing has changed."),
    Tag("changes", "What happens in a library, one after the other."),
    Tag("keys", "Who may call, with which role, and which libraries each sees. docs/security.md has the whole of it."),
    Tag("audit", "Who did what to which library."),
    Tag("replication", "Replicas, and backups of the whole server. docs/replication.md has the runbook."),
    Tag("health", "For load balancers and operators."),
]
ROUTERS = [
    libraries.router,
    documents.router,
    filtered_documents.router,
    batch.router,
    imports.router,
    exports.router,
    chunks.router,
    events.router,
    changes.router,
    retry.router,
    search.router,
    indexes.router,
    embedder_changes.router,
    facets.router,
    keys.router,
    audit.router,
    cache.router,
    replication.router,
]
BEARER = SecurityScheme(
    type="http",
    scheme="bearer",
    description="A key (pgs_...), a token made from one (pgt_...), or a JWT of the issuer that the server trusts.",
)


class Parts:
    """What an application is made of: one of each, which its handlers share."""

    def __init__(self, settings: Settings, url: str) -> None:
        self.settings = settings
        self.traces = tracing.Traces() if settings.tracing else None
        cursor = self.traces.cursor() if self.traces else psycopg.AsyncCursor
        self.engine = pools.make_engine(settings, url, cursor=cursor)
        metrics.observe_pool(self.engine, settings.pool_size)
        self.readers = changes.Readers(self.engine, settings)
        servers = replicas.targets(settings)
        self.topology = replicas.Topology(settings, self.engine, url, servers, cursor) if servers else None
        opening = self.topology.primary.opening if self.topology else contextlib.nullcontext
        self.answers = query_cache.QueryCache(settings, url, opening)
        self.guard = Guard(settings, self.engine, url, self.topology, opening)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Litestar) -> AsyncIterator[None]:
        """Watch, reconcile and listen while the application runs; afterwards give back what the parts hold."""
        settings, topology = self.settings, self.topology
        if settings.default_embedder == "local":  # load the model before the first request needs it
            await embedder_for(settings, {"provider": "local"}).embed(["pgshelf"], "query")
        reconciler = worker.running(self.engine, settings) if settings.worker_enabled else contextlib.nullcontext()
        watch = topology.watched() if topology else contextlib.nullcontext()
        async with watch, reconciler, changes.waking(self.readers):
            yield
        await self.guard.close()
        await self.answers.close()
        await providers.close()
        await pools.close(self.engine)
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)  # it waits for the collector

    def dependencies(self, metrics_folder: Path | None) -> dict[str, Provide]:
        """What handlers ask for, by the names of their parameters."""

        # what could be had at once, Litestar makes a task each for; asking for another puts each behind that
        def settings(engine: http.Engine) -> Settings:
            return self.settings

        def topology(settings: http.Config) -> replicas.Topology | None:
            return self.topology

        def cache(reader: http.Reader) -> query_cache.QueryCache:
            return self.answers

        def principal(settings: http.Config, request: Request[Any, Any, Any]) -> access.Principal:
            return access.principal(request)

        return {
            "engine": Provide(lambda: self.engine, sync_to_thread=False),
            "settings": Provide(settings, sync_to_thread=False),
            "metrics_folder": Provide(lambda: metrics_folder, sync_to_thread=False),
            "readers": Provide(lambda: self.readers, sync_to_thread=False),
            "cache": Provide(cache, sync_to_thread=False),
            "topology": Provide(topology, sync_to_thread=False),
            "reader": Provide(replicas.reader, sync_to_thread=False),
            "once": Provide(idempotency.once),
            "audited": Provide(idempotency.audited, sync_to_thread=False),
            "principal": Provide(principal, sync_to_thread=False),
        }


def create_app(settings: Settings, metrics_folder: Path | None = None) -> Litestar:
    """The ASGI application over the database of `settings.database_url`, which must be set.

    Several processes of one service share a `metrics_folder`.
    """
    if not settings.database_url:
        raise ValueError(
            "create_app needs settings.database_url; `pgshelf serve` starts a PostgreSQL where there is none"
        )
    parts = Parts(settings, settings.database_url)
    app = Litestar(
        route_handlers=[Router(settings.api_prefix or "/", route_handlers=ROUTERS), health.router, metrics.router],
        dependencies=parts.dependencies(metrics_folder),
        dto=http.Body,
        return_dto=None,
        response_class=http.Answer,
        middleware=[
            edge.decode_path,
            bodies.patience(settings),
            parts.guard.middleware,
            http.known_content,
            parts.answers.middleware,
        ],
        cors_config=edge.cors(settings),
        exception_handlers={Exception: http.render_problem},
        request_max_body_size=settings.max_body_bytes,
        lifespan=[parts.lifespan],
        logging_config=None,
        openapi_config=_openapi(),
    )
    app.asgi_handler = edge.Edge(app.asgi_handler, _observer(settings), parts.traces)
    return app


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="pgshelf",
        version=__version__,
        description="A vector document store that lives in PostgreSQL.",
        license=License("Apache-2.0", identifier="Apache-2.0"),
        openapi_router=Router(
            "/schema",
            route_handlers=[],
            include_in_schema=False,
            dto=None,
            return_dto=None,
            before_request=openapi.only_what_is_there,
        ),
        render_plugins=[openapi.Reference(path=["/", "/openapi.json"])],
        tags=TAGS,
        components=Components(security_schemes={"key": BEARER}),
        security=[{"key": []}],
        use_handler_docstrings=True,
    )


def _observer(settings: Settings) -> Callable[[edge.Served], None]:
    def observe(served: edge.Served) -> None:
        metrics.count(served)
        # to wait for changes, or for a slow client's body, is no work
        worked = served.stages["total"] - served.stages.get("wait", 0) - served.stages.get("receive", 0)
        slow = worked >= settings.slow_request * 1000
        if slow or settings.access_log:
            logs.request(slow, served.method, served.route, served.status, served.stages, served.notes)

    return observe


def from_environment() -> Litestar:
    """The application of a serving process; `pgshelf serve` hands its settings down through the environment."""
    if parent := os.environ.get(PARENT):
        threading.Thread(target=_die_with, args=(int(parent),), daemon=True).start()
    settings = Settings.from_env(os.environ)
    logs.configure(settings.log_level, settings.log_format)
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    app = create_app(settings, Path(folder) if folder else None)
    # what was made so far stays: the collector need not look at it again, nor come for every 700 objects of a request
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    return app


def _die_with(parent: int) -> None:
    """A worker whose parent was killed would go on holding the port; this ends it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
