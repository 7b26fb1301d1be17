"""Integrity under concurrency: sessions that really block each other, and a library on its way to another shelf."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.postgres import Databases

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

SHELVES = itertools.count(1)
FENCE_LOCK = "select pg_advisory_xact_lock(x'6c6962'::int, hashtext(%s))"
FENCE_ROW = "select 1 from pgshelf.libraries where id = %s for update"


class Session:
    """A connection with a thread of its own, so that a test can watch it wait."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self._thread = ThreadPoolExecutor(1)

    def do(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *parameters: Any) -> Any:
        return self.do(statement, *parameters)[0][0]

    def later(self, statement: str, *parameters: Any) -> Future[list[tuple[Any, ...]]]:
        return self._thread.submit(self.do, statement, *parameters)

    def close(self) -> None:
        self.connection.close()
        self._thread.shutdown()


MakeSession = Callable[[], Session]


@pytest.fixture
def session(shared_database_url: str) -> Iterator[MakeSession]:
    """Opens sessions, all closed at the end."""
    made: list[Session] = []

    def open_session() -> Session:
        made.append(Session(shared_database_url))
        return made[-1]

    yield open_session
    for one in made:
        one.connection.cancel_safe()
    for one in made:
        one.close()


@pytest.fixture
def main(session: MakeSession) -> Session:
    return session()


def blocked(watcher: Session, waiter: Session, answer: Future[Any], seconds: float = 10) -> None:
    """Wait until a session waits for a lock; fails when it is done instead."""
    deadline = time.monotonic() + seconds
    statement = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
    while not watcher.one(statement, waiter.connection.info.backend_pid):
        assert not answer.done(), f"it did not wait: {answer.exception() or answer.result()}"
        assert time.monotonic() < deadline, "it neither waits nor ends"
        time.sleep(0.005)


class Library:
    """A library of two dimensions with one document `k`: three chunks, the last of them pending."""

    def __init__(self, owner: Session) -> None:
        self.owner = owner
        self.name = f"lib {uuid.uuid4().hex[:12]}"
        self.id = owner.one(
            "insert into pgshelf.libraries (name, dimension, embedder, chunking) values (%s, 2, %s, '{}') returning id",
            self.name,
            Jsonb({"provider": "local", "dimension": 2}),
        )
        self.document = self.put(owner)
        self.chunks = self.rows("id")

    def put(
        self, by: Session, key: str = "k", texts: str = "{a,b,c}", embeddings: str = '{"[1,0]","[0,1]",null}'
    ) -> Any:
        return by.one(PUT, self.name, key, texts, embeddings)

    def rows(self, columns: str = "*", shelf: int = 0) -> list[Any]:
        statement = f"select {columns} from pgshelf.chunks_s{shelf} where library_id = %s order by document_id, ordinal"
        found = self.owner.do(statement, self.id)
        return [row[0] for row in found] if columns == "id" else found

    def orphans(self) -> int:
        return int(
            self.owner.one(
                "select count(*) from pgshelf.chunks c where c.library_id = %s"
                " and not exists (select 1 from pgshelf.documents d where d.id = c.document_id)",
                self.id,
            )
        )

    def writers(self) -> dict[str, tuple[str, tuple[Any, ...]]]:
        """Every way to write chunks, by name: a statement and its parameters."""
        a, b, c = self.chunks
        return {
            "put_document": (PUT, (self.name, "k", "{a,x}", '{"[1,0]","[1,1]"}')),
            "patch_chunk": ("select pgshelf.patch_chunk(%s, %s, 'new', '[2,1]', null)", (self.id, a)),
            "delete_chunk": ("select pgshelf.delete_chunk(%s, %s)", (self.id, b)),
            "store_embeddings": (STORE, (self.id, [c], [digest("c")], '{"[1,2]"}')),
            "fail_embeddings": (FAIL, (self.id, [c], [digest("c")])),
            "delete_document": ("select pgshelf.delete_document(%s, 'k')", (self.name,)),
        }


PUT = "select pgshelf.put_document(%s, %s, texts => %s, embeddings => %s)"
STORE = "select pgshelf.store_embeddings(%s, %s, %s, %s)"
INSERT = """insert into pgshelf.chunks (shelf, place, library_id, document_id, ordinal, text, embedding, language)
values (%s, 1, %s, %s, %s, 'text', %s, 'english')"""
FAIL = "select pgshelf.fail_embeddings(%s, %s, %s, 'no', array[null]::float8[], true)"
KEEPERS = ["put_document", "patch_chunk", "delete_chunk", "store_embeddings", "fail_embeddings"]
WRITERS = [*KEEPERS, "delete_document"]


