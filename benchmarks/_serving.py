"""A service for benchmarks to ask, in processes of its own; run by none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx2


@contextlib.contextmanager
def serving(url: str, port: int, **settings: str) -> Iterator[str]:
    """A service over the database at `url`: of one process and without a worker, unless `settings` say otherwise.

    These are named as PGSHELF_* without the prefix. Gives the address; ends the benchmark where nothing answers there.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
    known = {"DATABASE_URL": url, "PORT": str(port), "WORKERS": "1", "WORKER_ENABLED": "false", **settings}
    environment |= {f"PGSHELF_{name}": value for name, value in known.items()}
    command = [sys.executable, "-m", "pgshelf.cli", "serve"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{address}/ready").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the service did not become ready")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)
