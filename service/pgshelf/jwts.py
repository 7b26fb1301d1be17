"""Tokens of somebody else's issuer: JWTs, checked against its public keys."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import httpx
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.types import Options

from pgshelf.credentials import ROLES
from pgshelf.errors import Problem
from pgshelf.settings import Settings, listed

log = logging.getLogger("pgshelf")
LONGEST = 8192  # characters of a token
LEEWAY = 30  # seconds that clocks may differ
FRESH = 300.0  # seconds until the keys are fetched anew
COOLDOWN = 30.0  # seconds between two fetches at least, whatever tokens ask for
STALE = 3600.0  # seconds that the last keys serve while the issuer cannot be reached
BIGGEST = 1024 * 1024  # bytes of a key set
CHECKS: Options = {
    "require": ["exp", "iss", "aud", "sub"],
    "verify_signature": True,
    "enforce_minimum_key_length": True,
}


class Claims(msgspec.Struct, frozen=True):
    """What a valid token says of its bearer; no role is no right, an empty list of libraries sees none."""

    subject: str
    role: str | None
    libraries: list[str]


class Key(msgspec.Struct, frozen=True):
    """A public key and the one algorithm that it is used with: what a token says of itself decides nothing."""

    algorithm: str
    key: Any


class Issuer:
    """Checks the tokens of one issuer; its keys are fetched when they are needed, and not too often."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._roles = dict(part.split("=") for part in listed(settings.jwt_roles)) or {role: role for role in ROLES}
        self._keys: dict[str | None, Key] = {}
        self._fetched = self._tried = float("-inf")
        self._fetching = asyncio.Lock()

    async def check(self, token: str) -> Claims:
        """The claims of a token; the problem `invalid_token` says what is wrong with it."""
        if len(token) > LONGEST:
            raise _refused(f"is longer than {LONGEST} characters")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise _refused("is no JWT") from None
        key = await self._key(header.get("kid"))
        if header.get("alg") != key.algorithm:
            raise _refused(f"is not signed by {key.algorithm}, the algorithm of its key")
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                issuer=self._settings.jwt_issuer,
                audience=self._settings.jwt_audience,
                leeway=LEEWAY,
                options=CHECKS,
            )
        except jwt.ExpiredSignatureError:
            raise _refused("has expired") from None
        except jwt.InvalidSignatureError:
            raise _refused("has a signature that its key did not make") from None
        except jwt.PyJWTError as error:
            raise _refused(f"cannot be used: {error}") from None
        return Claims(_subject(claims), self._role(claims), self._libraries(claims))

    def _role(self, claims: dict[str, Any]) -> str | None:
        value = _within(claims, self._settings.jwt_role_claim)
        found = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
        named = {self._roles.get(item) for item in found if isinstance(item, str)}
        return next((role for role in reversed(ROLES) if role in named), None)

    def _libraries(self, claims: dict[str, Any]) -> list[str]:
        value = _within(claims, self._settings.jwt_libraries_claim)
        if value is None:
            return listed(self._settings.jwt_libraries)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise _refused(f"says {self._settings.jwt_libraries_claim} otherwise than as a list of texts")

    async def _key(self, kid: object) -> Key:
        """The key of this id. A key file in PEM form has one key without an id, which is then every token's."""
        await self._refresh(missing=kid not in self._keys and None not in self._keys)
        key = self._keys.get(kid) if isinstance(kid, str) else None
        key = key or self._keys.get(None)
        if key is None:
            raise _refused("names no key of the issuer's in its header (kid)")
        return key

    async def _refresh(self, *, missing: bool) -> None:
        if self._is_due(missing) or (not self._keys and self._fetching.locked()):
            async with self._fetching:
                if self._is_due(missing):  # nobody has been there meanwhile
                    await self._fetch()
        if time.monotonic() - self._fetched > STALE:
            detail = "The public keys of the issuer of tokens cannot be had. Keys of pgshelf work all the same."
            raise Problem("issuer_unavailable", detail, retry_after=COOLDOWN)

    def _is_due(self, missing: bool) -> bool:
        now = time.monotonic()
        if now - self._tried < (COOLDOWN if self._keys else 1):
            return False
        return missing or now - self._fetched > FRESH

    async def _fetch(self) -> None:
        self._tried = time.monotonic()
        try:
            self._keys = keys_of(await self._read())
            self._fetched = self._tried
        except (OSError, httpx.HTTPError, msgspec.MsgspecError, ValueError) as error:
            log.warning("the public keys of the issuer cannot be had: %s", error)

    async def _read(self) -> bytes:
        if self._settings.jwt_keys_file is not None:
            return await asyncio.to_thread(self._settings.jwt_keys_file.read_bytes)
        async with (
            httpx.AsyncClient(timeout=5, follow_redirects=False) as client,
            client.stream("GET", str(self._settings.jwt_jwks_url)) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"the issuer answered {response.status_code}")
            found = b""
            async for part in response.aiter_bytes():
                found += part
                if len(found) > BIGGEST:
                    raise ValueError("the key set is too large")
            return found


def keys_of(content: bytes) -> dict[str | None, Key]:
    """The usable keys of a JWKS by their ids, or the one key of a PEM file; ValueError when there is none."""
    if content.lstrip().startswith(b"-----BEGIN"):
        return {None: _key(load_pem_public_key(content))}
    found: dict[str | None, Key] = {}
    for item in msgspec.json.decode(content, type=dict[str, Any]).get("keys", []):
        if not isinstance(item, dict) or item.get("use", "sig") != "sig" or not isinstance(item.get("kid"), str):
            continue
        try:
            key = _key(jwt.PyJWK.from_dict(item).key)
        except (jwt.PyJWTError, ValueError):  # of a kind that is not for us
            continue
        if item.get("alg", key.algorithm) == key.algorithm:
            found[item["kid"]] = key
    if not found:
        raise ValueError("there is no public key for RS256, ES256 or EdDSA with an id (kid) in it")
    return found


def _key(key: object) -> Key:
    if isinstance(key, RSAPublicKey) and key.key_size >= 2048:
        return Key("RS256", key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return Key("ES256", key)
    if isinstance(key, Ed25519PublicKey):
        return Key("EdDSA", key)
    raise ValueError("not a public key for RS256 (of 2048 bits or more), ES256 or EdDSA")


def _subject(claims: dict[str, Any]) -> str:
    """Whose token it is: its requests are counted under this, and its idempotency keys are kept under it."""
    subject: str = claims["sub"]
    if not subject or not subject.isprintable():  # PostgreSQL could not store all that is not
        raise _refused("names nobody: its sub is empty, or not printable")
    return subject


def _within(claims: dict[str, Any], name: str) -> Any:
    """A claim by its name; else dots lead into objects."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _refused(what: str) -> Problem:
    return Problem("invalid_token", f"The token {what}. Get another one from the issuer.")
