"""Writes through a proxy that carries them out and drops every other answer: each takes effect once.

Used by tests/test_repeats.py (a hundred) and `make soak` (a thousand).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter, defaultdict
from typing import Any

import httpx2

from pgshelf_client import AsyncClient, Retries

LIBRARY = "repeats"
SENDERS = 8
RETRIES = Retries(times=40, base=0.001, cap=0.01)


class Dropper:
    """A proxy that has the server carry out a request, and then may close the connection instead of answering."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port, self.rng = port, rng
        self.dropped = self.replayed = 0
        self.answers: dict[bytes, list[bytes]] = defaultdict(list)  # by idempotency key: status line and body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            behind, ahead = await asyncio.open_connection("127.0.0.1", self.port)
            ahead.write(head + body)
            answer = await behind.read()
            ahead.close()
            key = re.search(rb"(?i)\r\nidempotency-key: *(\w+)", head)
            assert key
            said, _, content = answer.partition(b"\r\n\r\n")
            self.answers[key[1]].append(said.split(b"\r\n")[0] + content)
            self.replayed += b"idempotent-replayed: true" in said.lower()
            if self.rng.random() < 0.5:
                self.dropped += 1
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()


class Writes:
    """Writes of all kinds, each of a thing of its own, and what must be there afterwards."""

    def __init__(self, seed: int, requests: int) -> None:
        rng = random.Random(seed)
        self.kinds = [rng.choice(["add", "add", "update", "delete", "filter", "event"]) for _ in range(requests)]
        self.made: dict[int, Any] = {}
        self.results: dict[int, Any] = {}

    async def prepare(self, client: AsyncClient) -> None:
        await client.create_library(LIBRARY, embedder={"provider": "local"})
        for number, kind in enumerate(self.kinds):
            if kind in ("update", "delete", "filter"):
                self.made[number] = await client.add_document(LIBRARY, chunks=[], metadata={"number": number})

    async def send(self, client: AsyncClient, number: int, kind: str) -> Any:
        """What is not repeatable by itself: it would make another one, find another version, or find nothing."""
        if kind == "add":
            return await client.add_document(LIBRARY, text="text", metadata={"number": number}, wait=False)
        if kind == "update":
            return await client.update_document(LIBRARY, self.made[number].id, title="new", if_match=1)
        if kind == "delete":
            return await client.delete_document(LIBRARY, self.made[number].id, if_match=1)
        if kind == "filter":
            which = {"number": number, "done": {"$exists": False}}
            return await client.update_documents(LIBRARY, which, {"done": True}, max_affected=1)
        return await client.add_event(LIBRARY, f"event {number}", "text")

    def check(self, found: dict[str, Any]) -> None:
        """Each took effect once, and its sender knows how."""
        copies = Counter(document.metadata.get("number") for document in found.values())
        for number, kind in enumerate(self.kinds):
            result, made = self.results[number], self.made.get(number)
            if kind == "add":
                assert copies[number] == 1 and found[result.id].version == 1, number
            elif kind == "update":
                assert made and found[made.id].version == result.version == 2, number
            elif kind == "delete":
                assert made and made.id not in found, number
            elif kind == "filter":
                assert made and found[made.id].version == 2 and result == 1, number
            else:
                assert result.document_id in found and not result.duplicate, number


async def repeat(url: str, seed: int, requests: int) -> str:
    """Send so many writes, then compare what is there with what they should have done; tells figures."""
    dropper, writes = Dropper(httpx2.URL(url).port or 0, random.Random(f"{seed} drops")), Writes(seed, requests)
    async with await asyncio.start_server(dropper.serve, "127.0.0.1", 0) as server, AsyncClient(url) as client:
        await writes.prepare(client)
        todo = list(enumerate(writes.kinds))
        async with AsyncClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", retries=RETRIES) as sender:

            async def work() -> None:
                while todo:
                    number, kind = todo.pop()
                    writes.results[number] = await writes.send(sender, number, kind)

            await asyncio.gather(*[work() for _ in range(SENDERS)])
        writes.check({document.id: document async for document in client.documents(LIBRARY)})
    different = [answers for answers in dropper.answers.values() if len(set(answers)) > 1]
    assert not different, f"a repetition got another answer: {different[:3]}"
    repeated = sum(len(answers) - 1 for answers in dropper.answers.values())
    assert len(dropper.answers) == requests and dropper.replayed == repeated == dropper.dropped > 0
    return f"{requests} writes, {dropper.dropped} answers dropped, each repetition answered from the store"
