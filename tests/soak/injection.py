"""Hostile texts through every string that the API takes, and what they must not do: anything.

The places are found by walking the OpenAPI document, so a new string is covered by itself: parameters of paths, queries
and headers, every string and number of a body, the keys of its free objects, and filters in all their forms. Used by
tests/test_injection.py (a sample) and `python -m tests.soak --only injection` (all of it).
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2
import psycopg

from pgshelf.errors import CODES
from tests.soak.hostile import NUMBERS, TEXTS

MARK = "\ue0fe mark \ue0fe"
# of every request; what reads them knows nothing of the operation, so one of them does
HEADERS = ["Authorization", "X-Request-Id", "Accept", "Content-Type", "Traceparent", "X-Forwarded-For"]
FORMS: list[Any] = [  # of a filter, with a text as a field, an operator or a value
    {MARK: 1}, {"f": MARK}, {"f": {MARK: 1}}, {MARK: MARK}, {"$or": [{MARK: MARK}]}, {"$not": {"f": MARK}},
    {"f": [MARK]}, {"$id": MARK}, {"$title": {"$eq": MARK}},
    {"chunk." + MARK: MARK}, {"$" + MARK: 1}, {"a." + MARK: {"$exists": True}},
    {"$created_at": {"$gt": MARK}}, {"chunk.$text": {"$ilike": MARK}}, {"year": {"$gte": MARK}},
    *({"f": {operator: MARK}} for operator in ("$ne", "$gt", "$lt", "$like", "$ilike", "$regex", "$contains")),
    *({"f": {operator: [MARK, MARK]}} for operator in ("$in", "$nin", "$between", "$contains_any", "$contains_all")),
]  # fmt: skip
# after these the examples may not find what they are about
TAKEN_AWAY = ("deleteLibrary", "updateLibrary", "deleteDocument", "deleteDocuments", "deleteChunk", "putEmbedder")
SLOWEST = 5.0  # seconds of one request; what sleeps or explodes takes longer
CONTENT = """
with l as (select * from pgshelf.libraries where name = 'canary' and deleted_at is null),
ours as (select * from pg_catalog.pg_class where relnamespace in ('pgshelf'::regnamespace, 'public'::regnamespace))
select (select array_agg(c order by c.id) from public.canary c)::text,
  (select string_agg(l::text, ',') from l),
  (select string_agg(d::text, ',' order by d.id) from pgshelf.documents d join l on l.id = d.library_id),
  (select string_agg(c::text, ',' order by c.id) from pgshelf.chunks c join l on l.id = c.library_id),
  (select string_agg(r::text, ',' order by r.rolname) from pg_catalog.pg_roles r),
  (select string_agg(s::text, ',') from pg_catalog.pg_db_role_setting s),
  (select string_agg(o.relname || coalesce(o.relacl::text, ''), ',' order by o.relname) from ours o),
  (select count(*) from pg_catalog.pg_proc), (select count(*) from pg_catalog.pg_namespace where nspname !~ '^pg_'),
  (select string_agg(datname, ',' order by datname) from pg_catalog.pg_database where datname = current_database())
