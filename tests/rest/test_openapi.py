"""The OpenAPI document at /schema: complete, and its examples work as they stand."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import jsonschema_rs
import msgspec
import pytest

from pgshelf.app import create_app
from pgshelf.embedders import PROVIDERS
from pgshelf.errors import CODES, RETRY_AFTER
from pgshelf.settings import Settings
from tests.rest.asking import chunks, key, ok

pytestmark = pytest.mark.xdist_group("openapi")  # the document is made once

LINES = "application/x-ndjson"
ORDER = [  # each needs what those before it made
    "health", "ready", "createLibrary", "listLibraries", "getLibrary", "putDocument", "addDocument", "addEvent",
    "listDocuments", "listChanges", "getDocument", "updateDocument", "listChunks", "updateChunk", "getChunk",
    "search", "searchBatch", "searchLibraries", "libraryStats", "updateLibrary", "getIndex", "putIndex",
    "getEmbedder", "putEmbedder", "cancelEmbedder",
    "queryDocuments", "facets", "addDocuments", "importDocuments", "exportDocuments", "updateDocuments",
    "retryEmbeddings", "deleteDocuments", "deleteChunk", "getCache", "clearCache",
    "deleteDocument", "deleteLibrary",
    "createToken", "createKey", "listKeys", "getKey", "rotateKey", "revokeKey", "listAudit",
    "getReplication", "startBackup", "listBackups",
]  # fmt: skip


Described = dict[str, Any]


@pytest.fixture(scope="module")
def described() -> Described:
    """The document, made once: that takes longer than all that is asked of it."""

    async def asked() -> Described:
        app = create_app(Settings(database_url="postgresql://127.0.0.1:9/none", auth="off"))
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return ok(await client.get("/schema"))

    return asyncio.run(asked())


def operations(document: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    found = [(path, method, item) for path, methods in document["paths"].items() for method, item in methods.items()]
    by_id = {item["operationId"]: (path, method, item) for path, method, item in found}
    assert len(by_id) == len(found)
    return by_id


def check(document: dict[str, Any], name: str, value: Any) -> None:
    """Refuse what does not fit the component's schema, or holds what the schema does not name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(value)
    assert set(value) <= set(document["components"]["schemas"][name]["properties"]), name


def component(media: dict[str, Any]) -> str:
    found: str = media["schema"]["$ref"].rpartition("/")[2]
    return found


def example(document: dict[str, Any], operation: dict[str, Any]) -> Any:
    [schema, *_] = [media["schema"] for media in operation["requestBody"]["content"].values()]
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["examples"][0]


def test_every_operation_says_what_it_does(described: Described) -> None:
    found = operations(described)
    assert set(found) == set(ORDER)
    for path, method, item in found.values():
        assert item["summary"] and item["description"] and item["tags"], (path, method)
        for parameter in item.get("parameters", []):
            assert parameter["description"], (path, method, parameter)
            assert parameter["in"] != "path" or parameter["example"]


async def test_examples_work_as_they_stand(
    settings: Any, make_client: Any, database_url: str, tmp_path: Path, described: Described
) -> None:
    # the backup fails at once: a real one would copy the databases of all tests
    nowhere = {"backup_directory": tmp_path / "backups", "backup_url": "postgresql://127.0.0.1:9/none"}
    client = await make_client(msgspec.structs.replace(settings, **nowhere))
    client.headers["Authorization"] = f"Bearer {key(database_url, 'first', 'admin')}"
    found = operations(described)
    chunk = ""
    for name in ORDER:
        path, method, item = found[name]
        for parameter in item.get("parameters", []):
            if parameter["in"] == "path":
                value = chunk if parameter["name"] == "chunk" else parameter["example"]
                path = path.replace("{" + parameter["name"] + "}", quote(value, safe=""))
        body = example(described, item) if "requestBody" in item else None
        if body and LINES in item["requestBody"]["content"]:
            sent: dict[str, Any] = {"content": json.dumps(body).encode() + b"\n", "headers": {"Content-Type": LINES}}
            response = await client.request(method.upper(), path, **sent)
        else:
            response = await client.request(method.upper(), path, json=body)
        assert response.is_success, (name, response.text)
        said = item["responses"][str(response.status_code)]
        assert {header.lower() for header in said["headers"]} <= set(response.headers), name
        assert {"etag", "location"} & set(response.headers) <= {header.lower() for header in said["headers"]}, name
        if LINES in said.get("content", {}):
            first, *_, last = map(json.loads, response.content.splitlines())
            check(described, component(said["content"][LINES]), first)
            check(described, "ImportDone" if name == "importDocuments" else "DocumentInput", last)
        elif response.content:
            check(described, component(said["content"]["application/json"]), response.json())
        if name == "listChunks":
            chunk = response.json()["items"][0]["id"]
        if name == "search":
            assert response.json()["hits"]


def test_everything_is_described(described: Described) -> None:
    for name, schema in described["components"]["schemas"].items():
        assert schema["description"], name
        for field, what in schema["properties"].items():
            assert what.get("description"), f"{name}.{field}"
    for name, (_, _, item) in operations(described).items():
        for status, response in item["responses"].items():
            assert response["description"] not in ("", HTTPStatus(int(status)).description), (name, status)
            assert {"X-Request-Id", "Server-Timing"} <= set(response["headers"]), (name, status)
            assert ("WWW-Authenticate" in response["headers"]) == (status == "401"), (name, status)
            assert ("Retry-After" in response["headers"]) == (int(status) in RETRY_AFTER), (name, status)
            for media in response.get("content", {}).values():
                assert component(media) in described["components"]["schemas"], (name, status)


