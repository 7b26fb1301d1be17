"""The documentation: complete where it claims to be, and its examples run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from pgshelf.embedded_settings import archive_command
from pgshelf.errors import CODES
from pgshelf.settings import PREFIX, Settings
from pgshelf_client import Client
from tests.cohere_server import CohereServer

pytestmark = pytest.mark.unwatched

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "sql/README.md"]


def blocks(file: Path, language: str) -> list[str]:
    """The code blocks of a Markdown file."""
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)


def test_every_setting_is_documented() -> None:
    told = set(re.findall(rf"^\| `{PREFIX}([A-Z_]+)`", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE))
    assert told == {name.upper() for name in Settings.__struct_fields__}


def test_documented_defaults_are_true() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    rows = dict(re.findall(rf"^\| `{PREFIX}([A-Z_]+)` \| `?([^|`]+?)`? \|", text, re.MULTILINE))
    settings = Settings()
    computed = {"database_url", "replica_url", "data_dir", "workers", "auto_migrate", "embedder", "api_key"}
    computed |= {"cohere_api_key"}
    computed |= {"backup_directory", "backup_url", "wal_archive", "pg_bin"}
    computed |= {"jwt_issuer", "jwt_audience", "jwt_jwks_url", "jwt_keys_file"}
    for name in set(Settings.__struct_fields__) - computed:
        shown, value = rows[name.upper()], getattr(settings, name)
        if isinstance(value, bool):
            assert shown == str(value).lower(), name
        elif isinstance(value, int | float):
            assert float(shown) == value, name
        else:
            assert shown in {value or "none", value or "empty"}, name


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.+) \|$", (ROOT / "docs/rest.md").read_text(), re.MULTILINE)
    told = {code: int(status) for status, codes in rows for code in re.findall(r"`([a-z_]+)`", codes)}
    assert told == {code: status for code, (status, _) in CODES.items()}


def test_the_documented_archive_command_is_the_one_that_is_tested() -> None:
    text = (ROOT / "docs/replication.md").read_text()
    assert f"archive_command = '{archive_command(Path('/var/backups/wal'))}'" in text


@pytest.mark.parametrize("file", DOCS, ids=lambda file: str(file.relative_to(ROOT)))
def test_named_paths_exist(file: Path) -> None:
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:service|sdk|sql|migrations|tests|benchmarks|docs)/[\w./-]*)`", text)
    for path in named:
        if "NNNN" not in path:
            assert (ROOT / path).exists(), f"{file.name} names {path}"


def test_the_code_map_names_every_module() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for module in (ROOT / "service/pgshelf").glob("*.py"):
        if module.name != "__init__.py":
            assert f"`{module.name}`" in text or f"/{module.name}`" in text, f"the code map misses {module.name}"


def test_every_sql_file_is_described() -> None:
    text = (ROOT / "sql/README.md").read_text()
    for file in (ROOT / "sql").glob("*.sql"):
        assert f"`{file.name}`" in text, file.name


def run_shell(script: str, server: Any) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8432", server.url)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shared_environment() -> dict[str, str]:
    return {}  # the embedder by default


def test_the_examples_of_the_readme_run(
    served: Any, shared_database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = [block for block in blocks(ROOT / "README.md", "sh") if "curl" in block]
    [python], [sql] = blocks(ROOT / "README.md", "python"), blocks(ROOT / "README.md", "sql")
    output = "".join(run_shell(block, served) for block in shell)
    assert '"key":"ch-7"' in output and '"hits":[{' in output
    exec(compile(python.replace("http://127.0.0.1:8432", served.url), "README.md", "exec"), {})  # noqa: S102 - ours
    printed = capsys.readouterr().out
    assert "ch-8" in printed and "ch-7" in printed
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        hits, overview = [connection.execute(each.encode()).fetchall() for each in sql.split(";") if each.strip()]
    assert hits[0][0] == "ch-7" and len(hits) == 2
    assert overview == [("handbook", 2, 2, 0)]


def test_the_example_of_the_sdk_runs(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    [python] = blocks(ROOT / "sdk/README.md", "python")
    exec(compile(python.replace("http://127.0.0.1:8432", served.url), "sdk/README.md", "exec"), {})  # noqa: S102 - ours
    assert "vacuum" in capsys.readouterr().out


def test_the_examples_of_imports_run(
    served: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGSHELF_PORT", str(served.port))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    Path("notes.ndjson").write_text('{"key": "a", "text": "Dead rows."}\n{"text": "Locks."}\n')
    Path("manual").mkdir()
    Path("manual/vacuum.md").write_text("# Vacuum\n\nDead rows.\n")
    Path("staff.csv").write_text("id,body,year\n7,Ada wrote it.,1843\n")
    commands = [block for block in blocks(ROOT / "docs/ingestion.md", "sh") if "notes.ndjson" in block]
    pythons = [block for block in blocks(ROOT / "docs/ingestion.md", "python") if "import_documents" in block]
    said = "".join(run_shell(block, served) for block in commands)
    assert "notes.ndjson: 2 created, 0 replaced" in said and "staff.csv: 1 created" in said
    assert "manual/: 1 created" in said and "backup.ndjson.gz: 4 documents" in said
    for python in pythons:
        exec(compile(python.replace("http://127.0.0.1:8432", served.url), "docs/ingestion.md", "exec"), {})  # noqa: S102 - ours
    assert capsys.readouterr().out.endswith("1000\n")
    [readme] = [block for block in blocks(ROOT / "README.md", "sh") if "pgshelf import" in block]
    assert "2 dealt with by an earlier run" in run_shell(readme, served)
    assert Path("notes.parquet").exists()


def test_the_example_of_a_mirror_bears_what_happens_meanwhile(served: Any) -> None:
    class Changing(Client):
        """Its library changes just when all documents have been read."""

        def documents(self, *names: Any, **options: Any) -> Iterator[Any]:
            yield from super().documents(*names, **options)
            self.put_document("handbook", "c", text="Came and stayed.")
            self.put_document("handbook", "d", text="Came.")
            self.delete_document("handbook", "d")
            self.delete_document("handbook", "a")

    [python] = [block for block in blocks(ROOT / "docs/ingestion.md", "python") if "mirror" in block]
    with Changing(served.url) as client:
        client.create_library("handbook")
        for key in ("a", "b"):
            client.put_document("handbook", key, text=f"The text of {key}.")
        known: dict[str, Any] = {"client": client}
        exec(compile(python, "docs/ingestion.md", "exec"), known)  # noqa: S102 - ours
    assert {document.key for document in known["mirror"].values()} == {"b", "c"}


REQUEST = re.compile(r"^(GET|POST|PUT|PATCH|DELETE) (\S+)\n(.*?)(?:^→ (.*?)\n)?(?=^\n|\Z)", re.MULTILINE | re.DOTALL)


def contains(answer: Any, told: Any) -> bool:
    """Whether an answer says what was told of it; objects may hold more."""
    if isinstance(told, dict):
        return isinstance(answer, dict) and all(name in answer and contains(answer[name], told[name]) for name in told)
    if isinstance(told, list):
        same = isinstance(answer, list) and len(answer) == len(told)
        return same and all(contains(*pair) for pair in zip(answer, told, strict=True))
    return bool(answer == told)


def finds(answer: Any, told: str) -> bool:
    if told.startswith("{"):
        return contains(answer, json.loads(told))
    return [hit["key"] for hit in answer["hits"]] == told.split(", ")


def keys_that_match(client: httpx2.Client, filter: Any) -> str:
    """The keys of the documents of `handbook` that a search by this filter finds, in the order of the alphabet."""
    body = {"query": "rows", "mode": "vector", "filter": filter, "group_by": "document", "k": 100}
    answer = client.post("/v1/libraries/handbook/search", json=body)
    assert answer.status_code == 200, (filter, answer.text)
    return ", ".join(sorted(hit["key"] for hit in answer.json()["hits"]))


def test_the_examples_of_the_search_guide_run(
    database_url: str, make_live_server: Any, cohere_server: CohereServer, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"PGSHELF_COHERE_API_KEY": cohere_server.key, "PGSHELF_COHERE_BASE_URL": cohere_server.url}
    server = make_live_server(database_url, **environment, PGSHELF_EMBEDDER="local")
    requests = [request for block in blocks(ROOT / "docs/search.md", "http") for request in REQUEST.findall(block)]
    wrong: list[Any] = []
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        for method, path, body, told in requests:
            answer = client.request(method, path, json=json.loads(body) if body else None)
            assert answer.status_code in (200, 201, 202), (path, body, answer.text)
            if told and not finds(answer.json(), told):
                wrong.append((path, body, told, answer.text))
        text = (ROOT / "docs/search.md").read_text()
        rows = re.findall(r"^\|.* \| `(\{.*\})` \| ?(.*?) ?\|$|^\| `(\{.*\})` \| ?(.*?) ?\|$", text, re.MULTILINE)
        filters = [(one or two, first or second) for one, first, two, second in rows]
        assert len(filters) == len(re.findall(r"^\|.*\{.*\|$", text, re.MULTILINE))
        for filter, told in filters:
            if (found := keys_that_match(client, json.loads(filter))) != told:
                wrong.append((filter, told, found))
    assert wrong == []
    [python] = blocks(ROOT / "docs/search.md", "python")
    exec(compile(python.replace("http://127.0.0.1:8432", server.url), "docs/search.md", "exec"), {})  # noqa: S102 - ours
    printed = capsys.readouterr().out
    assert "<mark>dead</mark> <mark>rows</mark>" in printed and printed.endswith("\n6 ready\n")


@pytest.fixture
def connection(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's, with the library `three` of the SQL guide."""
    make = """insert into pgshelf.libraries (name, dimension, embedder, chunking)
      values ('three', 3, '{"provider": "none", "dimension": 3}', '{"size": 1200, "overlap": 0}')"""
    with psycopg.connect(database_url, autocommit=True) as opened:
        for statement in (make, "drop role if exists analyst"):
            opened.execute(statement.encode())
        yield opened
        opened.execute("reset role")
        opened.execute("drop role analyst")


