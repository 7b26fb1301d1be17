"""Imports: cut into requests, a few at a time, repeated safely, gone on with."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import numpy as np
import pytest

from pgshelf_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    ExportedDocument,
    ImportFailure,
    ImportProgress,
    NotFound,
    Retries,
    ServerError,
    Unauthorized,
    UnexpectedAnswer,
)
from pgshelf_client._import import BATCH_BYTES
from tests.sdk.import_script import FAULTS, ImportScript
from tests.sdk.script import Caller, Script, problem

pytestmark = pytest.mark.watched

AT_ONCE = Retries(times=5, base=0.0, cap=0.0)
NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture(params=["Client", "AsyncClient"])
async def importer(request: pytest.FixtureRequest) -> Any:
    """Connects a client of either kind to a script that imports."""
    callers: list[Any] = []

    def connected(script: ImportScript, **options: Any) -> Caller:
        options = {"retries": AT_ONCE, **options}
        client: Client | AsyncClient
        if request.param == "Client":
            client = Client(transport=httpx2.MockTransport(script), **options)
        else:
            client = AsyncClient(transport=httpx2.MockTransport(script.awaited), **options)
        callers.append(client)
        return Caller(client)

    yield connected
    for client in callers:
        await client.aclose() if isinstance(client, AsyncClient) else client.close()


Importer = Callable[..., Caller]


def numbered(count: int, **fields: Any) -> Iterator[dict[str, Any]]:
    return ({"text": f"t{number}", **fields} for number in range(count))


def texts(script: ImportScript) -> list[str]:
    return [document["text"] for document in script.documents]


async def test_documents_go_in_requests_of_a_size(importer: Importer) -> None:
    script = ImportScript()
    result = await importer(script).import_documents("hand/book", numbered(7), batch_size=3, parallel=1, wait=False)
    assert (result.created, result.replaced, result.skipped, result.pending, result.failed) == (7, 0, 0, 0, [])
    assert texts(script) == [f"t{number}" for number in range(7)]
    assert [request.content.count(b"\n") for request in script.requests] == [3, 3, 1]
    assert len(set(script.keys)) == 3
    assert script.requests[0].url.raw_path == b"/v1/libraries/hand%2Fbook/import?wait=false"
    assert {request.headers["content-type"] for request in script.requests} == {"application/x-ndjson"}

    script = ImportScript()
    large = [{"text": "x" * (BATCH_BYTES // 3)} for _ in range(5)]
    await importer(script).import_documents("handbook", large, parallel=1)
    assert [request.content.count(b"\n") for request in script.requests] == [3, 2]
    assert script.requests[0].url.query == b""
    assert (await importer(script).import_documents("handbook", [])).created == 0


async def test_a_document_may_have_any_form(importer: Importer) -> None:
    script, vector = ImportScript(), np.array([1, 0.5], dtype=np.float32)
    exported = ExportedDocument(key="e", title="E", metadata={"n": 1}, chunks=[])
    documents = [
        {"key": "m", "chunks": ({"text": text, "embedding": vector} for text in "ab"), "title": None},
        b'{"key": "l",  "text": "as it is"}',
        exported,
    ]
    result = await importer(script).import_documents("handbook", iter(documents))
    assert (result.created, result.failed) == (3, [])
    mapping, line, again = script.documents
    packed = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    assert mapping == {"key": "m", "chunks": [{"text": text, "embedding": packed} for text in "ab"]}
    assert line == {"key": "l", "text": "as it is"} and b'"l",  "text"' in script.requests[0].content
    assert again == {"key": "e", "title": "E", "metadata": {"n": 1}, "chunks": []}


async def test_an_async_source_is_drawn_by_the_async_client() -> None:
    async def source() -> AsyncIterator[Any]:
        for document in numbered(5):
            await asyncio.sleep(0)
            yield document

    script = ImportScript()
    async with AsyncClient(transport=httpx2.MockTransport(script.awaited)) as client:
        assert (await client.import_documents("handbook", source(), batch_size=2)).created == 5
    assert sorted(texts(script)) == [f"t{number}" for number in range(5)]


async def test_what_cannot_be_imported_is_told_and_spoils_nothing(importer: Importer) -> None:
    script, told = ImportScript(), list[ImportProgress]()
    documents: list[Any] = [
        {"text": "good"},
        {"text": "bad", "key": "b"},
        {"text": "x", "key": "nan", "metadata": {"n": float("nan")}},
        {"txt": "x"},
        ["no mapping"],
        b'{"text":\n"two lines"}',
        b"{no json",
        {"chunks": [{"text": "x", "embedding": [float("inf")]}], "key": 7},
        {"text": "later"},
        {"text": "good", "key": "g"},
        {"text": "better", "key": "g"},
    ]
    result = await importer(script).import_documents(
        "handbook", documents, batch_size=3, parallel=1, progress=told.append
    )
    assert (result.created, result.replaced, result.pending) == (3, 1, 1)
    assert [(failure.index, failure.key) for failure in result.failed] == [
        (1, "b"), (2, "nan"), (3, None), (4, None), (5, None), (6, None), (7, None)
    ]  # fmt: skip
    assert all(failure.document is documents[failure.index] for failure in result.failed)
    assert (result.failed[0].code, result.failed[0].detail) == ("validation_failed", "No.")
    assert [place.path for place in result.failed[0].errors] == ["text"]
    assert {failure.code for failure in result.failed[1:5]} == {"not_sendable"}
    details = [failure.detail for failure in result.failed]
    assert "not JSON compliant" in details[1]
    assert details[2] == "a document has no field 'txt'; there are key, title, text, chunks, source, metadata"
    assert details[3] == "a document is a mapping, not list"
    assert "one line of JSON" in details[4]
    assert "vector[0] is inf" in details[6]

    assert [progress.documents for progress in told] == [8, 11]
    assert told[-1] == ImportProgress(documents=11, created=3, replaced=1, pending=1, failed=7)

    failures: list[ImportFailure] = []
    result = await importer(ImportScript()).import_documents("handbook", documents, on_failure=failures.append)
    assert (result.created, result.failed, len(failures)) == (3, [], 7)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"parallel": 0}])
async def test_an_import_needs_sizes_that_work(importer: Importer, options: dict[str, int]) -> None:
    script = ImportScript()
    with pytest.raises(ValueError, match="must be 1 at least"):
        await importer(script).import_documents("handbook", numbered(3), **options)
    assert script.requests == []


@pytest.mark.parametrize("parallel", [1, 3])
async def test_memory_is_constant_however_many_documents_come(importer: Importer, parallel: int) -> None:
    size, held = 5, list[int]()
    script = ImportScript(delay=0.002)

    def source() -> Iterator[Any]:
        for drawn, document in enumerate(numbered(300), 1):
            held.append(drawn - script.answered)
            yield document

    result = await importer(script).import_documents("handbook", source(), batch_size=size, parallel=parallel)
    assert result.created == 300
    assert script.most == parallel
    assert max(held) <= (parallel + 1) * size


async def test_of_two_documents_with_one_key_the_later_is_written_last(importer: Importer) -> None:
    order = random.Random(1)
    keys = [f"k{order.randrange(12)}" for _ in range(120)]
    script = ImportScript(commit=1)
    script.fault = lambda number: "lost before" if order.random() < 0.3 else None
    documents = [{"key": key, "text": f"t{place}"} for place, key in enumerate(keys)]
    result = await importer(script, retries=Retries(times=30, base=0.01, cap=0.01)).import_documents(
        "handbook", documents, batch_size=2, parallel=4
    )
    assert result.failed == [] and result.created + result.replaced == 120
    written = {document["key"]: document["text"] for document in script.documents}
    assert written == {document["key"]: document["text"] for document in documents}


async def test_every_document_is_written_once_whatever_happens_on_the_way(
    importer: Importer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    script = ImportScript(lambda number: chance.choice(FAULTS) if chance.random() < 0.4 else None)
    retries = Retries(times=50, base=0.0, cap=0.0)
    result = await importer(script, retries=retries).import_documents("handbook", numbered(200), batch_size=7)
    assert sorted(texts(script)) == sorted(f"t{number}" for number in range(200))
    assert result.created + result.skipped == 200
    assert len(script.requests) > 200 / 7


@pytest.mark.parametrize("parallel", [1, 2])
async def test_an_import_that_died_is_gone_on_with(importer: Importer, parallel: int) -> None:
    def dying(alive: int) -> Iterator[Any]:
        yield from itertools.islice(numbered(20), alive)
        raise RuntimeError("killed")

    script = ImportScript()
    options: dict[str, Any] = {"name": "Größe / 1", "batch_size": 3, "parallel": parallel}
    with pytest.raises(RuntimeError, match="killed"):
        await importer(script).import_documents("handbook", dying(11), **options)
    before, asked = len(script.documents), len(script.requests)
    assert 0 < before < 11
    script.fault = lambda number: "broken off" if number == asked + 5 else None
    result = await importer(script).import_documents("handbook", numbered(20), **options)
    assert sorted(texts(script)) == sorted(f"t{number}" for number in range(20))
    assert result.created + result.skipped == 20 and result.skipped >= before

    # what has changed is no repetition; another name is another import, and no name is none
    for changed in ({"name": "other"}, {"name": None}, {}):
        script.documents.clear()
        fields = {"source": "new"} if not changed else {}
        result = await importer(script).import_documents("handbook", numbered(20, **fields), **{**options, **changed})
        assert (result.created, result.skipped, len(script.documents)) == (20, 0, 20)


@pytest.mark.parametrize(
    ("answers", "raised", "match"),
    [
        ((problem(404, "library_not_found"),), NotFound, "library_not_found"),
        ((httpx2.Response(200, content=b'{"error": {"status": 507, "code": "odd", "detail": "Full."}}\n',
                          headers=NDJSON),), ServerError, "507 odd: Full"),
        ((httpx2.Response(200, content=b'{"error": {"status": 401, "code": "key_revoked", "detail": "Gone."}}\n',
                          headers=NDJSON),), Unauthorized, "401 key_revoked: Gone"),
        ((httpx2.ConnectError("refused"),), ConnectionFailed, "refused"),
        ((httpx2.Response(200, content=b"<html>", headers=NDJSON),), UnexpectedAnswer, "not in the form"),
        ((httpx2.Response(200, content=b"", headers=NDJSON),), UnexpectedAnswer, "not in the form"),
        ((httpx2.Response(200, content=b'{"lines": [1, 1], "created": 1}\n', headers=NDJSON),), UnexpectedAnswer,
         "does not tell of its end"),
    ],
)  # fmt: skip
async def test_what_stops_an_import_is_raised(
    connect: Callable[..., Caller], answers: Any, raised: type[Exception], match: str
) -> None:
    source = numbered(1000)
    with pytest.raises(raised, match=match):
        await connect(Script(*answers), retries=AT_ONCE).import_documents("handbook", source, batch_size=2)
    assert len(list(source)) > 980


async def test_an_import_that_another_one_holds_is_waited_for(
    connect: Callable[..., Caller], waits: list[float]
) -> None:
    done = httpx2.Response(200, content=b'{"done": true, "created": 1}\n', headers=NDJSON)
    running = problem(409, "import_running")
    script = Script(*[running] * 20, done)
    result = await connect(script).import_documents("handbook", numbered(1))
    assert (result.created, len(waits)) == (1, 20)
    assert all(1 <= wait <= 2 for wait in waits)
    with pytest.raises(Exception, match="import_running"):
        await connect(Script(running), retries=0).import_documents("handbook", numbered(1))


EXPORT = b'{"key":"a","metadata":{"n":1},"chunks":[{"text":"x\xe2\x80\xa8y","embedding":[0.5,1]}]}\n{"chunks":[]}\n'


async def test_an_export_comes_document_by_document(connect: Callable[..., Caller]) -> None:
    script = Script(problem(503, "unavailable"), httpx2.Response(200, content=EXPORT, headers=NDJSON))
    first, second = await connect(script, retries=AT_ONCE).export_documents("handbook", filter={"n": 1})
    assert (first.key, first.metadata, first.chunks[0].text, first.chunks[0].embedding) == (
        "a", {"n": 1}, "x\u2028y", [0.5, 1.0]
    )  # fmt: skip
    assert second == ExportedDocument()
    assert script.asked[0] == "GET /v1/libraries/handbook/export?filter=%7B%22n%22%3A+1%7D&embeddings=true"
    lines = await connect(script).export_lines("handbook", embeddings=False)
    assert b"\n".join([*lines, b""]) == EXPORT
    assert script.asked[-1] == "GET /v1/libraries/handbook/export?embeddings=false"

    with pytest.raises(UnexpectedAnswer, match="line of the export"):
        await connect(Script(httpx2.Response(200, content=b"[]\n"))).export_documents("handbook")
    with pytest.raises(NotFound):
        await connect(Script(problem(404, "library_not_found"))).export_lines("nothing")


class Breaking(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that breaks off."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        raise httpx2.ReadError("gone")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
        raise httpx2.ReadError("gone")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_an_export_that_breaks_off_says_so_and_one_that_never_began_is_repeated(kind: type) -> None:
    bodies = [Breaking(), Breaking(EXPORT[:-4], EXPORT[-4:-2])]
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, stream=bodies.pop(0), headers=NDJSON))
    client = kind(transport=transport, retries=AT_ONCE)
    got: list[bytes] = []
    with pytest.raises(ConnectionFailed, match="gone"):
        if isinstance(client, Client):
            got.extend(client.export_lines("handbook"))
        else:
            async for line in client.export_lines("handbook"):
                got.append(line)
    await client.aclose() if isinstance(client, AsyncClient) else client.close()
    assert bodies == [] and [json.loads(line)["key"] for line in got] in ([], ["a"])
