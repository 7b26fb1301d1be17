"""Several documents in one request, each with a result of its own."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

import msgspec
import psycopg
from litestar import Router, post
from litestar.params import JSONBody
from msgspec import Meta

from pgshelf import bulk
from pgshelf.connections import Connection
from pgshelf.embedding import LibraryConfig, asked_again, library_config
from pgshelf.errors import invalid, problem_of
from pgshelf.http import Answer, Config, Engine, LibraryName, Wait, problems
from pgshelf.idempotency import Write
from pgshelf.ingest import DocumentInput, checked
from pgshelf.settings import Settings


class AddDocuments(msgspec.Struct, forbid_unknown_fields=True):
    """Several documents, which are written in order."""

    documents: Annotated[
        Annotated[list[Any], Meta(min_length=1)],
        Meta(description="At most PGSHELF_MAX_BATCH (100) of them."),
    ]


class DocumentResult(msgspec.Struct, omit_defaults=True):
    """What became of one document."""

    status: Annotated[int, Meta(description="The status that it would have had alone: 201, 200, 202 or an error's.")]
    id: Annotated[UUID | None, Meta(description="Its id, where it was written.")] = None
    key: Annotated[str | None, Meta(description="Its key, if it has one.")] = None
    error: Annotated[bulk.DocumentProblem | None, Meta(description="Why it was not written.")] = None


class NothingWritten(Exception):
    """A batch none of whose documents was written, and not for their own faults alone: its answer is not kept."""


class DocumentResults(msgspec.Struct):
    """What became of several documents."""

    results: Annotated[list[DocumentResult], Meta(description="One for each document, in order.")]


@post(
    "/libraries/{library:str}/documents/batch",
    status_code=200,
    responses=problems(404, 409, 413, 415),
    response_description="One result for each document",
    summary="Add several documents",
    operation_id="addDocuments",
)
async def add_documents(
    library: LibraryName,
    data: JSONBody[AddDocuments],
    engine: Engine,
    once: Write,
    settings: Config,
    wait: Wait = True,
) -> Answer[DocumentResults]:
    """Store several documents as if one by one, in order; one that is refused spoils no other."""
    if (kept := await once.replayed()) is not None:  # lest its texts be embedded again
        return kept
    if len(data.documents) > settings.max_batch:
        raise invalid("documents", f"has {len(data.documents)} documents, at most {settings.max_batch} are allowed")

    async def prepare_and_write() -> Answer[DocumentResults]:
        config = await library_config(engine, library)
        items = [bulk.Item(place) for place in range(len(data.documents))]
        for item, given in zip(items, data.documents, strict=True):
            await _prepare(item, config, settings, given)
        if wait and config.embedder["provider"] != "none":
            problem = await bulk.embed_new(engine, settings, config, items)
            for item in items:  # alone, those that bring all their vectors would not have met it
                if problem and item.prepared and any(vector is None for vector in item.prepared.vectors):
                    item.refuse(problem)

        async def write(connection: Connection) -> Answer[DocumentResults]:
            await bulk.write(connection, config, items)
            problems = [item.problem for item in items if item.problem]
            if len(problems) == len(items) and any(problem.status >= 500 for problem in problems):
                raise NothingWritten
            once.note(count=sum(item.problem is None for item in items))
            return Answer(DocumentResults([_result(item) for item in items]), status_code=200)

        async def partly() -> Answer[DocumentResults]:
            try:
                return await bulk.without_refused(lambda: once.run(write))
            except NothingWritten:  # the provider may be back when the same key comes again
                return Answer(DocumentResults([_result(item) for item in items]), status_code=200)

        async def write_whole(connection: Connection) -> Answer[DocumentResults]:
            await bulk.write_whole(connection, config, items, lambda text: once.recording(text, count=len(items)))
            return Answer(DocumentResults([_result(item) for item in items]), status_code=200)

        if not bulk.is_whole(items):
            return await partly()
        try:
            return await once.run(write_whole, single=True, recording=True)
        except (psycopg.Error, UnicodeError) as error:
            if problem_of(error).status not in bulk.OWN_STATUSES:
                raise
        return await partly()

    return await asked_again(prepare_and_write)


async def _prepare(item: bulk.Item, config: LibraryConfig, settings: Settings, given: Any) -> None:
    try:
        document = msgspec.convert(given, DocumentInput)
        item.key = document.key
        item.prepared = await checked(config, settings, document)
    except Exception as error:
        problem = problem_of(error)
        if problem.status not in bulk.OWN_STATUSES:
            raise
        item.refuse(problem)


def _result(item: bulk.Item) -> DocumentResult:
    if item.problem:
        return DocumentResult(item.problem.status, key=item.key, error=bulk.told(item.problem))
    return DocumentResult(202 if item.pending else 201 if item.created else 200, item.id, item.key)


router = Router("/", route_handlers=[add_documents], tags=["documents"])
