"""A server's import as the SDK meets it: remembers what it committed under each key, and can fail on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2

FAULTS = ("lost before", "lost after", "broken off", "storage full", "running")


class ImportScript:
    """Commits lines in batches of `commit`; `fault(request number)` names what goes wrong with one."""

    def __init__(self, fault: Callable[[int], str | None] = lambda _: None, commit: int = 2, delay: float = 0) -> None:
        self.fault = fault
        self.commit = commit
        self.delay = delay
        self.requests: list[httpx2.Request] = []
        self.documents: list[dict[str, Any]] = []  # in the order they were written
        self.progress: dict[str, list[int]] = {}  # lines committed under a key, and how many of them failed
        self.running = self.most = self.answered = 0
        self.lock = threading.Lock()

    @property
    def keys(self) -> list[str]:
        return [request.headers["Idempotency-Key"] for request in self.requests]

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        with self.counted(request) as number:
            time.sleep(self.delay)
            return self.answer(request, number)

    async def awaited(self, request: httpx2.Request) -> httpx2.Response:
        with self.counted(request) as number:
            await asyncio.sleep(self.delay)
            return self.answer(request, number)

    @contextlib.contextmanager
    def counted(self, request: httpx2.Request) -> Iterator[int]:
        with self.lock:
            self.requests.append(request)
            number = len(self.requests)
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield number
        finally:
            with self.lock:
                self.running -= 1
                self.answered += request.content.count(b"\n")

    def answer(self, request: httpx2.Request, number: int) -> httpx2.Response:
        fault = self.fault(number)
        if fault == "lost before":
            raise httpx2.ReadError("gone")
        if fault == "running":
            return httpx2.Response(409, json={"status": 409, "code": "import_running", "detail": "It runs."})
        with self.lock:
            told = self.import_lines(request, fault)
        if fault == "lost after":
            raise httpx2.ReadError("gone")
        content = b"".join(json.dumps(line).encode() + b"\n" for line in told)
        return httpx2.Response(200, content=content, headers={"Content-Type": "application/x-ndjson"})

    def import_lines(self, request: httpx2.Request, fault: str | None) -> list[dict[str, Any]]:
        lines = request.content.splitlines()
        done = self.progress.setdefault(request.headers["Idempotency-Key"], [0])
        skipped, told = done[0], list[dict[str, Any]]()
        total = {"created": 0, "replaced": 0, "pending": 0, "failed": 0}
        for first in range(skipped, len(lines), self.commit):
            if fault in ("broken off", "storage full") and first >= self.commit:
                code, status = {"broken off": ("unavailable", 503), "storage full": ("storage_full", 507)}[fault]
                error = {"status": status, "code": code, "detail": "Later."}
                return [*told, {"error": error, "committed_lines": first}]
            part = lines[first : first + self.commit]
            result = self.commit_part(part, first + 1)
            done[0] = first + len(part)
            told.append({"lines": [first + 1, done[0]], **result})
            for name in total:
                total[name] += len(result[name]) if name == "failed" else result[name]
        return [*told, {"done": True, "lines": len(lines), "skipped": skipped, **total}]

    def commit_part(self, part: list[bytes], number: int) -> dict[str, Any]:
        result: dict[str, Any] = {"created": 0, "replaced": 0, "pending": 0, "failed": []}
        for place, line in enumerate(part, number):
            try:
                document = json.loads(line)
                assert document.get("text") != "bad"
            except (ValueError, AssertionError):
                error = {"status": 400, "code": "validation_failed", "detail": "No.", "errors": [{"path": "text"}]}
                result["failed"].append({"line": place, "error": error})
                continue
            known = {each["key"] for each in self.documents if "key" in each}
            result["replaced" if document.get("key") in known else "created"] += 1
            result["pending"] += document.get("text") == "later"
            self.documents.append(document)
        return result
