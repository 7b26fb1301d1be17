"""Who may do what: every route of the OpenAPI document with every kind of credentials."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg
import pytest
import pytest_asyncio

from pgshelf import credentials
from pgshelf.access import RULES
from pgshelf.app import create_app
from pgshelf.authentication import Authenticator
from pgshelf.settings import Settings
from tests.conftest import _lifespan
from tests.issuer import Issuer
from tests.rest.asking import bearer, key, ok, problem

# What each operation asks for: a role, and where it names its library. A route that is not here fails the suite.
MATRIX = {
    "health": ("open", ""), "ready": ("open", ""),
    "listLibraries": ("reader", "lists"), "createLibrary": ("admin", "names"),
    "getLibrary": ("reader", "path"), "libraryStats": ("reader", "path"), "getIndex": ("reader", "path"),
    "updateLibrary": ("admin", "path"), "deleteLibrary": ("admin", "path"), "putIndex": ("admin", "path"),
    "getEmbedder": ("reader", "path"), "putEmbedder": ("admin", "path"), "cancelEmbedder": ("admin", "path"),
    "addDocument": ("writer", "path"), "putDocument": ("writer", "path"), "updateDocument": ("writer", "path"),
    "deleteDocument": ("writer", "path"), "updateDocuments": ("writer", "path"), "deleteDocuments": ("writer", "path"),
    "listDocuments": ("reader", "path"), "getDocument": ("reader", "path"), "queryDocuments": ("reader", "path"),
    "listChunks": ("reader", "path"), "getChunk": ("reader", "path"),
    "updateChunk": ("writer", "path"), "deleteChunk": ("writer", "path"),
    "search": ("reader", "path"), "searchBatch": ("reader", "path"), "facets": ("reader", "path"),
    "searchLibraries": ("reader", "body"),
    "addDocuments": ("writer", "path"), "importDocuments": ("writer", "path"), "exportDocuments": ("reader", "path"),
    "addEvent": ("writer", "path"), "retryEmbeddings": ("writer", "path"), "listChanges": ("reader", "path"),
    "getCache": ("reader", "all"), "clearCache": ("admin", "all"),
    "createKey": ("admin", "all"), "listKeys": ("admin", "all"), "getKey": ("admin", "all"),
    "revokeKey": ("admin", "all"), "rotateKey": ("admin", "all"),
    "createToken": ("reader", ""), "listAudit": ("admin", "all"),
    "getReplication": ("admin", "all"), "startBackup": ("admin", "all"), "listBackups": ("admin", "all"),
}  # fmt: skip
LEVEL = {"reader": 1, "writer": 2, "admin": 3}
LAST = ["deleteLibrary"]  # what those before it need
CONTENT = """
select (select jsonb_agg(to_jsonb(l) order by l.id) from pgshelf.libraries l),
  (select jsonb_agg(to_jsonb(d) order by d.id) from pgshelf.documents d),
  (select jsonb_agg(to_jsonb(k) - 'last_used_at' order by k.id) from pgshelf.keys k),
  (select count(*) from pgshelf.key_secrets)
