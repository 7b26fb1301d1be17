"""What keys and tokens look like: random, recognisable, with a checksum; and their roles. Pure."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
import zlib
from typing import Literal

import msgspec

ALPHABET = string.digits + string.ascii_letters
RANDOM = 37  # characters: 220 bits, of which the hint shows 24
CHECKSUM = 6  # characters: a CRC-32
# What a scanner looks for in sources and logs: pgs_ is a key, pgt_ a token made from one.
FORM = re.compile(rf"pg[st]_[0-9A-Za-z]{{{RANDOM + CHECKSUM}}}")
PREFIXES = {"key": "pgs_", "token": "pgt_"}
ROLES = ("reader", "writer", "admin")  # each may do what those before it may


class Minted(msgspec.Struct, frozen=True):
    """A new secret, which is shown once, and what is kept of it."""

    secret: str
    hash: bytes
    hint: str


def mint(kind: Literal["key", "token"] = "key") -> Minted:
    """Make a secret by the operating system's generator."""
    body = PREFIXES[kind] + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM))
    secret = body + _checksum(body)
    return Minted(secret, digest(secret), body[:8])


def well_formed(secret: str) -> bool:
    """Whether a text can be one of our secrets: tells a typo from an unknown key without asking the database."""
    return FORM.fullmatch(secret) is not None and secret[-CHECKSUM:] == _checksum(secret[:-CHECKSUM])


def digest(secret: str) -> bytes:
    """What is stored. Nobody guesses 220 random bits, so a slow hash would protect nothing and cost every request."""
    return hashlib.sha256(secret.encode()).digest()


def _checksum(body: str) -> str:
    value, found = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM):
        value, place = divmod(value, len(ALPHABET))
        found = ALPHABET[place] + found
    return found