def digest(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


@pytest.fixture
def library(main: Session) -> Library:
    return Library(main)


def add_shelf(owner: Session) -> int:
    """Make a shelf as a promotion does: detached, with its check, then attached."""
    shelf = next(SHELVES)
    owner.do(
        f"""create table pgshelf.chunks_s{shelf} (like pgshelf.chunks including defaults including storage
        including generated including constraints, constraint chunks_s{shelf}_shelf check (shelf = {shelf}))"""
    )
    key = "library_id, document_id, ordinal, place, shelf"
    owner.do(f"alter table pgshelf.chunks_s{shelf} add constraint chunks_s{shelf}_pkey primary key ({key})")
    owner.do(f"alter table pgshelf.chunks attach partition pgshelf.chunks_s{shelf} for values in ({shelf})")
    return shelf


COPIED = "place, library_id, document_id, ordinal, id, text, metadata, embedding, language, embed_attempts, embed_after"


def copy(library: Library, shelf: int, by: Session | None = None) -> None:
    statement = f"insert into pgshelf.chunks_s{shelf} (shelf, {COPIED}) select {shelf}, {COPIED} from pgshelf.chunks_s0"
    (by or library.owner).do(f"{statement} where library_id = %s", library.id)


def move(library: Library, moving: int, shelf: int | None) -> None:
    library.owner.do(
        "update pgshelf.libraries set moving = %s, moving_to = %s where id = %s", moving, shelf, library.id
    )


# -- rules that no way around the functions breaks


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("promoted", [False, True])
def test_a_chunk_needs_its_document(main: Session, library: Library, elsewhere: bool, promoted: bool) -> None:
    document = Library(main).document if elsewhere else uuid.uuid4()
    shelf = add_shelf(main) if promoted else 0
    with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught:
        main.do(INSERT, shelf, library.id, document, 9, "[1,0]")
    assert caught.value.diag.constraint_name == "chunks_document"
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        main.do("update pgshelf.chunks set document_id = %s where id = %s", document, library.chunks[0])
    assert library.rows("id", 0) == library.chunks


@pytest.mark.parametrize(("wrong", "state"), [("[1,0,0]", "PS010"), ("[0,0]", "PS011"), ("[1e20,0]", "PS012")])
def test_a_vector_fits_its_library_whoever_writes_it(main: Session, library: Library, wrong: str, state: str) -> None:
    before = library.rows()
    for statement, parameters in (
        (INSERT, (0, library.id, library.document, 9, wrong)),
        ("update pgshelf.chunks set embedding = %s where id = %s", (wrong, library.chunks[0])),
        (STORE, (library.id, [library.chunks[2]], [digest("c")], f'{{"{wrong}"}}')),
        ("select pgshelf.patch_chunk(%s, %s, null, %s, null)", (library.id, library.chunks[0], wrong)),
    ):
        with pytest.raises(psycopg.Error) as caught:
            main.do(statement, *parameters)
        assert caught.value.sqlstate == state
    assert library.rows() == before


def test_a_deleted_document_takes_the_chunks_of_its_own_shelf(main: Session, library: Library) -> None:
    shelf, other = add_shelf(main), Library(main)
    copy(library, shelf)
    main.do("update pgshelf.libraries set shelf = %s where id = %s", shelf, library.id)
    main.do("delete from pgshelf.documents where id = any (%s)", [library.document, other.document])
    assert library.rows(shelf=shelf) == other.rows() == []
    # what the move left behind counts nowhere and is reaped by whoever moved the library
    assert len(library.rows(shelf=0)) == 3
    assert main.one("select count(*) from pgshelf.chunks_view where library = %s", library.name) == 0


@pytest.mark.parametrize(
    "deletion", ["delete from pgshelf.documents where id = %s", "select pgshelf.delete_document(%s, %s)"]
)
def test_a_deleted_document_takes_its_attributes(main: Session, library: Library, deletion: str) -> None:
    main.do("update pgshelf.libraries set attributes = %s where id = %s", Jsonb({"year": "number"}), library.id)
    others = Library(main), library.put(main, "other")
    for document in (library.document, others[1]):
        main.do("update pgshelf.documents set metadata = %s where id = %s", Jsonb({"year": 2024}), document)
    values = "select document_id, num from pgshelf.attribute_values where library_id = %s"
    assert sorted(main.do(values, library.id)) == sorted([(library.document, 2024), (others[1], 2024)])
    named = (library.document,) if deletion.startswith("delete") else (library.name, str(library.document))
    main.do(deletion, *named)
    assert main.do(values, library.id) == [(others[1], 2024)]


def test_there_is_no_shelf_for_chance_rows(main: Session, library: Library) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="no partition"):
        main.do(INSERT, 4711, library.id, library.document, 9, "[1,0]")


# -- deleters and writers


