"""A primary that dies, and commits of which nobody knows: what writers are told is true."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.replication.cluster import Cluster
from tests.replication.conftest import Serve
from tests.replication.failovers import Failovers
from tests.rest.asking import at, document, library, ok, problem, until

pytestmark = pytest.mark.xdist_group("replication")
DOCUMENT = {"chunks": [{"text": "one", "embedding": [1.0, 0.0, 0.0]}]}
WAITING = "select pid from pg_stat_activity where wait_event = 'SyncRep'"


@contextmanager
def waiting_for(cluster: Cluster, standby: str) -> Iterator[None]:
    """Commits wait for a standby of this name."""
    cluster.primary.set(synchronous_standby_names=standby)
    try:
        yield
    finally:
        cluster.primary.set(synchronous_standby_names="")


async def made(client: object, cluster: Cluster) -> str:
    name = f"l-{uuid.uuid4().hex[:8]}"
    await library(client, name)  # type: ignore[arg-type]
    cluster.caught_up()
    return name


@pytest.mark.parametrize("single", [False, True])
async def test_a_commit_that_no_standby_confirms_is_unknown_and_can_be_repeated(
    cluster: Cluster, serve: Serve, single: bool
) -> None:
    client = await serve(statement_timeout=1.0)
    name = await made(client, cluster)
    path, sent = at("libraries", name, "documents", "k"), {"Idempotency-Key": uuid.uuid4().hex}
    if single:  # a statement that is its own transaction
        ok(await client.put(path, json=DOCUMENT), 201)
    with waiting_for(cluster, "nobody"):
        started = time.monotonic()
        if single:
            answer = await client.delete(path)
        else:
            answer = await client.put(path, json=DOCUMENT, headers=sent)
        assert "no standby has confirmed" in problem(answer, 503, "write_outcome_unknown")["detail"]
        assert time.monotonic() - started < 8
    if single:
        problem(await client.delete(path), 404, "document_not_found")  # it was done
    else:
        again = await client.put(path, json=DOCUMENT, headers=sent)
        assert again.status_code == 201 and again.headers["Idempotent-Replayed"] == "true"


async def test_a_connection_that_is_lost_in_a_commit_leaves_the_outcome_unknown(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    name = await made(client, cluster)
    path = at("libraries", name, "documents", "k")
    with waiting_for(cluster, "nobody"):
        writing = asyncio.create_task(client.put(path, json=DOCUMENT))

        async def in_commit() -> bool:
            return cluster.primary.ask(WAITING) is not None

        await until(in_commit)
        cluster.primary.ask("select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")
        problem(await writing, 503, "write_outcome_unknown")
    ok(await client.get(path, headers={"Pgshelf-Consistency": "strong"}))


async def test_a_connection_that_is_lost_before_the_commit_has_written_nothing(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    name = await made(client, cluster)
    await document(client, "k", into=name)
    path = at("libraries", name, "documents", "k")
    with psycopg.connect(cluster.primary.url) as holder:
        holder.execute("select from pgshelf.documents where key = 'k' for update")
        writing = asyncio.create_task(client.patch(path, json={"title": "new"}))

        ended = 0
        while not writing.done():  # it is tried once more, in another session
            ended += cluster.primary.ask(
                "select count(pg_terminate_backend(pid)) from pg_locks where not granted and pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.05)
        assert ended >= 2
        problem(await writing, 503, "database_unavailable")
    assert ok(await client.get(path, headers={"Pgshelf-Consistency": "strong"}))["title"] is None


async def test_a_failover_under_load(cluster: Cluster, serve: Serve) -> None:
    for node in cluster.nodes:
        node.settings["synchronous_standby_names"] = "ANY 1 (n0, n1, n2)"
    cluster.primary.set(synchronous_standby_names="ANY 1 (n0, n1, n2)")
    client = await serve(statement_timeout=5.0)
    name = await made(client, cluster)
    cluster.standbys[0].ask("checkpoint")
    failovers = Failovers(client, cluster, name, seed=3)
    await failovers.run(1)
    print(failovers.figures())
    assert sum(failovers.lost.values()) == 0, failovers.figures()
    assert failovers.acknowledged