"""


class Place(NamedTuple):
    """Where a text goes: `path`, `query` or `header` with the name, or `body` with the way to it."""

    kind: str
    way: tuple[str | int, ...]
    number: bool = False
    form: Any = None  # of what is put there; None: the text itself

    def __str__(self) -> str:
        form = "" if self.form is None else f" {json.dumps(self.form).replace(json.dumps(MARK)[1:-1], '·')}"
        return f"{self.kind} {'.'.join(map(str, self.way))}{form}"


class Operation:
    """One operation of the document, and everything in it that takes a text."""

    def __init__(self, document: dict[str, Any], method: str, path: str, item: dict[str, Any]) -> None:
        self.schemas = document["components"]["schemas"]
        self.name, self.method, self.path = item["operationId"], method.upper(), path
        self.parameters = item.get("parameters", [])
        self.body: Any = None
        self.lines = False
        self.places = [Place("header", (name,)) for name in HEADERS] if self.name == "search" else []
        for parameter in self.parameters:
            numeric = not self._is(parameter["schema"], "string") and self._is(parameter["schema"], "integer", "number")
            self.places.append(Place(parameter["in"], (parameter["name"],), numeric))
            if parameter["name"] == "filter":
                self.places += [Place("query", ("filter",), form=form) for form in FORMS]
        if "requestBody" in item:
            [(kind, media), *_] = item["requestBody"]["content"].items()
            self.lines = kind == "application/x-ndjson"
            self.schema = self._resolved(media["schema"])
            self.body = self.schema["examples"][0]
            self.places += self._walk(self.schema, ())

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        return found

    def _arms(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        schema = self._resolved(schema)
        arms = [arm for key in ("anyOf", "oneOf", "allOf") for arm in schema.get(key, [])]
        return [each for arm in arms for each in self._arms(arm)] or [schema]

    def _is(self, schema: dict[str, Any], *types: str) -> bool:
        return any(arm.get("type") in types or ("enum" in arm and "string" in types) for arm in self._arms(schema))

    def _walk(self, schema: dict[str, Any], way: tuple[str | int, ...]) -> Iterator[Place]:
        if len(way) > 6:
            return
        for arm in self._arms(schema):
            if arm.get("type") == "string" or "enum" in arm:
                yield Place("body", way)
            elif arm.get("type") in ("integer", "number"):
                yield Place("body", way, number=True)
            elif arm.get("type") == "array":
                yield from self._walk(arm["items"], (*way, 0))
            elif "properties" in arm:
                for name, each in arm["properties"].items():
                    yield from self._walk(each, (*way, name))
            elif arm.get("type") == "object":
                forms = FORMS if way[-1] == "filter" else [{MARK: "x"}, {"x": MARK}, {"x": [{MARK: MARK}]}]
                yield from (Place("body", way, form=form) for form in forms)

    def minimal(self, way: tuple[str | int, ...]) -> Any:
        """The example's body, with what is required on the way to a place."""
        body = copy.deepcopy(self.body)
        here, schema = body, self.schema
        for step in way[:-1]:
            wanted = "array" if isinstance(step, int) else "object"
            arm = next(each for each in self._arms(schema) if each.get("type") == wanted)
            schema = arm["items"] if isinstance(step, int) else arm["properties"][step]
            if isinstance(step, int):
                if not here:
                    here.append(self._least(schema))
                here = here[0]
            else:
                if not isinstance(here.get(step), (dict, list)):
                    here[step] = self._least(schema)
                here = here[step]
        return body

    def _least(self, schema: dict[str, Any]) -> Any:
        arm = next((a for a in self._arms(schema) if a.get("type") in ("object", "array")), self._arms(schema)[0])
        if "enum" in arm:
            return arm["enum"][0]
        if arm.get("type") == "object":
            return {name: self._least(arm["properties"][name]) for name in arm.get("required", [])}
        return {"array": [], "string": "x", "integer": 1, "number": 1}.get(arm.get("type", ""), None)


