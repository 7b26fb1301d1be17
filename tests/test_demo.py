"""The demo's corpus is well formed, and its questions find what they should with the local embedder."""

import asyncio
import io
import sys

import numpy as np
import pytest
from rich.console import Console

from pgshelf import demo
from pgshelf.embedders.local import LocalEmbedder
from pgshelf_client.types import Hit, SearchResult


@pytest.fixture(scope="module")
def documents():
    return {document["key"]: document for document in demo.stdlib_documents()}


@pytest.fixture(scope="module")
def best(documents):
    """The modules of the three best hits for a question: exact cosine over all chunks, as the database does it."""
    chunks = [(key, chunk["text"]) for key, document in documents.items() for chunk in document["chunks"]]
    embedder = LocalEmbedder()
    vectors = asyncio.run(embedder.embed([text for _, text in chunks], "document"))

    def search(question):
        scores = vectors @ asyncio.run(embedder.embed([question], "query"))[0]
        return [chunks[n][0] for n in np.argsort(-scores)[:3]]

    return search


def names(document):
    return {chunk["metadata"]["name"]: chunk for chunk in document["chunks"]}


def test_the_corpus_has_a_document_per_module_and_thousands_of_chunks(documents):
    assert 200 < len(documents) < 500
    assert 4_000 < sum(len(document["chunks"]) for document in documents.values()) < 12_000
    assert list(documents) == sorted(documents)


def test_every_document_is_one_that_the_service_takes(documents):
    for key, document in documents.items():
        assert document.keys() == {"key", "title", "source", "metadata", "chunks"}
        assert document["title"].startswith(key)
        assert len(document["title"]) <= 200
        assert 1 <= len(document["chunks"]) <= demo.MAX_CHUNKS
        assert len(names(document)) == len(document["chunks"])
        for name, chunk in names(document).items():
            assert name == key or name.startswith(f"{key}.")
            assert chunk["metadata"].keys() == {"kind", "name"}
            assert chunk["text"].startswith(f"{name}\n\n")
            assert len(name) + 2 < len(chunk["text"]) <= demo.MAX_TEXT
            assert "\0" not in chunk["text"]
            assert chunk["text"].encode()


def test_sources_name_the_file_without_saying_where_this_machine_keeps_it(documents):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert documents["json"]["source"] == f"{version}/json/__init__.py"
    assert documents["math"]["source"] == f"{version}/math (compiled)"
    assert all(document["source"].startswith(f"{version}/") for document in documents.values())
    metadata = documents["email.message"]["metadata"]
    assert metadata["package"] == "email"
    assert metadata["python"] == ".".join(map(str, sys.version_info[:3]))
    assert metadata["lines"] > 500


def test_modules_classes_functions_and_methods_are_told_apart(documents):
    kinds = {
        name: chunk["metadata"]["kind"]
        for key in ("json", "argparse", "threading")
        for name, chunk in names(documents[key]).items()
    }
    assert kinds["json"] == "module"
    assert kinds["json.dumps"] == "function"
    assert kinds["argparse.ArgumentParser"] == "class"
    assert kinds["threading.Thread.start"] == "method"


def test_what_is_written_in_c_is_there_under_its_public_name(documents):
    for name in (
        "itertools.combinations",
        "math.sqrt",
        "time.perf_counter",
        "sqlite3.Connection.execute",
        "zlib.compress",
        "hashlib.sha256",
        "os.listdir",
        "builtins.print",
        "builtins.str.split",
        "csv.reader",
        "datetime.datetime.now",
        "collections.deque.append",
    ):
        assert name in names(documents[name.partition(".")[0]])


def test_private_names_test_suites_and_modules_that_are_gone_are_left_out(documents):
    parts = {part for document in documents.values() for name in names(document) for part in name.split(".")}
    assert not [part for part in parts if part.startswith("_")]
    assert not demo.LEFT_OUT & {part for key in documents for part in key.split(".")}


def test_nothing_is_imported_from_python_files_but_what_is_listed(documents):
    assert "antigravity" not in sys.modules
    assert "tkinter" in documents
    assert "tkinter" not in sys.modules


