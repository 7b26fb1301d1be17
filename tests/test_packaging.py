"""The wheels hold all they need: installed where no clone is in reach they migrate and serve."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[1]
START_SECONDS = 40.0

# The wheels are built once: xdist gives all tests of this file to one process.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command with nothing of this process's environment but the way to programs, and return what it prints."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={"PATH": os.environ["PATH"], **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(project: Path, kind: str, into: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", into, cwd=project)
    (built,) = [*into.glob("*.whl"), *into.glob("*.tar.gz")]
    return built


@pytest.fixture(scope="module")
def service_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def service_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("service"))


@pytest.fixture(scope="module")
def sdk_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "sdk", "wheel", tmp_path_factory.mktemp("sdk"))


def environment_with(directory: Path, *wheels: Path) -> Path:
    """Make an environment of these wheels; all other packages are those of the tests, the editable ones left out.

    A path that a .pth file adds is not searched for further .pth files, which is what editable packages are.
    """
    venv.create(directory, symlinks=True)
    python = directory / "bin" / "python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", *wheels, cwd=directory)
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", script, cwd=directory).strip())
    others = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    return python


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, service_wheel: Path, sdk_wheel: Path) -> Path:
    return environment_with(tmp_path_factory.mktemp("environment"), service_wheel, sdk_wheel)


def files_below(folder: str) -> set[str]:
    paths = (ROOT / folder).rglob("*")
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_package_migrations_and_sql(service_wheel):
    held = {name for name in zipfile.ZipFile(service_wheel).namelist() if ".dist-info/" not in name}
    package = {name.removeprefix("service/") for name in files_below("service/pgshelf")}
    beside = {f"pgshelf/{name}" for folder in ("migrations", "sql") for name in files_below(folder)}
    beside.add("pgshelf/docs/errors.md")  # which /errors shows
    assert held == package | beside
    assert "pgshelf/migrations/env.py" in held
    assert "pgshelf/migrations/script.py.mako" in held
    assert "pgshelf/sql/90_grants.sql" in held


def test_the_wheel_says_what_it_is(service_wheel):
    with zipfile.ZipFile(service_wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "pgshelf = pgshelf.cli:main" in entry_points
    assert "pgshelf/py.typed" in names


def test_the_sdk_wheel_holds_the_sdk_only(sdk_wheel):
    held = {name for name in zipfile.ZipFile(sdk_wheel).namelist() if ".dist-info/" not in name}
    assert held == {name.removeprefix("sdk/") for name in files_below("sdk/pgshelf_client")}
    assert "pgshelf_client/py.typed" in held


def test_the_source_distribution_builds_the_same_wheel(service_sdist, service_wheel, tmp_path):
    with tarfile.open(service_sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    rebuilt = build(unpacked, "wheel", tmp_path / "rebuilt")
    assert set(zipfile.ZipFile(rebuilt).namelist()) == set(zipfile.ZipFile(service_wheel).namelist())
    assert rebuilt.name == service_wheel.name


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(project: Path) -> set[str]:
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    lines = [*table["dependencies"], *chain.from_iterable(table.get("optional-dependencies", {}).values())]
    return {normal(re.split(r"[^\w.-]", line)[0]) for line in lines}


def imported(package: Path) -> set[str]:
    names: set[str] = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {package.name, "__future__"}


@pytest.mark.parametrize(("project", "package"), [(".", "service/pgshelf"), ("sdk", "sdk/pgshelf_client")])
def test_every_imported_package_is_a_declared_dependency(project, package):
    distributions = importlib.metadata.packages_distributions()
    known = declared(ROOT / project)
    # an editable package has no list of its modules: by its name then
    sources = {name: set(map(normal, distributions.get(name, [name]))) for name in imported(ROOT / package)}
    missing = {name for name, candidates in sources.items() if not candidates & known}
    assert not missing, f"imported, but not among the dependencies of {project}/pyproject.toml"


@pytest.fixture(scope="module")
def own_database_url() -> Iterator[str]:
    """A bundled server, outside of pytest's directory: another run of pytest would shut root's server out of that."""
    from pgshelf import embedded

    with tempfile.TemporaryDirectory(prefix="pgshelf-test-") as directory, embedded.start(Path(directory)) as server:
        yield server.url()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, python: Path, own_database_url: str) -> Iterator[str]:
    """The address of a server that runs from the wheel, in a directory where no clone is; it ends by SIGTERM."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {"PATH": os.environ["PATH"], "HOME": str(elsewhere), "PGSHELF_DATABASE_URL": own_database_url}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pgshelf = python.parent / "pgshelf"
    run(pgshelf, "migrate", cwd=elsewhere, **environment)
    command = [str(pgshelf), "serve", "--port", str(port), "--workers", "1"]
    output = elsewhere / "output"
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, output)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(address: str, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, output.read_text()
        try:
            if httpx2.get(f"{address}/ready", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready after {START_SECONDS:.0f} s: {output.read_text()}")


def test_the_installed_package_is_what_runs(python, tmp_path):
    script = "import pgshelf, pgshelf_client; print(pgshelf.__file__); print(pgshelf_client.__file__)"
    found = run(python, "-c", script, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(python.parents[1]) for file in found)


def test_installed_it_migrates_serves_and_searches(served):
    with httpx2.Client(base_url=served) as client:
        assert client.get("/ready").json()["status"] == "ready"
        assert client.post("/v1/libraries", json={"name": "handbook"}).status_code == 201
        documents = "/v1/libraries/handbook/documents"
        assert client.post(documents, json={"key": "vacuum", "text": "Vacuum reclaims dead rows."}).status_code == 201
        found = client.post("/v1/libraries/handbook/search", json={"query": "dead rows"})
        assert [hit["key"] for hit in found.json()["hits"]] == ["vacuum"]


def test_the_sdk_alone_works_against_it(served, sdk_wheel, tmp_path):
    python = environment_with(tmp_path / "sdk", sdk_wheel)
    script = f"""
import importlib.util
from pgshelf_client import Client

assert importlib.util.find_spec("pgshelf") is None
with Client("{served}") as shelf:
    shelf.create_library("through-the-sdk")
    shelf.add_document("through-the-sdk", key="analyze", text="Analyze gathers statistics.")
    print([hit.key for hit in shelf.search("through-the-sdk", "statistics").hits])
"""
    assert run(python, "-c", script, cwd=tmp_path) == "['analyze']\n"
