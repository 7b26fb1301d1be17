"""One application for all the cases of a file that writes nothing, for starting one for each would take minutes; and
what applications ask the database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from pgshelf import database
from pgshelf.app import create_app
from pgshelf.settings import Settings
from tests.conftest import _lifespan


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(
    shared_database_url: str, vector_schema: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client for an application on the database of the file; low limits, no worker."""
    limits = {"max_body_bytes": 200_000, "max_chunks": 20, "max_text_length": 50_000, "max_query_length": 500}
    limits |= {"max_k": 100, "max_offset": 200, "max_page": 50, "max_title_length": 100, "max_metadata_bytes": 2000}
    limits |= {"max_metadata_depth": 5, "max_chunk_length": 2000, "max_filter_bytes": 3000, "max_filter_depth": 20}
    settings = Settings(
        database_url=shared_database_url,
        data_dir=tmp_path_factory.mktemp("data"),
        vector_schema=vector_schema,
        worker_enabled=False,
        **limits,  # type: ignore[arg-type]  # all of them are integers
    )
    app = create_app(settings)
    async with _lifespan(app):
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that are sent from now on."""
    sent: list[str] = []
    rows = database.rows

    async def noted(connection: Any, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        sent.append(statement)
        return await rows(connection, statement, *parameters)

    monkeypatch.setattr(database, "rows", noted)
    return sent
