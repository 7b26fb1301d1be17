"""`pgshelf demo` as a person runs it: it ingests, asks, and says how to go on; the lines work as pasted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def demo() -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A `pgshelf demo --keep` that has answered all questions, and the file it prints to."""
    # not pytest's tmp_path: as root the server runs as another user, who may not enter there
    with tempfile.TemporaryDirectory(prefix="pgshelf-demo-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        log = Path(folder) / "log"
        command = [str(Path(sys.executable).with_name("pgshelf")), "demo", "--keep", "--port", str(port)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--data-dir", f"{folder}/data"],
                stdout=out,
                stderr=out,
                env={**environment, "PGSHELF_WORKERS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + 110
            while "hit.metadata['name'])\"" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield process, log
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.unwatched
def test_the_demo_answers_its_questions_and_its_lines_work_as_pasted(
    demo: tuple[subprocess.Popen[bytes], Path],
) -> None:
    process, log = demo
    text = log.read_text()
    assert "12 of 12 questions have a sensible answer among their first three hits" in text
    assert re.search(r"\d{3} documents, \d{4,5} chunks", text)
    curl, psql, python = re.split(r"\n\n", text.split("4. go on")[1].split("\n\n", 1)[1].strip(), maxsplit=2)
    for line, expected in ((curl, '"hits":[{'), (psql, "(5 rows)"), (python, "zipfile")):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches all processes of a terminal
    assert process.wait(60) == 0, log.read_text()
