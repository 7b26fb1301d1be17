"""Starting, going on and ending: without a database, behind TLS, while it is migrated, with requests under way."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
import trustme

from pgshelf import cli_serve, doctor, migrate
from pgshelf.settings import Settings
from tests.conftest import MakeLiveServer
from tests.postgres_proxy import Proxy

LIBRARY = {"name": "a", "dimension": 2, "embedder": {"provider": "none"}}
DOCUMENT = {"chunks": [{"text": "one", "embedding": [1.0, 0.0]}]}
SEARCH = "/v1/libraries/a/search"


@pytest.fixture
def proxy(database_url: str, unused_port: int) -> Iterator[Proxy]:
    with Proxy(database_url, unused_port) as made:
        yield made


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


MakeTls = Callable[..., Proxy]


@pytest.fixture
def tls(database_url: str, unused_port: int, authority: trustme.CA) -> Iterator[Proxy]:
    """The database behind a certificate for localhost."""
    with Proxy(database_url, unused_port, server_context(authority, "localhost")) as made:
        made.open()
        yield made


def server_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def root(authority: trustme.CA, folder: Path) -> str:
    """The authority's certificate in a file, for sslrootcert."""
    file = folder / "root.crt"
    authority.cert_pem.write_to_path(str(file))
    return str(file)


def test_it_starts_before_the_database_and_outlives_it(
    database_url: str, proxy: Proxy, make_live_server: MakeLiveServer
) -> None:
    server = make_live_server(proxy.url(database_url), wait=False, PGSHELF_CONNECT_TIMEOUT="2")
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        wait_for(lambda: client.get("/health").status_code == 200)
        answer = client.get("/ready")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert client.get("/v1/libraries").status_code == 503
        assert "not ready: the database cannot be reached" in server.output
        proxy.open()
        server.wait_until_ready()
        assert client.post("/v1/libraries", json=LIBRARY).status_code == 201
        assert client.put("/v1/libraries/a/documents/k", json=DOCUMENT).status_code == 201
        for _ in range(2):
            proxy.close()
            assert client.post(SEARCH, json={"vector": [1, 0]}).status_code == 503
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
            proxy.open()
            # the first request finds connections that are gone, and others in their place
            assert len(client.post(SEARCH, json={"vector": [1, 0]}).json()["hits"]) == 1


def test_requests_under_way_are_finished(database_url: str, make_live_server: MakeLiveServer) -> None:
    server = make_live_server(database_url)
    with httpx2.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/v1/libraries", json=LIBRARY).status_code == 201
        with psycopg.connect(database_url) as connection:
            connection.execute("lock table pgshelf.documents")
            waiting = pool.submit(httpx2.put, f"{server.url}/v1/libraries/a/documents/k", json=DOCUMENT, timeout=30)
            wait_for(lambda: blocked(database_url))
            server.process.terminate()
            time.sleep(0.5)
            assert not waiting.done() and server.process.poll() is None
        assert waiting.result(20).status_code == 201
        assert server.process.wait(20) == 0
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select count(*) from pgshelf.chunks").fetchone() == (1,)


def test_it_serves_while_it_is_migrated(
    database_url: str, make_live_server: MakeLiveServer, vector_schema: str
) -> None:
    server = make_live_server(database_url)
    statuses: list[int] = []
    done = threading.Event()

    def go_on() -> None:
        with httpx2.Client(base_url=server.url, timeout=30) as client:
            while not done.is_set():
                statuses.append(client.post(SEARCH, json={"vector": [1, 0], "filter": {"n": 1}}).status_code)
                document = {**DOCUMENT, "metadata": {"n": 1}}
                statuses.append(client.put("/v1/libraries/a/documents/k", json=document).status_code)

    with httpx2.Client(base_url=server.url) as client, ThreadPoolExecutor(2) as pool:
        assert client.post("/v1/libraries", json=LIBRARY).status_code == 201
        assert client.put("/v1/libraries/a/documents/k", json=DOCUMENT).status_code == 201
        running = [pool.submit(go_on) for _ in range(2)]
        try:
            with psycopg.connect(database_url, autocommit=True) as connection:
                for _ in range(3):
                    connection.execute("update pgshelf.installation set sql_hash = 'that of an older version'")
                    assert client.get("/ready").status_code == 503
                    migrate.upgrade(database_url, vector_schema=vector_schema)
                    assert client.get("/ready").status_code == 200
        finally:
            done.set()
        for each in running:
            each.result()
    assert len(statuses) > 20
    assert set(statuses) <= {200, 201}


def test_it_reaches_postgresql_through_tls_that_is_verified(
    database_url: str, tls: Proxy, authority: trustme.CA, make_live_server: MakeLiveServer, tmp_path: Path
) -> None:
    url = tls.url(database_url, sslmode="verify-full", sslrootcert=root(authority, tmp_path))
    server = make_live_server(url)
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        assert client.post("/v1/libraries", json={**LIBRARY, "index": {"type": "hnsw"}}).status_code == 201
        assert client.put("/v1/libraries/a/documents/k", json=DOCUMENT).status_code == 201
        assert len(client.post(SEARCH, json={"vector": [1, 0]}).json()["hits"]) == 1
        # the reconciler of shelves, which has a connection of its own
        wait_for(lambda: client.get("/v1/libraries/a/index").json()["state"] == "ready")
    assert tls.encrypted >= 3
    levels = {finding.text: finding.level for finding in doctor.examine(url, Settings(database_url=url))}
    assert levels["the connection is encrypted"] == "ok"


@pytest.mark.parametrize("wrong", ["authority", "name", "none"])
async def test_a_certificate_that_is_not_right_is_refused_and_said(
    wrong: str,
    database_url: str,
    unused_port: int,
    authority: trustme.CA,
    make_settings: Callable[..., Settings],
    make_client: Any,
    tmp_path: Path,
) -> None:
    context = {
        "authority": server_context(trustme.CA(), "localhost"),
        "name": server_context(authority, "db.example.org"),
        "none": None,
    }[wrong]
    said = {
        "authority": "certificate verify failed",
        "name": 'server certificate for "db.example.org" does not match host name "localhost"',
        "none": "server does not support SSL, but SSL was required",
    }[wrong]
    with Proxy(database_url, unused_port, context) as proxy:
        proxy.open()
        url = proxy.url(database_url, sslmode="verify-full", sslrootcert=root(authority, tmp_path))
        # what serve prints at its start, and doctor always
        [finding] = doctor.examine(url, Settings(database_url=url))
        assert finding.level == "fail" and finding.text.startswith("the database cannot be reached")
        assert said in finding.text
        client = await make_client(make_settings(url, worker_enabled=False))
        assert (await client.get("/health")).status_code == 200
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert (await client.post(SEARCH, json={"vector": [1, 0]})).status_code == 503


def test_processes_are_replaced_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Recorder:
        def __init__(self, _: str, **options: Any) -> None:
            given.update(options)

        def serve(self) -> None: ...

    monkeypatch.setattr("granian.Granian", Recorder)
    monkeypatch.setattr("os.register_at_fork", lambda **_: None)
    cli_serve._serve(Settings(workers_lifetime=86_400, workers_max_bytes=2 * 1024**3), "127.0.0.1", reload=False)
    assert (given["workers_lifetime"], given["workers_max_rss"]) == (86_400, 2048)
    cli_serve._serve(Settings(), "127.0.0.1", reload=False)
    assert (given["workers_lifetime"], given["workers_max_rss"]) == (None, None)


def blocked(url: str) -> bool:
    """Whether a session of the service waits for a lock."""
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        ).fetchone()
    return found is not None


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx2.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)
