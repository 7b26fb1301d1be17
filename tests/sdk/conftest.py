from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from pgshelf_client import AsyncClient, Client, _async, _sync
from tests.sdk.script import Caller, Script


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Caller]]:
    """Connects a client of either kind to a script: `connect(script, **options)`."""
    with ExitStack() as stack:

        def made(script: Script, **options: Any) -> Caller:
            transport = httpx2.MockTransport(script)
            if request.param == "AsyncClient":
                return Caller(AsyncClient(transport=transport, **options))
            return Caller(stack.enter_context(Client(transport=transport, **options)))

        yield made


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts in seconds, which nobody waits for."""
    seconds: list[float] = []

    async def sleep(delay: float) -> None:
        seconds.append(delay)

    monkeypatch.setattr(_sync, "time", SimpleNamespace(sleep=seconds.append))
    monkeypatch.setattr(_async, "asyncio", SimpleNamespace(sleep=sleep))
    return seconds
