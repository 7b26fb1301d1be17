"""What is said of replication, held against PostgreSQL's own views: a real primary and a real standby."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest
import pytest_asyncio
from psycopg import conninfo
from psycopg.rows import dict_row

from pgshelf import doctor, pools, worker
from pgshelf.app import create_app
from pgshelf.pools import make_engine
from pgshelf.settings import Settings
from tests.conftest import _lifespan
from tests.replication.servers import Primary, Standby, cluster, wait_until
from tests.rest.asking import ok, problem
from tests.test_metrics import count

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("replication")]

ON_PRIMARY = """
select pg_current_wal_lsn()::text as now, pg_current_wal_flush_lsn()::text as flushed, r.*, s.*,
  ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int as timeline,
  pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn)::bigint as behind,
  pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint as retained,
  extract(epoch from r.replay_lag)::float8 as lag,
  (select max(at) from pgshelf.heartbeats) as heartbeat, current_setting('cluster_name') as cluster
from pg_stat_replication r join pg_replication_slots s on s.active_pid = r.pid
"""
ON_STANDBY = """
select w.*, pg_last_wal_replay_lsn()::text as replayed, c.*, current_setting('cluster_name') as cluster,
  pg_wal_lsn_diff(w.latest_end_lsn, pg_last_wal_replay_lsn())::bigint as behind,
  (select max(at) from pgshelf.heartbeats) as heartbeat
from pg_stat_wal_receiver w, pg_stat_database_conflicts c where c.datname = current_database()
"""


@pytest.fixture(scope="module")
def pair(postgres_version: int) -> Iterator[tuple[Primary, Standby]]:
    settings = {"max_standby_streaming_delay": "0", "wal_receiver_status_interval": "1s"}
    with cluster("near", version=16 if postgres_version == 16 else 18, **settings) as (primary, [standby]):
        yield primary, standby


@pytest.fixture
def primary(pair: tuple[Primary, Standby]) -> Primary:
    return pair[0]


@pytest.fixture
def standby(pair: tuple[Primary, Standby]) -> Standby:
    return pair[1]


@contextlib.asynccontextmanager
async def service(url: str, **settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A service on one of the servers; nothing runs in it by itself."""
    known: dict[str, Any] = {"worker_enabled": False, "embedder": "none", "heartbeat_interval": 0.1}
    app = create_app(Settings(database_url=url, **known | settings))
    async with _lifespan(app):
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


@pytest_asyncio.fixture(loop_scope="module")
async def on_primary(primary: Primary) -> AsyncIterator[httpx2.AsyncClient]:
    async with service(primary.url) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def on_standby(standby: Standby) -> AsyncIterator[httpx2.AsyncClient]:
    async with service(standby.url) as client:
        yield client


def one(url: str, statement: str) -> dict[str, Any]:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row


