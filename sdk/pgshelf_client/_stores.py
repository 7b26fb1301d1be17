"""What the vector stores of frameworks share: each text of theirs is a document of one chunk, its id the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ._sync import Client
from .errors import BY_STATUS, ApiError, ServerError
from .types import Document, DocumentFailure, HitPart, NewDocument

PREFIX = "id:"  # pgshelf takes what looks like an id for one of its own; a framework's UUIDs are keys all the same
BATCH = 100  # documents in a request; lists of a filter hold up to a thousand
UUID = re.compile(r"(\{)?[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}(?(1)\})", re.IGNORECASE)
ALL = {"$id": {"$exists": True}}
PARTS: tuple[HitPart, ...] = ("text", "metadata", "document")


def key_of(id: str) -> str:
    """The key of a document that a framework calls `id`."""
    return PREFIX + id if id.startswith(PREFIX) or _is_uuid(id) else id


def id_of(key: str | None, document_id: str) -> str:
    """What a framework calls a document; one without a key, which somebody else wrote, goes by its own id."""
    return document_id if key is None else key.removeprefix(PREFIX)


def named(ids: Iterable[str]) -> dict[str, Any]:
    """A filter for documents by what a framework calls them."""
    given = list(ids)
    return {"$or": [{"$key": {"$in": [key_of(id) for id in given]}}, {"$id": {"$in": list(filter(_is_uuid, given))}}]}


def batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """A few at a time, each once."""
    once = list(dict.fromkeys(ids))
    return (once[at : at + BATCH] for at in range(0, len(once), BATCH))


def store(client: Client, library: str, documents: list[NewDocument]) -> None:
    """Write documents, some in each request; they can be found when this returns.

    Raises the `ApiError` of the first one that was refused; the others are written.
    """
    failure: tuple[str, DocumentFailure] | None = None
    for at in range(0, len(documents), BATCH):
        part = documents[at : at + BATCH]
        for document, result in zip(part, client.add_documents(library, part), strict=True):
            if result.error is not None and failure is None:
                failure = str(document["key"]), result.error
    if failure is not None:
        key, error = failure
        kind = BY_STATUS.get(error.status, ServerError if error.status >= 500 else ApiError)
        message = f"{id_of(key, '')}: {error.detail}"
        raise kind(message, status=error.status, code=error.code, detail=error.detail, errors=error.errors)


def remove(client: Client, library: str, ids: Sequence[str]) -> int:
    """Delete documents by what a framework calls them; how many there were."""
    return sum(client.delete_documents(library, named(part)) for part in batches(ids))


def fetch(client: Client, library: str, filter: dict[str, Any]) -> Iterator[tuple[Document, str]]:
    """Documents that match, with their text; that of several chunks in paragraphs."""
    for document in client.query_documents(library, filter=filter):
        yield document, "\n\n".join(chunk.text for chunk in client.chunks(library, document.id))


def _is_uuid(id: str) -> bool:
    return UUID.fullmatch(id) is not None
