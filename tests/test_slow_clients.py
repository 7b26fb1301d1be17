"""Slow clients, half-open connections, and many at once: others are served all the while."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import psutil
import pytest

from pgshelf.bodies import PACE, patient
from pgshelf.errors import Problem
from tests.conftest import MakeLiveServer
from tests.soak.slow_clients import KINDS, all_of_it

SIZE = {"documents": 400, "each": 12, "half_open": 50, "in_turn": 200, "at_once": 100, "readers": 8, "reading": 0}


@pytest.mark.unwatched
async def test_others_are_served_all_the_while(database_url: str, make_live_server: MakeLiveServer) -> None:
    server = make_live_server(
        database_url,
        PGSHELF_HEADER_TIMEOUT="2",  # less, and a machine that is busy with other tests is as late as they are slow
        PGSHELF_BODY_TIMEOUT="2",
        PGSHELF_EMBEDDER="none",
        PGSHELF_POOL_SIZE="6",
    )
    told = await all_of_it(server.url, database_url, 2.0, SIZE)
    print(told)
    assert told["slow"].startswith(str({"closed": 12 * 4, "408": 12 * 4}))
    # half of the connections are for others, whoever reads or does not
    assert told["exports that nobody reads"] == {"200": 3, "503": 5}
    assert told["longest"] < 5.0, told  # on a machine that is busy with other tests


def test_connections_that_say_nothing_give_their_places_back(
    database_url: str, make_live_server: MakeLiveServer
) -> None:
    server = make_live_server(database_url, PGSHELF_HEADER_TIMEOUT="1", PGSHELF_MAX_CONNECTIONS="20")
    if sys.platform == "linux":
        files, most = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert files == most or files >= 65_536  # a connection is a file
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
    try:
        began = time.monotonic()
        assert httpx2.get(f"{server.url}/health", timeout=10).status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for each in silent:
            each.close()


async def received(pieces: AsyncIterator[bytes], seconds: float, *, stream: bool = False) -> int:
    """How many bytes of a body come through before it is over."""
    came, over = 0, False

    async def receive() -> Any:
        nonlocal over
        try:
            return {"type": "http.request", "body": await anext(pieces), "more_body": True}
        except StopAsyncIteration:
            if over:
                await asyncio.sleep(2 * seconds)  # the end of the connection may take its time
                return {"type": "http.disconnect"}
            over = True
            return {"type": "http.request", "body": b"", "more_body": False}

    waiting = patient(receive, seconds, stream=stream)
    while (message := await waiting())["type"] == "http.request":
        came += len(message["body"])
    return came


async def pieces(size: int, pause: float, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        await asyncio.sleep(pause)
        yield b"x" * size


async def test_a_body_may_take_as_long_as_it_takes_while_it_comes() -> None:
    assert await received(pieces(PACE, 0.1, 5), 0.2) == 5 * PACE
    with pytest.raises(Problem, match="Only 0 bytes") as stopped:
        await received(pieces(1, 0.5, 1), 0.2)
    assert stopped.value.code == "request_timeout"
    with pytest.raises(Problem, match=r"Only [1-9] bytes"):
        await received(pieces(1, 0.1, 10), 0.2)
    assert await received(pieces(1, 0.1, 5), 0.2, stream=True) == 5  # an import may trickle


async def test_a_body_is_over_when_all_of_it_has_come() -> None:
    """granian says so in a part of its own, which would be waited for."""
    parts = [{"type": "http.request", "body": b"xx", "more_body": True} for _ in range(3)]

    async def receive() -> Any:
        return parts.pop(0)

    waiting: Any = patient(receive, 1, length=4)
    assert [(await waiting())["more_body"] for _ in range(2)] == [True, False]
    assert len(parts) == 1


def test_a_body_in_chunks_is_as_long_as_its_chunks(database_url: str, make_live_server: MakeLiveServer) -> None:
    """Whatever length it also tells: of two that disagree the chunks count, or the request is refused."""
    server = make_live_server(database_url, PGSHELF_EMBEDDER="none")
    body = b'{"name": "notes", "embedder": {"provider": "none", "dimension": 2}}'
    for length in (20, 200):  # the first chunk is as long as the one
        head = (
            f"POST /v1/libraries HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: {length}"
        )
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(f"{head}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode() + chunks)
            with connection.makefile("rb") as file:
                answer = file.read()

        assert answer.split(b" ")[1] in (b"201", b"409", b"400"), answer
        assert b"invalid" not in answer, answer
    assert httpx2.get(f"{server.url}/health", timeout=10).status_code == 200


def test_there_are_bodies_among_the_kinds() -> None:
    assert sum("body" in kind or kind == "never ends" for kind in KINDS) == 4
