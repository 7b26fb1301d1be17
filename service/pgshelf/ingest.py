"""From a document as it arrives to what `write_document` takes: checked, split, embedded before anything is written."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Annotated, Any
from uuid import UUID

import msgspec
import sqlalchemy
from msgspec import Meta
from pgvector import Vector
from psycopg.types.json import Jsonb

from pgshelf import database, limits
from pgshelf.chunking import split
from pgshelf.embedding import (
    LibraryConfig,
    asked_again,
    config_and_texts,
    embed,
    embed_for_writing,
    library_config,
    store,
)
from pgshelf.errors import invalid
from pgshelf.http import as_id
from pgshelf.settings import Settings
from pgshelf.stored_documents import COLUMNS

Key = Annotated[str, Meta(min_length=1, max_length=512, examples=["guide/vacuum"])]
Title = Annotated[str, Meta(examples=["Vacuum"])]
Floats = Annotated[list[float], Meta(min_length=1, max_length=16000)]


class ChunkInput(msgspec.Struct, forbid_unknown_fields=True):
    """One passage."""

    text: Annotated[str, Meta(description="At most PGSHELF_MAX_CHUNK_LENGTH (20000) characters.")]
    embedding: Annotated[
        Floats | bytes | None,
        Meta(description="Numbers, or little-endian float32 bytes (base64 in JSON); the embedder makes it if absent."),
    ] = None
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours: a JSON object.")] = {}


class DocumentInput(msgspec.Struct, forbid_unknown_fields=True):
    """A whole document: either `text`, which is split into chunks, or `chunks`."""

    key: Annotated[
        Key | None,
        Meta(description="Your name for it; a document of the same key is replaced. With PUT the address says it."),
    ] = None
    title: Annotated[Title | None, Meta(description="At most PGSHELF_MAX_TITLE_LENGTH (1000) characters.")] = None
    text: Annotated[
        Annotated[str, Meta(examples=["VACUUM reclaims storage occupied by dead tuples."])] | None,
        Meta(description="All of it, to be split and embedded; at most PGSHELF_MAX_TEXT_LENGTH (2000000) characters."),
    ] = None
    chunks: Annotated[
        list[ChunkInput] | None, Meta(description="The passages, in order; at most PGSHELF_MAX_CHUNKS (1000).")
    ] = None
    source: Annotated[str | None, Meta(description="Where it comes from, such as an address.")] = None
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours: a JSON object.")] = {}


class Prepared(msgspec.Struct):
    """A document that can be written; vectors that are None are made now or later, `paths` name their texts."""

    library: LibraryConfig
    key: str | None
    title: str | None
    source: str | None
    metadata: Jsonb
    texts: list[str]
    vectors: list[Vector | None]
    chunk_metadata: list[Jsonb]
    paths: list[str]
    document_id: UUID | None = None
    made: set[int] = msgspec.field(default_factory=set)  # places of vectors that the library's embedder made

    @property
    def parameters(self) -> tuple[Any, ...]:
        """Those of `WRITE`, but for the version."""
        given = self.vectors if any(vector is not None for vector in self.vectors) else None
        maker = Jsonb(self.library.embedder) if self.made else None
        about = (self.library.id, maker, self.document_id, self.key, self.title, self.source, self.metadata)
        return (*about, self.texts, given, self.chunk_metadata)

    def missing(self, known: Counter[str]) -> list[int]:
        """Places of texts that need a vector where the stored document has vectors of the texts that are `known`.

        A text that comes more often than it is known needs one at each of its places: SQL decides which chunks stay.
        """
        wanted = Counter(self.texts)
        return [
            index for index, text in enumerate(self.texts) if self.vectors[index] is None and wanted[text] > known[text]
        ]


INLINE_TEXT = 20_000  # characters
# vectors go in binary (%b): as text they take a hundred times as long
WRITE = f"""select {COLUMNS}, w.created, w.pending from pgshelf.write_document(%s, %s, %s, %s, %s, %s, %s, %s, %b, %s,
  %s) w, lateral (select (w.document).*) d"""  # noqa: S608 - put together from constants


async def prepare(
    engine: sqlalchemy.Engine,
    settings: Settings,
    library: str,
    document_id: UUID | None,
    data: DocumentInput,
    wait: bool,
) -> Prepared:
    """Check a document, split its text and, with `wait`, embed what the library does not hold yet."""
    _check(data, document_id, settings)
    config, known = await config_and_texts(engine, library, *((document_id, data.key) if wait else (None, None)))
    prepared = await _prepared(config, settings, data, document_id)
    if wait and (config.embedder["provider"] != "none" or config.next_embedder):
        await _embed_new(engine, settings, prepared, known)
    return prepared


async def checked(config: LibraryConfig, settings: Settings, data: DocumentInput) -> Prepared:
    """Check one document of many and split its text; nothing is embedded."""
    _check(data, None, settings)
    return await _prepared(config, settings, data, None)


async def _prepared(
    config: LibraryConfig, settings: Settings, data: DocumentInput, document_id: UUID | None
) -> Prepared:
    texts, vectors, metadata, paths = await _passages(data, config, settings)
    about = limits.metadata(data.metadata, settings)
    return Prepared(config, data.key, data.title, data.source, about, texts, vectors, metadata, paths, document_id)


def _check(data: DocumentInput, document_id: UUID | None, settings: Settings) -> None:
    if data.key is not None and as_id(data.key) is not None:
        raise invalid("key", "parses as a UUID, and those are ids; choose another key")
    if data.key in (".", ".."):
        raise invalid("key", "means something else in an address; choose another key")
    if document_id is not None and data.key is not None:
        raise invalid("key", "cannot be changed; leave it out when putting a document by its id")
    limits.bounded_text(data.title, settings.max_title_length, "title")
    limits.bounded_text(data.source, settings.max_title_length, "source")
    for path in ("key", "title", "source", "text"):
        limits.storable(getattr(data, path), path)
    if (data.text is None) == (data.chunks is None):
        raise invalid("text", "give either text or chunks")


Passages = tuple[list[str], list[Vector | None], list[Jsonb], list[str]]


async def _passages(data: DocumentInput, config: LibraryConfig, settings: Settings) -> Passages:
    if data.text is not None:
        limits.required_text(data.text, settings.max_text_length, "text")
        arguments = (data.text, config.chunking["size"], config.chunking["overlap"])
        # a megabyte takes up to a second: other requests shall not wait for it
        texts = await asyncio.to_thread(split, *arguments) if len(data.text) > INLINE_TEXT else split(*arguments)
        if not texts:
            raise invalid("text", "holds nothing that can be searched")
        given = [ChunkInput(text) for text in texts]
        paths = ["text"] * len(given)
    else:
        given = data.chunks or []
        paths = [f"chunks[{index}].text" for index in range(len(given))]
        for chunk, path in zip(given, paths, strict=True):
            limits.required_text(chunk.text, settings.max_chunk_length, path)
            limits.storable(chunk.text, path)
    if len(given) > settings.max_chunks:
        detail = f"would make {len(given)} chunks, at most {settings.max_chunks} are allowed; split the document"
        raise invalid("text" if data.text is not None else "chunks", detail)
    vectors = [
        None if chunk.embedding is None else limits.vector(chunk.embedding, f"chunks[{index}].embedding")
        for index, chunk in enumerate(given)
    ]
    metadata = [
        limits.metadata(chunk.metadata, settings, f"chunks[{index}].metadata") for index, chunk in enumerate(given)
    ]
    return [chunk.text for chunk in given], vectors, metadata, paths


async def _embed_new(engine: sqlalchemy.Engine, settings: Settings, prepared: Prepared, known: Counter[str]) -> None:
    """Embed, before anything is written, the texts that the stored document does not hold already (`known`)."""
    config, texts, vectors = prepared.library, prepared.texts, prepared.vectors
    missing = prepared.missing(known)
    if config.embedder["provider"] == "none":  # what is missing is refused when it is written
        missing = []
    brought = [text for text, vector in zip(texts, vectors, strict=True) if vector is not None]
    paths = [prepared.paths[index] for index in missing]
    made = await embed_for_writing(engine, settings, config, [texts[index] for index in missing], paths, brought)
    for index, vector in zip(missing, made, strict=True):
        vectors[index] = vector
    prepared.made.update(missing)


async def embed_pending(engine: sqlalchemy.Engine, settings: Settings, config: LibraryConfig, document_id: UUID) -> int:
    """Embed chunks that lost their vectors to another writer since `prepare` looked; returns how many were stored."""

    async def work() -> int:
        rows = await database.run(engine, "select * from pgshelf.pending_chunks(%s, %s)", config.id, document_id)
        if not rows:
            return 0
        choice = (await library_config(engine, str(config.id))).embedder
        ids, texts = [row[0] for row in rows], [row[1] for row in rows]
        made = await embed(engine, settings, choice, texts, "document", ["text"] * len(texts))
        return await store(engine, config.id, choice, ids, texts, made)

    return await asked_again(work)