@pytest.mark.parametrize("moving", [0, 1, 2])
@pytest.mark.parametrize("writer", KEEPERS)
@pytest.mark.parametrize(
    "deletion", ["delete from pgshelf.documents where id = %s", "select pgshelf.delete_document(%s, %s)"]
)
def test_a_deleter_with_an_older_snapshot_fails(
    main: Session, session: MakeSession, library: Library, deletion: str, writer: str, moving: int
) -> None:
    deleter = session()
    if moving:
        shelf = add_shelf(main)
        copy(library, shelf)
        move(library, moving, shelf)
    deleter.do("begin isolation level repeatable read")
    deleter.do("select count(*) from pgshelf.documents")
    statement, parameters = library.writers()[writer]
    main.do(statement, *parameters)
    named = (library.document,) if deletion.startswith("delete") else (library.name, str(library.document))
    with pytest.raises(psycopg.errors.SerializationFailure):
        deleter.do(deletion, *named)
    deleter.do("rollback")
    assert library.orphans() == 0
    main.do("delete from pgshelf.documents where id = %s", library.document)
    if moving == 1:  # what was copied goes when the promoter comes to the document in the log
        assert library.rows() == []
        logged = main.do("select distinct document_id from pgshelf.move_log where library_id = %s", library.id)
        assert logged == [(library.document,)]
    else:
        assert main.one("select count(*) from pgshelf.chunks where library_id = %s", library.id) == 0


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_a_writer_waits_for_a_deleter_and_leaves_no_orphan(
    main: Session, session: MakeSession, library: Library, isolation: str, writer: str
) -> None:
    deleter, waiter = session(), session()
    deleter.do(f"begin isolation level {isolation}")
    deleter.do("delete from pgshelf.documents where id = %s", library.document)
    statement, parameters = library.writers()[writer]
    answer = waiter.later(statement, *parameters)
    blocked(main, waiter, answer)
    deleter.do("commit")
    if writer in ("patch_chunk", "delete_chunk"):
        with pytest.raises(psycopg.Error) as caught:
            answer.result(10)
        assert caught.value.sqlstate == "PS003"
    elif writer == "delete_document":
        with pytest.raises(psycopg.Error) as caught:
            answer.result(10)
        assert caught.value.sqlstate == "PS002"
    elif writer == "store_embeddings":
        assert answer.result(10) == [(0,)]
    else:
        answer.result(10)
    assert library.orphans() == 0
    texts = main.do("select text from pgshelf.chunks_view where library = %s order by ordinal", library.name)
    assert texts == ([("a",), ("x",)] if writer == "put_document" else [])


def test_a_deleter_waits_for_a_chunk_that_is_being_written(
    main: Session, session: MakeSession, library: Library
) -> None:
    writer, deleter = session(), session()
    writer.do("begin")
    writer.do(INSERT, 0, library.id, library.document, 9, "[1,0]")
    answer = deleter.later("delete from pgshelf.documents where id = %s", library.document)
    blocked(main, deleter, answer)
    writer.do("commit")
    answer.result(10)
    assert library.rows() == []


# -- writers and writers


@pytest.mark.parametrize("key", ["k", "new"])
def test_upserts_of_one_key_come_one_after_the_other(
    main: Session, session: MakeSession, library: Library, key: str
) -> None:
    first, second = session(), session()
    first.do("begin")
    document = library.put(first, key, "{a,b,1}", '{"[1,0]","[1,0]","[1,0]"}')
    answer = second.later(PUT, library.name, key, "{2,b}", '{"[0,1]",null}')
    blocked(main, second, answer)
    first.do("commit")
    assert answer.result(10) == [(document,)]
    rows = main.do(
        "select text, embedding::text from pgshelf.chunks_view where document_id = %s order by ordinal", document
    )
    assert rows == [("2", "[0,1]"), ("b", "[1,0]")]
    assert main.one("select version from pgshelf.documents where id = %s", document) == (3 if key == "k" else 2)


def test_an_upsert_behind_one_that_rolls_back_is_whole(main: Session, session: MakeSession, library: Library) -> None:
    first, second = session(), session()
    first.do("begin")
    library.put(first, "new", "{1,2,3}", '{"[1,0]","[1,0]","[1,0]"}')
    answer = second.later(PUT, library.name, "new", "{4}", '{"[0,1]"}')
    blocked(main, second, answer)
    first.do("rollback")
    [(document,)] = answer.result(10)
    assert main.do("select text from pgshelf.chunks_view where document_id = %s", document) == [("4",)]


def test_writers_of_different_documents_do_not_wait_for_each_other(
    main: Session, session: MakeSession, library: Library
) -> None:
    first, second = session(), session()
    first.do("begin")
    library.put(first)
    second.do("set lock_timeout = '2s'")
    library.put(second, "other")
    first.do("commit")


def test_many_writers_leave_every_document_whole(main: Session, session: MakeSession, library: Library) -> None:
    sessions = [session() for _ in range(4)]

    def write(number: int) -> None:
        chance = random.Random(number)
        for turn in range(30):
            size = chance.randrange(1, 5)
            texts = "{" + ",".join(f"{number}.{turn}.{size}" for _ in range(size)) + "}"
            vectors = "{" + ",".join(['"[1,1]"'] * size) + "}"
            library.put(sessions[number], f"k{chance.randrange(3)}", texts, vectors)
            if chance.random() < 0.1:
                sessions[number].do("delete from pgshelf.documents where library_id = %s and key = 'k1'", library.id)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(write, number) for number in range(4)]:
            done.result(60)
    found = main.do(
        "select key, array_agg(distinct text), array_agg(ordinal order by ordinal) from pgshelf.chunks_view v"
        " join pgshelf.documents d on d.id = v.document_id where v.library_id = %s and key ~ '^k.' group by key",
        library.id,
    )
    assert {"k0", "k2"} <= {key for key, _, _ in found}
    for _, texts, ordinals in found:
        assert len(texts) == 1  # of one writer
        assert ordinals == list(range(int(texts[0].split(".")[2])))  # all of it
    assert library.orphans() == 0


