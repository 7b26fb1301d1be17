"""Where the service listens, and who may come in there: looked at before it serves."""

from __future__ import annotations

import errno
import socket

import psycopg

from pgshelf import authentication, connections
from pgshelf.console import Failure
from pgshelf.settings import Settings, is_loopback

OTHERWISE = (
    "Listen on 127.0.0.1, or set PGSHELF_ALLOW_UNAUTHENTICATED=true where something in front of pgshelf authenticates."
)


def check_address(settings: Settings) -> str:
    """The IP address to listen on, which is free and which nobody reaches by mistake; Failure says what is wrong."""
    if settings.auth == "off" and not is_loopback(settings.host) and not settings.allow_unauthenticated:
        raise Failure(f"{_reachable(settings)}PGSHELF_AUTH=off would let anybody in. {OTHERWISE}")
    try:
        family, kind, _, _, where = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        todo = "Choose --host." if elsewhere else "Choose --port."
        raise Failure(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. {todo}") from None
    return str(where[0])


def _reachable(settings: Settings) -> str:
    return f"{settings.host} can be reached from other machines, and "


def check_access(url: str, settings: Settings) -> str:
    """Who may come in, in a few words; Failure where others reach the address while nothing says who may."""
    closed = authentication.requires_keys(settings)
    if closed is False:
        return "open to whoever reaches it: PGSHELF_AUTH=off"
    try:
        with connections.connect(url, "serve") as connection:
            row = connection.execute(
                "select exists (select from pgshelf.keys), exists (select from pgshelf.keys k"
                " where k.revoked_at is null and coalesce(k.expires_at > now(), true))"
            ).fetchone()
        any_key, usable = row or (False, False)
    except psycopg.Error:  # the banner is followed by what is wrong with the database
        any_key = usable = None
    if closed and settings.auth == "auto" and not settings.jwt and not usable:
        why = "there is no key yet" if usable is False else "the database does not say whether there is a key"
        todo = "Make one with pgshelf keys create, set PGSHELF_AUTH=on or the settings of JWT. "
        raise Failure(f"{_reachable(settings)}{why}. {todo}{OTHERWISE}")
    if closed is None and not any_key:
        return "open to whoever reaches it, until there is a key: pgshelf keys create NAME --role admin"
    if usable or settings.jwt:
        return "with a key" + (f", or a token of {settings.jwt_issuer}" if settings.jwt else "")
    return "with a key, and there is none: pgshelf keys create NAME --role admin"
