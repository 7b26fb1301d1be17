"""A few requests at a time, in the manner of each client: what `_async.py` names AsyncLanes is Lanes in `_sync.py`."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ._import import Batch

R = TypeVar("R")
T = TypeVar("T")
Source = Iterable[T]
AsyncSource = Iterable[T] | AsyncIterable[T]


def each(items: Iterable[T]) -> Iterator[T]:
    """The items, as `async_each` gives them."""
    return iter(items)


async def async_each(items: AsyncSource[T]) -> AsyncIterator[T]:
    """The items of either kind of iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    for item in items:
        yield item


def checked(count: int) -> int:
    if count < 1:
        raise ValueError(f"parallel is {count}; it must be 1 at least")
    return count


def free(running: Iterable[Batch], count: int, batch: Batch) -> bool:
    """Whether a batch may start: of two documents with one key the later must be the last to be written."""
    others = list(running)
    return len(others) < count and all(batch.keys.isdisjoint(other.keys) for other in others)


class Lanes(Generic[R]):
    """Sends batches from `count` threads; `take` gets the answers in the caller's."""

    def __init__(self, count: int, send: Callable[[Batch], R], take: Callable[[Batch, R], Any]) -> None:
        self.count = checked(count)
        self.send = send
        self.take = take
        self.running: dict[futures.Future[R], Batch] = {}

    def __enter__(self) -> Self:
        self.pool = futures.ThreadPoolExecutor(self.count, thread_name_prefix="pgshelf-import")
        return self

    def put(self, batch: Batch) -> None:
        """Start a batch as soon as a lane is free for it."""
        while not free(self.running.values(), self.count, batch):
            self.wait()
        self.running[self.pool.submit(self.send, batch)] = batch

    def wait(self) -> None:
        """Until one of those that are running, at least, is answered."""
        done, _ = futures.wait(self.running, return_when=futures.FIRST_COMPLETED)
        for future in done:
            self.take(self.running.pop(future), future.result())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while error is None and self.running:
                self.wait()
        finally:
            self.pool.shutdown(cancel_futures=True)


class AsyncLanes(Generic[R]):
    """Sends batches from `count` tasks."""

    def __init__(self, count: int, send: Callable[[Batch], Awaitable[R]], take: Callable[[Batch, R], Any]) -> None:
        self.count = checked(count)
        self.send = send
        self.take = take
        self.running: dict[asyncio.Future[R], Batch] = {}

    async def __aenter__(self) -> Self:
        return self

    async def put(self, batch: Batch) -> None:
        """Start a batch as soon as a lane is free for it."""
        while not free(self.running.values(), self.count, batch):
            await self.wait()
        self.running[asyncio.ensure_future(self.send(batch))] = batch
        await asyncio.sleep(0)  # a plain iterable may not give the loop another chance for long

    async def wait(self) -> None:
        """Until one of those that are running, at least, is answered."""
        done, _ = await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            self.take(self.running.pop(future), future.result())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            while error is None and self.running:
                await self.wait()
        finally:
            for future in self.running:
                future.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)
