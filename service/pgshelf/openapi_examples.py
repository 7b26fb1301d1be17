"""Examples for the OpenAPI document: a body and an answer of each kind, which work as they are."""

from __future__ import annotations

from typing import Any

import msgspec

from pgshelf.audit import AuditEntry
from pgshelf.backups import Backup
from pgshelf.batch import AddDocuments, DocumentResults
from pgshelf.cache import CacheInfo
from pgshelf.changes import Change, Changes
from pgshelf.chunks import Chunk, PatchChunk
from pgshelf.documents import PatchDocument
from pgshelf.embedder_changes import EmbedderState
from pgshelf.embedder_choice import EmbedderChoice
from pgshelf.errors import CODES
from pgshelf.events import EventInput, EventTaken
from pgshelf.facets import FacetsAnswer, FacetsRequest
from pgshelf.filtered_documents import Affected, DeleteDocuments, DocumentQuery, DocumentsFound, UpdateDocuments
from pgshelf.health import Health, Ready
from pgshelf.http import ProblemBody
from pgshelf.imports import ImportBatch, ImportDone, ImportError
from pgshelf.index_choice import IndexChoice
from pgshelf.indexes import Index
from pgshelf.ingest import DocumentInput
from pgshelf.keys import CreateKey, CreateToken, Key, NewKey, RotateKey, Token
from pgshelf.libraries import CreateLibrary, Library, PatchLibrary, Stats
from pgshelf.replication import BackupList, Replication, Server, StartBackup
from pgshelf.retry import Retried, RetryEmbeddings
from pgshelf.search import Batch, BatchAnswer, LibrariesAnswer, LibrariesRequest
from pgshelf.search_forms import SearchAnswer, SearchRequest
from pgshelf.stored_documents import Document

