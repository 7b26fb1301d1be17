"""How fresh a read must be: the tokens that writes answer with, and the levels that requests ask for."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Literal, Self

import msgspec

from pgshelf.errors import invalid

TOKEN = "Pgshelf-Consistency-Token"  # noqa: S105 - a header, and no secret
LEVEL = "Pgshelf-Consistency"
Level = Literal["eventual", "session", "strong"]
FORM = r"^[0-9a-f]{16}-[0-9a-f]{8}-[0-9a-f]{16}$"


class Position(msgspec.Struct, frozen=True, order=True):
    """A place in the history of a database: which cluster, which timeline, and how far its WAL had come there."""

    system: int
    timeline: int
    lsn: int

    @property
    def token(self) -> str:
        """As clients carry it. Of two tokens of one cluster the later one is the greater text."""
        return f"{self.system:016x}-{self.timeline:08x}-{self.lsn:016x}"

    @classmethod
    def of(cls, token: str) -> Self:
        """What a token says; a 400 where it is none."""
        if not re.fullmatch(FORM, token):
            raise invalid(TOKEN, "is no token of pgshelf; send it as a write answered it, unchanged")
        return cls(*(int(part, 16) for part in token.split("-")))

    def reached(self, other: Position) -> bool:
        """Whether a server that has replayed up to here shows what was written up to `other`.

        On an older timeline an LSN may be higher and yet lack the write. On a younger one it shows all that the
        failover has kept.
        """
        return self.system == other.system and self.timeline >= other.timeline and self.lsn >= other.lsn


# Where the last write of the current request was committed, if there was one; None outside of requests, where nobody
# wants to know.
committed: ContextVar[list[Position] | None] = ContextVar("committed", default=None)


def newest() -> str | None:
    """The token of the current request's writes, if there were any."""
    positions = committed.get()
    return positions[0].token if positions else None
