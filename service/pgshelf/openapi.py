"""The OpenAPI document at /schema: Litestar's, with msgspec's schemas, headers, formats, and examples that work."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from litestar import Request
from litestar.exceptions import NotFoundException
from litestar.openapi.plugins import JsonRenderPlugin

from pgshelf.access import RULES
from pgshelf.audit import AuditEntry
from pgshelf.chunks import Chunk
from pgshelf.errors import CODES, RETRY_AFTER
from pgshelf.http import NDJSON, Page
from pgshelf.keys import Key
from pgshelf.libraries import Library
from pgshelf.openapi_examples import ANSWERS, BODIES, PATHS
from pgshelf.stored_documents import Document

PAGES: list[Any] = [Page[Library], Page[Document], Page[Chunk], Page[Key], Page[AuditEntry]]
SHARED = {  # what the structs of http.py do not say of themselves
    "Page": {"items": "The items, in order.", "next": "Send it as `after` for the page behind; null at the end."},
    "FieldError": {"path": "Where in the request.", "message": "What is wrong there."},
    "ProblemBody": {
        "type": "Where the code is explained: a section of the page /errors of every service.",
        "title": "The code, in words; the same every time.",
        "status": "The status of the answer.",
        "detail": "What is wrong this time, and what to do about it.",
        "instance": "The path that was asked for.",
        "code": "For programs: branch on this one.",
        "request_id": "The X-Request-Id of the answer; it is in the server's log.",
        "sqlstate": "PostgreSQL's own code, where it is all that is known.",
        "errors": "The fields that are not valid, where it is about fields.",
    },
}
PARAMETERS = {"limit": "How many items at most: 100 if absent; PGSHELF_MAX_PAGE (1000) is the limit."}

HEADERS = {
    "X-Request-Id": ("Yours, if you sent a usable one, else a new one.", "string"),
    "Server-Timing": ("Milliseconds spent per stage, and in total.", "string"),
    "Location": ("The address of what was written.", "string"),
    "ETag": ("The version of the document, for If-Match and If-None-Match.", "string"),
    "WWW-Authenticate": ("How to say who calls.", "string"),
    "Retry-After": ("Seconds to wait before trying again.", "integer"),
    "RateLimit-Policy": ("The quota: `q` requests in `w` seconds.", "string"),
    "RateLimit": ("What is left of it: `r` requests, all of them again in `t` seconds.", "string"),
}
SENT = {  # in successful answers, beside what every answer has
    "createLibrary": ["Location"],
    "createKey": ["Location"],
    "addDocument": ["Location", "ETag"],
    "putDocument": ["Location", "ETag"],
    "addEvent": ["Location"],
    "getDocument": ["ETag"],
    "updateDocument": ["ETag"],
}
# only said, not listed: tools that read the document, schemathesis among them, refuse to send what they cannot write
SENT_AS = "JSON, or the same as MessagePack: then with `Content-Type: application/msgpack`, where bytes need no base64."
PAGE_NAME = re.compile(r"Page_pgshelf\.\w+\.(\w+)_")  # Litestar's; msgspec says Page_Library_


class Reference(JsonRenderPlugin):
    """Renders the document as JSON."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The document, completed."""
        return super().render(request, completed(openapi_schema))


def only_what_is_there(request: Request[Any, Any, Any]) -> None:
    """Litestar has a page of its own for all else below /schema; ours is a problem."""
    if "path" in request.path_params:
        raise NotFoundException


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """Put in what Litestar's own schemas leave out; doing it twice does no harm."""
    document["components"]["schemas"] = _schemas()
    for operation in [item for methods in document["paths"].values() for item in methods.values()]:
        if RULES[operation["operationId"]].role is None:
            operation["security"] = []
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                parameter["example"] = PATHS[parameter["name"]]
            parameter["description"] = PARAMETERS.get(parameter["name"], parameter["description"])
        if operation["operationId"] == "importDocuments":
            schema = {"$ref": "#/components/schemas/DocumentInput"}
            text = "A stream of any length, a document in each line; packed by gzip where Content-Encoding says so."
            operation["requestBody"] = {"description": text, "required": True, "content": {NDJSON: {"schema": schema}}}
        elif "requestBody" in operation:
            operation["requestBody"]["description"] = SENT_AS
            _optional(operation["requestBody"])
        for status, response in operation["responses"].items():
            names = ["X-Request-Id", "Server-Timing"]
            names += SENT.get(operation["operationId"], []) if int(status) < 400 else []
            names += ["Retry-After"] if int(status) in RETRY_AFTER else []
            names += ["WWW-Authenticate"] if int(status) == 401 else []
            names += ["RateLimit-Policy", "RateLimit"] if int(status) == 429 else []
            response["headers"] = {
                name: {"description": HEADERS[name][0], "schema": {"type": HEADERS[name][1]}} for name in names
            }
            if status in ("204", "304"):
                response.pop("content", None)  # Litestar's for Answer[None]: there is no body
            if operation["operationId"] == "listChanges" and status == "200":
                page = response["content"]["application/json"]["schema"]
                page["$ref"] = "#/components/schemas/Changes"  # Litestar's is one of this and a stream of bytes
                for other in [key for key in page if key != "$ref"]:
                    del page[other]
                response["content"]["text/event-stream"] = {"schema": {"$ref": "#/components/schemas/Change"}}
            _also_msgpack(response.get("content") or {})
    return document


def _optional(body: dict[str, Any]) -> None:
    """A body that may be null to its handler may be left out by the client."""
    content = body["content"]["application/json"]
    if parts := content["schema"].pop("oneOf", None):
        content["schema"] = next(part for part in parts if "$ref" in part)
        body["required"] = False
    if not body["required"]:
        body["description"] += " May be left out."


def _schemas() -> dict[str, Any]:
    """What msgspec says of the structs: unknown fields are refused, bounds of zero, descriptions, enums."""
    structs = [*BODIES, *ANSWERS, *PAGES]
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for struct, example in (BODIES | ANSWERS).items():
        schemas[struct.__name__]["examples"] = [example]
    for name, schema in schemas.items():
        for field, text in SHARED.get(name.partition("_")[0], {}).items():
            schema["properties"][field]["description"] = text
    # not decoded with all of them, so that one of a wrong form spoils no other
    schemas["AddDocuments"]["properties"]["documents"]["items"] = {"$ref": "#/components/schemas/DocumentInput"}
    schemas["ProblemBody"]["properties"]["code"]["enum"] = sorted(CODES)
    return schemas


def _also_msgpack(content: dict[str, Any]) -> None:
    """Whatever is JSON may be MessagePack, but for problems."""
    if "application/json" in content:
        schema = content["application/json"]["schema"]
        schema["$ref"] = PAGE_NAME.sub(r"Page_\1_", schema["$ref"])
        content["application/msgpack"] = {"schema": dict(schema)}
