"""Which tokens a client remembers, and what its reads send."""

from __future__ import annotations

import threading
from typing import Any

import httpx2
import pytest

from pgshelf_client import Client, ConsistencyLevel
from pgshelf_client._base import LEVEL, Consistency
from pgshelf_client._base import SEEN as TOKEN
from tests.sdk.script import LIBRARY, Script, ok


def token(system: int, timeline: int, position: int) -> str:
    return f"{system:016x}-{timeline:08x}-{position:016x}"


def answered(body: Any, token: str | None) -> httpx2.Response:
    response = ok(body)
    if token is not None:
        response.headers[TOKEN] = token
    return response


def test_a_later_token_is_kept_and_an_earlier_one_is_not() -> None:
    seen = Consistency("session")
    told = [(1, 1, 5), (1, 1, 3), (1, 2, 1), (1, 1, 0xFFFFFFFFFF), (2, 1, 1)]
    kept = []
    for each in told:
        seen.saw(token(*each))
        seen.saw(None)
        kept.append(seen.token)
    # a promotion goes before any position, and of another cluster nothing is known to be earlier
    assert kept == [token(*told[0]), token(*told[0]), token(*told[2]), token(*told[2]), token(*told[4])]


def test_threads_leave_the_latest() -> None:
    seen = Consistency("session")

    def tell(start: int) -> None:
        for position in range(start, 4000, 4):
            seen.saw(token(1, 1, position))

    threads = [threading.Thread(target=tell, args=(start,)) for start in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert seen.token == token(1, 1, 3999)


def test_reads_carry_what_writes_were_answered_with() -> None:
    script = Script(answered(LIBRARY, token(1, 1, 7)), answered(LIBRARY, None))
    with Client("http://x", transport=httpx2.MockTransport(script)) as client:
        client.get_library("x")
        assert TOKEN not in script.requests[-1].headers
        client.update_library("x", description="d")
        assert TOKEN not in script.requests[-1].headers  # the primary needs none
        client.get_library("x")
        assert script.requests[-1].headers[TOKEN] == client.consistency_token == token(1, 1, 7)
        client.consistency_token = token(1, 1, 9)
        client.get_library("x")
        assert script.requests[-1].headers[TOKEN] == token(1, 1, 9)


@pytest.mark.parametrize("level", ["eventual", "strong"])
def test_other_levels_are_said_and_no_token_is(level: ConsistencyLevel) -> None:
    script = Script(answered(LIBRARY, token(1, 1, 7)))
    with Client("http://x", consistency=level, transport=httpx2.MockTransport(script)) as client:
        client.update_library("x", description="d")
        assert LEVEL not in script.requests[-1].headers
        client.get_library("x")
        assert script.requests[-1].headers[LEVEL] == level
        assert TOKEN not in script.requests[-1].headers


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="eventual"):
        Client("http://x", consistency="weak")  # type: ignore[arg-type]  # who has no type checker
