"""A way to PostgreSQL that can be closed, opened again, and put behind TLS: the bundled server has none of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self

from psycopg import conninfo

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104


class Proxy:
    """Passes on what comes to `port` to the server of `url`; with `tls` it answers SSLRequest with a certificate.

    It does not listen before `open` is called, and ends all connections when it is closed.
    """

    def __init__(self, url: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.port, self._tls = port, tls
        self.encrypted = 0  # connections that asked for TLS and got it
        parts = conninfo.conninfo_to_dict(url)
        self._host, self._port = str(parts.get("host") or "127.0.0.1"), int(parts.get("port") or 5432)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def url(self, url: str, **parameters: str) -> str:
        """The connection string `url`, through here."""
        return conninfo.make_conninfo(url, host="localhost", hostaddr="127.0.0.1", port=self.port, **parameters)

    def open(self) -> None:
        """Listen."""
        self._do(self._open())

    def close(self) -> None:
        """Listen no more, and end what is connected."""
        self._do(self._close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        while asyncio.all_tasks() - {asyncio.current_task()}:
            for task in self._tasks:  # a connection that was just accepted comes here when its task begins
                task.cancel()
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError, asyncio.CancelledError):
                await self._connect(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(8)
        while (code := struct.unpack("!II", first)[1]) in (SSL_REQUEST, GSS_REQUEST):
            secure = code == SSL_REQUEST and self._tls is not None
            writer.write(b"S" if secure else b"N")
            await writer.drain()
            if secure and self._tls is not None:
                await writer.start_tls(self._tls)
                self.encrypted += 1
            first = await reader.readexactly(8)
        if self._host.startswith("/"):
            there = await asyncio.open_unix_connection(str(Path(self._host) / f".s.PGSQL.{self._port}"))
        else:
            there = await asyncio.open_connection(self._host, self._port)
        there[1].write(first)
        ways = [asyncio.create_task(pass_on(*way)) for way in ((reader, there[1]), (there[0], writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            there[1].transport.abort()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Everything from one side to the other, until it ends."""
    with contextlib.suppress(OSError, ssl.SSLError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
