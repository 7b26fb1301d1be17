"""What is sent again after a fault, what is not, and how long the waits are."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx2
import pytest

from pgshelf_client import (
    ApiError,
    AsyncClient,
    BadGateway,
    Client,
    Conflict,
    ConnectionFailed,
    NotFound,
    RateLimited,
    Retries,
    Unavailable,
)
from pgshelf_client._base import KEY, Call
from pgshelf_client._retry import Attempts
from tests.sdk.script import CHUNK, DOCUMENT, EMBEDDER, INDEX, LIBRARY, Answer, Script, ok, problem

Case = tuple[str, tuple[Any, ...], dict[str, Any], httpx2.Response]

# What changes nothing, and writes, each of which has an idempotency key.
READS: list[Case] = [
    ("get_library", ("x",), {}, ok(LIBRARY)),
    ("documents", ("x",), {}, ok({"items": [], "next": None})),
    ("search", ("x", "rows"), {}, ok({"hits": [], "took_ms": 1})),
    ("search_batch", ("x", [{"query": "rows"}]), {}, ok({"results": [], "took_ms": 1})),
    ("search_libraries", (["x"], "rows"), {}, ok({"hits": [], "took_ms": 1})),
    ("query_documents", ("x",), {}, ok({"items": [], "next": None})),
    ("count_documents", ("x",), {}, ok({"items": [], "total": 0})),
    ("update_documents", ("x", {"a": 1}, {"a": 2}), {"dry_run": True}, ok({"affected": 1})),
    ("delete_documents", ("x", {"a": 1}), {"dry_run": True}, ok({"affected": 1})),
    ("facets", ("x", ["year"]), {}, ok({"facets": {}, "documents": 0})),
]
WRITES: list[Case] = [
    ("create_library", ("x",), {}, ok(LIBRARY)),
    ("update_library", ("x",), {"name": "y"}, ok(LIBRARY)),
    ("set_index", ("x", "hnsw"), {}, ok(INDEX)),
    ("set_embedder", ("x", "local"), {}, ok(EMBEDDER)),
    ("cancel_embedder", ("x",), {}, ok(EMBEDDER)),
    ("add_document", ("x",), {"text": "t"}, ok(DOCUMENT)),
    ("put_document", ("x", "k"), {"text": "t", "if_match": 1}, ok(DOCUMENT)),
    ("update_document", ("x", "k"), {"title": "t", "if_match": 1}, ok(DOCUMENT)),
    ("update_chunk", ("x", "c"), {"text": "t"}, ok(CHUNK)),
    ("update_documents", ("x", {"a": 1}, {"a": 2}), {}, ok({"affected": 1})),
    ("delete_documents", ("x", {"a": 1}), {}, ok({"affected": 1})),
    ("retry_embeddings", ("x",), {}, ok({"retried": 1})),
    ("add_event", ("x", "e", "t"), {}, ok({"id": "e", "document_id": "d", "key": "e", "duplicate": False}, 202)),
    ("delete_document", ("x", "k"), {"if_match": 1}, ok(status=204)),
    ("delete_library", ("x",), {}, ok(status=204)),
    ("delete_chunk", ("x", "c"), {}, ok(status=204)),
    ("clear_cache", (), {}, ok(status=204)),
]
CALL = ("method", "args", "options", "answer")

NEVER_SENT: list[Answer] = [
    httpx2.ConnectError("refused"),
    httpx2.ConnectTimeout("slow"),
    httpx2.PoolTimeout("full"),
    httpx2.ProxyError("no"),
]
LOST: list[Answer] = [
    httpx2.ReadTimeout("slow"),
    httpx2.ReadError("reset"),
    httpx2.WriteError("broken pipe"),
    httpx2.RemoteProtocolError("Server disconnected without sending a response."),
]
NOTHING_DONE: list[Answer] = [
    problem(429, "rate_limited"),
    httpx2.Response(429),
    problem(503, "pool_exhausted"),
    problem(503, "not_migrated"),
    problem(503, "not_ready"),
    problem(503, "lock_timeout"),
    problem(503, "read_only"),
    problem(503, "storage_full"),
    problem(409, "conflict"),
    problem(409, "idempotency_key_in_use"),
]
DOUBTFUL: list[Answer] = [
    problem(503, "database_unavailable"),
    problem(504, "timeout"),
    problem(502, "embedder_failed"),
    httpx2.Response(503, text="from a proxy"),
]
FINAL = [(400, "invalid_json"), (404, "library_not_found"), (409, "version_mismatch"), (500, "internal_error")]


def named(value: object) -> str | None:
    if isinstance(value, httpx2.Response):
        return f"{value.status_code}-{value.json()['code'] if value.content.startswith(b'{') else 'bare'}"
    return type(value).__name__ if isinstance(value, Exception) else None


@pytest.mark.parametrize(CALL, READS + WRITES)
@pytest.mark.parametrize("fault", NEVER_SENT + NOTHING_DONE, ids=named)
async def test_what_the_server_never_did_is_always_sent_again(connect, waits, method, args, options, answer, fault):
    script = Script(fault, fault, answer)
    await getattr(connect(script), method)(*args, **options)
    assert len(script.requests) == 3
    assert len({(r.method, r.url, r.content, r.headers.get("if-match")) for r in script.requests}) == 1
    assert len(waits) == 2


@pytest.mark.parametrize(CALL, READS + WRITES)
@pytest.mark.parametrize("fault", LOST + DOUBTFUL, ids=named)
async def test_in_doubt_everything_is_sent_again(connect, waits, method, args, options, answer, fault):
    script = Script(fault, answer)
    await getattr(connect(script), method)(*args, **options)
    assert len(script.requests) == 2


@pytest.mark.parametrize(CALL, READS)
async def test_reads_have_no_idempotency_key(connect, method, args, options, answer):
    script = Script(answer)
    await getattr(connect(script), method)(*args, **options)
    assert KEY not in script.requests[0].headers


@pytest.mark.parametrize(CALL, WRITES)
async def test_each_write_has_a_key_of_its_own_in_all_attempts(connect, waits, method, args, options, answer):
    script = Script(httpx2.ReadError("reset"), problem(503, "pool_exhausted"), answer, answer)
    for _ in range(2):
        await getattr(connect(script), method)(*args, **options)
    first, *again, other = [request.headers[KEY] for request in script.requests]
    assert again == [first, first] and other != first
    assert len(first) == 32


# A write without a key: nothing here makes one, but a stream cannot be sent twice.
BARE = Call(method="POST", url="http://x/v1/stream")


@pytest.mark.parametrize("fault", LOST, ids=named)
def test_a_lost_answer_to_a_write_without_a_key_is_reported_as_unknown(fault):
    with pytest.raises(ConnectionFailed, match="the server may have carried it out") as raised:
        Attempts(BARE, Retries()).after_failure(fault)
    assert raised.value.outcome_unknown
    assert raised.value.__cause__ is fault


@pytest.mark.parametrize("answer", DOUBTFUL, ids=named)
def test_a_doubtful_refusal_of_a_write_without_a_key_is_raised(answer):
    with pytest.raises(ApiError):
        Attempts(BARE, Retries()).after_answer(answer)


@pytest.mark.parametrize(("status", "code"), FINAL)
async def test_a_final_refusal_is_raised_at_once(connect, waits, status, code):
    script = Script(problem(status, code), ok(LIBRARY))
    with pytest.raises(ApiError) as raised:
        await connect(script).get_library("x")
    assert (raised.value.code, len(script.requests), waits) == (code, 1, [])


@pytest.mark.parametrize(
    "fault",
    [httpx2.UnsupportedProtocol("gopher"), httpx2.LocalProtocolError("bad header"), httpx2.DecodingError("bad gzip")],
    ids=named,
)
async def test_what_would_fail_again_is_not_tried_again(connect, waits, fault):
    script = Script(fault, ok(LIBRARY))
    with pytest.raises(ConnectionFailed):
        await connect(script).get_library("x")
    assert len(script.requests) == 1


@pytest.mark.parametrize("probe", ["health", "ready"])
@pytest.mark.parametrize(
    ("fault", "error"), [(problem(503, "not_ready"), Unavailable), (httpx2.ConnectError("refused"), ConnectionFailed)]
)
async def test_probes_say_what_is_now(connect, waits, probe, fault, error):
    script = Script(fault)
    with pytest.raises(error):
        await getattr(connect(script), probe)()
    assert (len(script.requests), waits) == (1, [])


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2), (3, 4), (Retries(times=5), 6)])
async def test_the_last_failure_is_raised_after_so_many_retries(connect, waits, retries, attempts):
    script = Script(problem(503, "pool_exhausted"))
    with pytest.raises(Unavailable):
        await connect(script, retries=retries).get_library("x")
    assert (len(script.requests), len(waits)) == (attempts, attempts - 1)


async def test_a_server_that_is_not_there_is_named(connect, waits):
    script = Script(httpx2.ConnectError("Connection refused"))
    with pytest.raises(ConnectionFailed) as raised:
        await connect(script, retries=2).create_library("x")
    assert str(raised.value) == "POST http://127.0.0.1:8432/v1/libraries: Connection refused (attempt 3)"
    assert not raised.value.outcome_unknown


async def test_a_failure_without_words_is_named_by_its_kind(connect):
    with pytest.raises(ConnectionFailed, match="ReadTimeout"):
        await connect(Script(httpx2.ReadTimeout("")), retries=0).get_library("x")


async def test_an_earlier_lost_answer_leaves_the_outcome_unknown(connect, waits):
    script = Script(httpx2.ReadError("reset"), httpx2.ConnectError("refused"))
    with pytest.raises(ConnectionFailed) as raised:
        await connect(script).put_document("x", "k", text="t")
    assert raised.value.outcome_unknown


async def test_the_outcome_of_a_read_is_never_in_doubt(connect, waits):
    with pytest.raises(ConnectionFailed) as raised:
        await connect(Script(httpx2.ReadError("reset"))).search("x", "rows")
    assert not raised.value.outcome_unknown
    assert "may have carried" not in str(raised.value)


async def test_a_repeated_deletion_that_finds_nothing_is_not_found(connect, waits):
    """Had the first one been carried out, its answer would have been kept."""
    with pytest.raises(NotFound):
        await connect(Script(httpx2.ReadError("reset"), problem(404, "document_not_found"))).delete_document("x", "k")


async def test_a_repeated_read_that_finds_nothing_is_not_found(connect, waits):
    with pytest.raises(NotFound):
        await connect(Script(httpx2.ReadError("reset"), problem(404, "document_not_found"))).get_document("x", "k")


async def test_a_refusal_after_a_retry_is_that_refusal(connect, waits):
    with pytest.raises(Conflict):
        await connect(Script(httpx2.ConnectError("no"), problem(409, "library_exists"))).create_library("x")


async def test_retry_after_is_waited_for_with_jitter_on_top(connect, waits):
    script = Script(problem(503, "pool_exhausted", {"Retry-After": "2"}), ok(LIBRARY))
    await connect(script, retries=Retries(base=0.5)).get_library("x")
    (wait,) = waits
    assert 2.0 <= wait <= 2.5


async def test_a_retry_after_beyond_the_bound_is_left_to_the_caller(connect, waits):
    script = Script(problem(429, "rate_limited", {"Retry-After": "31"}), ok(LIBRARY))
    with pytest.raises(RateLimited) as raised:
        await connect(script).get_library("x")
    assert (raised.value.retry_after, len(script.requests), waits) == (31.0, 1, [])
    script = Script(problem(429, "rate_limited", {"Retry-After": "31"}), ok(LIBRARY))
    await connect(script, retries=Retries(max_retry_after=31)).get_library("x")
    assert len(script.requests) == 2


async def test_waits_double_up_to_the_cap_and_are_random_below(connect, waits):
    retries = Retries(times=400, base=1.0, cap=4.0)
    with pytest.raises(BadGateway):
        await connect(Script(httpx2.Response(502)), retries=retries).get_library("x")
    first, second, later = waits[0], waits[1], waits[2:]
    assert 0.0 <= first <= 1.0
    assert 0.0 <= second <= 2.0
    assert all(0.0 <= wait <= 4.0 for wait in later)
    assert min(later) < 0.5 < 3.5 < max(later)  # 398 draws: missing either half has a chance below 1e-22


async def test_really_waiting_takes_the_time(connect):
    script = Script(problem(503, "pool_exhausted", {"Retry-After": "1"}), ok(LIBRARY))
    started = asyncio.get_running_loop().time()
    await connect(script, retries=Retries(base=0.0)).get_library("x")
    assert asyncio.get_running_loop().time() - started >= 1.0


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_over_a_real_socket_a_refused_connection_never_began():
    url, retries = f"http://127.0.0.1:{unused_port()}", Retries(times=1, base=0.0)
    async with AsyncClient(url, retries=retries) as client:
        with pytest.raises(ConnectionFailed, match="attempt 2") as raised:
            await client.create_library("x")
    assert not raised.value.outcome_unknown
    with Client(url, retries=retries) as waiting, pytest.raises(ConnectionFailed, match="attempt 2") as raised:
        waiting.create_library("x")
    assert not raised.value.outcome_unknown


async def test_over_a_real_socket_a_connection_cut_after_the_request_is_unknown():
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AsyncClient(url, retries=0) as client:
            with pytest.raises(ConnectionFailed) as raised:
                await client.create_library("x")
        assert raised.value.outcome_unknown
        with Client(url, retries=0) as waiting, pytest.raises(ConnectionFailed) as raised:
            await asyncio.to_thread(waiting.create_library, "x")
        assert raised.value.outcome_unknown
