"""Alembic, driven: the same steps whether `pgshelf migrate`, `alembic upgrade head` or `--sql` asks for them."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import psycopg
from alembic import command, op
from alembic.config import Config
from alembic.util import CommandError
from pgvector.sqlalchemy import VECTOR
from psycopg import sql
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from pgshelf import pools
from pgshelf.schema import head, resource, sql_files, sql_hash
from pgshelf.settings import Settings
from pgshelf.tables import XID8, metadata

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext

SCHEMA = "pgshelf"
LOCK = (0x70677368, 1)  # advisory lock of migrations: "pgsh", 1
LOCK_WAIT = 120.0  # seconds that a second migrator waits for the first
GUARDS = (
    "set lock_timeout = '10s'; set statement_timeout = '15min'; set search_path = pg_catalog, pg_temp; set jit = off"
)


class MigrationError(CommandError):
    """The database could not be migrated; the message says why and what to do."""


def upgrade(url: str, revision: str = "head", *, vector_schema: str = "public", warn: bool = True) -> None:
    """Bring the database at `url` to `revision` and apply sql/; safe to repeat, and for several to run at once."""
    _command(command.upgrade, url, revision, vector_schema, warn)


def downgrade(url: str, revision: str = "base", *, vector_schema: str = "public") -> None:
    """Take the database at `url` back to `revision`; `base` leaves nothing behind."""
    _command(command.downgrade, url, revision, vector_schema)


def offline_sql(revision: str = "head", *, vector_schema: str = "public") -> str:
    """The statements of an upgrade as text, for a DBA to read and run with psql."""
    config = _config(None, vector_schema)
    config.output_buffer = output = io.StringIO()
    command.upgrade(config, revision, sql=True)
    return output.getvalue()


def run(statements: str) -> None:
    """Run a migration's SQL as it stands; `@vector@` names the schema of pgvector."""
    _run(op.get_context(), statements)


def clear_routines() -> None:
    """The first step of a way down: take away what sql/ made, which may not fit the tables of an older revision."""
    run((resource("migrations") / "clear_routines.sql").read_text())


def _config(url: str | None, vector_schema: str, warn: bool = True) -> Config:
    config = Config()
    config.set_main_option("script_location", str(resource("migrations")).replace("%", "%%"))
    config.attributes |= {"url": url, "vector_schema": vector_schema, "warn": warn}
    return config


def _command(
    call: Callable[[Config, str], None], url: str, revision: str, vector_schema: str, warn: bool = True
) -> None:
    try:
        call(_config(url, vector_schema, warn), revision)
    except psycopg.errors.DependentObjectsStillExist as error:
        raise MigrationError(
            f"nothing was changed: {error.diag.message_primary}. "
            f"Drop what depends on it first: {error.diag.message_detail}"
        ) from error
    except psycopg.Error as error:
        raise MigrationError(_said(error)) from error
    except DBAPIError as error:  # from a statement of Alembic's, or from connecting
        raise MigrationError(_said(error.orig or error)) from error
    except CommandError as error:
        raise MigrationError(f"{error}; this version of pgshelf knows revisions up to {head()}") from error


def _said(error: BaseException) -> str:
    while isinstance(error.__context__, psycopg.Error):
        error = error.__context__  # what ended a connection says more than the rollback that did not find it
    if isinstance(error, (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)):
        return (
            f"the step that waited was rolled back: {error.diag.message_primary}. Another session holds what it needs; "
            "look for long transactions in pg_stat_activity, end them, then run it again"
        )
    if not isinstance(error, psycopg.Error) or error.diag.message_primary is None:
        return str(error).strip()
    return ". ".join(part for part in (error.diag.message_primary, error.diag.message_hint) if part)


def _run(context: Any, statements: str) -> None:
    statements = _filled(statements, context.config.attributes["vector_schema"])
    if context.as_sql:
        context.impl.static_output(statements)
    else:
        _driver(context.connection).execute(statements.encode())


def _filled(statements: str, vector_schema: str) -> str:
    """Name pgvector's schema: `@vector_ident@` stands inside a string literal, `@vector_literal@` is one."""
    ident, literal = sql.Identifier(vector_schema).as_string(), sql.Literal(vector_schema).as_string()
    return (
        statements.replace("@vector@", ident)
        .replace("@vector_ident@", ident.replace("'", "''"))
        .replace("@vector_literal@", literal.strip())
    )


def _driver(connection: Connection) -> psycopg.Connection[Any]:
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 - narrows the type: the engine is made for psycopg
    return driver


def _tell(notice: psycopg.errors.Diagnostic) -> None:
    if notice.severity_nonlocalized == "WARNING":
        print(f"warning: {notice.message_primary}", file=sys.stderr)


def _destination(context: EnvironmentContext) -> str | None:
    """The revision asked for, `base` included; None for commands that only look (current, check, history)."""
    try:
        return str(context.get_revision_argument() or "base")  # Alembic says None for base
    except KeyError:
        return None


