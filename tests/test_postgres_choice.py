"""Which PostgreSQL the tests take, and that they really took it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import psycopg
import pytest

from tests.postgres import Choice, Databases, NoServer, Server, choose, docker_answers, on_database

DSN = "postgresql://somebody@db.example/app"


@pytest.mark.parametrize(
    ("environ", "docker", "option", "kind"),
    [
        ({"PGSHELF_TEST_DSN": DSN}, True, "auto", "dsn"),
        ({"PGSHELF_TEST_DSN": DSN}, False, "dsn", "dsn"),
        ({"PGSHELF_TEST_DSN": DSN}, True, "containers", "containers"),
        ({"PGSHELF_TEST_DSN": DSN}, True, "embedded", "embedded"),
        ({"PGSHELF_TEST_DSN": ""}, True, "auto", "containers"),
        ({}, True, "auto", "containers"),
        ({}, False, "auto", "embedded"),
        ({}, False, "containers", "containers"),
        ({}, True, "embedded", "embedded"),
    ],
)
def test_the_option_then_the_dsn_then_docker_then_the_embedded_server(
    environ: dict[str, str], docker: bool, option: str, kind: str
) -> None:
    choice = choose(environ, lambda: docker, option)
    assert choice.kind == kind
    assert choice.dsn == (DSN if kind == "dsn" else None)


def test_docker_is_asked_only_when_it_matters() -> None:
    def fail() -> bool:
        raise AssertionError("asked")

    assert choose({"PGSHELF_TEST_DSN": DSN}, fail) == Choice("dsn", 18, DSN)
    assert choose({}, fail, "embedded", 16) == Choice("embedded", 16)


def test_a_choice_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(NoServer, match="PGSHELF_TEST_DSN"):
        choose({}, lambda: True, "dsn")
    with pytest.raises(NoServer, match="18 or 16, not 17"):
        choose({}, lambda: False, version=17)
    assert choose({}, lambda: True, version=17) == Choice("containers", 17)


@pytest.mark.parametrize(("answer", "answers"), [(b"HTTP/1.1 200 OK\r\n\r\nOK", True), (b"", False), (None, False)])
def test_docker_answers_or_not_within_two_seconds(answer: bytes | None, answers: bool, tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(path))
        daemon.listen()
        threading.Thread(target=_answer, args=(daemon, answer), daemon=True).start()
        assert docker_answers({"DOCKER_HOST": f"unix://{path}"}) is answers
    assert time.monotonic() - began < 2


def _answer(daemon: socket.socket, answer: bytes | None) -> None:
    connection, _ = daemon.accept()
    with connection:
        connection.recv(1000)
        if answer is None:
            connection.recv(1000)  # a daemon that hangs: until the other side gives up
        else:
            connection.sendall(answer)


def test_no_docker(tmp_path: Path) -> None:
    assert not docker_answers({"DOCKER_HOST": f"unix://{tmp_path}/none.sock"})
    assert not docker_answers({"DOCKER_HOST": "tcp://127.0.0.1:9"})


def test_the_server_is_the_chosen_one(postgres: Server, pytestconfig: pytest.Config) -> None:
    choice = postgres.choice
    asked = pytestconfig.getoption("--postgres")
    assert asked in ("auto", choice.kind)
    with psycopg.connect(postgres.admin_url) as connection:
        query = "select current_setting('server_version_num')::int / 10000, inet_server_addr(), "
        row = connection.execute(query + "current_setting('cluster_name')").fetchone()
    assert row is not None
    version, address, cluster_name = row
    if choice.kind == "dsn":
        assert postgres.admin_url == choice.dsn
    else:
        assert version == choice.version == pytestconfig.getoption("--postgres-version")
        assert (address is None) == cluster_name.startswith("pgshelf-") == (choice.kind == "embedded")


def test_pgvector_is_in_the_chosen_schema_and_nothing_else_is_there(
    empty_database_url: str, vector_schema: str
) -> None:
    with psycopg.connect(empty_database_url) as connection:
        query = "select extnamespace::regnamespace::text from pg_extension where extname = 'vector'"
        assert connection.execute(query).fetchall() == [(vector_schema,)]
        assert connection.execute("select to_regnamespace('pgshelf')").fetchall() == [(None,)]


def test_every_test_has_a_database_of_its_own(databases: Databases) -> None:
    one, other = databases.empty(), databases.empty()
    with psycopg.connect(one, autocommit=True) as connection:
        connection.execute("create table only_here ()")
        with psycopg.connect(other) as neighbour:
            assert neighbour.execute("select to_regclass('only_here')").fetchall() == [(None,)]
        databases.drop(one)  # although somebody is connected
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    databases.drop(other)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(one)


def test_a_migrated_database_is_a_copy_of_the_template(database_url: str, shared_database_url: str) -> None:
    assert database_url != shared_database_url
    for url in (database_url, shared_database_url):
        with psycopg.connect(url) as connection:
            assert connection.execute("select to_regclass('pgshelf.libraries') is not null").fetchone() == (True,)


def test_another_database_of_the_same_server() -> None:
    assert on_database("postgresql://u:p@h:1/a?x=/y%20z", "b") == "postgresql://u:p@h:1/b?x=/y%20z"
    assert on_database("postgresql://postgres@/postgres?host=/tmp/run", "b") == "postgresql://postgres@/b?host=/tmp/run"
