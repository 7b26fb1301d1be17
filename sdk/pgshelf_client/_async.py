"""The client for asyncio, written by hand; `_sync.py` is generated from this file."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
import msgspec
from msgspec import UNSET, UnsetType

from . import _base as base
from ._base import changed, given, json_object, listed, packed, patched_object
from ._import import Batch, Cutter, Tally
from ._lanes import AsyncLanes, AsyncSource, async_each
from ._retry import Attempts, Retries
from .errors import ConnectionFailed
from .types import (
    AttributeType,
    AuditEntry,
    Backup,
    BatchResult,
    CacheInfo,
    Change,
    Changes,
    Chunk,
    ChunkingChoice,
    ChunkPart,
    ConsistencyLevel,
    Document,
    DocumentResult,
    EmbedderChoice,
    EmbedderState,
    EmbeddingType,
    EventTaken,
    ExportedDocument,
    FacetsResult,
    Fusion,
    GroupBy,
    Health,
    HitPart,
    ImportFailure,
    ImportProgress,
    ImportResult,
    Index,
    IndexChoice,
    IndexStorage,
    IndexType,
    Key,
    Library,
    LibraryStats,
    Like,
    Metadata,
    Metric,
    Mmr,
    Mode,
    Name,
    NewChunk,
    NewDocument,
    NewKey,
    Outcome,
    Provider,
    Readiness,
    Replication,
    Rerank,
    Role,
    Search,
    SearchResult,
    SortKey,
    Token,
    Truncate,
    Vector,
)

T = TypeVar("T")


class AsyncClient:
    """A pgshelf server, reached by asyncio; one client keeps a pool of connections and serves any number of callers.

        async with AsyncClient() as shelf:
            await shelf.add_document("handbook", key="vacuum", text="Vacuum reclaims dead rows.")
            result = await shelf.search("handbook", "how do I get space back?")

    `base_url` may end in `api_prefix` or not; `timeout` is in seconds; `retries` is a number or a `Retries`.
    What fails for now is sent again: when the server cannot be reached, after a lost answer, after 429, 502, 503 and
    504, and when the server had to roll back. That is safe for writes, too: each has an idempotency key, so an attempt
    whose predecessor was carried out unseen gets the answer of that one.
    Where the server reads from replicas, `consistency` says how fresh reads are: "session" sees all that this client
    has written, "eventual" may not, "strong" reads what the primary has.
    Every method may raise `ApiError`, `ConnectionFailed` or `UnexpectedAnswer`.
    """

    def __init__(
        self,
        base_url: str = base.DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        api_prefix: str = "/v1",
        timeout: float | httpx2.Timeout | None = base.DEFAULT_TIMEOUT,
        retries: int | Retries = 3,
        consistency: ConsistencyLevel = "session",
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._routes = base.Routes(base_url, api_prefix)
        self._consistency = base.Consistency(consistency)
        self._retries = retries if isinstance(retries, Retries) else Retries(times=retries)
        self._http = httpx2.AsyncClient(headers=base.default_headers(api_key), timeout=timeout, transport=transport)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._http.__aexit__(kind, error, traceback)

    async def aclose(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        await self._http.aclose()

    @property
    def consistency_token(self) -> str | None:
        """How far this client's writes are. Given to another client, the "session" of that one sees them, too."""
        return self._consistency.token

    @consistency_token.setter
    def consistency_token(self, token: str | None) -> None:
        self._consistency.saw(token)

    # The server

    async def health(self) -> Health:
        """Whether the server answers at all; asked once, never retried."""
        return await self._fetch(self._routes.probe("health"), base.HEALTH)

    async def ready(self) -> Readiness:
        """Whether the server can work now; asked once, never retried. Raises `Unavailable` when it cannot."""
        return await self._fetch(self._routes.probe("ready"), base.READINESS)

    # Libraries

    async def create_library(
        self,
        name: str,
        *,
        description: str | None = None,
        embedder: EmbedderChoice | None = None,
        dimension: int | None = None,
        metric: Metric | None = None,
        language: str | None = None,
        index: IndexChoice | None = None,
        attributes: Mapping[str, AttributeType] | None = None,
        chunking: ChunkingChoice | None = None,
        metadata: Metadata | None = None,
    ) -> Library:
        """Create a library; `Conflict` when the name is taken.

        `embedder` is {"provider": ..., "model": ..., "dimension": ...}, with a provider out of "local", "cohere",
        "openai" and "sentence_transformers"; with "none" you bring the vectors, and `dimension` is required. `chunking`
        is {"size": ..., "overlap": ...}. `index` is what `set_index` takes, as {"type": "hnsw"}. `attributes` are
        metadata fields to index: {"year": "number", "published": "datetime"}.
        """
        body = given(
            name=name,
            description=description,
            embedder=embedder,
            dimension=dimension,
            metric=metric,
            language=language,
            index=index,
            attributes=attributes,
            chunking=chunking,
            metadata=json_object(metadata),
        )
        return await self._fetch(self._routes.call("POST", "libraries", body=body), base.LIBRARY)

    async def get_library(self, library: Name) -> Library:
        """One library, by name or id."""
        return await self._fetch(self._routes.call("GET", "libraries", library), base.LIBRARY)

    def libraries(self, *, page_size: int | None = None) -> AsyncIterator[Library]:
        """All libraries, fetched page by page."""
        call = self._routes.call("GET", "libraries", params={"limit": page_size})
        return self._items(call, base.LIBRARIES)

    async def update_library(
        self,
        library: Name,
        *,
        name: str | UnsetType = UNSET,
        description: str | UnsetType | None = UNSET,
        attributes: Mapping[str, AttributeType] | UnsetType | None = UNSET,
        chunking: ChunkingChoice | UnsetType = UNSET,
        metadata: Metadata | UnsetType = UNSET,
    ) -> Library:
        """Change what is given; None clears the description, in `metadata` (merged by RFC 7396) it removes a field.

        `attributes` replaces all that were declared; those of `Library.attributes_ready` have their index already.
        """
        body = changed(
            name=name,
            description=description,
            attributes=attributes,
            chunking=chunking,
            metadata=patched_object(metadata),
        )
        return await self._fetch(self._routes.call("PATCH", "libraries", library, body=body), base.LIBRARY)

    async def delete_library(self, library: Name) -> None:
        """Delete a library and all that is in it."""
        await self._answer(self._routes.call("DELETE", "libraries", library))

    async def library_stats(self, library: Name) -> LibraryStats:
        """How much a library holds, and how much of it waits for its embeddings."""
        return await self._fetch(self._routes.call("GET", "libraries", library, "stats"), base.STATS)

    # Keys

    async def create_key(
        self,
        name: str,
        role: Role,
        *,
        libraries: Sequence[str] | None = None,
        expires_at: datetime | None = None,
    ) -> NewKey:
        """Create a key with the role "reader", "writer" or "admin"; its `secret` is in this answer and nowhere else.

        `libraries` are ids, names or patterns such as "team-*"; the key sees all if there are none. `expires_at` needs
        a time zone. It takes a key of the role admin for all libraries.
        """
        body = given(name=name, role=role, libraries=listed(libraries), expires_at=expires_at)
        return await self._fetch(self._routes.call("POST", "keys", body=body), base.NEW_KEY)

    def keys(self, *, revoked: bool | None = None, page_size: int | None = None) -> AsyncIterator[Key]:
        """All keys, fetched page by page; with `revoked` those that were revoked, too."""
        params = {"revoked": None if revoked is None else str(revoked).lower(), "limit": page_size}
        return self._items(self._routes.call("GET", "keys", params=params), base.API_KEYS)

    async def get_key(self, key: Name) -> Key:
        """One key, by name or id, without its secret."""
        return await self._fetch(self._routes.call("GET", "keys", key), base.API_KEY)

    async def revoke_key(self, key: Name) -> None:
        """End a key and all its tokens, at once."""
        await self._answer(self._routes.call("DELETE", "keys", key))

    async def rotate_key(
        self, key: Name, *, overlap: int | None = None, expires_at: datetime | UnsetType | None = UNSET
    ) -> NewKey:
        """Give a key another secret; the one before is valid for `overlap` seconds yet, a day if that is not given."""
        body = {**given(overlap=overlap), **changed(expires_at=expires_at)}
        return await self._fetch(self._routes.call("POST", "keys", key, "rotate", body=body), base.NEW_KEY)

    async def create_token(
        self, *, role: Role | None = None, libraries: Sequence[str] | None = None, expires_in: int | None = None
    ) -> Token:
        """Exchange this client's key for a token, which may do less and lives for `expires_in` seconds."""
        body = given(role=role, libraries=listed(libraries), expires_in=expires_in)
        return await self._fetch(self._routes.call("POST", "token", body=body), base.TOKEN)

    # The audit log

    def audit(
        self,
        *,
        action: str | None = None,
        library: Name | None = None,
        since: datetime | None = None,
        outcome: Outcome | None = None,
        page_size: int | None = None,
    ) -> AsyncIterator[AuditEntry]:
        """Who did what, newest first; all of it, or one action, library or outcome ("done" or "refused").

        `since` needs a time zone. It takes a key of the role admin for all libraries.
        """
        moment = None if since is None else since.isoformat()
        params = {
            "action": action,
            "library": None if library is None else str(library),
            "since": moment,
            "outcome": outcome,
            "limit": page_size,
        }
        return self._items(self._routes.call("GET", "audit", params=params), base.AUDIT)

    # Replication and backups

    async def replication(self) -> Replication:
        """Who follows whom, and how far each is, as the server knows that the service is connected to.

        This and backups take a key of the role admin for all libraries.
        """
        return await self._fetch(self._routes.call("GET", "replication"), base.REPLICATION)

    async def backups(self) -> list[Backup]:
        """All backups, the newest first."""
        return (await self._fetch(self._routes.call("GET", "replication", "backups"), base.BACKUPS)).items

    async def start_backup(self, *, label: str | None = None) -> Backup:
        """Start a backup of the whole PostgreSQL server; `backups` tells when it is done."""
        call = self._routes.call("POST", "replication", "backups", body=given(label=label))
        return await self._fetch(call, base.BACKUP)

    # Indexes

    async def get_index(self, library: Name) -> Index:
        """The index that is wanted, the one that searches use, and how far the work is."""
        return await self._fetch(self._routes.call("GET", "libraries", library, "index"), base.INDEX)

    async def set_index(
        self,
        library: Name,
        type: IndexType,
        *,
        storage: IndexStorage | None = None,
        m: int | None = None,
        ef_construction: int | None = None,
        lists: int | None = None,
        bits: int | None = None,
        seed: int | None = None,
    ) -> Index:
        """Ask for an index: "auto", "flat", "hnsw", "ivfflat", "lsh" or "kdtree"; the server builds it meanwhile.

        Searches and writes go on, with the old index until the new one is ready; `wait_for_index` waits for that.
        """
        body = given(
            type=type, storage=storage, m=m, ef_construction=ef_construction, lists=lists, bits=bits, seed=seed
        )
        return await self._fetch(self._routes.call("PUT", "libraries", library, "index", body=body), base.INDEX)

    async def wait_for_index(self, library: Name, *, timeout: float = 600.0) -> Index:  # noqa: ASYNC109 - the same in both clients
        """Ask for the index until it is not "building" any more: "ready", "waiting" for vectors, or "failed".

        `WaitedTooLong` after `timeout` seconds; the building goes on.
        """
        deadline = base.Deadline(timeout)
        while True:
            index = await self.get_index(library)
            if index.state != "building":
                return index
            await asyncio.sleep(deadline.next_wait(f"the index of {library} is still being built"))

    # Embedders

    async def get_embedder(self, library: Name) -> EmbedderState:
        """The embedder whose vectors searches use, the one that is wanted, and how far the change is."""
        return await self._fetch(self._routes.call("GET", "libraries", library, "embedder"), base.EMBEDDER)

    async def set_embedder(
        self,
        library: Name,
        provider: Provider,
        *,
        model: str | None = None,
        dimension: int | None = None,
        query_prefix: str | None = None,
        document_prefix: str | None = None,
        embedding_type: EmbeddingType | None = None,
        truncate: Truncate | None = None,
    ) -> EmbedderState:
        """Ask for another embedder; the server embeds all texts anew meanwhile, and then all change at once.

        Searches and writes go on, with the old one until then; `wait_for_embedder` waits for that. The one in use
        calls a change off. The options are those of `embedder` in `create_library`.
        """
        body = given(
            provider=provider,
            model=model,
            dimension=dimension,
            query_prefix=query_prefix,
            document_prefix=document_prefix,
            embedding_type=embedding_type,
            truncate=truncate,
        )
        return await self._fetch(self._routes.call("PUT", "libraries", library, "embedder", body=body), base.EMBEDDER)

    async def cancel_embedder(self, library: Name) -> EmbedderState:
        """Call off a change; the answer says which embedder the library keeps: the new one, if it was too late."""
        return await self._fetch(self._routes.call("DELETE", "libraries", library, "embedder"), base.EMBEDDER)

    async def wait_for_embedder(self, library: Name, *, timeout: float = 600.0) -> EmbedderState:  # noqa: ASYNC109 - the same in both clients
        """Ask for the embedder until it is "ready", or the change has "failed" for now.

        `WaitedTooLong` after `timeout` seconds; the change goes on.
        """
        deadline = base.Deadline(timeout)
        while True:
            embedder = await self.get_embedder(library)
            if embedder.state in ("ready", "failed"):
                return embedder
            await asyncio.sleep(deadline.next_wait(f"the embedder of {library} is still being changed"))

    # Documents

    async def add_document(
        self,
        library: Name,
        *,
        key: str | None = None,
        title: str | None = None,
        text: str | None = None,
        chunks: Iterable[NewChunk] | None = None,
        source: str | None = None,
        metadata: Metadata | None = None,
        wait: bool | None = None,
        if_match: int | None = None,
    ) -> Document:
        """Store a document, given as `text` or as `chunks`; one with the same `key` is replaced.

        With `wait=False` the server answers before the chunks are embedded. `if_match` is the version you have seen of
        the one that is replaced.
        """
        fields = given(key=key, title=title, text=text, chunks=chunks, source=source, metadata=metadata)
        body = base.new_document(fields)
        path = ("libraries", library, "documents")
        call = self._routes.call("POST", *path, params={"wait": wait}, body=body, if_match=if_match)
        return await self._fetch(call, base.DOCUMENT)

    async def add_documents(
        self, library: Name, documents: Iterable[NewDocument], *, wait: bool | None = None
    ) -> list[DocumentResult]:
        """Store several documents in one request, in order; each has its result, and one that fails spoils no other.

        A document is a mapping of what `add_document` takes. For more than about a hundred: `import_documents`.
        """
        bodies = [base.new_document(document) for document in documents]
        path = ("libraries", library, "documents", "batch")
        call = self._routes.call("POST", *path, params={"wait": wait}, body={"documents": bodies})
        return (await self._fetch(call, base.DOCUMENT_RESULTS)).results

    async def put_document(
        self,
        library: Name,
        document: Name,
        *,
        title: str | None = None,
        text: str | None = None,
        chunks: Iterable[NewChunk] | None = None,
        source: str | None = None,
        metadata: Metadata | None = None,
        wait: bool | None = None,
        if_match: int | None = None,
    ) -> Document:
        """Replace a document, or create it under a key; an id must exist. `if_match` is the version you have seen."""
        body = base.new_document(given(title=title, text=text, chunks=chunks, source=source, metadata=metadata))
        path = ("libraries", library, "documents", document)
        call = self._routes.call("PUT", *path, params={"wait": wait}, body=body, if_match=if_match)
        return await self._fetch(call, base.DOCUMENT)

    async def get_document(self, library: Name, document: Name) -> Document:
        """One document, by key or id."""
        return await self._fetch(self._routes.call("GET", "libraries", library, "documents", document), base.DOCUMENT)

    def documents(self, library: Name, *, page_size: int | None = None) -> AsyncIterator[Document]:
        """All documents of a library in the order of their creation, fetched page by page."""
        call = self._routes.call("GET", "libraries", library, "documents", params={"limit": page_size})
        return self._items(call, base.DOCUMENTS)

    async def update_document(
        self,
        library: Name,
        document: Name,
        *,
        title: str | UnsetType | None = UNSET,
        source: str | UnsetType | None = UNSET,
        metadata: Metadata | UnsetType = UNSET,
        if_match: int | None = None,
    ) -> Document:
        """Change what is given; None clears it, in `metadata` (merged by RFC 7396) it removes a field."""
        body = changed(title=title, source=source, metadata=patched_object(metadata))
        path = ("libraries", library, "documents", document)
        return await self._fetch(self._routes.call("PATCH", *path, body=body, if_match=if_match), base.DOCUMENT)

    async def delete_document(self, library: Name, document: Name, *, if_match: int | None = None) -> None:
        """Delete a document with its chunks; `Conflict` when another table refers to it or `if_match` is stale."""
        path = ("libraries", library, "documents", document)
        await self._answer(self._routes.call("DELETE", *path, if_match=if_match))

    def query_documents(
        self,
        library: Name,
        filter: Mapping[str, Any] | None = None,
        *,
        sort: Iterable[SortKey] | None = None,
        page_size: int | None = None,
    ) -> AsyncIterator[Document]:
        """The documents that match a filter, fetched page by page.

        `sort` is [{"field": "year", "order": "desc"}], of declared attributes and columns; oldest first if absent.
        """
        order = None if sort is None else list(sort)
        body = base.search_body(filter=filter, sort=order, limit=page_size)
        call = self._routes.call("POST", "libraries", library, "documents", "query", body=body, reads=True)
        return self._items(call, base.DOCUMENTS)

    async def count_documents(self, library: Name, filter: Mapping[str, Any] | None = None) -> int:
        """How many documents match a filter."""
        body = base.search_body(filter=filter, limit=1, total=True)
        call = self._routes.call("POST", "libraries", library, "documents", "query", body=body, reads=True)
        return (await self._fetch(call, base.DOCUMENTS)).total

    async def update_documents(
        self,
        library: Name,
        filter: Mapping[str, Any],
        patch: Metadata,
        *,
        max_affected: int | None = None,
        dry_run: bool = False,
    ) -> int:
        """Change the metadata of all documents that match, by a merge patch (RFC 7396); how many it were.

        `Conflict`, and nothing changed, when more than `max_affected` match. `dry_run` only counts.
        """
        body = base.search_body(filter=filter, patch=patch, max_affected=max_affected, dry_run=dry_run or None)
        path = ("libraries", library, "documents", "update")
        return (await self._fetch(self._routes.call("POST", *path, body=body, reads=dry_run), base.AFFECTED)).affected

    async def delete_documents(
        self, library: Name, filter: Mapping[str, Any], *, max_affected: int | None = None, dry_run: bool = False
    ) -> int:
        """Delete all documents that match, with their chunks; how many it were.

        `Conflict`, and nothing deleted, when more than `max_affected` match or another table refers to one. `dry_run`
        only counts. All documents are {"$id": {"$exists": True}}; an empty filter is refused.
        """
        body = base.search_body(filter=filter, max_affected=max_affected, dry_run=dry_run or None)
        path = ("libraries", library, "documents", "delete")
        return (await self._fetch(self._routes.call("POST", *path, body=body, reads=dry_run), base.AFFECTED)).affected

    async def retry_embeddings(self, library: Name, *, filter: Mapping[str, Any] | None = None) -> int:
        """Try failed embeddings again, of all documents or of those that match; how many chunks it were."""
        path = ("libraries", library, "embeddings", "retry")
        call = self._routes.call("POST", *path, body=base.search_body(filter=filter))
        return (await self._fetch(call, base.RETRIED)).retried

    # Import and export

    async def import_documents(
        self,
        library: Name,
        documents: AsyncSource[NewDocument | ExportedDocument | Mapping[str, Any] | bytes],
        *,
        batch_size: int = 500,
        parallel: int = 2,
        name: str | None = None,
        wait: bool | None = None,
        progress: Callable[[ImportProgress], object] | None = None,
        on_failure: Callable[[ImportFailure], object] | None = None,
    ) -> ImportResult:
        """Store any number of documents, drawn from any iterable; bytes are a document as a line of JSON.

        They go in requests of `batch_size` documents (or some megabytes), of which `parallel` are on their way at a
        time; no more than one batch is held beyond these. A document that is refused spoils no other: it is among
        `failed`, or given to `on_failure`. `progress` is called after each answer. Of two documents with one key the
        later is written last; with `parallel=1` all are created in the order given.

        A request is repeated safely. An import that ended early is gone on with when it is called again with the same
        `name`, `batch_size` and documents in the same order: what is committed is skipped, also documents without a
        key. Take another name for another import. `wait=True` embeds before a batch is committed, False leaves it to
        the worker.
        """
        tally = Tally(progress, on_failure, self._consistency.saw)
        cutter = Cutter(batch_size, name, tally.refuse)

        async def send(batch: Batch) -> bytes:
            lines = batch.body()
            path, key = ("libraries", library, "import"), cutter.key(batch, lines)
            call = self._routes.call("POST", *path, params={"wait": wait}, lines=lines, key=key)
            return (await self._answer(call)).content

        async with AsyncLanes(parallel, send, tally.take) as lanes:
            async for document in async_each(documents):
                batch = cutter.add(document)
                if batch is not None:
                    await lanes.put(batch)
            batch = cutter.rest()
            if batch is not None:
                await lanes.put(batch)
        return tally.result()

    async def export_documents(
        self, library: Name, *, filter: Mapping[str, Any] | None = None, embeddings: bool = True
    ) -> AsyncIterator[ExportedDocument]:
        """All documents of one moment, or those that match, oldest first; `import_documents` takes them.

        They come as they arrive; what breaks off in the middle raises `ConnectionFailed`. Without `embeddings` the
        vectors are left out.
        """
        async for line in self.export_lines(library, filter=filter, embeddings=embeddings):
            yield base.exported(line)

    async def export_lines(
        self, library: Name, *, filter: Mapping[str, Any] | None = None, embeddings: bool = True
    ) -> AsyncIterator[bytes]:
        """What `export_documents` gives, each document as a line of JSON, without its newline, as files hold it."""
        params = base.export_params(filter, embeddings)
        attempts = Attempts(self._routes.call("GET", "libraries", library, "export", params=params), self._retries)
        call, lines, begun = attempts.call, base.Lines(), False
        while True:
            try:
                async with self._http.stream(
                    call.method, call.url, params=call.params, headers=call.headers
                ) as response:
                    if response.is_success:
                        async for data in response.aiter_bytes():
                            begun = True
                            for line in lines.feed(data):
                                yield line
                        return
                    await response.aread()
                    delay = attempts.after_answer(response) or 0.0
            except httpx2.RequestError as error:
                if begun:  # another snapshot would begin anew
                    raise ConnectionFailed(attempts.describe(error)) from error
                delay = attempts.after_failure(error)
            await asyncio.sleep(delay)

    async def add_event(self, library: Name, id: str, text: str, *, metadata: Metadata | None = None) -> EventTaken:
        """Store an event as a document, before it is embedded; one of the same `id` that is sent again has no effect.

        `Conflict` when that one had another text or other metadata.
        """
        body = given(id=id, text=text, metadata=json_object(metadata))
        return await self._fetch(self._routes.call("POST", "libraries", library, "events", body=body), base.EVENT_TAKEN)

    # Chunks

    def chunks(
        self,
        library: Name,
        document: Name,
        *,
        include: ChunkPart | Sequence[ChunkPart] | None = None,
        page_size: int | None = None,
    ) -> AsyncIterator[Chunk]:
        """The chunks of a document in order, fetched page by page; `include=["embedding"]` adds their vectors."""
        path = ("libraries", library, "documents", document, "chunks")
        call = self._routes.call("GET", *path, params={"limit": page_size, "include": listed(include)})
        return self._items(call, base.CHUNKS)

    async def get_chunk(
        self, library: Name, chunk: Name, *, include: ChunkPart | Sequence[ChunkPart] | None = None
    ) -> Chunk:
        """One chunk, by id; `include=["embedding"]` adds its vector."""
        path = ("libraries", library, "chunks", chunk)
        return await self._fetch(self._routes.call("GET", *path, params={"include": listed(include)}), base.CHUNK)

    async def update_chunk(
        self,
        library: Name,
        chunk: Name,
        *,
        text: str | UnsetType = UNSET,
        embedding: Vector | UnsetType = UNSET,
        metadata: Metadata | UnsetType = UNSET,
        wait: bool | None = None,
        if_match: int | None = None,
    ) -> Chunk:
        """Change a chunk in place; a new text without an embedding is embedded by the library's embedder.

        `if_match` is the version you have seen of its document: `Conflict` when that is stale.
        """
        vector = UNSET if embedding is UNSET else packed(embedding)
        body = changed(text=text, embedding=vector, metadata=patched_object(metadata))
        path = ("libraries", library, "chunks", chunk)
        call = self._routes.call("PATCH", *path, params={"wait": wait}, body=body, if_match=if_match)
        return await self._fetch(call, base.CHUNK)

    async def delete_chunk(self, library: Name, chunk: Name, *, if_match: int | None = None) -> None:
        """Delete a chunk; `Conflict` when `if_match`, the version you have seen of its document, is stale."""
        path = ("libraries", library, "chunks", chunk)
        await self._answer(self._routes.call("DELETE", *path, if_match=if_match))

    # Changes

    async def changes(
        self, library: Name, *, after: str | None = None, follow: bool = False, page_size: int | None = None
    ) -> AsyncIterator[Change]:
        """What changed in a library, in the order of commits, each change once; with `follow` it waits for more.

        `after` is the cursor of the last change that you have dealt with, or "now"; without it you get all that is
        kept. To mirror a library take `(await changes_page(library, after="now")).next`, then read all documents, then
        follow from there. `ApiError` with the code "changes_expired" says to begin anew.
        """
        while True:
            wait = base.FOLLOW_WAIT if follow else None
            page = await self.changes_page(library, after=after, limit=page_size, wait=wait)
            for change in page.items:
                yield change
            if not page.items and not follow:
                return
            after = page.next

    async def changes_page(
        self, library: Name, *, after: str | None = None, limit: int | None = None, wait: float | None = None
    ) -> Changes:
        """The next changes; if there are none yet, those that come within `wait` seconds, or none."""
        params = {"after": after, "limit": limit, "wait": wait}
        return await self._fetch(self._routes.call("GET", "libraries", library, "changes", params=params), base.CHANGES)

    # Search

    async def search(
        self,
        library: Name,
        query: str | None = None,
        *,
        vector: Vector | None = None,
        like: Like | None = None,
        mode: Mode | None = None,
        k: int | None = None,
        offset: int | None = None,
        filter: Mapping[str, Any] | None = None,
        max_distance: float | None = None,
        min_score: float | None = None,
        fusion: Fusion | None = None,
        mmr: Mmr | None = None,
        group_by: GroupBy | None = None,
        group_size: int | None = None,
        rerank: Rerank | None = None,
        exact: bool | None = None,
        ef_search: int | None = None,
        include: HitPart | Sequence[HitPart] | None = None,
        facets: Sequence[str] | None = None,
        total: bool | None = None,
        explain: bool | None = None,
    ) -> SearchResult:
        """The `k` (10) best chunks for a text, for a vector, or for what they shall be `like`, after skipping `offset`.

        `mode` is "vector", "text" or "hybrid", the default for a query. `like` is {"chunk": id} or {"document": key},
        `filter` {"year": {"$gte": 2020}}, `fusion` {"method": "weighted", "weights": [1, 2]}, `mmr` {"lambda": 0.5},
        `rerank` {"provider": "cohere"}. With `group_by="document"` every document gives its `group_size` (1) best, and
        `k` and `offset` count documents.
        `include` names what each hit carries: "text", "metadata", "document" (these three by default), "highlight",
        "embedding". `facets` names fields whose values shall be counted.
        """
        body = base.search_body(
            query=query,
            vector=vector,
            like=like,
            mode=mode,
            k=k,
            offset=offset,
            filter=filter,
            max_distance=max_distance,
            min_score=min_score,
            fusion=fusion,
            mmr=mmr,
            group_by=group_by,
            group_size=group_size,
            rerank=rerank,
            exact=exact,
            ef_search=ef_search,
            include=include,
            facets=facets,
            total=total,
            explain=explain,
        )
        call = self._routes.call("POST", "libraries", library, "search", body=body, reads=True)
        return await self._fetch(call, base.SEARCH_RESULT)

    async def search_batch(self, library: Name, searches: Iterable[Search]) -> BatchResult:
        """Several searches of a library at once; each item has its `answer`, or its `error`, which spoils no other.

        A search is a mapping of what `search` takes: {"query": "locks", "k": 3}.
        """
        body = {"searches": [base.batched_search(search) for search in searches]}
        call = self._routes.call("POST", "libraries", library, "search", "batch", body=body, reads=True)
        return await self._fetch(call, base.BATCH_RESULT)

    async def search_libraries(
        self,
        libraries: Sequence[Name],
        query: str | None = None,
        *,
        vector: Vector | None = None,
        mode: Mode | None = None,
        k: int | None = None,
        offset: int | None = None,
        filter: Mapping[str, Any] | None = None,
        max_distance: float | None = None,
        min_score: float | None = None,
        fusion: Fusion | None = None,
        rerank: Rerank | None = None,
        exact: bool | None = None,
        ef_search: int | None = None,
        include: HitPart | Sequence[HitPart] | None = None,
    ) -> SearchResult:
        """Search several libraries as one; each hit names its `library`. The options are those of `search`.

        `k` + `offset` is at most 10,000.
        """
        body = base.search_body(
            libraries=libraries,
            query=query,
            vector=vector,
            mode=mode,
            k=k,
            offset=offset,
            filter=filter,
            max_distance=max_distance,
            min_score=min_score,
            fusion=fusion,
            rerank=rerank,
            exact=exact,
            ef_search=ef_search,
            include=include,
        )
        return await self._fetch(self._routes.call("POST", "search", body=body, reads=True), base.SEARCH_RESULT)

    async def facets(
        self,
        library: Name,
        attributes: Sequence[str],
        *,
        filter: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> FacetsResult:
        """How many of the documents that match have which value of a field: its `limit` (10) most frequent ones."""
        body = base.search_body(attributes=attributes, filter=filter, limit=limit)
        call = self._routes.call("POST", "libraries", library, "facets", body=body, reads=True)
        return await self._fetch(call, base.FACETS_RESULT)

    async def cache_info(self) -> CacheInfo:
        """How the server's query cache does; it takes a key that sees all libraries."""
        return await self._fetch(self._routes.call("GET", "cache"), base.CACHE)

    async def clear_cache(self, library: Name | None = None) -> None:
        """Let every process of the server forget the answers that it keeps, of one library or of all.

        Nothing stale is ever in there; this is for those who measure. It takes an admin's key that sees all libraries.
        """
        await self._answer(
            self._routes.call("DELETE", "cache", params={"library": None if library is None else str(library)})
        )

    # How a call is carried out

    async def _fetch(self, call: base.Call, decoder: msgspec.json.Decoder[T]) -> T:
        return base.decoded(await self._answer(call), decoder)

    async def _items(self, call: base.Call, decoder: msgspec.json.Decoder[base.Page[T]]) -> AsyncIterator[T]:
        page = await self._fetch(call, decoder)
        while True:
            for item in page.items:
                yield item
            if page.next is None:
                return
            page = await self._fetch(call.after(page.next), decoder)

    async def _answer(self, call: base.Call) -> httpx2.Response:
        attempts = Attempts(call, self._retries)
        while True:
            try:
                response = await self._http.request(
                    call.method,
                    call.url,
                    params=call.params,
                    content=call.body,
                    headers=self._consistency.headers(call),
                )
            except httpx2.RequestError as error:
                delay = attempts.after_failure(error)
            else:
                self._consistency.saw(response.headers.get(base.SEEN))
                outcome = attempts.after_answer(response)
                if outcome is None:
                    return response
                delay = outcome
            await asyncio.sleep(delay)
