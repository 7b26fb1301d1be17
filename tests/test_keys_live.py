"""Keys in running services: made on the command line, revoked at once in every process, never printed."""

from __future__ import annotations

import asyncio
import http.client
import os
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import httpx2
import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import conninfo_to_dict

from pgshelf import credentials
from pgshelf.app import create_app
from pgshelf.cli import main
from pgshelf.settings import Settings
from tests.conftest import _lifespan
from tests.roles import ask, logins

Run = Callable[..., Result]


@pytest.fixture
def run(database_url: str) -> Run:
    """Runs a command on the database of the test."""

    def invoke(*words: str, url: str = database_url, **environment: str) -> Result:
        known = {"PGSHELF_DATABASE_URL": url, "PGSHELF_LOG_LEVEL": "error", **environment}
        return CliRunner().invoke(main, words, env=known)

    return invoke


def made(run: Run, *words: str, **environment: str) -> str:
    result = run("keys", *words, **environment)
    assert result.exit_code == 0, result.output
    assert credentials.well_formed(result.stdout.strip()) and "cannot be shown again" in result.stderr
    return result.stdout.strip()


def test_keys_on_the_command_line(run: Run, database_url: str) -> None:
    secret = made(run, "create", "ci", "--role", "writer", "--library", "team-*", "--library", "b", "--expires", "90d")
    made(run, "create", "root", "--role", "admin")
    lines = run("keys", "list").stdout.splitlines()
    assert len(lines) == 2 and "ci  writer  team-*, b  " + secret[:8] in lines[0] and "expires" in lines[0]
    assert "root  admin  all libraries" in lines[1] and "no end, never used" in lines[1]
    rotated = made(run, "rotate", "ci", "--overlap", "60")
    assert f"{rotated[:8]}, {secret[:8]}..." in run("keys", "list").stdout
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "select libraries, expires_at - created_at from pgshelf.keys where name = 'ci'"
        ).fetchone()
        assert row and row[0] == ["team-*", "b"] and 89 <= row[1].days <= 90
    assert run("keys", "revoke", "ci").stdout == "ci is revoked\n"
    assert "ci" not in run("keys", "list").stdout
    assert "ci" in run("keys", "list", "--revoked").stdout and "revoked" in run("keys", "list", "--revoked").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("revoke", "none"), "There is no key 'none'"),
        (("rotate", "none"), "There is no key 'none'"),
        (("create", "root", "--role", "admin"), "There is a key of this name already. Choose another name"),
        (("create", "", "--role", "admin"), "name: Expected `str` of length >= 1"),
        (("create", "a" * 129, "--role", "admin"), "name: Expected `str` of length <= 128"),
        (("create", "a", "--role", "reader", "--library", ""), "libraries[0]: Expected `str` of length >= 1"),
        (("create", " a", "--role", "admin"), "name: must be printable"),
        (("create", "a", "--role", "admin", "--expires", "2001-01-01"), "expires_at: has passed already"),
    ],
)
def test_what_the_command_line_refuses(run: Run, words: tuple[str, ...], said: str) -> None:
    made(run, "create", "root", "--role", "admin")
    result = run("keys", *words)
    assert result.exit_code == 1 and said in result.output and len(result.output.splitlines()) == 1


def test_the_role_of_a_service_manages_keys(run: Run, database_url: str, vector_schema: str) -> None:
    with logins(database_url, vector_schema) as login:
        serves, reads = login("pgshelf_service"), login("pgshelf_reader")
        secret = made(run, "create", "ci", "--role", "reader", url=serves)
        assert made(run, "rotate", "ci", url=serves) != secret
        assert "ci  reader" in run("keys", "list", url=serves).stdout
        assert run("keys", "revoke", "ci", url=serves).stdout == "ci is revoked\n"
        user = conninfo_to_dict(serves)["user"]
        audited = ask(
            database_url, "select action, principal_kind, principal, detail from pgshelf.audit_log order by at, id"
        )
        assert audited == [(f"key.{what}", "role", user, "ci") for what in ("create", "rotate", "revoke")]
        for words in (("list",), ("revoke", "ci"), ("rotate", "ci"), ("create", "b", "--role", "reader")):
            refused = run("keys", *words, url=reads)
            user = conninfo_to_dict(reads)["user"]
            assert refused.exit_code == 1 and f"the role {user} may not manage keys" in refused.output
            assert "pgshelf_service" in refused.output and len(refused.output.splitlines()) == 1


def test_a_new_key_says_which_database_it_is_in(run: Run, database_url: str) -> None:
    known = conninfo_to_dict(database_url)
    result = run("keys", "create", "here", "--role", "reader")
    assert f"The key here is in the database {known['dbname']} on {known['host']}" in result.stderr
    assert str(known.get("password") or "no password") not in result.stderr


def test_times_on_the_command_line(run: Run) -> None:
    for text in ("soon", "90x", ""):
        result = run("keys", "create", "a", "--role", "admin", "--expires", text)
        assert result.exit_code == 2 and "needs a duration such as 90d" in result.output
    for number, text in enumerate(("30s", "5m", "12h", "2100-01-31", "2100-01-31T12:00:00+01:00")):
        made(run, "create", f"k{number}", "--role", "reader", "--expires", text)


def test_commands_without_a_schema_say_what_to_do(empty_database_url: str) -> None:
    result = CliRunner().invoke(main, ["keys", "list"], env={"PGSHELF_DATABASE_URL": empty_database_url})
    assert result.exit_code == 1 and "pgshelf migrate" in result.output


