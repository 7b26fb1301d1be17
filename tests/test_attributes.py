"""Declared attributes: complete when they are ready, whoever writes meanwhile and whatever is killed."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg import errors
from psycopg.types.json import Jsonb

from tests.rest.asking import at, document, library, ok, problem, until

pytestmark = pytest.mark.unwatched

Connection = psycopg.Connection[Any]
LIBRARY = uuid.UUID(int=1)
Open = Callable[[], Connection]
# what attribute_values must hold, computed from the documents
WANTED = """
select d.id, a.key, r.num, r.txt, r.ts, r.exact from pgshelf.libraries l
join pgshelf.documents d on d.library_id = l.id cross join lateral jsonb_each_text(l.attributes) a
cross join lateral pgshelf.attribute_row(d.metadata, a.key, a.value) r
where r.exact is not null"""
HELD = "select v.document_id, v.attribute, v.num, v.txt, v.ts, v.exact from pgshelf.attribute_values v"


@pytest.fixture
def open_connection(database_url: str) -> Iterator[Open]:
    opened: list[Connection] = []

    def connect() -> Connection:
        opened.append(psycopg.connect(database_url, autocommit=True))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def connection(open_connection: Open) -> Connection:
    """An owner's connection to a database with one library and 25 documents."""
    opened = open_connection()
    opened.execute(
        "insert into pgshelf.libraries (id, name, dimension, embedder, chunking)"
        " values (%s, 'shelf', 2, '{\"provider\": \"none\", \"dimension\": 2}', '{}')",
        [LIBRARY],
    )
    for number in range(25):
        put(opened, number, {"year": number, "lang": f"l{number % 3}", "at": {"day": f"2020-01-{number + 1:02}"}})
    return opened


def put(connection: Connection, number: int, metadata: dict[str, Any]) -> None:
    connection.execute(
        "insert into pgshelf.documents (place, library_id, key, metadata) values (0, %s, %s, %s)"
        " on conflict (library_id, key) do update set metadata = excluded.metadata",
        [LIBRARY, f"k{number}", Jsonb(metadata)],
    )


def declare(connection: Connection, attributes: dict[str, str]) -> None:
    connection.execute("select pgshelf.declare_attributes(%s, %s)", [LIBRARY, Jsonb(attributes)])


def fill(connection: Connection, limit: int = 10) -> int:
    """What the worker does until there is nothing to do; tells how many steps it took."""
    for steps in range(1000):
        if not one(connection, "select pgshelf.fill_attributes(%s)", limit):
            return steps
    raise AssertionError("filling does not come to an end")


