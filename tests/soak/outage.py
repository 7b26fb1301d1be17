"""A provider that is away for a while, and what must go on meanwhile. Used by tests/test_outage.py and `make soak`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2

from tests.cohere_server import Answer, CohereServer, Handler, numbers_of, reset, status

KINDS = ("refused", "hang", "500", "429")
LIBRARY = "outage"
DIMENSION = 256
HEALED_WITHIN = 30.0  # seconds, beside the longest wait of the circuit
ADDRESS = f"/v1/libraries/{LIBRARY}"


class Provider:
    """Cohere's API at one address, which can be taken away and brought back."""

    def __init__(self) -> None:
        self._server = CohereServer()
        self.key, self.url = self._server.key, self._server.url
        self._server.__enter__()
        self._back = threading.Event()
        self.asked = 0  # requests to servers of the past

    def requests(self) -> int:
        return self.asked + len(self._server.asked)

    def take_away(self, kind: str) -> None:
        self._back.clear()
        if kind == "refused":
            self._server.outage = reset  # of connections that are kept
            self._server.__exit__()
        else:
            faults = {"hang": self._hang, "500": status(500), "429": status(429, retry_after="1")}
            self._server.outage = faults[kind]

    def _hang(self, handler: Handler, _: Answer) -> None:
        self._back.wait()
        handler.close_connection = True

    def bring_back(self, kind: str) -> None:
        self._back.set()
        self._server.outage = None
        if kind == "refused":
            self.asked += len(self._server.asked)
            texts, port = self._server.texts, int(self.url.rpartition(":")[2])
            self._server = CohereServer(port)
            self._server.texts = texts
            self._server.__enter__()

    def answered(self) -> Counter[str]:
        """How often each text of a document got its vector."""
        return Counter(text for kind, text in self._server.texts if kind == "search_document")

    def close(self) -> None:
        self._back.set()
        self._server.__exit__()


class Outage:
    """One outage of `seconds`, seen by a client of the service."""

    def __init__(self, client: httpx2.AsyncClient, provider: Provider, kind: str) -> None:
        self.client, self.provider, self.kind = client, provider, kind
        self.written: list[str] = []
        self.answers: Counter[str] = Counter()
        self.healed = 0.0

    async def run(self, seconds: float) -> None:
        await self._prepare()
        self.provider.take_away(self.kind)
        try:
            await self._open()
            until = time.monotonic() + seconds
            while True:
                await self._goes_on()
                if time.monotonic() > until:
                    break
                await asyncio.sleep(min(1.0, seconds / 4))
        finally:
            self.provider.bring_back(self.kind)
        await self._heals()

    async def _prepare(self) -> None:
        embedder = {"provider": "cohere", "model": "embed-v4.0", "dimension": DIMENSION}
        await self._ok("POST", "/v1/libraries", {"name": LIBRARY, "embedder": embedder})
        body = {"key": "before", "chunks": [{"text": "penguins swim under the ice"}]}
        assert (await self._ok("POST", f"{ADDRESS}/documents", body))["status"] == "ready"

    async def _open(self) -> None:
        """Questions fail as the provider does, until it is known to be away: then they are answered 503 at once."""
        for number in range(50):
            answer = await self._ask({"query": f"first question {number}"})
            problem = answer.json()
            assert answer.status_code in (502, 503, 504), answer.text
            assert problem["code"] in ("embedder_failed", "embedder_unavailable", "embedder_timeout"), answer.text
            if "has been failing" in problem["detail"]:
                return
        raise AssertionError("the circuit does not open")

    async def _goes_on(self) -> None:
        for mode in ("vector", "hybrid"):
            started = time.monotonic()
            answer = await self._ask({"query": f"how is it under {time.monotonic()}", "mode": mode})
            self.answers[f"{answer.status_code} {answer.json()['code']}"] += 1
            assert answer.status_code in (502, 503, 504), answer.text
            if answer.status_code == 503:  # else it was the one that probed
                assert int(answer.headers["Retry-After"]) >= 1
            if "has been failing" in answer.json()["detail"]:
                assert time.monotonic() - started < 2.0, "it waits for a provider that is known to be away"
        key = f"document {len(self.written)}"
        body = {"key": key, "chunks": [{"text": f"{key} of {self.kind}, part {part}"} for part in range(3)]}
        answer = await self.client.post(f"{ADDRESS}/documents", params={"wait": "false"}, json=body)
        assert (answer.status_code, answer.json()["status"]) == (202, "pending"), answer.text
        self.written.append(key)
        waited = await self.client.post(f"{ADDRESS}/documents", json={"key": "waits", "text": f"{time.monotonic()}"})
        assert waited.status_code in (502, 503, 504), waited.text
        assert (await self.client.get(f"{ADDRESS}/documents/waits")).status_code == 404, "it was written all the same"
        vector = numbers_of("search_query", "penguins swim", DIMENSION)
        for search in (
            {"query": "penguins", "mode": "text"},
            {"vector": vector},
            {"vector": vector, "query": "penguins", "mode": "hybrid"},
        ):
            found = await self._ask(search)
            assert found.status_code == 200, found.text
            assert [hit["key"] for hit in found.json()["hits"]][:1] == ["before"]
        words = await self._ask({"query": f'"{key}"', "mode": "text"})
        assert {hit["key"] for hit in words.json()["hits"]} == {key}, "what waits for its vector is not found by words"
        stats = await self._ok("GET", f"{ADDRESS}/stats")
        assert (stats["pending"], stats["failed"]) == (3 * len(self.written), 0)

    async def _heals(self) -> None:
        back = time.monotonic()
        await self._until(self._all_ready, back)
        for key in self.written:
            document = await self._ok("GET", f"{ADDRESS}/documents/{key.replace(' ', '%20')}")
            assert document["status"] == "ready"

        async def asked() -> bool:
            return (await self._ask({"query": f"{self.written[0]} {time.monotonic()}"})).status_code == 200

        await self._until(asked, back)
        self.healed = time.monotonic() - back
        twice = {text: count for text, count in self.provider.answered().items() if count > 1}
        # whoever takes slow for hanging may have been answered when he had given up
        assert not twice or self.kind == "hang", f"embedded twice: {twice}"

    async def _all_ready(self) -> bool:
        stats = await self._ok("GET", f"{ADDRESS}/stats")
        assert stats["failed"] == 0
        return bool(stats["pending"] == 0)

    async def _until(self, condition: Callable[[], Any], since: float) -> None:
        while not await condition():
            assert time.monotonic() - since < HEALED_WITHIN + 60, "it does not heal by itself"
            await asyncio.sleep(0.05)

    async def _ask(self, search: dict[str, Any]) -> httpx2.Response:
        return await self.client.post(f"{ADDRESS}/search", json=search)

    async def _ok(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.client.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json()
