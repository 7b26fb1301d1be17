"""Fixtures for everybody: a PostgreSQL, databases on it, the application and running servers.

The environment is read here and nowhere else in the tests: PGSHELF_TEST_DSN, PGSHELF_TEST_POSTGRES_VERSION and
PGSHELF_TEST_VECTOR_SCHEMA; what remains of it, PGSHELF_* apart, goes to the servers that the tests start.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import watching
from tests.cohere_server import CohereServer
from tests.openai_server import OpenAIServer
from tests.postgres import OPTIONS, Choice, Databases, NoServer, Server, choose, docker_answers, start_server

READY_SECONDS = 60.0
CHOICE = pytest.StashKey[Choice]()
SERVER = pytest.StashKey[Server]()
_made: set[Path] = set()  # files of tests that have made a server
WATCHED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgshelf")
    group.addoption("--postgres", choices=OPTIONS, default="auto", help="where the tests find PostgreSQL")
    version = os.environ.get("PGSHELF_TEST_POSTGRES_VERSION", "18")
    group.addoption("--postgres-version", type=int, choices=(16, 17, 18), default=int(version))
    schema = os.environ.get("PGSHELF_TEST_VECTOR_SCHEMA", "public")
    group.addoption("--vector-schema", default=schema, help="where pgvector is installed: public, extensions ...")
    group.addoption("--soak-minutes", type=float, default=0, help="how long schemathesis runs; 0: seconds")
    group.addoption("--filters", type=int, default=100, help="how many filters are generated for each way to run them")
    group.addoption("--filters-seed", type=int, default=None, help="repeats the generated filters of a run")


def pytest_configure(config: pytest.Config) -> None:
    told = getattr(config, "workerinput", {}).get("pgshelf_server")  # by the process that started the run
    if told:
        config.stash[SERVER] = Server(Choice(**told["choice"]), told["admin_url"])
        return
    option, version = config.getoption("--postgres"), config.getoption("--postgres-version")
    try:
        config.stash[CHOICE] = choose(os.environ, lambda: docker_answers(os.environ), option, version)
    except NoServer as error:
        raise pytest.UsageError(str(error)) from None


def pytest_report_header(config: pytest.Config) -> str:
    if CHOICE not in config.stash:  # in a worker of xdist, which was told by the process that has it
        return "postgres: that of the run"
    choice = config.stash[CHOICE]
    version = "" if choice.kind == "dsn" else f" {choice.version}"
    return f"postgres: {choice.kind}{version}, pgvector in schema {config.getoption('--vector-schema')}"


@pytest.hookimpl(tryfirst=True)  # before pytest-cov begins, and before xdist starts its workers
def pytest_sessionstart(session: pytest.Session) -> None:
    if not _runs_tests(session.config):
        watching.watch(session.config, False)
    elif hasattr(session.config, "workerinput"):
        watching.watch_once()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker of the one server of the run, which outlives every worker."""
    server = _server(node.config)
    choice = {"kind": server.choice.kind, "version": server.choice.version, "dsn": server.choice.dsn}
    node.workerinput["pgshelf_server"] = {"choice": choice, "admin_url": server.admin_url}


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """What is imported to collect the tests stays: looking for garbage there took a quarter of collecting them."""
    if session.config.pluginmanager.hasplugin("_cov") and _runs_tests(session.config):
        watching.watch_imports(session.config)
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def _runs_tests(config: pytest.Config) -> bool:
    """Whether this process does, rather than workers of xdist that it starts."""
    return hasattr(config, "workerinput") or getattr(config.option, "dist", "no") == "no"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage watches a test's first case, for being watched takes many times as long. A marker says otherwise.

    Tests that share the database of their file go to one process, which fills it once.
    """
    seen: set[tuple[str, str]] = set()
    for item in items:
        if "shared_database_url" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        test = (str(item.path), getattr(item, "originalname", item.name))
        first = test not in seen or item.get_closest_marker("watched") is not None
        item.stash[WATCHED] = first and item.get_closest_marker("unwatched") is None
        seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    watching.watch(item.config, item.stash[WATCHED])
    try:
        return (yield)
    finally:
        if nextitem is None:
            watching.watch(item.config, True)


def first_of_its_file(request: pytest.FixtureRequest) -> bool:
    """Whether a file of tests makes a server for the first time: that of each file is watched."""
    known = request.path in _made
    _made.add(request.path)
    return not known


def pytest_unconfigure(config: pytest.Config) -> None:
    if SERVER in config.stash:
        config.stash[SERVER].close()


def _server(config: pytest.Config) -> Server:
    if SERVER not in config.stash:
        config.stash[SERVER] = start_server(config.stash[CHOICE])
    return config.stash[SERVER]


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Server:
    """The server of this run; `admin_url` is a superuser's."""
    return _server(pytestconfig)


