"""Making the vectors of a library's texts, at once or from what is pending: shared by handlers and the worker."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import psycopg
import sqlalchemy
from pgvector import Vector
from psycopg.types.json import Jsonb

from pgshelf import circuits, database, embedding_cache, providers
from pgshelf.embedders import (
    Embedder,
    EmbedderError,
    EmbedderTimeout,
    EmbedderUnavailable,
    Kind,
    ModelUnknown,
    TextRefused,
    TextsRefused,
    described,
    embedder_for,
    settled,
)
from pgshelf.errors import Problem
from pgshelf.settings import Settings
from pgshelf.timing import stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("pgshelf.embedding")
Vectors = dict[str, "NDArray[np.float32]"]
T = TypeVar("T")

EMBEDDER_CHANGED = "PS041"
KNOWN = 1000  # libraries whose embedder a process remembers
ASKED = 5  # times that vectors are made before a change of the embedder in between is an error
NEXT_GRACE = 1.0  # seconds that a writer waits for the embedder that is to come, when he has his own vectors
CALLS_AT_ONCE = 4  # of one request, or of one batch of the worker
HARMLESS = "text"  # refused only by a provider that refuses everything


class LibraryConfig(msgspec.Struct, frozen=True):
    """What writing and searching need to know of a library."""

    id: UUID
    embedder: dict[str, Any]
    chunking: dict[str, int]
    change: int | None = None  # of the embedder, while there is one
    next_embedder: dict[str, Any] | None = None


CONFIG = "select * from pgshelf.library_config(%s, %s, %s)"


async def library_config(engine: database.Source, library: str) -> LibraryConfig:
    """Look up a library by name or id; PS001 when there is none."""
    return (await config_and_texts(engine, library, None, None))[0]


async def config_and_texts(
    engine: database.Source, library: str, document: UUID | None, key: str | None
) -> tuple[LibraryConfig, Counter[str]]:
    """A library by name or id, and how often each text of a document, named by its id or key, has a vector already."""
    *config, texts = (await database.run(engine, CONFIG, library, document, key))[0]
    return LibraryConfig(*config), Counter(texts or ())


_known: WeakKeyDictionary[sqlalchemy.Engine, dict[str, dict[str, Any]]] = WeakKeyDictionary()


def known_embedders(source: database.Source) -> dict[str, dict[str, Any]]:
    """The embedders that libraries, by name or id, had when they were last asked: they may have others by now.

    Whoever uses one looks in the statement that uses its vectors, which ends in PS041 where it is another.
    """
    known = _known.setdefault(database.primary(source), {})
    if len(known) > KNOWN:
        known.clear()
    return known


async def asked_again(work: Callable[[], Awaitable[T]]) -> T:
    """Do `work`, which makes vectors and uses them, again when the embedder of the library changed in between."""
    for attempt in range(ASKED):
        try:
            return await work()
        except psycopg.Error as error:
            if error.sqlstate == EMBEDDER_CHANGED:
                _known.clear()
            if error.sqlstate != EMBEDDER_CHANGED or attempt == ASKED - 1:
                raise
    raise AssertionError("unreachable")


def embedder_of(settings: Settings, choice: Mapping[str, Any]) -> Embedder:
    """The embedder that a library names; a problem when this server cannot provide it."""
    if choice["provider"] == "none":
        detail = "The library has no embedder (provider none): send vectors with the chunks and with the searches."
        raise Problem("no_embedder", detail)
    try:
        return embedder_for(settings, choice)
    except ValueError as error:
        raise Problem("embedder_not_configured", _sentence(error)) from None


async def described_embedder(settings: Settings, choice: Mapping[str, Any]) -> dict[str, Any]:
    """What a new library keeps of the embedder that it asks for; a problem when this server cannot provide it.

    A provider that has to be asked for it is asked whatever its circuit, and counts as neither away nor back: who
    chooses an embedder shall hear the truth of now, may have misspelt the model, and a name that a client makes up
    shall have no circuit, with its line in /metrics.
    """
    try:
        return described(await settled(settings, choice))
    except ValueError as error:
        raise Problem("embedder_not_configured", _sentence(error)) from None
    except EmbedderError as error:
        raise problem_of(error) from error


def _sentence(error: Exception) -> str:
    said = str(error)
    return f"{said[0].upper()}{said[1:]}."


async def embed(
    engine: sqlalchemy.Engine,
    settings: Settings,
    choice: Mapping[str, Any],
    texts: Sequence[str],
    kind: Kind,
    paths: Sequence[str],
) -> list[Vector]:
    """Embed texts for a client; `paths` name each text in the request, for the problem that one may be."""
    embedder = embedder_of(settings, choice)
    try:
        return [Vector(row) for row in await vectors_of(engine, settings, embedder, texts, kind)]
    except EmbedderError as error:
        raise problem_of(error, paths) from error


def problem_of(error: EmbedderError, paths: Sequence[str] = ()) -> Problem:
    """What a client is told when there are no vectors."""
    if isinstance(error, TextRefused):
        path = paths[error.index]
        errors = [{"path": path, "message": str(error)}]
        return Problem("text_not_embeddable", f"{path}: {error}", errors=errors)
    if isinstance(error, EmbedderTimeout):
        return Problem("embedder_timeout", f"{error}.", retry_after=error.retry_after)
    if isinstance(error, EmbedderUnavailable):
        return Problem("embedder_unavailable", f"{error}.", retry_after=error.retry_after)
    return Problem("embedder_not_configured" if isinstance(error, ModelUnknown) else "embedder_failed", f"{error}.")


async def vectors_of(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, texts: Sequence[str], kind: Kind
) -> NDArray[np.float32]:
    """The vectors of texts, one row each, out of the cache or from the provider, who is asked for equal texts once.

    Raises EmbedderError. What other batches gave is in the cache then: nothing that was answered is asked for again.
    """
    cached = embedding_cache.used(settings, embedder)
    missing = list(dict.fromkeys(texts))
    made: Vectors = {}
    if cached:
        made = await embedding_cache.look_up(engine, embedder, missing, kind)
        missing = [text for text in missing if text not in made]
    batches = iter([missing[at : at + embedder.batch] for at in range(0, len(missing), embedder.batch)])
    failures: list[EmbedderError] = []

    async def ask(batch: list[str]) -> None:
        with circuits.guarded(engine, settings, circuits.embedder(embedder)):
            answer = dict(zip(batch, await call(embedder, batch, kind), strict=True))
        made.update(answer)
        if cached:
            await embedding_cache.remember(engine, embedder, answer, kind)

    async def go_through() -> None:
        for batch in batches:
            try:
                await _in_parts(ask, batch)
            except TextRefused as error:
                failures.append(TextRefused(str(error), texts.index(batch[error.index])))
            except EmbedderError as error:
                failures.append(error)
            if failures:
                return

    if missing:
        with stage("embed"):
            await asyncio.gather(*[go_through() for _ in range(min(CALLS_AT_ONCE, len(missing)))])
    if failures:
        raise failures[0]
    return np.array([made[text] for text in texts], dtype=np.float32).reshape(len(texts), embedder.dimension)


async def call(embedder: Embedder, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
    """The one place where a provider is asked, for a batch that it takes."""
    with providers.measured(embedder.provider, "embed", circuits.EMBEDDER.answers):
        return await embedder.embed(texts, kind)


async def _in_parts(ask: Callable[[list[str]], Awaitable[None]], texts: list[str]) -> None:
    """Ask for texts; where the provider refuses them and does not say which, TextRefused comes from the one."""
    parts = [(0, texts)]
    while parts:
        start, part = parts.pop()
        try:
            await ask(part)
        except TextsRefused as error:
            if part is texts:
                await ask([HARMLESS])  # where that is refused, too, it is not for the texts
            if len(part) == 1:
                raise TextRefused(str(error), start) from error
            middle = len(part) // 2
            parts += [(start + middle, part[middle:]), (start, part[:middle])]


async def embed_for_writing(
    engine: sqlalchemy.Engine,
    settings: Settings,
    config: LibraryConfig,
    texts: Sequence[str],
    paths: Sequence[str],
    others: Sequence[str] = (),
) -> list[Vector]:
    """Embed texts that are about to be written.

    While the embedder of the library changes, the vectors that they will have then are made beside, and those of
    `others`, whose vectors the client brought: the change shall not have to wait for them.
    """

    async def now() -> list[Vector]:
        return await embed(engine, settings, config.embedder, texts, "document", paths) if texts else []

    if config.next_embedder is None:
        return await now()
    later = asyncio.create_task(_embed_next(engine, settings, config, list(dict.fromkeys([*texts, *others]))))
    try:
        made = await now()
        await asyncio.wait([later], timeout=NEXT_GRACE)
        return made
    finally:
        later.cancel()
        await asyncio.wait([later])


async def _embed_next(
    engine: sqlalchemy.Engine, settings: Settings, config: LibraryConfig, texts: Sequence[str]
) -> None:
    """Whatever goes wrong is left to the worker, which finds the texts without a vector."""
    if not texts:
        return
    try:
        embedder = embedder_of(settings, config.next_embedder or {})
        await store_next(engine, config.change, texts, await vectors_of(engine, settings, embedder, texts, "document"))
    except (EmbedderError, Problem, psycopg.Error) as error:
        log.warning("embedding %d texts for the next embedder failed, left to the worker: %s", len(texts), error)


async def store_next(engine: sqlalchemy.Engine, change: int | None, texts: Sequence[str], vectors: Any) -> bool:
    """Keep vectors of an embedder that is to come; False when nobody wants it any more."""
    hashes = [change_hash(text) for text in texts]
    made = [Vector(vector) for vector in vectors]
    statement = "select pgshelf.change_store(%s, %s, %b, null)"
    return bool((await database.run(engine, statement, change, hashes, made))[0][0])


def change_hash(text: str) -> bytes:
    """What `sha256(convert_to(text, 'UTF8'))` is in SQL: vectors of an embedder to come are kept by it."""
    return hashlib.sha256(text.encode()).digest()


def text_hash(text: str) -> str:
    """What `md5(text)` is in SQL: tells whether a chunk still holds the text that was embedded."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


async def store(
    engine: sqlalchemy.Engine,
    library: UUID,
    choice: Mapping[str, Any],
    chunks: Sequence[UUID],
    texts: Sequence[str],
    vectors: Any,
) -> int:
    """Give pending chunks vectors that the embedder `choice` made; PS041 when the library has another one by now.

    Chunks that changed meanwhile are left out. Returns how many were stored.
    """
    rows = await database.run(
        engine,
        "select pgshelf.store_embeddings(pgshelf.embedded_with(%s, %s), %s, %s, %b)",
        library,
        Jsonb(choice),
        list(chunks),
        [text_hash(text) for text in texts],
        [vector if isinstance(vector, Vector) else Vector(vector) for vector in vectors],
        written=True,
    )
    return int(rows[0][0])
