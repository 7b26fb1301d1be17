"""A disk that is full in the middle of an import: a clear problem, nothing lost that was answered, and it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from pgshelf import embedded, migrate
from tests.conftest import MakeClient, MakeSettings
from tests.rest.asking import library, ok

MEBIBYTE = 1024 * 1024
PATH = "/v1/libraries/shelf"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Outside of pytest's own, which only its owner may enter: PostgreSQL may be another user."""
    with tempfile.TemporaryDirectory(prefix="pgshelf-test-") as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 16 MiB. Only root may mount one."""
    disk = folder / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={16 * MEBIBYTE},mode=711", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here; needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def database_on_it(folder: Path, small_disk: Path, postgres_version: int) -> Iterator[str]:
    """A database whose chunks lie on the small disk, and its log of writes elsewhere."""
    server = embedded.start(folder / "server", postgres_version if postgres_version in embedded.VERSIONS else 18)
    try:
        url = server.url()
        migrate.upgrade(url, warn=False)
        space = small_disk / "space"
        space.mkdir()
        owner = next((folder / "server").rglob("PG_VERSION")).stat()
        os.chown(space, owner.st_uid, owner.st_gid)
        with psycopg.connect(url, autocommit=True) as db:
            db.execute(f"create tablespace small location '{space}'".encode())
            db.execute("alter table pgshelf.chunks_s0 set tablespace small")
        yield url
    finally:
        server.stop()


def line(number: int) -> bytes:
    vector = np.random.default_rng(number).normal(size=256).astype(np.float32).tolist()
    return (
        json.dumps({"key": f"k{number}", "chunks": [{"text": f"text {number}", "embedding": vector}]}).encode() + b"\n"
    )


@pytest.mark.unwatched
async def test_disk_full_in_the_middle_of_an_import(
    small_disk: Path, database_on_it: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_on_it, worker_enabled=False, import_batch=200))
    await library(client, embedder={"provider": "none"}, dimension=256)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - MEBIBYTE))
    total = 3000
    headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": "all of it"}

    async def body() -> AsyncIterator[bytes]:
        for number in range(total):
            yield line(number)

    async def send() -> list[dict[str, Any]]:
        response = await client.post(f"{PATH}/import", content=body(), headers=headers, timeout=120)
        return [json.loads(item) for item in response.text.splitlines()]

    *batches, last = await send()
    assert last["error"]["status"] == 503 and last["error"]["code"] == "storage_full", last
    assert "space" in last["error"]["detail"]
    committed = last["committed_lines"]
    assert 0 < committed < total and committed == batches[-1]["lines"][1]
    refused = await client.put(
        f"{PATH}/documents/x",
        content=line(total).replace(b'"key"', b'"title"'),
        headers={"Content-Type": "application/json"},
    )
    assert refused.status_code == 503 and refused.json()["code"] == "storage_full"
    assert ok(await client.get(f"{PATH}/stats"))["documents"] == committed  # all that was answered, and no more
    ballast.unlink()
    *_, last = await send()
    assert (last["skipped"], last["created"], last["failed"]) == (committed, total - committed, 0)
    assert ok(await client.get(f"{PATH}/stats"))["chunks"] == total
    vector = json.loads(line(17))["chunks"][0]["embedding"]
    found = ok(await client.post(f"{PATH}/search", json={"vector": vector, "k": 1}))
    assert found["hits"][0]["key"] == "k17"
