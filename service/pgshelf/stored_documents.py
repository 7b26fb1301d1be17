"""A document as it is stored, and how it is read: shared by the handlers of one and of those that match a filter."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import Meta


class ChunkCounts(msgspec.Struct):
    """The chunks of a document, counted."""

    total: Annotated[int, Meta(description="All of them.")]
    pending: Annotated[int, Meta(description="Those that wait for their vector.")]
    failed: Annotated[int, Meta(description="Those whose embedding was given up.")]


class Document(msgspec.Struct):
    """A document. It is `ready` when all its chunks can be found."""

    id: Annotated[UUID, Meta(description="Stays when the document is replaced; addresses take id or key.")]
    key: Annotated[str | None, Meta(description="The client's own name for it, unique in the library.")]
    title: Annotated[str | None, Meta(description="The title.")]
    source: Annotated[str | None, Meta(description="Where it comes from, such as an address.")]
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours.")]
    version: Annotated[int, Meta(description="Grows with every change; the ETag, for If-Match.")]
    created_at: Annotated[datetime, Meta(description="When it was first written.")]
    updated_at: Annotated[datetime, Meta(description="When it last changed.")]
    chunks: Annotated[ChunkCounts, Meta(description="How many passages it has.")]
    status: Annotated[
        Literal["ready", "pending", "failed"],
        Meta(description="`failed` if any chunk failed, else `pending` if any waits for its vector."),
    ]


# What is selected: of `documents d`, and of `count_chunks(...) n`.
COLUMNS = "d.id, d.key, d.title, d.source, d.metadata, d.version, d.created_at, d.updated_at"
COUNTS = "coalesce(n.total, 0), coalesce(n.pending, 0), coalesce(n.failed, 0)"


def document_of(row: tuple[Any, ...]) -> Document:
    """The document in a row of COLUMNS and COUNTS."""
    *columns, total, pending, failed = row
    counts = ChunkCounts(total, pending, failed)
    status = "failed" if failed else "pending" if pending else "ready"
    return Document(**dict(zip(Document.__struct_fields__, (*columns, counts, status), strict=True)))
