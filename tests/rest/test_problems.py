"""Every problem is really caused, each by the way that is kept here, and each has its section in docs/errors.md."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
import pytest_asyncio

from pgshelf import credentials
from pgshelf.app import create_app
from pgshelf.backups import Backups
from pgshelf.errors import CODES, RETRY_AFTER
from pgshelf.settings import Settings
from pgshelf_client._retry import NOTHING_DONE, PASSING_STATUSES
from tests.cohere_server import CohereServer, hang, status
from tests.conftest import _free_port, _lifespan
from tests.issuer import Issuer
from tests.postgres import Databases
from tests.rest.asking import at, bearer, document, key, library, ok, problem, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.watched]

ROOT = Path(__file__).parents[2]
SHELF = at("libraries", "shelf")
DOCUMENTS, SEARCH, IMPORT = f"{SHELF}/documents", f"{SHELF}/search", f"{SHELF}/import"
ID = "00000000-0000-4000-8000-000000000000"
LINES = {"Content-Type": "application/x-ndjson"}
RERANKED = {"vector": [1, 0, 0], "query": "x", "mode": "vector", "rerank": {"provider": "cohere"}}


class World:
    """A service with a library `shelf`, and what it takes to make others on the same database that fail."""

    def __init__(self, url: str, databases: Databases, vector_schema: str, folder: Path, cohere: CohereServer) -> None:
        self.url, self.databases, self.cohere, self.folder = url, databases, cohere, folder
        self._known: dict[str, Any] = {"data_dir": folder, "vector_schema": vector_schema, "worker_enabled": False}
        self._stack = contextlib.AsyncExitStack()
        self.client: httpx2.AsyncClient
        self.names = (f"n{number}" for number in count())

    async def start(self) -> None:
        known: dict[str, Any] = {
            "cohere_api_key": self.cohere.key,
            "cohere_base_url": self.cohere.url,
            "cohere_timeout": 0.3,
        }
        self.client = await self.service(embedder="local", **known)
        await library(self.client)
        await document(self.client, "k")

    async def close(self) -> None:
        await self._stack.aclose()

    async def service(self, url: str | None = None, **settings: Any) -> httpx2.AsyncClient:
        """A client of another application on the same database, or on that of `url`."""
        given = {**self._known, "database_url": url or self.url, "embedder": "none", "auth": "off", **settings}
        app = create_app(Settings(**given))
        await self._stack.enter_async_context(_lifespan(app))
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")
        return await self._stack.enter_async_context(client)

    async def embedded_by_cohere(self) -> str:
        """The path of a new library whose embedder is Cohere's."""
        name = next(self.names)
        await self.client.post("/v1/libraries", json={"name": name, "embedder": {"provider": "cohere"}})
        return at("libraries", name)

    @contextlib.contextmanager
    def session(self) -> Iterator[psycopg.Connection[Any]]:
        """A session beside the application, whose transaction is rolled back."""
        with psycopg.connect(self.url) as connection:
            yield connection
            connection.rollback()


Cause = Callable[[World], Awaitable[httpx2.Response]]
CAUSES: dict[str, Cause] = {}
# What takes a machine of its own is caused by a test of its own, which names the code.
ELSEWHERE = {
    "storage_full": ("tests/test_disk_full.py", "test_disk_full_in_the_middle_of_an_import"),
    "write_outcome_unknown": (
        "tests/replication/test_failover.py",
        "test_a_connection_that_is_lost_in_a_commit_leaves_the_outcome_unknown",
    ),
}


def causes(code: str) -> Callable[[Cause], Cause]:
    def register(cause: Cause) -> Cause:
        assert code not in CAUSES
        CAUSES[code] = cause
        return cause

    return register


