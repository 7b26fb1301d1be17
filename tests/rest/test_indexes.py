"""The index of a library over REST: asked for, refused, watched while it is built."""

from __future__ import annotations

from typing import Any

import httpx2
import msgspec
import numpy as np
import psycopg
import pytest

from tests.rest.asking import at, document, library, ok, problem, until
from tests.shelving import reconcile

INDEX = at("libraries", "shelf", "index")


@pytest.fixture
async def quiet(settings: Any, make_client: Any) -> httpx2.AsyncClient:
    """A service without a worker: the tests say when work is done."""
    made: httpx2.AsyncClient = await make_client(msgspec.structs.replace(settings, worker_enabled=False))
    return made


async def documents(client: httpx2.AsyncClient, count: int) -> None:
    given = np.random.default_rng(1).normal(size=(count, 3))
    await document(client, "all", *([float(x) for x in vector] for vector in given))


async def test_a_new_library_is_searched_exactly(quiet: httpx2.AsyncClient) -> None:
    await library(quiet)
    found = ok(await quiet.get(INDEX))
    estimate = found.pop("estimate")
    assert found == {
        "wanted": {"type": "auto"}, "actual": {"type": "flat"}, "state": "ready", "progress": 1.0, "phase": None,
        "error": None, "shelf": 0, "moving": False,
    }  # fmt: skip
    assert estimate == {"rows": 0, "bytes": 0, "memory_bytes": 0, "seconds": 0.0}


async def test_an_index_is_accepted_then_built_then_there(quiet: httpx2.AsyncClient, settings: Any) -> None:
    await library(quiet)
    await documents(quiet, 40)
    wanted = {"type": "hnsw", "m": 8}
    queued = ok(await quiet.put(INDEX, json=wanted), 202)
    assert (queued["wanted"], queued["actual"]) == (wanted, {"type": "flat"})
    assert (queued["state"], queued["progress"], queued["phase"]) == ("building", 0.0, "queued")
    assert queued["estimate"]["rows"] == 40
    assert queued["estimate"]["bytes"] > 0 and queued["estimate"]["memory_bytes"] > 0
    stats = ok(await quiet.get(at("libraries", "shelf", "stats")))
    assert (stats["shelf"], stats["index"]) == (0, {"type": "flat", "state": "building", "progress": 0.0})

    phases = []

    async def look(step: str) -> None:
        found = ok(await quiet.get(INDEX))
        phases.append((found["progress"], found["phase"]))
        hits = ok(await quiet.post(at("libraries", "shelf", "search"), json={"vector": [1, 0, 0], "k": 5}))["hits"]
        assert len(hits) == 5

    await reconcile(settings, step=look)
    assert ("copying" in {phase for _, phase in phases}) and ("catching up" in {phase for _, phase in phases})
    assert [progress for progress, _ in phases] == sorted(progress for progress, _ in phases)
    ready = ok(await quiet.get(INDEX))
    assert (ready["state"], ready["progress"], ready["phase"], ready["moving"]) == ("ready", 1.0, None, False)
    assert ready["actual"] | {"serial": 0} == {
        "type": "hnsw", "m": 8, "ef_construction": 64, "storage": "halfvec", "rows": 40, "serial": 0
    }  # fmt: skip
    assert ready["shelf"] > 0
    assert ok(await quiet.put(INDEX, json=wanted)) == ready  # it is so already
    stats = ok(await quiet.get(at("libraries", "shelf", "stats")))
    assert (stats["shelf"], stats["index"]) == (
        ready["shelf"],
        {"type": "hnsw", "state": "ready", "progress": 1.0},
    )


async def test_the_worker_of_the_service_builds_it(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, worker_interval=0.02))
    await library(client, index={"type": "flat"})
    await documents(client, 40)

    async def ready() -> bool:
        found = ok(await client.get(INDEX))
        return found["state"] == "ready" and found["actual"]["type"] == found["wanted"]["type"] and found["shelf"] > 0

    await until(ready)
    for wanted in ({"type": "lsh", "bits": 64, "seed": 3}, {"type": "hnsw", "storage": "bit"}):
        ok(await client.put(INDEX, json=wanted), 202)
        await until(ready)
        assert ok(await client.get(INDEX))["actual"].items() >= wanted.items()
        hits = ok(await client.post(at("libraries", "shelf", "search"), json={"vector": [1, 0, 0], "k": 40}))["hits"]
        assert len({hit["chunk_id"] for hit in hits}) == 40


async def test_a_library_is_created_with_an_index(quiet: httpx2.AsyncClient, settings: Any) -> None:
    await library(quiet, metric="l2", index={"type": "kdtree"})
    found = ok(await quiet.get(INDEX))
    assert (found["wanted"], found["state"], found["shelf"]) == ({"type": "kdtree"}, "building", 0)
    await reconcile(settings)
    found = ok(await quiet.get(INDEX))
    assert (found["actual"]["type"], found["state"]) == ("kdtree", "ready")


