"""The command that shows what pgshelf does: demo."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pgshelf import embedded
from pgshelf.cli_database import exit_when_told
from pgshelf.console import Failure
from pgshelf.settings import PREFIX, Settings

if TYPE_CHECKING:
    from pgshelf_client import Client


@click.command("demo")
@click.option("--keep", is_flag=True, help="Leave it serving until Ctrl-C.")
@click.option("--port", type=int, help="Port to listen on (PGSHELF_PORT).")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    default=Path(".pgshelf"),
    show_default=True,
    help="Where the data goes.",
)
@click.pass_obj
def demo_command(settings_of: Callable[..., Settings], keep: bool, port: int | None, data_dir: Path) -> None:
    """Ingest the documentation of the Python standard library on this machine, and search it over HTTP."""
    from rich.console import Console

    from pgshelf import demo
    from pgshelf_client import Client

    told = exit_when_told()
    console, settings, library = Console(highlight=False), settings_of(port=port), "python-docs"
    url, sensible = f"http://127.0.0.1:{settings.port}", 0
    console.print("[bold]1. start PostgreSQL, migrate, serve[/bold]")
    apart = f"  open to all on this machine; its data are its own: pgshelf keys and doctor need --data-dir {data_dir}"
    console.print(apart, markup=False, soft_wrap=True)
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
