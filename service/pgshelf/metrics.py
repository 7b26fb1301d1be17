"""What an operator's Prometheus reads at `/metrics`: requests and stages of all processes, and what the database says.

Whichever process is asked adds up what all have counted. What is one for all processes is asked of the database.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy
from litestar import Response, Router, get
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as exposition
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from sqlalchemy import event

from pgshelf import database
from pgshelf.counts import Folder, everywhere
from pgshelf.edge import Served
from pgshelf.http import Config, Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

REQUESTS = Counter("pgshelf_http_requests", "Requests answered.", ["method", "route", "status"])
DURATION = Histogram(
    "pgshelf_http_request_duration_seconds", "From a request to its answer.", ["route"], buckets=SECONDS
)
STAGES = Histogram("pgshelf_http_stage_seconds", "Stages of requests, as in Server-Timing.", ["stage"], buckets=SECONDS)
PROBLEMS = Counter("pgshelf_problems", "Answers that are problems, by their code.", ["code"])
POOL = Gauge("pgshelf_pool_connections", "Connections to PostgreSQL.", ["state"], multiprocess_mode="livesum")
POOL_SIZE = Gauge("pgshelf_pool_size", "Connections that the processes may open.", multiprocess_mode="livesum")

# chunks are estimated from the statistics collector: counting millions at every scrape would be a load of its own
QUERY = """
select 'pgshelf_libraries', index_state, count(*)::float8 from pgshelf.libraries where deleted_at is null group by 2
union all select 'pgshelf_libraries_waiting', null, count(distinct library_id) from pgshelf.waiting
union all select 'pgshelf_pending_age_seconds', null,
  coalesce(extract(epoch from now() - min(due)), 0)::float8 from pgshelf.waiting where due <= now()
union all select 'pgshelf_documents', null, greatest(reltuples, 0)::float8 from pg_class
  where oid = 'pgshelf.documents'::regclass
union all select 'pgshelf_index_builds_running', null, pgshelf.builds_running()::float8
union all select m.* from pgshelf.library_metrics(%s) l cross join lateral (values
  ('pgshelf_library_chunks', l.library, l.chunks), ('pgshelf_library_bytes', l.library, l.bytes),
  ('pgshelf_library_pending', l.library, l.pending), ('pgshelf_library_failed', l.library, l.failed)
  ) m(name, label, value)
  where m.value is not null
union all select m.name, r.name, m.value from pgshelf.replication(%s, %s) r, lateral (values
  ('pgshelf_replication_healthy', case when r.health is not null then (r.health = 'healthy')::int::float8 end),
  ('pgshelf_replication_lag_bytes', r.lag_bytes), ('pgshelf_replication_lag_seconds', r.lag_seconds),
  ('pgshelf_replication_retained_bytes', r.retained_bytes),
  ('pgshelf_replication_conflicts', (select sum(c.value::float8) from jsonb_each_text(r.conflicts) c))) m (name, value)
  where r.role <> 'primary' and m.value is not null
"""
MEANINGS = {
    "pgshelf_libraries": ("Libraries by the state of their index.", "state"),
    "pgshelf_libraries_waiting": ("Libraries that may hold chunks without a vector.", None),
    "pgshelf_pending_age_seconds": ("How long the oldest chunk that is due has waited for its vector.", None),
    "pgshelf_documents": ("Documents of all libraries, as PostgreSQL estimates them.", None),
    "pgshelf_replication_healthy": (
        "Whether a replica, or the standby asked, is connected and in time.",
        "replica",
    ),
    "pgshelf_replication_lag_bytes": ("WAL that it has not replayed.", "replica"),
    "pgshelf_replication_lag_seconds": ("Age of the last moment of which it has everything.", "replica"),
    "pgshelf_replication_retained_bytes": ("WAL that its slot keeps on the server that was asked.", "replica"),
    "pgshelf_replication_conflicts": ("Queries that replay cancelled on the standby that was asked.", "replica"),
    "pgshelf_index_builds_running": ("Indexes of shelves that PostgreSQL is building.", None),
    "pgshelf_library_chunks": ("Chunks of a library, estimated where it has a shelf of its own.", "library"),
    "pgshelf_library_bytes": ("Bytes of a shelf with its indexes.", "library"),
    "pgshelf_library_pending": ("Chunks that wait for their vector, up to 100,000.", "library"),
    "pgshelf_library_failed": ("Chunks that were given up, up to 100,000.", "library"),
}


def observe_pool(engine: sqlalchemy.Engine, size: int) -> None:
    """Count the connections of an engine's pool as they come, go, and are used."""
    POOL_SIZE.set(size)
    for state in ("open", "used"):
        POOL.labels(state).set(0)
    for name, state, step in (("connect", "open", 1), ("close", "open", -1), ("checkout", "used", 1)):
        event.listen(engine.pool, name, _step(state, step))
    event.listen(engine.pool, "checkin", _step("used", -1))


def _step(state: str, amount: int) -> Any:
    def count(*_: Any) -> None:
        POOL.labels(state).inc(amount)

    return count


# finding the series of some labels takes longer than counting; there are only so many routes and stages
_requests = functools.cache(REQUESTS.labels)
_duration, _stages = functools.cache(DURATION.labels), functools.cache(STAGES.labels)


def count(served: Served) -> None:
    """Count a request that was answered."""
    _requests(served.method, served.route, served.status).inc()
    if served.problem is not None:
        PROBLEMS.labels(served.problem).inc()
    for name, milliseconds in served.stages.items():
        (_duration(served.route) if name == "total" else _stages(name)).observe(milliseconds / 1000)


class Rows:
    """What the database said, as a collector of prometheus-client."""

    def __init__(self, rows: Iterable[tuple[Any, ...]]) -> None:
        self.rows = rows

    def collect(self) -> Iterator[Metric]:
        """A family for each name, in the order of MEANINGS."""
        families = {
            name: GaugeMetricFamily(name, meaning, labels=[label] if label else [])
            for name, (meaning, label) in MEANINGS.items()
        }
        for name, label, value in self.rows:
            families[name].add_metric([label] if label is not None else [], value or 0.0)
        return iter(families.values())


# not in the OpenAPI document: its readers know the address, and it is no part of what a client may rely on
@get("/metrics", media_type=CONTENT_TYPE_LATEST, include_in_schema=False, operation_id="metrics")
async def metrics(engine: Engine, settings: Config, metrics_folder: Folder) -> Response[bytes]:
    """Everything that is measured, of all processes of this service, in Prometheus' text format."""
    limits = (settings.replication_lag_bytes, settings.replication_lag_seconds)
    rows = await database.run(engine, QUERY, settings.metrics_libraries, *limits)
    registry = CollectorRegistry()
    registry.register(Rows(rows))
    return Response(exposition(everywhere(metrics_folder)) + exposition(registry), media_type=CONTENT_TYPE_LATEST)


router = Router("/", route_handlers=[metrics])
