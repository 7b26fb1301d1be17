"""`pgshelf import` and `pgshelf export` against a running service."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from pgshelf import cli_transfer
from pgshelf.cli import main
from pgshelf.transfer import Columns, Source
from pgshelf_client import Client, ImportProgress
from tests.conftest import LiveServer

VECTORS = ("--create", "--embedder", "none", "--dimension", "3")
Run = Callable[..., Result]


@pytest.fixture
def run(served: LiveServer) -> Run:
    """Runs a command against the service: run("export", "notes", status=0)."""

    def invoke(*arguments: str | Path, status: int = 0, input: bytes | None = None) -> Result:
        environment = {name: None for name in os.environ if name.startswith("PGSHELF_")}
        options = [*map(str, arguments), "--url", served.url]
        result = CliRunner().invoke(main, options, env={**environment, "PGSHELF_LOG_LEVEL": "error"}, input=input)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    return invoke


def documents(count: int, keyed: int = 2) -> list[dict[str, Any]]:
    """Documents with vectors, of which every `keyed`th has a key."""
    return [
        {
            **({} if number % keyed else {"key": f"k{number}"}),
            "metadata": {"n": number},
            "chunks": [{"text": f"document {number}", "embedding": [1, number / 1000, 0.1]}],
        }
        for number in range(count)
    ]


def lines(items: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in items)


STRANGE: list[dict[str, Any]] = [
    {"key": "a/b %", "title": "Größe", "source": "s", "metadata": {"a": {"b": [1, None, "\u2028"]}, "x": 1.50},
     "chunks": [{"text": "one\r\n\ntwo, \"three\"", "embedding": [1e-7, 0.1, -3]},
                {"text": "t", "embedding": [1, 2, 3]}]},
    {"metadata": {}, "chunks": []},
    *({"title": title, "source": title, "chunks": []} for title in ("a\rb", "a\r\nb", "a\nb", 'a "b"', "a,b;c\td")),
    {"title": "=1+1", "chunks": [{"text": " x ", "embedding": [0.3, 0, 1], "metadata": {"page": 7, "big": 10**20}}]},
]  # fmt: skip


@pytest.mark.parametrize("suffix", ["ndjson", "ndjson.gz", "csv", "csv.gz", "parquet"])
def test_export_import_export_is_equal(run: Run, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "given.jsonl").write_bytes(lines(STRANGE + documents(1200)))
    result = run("import", "one", tmp_path / "given.jsonl", *VECTORS)
    assert result.stdout == f"{tmp_path}/given.jsonl: 1208 created, 0 replaced\n"
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
    assert run("export", "one", first).stdout == f"{first}: 1208 documents\n"
    assert run("import", "two", first, *VECTORS).stderr == "made the library two\n"
    run("export", "two", second)
    assert first.read_bytes() == second.read_bytes()
    exported = run("export", "two").stdout_bytes
    assert exported == run("export", "one", "-").stdout_bytes
    found = [json.loads(line) for line in exported.splitlines()]
    assert [document["metadata"] for document in found[8:]] == [{"n": number} for number in range(1200)]
    assert found[0]["chunks"][0]["text"] == STRANGE[0]["chunks"][0]["text"]


def test_an_export_may_be_of_a_part(run: Run, tmp_path: Path) -> None:
    run("import", "one", "-", *VECTORS, input=lines(documents(20)))
    path = tmp_path / "part.ndjson"
    run("export", "one", path, "--filter", '{"n": {"$lt": 3}}', "--no-embeddings")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [document["metadata"]["n"] for document in found] == [0, 1, 2]
    assert all("embedding" not in chunk for document in found for chunk in document["chunks"])

    table = run("export", "one", "--format", "csv").stdout
    assert len(list(csv.reader(io.StringIO(table)))) == 21
    assert "404 library_not_found" in run("export", "nothing", path, status=1).stderr
    assert len(path.read_text().splitlines()) == 3, "what was there is left"
    assert os.listdir(tmp_path) == ["part.ndjson"]
    assert "no/x.csv: No such file" in run("export", "one", tmp_path / "no/x.csv", status=1).stderr


def test_bad_lines_are_listed_with_their_numbers_and_spoil_nothing(run: Run, tmp_path: Path) -> None:
    good = lines(documents(600)).splitlines()
    bad = {3: b"{no json", 4: b"", 5: b'{"chunks": [{"text": "x", "embedding": [1, 2]}]}', 601: b'{"text": " "}'}
    given = list(good)
    for place, line in bad.items():
        given.insert(place - 1, line)
    path, rejects = tmp_path / "a.ndjson", tmp_path / "bad.ndjson"
    path.write_bytes(b"\n".join(given))
    (tmp_path / "b.csv").write_text('key,text,embedding\nx,t,oops\ny,t\nz,t,"[1,2,3]"\n')
    result = run("import", "notes", path, tmp_path / "b.csv", *VECTORS, "--rejects", rejects, status=1)
    assert result.stdout.splitlines() == [
        f"{path}: 600 created, 0 replaced, 3 failed", f"{tmp_path}/b.csv: 1 created, 0 replaced, 2 failed"
    ]  # fmt: skip
    told = result.stderr.splitlines()[1:]
    assert [line.split(":")[1].split()[0] for line in told] == ["3", "5", "601", "2", "3"]
    assert "could not be decoded" in told[0] and "3" in told[1] and told[4].endswith("has 2 fields, the header 3")
    kept = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(each["file"], each["line"]) for each in kept] == [
        (str(path), 3), (str(path), 5), (str(path), 601), (f"{tmp_path}/b.csv", 2), (f"{tmp_path}/b.csv", 3)
    ]  # fmt: skip
    assert kept[1]["code"] == "wrong_dimension" and kept[4]["code"] == "not_a_document"

    # the good ones are there, once, however often it is said
    result = run("import", "notes", path, tmp_path / "b.csv", "--rejects", rejects, status=1)
    assert "603 dealt with by an earlier run" in result.stdout
    assert len(run("export", "notes").stdout.splitlines()) == 601
    run("import", "notes", path, "--restart", "--rejects", rejects, status=1)
    assert len(run("export", "notes").stdout.splitlines()) == 901, "without keys they are others"
    assert len(rejects.read_text().splitlines()) == 3


def test_of_very_many_bad_lines_the_first_are_shown(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,embedding\n" + "x,oops\n" * 50)
    result = run("import", "notes", path, *VECTORS, status=1)
    assert len(result.stderr.splitlines()) == 22
    assert result.stderr.splitlines()[-1] == "and 30 more bad lines; --rejects FILE keeps them all"
    result = run("import", "notes", path, "--rejects", tmp_path / "bad", status=1)
    assert result.stderr.splitlines()[-1] == f"and 30 more bad lines; all are in {tmp_path}/bad"
    assert "no/bad: No such file" in run("import", "notes", path, "--rejects", tmp_path / "no/bad", status=1).stderr


def test_tables_are_mapped(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("id;body;vector;team;year\n7;Dead rows.;[1,0,0];x;2020\n8;Locks.;[0,1,0];;007\n")
    options = ["--format", "csv", "--delimiter", ";", "--infer", "--map", "id=key", "--map", "body=text"]
    run("import", "notes", path, *VECTORS, *options, "--map", "vector=embedding", "--map", "team=metadata.group")
    found = [json.loads(line) for line in run("export", "notes").stdout.splitlines()]
    assert [(each["key"], each["metadata"], each["chunks"]) for each in found] == [
        ("7", {"year": 2020, "group": "x"}, [{"text": "Dead rows.", "embedding": [1, 0, 0]}]),
        ("8", {"year": "007"}, [{"text": "Locks.", "embedding": [0, 1, 0]}]),
    ]
    table = pa.table({"key": ["7"], "text": ["New."], "embedding": pa.array([[0, 0, 1.0]], pa.list_(pa.float32()))})
    pq.write_table(table, tmp_path / "b.parquet")
    assert "0 created, 1 replaced" in run("import", "notes", tmp_path / "b.parquet").stdout
    assert json.loads(run("export", "notes").stdout.splitlines()[0])["chunks"][0]["text"] == "New."
    packed = gzip.compress(lines(documents(3)))
    (tmp_path / "c.ndjson.gz").write_bytes(packed)
    assert "3 created" in run("import", "notes", tmp_path / "c.ndjson.gz", "--parallel", "3", "--no-wait").stdout


def test_a_library_is_made_if_it_is_missing(run: Run, served: LiveServer) -> None:
    line = lines(documents(1, keyed=1))
    assert "404 library_not_found" in run("import", "notes", "-", input=line, status=1).stderr
    run("import", "notes", "-", *VECTORS, "--metric", "l2", input=line)
    result = run("import", "notes", "-", *VECTORS, input=line)
    assert result.stdout == "-: 0 created, 1 replaced\n" and "made" not in result.stderr
    run(
        "import", "texts", "-", "--create", "--embedder", "local:wordllama-l2-supercat", "--dimension", "128", input=b""
    )
    assert "409 " not in run("import", "a b", "-", "--create", "--embedder", "odd", status=1, input=b"").stderr
    with Client(served.url) as client:
        assert (client.get_library("notes").metric, client.get_library("notes").dimension) == ("l2", 3)
        assert client.get_library("texts").embedder.dimension == 128


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.ndjson", "--dimension", "3"], "need --create"),
        (["a.csv", "--map", "x"], "needs COLUMN=FIELD"),
        (["a.csv", "--delimiter", "ab"], "one character"),
        (["a.csv", "--parallel", "0"], "not in the range"),
        ([], "Missing argument"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, arguments: list[str], said: str) -> None:
    assert said in run("import", "notes", *arguments, status=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.ndjson"], "pgshelf: nothing.ndjson: No such file or directory"),
        (["a.log"], "--format"),
        (["nothing.md"], "nothing.md: No such file"),
        (["empty"], "holds no file that ends in .txt, .md, .html, .rst"),
        (["-", "--format", "parquet"], "pipe"),
        (["a.csv", "nothing.csv"], "nothing.csv: No such file"),
        (["a.csv", "--map", "x=text"], "has no column x"),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_command(
    run: Run, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text('text,embedding\nx,"[1,2,3]"\n')
    (tmp_path / "empty").mkdir()
    result = run("import", "notes", *arguments, *VECTORS, status=1)
    assert said in result.stderr.splitlines()[-1] and result.stderr.splitlines()[-1].startswith("pgshelf: ")


def test_a_folder_of_texts_is_a_document_each(
    run: Run, served: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("manual")
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("Plain words.")
    (folder / "b.md").write_text("---\ntags: x\n---\n\n```sh\n# no heading\n```\n\n## Vacuum ##\n\nDead rows.\n")
    (folder / "deep" / "c.HTML").write_text(
        "<html><head><title>Locks &amp; waits</title><style>p {}</style></head>"
        "<body><h2>Rows</h2><p>One <b>waits</b>.</p>"
    )
    (folder / "deep" / "d.rst").write_text("======\nIndexes\n=======\n\nA tree.\n")
    (folder / "e.md").write_bytes(b"caf\xe9")
    (folder / "f.txt").write_text(" ")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    (folder / ".git" / "g.txt").write_text("hidden")
    result = run("import", "manual", "manual", "--create", "--embedder", "local", status=1)
    assert "manual: 4 created, 0 replaced, 2 failed" in result.stdout
    assert "e.md: is not UTF-8" in result.stderr and "'f.txt'" in result.stderr
    with Client(served.url) as client:
        found = {document.key: document for document in client.documents("manual")}
        assert {key: (document.title, document.source) for key, document in found.items()} == {
            "a.txt": ("a.txt", "manual/a.txt"),
            "b.md": ("Vacuum", "manual/b.md"),
            "deep/c.HTML": ("Locks & waits", "manual/deep/c.HTML"),
            "deep/d.rst": ("Indexes", "manual/deep/d.rst"),
        }
        chunks = list(client.chunks("manual", found["deep/c.HTML"].id))
        assert [chunk.text for chunk in chunks] == ["## Rows\n\nOne waits."]
    assert "dealt with by an earlier run" in run("import", "manual", "manual", status=1).stdout
    assert "1 created" in run("import", "notes", "manual/b.md", "--create", "--embedder", "local").stdout
    with Client(served.url) as client:
        assert [document.key for document in client.documents("notes")] == ["b.md"]


def stored(database_url: str) -> list[int]:
    """The numbers of the documents that are there."""
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("""select (d.metadata ->> 'n')::int from pgshelf.documents d
            join pgshelf.libraries l on l.id = d.library_id
            where l.name = 'notes' and l.deleted_at is null order by 1""").fetchall()
        return [number for (number,) in rows]


def test_a_killed_import_is_gone_on_with_by_the_same_command(
    run: Run, served: LiveServer, shared_database_url: str, tmp_path: Path
) -> None:
    total, path = 5000, tmp_path / "many.ndjson"
    path.write_bytes(lines(documents(total)))
    run("import", "notes", "-", *VECTORS, input=b"")
    command = [str(Path(sys.executable).with_name("pgshelf")), "import", "notes", str(path)]
    command += ["--url", served.url]
    for least in (1, 2000):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(stored(shared_database_url)) < least:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, said
    assert least <= len(stored(shared_database_url)) < total
    result = run("import", "notes", path)
    assert "dealt with by an earlier run" in result.stdout
    assert stored(shared_database_url) == list(range(total)), "each once, also those without a key"


def test_an_import_without_a_server_says_so_soon(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_bytes(b"{}\n")
    started = time.monotonic()
    result = CliRunner().invoke(main, ["import", "x", str(tmp_path / "a.ndjson"), "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1 and "Is pgshelf serve running there?" in result.stderr
    assert time.monotonic() - started < 10


def test_a_file_that_nobody_may_read_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pgshelf.transfer.fingerprint", refuse)
    (tmp_path / "a.ndjson").write_bytes(b"{}\n")
    result = run("import", "notes", tmp_path / "a.ndjson", *VECTORS, status=1)
    assert result.stderr.endswith(f"pgshelf: {tmp_path}/a.ndjson: Permission denied\n")
    assert "Is a directory" in run("import", "notes", tmp_path, "--format", "csv", status=1).stderr


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ndjson"
    monkeypatch.chdir(tmp_path)
    path.write_bytes(b'{"text": "x"}\n' * 10)
    shown: dict[type, str] = {}
    monkeypatch.setattr(cli_transfer, "EVERY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    for kind in (Terminal, io.StringIO):
        source, stream = Source(str(path), None, Columns(), None), kind()
        monkeypatch.setattr(sys, "stderr", stream)
        with cli_transfer._progress(source) as told:
            assert len(list(source.items())) == 10
            told(ImportProgress(documents=10, created=9, failed=1))
        shown[kind] = stream.getvalue()
    assert shown[io.StringIO] == f"{path}: 10 documents, 100%\n"
    assert "100%" in shown[Terminal] and "10 documents, 1 failed" in shown[Terminal]
