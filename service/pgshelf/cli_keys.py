"""`pgshelf keys`: the keys of the REST API, straight in the database."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec
import psycopg

from pgshelf.cli_database import DATA_DIR, database_of, migrated
from pgshelf.console import Failure
from pgshelf.settings import Settings


@click.group("keys")
def keys_group() -> None:
    """Keys of the REST API, straight in the database; the service need not run."""


AUDIT = "select pgshelf.audit(%s, 'done', 'role', current_user::text, null, null, null, null, 1, %s)"
MANAGERS = (
    "Those may that own the schema pgshelf, or are members of pgshelf_service; PGSHELF_DATABASE_URL names the role."
)


@contextlib.contextmanager
def _keys(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the database that has the keys; what it refuses ends the command."""
    from pgshelf import connections
    from pgshelf.errors import Problem, problem_of

    with database_of(settings) as (url, server):
        if server is not None:
            migrated(url, settings)
        try:
            with connections.connect(url, "keys") as connection:
                try:
                    yield connection
                except psycopg.errors.InsufficientPrivilege:
                    raise Failure(f"the role {connection.info.user} may not manage keys. {MANAGERS}") from None
        except (psycopg.Error, msgspec.ValidationError, Problem) as error:
            raise Failure(problem_of(error).detail) from None


def _place(connection: psycopg.Connection[Any], settings: Settings) -> str:
    """Which database it is, without a password."""
    if settings.database_url is None:
        return f"the bundled PostgreSQL in {settings.data_dir.resolve()}"
    return f"the database {connection.info.dbname} on {connection.info.host}:{connection.info.port}"


def _moment(_: click.Context, option: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    if found := re.fullmatch(r"(\d{1,6})([smhd])", value):
        unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}[found[2]]
        return datetime.now(UTC) + timedelta(**{unit: int(found[1])})
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter("needs a duration such as 90d or 12h, or a time such as 2027-01-31T00:00Z") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@keys_group.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice(["reader", "writer", "admin"]), required=True, help="What it may do.")
@click.option(
    "--library", "scope", multiple=True, metavar="NAME", help="A name, an id or a pattern (team-*); may be repeated."
)
@click.option("--expires", "ends", callback=_moment, metavar="WHEN", help="Such as 90d, 12h, or 2027-01-31.")
@DATA_DIR
@click.pass_obj
def keys_create(
    settings_of: Callable[..., Settings],
    name: str,
    role: str,
    scope: tuple[str, ...],
    ends: datetime | None,
    data_dir: Path | None,
) -> None:
    """Make a key, which sees all libraries unless --library says which. Its secret is printed this once."""
    from pgshelf import credentials, keys

    made, settings = credentials.mint(), settings_of(data_dir=data_dir)
    with _keys(settings) as connection:
        said = {"name": name, "role": role, "libraries": list(scope) or None, "expires_at": ends}
        asked = msgspec.convert(said, keys.CreateKey)
        keys.check_name(asked.name)
        keys.check_expiry(asked.expires_at)
        given = [name, role, keys.stored_scope(asked.libraries), ends, made.hash, made.hint]
        with connection.transaction():
            connection.execute("select pgshelf.create_key(%s, %s, %s, %s, %s, %s)", given)
            connection.execute(AUDIT, ["key.create", name])
        place = _place(connection, settings)
    click.echo(made.secret)
    click.echo(f"The key {name} is in {place}. Keep its secret now: it cannot be shown again.", err=True)


@keys_group.command("list")
@click.option("--revoked", is_flag=True, help="The revoked ones, too.")
@DATA_DIR
@click.pass_obj
def keys_list(settings: Callable[..., Settings], revoked: bool, data_dir: Path | None) -> None:
    """List keys, without their secrets."""
    with _keys(settings(data_dir=data_dir)) as connection:
        rows = connection.execute(
            "select k.id, k.name, k.role, coalesce(array_to_string(k.libraries, ', '), 'all libraries'), k.expires_at,"
            " k.revoked_at, k.last_used_at, (select string_agg(s.hint, ', ' order by s.created_at desc)"
            " from pgshelf.key_secrets s"
            " where s.key_id = k.id and not s.token and coalesce(s.expires_at > now(), true))"
            " from pgshelf.keys k where %s or k.revoked_at is null order by k.created_at, k.id",
            [revoked],
        ).fetchall()
    for key, name, role, scope, ends, over, used, hints in rows:
        said = [f"revoked {over:%Y-%m-%d %H:%M}" if over else f"expires {ends:%Y-%m-%d %H:%M}" if ends else "no end"]
        said += [f"used {used:%Y-%m-%d %H:%M}" if used else "never used"]
        click.echo(f"{key}  {name}  {role}  {scope}  {hints or '-'}...  {', '.join(said)}")


@keys_group.command("revoke")
@click.argument("key")
@DATA_DIR
@click.pass_obj
def keys_revoke(settings: Callable[..., Settings], key: str, data_dir: Path | None) -> None:
    """End KEY (its name or id) and all its tokens, at once in every running service."""
    with _keys(settings(data_dir=data_dir)) as connection:
        with connection.transaction():
            connection.execute("select pgshelf.revoke_key(%s)", [key])
            connection.execute(AUDIT, ["key.revoke", key])
    click.echo(f"{key} is revoked")


@keys_group.command("rotate")
@click.argument("key")
@click.option("--overlap", type=click.IntRange(0), default=86_400, show_default=True, help="Seconds of the old secret.")
@DATA_DIR
@click.pass_obj
def keys_rotate(settings: Callable[..., Settings], key: str, overlap: int, data_dir: Path | None) -> None:
    """Give KEY (its name or id) another secret, which is printed this once; the old one is valid for a while yet."""
    from pgshelf import credentials

    made = credentials.mint()
    with _keys(settings(data_dir=data_dir)) as connection:
        given = [key, made.hash, made.hint, timedelta(seconds=overlap)]
        with connection.transaction():
            connection.execute("select pgshelf.rotate_key(%s, %s, %s, %s, null, false)", given)
            connection.execute(AUDIT, ["key.rotate", key])
    click.echo(made.secret)
    click.echo("Keep it now: it cannot be shown again.", err=True)
