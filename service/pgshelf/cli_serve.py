"""The commands that run until they are told to stop: serve, worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec

from pgshelf import __version__, embedded
from pgshelf.cli_database import DATA_DIR, database_of, migrated
from pgshelf.console import Failure
from pgshelf.settings import PREFIX, Settings

NUMBERS = "PROMETHEUS_MULTIPROC_DIR"


@contextlib.contextmanager
def _shared_numbers() -> Iterator[None]:
    """A folder where the processes put their numbers together; prometheus-client looks for it when it is imported."""
    with tempfile.TemporaryDirectory(prefix="pgshelf-metrics-") as folder:
        before = os.environ.get(NUMBERS)
        os.environ[NUMBERS] = folder
        try:
            yield
        finally:
            del os.environ[NUMBERS]
            if before is not None:
                os.environ[NUMBERS] = before


@click.command("serve")
@click.option("--host", help="Address to listen on (PGSHELF_HOST).")
@click.option("--port", type=int, help="Port to listen on (PGSHELF_PORT).")
@DATA_DIR
@click.option("--workers", type=int, help="Processes; the default is one for each core (PGSHELF_WORKERS).")
@click.option("--reload", is_flag=True, help="Restart when the code changes, for development; needs pgshelf[reload].")
@click.pass_obj
@_shared_numbers()
def serve_command(
    settings_of: Callable[..., Settings],
    host: str | None,
    port: int | None,
    data_dir: Path | None,
    workers: int | None,
    reload: bool,
) -> None:
    """Serve the REST API."""
    from pgshelf.listening import check_access, check_address

    settings = settings_of(host=host, port=port, data_dir=data_dir, workers=workers)
    if settings.tracing and not _has("opentelemetry"):
        raise Failure("PGSHELF_TRACING needs OpenTelemetry: pip install 'pgshelf[otel]'")
    if settings.database_url:
        _check_rights(settings.database_url)
    access = check_access(settings.database_url, settings) if settings.database_url else None
    address = check_address(settings)
    with database_of(settings) as (url, server):
        if settings.auto_migrate if settings.auto_migrate is not None else server is not None:
            migrated(url, settings)
        click.echo(_banner(settings, server, access or check_access(url, settings)))
        if server is None:
            _say_what_fails(url, settings)
        os.environ.update(_environment(msgspec.structs.replace(settings, database_url=url)))
        os.environ["_PGSHELF_PARENT"] = str(os.getpid())
        stop = threading.Event()
        if server is not None:
            threading.Thread(target=_keep_running, args=(server, stop), daemon=True).start()
        try:
            _serve(settings, address, reload)
        finally:
            stop.set()


@click.command("worker")
@DATA_DIR
@click.pass_obj
def worker_command(settings_of: Callable[..., Settings], data_dir: Path | None) -> None:
    """Embed what is pending, build indexes and clean up, without serving.

    A service does that itself unless PGSHELF_WORKER_ENABLED is false; any number of both may run.
    """
    settings = settings_of(data_dir=data_dir)
    if settings.database_url:
        _check_rights(settings.database_url, builds=True)
    with database_of(settings) as (url, server):
        if settings.auto_migrate if settings.auto_migrate is not None else server is not None:
            migrated(url, settings)
        if server is None:
            _say_what_fails(url, settings)
        stop = threading.Event()
        if server is not None:
            threading.Thread(target=_keep_running, args=(server, stop), daemon=True).start()
        click.echo(f"pgshelf {__version__} works on {settings.summary()['database_url'] if server is None else url}")
        try:
            asyncio.run(_until_told(msgspec.structs.replace(settings, database_url=url)))
        finally:
            stop.set()


async def _until_told(settings: Settings) -> None:
    from pgshelf import worker

    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await worker.alone(settings, stopped)


def _check_rights(url: str, *, builds: bool = False) -> None:
    from pgshelf import doctor

    if lacking := doctor.forbidden(url, builds=builds):
        raise Failure(f"{lacking}. docs/deployment.md has the roles; pgshelf doctor says more.")


def _say_what_fails(url: str, settings: Settings) -> None:
    """Serving begins all the same: the database may come, or be migrated, later."""
    from pgshelf import doctor

    for finding in doctor.examine(url, settings):
        if finding.level == "fail":
            click.echo(f"pgshelf: not ready: {finding.text}", err=True)


def _serve(settings: Settings, address: str, reload: bool) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces, Loops
    from granian.http import HTTP1Settings
    from granian.log import LogLevels

    _allow_files()
    # a worker that is told to stop before it has handlers of its own would swallow that in a copy of its parent's
    os.register_at_fork(after_in_child=_default_signals)
    Granian(
        "pgshelf.app:from_environment",
        factory=True,
        interface=Interfaces.ASGI,
        loop=Loops.uvloop,  # a tenth of a request's processor time less than asyncio's own
        address=address,
        port=settings.port,
        workers=settings.workers,
        # granian would look for HTTP/2 first, and wait for that without end; so the time counts from the start
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=int(settings.header_timeout * 1000)),
        backpressure=settings.max_connections,
        respawn_failed_workers=True,
        respawn_interval=0.5,
        workers_kill_timeout=30,
        workers_lifetime=settings.workers_lifetime,
        workers_max_rss=settings.workers_max_bytes and settings.workers_max_bytes // 1024**2,
        websockets=False,
        log_level=LogLevels.warning,
        reload=reload,
        reload_paths=[Path(__file__).parent] if reload else None,
        process_name="pgshelf" if _has("setproctitle") else None,
    ).serve()


ENOUGH_FILES = 65_536


def _allow_files() -> None:
    """As many open files as this user may have, within reason: each connection of a client is one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= now < ENOUGH_FILES:
        with contextlib.suppress(OSError, ValueError):  # where a system promises more than it gives
            wanted = ENOUGH_FILES if most == resource.RLIM_INFINITY else min(most, ENOUGH_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _keep_running(server: embedded.EmbeddedServer, stop: threading.Event) -> None:
    """Start the bundled PostgreSQL again when it dies under us."""
    while not stop.wait(0.5):
        try:
            server.ensure_running()
        except embedded.EmbeddedError as error:
            logging.getLogger("pgshelf").error("%s", error)


def _environment(settings: Settings) -> dict[str, str]:
    """The settings as worker processes read them."""
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    return {PREFIX + name.upper(): str(value) for name, value in values.items() if value is not None}


def _banner(settings: Settings, server: embedded.EmbeddedServer | None, access: str) -> str:
    default, shown, here = Settings(), settings.summary(), f"http://{settings.host}:{settings.port}"
    shown_above = ("database_url", "host", "port")
    changed = [
        f"    {name} = {text}"
        for name, text in shown.items()
        if getattr(settings, name) != getattr(default, name) and name not in shown_above
    ]
    lines = [
        f"pgshelf {__version__}, starting",
        f"  API      {here}{settings.api_prefix}   (reference: {here}/schema, state: {here}/ready)",
        "  database "
        + (shown["database_url"] if server is None else f"PostgreSQL {server.version}, bundled, in {server.data_dir}"),
    ]
    lines.append(f"  access   {access}")
    if server is not None:
        lines.append(f"  psql     {server.psql_command()}")
    lines.append("  settings " + ("all at their defaults" if not changed else "that differ from the defaults:"))
    return "\n".join([*lines, *changed])
