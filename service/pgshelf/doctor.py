"""What an operator would check by hand: versions, extension, schema, roles, indexes, server settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import msgspec
import psycopg

from pgshelf import connections, health, pools, providers
from pgshelf.embedders import EmbedderError, embedder_for, settled
from pgshelf.settings import Settings, is_loopback


class Finding(msgspec.Struct):
    """One line: `ok`, `warn` (works, could be better) or `fail` (does not work), and what to do."""

    level: Literal["ok", "warn", "fail"]
    text: str


Connection = psycopg.Connection[Any]
Look = Callable[[Connection], Iterator[Finding]]


def examine(url: str, settings: Settings, *, ask: bool = False) -> Iterator[Finding]:
    """Look at everything; stops at the first finding behind which nothing else can be seen.

    With `ask`, each embedder that is in use makes one vector.
    """
    try:
        connection = connections.connect(url, "doctor")
    except psycopg.Error as error:
        yield Finding(
            "fail", f"the database cannot be reached: {_line(error).rstrip('?.')}. Check PGSHELF_DATABASE_URL."
        )
        return
    with connection:
        first = (partial(_rights, settings=settings), _become_owner, _server, _encryption, _extension, _schema)
        yield from _each(connection, *first)
        there = _has_schema(connection)
        if there:
            yield from _each(connection, _roles, _beyond, _indexes, _pending, _replication)
        yield from _each(connection, _parameters, partial(_connections, settings=settings))
        yield from _default_embedder(settings, ask)
        if there:
            yield from _each(connection, partial(_embedders, settings=settings, ask=ask))


def _each(connection: Connection, *looks: Look) -> Iterator[Finding]:
    """What each look finds; one that fails is a finding itself, and keeps no other from being taken."""
    for look in looks:
        try:
            yield from look(connection)
        except psycopg.Error as error:
            name = getattr(look, "func", look).__name__.strip("_").replace("_", " ")
            yield Finding("fail", f"{name}: {_line(error)}")


def _has_schema(connection: Connection) -> bool:
    try:
        return _one(connection, "select to_regclass('pgshelf.installation')") != (None,)
    except psycopg.Error:  # the look at the schema has said so
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _one(connection: Connection, statement: str, *parameters: Any) -> tuple[Any, ...] | None:
    return connection.execute(statement.encode(), parameters).fetchone()


def _setting(connection: Connection, name: str) -> str:
    row = _one(connection, "select current_setting(%s)", name)
    return str(row[0]) if row else ""


def _server(connection: Connection) -> Iterator[Finding]:
    version = connection.info.server_version // 10000
    level: Literal["ok", "fail"] = "ok" if 16 <= version <= 18 else "fail"
    todo = "" if level == "ok" else "; pgshelf is made for 16 to 18"
    yield Finding(level, f"PostgreSQL {_setting(connection, 'server_version')}{todo}")
    if _setting(connection, "server_encoding") != "UTF8":
        yield Finding("fail", "the database is not encoded in UTF8; create one that is")
    if (_one(connection, "select pg_is_in_recovery()") or (False,))[0]:
        yield Finding("warn", "the server is a standby: it answers searches and takes no writes")


def _encryption(connection: Connection) -> Iterator[Finding]:
    # of a Unix socket there is no address; pg_stat_ssl would not do, for a proxy may hold the certificate
    if connection.pgconn.ssl_in_use:
        yield Finding("ok", "the connection is encrypted")
    elif connection.info.host and not (
        connection.info.host.startswith(("/", "@")) or is_loopback(connection.info.host)
    ):
        yield Finding(
            "warn", "the connection is not encrypted: set sslmode=verify-full and sslrootcert in PGSHELF_DATABASE_URL"
        )


def _extension(connection: Connection) -> Iterator[Finding]:
    row = _one(connection, "select extversion from pg_extension where extname = 'vector'")
    if row is None:
        yield Finding(
            "fail", "pgvector is not installed here: create extension vector (pgshelf migrate does it where it may)"
        )
        return
    version = tuple(int(part) for part in row[0].split(".")[:3])
    if version < (0, 8, 0):
        yield Finding(
            "fail", f"pgvector {row[0]} is too old; install 0.8.0 or newer, then: alter extension vector update"
        )
    elif version < (0, 8, 6):
        yield Finding(
            "warn", f"pgvector {row[0]} works; 0.8.6 or newer repairs links that older ones lose after vacuum"
        )
    else:
        yield Finding("ok", f"pgvector {row[0]}")


def _schema(connection: Connection) -> Iterator[Finding]:
    revision, fingerprint = health.expected()
    if _one(connection, "select to_regclass('pgshelf.installation')") == (None,):
        yield Finding("fail", "the schema pgshelf is missing; run pgshelf migrate")
        return
    row = _one(connection, health.INSTALLED)
    found = row[:2] if row else ()
    if found == (revision, fingerprint):
        yield Finding("ok", f"the schema is at revision {revision}, with the functions of this version")
    else:
        yield Finding(
            "fail", f"the schema is not that of this version (wanted revision {revision}); run pgshelf migrate"
        )


RIGHTS = """
select session_user::text, r.rolsuper, r.rolbypassrls, o.rolname, pg_has_role(session_user, o.oid, 'usage'),
  pg_has_role(session_user, o.oid, 'set'),
  coalesce(pg_has_role(session_user, to_regrole('pgshelf_service'), 'usage'), false),
  coalesce(pg_has_role(session_user, to_regrole('pgshelf_worker'), 'member'), false)
