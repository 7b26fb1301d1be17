"""Files of documents, without a server: what is read from them, what is refused, what is written."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import stat
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pgshelf import transfer
from pgshelf.transfer import Columns, FileError, Rejected, Source, format_of, writing


def read(path: Path | str, kind: str | None = None, delimiter: str | None = None, **columns: Any) -> list[Any]:
    """The documents of a file as mappings with their places, and what was rejected."""
    found = list[Any]()
    for item in Source(str(path), kind, Columns(**columns), delimiter).items():
        if isinstance(item, Rejected):
            found.append((item.place, item.detail))
        else:
            found.append((item.place, json.loads(item) if isinstance(item, bytes) else dict(item)))
    return found


@pytest.mark.parametrize(
    ("name", "given", "found"),
    [
        ("a.ndjson", None, ("ndjson", False)), ("A.JSONL.GZ", None, ("ndjson", True)), ("-", None, ("ndjson", False)),
        ("x/a.csv.gz", None, ("csv", True)), ("a.tsv", None, ("csv", False)), ("a.pq", None, ("parquet", False)),
        ("a.txt", "csv", ("csv", False)), ("-", "csv", ("csv", False)), ("a.gz", "ndjson", ("ndjson", True)),
    ],
)  # fmt: skip
def test_the_name_says_the_format(name: str, given: str | None, found: tuple[str, bool]) -> None:
    assert format_of(name, given) == found


@pytest.mark.parametrize(("name", "said"), [("a.log", "--format"), ("a.gz", "--format"), ("a.parquet.gz", "packed")])
def test_a_name_that_does_not_say_it_is_refused(name: str, said: str) -> None:
    with pytest.raises(FileError, match=said):
        format_of(name, None)


@pytest.mark.parametrize("packed", [False, True])
def test_ndjson_has_a_document_in_each_line_that_is_not_empty(tmp_path: Path, packed: bool) -> None:
    data = '\ufeff{"text":"a\u2028\x85b"}\r\n\n   \n{"text":"c"}'.encode()
    path = tmp_path / ("a.ndjson" + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read(path) == [(1, {"text": "a\u2028\x85b"}), (4, {"text": "c"})]


def test_a_line_that_would_fill_the_memory_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LINE_BYTES", 10)
    path = tmp_path / "a.ndjson"
    path.write_bytes(b'"' + b"x" * 34 + b'"\n"12345"\n' + b'"1234567"\n' + b"y" * 50)
    assert read(path) == [(1, "has more than 10 bytes"), (2, "12345"), (3, "1234567"), (4, "has more than 10 bytes")]


def test_what_is_no_gzip_or_only_half_of_it_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson.gz"
    path.write_bytes(b'{"text": "plain"}')
    with pytest.raises(FileError, match=r"a\.ndjson\.gz: Not a gzipped file"):
        read(path)
    whole = gzip.compress(os.urandom(5000).hex().encode() + b"\n")
    path.write_bytes(whole[:-2000])
    with pytest.raises(FileError, match="damaged behind line 0"):
        read(path)
    path.write_bytes(whole[:1000] + b"\xff" * 500 + whole[1500:])
    with pytest.raises(FileError, match=r"a\.ndjson\.gz: "):
        list(Source(str(path), None, Columns(), None).items())
    with pytest.raises(FileError, match="No such file"):
        read(tmp_path / "nothing.csv")


CSV = '''\ufeffkey,title,text,source,embedding,year,note
a,A,"two
lines, one comma",s,"[1, 0.5]",2020,
b,,,,,007,"say ""x"""