def test_docstrings_are_found_under_conditions_and_in_assignments_but_not_in_functions():
    code = b'''
import sys
__doc__ = """A module
   whose documentation is assigned."""
if sys.platform == "win32":
    def where():
        "On Windows."
else:
    def where():
        "Elsewhere."
try:
    class Tool:
        """A tool."""
        def use(self):
            """Use it."""
            def inner():
                """Not for anybody."""
        def _hidden(self):
            """Private."""
        class Part:
            """A part of it."""
        async def wait(self):
            """Wait for it."""
except ImportError:
    def fallback():
        """Instead of it."""
def silent(): pass
def blank():
    """   """
'''
    assert {name: (kind, text) for kind, name, text in demo._parsed_docs(code, "m")} == {
        "m": ("module", "A module\nwhose documentation is assigned."),
        "m.where": ("function", "Elsewhere."),
        "m.Tool": ("class", "A tool."),
        "m.Tool.use": ("method", "Use it."),
        "m.Tool.Part": ("class", "A part of it."),
        "m.Tool.wait": ("method", "Wait for it."),
        "m.fallback": ("function", "Instead of it."),
    }


def test_a_chunk_is_the_name_and_the_opening_of_the_docstring():
    text = "First paragraph.\n\nSecond one.\n   \nThird: " + "x" * 300 + "\n\nFourth."
    assert demo._chunk(("function", "m.f", text)) == {
        "text": "m.f\n\nFirst paragraph.\n\nSecond one.",
        "metadata": {"kind": "function", "name": "m.f"},
    }
    assert len(demo._chunk(("module", "m", "x" * 9000))["text"]) == demo.MAX_TEXT


def test_a_module_that_was_not_built_is_passed_over(monkeypatch):
    monkeypatch.setattr(demo, "COMPILED", ("math", "no_such_module"))
    monkeypatch.setattr(demo, "_files", lambda root: {})
    assert [document["key"] for document in demo.stdlib_documents()] == ["math"]


@pytest.mark.parametrize("question", demo.QUESTIONS)
def test_a_question_finds_a_sensible_module_among_the_first_three_hits(documents, best, question):
    wanted = demo.QUESTIONS[question]
    assert wanted & documents.keys()
    assert wanted & set(best(question))


def test_other_questions_find_their_modules_too(best):
    others = {
        "run code in several threads": "threading",
        "pick a random element from a list": "random",
        "read a CSV file": "csv",
        "compute the average and standard deviation": "statistics",
        "write log messages to a file": "logging",
        "copy a directory tree": "shutil",
        "add days to a date": "datetime",
        "cache the results of a function": "functools",
        "unpack a zip archive": "zipfile",
        "square root of a number": "math",
        "encode bytes as base64": "base64",
    }
    missed = {question for question, module in others.items() if module not in best(question)}
    assert len(missed) <= 1, missed


def printed(result, width=100):
    output = io.StringIO()
    demo.show(Console(file=output, width=width), "how [bold]do I?", result, 12.345)
    return output.getvalue()


def hit(**fields):
    return Hit(chunk_id="1", document_id="some-id", ordinal=0, score=0.98765, distance=0.1, **fields)


def test_hits_are_shown_with_name_kind_score_first_line_and_time():
    shown = printed(
        SearchResult(
            hits=[
                hit(
                    key="json",
                    text="json.dumps\n\nSerialize [obj].\n\nMore.",
                    metadata={"kind": "function", "name": "json.dumps"},
                )
            ],
            took_ms=1.0,
        )
    )
    assert [line.split() for line in shown.splitlines() if line.strip()] == [
        ["how", "[bold]do", "I?", "12.3", "ms"],
        ["0.988", "json.dumps", "function"],
        ["Serialize", "[obj]."],
    ]


def test_long_lines_are_cut_to_the_width_of_the_terminal():
    shown = printed(SearchResult(hits=[hit(text="x " * 500, metadata={"name": "n", "kind": "class"})], took_ms=1.0), 60)
    assert len(shown.strip().splitlines()) == 3
    assert max(map(len, shown.splitlines())) <= 60


def test_hits_without_key_text_or_metadata_and_no_hits_at_all_are_shown_too():
    assert "some-id" in printed(SearchResult(hits=[hit()], took_ms=1.0))
    assert "nothing found" in printed(SearchResult(hits=[], took_ms=1.0))
