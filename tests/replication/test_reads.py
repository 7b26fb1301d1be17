"""Reads from standbys: where they go, what they show, and what a client never sees of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx2
import psycopg
import pytest
from prometheus_client import REGISTRY

from pgshelf import database, pools, replicas, servers
from pgshelf.consistency import Position
from tests.collector import attributes, collecting
from tests.conftest import MakeLiveServer, MakeSettings
from tests.replication.cluster import Cluster, Node
from tests.replication.conftest import Serve
from tests.replication.pairs import TOKEN, Pairs
from tests.rest.asking import at, bearer, document, key, library, ok, problem, until

pytestmark = pytest.mark.xdist_group("replication")
ASKED = {"vector": [1, 0, 0]}


def reads(node: Node | None = None) -> float:
    """How many reads a server has answered, or the primary's pool."""
    return REGISTRY.get_sample_value("pgshelf_replica_reads_total", {"server": name(node) if node else "primary"}) or 0


def retries(reason: str) -> float:
    return REGISTRY.get_sample_value("pgshelf_replica_retries_total", {"reason": reason}) or 0


def name(node: Node) -> str:
    return f"{node.socket}:5432"


@contextlib.contextmanager
def delayed(cluster: Cluster, by: str) -> Iterator[None]:
    """Commits take effect on the standbys so much later."""
    for node in cluster.standbys:
        node.set(recovery_min_apply_delay=by)
    try:
        yield
    finally:
        for node in cluster.standbys:
            node.set(recovery_min_apply_delay="0")
        cluster.caught_up()


async def filled(client: httpx2.AsyncClient, cluster: Cluster) -> str:
    """A library with a document, on all servers."""
    made = f"l-{uuid.uuid4().hex[:8]}"
    await library(client, made)
    await document(client, "k", into=made)
    cluster.caught_up()
    return made


async def search(client: httpx2.AsyncClient, made: str, **headers: str) -> list[Any]:
    hits: list[Any] = ok(await client.post(at("libraries", made, "search"), json=ASKED, headers=headers))["hits"]
    return hits