from pg_roles r, pg_class c join pg_namespace n on n.oid = c.relnamespace and n.nspname = 'pgshelf'
join pg_roles o on o.oid = c.relowner where r.rolname = session_user and c.relname = 'chunks'
"""
# Whoever was granted a table itself: row security guards those, and nothing guards a shelf.
BY_HAND = """
select c.oid::regclass::text, coalesce(r.rolname, 'public'), c.relname ~ '^chunks_s' from pg_class c
cross join lateral aclexplode(c.relacl) a left join pg_roles r on r.oid = a.grantee
where c.relnamespace = 'pgshelf'::regnamespace and c.relkind in ('r', 'p') and a.grantee <> c.relowner
  and (a.grantee is distinct from to_regrole('pgshelf_service')::oid or c.relname ~ '^chunks_s')
group by 1, 2, 3 order by 1, 2
"""
LOST = """
select distinct g.role from pgshelf.grants g where to_regrole(quote_ident(g.role)) is null order by 1
"""
SPARE = 10  # connections that are left to others
OTHERS = ("pgshelf_reader", "pgshelf_writer", "pgshelf_monitor", "pgshelf_service", "pgshelf_worker")


def forbidden(url: str, *, builds: bool = False) -> str | None:
    """What the role lacks to serve or, with `builds`, to work behind a service; None where nobody can tell yet."""
    try:
        with connections.connect(url, "doctor") as connection:
            found = _one(connection, RIGHTS)
    except psycopg.Error:
        return None
    if found is None:
        return None
    role, _, _, owner, owns, may_own, serves, works = found
    if owns or serves or (builds and may_own):
        return None
    if not builds:
        return _may_not_serve(role)
    return (
        _may_not_own(role, owner)
        if works
        else f"the role {role} is no worker: a DBA runs grant pgshelf_worker to {role}"
    )


def _may_not_serve(role: str) -> str:
    return f"the role {role} may not serve: a DBA runs grant pgshelf_service to {role}"


def _may_not_own(role: str, owner: str) -> str:
    todo = f"grant {owner} to pgshelf_worker with inherit false, set true"
    return f"the role {role} is one for pgshelf worker, and may not become the owner yet: a DBA runs {todo}"


def _rights(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """What the role that connects may do: too little, enough, too much."""
    found = _one(connection, RIGHTS)
    if found is None:
        return
    role, superuser, bypasses, owner, owns, may_own, serves, works = found
    if superuser or bypasses:
        what = "a superuser" if superuser else "above row security (BYPASSRLS)"
        if settings.database_url is not None:  # the bundled PostgreSQL has no other
            yield Finding("warn", f"the role {role} is {what}, more than pgshelf needs: see docs/deployment.md")
    if superuser:
        return
    if owns:
        yield Finding("ok", f"the role {role} has the rights of the owner: it may migrate, serve and build")
    elif may_own:
        yield Finding("ok", f"the role {role} may become the owner, {owner}: it is one for pgshelf worker")
    elif serves:
        yield Finding("ok", f"the role {role} may serve; indexes are built by pgshelf worker, as a member of {owner}")
        if not (_one(connection, "select pgshelf.granted(null, 'write')") or (False,))[0]:
            yield Finding("warn", f"the role {role} was not granted all libraries: its service sees only some")
    else:
        yield Finding("fail", _may_not_own(role, owner) if works else _may_not_serve(role))


def _become_owner(connection: Connection) -> Iterator[Finding]:
    """As a worker does, who sees nothing before."""
    connection.execute(pools.BECOME_OWNER)
    return iter(())


def _beyond(connection: Connection) -> Iterator[Finding]:
    """Rights that somebody has beside the grants."""
    for table, role, shelf in connection.execute(BY_HAND.encode()):
        why = "a shelf, where nothing hides a library" if shelf else "a table; views and functions are what is meant"
        yield Finding("warn", f"the role {role} was granted {why}: revoke all on {table} from {role}")
    above = "select rolname from pg_roles where rolname = any (%s) and (rolsuper or rolbypassrls) order by 1"
    for (role,) in connection.execute(above.encode(), [list(OTHERS)]):
        yield Finding("warn", f"the role {role} is above row security, and so are its members: alter role {role}")
    if (_one(connection, "select has_table_privilege('pgshelf.grants', 'select')") or (False,))[0]:
        for (role,) in connection.execute(LOST.encode()):
            text = f"the role {role} is gone, its grants are not: select pgshelf.revoke_library('{role}', '*')"
            yield Finding("warn", text)


def _roles(connection: Connection) -> Iterator[Finding]:
    for role in OTHERS:
        if _one(connection, "select 1 from pg_roles where rolname = %s", role) is None:
            yield Finding(
                "warn", f"the role {role} is missing: a DBA runs create role {role} nologin, then pgshelf migrate"
            )
        elif not (_one(connection, "select has_schema_privilege(%s, 'pgshelf', 'usage')", role) or (False,))[0]:
            yield Finding("warn", f"the role {role} has no grants here; run pgshelf migrate")
        else:
            yield Finding("ok", f"role {role}")


def _indexes(connection: Connection) -> Iterator[Finding]:
    rows = connection.execute(
        "select i.indexrelid::regclass::text from pg_index i join pg_class c on c.oid = i.indexrelid"
        " join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'pgshelf' and not i.indisvalid"
        # one that is being built is not valid yet
        " and not exists (select from pg_locks k join pg_database b on b.oid = k.database"
        "   where b.datname = current_database() and k.relation = i.indrelid"
        "   and k.mode = 'ShareUpdateExclusiveLock' and k.granted)"
    ).fetchall()
    for (name,) in rows:
        yield Finding("fail", f"the index {name} is invalid; run: reindex index concurrently {name}")
    if not rows:
        yield Finding("ok", "all indexes are valid")


def _pending(connection: Connection) -> Iterator[Finding]:
    row = _one(
        connection, "select count(*), count(*) filter (where failed), max(error) from pgshelf.pending_embeddings"
    )
    waiting, failed, error = row or (0, 0, None)
    if failed:
        yield Finding("warn", f"{failed} chunks could not be embedded, the last reason: {error}")
    yield Finding("ok", f"{waiting - failed} chunks wait for their vectors")


def _replication(connection: Connection) -> Iterator[Finding]:
    followers = connection.execute(
        "select name, health, lag_bytes, retained_bytes, visible from pgshelf.replication() where role <> 'primary'"
    ).fetchall()
    for name, condition, lag, retained, _ in followers:
        if condition == "disconnected":
            kept = f" and keeps {retained} bytes of WAL on this server; drop its slot if it is gone" if retained else ""
            yield Finding("warn", f"the replica {name} is not connected{kept}")
        elif condition is not None:
            yield Finding("ok" if condition == "healthy" else "warn", f"the replica {name} is {lag} bytes behind")
    if followers and not followers[0][-1]:
        user = connection.info.user
        yield Finding("warn", f"{user} does not see how far replicas are; a superuser runs: grant pg_monitor to {user}")
    row = _one(
        connection,
        "select last_failed_wal, last_failed_time from pg_stat_archiver where last_failed_time > coalesce"
        "(last_archived_time, '-infinity')",
    )
    if row is not None:
        text = f"WAL is not archived: {row[0]} failed at {row[1]:%Y-%m-%d %H:%M}; it stays on the server until it is"
        yield Finding("warn", f"{text}. The server's log says why")


def _parameters(connection: Connection) -> Iterator[Finding]:
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        if _setting(connection, name) == "off":
            yield Finding("warn", f"{name} is off: acknowledged writes can be lost when the machine fails")
    for name, reason in (
        ("autovacuum", "dead rows stay in the indexes, and searches get slower and worse"),
        ("track_counts", "how large libraries are is not known, so none gets an index by itself"),
    ):
        if _setting(connection, name) == "off":
            yield Finding("fail", f"{name} is off: {reason}")
    if _setting(connection, "default_transaction_read_only") == "on":
        yield Finding("fail", "default_transaction_read_only is on: nothing can be written")
    if int(_setting(connection, "max_locks_per_transaction")) < 128:
        yield Finding(
            "warn", "max_locks_per_transaction is below 128; raise it before there are thousands of libraries"
        )


def _connections(connection: Connection, settings: Settings) -> Iterator[Finding]:
    each, allowed = connections.most(settings), int(_setting(connection, "max_connections"))
    wanted = settings.workers * each
    how = f"{settings.workers} processes x {each}: PGSHELF_POOL_SIZE and {each - settings.pool_size} beside it"
    if wanted > allowed - SPARE:
        text = f"serve may open {wanted} connections ({how}) and the server allows {allowed}"
        yield Finding("warn", f"{text}: lower PGSHELF_POOL_SIZE, or raise max_connections")
        return
    yield Finding("ok", f"serve opens up to {wanted} connections ({how})")


def _default_embedder(settings: Settings, ask: bool) -> Iterator[Finding]:
    """The embedder of libraries that will name none."""
    provider, model, dimension = settings.default_embedder, settings.embedder_model, settings.embedder_dimension
    if provider != "none":
        yield _embedder(settings, "by default", {"provider": provider, "model": model, "dimension": dimension}, ask)


def _embedders(connection: Connection, settings: Settings, ask: bool) -> Iterator[Finding]:
    """The embedders that libraries have."""
    used = "select embedder, count(*) from pgshelf.libraries where deleted_at is null group by 1 order by 2 desc, 1"
    for choice, count in connection.execute(used.encode()):
        if choice["provider"] != "none":
            yield _embedder(settings, f"of {count} {'library' if count == 1 else 'libraries'}", choice, ask)


def _embedder(settings: Settings, whose: str, choice: dict[str, Any], ask: bool) -> Finding:
    model = f" {choice['model']}" if choice.get("model") else ""
    size = f" ({choice['dimension']} dimensions)" if choice.get("dimension") else ""
    name = f"the embedder {whose}, {choice['provider']}{model}{size}"
    try:
        if choice["provider"] in ("openai", "sentence_transformers") and not ask:
            choice = {**choice, "dimension": choice.get("dimension") or 1}  # which only asking would tell
        if not ask:
            embedder_for(settings, choice)
            return Finding("ok", f"{name}, is set up")
        started = time.perf_counter()
        asyncio.run(_one_vector(settings, choice))
    except ValueError as error:
        return Finding("warn", f"{name}, cannot be used: {error}")
    except EmbedderError as error:
        return Finding("fail", f"{name}, does not work: {error}")
    return Finding("ok", f"{name}, answered in {(time.perf_counter() - started) * 1000:.0f} ms")


async def _one_vector(settings: Settings, choice: dict[str, Any]) -> None:
    made = embedder_for(settings, choice) if choice.get("dimension") else await settled(settings, choice)
    try:
        await made.embed(["text"], "query")
    finally:
        await providers.close()
