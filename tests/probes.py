"""Seeded probes across the border between libraries, over REST and in SQL.

A key and a role that have two libraries of five ask about the others in every way. Everything in those carries a
marker: no answer may hold it. And each probe is sent twice, about something that is there and about something that is
not: both answers must be the same but for the names that were sent, the stages that the service passed through among
what is compared. Used by tests/test_probes.py (some hundreds) and `python -m tests.soak --probes 10000`.
"""

from __future__ import annotations

import base64
import random
import re
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import httpx2
import msgspec
import psycopg
from psycopg.types.json import Jsonb

from tests.rest.asking import at, bearer, ok

MARKER = "zqxmarkerzqx"
OWN, FOREIGN = ("own-a", "own-b"), ("vault-a", "vault-b", "vault-c")
ADMIN_KEY = "the-admin-used-this"  # an Idempotency-Key
NOISE = {"x-request-id", "date", "server-timing"}


class Leak(AssertionError):
    """An answer that tells of what the caller may not know."""


class Border:
    """Libraries on both sides, and the names of what is beyond; `absent` things have names of the same length."""

    def __init__(self, client: httpx2.AsyncClient, admin: str, key: str, seed: int) -> None:
        self.client, self.admin, self.key = client, bearer(admin), bearer(key)
        self.random = random.Random(seed)
        self.seed = seed
        self.documents: list[str] = []  # ids of foreign documents
        self.chunks: list[str] = []
        self.own_documents: list[str] = []
        self.ids: dict[str, str] = {}
        self.cursors: list[str] = []  # of pages of foreign documents
        self.feeds: list[str] = []  # places in the feeds of foreign libraries
        self.count: Counter[str] = Counter()
        self.turns: dict[str, list[Any]] = {}

    def turn(self, side: str, kinds: dict[str, Any]) -> tuple[str, Any]:
        """The kinds of probes come round after round, each time in another order."""
        left = self.turns.get(side) or self.random.sample(list(kinds.items()), len(kinds))
        self.turns[side] = left[1:]
        self.count[f"{side} {left[0][0]}"] += 1
        found: tuple[str, Any] = left[0]
        return found

    async def build(self) -> None:
        """Make all libraries, as an admin."""
        self.client.headers.update(self.admin)
        for name in OWN + FOREIGN:
            mark = "plain" if name in OWN else MARKER
            body: dict[str, Any] = {"name": name, "description": mark, "metadata": {mark: mark}}
            body |= {"embedder": {"provider": "none"}, "dimension": 3, "attributes": {"year": "number", mark: "text"}}
            self.ids[name] = ok(await self.client.post("/v1/libraries", json=body), 201)["id"]
            for n in range(8):
                await self._write(name, n, mark)
            page = ok(await self.client.get(at("libraries", name, "documents"), params={"limit": 3}))
            feed = ok(await self.client.get(at("libraries", name, "changes"), params={"limit": 3}))
            if name in FOREIGN:
                self.cursors.append(page["next"])
                self.feeds.append(feed["next"])
        headers = {"Idempotency-Key": ADMIN_KEY}
        body = {"filter": {"$key": "none"}, "patch": {MARKER: 1}}
        ok(await self.client.post(at("libraries", FOREIGN[0], "documents", "update"), json=body, headers=headers))
        del self.client.headers["Authorization"]

    async def _write(self, library: str, n: int, mark: str) -> None:
        body = {
            "key": f"{'sheet' if library in OWN else 'paper'}-{library[-1]}-{n}",
            "title": f"{mark} title",
            "source": f"https://{mark}",
            "metadata": {"year": 2000 + n, mark: mark, "tags": [mark, "common"]},
            "chunks": [
                {"text": f"{mark} common {c}", "embedding": [1, n / 8, c / 8], "metadata": {mark: c}} for c in range(2)
            ],
        }
        made = ok(await self.client.post(at("libraries", library, "documents"), json=body), 201)
        items = ok(await self.client.get(at("libraries", library, "documents", made["id"], "chunks")))["items"]
        if library in FOREIGN:
            self.documents.append(made["id"])
            self.chunks += [item["id"] for item in items]
        else:
            self.own_documents.append(made["id"])

    # -- pairs: what is there, and what is not

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def library(self) -> tuple[str, str]:
        name = self.random.choice(FOREIGN)
        if self.random.random() < 0.5:
            return name, self.random.choice(["vaunt-a", "vaunt-b", "vaunt-c"])
        return self.ids[name], self.uuid()

    def document(self) -> tuple[str, str]:
        if self.random.random() < 0.5:
            return self.random.choice(self.documents), self.uuid()
        letter, n = self.random.choice("abc"), self.random.randrange(8)
        return f"paper-{letter}-{n}", f"piper-{letter}-{n}"

    def chunk(self) -> tuple[str, str]:
        return self.random.choice(self.chunks), self.uuid()

    def own(self) -> str:
        name = self.random.choice(OWN)
        return self.random.choice([name, self.ids[name]])

    def word(self) -> tuple[str, str]:
        return MARKER, "abcunusedabc"

    def cursor(self) -> tuple[str, str]:
        """A place in a list of documents: of foreign ones, and of ones that never were."""
        there = self.random.choice(self.cursors)
        moment, row = msgspec.msgpack.decode(base64.urlsafe_b64decode(there + "=" * (-len(there) % 4)))
        other = msgspec.msgpack.encode((moment, uuid.UUID(self.uuid()).bytes))
        assert len(row) == 16
        return there, base64.urlsafe_b64encode(other).decode().rstrip("=")

    def feed(self) -> tuple[str, str]:
        there = self.random.choice(self.feeds)
        position, _ = msgspec.msgpack.decode(base64.urlsafe_b64decode(there + "=" * (-len(there) % 4)))
        other = msgspec.msgpack.encode((position, uuid.UUID(self.uuid()).bytes))
        return there, base64.urlsafe_b64encode(other).decode().rstrip("=")

    def condition(self) -> tuple[Any, Any]:
        """A filter about something foreign."""
        (document, absent), (word, unused) = self.document(), self.word()
        shapes: list[Callable[[str, str], Any]] = [
            lambda d, _: {"$id": d} if re.fullmatch("[0-9a-f-]{36}", d) else {"$key": d},
            lambda d, _: {"$or": [{"$key": {"$in": [d, "other"]}}, {"$title": {"$ilike": f"{d}%"}}]},
            lambda _, w: {w: w},
            lambda _, w: {f"chunk.{w}": {"$gte": 0}},
            lambda _, w: {"$title": {"$like": f"{w}%"}},
            lambda _, w: {"tags": {"$contains": w}},
            lambda _, w: {"chunk.$text": {"$regex": w}},
            lambda _, w: {"$not": {"$source": f"https://{w}"}},
            lambda _, w: {w: {"$exists": True}},
        ]
        shape = self.random.choice(shapes)
        return shape(document, word), shape(absent, unused)

    # -- REST

    def request(self) -> tuple[str, str, Any, Any, dict[str, str], tuple[Any, Any]]:
        """A request as (name, method, first, second, headers, names): path and body about what is there, and not."""
        name, make = self.turn("rest", REST)
        method, first, second, names = make(self)
        # in a library of its own the key would be its own after the first request
        own = [*OWN, *(self.ids[each] for each in OWN)]
        sent = method != "GET" and self.random.random() < 0.2 and not any(each in first[0] for each in own)
        # what this key asked for before is no secret to it, and would be answered from the query cache
        headers = {"Cache-Control": "no-cache"} | ({"Idempotency-Key": ADMIN_KEY} if sent else {})
        return name, method, first, second, headers, names

    async def over_rest(self) -> None:
        """One probe: the same request about both, by the key that has two libraries."""
        name, method, first, second, headers, names = self.request()
        seen = []
        for (path, params, body), about in zip((first, second), names, strict=True):
            answer = await self.client.request(method, path, params=params, json=body, headers={**self.key, **headers})
            seen.append(told(answer, about))
            if MARKER in leaves(answer, about):
                raise Leak(f"seed {self.seed}: {name} {method} {path} {params} {body}: {answer.text}")
        if seen[0] != seen[1]:
            raise Leak(f"seed {self.seed}: {name} {method} {first} | {second}: {seen[0]} | {seen[1]}")

    # -- SQL

    async def in_sql(self, session: psycopg.AsyncConnection[Any]) -> None:
        """One probe in SQL, by a role that has the two libraries; whatever it writes is rolled back."""
        name, make = self.turn("sql", SQL)
        statement, *pairs = make(self)
        seen = []
        for place in range(2):
            given = [pair[place] for pair in pairs]
            said = await run(session, statement, given)
            for value in given:
                said = said.replace(text_of(value), "<it>")
            seen.append(TIMES.sub("", said))
            if MARKER in said:
                raise Leak(f"seed {self.seed}: {name} {statement} {given}: {said}")
        if seen[0] != seen[1]:
            raise Leak(f"seed {self.seed}: {name} {statement} {pairs}: {seen[0]} | {seen[1]}")


