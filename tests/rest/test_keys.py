"""Keys and tokens over REST: made, listed, rotated, revoked, exchanged; no keys yet; hosts; other origins."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import psycopg
import pytest

from pgshelf import authentication, credentials, hosts
from pgshelf.settings import Settings
from tests.rest.asking import bearer, key, library, ok, pages, problem, until

KEYS = "/v1/keys"
EVERY = "0.0.0.0"  # noqa: S104 - nobody listens


@pytest.fixture
async def admin(client: httpx2.AsyncClient, database_url: str) -> httpx2.AsyncClient:
    """A client with a key for everything."""
    client.headers.update(bearer(key(database_url, "root", "admin")))
    return client


async def role_of(client: httpx2.AsyncClient, secret: str) -> int:
    """What the list of libraries answers to a secret."""
    return (await client.get("/v1/libraries", headers=bearer(secret))).status_code


async def test_a_key_is_made_and_shown_once(admin: httpx2.AsyncClient, database_url: str) -> None:
    body: dict[str, Any] = {"name": "crawler", "role": "writer", "libraries": ["team-*", "handbook"]}
    response = await admin.post(KEYS, json={**body, "expires_at": "2100-01-01T00:00:00Z"})
    made = ok(response, 201)
    assert response.headers["cache-control"] == "no-store"
    assert {name: made[name] for name in body} == body and made["expires_at"] == "2100-01-01T00:00:00Z"
    assert credentials.well_formed(made["secret"]) and made["secret"].startswith("pgs_")
    found = ok(await admin.get(response.headers["location"]))
    assert found == ok(await admin.get(f"{KEYS}/crawler"))
    assert found["secrets"][0]["hint"] == made["secret"][:8] and "secret" not in found
    for answer in (await admin.get(KEYS), await admin.get(f"{KEYS}/crawler")):
        assert made["secret"] not in answer.text and made["secret"][9:] not in answer.text
    with psycopg.connect(database_url) as connection:
        everything = str(
            connection.execute("select to_jsonb(k), to_jsonb(s) from pgshelf.keys k, pgshelf.key_secrets s").fetchall()
        )
    assert made["secret"][9:] not in everything and credentials.digest(made["secret"]).hex() in everything


EVERYTHING: list[dict[str, Any]] = [{}, {"libraries": None}, {"libraries": ["a", "*"]}]


async def test_a_key_for_all_libraries(admin: httpx2.AsyncClient) -> None:
    for number, fields in enumerate(EVERYTHING):
        made = ok(await admin.post(KEYS, json={"name": f"k{number}", "role": "reader", **fields}), 201)
        assert made["libraries"] == ["*"] and made["expires_at"] is None


NO_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"), ({"name": "x" * 129}, "name"), ({"name": " a"}, "name"), ({"name": "a\n"}, "name"),
    ({"name": ".."}, "name"), ({"name": "00000000-0000-4000-8000-000000000000"}, "name"),
    ({"role": "root"}, "role"), ({"libraries": []}, "libraries"), ({"libraries": [""]}, "libraries[0]"),
    ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"), ({"expires_at": "2100-01-01T00:00:00"}, "expires_at"),
    ({"secret": "x"}, "body"),
]  # fmt: skip


async def test_what_makes_no_key(admin: httpx2.AsyncClient) -> None:
    for fields, path in NO_KEYS:
        response = await admin.post(KEYS, json={"name": "a", "role": "reader", **fields})
        assert problem(response, 400, "validation_failed")["errors"][0]["path"] == path, fields


async def test_names_of_keys_are_unique_until_they_are_revoked(admin: httpx2.AsyncClient) -> None:
    body = {"name": "a", "role": "reader"}
    first = ok(await admin.post(KEYS, json=body), 201)
    problem(await admin.post(KEYS, json=body), 409, "key_exists")
    assert (await admin.delete(f"{KEYS}/a")).status_code == 204
    second = ok(await admin.post(KEYS, json=body), 201)
    assert ok(await admin.get(f"{KEYS}/a"))["id"] == second["id"] != first["id"]
    assert ok(await admin.get(f"{KEYS}/{first['id'].upper()}"))["revoked_at"] is not None
    for gone in (first["id"], "b", "00000000-0000-4000-8000-000000000000"):
        problem(await admin.delete(f"{KEYS}/{gone}"), 404, "key_not_found")
        problem(await admin.post(f"{KEYS}/{gone}/rotate", json={}), 404, "key_not_found")


async def test_keys_are_listed_page_by_page(admin: httpx2.AsyncClient) -> None:
    for number in range(5):
        ok(await admin.post(KEYS, json={"name": f"k{number}", "role": "reader"}), 201)
    assert (await admin.delete(f"{KEYS}/k1")).status_code == 204
    assert [item["name"] for item in await pages(admin, KEYS, 2)] == ["root", "k0", "k2", "k3", "k4"]
    every = ok(await admin.get(KEYS, params={"revoked": True}))["items"]
    assert [item["name"] for item in every if item["revoked_at"]] == ["k1"]
    assert all(len(item["secrets"]) == 1 for item in every)


async def test_a_rotated_key_has_two_secrets_for_a_while(admin: httpx2.AsyncClient, database_url: str) -> None:
    old = ok(await admin.post(KEYS, json={"name": "a", "role": "reader"}), 201)
    response = await admin.post(f"{KEYS}/a/rotate", json={"overlap": 60})
    new = ok(response)
    assert response.headers["cache-control"] == "no-store"
    assert (new["id"], new["secret"] != old["secret"]) == (old["id"], True)
    secrets = ok(await admin.get(f"{KEYS}/a"))["secrets"]
    assert [item["hint"] for item in secrets] == [new["secret"][:8], old["secret"][:8]]
    left = datetime.fromisoformat(secrets[1]["expires_at"]) - datetime.now(UTC)
    assert secrets[0]["expires_at"] is None and timedelta(seconds=30) < left <= timedelta(seconds=61)
    assert [await role_of(admin, each["secret"]) for each in (old, new)] == [200, 200]
    # a longer overlap gives no time back
    third = ok(await admin.post(f"{KEYS}/a/rotate", json={}))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update pgshelf.key_secrets set expires_at = now() where expires_at < now() + '61 s'")
    problem(await admin.get("/v1/libraries", headers=bearer(old["secret"])), 401, "key_expired")
    assert [await role_of(admin, each["secret"]) for each in (new, third)] == [200, 200]
    last = ok(await admin.post(f"{KEYS}/a/rotate", json={"overlap": 0}))
    assert [await role_of(admin, each["secret"]) for each in (old, new, third, last)] == [401, 401, 401, 200]
    problem(await admin.post(f"{KEYS}/a/rotate", json={"overlap": -1}), 400, "validation_failed")


async def test_a_rotation_may_renew_an_expired_key(admin: httpx2.AsyncClient, database_url: str) -> None:
    secret = key(database_url, "old", "reader", expires_at=datetime.now(UTC) - timedelta(days=1))
    problem(await admin.get("/v1/libraries", headers=bearer(secret)), 401, "key_expired")
    new = ok(await admin.post(f"{KEYS}/old/rotate", json={"expires_at": "2100-01-01T00:00:00+02:00"}))
    assert new["expires_at"] == "2099-12-31T22:00:00Z" and await role_of(admin, new["secret"]) == 200
    assert ok(await admin.post(f"{KEYS}/old/rotate", json={}))["expires_at"] == new["expires_at"]
    assert ok(await admin.post(f"{KEYS}/old/rotate", json={"expires_at": None}))["expires_at"] is None
    problem(
        await admin.post(f"{KEYS}/old/rotate", json={"expires_at": "2001-01-01T00:00:00Z"}), 400, "validation_failed"
    )


async def test_a_token_is_narrower_and_short_lived(admin: httpx2.AsyncClient, database_url: str) -> None:
    for name in ("team-a", "team-b", "other"):
        await library(admin, name)
    wide = bearer(key(database_url, "team", "writer", "team-*"))
    response = await admin.post("/v1/token", json={"role": "reader", "libraries": ["team-a", "other"]}, headers=wide)
    made = ok(response, 201)
    assert response.headers["cache-control"] == "no-store" and made["token"].startswith("pgt_")
    assert (made["role"], made["libraries"]) == ("reader", ["team-a", "other"])
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=14) < left <= timedelta(minutes=15, seconds=1)
    token = bearer(made["token"])
    # both scopes must cover a library
    assert [item["name"] for item in ok(await admin.get("/v1/libraries", headers=token))["items"]] == ["team-a"]
    ok(await admin.get("/v1/libraries/team-a", headers=token))
    for hidden in ("team-b", "other", "none"):
        problem(await admin.get(f"/v1/libraries/{hidden}", headers=token), 404, "library_not_found")
    problem(await admin.post("/v1/libraries/team-a/documents", json={"text": "x"}, headers=token), 403, "forbidden")
    problem(await admin.post("/v1/token", json={}, headers=token), 403, "forbidden")
    plain = ok(await admin.post("/v1/token", json={"expires_in": 3600}, headers=wide), 201)
    assert (plain["role"], plain["libraries"]) == ("writer", ["*"])
    names = [item["name"] for item in ok(await admin.get("/v1/libraries", headers=bearer(plain["token"])))["items"]]
    assert names == ["team-a", "team-b"]
    problem(await admin.post("/v1/token", json={"role": "admin"}, headers=wide), 403, "forbidden")
    problem(await admin.post("/v1/token", json={"expires_in": 3601}, headers=wide), 400, "validation_failed")


async def test_a_token_ends_with_its_key_or_its_secret(admin: httpx2.AsyncClient, database_url: str) -> None:
    async def token(secret: str) -> dict[str, Any]:
        found: dict[str, Any] = ok(await admin.post("/v1/token", json={}, headers=bearer(secret)), 201)
        return found

    end = datetime.now(UTC) + timedelta(seconds=60)
    short = await token(key(database_url, "short", "reader", expires_at=end))
    assert datetime.fromisoformat(short["expires_at"]) == end
    made = ok(await admin.post(KEYS, json={"name": "a", "role": "reader"}), 201)
    first = await token(made["secret"])
    rotated = ok(await admin.post(f"{KEYS}/a/rotate", json={"overlap": 0}))
    problem(await admin.get("/v1/libraries", headers=bearer(first["token"])), 401, "key_expired")
    second = await token(rotated["secret"])
    assert await role_of(admin, second["token"]) == 200
    assert (await admin.delete(f"{KEYS}/a")).status_code == 204
    for secret in (second["token"], rotated["secret"]):
        problem(await admin.get("/v1/libraries", headers=bearer(secret)), 401, "key_revoked")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update pgshelf.key_secrets set expires_at = now() - interval '2 hours' where token")
        await token(key(database_url, "b"))
        assert connection.execute("select count(*) from pgshelf.key_secrets where token").fetchone() == (1,)


async def test_a_key_may_end_itself(admin: httpx2.AsyncClient) -> None:
    assert (await admin.delete(f"{KEYS}/root")).status_code == 204
    problem(await admin.get(KEYS), 401, "key_revoked")


async def test_the_last_use_is_recorded_once_a_minute(admin: httpx2.AsyncClient, database_url: str) -> None:
    secret = key(database_url, "a")
    with psycopg.connect(database_url, autocommit=True) as connection:

        def used() -> Any:
            row = connection.execute("select last_used_at, xmin::text from pgshelf.keys where name = 'a'").fetchone()
            return row

        assert used()[0] is None
        await asyncio.gather(*(role_of(admin, secret) for _ in range(10)))

        async def recorded() -> bool:
            return used()[0] is not None

        await until(recorded)
        first = used()
        await role_of(admin, secret)
        await asyncio.sleep(0.2)
        assert used() == first
        connection.execute("update pgshelf.keys set last_used_at = now() - interval '61 s' where name = 'a'")
        stale = used()
        await role_of(admin, secret)

        async def again() -> bool:
            return bool(used() != stale)

        await until(again)


async def test_a_use_that_cannot_be_recorded_is_in_nobodys_way(
    admin: httpx2.AsyncClient, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pgshelf")
    secret = key(database_url, "a")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("drop function pgshelf.key_used")
    assert await role_of(admin, secret) == 200

    async def told() -> bool:
        return "the use of a key was not recorded" in caplog.text

    await until(told)
    assert secret not in caplog.text and "WARNING" not in caplog.text


async def test_a_lost_connection_is_opened_again(admin: httpx2.AsyncClient, database_url: str) -> None:
    for _ in range(2):
        with psycopg.connect(database_url, autocommit=True) as connection:
            ended = connection.execute(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity"
                " where application_name = 'pgshelf auth' and datname = current_database()"
            ).fetchone()
            assert ended == (0 if _ == 0 else 1,)
        ok(await admin.get("/v1/libraries"))


async def test_callers_who_give_up_leave_the_connection_usable(
    database_url: str, make_settings: Any, make_client: Any
) -> None:
    client = await make_client(make_settings(database_url, auth="on", pool_timeout=0.3))
    headers = bearer(key(database_url, "a"))
    ok(await client.get("/v1/libraries", headers=headers))
    with psycopg.connect(database_url) as connection:
        connection.execute("lock table pgshelf.keys in access exclusive mode")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.get("/v1/libraries", headers=headers)
        waiting = asyncio.create_task(client.get("/v1/libraries", headers=headers))
        await asyncio.sleep(0.1)
        problem(await client.get("/v1/libraries", headers=headers), 503, "pool_exhausted")
        connection.rollback()
    ok(await waiting)
    ok(await client.get("/v1/libraries", headers=headers))


async def test_secrets_are_not_logged(
    admin: httpx2.AsyncClient, database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    made = ok(await admin.post(KEYS, json={"name": "a", "role": "reader"}), 201)
    rotated = ok(await admin.post(f"{KEYS}/a/rotate", json={}))
    token = ok(await admin.post("/v1/token", json={}), 201)["token"]
    secrets = [made["secret"], rotated["secret"], token, admin.headers["authorization"].split()[1]]
    for secret in secrets:
        await admin.get("/v1/libraries", headers=bearer(secret))
        await admin.get("/v1/libraries", headers=bearer(secret[:-1]))

    def broken(*_: Any) -> bool:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(credentials, "well_formed", broken)
    problem(await admin.get("/v1/libraries"), 500, "internal_error")
    assert "on purpose" in caplog.text
    assert not [secret for secret in secrets if secret[9:-1] in caplog.text]


async def test_open_until_there_is_a_key(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    made = ok(await client.post(KEYS, json={"name": "first", "role": "admin"}), 201)
    # a header is enough to look again at once; without one it takes a second at most
    ok(await client.get("/v1/libraries", headers=bearer(made["secret"])))
    problem(await client.get("/v1/libraries"), 401, "unauthorized")
    for path in ("/health", "/ready", "/schema"):
        ok(await client.get(path))
    # revoking the last key does not open it again
    assert (await client.delete(f"{KEYS}/first", headers=bearer(made["secret"]))).status_code == 204
    problem(await client.get("/v1/libraries"), 401, "unauthorized")


async def test_an_open_service_looks_for_the_first_key(client: httpx2.AsyncClient, database_url: str) -> None:
    ok(await client.get("/v1/libraries", headers={"Authorization": "Bearer of-something-else"}))
    problem(await client.post("/v1/token", json={}), 403, "forbidden")
    key(database_url, "first", "admin")
    started = time.monotonic()

    async def closed() -> bool:
        return (await client.get("/v1/libraries")).status_code == 401

    await until(closed, 5)
    assert time.monotonic() - started < 4


async def test_authentication_can_be_off(database_url: str, make_settings: Any, make_client: Any) -> None:
    secret = key(database_url, "a", "reader", "none")
    client = await make_client(make_settings(database_url, auth="off"))
    for headers in ({}, bearer(secret), bearer("pgs_x")):
        ok(await client.get("/v1/libraries", headers=headers))
    problem(await client.post("/v1/token", json={}, headers=bearer(secret)), 403, "forbidden")


@pytest.mark.parametrize(
    ("public", "found"),
    [("", []), ("false", []), ("docs-*, faq", ["docs-a", "faq"]), ("*", ["docs-a", "faq", "private"]),
     ("true", ["docs-a", "faq", "private"])],
)  # fmt: skip
async def test_searching_may_be_public(
    database_url: str, make_settings: Any, make_client: Any, public: str, found: list[str]
) -> None:
    client = await make_client(make_settings(database_url, auth="on", public_search=public))
    admin = bearer(key(database_url, "a", "admin"))
    question = {"query": "x", "mode": "text"}
    for name in ("docs-a", "faq", "private"):
        ok(await client.post("/v1/libraries", json={"name": name}, headers=admin), 201)
        for path, body in (
            (f"/v1/libraries/{name}/search", question),
            (f"/v1/libraries/{name}/search/batch", {"searches": [question]}),
            (f"/v1/libraries/{name}/facets", {"attributes": ["year"]}),
            ("/v1/search", {"libraries": [name], **question}),
        ):
            response = await client.post(path, json=body)
            if name in found:
                ok(response)
            elif found:
                problem(response, 404, "library_not_found")
            else:
                problem(response, 401, "unauthorized")
            # a bad key is worse than none
            problem(await client.post(path, json=body, headers=bearer("pgs_x")), 401, "invalid_key")
        problem(await client.get(f"/v1/libraries/{name}/documents"), 401, "unauthorized")
    problem(await client.get("/v1/libraries"), 401, "unauthorized")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, None), ({"host": "localhost"}, None), ({"host": "::1"}, None), ({"host": EVERY}, True),
        ({"host": EVERY, "allow_unauthenticated": True}, None), ({"host": EVERY, "auth": "off"}, False),
        ({"auth": "on"}, True), ({"auth": "off"}, False),
        ({"jwt_issuer": "i", "jwt_audience": "a", "jwt_jwks_url": "https://x/keys"}, True),
    ],
)  # fmt: skip
def test_when_keys_are_required(settings: dict[str, Any], wanted: bool | None) -> None:
    assert authentication.requires_keys(Settings(**settings)) is wanted


# -- other hosts, other origins


OWN_HOSTS = ["localhost", "LOCALHOST:8432", "127.0.0.1:1", "[::1]:8432", "localhost."]
OTHER_HOSTS = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8432", "", "evil.example:localhost"]
OTHER_HOSTS += ["[::1].evil.example", "[::1", "localhost:8432:1", "localhost@evil.example"]


async def test_on_loopback_other_names_are_refused(client: httpx2.AsyncClient) -> None:
    for host in OWN_HOSTS:
        ok(await client.get("/v1/libraries", headers={"Host": host}))
    for host in OTHER_HOSTS:
        problem(await client.get("/v1/libraries", headers={"Host": host}), 400, "host_not_allowed")
        for path in ("/health", "/ready"):  # a balancer asks by address
            ok(await client.get(path, headers={"Host": host}))


@pytest.mark.parametrize(
    ("settings", "allowed", "refused"),
    [
        ({"host": EVERY}, ["anything.example"], []),
        ({"allowed_hosts": "*"}, ["anything.example"], []),
        ({"allowed_hosts": "Search.example.org, *.internal"}, ["search.example.org", "a.internal"],
         ["localhost", "internal", "x.search.example.org", "a.internal.example"]),
        ({"host": EVERY, "allowed_hosts": "a"}, ["a"], ["b"]),
    ],
)  # fmt: skip
def test_hosts_by_setting(settings: dict[str, Any], allowed: list[str], refused: list[str]) -> None:
    allowing = hosts.allowed_hosts(Settings(**settings))
    assert all(not allowing or hosts.is_allowed_host(host, allowing) for host in allowed)
    assert not any(hosts.is_allowed_host(host, allowing) for host in refused)


async def test_other_origins_may_call_only_by_setting(
    client: httpx2.AsyncClient, database_url: str, make_settings: Any, make_client: Any
) -> None:
    origin = {"Origin": "https://app.example.org"}
    asking = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for response in (
        await client.get("/v1/libraries", headers=origin),
        await client.options("/v1/libraries", headers=asking),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
    settings = make_settings(database_url, auth="on", cors_origins="https://app.example.org,http://localhost:3000")
    other = await make_client(settings)
    preflight = await other.options("/v1/libraries", headers=asking)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origin["Origin"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in preflight.headers
    # also on what is refused, or no page could tell why
    response = await other.get("/v1/libraries", headers=origin)
    problem(response, 401, "unauthorized")
    assert response.headers["access-control-allow-origin"] == origin["Origin"]
    assert "X-Request-Id" in response.headers["access-control-expose-headers"]
    stranger = {**asking, "Origin": "https://app.example.org.evil.example"}
    for response in (
        await other.get("/v1/libraries", headers=stranger),
        await other.options("/v1/libraries", headers=stranger),
    ):
        assert "access-control-allow-origin" not in response.headers


# -- the form of secrets


def test_secrets_are_random_recognisable_and_checked() -> None:
    made = [credentials.mint(kind) for kind in ("key", "token") for _ in range(200)]
    assert len({each.secret for each in made}) == 400
    for each in made:
        assert re.fullmatch(r"pg[st]_[0-9A-Za-z]{43}", each.secret) and credentials.well_formed(each.secret)
        assert each.hint == each.secret[:8] and each.hash == credentials.digest(each.secret)
    # what the hint does not show, nobody guesses
    assert (credentials.RANDOM - 4) * 5.954 > 192
    assert min(len(set(column)) for column in zip(*(each.secret[4:41] for each in made), strict=True)) > 50


def test_typing_errors_are_found() -> None:
    secret = credentials.mint().secret
    for place in range(len(secret)):
        for character in "0aZ_-é":
            changed = secret[:place] + character + secret[place + 1 :]
            assert changed == secret or not credentials.well_formed(changed)
        assert not credentials.well_formed(secret[:place] + secret[place + 1 :])
    for place in range(4, len(secret) - 1):
        swapped = secret[:place] + secret[place + 1] + secret[place] + secret[place + 2 :]
        assert swapped == secret or not credentials.well_formed(swapped)
    assert not credentials.well_formed(secret + "\n") and not credentials.well_formed("")