# -- the lock order: advisory lock of the library (shared), its row (for key share), the document


@pytest.mark.parametrize("fence", [(FENCE_LOCK, FENCE_ROW), (FENCE_LOCK,), (FENCE_ROW,)])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_fence_holds_every_writer_off(
    main: Session, session: MakeSession, library: Library, writer: str, fence: tuple[str, ...]
) -> None:
    statement, parameters = library.writers()[writer]
    promoter, waiter = session(), session()
    promoter.do("begin")
    for lock in fence:
        promoter.do(lock, str(library.id))
    answer = waiter.later(statement, *parameters)
    blocked(main, waiter, answer)
    # it waits with empty hands: its document is free, searches and other libraries go on
    main.do("select 1 from pgshelf.documents where id = %s for update nowait", library.document)
    assert len(main.do("select 1 from pgshelf.search(%s, '[1,0]')", library.name)) == 2
    Library(main)
    promoter.do("commit")
    answer.result(10)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_holds_the_fence_off_until_it_commits(
    main: Session, session: MakeSession, library: Library, writer: str
) -> None:
    holder = session()
    holder.do("begin")
    statement, parameters = library.writers()[writer]
    holder.do(statement, *parameters)
    locks = "select pg_try_advisory_xact_lock(x'6c6962'::int, hashtext(%s))"
    assert main.one(locks, str(library.id)) is False
    with pytest.raises(psycopg.errors.LockNotAvailable):
        main.do(f"{FENCE_ROW} nowait", library.id)
    holder.do("commit")
    assert main.one(locks, str(library.id)) is True
    main.do(f"{FENCE_ROW} nowait", library.id)


# -- a library that moves to a shelf of its own


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_log_documents_while_a_copy_is_made(main: Session, library: Library, writer: str) -> None:
    shelf = add_shelf(main)
    move(library, 1, shelf)
    statement, parameters = library.writers()[writer]
    main.do(statement, *parameters)
    logged = main.do("select distinct document_id from pgshelf.move_log where library_id = %s", library.id)
    assert logged == [(library.document,)]
    assert library.rows(shelf=shelf) == []
    Library(main)  # others are not logged
    assert main.one("select count(distinct library_id) from pgshelf.move_log where library_id = %s", library.id) == 1


COMPARED = (
    "ordinal, id, text, metadata, embedding::text, language, tsv::text, embed_attempts, embed_after::text, embed_error"
)


@pytest.mark.parametrize("writer", WRITERS)
def test_writers_write_both_shelves_before_the_switch(main: Session, library: Library, writer: str) -> None:
    library.put(main, "kept", "{y,z}", '{"[1,3]","[3,1]"}')
    shelf = add_shelf(main)
    move(library, 1, shelf)
    copy(library, shelf)
    move(library, 2, shelf)
    before = library.rows(COMPARED)
    statement, parameters = library.writers()[writer]
    main.do(statement, *parameters)
    after = library.rows(COMPARED)
    assert after != before
    assert library.rows(COMPARED, shelf) == after
    assert main.do("select 1 from pgshelf.move_log where library_id = %s", library.id) == []

    hits, shown = seen(main, library)
    assert len(hits) == len({hit[0] for hit in hits}) == len([row for row in after if row[4]])
    assert len(shown) == len(set(shown)) == len(after)
    main.do("update pgshelf.libraries set shelf = %s, moving = 0, moving_to = null where id = %s", shelf, library.id)
    assert seen(main, library) == (hits, shown)
    main.do("delete from pgshelf.chunks_s0 where library_id = %s", library.id)
    assert seen(main, library) == (hits, shown)


def seen(by: Session, library: Library) -> tuple[list[Any], list[Any]]:
    """What a search finds and what the view shows."""
    hits = by.do(
        "select chunk_id, key, ordinal, distance, text from pgshelf.search(%s, '[1,0]', k => 100)", library.name
    )
    return hits, by.do("select id, text from pgshelf.chunks_view where library = %s order by id", library.name)


def test_chunks_on_another_shelf_are_invisible(main: Session, library: Library) -> None:
    before, shelf = seen(main, library), add_shelf(main)
    copy(library, shelf)
    main.do(f"update pgshelf.chunks_s{shelf} set text = 'stale', id = gen_random_uuid()")
    assert seen(main, library) == before
    overview = "select documents, chunks, pending from pgshelf.libraries_overview where id = %s"
    assert main.do(overview, library.id) == [(1, 3, 1)]
    waiting = "select count(*) from pgshelf.pending_embeddings where library = %s"
    assert main.one(waiting, library.name) == 1
    assert "stale" not in {row[3] for row in main.do("select * from pgshelf.claim_pending(1000, '0 s')")}
    stale = library.rows("id", shelf)
    assert main.one(STORE, library.id, stale, [digest("stale")] * 3, '{"[1,1]","[1,1]","[1,1]"}') == 0
    for change in ("patch_chunk(%s, %s, 'x', null, null)", "delete_chunk(%s, %s)"):
        with pytest.raises(psycopg.Error) as caught:
            main.do(f"select pgshelf.{change}", library.id, stale[0])
        assert caught.value.sqlstate == "PS003"


