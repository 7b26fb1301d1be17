"""`make replicas` starts what it says, and leaves nothing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.rest.asking import ok

pytestmark = pytest.mark.xdist_group("replication")

ROOT = Path(__file__).parents[2]


def test_it_serves_over_two_replicas_and_stops_cleanly(unused_port: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.replication", "--port", str(unused_port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while "Ctrl-C ends it" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        answer = ok(httpx2.get(f"http://127.0.0.1:{unused_port}/v1/replication"))
        assert answer["role"] == "primary" and answer["overall"] == "healthy"
        assert [replica["name"] for replica in answer["replicas"]] == ["replica1", "replica2"]
        assert ok(httpx2.get(f"http://127.0.0.1:{unused_port + 1}/v1/replication"))["role"] == "standby"
        started = psutil.Process(process.pid).children(recursive=True)
        primary = psutil.Process(int(re.findall(r"kill -9 (\d+)", log.read_text())[0]))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
        deadline = time.monotonic() + 10
        while left := [each for each in {*started, primary} if _runs(each)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def _runs(process: psutil.Process) -> bool:
    """Whoever adopted it may take a while to take note of its end."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