CHUNK = "6f1c9c1e-2f0d-4c5b-9a39-0d3f5a1b7c21"
DOCUMENT = "0b8f6c52-93a4-4f7e-8a51-1f0f7a2f4d10"
PATHS = {"library": "handbook", "document": "guide/vacuum", "chunk": CHUNK, "key": "crawler"}
KEY = {
    "id": "9d1f0a52-7a55-4f3b-8f0e-0c3c2b8f6a10",
    "name": "crawler",
    "role": "writer",
    "libraries": ["handbook", "team-*"],
    "created_at": "2026-01-05T09:00:00Z",
    "expires_at": None,
    "revoked_at": None,
    "last_used_at": None,
}
HIT = {
    "chunk_id": CHUNK,
    "document_id": DOCUMENT,
    "key": "guide/vacuum",
    "ordinal": 0,
    "score": 0.0325,
    "distance": 0.5,
    "text": "VACUUM reclaims storage occupied by dead tuples.",
    "document": {
        "title": "Vacuum",
        "source": "https://www.postgresql.org/docs/current/sql-vacuum.html",
        "metadata": {"year": 2025},
    },
    "highlight": "VACUUM <mark>reclaims</mark> storage occupied by dead tuples.",
}
DOCUMENT_ANSWER = {
    "id": DOCUMENT,
    "key": "guide/vacuum",
    "title": "Vacuum",
    "source": "https://www.postgresql.org/docs/current/sql-vacuum.html",
    "metadata": {"year": 2025},
    "version": 1,
    "created_at": "2026-01-05T09:01:00Z",
    "updated_at": "2026-01-05T09:01:00Z",
    "chunks": {"total": 1, "pending": 0, "failed": 0},
    "status": "ready",
}
CHANGE: dict[str, Any] = {
    "cursor": "kgPEEPHZjd09YUhmqR1GW6-5oTE",
    "kind": "put",
    "version": 1,
    "at": "2026-01-05T09:01:00Z",
    "document_id": DOCUMENT,
    "key": "guide/vacuum",
    "created": True,
}
BACKUP: dict[str, Any] = {
    "id": "20260105T090100Z",
    "label": "before the upgrade",
    "state": "done",
    "error": None,
    "started_at": "2026-01-05T09:01:00Z",
    "finished_at": "2026-01-05T09:01:42Z",
    "bytes": 1073741824,
    "start_lsn": "0/5000028",
    "end_lsn": "0/5000120",
    "timeline": 1,
    "postgres": "18.1",
}
REPLICA: dict[str, Any] = {
    "role": "replica",
    "name": "replica1",
    "address": "10.0.0.7",
    "slot": "replica1",
    "state": "streaming",
    "sync_state": "async",
    "timeline": None,
    "sent_lsn": "0/5000560",
    "written_lsn": "0/5000560",
    "flushed_lsn": "0/5000560",
    "replayed_lsn": "0/5000558",
    "lag_bytes": 8,
    "lag_seconds": 0.002,
    "last_message_at": "2026-01-05T09:00:00Z",
    "last_heartbeat_at": "2026-01-05T08:59:58Z",
    "wal_status": "reserved",
    "retained_bytes": 8,
    "conflicts": None,
    "health": "healthy",
}
BODIES: dict[type[msgspec.Struct], dict[str, Any]] = {
    CreateLibrary: {
        "name": "handbook",
        "description": "How we run things",
        "metadata": {"team": "operations"},
        "attributes": {"year": "number"},
    },
    PatchLibrary: {
        "description": None,
        "chunking": {"size": 800, "overlap": 80},
        "metadata": {"team": "platform"},
        "attributes": {"year": "number", "lang": "text"},
    },
    IndexChoice: {"type": "hnsw", "storage": "halfvec", "m": 16, "ef_construction": 64},
    EmbedderChoice: {"provider": "local", "dimension": 128},
    DocumentInput: {
        "title": "Vacuum",
        "text": "VACUUM reclaims storage occupied by dead tuples.",
        "source": "https://www.postgresql.org/docs/current/sql-vacuum.html",
        "metadata": {"year": 2025},
    },
    EventInput: {"id": "build-4711", "text": "Build 4711 failed: the disk was full.", "metadata": {"branch": "main"}},
    PatchDocument: {"title": "VACUUM", "metadata": {"year": 2026, "draft": None}},
    PatchChunk: {"text": "VACUUM takes back what dead tuples occupy.", "metadata": {"reviewed": True}},
    SearchRequest: {
        "query": 'how do I reclaim "dead tuples" -index',
        "k": 3,
        "filter": {"year": {"$gte": 2020}, "$or": [{"$title": {"$ilike": "vac%"}}, {"chunk.page": 3}]},
        "include": ["text", "document", "highlight"],
        "facets": ["year"],
        "total": True,
    },
    Batch: {"searches": [{"query": "reclaim disk space", "k": 1}, {"query": "replication", "mode": "text"}]},
    LibrariesRequest: {"libraries": ["handbook"], "query": "how do I reclaim disk space", "k": 3},
    DocumentQuery: {
        "filter": {"year": {"$gte": 2020}},
        "sort": [{"field": "year", "order": "desc"}, {"field": "$title"}],
        "limit": 10,
        "total": True,
    },
    AddDocuments: {
        "documents": [
            {"key": "guide/analyze", "text": "ANALYZE collects statistics about the contents of tables."},
            {"key": "guide/reindex", "chunks": [{"text": "REINDEX rebuilds an index.", "metadata": {"page": 7}}]},
        ]
    },
    UpdateDocuments: {
        "filter": {"year": {"$lt": 2026}, "reviewed": {"$exists": False}},
        "patch": {"reviewed": False, "draft": None},
        "max_affected": 1000,
    },
    RetryEmbeddings: {"filter": {"year": 2025}},
    DeleteDocuments: {"filter": {"$updated_at": {"$lt": "2020-01-01"}}, "dry_run": True},
    CreateKey: {"name": "crawler", "role": "writer", "libraries": ["handbook", "team-*"]},
    RotateKey: {"overlap": 3600},
    StartBackup: {"label": "before the upgrade"},
    CreateToken: {"role": "reader", "libraries": ["handbook"], "expires_in": 600},
    FacetsRequest: {"attributes": ["year", "$source"], "filter": {"chunk.$text": {"$ilike": "%vacuum%"}}, "limit": 5},
}
ANSWERS: dict[type[msgspec.Struct], dict[str, Any]] = {
    Library: {
        "id": "3d0c8c0e-5f55-4f0b-9a5d-6a8f4a0f9b11",
        "name": "handbook",
        "description": "How we run things",
        "dimension": 256,
        "metric": "cosine",
        "embedder": {"provider": "local", "dimension": 256, "model": "wordllama-l2-supercat"},
        "chunking": {"size": 1200, "overlap": 0},
        "language": "english",
        "metadata": {"team": "operations"},
        "attributes": {"year": "number"},
        "attributes_ready": {"year": "number"},
        "version": 1,
        "created_at": "2026-01-05T09:00:00Z",
        "updated_at": "2026-01-05T09:00:00Z",
    },
    Stats: {
        "documents": 1,
        "chunks": 1,
        "pending": 0,
        "failed": 0,
        "bytes": 1534,
        "shelf": 1,
        "index": {"type": "flat", "state": "ready", "progress": 1.0},
    },
    EmbedderState: {
        "embedder": {"provider": "local", "dimension": 256, "model": "wordllama-l2-supercat"},
        "wanted": {"provider": "local", "dimension": 128, "model": "wordllama-l2-supercat"},
        "state": "embedding",
        "progress": 0.45,
        "embedded": 4500,
        "total": 9000,
        "error": None,
    },
    Index: {
        "wanted": {"type": "hnsw"},
        "actual": {"type": "flat"},
        "state": "building",
        "progress": 0.45,
        "phase": "building index: loading tuples",
        "error": None,
        "shelf": 0,
        "moving": True,
        "estimate": {"rows": 20000, "bytes": 17300000, "memory_bytes": 25300000, "seconds": 6.2},
    },
    Document: DOCUMENT_ANSWER,
    Change: CHANGE,
    Changes: {"items": [CHANGE], "next": CHANGE["cursor"]},
    EventTaken: {"id": "build-4711", "document_id": DOCUMENT, "key": "build-4711", "duplicate": False},
    Chunk: {
        "id": CHUNK,
        "document_id": DOCUMENT,
        "ordinal": 0,
        "text": "VACUUM reclaims storage occupied by dead tuples.",
        "metadata": {},
        "status": "ready",
        "error": None,
    },
    SearchAnswer: {
        "hits": [HIT],
        "took_ms": 2.417,
        "cached": False,
        "total": 1,
        "facets": {"year": [{"value": 2025, "documents": 1}]},
    },
    BatchAnswer: {
        "results": [
            {"answer": {"hits": [HIT], "took_ms": 2.4, "cached": False}},
            {
                "error": {
                    "status": 422,
                    "code": "wrong_dimension",
                    "detail": "It has 3 dimensions.",
                }
            },
        ],
        "took_ms": 5.3,
    },
    LibrariesAnswer: {"hits": [{**HIT, "library": "handbook"}], "took_ms": 0.6, "cached": True},
    CacheInfo: {
        "enabled": True,
        "max_bytes": 67108864,
        "ttl": 3600.0,
        "entries": 412,
        "bytes": 3141592,
        "hits": 18231,
        "misses": 977,
        "evictions": 565,
    },
    DocumentsFound: {"items": [DOCUMENT_ANSWER], "next": None, "total": 1},
    Affected: {"affected": 12},
    Retried: {"retried": 3},
    DocumentResults: {
        "results": [
            {"status": 201, "id": DOCUMENT, "key": "guide/analyze"},
            {
                "status": 422,
                "key": "guide/reindex",
                "error": {"status": 422, "code": "wrong_dimension", "detail": "The vector has 3 dimensions."},
            },
        ]
    },
    ImportBatch: {
        "lines": [1, 500],
        "created": 499,
        "replaced": 0,
        "pending": 0,
        "failed": [
            {
                "line": 17,
                "error": {"status": 400, "code": "validation_failed", "detail": "text: give either text or chunks"},
            }
        ],
    },
    ImportDone: {
        "done": True,
        "lines": 500,
        "skipped": 0,
        "created": 499,
        "replaced": 0,
        "pending": 0,
        "failed": 1,
    },
    ImportError: {
        "error": {"status": 503, "code": "storage_full", "detail": "Nothing was written. Free space, then try again."},
        "committed_lines": 4500,
    },
    FacetsAnswer: {
        "facets": {"year": [{"value": 2025, "documents": 7}, {"value": 2024, "documents": 5}]},
        "documents": 12,
    },
    AuditEntry: {
        "id": "4b0a8a52-1c55-4d3b-9f0e-7c3c2b8f6a22",
        "at": "2026-01-05T09:00:00Z",
        "action": "document.delete",
        "outcome": "done",
        "principal_kind": "key",
        "principal": "crawler",
        "principal_id": KEY["id"],
        "library_id": "5d1f0a52-7a55-4f3b-8f0e-0c3c2b8f6a31",
        "library": "handbook",
        "document": "guide/vacuum",
        "count": 1,
        "detail": None,
        "request_id": "0f5c1a",
    },
    Key: {**KEY, "secrets": [{"hint": "pgs_4fQz", "created_at": "2026-01-05T09:00:00Z", "expires_at": None}]},
    NewKey: {**KEY, "secret": "pgs_..."},
    Token: {
        "token": "pgt_...",
        "role": "reader",
        "libraries": ["handbook"],
        "expires_at": "2026-01-05T09:10:00Z",
    },
    Backup: BACKUP,
    BackupList: {"items": [BACKUP], "next": None},
    Server: REPLICA,
    Replication: {
        **dict.fromkeys(REPLICA),
        "role": "primary",
        "name": "main",
        "timeline": 1,
        "written_lsn": "0/5000560",
        "flushed_lsn": "0/5000560",
        "last_heartbeat_at": "2026-01-05T08:59:58Z",
        "health": "healthy",
        "overall": "healthy",
        "hidden": None,
        "replicas": [REPLICA],
    },
    ProblemBody: {
        "type": "/errors#library_not_found",
        "title": CODES["library_not_found"][1],
        "status": 404,
        "detail": 'There is no library "handbok".',
        "instance": "/v1/libraries/handbok",
        "code": "library_not_found",
        "request_id": "5f0c1b9f1c3e4d0f9a7b2f6f0a1d9c33",
    },
    Health: {"status": "ok", "version": "1.0.0"},
    Ready: {"status": "ready", "checks": {"database": "ok", "schema": "0001", "pgvector": "0.8.1"}},
}