def test_a_library_moves_while_it_is_written_and_searched(
    main: Session, session: MakeSession, library: Library
) -> None:
    sessions = [session() for _ in range(3)]
    truth: dict[str, list[str]] = {}
    stop: list[bool] = []

    def write(number: int) -> None:
        chance = random.Random(number)
        for turn in itertools.count():
            if stop:
                return
            key, size = f"{number}-{chance.randrange(4)}", chance.randrange(1, 4)
            texts = [f"{number}.{turn}.{n}" for n in range(size)]
            library.put(sessions[number], key, "{" + ",".join(texts) + "}", "{" + ",".join(['"[1,1]"'] * size) + "}")
            truth[key] = texts

    def read() -> int:
        for turn in itertools.count(1):
            found = sessions[2].do("select key, ordinal from pgshelf.search(%s, '[1,0]', k => 100)", library.name)
            assert len(found) == len(set(found)) >= 2
            if stop:
                return turn
        return 0

    promoter = session()

    def fenced(statement: str, *parameters: Any) -> None:
        with promoter.connection.transaction():
            promoter.do(FENCE_LOCK, str(library.id))
            promoter.do(FENCE_ROW, library.id)
            promoter.do(statement, *parameters)

    with ThreadPoolExecutor(3) as threads:
        running: list[Future[Any]] = [threads.submit(write, 0), threads.submit(write, 1), threads.submit(read)]
        try:
            shelf = _promote(library, promoter, fenced)
        finally:
            stop.append(True)
        results = [done.result(30) for done in running]
    assert results[2]
    assert main.one("select shelf from pgshelf.libraries where id = %s", library.id) == shelf
    found = main.do(
        "select document_key, array_agg(text order by ordinal) from pgshelf.chunks_view"
        " where library = %s and document_key <> 'k' group by 1",
        library.name,
    )
    assert dict(found) == truth
    assert library.orphans() == 0


def _promote(library: Library, promoter: Session, fenced: Callable[..., None]) -> int:
    """The protocol of a promotion, with a pause in every state."""
    shelf = add_shelf(promoter)
    time.sleep(0.1)
    fenced("update pgshelf.libraries set moving = 1, moving_to = %s where id = %s", shelf, library.id)
    copy(library, shelf, promoter)
    time.sleep(0.1)
    fenced("update pgshelf.libraries set moving = 2 where id = %s", library.id)
    log = "select distinct document_id from pgshelf.move_log where library_id = %s limit 2"
    while documents := [row[0] for row in promoter.do(log, library.id)]:
        with promoter.connection.transaction():
            promoter.do("select 1 from pgshelf.documents where id = any (%s) order by id for no key update", documents)
            promoter.do(f"delete from pgshelf.chunks_s{shelf} where document_id = any (%s)", documents)
            promoter.do(
                f"insert into pgshelf.chunks_s{shelf} (shelf, {COPIED}) select {shelf}, {COPIED} from pgshelf.chunks_s0"
                " where library_id = %s and document_id = any (%s)",
                library.id,
                documents,
            )
            promoter.do("delete from pgshelf.move_log where document_id = any (%s)", documents)
    time.sleep(0.1)
    fenced("update pgshelf.libraries set shelf = %s, moving = 0, moving_to = null where id = %s", shelf, library.id)
    time.sleep(0.1)
    return shelf


# -- workers


@pytest.fixture
def only(database_url: str) -> Iterator[list[Session]]:
    """Sessions on a database of their own: claims look at every library."""
    sessions = [Session(database_url) for _ in range(4)]
    yield sessions
    for one in sessions:
        one.close()


CLAIM = "select chunk_id from pgshelf.claim_pending(%s, %s)"


def test_two_workers_never_claim_the_same_chunk(only: list[Session]) -> None:
    first, second, *_ = only
    library = Library(first)
    library.put(first, "many", "{1,2,3,4,5,6,7,8,9}", "{" + ",".join(["null"] * 9) + "}")
    first.do("begin")
    mine = first.do(CLAIM, 4, "1 min")
    second.do("set lock_timeout = '2s'")
    theirs = second.do(CLAIM, 100, "1 min")  # does not wait
    assert (len(mine), len(theirs), set(mine) & set(theirs)) == (4, 6, set())
    assert second.do(CLAIM, 100, "1 min") == []
    first.do("rollback")  # a worker that dies gives back what it held
    assert set(second.do(CLAIM, 100, "0 s")) == set(mine)
    assert set(second.do(CLAIM, 100, "1 min")) == set(mine)  # as does one whose lease is over


