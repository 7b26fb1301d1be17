"""The query cache over REST: equal searches are answered again until something is committed that may alter it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest
import pytest_asyncio

from pgshelf import query_cache, search, searching
from pgshelf.app import create_app
from pgshelf.settings import Settings
from tests.cohere_server import CohereServer
from tests.conftest import _lifespan
from tests.rest.asking import at, bearer, document, key, library, local, ok, problem, until

Api = httpx2.AsyncClient
Connection = psycopg.Connection[Any]
Change = Callable[["Place"], Awaitable[Any]]
NAMES = count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(
    shared_database_url: str, vector_schema: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Api]:
    """An application with a worker, on the database of the file."""
    settings = Settings(
        database_url=shared_database_url,
        data_dir=tmp_path_factory.mktemp("data"),
        vector_schema=vector_schema,
        worker_interval=0.05,
    )
    app = create_app(settings)
    async with _lifespan(app):
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client


@pytest.fixture
def sql(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        yield connection


class Place:
    """A library with three documents, and a search of it."""

    def __init__(self, api: Api, sql: Connection, name: str, request: dict[str, Any]) -> None:
        self.api, self.sql, self.name, self.request = api, sql, name, request
        self.id = ""

    @property
    def path(self) -> str:
        return at("libraries", self.name)

    async def search(self, control: str = "", **more: Any) -> dict[str, Any]:
        return await self.ask(more, control)

    async def ask(self, more: dict[str, Any], control: str = "") -> dict[str, Any]:
        headers = {"Cache-Control": control} if control else {}
        answer = await self.api.post(f"{self.path}/search", json={**self.request, **more}, headers=headers)
        found: dict[str, Any] = ok(answer)
        return found

    def run(self, statement: str, *parameters: Any) -> None:
        """SQL that names the library by {id} and {name}."""
        self.sql.execute(statement.replace("{id}", f"'{self.id}'").replace("{name}", f"'{self.name}'"), parameters)


async def place(api: Api, sql: Connection, *, embedder: bool = False) -> Place:
    made = Place(api, sql, f"shelf-{next(NAMES)}", {"query": "cats", "mode": "text"})
    made.id = (await (local if embedder else library)(api, made.name))["id"]
    for number, text in enumerate(["cats sleep", "cats and dogs", "birds sing"]):
        chunk = {"text": text} if embedder else {"text": text, "embedding": [1, number, 0]}
        await document(api, f"d{number}", into=made.name, chunks=[chunk], metadata={"n": number})
    made.request = {"query": "cats"} if embedder else {"vector": [1, 1, 1]}
    return made


def rest(method: str, path: str, body: Any = None, status: int = 200) -> Change:
    async def change(place: Place) -> None:
        ok(await place.api.request(method, place.path + path, json=body), status)

    return change


def statement(text: str) -> Change:
    async def change(place: Place) -> None:
        place.run(text)

    return change


async def patch_chunk(place: Place) -> None:
    chunk = ok(await place.api.get(f"{place.path}/documents/d1/chunks"))["items"][0]["id"]
    ok(await place.api.patch(f"{place.path}/chunks/{chunk}", json={"embedding": [9, 9, 9]}))


async def delete_chunk(place: Place) -> None:
    chunk = ok(await place.api.get(f"{place.path}/documents/d1/chunks"))["items"][0]["id"]
    ok(await place.api.delete(f"{place.path}/chunks/{chunk}"), 204)


async def rename(place: Place) -> None:
    ok(await place.api.patch(place.path, json={"name": f"{place.name}-renamed"}))
    place.name += "-renamed"


async def delete_and_make_again(place: Place) -> None:
    ok(await place.api.delete(place.path), 204)
    await library(place.api, place.name)


async def index(place: Place) -> None:
    ok(await place.api.put(f"{place.path}/index", json={"type": "hnsw"}), 202)

    async def built() -> bool:
        return bool(ok(await place.api.get(f"{place.path}/index"))["state"] == "ready")

    await until(built)


PUT = {"chunks": [{"text": "more cats", "embedding": [1, 1, 1]}]}
NEW = """insert into pgshelf.chunks (shelf, place, library_id, document_id, ordinal, text, embedding, language)
  select 0, d.place, d.library_id, d.id, 7, 'new', '[1,1,1]', 'english' from pgshelf.documents d
  where d.library_id = {id} and d.key = 'd2'"""
PUT_SQL = """select pgshelf.put_document({name}, 'd1', texts => '{new}',
  embeddings => array[cast('[1,1,1]' as vector)])"""
CHANGES: dict[str, Change] = {
    "a document, put": rest("PUT", "/documents/d1", PUT),
    "a document, new": rest("POST", "/documents", PUT, 201),
    "a document, patched": rest("PATCH", "/documents/d1", {"metadata": {"n": 7}}),
    "a document, deleted": rest("DELETE", "/documents/d1", status=204),
    "documents, in a batch": rest("POST", "/documents/batch", {"documents": [PUT]}),
    "documents, by a filter": rest("POST", "/documents/update", {"filter": {"n": 1}, "patch": {"metadata": {"m": 1}}}),
    "a chunk, patched": patch_chunk,
    "a chunk, deleted": delete_chunk,
    "attributes": rest("PATCH", "", {"attributes": {"n": "number"}}),
    "a new name": rename,
    "another library of the name": delete_and_make_again,
    "an index": index,
    "put_document": statement(PUT_SQL),
    "delete_document": statement("select pgshelf.delete_document({name}, 'd1')"),
    "a plain update of documents": statement("update pgshelf.documents set title = 'x' where library_id = {id}"),
    "a time alone": statement("update pgshelf.documents set updated_at = 'epoch' where library_id = {id}"),
    "a plain delete of documents": statement("delete from pgshelf.documents where library_id = {id} and key = 'd1'"),
    "a plain insert of documents": statement("insert into pgshelf.documents (place, library_id) values (1, {id})"),
    "texts of chunks": statement("update pgshelf.chunks_s0 set text = 'x' where library_id = {id}"),
    "vectors of chunks": statement("update pgshelf.chunks set embedding = '[0,0,1]' where library_id = {id}"),
    "chunks, gone": statement("delete from pgshelf.chunks where library_id = {id} and ordinal = 0"),
    "chunks, new": statement(NEW),
    "the language": statement("update pgshelf.libraries set language = 'german' where id = {id}"),
    "words that are counted": statement("select pgshelf.mark_libraries(array[{id}::uuid])"),
    "clearing": statement("select pgshelf.forget_answers()"),
    "clearing one": statement("select pgshelf.forget_answers({name})"),
}  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
async def test_a_change_is_seen_at_once(api: Api, sql: Connection, change: Change) -> None:
    here = await place(api, sql)
    first, second = await here.search(), await here.search()
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["hits"] == second["hits"]
    await change(here)
    third = await here.search()
    assert not third["cached"]
    assert third["hits"] == (await here.search("no-cache"))["hits"]


@pytest.mark.asyncio(loop_scope="module")
async def test_what_alters_no_answer_keeps_it(api: Api, sql: Connection) -> None:
    here, there = await place(api, sql), await place(api, sql)
    await here.search()
    await CHANGES["put_document"](there)
    with sql.transaction(force_rollback=True):
        await CHANGES["a plain update of documents"](here)
        assert (await here.search())["cached"]  # not committed yet
    sql.execute("select pgshelf.join_marks(1)")
    assert (await here.search())["cached"]
    assert not (await there.search())["cached"]


@pytest.mark.asyncio(loop_scope="module")
async def test_vectors_that_arrive_are_found(api: Api, sql: Connection) -> None:
    here = await place(api, sql, embedder=True)
    here.request["mode"] = "vector"
    assert [(await here.search())["cached"] for _ in range(2)] == [False, True]
    here.run("select pgshelf.put_document({name}, 'late', texts => array['cats cats'])")

    async def found() -> bool:
        return any(hit["key"] == "late" for hit in (await here.search("no-store"))["hits"])

    await until(found)
    assert (await here.search())["hits"] == (await here.search("no-store"))["hits"]


@pytest.mark.asyncio(loop_scope="module")
async def test_another_embedder_is_another_answer(api: Api, sql: Connection) -> None:
    here = await place(api, sql, embedder=True)
    before = await here.search()
    ok(await api.put(f"{here.path}/embedder", json={"provider": "local", "dimension": 64}), 202)

    async def over() -> bool:
        answer, anew = await here.search(), await here.search("no-store")
        embedder = ok(await api.get(f"{here.path}/embedder"))
        assert answer["hits"] in (anew["hits"], before["hits"])
        return bool(embedder["embedder"]["dimension"] == 64)

    await until(over)
    answer = await here.search()
    assert answer["hits"] == (await here.search("no-cache"))["hits"] != before["hits"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "request_",
    [
        {"like": {"document": "d1"}},
        {"mode": "text", "query": "cats"},
        {"vector": [1, 0, 0], "filter": {"n": {"$lt": 2}}, "facets": ["n"], "total": True},
        {"vector": [1, 0, 0], "include": ["embedding", "highlight"]},
        {"vector": [1, 0, 0], "filter": {"n": 77}},
        {"vector": [1, 0, 0], "group_by": "document", "offset": 1},
    ],
    ids=["like", "words", "facets", "parts", "nothing found", "groups"],
)
async def test_a_kept_answer_is_the_answer(api: Api, sql: Connection, request_: dict[str, Any]) -> None:
    here = await place(api, sql)
    answers = [ok(await api.post(f"{here.path}/search", json=request_)) for _ in range(3)]
    assert [answer.pop("cached") for answer in answers] == [False, True, True]
    assert [answer.pop("took_ms") > 0 for answer in answers] == [True] * 3
    assert answers[0] == answers[1] == answers[2]
    await CHANGES["put_document"](here)
    assert not ok(await api.post(f"{here.path}/search", json=request_))["cached"]


@pytest.mark.asyncio(loop_scope="module")
async def test_searches_that_differ_are_answered_each(api: Api, sql: Connection) -> None:
    here = await place(api, sql)
    await here.search()
    for other in ({"k": 1}, {"exact": True}, {"filter": {"n": 1}}, {"filter": {"n": True}}, {"vector": [1, 1, 1.5]}):
        assert not (await here.ask(other))["cached"], other
    huge = {"filter": {"n": 2**70}}  # fits no MessagePack, and so no key
    assert [(await here.ask(huge))["cached"] for _ in range(2)] == [False, False]
    explained = [await here.search(explain=True) for _ in range(2)]
    assert [answer["cached"] for answer in explained] == [False, False]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_is_known_again_as_it_stands(api: Api, sql: Connection) -> None:
    """Byte for byte, without being read; said otherwise it is read, and known by what it says."""
    here = await place(api, sql)
    told = {"vector": [1, 1, 1], "facets": ["n"], "total": True}
    packed, plain = {"Accept": "application/msgpack"}, {"Content-Type": "application/json"}
    usual, spaced = (json.dumps(told, separators=separators).encode() for separators in ((",", ":"), (", ", ": ")))

    async def ask(body: bytes, **headers: str) -> tuple[bool, bool, Any]:
        """Whether it was read, whether the answer was kept, and the answer."""
        answer = await api.post(f"{here.path}/search", content=body, headers={**plain, **headers})
        assert answer.status_code == 200, answer.text
        packing = "msgpack" in answer.headers["content-type"]
        said = msgspec.msgpack.decode(answer.content) if packing else answer.json()
        assert said.pop("took_ms") > 0
        return "decode;" in answer.headers["server-timing"], said.pop("cached"), said

    first = await ask(usual)
    answers = [await ask(usual), await ask(spaced), await ask(usual, **packed), await ask(usual)]
    assert first[:2] == (True, False)
    assert [answer[:2] for answer in answers] == [(False, True), (True, True), (True, True), (False, True)]
    assert all(answer[2] == first[2] for answer in answers)
    assert (await ask(usual, **{"Cache-Control": "no-cache"}))[:2] == (True, False)
    await CHANGES["put_document"](here)
    assert [(await ask(usual))[:2] for _ in range(2)] == [(True, False), (False, True)]
    # an answer that is kept makes nothing right that is wrong
    query = await api.post(f"{here.path}/search", content=usual, headers={**plain, "Pgshelf-Consistency": "perhaps"})
    problem(query, 400, "validation_failed")
    problem(await api.post(f"{here.path}/search", content=usual), 415, "unsupported_media_type")
    long = usual + b" " * query_cache.SHORT
    assert [(await ask(long))[:2] for _ in range(2)] == [(True, True)] * 2


async def test_who_may_not_ask_gets_no_answer(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False, embedder="none", auth="on"))
    secrets = [key(database_url, "root", "admin"), *(key(database_url, name, "reader", name) for name in ("a", "b"))]
    with psycopg.connect(database_url, autocommit=True) as sql:
        client.headers.update(bearer(secrets[0]))
        here = await place(client, sql)
        ok(await client.patch(here.path, json={"name": "a"}))

        async def ask(secret: str) -> httpx2.Response:
            found: httpx2.Response = await client.post(
                "/v1/libraries/a/search", json=here.request, headers=bearer(secret)
            )
            return found

        assert [ok(await ask(secrets[1]))["cached"] for _ in range(2)] == [False, True]
        problem(await ask(secrets[2]), 404, "library_not_found")
        sql.execute("select pgshelf.revoke_key('a')")
        problem(await ask(secrets[1]), 401, "key_revoked")


async def test_who_sees_some_libraries_gets_the_answers_to_what_he_asked(
    database_url: str, make_settings: Any, make_client: Any
) -> None:
    """The guard has read such a body by the time that the cache comes to it."""
    client = await make_client(make_settings(database_url, worker_enabled=False, embedder="none", auth="on"))
    client.headers.update(bearer(key(database_url, "root", "admin")))
    with psycopg.connect(database_url, autocommit=True) as sql:
        shelves = [(await place(client, sql)).name for _ in range(2)]
    secrets = {name: key(database_url, name, "reader", name) for name in shelves}

    async def ask(name: str, *vector: float) -> tuple[bool, bool, set[str], float]:
        body = {"libraries": [name], "vector": vector, "k": 1}
        answer = await client.post("/v1/search", json=body, headers=bearer(secrets[name]))
        said = ok(answer)
        known = "decode;" not in answer.headers["server-timing"]
        return said["cached"], known, {hit["library"] for hit in said["hits"]}, said["hits"][0]["distance"]

    first, second = shelves
    for name, y, distance in ((first, 0, 0.0), (second, 0, 0.0), (second, 1, 0.0), (second, -1, 0.293)):
        cached, known, found, away = await ask(name, 1, y, 0)
        assert (cached, known, found, round(away, 3)) == (False, False, {name}, distance)
        assert await ask(name, 1, y, 0) == (True, True, found, away)


@pytest.mark.asyncio(loop_scope="module")
async def test_several_searches_and_several_libraries(api: Api, sql: Connection) -> None:
    one, two = await place(api, sql), await place(api, sql)
    batch = {"searches": [one.request, {"vector": [1, 2]}, {**one.request, "k": 1}]}
    for expected in (False, True):
        results = ok(await api.post(f"{one.path}/search/batch", json=batch))["results"]
        assert [result["answer"]["cached"] for result in results[::2]] == [expected] * 2
        assert results[1]["error"]["code"] == "wrong_dimension"
    several = {"libraries": [one.name, two.name, two.id], "vector": [1, 1, 1]}
    answers = [ok(await api.post("/v1/search", json=several)) for _ in range(2)]
    assert [answer["cached"] for answer in answers] == [False, True]
    assert answers[0]["hits"] == answers[1]["hits"] and len(answers[0]["hits"]) == 6
    await CHANGES["put_document"](two)
    answer = ok(await api.post("/v1/search", json=several))
    assert not answer["cached"] and "new" in [hit["text"] for hit in answer["hits"]]
    past = [ok(await api.post("/v1/search", json={**several, "offset": 50})) for _ in range(2)]
    assert [(answer["hits"], answer["cached"]) for answer in past] == [([], False), ([], True)]


@pytest.mark.asyncio(loop_scope="module")
async def test_what_changes_between_the_statements_of_a_search_is_not_kept(
    api: Api, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vector of a `like` and the ids of several libraries are read before the search itself, and may be older."""
    here, there = await place(api, sql), await place(api, sql)

    def meanwhile(module: Any, name: str, *changes: tuple[Place, str]) -> None:
        original, left = getattr(module, name), list(changes)

        async def after(*arguments: Any) -> Any:
            found = await original(*arguments)
            while left:
                changed, statement = left.pop(0)
                changed.run(statement)
            return found

        monkeypatch.setattr(module, name, after)

    nearer = """update pgshelf.chunks set embedding = '[0,0,1]' where document_id =
      (select d.id from pgshelf.documents d where d.library_id = {id} and d.key = 'd1')"""
    meanwhile(searching, "_like", (here, nearer))
    here.request = {"like": {"document": "d1"}}
    first, second = await here.search(), await here.search()
    assert second["cached"] is False
    assert second["hits"] == (await here.search("no-cache"))["hits"]
    assert [hit["distance"] for hit in first["hits"]] != [hit["distance"] for hit in second["hits"]]

    rename = "update pgshelf.libraries set name = {name} || %s where id = {id}"
    swapped = f"update pgshelf.libraries set name = '{here.name}' where id = {{id}}"
    meanwhile(search, "ask", (here, rename.replace("%s", "'-was'")), (there, swapped))
    several = {"libraries": [here.name], "vector": [1, 1, 1]}
    answers = [ok(await api.post("/v1/search", json=several)) for _ in range(3)]
    assert [answer["cached"] for answer in answers] == [False, False, True]
    assert {hit["document_id"] for hit in answers[0]["hits"]}.isdisjoint(
        hit["document_id"] for hit in answers[1]["hits"]
    )


@pytest.mark.asyncio(loop_scope="module")
async def test_cache_control(api: Api, sql: Connection) -> None:
    here = await place(api, sql)
    assert not (await here.search("no-store"))["cached"]
    assert not (await here.search())["cached"]  # none was kept
    assert (await here.search())["cached"]
    assert not (await here.search("max-age=0, No-Cache"))["cached"]
    assert (await here.search())["cached"]
    ok(await api.delete(here.path), 204)
    problem(await api.post(f"{here.path}/search", json=here.request), 404, "library_not_found")


@pytest.mark.asyncio(loop_scope="module")
async def test_it_tells_how_it_does_and_is_cleared(api: Api, sql: Connection) -> None:
    here, there = await place(api, sql), await place(api, sql)
    before = ok(await api.get("/v1/cache"))
    for _ in range(3):
        await here.search()
        await there.search()
    after = ok(await api.get("/v1/cache"))
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (4, 2)
    assert after["entries"] - before["entries"] == 2 and after["bytes"] > before["bytes"]
    assert (after["enabled"], after["max_bytes"], after["ttl"]) == (True, 64 * 2**20, 3600)
    exposed = (await api.get("/metrics")).text
    assert 'pgshelf_query_cache_lookups_total{outcome="hit"}' in exposed

    ok(await api.delete("/v1/cache", params={"library": here.name}), 204)
    assert [(await each.search())["cached"] for each in (here, there)] == [False, True]
    ok(await api.delete("/v1/cache"), 204)
    assert [(await each.search())["cached"] for each in (here, there)] == [False, False]
    assert ok(await api.get("/v1/cache"))["evictions"] - after["evictions"] >= 3
    problem(await api.delete("/v1/cache", params={"library": "nowhere"}), 404, "library_not_found")


async def test_processes_share_what_is_true(database_url: str, make_settings: Any, make_client: Any) -> None:
    settings = make_settings(database_url, worker_enabled=False, embedder="none")
    one, two = await make_client(settings), await make_client(settings)
    with psycopg.connect(database_url, autocommit=True) as sql:
        here = await place(one, sql)
        there = Place(two, sql, here.name, here.request)
        assert [(await each.search())["cached"] for each in (here, there, here, there)] == [False, False, True, True]
        ok(await one.put(f"{here.path}/documents/d1", json=PUT))
        assert (await there.search())["cached"] is False
        ok(await two.delete("/v1/cache"), 204)
        assert (await here.search())["cached"] is False


async def test_room_and_age_are_bounded(database_url: str, make_settings: Any, make_client: Any) -> None:
    settings = make_settings(database_url, worker_enabled=False, embedder="none", cache_bytes=16_000, cache_ttl=0.4)
    client = await make_client(settings)
    with psycopg.connect(database_url, autocommit=True) as sql:
        here = await place(client, sql)
        bodies = [{"vector": [1, 1, number]} for number in range(30)]
        for body in bodies:
            await here.ask(body)
        room = ok(await client.get("/v1/cache"))
        assert (await here.ask(bodies[0]))["cached"] is False  # the oldest went
        assert (await here.ask(bodies[0]))["cached"] is True
        assert room["max_bytes"] == 16_000
        large = {"include": ["embedding", "text"], "filter": {"n": {"$gte": 0}}, "facets": ["n"]}
        chunk = {"text": "cats " * 800, "embedding": [1, 1, 1]}
        await document(client, "large", into=here.name, chunks=[chunk], metadata={"n": 4})
        assert [(await here.ask(large))["cached"] for _ in range(2)] == [False, False]

        async def old() -> bool:
            return (await here.ask(bodies[0]))["cached"] is False

        await here.ask(bodies[0])
        await until(old, 5)


async def test_it_can_be_off(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False, cache_bytes=0))
    with psycopg.connect(database_url, autocommit=True) as sql:
        here = await place(client, sql)
        assert [(await here.search())["cached"] for _ in range(2)] == [False, False]
    assert ok(await client.get("/v1/cache"))["enabled"] is False


async def test_a_reranker_is_paid_once(
    database_url: str, make_settings: Any, make_client: Any, cohere_server: CohereServer
) -> None:
    settings = make_settings(
        database_url, worker_enabled=False, cohere_api_key=cohere_server.key, cohere_base_url=cohere_server.url
    )
    client = await make_client(settings)
    with psycopg.connect(database_url, autocommit=True) as sql:
        here = await place(client, sql)
        reranked = {"query": "dogs", "mode": "vector", "rerank": {"provider": "cohere"}}
        first, second = await here.ask(reranked), await here.ask(reranked)
    assert second["cached"] and first["hits"] == second["hits"]
    assert len(cohere_server.asked) == 1
