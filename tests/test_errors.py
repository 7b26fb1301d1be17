"""Everything that can go wrong: caused for real where that is possible, constructed where it is not."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import numpy as np
import psycopg
import pytest
from litestar.exceptions import HTTPException, InternalServerException, NotAuthorizedException

from pgshelf import embedded, embedding, libraries, migrate
from pgshelf.embedders import EmbedderFailed, EmbedderTimeout, EmbedderUnavailable, TextRefused
from pgshelf.errors import CLASSES, CODES, SQLSTATES, Problem, problem_of
from tests.rest.asking import at, chunks, document, library, local, ok, problem, until

SHELF = at("libraries", "shelf")


def database_error(sqlstate: str | None, kind: type[psycopg.Error] = psycopg.OperationalError) -> psycopg.Error:
    return type("Made", (kind,), {"sqlstate": sqlstate})("select secret from inside")


@pytest.mark.parametrize("sqlstate", SQLSTATES)
def test_a_sqlstate_has_its_problem(sqlstate: str) -> None:
    made = problem_of(database_error(sqlstate))
    assert (made.code, made.sqlstate) == (SQLSTATES[sqlstate], sqlstate)
    assert made.status == CODES[made.code][0] < 600
    assert ("Retry-After" in made.headers) == (made.status in (429, 503, 504))


@pytest.mark.parametrize("start", CLASSES)
def test_a_class_of_sqlstates_has_its_problem(start: str) -> None:
    assert problem_of(database_error(start + "ZZZ")).code == CLASSES[start]


@pytest.mark.parametrize("sqlstate", ["XX000", "42601", "0A000", "P0001"])
def test_a_sqlstate_that_nobody_foresaw_is_our_fault_and_tells_nothing(sqlstate: str) -> None:
    made = problem_of(database_error(sqlstate))
    assert (made.code, made.sqlstate) == ("internal_error", sqlstate)
    assert "secret" not in made.detail


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (database_error(None), "database_unavailable"),
        (database_error(None, psycopg.DataError), "invalid_text"),
        (msgspec.DecodeError("x"), "invalid_json"),
        (RecursionError(), "invalid_json"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "invalid_text"),
        (HTTPException(status_code=418, detail="tea"), "validation_failed"),
        (NotAuthorizedException(), "validation_failed"),
        (InternalServerException("secret"), "internal_error"),
        (ZeroDivisionError("secret"), "internal_error"),
        (Problem("conflict", "as it is"), "conflict"),
    ],
)
def test_any_exception_is_a_problem(error: Exception, code: str) -> None:
    made = problem_of(error)
    assert made.code == code and "secret" not in made.detail


@pytest.fixture
def admin(database_url: str) -> Any:
    """A session beside the application."""
    with psycopg.connect(database_url) as connection:
        yield connection


async def test_all_connections_busy(database_url: str, make_settings: Any, make_client: Any, admin: Any) -> None:
    client = await make_client(make_settings(database_url, pool_size=1, pool_timeout=0.3, worker_enabled=False))
    ok(await client.get("/v1/libraries"))
    admin.execute("lock pgshelf.libraries")
    waiting = asyncio.create_task(client.get("/v1/libraries"))
    await asyncio.sleep(0.1)
    assert "PGSHELF_POOL_SIZE" in problem(await client.get("/v1/libraries"), 503, "pool_exhausted")["detail"]
    assert ok(await client.get("/health"))["status"] == "ok"
    admin.rollback()
    ok(await waiting)
    ok(await client.get("/v1/libraries"))


async def test_a_statement_that_takes_too_long(
    database_url: str, make_settings: Any, make_client: Any, admin: Any
) -> None:
    client = await make_client(make_settings(database_url, statement_timeout=0.2, worker_enabled=False))
    await library(client)
    admin.execute("lock pgshelf.libraries")
    assert problem(await client.get(SHELF), 504, "timeout")["sqlstate"] == "57014"
    admin.rollback()
    ok(await client.get(SHELF))


async def test_a_lock_that_is_not_given(database_url: str, make_settings: Any, make_client: Any, admin: Any) -> None:
    client = await make_client(make_settings(database_url, lock_timeout=0.2, worker_enabled=False))
    await library(client)
    await document(client, "k")
    admin.execute("select from pgshelf.documents for update")
    for response in (await client.patch(f"{SHELF}/documents/k", json={}), await client.delete(f"{SHELF}/documents/k")):
        assert problem(response, 503, "lock_timeout")["sqlstate"] == "55P03"
    ok(await client.get(f"{SHELF}/documents/k"))
    admin.rollback()
    ok(await client.delete(f"{SHELF}/documents/k"), 204)


async def test_a_database_without_pgshelf(empty_database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(empty_database_url, worker_enabled=False))
    for response in (
        await client.get("/v1/libraries"),
        await client.post("/v1/libraries", json={"name": "a"}),
        await client.post(f"{SHELF}/documents", json={"text": "x"}),
        await client.get(f"{SHELF}/documents/k"),
        await client.post(f"{SHELF}/search", json={"query": "x"}),
        await client.delete(SHELF),
    ):
        assert "pgshelf migrate" in problem(response, 503, "not_migrated")["detail"]


async def test_a_server_that_takes_no_writes(database_url: str, make_settings: Any, make_client: Any) -> None:
    first = await make_client(make_settings(database_url))
    await local(first)
    await document(first, "k", text="VACUUM reclaims storage.")
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f'alter database "{name}" set default_transaction_read_only = on')
    client = await make_client(make_settings(database_url, worker_enabled=False))
    (chunk,) = await chunks(client, "k")
    for response in (
        await client.post("/v1/libraries", json={"name": "a"}),
        await client.post(f"{SHELF}/documents", json={"text": "x"}),
        await client.patch(f"{SHELF}/documents/k", json={"title": "x"}),
        await client.patch(f"{SHELF}/chunks/{chunk['id']}", json={"text": "x"}),
        await client.delete(f"{SHELF}/documents/k"),
        await client.delete(SHELF),
    ):
        assert problem(response, 503, "read_only")["sqlstate"] == "25006"
    assert len(ok(await client.post(f"{SHELF}/search", json={"query": "storage"}))["hits"]) == 1


async def test_the_database_goes_and_comes_back(
    tmp_path: Path, postgres_version: int, make_settings: Any, make_client: Any
) -> None:
    def start() -> embedded.EmbeddedServer:
        version = postgres_version if postgres_version in embedded.VERSIONS else 18
        return embedded.start(tmp_path / "own", version, settings={"fsync": "off"})

    server = await asyncio.to_thread(start)
    migrate.upgrade(server.url())
    client = await make_client(make_settings(server.url(), worker_interval=0.1))
    await local(client)
    await document(client, "k", text="VACUUM reclaims storage.")
    await asyncio.to_thread(server.stop)
    for _ in range(2):
        for response in (
            await client.get(SHELF),
            await client.post(f"{SHELF}/documents", json={"text": "x"}),
            await client.post(f"{SHELF}/search", json={"query": "x"}),
            await client.get("/ready"),
        ):
            body = problem(response, 503, "database_unavailable")
            assert "/own" not in body["detail"]
        assert ok(await client.get("/health"))["status"] == "ok"
    server = await asyncio.to_thread(start)
    with server:

        async def back() -> bool:
            return bool((await client.get("/ready")).status_code == 200)

        await until(back, 15)
        assert ok(await client.get(f"{SHELF}/documents/k"))["status"] == "ready"
        ok(await client.post(f"{SHELF}/documents?wait=false", json={"key": "late", "text": "x"}), 202)

        async def embedded_by_the_worker() -> bool:
            return bool(ok(await client.get(f"{SHELF}/documents/late"))["status"] == "ready")

        await until(embedded_by_the_worker, 15)
        await asyncio.to_thread(psycopg.connect(server.url()).close)


async def test_sessions_that_were_cut_off_are_replaced(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    with psycopg.connect(database_url, autocommit=True) as connection:
        for _ in range(3):
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
            ok(await client.get(SHELF))


async def test_a_mistake_of_ours_tells_nothing_and_is_logged(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("select secret from vault")

    monkeypatch.setattr(libraries, "_find", broken)
    response = await client.get(SHELF, headers={"X-Request-Id": "it-was-me"})
    problem(response, 500, "internal_error")
    assert "secret" not in response.text and "RuntimeError" not in response.text
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert (vars(record)["request_id"], bool(record.exc_info)) == ("it-was-me", True)


async def test_an_error_of_the_database_that_nobody_foresaw(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "create or replace function pgshelf.delete_library(p_library text) returns void language plpgsql"
            " as $$ begin raise 'secret' using errcode = 'XX000'; end $$"
        )
    response = await client.delete(SHELF)
    assert problem(response, 500, "internal_error")["sqlstate"] == "XX000"
    assert "secret" not in response.text


async def test_passwords_stay_out_of_answers_and_logs(
    make_settings: Any, make_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = "postgresql://somebody:hunter2@127.0.0.1:1/nowhere"
    client = await make_client(make_settings(url, worker_interval=0.05))
    for path in ("/v1/libraries", "/ready"):
        response = await client.get(path)
        problem(response, 503, "database_unavailable")
        assert "hunter2" not in response.text and "somebody" not in response.text
    await asyncio.sleep(0.2)
    assert caplog.text and "hunter2" not in caplog.text


async def test_more_than_postgresql_can_store(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, max_chunk_length=5_000_000))
    await library(client)
    words = " ".join(f"word{number:x}" for number in range(200_000))
    body = {"key": "k", "chunks": [{"text": words, "embedding": [1, 0, 0]}]}
    problem(await client.post(f"{SHELF}/documents", json=body), 422, "too_complex")
    problem(await client.get(f"{SHELF}/documents/k"), 404, "document_not_found")


class Provider:
    """An embedding provider that fails as it is told to, or gives what it is told to."""

    provider, model, dimension = "local", "fails", 256
    batch, cached = 10, False

    def __init__(self, outcome: Exception) -> None:
        self.outcome = outcome

    async def embed(self, texts: list[str], kind: str) -> np.ndarray:
        raise self.outcome


@pytest.mark.parametrize(
    ("outcome", "status", "code", "words"),
    [
        (EmbedderFailed("the provider refused the model"), 502, "embedder_failed", "refused the model"),
        (EmbedderUnavailable("the provider is overloaded", 7.4), 503, "embedder_unavailable", "overloaded"),
        (EmbedderTimeout("the provider did not answer", 7.4), 504, "embedder_timeout", "not answer"),
        (TextRefused("text has no meaning to this model", 0), 422, "text_not_embeddable", "no meaning"),
    ],
)
async def test_a_provider_that_fails(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, outcome: Exception, status: int, code: str, words: str
) -> None:
    await local(client)
    monkeypatch.setattr(embedding, "embedder_for", lambda *_: Provider(outcome))
    for response, path in (
        (await client.post(f"{SHELF}/documents", json={"key": "k", "text": "x"}), "text"),
        (await client.post(f"{SHELF}/documents", json={"key": "k", "chunks": [{"text": "x"}]}), "chunks[0].text"),
        (await client.post(f"{SHELF}/search", json={"query": "x"}), "query"),
    ):
        body = problem(response, status, code)
        assert words in body["detail"]
        if code == "text_not_embeddable":
            assert body["errors"][0]["path"] == path
        if code == "embedder_unavailable":
            assert response.headers["retry-after"] == "7"
    assert ok(await client.get(f"{SHELF}/documents"))["items"] == []


async def test_an_embedder_that_this_server_lacks(client: httpx2.AsyncClient, admin: Any) -> None:
    await local(client)
    admin.execute("""update pgshelf.libraries set embedder = '{"provider": "other", "dimension": 256}'""")
    admin.commit()
    for response in (
        await client.post(f"{SHELF}/documents", json={"text": "x"}),
        await client.post(f"{SHELF}/search", json={"query": "x"}),
    ):
        assert "other" in problem(response, 422, "embedder_not_configured")["detail"]