@pytest.mark.parametrize(
    ("index", "path"),
    [
        ({}, "type"),
        ({"type": "btree"}, "type"),
        ({"type": "hnsw", "m": 1}, "m"),
        ({"type": "hnsw", "m": "16"}, "m"),
        ({"type": "hnsw", "storage": None}, "storage"),
        ({"type": "hnsw", "ef": 10}, None),
    ],
    ids=str,
)
async def test_what_is_malformed_is_refused(quiet: httpx2.AsyncClient, index: Any, path: str | None) -> None:
    await library(quiet)
    for answer in (
        await quiet.put(INDEX, json=index),
        await quiet.post(
            "/v1/libraries", json={"name": "other", "embedder": {"provider": "none"}, "dimension": 3, "index": index}
        ),
    ):
        refused = problem(answer, 400, "validation_failed")
        if path and index:
            assert refused["errors"][0]["path"].removeprefix("index.") == path
    assert ok(await quiet.get(INDEX))["wanted"] == {"type": "auto"}


@pytest.mark.parametrize(
    ("index", "says"),
    [({"type": "flat", "m": 16}, "has no m"), ({"type": "hnsw", "m": 50}, "ef_construction 100 or more")],
    ids=str,
)
async def test_what_a_type_has_not_is_refused(quiet: httpx2.AsyncClient, index: Any, says: str) -> None:
    await library(quiet)
    assert says in problem(await quiet.put(INDEX, json=index), 400, "validation_failed")["detail"]


async def test_what_is_impossible_is_refused_with_what_would_work(quiet: httpx2.AsyncClient) -> None:
    await library(quiet, metric="l1")
    refused = problem(await quiet.put(INDEX, json={"type": "ivfflat"}), 422, "index_impossible")
    assert refused["sqlstate"] == "PS014"
    assert refused["detail"] == (
        'There is no ivfflat index for the metric l1. Possible here: {"type": "hnsw", "storage": "vector"}, '
        "and flat, which searches exactly."
    )
    body = {"name": "other", "embedder": {"provider": "none"}, "dimension": 5000, "index": {"type": "kdtree"}}
    problem(await quiet.post("/v1/libraries", json=body), 422, "index_impossible")
    assert [item["name"] for item in ok(await quiet.get("/v1/libraries"))["items"]] == ["shelf"]


async def test_a_library_that_is_not_there(quiet: httpx2.AsyncClient) -> None:
    problem(await quiet.get(INDEX), 404, "library_not_found")
    problem(await quiet.put(INDEX, json={"type": "flat"}), 404, "library_not_found")


async def test_a_failure_is_told_and_asking_again_tries_again(
    quiet: httpx2.AsyncClient, settings: Any, database_url: str
) -> None:
    await library(quiet, metric="l2")
    made = await document(quiet, "large", [1e6, 0, 0])
    wanted = {"type": "hnsw", "storage": "halfvec"}
    ok(await quiet.put(INDEX, json=wanted), 202)
    await reconcile(settings)
    failed = ok(await quiet.get(INDEX))
    assert (failed["state"], failed["actual"], failed["shelf"]) == ("failed", {"type": "flat"}, 0)
    assert "out of range for type halfvec" in failed["error"]
    assert failed["progress"] < 1 and failed["phase"] == "waiting to try again"

    ok(await quiet.delete(at("libraries", "shelf", "documents", made["id"])), 204)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update pgshelf.libraries set index_after = now() + interval '5 minutes'")
    again = ok(await quiet.put(INDEX, json=wanted), 202)
    assert (again["state"], again["error"]) == ("building", None)
    await reconcile(settings)
    assert ok(await quiet.get(INDEX))["state"] == "ready"


async def test_a_deleted_library_has_no_index(quiet: httpx2.AsyncClient, settings: Any) -> None:
    await library(quiet, index={"type": "hnsw"})
    await reconcile(settings)
    ok(await quiet.delete(at("libraries", "shelf")), 204)
    problem(await quiet.get(INDEX), 404, "library_not_found")
    await library(quiet)
    assert ok(await quiet.get(INDEX))["wanted"] == {"type": "auto"}


async def test_what_an_index_is_too_coarse_for_is_said(quiet: httpx2.AsyncClient, settings: Any) -> None:
    await library(quiet, metric="l2")
    await documents(quiet, 40)
    ok(await quiet.put(INDEX, json={"type": "hnsw", "storage": "halfvec"}), 202)
    await reconcile(settings)
    search = at("libraries", "shelf", "search")
    said = problem(await quiet.post(search, json={"vector": [1e6, 0, 0]}), 422, "invalid_vector")
    assert "halfvec" in said["detail"]
    assert len(ok(await quiet.post(search, json={"vector": [1e6, 0, 0], "exact": True}))["hits"]) == 10
    far = {"key": "far", "chunks": [{"text": "far", "embedding": [1e6, 0, 0]}]}
    problem(await quiet.post(at("libraries", "shelf", "documents"), json=far), 422, "invalid_vector")