def test_many_workers_share_the_work(only: list[Session]) -> None:
    library, other = Library(only[0]), Library(only[0])
    texts = "{" + ",".join(str(n) for n in range(200)) + "}"
    for each in (library, other):
        each.put(only[0], "many", texts, "{" + ",".join(["null"] * 200) + "}")

    def work(by: Session) -> list[Any]:
        claimed = []
        for _ in range(200):
            batch = by.do(CLAIM, 7, "1 min")
            claimed += batch
        return claimed

    with ThreadPoolExecutor(4) as threads:
        claimed = [row for batch in threads.map(work, only) for row in batch]
    assert len(claimed) == len(set(claimed)) == 402


# -- which libraries a claim looks at

WAITING = "select count(*)::int from pgshelf.waiting"
LOOK = "select pgshelf.look_again(%s, %s)"
TEXTS = "select text from pgshelf.claim_pending(100, '1 min')"
GIVE_UP = "update pgshelf.chunks set embed_after = 'infinity' where embedding is null"
LOOKED_AT = """select distinct (substring(relation::regclass::text from 'chunks_s([0-9]+)'))::int from pg_locks
where pid = pg_backend_pid() and relation::regclass::text ~ 'chunks' order by 1"""
MANY = 1000


@pytest.fixture(scope="module")
def many_shelves(databases: Databases) -> Iterator[Session]:
    """A database of a thousand libraries on shelves of their own, with a document each and nothing that waits."""
    url = databases.migrated()
    made = Session(url)
    partition = "create table pgshelf.chunks_s%s partition of pgshelf.chunks for values in (%1$s)"
    for first in range(1, MANY, 100):  # each holds its locks until it commits
        loop = f"for n in {first}..{first + 99} loop execute format('{partition}', n); end loop"
        made.connection.execute(f"do $$ begin {loop}; end $$".encode())
    made.do(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking, shelf)
        select 'l' || n, 2, %s, '{}', n from generate_series(1, %s) n""",
        Jsonb({"provider": "local", "dimension": 2}),
        MANY,
    )
    made.do(
        "select pgshelf.put_document(name, 'k', texts => '{a}', embeddings => '{\"[1,0]\"}') from pgshelf.libraries"
    )
    yield made
    made.close()
    databases.drop(url)


def look(by: Session) -> tuple[list[str], list[int]]:
    """Claim; the texts, and the shelves of which any table or index was opened."""
    with by.connection.transaction():
        return [text for (text,) in by.do(TEXTS)], [shelf for (shelf,) in by.do(LOOKED_AT)]


@pytest.mark.xdist_group("many shelves")
def test_a_claim_touches_no_shelf_where_nothing_waits(many_shelves: Session) -> None:
    assert many_shelves.one(WAITING) == 0
    assert look(many_shelves) == ([], [])
    for shelf in (900, 3):
        many_shelves.do("select pgshelf.put_document(%s, 'p', texts => array[%s])", f"l{shelf}", f"on {shelf}")
    many_shelves.do("select pgshelf.put_document('l7', 'p', texts => '{later}')")
    many_shelves.do("update pgshelf.chunks_s7 set embed_after = now() + '1 hour' where embedding is null")
    many_shelves.do("select pgshelf.look_again(id, 7) from pgshelf.libraries where shelf = 7")
    # what waited longest comes first, whatever the number of its shelf
    assert look(many_shelves) == (["on 900"], [900])
    assert look(many_shelves) == (["on 3"], [3])
    assert look(many_shelves) == ([], [])
    many_shelves.do("update pgshelf.chunks set embed_after = now() where text = 'on 900'")
    assert look(many_shelves) == (["on 900"], [900])


@pytest.mark.xdist_group("many shelves")
def test_a_claim_looks_at_a_bounded_number_of_shelves(many_shelves: Session) -> None:
    """After a long pause of every worker all leases are over at once; a transaction cannot hold a thousand shelves."""
    many_shelves.do("delete from pgshelf.chunks where embedding is null")
    many_shelves.do("delete from pgshelf.waiting")
    many_shelves.do("insert into pgshelf.waiting select id, '3', now() from pgshelf.libraries where shelf <> 500")
    many_shelves.do("select pgshelf.put_document('l500', 'p', texts => '{last}')")
    seen: list[int] = []
    texts: list[str] = []
    while not texts:
        texts, shelves = look(many_shelves)
        assert 1 <= len(shelves) <= 32, "it looks at too many, or for ever"
        seen += shelves
    assert texts == ["last"]
    assert sorted(seen) == list(range(1, MANY + 1))
    assert many_shelves.one(WAITING) == 1


@pytest.mark.parametrize("held", ["pgshelf.waiting", "pgshelf.chunks_s0"])
def test_what_is_written_while_a_claim_looks_is_not_forgotten(only: list[Session], held: str) -> None:
    writer, claimer, watcher, _ = only
    library = Library(watcher)
    watcher.do(GIVE_UP)
    assert watcher.one(WAITING) == 1  # of the chunk that was given up
    writer.do("begin")
    library.put(writer, "new", "{new}", "{null}")
    writer.do(f"lock table {held} in access exclusive mode")
    answer = claimer.later(LOOK, library.id, 0)
    blocked(watcher, claimer, answer)
    writer.do("commit")
    answer.result(10)
    assert watcher.do(TEXTS) == [("new",)]


def test_a_row_of_a_writer_outlives_the_claims_that_did_not_see_it(only: list[Session]) -> None:
    writer, claimer, watcher, _ = only
    library = Library(watcher)
    watcher.do(GIVE_UP)
    writer.do("begin")
    library.put(writer, "new", "{new}", "{null}")
    claimer.do("set lock_timeout = '2s'")  # neither waits for the other
    assert claimer.do(TEXTS) == []
    assert claimer.one(WAITING) == 0  # of those it could see
    writer.do("commit")
    assert claimer.do(TEXTS) == [("new",)]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_claims_at_once_do_not_remove_what_the_other_relies_on(only: list[Session], end: str) -> None:
    first, second, writer, _ = only
    library = Library(writer)
    first.do("begin")
    assert first.do(TEXTS) == [("c",)]
    library.put(writer, "new", "{new}", "{null}")
    second.do("set lock_timeout = '2s'")
    second.do("begin")
    assert second.do(TEXTS) == [("new",)]
    assert first.do(TEXTS) == []  # the other has it, and holds the row of its writer
    second.do("commit")
    first.do(end)
    given_back = [("c",)] if end == "rollback" else []
    assert second.do(TEXTS) == given_back
    second.do("update pgshelf.chunks set embedding = '[1,1]' where text = 'new'")
    # the lease of a worker that died; nobody else says that it is over
    writer.do("set session_replication_role = replica")
    for table in ("chunks set embed_after", "waiting set due"):
        writer.do(f"update pgshelf.{table} = now() - '1 s'::interval")
    assert second.do(TEXTS) == [("c",)]


def test_a_library_is_noted_once_for_each_transaction_and_once_after_a_look(only: list[Session]) -> None:
    owner = only[0]
    library = Library(owner)
    assert owner.one(WAITING) == 1
    library.put(owner, "many", "{" + ",".join(map(str, range(50))) + "}", "{" + ",".join(["null"] * 50) + "}")
    assert owner.one(WAITING) == 2
    for n in range(20):
        library.put(owner, f"k{n}", "{x}", "{null}")
    library.put(owner, "ready", "{x}", '{"[1,0]"}')
    assert owner.one(WAITING) == 22
    assert len(owner.do(CLAIM, 10, "1 min")) == 10
    # of the oldest chunk that is left, not of those that were claimed
    oldest = "select min(embed_after) from pgshelf.chunks where embedding is null"
    assert owner.do(f"select due = ({oldest}), due < now() from pgshelf.waiting") == [(True, True)]
    assert len(owner.do(CLAIM, 100, "1 min")) == 61
    assert owner.do(f"select due = ({oldest}), due > now() + '50 s' from pgshelf.waiting") == [(True, True)]
    owner.do("update pgshelf.chunks set embedding = '[1,1]' where embedding is null")
    owner.do("update pgshelf.waiting set due = now()")
    assert owner.do(CLAIM, 100, "1 min") == []
    assert owner.one(WAITING) == 0


RETRIES = {
    "put_document": ("select pgshelf.put_document(%s, 'k', texts => '{c}')", lambda library: (library.name,)),
    "patch_chunk": (
        "select pgshelf.patch_chunk(%s, %s, 'new', null, null)",
        lambda library: (library.id, library.chunks[2]),
    ),
    "fail_embeddings": (  # of a worker that was slower than its lease
        "select pgshelf.fail_embeddings(%s, %s, %s, 'no', '{0}', true)",
        lambda library: (library.id, [library.chunks[2]], [digest("c")]),
    ),
    "update": ("update pgshelf.chunks set embed_after = now() where id = %s", lambda library: (library.chunks[2],)),
    "embedding": ("update pgshelf.chunks set embedding = null where id = %s", lambda library: (library.chunks[0],)),
    "insert": (
        "insert into pgshelf.chunks (shelf, place, library_id, document_id, ordinal, text, language)"
        " values (0, 1, %s, %s, 9, 'x', 'english')",
        lambda library: (library.id, library.document),
    ),
}


@pytest.mark.parametrize("way", RETRIES)
def test_whoever_makes_a_chunk_wait_again_is_heard(only: list[Session], way: str) -> None:
    owner = only[0]
    library = Library(owner)
    owner.do(GIVE_UP)
    assert owner.do(TEXTS) == []
    assert owner.one(WAITING) == 0
    statement, parameters = RETRIES[way]
    owner.do(statement, *parameters(library))
    assert len(owner.do(TEXTS)) == 1


@pytest.mark.parametrize("together", [False, True])
def test_a_shorter_wait_than_the_lease_is_heard_and_a_longer_one_costs_one_look(
    only: list[Session], together: bool
) -> None:
    owner = only[0]
    library = Library(owner)
    wait = "select pgshelf.fail_embeddings(%s, %s, %s, 'no', array[%s]::float8[], true)"
    owner.do("begin" if together else "select")
    assert owner.do(TEXTS) == [("c",)]
    owner.do(wait, library.id, library.chunks[2:], [digest("c")], 0.0)
    owner.do("commit" if together else "select")
    assert owner.do(TEXTS) == [("c",)]
    owner.do(wait, library.id, library.chunks[2:], [digest("c")], 3600.0)
    owner.do("update pgshelf.waiting set due = now()")  # the lease would be over
    assert owner.do(TEXTS) == []
    assert owner.do("select due > now() + '59 min' from pgshelf.waiting") == [(True,)]


@pytest.mark.parametrize("end", ["rollback", "rollback to a", "kill"])
def test_a_chunk_and_its_note_come_together_or_not_at_all(only: list[Session], end: str) -> None:
    writer, watcher, *_ = only
    library = Library(watcher)
    watcher.do(GIVE_UP)
    assert watcher.do(TEXTS) == []
    writer.do("begin")
    writer.do("savepoint a")
    library.put(writer, "new", "{lost}", "{null}")
    assert (writer.one(WAITING), watcher.one(WAITING)) == (1, 0)
    if end == "kill":
        watcher.do("select pg_terminate_backend(%s, 10000)", writer.connection.info.backend_pid)
    else:
        writer.do(end)
    if end == "rollback to a":
        library.put(writer, "new", "{kept}", "{null}")
        writer.do("commit")
    assert watcher.one(WAITING) == watcher.one("select count(*)::int from pgshelf.documents where key = 'new'")
    assert watcher.do(TEXTS) == ([("kept",)] if end == "rollback to a" else [])


def test_a_claim_that_is_killed_leaves_what_it_found(only: list[Session]) -> None:
    claimer, watcher, *_ = only
    Library(watcher)
    before = watcher.do("select * from pgshelf.waiting")
    claimer.do("begin")
    assert claimer.do(TEXTS) == [("c",)]
    assert claimer.do("select * from pgshelf.waiting") != before
    watcher.do("select pg_terminate_backend(%s, 10000)", claimer.connection.info.backend_pid)
    assert watcher.do("select * from pgshelf.waiting") == before
    assert watcher.do(TEXTS) == [("c",)]


def test_a_library_that_moves_under_a_look_is_left_for_the_next(only: list[Session]) -> None:
    owner = only[0]
    library = Library(owner)
    shelf = add_shelf(owner)
    copy(library, shelf)
    owner.do("update pgshelf.libraries set shelf = %s where id = %s", shelf, library.id)
    owner.do("delete from pgshelf.chunks_s0 where library_id = %s", library.id)
    before = owner.one(WAITING)
    owner.do(LOOK, library.id, 0)
    assert owner.one(WAITING) == before > 0
    assert owner.do(TEXTS) == [("c",)]


@pytest.mark.parametrize("reaped", [False, True])
def test_the_notes_of_a_deleted_library_go(only: list[Session], reaped: bool) -> None:
    owner = only[0]
    library, other = Library(owner), Library(owner)
    owner.do("select pgshelf.delete_library(%s)", library.name)
    while reaped and owner.one("select pgshelf.reap_deleted()"):
        pass
    assert owner.do("select library_id from pgshelf.claim_pending(100, '1 min')") == [(other.id,)]
    assert owner.do("select library_id from pgshelf.waiting") == [(other.id,)]


def test_vectors_of_texts_that_changed_are_not_stored(main: Session, session: MakeSession, library: Library) -> None:
    a, b, c = library.chunks
    state = "select id, embedding::text from pgshelf.chunks_s0 where library_id = %s order by ordinal"
    assert main.one(STORE, library.id, [c, a], [digest("older"), digest("a")], '{"[5,5]","[6,6]"}') == 0
    assert main.do(state, library.id) == [(a, "[1,0]"), (b, "[0,1]"), (c, None)]
    assert main.one(STORE, Library(main).id, [c], [digest("c")], '{"[5,5]"}') == 0  # of another library
    assert main.one(STORE, library.id, [uuid.uuid4()], [digest("c")], '{"[5,5]"}') == 0

    writer, worker = session(), session()  # the text changes while the worker waits to store
    writer.do("begin")
    writer.do("select pgshelf.patch_chunk(%s, %s, 'newer', null, null)", library.id, c)
    answer = worker.later(STORE, library.id, [c], [digest("c")], '{"[5,5]"}')
    blocked(main, worker, answer)
    writer.do("commit")
    assert answer.result(10) == [(0,)]
    assert main.one(STORE, library.id, [c], [digest("newer")], '{"[5,5]"}') == 1
    assert main.do(state, library.id)[2] == (c, "[5,5]")


def test_stores_in_any_order_do_not_deadlock(main: Session, session: MakeSession, library: Library) -> None:
    for n in range(6):
        library.put(main, f"p{n}", f"{{t{n}}}", "{null}")
    pending = main.do(
        "select id, md5(text) from pgshelf.chunks_view where library = %s and status = 'pending'", library.name
    )
    workers = [session() for _ in range(4)]

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(25):
            some = chance.sample(pending, 4)
            vectors = "{" + ",".join(['"[1,1]"'] * 4) + "}"
            with workers[number].connection.transaction(force_rollback=chance.random() < 0.9):
                workers[number].do(STORE, library.id, [row[0] for row in some], [row[1] for row in some], vectors)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
