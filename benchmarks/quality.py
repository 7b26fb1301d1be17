"""How good the hits are, by words, by vectors and by both: nDCG@10 and recall@100 on a judged collection.

The collection lies in BEIR's layout, in a folder that is the first argument:

    corpus.jsonl    {"_id", "title"?, "text"}, a document a line
    queries.jsonl   {"_id", "text"}
    qrels/test.tsv  query-id, corpus-id, score, tabs between, a line of headings first (or qrels.tsv beside the others)

A document becomes one chunk, title and text. Vectors are the local embedder's, searches are pgshelf.search_text,
pgshelf.search and pgshelf.search_hybrid with their defaults, metrics are trec_eval's. Without a folder a dozen built-in
sentences show that it works; their figures mean nothing. Starts a PostgreSQL of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytrec_eval
from numpy.typing import NDArray
from pgvector.psycopg import register_vector

from pgshelf import embedded, migrate, shelves
from pgshelf.embedders.local import DIMENSION, LocalEmbedder
from pgshelf.settings import Settings

Connection = psycopg.Connection[Any]
LIBRARY = "quality"
DEPTH = 100
SEARCHES = {
    "text": "select key from pgshelf.search_text(%(library)s, %(query)s, k => %(k)s)",
    "vector": "select key from pgshelf.search(%(library)s, %(vector)s, k => %(k)s)",
    "hybrid": "select key from pgshelf.search_hybrid(%(library)s, %(query)s, %(vector)s, k => %(k)s)",
}
HOW_TO = """No collection was named, so these are a dozen sentences: a sign that it works, no more. Collections are
listed at https://github.com/beir-cellar/beir/wiki/Datasets-available (SciFact is small). Unpack one, then run
  .venv/bin/python -m benchmarks.quality FOLDER"""
# title, text and the queries that it answers
BUILT_IN = {
    "vacuum": ("Vacuum", "VACUUM reclaims the storage that dead rows occupy.", "how do I free disk space"),
    "analyze": ("Analyze", "ANALYZE collects statistics for the query planner.", "statistics of the planner"),
    "index": ("Index", "An index makes finding rows faster and writing them slower.", "make a lookup faster"),
    "wal": ("Write-ahead log", "Changes are logged before data files are written.", "are changes logged"),
    "replica": ("Standby", "A standby replays the log of its primary and answers reads.", "read from a second server"),
    "role": ("Roles", "A role owns objects and may be granted rights on others.", "who may see which table"),
    "mvcc": ("MVCC", "Readers never block writers: each statement sees a snapshot.", "do reads wait for writes"),
    "toast": ("TOAST", "Values that are too large for a page are compressed and stored elsewhere.", "very long values"),
    "join": ("Joins", "Nested loops, hash joins and merge joins combine two tables.", "combine rows of two tables"),
    "copy": ("COPY", "COPY moves data between a table and a file.", "load a CSV file"),
    "sequence": ("Sequences", "A sequence hands out numbers, each only once.", "unique numbers for new rows"),
    "trigger": ("Triggers", "A trigger calls a function whenever rows change.", "run code on every insert"),
}  # fmt: skip


@dataclass
class Collection:
    """Texts by id, queries that have judgements by id, and the grades of documents for each query."""

    name: str
    texts: dict[str, str]
    queries: dict[str, str]
    grades: dict[str, dict[str, int]]


def built_in() -> Collection:
    """A dozen sentences, each the answer to one query."""
    return Collection(
        "built-in sentences",
        {key: f"{title}\n{text}" for key, (title, text, _) in BUILT_IN.items()},
        {key: query for key, (_, _, query) in BUILT_IN.items()},
        {key: {key: 1} for key in BUILT_IN},
    )


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    with file.open(encoding="utf-8") as opened:
        return [json.loads(line) for line in opened if line.strip()]


def read(folder: Path, split: str) -> Collection:
    """A collection in BEIR's layout; documents without text are left out, as nothing can find them."""
    judged = next((f for f in (folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv") if f.exists()), None)
    if judged is None or not (folder / "corpus.jsonl").exists() or not (folder / "queries.jsonl").exists():
        raise SystemExit(f"{folder} lacks corpus.jsonl, queries.jsonl or qrels/{split}.tsv: it is not in BEIR's layout")
    grades: dict[str, dict[str, int]] = defaultdict(dict)
    for line in judged.read_text("utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        grades[query][document] = int(grade)
    texts = {
        str(each["_id"]): f"{each.get('title') or ''}\n{each['text']}".strip()
        for each in lines(folder / "corpus.jsonl")
    }
    queries = {str(each["_id"]): each["text"] for each in lines(folder / "queries.jsonl")}
    return Collection(
        folder.resolve().name,
        {key: text.replace("\0", "") for key, text in texts.items() if text},
        {key: text for key, text in queries.items() if any(grade > 0 for grade in grades.get(key, {}).values())},
        dict(grades),
    )


def embed(texts: list[str]) -> NDArray[np.float32]:
    return LocalEmbedder()._embed(texts)


def fill(connection: Connection, collection: Collection, language: str) -> None:
    """A library of one document with one chunk for each text."""
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, metric, embedder, chunking, language)
        values (%s, %s, 'cosine', jsonb_build_object('provider', 'local', 'dimension', %s::int), 
          '{"size": 1200, "overlap": 0}', %s)""",
        [LIBRARY, DIMENSION, DIMENSION, language],
    )
    vectors = embed(list(collection.texts.values()))
    put = "select pgshelf.put_document(%s, %s, texts => array[%s], embeddings => array[%s])"
    with connection.transaction(), connection.pipeline():
        for (key, text), vector in zip(collection.texts.items(), vectors, strict=True):
            connection.execute(put, [LIBRARY, key, text, vector])


def run(connection: Connection, collection: Collection, mode: str, k: int) -> tuple[dict[str, list[str]], float]:
    """The keys that each query finds, best first, and the median of the milliseconds."""
    vectors = embed(list(collection.queries.values()))
    found, spent = {}, []
    for (key, query), vector in zip(collection.queries.items(), vectors, strict=True):
        started = time.perf_counter()
        rows = connection.execute(
            SEARCHES[mode], {"library": LIBRARY, "query": query, "vector": vector, "k": k}
        ).fetchall()
        spent.append((time.perf_counter() - started) * 1000)
        found[key] = [row[0] for row in rows]
    return found, statistics.median(spent)


def judge(collection: Collection, found: dict[str, list[str]]) -> tuple[float, float]:
    """nDCG@10 and recall@100 in percent, means over all queries; one that finds nothing counts as 0."""
    judged = {query: collection.grades[query] for query in collection.queries}
    # trec_eval sorts by score, and equal scores its own way: the place of a hit is its score
    ranked = {query: {key: float(-place) for place, key in enumerate(keys)} for query, keys in found.items() if keys}
    results = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(ranked)
    ndcg = sum(each["ndcg_cut_10"] for each in results.values()) / len(judged)
    return 100 * ndcg, 100 * sum(each["recall_100"] for each in results.values()) / len(judged)


def main() -> None:
    """Fill, search in each mode, judge, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?", help="a collection in BEIR's layout")
    options.add_argument("--split", default="test", help="which file of qrels/")
    options.add_argument("--language", default="english", help="text search configuration of the library")
    options.add_argument(
        "--promote-at",
        type=int,
        default=Settings().promote_at,
        help="chunks from which the library gets a shelf and an index of its own",
    )
    chosen = options.parse_args()
    collection = read(chosen.folder, chosen.split) if chosen.folder else built_in()
    with tempfile.TemporaryDirectory(prefix="pgshelf-bench-") as folder, embedded.start(Path(folder)) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("create extension if not exists vector")
            migrate.upgrade(server.url(), warn=False)
            register_vector(connection)
            started = time.perf_counter()
            fill(connection, collection, chosen.language)
            connection.execute("vacuum analyze")
            shelves.reconcile_all(server.url(), Settings(promote_at=chosen.promote_at))
            filled = time.perf_counter() - started
            (index,) = connection.execute("select index_actual ->> 'type' from pgshelf.libraries").fetchone() or ("",)
            rows = {}
            for mode in SEARCHES:
                found, _ = run(connection, collection, mode, DEPTH)
                rows[mode] = (*judge(collection, found), run(connection, collection, mode, 10)[1])
    if not chosen.folder:
        print(HOW_TO)
    what = f"{len(collection.texts)} documents, {len(collection.queries)} queries; local embedder, index {index}"
    print(f"{collection.name}: {what}; filled in {filled:.1f} s")
    print(f"{'mode':<10}{'nDCG@10':>10}{'recall@100':>12}{'median, k = 10':>17}")
    for mode, (ndcg, recall, median) in rows.items():
        print(f"{mode:<10}{ndcg:>10.1f}{recall:>12.1f}{median:>14.2f} ms")


if __name__ == "__main__":
    main()
