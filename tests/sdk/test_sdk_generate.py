"""_sync.py is what _async.py makes, and the generator notices when it is not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SDK = Path(__file__).parents[2] / "sdk"


def generate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SDK / "generate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name in ("_async.py", "_sync.py"):
        shutil.copy(SDK / "pgshelf_client" / name, tmp_path)
    return tmp_path


def test_the_generated_client_is_up_to_date():
    done = generate("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_asynchronous_is_left():
    source = (SDK / "pgshelf_client" / "_sync.py").read_text()
    body = source.split("\n", 1)[1]  # the first line names the file it comes from
    assert not re.findall(r"(?i)\w*async\w*|\bawait\b|\baclose\b", body)


@pytest.mark.parametrize("name", ["_sync.py", "_async.py"])
def test_a_change_on_either_side_is_drift(package, name):
    file = package / name
    file.write_text(file.read_text().replace('"""Delete a chunk;', '"""Delete one chunk;'))
    before = (package / "_sync.py").read_text()
    done = generate("--check", package)
    assert done.returncode == 1
    assert "Delete one chunk;" in done.stdout
    assert "run python sdk/generate.py" in done.stderr
    assert (package / "_sync.py").read_text() == before


def test_a_missing_file_is_drift_and_generating_mends_it(package):
    wanted = (package / "_sync.py").read_text()
    (package / "_sync.py").unlink()
    assert generate("--check", package).returncode == 1
    assert generate(package).returncode == 0
    assert (package / "_sync.py").read_text() == wanted
    assert generate("--check", package).returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "unused"),
    [("aclose", "shut", "aclose"), ("            await shelf.", "            shelf.", "await shelf.")],
)
@pytest.mark.parametrize("arguments", [("--check",), ()], ids=["check", "write"])
def test_a_replacement_that_nothing_needs_is_an_error(package, old, new, unused, arguments):
    file = package / "_async.py"
    file.write_text(file.read_text().replace(old, new))
    done = generate(*arguments, package)
    assert done.returncode == 1
    assert unused in done.stderr
