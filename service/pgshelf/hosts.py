"""Which hosts requests may be for: a name that somebody else made lead here shall not do (DNS rebinding)."""

from __future__ import annotations

import re

from pgshelf.settings import Settings, is_loopback, listed

HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@]+?)\.?)(?::[0-9]*)?")


def allowed_hosts(settings: Settings) -> list[str]:
    """The hosts that requests may be for; none: any. On loopback, a name that leads there is not enough (rebinding)."""
    if settings.allowed_hosts:
        return (
            [] if settings.allowed_hosts.strip() == "*" else [host.lower() for host in listed(settings.allowed_hosts)]
        )
    return ["localhost", "127.0.0.1", "::1", settings.host.lower()] if is_loopback(settings.host) else []


def is_allowed_host(header: str, hosts: list[str]) -> bool:
    """Whether a Host header names one of them, whatever its port; *.example.org stands for all below it."""
    found = HOST.fullmatch(header.lower())
    host = (found["v6"] or found["name"]) if found else ""
    return any(host == each or (each.startswith("*.") and host.endswith(each[1:])) for each in hosts)