def sends(code: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> None:
    """A cause that takes one request."""

    async def cause(w: World) -> httpx2.Response:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return await w.client.request(method, path, headers=headers, **({} if body is None else content))

    causes(code)(cause)


JSON = {"Content-Type": "application/json"}
sends("invalid_json", "POST", SEARCH, b"{", JSON)
sends("validation_failed", "POST", SEARCH, {"vector": [1, 0, 0], "k": 0})
sends("invalid_text", "POST", DOCUMENTS, {"title": "a\x00b", "chunks": [{"text": "x", "embedding": [1, 0, 0]}]})
sends("host_not_allowed", "GET", SHELF, headers={"Host": "evil.example.org"})
sends("library_not_found", "GET", at("libraries", "none"))
sends("document_not_found", "GET", f"{DOCUMENTS}/none")
sends("chunk_not_found", "GET", f"{SHELF}/chunks/{ID}")
sends("key_not_found", "GET", "/v1/keys/none")
sends("route_not_found", "GET", "/v1/nothing")
sends("method_not_allowed", "PUT", SEARCH, {})
sends("library_exists", "POST", "/v1/libraries", {"name": "shelf"})
sends("version_mismatch", "PATCH", f"{DOCUMENTS}/k", {"title": "x"}, {"If-Match": '"99"'})
sends("too_many_affected", "POST", f"{DOCUMENTS}/delete", {"filter": {"$key": "k"}, "max_affected": 0})
sends("body_too_large", "POST", SEARCH, b" " * (32 * 1024 * 1024 + 1), JSON)
sends("unsupported_media_type", "POST", SEARCH, b"x", {"Content-Type": "text/plain"})
sends("wrong_dimension", "POST", SEARCH, {"vector": [1, 0]})
sends("zero_vector", "POST", SEARCH, {"vector": [0, 0, 0]})
sends("invalid_vector", "POST", SEARCH, {"vector": [1e39, 0, 0]})
sends("embedding_required", "POST", DOCUMENTS, {"text": "x"})
sends("no_embedder", "POST", SEARCH, {"query": "x", "mode": "vector"})
CHOICE = {"provider": "openai", "model": "m"}
sends("embedder_not_configured", "POST", "/v1/libraries", {"name": "openai", "embedder": CHOICE})


async def as_caller(w: World, secret: str | None, method: str = "GET", path: str = SHELF) -> httpx2.Response:
    """A request to a service that asks for a key."""
    closed = await w.service(auth="on")
    return await closed.request(method, path, headers={} if secret is None else bearer(secret))


@causes("unauthorized")
async def no_key(w: World) -> httpx2.Response:
    return await as_caller(w, None)


@causes("invalid_key")
async def unknown_key(w: World) -> httpx2.Response:
    return await as_caller(w, credentials.mint().secret)


@causes("key_expired")
async def old_key(w: World) -> httpx2.Response:
    past = datetime.now(UTC) - timedelta(seconds=1)
    return await as_caller(w, key(w.url, next(w.names), expires_at=past))


@causes("key_revoked")
async def revoked_key(w: World) -> httpx2.Response:
    return await as_caller(w, key(w.url, next(w.names), revoked=True))


@causes("forbidden")
async def low_role(w: World) -> httpx2.Response:
    return await as_caller(w, key(w.url, next(w.names), "reader"), "DELETE", f"{DOCUMENTS}/k")


@causes("invalid_token")
async def forged_token(w: World) -> httpx2.Response:
    issuer = Issuer()
    trusting = await w.service(auth="on", **issuer.settings(w._known["data_dir"]))
    return await trusting.get(SHELF, headers=bearer(issuer.token("admin", key="new")))


@causes("issuer_unavailable")
async def lost_issuer(w: World) -> httpx2.Response:
    known = {"jwt_issuer": "https://id.example.org/", "jwt_audience": "pgshelf"}
    trusting = await w.service(auth="on", jwt_jwks_url=f"http://127.0.0.1:{_free_port()}/keys", **known)
    return await trusting.get(SHELF, headers=bearer(Issuer().token("admin")))


@causes("key_exists")
async def taken_name(w: World) -> httpx2.Response:
    key(w.url, name := next(w.names))
    return await w.client.post("/v1/keys", json={"name": name, "role": "reader"})


@causes("referenced")
async def foreign_key(w: World) -> httpx2.Response:
    made = await document(w.client, "contract")
    table = f"contracts_{next(w.names)}"
    with psycopg.connect(w.url, autocommit=True) as db:
        db.execute(f"create table {table} (document uuid references pgshelf.documents (id))".encode())
        db.execute(f"insert into {table} values (%s)".encode(), [made["id"]])
        answer = await w.client.delete(f"{DOCUMENTS}/contract")
        db.execute(f"drop table {table}".encode())
    return answer


async def slowly(first: bytes, go_on: asyncio.Event) -> AsyncIterator[bytes]:
    """A body whose end waits."""
    yield first
    await go_on.wait()


@causes("request_timeout")
async def body_that_stops(w: World) -> httpx2.Response:
    impatient = await w.service(body_timeout=0.1)
    return await impatient.post(SEARCH, content=slowly(b"{", asyncio.Event()), headers=JSON)


@causes("import_running")
async def two_imports(w: World) -> httpx2.Response:
    go_on, headers = asyncio.Event(), {**LINES, "Idempotency-Key": "night"}
    first = asyncio.create_task(w.client.post(IMPORT, content=slowly(b"\n", go_on), headers=headers))

    async def running() -> bool:
        with w.session() as db:
            return db.execute("select exists (select from pgshelf.imports)").fetchone() == (True,)

    await until(running)
    answer = await w.client.post(IMPORT, content=b"\n", headers=headers)
    go_on.set()
    await first
    return answer


@causes("import_differs")
async def other_lines(w: World) -> httpx2.Response:
    headers = {**LINES, "Idempotency-Key": "day"}
    await w.client.post(IMPORT, content=b"\n\n", headers=headers)
    return await w.client.post(IMPORT, content=b" \n\n", headers=headers)


@causes("conflict")
async def serialization_thrice(w: World) -> httpx2.Response:
    while True:  # three times in a row, or one of the attempts was quicker
        answer = await written_beside(w, 3)
        if not answer.is_success:
            return answer


@causes("event_differs")
async def event_twice(w: World) -> httpx2.Response:
    event = {"id": "build", "text": "failed"}
    vector = at("libraries", (await library(w.client, next(w.names), embedder={"provider": "local"}))["name"])
    ok(await w.client.post(f"{vector}/events", json=event), 202)
    return await w.client.post(f"{vector}/events", json=event | {"text": "succeeded"})


@causes("changes_expired")
async def old_cursor(w: World) -> httpx2.Response:
    changes = at("libraries", (await library(w.client, next(w.names)))["name"], "changes")
    name = changes.split("/")[3]
    start = ok(await w.client.get(changes, params={"after": "now"}))["next"]
    for number in range(3):
        await document(w.client, f"k{number}", into=name)
    await w.client.get(changes)
    with psycopg.connect(w.url, autocommit=True) as db:
        db.execute("update pgshelf.change_log set stamped_at = now() - interval '8 days'")
        db.execute("select pgshelf.prune_changes(interval '7 days', 100)")
    return await w.client.get(changes, params={"after": start})


@causes("idempotency_key_reused")
async def key_for_another(w: World) -> httpx2.Response:
    headers = {"Idempotency-Key": next(w.names)}
    await w.client.patch(f"{DOCUMENTS}/k", json={"title": "a"}, headers=headers)
    return await w.client.patch(f"{DOCUMENTS}/k", json={"title": "b"}, headers=headers)


@causes("idempotency_key_in_use")
async def key_in_use(w: World) -> httpx2.Response:
    hasty, name = await w.service(lock_timeout=0.1), next(w.names)
    with w.session() as db:
        db.execute("insert into pgshelf.idempotency_keys (key, request) values (%s, '')", [name])
        return await hasty.patch(f"{DOCUMENTS}/k", json={"title": "a"}, headers={"Idempotency-Key": name})


@causes("text_not_embeddable")
async def long_text(w: World) -> httpx2.Response:
    name, embedder = next(w.names), {"provider": "cohere", "truncate": "none"}
    ok(await w.client.post("/v1/libraries", json={"name": name, "embedder": embedder}), 201)
    body = {"chunks": [{"text": "word " * 3900}]}
    return await w.client.post(at("libraries", name, "documents"), json=body)


@causes("no_vector")
async def like_what_waits(w: World) -> httpx2.Response:
    name = (await library(w.client, next(w.names), embedder={"provider": "local"}))["name"]
    await w.client.post(at("libraries", name, "documents"), params={"wait": "false"}, json={"key": "a", "text": "a"})
    return await w.client.post(at("libraries", name, "search"), json={"like": {"document": "a"}})


@causes("libraries_differ")
async def other_metric(w: World) -> httpx2.Response:
    other = (await library(w.client, next(w.names), metric="l2"))["name"]
    return await w.client.post("/v1/search", json={"libraries": ["shelf", other], "vector": [1, 0, 0]})


sends("backups_not_configured", "POST", at("replication", "backups"), {})


@causes("backup_running")
async def two_backups(w: World) -> httpx2.Response:
    _, lock = Backups(w.folder / "backups").claim("on the command line")
    try:
        return await (await w.service(backup_directory=w.folder / "backups")).post(
            at("replication", "backups"), json={}
        )
    finally:
        os.close(lock)


@causes("index_impossible")
async def no_such_index(w: World) -> httpx2.Response:
    name = (await library(w.client, next(w.names), metric="l1"))["name"]
    return await w.client.put(at("libraries", name, "index"), json={"type": "ivfflat"})


@causes("too_complex")
async def too_many_words(w: World) -> httpx2.Response:
    generous = await w.service(max_chunk_length=5_000_000)
    words = " ".join(f"word{number:x}" for number in range(200_000))
    return await generous.post(DOCUMENTS, json={"chunks": [{"text": words, "embedding": [1, 0, 0]}]})


@causes("rate_limited")
async def twice_an_hour(w: World) -> httpx2.Response:
    limited = await w.service(rate_limit_search="1/h")
    ok(await limited.get(SHELF))
    return await limited.get(SHELF)


@causes("too_many_concurrent")
async def two_streams(w: World) -> httpx2.Response:
    limited = await w.service(max_concurrent_streams=1)
    waiting = asyncio.create_task(limited.get(f"{SHELF}/changes", params={"after": "now", "wait": 1}))
    await asyncio.sleep(0.1)
    answer = await limited.get(f"{SHELF}/changes")
    await waiting
    return answer


@causes("internal_error")
async def row_that_nobody_writes(w: World) -> httpx2.Response:
    name = (await library(w.client, next(w.names), embedder={"provider": "local"}))["name"]
    with psycopg.connect(w.url, autocommit=True) as db:
        db.execute("update pgshelf.libraries set chunking = '{}' where name = %s", [name])
    return await w.client.post(at("libraries", name, "documents"), json={"text": "x"})


async def embedding(w: World, *faults: Any) -> httpx2.Response:
    path = await w.embedded_by_cohere()
    w.cohere.fail(*faults)
    return await w.client.post(f"{path}/documents", json={"text": next(w.names)})


@causes("embedder_failed")
async def embedder_that_fails(w: World) -> httpx2.Response:
    return await embedding(w, status(401))


@causes("embedder_unavailable")
async def embedder_that_is_overloaded(w: World) -> httpx2.Response:
    return await embedding(w, status(429, "slow down", retry_after="30"))


@causes("embedder_timeout")
async def embedder_that_hangs(w: World) -> httpx2.Response:
    return await embedding(w, hang)


async def reranking(w: World, *faults: Any) -> httpx2.Response:
    w.cohere.fail(*faults)
    return await w.client.post(SEARCH, json=RERANKED)


@causes("reranker_failed")
async def reranker_that_fails(w: World) -> httpx2.Response:
    return await reranking(w, status(401))


@causes("reranker_unavailable")
async def reranker_that_is_overloaded(w: World) -> httpx2.Response:
    return await reranking(w, status(429, "slow down", retry_after="30"))


@causes("reranker_timeout")
async def reranker_that_hangs(w: World) -> httpx2.Response:
    return await reranking(w, hang)


@causes("reranker_not_configured")
async def no_reranker(w: World) -> httpx2.Response:
    return await (await w.service()).post(SEARCH, json=RERANKED)


@causes("database_unavailable")
async def database_that_is_down(w: World) -> httpx2.Response:
    return await (await w.service(f"postgresql://nobody@127.0.0.1:{_free_port()}/none")).get(SHELF)


@causes("database_forbidden")
async def role_without_rights(w: World) -> httpx2.Response:
    return await (await w.service(with_options(w.url, "role=pg_monitor"))).get(SHELF)


@causes("read_only")
async def server_that_takes_no_writes(w: World) -> httpx2.Response:
    standby = await w.service(with_options(w.url, "default_transaction_read_only=on"))
    return await standby.patch(f"{DOCUMENTS}/k", json={"title": "x"})


@causes("not_migrated")
async def database_without_pgshelf(w: World) -> httpx2.Response:
    return await (await w.service(w.databases.empty())).get(SHELF)


@causes("not_ready")
async def service_that_cannot_serve(w: World) -> httpx2.Response:
    return await (await w.service(w.databases.empty())).get("/ready")


@causes("too_many_readers")
async def two_readers(w: World) -> httpx2.Response:
    small = await w.service(changes_readers=1)
    waiting = asyncio.create_task(small.get(f"{SHELF}/changes", params={"after": "now", "wait": 1}))
    await asyncio.sleep(0.1)
    answer = await small.get(f"{SHELF}/changes", params={"after": "now", "wait": 1})
    await waiting
    return answer


@causes("pool_exhausted")
async def one_connection(w: World) -> httpx2.Response:
    small = await w.service(pool_size=1, pool_timeout=0.2)
    with w.session() as db:
        db.execute("lock pgshelf.libraries")
        waiting = asyncio.create_task(small.get(SHELF))
        await asyncio.sleep(0.1)
        answer = await small.get(SHELF)
        db.rollback()
        ok(await waiting)
    return answer


@causes("lock_timeout")
async def row_that_is_held(w: World) -> httpx2.Response:
    hasty = await w.service(lock_timeout=0.1)
    with w.session() as db:
        db.execute("select from pgshelf.documents where key = 'k' for update")
        return await hasty.patch(f"{DOCUMENTS}/k", json={"title": "x"})


@causes("timeout")
async def statement_that_takes_too_long(w: World) -> httpx2.Response:
    hasty = await w.service(statement_timeout=0.2)
    with w.session() as db:
        db.execute("lock pgshelf.libraries")
        return await hasty.get(SHELF)


def with_options(url: str, option: str) -> str:
    """The same database, in sessions that begin with a setting."""
    return str(psycopg.conninfo.make_conninfo(url, options=f"-c {option}"))


async def waited_for(watch: psycopg.Connection[Any], holder: psycopg.Connection[Any], *ends: asyncio.Task[Any]) -> None:
    """Until another session waits for what `holder` holds, or one of the tasks has ended."""
    question = "select exists (select from pg_stat_activity where %s = any (pg_blocking_pids(pid)))"

    async def blocked() -> bool:
        return watch.execute(question, [holder.info.backend_pid]).fetchone() == (True,) or any(t.done() for t in ends)

    await until(blocked)


async def written_beside(w: World, times: int) -> httpx2.Response:
    """A write, in REPEATABLE READ, of a document that another session changes meanwhile, so many times."""
    strict = await w.service(with_options(w.url, "default_transaction_isolation=repeatable\\ read"))
    with psycopg.connect(w.url, autocommit=True) as watch, psycopg.connect(w.url, autocommit=True) as db:
        await document(w.client, "contested")
        change = "update pgshelf.documents set title = 'beside' where key = 'contested'"
        db.execute("begin")
        db.execute(change)
        writing = asyncio.create_task(strict.patch(f"{DOCUMENTS}/contested", json={"title": "written"}))
        for left in reversed(range(times)):
            await waited_for(watch, db, writing)
            db.execute("commit")
            if left:  # before the next attempt has its snapshot
                db.execute("begin")
                db.execute(change)
        return await writing


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    shared_database_url: str, databases: Databases, vector_schema: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    with CohereServer() as cohere:
        made = World(shared_database_url, databases, vector_schema, tmp_path_factory.mktemp("data"), cohere)
        try:
            await made.start()
            yield made
        finally:
            await made.close()


@pytest.mark.parametrize("code", CAUSES)
async def test_a_problem_is_caused(world: World, code: str) -> None:
    answer = await CAUSES[code](world)
    if answer.headers["content-type"].startswith("application/x-ndjson"):  # it came after the answer had begun
        assert f'"code":"{code}"' in answer.text.splitlines()[-1]
        return
    body = problem(answer, CODES[code][0], code)
    page = await world.client.get(body["type"].partition("#")[0])
    assert page.headers["content-type"] == "text/markdown; charset=utf-8"
    assert f"\n## {body['type'].partition('#')[2]}\n" in page.text


async def test_every_problem_has_a_cause() -> None:
    assert set(CAUSES).isdisjoint(ELSEWHERE)
    assert set(CAUSES) | set(ELSEWHERE) == set(CODES)
    for code, (file, name) in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        assert f"def {name}(" in text and f'"{code}"' in text


async def test_every_problem_is_explained() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    found = re.findall(r"^## (\w+)\n\n\*\*(\d+)\*\* · Retry: (yes|no)\n\n\S", text, re.MULTILINE)
    assert len(found) == len(re.findall("^## ", text, re.MULTILINE))
    assert {code: int(status) for code, status, _ in found} == {code: status for code, (status, _) in CODES.items()}
    # the page and what the Python client does are the same: it sends again what may succeed then
    told = {code for code, _, again in found if again == "yes"}
    passing = {code for code, (status, _) in CODES.items() if status in PASSING_STATUSES | set(RETRY_AFTER)}
    assert told == passing | NOTHING_DONE | {"import_running", "backup_running"}


async def test_a_serialization_failure_is_tried_again(world: World) -> None:
    assert ok(await written_beside(world, 1))["title"] == "written"


async def test_a_deadlock_is_tried_again(world: World) -> None:
    """The write is the one that closes the circle, and soon the one that PostgreSQL breaks off."""
    await document(world.client, "circle")
    hurried = await world.service(with_options(world.url, "deadlock_timeout=10ms"))
    name = next(world.names)
    with world.session() as watch, world.session() as gate, world.session() as other:
        watch.autocommit = True
        other.execute("set deadlock_timeout = '1min'")
        gate.execute("select from pgshelf.libraries where name = 'shelf' for update")
        other.execute("select from pgshelf.documents where key = 'circle' for update")
        headers = {"Idempotency-Key": name}
        body = {"title": "written", "chunks": []}
        writing = asyncio.create_task(hurried.put(f"{DOCUMENTS}/circle", json=body, headers=headers))
        await waited_for(watch, gate)  # it holds its idempotency key, and wants the library
        insert = "insert into pgshelf.idempotency_keys (key, request) values (%s, '')"
        closing = asyncio.create_task(asyncio.to_thread(other.execute, insert, [name]))

        async def closed() -> bool:
            question = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
            return watch.execute(question, [other.info.backend_pid]).fetchone() == (True,)

        await until(closed)
        gate.rollback()  # now it gets the library, and wants the document
        await closing  # it was broken off, else this would wait for it
        other.rollback()
        assert ok(await writing)["title"] == "written"
