"""Files of documents: NDJSON, CSV and Parquet, read and written row by row, NDJSON and CSV also packed by gzip."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import math
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    import pyarrow

STDIO = "-"
SUFFIXES = {
    ".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".pq": "parquet",
}  # fmt: skip
FORMATS = ("ndjson", "csv", "parquet")
TEXTS = ("key", "title", "text", "source")
JSON_FIELDS = ("embedding", "metadata", "chunks")
LINE_BYTES = 64 * 1024 * 1024  # of a line, and characters of a CSV field: what is longer is no document
ROWS = 500  # of Parquet, read or written at a time
HEAD = 64 * 1024
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class FileError(Exception):
    """A file that cannot be read or written at all; the message says why."""


class Line(bytes):
    """A document as a line of JSON; `place` is its number in the file, from 1."""

    place: int


class Row(dict[str, Any]):
    """A document from a row; `place` is the number of its line, or of its row in Parquet, from 1."""

    place: int


class Rejected(msgspec.Struct, frozen=True):
    """A line that is no document, and why."""

    place: int
    detail: str


class Columns(msgspec.Struct, frozen=True):
    """What the columns of a table are: fields of a document by `names`, else by their own name, else metadata."""

    names: Mapping[str, str] = {}
    infer: bool = False

    def field(self, column: str) -> str | None:
        """The field that a column is: one of a document's, `metadata.NAME`, or None for one that is left out."""
        field = self.names.get(column, column)
        if field == "":
            return None
        return field if field in (*TEXTS, *JSON_FIELDS) or field.startswith("metadata.") else f"metadata.{field}"


def format_of(name: str, given: str | None) -> tuple[str, bool]:
    """The format of a file and whether it is packed, by its name unless the format is `given`."""
    packed = name.lower().endswith(".gz")
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    found = given or SUFFIXES.get(suffix) or ("ndjson" if name == STDIO else None)
    if found is None:
        raise FileError(
            f"{name}: the name does not say whether it is NDJSON, CSV or Parquet; say so with --format."
            " Texts end in .txt, .md, .html or .rst"
        )
    if found == "parquet" and packed:
        raise FileError(f"{name}: Parquet is packed inside; leave the .gz out")
    return found, packed


def fingerprint(path: Path, *more: Any) -> str:
    """Stays while a file does: of its place, size, time and beginning, and of what else decides what it says."""
    status = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(HEAD)).hexdigest()
    told = (str(path.resolve()), status.st_size, status.st_mtime_ns, head, more)
    return hashlib.sha256(msgspec.json.encode(told)).hexdigest()


Item = Line | Row | Rejected
Stream = IO[bytes] | gzip.GzipFile


class Source:
    """A file that documents are read from; `done` of `total` bytes or rows are read, 0 if nobody knows how many."""

    def __init__(self, name: str, given: str | None, columns: Columns, delimiter: str | None) -> None:
        self.name = name
        self.format, self.packed = format_of(name, given)
        if self.format == "parquet" and name == STDIO:
            raise FileError("Parquet cannot be read from a pipe; name a file")
        self.columns = columns
        self.delimiter = delimiter or ("\t" if ".tsv" in Path(name.lower()).suffixes else ",")
        self.total = 0
        self._file: IO[bytes] | None = None
        self._rows = 0

    @property
    def done(self) -> int:
        """How much is read."""
        if self._file is None:
            return self._rows
        return self.total if self._file.closed else self._file.tell()

    def items(self) -> Iterator[Item]:
        """The documents in order, and the lines that are none."""
        place = 0
        try:
            with contextlib.ExitStack() as stack:
                if self.format == "parquet":
                    found = self._parquet()
                else:
                    raw = sys.stdin.buffer if self.name == STDIO else stack.enter_context(Path(self.name).open("rb"))
                    if self.name != STDIO:
                        self._file, self.total = raw, os.fstat(raw.fileno()).st_size
                    stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if self.packed else raw
                    found = json_lines(stream) if self.format == "ndjson" else self._csv(stream)
                for item in found:
                    place = item.place
                    yield item
        except OSError as error:  # a file that gzip did not make is one
            raise FileError(f"{self.name}: {error.strerror or error}") from None
        except (EOFError, zlib.error) as error:
            raise FileError(f"{self.name}: damaged behind line {place}: {error}") from None

    def _csv(self, stream: Stream) -> Iterator[Item]:
        csv.field_size_limit(LINE_BYTES)
        # what is no UTF-8 is one row's fault
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=self.delimiter)
        header = next(reader, [])
        if not header:
            raise FileError(f"{self.name}: no header; the first line names the columns")
        if len({*header}) < len(header):
            raise FileError(f"{self.name}: the header names a column twice")
        fields = self._fields(header)
        while True:
            place = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Rejected(place, f"is no CSV: {error}")
                continue
            if values is None:
                break
            if values:
                yield csv_row(place, values, fields, self.columns.infer)
        text.detach()

    def _fields(self, columns: list[str]) -> list[str | None]:
        if unknown := self.columns.names.keys() - set(columns):
            raise FileError(f"{self.name}: has no column {', '.join(sorted(unknown))}; there are {', '.join(columns)}")
        return [self.columns.field(column) for column in columns]

    def _parquet(self) -> Iterator[Item]:
        arrow, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(self.name) as file:
                self.total = file.metadata.num_rows
                fields = self._fields(file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=ROWS):
                    yield from parquet_rows(self._rows, batch, fields)
                    self._rows += batch.num_rows
        except arrow.ArrowException as error:
            raise FileError(f"{self.name}: {error}") from None