class Asking:
    """Asks services again and again, each time over a new connection, so that all processes have a turn."""

    def __init__(self, servers: list[Any], secrets: list[str]) -> None:
        self.answers: list[tuple[float, int]] = []  # when each was sent, and what came
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(server.port, secret)) for server in servers for secret in secrets
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, port: int, secret: str) -> None:
        while not self._done.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            started = time.perf_counter()
            connection.request("GET", "/v1/libraries", headers={"Authorization": f"Bearer {secret}"})
            self.answers.append((started, connection.getresponse().status))
            connection.close()

    def sent(self, begin: float, end: float = float("inf")) -> list[int]:
        return [status for started, status in list(self.answers) if begin <= started < end]

    def wait_for(self, number: int, since: float) -> None:
        deadline = time.monotonic() + 20
        while len(self.sent(since)) < number and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def test_a_revoked_key_ends_at_once_in_every_process(run: Run, database_url: str, make_live_server: Any) -> None:
    """Whatever is sent after the revocation was answered is refused, whichever process it meets."""
    servers = [make_live_server(database_url, "--workers", "2", wait=False, PGSHELF_AUTH="on") for _ in range(2)]
    for server in servers:
        server.wait_until_ready()
    admin = {"Authorization": f"Bearer {made(run, 'create', 'root', '--role', 'admin')}"}

    def over_rest(name: str) -> None:
        assert httpx2.delete(f"{servers[1].url}/v1/keys/{name}", headers=admin).status_code == 204

    def on_the_command_line(name: str) -> None:
        assert run("keys", "revoke", name).exit_code == 0

    def by_a_rotation(name: str) -> None:
        made(run, "rotate", name, "--overlap", "0")

    for way in (over_rest, on_the_command_line, by_a_rotation):
        secret = made(run, "create", way.__name__, "--role", "reader")
        owner = {"Authorization": f"Bearer {secret}"}
        token = httpx2.post(f"{servers[0].url}/v1/token", json={}, headers=owner).json()["token"]
        asking = Asking(servers, [secret, token])
        try:
            asking.wait_for(40, since=0)
            begun = time.perf_counter()
            way(way.__name__)
            over = time.perf_counter()
            asking.wait_for(40, since=over)
        finally:
            asking.stop()
        assert len(asking.sent(0, begun)) >= 40 and asking.sent(0, begun)[:20] == [200] * 20
        assert len(asking.sent(over)) >= 40 and set(asking.sent(over)) == {401}
    for server in servers:
        assert "pgs_" not in server.output and "pgt_" not in server.output


def test_searching_and_failing_with_a_key_on_the_command_line(
    run: Run, database_url: str, make_live_server: Any
) -> None:
    server = make_live_server(database_url, PGSHELF_AUTH="on", PGSHELF_LOG_LEVEL="debug", PGSHELF_API_KEY="pgs_hidden")
    assert "access   with a key, and there is none: pgshelf keys create NAME --role admin" in server.output
    assert "pgs_hidden" not in server.output
    secret = made(run, "create", "root", "--role", "admin")
    headers = {"Authorization": f"Bearer {secret}"}
    made_one = httpx2.post(f"{server.url}/v1/libraries", json={"name": "a"}, headers=headers)
    assert made_one.status_code == 201
    for key, code, said in ((secret, 0, "nothing found"), ("", 1, "401"), (secret[:-1], 1, "401")):
        result = run("search", "a", "x", "--url", server.url, PGSHELF_API_KEY=key)
        assert result.exit_code == code and said in result.output, result.output
        assert secret[9:] not in result.output or code == 0
    assert secret[9:-1] not in server.output


# -- where it listens


@pytest.mark.parametrize("auth", ["auto", "off"])
def test_other_machines_are_not_served_without_keys(run: Run, auth: str) -> None:
    result = run("serve", "--host", "0.0.0.0", PGSHELF_AUTH=auth)  # noqa: S104 - refused, that is the point
    assert result.exit_code == 1 and "0.0.0.0 can be reached from other machines" in result.output
    assert ("there is no key yet" in result.output) == (auth == "auto")
    assert "PGSHELF_ALLOW_UNAUTHENTICATED" in result.output


SAID_HOW = [
    ({}, ["admin"], "with a key", 401),
    ({"PGSHELF_AUTH": "on"}, [], "with a key, and there is none", 401),
    ({"PGSHELF_ALLOW_UNAUTHENTICATED": "true"}, [], "open to whoever reaches it, until there is a key", 200),
    ({"PGSHELF_ALLOW_UNAUTHENTICATED": "true", "PGSHELF_AUTH": "off"}, ["admin"], "open to whoever", 200),
    ({"PGSHELF_ALLOW_UNAUTHENTICATED": "true"}, ["admin"], "with a key", 401),
]


@pytest.mark.parametrize(("settings", "keys", "said", "status"), SAID_HOW)
def test_other_machines_are_served_when_somebody_said_how(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    unused_port: int,
    settings: dict[str, str],
    keys: list[str],
    said: str,
    status: int,
) -> None:
    """What the command would serve, asked in this process."""
    for role in keys:
        made(run, "create", role, "--role", role)
    answered: list[int] = []

    class Served:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def serve(self) -> None:
            answered.append(asyncio.run(asked(Settings.from_env(os.environ))))

    async def asked(found: Settings) -> int:
        app = create_app(found)
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with _lifespan(app), httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get("/v1/libraries")).status_code

    monkeypatch.setattr("granian.Granian", Served)
    with patch.dict(os.environ):  # the command hands its settings down there
        words = ("serve", "--host", "0.0.0.0", "--port", str(unused_port))  # noqa: S104 - nobody listens
        result = run(*words, **settings)
    assert result.exit_code == 0, result.output
    assert f"access   {said}" in result.output
    assert answered == [status]