def test_the_examples_of_the_sql_guide_run(connection: psycopg.Connection[Any], vector_schema: str) -> None:
    put, grant, search, like, join, count, explain, follow, write = blocks(ROOT / "docs/sql.md", "sql")

    def run(script: str, role: str = "none") -> list[list[tuple[Any, ...]]]:
        connection.execute(f"set role {role}".encode())
        parts = re.split(r";\n", script.replace("public.vector", f'"{vector_schema}".vector'))
        cursors = [connection.execute(part.encode()) for part in parts if part.strip()]
        return [cursor.fetchall() if cursor.description else [] for cursor in cursors]

    run(put)
    run(grant)
    near, words, both = run(search, "analyst")
    assert [(key, ordinal) for key, ordinal, *_ in near] == [("ch-7", 0), ("ch-7", 1)]
    assert [(key, ordinal) for key, ordinal, *_ in words] == [("ch-7", 0)]
    assert "<mark>dead</mark> <mark>rows</mark>" in words[0][3]
    assert len(both) == 3
    assert [key for key, _ in run(like, "analyst")[0]] == ["ch-8"]

    facets, documents, of_2026, with_vacuum = run(count, "analyst")
    assert facets == [("year", 2024, 1), ("year", 2026, 1), ("lang", "en", 2)]
    assert (documents, of_2026, with_vacuum) == ([(1,)], [(2,)], [(1,)])
    how, status, recall = run(explain, "analyst")
    assert how[0][:2] == ("exact", "1") and how[0][2] > 0
    assert status == [("three", "auto", "flat", "ready", 1)]
    assert recall == [(1, 1, 3)]

    assert run(follow, "analyst") == [[]]
    run("select pgshelf.stamp_all_changes()")  # as a running service does
    assert run(follow, "analyst") == [[(1, "put", "ch-7", 1), (2, "put", "ch-8", 1)]]

    create, select = re.split(r"(?<=;)\n", join.strip(), maxsplit=1)
    run(create + "\n")
    connection.execute("insert into contracts select 1, id, 'acme' from pgshelf.documents_view where key = 'ch-7'")
    assert [len(rows) for rows in run(select)] == [2]
    assert run(write)[2:] == [[(1,)], [(1,)]]
    left = connection.execute("select key, title, metadata from pgshelf.documents_view").fetchall()
    assert left == [("ch-8", "Row locks", {"lang": "en", "reviewed": True})]
