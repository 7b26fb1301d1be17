"""Importing chunks through the SDK into a searchable, indexed library, beside a script that does no more than it must.

The script COPYs the same rows into tables of the same columns and builds the same indexes, with psycopg, in the same
run. Vectors given (384 dimensions): at most 1.25 times the script's time. Text for the local embedder: at most 2 times,
plus the embedder's own time. Peak memory of service and client must be flat, within 20 %, from a tenth of the chunks to
all of them. Starts a PostgreSQL and services of its own; some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from psycopg.types.json import Jsonb

from pgshelf import embedded, migrate
from pgshelf.settings import Settings
from pgshelf_client import Client, ConnectionFailed
from pgshelf_client.types import NewDocument

DIMENSION = 384
PER_DOCUMENT = 10
BLOCK = 100  # documents that are made at a time
GOAL, TEXT_GOAL, MEMORY_GOAL = 1.25, 2.0, 1.2
DONE = 0.1  # seconds between two looks whether the index is there


def documents(chunks: int, dimension: int) -> Iterator[NewDocument]:
    """Documents of ten chunks of about 50 words, the same ones each time; without vectors where `dimension` is 0."""
    draw = np.random.default_rng(7)
    letters = draw.integers(97, 117, size=(20_000, 7), dtype=np.uint8).tobytes().decode()
    words = np.array([letters[7 * n : 7 * n + draw.integers(3, 8)] for n in range(20_000)])
    centres = np.random.default_rng(11).normal(size=(200, max(dimension, 1))).astype(np.float32)
    for first in range(0, chunks // PER_DOCUMENT, BLOCK):
        count = min(BLOCK, chunks // PER_DOCUMENT - first)
        ranks = np.minimum(draw.zipf(1.3, size=(count * PER_DOCUMENT, 50)) - 1, 19_999)
        texts = [" ".join(words[row]) for row in ranks]
        near = centres[draw.integers(0, len(centres), size=len(texts))]
        vectors = near + 0.6 * draw.standard_normal(size=near.shape, dtype=np.float32)
        for number in range(count):
            own = range(number * PER_DOCUMENT, (number + 1) * PER_DOCUMENT)
            given: list[Any] = [
                {"text": texts[i], "embedding": vectors[i]} if dimension else {"text": texts[i]} for i in own
            ]
            yield {"key": f"d{first + number}", "metadata": {"year": 1990 + number % 30}, "chunks": given}


def peak(process: int) -> float:
    """The most memory a process has had, in MiB."""
    [line] = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def serving(url: str, folder: Path) -> contextlib.AbstractContextManager[tuple[str, int]]:
    """A service with one process; gives its address and the process that does the work."""

    @contextlib.contextmanager
    def run() -> Iterator[tuple[str, int]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"PGSHELF_DATABASE_URL": url, "PGSHELF_WORKERS": "1", "PGSHELF_DATA_DIR": str(folder)}
        command = [str(Path(sys.executable).with_name("pgshelf")), "serve", "--port", str(port)]
        with (folder / "serve.log").open("wb") as log:
            process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            with Client(address) as client:
                for _ in range(600):
                    with contextlib.suppress(ConnectionFailed):
                        client.health()
                        break
                    time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            # granian's worker is the child that has grown most
            yield address, max(map(int, children), key=peak)
        finally:
            process.terminate()
            process.wait(60)

    return run()


def import_all(address: str, chunks: int, dimension: int, library: str) -> None:
    """What the client's process does: import, wait for the index, print the seconds of both and its peak memory."""
    with Client(address) as client:
        started = time.perf_counter()
        result = client.import_documents(library, documents(chunks, dimension), progress=None)
        imported = time.perf_counter() - started
        if result.created != chunks // PER_DOCUMENT:
            raise SystemExit(f"not everything was imported: {result}")
        while True:
            index = client.get_index(library)  # statistics would count all rows each time
            if index.state == "ready" and index.actual["type"] == "hnsw":
                break
            time.sleep(DONE)
        print(json.dumps([imported, time.perf_counter() - started, peak(os.getpid())]))


