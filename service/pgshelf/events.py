"""Events: texts that may arrive several times. They are stored once and at once; the worker embeds them."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import msgspec
from litestar import Router, post
from litestar.params import JSONBody
from msgspec import Meta

from pgshelf import database
from pgshelf.connections import Connection
from pgshelf.errors import invalid
from pgshelf.http import Answer, Config, Engine, LibraryName, as_id, problems
from pgshelf.idempotency import Write
from pgshelf.ingest import DocumentInput, prepare


class EventInput(msgspec.Struct, forbid_unknown_fields=True):
    """Something that happened."""

    id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=500, examples=["build-4711"])],
        Meta(description="Your name for it. An event that is sent again has no effect."),
    ]
    text: Annotated[
        Annotated[str, Meta(examples=["Build 4711 failed: the disk was full."])],
        Meta(description="What it says; split into chunks as the library has it."),
    ]
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours: a JSON object.")] = {}


class EventTaken(msgspec.Struct):
    """The event is stored; the worker embeds it."""

    id: Annotated[str, Meta(description="As it was sent.")]
    document_id: Annotated[UUID, Meta(description="The document that it was stored as.")]
    key: Annotated[
        str, Meta(description="The key of that document: the id, or `urn:uuid:` and the id if it is a UUID.")
    ]
    duplicate: Annotated[bool, Meta(description="Whether it had been sent before; then nothing was done.")]


ADD = "select document_id, duplicate from pgshelf.add_event(%s, %s, %s, %s, %s)"


@post(
    "/libraries/{library:str}/events",
    status_code=202,
    responses=problems(404, 409, 413, 415, 422),
    response_description="Stored, now or before",
    summary="Add an event",
    operation_id="addEvent",
)
async def add_event(
    library: LibraryName, data: JSONBody[EventInput], engine: Engine, once: Write, settings: Config
) -> Answer[EventTaken]:
    """Store an event as a document, and answer before it is embedded.

    Sent again, it gets the same answer and changes nothing, whatever its document has become since.
    """
    if data.id in (".", ".."):  # as a key it would be refused by a name that the client did not use
        raise invalid("id", "means something else in an address; choose another id")
    event_id = as_id(data.id)  # many names of events are UUIDs, which no key can be
    key = data.id if event_id is None else event_id.urn
    document = DocumentInput(key=key, text=data.text, metadata=data.metadata)
    prepared = await prepare(engine, settings, library, None, document, wait=False)
    about, texts = prepared.parameters[6:8]
    sent = hashlib.sha256(json.dumps([data.text, data.metadata], sort_keys=True).encode()).digest()

    async def add(connection: Connection) -> Answer[EventTaken]:
        found = await database.rows(connection, ADD, prepared.library.id, key, sent, about, texts)
        document_id, duplicate = found[0]
        once.note(document=key, count=int(not duplicate))
        path = f"{settings.api_prefix}/libraries/{quote(library, safe='')}/documents/{document_id}"
        taken = EventTaken(data.id, document_id, key, duplicate)
        return Answer(taken, status_code=202, headers={"Location": path})

    return await once.run(add, single=True)


router = Router("/", route_handlers=[add_event], tags=["documents"])
