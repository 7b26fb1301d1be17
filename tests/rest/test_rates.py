"""How much one caller may ask: in a time, over all processes, and at once; and whose address counts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psycopg
import pytest

from pgshelf import pools, questions, rates
from pgshelf.access import RULES
from pgshelf.pools import make_engine
from pgshelf.rates import PRESETS, Quota, Rates, quota, quotas
from pgshelf.settings import Settings
from pgshelf.worker import tidy
from pgshelf_client import Client, RateLimited
from tests.conftest import MakeClient, MakeLiveServer, MakeSettings
from tests.rest.asking import at, bearer, document, key, library, ok, problem
from tests.roles import logins

SHELF = at("libraries", "shelf")
SEARCH = f"{SHELF}/search"
FIELDS = ("ratelimit", "ratelimit-policy", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset")


def told(response: httpx2.Response) -> dict[str, str]:
    """What an answer says of limits."""
    return {name: response.headers[name] for name in FIELDS if name in response.headers}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("100/s", Quota(100, 1)),
        ("600/10min", Quota(600, 600)),
        ("5/h", Quota(5, 3600)),
        ("1/2d", Quota(1, 172_800)),
        ("off", None),
        ("", None),
    ],
)
def test_a_quota_is_read(text: str, found: Quota | None) -> None:
    assert quota(text) == found


def test_a_class_may_differ_from_the_preset() -> None:
    assert quotas(Settings()) == {}
    team = quotas(Settings(rate_limits="team"))
    assert team == {kind: quota(text) for kind, text in PRESETS["team"].items()}
    mixed = quotas(Settings(rate_limits="team", rate_limit_search="7/min", rate_limit_import="off"))
    assert mixed == {"search": Quota(7, 60), "write": team["write"], "admin": team["admin"]}


def test_every_operation_has_a_class() -> None:
    kinds = {name: rule.kind for name, rule in RULES.items()}
    assert kinds["search"] == kinds["getDocument"] == kinds["listChanges"] == "search"
    assert kinds["addDocument"] == kinds["createToken"] == "write"
    assert kinds["importDocuments"] == kinds["exportDocuments"] == "import"
    assert kinds["createKey"] == kinds["metrics"] == "admin"
    assert {name for name, rule in RULES.items() if rule.stream} == {
        "importDocuments",
        "exportDocuments",
        "listChanges",
    }


async def test_a_second_is_called_one(database_url: str, make_settings: MakeSettings, make_client: MakeClient) -> None:
    client = await make_client(make_settings(database_url, rate_limit_search="1/s"))
    answers = [await client.get(SHELF) for _ in range(5)]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "At most 1 requests of the class 'search' in a second." in problem(refused, 429, "rate_limited")["detail"]


async def test_a_quota_is_kept_and_told(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, rate_limit_search="3/min", rate_limit_write="1/h"))
    await library(client)
    assert told(await client.get("/health")) == told(await client.get("/v1/nothing")) == {}
    await document(client, "k")  # another class
    left = []
    for _ in range(3):
        answer = await client.get(SHELF)
        ok(answer)
        left.append(told(answer))
    assert left[0] == {
        "ratelimit-policy": '"search";q=3;w=60', "ratelimit": '"search";r=2;t=20',
        "ratelimit-limit": "3", "ratelimit-remaining": "2", "ratelimit-reset": "20",
    }  # fmt: skip
    assert [each["ratelimit-remaining"] for each in left] == ["2", "1", "0"]
    refused = await client.post(SEARCH, json={"vector": [1, 0, 0]})
    assert "3 requests of the class 'search' in 60 seconds" in problem(refused, 429, "rate_limited")["detail"]
    wait = int(refused.headers["retry-after"])
    assert 15 <= wait <= 20  # the first of them is there again after a third of the time
    assert told(refused)["ratelimit"] == f'"search";r=0;t={wait}'
    problem(await client.put(f"{SHELF}/documents/k", json={"title": "x"}), 429, "rate_limited")
    ok(await client.get("/health"))


async def test_who_is_over_the_limit_sends_no_body(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, rate_limit_search="1/h"))
    await library(client)
    ok(await client.get(SHELF))

    asked: list[bool] = []

    async def body() -> AsyncIterator[bytes]:
        asked.append(True)
        yield b"{}"

    problem(await client.post(SEARCH, content=body(), headers={"Content-Type": "text/plain"}), 429, "rate_limited")
    assert not asked


async def test_each_key_has_its_own_and_shares_it_with_its_tokens(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, auth="on", rate_limit_search="2/h"))
    first, second = key(database_url, "first"), key(database_url, "second")
    token = ok(await client.post("/v1/token", json={}, headers=bearer(first)), 201)["token"]
    for secret in (first, token, second, second):
        ok(await client.get("/v1/libraries", headers=bearer(secret)))
    for secret in (first, token, second):
        problem(await client.get("/v1/libraries", headers=bearer(secret)), 429, "rate_limited")
    # who has no key, or a wrong one, is counted by address
    for secret in ("pgs_wrong", "pgs_other"):
        problem(await client.get("/v1/libraries", headers=bearer(secret)), 401, "invalid_key")
    for headers in ({}, bearer("pgs_wrong")):
        problem(await client.get("/v1/libraries", headers=headers), 429, "rate_limited")


async def test_it_is_there_again_after_a_while(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, rate_limit_search="4/s", rate_limit_admin="off"))
    await library(client)
    while (answer := await client.get(SHELF)).status_code == 200:
        pass
    problem(answer, 429, "rate_limited")
    await asyncio.sleep(0.55)
    ok(await client.get(SHELF))
    ok(await client.get(SHELF))


async def test_what_cannot_be_counted_is_let_in(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, rate_limit_search="1/h", lock_timeout=0.1))
    await library(client)
    with psycopg.connect(database_url, autocommit=True) as db:
        db.execute("alter table pgshelf.rate_shares rename to away")
        for _ in range(3):
            answer = await client.get(SHELF)
            ok(answer)
        assert told(answer)["ratelimit-remaining"] == "1"
        db.execute("alter table pgshelf.away rename to rate_shares")


async def test_a_service_that_is_not_the_owner_counts(
    database_url: str, vector_schema: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    with logins(database_url, vector_schema) as login:
        service = login("pgshelf_service")
        client = await make_client(make_settings(service, rate_limit_search="1/h", worker_enabled=False))
        await library(client)
        ok(await client.get(SHELF))
        problem(await client.get(SHELF), 429, "rate_limited")
        engine = make_engine(make_settings(service), service)
        assert await tidy(engine, make_settings(service)) == 0  # it may forget shares, too
        await pools.close(engine)


async def test_few_requests_ask_postgresql(
    database_url: str, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = Rates(make_settings(database_url, rate_limit_search="1000/s"), database_url)
    asked = 0
    ask = questions.Beside.ask

    async def counted(self: questions.Beside, *given: Any) -> Any:
        nonlocal asked
        asked += 1
        return await ask(self, *given)

    monkeypatch.setattr(questions.Beside, "ask", counted)
    for _ in range(500):
        await limiter.admit("somebody", "search")
    assert asked <= 13  # 1, 2, 4 ... 64, then 100 at a time
    assert limiter._shares["somebody", "search"].step == 100
    monkeypatch.setattr(rates, "LATE", 0.0)  # who comes seldom takes less in advance
    limiter._shares["somebody", "search"].taken = 0
    monkeypatch.setattr(rates, "SOON", 0.0)
    await limiter.admit("somebody", "search")
    assert limiter._shares["somebody", "search"].step == 50
    # a process forgets those that it has not seen for longest
    monkeypatch.setattr(rates, "KNOWN", 2)
    for name in ("a", "b", "somebody", "c"):
        await limiter.admit(name, "search")
    assert [caller for caller, _ in limiter._shares] == ["somebody", "c"]
    await limiter.close()


async def test_a_clock_that_was_set_back_shuts_nobody_out(database_url: str) -> None:
    take = "select granted, remaining, wait from pgshelf.take_requests('a', 'search', %s, 10, 60)"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as db:

        async def taken(wanted: int) -> Any:
            return await (await db.execute(take, [wanted])).fetchone()

        assert await taken(4) == (4, 6, 0)
        assert await taken(9) == (6, 0, 0)
        granted, left, wait = await taken(1)
        assert (granted, left) == (0, 0) and 5 < wait <= 6
        await db.execute("update pgshelf.rate_shares set whole_at = now() + interval '1 day'")
        assert (await taken(1))[2] == pytest.approx(6)
        assert await (await db.execute("select pgshelf.forget_rate_shares()")).fetchone() == (0,)
        await db.execute("update pgshelf.rate_shares set whole_at = now() - interval '1 second'")
        assert await (await db.execute("select pgshelf.forget_rate_shares()")).fetchone() == (1,)
        assert await taken(10) == (10, 0, 0)


def test_two_processes_keep_one_limit(database_url: str, make_live_server: MakeLiveServer) -> None:
    """A caller that asks two servers as fast as it can: in t seconds no more than q (1 + t / w) and 2 (q / 10 - 1)."""
    servers = [make_live_server(database_url, PGSHELF_RATE_LIMIT_SEARCH="20/2s", wait=False) for _ in range(2)]
    for server in servers:
        server.wait_until_ready()
    httpx2.post(
        f"{servers[0].url}/v1/libraries", json={"name": "shelf", "embedder": {"provider": "none"}, "dimension": 3}
    )
    seen: list[Counter[int]] = []

    def ask(url: str) -> None:
        counts = Counter[int]()
        with httpx2.Client() as client:
            while time.monotonic() < end:
                counts[client.get(f"{url}{SHELF}").status_code] += 1
        seen.append(counts)

    begun = time.monotonic()
    end = begun + 2.0
    with ThreadPoolExecutor() as pool:
        for server in servers * 2:
            pool.submit(ask, server.url)
    spent, total = time.monotonic() - begun, sum(seen, Counter[int]())
    assert set(total) == {200, 429}, total
    assert 20 <= total[200] <= 20 * (1 + spent / 2) + 2 * 1, (total, spent)


def test_the_client_comes_back_when_it_is_told(database_url: str, make_live_server: MakeLiveServer) -> None:
    server = make_live_server(database_url, PGSHELF_RATE_LIMIT_ADMIN="1/s", PGSHELF_RATE_LIMIT_SEARCH="1/h")
    with Client(server.url) as client:
        started = time.monotonic()
        for name in ("a", "b"):
            client.create_library(name, embedder={"provider": "none"}, dimension=3)
        assert time.monotonic() - started >= 1
        client.get_library("a")
        with pytest.raises(RateLimited) as refused:
            client.get_library("a")
        assert refused.value.code == "rate_limited" and 3000 < (refused.value.retry_after or 0) <= 3600


async def test_so_many_at_once_and_streams_for_themselves(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    limits = {"max_concurrent_requests": 2, "max_concurrent_streams": 1}
    client = await make_client(make_settings(database_url, lock_timeout=20.0, **limits))
    await library(client)
    with psycopg.connect(database_url) as db:
        db.execute("lock pgshelf.libraries")
        held = [asyncio.create_task(client.get(SHELF)) for _ in range(2)]
        await asyncio.sleep(0.2)
        refused = await client.get(SHELF)
        assert "At most 2 requests" in problem(refused, 429, "too_many_concurrent")["detail"]
        ok(await client.get("/health"))
        stream = asyncio.create_task(client.get(f"{SHELF}/export"))
        await asyncio.sleep(0.1)
        refused = await client.get(f"{SHELF}/changes")
        assert "At most 1 streams" in problem(refused, 429, "too_many_concurrent")["detail"]
        db.rollback()
    for answer in await asyncio.gather(*held, stream):
        assert answer.status_code == 200
    ok(await client.get(SHELF))
    ok(await client.get(f"{SHELF}/changes"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "found"),
    [
        ("203.0.113.7", ["198.51.100.1"], "203.0.113.7"),  # who is no proxy says what it likes
        ("10.0.0.9", [], "10.0.0.9"),
        ("10.0.0.9", ["198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.9", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.9", ["forged, 198.51.100.1"], "198.51.100.1"),  # the last one is the proxy's own
        ("10.0.0.9", ["198.51.100.1, 10.1.1.1"], "198.51.100.1"),
        ("10.0.0.9", ["198.51.100.1", "10.1.1.1"], "198.51.100.1"),
        ("10.0.0.9", ["10.1.1.1"], "10.1.1.1"),
        ("10.0.0.9", ["198.51.100.1, nonsense"], "unknown"),
        ("2001:db8:1:2:3::4", [], "2001:db8:1:2::/64"),
        ("10.0.0.9", ["[2001:db8:1:2::5]"], "2001:db8:1:2::/64"),
    ],
)
def test_the_address_that_counts(peer: str, forwarded: list[str], found: str) -> None:
    limiter = Rates(Settings(trusted_proxies="10.0.0.0/8"), "postgresql://nowhere")
    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    assert limiter.address({"client": (peer, 1), "headers": headers}) == f"address {found}"
    assert Rates(Settings(), "").address({"client": (peer, 1), "headers": headers}).startswith("address ")


def test_without_an_address_all_are_one() -> None:
    assert Rates(Settings(), "").address({"client": None, "headers": []}) == "address unknown"
