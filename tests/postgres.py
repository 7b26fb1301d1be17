"""Where the tests find PostgreSQL: the choice, the server it leads to, and the databases of single tests."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

Kind = Literal["dsn", "containers", "embedded"]
OPTIONS = ("auto", "embedded", "containers", "dsn")
DSN_VARIABLE = "PGSHELF_TEST_DSN"
PASSWORD = "pgshelf"
# Nobody needs these databases after a power failure.
FAST = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "300"}
TEMPLATE_LOCK = 0x70677368
MEMORY, ENOUGH_MEMORY = Path("/dev/shm"), 4 * 1024**3  # noqa: S108 - mkdtemp makes folders there that are ours alone


class NoServer(Exception):
    """The tests were asked for a PostgreSQL that cannot be had; the text says why."""


@dataclass(frozen=True)
class Choice:
    """Which PostgreSQL the tests use."""

    kind: Kind
    version: int = 18
    dsn: str | None = None


def choose(
    environ: Mapping[str, str], docker_answers: Callable[[], bool], option: str = "auto", version: int = 18
) -> Choice:
    """Choose: what the option says, else the DSN if there is one, containers if Docker answers, the embedded server."""
    dsn = environ.get(DSN_VARIABLE)
    if option == "dsn" and not dsn:
        raise NoServer(f"--postgres=dsn needs {DSN_VARIABLE}")
    if dsn and option in ("auto", "dsn"):
        return Choice("dsn", version, dsn)
    if option == "containers" or (option == "auto" and docker_answers()):
        return Choice("containers", version)
    if version not in (16, 18):
        raise NoServer(f"the embedded server is PostgreSQL 18 or 16, not {version}: use --postgres=containers")
    return Choice("embedded", version)


def docker_answers(environ: Mapping[str, str]) -> bool:
    """Whether a Docker daemon answers where testcontainers would look for it; says so within two seconds."""
    address = urlsplit(environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
    family = socket.AF_UNIX if address.scheme == "unix" else socket.AF_INET
    with socket.socket(family) as probe:
        probe.settimeout(0.8)
        try:
            probe.connect(address.path if address.scheme == "unix" else (address.hostname, address.port or 2375))
            probe.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return probe.recv(5) == b"HTTP/"
        except OSError:
            return False


def on_database(url: str, database: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


class Server:
    """A running server for one run of the tests; the process that started it closes it."""

    def __init__(self, choice: Choice, admin_url: str, stack: ExitStack | None = None) -> None:
        self.choice = choice
        self.admin_url = admin_url
        self._stack = stack or ExitStack()

    def close(self) -> None:
        self._stack.close()


def start_server(choice: Choice) -> Server:
    """Start what was chosen."""
    with ExitStack() as stack:
        if choice.kind == "dsn":
            url = choice.dsn or ""
        elif choice.kind == "containers":
            url = _start_container(choice.version, stack)
        else:
            url = _start_embedded(choice.version, stack)
        return Server(choice, url, stack.pop_all())


def _start_embedded(version: int, stack: ExitStack) -> str:
    from pgshelf import embedded

    directory = Path(tempfile.mkdtemp(prefix="pgshelf-test-", dir=in_memory()))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return stack.enter_context(embedded.start(directory, version, settings=FAST)).url("postgres")


def in_memory() -> str | None:
    """A folder in memory where there is room for all tests: a server and a database are hundreds of files."""
    try:
        return str(MEMORY) if shutil.disk_usage(MEMORY).free > ENOUGH_MEMORY and os.access(MEMORY, os.W_OK) else None
    except OSError:  # on macOS there is none
        return None


def _start_container(version: int, stack: ExitStack) -> str:
    from testcontainers.core.container import DockerContainer

    command = " ".join(["postgres", *(f"-c {name}={value}" for name, value in FAST.items())])
    environment = {"POSTGRES_PASSWORD": PASSWORD}
    image = f"pgvector/pgvector:pg{version}"
    container = DockerContainer(image, command=command, env=environment, ports=[5432], shm_size="256m")
    stack.enter_context(container)
    host, port = container.get_container_host_ip(), container.get_exposed_port(5432)
    url = f"postgresql://postgres:{PASSWORD}@{host}:{port}/postgres"
    _wait_for(url)
    return url


def _wait_for(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


class Databases:
    """Makes the databases of one test process, and the template that they are copied from."""

    def __init__(self, server: Server, vector_schema: str) -> None:
        self.server = server
        self.vector_schema = vector_schema
        self._prefix = f"pgshelf_test_{uuid.uuid4().hex[:8]}"
        self._count = 0
        self._template: str | None = None
        self._admin = psycopg.connect(server.admin_url, autocommit=True)

    def close(self) -> None:
        if self._template:
            self.drop(self._template)
        self._admin.close()

    def empty(self) -> str:
        """Make a database that holds pgvector, in the chosen schema, and nothing else; return its URL."""
        url = self._create("create database {} template template0 encoding 'UTF8'")
        schema = sql.Identifier(self.vector_schema)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("create schema if not exists {}").format(schema))
            connection.execute(sql.SQL("create extension vector schema {}").format(schema))
        return url

    def prepare(self) -> str:
        """Make the migrated template once; its grants keep the roles, which another database's way down would drop."""
        if self._template is None:
            self._template = self._migrate()
        return self._template

    def migrated(self) -> str:
        """Make a copy of the migrated template; return its URL."""
        return self.copy(self.prepare())

    def copy(self, url: str) -> str:
        """Make a copy of a database that nobody is connected to; return its URL."""
        template = urlsplit(url).path[1:]
        # files, not WAL: five times faster where nothing is flushed
        return self._create("create database {} template {} strategy file_copy", sql.Identifier(template))

    def drop(self, url: str) -> None:
        """Drop a database, whoever is still connected."""
        name = sql.Identifier(urlsplit(url).path[1:])
        self._admin.execute(sql.SQL("drop database if exists {} with (force)").format(name))

    def _create(self, statement: str, *names: sql.Identifier) -> str:
        self._count += 1
        name = f"{self._prefix}_{self._count}"
        self._admin.execute(sql.SQL(statement).format(sql.Identifier(name), *names))
        return on_database(self.server.admin_url, name)

    def _migrate(self) -> str:
        from pgshelf import migrate

        url = self.empty()
        # roles belong to the cluster: two test processes making them at once would collide
        self._admin.execute("select pg_advisory_lock(%s)", [TEMPLATE_LOCK])
        try:
            migrate.upgrade(url)
        finally:
            self._admin.execute("select pg_advisory_unlock(%s)", [TEMPLATE_LOCK])
        return url