@pytest.fixture(scope="session")
def postgres_version(pytestconfig: pytest.Config) -> int:
    """The major version asked for: for tests that start a bundled server of their own."""
    return int(pytestconfig.getoption("--postgres-version"))


@pytest.fixture(scope="session")
def vector_schema(pytestconfig: pytest.Config) -> str:
    """The schema where pgvector is installed in the test databases."""
    return str(pytestconfig.getoption("--vector-schema"))


@pytest.fixture(scope="session")
def databases(postgres: Server, vector_schema: str) -> Iterator[Databases]:
    """Makes and drops databases, for tests that need several."""
    made = Databases(postgres, vector_schema)
    made.prepare()
    yield made
    made.close()


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A fresh migrated database."""
    url = databases.migrated()
    yield url
    databases.drop(url)


@pytest.fixture(scope="module")
def shared_database_url(databases: Databases) -> Iterator[str]:
    """A migrated database that the tests of one file share."""
    url = databases.migrated()
    yield url
    databases.drop(url)


@pytest.fixture
def empty_database_url(databases: Databases) -> Iterator[str]:
    """A fresh database with pgvector and without pgshelf."""
    url = databases.empty()
    yield url
    databases.drop(url)


MakeSettings = Callable[..., Any]


@pytest.fixture
def make_settings(tmp_path: Path, vector_schema: str) -> MakeSettings:
    """Makes Settings for a database: make_settings(url, max_k=5)."""
    from pgshelf.settings import Settings

    def make(url: str, **overrides: Any) -> Settings:
        known = {"database_url": url, "data_dir": tmp_path / "data", "vector_schema": vector_schema}
        return Settings(**{**known, **overrides})

    return make


@pytest.fixture
def settings(database_url: str, make_settings: MakeSettings) -> Any:
    """Settings of an application on a database of its own."""
    return make_settings(database_url)


MakeClient = Callable[..., Awaitable[httpx2.AsyncClient]]


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """Starts an application in this process: `await make_client(settings)` gives an HTTP client for it."""
    from tests import applications

    made: list[tuple[Any, Any]] = []
    async with AsyncExitStack() as stack:

        async def make(settings: Any, **options: Any) -> httpx2.AsyncClient:
            app = applications.take(settings)
            await stack.enter_async_context(_lifespan(app))
            made.append((app, settings))
            transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
            client = httpx2.AsyncClient(transport=transport, base_url="http://localhost", **options)
            return await stack.enter_async_context(client)

        yield make
    for app, settings in made:
        applications.give_back(app, settings)


@pytest.fixture
async def client(settings: Any, make_client: MakeClient) -> httpx2.AsyncClient:
    """An HTTP client for an application that runs in this process, on a database of its own."""
    return await make_client(settings)


@asynccontextmanager
async def _lifespan(app: Any) -> AsyncIterator[None]:
    """Run an application's start and end in one task, as a server does: task groups insist on it."""
    started, ending = asyncio.Event(), asyncio.Event()

    async def live() -> None:
        async with app.lifespan():
            started.set()
            await ending.wait()

    task = asyncio.create_task(live())
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    try:
        yield
    finally:
        ending.set()
        await task