def _include(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
    """Leave out what `alembic check` cannot know: the shelves, which are made at run time, and Alembic's own table."""
    table = name if kind == "table" else getattr(getattr(item, "table", None), "name", "")
    return not (str(table).startswith("chunks_s") or table == "alembic_version")


def _options(destination: str | None) -> dict[str, Any]:
    """Upwards each step is kept; downwards all or none: a last step that refuses must not find the first ones gone."""
    return {
        "target_metadata": metadata,
        "version_table_schema": SCHEMA,
        "include_schemas": True,
        "include_name": lambda name, kind, _: kind != "schema" or name == SCHEMA,
        "include_object": _include,
        "transaction_per_migration": destination in (None, head()),
        "compare_server_default": False,
    }


def run_environment(context: Any, environ: Mapping[str, str]) -> None:
    """What env.py does: `context` is Alembic's module of that name, which stands for the current environment."""
    if context.is_offline_mode():
        run_offline(context, environ)
    else:
        run_online(context, environ)


def run_online(context: EnvironmentContext, environ: Mapping[str, str]) -> None:
    """What env.py does with a database: guards, lock, prepare, migrations, sql/, teardown."""
    attributes = context.config.attributes
    url = attributes.get("url") or Settings.from_env(environ).database_url
    if not url:
        raise MigrationError("set PGSHELF_DATABASE_URL to the database that shall be migrated")
    with pools.migration_engine(url).connect() as connection:
        driver = _driver(connection)
        if attributes.get("warn", True):
            driver.add_notice_handler(_tell)
        with connection.begin():
            _lock(driver)
            driver.execute(GUARDS)
            found = _vector_schema(driver)
            attributes["vector_schema"] = found[0] if found else attributes.get("vector_schema") or _default(environ)
        ischema_names["xid8"] = XID8
        if found:
            ischema_names[found[1].lower()] = (
                VECTOR  # reflection (alembic check) sees the type under its qualified name
            )
        # SQLAlchemy read it before the guards: with pgshelf first in the search_path our schema would go unnamed
        connection.dialect.default_schema_name = "pg_catalog"
        _migrate(context, connection)


def _migrate(context: EnvironmentContext, connection: Connection) -> None:
    destination = _destination(context)
    if destination is not None:
        if not set(destination) & set("+-"):  # relative ones depend on where the database is
            context.script.get_revisions(destination)  # one that does not exist is refused before anything is made
        with connection.begin():
            _driver(connection).execute(_read("prepare.sql", context).encode())
    context.configure(connection=connection, **_options(destination))
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()  # Alembic looked at the version and left a transaction open
    if destination is None:
        return
    with connection.begin():
        heads = context.get_context().get_current_heads()
        if not heads:
            _driver(connection).execute(_read("teardown.sql", context).encode())
        elif heads == (head(),):
            _driver(connection).execute(_routines(context).encode())


def run_offline(context: EnvironmentContext, environ: Mapping[str, str]) -> None:
    """What env.py does without a database: the same statements, printed."""
    attributes = context.config.attributes
    attributes["vector_schema"] = attributes.get("vector_schema") or _default(environ)
    destination = _destination(context)
    context.configure(dialect_name="postgresql", literal_binds=True, **_options(destination))
    output = context.get_context().impl.static_output
    output(
        "-- pgshelf, for a database without it. Run it with psql -v ON_ERROR_STOP=1, as the role that shall own it.\n"
    )
    output(f"{GUARDS};\nselect pg_advisory_lock({LOCK[0]}, {LOCK[1]});\n")
    output("begin;\n" + _read("prepare.sql", context) + "commit;\n")
    with context.begin_transaction():
        context.run_migrations()
    base = destination == "base"
    output("begin;\n" + (_read("teardown.sql", context) if base else _routines(context)) + "commit;\n")
    output(f"select pg_advisory_unlock({LOCK[0]}, {LOCK[1]});\nreset all;\n")


def _read(name: str, context: EnvironmentContext) -> str:
    return _filled((resource("migrations") / name).read_text(), context.config.attributes["vector_schema"])


def _routines(context: EnvironmentContext) -> str:
    body = "\n".join(file.read_text() for file in sql_files())
    body += f"\nupdate pgshelf.installation set sql_hash = '{sql_hash()}';\n"
    return _filled(body, context.config.attributes["vector_schema"])


def _default(environ: Mapping[str, str]) -> str:
    return Settings.from_env(environ).vector_schema


def _vector_schema(driver: psycopg.Connection[Any]) -> tuple[str, str] | None:
    """The schema of pgvector, and the qualified name of its type as PostgreSQL writes it."""
    return driver.execute(
        "select n.nspname, quote_ident(n.nspname) || '.vector' from pg_extension e"
        " join pg_namespace n on n.oid = e.extnamespace where e.extname = 'vector'"
    ).fetchone()


def _lock(driver: psycopg.Connection[Any]) -> None:
    """Take the migration lock; poll, because a waiting lock would hold a snapshot open for as long."""
    deadline = time.monotonic() + LOCK_WAIT
    while not driver.execute("select pg_try_advisory_lock(%s, %s)", LOCK).fetchone()[0]:  # type: ignore[index]  # one row
        if time.monotonic() > deadline:
            raise MigrationError(f"another migration of this database has been running for {LOCK_WAIT:.0f} s")
        driver.execute("select pg_sleep(0.2)")
