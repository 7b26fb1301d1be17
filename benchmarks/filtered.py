"""Filtered search against exact truth: pgshelf.search, plain pgvector and exact search, side by side in one run.

Filters let about 70, 50, 10, 1, 0.1 and 0.01 % of 100,000 chunks through, spread over the vectors or topical (see
_corpus.py), by equality and range (declared attributes), containment (a list of tags: metadata, GIN index), and
equality and range together with a condition on the chunk (mixed). Equality on what is not declared goes as containment
does. Plain pgvector has the same tables and indexes, a join as a careful engineer writes it, the planner's choice and
an iterative scan. Some minutes; --cells takes a part.

Goals: recall@10 of 0.97 or more in every cell and as many rows as there are; the median at most 2 times the unfiltered
one where half of the chunks or more match, 6 times at 10 %, 3 ms at 1 % and below.
"""

from __future__ import annotations

import json
import random
import statistics
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import psycopg

from benchmarks import _corpus, _library
from benchmarks._corpus import SHARES, STRIPES, TAGS_BEGIN, Corpus, Scatter
from benchmarks._library import Stopwatch, Truth

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

K = 10
RECALL = 0.97
KINDS = ("equality", "range", "containment", "mixed")
SYSTEMS = ("pgshelf", "pgvector", "exact")
GRADE = 0.8  # mixed: the share of chunks whose own metadata fit
RANGE = 0.25  # mixed: the share of documents within the range, at least
# mixed: the value of equality, and the share of documents that have it
BROADER = {
    "p70": ("wide", "p90", 0.9),
    "p50": ("most", "p70", 0.7),
    "p10": ("label", "p50", 0.5),
    "p1": ("label", "p10", 0.1),
    "p01": ("label", "p1", 0.01),
    "p001": ("label", "p01", 0.001),
}


@dataclass
class Cell:
    """One filter, how plain SQL says it, and the chunks that fulfil it."""

    share: str
    scatter: Scatter
    kind: str
    filter: dict[str, Any]
    joins: str
    conditions: str
    matches: NDArray[np.bool_]
    spent: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    recalls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # searches with fewer rows than exist
    strategy: str = ""

    @property
    def rows(self) -> int:
        return min(K, int(self.matches.sum()))

    @property
    def name(self) -> str:
        return f"{self.share} {self.scatter} {self.kind}"

    def goal(self, unfiltered: float) -> float:
        """The median that pgshelf may have, in milliseconds."""
        share = SHARES[self.share]
        return 2 * unfiltered if share >= 0.5 else 6 * unfiltered if share >= 0.1 else 3.0

    def good(self, unfiltered: float) -> bool:
        """Whether pgshelf reaches its goals here."""
        fast = statistics.median(self.spent["pgshelf"]) <= self.goal(unfiltered)
        return fast and statistics.mean(self.recalls["pgshelf"]) >= RECALL and not self.missing["pgshelf"]


# -- filters

DECLARED = _corpus.DECLARED | {
    f"{scatter}.{name}": "text" for scatter in get_args(Scatter) for name in ("label", "most", "wide")
}
DOCUMENTS = "join pgshelf.documents d on d.id = c.document_id"
VALUES = "join pgshelf.attribute_values {0} on {0}.library_id = c.library_id and {0}.document_id = c.document_id"


def contains(library: uuid.UUID, scatter: str, tag: str) -> str:
    """Containment as the GIN index on metadata serves it; the text is our own, nobody else's."""
    wanted = json.dumps({scatter: {"tags": [tag]}})
    return f"pgshelf.scoped(d.library_id, d.metadata) @> pgshelf.scoped('{library}', '{wanted}')"


def equals(scatter: str, name: str, value: str) -> str:
    """Equality as the index on declared attributes serves it."""
    return f"w.attribute = '{scatter}.{name}' and w.txt = '{value}'"


def within(scatter: str, low: float, high: float) -> str:
    """A range as the index on declared attributes serves it."""
    return f"v.attribute = '{scatter}.rank' and v.num between {low} and {high}"


