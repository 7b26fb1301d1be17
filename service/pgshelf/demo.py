"""The demo's corpus, questions and output: the documentation of the Python standard library found on this machine."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from pgshelf_client import Client, SearchResult

MAX_CHUNKS = 1000
MAX_TEXT = 4000

# A chunk is a name and the paragraphs that open its docstring: the first, and others up to this many characters. The
# local embedder averages words, so parameters and examples blur what the opening says. Mean reciprocal rank of the
# first right hit over 29 questions: 0.90 at 200, 0.87 at 0 and at 300, 0.82 at 500, 0.85 with whole docstrings.
OPENING = 200

# What a person might ask, and the modules of which one should be among the first three hits.
QUESTIONS: dict[str, frozenset[str]] = {
    "how do I parse command line arguments": frozenset({"argparse"}),
    "read and write JSON": frozenset({"json"}),
    "match text with a regular expression": frozenset({"re"}),
    "store data in an SQLite database": frozenset({"sqlite3"}),
    "measure how long code takes to run": frozenset({"timeit", "time", "profile", "cProfile"}),
    "compress a file": frozenset({"gzip", "bz2", "lzma", "zlib", "zipfile"}),
    "run another program and capture its output": frozenset({"subprocess"}),
    "send an email": frozenset({"smtplib", "email"}),
    "make an HTTP request": frozenset({"urllib.request", "http.client"}),
    "compute a SHA-256 hash": frozenset({"hashlib"}),
    "create a temporary file": frozenset({"tempfile"}),
    "iterate over all combinations of a list": frozenset({"itertools"}),
}

# Not for users of the library, or gone from newer Pythons (PEP 594, PEP 632): the demo is about the same everywhere.
LEFT_OUT = frozenset(
    "antigravity asynchat asyncore aifc audioop cgi cgitb chunk crypt distutils encodings ensurepip idlelib imghdr imp "
    "lib2to3 mailcap msilib nis nntplib ossaudiodev pipes pydoc_data smtpd sndhdr spwd sunau telnetlib test tests this "
    "tix turtledemo uu xdrlib".split()
)

# Documented in C. These may be imported: that does nothing but define their names.
COMPILED = (
    "array atexit binascii builtins bz2 cmath collections contextvars csv datetime decimal errno faulthandler fcntl "
    "functools gc grp hashlib io itertools lzma marshal math mmap operator os pickle pwd queue resource select signal "
    "socket sqlite3 ssl struct sys syslog termios time unicodedata weakref zlib zoneinfo".split()
)
MEMBERS = (
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    staticmethod,
)

Doc = tuple[str, str, str]  # kind, qualified name, docstring


def stdlib_documents() -> Iterator[dict[str, Any]]:
    """Bodies for `POST .../documents`: a document per module, in order of their names, a chunk per docstring.

    Python files are parsed, not imported. Chunks carry their `kind` (module, class, function, method) and `name`.
    """
    files = _files(Path(sysconfig.get_path("stdlib")))
    for module in sorted(files.keys() | set(COMPILED)):
        found: dict[str, Doc] = {}
        metadata: dict[str, Any] = {"package": module.partition(".")[0], "python": sys.version.partition(" ")[0]}
        source = f"{_python()}/{module} (compiled)"
        if module in files:
            path, relative = files[module]
            code = path.read_bytes()
            source = f"{_python()}/{relative.as_posix()}"
            metadata["lines"] = code.count(b"\n")
            found = {doc[1]: doc for doc in _parsed_docs(code, module)}
        if module in COMPILED:
            found = {doc[1]: doc for doc in _compiled_docs(module)} | found
        if found:
            docs = sorted(found.values(), key=lambda doc: doc[1] != module)  # the module's own first
            yield {
                "key": module,
                "title": _title(module, docs[0]),
                "source": source,
                "metadata": metadata,
                "chunks": [_chunk(doc) for doc in docs[:MAX_CHUNKS]],
            }


def _python() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _title(module: str, doc: Doc) -> str:
    line = doc[2].splitlines()[0].strip().rstrip(".")
    return f"{module}: {line}"[:200] if doc[0] == "module" and line else module


def _chunk(doc: Doc) -> dict[str, Any]:
    kind, name, text = doc
    return {"text": f"{name}\n\n{_opening(text)}"[:MAX_TEXT].rstrip(), "metadata": {"kind": kind, "name": name}}


def _opening(text: str) -> str:
    opening, *others = re.split(r"\n\s*\n", text.strip())
    for paragraph in others:
        if len(opening) + len(paragraph) > OPENING:
            break
        opening += f"\n\n{paragraph}"
    return opening


def _files(root: Path) -> dict[str, tuple[Path, Path]]:
    """The public modules below `root`: their file, and its path relative to `root`."""
    files = {}
    for top in sorted(sys.stdlib_module_names):
        single = root / f"{top}.py"
        for path in [single] if single.is_file() else sorted((root / top).rglob("*.py")):
            relative = path.relative_to(root)
            parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
            if not any(part.startswith("_") or part in LEFT_OUT for part in parts):
                files[".".join(parts)] = path, relative
    return files


def _parsed_docs(code: bytes, module: str) -> Iterator[Doc]:
    with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of escapes in older files
        tree = ast.parse(code)
    docstring = ast.get_docstring(tree) or _assigned_doc(tree)
    if docstring and docstring.strip():
        yield "module", module, docstring
    yield from _docs_in(tree.body, module, "function")


def _assigned_doc(tree: ast.Module) -> str | None:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__doc__")], value=ast.Constant(value=str(text))):
                return inspect.cleandoc(text)
    return None


def _docs_in(body: list[ast.stmt], prefix: str, function: str) -> Iterator[Doc]:
    """Classes and functions, those under `if` and `try` too; of two with one name the later counts, as in Python."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            for branch in (node.body, *(handler.body for handler in getattr(node, "handlers", [])), node.orelse):
                yield from _docs_in(branch, prefix, function)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            name = f"{prefix}.{node.name}"
            docstring = ast.get_docstring(node)
            if docstring and docstring.strip():
                yield "class" if isinstance(node, ast.ClassDef) else function, name, docstring
            if isinstance(node, ast.ClassDef):
                yield from _docs_in(node.body, name, "method")


