"""What commands share that work on the database itself: where it is, the bundled one if there is no other."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import click

from pgshelf import embedded
from pgshelf.console import Failure
from pgshelf.settings import Settings

DATA_DIR = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Data of the bundled PostgreSQL (PGSHELF_DATA_DIR)."
)


@contextlib.contextmanager
def database_of(settings: Settings) -> Iterator[tuple[str, embedded.EmbeddedServer | None]]:
    """The URL to use, and the bundled server behind it where it is ours."""
    if settings.database_url:
        yield settings.database_url, None
        return
    from pgshelf import connections

    try:
        # some connections are left for psql and for others that share the server
        allowed = max(200, settings.workers * connections.most(settings) + 50)
        server = embedded.start(
            settings.data_dir,
            settings.postgres_version,
            settings={"max_connections": str(allowed)},
            archive=settings.wal_archive,
        )
    except embedded.EmbeddedError as error:
        raise Failure(str(error)) from None
    with server:
        yield server.url(), server


def migrated(url: str, settings: Settings) -> None:
    from pgshelf import migrate

    bundled = settings.database_url is None  # nobody can install another pgvector there: doctor says enough
    try:
        migrate.upgrade(url, vector_schema=settings.vector_schema, warn=not bundled)
    except migrate.MigrationError as error:
        raise Failure(str(error)) from None


def exit_when_told() -> threading.Event:
    """End on SIGTERM as on Ctrl-C, with what was started; set in case that the exception got lost on its way."""
    told = threading.Event()

    def end(*_: object) -> None:
        told.set()
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, end)
    return told
