"""JWTs: key files, key sets that change, issuers that are away, claims by setting."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pgshelf import jwts
from pgshelf.errors import Problem
from pgshelf.settings import Settings
from tests.issuer import ALGORITHMS, AUDIENCE, NAME, Issuer

pytestmark = pytest.mark.watched  # each case is another way

TRUST = {"jwt_issuer": NAME, "jwt_audience": AUDIENCE}


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


class KeyServer:
    """Serves a key set; `status` and `content` may change, `asked` counts."""

    def __init__(self, content: bytes) -> None:
        self.content, self.status, self.asked = content, 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(outer.status)
                self.send_header("Location", "/keys")
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def settings(self) -> Settings:
        return Settings(**TRUST, jwt_jwks_url=f"http://127.0.0.1:{self.server.server_port}/keys")  # type: ignore[arg-type]


@pytest.fixture
def key_server(issuer: Issuer) -> Iterator[KeyServer]:
    server = KeyServer(json.dumps(issuer.key_set()).encode())
    yield server
    server.server.shutdown()
    server.server.server_close()


async def code(checker: jwts.Issuer, token: str) -> str:
    """`valid`, or the code of the problem."""
    try:
        await checker.check(token)
    except Problem as problem:
        return problem.code
    return "valid"


async def test_a_key_set_is_fetched_when_it_is_needed(issuer: Issuer, key_server: KeyServer) -> None:
    checker = jwts.Issuer(key_server.settings)
    assert key_server.asked == 0
    found = await asyncio.gather(
        *(code(checker, issuer.token(key=kid)) for kid in ALGORITHMS.values() for _ in range(5))
    )
    assert set(found) == {"valid"} and key_server.asked == 1


async def test_unknown_keys_do_not_make_it_fetch_again_and_again(
    issuer: Issuer, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = jwts.Issuer(key_server.settings)
    await checker.check(issuer.token())
    for _ in range(20):
        assert await code(checker, issuer.token(key="new")) == "invalid_token"
    assert key_server.asked == 1
    # when it may look again, it finds a key that is new, and loses one that is gone
    key_server.content = json.dumps(issuer.key_set("new", "rsa")).encode()
    monkeypatch.setattr(jwts, "COOLDOWN", 0.0)
    assert await code(checker, issuer.token(key="new")) == "valid"
    monkeypatch.setattr(jwts, "COOLDOWN", 30.0)
    assert await code(checker, issuer.token(key="ed")) == "invalid_token"
    assert key_server.asked == 2


async def test_keys_are_fetched_anew_after_a_while(
    issuer: Issuer, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = jwts.Issuer(key_server.settings)
    await checker.check(issuer.token())
    key_server.content = json.dumps(issuer.key_set("rsa")).encode()
    assert await code(checker, issuer.token()) == "valid"
    monkeypatch.setattr(jwts, "COOLDOWN", 0.0)
    monkeypatch.setattr(jwts, "FRESH", 0.0)
    assert await code(checker, issuer.token()) == "invalid_token"


@pytest.mark.parametrize(
    ("status", "content"),
    [(500, b""), (302, b""), (200, b"<html>"), (200, b'{"keys": []}'), (200, b"[]"), (200, b" " * 2_000_000)],
)
async def test_an_issuer_that_is_away(
    issuer: Issuer, key_server: KeyServer, monkeypatch: pytest.MonkeyPatch, status: int, content: bytes
) -> None:
    good, key_server.content, key_server.status = key_server.content, content, status
    checker = jwts.Issuer(key_server.settings)
    for _ in range(5):
        assert await code(checker, issuer.token()) == "issuer_unavailable"
    assert key_server.asked == 1  # not for each request
    checker._tried = float("-inf")
    key_server.content, key_server.status = good, 200
    assert await code(checker, issuer.token()) == "valid"
    # the last keys serve for a while, and not for ever
    key_server.content, key_server.status = content, status
    monkeypatch.setattr(jwts, "COOLDOWN", 0.0)
    monkeypatch.setattr(jwts, "FRESH", 0.0)
    assert await code(checker, issuer.token()) == "valid"
    monkeypatch.setattr(jwts, "STALE", 0.0)
    assert await code(checker, issuer.token()) == "issuer_unavailable"


async def test_an_address_where_nobody_listens(issuer: Issuer, unused_port: int) -> None:
    url = f"http://127.0.0.1:{unused_port}/keys"
    checker = jwts.Issuer(Settings(**TRUST, jwt_jwks_url=url))  # type: ignore[arg-type]
    assert await code(checker, issuer.token()) == "issuer_unavailable"


@pytest.mark.parametrize(("algorithm", "name"), ALGORITHMS.items())
async def test_a_pem_file_has_one_key_for_all_tokens(issuer: Issuer, tmp_path: Path, algorithm: str, name: str) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(issuer.pem(name))
    checker = jwts.Issuer(Settings(**TRUST, jwt_keys_file=file))  # type: ignore[arg-type]
    assert await code(checker, issuer.token(key=name)) == "valid"
    assert await code(checker, issuer.token(key=name, header={"kid": "whatever"})) == "valid"
    for other in set(ALGORITHMS.values()) - {name}:
        assert await code(checker, issuer.token(key=other)) == "invalid_token"
    by_id = {"ed": ["no key", "another key's id"], "rsa": ["a key for encryption"]}
    for wrong, token in issuer.wrong().items():
        expected = "valid" if wrong in by_id.get(name, []) else "invalid_token"
        assert await code(checker, token) == expected, wrong


def test_keys_that_are_too_weak_or_of_another_kind_are_not_used(issuer: Issuer) -> None:
    short = rsa.generate_private_key(65537, 1024)  # noqa: S505 - refused, that is the point
    for weak in (short, ec.generate_private_key(ec.SECP384R1())):
        pem = weak.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        with pytest.raises(ValueError, match="not a public key for RS256"):
            jwts.keys_of(pem)
    mixed = {"keys": [{**issuer.jwk("rsa"), "alg": "PS256"}, {**issuer.jwk("ec"), "alg": "ES256"}]}
    assert list(jwts.keys_of(json.dumps(mixed).encode())) == ["ec"]


@pytest.mark.parametrize(
    ("settings", "claims", "role", "libraries"),
    [
        ({}, {"pgshelf_role": "writer"}, "writer", []),
        ({}, {"pgshelf_role": ["reader", "admin", 7, "root"], "pgshelf_libraries": "a b"}, "admin", ["a b"]),
        ({}, {"pgshelf_role": "openid reader profile", "pgshelf_libraries": ["a", "b-*"]}, "reader", ["a", "b-*"]),
        ({}, {"pgshelf_role": "root"}, None, []),
        ({}, {"pgshelf_role": 7}, None, []),
        ({}, {}, None, []),
        ({"jwt_roles": "ops=admin,team=reader"}, {"pgshelf_role": "admin"}, None, []),
        ({"jwt_roles": "ops=admin,team=reader", "jwt_libraries": "*"}, {"pgshelf_role": ["team"]}, "reader", ["*"]),
        ({"jwt_role_claim": "realm_access.roles"}, {"realm_access": {"roles": ["writer"]}}, "writer", []),
        ({"jwt_role_claim": "realm_access.roles"}, {"realm_access": ["writer"]}, None, []),
        ({"jwt_role_claim": "https://x.example/role"}, {"https://x.example/role": "writer"}, "writer", []),
        ({"jwt_libraries_claim": "t.l", "jwt_libraries": "a, b"}, {"t": {"l": ["c"]}}, None, ["c"]),
    ],
)
async def test_claims_by_setting(
    issuer: Issuer, tmp_path: Path, settings: dict[str, Any], claims: dict[str, Any], role: str | None, libraries: Any
) -> None:
    checker = jwts.Issuer(Settings(**issuer.settings(tmp_path), **settings))
    found = await checker.check(issuer.token(None, None, **claims))
    assert (found.subject, found.role, found.libraries) == ("ann", role, libraries)


async def test_audiences_and_clocks_that_differ_a_little(issuer: Issuer, tmp_path: Path) -> None:
    checker = jwts.Issuer(Settings(**issuer.settings(tmp_path)))
    assert await code(checker, issuer.token(aud=["other", AUDIENCE])) == "valid"
    assert await code(checker, issuer.token(exp=time.time() - 10)) == "valid"
    assert await code(checker, issuer.token(nbf=time.time() + 10)) == "valid"
