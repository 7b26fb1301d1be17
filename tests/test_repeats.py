"""Writes whose answers are lost and that are sent again: the short form of what `make soak` does a thousand times."""

from __future__ import annotations

import random

import pytest

from tests.conftest import LiveServer
from tests.soak.repeats import repeat


@pytest.mark.unwatched
async def test_what_is_sent_again_takes_effect_once(live_server: LiveServer) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    print(await repeat(live_server.url, seed, 100))
