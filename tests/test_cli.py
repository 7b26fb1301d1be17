"""The command line, as people and init systems use it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import click
import httpx2
import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import conninfo_to_dict

import pgshelf
from pgshelf import cli_serve, embedded, schema
from pgshelf.cli import main
from pgshelf.embedders import PROVIDERS
from pgshelf_client import Client, Embedder, EmbedderState, Index, IndexEstimate
from tests.cohere_server import CohereServer, status
from tests.conftest import LiveServer
from tests.openai_server import OpenAIServer
from tests.postgres import Server, in_memory, on_database
from tests.roles import ask, logins
from tests.soak.crash import ended, workers_of

bundled = pytest.mark.xdist_group("bundled")  # one data directory, used by one test after the other
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vector_schema: str) -> Run:
    """Runs a command in this process: run("doctor", url=..., PGSHELF_PORT="1")."""

    def invoke(*arguments: str, url: str | None = None, color: bool = False, **environment: str) -> Result:
        known = {"PGSHELF_DATABASE_URL": url or "", "PGSHELF_VECTOR_SCHEMA": vector_schema}
        known |= {"PGSHELF_DATA_DIR": str(tmp_path / "data"), "PGSHELF_LOG_LEVEL": "error"}
        return CliRunner().invoke(main, arguments, env=known | environment, color=color)

    for name in [name for name in os.environ if name.startswith("PGSHELF_")]:
        monkeypatch.delenv(name)
    return invoke


def with_password(url: str, password: str) -> str:
    """The same database; a server that trusts its socket does not look at the password."""
    parts = urlsplit(url)
    if parts.password is not None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{host}"))


# -- migrate


def tables(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        rows = connection.execute("select tablename from pg_tables where schemaname = 'pgshelf' order by 1").fetchall()
        return [name for (name,) in rows]


def test_migrate_brings_a_database_up_to_date_and_takes_it_back(run: Run, empty_database_url: str) -> None:
    for _ in range(2):  # to repeat it is safe
        result = run("migrate", url=empty_database_url)
        assert (result.exit_code, result.stdout) == (0, f"the schema pgshelf is at revision {schema.head()}\n")
        assert "chunks" in tables(empty_database_url)
    result = run("migrate", "--down-to", "base", url=empty_database_url)
    assert (result.exit_code, result.stdout) == (0, "the schema pgshelf is back at base\n")
    assert tables(empty_database_url) == []


def test_migrate_prints_statements_that_do_the_same(run: Run, empty_database_url: str) -> None:
    result = run("migrate", "--sql")
    assert result.exit_code == 0
    assert tables(empty_database_url) == []
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute(result.stdout.encode())
    assert run("doctor", url=empty_database_url).exit_code == 0


def test_migrate_refuses_to_take_away_what_is_referenced(run: Run, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("create table invoices (document uuid references pgshelf.documents (id))")
    result = run("migrate", "--down-to", "base", url=database_url)
    assert result.exit_code == 1
    assert "pgshelf: nothing was changed" in result.stderr
    assert "invoices" in result.stderr
    assert "chunks" in tables(database_url)


def test_migrate_says_why_it_cannot(run: Run) -> None:
    result = run("migrate", url="postgresql://nobody:s3cret@127.0.0.1:1/nothing")
    assert (result.exit_code, "s3cret" in result.output) == (1, False)
    assert result.stderr.startswith("pgshelf: ")
    assert "refused" in result.stderr


# -- doctor


def lines(result: Result, level: str) -> list[str]:
    return [line.removeprefix(level).strip() for line in result.stdout.splitlines() if line.startswith(level)]


def test_doctor_finds_a_good_database_good(run: Run, database_url: str) -> None:
    result = run("doctor", url=database_url, PGSHELF_WORKERS="2", PGSHELF_POOL_SIZE="7")
    assert (result.exit_code, lines(result, "fail")) == (0, [])
    good = "\n".join(lines(result, "ok"))
    for part in ("PostgreSQL 1", f"revision {schema.head()}", "role pgshelf_reader", "role pgshelf_writer",
                 "role pgshelf_worker",
                 "all indexes are valid", "0 chunks wait", "up to 24 connections (2 processes x 12"):  # fmt: skip
        assert part in good


def test_doctor_says_what_to_do_without_a_schema(run: Run, empty_database_url: str) -> None:
    result = run("doctor", url=empty_database_url)
    assert result.exit_code == 1
    assert "the schema pgshelf is missing; run pgshelf migrate" in lines(result, "fail")


def test_doctor_says_what_to_do_without_a_database(run: Run) -> None:
    result = run("doctor", url="postgresql://nobody:s3cret@127.0.0.1:1/nothing")
    [finding] = lines(result, "fail")
    assert result.exit_code == 1
    assert "cannot be reached" in finding and "PGSHELF_DATABASE_URL" in finding
    assert "s3cret" not in result.output


BROKEN = {
    "functions of another version": (
        "update pgshelf.installation set sql_hash = 'other'", "fail", "run pgshelf migrate"
    ),
    "another revision": ("update pgshelf.alembic_version set version_num = '0000'", "fail", "run pgshelf migrate"),
    "no pgvector": ("update pg_extension set extname = 'elsewhere' where extname = 'vector'", "fail", "not installed"),
    "an old pgvector": ("update pg_extension set extversion = '0.7.4' where extname = 'vector'", "fail", "0.8.0"),
    "a pgvector with known defects": (
        "update pg_extension set extversion = '0.8.5' where extname = 'vector'", "warn", "0.8.6 or newer"
    ),
    "a newer pgvector": ("update pg_extension set extversion = '0.9.0' where extname = 'vector'", "ok", "pgvector 0.9"),
    "an invalid index": (
        "update pg_index set indisvalid = false where indexrelid = 'pgshelf.chunks_s0_id_idx'::regclass",
        "fail", "reindex index concurrently pgshelf.chunks_s0_id_idx",
    ),
    "a role without grants": ("revoke usage on schema pgshelf from pgshelf_reader", "warn", "no grants here"),
    "a superuser": ("select 1", "warn", "is a superuser, more than pgshelf needs"),
    "a table granted by hand": (
        "grant select on pgshelf.documents to pgshelf_reader", "warn",
        "revoke all on pgshelf.documents from pgshelf_reader",
    ),
    "a shelf granted by hand": (
        "grant select on pgshelf.chunks_s0 to pgshelf_service", "warn", "was granted a shelf, where nothing hides"
    ),
    "grants of a role that is gone": (
        "insert into pgshelf.grants (role, access) values ('who was', 'read')", "warn",
        "select pgshelf.revoke_library('who was', '*')",
    ),
    "a server that does not count": (
        "alter database this set track_counts = off", "fail", "none gets an index by itself"
    ),
    "a database that takes no writes": (
        "alter database this set default_transaction_read_only = on", "fail", "nothing can be written"
    ),
    "chunks that were given up": (
        """insert into pgshelf.libraries (name, dimension, embedder, chunking)
           values ('n', 4, '{"provider": "local", "dimension": 4}', '{}');
           select pgshelf.put_document('n', 'a', texts => array['x', 'y']);
           update pgshelf.chunks set embed_after = 'infinity', embed_error = 'refused' where text = 'x'""",
        "warn", "1 chunks could not be embedded, the last reason: refused",
    ),
    "a missing table": ("alter table pgshelf.libraries rename to books", "fail", "embedders: relation"),
    "a missing view": ("drop view pgshelf.pending_embeddings", "fail", "pending: relation"),
}  # fmt: skip


def test_doctor_knows_the_roles(run: Run, database_url: str, vector_schema: str) -> None:
    owner = "select relowner::regrole::text from pg_class where oid = 'pgshelf.chunks'::regclass"
    with logins(database_url, vector_schema) as login:
        serves = login("pgshelf_service")
        told = {
            "may not serve: a DBA runs grant pgshelf_service": login("pgshelf_reader"),
            "may serve; indexes are built by pgshelf worker": serves,
            "above row security (BYPASSRLS)": login("pgshelf_service", options="bypassrls"),
        }
        for said, url in told.items():
            assert said in run("doctor", url=url).output
        [(name,)] = ask(database_url, owner)
        made = login("pgshelf_worker")
        ask(database_url, f"grant {name} to {conninfo_to_dict(made)['user']} with inherit false, set true")
        result = run("doctor", url=made)
        assert f"may become the owner, {name}: it is one for pgshelf worker" in result.output
        assert (result.exit_code, lines(result, "fail")) == (0, [])
        ask(database_url, "select pgshelf.revoke_library('pgshelf_service', '*')")
        result = run("doctor", url=serves)
        assert "was not granted all libraries" in result.output
        assert (result.exit_code, lines(result, "fail")) == (0, [])


def test_a_role_without_rights_is_told_who_grants_them(run: Run, database_url: str, vector_schema: str) -> None:
    """Each look of doctor is a line; serve and worker say it and end."""
    owner = "select relowner::regrole::text from pg_class where oid = 'pgshelf.chunks'::regclass"
    [(name,)] = ask(database_url, owner)
    with logins(database_url, vector_schema) as login:
        for roles in ((), ("pgshelf_reader",), ("pgshelf_worker",)):
            url = login(*roles)
            user = conninfo_to_dict(url)["user"]
            serves = f"the role {user} may not serve: a DBA runs grant pgshelf_service to {user}"
            no_worker = f"the role {user} is no worker: a DBA runs grant pgshelf_worker to {user}"
            no_owner = f"may not become the owner yet: a DBA runs grant {name} to pgshelf_worker"
            works = no_owner if roles == ("pgshelf_worker",) else no_worker
            result = run("doctor", url=url)
            assert isinstance(result.exception, SystemExit) and result.exit_code == 1
            assert (no_owner if works == no_owner else serves) in "\n".join(lines(result, "fail")), result.output
            assert all(line[:4] in ("ok  ", "warn", "fail") for line in result.stdout.splitlines())
            for command, said in (("serve", serves), ("worker", works)):
                result = run(command, url=url)
                assert isinstance(result.exception, SystemExit) and result.exit_code == 1
                assert said in result.stderr and "pgshelf doctor says more" in result.stderr, result.output


@pytest.mark.watched
@pytest.mark.parametrize("name", BROKEN)
def test_doctor_names_what_is_wrong(run: Run, database_url: str, name: str) -> None:
    statements, level, said = BROKEN[name]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(statements.replace("database this", f"database {connection.info.dbname}").encode())
    result = run("doctor", url=database_url)
    assert said in "\n".join(lines(result, level)), result.output
    assert result.exit_code == (1 if level == "fail" else 0)


def test_doctor_names_server_settings_that_lose_writes_and_a_database_that_is_no_utf8(
    run: Run, postgres: Server, empty_database_url: str
) -> None:
    name = urlsplit(empty_database_url).path[1:] + "_ascii"
    with psycopg.connect(postgres.admin_url, autocommit=True) as admin:
        admin.execute(
            f"create database {name} encoding 'SQL_ASCII' template template0 locale_provider libc locale 'C'".encode()
        )
        admin.execute(f"alter database {name} set synchronous_commit = off".encode())
        try:
            result = run("doctor", url=on_database(postgres.admin_url, name))
        finally:
            admin.execute(f"drop database {name}".encode())
    assert any("UTF8" in line for line in lines(result, "fail"))
    assert any(line.startswith("synchronous_commit is off") for line in lines(result, "warn"))
    assert result.exit_code == 1


# -- search


@pytest.fixture(scope="module")
def shared_environment() -> dict[str, str]:
    return {}  # the embedder by default


def test_search_prints_hits_for_people_and_for_programs(run: Run, served: LiveServer) -> None:
    documents = {"birds": "Penguins swim under the ice.", "cars": "Engines burn petrol."}
    httpx2.post(f"{served.url}/v1/libraries", json={"name": "notes"}).raise_for_status()
    for key, text in documents.items():
        address = f"{served.url}/v1/libraries/notes/documents/{key}"
        httpx2.put(address, json={"text": text}).raise_for_status()

    result = run("search", "notes", "penguins on ice", "--url", served.url)
    assert result.exit_code == 0
    assert [line.split()[1:] for line in result.stdout.splitlines()[::2]] == [["birds", "#0"], ["cars", "#0"]]
    assert result.stdout.splitlines()[1].strip() == documents["birds"]

    result = run("search", "notes", "penguins on ice", "-k", "1", "--json", PGSHELF_PORT=str(served.port))
    [hit] = map(json.loads, result.stdout.splitlines())
    assert (hit["key"], hit["text"]) == ("birds", documents["birds"])

    httpx2.post(f"{served.url}/v1/libraries", json={"name": "empty"}).raise_for_status()
    result = run("search", "empty", "anything", "--url", served.url)
    assert (result.exit_code, result.stdout) == (0, "nothing found\n")
    result = run("search", "empty", "anything", "--json", "--url", served.url)
    assert (result.exit_code, result.stdout) == (0, "")

    result = run("search", "nothing", "anything", "--url", served.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pgshelf: ") and "'nothing'" in result.stderr


def test_search_takes_the_options_of_a_search(run: Run, served: LiveServer) -> None:
    httpx2.post(f"{served.url}/v1/libraries", json={"name": "notes"}).raise_for_status()
    for key, text, year in [
        ("birds", "Penguins <b>swim</b> & dive\x1b[2J under the ice.", 2020),
        ("bears", "Bears walk on the ice.\n\nThey hunt on the ice, too.", 2024),
    ]:
        body = {"chunks": [{"text": part} for part in text.split("\n\n")], "metadata": {"year": year}}
        httpx2.put(f"{served.url}/v1/libraries/notes/documents/{key}", json=body).raise_for_status()

    def search(*options: str, color: bool = False) -> Result:
        result = run("search", "notes", "ice", "--url", served.url, *options, color=color)
        assert result.exit_code == 0, result.output
        return result

    def found(*options: str) -> list[str]:
        return [line.split(maxsplit=1)[1] for line in search(*options).stdout.splitlines()[::2]]

    words = ("--mode", "text")
    assert sorted(found(*words)) == ["bears #0", "bears #1", "birds #0"]
    assert found(*words, "--filter", '{"year": {"$lt": 2024}}') == ["birds #0"]
    assert sorted(line.split()[0] for line in found(*words, "--group-by-document")) == ["bears", "birds"]
    assert found(*words, "--offset", "1", "-k", "1") == found(*words)[1:2]

    birds = (*words, "--filter", '{"$key": "birds"}')
    shown = search(*birds, color=True).stdout.splitlines()[1]
    assert shown.strip() == "Penguins <b>swim</b> & dive[2J under the \x1b[1mice\x1b[0m."
    assert "\x1b" not in search(*birds).stdout, "nothing is bold where the output is no terminal"
    assert "under the ice" in search("--mode", "vector").stdout

    told = search("--mode", "vector", "--explain").stdout
    assert "\nhow: exact, recall 1.00 against exact search; 0 rows were looked at and did not match\nwith " in told
    assert "\nhow: words; " in search(*words, "--explain").stdout
    counted = ("--facets", "year, lang")
    assert search(*words, *counted).stdout.splitlines()[-2:] == ["year: 2020 1, 2024 1", "lang: no values"]
    *hits, facets, explanation = map(
        json.loads, search(*words, *counted, "--explain", "--json", "--exact").stdout.splitlines()
    )
    assert len(hits) == 3 and "<mark>ice</mark>" in hits[0]["highlight"]
    assert facets["facets"]["year"][0] == {"value": 2020, "documents": 1}
    assert explanation["explain"]["strategy"] == "words"


def test_search_finds_what_is_like_a_chunk_or_a_document(run: Run, served: LiveServer) -> None:
    with Client(served.url) as client:
        client.create_library("notes", embedder={"provider": "none"}, dimension=2)
        vectors: dict[str, list[float]] = {"a": [1, 0], "b": [1, 0.1], "c": [0, 1], "d": [0.1, 1]}
        for key, vector in vectors.items():
            client.put_document("notes", key, chunks=[{"text": key, "embedding": vector}], metadata={"kind": key * 2})
        document = client.get_document("notes", "c").id
        [chunk] = client.chunks("notes", "c")

    def nearest(*arguments: str) -> str:
        result = run("search", "notes", *arguments, "-k", "1", "--url", served.url)
        assert result.exit_code == 0, result.output
        return result.stdout.split()[1]

    assert nearest("--like", "a") == "b"
    assert nearest("--like", document) == nearest("--like", chunk.id, "--exact") == "d"
    assert nearest("b", "--like", "c", "--mode", "vector") == "d"
    facets = run("search", "notes", "--like", "a", "--facets", "kind", "--url", served.url).stdout
    assert facets.splitlines()[-1] == "kind: aa 1, bb 1, cc 1, dd 1"

    for unknown in ("nobody", "00000000-0000-0000-0000-000000000000"):
        result = run("search", "notes", "--like", unknown, "--url", served.url)
        assert (result.exit_code, "404 document_not_found" in result.stderr) == (1, True)
    result = run("search", "elsewhere", "--like", document, "--url", served.url)
    assert (result.exit_code, "404 library_not_found" in result.stderr) == (1, True)


def test_search_needs_something_to_look_for(run: Run) -> None:
    result = run("search", "notes")
    assert (result.exit_code, "Say what to look for" in result.stderr) == (2, True)
    result = run("search", "notes", "x", "--facets", "year,")
    assert (result.exit_code, "needs names with commas" in result.stderr) == (2, True)


def test_search_reranks(run: Run, database_url: str, make_live_server: Any, cohere_server: CohereServer) -> None:
    environment = {"PGSHELF_COHERE_API_KEY": cohere_server.key, "PGSHELF_COHERE_BASE_URL": cohere_server.url}
    server = make_live_server(database_url, **environment)
    write(server, "a")
    result = run("search", "notes", "the text of a", "--rerank", "--url", server.url)
    assert (result.exit_code, result.stdout.split()[:2]) == (0, ["1.000", "a"])
    [query] = [asked.body["query"] for asked in cohere_server.asked if "query" in asked.body]
    assert query == "the text of a"


@pytest.mark.parametrize("condition", ["{", "[1]", '"year"', ""])
def test_search_refuses_a_filter_that_is_no_json_object(run: Run, condition: str) -> None:
    result = run("search", "notes", "anything", "--filter", condition)
    assert result.exit_code == 2
    assert "--filter" in result.stderr and "needs a JSON object" in result.stderr


def test_search_says_that_nobody_serves(run: Run) -> None:
    result = run("search", "notes", "anything", "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pgshelf: ") and "127.0.0.1:1" in result.stderr


# -- index


def test_index_shows_and_changes_the_index(run: Run, served: LiveServer) -> None:
    write(served, "a")
    here = ("--url", served.url)
    result = run("index", "notes", *here)
    assert (result.exit_code, result.stdout.splitlines()) == (
        0, ["wanted  auto", "in use  flat", "state   ready"]
    )  # fmt: skip

    result = run("index", "notes", "--type", "hnsw", "--storage", "vector", *here)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "wanted  hnsw, storage vector")
    result = run("index", "notes", "--wait", *here)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "state   ready")
    assert result.stdout.splitlines()[1].startswith("in use  hnsw, ")

    result = run("index", "notes", "--type", "ivfflat", "--wait", *here)
    assert result.stdout.splitlines()[-1] == "state   waiting for enough vectors, searched exactly so far"
    index = json.loads(run("index", "notes", "--json", *here).stdout)
    assert (index["wanted"], index["state"]) == ({"type": "ivfflat"}, "waiting")

    result = run("index", "notes", "--type", "kdtree", *here)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pgshelf: 422 index_impossible: ")
    result = run("index", "notes", "--storage", "bit", *here)
    assert (result.exit_code, "--storage needs --type" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("state", "said", "status"),
    [
        ({"state": "building", "progress": 0.45}, "building, 45% done, about 6 s in all", 0),
        ({"state": "failed", "error": "No space left."}, "failed: No space left.; it is tried again", 1),
    ],
)
def test_index_says_how_far_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], said: str, status: int
) -> None:
    index = Index(wanted={"type": "hnsw"}, actual={"type": "flat"}, estimate=IndexEstimate(seconds=6.2), **state)
    monkeypatch.setattr(Client, "get_index", lambda *_: index)
    monkeypatch.setattr(Client, "wait_for_index", lambda *_, **options: index)
    result = run("index", "notes", "--wait")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (status, f"state   {said}")


# -- embedder


def test_embedder_names_all_providers(run: Run) -> None:
    told = run("embedder", "--help").output
    assert [provider for provider in PROVIDERS if provider not in told] == []


def test_embedder_shows_and_changes_the_embedder(run: Run, served: LiveServer) -> None:
    write(served, "a")
    here = ("--url", served.url)
    used = "local, wordllama-l2-supercat, dimension"
    result = run("embedder", "notes", *here)
    assert (result.exit_code, result.stdout.splitlines()) == (
        0, [f"wanted  {used} 256", f"in use  {used} 256", "state   ready"]
    )  # fmt: skip
    result = run("embedder", "notes", "--provider", "local", "--dimension", "64", "--wait", *here)
    assert (result.exit_code, result.stdout.splitlines()) == (
        0, [f"wanted  {used} 64", f"in use  {used} 64", "state   ready"]
    )  # fmt: skip
    found = json.loads(run("embedder", "notes", "--cancel", "--json", *here).stdout)
    assert (found["embedder"]["dimension"], found["wanted"], found["embedded"], found["total"]) == (64, None, 1, 1)

    result = run("embedder", "notes", "--provider", "nobody", *here)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("pgshelf: 422 embedder_not_configured: ")
    result = run("embedder", "notes", "--dimension", "64", *here)
    assert (result.exit_code, "need --provider" in result.stderr) == (2, True)
    result = run("embedder", "notes", "--cancel", "--provider", "local", *here)
    assert (result.exit_code, "Either --cancel or --provider" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("state", "said", "status"),
    [
        ({"state": "embedding", "progress": 0.45, "embedded": 5, "total": 9},
         "embedding, 45% done, 5 of 9 chunks embedded", 0),
        ({"state": "failed", "error": "No key."}, "failed: No key.; it is tried again", 1),
    ],
)  # fmt: skip
def test_embedder_says_how_far_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], said: str, status: int
) -> None:
    used, wanted = (Embedder(provider="local", dimension=dimension) for dimension in (256, 64))
    found = EmbedderState(embedder=used, wanted=wanted, **state)
    monkeypatch.setattr(Client, "get_embedder", lambda *_: found)
    monkeypatch.setattr(Client, "wait_for_embedder", lambda *_, **options: found)
    result = run("embedder", "notes", "--wait")
    assert (result.exit_code, result.stdout.splitlines()) == (
        status, ["wanted  local, dimension 64", "in use  local, dimension 256", f"state   {said}"]
    )  # fmt: skip


# -- serve: what it refuses before it starts


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--port", "99999"], {}, "65535"),
        ([], {"PGSHELF_WORKERS": "none"}, "PGSHELF_WORKERS=none"),
        ([], {"PGSHELF_WORKER": "1"}, "PGSHELF_WORKER is not a setting"),
        ([], {"PGSHELF_CHUNK_OVERLAP": "5000"}, "chunk_overlap must be smaller"),
        ([], {"PGSHELF_POSTGRES_VERSION": "17"}, "18 or 16"),
        (["--host", "0.0.0.0"], {}, "PGSHELF_ALLOW_UNAUTHENTICATED"),  # noqa: S104 - what is refused
        (["--host", "shelf.example.com"], {"PGSHELF_AUTH": "off"}, "PGSHELF_ALLOW_UNAUTHENTICATED"),
        (["--host", "203.0.113.7"], {"PGSHELF_ALLOW_UNAUTHENTICATED": "true"}, "cannot listen on 203.0.113.7:8432"),
        (["--host", "203.0.113.7"], {"PGSHELF_ALLOW_UNAUTHENTICATED": "true"}, "Choose --host."),
        (["--host", "no.host.invalid"], {"PGSHELF_ALLOW_UNAUTHENTICATED": "true"}, "Choose --host."),
    ],
)
def test_serve_refuses_what_it_cannot_do(
    run: Run, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    result = run("serve", *arguments, **environment)
    assert result.exit_code == 1
    assert result.stderr.startswith("pgshelf: ") and said in result.stderr


def test_worker_embeds_without_serving_and_ends_when_told(database_url: str, tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
    known = {"PGSHELF_DATABASE_URL": database_url, "PGSHELF_WORKER_INTERVAL": "0.05", "PGSHELF_WORKER_ENABLED": "false"}
    with psycopg.connect(database_url, autocommit=True) as db, (tmp_path / "log").open("wb") as log:
        db.execute(
            "insert into pgshelf.libraries (name, dimension, embedder, chunking, index) values ('l', 64,"
            """ '{"provider": "local", "dimension": 64}', '{"size": 100, "overlap": 0}', '{"type": "auto"}')"""
        )
        db.execute("select pgshelf.put_document('l', 'k', texts => '{one,two}')")
        command = [str(Path(sys.executable).with_name("pgshelf")), "worker"]
        process = subprocess.Popen(command, env=inherited | known, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while db.execute("select count(*) from pgshelf.pending_embeddings").fetchone() != (0,):
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
    assert (tmp_path / "log").read_text().startswith(f"pgshelf {pgshelf.__version__} works on postgresql://")


def test_a_worker_without_a_schema_says_what_to_do(empty_database_url: str, tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
    known = {"PGSHELF_DATABASE_URL": empty_database_url, "PGSHELF_WORKER_INTERVAL": "0.05"}
    with (tmp_path / "log").open("wb") as log:
        command = [str(Path(sys.executable).with_name("pgshelf")), "worker"]
        process = subprocess.Popen(command, env=inherited | known, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while (warnings := (tmp_path / "log").read_text().count("failed, trying again")) < 4:
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
    text = (tmp_path / "log").read_text()
    assert "not ready: the schema pgshelf is missing; run pgshelf migrate" in text
    assert text.count("Run `pgshelf migrate`") >= warnings and "LINE 1" not in text


def test_serve_refuses_a_busy_port(run: Run) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        result = run("serve", "--port", str(busy.getsockname()[1]))
    assert result.exit_code == 1
    assert "cannot listen on 127.0.0.1:" in result.stderr and "--port" in result.stderr


def test_commands_say_why_the_bundled_server_does_not_start(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data" / "postgres").mkdir(parents=True)
    (tmp_path / "data" / "postgres" / "PG_VERSION").write_text("15\n")
    result = run("doctor")
    assert result.exit_code == 1
    assert "was made by PostgreSQL 15" in result.stderr


def test_the_bundled_server_is_watched_through_failures(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()

    class Failing:
        asked = 0

        def ensure_running(self) -> None:
            self.asked += 1
            if self.asked == 2:
                stop.set()
            raise embedded.EmbeddedError("the disk is full")

    watched = Failing()
    cli_serve._keep_running(watched, stop)  # type: ignore[arg-type]  # all that is asked of a server
    assert (watched.asked, caplog.messages) == (2, ["the disk is full"] * 2)


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(main, ["--help"])
    for name in main.list_commands(click.Context(main)):
        assert f"  {name} " in result.output
    assert CliRunner().invoke(main, ["--version"]).output == f"pgshelf, version {pgshelf.__version__}\n"


# -- serve, on a database of somebody's


def test_serve_says_what_it_does_and_masks_secrets(
    database_url: str, make_live_server: Any, vector_schema: str
) -> None:
    url = with_password(database_url, "s3cret")
    server = make_live_server(url, "--host", "localhost", PGSHELF_MAX_K="77", PGSHELF_VECTOR_SCHEMA=vector_schema)
    password = urlsplit(url).password
    assert f"http://localhost:{server.port}/v1" in server.output
    assert "max_k = 77" in server.output
    assert ":***@" in server.output
    assert f":{password}@" not in server.output
    assert server.stop() == 0


@pytest.mark.watched
def test_serve_migrates_only_when_told_to(empty_database_url: str, make_live_server: Any, vector_schema: str) -> None:
    server = make_live_server(empty_database_url, wait=False, PGSHELF_VECTOR_SCHEMA=vector_schema)
    answer = answer_of(f"{server.url}/ready")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "pgshelf migrate" in answer.json()["detail"]
    assert tables(empty_database_url) == []
    make_live_server(empty_database_url, PGSHELF_AUTO_MIGRATE="true", PGSHELF_VECTOR_SCHEMA=vector_schema)
    # the one that was there goes on, without a restart
    assert answer_of(f"{server.url}/ready").status_code == 200


@pytest.mark.watched
def test_serve_fails_when_it_cannot_migrate(make_live_server: Any) -> None:
    server = make_live_server("postgresql://nobody@127.0.0.1:1/x", wait=False, PGSHELF_AUTO_MIGRATE="true")
    assert server.process.wait(30) == 1
    assert "pgshelf: " in server.output and "Traceback" not in server.output


def test_other_machines_reach_it_when_that_is_said(database_url: str, make_live_server: Any) -> None:
    host = "0.0.0.0"  # noqa: S104 - said twice, as it must be
    server = make_live_server(database_url, "--host", host, PGSHELF_ALLOW_UNAUTHENTICATED="true")
    assert httpx2.get(f"{server.url}/health").json()["status"] == "ok"


def answer_of(address: str, seconds: float = 30) -> httpx2.Response:
    """The first answer that comes at all."""
    deadline = time.monotonic() + seconds
    with httpx2.Client() as client:
        while True:
            try:
                return client.get(address)
            except httpx2.TransportError:
                assert time.monotonic() < deadline, "no answer"
                time.sleep(0.05)


def test_reload_serves_changed_code(database_url: str, make_live_server: Any) -> None:
    server = make_live_server(database_url, "--reload")
    [before] = workers_of(server.process.pid)
    os.utime(Path(pgshelf.__file__))
    assert ended([before], 20)
    server.wait_until_ready()
    [after] = workers_of(server.process.pid)
    assert after.pid != before.pid
    assert server.stop() == 0


def test_a_killed_worker_is_replaced(database_url: str, make_live_server: Any) -> None:
    server = make_live_server(database_url, "--workers", "2")
    victim, other = workers_of(server.process.pid)
    victim.kill()
    deadline = time.monotonic() + 20
    while {each.pid for each in workers_of(server.process.pid)} <= {victim.pid, other.pid} or len(
        workers_of(server.process.pid)
    ) < 2:
        assert time.monotonic() < deadline, server.output
        time.sleep(0.05)
    server.wait_until_ready()
    assert other.is_running()
    assert server.stop() == 0


# -- serve, on the PostgreSQL that it brings


@pytest.fixture(scope="module")
def version(postgres_version: int) -> int:
    return postgres_version if postgres_version in embedded.VERSIONS else 18


@pytest.fixture(scope="module")
def data_dir(version: int) -> Iterator[Path]:
    """One cluster for all tests here: initdb takes longer than what they do."""
    directory = Path(tempfile.mkdtemp(prefix="pgshelf-test-", dir=in_memory()))
    yield directory / "data"
    with embedded.start(directory / "data", version):
        pass  # whatever a failed test left running has no other user now
    shutil.rmtree(directory)


Serve = Callable[..., Any]


@pytest.fixture
def serve(make_live_server: Any, data_dir: Path, version: int) -> Serve:
    def start(*arguments: str, **options: Any) -> Any:
        # the option wins over the environment's
        environment = {"PGSHELF_POSTGRES_VERSION": str(version)}
        return make_live_server(None, "--data-dir", str(data_dir), *arguments, **environment, **options)

    return start


@pytest.fixture
def postmaster(data_dir: Path, version: int) -> Callable[[], int | None]:
    return lambda: embedded.EmbeddedServer(data_dir, version, {}, 10).pid


def write(server: Any, key: str) -> None:
    httpx2.post(f"{server.url}/v1/libraries", json={"name": "notes"})  # 409 when it is there
    answer = httpx2.put(f"{server.url}/v1/libraries/notes/documents/{key}", json={"text": f"the text of {key}"})
    assert answer.status_code in (200, 201), answer.text


def read(server: Any, key: str) -> str:
    answer = httpx2.get(f"{server.url}/v1/libraries/notes/documents/{key}/chunks")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["items"][0]["text"])


@bundled
@pytest.mark.watched
def test_it_brings_its_own_database_and_stops_it(
    serve: Serve, postmaster: Callable[[], int | None], data_dir: Path, run: Run, version: int
) -> None:
    started = time.monotonic()
    server = serve()
    first = time.monotonic() - started  # with all that is made once
    write(server, "kept")
    [line] = [line for line in server.output.splitlines() if line.startswith("  psql ")]
    psql = subprocess.run([*shlex.split(line)[1:], "-Atc", "select library from pgshelf.documents_view"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert psql.stdout == "notes\n"
    assert f"PostgreSQL {version}, bundled, in {data_dir}" in server.output

    assert server.stop() == 0
    assert postmaster() is None
    assert not (data_dir / "postgres" / "postmaster.pid").exists()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")

    started = time.monotonic()
    again = serve(port=server.port)
    assert time.monotonic() - started < max(10, first)
    assert read(again, "kept") == "the text of kept"

    # other commands join the running server and leave it running
    options = ["--data-dir", str(data_dir)]
    result = run("doctor", *options, PGSHELF_POSTGRES_VERSION=str(version))
    assert (result.exit_code, lines(result, "fail")) == (0, [])
    assert run("migrate", *options, PGSHELF_POSTGRES_VERSION=str(version)).exit_code == 0
    assert read(again, "kept") == "the text of kept"


@bundled
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_signal_ends_it_cleanly_while_it_works(
    serve: Serve, postmaster: Callable[[], int | None], how: signal.Signals
) -> None:
    server = serve()
    write(server, "a")
    server.process.send_signal(how)
    started = time.monotonic()
    assert server.process.wait(20) == 0
    assert time.monotonic() - started < 10
    assert postmaster() is None
    assert "Traceback" not in server.output


@bundled
def test_a_killed_parent_leaves_a_way_to_start_again(serve: Serve, postmaster: Callable[[], int | None]) -> None:
    server = serve("--workers", "2")
    write(server, "before")
    workers = workers_of(server.process.pid)
    assert len(workers) == 2
    server.process.kill()
    assert ended(workers, 2), "workers outlive their parent and hold the port"
    assert postmaster() is not None, "nobody was left to stop it"

    again = serve(port=server.port)
    assert read(again, "before") == "the text of before"
    write(again, "after")
    assert again.stop() == 0
    assert postmaster() is None


@bundled
@pytest.mark.watched
def test_a_killed_postgres_comes_back_by_itself(serve: Serve, postmaster: Callable[[], int | None]) -> None:
    server = serve()
    write(server, "before")
    pid = postmaster()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    seen: set[int] = set()
    deadline = time.monotonic() + 30
    with httpx2.Client(base_url=server.url) as client:
        while 200 not in seen or postmaster() in (None, pid):
            with contextlib.suppress(httpx2.ReadTimeout):
                seen.add(client.get("/v1/libraries/notes/documents/before").status_code)
            assert time.monotonic() < deadline, server.output
            time.sleep(0.02)
    assert seen <= {200, 503}
    server.wait_until_ready()
    write(server, "after")
    assert read(server, "before") == "the text of before"
    assert server.stop() == 0
    assert postmaster() is None


def test_doctor_says_which_embedders_are_set_up(run: Run, database_url: str, cohere_server: CohereServer) -> None:
    with psycopg.connect(database_url) as connection:
        for name in ("a", "b"):
            connection.execute(
                """insert into pgshelf.libraries (name, dimension, embedder, chunking) values (%s, 256,
                '{"provider": "cohere", "model": "embed-v4.0", "dimension": 256}', '{"size": 1200, "overlap": 0}')""",
                [name],
            )
    known = {"PGSHELF_COHERE_API_KEY": cohere_server.key, "PGSHELF_COHERE_BASE_URL": cohere_server.url}
    result = run("doctor", url=database_url)
    assert (
        "the embedder of 2 libraries, cohere embed-v4.0 (256 dimensions), cannot be used: embedding through Cohere"
        " needs PGSHELF_COHERE_API_KEY on the server"
    ) in lines(result, "warn")
    assert "the embedder by default, local, is set up" in lines(result, "ok")
    result = run("doctor", url=database_url, **known)
    assert "the embedder of 2 libraries, cohere embed-v4.0 (256 dimensions), is set up" in lines(result, "ok")
    assert "the embedder by default, cohere, is set up" in lines(result, "ok")
    assert cohere_server.asked == []
    result = run("doctor", "--providers", url=database_url, **known)
    answered = [line for line in lines(result, "ok") if "answered in" in line]
    assert result.exit_code == 0 and len(answered) == 2
    cohere_server.fail(status(401), status(401))
    result = run("doctor", "--providers", url=database_url, **known)
    refused = "(256 dimensions), does not work: Cohere refused the key in PGSHELF_COHERE_API_KEY (status 401)"
    assert result.exit_code == 1 and any(refused in line for line in lines(result, "fail"))
    assert cohere_server.key not in result.output


def test_doctor_asks_an_endpoint_of_openais_api(run: Run, database_url: str, openai_server: OpenAIServer) -> None:
    known = {"PGSHELF_EMBEDDER": "openai", "PGSHELF_OPENAI_API_KEY": openai_server.key}
    [lacking] = [line for line in lines(run("doctor", url=database_url, **known), "warn") if "embedder" in line]
    assert "openai, cannot be used" in lacking and "PGSHELF_OPENAI_BASE_URL" in lacking
    known |= {"PGSHELF_EMBEDDER_MODEL": "bge-of-tests", "PGSHELF_OPENAI_BASE_URL": openai_server.base_url}
    result = run("doctor", url=database_url, **known)
    assert "the embedder by default, openai bge-of-tests, is set up" in lines(result, "ok")
    assert openai_server.asked == []
    result = run("doctor", "--providers", url=database_url, **known)
    assert result.exit_code == 0 and "openai bge-of-tests, answered in" in result.output