def json_lines(stream: Stream) -> Iterator[Line | Rejected]:
    """The lines of a file that are not empty; one that would fill the memory is passed over."""
    place = 0
    while line := stream.readline(LINE_BYTES):
        place += 1
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(LINE_BYTES)
            yield Rejected(place, f"has more than {LINE_BYTES} bytes")
            continue
        if place == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if stripped := line.strip():
            found = Line(stripped)
            found.place = place
            yield found


def csv_row(place: int, values: list[str], fields: list[str | None], infer: bool) -> Row | Rejected:
    """A document from the fields of a line; an empty one is absent."""
    if len(values) != len(fields):
        return Rejected(place, f"has {len(values)} fields, the header {len(fields)}")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return Rejected(place, "is not UTF-8")
    given = [(field, value) for field, value in zip(fields, values, strict=True) if field and value]
    return row(place, [(field, inferred(value) if infer and "." in field else value) for field, value in given])


def inferred(text: str) -> Any:
    """A number or a truth value where the text is one as JSON writes it."""
    if text in ("true", "false"):
        return text == "true"
    return msgspec.json.decode(text) if NUMBER.fullmatch(text) else text


def parquet_rows(before: int, batch: pyarrow.RecordBatch, fields: list[str | None]) -> Iterator[Row | Rejected]:
    """Documents from a batch of rows; null and NaN are absent."""
    columns = [
        (field, vectors(column) if field == "embedding" else column.to_pylist())
        for field, column in zip(fields, batch.columns, strict=True)
        if field
    ]
    for index in range(batch.num_rows):
        values = [(field, column[index]) for field, column in columns]
        yield row(before + index + 1, [(field, value) for field, value in values if not absent(value)])


def absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def vectors(column: pyarrow.Array) -> list[Any]:
    """The values of a column of vectors: arrays, which need no Python number for each of their numbers."""
    import pyarrow.types as types

    listed = types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type)
    if not listed or not types.is_floating(column.type.value_type):
        return list(column.to_pylist())
    return [each.values.to_numpy(zero_copy_only=False) if each.is_valid else None for each in column]


def row(place: int, values: Iterable[tuple[str, Any]]) -> Row | Rejected:
    """A document from its fields; a text with an embedding is the one chunk of its document."""
    document, metadata = Row(), dict[str, Any]()
    document.place = place
    try:
        for field, value in values:
            if field in TEXTS:
                document[field] = as_text(field, value)
            elif field in JSON_FIELDS:
                document[field] = as_json(field, value)
            else:
                metadata[field.removeprefix("metadata.")] = value
    except ValueError as error:
        return Rejected(place, str(error))
    if metadata:
        document["metadata"] = {**document.get("metadata", {}), **metadata}
    if "embedding" in document:
        if "text" not in document or "chunks" in document:
            return Rejected(place, "embedding: belongs to a text, and there is none, or there are chunks too")
        document["chunks"] = [{"text": document.pop("text"), "embedding": document.pop("embedding")}]
    return document


def as_text(field: str, value: Any) -> str:
    if isinstance(value, (dict, list, bytes)):
        raise ValueError(f"{field}: is a text, not {type(value).__name__}")
    return str(value)