class LiveServer:
    """A `pgshelf serve` of its own process group; `url` is its address, `output` what it printed so far."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self._log = log
        command = [str(Path(sys.executable).with_name("pgshelf")), "serve", "--port", str(port), *arguments]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until /ready says so; fails with the server's output."""
        deadline = time.monotonic() + seconds
        with httpx2.Client(timeout=5) as client:  # one: each reads all certificates of this machine
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    if client.get(f"{self.url}/ready").status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                time.sleep(0.05)
        pytest.fail(f"pgshelf serve was not ready (exit status {self.process.poll()}):\n{self.output}")

    def stop(self, seconds: float = 30) -> int:
        """End it as a terminal or an init system would and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it with all its processes, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nothing left but perhaps a zombie
            pass
        self.process.wait()


@pytest.fixture
def cohere_server() -> Iterator[CohereServer]:
    """Cohere's API on this machine: cohere_api_key=cohere_server.key, cohere_base_url=cohere_server.url."""
    with CohereServer() as server:
        yield server


@pytest.fixture
def openai_server() -> Iterator[OpenAIServer]:
    """An endpoint of OpenAI's embeddings API on this machine: openai_base_url=openai_server.base_url."""
    with OpenAIServer() as server:
        yield server


MakeLiveServer = Callable[..., LiveServer]


@pytest.fixture
def make_live_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeLiveServer]:
    """Starts `pgshelf serve` processes: make_live_server(url, "--workers", "2", wait=True, PGSHELF_MAX_K="5")."""
    with _live_servers(tmp_path, request) as make:
        yield make


@pytest.fixture(scope="module")
def shared_environment() -> dict[str, str]:
    """The environment of `shared_live_server`: its libraries have no embedder by default. A file may have another."""
    return {"PGSHELF_EMBEDDER": "none"}


@pytest.fixture(scope="module")
def shared_live_server(
    request: pytest.FixtureRequest,
    shared_database_url: str,
    shared_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveServer]:
    """A running `pgshelf serve` that the tests of one file share."""
    with _live_servers(tmp_path_factory.mktemp("serve"), request) as make:
        yield make(shared_database_url, **shared_environment)


@pytest.fixture
def served(shared_live_server: LiveServer) -> Iterator[LiveServer]:
    """The running service of the file, without libraries."""
    from pgshelf_client import Client

    yield shared_live_server
    with Client(shared_live_server.url) as client:
        for library in list(client.libraries()):
            client.delete_library(library.name)


@contextmanager
def _live_servers(tmp_path: Path, request: pytest.FixtureRequest | None = None) -> Iterator[MakeLiveServer]:
    servers: list[LiveServer] = []

    def watched() -> bool:
        if request is None or request.node.get_closest_marker("watched"):
            return True
        return first_of_its_file(request)

    def make(url: str | None, *arguments: str, wait: bool = True, port: int = 0, **environment: str) -> LiveServer:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
        if watching.PROCESSES in inherited and not watched():
            del inherited[watching.PROCESSES]
        known = {"PGSHELF_DATABASE_URL": url or "", "PGSHELF_DATA_DIR": str(tmp_path / "data"), "PGSHELF_WORKERS": "1"}
        log = tmp_path / f"serve-{len(servers)}.log"
        server = LiveServer(list(arguments), {**inherited, **known, **environment}, port or _free_port(), log)
        servers.append(server)
        if wait:
            server.wait_until_ready()
        return server

    try:
        yield make
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def live_server(database_url: str, make_live_server: MakeLiveServer) -> LiveServer:
    """A running `pgshelf serve` on a database of its own."""
    return make_live_server(database_url)


@pytest.fixture
def unused_port() -> int:
    """A port of this machine on which nobody listens."""
    return _free_port()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