def ours(url: str, folder: Path, chunks: int, dimension: int) -> tuple[float, float, float, float, str]:
    """Seconds of the import and in all, peak memory of client and service, and the shelf."""
    name = f"l{chunks}-{dimension}"
    with serving(url, folder) as (address, process):
        with Client(address) as client:
            if dimension:
                client.create_library(name, embedder={"provider": "none"}, dimension=dimension)
            else:
                client.create_library(name, embedder={"provider": "local"})
        command = [sys.executable, "-m", "benchmarks.ingest", "--client", address, name]
        command += ["--chunks", str(chunks), "--dimension", str(dimension)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        imported, seconds, memory = json.loads(done.stdout)
        return imported, seconds, memory, peak(process), name


def script(url: str, library: str, chunks: int, dimension: int, vectors: Any = None) -> float:
    """What a script takes that knows its rows, COPYs them, and builds the indexes that the library has now."""
    with psycopg.connect(url, autocommit=True) as db:
        register_vector(db)
        found = db.execute("select id, shelf from pgshelf.libraries where name = %s", [library])
        [(library_id, shelf)] = found.fetchall()
        definitions = [
            text.replace("pgshelf.", "plain.", 1) if "ON pgshelf." in text else text
            for (text,) in db.execute(
                """select replace(pg_get_indexdef(i.indexrelid), 'ON pgshelf.' || c.relname, 'ON plain.'
                  || case when c.relname = 'documents' then 'documents' else 'chunks' end)
                from pg_index i join pg_class c on c.oid = i.indrelid
                where i.indrelid in ('pgshelf.documents'::regclass, %s::regclass) order by i.indexrelid""",
                [f"pgshelf.chunks_s{shelf}"],
            )
        ]
        db.execute("drop schema if exists plain cascade")
        db.execute("create schema plain")
        for table in ("documents", "chunks"):
            db.execute(
                f"create table plain.{table} (like pgshelf.{table} including defaults including generated"
                " including constraints including storage)".encode()
            )
        started = time.perf_counter()
        place = 0
        with db.cursor() as cursor:
            with cursor.copy(
                "copy plain.documents (place, library_id, id, key, metadata) from stdin (format binary)"
            ) as copy:
                copy.set_types(["int4", "uuid", "uuid", "text", "jsonb"])
                for number, document in enumerate(documents(chunks, dimension)):
                    document_id = uuid.UUID(int=number + 1)
                    copy.write_row((1, library_id, document_id, document["key"], Jsonb(document["metadata"])))
            with cursor.copy(
                "copy plain.chunks (shelf, place, library_id, document_id, ordinal, text, metadata, embedding,"
                " language) from stdin (format binary)"
            ) as copy:
                copy.set_types(["int4", "int4", "uuid", "uuid", "int4", "text", "jsonb", "vector", "text"])
                empty = Jsonb({})
                for number, document in enumerate(documents(chunks, dimension)):
                    document_id = uuid.UUID(int=number + 1)
                    for ordinal, chunk in enumerate(document["chunks"] or ()):
                        vector = chunk["embedding"] if vectors is None else vectors[place]
                        place += 1
                        given = (shelf, 1, library_id, document_id, ordinal, chunk["text"], empty, vector, "english")
                        copy.write_row(given)
        copied = time.perf_counter() - started
        db.execute("set maintenance_work_mem = '1GB'")
        for definition in definitions:
            before = time.perf_counter()
            db.execute(definition.encode())
            print(f"    {time.perf_counter() - before:6.1f} s {definition.split(' USING ')[0][:60]}")
        db.execute("analyze plain.chunks")
        seconds = time.perf_counter() - started
        print(f"    script: copied in {copied:.1f} s, all in {seconds:.1f} s")
        db.execute("drop schema plain cascade")
        return seconds


def embedding(chunks: int) -> tuple[float, Any]:
    """What the local embedder takes for the texts by itself, and its vectors."""
    from pgshelf.embedders import embedder_for

    embedder = embedder_for(Settings(), {"provider": "local"})
    asyncio.run(embedder.embed(["warm"], "document"))
    texts = [chunk["text"] for document in documents(chunks, 0) for chunk in document["chunks"] or ()]
    started = time.perf_counter()
    parts = [asyncio.run(embedder.embed(texts[at : at + 500], "document")) for at in range(0, len(texts), 500)]
    return time.perf_counter() - started, np.concatenate(parts)


def verdict(said: str, ratio: float, goal: float) -> None:
    print(f"{said}: {ratio:.2f} ({'kept' if ratio <= goal else 'MISSED'}, {goal} at most)")


def main() -> None:
    """Measure all of it, or be the client of one import."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="20,000 chunks")
    parser.add_argument("--dimension", type=int, default=DIMENSION)
    parser.add_argument("--client", nargs=2, metavar=("ADDRESS", "LIBRARY"))
    options = parser.parse_args()
    if options.client:
        import_all(options.client[0], options.chunks, options.dimension, options.client[1])
        return
    chunks = 20_000 if options.quick else options.chunks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = embedded.start(folder / "data", 18)
        try:
            url = server.url()
            migrate.upgrade(url, warn=False)
            few = ours(url, folder, max(10_000, chunks // 10), options.dimension)
            many = ours(url, folder, chunks, options.dimension)
            print(f"{chunks} chunks with vectors: imported in {many[0]:.1f} s, indexed after {many[1]:.1f} s")
            verdict("times the script", many[1] / script(url, many[4], chunks, options.dimension), GOAL)
            for who, before, after in (("client", few[2], many[2]), ("service", few[3], many[3])):
                print(f"peak memory of the {who}: {before:.0f} MiB, {after:.0f} MiB")
                verdict("times as much for all", after / before, MEMORY_GOAL)
            text = ours(url, folder, chunks, 0)
            print(f"{chunks} chunks of text: imported in {text[0]:.1f} s, indexed after {text[1]:.1f} s")
            own, vectors = embedding(chunks)
            print(f"the embedder alone: {own:.1f} s")
            verdict(
                "times the script, without it", (text[1] - own) / script(url, text[4], chunks, 0, vectors), TEXT_GOAL
            )
        finally:
            server.stop()


if __name__ == "__main__":
    main()
