"""The documentation: complete where it claims to be, and its examples run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgshelf.errors import CODES
from pgshelf.settings import PREFIX, Settings

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
    computed = {"database_url", "data_dir", "workers", "auto_migrate"}
    for name in set(Settings.__struct_fields__) - computed:
        shown, value = rows[name.upper()], getattr(settings, name)
        if isinstance(value, bool):
            assert shown == str(value).lower(), name
        elif isinstance(value, int | float):
            assert float(shown) == value, name
        else:
            assert shown == value, name


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.+) \|$", (ROOT / "docs/rest.md").read_text(), re.MULTILINE)
    told = {code: int(status) for status, codes in rows for code in re.findall(r"`([a-z_]+)`", codes)}
    assert told == {code: status for code, (status, _) in CODES.items()}


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


def test_the_examples_of_the_readme_run(
    live_server: Any, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = [block for block in blocks(ROOT / "README.md", "sh") if "curl" in block]
    [python], [sql] = blocks(ROOT / "README.md", "python"), blocks(ROOT / "README.md", "sql")
    output = "".join(run_shell(block, live_server) for block in shell)
    assert '"key":"ch-7"' in output and '"hits":[{' in output
    exec(compile(python.replace("http://127.0.0.1:8432", live_server.url), "README.md", "exec"), {})  # noqa: S102 - ours
    printed = capsys.readouterr().out
    assert "ch-8" in printed and "ch-7" in printed
    with psycopg.connect(database_url, autocommit=True) as connection:
        hits, overview = [connection.execute(each.encode()).fetchall() for each in sql.split(";") if each.strip()]
    assert hits[0][0] == "ch-7" and len(hits) == 2
    assert overview == [("handbook", 2, 2, 0)]


def test_the_example_of_the_sdk_runs(live_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    [python] = blocks(ROOT / "sdk/README.md", "python")
    exec(compile(python.replace("http://127.0.0.1:8432", live_server.url), "sdk/README.md", "exec"), {})  # noqa: S102 - ours
    assert "vacuum" in capsys.readouterr().out


def test_the_examples_of_the_sql_guide_run(database_url: str, vector_schema: str) -> None:
    make = """insert into pgshelf.libraries (name, dimension, embedder, chunking)
      values ('three', 3, '{"provider": "none", "dimension": 3}', '{"size": 1200, "overlap": 0}')"""
    grant, search, join, write = blocks(ROOT / "docs/sql.md", "sql")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(make.encode())
        put, delete = [part for part in write.split(";\n") if part.strip()]
        connection.execute(put.replace("public.vector", f'"{vector_schema}".vector').encode())
        hits = connection.execute(search.encode()).fetchall()
        assert [(key, ordinal) for key, ordinal, *_ in hits] == [("ch-7", 0), ("ch-7", 1)]
        create, select = [part for part in join.split(";\n") if part.strip()]
        connection.execute(create.encode())
        connection.execute("insert into contracts select 1, id, 'acme' from pgshelf.documents_view")
        assert len(connection.execute(select.encode()).fetchall()) == 2
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            connection.execute(delete.encode())
        connection.execute("drop table contracts")
        connection.execute(delete.encode())
        assert connection.execute(search.encode()).fetchall() == []
        connection.execute("drop role if exists analyst")
        connection.execute("create role analyst")
        connection.execute(grant.encode())
        connection.execute("drop role analyst")