def cell(corpus: Corpus, library: uuid.UUID, share: str, scatter: Scatter, kind: str) -> Cell:
    """The filter of a cell."""
    if kind == "containment":
        tagged: dict[str, Any] = {f"{scatter}.tags": {"$contains": share}}
        plain = contains(library, scatter, share)
        return Cell(share, scatter, kind, tagged, DOCUMENTS, plain, corpus.tagged(scatter, share))
    if kind == "equality":
        name = "most" if share == "p70" else "label"
        matches = corpus.values(scatter, name) == share
        equal = {f"{scatter}.{name}": share}
        return Cell(share, scatter, kind, equal, VALUES.format("w"), equals(scatter, name, share), matches)
    rank = corpus.values(scatter, "rank")
    if kind == "range":
        low, high = TAGS_BEGIN, round(TAGS_BEGIN + SHARES[share], 6)
        between: dict[str, Any] = {f"{scatter}.rank": {"$between": [low, high]}}
        matches = (rank >= low) & (rank <= high)
        return Cell(share, scatter, kind, between, VALUES.format("v"), within(scatter, low, high), matches)
    name, value, broad = BROADER[share]
    grade = 0.9 if share == "p70" else GRADE
    low, high = mixed_range(share, scatter, broad, grade)
    mixed: dict[str, Any] = {
        f"{scatter}.{name}": value,
        f"{scatter}.rank": {"$gte": low, "$lte": high},
        "chunk.grade": {"$lt": grade},
    }
    plain = f"{equals(scatter, name, value)} and {within(scatter, low, high)}"
    plain += f" and (c.metadata ->> 'grade')::float8 < {grade}"
    matches = (corpus.values(scatter, name) == value) & (rank >= low) & (rank <= high) & (corpus.grades < grade)
    return Cell(share, scatter, kind, mixed, f"{VALUES.format('v')} {VALUES.format('w')}", plain, matches)


def mixed_range(share: str, scatter: Scatter, broad: float, grade: float) -> tuple[float, float]:
    """A range that leaves `share` of all chunks, among those that have the value and the grade."""
    rest = SHARES[share] / grade
    if scatter == "spread":
        return 0.0, round(rest / broad, 6)
    # value and range lie in the same row of documents, so they overlap where one ends and the other begins
    label = BROADER[share][1]
    end = broad + (STRIPES[label] if BROADER[share][0] == "label" else 0.0)
    return round(end - rest, 6), round(min(end - rest + max(RANGE, rest), 1.0), 6)


# -- systems


def statements(connection: psycopg.Connection[Any], library: uuid.UUID) -> dict[str, str]:
    """The statement of each system, with {joins} and {conditions} for plain pgvector."""
    question = """select l.shelf, pgshelf.index_key(l.index_actual, l.metric, l.dimension, 'c.embedding'),
        pgshelf.index_key(l.index_actual, l.metric, l.dimension, '%%(vector)b'),
        pgshelf.index_operator(l.index_actual, l.metric), pgshelf.distance_operator(l.metric)
        from pgshelf.libraries l where l.id = %s"""
    row = connection.execute(question, [library]).fetchone()
    assert row  # noqa: S101 - it was made a moment ago
    shelf, key, target, by_key, by_distance = row
    search = "select * from pgshelf.search('corpus', %(vector)b, filter => %(filter)s"
    plain = f"""with near as materialized (
        select c.id, c.document_id, c.text, c.metadata, c.embedding {by_distance} %(vector)b as distance
        from pgshelf.chunks_s{shelf} c {{joins}} where c.library_id = '{library}' and {{conditions}}
        order by {key} {by_key} {target} limit {K})
      select n.id, n.distance, n.text, n.metadata, d.title, d.source, d.metadata
      from near n join pgshelf.documents d on d.id = n.document_id order by n.distance, n.id"""  # noqa: S608 - our own parts
    return {"pgshelf": search + ")", "pgvector": plain, "exact": search + ", exact => true)"}


def measure(
    watch: Stopwatch, cells: list[Cell], truth: Truth, corpus: Corpus, said: dict[str, str], queries: int
) -> Cell:
    """Ask every system every question, turn by turn, so that noise meets all; returns the unfiltered searches."""
    unfiltered = Cell("", "spread", "unfiltered", {}, "", "true", corpus.grades >= 0)
    chance = random.Random(1)
    for query in range(-3, queries):  # the first few fill caches and do not count
        for each in chance.sample(cells, len(cells)):
            asked = query % len(corpus.queries)
            for system in chance.sample(SYSTEMS, len(SYSTEMS)):
                if system != "exact" or query % 10 == 0:  # it is slow, and knows no luck
                    ask(watch, each, system, said, truth, corpus, asked, query >= 0)
            for system in ("pgshelf", "pgvector"):
                other = (asked + 1 + chance.randrange(len(corpus.queries) - 1)) % len(corpus.queries)
                ask(watch, unfiltered, system, said, truth, corpus, other, query >= 0)
    for query in range(0, queries, 10):
        ask(watch, unfiltered, "exact", said, truth, corpus, query, True)
    return unfiltered