def one(connection: Connection, statement: str, *parameters: Any) -> Any:
    row = connection.execute(statement.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def ready(connection: Connection) -> Any:
    return one(connection, "select attributes_ready from pgshelf.libraries")


def complete(connection: Connection) -> bool:
    """Whether the side table holds what the documents say, no more and no less."""
    held, wanted = connection.execute(HELD).fetchall(), connection.execute(WANTED).fetchall()
    return sorted(held, key=repr) == sorted(wanted, key=repr) and len(held) > 0


def test_declared_attributes_are_filled_and_ready(connection: Connection) -> None:
    attributes = {"year": "number", "lang": "text", "at.day": "datetime"}
    declare(connection, attributes)
    assert ready(connection) == {}
    assert fill(connection) == 4  # the fence, then 10, 10 and 5 documents
    assert ready(connection) == attributes and complete(connection)
    assert one(connection, "select count(*) from pgshelf.attribute_values") == 75
    assert fill(connection) == 0


def test_a_batch_that_ends_with_the_documents_ends_the_work(connection: Connection) -> None:
    declare(connection, {"year": "number"})
    assert fill(connection, 5) == 7  # the fence, five batches, and one that finds nothing left
    assert ready(connection) == {"year": "number"} and complete(connection)


def test_writing_deleting_and_changing_keep_them(connection: Connection) -> None:
    declare(connection, {"year": "number"})
    fill(connection)
    put(connection, 3, {"year": 2000})
    put(connection, 4, {"year": "no number"})
    put(connection, 100, {"year": 1.5})
    connection.execute("update pgshelf.documents set metadata = '{}' where key = 'k5'")
    connection.execute("update pgshelf.documents set version = version + 1")
    connection.execute("delete from pgshelf.documents where key in ('k6', 'k7')")
    assert complete(connection)
    assert one(connection, "select count(*) from pgshelf.attribute_values") == 23
    assert one(connection, "select count(*) from pgshelf.attribute_values v where not v.exact") == 1  # "no number"


def test_an_attribute_that_goes_or_changes_its_type_is_not_ready_at_once(connection: Connection) -> None:
    declare(connection, {"year": "number", "lang": "text"})
    fill(connection)
    declare(connection, {"year": "text", "lang": "text"})
    assert ready(connection) == {"lang": "text"}
    put(connection, 1, {"year": "then", "lang": "xx"})
    fill(connection)
    assert ready(connection) == {"year": "text", "lang": "text"} and complete(connection)
    declare(connection, {"lang": "text"})
    assert ready(connection) == {"lang": "text"}
    put(connection, 2, {"year": "lost", "lang": "yy"})  # year is kept no longer
    declare(connection, {"lang": "text", "year": "text"})
    assert ready(connection) == {"lang": "text"}
    fill(connection)
    assert ready(connection) == {"year": "text", "lang": "text"} and complete(connection)
    declare(connection, {})
    fill(connection)
    assert ready(connection) == {} and one(connection, "select count(*) from pgshelf.attribute_values") == 0


def test_declaring_the_same_again_changes_nothing(connection: Connection) -> None:
    declare(connection, {"year": "number"})
    fill(connection)
    declare(connection, {"year": "number"})
    assert ready(connection) == {"year": "number"} and fill(connection) == 0


def test_new_wishes_while_it_is_filled_start_over(connection: Connection) -> None:
    declare(connection, {"year": "number"})
    for _ in range(2):
        assert one(connection, "select pgshelf.fill_attributes(10)")
    declare(connection, {"year": "number", "lang": "text"})
    fill(connection)
    assert ready(connection) == {"year": "number", "lang": "text"} and complete(connection)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ([], "attributes are an object"),
        (None, "attributes are an object"),
        ({f"a{number}": "text" for number in range(33)}, "more than 32 attributes"),
        ({"": "text"}, "1 to 200 characters"),
        ({"x" * 201: "text"}, "1 to 200 characters"),
        ({"$title": "text"}, "does not begin with"),
        ({"chunk.page": "number"}, "does not begin with"),
        ({".".join("a" * 33): "text"}, "1 to 200 characters"),
        ({"a": "integer"}, "there is no type integer"),
        ({"a": None}, "there is no type"),
        ({"a": {"type": "text"}}, "there is no type"),
    ],
    ids=str,
)
def test_what_cannot_be_declared_is_refused(connection: Connection, attributes: Any, message: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        declare(connection, attributes)
    assert caught.value.sqlstate == "PS030" and message in str(caught.value.diag.message_primary)


@contextmanager
def blocked(watcher: Connection, work: Callable[[], None], holder: Connection) -> Iterator[None]:
    """Start `work` in a thread and see it wait for `holder`; after the block it must come to its end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        waiting = "select exists (select from pg_stat_activity a where %s = any (pg_blocking_pids(a.pid)))"
        while not one(watcher, waiting, holder.info.backend_pid):
            assert thread.is_alive(), "nothing was waited for"
        yield
    finally:
        holder.rollback()
        thread.join(20)
        assert not thread.is_alive() and not failed, failed


def test_the_fence_waits_for_a_writer_who_read_the_old_attributes(
    connection: Connection, open_connection: Open
) -> None:
    writer = open_connection()
    with writer.transaction():
        put(writer, 200, {"year": 200})  # nothing is declared yet
        declare(connection, {"year": "number"})
        assert not one(connection, "select pgshelf.fill_attributes(100)")  # in vain, and without waiting for long
        assert not one(connection, "select pgshelf.fill_attributes(100)")
        assert ready(connection) == {}
    fill(connection)
    assert complete(connection) and one(connection, "select count(*) from pgshelf.attribute_values") == 26


def test_filling_waits_for_a_writer_and_writes_what_he_wrote(connection: Connection, open_connection: Open) -> None:
    writer, filler = open_connection(), open_connection()
    declare(connection, {"year": "number"})
    assert one(connection, "select pgshelf.fill_attributes(100)")  # the fence
    writer.autocommit = False
    writer.execute("update pgshelf.documents set metadata = '{\"year\": 4000}' where key = 'k7'")
    failed: list[bool] = []
    thread = threading.Thread(target=lambda: failed.append(one(filler, "select pgshelf.fill_attributes(100)")))
    thread.start()
    waiting = "select exists (select from pg_stat_activity a where %s = any (pg_blocking_pids(a.pid)))"
    while not one(connection, waiting, writer.info.backend_pid):
        assert thread.is_alive(), "filling does not wait for the writer"
    writer.commit()
    thread.join(20)
    assert failed == [True] and complete(connection)
    assert one(connection, "select num from pgshelf.attribute_values where num = 4000") == 4000


def test_a_writer_waits_for_the_batch_that_read_his_document(connection: Connection, open_connection: Open) -> None:
    filler, writer = open_connection(), open_connection()
    declare(connection, {"year": "number"})
    assert one(connection, "select pgshelf.fill_attributes(100)")
    filler.autocommit = False
    filler.execute("select pgshelf.fill_attributes(100)")

    def write() -> None:
        writer.execute("update pgshelf.documents set metadata = '{\"year\": 4000}' where key = 'k7'")

    with blocked(connection, write, filler):
        filler.commit()
    assert complete(connection) and ready(connection) == {"year": "number"}


def test_an_old_snapshot_cannot_write_past_a_declaration(connection: Connection, open_connection: Open) -> None:
    writer = open_connection()
    writer.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with pytest.raises(errors.SerializationFailure), writer.transaction():
        writer.execute("select count(*) from pgshelf.documents")  # the snapshot is taken
        declare(connection, {"year": "number"})
        fill(connection)
        put(writer, 300, {"year": 300})
    assert complete(connection)
    with writer.transaction():
        put(writer, 300, {"year": 300})
    assert complete(connection)


def test_two_workers_share_the_work(connection: Connection, open_connection: Open) -> None:
    other = open_connection()
    declare(connection, {"year": "number"})
    assert one(connection, "select pgshelf.fill_attributes(10)")
    other.autocommit = False
    assert other.execute("select pgshelf.fill_attributes(10)").fetchone() == (True,)
    assert not one(connection, "select pgshelf.fill_attributes(10)")  # the other one is at it
    other.rollback()
    fill(connection)
    assert complete(connection)


@pytest.mark.parametrize("seed", range(3))
def test_writers_and_killed_workers_at_the_same_time(connection: Connection, open_connection: Open, seed: int) -> None:
    """Four writers, declarations that change, and a worker whose session is ended in the middle, over and over."""
    ending, failed = threading.Event(), list[BaseException]()

    def write(number: int, opened: Connection) -> None:
        rng = random.Random(seed * 100 + number)
        try:
            while not ending.is_set():
                key = rng.randrange(60)
                with opened.transaction():
                    if rng.random() < 0.2:
                        opened.execute("delete from pgshelf.documents where key = %s", [f"k{key}"])
                    else:
                        put(opened, key, {"year": rng.randrange(9), "lang": rng.choice(["a", 5, None])})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number, open_connection())) for number in range(4)]
    for thread in threads:
        thread.start()
    rng = random.Random(seed)
    try:
        for wish in (
            {"year": "number"},
            {"year": "text", "lang": "text"},
            {"lang": "text"},
            {"year": "number", "lang": "text"},
        ):
            declare(connection, wish)
            for _ in range(4):
                worker = open_connection()
                for _ in range(rng.randrange(3)):
                    worker.execute("select pgshelf.fill_attributes(%s)", [rng.randrange(1, 20)])
                worker.autocommit = False
                worker.execute("select pgshelf.fill_attributes(%s)", [rng.randrange(1, 20)])
                connection.execute("select pg_terminate_backend(%s)", [worker.info.backend_pid])
            for _ in range(2000):
                one(connection, "select pgshelf.fill_attributes(7)")
                if one(connection, "select attributes_filling is null from pgshelf.libraries"):
                    break
            with connection.transaction():
                connection.execute("set transaction isolation level repeatable read")
                assert ready(connection) == wish and complete(connection)
    finally:
        ending.set()
        for thread in threads:
            thread.join(20)
    assert not failed, failed


async def test_the_worker_makes_declared_attributes_ready(client: httpx2.AsyncClient) -> None:
    made = await library(client, attributes={"lang": "text"})
    assert made["attributes"] == made["attributes_ready"] == {"lang": "text"}
    await document(client, "a", metadata={"year": 2020, "lang": "en"})
    changed = ok(await client.patch(at("libraries", "shelf"), json={"attributes": {"lang": "text", "year": "number"}}))
    assert changed["attributes"] == {"lang": "text", "year": "number"} and changed["version"] == 2
    assert changed["attributes_ready"] == {"lang": "text"}

    async def done() -> bool:
        now = ok(await client.get(at("libraries", "shelf")))
        return bool(now["attributes_ready"] == now["attributes"])

    await until(done)
    nothings: list[dict[str, str] | None] = [None, {}]
    for nothing in nothings:
        changed = ok(await client.patch(at("libraries", "shelf"), json={"attributes": nothing}))
        assert changed["attributes"] == changed["attributes_ready"] == {}


@pytest.mark.parametrize(
    "attributes",
    [
        {"a": "integer"},
        {"$title": "text"},
        {"chunk.a": "text"},
        {"": "text"},
        {f"a{n}": "text" for n in range(33)},
        ["a"],
    ],
    ids=str,
)
async def test_attributes_that_cannot_be_are_refused_over_rest(client: httpx2.AsyncClient, attributes: Any) -> None:
    body = {"name": "x", "embedder": {"provider": "none"}, "dimension": 3, "attributes": attributes}
    problem(await client.post("/v1/libraries", json=body), 400, "validation_failed")
    await library(client)
    answer = await client.patch(at("libraries", "shelf"), json={"attributes": attributes, "name": "other"})
    problem(answer, 400, "validation_failed")
    ok(await client.get(at("libraries", "shelf")))
