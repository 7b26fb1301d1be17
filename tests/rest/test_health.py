"""Is the process alive, can it serve, and what does it serve."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import httpx2
import psycopg

from pgshelf import __version__, errors_page, migrate, schema
from pgshelf.errors import CODES
from tests.rest.asking import ok, problem

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class Sections(HTMLParser):
    """What of a page an address can lead to, and where the page leads."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str | None] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [tag for name, _ in attrs if name in ("href", "src")]


async def test_health_and_readiness(client: httpx2.AsyncClient) -> None:
    assert ok(await client.get("/health")) == {"status": "ok", "version": __version__}
    ready = ok(await client.get("/ready"))
    assert ready["status"] == "ready"
    assert (ready["checks"]["database"], ready["checks"]["schema"]) == ("ok", schema.head())
    assert ready["checks"]["pgvector"].startswith("0.")


async def test_without_pgvector_it_is_not_ready(client: httpx2.AsyncClient, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("drop extension vector cascade")
    assert "pgvector" in problem(await client.get("/ready"), 503, "not_ready")["detail"]


async def test_an_empty_database_is_not_ready(empty_database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(empty_database_url, worker_enabled=False))
    assert ok(await client.get("/health"))["status"] == "ok"
    assert "pgshelf migrate" in problem(await client.get("/ready"), 503, "not_ready")["detail"]


async def test_it_gets_ready_when_the_database_is_migrated(
    empty_database_url: str, make_settings: Any, make_client: Any, vector_schema: str
) -> None:
    client = await make_client(make_settings(empty_database_url, worker_enabled=False))
    problem(await client.get("/v1/libraries"), 503, "not_migrated")
    migrate.upgrade(empty_database_url, vector_schema=vector_schema)
    ok(await client.get("/ready"))
    ok(await client.get("/v1/libraries"))


async def test_another_version_of_the_schema_is_not_ready(client: httpx2.AsyncClient, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update pgshelf.installation set sql_hash = 'old'")
        assert "functions" in problem(await client.get("/ready"), 503, "not_ready")["detail"]
        connection.execute("update pgshelf.alembic_version set version_num = '9999'")
        assert "9999" in problem(await client.get("/ready"), 503, "not_ready")["detail"]
        connection.execute("delete from pgshelf.alembic_version")
        problem(await client.get("/ready"), 503, "not_ready")


async def test_a_browser_can_read_about_problems(client: httpx2.AsyncClient) -> None:
    page = await client.get("/errors", headers=BROWSER)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    found = Sections()
    found.feed(page.text)
    assert sorted(map(str, found.ids)) == sorted(CODES)
    assert found.links == [], "the other files of docs/ are not served"
    assert "<p><strong>400</strong> · Retry: no</p>" in page.text and "<code>/v1</code>" in page.text
    assert "<code>X</code> &lt;b&gt; <strong>&amp;</strong>" in errors_page.page("`X` <b> **&**")
    for plain in ("", "*/*", "application/json"):
        text = await client.get("/errors", headers={"Accept": plain})
        assert text.headers["content-type"] == "text/markdown; charset=utf-8" and text.text.startswith("# Problems")
        assert text.headers["vary"] == page.headers["vary"] == "Accept"


async def test_what_is_not_there_below_the_schema_is_a_problem(client: httpx2.AsyncClient) -> None:
    for path in ("/schema/x", "/schema/x/y", "/schema/redoc", "/schema/x.json"):
        problem(await client.get(path, headers=BROWSER), 404, "route_not_found")


async def test_they_have_no_prefix(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, api_prefix="/some/where"))
    for path in ("/health", "/ready", "/schema", "/schema/openapi.json"):
        assert ok(await client.get(path))
        problem(await client.get(f"/some/where{path}"), 404, "route_not_found")
