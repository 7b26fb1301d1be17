"""Clients that are slow, or that are many, and the others, who are served all the while.

Used by tests/test_slow_clients.py (seconds) and `python -m tests.soak --only slow-clients` (minutes).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import psycopg

LIBRARY = "slow"
SEARCH = f"/v1/libraries/{LIBRARY}/search"
VECTOR = {"vector": [1.0, 0.0, 0.0]}
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % SEARCH.encode()
EXPORT = b"GET /v1/libraries/%s/export HTTP/1.1\r\nHost: localhost\r\n\r\n" % LIBRARY.encode()
# What a client sends at once, and then again and again.
KINDS: dict[str, tuple[bytes, bytes]] = {
    "says nothing": (b"", b""),
    "begins HTTP/2": (b"PRI * HT", b""),
    "stops in the head": (HEAD, b""),
    "trickles the head": (HEAD, b"x: y\r\n"),
    "sends no body": (HEAD + b"Content-Length: 1000\r\n\r\n", b""),
    "stops in the body": (HEAD + b"Content-Length: 1000\r\n\r\n{", b""),
    "trickles the body": (HEAD + b"Content-Length: 1000\r\n\r\n{", b" "),
    "never ends": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n"),
}
FILL = """
with d as (insert into pgshelf.documents (place, library_id, key, metadata)
  select 1, l.id, 'd' || n, '{}' from pgshelf.libraries l, generate_series(1, %s) n where l.name = %s returning *)
insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, text, embedding, language)
  select 0, 1, d.library_id, d.id, 0, repeat(md5(d.key) || ' ', 500), '[1,2,3]', 'english' from d
"""


def strangers(url: str) -> httpx2.AsyncClient:
    """A client that comes over a new connection with each request."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx2.AsyncClient(base_url=url, timeout=60, limits=limits)


class Witness:
    """Somebody else: asks for /health and for a search, over a new connection each time, and takes the time."""

    def __init__(self, url: str) -> None:
        self.client = strangers(url)
        self.seconds: dict[str, list[float]] = {"/health": [], SEARCH: []}

    async def look(self) -> None:
        for path, seen in self.seconds.items():
            begun = time.monotonic()
            answer = await (self.client.get(path) if path == "/health" else self.client.post(path, json=VECTOR))
            assert answer.status_code == 200, answer.text
            seen.append(time.monotonic() - begun)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async def forever() -> None:
            while True:
                await self.look()
                await asyncio.sleep(0.02)

        task = asyncio.create_task(forever())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self.client.aclose()

    def longest(self) -> float:
        return max(max(seen) for seen in self.seconds.values())

    def figures(self) -> str:
        def told(name: str) -> str:
            seen = sorted(self.seconds[name])
            at = [seen[min(len(seen) - 1, int(len(seen) * part))] * 1000 for part in (0.5, 0.95, 0.99)]
            p50, p95, p99 = at
            return f"p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}, longest {seen[-1] * 1000:.0f} ms of {len(seen)}"

        return f"/health: {told('/health')}; search: {told(SEARCH)}"


async def prepare(url: str, database_url: str, documents: int) -> None:
    """The library that is searched; each document has a text of 16 kB."""
    body = {"name": LIBRARY, "embedder": {"provider": "none"}, "dimension": 3}
    async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
        assert (await client.post("/v1/libraries", json=body)).status_code == 201
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(FILL, [documents, LIBRARY])


async def slow(port: int, first: bytes, again: bytes, pause: float) -> tuple[float, bytes]:
    """One slow client: after how many seconds it was got rid of, and what it was told."""
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    told = asyncio.create_task(reader.read())
    try:
        writer.write(first)
        while not told.done():
            await asyncio.wait([told], timeout=pause)
            writer.write(again)
        with contextlib.suppress(ConnectionError):
            return time.monotonic() - begun, told.result()
        return time.monotonic() - begun, b""
    finally:
        told.cancel()
        writer.close()


async def crowd(port: int, each: int, patience: float) -> Counter[str]:
    """So many slow clients of each kind at once; all are got rid of within the server's patience and a little more."""
    given = {kind: [slow(port, *sends, 0.2) for _ in range(each)] for kind, sends in KINDS.items()}
    ends: Counter[str] = Counter()
    found = await asyncio.gather(*[asyncio.gather(*clients) for clients in given.values()])
    for kind, clients in zip(given, found, strict=True):
        for seconds, told in clients:
            assert seconds < patience + 20, f"{kind}: still there after {seconds:.1f} s"
            body = "body" in kind or kind == "never ends"
            assert told.startswith(b"HTTP/1.1 408 ") == body, (kind, told)
            assert not body or b'"code":"request_timeout"' in told
            ends["408" if body else "closed"] += 1
    return ends


async def one_after_another(port: int, count: int) -> float:
    """So many connections, each with one request; the seconds that all took."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    begun = time.monotonic()
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
    return time.monotonic() - begun


async def half_open(port: int, count: int) -> None:
    """Connections that are broken off in the middle of a request, without a word (RST)."""
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        await asyncio.sleep(0)


async def at_once(url: str, count: int) -> list[float]:
    """So many clients that search in the same moment, each over its own connection; the seconds of each."""

    async def search(client: httpx2.AsyncClient) -> float:
        begun = time.monotonic()
        answer = await client.post(SEARCH, json=VECTOR)
        assert answer.status_code == 200, answer.text
        return time.monotonic() - begun

    async with strangers(url) as client:
        return sorted(await asyncio.gather(*[search(client) for _ in range(count)]))


class Readers:
    """Clients that ask for an export and read nothing of it."""

    def __init__(self, port: int, count: int) -> None:
        self.sockets = [socket.socket() for _ in range(count)]
        for each in self.sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.connect(("127.0.0.1", port))
            each.sendall(EXPORT)

    def heads(self) -> Counter[str]:
        """The statuses that they were answered with."""
        return Counter(each.recv(20).split(b" ")[1].decode() for each in self.sockets)

    def close(self) -> None:
        for each in self.sockets:
            each.close()


async def all_of_it(url: str, database_url: str, patience: float, size: dict[str, int]) -> dict[str, Any]:
    """Every kind of trouble, one after the other, while somebody else is served; figures of all of them."""
    port, witness, told = int(url.rpartition(":")[2]), Witness(url), dict[str, Any]()
    await prepare(url, database_url, size["documents"])
    await witness.look()
    async with witness.watching():
        begun = time.monotonic()
        told["slow"] = f"{dict(await crowd(port, size['each'], patience))} after {time.monotonic() - begun:.1f} s"
        await half_open(port, size["half_open"])
        seconds = await one_after_another(port, size["in_turn"])
        told["one after another"] = f"{size['in_turn']} in {seconds:.1f} s"
        spent = await at_once(url, size["at_once"])
        told["at once"] = f"{len(spent)}, the last after {spent[-1]:.2f} s"
        readers = await asyncio.to_thread(Readers, port, size["readers"])
        try:
            told["exports that nobody reads"] = dict(await asyncio.to_thread(readers.heads))
            await asyncio.sleep(size["reading"])
        finally:
            readers.close()
    told["others"] = witness.figures()
    told["longest"] = witness.longest()
    return told
