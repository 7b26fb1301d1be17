"""What pg_upgrade refuses to carry over must not be in our tables."""

from __future__ import annotations

import psycopg

# From PostgreSQL's documentation of pg_upgrade: types that hold system OIDs, which are not preserved.
REFUSED = [
    "regcollation",
    "regconfig",
    "regdictionary",
    "regnamespace",
    "regoper",
    "regoperator",
    "regproc",
    "regprocedure",
]
COLUMNS = """
select attrelid::regclass || '.' || attname from pg_attribute a join pg_class c on c.oid = a.attrelid
where c.relkind in ('r', 'p', 'm') and c.relnamespace = %s::regnamespace and not a.attisdropped
  and a.atttypid = any (%s::text[]::regtype[])
"""


def test_no_column_is_of_a_type_that_pg_upgrade_refuses(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        assert connection.execute(COLUMNS, ["pgshelf", REFUSED]).fetchall() == []
        connection.execute("create table public.probe (language regconfig)")
        assert connection.execute(COLUMNS, ["public", REFUSED]).fetchall() == [("probe.language",)]
