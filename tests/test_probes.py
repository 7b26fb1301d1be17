"""What a key and a role find out about libraries that they do not have: nothing."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests import probes
from tests.conftest import MakeClient
from tests.rest.asking import key
from tests.roles import logins

SEED = 20_261


@pytest.mark.unwatched
async def test_probes_find_nothing_beyond_the_border(
    database_url: str, make_settings: Any, make_client: MakeClient, vector_schema: str
) -> None:
    with logins(database_url, vector_schema) as login:
        service = login("pgshelf_service")
        client = await make_client(make_settings(service, auth="on", worker_enabled=False))
        border = probes.Border(
            client, key(database_url, "root", "admin"), key(database_url, "some", "writer", *probes.OWN), SEED
        )
        await border.build()
        role = login("pgshelf_writer", libraries=dict.fromkeys(probes.OWN, "write"))
        async with await psycopg.AsyncConnection.connect(role, autocommit=True) as session:
            await probes.probe(border, session, 2 * max(len(probes.REST), len(probes.SQL)))
            kinds = {f"rest {name}" for name in probes.REST} | {f"sql {name}" for name in probes.SQL}
            assert set(border.count) == kinds
            # what a probe would find if there were something to find
            with psycopg.connect(database_url, autocommit=True) as owner:
                name = psycopg.conninfo.conninfo_to_dict(role)["user"]
                owner.execute("select pgshelf.grant_library(%s, %s)", [name, probes.FOREIGN[0]])
            with pytest.raises(probes.Leak):
                await probes.probe(border, session, 2 * len(probes.SQL))