def _compiled_docs(module: str) -> Iterator[Doc]:
    """What the public names of a module say that are written in C, of its own or of its helper's (`_csv`, `posix`)."""
    try:
        with warnings.catch_warnings(action="ignore"):
            namespace = vars(importlib.import_module(module)).copy()
    except ImportError:  # not built on this machine
        return
    if namespace["__doc__"]:
        yield "module", module, inspect.cleandoc(namespace["__doc__"])
    for name in namespace.get("__all__") or list(namespace):
        if name.startswith("_"):
            continue
        thing = namespace.get(name)
        home = getattr(thing, "__module__", None) or ""
        if not (home in (module, "posix") or home.startswith("_")):
            continue
        if inspect.isbuiltin(thing):
            yield from _doc("function", f"{module}.{name}", thing)
        elif inspect.isclass(thing):
            yield from _doc("class", f"{module}.{name}", thing)
            for attribute, member in vars(thing).items():
                if not attribute.startswith("_") and isinstance(member, MEMBERS):
                    yield from _doc("method", f"{module}.{name}.{attribute}", member)


def _doc(kind: str, name: str, thing: object) -> Iterator[Doc]:
    if isinstance(thing.__doc__, str) and thing.__doc__.strip():
        yield kind, name, inspect.cleandoc(thing.__doc__)


def show(console: Console, question: str, result: SearchResult, milliseconds: float) -> None:
    """Print a question, its hits (score, name, kind, what it says) and how long the answer took over HTTP."""
    from rich.text import Text

    console.print()
    console.print(Text.assemble((question, "bold"), (f"   {milliseconds:.1f} ms", "dim")))
    for hit in result.hits:
        metadata = hit.metadata or {}
        name = str(metadata.get("name") or hit.key or hit.document_id)
        says = (hit.text or "").removeprefix(name).strip().partition("\n")[0]
        line = Text.assemble(
            (f"  {hit.score:.3f}  ", "green"), (name, "cyan"), (f"  {metadata.get('kind', '')}", "dim")
        )
        console.print(line, no_wrap=True, overflow="ellipsis")
        console.print(Text(f"         {says}"), no_wrap=True, overflow="ellipsis")
    if not result.hits:
        console.print(Text("  nothing found", style="yellow"))


def fill(client: Client, library: str, console: Console) -> None:
    """Ingest the corpus under a progress bar; documents that are there already are replaced, unchanged chunks kept."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    documents = list(stdlib_documents())
    if library not in {each.name for each in client.libraries()}:
        client.create_library(
            library, description="The documentation of the Python standard library", embedder={"provider": "local"}
        )
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(4) as pool:
        task = progress.add_task("chunks", total=sum(len(document["chunks"]) for document in documents))
        try:
            for document in pool.map(lambda document: client.add_document(library, **document), documents):
                progress.advance(task, document.chunks.total if document.chunks else 0)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C shall not wait for what has not begun
            raise
    stats = client.library_stats(library)
    console.print(f"  {stats.documents} documents, {stats.chunks} chunks, {stats.bytes / 1e6:.1f} MB in PostgreSQL")


def ask(client: Client, library: str, console: Console) -> int:
    """Ask all questions over HTTP and show the answers; returns how many had a sensible one among the first three."""
    sensible = 0
    for question, modules in QUESTIONS.items():
        started = time.perf_counter()
        result = client.search(library, question, mode="vector", k=3)
        show(console, question, result, (time.perf_counter() - started) * 1000)
        sensible += any(hit.key in modules for hit in result.hits)
    return sensible


def how_to_go_on(url: str, psql: str, library: str) -> str:
    """Lines for curl, psql and the SDK that work as pasted while the demo serves."""
    body = '{"query": "open a file in a zip archive", "k": 3}'
    statement = "select document_key, ordinal, left(text, 60) from pgshelf.chunks_view where library = '{}' limit 5"
    return f"""
  curl -s {url}/v1/libraries/{library}/search -H 'content-type: application/json' -d '{body}'

  {psql} -c "{statement.format(library)}"

  {sys.executable} -c "
from pgshelf_client import Client
for hit in Client('{url}').search('{library}', 'open a file in a zip archive', k=3).hits:
    print(round(hit.score, 3), hit.metadata['name'])"
"""