async def test_reads_spread_over_the_standbys_and_writes_find_the_primary(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    made = await filled(client, cluster)
    before = [reads(), *map(reads, cluster.standbys)]
    for path in ("", "/documents", "/documents/k", "/documents/k/chunks"):
        ok(await client.get(at("libraries", made) + path))
    for _ in range(6):
        assert len(await search(client, made)) == 1
    ok(await client.post(at("libraries", made, "facets"), json={"attributes": ["$key"]}))
    ok(await client.post(at("libraries", made, "documents", "query"), json={}))
    ok(await client.post("/v1/search", json={"libraries": [made], **ASKED}))
    ok(await client.post(at("libraries", made, "search", "batch"), json={"searches": [ASKED, ASKED]}))
    ok(await client.get("/ready"))
    after = [reads(), *map(reads, cluster.standbys)]
    assert after[0] == before[0]
    assert min(then - now for then, now in zip(after[1:], before[1:], strict=True)) >= 5


def test_a_statement_on_a_standby_is_part_of_the_trace(cluster: Cluster, make_live_server: MakeLiveServer) -> None:
    with collecting() as collector:
        server = make_live_server(
            cluster.url,
            PGSHELF_REPLICA_URL=cluster.replica_url,
            PGSHELF_EMBEDDER="none",
            PGSHELF_WORKER_ENABLED="false",
            **collector.environment,
        )
        made = f"l-{uuid.uuid4().hex[:8]}"
        body = {"name": made, "embedder": {"provider": "none"}, "dimension": 3}
        assert httpx2.post(f"{server.url}/v1/libraries", json=body).status_code == 201
        cluster.caught_up()
        trace = uuid.uuid4().hex
        into, sent = f"{server.url}/v1/libraries/{made}", {"traceparent": f"00-{trace}-{'1' * 16}-01"}
        assert httpx2.get(f"{into}/documents", headers=sent).status_code == 200
        spans = collector.of(trace, "GET /v1/libraries/{library}/documents")
        counted = httpx2.get(f"{server.url}/metrics").text
    assert 'pgshelf_replica_reads_total{server="primary"} 0.0' in counted
    [statement] = [span for span in spans if "count_chunks" in attributes(span).get("db.query.text", "")]
    assert {span.span_id: span.name for span in spans}[statement.parent_span_id] == "sql"


async def test_a_read_with_a_token_sees_the_write_and_one_without_need_not(cluster: Cluster, serve: Serve) -> None:
    client = await serve(replica_wait=5.0, pool_size=20)
    made = await filled(client, cluster)
    with delayed(cluster, "30ms"):
        before = sum(map(reads, cluster.standbys))
        sure = Pairs(client, made, tokens=True, seed=1)
        await sure.run(200, at_once=10)
        assert (sure.done, sure.stale) == (200, [])
        assert sum(map(reads, cluster.standbys)) - before > 150  # the replicas answered, not the primary for them
    with delayed(cluster, "1s"):  # nobody waits for it
        unsure = Pairs(client, made, tokens=False, seed=2)
        await unsure.run(40)
        assert unsure.stale


async def test_who_cannot_wait_long_enough_gets_the_primary(cluster: Cluster, serve: Serve) -> None:
    client = await serve(replica_wait=0.1)
    made = await filled(client, cluster)
    with delayed(cluster, "1s"):
        written = await client.put(at("libraries", made, "documents", "new"), json={"title": "new", "chunks": []})
        assert written.status_code == 201, written.text
        before, started = reads(), time.monotonic()
        read = await client.get(at("libraries", made, "documents", "new"), headers={TOKEN: written.headers[TOKEN]})
        assert ok(read)["title"] == "new"
        assert reads() == before + 1
        assert time.monotonic() - started < 0.8


async def test_levels(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    made = await filled(client, cluster)
    with delayed(cluster, "1s"):
        written = await client.put(at("libraries", made, "documents", "new"), json={"chunks": []})
        path, token = at("libraries", made, "documents", "new"), written.headers[TOKEN]
        before = reads()
        ok(await client.get(path, headers={"Pgshelf-Consistency": "strong"}))
        assert reads() == before  # it went past the replicas
        eventual = await client.get(path, headers={"Pgshelf-Consistency": "eventual", TOKEN: token})
        problem(eventual, 404, "document_not_found")
    problem(await client.get(path, headers={"Pgshelf-Consistency": "weak"}), 400, "validation_failed")
    for bad in ("", "x", token[:-1], token.upper() + "A", "0" * 34):
        problem(await client.get(path, headers={TOKEN: bad}), 400, "validation_failed")


async def test_tokens_of_another_history_are_understood(cluster: Cluster, serve: Serve) -> None:
    client = await serve(replica_wait=0.1)
    made = await filled(client, cluster)
    token = (await client.delete(at("libraries", made, "documents", "none"))).headers.get(TOKEN)
    assert token is None  # nothing was written
    token = (await client.put(at("libraries", made, "documents", "k"), json={"chunks": []})).headers[TOKEN]
    now = Position.of(token)
    cluster.caught_up()
    for odd in (Position(now.system ^ 1, now.timeline, 1), Position(now.system, now.timeline + 1, 1)):
        before = reads()
        ok(await client.get(at("libraries", made), headers={TOKEN: odd.token}))
        assert reads() == before + 1  # only the primary can be asked
    before = reads()
    ok(await client.get(at("libraries", made), headers={TOKEN: token}))
    assert reads() == before


async def test_one_write_one_token_and_a_repeated_write_has_one_too(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    made = await filled(client, cluster)
    path, sent = at("libraries", made, "documents", "twice"), {"Idempotency-Key": "once"}
    tokens = [(await client.put(path, json={"chunks": []}, headers=sent)).headers[TOKEN] for _ in range(2)]
    assert tokens == sorted(tokens)
    for call in (
        client.delete(path),
        client.post(at("libraries", made, "documents"), json={"key": "x", "chunks": []}),
        client.post(at("libraries", made, "documents", "batch"), json={"documents": [{"key": "y", "chunks": []}]}),
        client.patch(at("libraries", made), json={"description": "d"}),
    ):
        tokens.append((await call).headers[TOKEN])
    assert tokens == sorted(tokens)


async def test_a_paused_standby_is_left_within_the_deadline_and_serves_again(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    made = await filled(client, cluster)
    victim, other = cluster.standbys
    for _ in range(4):
        await search(client, made)
    with victim.paused():
        started = time.monotonic()
        found = await asyncio.gather(*(search(client, made) for _ in range(20)))
        assert all(len(hits) == 1 for hits in found)
        assert time.monotonic() - started < 3
        before = reads(victim), reads(other)
        for _ in range(6):
            started = time.monotonic()
            await search(client, made)
            assert time.monotonic() - started < 0.5
        assert reads(victim) == before[0] and reads(other) == before[1] + 6
    await serves_again(client, made, victim)


async def serves_again(client: httpx2.AsyncClient, made: str, node: Node) -> None:
    async def again() -> bool:
        before = reads(node)
        await search(client, made)
        await search(client, made)
        return reads(node) > before

    await until(again)


async def test_a_standby_that_dies_is_left_at_once_and_serves_again(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    made = await filled(client, cluster)
    victim = cluster.standbys[0]
    await asyncio.gather(*(search(client, made) for _ in range(8)))
    victim.kill()
    found = await asyncio.gather(*(search(client, made) for _ in range(20)))
    assert all(len(hits) == 1 for hits in found)
    victim.start()
    await serves_again(client, made, victim)


async def test_a_standby_that_takes_no_more_connections_is_left(cluster: Cluster, serve: Serve) -> None:
    client = await serve()
    made = await filled(client, cluster)
    victim = cluster.standbys[0]
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(psycopg.connect(victim.url))
        for _ in range(20):
            assert len(await search(client, made)) == 1
    await serves_again(client, made, victim)


async def test_a_standby_far_behind_is_left(cluster: Cluster, serve: Serve) -> None:
    client = await serve(replica_max_lag=0.3)
    made = await filled(client, cluster)
    victim = cluster.standbys[0]
    victim.ask("select pg_wal_replay_pause()")
    try:

        async def away() -> bool:
            await document(client, into=made)
            before = reads(victim)
            for _ in range(4):
                await search(client, made)
            text = (await client.get("/metrics")).text
            return reads(victim) == before and f'pgshelf_replica_up{{server="{name(victim)}"}} 0.0' in text

        await until(away)
    finally:
        victim.ask("select pg_wal_replay_resume()")
    cluster.caught_up()
    await serves_again(client, made, victim)


async def test_a_service_that_starts_later_does_not_read_from_a_standby_far_behind(
    cluster: Cluster, serve: Serve
) -> None:
    made = await filled(await serve(), cluster)
    victim, other = cluster.standbys
    victim.ask("select pg_wal_replay_pause()")
    try:
        client = await serve()
        await document(client, "new", into=made)
        await asyncio.sleep(1.2)
        client = await serve(replica_max_lag=1.0)  # it has seen nothing of that
        before = reads(victim), reads(other)
        for _ in range(6):
            ok(await client.get(at("libraries", made, "documents", "new")))
        assert (reads(victim), reads(other)) == (before[0], before[1] + 6)
    finally:
        victim.ask("select pg_wal_replay_resume()")
    cluster.caught_up()
    await serves_again(client, made, victim)


async def test_how_old_a_replica_is_is_known_for_as_long_as_the_service_runs(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings("postgresql://nowhere")
    engine = pools.make_engine(settings, settings.database_url)
    primary = servers.Primary(settings, settings.database_url, engine)
    for second in range(5001):
        monkeypatch.setattr(time, "monotonic", lambda now=float(second): now)
        primary.position = Position(1, 1, second)
        primary.heard(primary.position)
    monkeypatch.undo()
    await pools.close(engine)
    assert len(primary._past) <= servers.ROUND
    for age in range(4000):
        assert age <= primary.age(5000 - age, None) <= age * servers.COARSE + 1
    assert primary.age(-1, None) == float("inf")  # nobody knows
    assert (primary.age(-1, -7.0), primary.age(-1, 4999.0)) == (5007, 5000)


async def test_a_recovery_conflict_is_no_clients_business(cluster: Cluster, make_settings: MakeSettings) -> None:
    cluster.primary.ask("create table public.conflicts as select generate_series(1, 1000) as n")
    for node in cluster.standbys:
        node.set(max_standby_streaming_delay="0")
    cluster.caught_up()
    settings = make_settings(cluster.url, replica_url=cluster.replica_url, replica_interval=0.1)
    engine = pools.make_engine(settings, cluster.url)
    topology = replicas.Topology(settings, engine, cluster.url, replicas.targets(settings))
    before = retries("conflict")

    async def slowly(connection: Any) -> int:
        counted = "select count(*) from public.conflicts, lateral (select pg_sleep(0.0005 + n * 0)) s"
        return int((await database.rows(connection, counted))[0][0])

    async def churn() -> None:
        async with await psycopg.AsyncConnection.connect(cluster.primary.url, autocommit=True) as connection:
            while True:
                await connection.execute("delete from public.conflicts where n % 7 = 0")
                await connection.execute("vacuum public.conflicts")
                await connection.execute("insert into public.conflicts select generate_series(7, 1000, 7)")
                await asyncio.sleep(0.05)

    async with topology.watched():
        churning = asyncio.create_task(churn())
        counts = [await replicas.Routed(topology, None).retried(slowly) for _ in range(2)]
        churning.cancel()
        await asyncio.gather(churning, return_exceptions=True)
    await pools.close(engine)
    for node in cluster.standbys:
        node.set(max_standby_streaming_delay="30s")
    assert set(counts) <= {1000, 858, 1142}
    assert retries("conflict") > before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (psycopg.errors.SerializationFailure("canceling statement due to conflict with recovery"), "conflict"),
        (psycopg.errors.InternalError_("cannot load deleted element"), "conflict"),
        (psycopg.errors.UndefinedFile("could not open file"), "conflict"),
        (psycopg.errors.ReadOnlySqlTransaction("cannot execute INSERT in a read-only transaction"), "other"),
        (psycopg.errors.UndefinedTable("it comes with the next migration"), "other"),
        (psycopg.errors.LockNotAvailable("the replay of a DDL holds it"), "other"),
        (psycopg.OperationalError("server closed the connection unexpectedly"), "lost"),
        (psycopg.errors.TooManyConnections("sorry, too many clients already"), "lost"),
        (psycopg.ProgrammingError("cannot adapt type"), "other"),
        (psycopg.DataError("NUL"), None),
        (psycopg.errors.QueryCanceled("canceling statement due to statement timeout"), None),
        (psycopg.errors.InvalidTextRepresentation("no uuid"), None),
    ],
)
def test_what_is_asked_elsewhere(error: psycopg.Error, reason: str | None) -> None:
    assert replicas.of_standby(error) == reason


async def test_who_may_come_in_is_known_while_the_primary_is_away(cluster: Cluster, serve: Serve) -> None:
    secret = key(cluster.primary.url, f"r-{uuid.uuid4().hex[:8]}")
    admin = key(cluster.primary.url, f"a-{uuid.uuid4().hex[:8]}", "admin")
    client = await serve(auth="on")
    client.headers.update(bearer(admin))
    made = await filled(client, cluster)
    client.headers.update(bearer(secret))
    with cluster.primary.paused():

        async def answers() -> bool:
            found = await client.post(at("libraries", made, "search"), json=ASKED)
            return found.status_code == 200

        await until(answers, 8)
        problem(await client.get("/v1/libraries", headers=bearer("pgs_" + "x" * 40)), 401, "invalid_key")
    await until(answers, 8)


async def test_several_libraries_are_those_that_were_judged_also_where_names_are_older(
    cluster: Cluster, serve: Serve
) -> None:
    client = await serve(auth="on")
    client.headers.update(bearer(key(cluster.primary.url, f"a-{uuid.uuid4().hex[:8]}", "admin")))
    made, other = [await filled(client, cluster) for _ in range(2)]
    document_id = ok(await client.get(at("libraries", other, "documents", "k")))["id"]
    reader = bearer(key(cluster.primary.url, f"r-{uuid.uuid4().hex[:8]}", "reader", made))
    body = {"libraries": [made], **ASKED}
    with delayed(cluster, "1s"):
        ok(await client.patch(at("libraries", made), json={"name": f"{made}-was"}))
        ok(await client.patch(at("libraries", other), json={"name": made}))
        before = sum(map(reads, cluster.standbys))
        answer = await client.post("/v1/search", json=body, headers={**reader, "Pgshelf-Consistency": "eventual"})
        assert [hit["document_id"] for hit in ok(answer)["hits"]] == [document_id]
        assert sum(map(reads, cluster.standbys)) > before
