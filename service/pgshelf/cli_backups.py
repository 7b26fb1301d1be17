"""`pgshelf backup` and `pgshelf restore`: copies of the whole PostgreSQL server, and new servers made of them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pgshelf import embedded
from pgshelf.cli_database import DATA_DIR, database_of, exit_when_told
from pgshelf.console import Failure
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from pgshelf.backups import Backup, Backups
    from pgshelf.restore import Recovery

RECOVERY_SECONDS = 7 * 86_400.0  # archived WAL of months may have to be replayed


def _moment_past(_: click.Context, option: click.Parameter, value: str | None) -> datetime | None:
    try:
        moment = None if value is None else datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if value is not None and (moment is None or moment.tzinfo is None):
        raise click.BadParameter("needs a time with its zone, such as 2027-01-31T09:30:00Z")
    return moment


def _lsn(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", value):
        raise click.BadParameter("needs a place in the WAL, such as 0/3000148")
    return value


def _program_folders(pg_bin: Path | None) -> list[Path]:
    from pgshelf import postgres_programs

    bundled = []
    with contextlib.suppress(embedded.EmbeddedError):
        bundled = [embedded.bin_dir(version) for version in sorted(embedded.VERSIONS)]
    return postgres_programs.program_folders(pg_bin, os.environ.get("PATH", os.defpath), bundled)


@click.command("backup")
@click.option("--to", "to", type=click.Path(path_type=Path), help="Directory of backups (PGSHELF_BACKUP_DIRECTORY).")
@click.option("--label", help="What to call it.")
@click.option("--keep", type=click.IntRange(1), help="Delete all but the newest so many (PGSHELF_BACKUP_KEEP).")
@click.option("--list", "listed", is_flag=True, help="List what is there instead of taking one.")
@click.option("--job", is_flag=True, hidden=True, help="Take the backup that a service has begun, as its input says.")
@DATA_DIR
@click.pass_obj
def backup_command(
    settings_of: Callable[..., Settings],
    to: Path | None,
    label: str | None,
    keep: int | None,
    listed: bool,
    job: bool,
    data_dir: Path | None,
) -> None:
    """Copy the whole PostgreSQL server into a directory, with pg_basebackup, and check the copy."""
    from pgshelf import backups, base_backup

    if job:
        handed = msgspec.json.decode(sys.stdin.buffer.read(), type=base_backup.Job)
        pg_bin = None if handed.pg_bin is None else Path(handed.pg_bin)
        sys.exit(base_backup.take(handed, _program_folders(pg_bin), os.environ).state != "done")
    settings = settings_of(data_dir=data_dir, backup_directory=to, backup_keep=keep)
    store = _backups(settings)
    if listed:
        for each in store.all():
            click.echo(_described(each))
        return
    exit_when_told()
    with database_of(settings) as (url, _):
        try:
            begun, lock = store.claim(label)
        except (backups.BackupError, OSError) as error:
            raise Failure(str(error)) from None
        handed = base_backup.Job(
            directory=str(store.directory),
            backup=begun,
            lock=lock,
            url=settings.backup_url or url,
            keep=settings.backup_keep,
            archive=None if settings.wal_archive is None else str(settings.wal_archive),
        )
        taken = base_backup.take(handed, _program_folders(settings.pg_bin), os.environ)
    if taken.state != "done":
        raise Failure(f"the backup failed: {taken.error}")
    click.echo(_described(taken))
    click.echo(f"It is in {store.data(taken)}", err=True)


def _backups(settings: Settings) -> Backups:
    from pgshelf import backups

    if settings.backup_directory is None:
        raise Failure("say where backups are: --to DIRECTORY, or PGSHELF_BACKUP_DIRECTORY")
    return backups.Backups(settings.backup_directory.resolve())


def _described(backup: Backup) -> str:
    size = "" if backup.bytes is None else f"  {backup.bytes / 1024**2:.0f} MB"
    places = "" if backup.end_lsn is None else f"  {backup.start_lsn} to {backup.end_lsn} on timeline {backup.timeline}"
    said = [f"{backup.id}  {backup.state}{size}{places}"]
    said += [f"until {backup.finished_at:%Y-%m-%d %H:%M:%S%z}"] if backup.finished_at else []
    return "  ".join([*said, *filter(None, [backup.label, backup.error])])


@click.command("restore")
@click.argument("backup", required=False)
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="Directory of backups (PGSHELF_BACKUP_DIRECTORY)."
)
@click.option("--to", "target", type=click.Path(path_type=Path), required=True, help="A new directory.")
@click.option("--archive", type=click.Path(path_type=Path), help="Directory of archived WAL (PGSHELF_WAL_ARCHIVE).")
@click.option("--to-time", "moment", callback=_moment_past, metavar="TIME", help="Recover to a time, with its zone.")
@click.option("--to-lsn", "lsn", callback=_lsn, metavar="LSN", help="Recover to a place in the WAL.")
@click.option("--to-name", "name", help="Recover to what pg_create_restore_point named.")
@click.pass_obj
def restore_command(
    settings_of: Callable[..., Settings],
    backup: str | None,
    source: Path | None,
    target: Path,
    archive: Path | None,
    moment: datetime | None,
    lsn: str | None,
    name: str | None,
) -> None:
    """Make a new server of BACKUP (its id; the newest that fits if absent), recovered to a moment if you say one.

    Without one it is recovered as far as there is archived WAL, or, without an archive, to the end of the backup. Of a
    bundled PostgreSQL a data directory is made, ready to serve; of another one the directory that it starts from.
    """
    from pgshelf import backups, postgres_programs, restore

    settings = settings_of(backup_directory=source, wal_archive=archive)
    if sum(each is not None for each in (moment, lsn, name)) > 1:
        raise Failure("choose one of --to-time, --to-lsn and --to-name")
    if settings.wal_archive is None and (moment or lsn or name):
        raise Failure("a moment is reached with archived WAL: say where it is with --archive, or PGSHELF_WAL_ARCHIVE")
    archive = None if settings.wal_archive is None else settings.wal_archive.resolve()
    recovery, target = restore.Recovery(moment, lsn, name, archive), target.resolve()
    exit_when_told()
    try:
        store = _backups(settings)
        found = restore.find(store, backup, recovery)
        programs = postgres_programs.find_programs(_program_folders(settings.pg_bin), found.major)
        if store.is_bundled(found):
            _recover_bundled(store, found, target, programs, recovery)
            return
        restore.restore(store, found, target, programs)
        restore.prepare(target, recovery)
    except (backups.BackupError, embedded.EmbeddedError, OSError) as error:
        raise Failure(str(error)) from None
    click.echo(f"{found.id} is in {target}. PostgreSQL recovers it when it is started there, then takes writes:")
    click.echo(f"  {programs / 'pg_ctl'} -D {target} start")


def _recover_bundled(store: Backups, backup: Backup, target: Path, programs: Path, recovery: Recovery) -> None:
    """Recover with the bundled server, once, and stop it; what it was told is forgotten at its next start."""
    from pgshelf import connections, restore

    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    restore.restore(store, backup, target / "postgres", programs)
    click.echo(f"{backup.id} is in {target}; recovering", err=True)
    told = {**recovery.settings(), "hot_standby": "off"}  # nobody may come in before it is done
    with embedded.start(target, backup.major, settings=told, timeout=RECOVERY_SECONDS) as server:
        with connections.connect(server.url(), "restore") as connection:
            row = connection.execute("select pg_last_xact_replay_timestamp()").fetchone()
    last = f", its last change is of {row[0].astimezone(UTC):%Y-%m-%d %H:%M:%S.%f} UTC" if row and row[0] else ""
    click.echo(f"recovered{last}. Serve it: pgshelf serve --data-dir {target}")
