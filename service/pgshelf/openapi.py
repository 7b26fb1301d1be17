"""The OpenAPI document at /schema: Litestar's, with exact schemas of what may be sent, and examples that work."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.plugins import JsonRenderPlugin

from pgshelf.chunks import PatchChunk
from pgshelf.documents import PatchDocument
from pgshelf.errors import CODES
from pgshelf.ingest import DocumentInput
from pgshelf.libraries import CreateLibrary, PatchLibrary
from pgshelf.search import SearchRequest

PATHS = {"library": "handbook", "document": "guide/vacuum", "chunk": "6f1c9c1e-2f0d-4c5b-9a39-0d3f5a1b7c21"}
BODIES: dict[type[msgspec.Struct], dict[str, Any]] = {
    CreateLibrary: {"name": "handbook", "description": "How we run things", "metadata": {"team": "operations"}},
    PatchLibrary: {"description": None, "chunking": {"size": 800, "overlap": 80}, "metadata": {"team": "platform"}},
    DocumentInput: {
        "title": "Vacuum",
        "text": "VACUUM reclaims storage occupied by dead tuples.",
        "source": "https://www.postgresql.org/docs/current/sql-vacuum.html",
        "metadata": {"year": 2025},
    },
    PatchDocument: {"title": "VACUUM", "metadata": {"year": 2026, "draft": None}},
    PatchChunk: {"text": "VACUUM takes back what dead tuples occupy.", "metadata": {"reviewed": True}},
    SearchRequest: {"query": "how do I reclaim disk space", "k": 3, "include": ["text", "document"]},
}


class Reference(JsonRenderPlugin):
    """Renders the document as JSON."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The document, completed."""
        return super().render(request, completed(openapi_schema))


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """Put in what Litestar's own schemas leave out: unknown fields are refused, bounds of zero, examples, codes."""
    schemas = document["components"]["schemas"]
    _, exact = msgspec.json.schema_components(list(BODIES), ref_template="#/components/schemas/{name}")
    schemas.update(exact)
    for body, example in BODIES.items():
        schemas[body.__name__]["examples"] = [example]
    schemas["ProblemBody"]["properties"]["code"] = {"type": "string", "enum": sorted(CODES)}
    operations = [item for methods in document["paths"].values() for item in methods.values()]
    for operation in operations:
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                parameter["example"] = PATHS[parameter["name"]]
    return document
