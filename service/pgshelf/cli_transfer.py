"""The commands that move files of documents: import, export."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
import msgspec

from pgshelf.console import URL, Failure, connected, json_object, printable
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from pgshelf.text_files import Texts
    from pgshelf.transfer import Line, Row, Source
    from pgshelf_client import Client, ImportFailure, ImportProgress, ImportResult

RETRIES = 12  # half a minute: a server may start again meanwhile
SHOWN = 20  # bad lines that are printed; --rejects has them all
EVERY = 5.0  # seconds between two lines of progress where nobody watches


def _mapped(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.rpartition("=") for value in values]
    if not all(column for column, _, _ in pairs):
        raise click.BadParameter("needs COLUMN=FIELD", param=option)
    return {column: field for column, _, field in pairs}


FORMAT = click.option(
    "--format", "kind", type=click.Choice(["ndjson", "csv", "parquet"]), help="If the name does not say it."
)


@click.command("import")
@click.argument("library")
@click.argument("files", nargs=-1, required=True, metavar="FILE|FOLDER...")
@FORMAT
@click.option("--map", "names", multiple=True, metavar="COLUMN=FIELD", callback=_mapped, help="See above.")
@click.option("--infer", is_flag=True, help="CSV: numbers, true and false in metadata are no text.")
@click.option("--delimiter", help="CSV: what is between two fields.  [default: a comma; in .tsv a tab]")
@click.option("--create", is_flag=True, help="Make the library if it is missing.")
@click.option("--embedder", metavar="PROVIDER[:MODEL]", help="With --create; `none`: the files have the vectors.")
@click.option("--dimension", type=int, help="With --create: how many numbers a vector has.")
@click.option("--metric", type=click.Choice(["cosine", "l2", "inner_product", "l1"]), help="With --create.")
@click.option("--wait/--no-wait", default=None, help="Embed before a batch is committed, or leave it to the worker.")
@click.option("--parallel", default=1, show_default=True, type=click.IntRange(1, 32), help="Requests at a time.")
@click.option("--rejects", type=click.Path(dir_okay=False, path_type=Path), help="Add all bad lines to this file.")
@click.option("--restart", is_flag=True, help="Import all of it, whatever an earlier run has imported.")
@URL
@click.pass_obj
def import_command(
    settings: Callable[[], Settings],
    /,
    library: str,
    files: tuple[str, ...],
    kind: str | None,
    names: dict[str, str],
    infer: bool,
    delimiter: str | None,
    create: bool,
    embedder: str | None,
    dimension: int | None,
    metric: str | None,
    wait: bool | None,
    parallel: int,
    rejects: Path | None,
    restart: bool,
    url: str | None,
) -> None:
    """Import documents from files into LIBRARY of a running service; - is standard input.

    NDJSON has a document in each line. CSV and Parquet have one in each row: the columns key, title, source, text,
    embedding (of the text), metadata and chunks (these three JSON) are the document's, all others become metadata.
    --map says otherwise: --map body=text --map id=key --map team=metadata.group --map notes= (left out).

    Files that end in .txt, .md, .html or .rst are a document each, and of a folder all that are below it: the key is
    the path from there, the title the first heading.

    The same command again goes on where an import ended, however that was, and imports nothing twice while the file
    stays as it is. Bad lines are listed and spoil no others; the exit status is 1 when there were some.
    """
    from pgshelf.text_files import Texts, is_texts
    from pgshelf.transfer import Columns, FileError, Source

    if not create and (embedder or dimension or metric):
        raise click.UsageError("--embedder, --dimension and --metric need --create.")
    if delimiter is not None and len(delimiter) != 1:
        raise click.UsageError("--delimiter is one character.")
    bad, options = Rejects(rejects, restart), {"wait": wait, "parallel": parallel}
    try:
        sources = [
            Texts(name) if kind is None and is_texts(name) else Source(name, kind, Columns(names, infer), delimiter)
            for name in files
        ]
        with connected(settings(), url) as client:  # says soon that nobody is there
            if create:
                _create(client, library, embedder, dimension, metric)
            client.get_library(library)
        with bad, connected(settings(), url, RETRIES) as client:
            for source in sources:
                _import(client, library, source, bad, name=None if restart else _name(source), **options)
    except FileError as error:
        raise Failure(str(error)) from None
    bad.summary()
    sys.exit(1 if bad.count else 0)


def _create(client: Client, library: str, embedder: str | None, dimension: int | None, metric: str | None) -> None:
    from pgshelf_client import Conflict

    provider, _, model = (embedder or "").partition(":")
    wanted: dict[str, Any] = {"provider": provider, **({"model": model} if model else {})}
    if dimension is not None and provider not in ("", "none"):
        wanted["dimension"], dimension = dimension, None
    try:
        client.create_library(library, embedder=wanted if provider else None, dimension=dimension, metric=metric)
        click.echo(f"made the library {library}", err=True)
    except Conflict:
        return  # it is there


def _name(source: Source | Texts) -> str | None:
    """The same as long as the file and what is made of it stay the same; what comes through a pipe has none."""
    from pgshelf.text_files import Texts
    from pgshelf.transfer import STDIO, FileError, fingerprint

    if isinstance(source, Texts):
        return source.fingerprint()
    if source.name == STDIO:
        return None
    columns = source.columns
    told = (source.format, sorted(columns.names.items()), columns.infer, source.delimiter)
    try:
        path = Path(source.name)
        return fingerprint(path, *told) if path.is_file() else None
    except OSError as error:
        raise FileError(f"{source.name}: {error.strerror}") from None


def _import(client: Client, library: str, source: Source | Texts, bad: Rejects, **options: Any) -> None:
    from pgshelf.transfer import Rejected

    def documents() -> Iterator[Line | Row]:
        for item in source.items():
            if isinstance(item, Rejected):
                bad.add(source.name, item.place, None, item.detail)
            else:
                yield item

    def refused(failure: ImportFailure) -> None:
        places = [f"{place.path}: {place.message}" for place in failure.errors if place.message not in failure.detail]
        said = "; ".join([failure.detail or failure.code, *places])
        bad.add(source.name, failure.document.place, failure.key, said, failure.code)

    with _progress(source) as progress:
        result = client.import_documents(library, documents(), progress=progress, on_failure=refused, **options)
    click.echo(f"{source.name}: {_counted(result, bad.of(source.name))}")


def _counted(result: ImportResult, failed: int) -> str:
    parts = [f"{result.created} created", f"{result.replaced} replaced"]
    more = {
        "dealt with by an earlier run (--restart imports them again)": result.skipped,
        "waiting for embeddings": result.pending,
        "failed": failed,
    }
    return ", ".join([*parts, *(f"{count} {what}" for what, count in more.items() if count)])


class Rejects:
    """The bad lines: the first ones to be shown at the end, all of them into a file while they come."""

    def __init__(self, path: Path | None, anew: bool) -> None:
        self.path = path
        self.anew = anew
        self.count = 0
        self.counts: dict[str, int] = {}
        self.shown: list[str] = []
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Rejects:
        if self.path:
            try:
                # an import that is gone on with told of the lines before already
                self.file = self.path.open("wb" if self.anew else "ab", buffering=0)
            except OSError as error:
                raise Failure(f"{self.path}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def of(self, name: str) -> int:
        """How many lines of a file were bad."""
        return self.counts.get(name, 0)

    def add(self, name: str, place: int, key: str | None, detail: str, code: str = "not_a_document") -> None:
        """A bad line."""
        self.count += 1
        self.counts[name] = self.of(name) + 1
        if len(self.shown) < SHOWN:
            of_key = "" if key is None else f" {key!r}"
            self.shown.append(printable(f"{name}:{place}{of_key}: {detail}"))
        if self.file:
            told = {"file": name, "line": place, "key": key, "code": code, "detail": detail}
            self.file.write(msgspec.json.encode(told) + b"\n")

    def summary(self) -> None:
        """Show the first ones."""
        for line in self.shown:
            click.echo(line, err=True)
        if self.count > len(self.shown):
            where = f"all are in {self.path}" if self.path else "--rejects FILE keeps them all"
            click.echo(f"and {self.count - len(self.shown)} more bad lines; {where}", err=True)


@contextlib.contextmanager
def _progress(source: Source | Texts) -> Iterator[Callable[[ImportProgress], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _lines_now_and_then(source)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(printable(Path(source.name).name), total=None, said="")

        def told(progress: ImportProgress) -> None:
            said = f"{progress.documents} documents" + (f", {progress.failed} failed" if progress.failed else "")
            bar.update(task, total=source.total or None, completed=source.done, said=said)

        yield told


def _lines_now_and_then(source: Source | Texts) -> Callable[[ImportProgress], None]:
    last = time.monotonic()

    def told(progress: ImportProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            share = f", {source.done / source.total:.0%}" if source.total else ""
            click.echo(f"{source.name}: {progress.documents} documents{share}", err=True)

    return told


@click.command("export")
@click.argument("library")
@click.argument("file", default="-")
@FORMAT
@click.option("--no-embeddings", is_flag=True, help="Leave the vectors out.")
@click.option("--filter", "condition", metavar="JSON", callback=json_object, help='Such as {"year": {"$gte": 2020}}.')
@URL
@click.pass_obj
def export_command(
    settings: Callable[[], Settings],
    /,
    library: str,
    file: str,
    kind: str | None,
    no_embeddings: bool,
    condition: dict[str, Any] | None,
    url: str | None,
) -> None:
    """Export the documents of LIBRARY of a running service to FILE, or to standard output.

    All are of one moment. `import` takes the file again. It has its name only when it is whole.
    """
    from pgshelf.transfer import STDIO, FileError, writing

    count = 0
    with connected(settings(), url) as client:
        lines = client.export_lines(library, filter=condition, embeddings=not no_embeddings)
        try:
            with contextlib.closing(lines), writing(file, kind) as writer:  # type: ignore[type-var]  # a generator
                for line in lines:
                    writer.write(line)
                    count += 1
        except FileError as error:
            raise Failure(str(error)) from None
    if file != STDIO:
        click.echo(f"{file}: {count} documents")