async def at_rest(client: httpx2.AsyncClient, url: str, statement: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer of the service, and what PostgreSQL said before and after it: the same."""
    for _ in range(50):
        before, answer = one(url, statement), ok(await client.get("/v1/replication"))
        if before == one(url, statement) and before["behind"] == 0:
            return answer, before
        await asyncio.sleep(0.2)
    pytest.fail("the servers did not come to rest")


async def same_twice(client: httpx2.AsyncClient, url: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer of the service, the same before and after the view was asked, and the view's rows."""
    for _ in range(50):
        answer = ok(await client.get("/v1/replication"))
        with psycopg.connect(url, row_factory=dict_row) as connection:
            rows = connection.execute("select * from pgshelf.replication_status").fetchall()
        places = [[each[name] for name in each if name.endswith("_lsn")] for each in (answer, *answer["replicas"])]
        again = ok(await client.get("/v1/replication"))
        if places == [[each[name] for name in each if name.endswith("_lsn")] for each in (again, *again["replicas"])]:
            return answer, rows
        await asyncio.sleep(0.2)
    pytest.fail("the servers did not come to rest")


def moment(value: Any) -> str | None:
    return None if value is None else msgspec.to_builtins(value)


def table(value: Any) -> Any:
    """A row of the view as the service writes it."""
    return moment(value) if hasattr(value, "isoformat") else value


async def test_every_field_on_the_primary_is_postgresqls_own(primary: Primary, on_primary: httpx2.AsyncClient) -> None:
    assert primary.one("select pgshelf.beat(0.1)")
    answer, own = await at_rest(on_primary, primary.url, ON_PRIMARY)
    [replica] = answer.pop("replicas")
    lag = replica.pop("lag_seconds")
    assert lag == pytest.approx(own["lag"] or 0, abs=1)  # of an idle primary PostgreSQL forgets it
    assert replica == {
        "role": "replica", "name": own["application_name"], "address": "local", "slot": own["slot_name"],
        "state": own["state"], "sync_state": own["sync_state"], "timeline": None,
        "sent_lsn": own["sent_lsn"], "written_lsn": own["write_lsn"], "flushed_lsn": own["flush_lsn"],
        "replayed_lsn": own["replay_lsn"], "lag_bytes": own["behind"], "last_message_at": moment(own["reply_time"]),
        "last_heartbeat_at": moment(own["heartbeat"]), "wal_status": own["wal_status"],
        "retained_bytes": own["retained"], "conflicts": None, "health": "healthy",
    }  # fmt: skip
    assert (own["state"], own["sync_state"], own["slot_name"], own["wal_status"]) == (
        "streaming", "async", "near", "reserved"
    )  # fmt: skip
    assert {name: value for name, value in answer.items() if value is not None} == {
        "role": "primary", "name": own["cluster"], "timeline": own["timeline"], "written_lsn": own["now"],
        "flushed_lsn": own["flushed"], "last_heartbeat_at": moment(own["heartbeat"]), "health": "healthy",
        "overall": "healthy",
    }  # fmt: skip
    assert own["timeline"] == 1


async def test_every_field_on_a_standby_is_postgresqls_own(
    primary: Primary, standby: Standby, on_standby: httpx2.AsyncClient
) -> None:
    await cancelled_by_replay(primary, standby)
    answer, own = await at_rest(on_standby, standby.url, ON_STANDBY)
    assert answer.pop("lag_seconds") < 60
    conflicts = {
        "tablespace": own["confl_tablespace"], "lock": own["confl_lock"], "snapshot": own["confl_snapshot"],
        "buffer_pin": own["confl_bufferpin"], "deadlock": own["confl_deadlock"],
        "logical_slot": own["confl_active_logicalslot"],
    }  # fmt: skip
    assert conflicts["lock"] == 1
    assert answer == {
        "role": "standby", "name": own["cluster"], "address": f"{own['sender_host']}:{own['sender_port']}",
        "slot": own["slot_name"], "state": own["status"], "sync_state": None, "timeline": own["received_tli"],
        "sent_lsn": own["latest_end_lsn"], "written_lsn": own["written_lsn"], "flushed_lsn": own["flushed_lsn"],
        "replayed_lsn": own["replayed"], "lag_bytes": own["behind"],
        "last_message_at": moment(own["last_msg_receipt_time"]), "last_heartbeat_at": moment(own["heartbeat"]),
        "wal_status": None, "retained_bytes": None, "conflicts": conflicts, "health": "healthy", "overall": "healthy",
        "hidden": None, "replicas": [],
    }  # fmt: skip


async def cancelled_by_replay(primary: Primary, standby: Standby) -> None:
    """A query of the standby holds a table that the primary drops."""
    primary.query("create table public.doomed ()")
    standby.wait_for(primary)
    with psycopg.connect(standby.url) as reader:
        reader.execute("select * from public.doomed")
        primary.query("drop table public.doomed")
        standby.wait_for(primary)
        with pytest.raises(psycopg.Error):
            reader.execute("select 1")
    wait_until(lambda: one(standby.url, ON_STANDBY)["confl_lock"])


async def test_the_view_says_what_the_service_says(
    primary: Primary, standby: Standby, on_primary: httpx2.AsyncClient, on_standby: httpx2.AsyncClient
) -> None:
    for server, client in ((primary, on_primary), (standby, on_standby)):
        answer, rows = await same_twice(client, server.url)
        for said, row in zip([answer, *answer["replicas"]], rows, strict=True):
            assert row.pop("visible") is True
            passing = {"lag_seconds", "last_message_at"}  # time goes on
            assert {name: table(value) for name, value in row.items() if name not in passing} == {
                name: said[name] for name in row if name not in passing
            }
    defaults = "select pg_get_function_arguments('pgshelf.replication'::regproc)"
    limits = f"max_bytes bigint DEFAULT {Settings().replication_lag_bytes}, max_seconds double precision DEFAULT "
    assert primary.one(defaults).startswith(f"{limits}{Settings().replication_lag_seconds:.0f}")


async def test_a_replica_that_lags_says_so_and_takes_itself_out(
    primary: Primary, standby: Standby, on_standby: httpx2.AsyncClient
) -> None:
    small = {"replication_lag_bytes": 100_000, "replication_lag_seconds": 0.0}
    async with service(primary.url, **small) as near, service(standby.url, **small) as far:
        standby.wait_for(primary)
        ok(await far.get("/ready"))
        standby.query("select pg_wal_replay_pause()")
        primary.query("select pg_logical_emit_message(true, 'test', repeat('x', 1000000))")
        try:
            wait_until(
                lambda: standby.one(
                    "select pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) > 100000"
                )
            )
            answer = ok(await far.get("/v1/replication"))
            assert (answer["health"], answer["overall"]) == ("lagging", "lagging")
            assert answer["lag_bytes"] > 100_000
            detail = problem(await far.get("/ready"), 503, "not_ready")["detail"]
            assert "PGSHELF_REPLICATION_LAG" in detail
            ok(await on_standby.get("/ready"))  # its limits are wider
            wait_until(lambda: primary.one("select replay_lag > '0' from pg_stat_replication"))
            answer = ok(await near.get("/v1/replication"))
            assert (answer["health"], answer["overall"]) == ("healthy", "lagging")
            assert answer["replicas"][0]["lag_bytes"] > 100_000
            ok(await near.get("/ready"))  # it is not the primary's fault
            text = (await near.get("/metrics")).text
            assert count(text, "pgshelf_replication_healthy", replica="near") == 0
            assert count(text, "pgshelf_replication_lag_bytes", replica="near") > 100_000
            assert count(text, "pgshelf_replication_retained_bytes", replica="near") >= 0
        finally:
            standby.query("select pg_wal_replay_resume()")
        standby.wait_for(primary)
        ok(await far.get("/ready"))
        assert ok(await far.get("/v1/replication"))["health"] == "healthy"
    text = (await on_standby.get("/metrics")).text
    name = standby.one("select current_setting('cluster_name')")
    assert count(text, "pgshelf_replication_healthy", replica=name) == 1
    counted = standby.one(
        "select confl_tablespace + confl_lock + confl_snapshot + confl_bufferpin + confl_deadlock"
        " + confl_active_logicalslot from pg_stat_database_conflicts where datname = current_database()"
    )
    assert count(text, "pgshelf_replication_conflicts", replica=name) == counted


async def test_seconds_are_true_while_nobody_writes(primary: Primary, standby: Standby) -> None:
    """Only heartbeats are written: they show that one is on time and how late another is."""
    settings = Settings(database_url=primary.url, heartbeat_interval=0.2)
    engine = make_engine(settings, primary.url)
    beating = asyncio.create_task(worker._beat(engine, settings))
    limits = {"replication_lag_seconds": 1.0, "replication_lag_bytes": 0}
    try:
        async with service(primary.url, **limits) as near, service(standby.url, **limits) as far:
            await asyncio.sleep(1.5)
            [replica] = ok(await near.get("/v1/replication"))["replicas"]
            assert ok(await far.get("/v1/replication"))["lag_seconds"] < 0.9
            assert replica["lag_seconds"] < 1.5  # a standby at rest reports once a second here
            standby.query("select pg_wal_replay_pause()")
            try:
                paused = time.monotonic()
                await asyncio.sleep(2)
                late = ok(await far.get("/v1/replication"))
                assert time.monotonic() - paused - 0.6 < late["lag_seconds"] < time.monotonic() - paused + 0.6
                assert late["health"] == "lagging"
                problem(await far.get("/ready"), 503, "not_ready")
                [replica] = ok(await near.get("/v1/replication"))["replicas"]
                assert replica["health"] == "lagging" and 1 < replica["lag_seconds"] < 4
            finally:
                standby.query("select pg_wal_replay_resume()")
            wait_until(lambda: standby.one("select lag_bytes = 0 from pgshelf.replication_status"))
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await pools.close(engine)


async def test_heartbeats_are_few_and_small(primary: Primary, standby: Standby) -> None:
    beat = "select pgshelf.beat(%s)"
    primary.query("truncate pgshelf.heartbeats; checkpoint")
    with psycopg.connect(primary.url, autocommit=True) as connection:
        for _ in range(20):
            connection.execute(beat, [0.001])
            connection.execute("select pg_sleep(0.002)")
        start = connection.execute("select pg_current_wal_insert_lsn()").fetchone()
        beats = 0
        for _ in range(200):
            beats += bool((connection.execute(beat, [0.001]).fetchone() or [0])[0])
            connection.execute("select pg_sleep(0.002)")
        assert beats > 100
        row = connection.execute(
            "select (pg_current_wal_insert_lsn() - %s::pg_lsn) / %s", [*(start or ()), beats]
        ).fetchone()
        assert row is not None and row[0] < 400, "bytes of WAL for a beat"
        rows = connection.execute("select count(*) from pgshelf.heartbeats").fetchone()
        assert rows is not None and rows[0] <= 120
        assert [connection.execute(beat, [3600]).fetchone() for _ in range(3)].count((True,)) <= 1
    assert standby.one("select pgshelf.beat(0.001)") is False


async def test_who_may_not_see_is_told(primary: Primary, standby: Standby) -> None:
    primary.query("create role watcher login in role pgshelf_reader")
    standby.wait_for(primary)
    url = conninfo.make_conninfo(primary.url, user="watcher")
    for server in (primary, standby):
        with psycopg.connect(conninfo.make_conninfo(server.url, user="watcher"), row_factory=dict_row) as connection:
            for row in connection.execute("select * from pgshelf.replication_status"):
                assert row["visible"] is False
                if row["role"] == "replica":
                    assert (row["health"], row["replayed_lsn"], row["lag_bytes"]) == (None, None, None)
                    assert (row["name"], row["slot"], row["wal_status"]) == ("near", "near", "reserved")
                else:
                    assert row["health"] == "healthy"
    primary.query("grant usage on schema pgshelf to watcher; grant select on all tables in schema pgshelf to watcher")
    with psycopg.connect(url) as connection:
        told = [finding.text for finding in doctor._replication(connection)]
    assert told == ["watcher does not see how far replicas are; a superuser runs: grant pg_monitor to watcher"]
    async with service(url, auth="off") as client:
        answer = ok(await client.get("/v1/replication"))
        assert "grant pg_monitor to watcher" in answer["hidden"]
        assert answer["replicas"][0]["health"] is None and answer["overall"] == "healthy"
        primary.query("grant pg_monitor to watcher")
        answer = ok(await client.get("/v1/replication"))
        assert answer["hidden"] is None and answer["replicas"][0]["health"] == "healthy"


async def test_one_that_is_away_is_known_by_its_slot(
    primary: Primary, standby: Standby, on_primary: httpx2.AsyncClient
) -> None:
    standby.stop()
    try:
        wait_until(lambda: primary.one("select not active from pg_replication_slots"))
        primary.query("select pg_logical_emit_message(true, 'test', 'more')")
        own = one(
            primary.url,
            "select pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint as kept from pg_replication_slots",
        )
        answer = ok(await on_primary.get("/v1/replication"))
        [replica] = answer["replicas"]
        assert (replica["name"], replica["slot"], replica["health"]) == ("near", "near", "disconnected")
        assert replica["state"] is None and replica["replayed_lsn"] is None
        assert replica["retained_bytes"] == replica["lag_bytes"] >= own["kept"] > 0
        assert answer["overall"] == "disconnected"
        with psycopg.connect(primary.url) as connection:
            [told] = [finding for finding in doctor._replication(connection)]
        assert told.level == "warn" and "near is not connected and keeps" in told.text
    finally:
        standby.start()
    standby.wait_for(primary)


async def test_a_standby_that_is_cut_off_serves_until_it_is_too_old(primary: Primary, standby: Standby) -> None:
    name = standby.one("select setting from pg_settings where name = 'primary_conninfo'")
    async with service(standby.url, replication_lag_seconds=1.5) as short, service(standby.url) as long:
        assert primary.one("select pgshelf.beat(0.001)")
        standby.wait_for(primary)
        standby.query("alter system set primary_conninfo = 'host=/nowhere'")
        standby.query("select pg_reload_conf()")
        wait_until(lambda: not standby.query("select 1 from pg_stat_wal_receiver"))
        try:
            answer = ok(await short.get("/v1/replication"))
            assert (answer["health"], answer["state"], answer["address"]) == ("disconnected", None, None)
            assert answer["timeline"] == 1
            deadline = time.monotonic() + 10
            while (await short.get("/ready")).status_code == 200:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            assert "seconds behind" in problem(await short.get("/ready"), 503, "not_ready")["detail"]
            ok(await long.get("/ready"))
        finally:
            with psycopg.connect(standby.url, autocommit=True) as connection:
                connection.execute(psycopg.sql.SQL("alter system set primary_conninfo = {}").format(name))
                connection.execute("select pg_reload_conf()")
        wait_until(lambda: standby.query("select 1 from pg_stat_wal_receiver where status = 'streaming'"))


async def test_a_promoted_standby_is_a_primary_on_another_timeline(primary: Primary, standby: Standby) -> None:
    standby.wait_for(primary)
    standby.promote()
    async with service(standby.url) as client:
        answer = ok(await client.get("/v1/replication"))
        assert (answer["role"], answer["timeline"], answer["replicas"]) == ("primary", 2, [])
        ok(await client.get("/ready"))
    assert standby.one("select pgshelf.beat(0.001)") is False  # nobody follows it
