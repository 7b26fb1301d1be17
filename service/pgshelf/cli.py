"""The command line. Commands import what they need themselves, so that each starts quickly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import psycopg
import psycopg.conninfo

from pgshelf import __version__, cli_backups, cli_keys, cli_search, cli_transfer, embedded, logs
from pgshelf.cli_database import DATA_DIR, database_of, exit_when_told, migrated
from pgshelf.console import Failure
from pgshelf.settings import PREFIX, Settings, SettingsError, is_loopback

if TYPE_CHECKING:
    from pgshelf_client import Client


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pgshelf")
@click.pass_context
def main(context: click.Context) -> None:
    """A vector document store that lives in PostgreSQL.

    Settings are environment variables, PGSHELF_*; without PGSHELF_DATABASE_URL a bundled PostgreSQL is started.
    """
    context.obj = _settings


for command in (
    cli_search.search,
    cli_search.index,
    cli_search.embedder,
    cli_transfer.import_command,
    cli_transfer.export_command,
    cli_keys.keys_group,
    cli_backups.backup_command,
    cli_backups.restore_command,
):
    main.add_command(command)


def _settings(**overrides: Any) -> Settings:
    try:
        settings = Settings.from_env(os.environ, **overrides)
        psycopg.conninfo.conninfo_to_dict(
            (settings.database_url or "").replace("postgresql+psycopg://", "postgresql://", 1)
        )
    except SettingsError as error:
        raise Failure(str(error)) from None
    except psycopg.ProgrammingError as error:
        raise Failure(f"PGSHELF_DATABASE_URL is no connection string of PostgreSQL: {str(error).strip()}") from None
    logs.configure(settings.log_level, settings.log_format)
    return settings


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


@main.command()
@click.option("--host", help="Address to listen on (PGSHELF_HOST).")
@click.option("--port", type=int, help="Port to listen on (PGSHELF_PORT).")
@DATA_DIR
@click.option("--workers", type=int, help="Processes; the default is one for each core (PGSHELF_WORKERS).")
@click.option("--reload", is_flag=True, help="Restart when the code changes, for development; needs pgshelf[reload].")
@_shared_numbers()
def serve(host: str | None, port: int | None, data_dir: Path | None, workers: int | None, reload: bool) -> None:
    """Serve the REST API."""
    settings = _settings(host=host, port=port, data_dir=data_dir, workers=workers)
    if settings.tracing and not _has("opentelemetry"):
        raise Failure("PGSHELF_TRACING needs OpenTelemetry: pip install 'pgshelf[otel]'")
    access = _check_access(settings.database_url, settings) if settings.database_url else None
    address = _check_address(settings)
    with database_of(settings) as (url, server):
        if settings.auto_migrate if settings.auto_migrate is not None else server is not None:
            migrated(url, settings)
        click.echo(_banner(settings, server, access or _check_access(url, settings)))
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


@main.command("worker")
@DATA_DIR
def worker_command(data_dir: Path | None) -> None:
    """Embed what is pending, build indexes and clean up, without serving.

    A service does that itself unless PGSHELF_WORKER_ENABLED is false; any number of both may run.
    """
    settings = _settings(data_dir=data_dir)
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


def _say_what_fails(url: str, settings: Settings) -> None:
    """Serving begins all the same: the database may come, or be migrated, later."""
    from pgshelf import doctor

    for finding in doctor.examine(url, settings):
        if finding.level == "fail":
            click.echo(f"pgshelf: not ready: {finding.text}", err=True)


def _serve(settings: Settings, address: str, reload: bool) -> None:
    from granian import Granian
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels

    _allow_files()
    # a worker that is told to stop before it has handlers of its own would swallow that in a copy of its parent's
    os.register_at_fork(after_in_child=_default_signals)
    Granian(
        "pgshelf.app:from_environment",
        factory=True,
        interface=Interfaces.ASGI,
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


def _check_address(settings: Settings) -> str:
    """The IP address to listen on, which is free and which nobody reaches by mistake."""
    if settings.auth == "off" and not is_loopback(settings.host) and not settings.allow_unauthenticated:
        raise Failure(f"{_reachable(settings)}PGSHELF_AUTH=off would let anybody in. {OTHERWISE}")
    try:
        family, kind, _, _, where = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise Failure(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose --port.") from None
    return str(where[0])


OTHERWISE = (
    "Listen on 127.0.0.1, or set PGSHELF_ALLOW_UNAUTHENTICATED=true where something in front of pgshelf authenticates."
)


def _reachable(settings: Settings) -> str:
    return f"{settings.host} can be reached from other machines, and "


def _check_access(url: str, settings: Settings) -> str:
    """Who may come in, in a few words; refuses an address that others reach while nothing says who may."""
    from pgshelf import authentication, connections

    closed = authentication.requires_keys(settings)
    if closed is False:
        return "open to whoever reaches it: PGSHELF_AUTH=off"
    try:
        with connections.connect(url, "serve") as connection:
            row = connection.execute(
                "select exists (select from pgshelf.keys), exists (select from pgshelf.keys k"
                " where k.revoked_at is null and coalesce(k.expires_at > now(), true))"
            ).fetchone()
        any_key, usable = row or (False, False)
    except psycopg.Error:  # the banner is followed by what is wrong with the database
        any_key = usable = None
    if closed and settings.auth == "auto" and not settings.jwt and not usable:
        why = "there is no key yet" if usable is False else "the database does not say whether there is a key"
        todo = "Make one with pgshelf keys create, set PGSHELF_AUTH=on or the settings of JWT. "
        raise Failure(f"{_reachable(settings)}{why}. {todo}{OTHERWISE}")
    if closed is None and not any_key:
        return "open to whoever reaches it, until there is a key: pgshelf keys create NAME --role admin"
    if usable or settings.jwt:
        return "with a key" + (f", or a token of {settings.jwt_issuer}" if settings.jwt else "")
    return "with a key, and there is none: pgshelf keys create NAME --role admin"


def _banner(settings: Settings, server: embedded.EmbeddedServer | None, access: str) -> str:
    default, shown, here = Settings(), settings.summary(), f"http://{settings.host}:{settings.port}"
    shown_above = ("database_url", "host", "port")
    changed = [
        f"    {name} = {text}"
        for name, text in shown.items()
        if getattr(settings, name) != getattr(default, name) and name not in shown_above
    ]
    lines = [
        f"pgshelf {__version__}",
        f"  API      {here}{settings.api_prefix}   (reference: {here}/schema, state: {here}/ready)",
        "  database "
        + (shown["database_url"] if server is None else f"PostgreSQL {server.version}, bundled, in {server.data_dir}"),
    ]
    lines.append(f"  access   {access}")
    if server is not None:
        lines.append(f"  psql     {server.psql_command()}")
    lines.append("  settings " + ("all at their defaults" if not changed else "that differ from the defaults:"))
    return "\n".join([*lines, *changed])


@main.command("migrate")
@click.option("--sql", "as_sql", is_flag=True, help="Print the statements for a DBA instead of running them.")
@click.option("--down-to", metavar="REVISION", help="Go back to a revision; `base` removes pgshelf from the database.")
@DATA_DIR
def migrate_command(as_sql: bool, down_to: str | None, data_dir: Path | None) -> None:
    """Bring the schema `pgshelf` of the database up to date."""
    from pgshelf import migrate, schema

    settings = _settings(data_dir=data_dir)
    if as_sql:
        click.echo(migrate.offline_sql(vector_schema=settings.vector_schema))
        return
    with database_of(settings) as (url, _):
        if down_to is None:
            migrated(url, settings)
            click.echo(f"the schema pgshelf is at revision {schema.head()}")
            return
        try:
            migrate.downgrade(url, down_to, vector_schema=settings.vector_schema)
        except migrate.MigrationError as error:
            raise Failure(str(error)) from None
        click.echo(f"the schema pgshelf is back at {down_to}")


@main.command("doctor")
@DATA_DIR
@click.option("--providers", is_flag=True, help="Ask each embedder that is in use for one vector, too.")
def doctor_command(data_dir: Path | None, providers: bool) -> None:
    """Look at the database and the settings, and say what to do."""
    from pgshelf import doctor

    settings = _settings(data_dir=data_dir)
    failed = False
    with database_of(settings) as (url, _):
        for finding in doctor.examine(url, settings, ask=providers):
            failed |= finding.level == "fail"
            click.echo(f"{finding.level:<4}  {finding.text}")
    sys.exit(1 if failed else 0)


@main.command("demo")
@click.option("--keep", is_flag=True, help="Leave it serving until Ctrl-C.")
@click.option("--port", type=int, help="Port to listen on (PGSHELF_PORT).")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path(".pgshelf"),
    show_default=True,
    help="Where the data goes.",
)
def demo_command(keep: bool, port: int | None, data_dir: Path) -> None:
    """Ingest the documentation of the Python standard library on this machine, and search it over HTTP."""
    from rich.console import Console

    from pgshelf import demo
    from pgshelf_client import Client

    told = exit_when_told()
    console, settings, library = Console(highlight=False), _settings(port=port), "python-docs"
    url, sensible = f"http://127.0.0.1:{settings.port}", 0
    console.print("[bold]1. start PostgreSQL, migrate, serve[/bold]")
    with _serving(settings.port, data_dir) as process, Client(url, timeout=60) as client:
        _await(process, client)
        console.print("[bold]2. ingest the documentation of the Python standard library[/bold]")
        demo.fill(client, library, console)
        console.print("[bold]3. ask, over HTTP[/bold]")
        sensible = demo.ask(client, library, console)
        answered = f"{sensible} of {len(demo.QUESTIONS)} questions"
        console.print(f"\n{answered} have a sensible answer among their first three hits.")
        psql = embedded.EmbeddedServer(data_dir, settings.postgres_version, {}, 0).psql_command()
        console.print(f"[bold]4. go on[/bold] ({'Ctrl-C ends it' if keep else 'after: make demo KEEP=1'})")
        console.print(demo.how_to_go_on(url, psql, library), markup=False, soft_wrap=True)
        if keep:
            with contextlib.suppress(KeyboardInterrupt):
                while process.poll() is None and not told.is_set():
                    time.sleep(0.2)
    if told.is_set():
        raise SystemExit(143)
    if sensible < len(demo.QUESTIONS):
        raise Failure("some questions found nothing sensible")


@contextlib.contextmanager
def _serving(port: int, data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `pgshelf serve` with the bundled PostgreSQL, whatever database or archive the environment names."""
    fixed = {
        "AUTH": "off",
        "DATA_DIR": str(data_dir.resolve()),
        "API_PREFIX": "/v1",
        "HOST": "127.0.0.1",
        "LOG_LEVEL": "warning",
    }
    environment = {**os.environ, **{PREFIX + name: value for name, value in fixed.items()}}
    for elsewhere in ("DATABASE_URL", "WAL_ARCHIVE"):
        environment.pop(PREFIX + elsewhere, None)
    command = [sys.executable, "-m", "pgshelf.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment)  # noqa: S603 - our own program
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _await(process: subprocess.Popen[bytes], client: Client) -> None:
    from pgshelf_client import PgshelfError

    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(PgshelfError):
            client.ready()
            return
        time.sleep(0.1)
    raise Failure("the service did not become ready; see above")


if __name__ == "__main__":
    main()