def ask(
    watch: Stopwatch,
    each: Cell,
    system: str,
    said: dict[str, str],
    truth: Truth,
    corpus: Corpus,
    query: int,
    counts: bool,
) -> None:
    """One search of one system."""
    statement = said[system]
    parameters: dict[str, Any] = {
        "vector": corpus.queries[query],
        "filter": json.dumps(each.filter) if each.filter else None,
    }
    if system == "pgvector":
        statement = statement.format(joins=each.joins, conditions=each.conditions)
    spent, rows = watch.run(statement, parameters)
    if counts:
        each.spent[system].append(spent)
        each.recalls[system].append(truth.recall(query, [row[0] for row in rows], K, each.matches))
        each.missing[system] += len(rows) < each.rows


def strategies(connection: psycopg.Connection[Any], cells: list[Cell], corpus: Corpus) -> None:
    """What pgshelf says that it does in each cell."""
    for each in cells:
        question = "select pgshelf.explain_search('corpus', embedding => %b, filter => %s) ->> 'strategy'"
        row = connection.execute(question, [corpus.queries[0], json.dumps(each.filter)]).fetchone()
        each.strategy = row[0] if row else ""


# -- the table


def show(cells: list[Cell], unfiltered: Cell) -> bool:
    """Print the table; returns whether all goals are reached."""
    base = {system: statistics.median(unfiltered.spent[system]) for system in SYSTEMS}
    print(f"{'':<29}{'':>8} | {'pgshelf':^43} | {'pgvector, iterative':^32} | {'exact':>7}")
    head = f"{'recall':>7}{'short':>6}{'median':>8}{'p95':>8}"
    print(f"{'filter':<29}{'matches':>8} | {head}{'ratio':>7}{'goal':>7} | {head}   | {'median':>7} | strategy")
    for each in [unfiltered, *cells]:
        cpu = {system: sorted(each.spent[system]) for system in SYSTEMS}
        parts = {}
        for system in SYSTEMS:
            late = cpu[system][int(len(cpu[system]) * 0.95)]
            middle, recall = statistics.median(cpu[system]), statistics.mean(each.recalls[system])
            parts[system] = (middle, f"{recall:>7.3f}{each.missing[system]:>6}{middle:>8.2f}{late:>8.2f}")
        goal, good = (
            ("", "") if each is unfiltered else (f"{each.goal(base['pgshelf']):.1f}", each.good(base["pgshelf"]))
        )
        verdict = "" if each is unfiltered else "" if good else "  MISSED"
        ratio = parts["pgshelf"][0] / base["pgshelf"]
        print(
            f"{each.name.strip():<29}{int(each.matches.sum()):>8} | {parts['pgshelf'][1]}{ratio:>7.2f}{goal:>7} | "
            f"{parts['pgvector'][1]}   | {parts['exact'][0]:>7.1f} | {each.strategy}{verdict}",
            flush=True,
        )
    missed = [each.name for each in cells if not each.good(base["pgshelf"])]
    print(f"{len(cells) - len(missed)} of {len(cells)} cells reach their goals")
    return not missed


def main() -> None:
    """Load, measure, print."""
    parser = _corpus.options(__doc__)
    parser.add_argument("--cells", default="", help='only cells that have all these words: "p10 topical"')
    parser.add_argument("--quick", action="store_true", help="20,000 chunks, 20 queries, equality and mixed only")
    parser.add_argument("--ef", type=int, default=160, help="hnsw.ef_search of plain pgvector")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.chunks, chosen.queries = 20_000, 20
    kinds = ("equality", "mixed") if chosen.quick else KINDS
    corpus = _corpus.chosen(chosen)
    with _library.database() as connection:
        library = _library.load(connection, corpus, "corpus", DECLARED)
        built = _library.index(connection, "corpus", {"type": "hnsw"})
        said = statements(connection, library)
        wanted = set(chosen.cells.split())
        cells = [
            cell(corpus, library, share, scatter, kind)
            for share in SHARES
            for scatter in get_args(Scatter)
            for kind in kinds
            if wanted <= {share, scatter, kind}
        ]
        strategies(connection, cells, corpus)
        connection.execute("set hnsw.iterative_scan = relaxed_order")
        connection.execute(f"set hnsw.ef_search = {chosen.ef}")
        watch = Stopwatch(connection, chosen.cpu)
        truth = Truth(corpus, library)
        unfiltered = measure(watch, cells, truth, corpus, said, min(chosen.queries, len(corpus.queries)))
    print(
        f"{corpus.name}: {len(corpus.texts)} chunks of {len(corpus.documents)} documents, {corpus.dimension} dimensions"
    )
    clock = "CPU time of the server" if chosen.cpu else "the client's clock"
    print(f"k = {K}, {chosen.queries} queries, milliseconds by {clock}; promoted and indexed in {built:.0f} s")
    if not show(cells, unfiltered) and chosen.strict:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