"""


class Service:
    """An application that asks for keys, on the database of this file; `operations` are those of its document."""

    def __init__(self, client: httpx2.AsyncClient, url: str, document: dict[str, Any], issuer: Issuer) -> None:
        self.client, self.url, self.issuer = client, url, issuer
        self.schemas = document["components"]["schemas"]
        self.operations = {
            item["operationId"]: (method.upper(), path, item)
            for path, methods in document["paths"].items()
            for method, item in methods.items()
        }

    async def send(self, operation: str, headers: dict[str, str], library: str = "handbook") -> httpx2.Response:
        """The example of an operation, about a library."""
        method, path, item = self.operations[operation]
        for parameter in item.get("parameters", []):
            if parameter["in"] == "path":
                value = library if parameter["name"] == "library" else parameter["example"]
                path = path.replace("{" + parameter["name"] + "}", quote(value, safe=""))
        body = None
        if "application/json" not in item.get("requestBody", {"content": "application/json"})["content"]:
            headers = {"Content-Type": "application/x-ndjson", **headers}
            return await self.client.request(method, path, content=b'{"text": "x"}\n', headers=headers)
        if "requestBody" in item:
            schema = item["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            body = dict(self.schemas[schema]["examples"][0])
            body |= {"libraries": [library]} if operation == "searchLibraries" else {}
        return await self.client.request(method, path, json=body, headers=headers)

    def content(self) -> Any:
        with psycopg.connect(self.url) as connection:
            return connection.execute(CONTENT).fetchone()

    def renew(self) -> None:
        """The library and its document, as they were before anything was allowed."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("select pgshelf.delete_library(name) from pgshelf.libraries where deleted_at is null")
            connection.execute(
                "insert into pgshelf.libraries (name, dimension, embedder, chunking) values ('handbook', 256,"
                """ '{"provider": "local", "dimension": 256}', '{"size": 1200, "overlap": 0}'),"""
                """ ('other', 256, '{"provider": "local", "dimension": 256}', '{"size": 1200, "overlap": 0}')"""
            )
            connection.execute(
                "update pgshelf.keys set revoked_at = now() where revoked_at is null and name = 'crawler'"
            )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(
    shared_database_url: str, vector_schema: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    folder, issuer = tmp_path_factory.mktemp("access"), Issuer()
    settings = Settings(
        database_url=shared_database_url,
        data_dir=folder,
        vector_schema=vector_schema,
        worker_enabled=False,
        auth="on",
        **issuer.settings(folder),
    )
    app = create_app(settings)
    async with _lifespan(app):
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            document = ok(await client.get("/schema"))
            yield Service(client, shared_database_url, document, issuer)


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_every_route_is_in_the_matrix_and_has_a_rule(service: Service) -> None:
    assert set(service.operations) == set(MATRIX) == set(RULES) - {"metrics", "errors"}


async def test_routes_that_the_document_leaves_out(service: Service) -> None:
    """All that answers is in the document, but for the two references and the metrics, which name libraries."""
    app: Any = service.client._transport.app  # type: ignore[attr-defined]  # the application under test
    routes = {route.path for route in app.routes}
    documented = {path for _, path, _ in service.operations.values()}
    parameters = re.compile(r"\{(\w+):str\}")
    left_out = {parameters.sub(r"{\1}", path) for path in routes} - documented
    assert left_out == {"/errors", "/metrics", "/schema", "/schema/{path}", "/schema/openapi.json"}
    problem(await service.client.get("/metrics"), 401, "unauthorized")
    narrow, wide = key(service.url, "narrow scraper", "admin", "*a*"), key(service.url, "scraper", "reader")
    problem(await service.client.get("/metrics", headers=bearer(narrow)), 403, "forbidden")
    assert (await service.client.get("/metrics", headers=bearer(wide))).status_code == 200


def refused() -> dict[str, tuple[str, str]]:
    """Credentials that nobody accepts, by name; the code that they are answered with. `{...}` stands for a key."""
    made = credentials.mint().secret
    return {
        "no key": ("", "unauthorized"),
        "another scheme": ("Basic dXNlcjpwYXNz", "invalid_key"),
        "no scheme": (made, "invalid_key"),
        "no secret": ("Bearer", "invalid_key"),
        "malformed": ("Bearer pgs_short", "invalid_key"),
        "of another service": ("Bearer sk-0123456789abcdef", "invalid_key"),
        "two": (f"Bearer {made} {made}", "invalid_key"),
        "bad checksum": (f"Bearer {made[:-1]}{'a' if made[-1] != 'a' else 'b'}", "invalid_key"),
        "unknown": (f"Bearer {made}", "invalid_key"),
        "unknown token": (f"Bearer {credentials.mint('token').secret}", "invalid_key"),
    }


@pytest.mark.parametrize("name", [*refused(), "expired", "revoked"])
async def test_bad_credentials_are_refused_everywhere(service: Service, name: str) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    if name == "expired":
        header, code = f"Bearer {key(service.url, 'expired', 'admin', expires_at=past)}", "key_expired"
    elif name == "revoked":
        header, code = f"Bearer {key(service.url, 'revoked', 'admin', revoked=True)}", "key_revoked"
    else:
        header, code = refused()[name]
    await nobody(service, {"Authorization": header} if header else {}, code)


@pytest.mark.parametrize("name", Issuer().wrong())
async def test_wrong_jwts_are_refused_everywhere(service: Service, name: str) -> None:
    await nobody(service, bearer(service.issuer.wrong()[name]), "invalid_token")


async def nobody(service: Service, headers: dict[str, str], code: str) -> None:
    service.renew()
    before = service.content()
    for operation, (role, _) in MATRIX.items():
        response = await service.send(operation, headers)
        if role == "open":
            ok(response)
            continue
        body = problem(response, 401, code)
        challenge = response.headers["www-authenticate"]
        assert challenge.startswith('Bearer realm="pgshelf"') and ("invalid_token" in challenge) == bool(headers)
        # the same for what is there and what is not
        other = problem(await service.send(operation, headers, library="none"), 401, code)
        assert {**other, "instance": "", "request_id": ""} == {**body, "instance": "", "request_id": ""}
        assert "401" in service.operations[operation][2]["responses"]
    assert service.content() == before


@pytest.mark.parametrize("kind", ["key", "token", "jwt", "key for a pattern", "key for an id", "jwt for a name"])
@pytest.mark.parametrize("role", LEVEL)
async def test_a_role_may_do_what_it_may(service: Service, role: str, kind: str) -> None:
    service.renew()
    with psycopg.connect(service.url) as connection:
        row = connection.execute(
            "select id::text from pgshelf.libraries where name = 'handbook' and deleted_at is null"
        ).fetchone()
    scope = {"key for a pattern": "hand*", "key for an id": row[0].upper() if row else "", "jwt for a name": "handbook"}
    if kind.startswith("jwt"):
        secret = service.issuer.token(
            role, [scope.get(kind, "*")], key={"reader": "rsa", "writer": "ec"}.get(role, "ed")
        )
    elif kind == "key for an id":
        secret = (await made(service, role, [scope[kind]]))["secret"]
    else:
        secret = key(service.url, f"{role} {kind}", role, *([scope[kind]] if kind in scope else []))
    if kind == "token":
        secret = ok(await service.client.post("/v1/token", json={}, headers=bearer(secret)), 201)["token"]
    everything = kind not in scope
    for operation in [*(set(MATRIX) - set(LAST)), *LAST]:
        needed, where = MATRIX[operation]
        response = await service.send(operation, bearer(secret))
        if needed == "open":
            ok(response)
        elif operation == "createToken" and "key" not in kind:
            problem(response, 403, "forbidden")
        elif LEVEL[role] < LEVEL[needed] or (where == "all" and not everything):
            problem(response, 403, "forbidden")
            assert "403" in service.operations[operation][2]["responses"]
        elif kind == "key for an id" and where == "names":
            problem(response, 403, "forbidden")  # an id names no library that does not exist yet
        else:
            refused = response.status_code in (401, 403) or "library_not_found" in response.text
            assert not refused, (operation, response.text)


async def made(service: Service, role: str, libraries: list[str]) -> dict[str, Any]:
    """A key, made over REST by an admin."""
    name = f"{role} {len(service.content()[2] or [])}"  # none while there is no key
    admin = key(service.url, f"admin for {name}", "admin")
    body = {"name": name, "role": role, "libraries": libraries}
    found: dict[str, Any] = ok(await service.client.post("/v1/keys", json=body, headers=bearer(admin)), 201)
    return found


@pytest.mark.parametrize("kind", ["key", "token", "jwt", "jwt for none"])
async def test_another_librarys_key_finds_nothing(service: Service, kind: str) -> None:
    service.renew()
    scope = ["other*", "none-*"]
    secret = key(service.url, f"others {kind}", "admin", *scope)
    if kind == "token":
        wide = key(service.url, "wide", "admin")
        answer = await service.client.post("/v1/token", json={"libraries": scope}, headers=bearer(wide))
        secret = ok(answer, 201)["token"]
    elif kind.startswith("jwt"):
        secret = service.issuer.token("admin", scope if kind == "jwt" else [])
    before = service.content()
    for operation, (_, where) in MATRIX.items():
        response = await service.send(operation, bearer(secret))
        if where in ("path", "body"):
            hidden = problem(response, 404, "library_not_found")
            # what it may not see answers exactly as what does not exist, whatever the request
            missing = problem(
                await service.send(operation, bearer(secret), library="handbuck"), 404, "library_not_found"
            )
            told = hidden["detail"].replace("handbook", "handbuck")
            assert {**hidden, "detail": told, "instance": "", "request_id": ""} == {
                **missing, "instance": "", "request_id": ""
            }  # fmt: skip
            assert set(hidden) == set(missing)
        elif where in ("names", "all"):
            problem(response, 403, "forbidden")
        elif where == "lists":
            names = {library["name"] for library in ok(response)["items"]}
            assert names == ({"other"} if kind != "jwt for none" else set())
    changed = service.content()
    assert changed[:3] == before[:3]


async def test_who_calls_is_asked_before_anything_else(service: Service) -> None:
    """Neither the body nor its type nor the path's library matters to who has no key."""
    path = "/v1/libraries/none/search"
    for content, kind in ((b"{", "application/json"), (b"x", "text/plain"), (b"x" * 40_000_000, "application/json")):
        response = await service.client.post(path, content=content, headers={"Content-Type": kind})
        problem(response, 401, "unauthorized")
    # what is wrong with a body tells nothing of a library that the key does not see
    secret = key(service.url, "a narrow one", "writer", "other")
    for content in (b"{", b'{"k": -1}', b'{"vector": [1]}'):
        for library in ("handbook", "none"):
            response = await service.client.post(
                f"/v1/libraries/{library}/search",
                content=content,
                headers={"Content-Type": "application/json", **bearer(secret)},
            )
            problem(response, 404, "library_not_found")


async def test_the_reference_needs_no_key(service: Service) -> None:
    for path in ("/schema", "/schema/openapi.json"):
        ok(await service.client.get(path))
    assert (await service.client.get("/schema/nothing")).status_code == 404


async def test_a_route_without_a_rule_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = key(service.url, "an admin", "admin")
    monkeypatch.delitem(RULES, "libraryStats")
    response = await service.send("libraryStats", bearer(admin))
    assert "no rule" in problem(response, 403, "forbidden")["detail"]


async def test_several_libraries_are_searched_only_if_all_are_seen(service: Service) -> None:
    service.renew()
    secret = key(service.url, "several", "reader", "other")
    headers = bearer(secret)

    async def search(*libraries: Any, **fields: Any) -> httpx2.Response:
        body = {"libraries": list(libraries), "query": "x", **fields}
        return await service.client.post("/v1/search", json=body, headers=headers)

    ok(await search("other"))
    for names in (("other", "handbook"), ("handbook", "none"), ("handbook",)):
        first = next(name for name in names if name != "other")
        assert repr(first) in problem(await search(*names), 404, "library_not_found")["detail"]
    # the first that is missing is named, whether it exists or not
    assert "'none'" in problem(await search("none", "handbook"), 404, "library_not_found")["detail"]
    problem(await search(*["other"] * 101), 400, "validation_failed")
    problem(await search(7), 400, "validation_failed")
    response = await service.client.post("/v1/search", content=b"{", headers={**headers, "Content-Type": "text/plain"})
    problem(response, 415, "unsupported_media_type")
    response = await service.client.post(
        "/v1/search", content=b"{", headers={**headers, "Content-Type": "application/json"}
    )
    problem(response, 400, "invalid_json")


async def test_several_libraries_are_those_that_were_judged(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that mean other libraries by the time of the search, in which somebody has just searched, do not count."""
    service.renew()
    client, admin = service.client, bearer(key(service.url, "swapper", "admin"))
    for name in ("handbook", "other"):
        ok(
            await client.put(f"/v1/libraries/{name}/documents/k", json={"text": f"Pages of {name}."}, headers=admin),
            201,
        )
    ids = {name: ok(await client.get(f"/v1/libraries/{name}", headers=admin))["id"] for name in ("handbook", "other")}
    owner = bearer((await made(service, "reader", [ids["other"]]))["secret"])
    body = {"libraries": ["other"], "query": "pages", "mode": "text"}
    seen = Authenticator.seen

    async def texts(headers: dict[str, str]) -> list[str]:
        hits = ok(await client.post("/v1/search", json=body, headers=headers))["hits"]
        return [hit["text"] for hit in hits]

    async def swapped(*arguments: Any) -> Any:
        found = await seen(*arguments)
        for old, new in (("handbook", "between"), ("other", "handbook"), ("between", "other")):
            ok(await client.patch(f"/v1/libraries/{old}", json={"name": new}, headers=admin))
        assert await texts(admin) == ["Pages of handbook."]
        return found

    assert await texts(owner) == ["Pages of other."]
    with monkeypatch.context() as patched:
        patched.setattr(Authenticator, "seen", swapped)
        assert await texts(owner) == ["Pages of other."]
    problem(await client.post("/v1/search", json=body, headers=owner), 404, "library_not_found")


async def test_names_stay_within_the_scope_of_who_gives_them(service: Service) -> None:
    service.renew()
    headers = bearer(key(service.url, "team admin", "admin", "team-*", "handbook"))
    client = service.client
    ok(await client.post("/v1/libraries", json={"name": "team-a"}, headers=headers), 201)
    problem(await client.post("/v1/libraries", json={"name": "tea-a"}, headers=headers), 403, "forbidden")
    # neither does it tell whether such a library exists
    problem(await client.post("/v1/libraries", json={"name": "other"}, headers=headers), 403, "forbidden")
    problem(await client.post("/v1/libraries", json={"name": "team-a"}, headers=headers), 409, "library_exists")
    path = "/v1/libraries/team-a"
    problem(await client.patch(path, json={"name": "other-a"}, headers=headers), 403, "forbidden")
    problem(await client.patch(path, json={"name": None}, headers=headers), 400, "validation_failed")
    problem(
        await client.patch(path, json={}, headers={**headers, "Content-Type": "text/plain"}),
        415,
        "unsupported_media_type",
    )
    ok(await client.patch(path, json={"name": "team-b"}, headers=headers))
    problem(await client.get(path, headers=headers), 404, "library_not_found")
    ok(await client.get("/v1/libraries/team-b", headers=headers))
    ok(await client.patch("/v1/libraries/team-b", json={"description": "x"}, headers=headers))


async def test_a_scope_follows_names_or_ids(service: Service) -> None:
    """A name means what is called so now; an id stays with its library."""
    service.renew()
    admin = bearer(key(service.url, "renamer", "admin"))
    client = service.client
    library = ok(await client.get("/v1/libraries/handbook", headers=admin))["id"]
    by_name = bearer(key(service.url, "by name", "reader", "handbook"))
    by_id = bearer((await made(service, "reader", [f"{{{library.upper()}}}"]))["secret"])
    for headers in (by_name, by_id):
        for path in ("handbook", library, library.upper()):
            ok(await client.get(f"/v1/libraries/{path}", headers=headers))
        problem(await client.get("/v1/libraries/other", headers=headers), 404, "library_not_found")
    ok(await client.patch("/v1/libraries/handbook", json={"name": "renamed"}, headers=admin))
    ok(await client.patch("/v1/libraries/other", json={"name": "handbook"}, headers=admin))
    assert ok(await client.get("/v1/libraries/handbook", headers=by_name))["id"] != library
    problem(await client.get(f"/v1/libraries/{library}", headers=by_name), 404, "library_not_found")
    assert ok(await client.get("/v1/libraries/renamed", headers=by_id))["id"] == library
    problem(await client.get("/v1/libraries/handbook", headers=by_id), 404, "library_not_found")


PATTERNS = [
    ("team-*", "team-", True), ("team-*", "team-a", True), ("team-*", "Team-a", False), ("team-*", "a team-a", False),
    ("*-eu", "docs-eu", True), ("*-eu", "docs-eu-2", False), ("a*b*c", "a1b2c", True), ("a*b*c", "acb", False),
    ("a_b", "a_b", True), ("a_b", "axb", False), ("a%", "ab", False), ("a_*", "ab", False), ("a%*", "a%b", True),
    (r"a\*", r"a\b", True), (r"a\*", "ab", False), ("a.c", "abc", False), ("[a]*", "ab", False), ("ä*", "äb", True),
    ("**", "a", True), ("a*", "a\nb", True),
]  # fmt: skip


async def test_patterns(service: Service) -> None:
    with psycopg.connect(service.url) as connection:
        for entry, name, covered in PATTERNS:
            row = connection.execute("select pgshelf.in_scope(%s, null, %s)", [[entry], name]).fetchone()
            assert row == (covered,), (entry, name)


async def test_pages_of_what_a_key_sees_are_full(service: Service) -> None:
    service.renew()
    admin = bearer(key(service.url, "filler", "admin"))
    for number in range(6):
        body = {"name": f"{'seen' if number % 2 else 'unseen'}-{number}"}
        ok(await service.client.post("/v1/libraries", json=body, headers=admin), 201)
    headers = bearer(key(service.url, "pager", "reader", "seen-*"))
    page = ok(await service.client.get("/v1/libraries?limit=2", headers=headers))
    assert [item["name"] for item in page["items"]] == ["seen-1", "seen-3"]
    page = ok(await service.client.get("/v1/libraries", params={"after": page["next"]}, headers=headers))
    assert ([item["name"] for item in page["items"]], page["next"]) == (["seen-5"], None)
