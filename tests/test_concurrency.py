"""Two services on one database, and a hundred clients that write and read through both."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx2
import psycopg
import pytest

SEED = 4711
CLIENTS = 100
ROUNDS = 2
SHARED_KEYS = 8
DOCUMENTS = "/v1/libraries/notes/documents"


class Crowd:
    """What the clients did and were told."""

    def __init__(self, first: httpx2.AsyncClient, second: httpx2.AsyncClient) -> None:
        self.services = (first, second)
        self.kept: dict[str, list[str]] = {}  # key -> texts, as acknowledged last
        self.gone: set[str] = set()
        self.shared: dict[str, set[tuple[str, ...]]] = {}  # key -> every version that somebody wrote
        self.statuses: Counter[int] = Counter()

    async def ask(self, service: httpx2.AsyncClient, method: str, address: str, **options: Any) -> httpx2.Response:
        answer = await service.request(method, address, **options)
        self.statuses[answer.status_code] += 1
        assert answer.status_code < 500, answer.text
        return answer

    async def client(self, number: int) -> None:
        """Write through one service, read through the other, at once."""
        rng = random.Random(SEED + number)
        for turn in range(ROUNDS):
            writer, reader = rng.sample(self.services, 2)
            key = f"{number}-{turn}"
            await self.write_and_read(writer, reader, key, [f"{key} chunk {n}" for n in range(rng.randint(1, 4))])
            if rng.random() < 0.4:  # replace it, by the other way in
                texts = [f"{key} again {n}" for n in range(rng.randint(1, 4))]
                await self.write_and_read(reader, writer, key, texts)
            if rng.random() < 0.3:
                await self.delete_and_look(writer, reader, key)
            await self.upsert_shared(rng.choice(self.services), f"shared-{rng.randrange(SHARED_KEYS)}", key, rng)

    async def write_and_read(
        self, writer: httpx2.AsyncClient, reader: httpx2.AsyncClient, key: str, texts: list[str]
    ) -> None:
        body = {"chunks": [{"text": text} for text in texts]}
        answer = await self.ask(writer, "PUT", f"{DOCUMENTS}/{key}", json=body)
        assert answer.status_code == (200 if key in self.kept else 201)
        self.kept[key] = texts
        assert await self.texts(reader, key) == texts, "a read does not see the write"
        found = await self.ask(
            reader, "POST", "/v1/libraries/notes/search", json={"query": texts[-1], "k": 1, "mode": "vector"}
        )
        assert found.json()["hits"][0]["score"] > 0.99, "a search does not see the write"

    async def delete_and_look(self, writer: httpx2.AsyncClient, reader: httpx2.AsyncClient, key: str) -> None:
        assert (await self.ask(writer, "DELETE", f"{DOCUMENTS}/{key}")).status_code == 204
        self.gone.add(key)
        del self.kept[key]
        for service in (reader, writer):
            assert (await self.ask(service, "GET", f"{DOCUMENTS}/{key}")).status_code == 404
        assert (await self.ask(reader, "DELETE", f"{DOCUMENTS}/{key}")).status_code == 404

    async def upsert_shared(self, service: httpx2.AsyncClient, key: str, by: str, rng: random.Random) -> None:
        texts = tuple(f"{key} by {by}, part {n}" for n in range(rng.randint(2, 6)))
        self.shared.setdefault(key, set()).add(texts)
        wait = rng.choice(["true", "false"])
        body = {"key": key, "title": by, "chunks": [{"text": text} for text in texts]}
        answer = await self.ask(service, "POST", f"{DOCUMENTS}?wait={wait}", json=body)
        assert answer.status_code in (200, 201, 202)
        assert tuple(await self.texts(service, key)) in self.shared[key], "two versions are mixed"

    async def texts(self, service: httpx2.AsyncClient, key: str) -> list[str]:
        answer = await self.ask(service, "GET", f"{DOCUMENTS}/{key}/chunks")
        assert answer.status_code == 200
        return [item["text"] for item in answer.json()["items"]]


@pytest.mark.unwatched
async def test_a_hundred_clients_lose_and_double_nothing(database_url: str, make_live_server: Any) -> None:
    print(f"seed {SEED}")
    first, second = (make_live_server(database_url, wait=False, PGSHELF_POOL_TIMEOUT="30") for _ in range(2))
    for server in (first, second):
        server.wait_until_ready()
    limits = httpx2.Limits(max_connections=CLIENTS)
    async with (
        httpx2.AsyncClient(base_url=first.url, timeout=60, limits=limits) as one,
        httpx2.AsyncClient(base_url=second.url, timeout=60, limits=limits) as two,
    ):
        (await one.post("/v1/libraries", json={"name": "notes"})).raise_for_status()
        crowd = Crowd(one, two)
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(crowd.client(number))
        await everything_embedded(two)
        stats = (await two.get("/v1/libraries/notes/stats")).json()
    check(database_url, crowd, stats)
    print(dict(crowd.statuses))


async def everything_embedded(service: httpx2.AsyncClient, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while (await service.get("/v1/libraries/notes/stats")).json()["pending"]:  # noqa: ASYNC110 - another process embeds
            await asyncio.sleep(0.1)


def check(database_url: str, crowd: Crowd, stats: dict[str, Any]) -> None:
    with psycopg.connect(database_url) as connection:
        found = {
            key: (version, texts)
            for key, version, texts in connection.execute(
                """select d.key, d.version, array_agg(c.text order by c.ordinal) from pgshelf.documents d
                left join pgshelf.chunks c on c.document_id = d.id group by d.key, d.version"""
            ).fetchall()
        }
        count = connection.execute(
            "select count(*), count(distinct id), count(embedding) from pgshelf.chunks"
        ).fetchone()
    assert found.keys() == crowd.kept.keys() | crowd.shared.keys()
    assert {key: found[key][1] for key in crowd.kept} == crowd.kept
    for key, versions in crowd.shared.items():
        assert tuple(found[key][1]) in versions
        # every upsert counted once; embedding afterwards is no new version
        assert found[key][0] == len(versions)
    total = sum(len(texts) for _, texts in found.values())
    assert count == (total, total, total), "orphans, duplicates or missing vectors"
    assert (stats["documents"], stats["chunks"], stats["failed"]) == (len(found), total, 0)
