"""Numbers that jsonb holds and others do not: of any length, beyond 64 bits."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import Any

import httpx2
import msgspec
import psycopg

from tests.rest.asking import at, document, library, ok

LIBRARY = at("libraries", "shelf")
SEARCH = at("libraries", "shelf", "search")
LARGEST = sys.float_info.max
READ: dict[str, Any] = {
    "1e5000": LARGEST,
    "-1e5000": -LARGEST,
    "1e131000": LARGEST,
    "1e400": 10**400,
    "1e400 + 0.5": LARGEST,
    "-1e400 - 0.5": -LARGEST,
    "1e-5000": 0.0,
    "123456789012345678901234": 123456789012345678901234,
    "9007199254740993": 9007199254740993,
}
WRITE = """select pgshelf.put_document('shelf', key => 'k', texts => array['a text'], embeddings => '{"[1,0,0]"}',
  metadata => jsonb_build_object('n', %s::numeric, 'before', '"', 'list', array[%s::numeric]),
  chunk_metadata => array[jsonb_build_object('n', %s::numeric)])"""


async def test_numbers_of_any_length_that_sql_wrote_are_answered(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client, attributes={"n": "number"})
    for number, read in READ.items():
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(WRITE.replace("%s", f"({number})"))
        metadata = {"n": read, "before": '"', "list": [read]}
        for answer in (
            ok(await client.get(f"{LIBRARY}/documents/k")),
            *ok(await client.get(f"{LIBRARY}/documents"))["items"],
            *ok(await client.post(f"{LIBRARY}/documents/query", json={"filter": {"n": {"$exists": True}}}))["items"],
        ):
            assert answer["metadata"] == metadata, number
        assert ok(await client.get(f"{LIBRARY}/documents/k/chunks"))["items"][0]["metadata"] == {"n": read}
        counted = {name: [{"value": read, "documents": 1}] for name in ("n", "list")}
        for cached in (False, True):
            answer = ok(await client.post(SEARCH, json={"vector": [1, 0, 0], "facets": ["n", "list"]}))
            assert answer["cached"] is cached and answer["facets"] == counted
            [hit] = answer["hits"]
            assert hit["metadata"] == {"n": read} and hit["document"]["metadata"] == metadata
        assert ok(await client.post(f"{LIBRARY}/facets", json={"attributes": ["n", "list"]}))["facets"] == counted
        exported = await client.get(f"{LIBRARY}/export")
        assert exported.status_code == 200 and exported.text.count("\n") == 1
        ok(await client.get(f"{LIBRARY}/changes"))
        patched = ok(await client.patch(f"{LIBRARY}/documents/k", json={"metadata": {"another": 1}}))
        assert patched["metadata"] == metadata | {"another": 1}
        again = {"chunks": [{"text": "a text", "embedding": [1, 0, 0], "metadata": {"n": read}}], "metadata": metadata}
        written = ok(await client.put(f"{LIBRARY}/documents/k", json=again))["metadata"]
        assert Decimal(str(written["n"])) == Decimal(str(read)), (
            "what was answered can be written, and is the same number then"
        )


async def test_integers_beyond_64_bits_are_doubles_in_msgpack(client: httpx2.AsyncClient) -> None:
    await library(client)
    exact = {"least": -(2**63), "most": 2**64 - 1, "true": True}
    metadata = exact | {"n": 123456789012345678901234, "list": [{"n": 2**64}, -(2**63) - 1], "huge": -(10**400)}
    read = exact | {"n": 123456789012345678901234.0, "list": [{"n": 2.0**64}, -(2.0**63)], "huge": -LARGEST}
    chunk = {"text": "a text", "embedding": [1, 0, 0], "metadata": metadata}
    made = await document(client, "k", chunks=[chunk], metadata=metadata)
    assert made["metadata"] == metadata
    packed = {"Accept": "application/msgpack"}

    def unpacked(response: httpx2.Response) -> Any:
        assert response.status_code in (200, 201) and response.headers["content-type"] == "application/msgpack"
        return msgspec.msgpack.decode(response.content)

    plain = ok(await client.get(f"{LIBRARY}/documents/k"))
    found = unpacked(await client.get(f"{LIBRARY}/documents/k", headers=packed))
    assert found["metadata"] == read and [type(found["metadata"][name]) for name in exact] == [int, int, bool]
    assert found["created_at"].isoformat().replace("+00:00", "Z") == plain["created_at"]
    assert found | {name: plain[name] for name in ("metadata", "created_at", "updated_at")} == plain
    assert unpacked(await client.get(f"{LIBRARY}/documents", headers=packed))["items"][0]["metadata"] == read
    assert unpacked(await client.get(f"{LIBRARY}/documents/k/chunks", headers=packed))["items"][0]["metadata"] == read
    for cached in (False, True):
        request = {"vector": [1, 0, 0], "facets": ["n"], "include": ["metadata", "document", "embedding"]}
        answer = unpacked(await client.post(SEARCH, json=request, headers=packed))
        [hit] = answer["hits"]
        assert answer["cached"] is cached and hit["metadata"] == hit["document"]["metadata"] == read
        assert hit["embedding"] == [1, 0, 0] and answer["facets"] == {"n": [{"value": read["n"], "documents": 1}]}
    for _ in range(2):  # the second time it is the answer that was stored
        headers = packed | {"Idempotency-Key": "once"}
        patched = await client.patch(f"{LIBRARY}/documents/k", json={"metadata": {"another": 1}}, headers=headers)
        assert unpacked(patched)["metadata"] == read | {"another": 1}


async def test_numbers_are_doubles_and_integers_exact_in_filters_too(
    client: httpx2.AsyncClient, database_url: str
) -> None:
    await library(client)
    fraction, integer = "0.12345678901234567890123", "123456789012345678901234"
    with psycopg.connect(database_url, autocommit=True) as connection:
        for number in (fraction, integer):
            connection.execute(WRITE.replace("%s", number).replace("'k'", f"'by SQL {number}'"))
    for number in (fraction, integer):
        body = f'{{"key": "by REST {number}", "metadata": {{"n": {number}}}, "chunks": []}}'
        await client.post(f"{LIBRARY}/documents", content=body, headers={"Content-Type": "application/json"})

    async def equal(number: str) -> set[str]:
        body = f'{{"filter": {{"n": {number}}}}}'
        headers = {"Content-Type": "application/json"}
        found = ok(await client.post(f"{LIBRARY}/documents/query", content=body, headers=headers))
        return {item["key"] for item in found["items"]}

    assert await equal(fraction) == {f"by REST {fraction}"}
    assert await equal(integer) == {f"by REST {integer}", f"by SQL {integer}"}
    assert await equal("123456789012345678901235") == set()