class Corpus:
    """Sends hostile texts to an application that asks for a key, and looks what became of everything else."""

    def __init__(self, client: httpx2.AsyncClient, url: str, document: dict[str, Any]) -> None:
        self.client, self.url = client, url
        self.operations = [
            Operation(document, method, path, item)
            for path, methods in document["paths"].items()
            for method, item in methods.items()
        ]
        self.answers: Counter[str] = Counter()
        self.same = 0
        self.slowest = (0.0, "")
        self.chunk = ""
        self.before: Any = None

    @property
    def places(self) -> int:
        return sum(len(operation.places) for operation in self.operations)

    def figures(self) -> str:
        """What was sent, and what came of it."""
        answers = ", ".join(f"{status} {count}" for status, count in sorted(self.answers.items()))
        return (
            f"{self.answers.total()} requests through {self.places} places: {answers}; {self.same} texts came back"
            f" as they were sent; the slowest took {self.slowest[0]:.2f} s: {self.slowest[1]}"
        )

    def prepare(self) -> None:
        """What must not change."""
        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute("create table public.canary (id int primary key, note text, secret text)")
            db.execute("insert into public.canary values (1, 'sings', 'xyzzy-secret')")

    async def renew(self) -> None:
        """The library of the examples as they expect it, and another one beside it."""
        ok = (200, 201, 409)
        for name in ("handbook", "canary"):
            body = {"name": name, "attributes": {"year": "number"}}
            assert (await self.client.post("/v1/libraries", json=body)).status_code in ok
            path = f"/v1/libraries/{name}/documents/guide%2Fvacuum"
            if name == "handbook" or self.before is None:
                text = "VACUUM reclaims storage occupied by dead tuples."
                assert (await self.client.put(path, json={"text": text, "metadata": {"year": 2025}})).status_code in ok
        found = (await self.client.get("/v1/libraries/handbook/documents/guide%2Fvacuum/chunks")).json()
        self.chunk = found["items"][0]["id"]
        await self.client.post("/v1/keys", json={"name": "crawler", "role": "reader"})
        if self.before is None:
            self.before = self.content()

    def content(self) -> Any:
        with psycopg.connect(self.url) as db:
            return db.execute(CONTENT).fetchone()

    async def run(self, rng: random.Random, share: float = 1.0) -> None:
        """A share of all texts through every place; at least one through each."""
        await self.renew()
        for operation in self.operations:
            for place in operation.places:
                texts: list[Any] = NUMBERS if place.number else TEXTS
                chosen = texts if share >= 1 else rng.sample(texts, max(1, round(len(texts) * share)))
                for text in chosen:
                    await self.send(operation, place, text)
            changed = [pair for pair in zip(self.before, self.content(), strict=True) if pair[0] != pair[1]]
            assert not changed, f"{operation.name} changed {changed}"
            if share >= 1:
                print(f"  {operation.name}: {len(operation.places)} places", flush=True)
            await self.renew()

    async def send(self, operation: Operation, place: Place, text: str | bytes) -> None:
        """One text in one place."""
        headers, query, values = dict[str, str](), dict[str, str](), dict[str, str]()
        for parameter in operation.parameters:
            if parameter["in"] == "path":
                usual = self.chunk if parameter["name"] == "chunk" else parameter["example"]
                values[parameter["name"]] = quote(usual, safe="")
        if place.kind == "path":
            values[str(place.way[0])] = quote(_bytes(text), safe="")
        elif place.kind == "query":
            value = _put(json.dumps(place.form), text) if place.form is not None else _bytes(text)
            query[str(place.way[0])] = quote(value, safe="")
        elif place.kind == "header":
            if not isinstance(text, str) or not text.isprintable() or not text.isascii() or text != text.strip():
                return  # no header can hold it: hyper refuses the request
            headers[str(place.way[0])] = text
        path = operation.path
        for name, given in values.items():
            path = path.replace("{" + name + "}", given)
        if query:
            path += "?" + "&".join(f"{name}={value}" for name, value in query.items())
        content: bytes | None = None
        body: Any = None
        if operation.body is not None:
            body = operation.minimal(place.way) if place.kind == "body" else operation.body
            if place.kind == "body":
                _set(body, place.way, MARK if place.form is None else place.form)
            content = _put(json.dumps(body), text, number=place.number) + (b"\n" if operation.lines else b"")
            kind = "application/x-ndjson" if operation.lines else "application/json"
            headers.setdefault("Content-Type", kind)
        what = f"{operation.name} {place} {text!r:.200}"
        begun = time.monotonic()
        answer = await self.client.request(operation.method, path, content=content, headers=headers)
        spent = time.monotonic() - begun
        self.slowest = max(self.slowest, (spent, what))
        self.check(answer, what)
        assert spent < SLOWEST, f"{what} took {spent:.1f} s"
        if answer.is_success and place.kind == "body" and place.form is None and not place.number:
            self.compare(answer, place, text, what)
        if answer.is_success and operation.name in TAKEN_AWAY:
            await self.renew()

    def check(self, answer: httpx2.Response, what: str) -> None:
        """No failure of ours, no secret, no header of theirs, and a problem that is one."""
        assert answer.status_code < 500, f"{what}: {answer.text}"
        assert "x-injected" not in answer.headers, what
        assert "xyzzy" not in answer.text and "root:x:" not in answer.text, f"{what}: {answer.text}"
        self.answers[f"{answer.status_code}"] += 1
        if answer.status_code >= 400:
            code = answer.json()["code"]
            assert CODES[code][0] == answer.status_code, what
        elif '"error":{"status":5' in answer.text:
            raise AssertionError(f"{what}: {answer.text}")

    def compare(self, answer: httpx2.Response, place: Place, text: str | bytes, what: str) -> None:
        """What was stored comes back as it was sent."""
        if not isinstance(text, str) or len(place.way) != 1 or not answer.content:
            return
        try:
            told = answer.json().get(place.way[0])
        except (ValueError, AttributeError):
            return
        if isinstance(told, str):
            assert told == text, f"{what} came back as {told!r}"
            self.same += 1


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def _put(content: str, text: str | bytes, *, number: bool = False) -> bytes:
    """The text in place of the mark; bytes as they are, numbers without quotes."""
    mark = json.dumps(MARK)
    if number:
        return content.replace(mark, str(text)).encode()
    if isinstance(text, bytes):
        return content.encode().replace(mark[1:-1].encode(), text)
    return content.replace(mark[1:-1], json.dumps(text)[1:-1]).encode()


def _set(body: Any, way: tuple[str | int, ...], value: Any) -> None:
    for step in way[:-1]:
        body = body[step]
    if isinstance(way[-1], int):
        body[:1] = [value]
    else:
        body[way[-1]] = value
