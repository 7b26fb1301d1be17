"""Schemathesis against a running server: a few seconds in every run of the tests, minutes with --soak-minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MakeLiveServer
from tests.rest.asking import key

HERE = Path(__file__).parent


@pytest.mark.unwatched
def test_the_api_is_what_its_schema_says(
    database_url: str, make_live_server: MakeLiveServer, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    live_server = make_live_server(
        database_url, PGSHELF_CHANGES_MAX_WAIT="0.1"
    )  # it asks for the longest wait there is
    secret = key(database_url, "schemathesis", "admin")
    minutes = pytestconfig.getoption("--soak-minutes")
    budget = ["--max-time", str(int(minutes * 60))] if minutes else ["--max-examples", "5", "--max-time", "15"]
    seed = [] if minutes else ["--generation-deterministic"]
    access = ["--header", f"Authorization: Bearer {secret}"]
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(HERE / "schemathesis.toml")]
    run = subprocess.run(
        [*command, "run", f"{live_server.url}/schema", "--continue-on-failure", *budget, *seed, *access],
        cwd=tmp_path,
        env={
            "PYTHONPATH": str(HERE),
            "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
            "PYTHONHASHSEED": "0",
            "PATH": "/usr/bin:/bin",
            "NO_COLOR": "1",
        },
        capture_output=True,
        text=True,
        timeout=minutes * 60 + 300,
    )
    print(run.stdout)  # pytest -rP shows it
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}\n{live_server.output[-5000:]}"
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert phase in run.stdout, run.stdout