def test_examples_of_answers_fit_their_schemas(described: Described) -> None:
    schemas = described["components"]["schemas"]
    answers = {"Library", "Stats", "Document", "Chunk", "SearchAnswer", "ProblemBody", "Health", "Ready"}
    answers |= {"DocumentsFound", "Affected", "FacetsAnswer", "EventTaken", "Changes", "Change", "Retried"}
    answers |= {"Key", "NewKey", "Token", "Replication", "Server", "Backup", "BackupList"}
    answers |= {"DocumentResults", "ImportBatch", "ImportDone", "ImportError"}
    assert answers <= {name for name in schemas if "examples" in schemas[name]}
    for name, schema in schemas.items():
        for value in schema.get("examples", []):
            check(described, name, value)


def test_what_answers_may_say_is_listed(described: Described) -> None:
    schemas = described["components"]["schemas"]
    assert schemas["Library"]["properties"]["metric"]["enum"] == ["cosine", "inner_product", "l1", "l2"]
    assert schemas["EmbedderUsed"]["properties"]["provider"]["enum"] == list(PROVIDERS)
    for name in ("Document", "Chunk"):
        assert schemas[name]["properties"]["status"]["enum"] == ["failed", "pending", "ready"]
    assert schemas["SearchRequest"]["properties"]["include"]["default"] == ["text", "metadata", "document"]


async def test_messagepack_is_documented_where_it_is_answered(client: httpx2.AsyncClient, described: Described) -> None:
    for name, (_, _, item) in operations(described).items():
        said = "a document in each line" if name == "importDocuments" else "MessagePack"
        assert said in item.get("requestBody", {"description": said})["description"], name
        for status, response in item["responses"].items():
            if int(status) < 300 and status != "204":
                either = {"application/json", "application/msgpack"}
                expected = {LINES} if name in ("importDocuments", "exportDocuments") else either
                assert set(response["content"]) - {"text/event-stream"} == expected, (name, status)
    response = await client.get("/v1/libraries", headers={"Accept": "application/msgpack"})
    assert response.headers["content-type"] == "application/msgpack"
    check(described, "Page_Library_", msgspec.msgpack.decode(response.content))


def test_what_is_refused_is_said(described: Described) -> None:
    schemas = described["components"]["schemas"]
    for name in (
        "CreateLibrary",
        "PatchLibrary",
        "DocumentInput",
        "ChunkInput",
        "PatchDocument",
        "EventInput",
        "PatchChunk",
        "DocumentQuery",
        "UpdateDocuments",
        "DeleteDocuments",
        "RetryEmbeddings",
        "FacetsRequest",
        "CreateKey",
        "RotateKey",
        "CreateToken",
        "StartBackup",
        "AddDocuments",
    ):
        assert schemas[name]["additionalProperties"] is False, name
    search = schemas["SearchRequest"]
    assert search["additionalProperties"] is False
    assert search["properties"]["offset"]["minimum"] == 0 and search["properties"]["k"]["minimum"] == 1


def test_a_body_in_which_nothing_need_be_said_may_be_left_out(described: Described) -> None:
    bodies = {name: item["requestBody"] for name, (*_, item) in operations(described).items() if "requestBody" in item}
    assert {name for name, body in bodies.items() if not body["required"]} == {
        "createToken", "rotateKey", "startBackup", "retryEmbeddings", "queryDocuments"
    }  # fmt: skip


def test_whatever_may_ask_a_provider_may_fail_with_it(described: Described) -> None:
    assert {name for name, (*_, item) in operations(described).items() if "502" in item["responses"]} == {
        "createLibrary", "putEmbedder", "addDocument", "putDocument", "updateChunk", "search", "searchBatch",
        "searchLibraries",
    }  # fmt: skip


def test_every_problem_is_documented(described: Described) -> None:
    statuses = set()
    for path, _, item in operations(described).values():
        for status, response in item["responses"].items():
            if int(status) >= 400:
                statuses.add(int(status))
                assert list(response["content"]) == ["application/problem+json"], path
                assert response["content"]["application/problem+json"]["schema"]["$ref"].endswith("/ProblemBody")
        if path.startswith("/v1"):
            assert item.get("security") is None
            assert {"400", "401", "403", "500", "503", "504"} <= set(item["responses"])
    # 405 belongs to no operation: it is the answer to those that are not there
    assert statuses == {status for status, _ in CODES.values()} - {405}
    assert described["components"]["schemas"]["ProblemBody"]["properties"]["code"]["enum"] == sorted(CODES)


def test_the_document_says_how_to_authenticate(described: Described) -> None:
    assert described["security"] == [{"key": []}]
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    open_to_all = {name for name, (_, _, item) in operations(described).items() if item.get("security") == []}
    assert open_to_all == {"health", "ready"}


async def test_the_document_is_about_this_server(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, api_prefix=""))
    described = ok(await client.get("/schema"))
    assert described["openapi"].startswith("3.1") and "/libraries" in described["paths"]
    assert described == ok(await client.get("/schema/openapi.json"))


async def test_the_written_chunks_are_searchable(client: httpx2.AsyncClient, described: Described) -> None:
    """The example of a document has passages."""
    found = operations(described)
    ok(await client.post("/v1/libraries", json={"name": "shelf"}), 201)
    body = example(described, found["addDocument"][2]) | {"key": "k"}
    ok(await client.post("/v1/libraries/shelf/documents", json=body), 201)
    assert await chunks(client, "k")
