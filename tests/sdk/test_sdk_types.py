"""What type checkers know of the client: closed sets are those of the server, and what is not among them is found."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import httpx2
import pytest

import pgshelf_client
from pgshelf.app import create_app
from pgshelf.settings import Settings
from pgshelf_client import Client

pytestmark = pytest.mark.watched

ROOT = Path(__file__).parents[2]
MAPPINGS = {  # of the client, and what the server calls it
    "ChunkingChoice": "ChunkingChoice", "EmbedderChoice": "EmbedderChoice", "Fusion": "Fusion",
    "IndexChoice": "IndexChoice", "Like": "Like", "Mmr": "Mmr", "NewChunk": "ChunkInput",
    "NewDocument": "DocumentInput", "Rerank": "RerankChoice", "Search": "SearchRequest", "SortKey": "SortKey",
}  # fmt: skip
METHODS: dict[Callable[..., Any], str] = {
    Client.create_library: "CreateLibrary", Client.update_library: "PatchLibrary", Client.set_index: "IndexChoice",
    Client.set_embedder: "EmbedderChoice", Client.create_key: "CreateKey", Client.rotate_key: "RotateKey",
    Client.create_token: "CreateToken", Client.search: "SearchRequest", Client.search_libraries: "LibrariesRequest",
}  # fmt: skip
# methods whose parameters go into the query or the headers
PARAMETERS: list[tuple[Callable[..., Any], str, str, str]] = [
    (Client.audit, "outcome", "/v1/audit", "outcome"),
    (Client.chunks, "include", "/v1/libraries/{library}/documents/{document}/chunks", "include"),
    (Client.get_chunk, "include", "/v1/libraries/{library}/chunks/{chunk}", "include"),
    (Client.__init__, "consistency", "/v1/libraries", "Pgshelf-Consistency"),
]
# each line that ends in "# wrong" has a mistake, the others have none
USE = """
from pgshelf_client import Client, Mmr, NewDocument, Search

client = Client(consistency="strong")
Client(consistency="weak")  # wrong
client.search("a", "x", mode="text", include=["text", "highlight"], like={"document": "k"}, mmr={"lambda": 0.5})
client.search("a", "x", fusion={"method": "weighted", "weights": [1, 2]}, group_by="document", include="text")
client.search("a", "x", rerank={"provider": "cohere", "candidates": 20}, filter={"year": {"$gte": 2020}})
client.search("a", "x", mode="vectr")  # wrong
client.search("a", "x", include=["txt"])  # wrong
client.search("a", "x", like={"documnt": "x"})  # wrong
client.search("a", "x", fusion={"method": "rff"})  # wrong
client.search("a", "x", mmr={"lamda": 0.5})  # wrong
client.search("a", "x", rerank={"candidates": 20})  # wrong
client.search("a", "x", group_by="chunk")  # wrong
client.search_batch("a", [{"query": "x", "k": 3}, {"vector": [1, 2], "mode": "vector"}])
client.search_batch("a", [{"query": "x", "mode": "vectr"}])  # wrong
client.search_libraries(["a", "b"], "x", mode="words")  # wrong
client.set_index("a", "hnsw", storage="bit")
client.set_index("a", "hnsww")  # wrong
client.set_index("a", "hnsw", storage="byte")  # wrong
client.set_embedder("a", "cohere", truncate="end", embedding_type="binary")
client.set_embedder("a", "cohre")  # wrong
client.create_key("a", "admin")
client.create_key("a", "amin")  # wrong
client.create_token(role="raeder")  # wrong
client.create_library("a", embedder={"provider": "none"}, dimension=3, metric="l2", attributes={"year": "number"})
client.create_library("a", index={"type": "lsh", "bits": 64}, chunking={"size": 500}, metadata={"any": ["thing"]})
client.create_library("a", metric="l3")  # wrong
client.create_library("a", embedder={"model": "m"})  # wrong
client.create_library("a", attributes={"year": "int"})  # wrong
client.update_library("a", chunking={"sise": 500})  # wrong
client.query_documents("a", {"lang": "en"}, sort=[{"field": "year", "order": "desc"}])
client.query_documents("a", sort=[{"field": "year", "order": "down"}])  # wrong
client.audit(outcome="did")  # wrong
client.chunks("a", "k", include=["embedding"])
client.get_chunk("a", "c", include=["text"])  # wrong
mmr: Mmr = {"lambda": 0.5}
searches: list[Search] = [{"query": "x", "mmr": mmr}]
documents: list[NewDocument] = [{"key": "k", "text": "t"}]
client.search_batch("a", searches)
client.add_documents("a", documents)
client.add_documents("a", [{"text": "t", "chunks": [{"text": "t", "embedding": [1, 2]}]}])
client.add_documents("a", [{"txt": "t"}])  # wrong
"""


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """The OpenAPI document."""

    async def asked() -> dict[str, Any]:
        app = create_app(Settings(database_url="postgresql://127.0.0.1:9/none", auth="off"))
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found: dict[str, Any] = (await client.get("/schema")).json()
            return found

    return asyncio.run(asked())


def literals(hint: Any) -> Iterator[str]:
    """What a type allows of a closed set, wherever in it."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from literals(part)


def enums(schema: Any) -> Iterator[str]:
    """The same, of a JSON schema."""
    if isinstance(schema, list):
        for part in schema:
            yield from enums(part)
    elif isinstance(schema, dict):
        yield from (value for value in [*schema.get("enum", []), schema.get("const")] if value is not None)
        for name in ("anyOf", "oneOf", "items", "additionalProperties", "schema"):
            yield from enums(schema.get(name))


def test_mappings_have_the_members_of_the_server_and_their_values(described: dict[str, Any]) -> None:
    theirs = described["components"]["schemas"]
    ours = {name for name in pgshelf_client.__all__ if is_typeddict(getattr(pgshelf_client, name))}
    assert ours == set(MAPPINGS)
    for name, called in MAPPINGS.items():
        mapping, schema = getattr(pgshelf_client, name), theirs[called]
        hints = get_type_hints(mapping)
        assert {*hints} == {*schema["properties"]}, name
        assert mapping.__required_keys__ == {*schema.get("required", [])}, name
        for field, hint in hints.items():
            assert {*literals(hint)} == {*enums(schema["properties"][field])}, (name, field)


def test_parameters_have_the_values_of_the_server(described: dict[str, Any]) -> None:
    for method, called in METHODS.items():
        schema = described["components"]["schemas"][called]["properties"]
        hints = {name: hint for name, hint in get_type_hints(method).items() if name in schema}
        assert {*hints} == {*schema}, method
        for name, hint in hints.items():
            assert {*literals(hint)} == {*enums(schema[name])}, (method, name)
    for method, name, path, called in PARAMETERS:
        parameters = {each["name"]: each for each in described["paths"][path]["get"]["parameters"]}
        assert {*literals(get_type_hints(method)[name])} == {*enums(parameters[called])} != set(), method


def test_mypy_finds_what_is_not_among_them_and_takes_plain_mappings(tmp_path: Path) -> None:
    file = tmp_path / "use.py"
    file.write_text(USE)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--show-column-numbers", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    wrong = {number for number, line in enumerate(USE.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, done.stdout + done.stderr
