"""What the command line says when it cannot do what was asked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from pgshelf import cli_serve
from pgshelf.cli import main


def run(*arguments: str, **environment: str) -> Any:
    cleared = {name: None for name in os.environ if name.startswith("PGSHELF_")}
    return CliRunner().invoke(main, arguments, env={**cleared, **environment})


@pytest.mark.parametrize("url", ["garbage", "mysql://x/y", "postgresql://[::1"])
@pytest.mark.parametrize("command", ["serve", "migrate", "doctor"])
def test_a_database_url_that_is_none_is_named_in_one_line(command: str, url: str) -> None:
    result = run(command, PGSHELF_DATABASE_URL=url)
    assert result.exit_code == 1
    assert result.output.startswith("pgshelf: PGSHELF_DATABASE_URL is no connection string of PostgreSQL")


def test_an_option_out_of_range_is_named() -> None:
    result = run("serve", "--port", "99999")
    assert result.exit_code == 1
    assert "port: Expected `int` <= 65535" in result.output


def test_traces_without_their_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "_has", lambda module: module != "opentelemetry")
    result = run("serve", PGSHELF_TRACING="true", PGSHELF_DATABASE_URL="postgresql://127.0.0.1:1/nothing")
    assert result.exit_code == 1
    assert "pip install 'pgshelf[otel]'" in result.output


def test_a_search_without_a_server_asks_whether_there_is_one() -> None:
    result = run("search", "notes", "anything", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "Is pgshelf serve running there?" in result.output


@pytest.mark.parametrize(
    "url", ["nonsense", "http://", "http://[::1", "http://a:99999", "ftp://a", "http://a..b", "http://a\x01b"]
)
@pytest.mark.parametrize("words", [("search", "notes", "x"), ("index", "notes"), ("export", "notes", "x.csv")])
def test_an_address_that_is_none_is_named(words: tuple[str, ...], url: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        result = run(*words, "--url", url)
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert result.output.startswith("pgshelf: --url ") and "such as http://127.0.0.1:8432" in result.output


def test_who_is_not_let_in_is_told_where_the_key_goes(database_url: str, make_live_server: Any) -> None:
    server = make_live_server(database_url, PGSHELF_AUTH="on")
    for environment in ({}, {"PGSHELF_API_KEY": "pgs_wrong"}):
        result = run("search", "notes", "x", "--url", server.url, **environment)
        assert result.exit_code == 1 and result.output.endswith(". Set PGSHELF_API_KEY.\n"), result.output
    assert "PGSHELF_API_KEY" in run("import", "--help").output


def test_serving_an_unmigrated_database_says_so_and_serves(empty_database_url: str, make_live_server: Any) -> None:
    server = make_live_server(empty_database_url, wait=False)
    deadline = time.monotonic() + 60
    with httpx2.Client(timeout=5) as client:
        while True:
            try:
                answer = client.get(f"{server.url}/ready")
                break
            except httpx2.TransportError:
                assert time.monotonic() < deadline, server.output
                time.sleep(0.1)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "pgshelf: not ready: the schema pgshelf is missing; run pgshelf migrate" in server.output


def test_a_terminated_demo_leaves_nothing_running(unused_port: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pgshelf-demo-") as folder:
        log = Path(folder) / "log"
        command = [str(Path(sys.executable).with_name("pgshelf")), "demo", "--keep", "--port", str(unused_port)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--data-dir", f"{folder}/data"], stdout=out, stderr=out, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 60
            while "2. ingest" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            process.terminate()
            assert process.wait(60) == 143
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"http://127.0.0.1:{unused_port}/health")
            assert not Path(folder, "data/postgres/postmaster.pid").exists()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