def as_json(field: str, value: Any) -> Any:
    """What a column holds as JSON, or has the form of already."""
    kinds = {"embedding": list[float], "metadata": dict[str, Any], "chunks": list[dict[str, Any]]}
    if field == "embedding" and hasattr(value, "tolist"):
        return value
    try:
        found = msgspec.json.decode(value) if isinstance(value, str) else value
        if field == "chunks":
            found = [chunk(each) for each in msgspec.convert(found, kinds[field])]
        return msgspec.convert(found, kinds[field])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{field}: {error}") from None


def chunk(fields: dict[str, Any]) -> dict[str, Any]:
    """A chunk without what it lacks; its metadata may be JSON."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "metadata" in given:
        given["metadata"] = as_json("metadata", given["metadata"])
    return given


class Writer(Protocol):
    """Writes documents, given as lines of JSON."""

    def write(self, line: bytes) -> None: ...


class JsonWriter:
    """Writes lines as they are."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def write(self, line: bytes) -> None:
        """Write one document."""
        self.stream.write(line + b"\n")


class Exported(msgspec.Struct):
    key: str | None = None
    title: str | None = None
    source: str | None = None
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    chunks: msgspec.Raw = msgspec.Raw(b"[]")


class ExportedChunk(msgspec.Struct):
    text: str
    embedding: list[float] | None = None
    metadata: msgspec.Raw = msgspec.Raw(b"{}")


class _Rows:
    """Ends rows by a newline alone: Python 3.11 quotes a carriage return only where the end of a row holds one."""

    def __init__(self, text: IO[str]) -> None:
        self.text = text

    def write(self, row: str) -> None:
        """Write one row."""
        self.text.write(row.removesuffix("\r\n") + "\n")


class CsvWriter:
    """Writes a line for each document; metadata and chunks are JSON in it."""

    def __init__(self, stream: Stream) -> None:
        self.text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        self.csv = csv.writer(_Rows(self.text), lineterminator="\r\n")
        self.csv.writerow(Exported.__struct_fields__)

    def write(self, line: bytes) -> None:
        """Write one document."""
        found = msgspec.json.decode(line, type=Exported)
        values = (found.key, found.title, found.source, bytes(found.metadata).decode(), bytes(found.chunks).decode())
        self.csv.writerow(values)


class ParquetWriter:
    """Writes a row for each document, its chunks as a list; metadata is JSON."""

    def __init__(self, stream: Stream) -> None:
        self.arrow, parquet = _pyarrow()
        text = self.arrow.string()
        passage = [("text", text), ("embedding", self.arrow.list_(self.arrow.float32())), ("metadata", text)]
        columns = [(name, text) for name in ("key", "title", "source", "metadata")]
        chunks = ("chunks", self.arrow.list_(self.arrow.struct(passage)))
        self.schema = self.arrow.schema([*columns, chunks])
        self.file = parquet.ParquetWriter(stream, self.schema, compression="zstd")
        self.rows: list[dict[str, Any]] = []

    def write(self, line: bytes) -> None:
        """Write one document."""
        found = msgspec.json.decode(line, type=Exported)
        row = {name: getattr(found, name) for name in ("key", "title", "source")}
        chunks = msgspec.json.decode(found.chunks, type=list[ExportedChunk])
        passages = [
            {"text": chunk.text, "embedding": chunk.embedding, "metadata": bytes(chunk.metadata).decode()}
            for chunk in chunks
        ]
        self.rows.append({**row, "metadata": bytes(found.metadata).decode(), "chunks": passages})
        if len(self.rows) == ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are at hand."""
        self.file.write_batch(self.arrow.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows = []

    def close(self) -> None:
        """Write the end of the file."""
        self.flush()
        self.file.close()


@contextlib.contextmanager
def writing(name: str, given: str | None) -> Iterator[Writer]:
    """A writer into a file, which has its name only when it is whole; or to standard output."""
    kind, packed = format_of(name, given)
    with _replacing(Path(name)) if name != STDIO else contextlib.nullcontext(sys.stdout.buffer) as raw:
        # the same documents make the same file: without the time
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        if kind == "ndjson":
            yield JsonWriter(stream)
        elif kind == "csv":
            table = CsvWriter(stream)
            yield table
            table.text.flush()
            table.text.detach()
        else:
            rows = ParquetWriter(stream)
            yield rows
            rows.close()
        if packed:
            stream.close()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place when all is written, and is gone when that fails."""
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as file:
            try:
                yield file.file
                file.flush()
                os.fsync(file.fileno())
                umask = os.umask(0)
                os.umask(umask)
                Path(file.name).chmod(0o666 & ~umask)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise FileError("Parquet needs pyarrow: pip install 'pgshelf[parquet]'") from None
    return pyarrow, pyarrow.parquet
