"""Eight writers, in REST and in SQL, and eight readers of the query cache in four processes: no answer is ever stale.

Every write gives its document a greater number. Whoever asks after a write was acknowledged must find this number or a
greater one, and never one that was rolled back. Used by tests/test_cached.py (seconds) and `make soak`.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psycopg
from psycopg.types.json import Jsonb

from pgshelf_client import Client, Conflict, NewChunk
from tests.soak.feed import Worker

LIBRARIES = ("left", "right")
WRITERS, READERS, PROCESSES = 8, 8, 4
OWN = 4  # documents of a writer; nobody else writes them
ALL = 100  # hits; more than there are documents
BROKEN = """create or replace function pgshelf.search_state(library text) returns bigint stable language sql
  as 'select 7::bigint'"""
PUT = """select pgshelf.put_document(%s, key => %s, texts => array[%s], metadata => %s, chunk_metadata => array[%s],
  embeddings => array[cast(%s as vector)])"""
OF_DOCUMENT = "library_id = (select l.id from pgshelf.libraries l where l.name = %s) and key = %s"


@dataclass
class Document:
    """What its writer says of a document; a number stands for one write."""

    library: str
    key: str
    begun: int = 0
    known: int = 0  # the last that was acknowledged
    gone: set[int] = field(default_factory=set)  # writes that delete it
    undone: set[int] = field(default_factory=set)  # writes that are rolled back

    def allows(self, known: int, found: int | None) -> bool:
        """Whether a search that began when `known` was acknowledged may find this number, or nothing."""
        later = {number for number in range(known, self.begun + 1)} - self.undone
        return bool(later & self.gone) or known == 0 if found is None else found in later - self.gone


class Writer(Worker):
    """Changes its documents one after the other, in bursts; every fourth transaction in SQL is rolled back."""

    def __init__(self, number: int, seed: int, pause: float) -> None:
        super().__init__(f"writer {number}")
        self.rng, self.pause = random.Random(f"{seed} writer {number}"), pause
        self.documents = [Document(LIBRARIES[each % 2], f"{seed}-{number}-{each}") for each in range(OWN)]
        self.done_with = Counter[str]()

    def work(self) -> None:
        while not self.stopping.is_set():
            for _ in range(self.rng.choice([1, 1, 1, 4])):
                document = self.rng.choice(self.documents)
                there = document.known > 0 and document.known not in document.gone
                kind = self.rng.choice(["put", "patch", "chunk", "delete"]) if there else "put"
                document.begun += 1
                if kind == "delete":
                    document.gone.add(document.begun)
                if self.write(kind, document, document.begun):
                    document.known = document.begun
                    self.done_with[kind] += 1
                else:
                    self.done_with["rolled back"] += 1
            self.stopping.wait(self.rng.uniform(0, 2 * self.pause))

    def write(self, kind: str, document: Document, number: int) -> bool:
        raise NotImplementedError


class RestWriter(Writer):
    """A request for each write."""

    def __init__(self, number: int, seed: int, pause: float, url: str) -> None:
        super().__init__(number, seed, pause)
        self.url = url

    def work(self) -> None:
        with Client(self.url) as self.client:
            super().work()

    def write(self, kind: str, document: Document, number: int) -> bool:
        told, place = {"n": number}, (document.library, document.key)
        if kind == "put":
            chunk: NewChunk = {"text": f"number {number}", "embedding": [1, self.rng.random()], "metadata": told}
            self.client.put_document(*place, chunks=[chunk], metadata=told)
        elif kind == "patch":
            self.client.update_document(*place, metadata=told)
        elif kind == "chunk":
            [chunk_id] = [chunk.id for chunk in self.client.chunks(*place)]
            self.client.update_chunk(document.library, chunk_id, metadata=told)
        else:
            self.client.delete_document(*place)
        return True


class SqlWriter(Writer):
    """Public functions and plain statements of the owner's, in transactions that stay open for a moment."""

    def __init__(self, number: int, seed: int, pause: float, database_url: str) -> None:
        super().__init__(number, seed, pause)
        self.database_url = database_url

    def work(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as self.connection:
            super().work()

    def write(self, kind: str, document: Document, number: int) -> bool:
        commit = self.rng.random() > 0.25
        if not commit:
            document.undone.add(number)
        with self.connection.transaction(force_rollback=not commit):
            self.change(kind, document, number)
            time.sleep(self.rng.choice([0, 0.01, 0.05, 0.2]))
        return commit

    def change(self, kind: str, document: Document, number: int) -> None:
        told, place = Jsonb({"n": number}), [document.library, document.key]
        if kind == "put":
            given = [f"number {number}", told, told, f"[1,{self.rng.random()}]"]
            self.connection.execute(PUT, [*place, *given])
        elif kind == "patch":
            self.connection.execute(f"update pgshelf.documents set metadata = %s where {OF_DOCUMENT}", [told, *place])
        elif kind == "chunk":
            mine = f"select d.id from pgshelf.documents d where {OF_DOCUMENT}"
            self.connection.execute(
                f"update pgshelf.chunks set metadata = %s where document_id = ({mine})", [told, *place]
            )
        elif self.rng.random() < 0.5:
            self.connection.execute(f"delete from pgshelf.documents where {OF_DOCUMENT}", place)
        else:
            self.connection.execute("select pgshelf.delete_document(%s, %s)", place)


class Reader(Worker):
    """Asks the same few searches again and again, of all processes in turn, and judges every answer."""

    def __init__(self, number: int, seed: int, url: str, documents: list[Document]) -> None:
        super().__init__(f"reader {number}")
        self.rng, self.url, self.documents = random.Random(f"{seed} reader {number}"), url, documents
        self.reads = self.hits = self.misses = 0
        self.stale: list[str] = []

    def work(self) -> None:
        with httpx2.Client(base_url=f"{self.url}/v1", timeout=60) as client:
            while not self.stopping.is_set():
                # a connection belongs to one process; the next one to another, perhaps
                client.headers["Connection"] = "close" if self.reads % 10 == 9 else "keep-alive"
                self.read(client)

    def read(self, client: httpx2.Client) -> None:
        wanted: tuple[str, ...] = (self.rng.choice(LIBRARIES),)
        shape = self.rng.choice(["vector", "hybrid", "words", "like", "batch", "several"])
        ask: dict[str, Any] = {"k": ALL, "vector": [1, 1]}
        if shape in ("hybrid", "words"):
            ask |= {"query": "number"}
        if shape == "words":
            ask = {"k": ALL, "query": "number", "mode": "text"}
        if shape == "like":
            ask = {"k": ALL, "like": {"document": "still"}}
        path = f"/libraries/{wanted[0]}/search"
        if shape == "several":
            wanted, path = LIBRARIES, "/search"
            ask |= {"libraries": LIBRARIES}
        elif shape == "batch":
            path, ask = f"{path}/batch", {"searches": [ask]}
        floors = [(document, document.known) for document in self.documents if document.library in wanted]
        answer = client.post(path, json=ask).raise_for_status().json()
        if shape == "batch":
            [answer] = [result["answer"] for result in answer["results"]]
        self.judge(shape, floors, answer)

    def judge(self, shape: str, floors: list[tuple[Document, int]], answer: dict[str, Any]) -> None:
        found = {hit["key"]: max(hit["metadata"]["n"], hit["document"]["metadata"]["n"]) for hit in answer["hits"]}
        self.reads += 1
        self.hits += answer["cached"]
        for document, known in floors:
            if not document.allows(known, found.get(document.key)):
                about = (
                    f"{shape}, cached {answer['cached']}: {document.key} had {known}, found {found.get(document.key)}"
                )
                self.stale.append(about)


def consistency(
    database_url: str, url: str, seed: int, reads: int, *, pause: float = 3.0, minutes: float = 15, broken: bool = False
) -> tuple[str, list[str]]:
    """Read until there were so many; tells figures, and what was stale. `broken`: as if no state ever changed."""
    with Client(url) as client, psycopg.connect(database_url, autocommit=True) as connection:
        for name in LIBRARIES:
            with contextlib.suppress(Conflict):  # it is there
                client.create_library(name, embedder={"provider": "none"}, dimension=2)
            client.put_document(name, "still", chunks=[{"text": "number", "embedding": [1, 1], "metadata": {"n": 0}}])
            client.update_document(name, "still", metadata={"n": 0})
        if broken:
            connection.execute(BROKEN)
        writers: list[Writer] = [SqlWriter(number, seed, pause, database_url) for number in range(WRITERS // 2)]
        writers += [RestWriter(number, seed, pause, url) for number in range(WRITERS // 2, WRITERS)]
        documents = [document for writer in writers for document in writer.documents]
        readers = [Reader(number, seed, url, documents) for number in range(READERS)]
        started = time.monotonic()
        for each in (*writers, *readers):
            each.start()
        while sum(reader.reads for reader in readers) < reads and all(
            each.error is None for each in (*writers, *readers)
        ):
            assert time.monotonic() - started < minutes * 60, f"seed {seed}: not done within {minutes:g} minutes"
            time.sleep(0.05)
        seconds = time.monotonic() - started
        for each in (*readers, *writers):
            each.done()
    total, hits = sum(reader.reads for reader in readers), sum(reader.hits for reader in readers)
    written = sum((writer.done_with for writer in writers), Counter[str]())
    stale = [about for reader in readers for about in reader.stale]
    figures = (
        f"{total} reads in {seconds:.0f} s, {hits} of them from the cache ({100 * hits / total:.0f} %), "
        f"{len(stale)} stale; {written.total()} writes meanwhile: {dict(written)}"
    )
    return figures, stale