c,C,only three
d,D,t,s,oops,1,n
e,E,,,[1],1,n
f,F,g\udce9,,,1,n
g,,t,,,-1.5e3,true
'''


def test_csv_has_a_document_in_each_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV.encode("utf-8", "surrogateescape"))
    found = read(path)
    first = {
        "key": "a", "title": "A", "source": "s", "metadata": {"year": "2020"},
        "chunks": [{"text": "two\nlines, one comma", "embedding": [1.0, 0.5]}],
    }  # fmt: skip
    assert found[:3] == [
        (2, first), (4, {"key": "b", "metadata": {"year": "007", "note": 'say "x"'}}),
        (6, "has 3 fields, the header 7"),
    ]  # fmt: skip
    assert found[3][0] == 7 and found[3][1].startswith("embedding: ")
    assert found[4:] == [
        (8, "embedding: belongs to a text, and there is none, or there are chunks too"),
        (9, "is not UTF-8"),
        (10, {"key": "g", "text": "t", "metadata": {"year": "-1.5e3", "note": "true"}}),
    ]
    inferred = [document["metadata"] for _, document in read(path, infer=True) if isinstance(document, dict)]
    assert inferred == [{"year": 2020}, {"year": "007", "note": 'say "x"'}, {"year": -1500.0, "note": True}]


def test_columns_are_what_they_are_mapped_to(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('id\tbody\tteam\tnotes\tmetadata\tchunks\n7\tb\tx\tsecret\t{"a": [1], "group": 0}\t\n'
                    '8\t\t\t\t\t"[{""text"": ""t"", ""embedding"": null, ""metadata"": {""p"": 1}}]"\n'
                    "9\t\t\t\t[]\t\n10\t\t\t\t\t[1]\n")  # fmt: skip
    names = {"id": "key", "body": "text", "team": "metadata.group", "notes": ""}
    found = read(path, names=names)
    assert found[:2] == [
        (2, {"key": "7", "text": "b", "metadata": {"a": [1], "group": "x"}}),
        (3, {"key": "8", "chunks": [{"text": "t", "metadata": {"p": 1}}]}),
    ]
    assert [detail.partition(":")[0] for _, detail in found[2:]] == ["metadata", "chunks"]
    assert read(path, delimiter=",")[0][1] == "has 2 fields, the header 1"
    with pytest.raises(FileError, match="has no column nothing; there are id, body"):
        read(path, names={"nothing": "key"})


@pytest.mark.parametrize(("text", "said"), [("", "no header"), ("a,b,a\n", "names a column twice")])
def test_a_csv_without_a_header_of_use_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(FileError, match=said):
        read(tmp_path / "a.csv")


def test_a_field_that_never_ends_is_one_rows_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LINE_BYTES", 100)
    path = tmp_path / "a.csv"
    path.write_text(f"text\nx\n{'y' * 300}\nz\n")
    try:
        assert read(path) == [
            (2, {"text": "x"}), (3, "is no CSV: field larger than field limit (100)"), (4, {"text": "z"})
        ]  # fmt: skip
    finally:
        csv.field_size_limit(transfer.LINE_BYTES * 1000)


def test_parquet_has_a_document_in_each_row_and_its_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ROWS", 2)
    vector = pa.array([[1.0, 0.5], None, [0.0, 2.0]], pa.list_(pa.float32(), 2))
    moment = datetime.datetime(2024, 5, 31, tzinfo=datetime.UTC)
    table = pa.table({
        "key": [1, 2, 3], "text": ["a", "b", None], "embedding": vector, "year": [2020, None, 2022],
        "score": [float("nan"), 1.5, None], "at": [moment, None, None], "tags": [["x"], [], None],
        "price": [decimal.Decimal("1.20"), None, None],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    (one, first), (two, second), (three, detail) = read(tmp_path / "a.parquet")
    assert (one, two, three) == (1, 2, 3)
    [chunk] = first["chunks"]
    assert (chunk["text"], chunk["embedding"].tolist()) == ("a", [1.0, 0.5])
    assert isinstance(chunk["embedding"], np.ndarray), "no Python number for each number"
    assert first["metadata"] == {"year": 2020, "at": moment, "tags": ["x"], "price": decimal.Decimal("1.20")}
    assert second == {"key": "2", "text": "b", "metadata": {"score": 1.5, "tags": []}}
    assert detail.startswith("embedding: belongs to a text")

    strange = pa.table({"title": [["x"]], "embedding": ["[1]"], "text": ["t"]})
    pq.write_table(strange, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [(1, "title: is a text, not list")]
    mapped = read(tmp_path / "b.parquet", names={"title": ""})
    assert mapped == [(1, {"chunks": [{"text": "t", "embedding": [1.0]}]})]

    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(FileError, match=r"c\.parquet: "):
        read(tmp_path / "c.parquet")
    with pytest.raises(FileError, match="pipe"):
        Source("-", "parquet", Columns(), None)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FileError, match=r"pip install 'pgshelf\[parquet\]'"):
        read(tmp_path / "a.parquet")


def test_a_source_says_how_far_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_bytes(b'{"text": "x"}\n' * 100_000)
    source = Source(str(path), None, Columns(), None)
    items = source.items()
    for _ in range(50_000):
        next(items)
    assert source.total == path.stat().st_size
    assert 0.45 < source.done / source.total < 0.55
    items.close()  # type: ignore[attr-defined]  # a generator
    pq.write_table(pa.table({"text": ["x"] * 1200}), tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), None, Columns(), None)
    assert len(list(source.items())) == source.done == source.total == 1200


LINES = [
    b'{"key":"a","title":"A","source":"s","metadata":{"n": 1, "x": null},"chunks":[{"text":"one\\ntwo","embedding":'
    b'[0.1,-2e-07],"metadata":{"p": 1}},{"text":"\\"q\\", \xc3\xa9\xe2\x80\xa8","embedding":[1,0]}]}',
    b'{"metadata":{},"chunks":[]}',
    b'{"key":"c","metadata":{"big": 12345678901234567890},"chunks":[{"text":"no vector"}]}',
]


@pytest.mark.parametrize("suffix", ["ndjson", "ndjson.gz", "csv", "csv.gz", "parquet"])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ROWS", 2)
    path = tmp_path / f"a.{suffix}"
    for _ in range(2):
        with writing(str(path), None) as writer:
            for line in LINES:
                writer.write(line)
            assert not path.exists() or _, "it has its name when it is whole"
        assert os.listdir(tmp_path) == [path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    again = [document for _, document in read(path)]
    for told, line in zip(again, map(json.loads, LINES), strict=True):
        plain = {name: value for name, value in line.items() if value not in ({}, [])}
        for chunk in (found := {name: value for name, value in told.items() if value not in ({}, [])}).get(
            "chunks", []
        ):
            if not chunk.get("metadata", True):
                del chunk["metadata"]
            if "embedding" in chunk:
                chunk["embedding"] = np.float32(chunk["embedding"]).tolist()
        for chunk in plain.get("chunks", []):
            if "embedding" in chunk:
                chunk["embedding"] = np.float32(chunk["embedding"]).tolist()
        assert found == plain


@pytest.mark.parametrize(
    "field", ["a\rb", "a\r", "\r", "a\r\nb", "\r\n", "a\nb", '"', 'a "b" c', "a,b", "a;b\tc", " a ", "a\\b"]
)
def test_a_csv_field_is_quoted_where_it_must_be(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.csv"
    with writing(str(path), None) as writer:
        writer.write(json.dumps({"key": "k", "title": field, "source": field}).encode())
        writer.write(b'{"key":"behind"}')
    [(_, first), (_, second)] = read(path)
    assert (first["key"], first["title"], first["source"], second["key"]) == ("k", field, field, "behind")
    written = '"' + field.replace('"', '""') + '"' if set(field) & set('\r\n",') else field
    rows = f"k,{written},{written},{{}},[]\nbehind,,,{{}},[]\n"
    assert path.read_bytes().decode() == f"key,title,source,metadata,chunks\n{rows}"


def test_the_same_documents_make_the_same_packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, now in (("a.ndjson.gz", 1.0), ("b.ndjson.gz", 2e9)):
        monkeypatch.setattr("gzip.time", types.SimpleNamespace(time=lambda now=now: now))
        with writing(str(tmp_path / name), None) as writer:
            writer.write(LINES[0])
    assert (tmp_path / "a.ndjson.gz").read_bytes() == (tmp_path / "b.ndjson.gz").read_bytes()


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text("old")
    with pytest.raises(RuntimeError), writing(str(path), None) as writer:
        writer.write(LINES[0])
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.ndjson"]
    with pytest.raises(FileError, match="No such file or directory"), writing(f"{tmp_path}/no/a.csv", None):
        pass


def test_standard_output_takes_what_a_file_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in transfer.FORMATS:
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=out))
        with writing("-", kind) as writer:
            writer.write(LINES[2])
        assert out.getvalue() and not out.closed


def test_a_fingerprint_stays_while_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text("one")
    os.utime(path, (1, 1))
    first = transfer.fingerprint(path, "csv", uuid.UUID(int=1))
    assert transfer.fingerprint(path, "csv", uuid.UUID(int=1)) == first
    assert transfer.fingerprint(path, "ndjson", uuid.UUID(int=1)) != first
    path.write_text("two")
    os.utime(path, (1, 1))
    second = transfer.fingerprint(path, "csv", uuid.UUID(int=1))
    os.utime(path, (2, 2))
    path.rename(tmp_path / "b.ndjson")
    third = transfer.fingerprint(tmp_path / "b.ndjson", "csv", uuid.UUID(int=1))
    assert len({first, second, third}) == 3
