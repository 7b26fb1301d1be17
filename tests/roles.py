"""Logins with the least rights, for tests: what `docs/deployment.md` has a DBA make."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import conninfo, sql

Login = Callable[..., str]


@contextmanager
def logins(url: str, vector_schema: str) -> Iterator[Login]:
    """Makes logins that are members of roles, and gives the database's address as each: login("pgshelf_service")."""
    made: list[sql.Identifier] = []
    with psycopg.connect(url, autocommit=True) as admin:

        def login(*roles: str, libraries: dict[str, str] | None = None, options: str = "") -> str:
            name = f"test_{uuid.uuid4().hex[:12]}"
            role = sql.Identifier(name)
            admin.execute(sql.SQL("create role {} login password 'secret' " + options).format(role))
            made.append(role)
            for each in roles:
                admin.execute(sql.SQL("grant {} to {}").format(sql.Identifier(each), role))
            admin.execute(sql.SQL("grant usage on schema {} to {}").format(sql.Identifier(vector_schema), role))
            for library, access in (libraries or {}).items():
                admin.execute("select pgshelf.grant_library(%s, %s, %s)", [name, library, access])
            return conninfo.make_conninfo(url, user=name, password="secret")

        try:
            yield login
        finally:
            for role in made:
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where usename = %s",
                    [role.as_string().strip('"')],
                )
                admin.execute(sql.SQL("drop owned by {}").format(role))
                admin.execute(sql.SQL("drop role {}").format(role))


def ask(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """The rows of one statement, as the login of an address."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []
