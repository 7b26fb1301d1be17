"""Events: stored at once, found when the worker embedded them, and taken once, however often they are sent."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import httpx2
import pytest

from pgshelf import database, ingest, pools, worker
from pgshelf.pools import make_engine
from tests.rest.asking import at, chunks, document, library, local, ok, problem

EVENTS = at("libraries", "shelf", "events")
DOCUMENTS = at("libraries", "shelf", "documents")
EVENT: dict[str, Any] = {
    "id": "build 1/2",
    "text": "The build failed: the disk was full.",
    "metadata": {"branch": "main"},
}


@pytest.fixture
async def client(settings: Any, make_client: Any) -> httpx2.AsyncClient:
    """One whose worker does not run."""
    client: httpx2.AsyncClient = await make_client(type(settings)(**dict(_fields(settings), worker_enabled=False)))
    await local(client)
    return client


def _fields(settings: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(settings, name)) for name in settings.__struct_fields__]


async def test_an_event_is_a_document_that_waits_for_the_worker(
    client: httpx2.AsyncClient, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "embed", None)  # nobody may embed in the request
    response = await client.post(EVENTS, json=EVENT)
    taken = ok(response, 202)
    assert taken == {"id": "build 1/2", "document_id": taken["document_id"], "key": "build 1/2", "duplicate": False}
    found = ok(await client.get(response.headers["location"]))
    assert (found["id"], found["key"]) == (taken["document_id"], "build 1/2")
    assert (found["status"], found["metadata"]) == ("pending", {"branch": "main"})
    engine = make_engine(settings, settings.database_url)
    assert await worker.embed_pending(engine, settings) == 1
    await pools.close(engine)
    hits = ok(await client.post(at("libraries", "shelf", "search"), json={"query": "disk full"}))["hits"]
    assert hits[0]["document_id"] == taken["document_id"]


async def test_a_long_event_is_split_as_the_library_says(client: httpx2.AsyncClient) -> None:
    ok(await client.patch(at("libraries", "shelf"), json={"chunking": {"size": 50}}))
    text = " ".join(f"Sentence number {n} is here." for n in range(20))
    taken = ok(await client.post(EVENTS, json={"id": "long", "text": text}), 202)
    assert len(await chunks(client, taken["document_id"])) > 5


async def test_sent_again_it_has_no_effect(client: httpx2.AsyncClient) -> None:
    first = ok(await client.post(EVENTS, json=EVENT), 202)
    again = ok(await client.post(EVENTS, json=EVENT | {"metadata": dict(reversed(EVENT["metadata"].items()))}), 202)
    assert again == first | {"duplicate": True}
    assert ok(await client.get(at("libraries", "shelf", "documents", "build 1/2")))["version"] == 1


@pytest.mark.parametrize("change", [{"text": "Another."}, {"metadata": {}}, {"metadata": {"branch": "main", "n": 1}}])
async def test_the_same_id_with_something_else_is_refused(client: httpx2.AsyncClient, change: dict[str, Any]) -> None:
    ok(await client.post(EVENTS, json=EVENT), 202)
    detail = problem(await client.post(EVENTS, json=EVENT | change), 409, "event_differs")["detail"]
    assert "'build 1/2'" in detail


async def test_what_was_sent_counts_not_what_it_has_become(client: httpx2.AsyncClient) -> None:
    first = ok(await client.post(EVENTS, json=EVENT), 202)
    path = at("libraries", "shelf", "documents", "build 1/2")
    changed = ok(await client.put(path, json={"text": "Fixed.", "metadata": {"fixed": True}}))
    assert ok(await client.post(EVENTS, json=EVENT), 202) == first | {"duplicate": True}
    assert ok(await client.get(path)) == changed
    problem(await client.post(EVENTS, json=EVENT | {"text": "Fixed."}), 409, "event_differs")
    ok(await client.delete(path), 204)
    assert ok(await client.post(EVENTS, json=EVENT), 202) == first | {"duplicate": True}
    problem(await client.get(path), 404, "document_not_found")  # nobody deleted it in vain


async def test_a_document_that_is_no_event_is_left_alone(client: httpx2.AsyncClient) -> None:
    made = await document(client, "k", text="By hand.")
    problem(await client.post(EVENTS, json={"id": "k", "text": "An event."}), 409, "event_differs")
    assert ok(await client.get(f"{DOCUMENTS}/k")) == made
    ok(await client.delete(f"{DOCUMENTS}/k"), 204)
    assert ok(await client.post(EVENTS, json={"id": "k", "text": "An event."}), 202)["duplicate"] is False


async def test_a_uuid_may_name_an_event(client: httpx2.AsyncClient) -> None:
    name = str(uuid.uuid4())
    taken = ok(await client.post(EVENTS, json={"id": name.upper(), "text": "Done."}), 202)
    assert (taken["id"], taken["key"]) == (name.upper(), f"urn:uuid:{name}")
    assert ok(await client.get(at("libraries", "shelf", "documents", taken["key"])))["id"] == taken["document_id"]
    assert ok(await client.post(EVENTS, json={"id": name, "text": "Done."}), 202)["duplicate"]


async def test_sent_ten_times_at_once_it_is_taken_once(client: httpx2.AsyncClient) -> None:
    answers = await asyncio.gather(*[client.post(EVENTS, json=EVENT) for _ in range(10)])
    taken = [ok(answer, 202) for answer in answers]
    assert len({answer["document_id"] for answer in taken}) == 1
    assert sorted(answer["duplicate"] for answer in taken) == [False] + [True] * 9


async def test_under_an_idempotency_key_the_answer_stays_the_first(client: httpx2.AsyncClient) -> None:
    first = await client.post(EVENTS, json=EVENT, headers={"Idempotency-Key": "k"})
    again = await client.post(EVENTS, json=EVENT, headers={"Idempotency-Key": "k"})
    assert again.content == first.content and again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"id": "", "text": "x"}, "id"),
        ({"id": "x" * 501, "text": "x"}, "id"),
        ({"id": ".", "text": "x"}, "id"),
        ({"id": "..", "text": "x"}, "id"),
        ({"id": "x", "text": " "}, "text"),
        ({"id": "x"}, "body"),
        ({"id": "x", "text": "x", "title": "x"}, "body"),
    ],
)
async def test_what_is_no_event_is_refused(client: httpx2.AsyncClient, body: dict[str, Any], where: str) -> None:
    assert problem(await client.post(EVENTS, json=body), 400, "validation_failed")["errors"][0]["path"] == where


async def test_it_needs_a_library_with_an_embedder(client: httpx2.AsyncClient) -> None:
    problem(await client.post(at("libraries", "none", "events"), json=EVENT), 404, "library_not_found")
    await library(client, "bare")
    problem(await client.post(at("libraries", "bare", "events"), json=EVENT), 422, "embedding_required")


async def test_a_deleted_library_leaves_no_event_behind(client: httpx2.AsyncClient, settings: Any) -> None:
    ok(await client.post(EVENTS, json=EVENT), 202)
    ok(await client.delete(at("libraries", "shelf")), 204)
    engine = make_engine(settings, settings.database_url)
    while await worker.reap(engine, settings):
        pass
    assert await database.run(engine, "select count(*) from pgshelf.events") == [(0,)]
    await pools.close(engine)
    await local(client)
    assert ok(await client.post(EVENTS, json=EVENT), 202)["duplicate"] is False