TIMES = re.compile(r"'?\"?(Execution Time|Planning Time|Actual (Startup|Total) Time|took_ms)\"?'?: [0-9.e-]+,?")


def text_of(value: Any) -> str:
    return str(value.obj if isinstance(value, Jsonb) else value)


def names_of(about: Any) -> list[str]:
    """What of a request is echoed: the names that were sent."""
    if isinstance(about, (list, tuple)):
        return [name for each in about for name in names_of(each)]
    if isinstance(about, dict):
        return [name for key, each in about.items() for name in [key, *names_of(each)]]
    return [about] if isinstance(about, str) and len(about) > 6 else []


def leaves(answer: httpx2.Response, about: Any) -> str:
    """An answer without what it only repeats."""
    text = answer.text
    for name in sorted(names_of(about), key=len, reverse=True):
        text = text.replace(name, "<it>")
    return text


def told(answer: httpx2.Response, about: Any) -> tuple[Any, ...]:
    """All that an answer tells: status, headers, stages, body, but for names that were sent, and for times."""
    body = re.sub(r'"(request_id|took_ms|token|expires_at)":("[^"]*"|[0-9.]+)', "", leaves(answer, about))
    headers = {name: value for name, value in answer.headers.items() if name not in NOISE | {"content-length"}}
    stages = [part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")]
    return answer.status_code, sorted(headers.items()), sorted(stages), body


async def run(session: psycopg.AsyncConnection[Any], statement: str, given: list[Any]) -> str:
    """What a statement gives or ends in, as text."""
    try:
        async with session.transaction(force_rollback=True):
            cursor = await session.execute(statement.encode(), given)
            return repr(await cursor.fetchall())
    except psycopg.Error as error:
        said = error.diag
        return repr((error.sqlstate, said.message_primary, said.message_detail, said.message_hint, said.context))


Request = tuple[str, Any, Any, tuple[Any, Any]]
Make = Callable[[Border], Request]


def in_library(method: str, *below: str, body: Any = None, params: Any = None) -> Make:
    """About a library that the key does not see."""

    def make(border: Border) -> Request:
        there, absent = border.library()
        parts = [
            part.replace("{document}", border.document()[0]).replace("{chunk}", border.chunk()[0]) for part in below
        ]
        first, second = ((at("libraries", name, *parts), params, body) for name in (there, absent))
        return method, first, second, (there, absent)

    return make


def within(method: str, *below: str, pair: str, body: Any = None, params: Any = None) -> Make:
    """About something foreign, asked for in a library that the key sees; {it} stands for it."""

    def make(border: Border) -> Request:
        own, names = border.own(), getattr(border, pair)()

        def put(shape: Any, name: Any) -> Any:
            if isinstance(shape, dict):
                return {key: put(value, name) for key, value in shape.items()}
            if isinstance(shape, list):
                return [put(value, name) for value in shape]
            return (
                name
                if shape == "{it}"
                else shape.replace("{it}", name)
                if isinstance(shape, str) and "{it}" in shape
                else shape
            )

        both = [
            (at("libraries", own, *(put(part, name) for part in below)), put(params, name), put(body, name))
            for name in names
        ]
        return method, both[0], both[1], names

    return make


def several(border: Border) -> Request:
    there, absent = border.library()
    body = {"query": "common", "mode": "text"}
    both = [("/v1/search", None, {**body, "libraries": [OWN[0], name]}) for name in (there, absent)]
    return "POST", both[0], both[1], (there, absent)


def token(border: Border) -> Request:
    there, absent = border.library()
    both = [("/v1/token", None, {"libraries": [name]}) for name in (there, absent)]
    return "POST", both[0], both[1], (there, absent)


QUERY = {"query": "common", "mode": "text", "k": 20, "include": ["text", "metadata", "document", "embedding"]}
VECTOR = {"vector": [1, 0.5, 0.5], "k": 20}
DOC = {"chunks": [{"text": "t", "embedding": [1, 0, 0]}]}
REST: dict[str, Make] = {
    "library": in_library("GET"),
    "stats": in_library("GET", "stats"),
    "index": in_library("GET", "index"),
    "embedder": in_library("GET", "embedder"),
    "documents": in_library("GET", "documents"),
    "document": in_library("GET", "documents", "{document}"),
    "its chunks": in_library("GET", "documents", "{document}", "chunks"),
    "chunk": in_library("GET", "chunks", "{chunk}"),
    "query": in_library("POST", "documents", "query", body={"total": True}),
    "query badly": in_library("POST", "documents", "query", body={"nothing": 1}),
    "search": in_library("POST", "search", body=QUERY),
    "search badly": in_library("POST", "search", body={"vector": [1]}),
    "search like": in_library("POST", "search", body={"like": {"document": "thing-1"}}),
    "search batch": in_library("POST", "search", "batch", body={"searches": [QUERY, VECTOR]}),
    "facets": in_library("POST", "facets", body={"attributes": ["year"]}),
    "export": in_library("GET", "export"),
    "changes": in_library("GET", "changes"),
    "changes from now": in_library("GET", "changes", params={"after": "now"}),
    "add": in_library("POST", "documents", body=DOC),
    "add badly": in_library("POST", "documents", body={"chunks": [{"text": "t", "embedding": [1]}]}),
    "put": in_library("PUT", "documents", "thing-1", body=DOC),
    "patch": in_library("PATCH", "documents", "{document}", body={"title": "x"}),
    "delete": in_library("DELETE", "documents", "{document}"),
    "delete some": in_library("POST", "documents", "delete", body={"filter": {"year": 2001}, "dry_run": True}),
    "update some": in_library("POST", "documents", "update", body={"filter": {"year": 2001}, "patch": {}}),
    "batch": in_library("POST", "documents", "batch", body={"documents": [DOC]}),
    "event": in_library("POST", "events", body={"id": "e", "text": "t"}),
    "retry": in_library("POST", "embeddings", "retry", body={}),
    "patch chunk": in_library("PATCH", "chunks", "{chunk}", body={"text": "x"}),
    "delete library": in_library("DELETE"),
    "change index": in_library("PUT", "index", body={"type": "hnsw"}),
    "several": several,
    "token": token,
    "foreign document": within("GET", "documents", "{it}", pair="document"),
    "chunks of a foreign document": within("GET", "documents", "{it}", "chunks", pair="document"),
    "foreign chunk": within("GET", "chunks", "{it}", pair="chunk"),
    "patch a foreign document": within("PATCH", "documents", "{it}", pair="document", body={"title": "x"}),
    "delete a foreign document": within("DELETE", "documents", "{it}", pair="document"),
    "patch a foreign chunk": within("PATCH", "chunks", "{it}", pair="chunk", body={"metadata": {"x": 1}}),
    "delete a foreign chunk": within("DELETE", "chunks", "{it}", pair="chunk"),
    "like a foreign chunk": within("POST", "search", pair="chunk", body={"like": {"chunk": "{it}"}}),
    "like a foreign document": within("POST", "search", pair="document", body={"like": {"document": "{it}"}}),
    "filtered search": within("POST", "search", pair="condition", body={**VECTOR, "filter": "{it}", "total": True}),
    "filtered words": within("POST", "search", pair="condition", body={**QUERY, "filter": "{it}", "facets": ["tags"]}),
    "filtered query": within("POST", "documents", "query", pair="condition", body={"filter": "{it}", "total": True}),
    "filtered facets": within("POST", "facets", pair="condition", body={"attributes": ["tags"], "filter": "{it}"}),
    "filtered delete": within("POST", "documents", "delete", pair="condition",
                              body={"filter": {"$and": ["{it}", {"year": -1}]}}),
    "filtered export": within("GET", "export", pair="word", params={"filter": '{"{it}": "{it}"}'}),
    "words": within("POST", "search", pair="word", body={**QUERY, "query": "{it}"}),
    "prefixes": within("POST", "search", pair="word", body={**QUERY, "query": "{it}*", "total": True}),
    "facet of a foreign field": within("POST", "facets", pair="word", body={"attributes": ["{it}"]}),
    "sort by a foreign field": within("POST", "documents", "query", pair="word", body={"sort": [{"field": "{it}"}]}),
    "foreign page": within("GET", "documents", pair="cursor", params={"after": "{it}"}),
    "foreign place in the feed": within("GET", "changes", pair="feed", params={"after": "{it}"}),
}  # fmt: skip

Sql = tuple[Any, ...]


def call(statement: str, *pairs: str) -> Callable[[Border], Sql]:
    """A statement, and what its parameters are about; `own` is a library of the role's."""

    def make(border: Border) -> Sql:
        found: list[tuple[Any, Any]] = []
        for pair in pairs:
            if pair == "own":
                found.append((border.own(),) * 2)
            elif pair == "condition":
                one, other = border.condition()
                found.append((Jsonb(one), Jsonb(other)))
            elif pair == "id":
                found.append((border.ids[border.random.choice(FOREIGN)], border.uuid()))
            elif pair == "name":
                found.append((border.random.choice(FOREIGN), border.random.choice(["vaunt-a", "vaunt-b", "vaunt-c"])))
            elif pair == "document id":
                found.append((border.random.choice(border.documents), border.uuid()))
            else:
                found.append(getattr(border, pair)())
        return (statement, *found)

    return make


SQL: dict[str, Callable[[Border], Sql]] = {
    "search": call("select * from pgshelf.search(%s, '[1,0.5,0.5]')", "library"),
    "search badly": call("select * from pgshelf.search(%s, '[1]')", "library"),
    "search out of range": call("select * from pgshelf.search(%s, '[1,0,0]', k => 0)", "library"),
    "words": call("select * from pgshelf.search_text(%s, 'common')", "library"),
    "hybrid": call("select * from pgshelf.search_hybrid(%s, 'common', '[1,0,0]')", "library"),
    "explain": call("select pgshelf.explain_search(%s, '[1,0,0]')", "library"),
    "total": call("select pgshelf.total_hits(%s)", "library"),
    "facets": call("select * from pgshelf.facets(%s, '{year}')", "library"),
    "count": call("select pgshelf.count_documents(%s)", "library"),
    "changes": call("select * from pgshelf.changes(%s)", "library"),
    "recall": call("select * from pgshelf.index_recall(%s)", "library"),
    "put": call("select pgshelf.put_document(%s, 'k', texts => '{t}', embeddings => '{\"[1,0,0]\"}')", "library"),
    "put badly": call("select pgshelf.put_document(%s, 'k', texts => '{t}', embeddings => '{\"[1]\"}')", "library"),
    "delete": call("select pgshelf.delete_document(%s, %s)", "library", "document"),
    "update some": call("select pgshelf.update_documents(%s, '{\"year\": 2001}', '{}')", "library"),
    "delete some": call("select pgshelf.delete_documents(%s, '{\"year\": 2001}')", "library"),
    "retry": call("select pgshelf.retry_embeddings(%s)", "library"),
    "stats": call("select * from pgshelf.library_stats(%s::text::uuid)", "id"),
    "index": call("select * from pgshelf.library_index(%s::text::uuid)", "id"),
    "embedder": call("select * from pgshelf.library_embedder(%s::text::uuid)", "id"),
    "granted": call("select pgshelf.granted(%s::text::uuid, 'monitor')", "id"),
    "filtered": call("select * from pgshelf.search(%s, '[1,0.5,0.5]', k => 20, filter => %s)", "own", "condition"),
    "filtered words": call("select * from pgshelf.search_text(%s, 'common', filter => %s)", "own", "condition"),
    "filtered count": call("select pgshelf.count_documents(%s, %s), pgshelf.total_hits(%s, %s)",
                           "own", "condition", "own", "condition"),
    "filtered facets": call("select * from pgshelf.facets(%s, '{year,tags}', %s)", "own", "condition"),
    "filtered update": call("select pgshelf.update_documents(%s, %s, '{\"x\": 1}', 3)", "own", "condition"),
    "foreign words": call("select * from pgshelf.search_text(%s, %s)", "own", "word"),
    "foreign field": call("select * from pgshelf.facets(%s, array[%s])", "own", "word"),
    "delete a foreign document": call("select pgshelf.delete_document(%s, %s)", "own", "document"),
    "view of documents": call("select * from pgshelf.documents_view where id = %s::text::uuid", "document id"),
    "view by name": call("select count(*), max(title) from pgshelf.documents_view where library = %s", "name"),
    "view by metadata": call("select * from pgshelf.documents_view where metadata ? %s", "word"),
    "view of chunks": call("select * from pgshelf.chunks_view where id = %s::text::uuid", "chunk"),
    "view of texts": call("select * from pgshelf.chunks_view where text ~ %s", "word"),
    "overview": call("select * from pgshelf.libraries_overview where name = %s", "name"),
    "overview whole": call("select name, documents, chunks, bytes from pgshelf.libraries_overview order by 1"),
    "index status": call("select * from pgshelf.index_status where library_id = %s::text::uuid", "id"),
    "embedder status": call("select * from pgshelf.embedder_status where library = %s", "name"),
    "pending": call("select * from pgshelf.pending_embeddings where library = %s", "name"),
    "error in a condition": call("select 1 / (length(title) - length(title)) from pgshelf.documents_view"
                                 " where library = %s", "name"),
    "tables": call("select * from pgshelf.documents where id = %s::text::uuid", "document id"),
    "shelf": call("select * from pgshelf.chunks_s0 where id = %s::text::uuid", "chunk"),
    "internals": call("select pgshelf.library_named(%s)", "library"),
    "size of tables": call("select reltuples from pg_class where oid = to_regclass('pgshelf.' || %s)", "name"),
    "statistics": call("select * from pg_stats where schemaname = 'pgshelf' and most_common_vals::text ~ %s", "word"),
}  # fmt: skip


async def probe(border: Border, session: psycopg.AsyncConnection[Any], count: int) -> str:
    """Send probes over REST and in SQL in turn; gives how many of each kind there were."""
    began = datetime.now(UTC)
    for number in range(count):
        step: Callable[[], Awaitable[None]] = border.over_rest if number % 2 else lambda: border.in_sql(session)
        await step()
    took = (datetime.now(UTC) - began).total_seconds()
    kinds = {name.partition(" ")[0] for name in border.count}
    sums = {kind: sum(n for name, n in border.count.items() if name.startswith(kind)) for kind in sorted(kinds)}
    return f"{count} probes of {len(border.count)} kinds ({sums}) in {took:.0f} s, no answer told of another library"
