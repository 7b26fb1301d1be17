"""The commands that keep a database in order: migrate, doctor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from pgshelf.cli_database import DATA_DIR, database_of, migrated
from pgshelf.console import Failure
from pgshelf.settings import Settings


@click.command("migrate")
@click.option("--sql", "as_sql", is_flag=True, help="Print the statements for a DBA instead of running them.")
@click.option("--down-to", metavar="REVISION", help="Go back to a revision; `base` removes pgshelf from the database.")
@DATA_DIR
@click.pass_obj
def migrate_command(
    settings_of: Callable[..., Settings], as_sql: bool, down_to: str | None, data_dir: Path | None
) -> None:
    """Bring the schema `pgshelf` of the database up to date."""
    from pgshelf import migrate, schema

    settings = settings_of(data_dir=data_dir)
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


@click.command("doctor")
@DATA_DIR
@click.option("--providers", is_flag=True, help="Ask each embedder that is in use for one vector, too.")
@click.pass_obj
def doctor_command(settings_of: Callable[..., Settings], data_dir: Path | None, providers: bool) -> None:
    """Look at the database and the settings, and say what to do."""
    from pgshelf import doctor

    settings = settings_of(data_dir=data_dir)
    failed = False
    with database_of(settings) as (url, _):
        for finding in doctor.examine(url, settings, ask=providers):
            failed |= finding.level == "fail"
            click.echo(f"{finding.level:<4}  {finding.text}")
    sys.exit(1 if failed else 0)
