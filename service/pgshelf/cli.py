"""The command line. Commands import what they need themselves, so that each starts quickly."""

from __future__ import annotations

import os
from typing import Any

import click
import psycopg
import psycopg.conninfo

from pgshelf import (
    __version__,
    cli_backups,
    cli_demo,
    cli_keys,
    cli_maintenance,
    cli_search,
    cli_serve,
    cli_transfer,
    logs,
)
from pgshelf.console import Failure
from pgshelf.settings import Settings, SettingsError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="pgshelf")
@click.pass_context
def main(context: click.Context) -> None:
    """A vector document store that lives in PostgreSQL.

    Settings are environment variables, PGSHELF_*; without PGSHELF_DATABASE_URL a bundled PostgreSQL is started.
    """
    context.obj = _settings


for command in (
    cli_serve.serve_command,
    cli_serve.worker_command,
    cli_maintenance.migrate_command,
    cli_maintenance.doctor_command,
    cli_demo.demo_command,
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


if __name__ == "__main__":
    main()
