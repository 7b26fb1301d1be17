"""Bodies asked for before they are wanted: what comes, comes in order; what fails, fails where it is awaited."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from pgshelf import bodies

PARTS = [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.request", "body": b"b"}]


def sending(*parts: Any) -> tuple[Callable[[], Any], list[Any]]:
    """A `receive` with these parts, then nothing for ever; and what was asked for so far."""
    left, asked = list(parts), list[Any]()

    async def receive() -> Any:
        asked.append(None)
        await asyncio.sleep(0)
        if not left:
            await asyncio.Event().wait()
        if isinstance(part := left.pop(0), Exception):
            raise part
        return part

    return receive, asked


async def test_the_first_part_comes_meanwhile_and_the_others_in_order() -> None:
    receive, asked = sending(*PARTS)
    with bodies.early(receive) as early:
        await asyncio.sleep(0.01)
        assert len(asked) == 1
        assert [await early(), await early()] == PARTS
    assert len(asked) == 2


async def test_what_fails_fails_where_it_is_wanted() -> None:
    receive, _ = sending(OSError("gone"))
    with bodies.early(receive) as early:
        await asyncio.sleep(0.01)
        with pytest.raises(OSError, match="gone"):
            await early()


async def test_what_nobody_wants_is_called_off_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """A caller who is not let in: asyncio would complain of exceptions that nobody looked at."""
    for receive, _ in (sending(), sending(OSError("gone")), sending(*PARTS)):
        with bodies.early(receive):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    gc.collect()
    assert len(asyncio.all_tasks()) == 1
    assert not caplog.records


async def test_who_waits_for_it_can_be_cancelled() -> None:
    receive, _ = sending()
    with bodies.early(receive) as early, pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await early()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
