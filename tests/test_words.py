"""Word search against BM25 in plain Python, on every kind of shelf and under filters; how typed queries are read."""

from __future__ import annotations

import html
import itertools
import json
import math
import random
import re
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from pgshelf import shelves
from pgshelf.settings import Settings

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

Connection = psycopg.Connection[Any]
Row = tuple[uuid.UUID, float]
CHUNKS = 5_000
VOCABULARY = [a + b + c for a in "bdfgklm" for b in "aei" for c in "nrstp"]  # 105 words, none of them English
LIBRARIES = ("shared", "own", "own without statistics")
# As pgshelf.search_statement does it: the CTEs in one statement, run by EXECUTE ... USING.
HELPERS = """
create function pg_temp.worded(p_words text, p_filter jsonb, p_reach int, p_query text)
  returns table (id uuid, document_id uuid, ordinal int, score float8) language plpgsql as
$$
begin
  return query execute 'with ' || p_words || ' select * from worded' using null::text, p_filter, p_reach, p_query;
end $$;
create function pg_temp.explained(p_words text, p_filter jsonb, p_reach int, p_query text) returns json
  language plpgsql as
$$
declare
  v_plan json;
begin
  execute 'explain (analyze, format json) with ' || p_words || ' select * from worded' into v_plan
    using null::text, p_filter, p_reach, p_query;
  return v_plan;
end $$;
"""


@dataclass
class Condition:
    """A filter, as SQL and in Python (over metadata of the document, and of the chunk)."""

    documents: str = "true"
    chunks: str = "true"
    indexed: dict[str, Any] = field(default_factory=dict)
    chunks_indexed: dict[str, Any] = field(default_factory=dict)
    number: int = 1  # the numbers of chunks that are multiples of this fulfil it

    def fits(self, number: int) -> bool:
        return number % self.number == 0

    def arguments(self, library: uuid.UUID) -> list[str]:
        wanted = f"(select pgshelf.scoped('{library}', '{json.dumps(self.indexed)}'))"
        indexed = f"pgshelf.scoped(d.library_id, d.metadata) @> {wanted}"
        within = f"c.metadata @> '{json.dumps(self.chunks_indexed)}'::jsonb"
        return [
            self.documents,
            self.chunks,
            indexed if self.indexed else "true",
            within if self.chunks_indexed else "true",
        ]


def multiples(number: int, *, of: str = "documents", index: bool = True) -> Condition:
    """The chunks whose number is a multiple, asked of their documents or of themselves."""
    key = f"m{number}"
    if of == "documents":
        return Condition(f"d.metadata ? '{key}'", indexed={key: True} if index else {}, number=number)
    return Condition(chunks=f"c.metadata ? '{key}'", chunks_indexed={key: True} if index else {}, number=number)


SHARES = (2, 10, 100, 700, 10_000)
CONDITIONS: dict[str, Condition] = {
    "none": Condition(),
    **{f"1/{n}": multiples(n) for n in SHARES},
    **{f"1/{n}, no index": multiples(n, index=False) for n in (2, 100)},
    **{f"chunks 1/{n}": multiples(n, of="chunks") for n in (2, 100)},
    "chunks 1/10, no index": multiples(10, of="chunks", index=False),
    "chunks with their documents": Condition(chunks="d.metadata ? 'm10' or c.metadata ? 'm2'", number=2),
    "documents and chunks": Condition("d.metadata ? 'm10'", "c.metadata ? 'm2'", {"m10": True}, {"m2": True}, 10),
}


def words_of(rng: random.Random) -> str:
    """A text: few words are frequent, most are rare."""
    weights = [1 / (rank + 1) for rank in range(len(VOCABULARY))]
    return " ".join(rng.choices(VOCABULARY, weights, k=rng.choice((2, 3, 5, 8, 13, 40))))


@dataclass
class Corpus:
    """The texts of a library by the ids of their chunks, in the order of their numbers."""

    texts: dict[uuid.UUID, str]
    counts: dict[uuid.UUID, Counter[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = {chunk: Counter(text.split()) for chunk, text in self.texts.items()}

    def scores(
        self, query: Sequence[str], prefixes: Sequence[str] = (), condition: Condition | None = None
    ) -> dict[uuid.UUID, float]:
        """BM25 of all chunks that hold a word and fulfil a condition."""
        mean = sum(len(text.encode()) for text in self.texts.values()) / len(self.texts)
        terms: list[tuple[int, dict[uuid.UUID, int]]] = []
        for word, times in sorted(Counter(query).items()):
            terms.append((times, {chunk: count[word] for chunk, count in self.counts.items() if count[word]}))
        for prefix, times in Counter(prefixes).items():
            found = {
                chunk: sum(n for w, n in count.items() if w.startswith(prefix)) for chunk, count in self.counts.items()
            }
            terms.append((times, {chunk: n for chunk, n in found.items() if n}))
        result: dict[uuid.UUID, float] = {}
        for times, holders in terms:
            weight = times * math.log((len(self.texts) + 1) / (len(holders) + 0.5))
            for chunk, often in holders.items():
                length = 0.25 + 0.75 * len(self.texts[chunk].encode()) / mean
                result[chunk] = result.get(chunk, 0.0) + weight * often * 2.2 / (often + 1.2 * length)
        fits = condition.fits if condition else lambda number: True
        return {chunk: result[chunk] for number, chunk in enumerate(self.texts) if chunk in result and fits(number)}


def check(found: list[Row], scores: dict[uuid.UUID, float], k: int) -> None:
    """The best k, each with its score, best first, equals in the order of their ids."""
    assert len(found) == min(k, len(scores))
    assert len({chunk for chunk, _ in found}) == len(found)
    assert found == sorted(found, key=lambda row: (-row[1], row[0]))
    assert [score for _, score in found] == pytest.approx([scores[chunk] for chunk, _ in found], rel=1e-9)
    assert [score for _, score in found] == pytest.approx(sorted(scores.values(), reverse=True)[: len(found)], rel=1e-9)


@pytest.fixture(scope="module")
def db(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        connection.execute(HELPERS.encode())
        yield connection


def make_library(db: Connection, name: str, language: str = "simple", index: str = "auto") -> uuid.UUID:
    row = db.execute(
        """insert into pgshelf.libraries (name, dimension, metric, embedder, chunking, language, index, index_state)
        values (%s, 2, 'cosine', '{"provider": "local", "dimension": 2}', '{}', %s,
          jsonb_build_object('type', %s::text), %s)
        returning id""",
        [name, language, index, "ready" if index == "auto" else "building"],
    ).fetchone()
    assert row
    return uuid.UUID(str(row[0]))


def fill(db: Connection, library: uuid.UUID, texts: dict[uuid.UUID, str]) -> None:
    """A document for each text; the metadata of both say what the text's number is a multiple of."""
    marks = [Jsonb({f"m{n}": True for n in SHARES if number % n == 0}) for number in range(len(texts))]
    documents = [uuid.uuid5(library, str(chunk)) for chunk in texts]
    db.execute(
        """insert into pgshelf.documents (place, library_id, id, metadata)
        select 1, %s, x.id, x.metadata from unnest(%s::uuid[], %s::jsonb[]) x(id, metadata)""",
        [library, documents, marks],
    )
    db.execute(
        """insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, id, text, metadata, language)
        select 0, 1, l.id, x.document, 0, x.id, x.text, x.metadata, l.language
        from pgshelf.libraries l,
          unnest(%s::uuid[], %s::uuid[], %s::text[], %s::jsonb[]) x(document, id, text, metadata)
        where l.id = %s""",
        [documents, list(texts), list(texts.values()), marks, library],
    )


def search(
    db: Connection,
    library: uuid.UUID | str,
    query: str,
    k: int = 10,
    condition: Condition | None = None,
    made_for: str | None = None,
) -> list[Row]:
    """What `worded` holds, in its order, in a statement that was made for a query like some other."""
    return db.execute(
        """select x.id, x.score from pgshelf.libraries l,
          pg_temp.worded(pgshelf.word_candidates(l, %s, %s, %s, %s, %s), null, %s, %s) x where l.id = %s""",
        [*(condition or Condition()).arguments(uuid.UUID(str(library))), made_for, k, query, library],
    ).fetchall()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = random.Random(7)
    texts = [words_of(rng) for _ in range(CHUNKS)]
    texts[::9] = [texts[0]] * len(texts[::9])  # equals, for the order of ties
    # each word over and over, which is nearly the most that it can score
    texts[1 : 9 * len(VOCABULARY) : 9] = [" ".join([word] * 20) for word in VOCABULARY]
    return Corpus({uuid.UUID(int=rng.getrandbits(128)): text for text in texts})


@pytest.fixture(scope="module")
def libraries(db: Connection, shared_database_url: str, corpus: Corpus) -> dict[str, uuid.UUID]:
    """The same texts on shelf 0, and twice on shelves of their own, once without word statistics."""
    made = {name: make_library(db, name, index="auto" if name == "shared" else "flat") for name in LIBRARIES}
    for library in made.values():
        chunks = (
            corpus.texts
            if library == made["own"]
            else {uuid.uuid5(library, str(c)): t for c, t in corpus.texts.items()}
        )
        fill(db, library, chunks)
    db.execute("analyze")
    shelves.reconcile_all(shared_database_url, Settings(promote_at=10 * CHUNKS))
    db.execute("delete from pgshelf.word_statistics where library_id = %s", [made["own without statistics"]])
    db.execute("delete from pgshelf.terms where library_id = %s", [made["own without statistics"]])
    db.execute("analyze")
    shelf = "select name from pgshelf.libraries where shelf <> 0 and name = any (%s) order by name"
    assert [name for (name,) in db.execute(shelf, [list(LIBRARIES)])] == ["own", "own without statistics"]
    return made


Truths = dict[str, Corpus]


@pytest.fixture(scope="module")
def truths(corpus: Corpus, libraries: dict[str, uuid.UUID]) -> Truths:
    """The corpus under the ids that its chunks have in each library."""
    others = {name: library for name, library in libraries.items() if name != "own"}
    return {"own": corpus} | {
        name: Corpus({uuid.uuid5(library, str(c)): t for c, t in corpus.texts.items()})
        for name, library in others.items()
    }


# -- ranking

TEXTS = st.lists(
    st.lists(st.sampled_from(VOCABULARY[:6]), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=30
)


@given(texts=TEXTS, query=st.lists(st.sampled_from(VOCABULARY[:8]), max_size=6), k=st.integers(1, 40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ranking_is_bm25(db: Connection, texts: list[str], query: list[str], k: int) -> None:
    corpus = Corpus({uuid.uuid4(): text for text in texts})
    library = make_library(db, f"lib {uuid.uuid4()}")
    fill(db, library, corpus.texts)
    check(search(db, library, " ".join(query), k), corpus.scores(query), k)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_every_way_to_the_rows_finds_the_best(
    db: Connection, libraries: dict[str, uuid.UUID], truths: Truths, name: str, condition: Condition
) -> None:
    """Rare and frequent words, few and many hits, more than there are."""
    rng = random.Random(name)
    known = truths[name]
    for length in (1, 4, 15):
        query = rng.choices(VOCABULARY, k=length)
        scores = known.scores(query, condition=condition)
        for k in (1, 10, CHUNKS):
            check(search(db, libraries[name], " ".join(query), k, condition), scores, k)


def test_equal_chunks_stand_in_the_order_of_their_ids(
    db: Connection, libraries: dict[str, uuid.UUID], corpus: Corpus
) -> None:
    text = next(iter(corpus.texts.values()))
    twins = sorted(chunk for chunk, other in corpus.texts.items() if other == text)
    assert len(twins) > CHUNKS / 10
    assert [chunk for chunk, _ in search(db, libraries["own"], text, 20)] == twins[:20]


def test_frequency_counts_up_to_what_a_tsvector_holds(db: Connection) -> None:
    """PostgreSQL keeps at most 256 positions of a word, so 256 times is as often as can be."""
    library = make_library(db, "frequencies")
    texts = {
        uuid.uuid4(): "word " * often + "rest " * (300 - often) for often in (1, 2, 3, 17, 100, 254, 255, 256, 299)
    }
    fill(db, library, texts)
    corpus = Corpus(texts)
    for count in corpus.counts.values():
        count["word"] = min(count["word"], 255)
    check(search(db, library, "word"), corpus.scores(["word"]), 10)


@pytest.mark.parametrize("name", LIBRARIES)
def test_prefixes_score_by_all_their_words(
    db: Connection, libraries: dict[str, uuid.UUID], truths: Truths, name: str
) -> None:
    known = truths[name]
    for typed, words, prefixes in (
        ("ba*", [], ["ba"]),
        ("min* ban ban", ["ban", "ban"], ["min"]),
        ("ba* ban* len", ["len"], ["ba", "ban"]),
        ("x* fet", ["fet"], ["x"]),
    ):
        check(search(db, libraries[name], typed, 50), known.scores(words, prefixes), 50)


@pytest.mark.parametrize("name", LIBRARIES)
def test_phrases_and_exclusions_choose_among_the_scored(
    db: Connection, libraries: dict[str, uuid.UUID], truths: Truths, name: str
) -> None:
    known = truths[name]
    for typed, words, must, never in (
        ('"ban bar"', ["ban", "bar"], r"\bban bar\b", None),
        ('"ban bar" len', ["ban", "bar", "len"], r"\bban bar\b", None),
        ("ban -bar", ["ban"], None, r"\bbar\b"),
        ('len -"ban bar"', ["len"], None, r"\bban bar\b"),
        ("ban len -ba*", ["ban", "len"], None, r"\bba"),
        ('"bar ban" "bas bat" -len', ["bar", "ban", "bas", "bat"], r"(?=.*\bbar ban\b).*\bbas bat\b", r"\blen\b"),
    ):
        scores = {
            chunk: score
            for chunk, score in known.scores(words).items()
            if (not must or re.search(must, known.texts[chunk]))
            and not (never and re.search(never, known.texts[chunk]))
        }
        assert scores, typed
        for k in (5, CHUNKS):
            check(search(db, libraries[name], typed, k), scores, k)


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_is_found_for_nothing(db: Connection, libraries: dict[str, uuid.UUID], name: str) -> None:
    for query in ("", "   ", '* - "" \' & | !', "-ban", '-"ban bar"', "nowhere", '"ban nowhere"', '"ban" -ban'):
        assert search(db, libraries[name], query, CHUNKS) == [], query


def test_a_library_finds_its_own_chunks_only(db: Connection) -> None:
    for name in ("mine", "yours"):
        fill(db, make_library(db, name), {uuid.uuid5(uuid.NAMESPACE_OID, name): "common words"})
    library = db.execute("select id from pgshelf.libraries where name = 'mine'").fetchone()
    assert library
    ((chunk, _),) = search(db, library[0], "common")
    assert chunk == uuid.uuid5(uuid.NAMESPACE_OID, "mine")


# -- how the statement runs

Plan = dict[str, Any]


def plan(db: Connection, library: uuid.UUID, query: str, k: int = 10, condition: Condition | None = None) -> Plan:
    row = db.execute(
        """select pg_temp.explained(pgshelf.word_candidates(l, %s, %s, %s, %s), null, %s, %s)
        from pgshelf.libraries l where l.id = %s""",
        [*(condition or Condition()).arguments(library), k, query, library],
    ).fetchone()
    assert row
    result: Plan = row[0][0]["Plan"]
    return result


def below(root: Plan) -> list[Plan]:
    return [root, *(node for child in root.get("Plans", []) for node in below(child))]


def executed(root: Plan, part: str) -> bool:
    """Whether a part of the statement read its table."""
    (cte,) = [node for node in below(root) if node.get("Subplan Name") == f"CTE {part}"]
    scans = [node for node in below(cte) if str(node.get("Relation Name")).startswith("chunks_s")]
    assert scans, f"{part} reads no chunks"
    return any(node["Actual Loops"] for node in scans)


def rows_read(root: Plan, part: str) -> int:
    (cte,) = [node for node in below(root) if node.get("Subplan Name") == f"CTE {part}"]
    read = [n for n in below(cte) if str(n.get("Relation Name")).startswith("chunks_s") and n["Actual Loops"]]
    return sum(round(node["Actual Rows"] * node["Actual Loops"]) for node in read)


def index_names(root: Plan, part: str) -> set[str]:
    (cte,) = [node for node in below(root) if node.get("Subplan Name") == f"CTE {part}"]
    return {re.sub(r"\d+", "N", node["Index Name"]) for node in below(cte) if "Index Name" in node}


def df(corpus: Corpus, word: str) -> int:
    return sum(1 for count in corpus.counts.values() if count[word])


def test_rows_that_cannot_be_among_the_best_are_not_read(
    db: Connection, libraries: dict[str, uuid.UUID], corpus: Corpus
) -> None:
    rare, frequent = VOCABULARY[80], VOCABULARY[0]
    assert df(corpus, rare) < 150 and df(corpus, frequent) > CHUNKS / 3
    found = plan(db, libraries["own"], f"{rare} {frequent}")
    assert index_names(found, "w_first") == {"chunks_sN_tsv_idx"}
    assert rows_read(found, "w_first") == df(corpus, rare)
    assert not executed(found, "w_second")  # the frequent word alone is worth less than what was found
    both = [VOCABULARY[n] for n in (2, 3, 4, 5, 6)]
    found = plan(db, libraries["own"], " ".join(both))
    assert executed(found, "w_second")
    held = sum(1 for count in corpus.counts.values() if any(count[word] for word in both))
    assert rows_read(found, "w_first") + rows_read(found, "w_second") < held * 0.8


def test_all_rows_are_read_when_all_are_wanted(db: Connection, libraries: dict[str, uuid.UUID], corpus: Corpus) -> None:
    found = plan(db, libraries["own"], f"{VOCABULARY[80]} {VOCABULARY[0]}", CHUNKS)
    held = sum(1 for count in corpus.counts.values() if count[VOCABULARY[80]] or count[VOCABULARY[0]])
    assert rows_read(found, "w_first") + rows_read(found, "w_second") == held


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (CONDITIONS["1/100"], {"chunks_sN_pkey", "documents_metadata_idx"}),
        (CONDITIONS["chunks 1/100"], {"chunks_sN_metadata_idx"}),
    ],
    ids=["of documents", "of chunks"],
)
def test_few_that_fulfil_a_filter_are_found_by_its_index(
    db: Connection, libraries: dict[str, uuid.UUID], condition: Condition, index: set[str]
) -> None:
    found = plan(db, libraries["own"], f"{VOCABULARY[0]} {VOCABULARY[1]}", 10, condition)
    assert executed(found, "w_lead")
    assert index_names(found, "w_lead") >= index
    assert not executed(found, "w_first")
    assert not executed(found, "w_second")


def test_many_that_fulfil_a_filter_are_found_by_their_words(db: Connection, libraries: dict[str, uuid.UUID]) -> None:
    found = plan(db, libraries["own"], f"{VOCABULARY[80]} {VOCABULARY[90]}", 5, CONDITIONS["1/2"])
    assert executed(found, "w_first")
    assert index_names(found, "w_first") == {"chunks_sN_tsv_idx", "documents_pkey"}
    assert not executed(found, "w_lead")


def test_no_filter_touches_no_document(db: Connection, libraries: dict[str, uuid.UUID]) -> None:
    for name in LIBRARIES:
        relations = {node.get("Relation Name") for node in below(plan(db, libraries[name], "ban bar"))}
        assert "documents" not in relations


def test_statistics_spare_counting(db: Connection, libraries: dict[str, uuid.UUID]) -> None:
    scans = """select sum(coalesce(t.seq_scan, 0) + coalesce(t.idx_scan, 0)) from pgshelf.libraries l
      join pg_stat_xact_user_tables t on t.schemaname = 'pgshelf' and t.relname = 'chunks_s' || l.shelf
      where l.id = %s"""
    for name, counted in (("own", False), ("own without statistics", True)):
        with db.transaction():
            before = db.execute(scans, [libraries[name]]).fetchone()
            (mean,) = db.execute(
                "select p.mean from pgshelf.libraries l,"
                " pgshelf.word_plan(l.id, l.shelf, l.language, %s, 10, 1, 0) p where l.id = %s",
                [VOCABULARY[0], libraries[name]],
            ).fetchone() or (None,)
            assert mean is not None and mean > 0
            assert (db.execute(scans, [libraries[name]]).fetchone() != before) is counted


@pytest.mark.parametrize(
    "made_for", ["one", " ".join(VOCABULARY[:8]), " ".join(VOCABULARY), None], ids=["1", "8", "many", "unknown"]
)
def test_a_statement_finds_the_same_for_any_number_of_words(
    db: Connection, libraries: dict[str, uuid.UUID], truths: Truths, made_for: str | None
) -> None:
    """Words beyond those that it writes out score as well."""
    rng = random.Random(11)
    for name, count in itertools.product(LIBRARIES, (1, 8, 9, 17)):
        words, prefixes = rng.sample(VOCABULARY, count), rng.sample(["ba", "de", "ki"], count % 2)
        query = " ".join([*words, *(f"{prefix}*" for prefix in prefixes)])
        scores = truths[name].scores(words, prefixes)
        check(search(db, libraries[name], query, made_for=made_for), scores, 10)


# -- statistics


def test_counted_words(db: Connection, libraries: dict[str, uuid.UUID], corpus: Corpus) -> None:
    library = libraries["own"]
    assert db.execute("select pgshelf.refresh_words(%s)", [library]).fetchone() == (True,)
    counted = dict(db.execute("select lexeme, chunks from pgshelf.terms where library_id = %s", [library]).fetchall())
    assert counted == {word: df(corpus, word) for word in VOCABULARY if df(corpus, word) > 100}
    assert 10 < len(counted) < len(VOCABULARY)
    row = db.execute("select chunks, bytes from pgshelf.word_statistics where library_id = %s", [library]).fetchone()
    assert row == (CHUNKS, sum(map(len, corpus.texts.values())))


def test_only_libraries_on_shelves_of_their_own_are_counted(db: Connection, libraries: dict[str, uuid.UUID]) -> None:
    for library in (libraries["shared"], uuid.uuid4()):
        assert db.execute("select pgshelf.refresh_words(%s)", [library]).fetchone() == (False,)
    assert db.execute("select 1 from pgshelf.terms where library_id = %s", [libraries["shared"]]).fetchone() is None


def test_words_are_counted_by_one_session_at_a_time(
    db: Connection, shared_database_url: str, libraries: dict[str, uuid.UUID]
) -> None:
    with psycopg.connect(shared_database_url) as other:
        assert other.execute("select pgshelf.refresh_words(%s)", [libraries["own"]]).fetchone() == (True,)
        assert db.execute("select pgshelf.refresh_words(%s)", [libraries["own"]]).fetchone() == (False,)
    assert db.execute("select pgshelf.refresh_words(%s)", [libraries["own"]]).fetchone() == (True,)


def test_old_statistics_lose_no_row(db: Connection, libraries: dict[str, uuid.UUID], corpus: Corpus) -> None:
    """Counts of long ago change weights a little, and nothing else."""
    with db.transaction(force_rollback=True):
        db.execute("update pgshelf.terms set chunks = 1 + chunks / 10 where library_id = %s", [libraries["own"]])
        db.execute(
            "update pgshelf.word_statistics set chunks = 3, bytes = 90 where library_id = %s", [libraries["own"]]
        )
        for query in ("ban", "ban bar " + VOCABULARY[80]):
            found = search(db, libraries["own"], query, CHUNKS)
            assert {chunk for chunk, _ in found} == corpus.scores(query.split()).keys()
            best = search(db, libraries["own"], query, 10)
            assert best == found[:10]


# -- what is typed

ENGLISH = {
    "vacuum": "VACUUM reclaims storage occupied by dead rows. Run the vacuum often.",
    "index": "An index makes reading rows faster, and the well-known price is slower writing.",
    "theorem": "The theorem of Pythagoras, in its 2nd edition: a+b=c; see file C:\\docs\\it's.",
    "crash": "After a crash recovery replays the write-ahead log.",
}


@pytest.fixture(scope="module")
def english(db: Connection) -> uuid.UUID:
    library = make_library(db, "english", "english")
    fill(db, library, {uuid.uuid5(uuid.NAMESPACE_OID, name): text for name, text in ENGLISH.items()})
    return library


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("vacuuming", "vacuum"),
        ("the reclaimed crashes", "vacuum crash"),  # ORed, stemmed, without stop words
        ("rows", "vacuum index"),
        ('"dead rows"', "vacuum"),
        ("“dead rows”", "vacuum"),
        ('"rows dead"', ""),
        ('"reading the rows"', ""),  # a stop word between them is a word between them
        ('"occupied by dead"', "vacuum"),
        ('rows -"dead rows"', "index"),
        ("rows -dead", "index"),
        ("rows --dead", "vacuum index"),  # one - excludes
        ("rows - dead", "vacuum index"),
        ("rows -the", "vacuum index"),  # a stop word is nowhere
        ("rows -reclaim*", "index"),
        ("well-known", "index"),
        ("-well-known rows", "vacuum"),
        ("recla*", "vacuum"),
        ("the*", "theorem"),  # a stop word, but a prefix as well
        ("re*", "vacuum index crash"),
        ("*", ""),
        ("r*", "vacuum index crash"),
        ("vacuum or crash", "vacuum crash"),
        ("vacuum & crash | !index", "vacuum index crash"),
        ("crash <-> index:*", "index crash"),
        ("'crash':A", "crash"),
        ("crash)(((", "crash"),
        ('5" crash 6" rows', "vacuum index crash"),  # inches open no quotation
        ('"crash rows', "vacuum index crash"),  # one that never ends is none
        ('crash "', "crash"),
        ('"" rows', "vacuum index"),
        ("it's", ""),
        ("2nd", "theorem"),
        ("a+b", "theorem"),
        ("C:\\docs\\it", "theorem"),
        ("no such thing", ""),
        ("to be or not to be", ""),
        ('"to be or not to be" rows', "vacuum index"),
    ],
)
def test_a_query_means_what_a_person_means(db: Connection, english: uuid.UUID, query: str, names: str) -> None:
    found = {chunk for chunk, _ in search(db, english, query)}
    assert found == {uuid.uuid5(uuid.NAMESPACE_OID, name) for name in names.split()}


def test_how_a_query_is_read(db: Connection) -> None:
    read = "select scored::text, required::text from pgshelf.words_query('english', %s)"
    assert db.execute(read, ["the"]).fetchone() == (None, None)
    assert db.execute(read, ["Cats"]).fetchone() == ("'cat'", None)
    scored, required = db.execute(read, ['cats "black dogs" -mouse run*']).fetchone() or ("", "")
    assert set(scored.split(" | ")) == {"'cat'", "'black'", "'dog'", "'run':*"}
    assert required == "'black' <-> 'dog' & !'mous'"


def test_a_library_is_searched_in_its_language(db: Connection) -> None:
    for language, query, found in (("german", "Häuser", 1), ("simple", "Häuser", 0), ("simple", "haus", 1)):
        library = make_library(db, f"lib {uuid.uuid4()}", language)
        fill(db, library, {uuid.uuid4(): "Das Haus am See"})
        assert len(search(db, library, query)) == found


TYPED = st.text(
    st.one_of(
        st.sampled_from("\"'-*\\ :&|!()<>“”%$\t\n"), st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    ),
    max_size=60,
)


@given(query=TYPED)
@example("ban " * 5_000)
@example("b" * 5_000)
@example("“" * 200)
@example(" ".join(f"w{n}*" for n in range(3_000)))
@example(" ".join(f'"ban{n} bar"' for n in range(2_000)))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_typed_raises_nothing(db: Connection, libraries: dict[str, uuid.UUID], query: str) -> None:
    for name in LIBRARIES[:2]:
        assert len(search(db, libraries[name], query)) <= 10
    db.execute(
        "select pgshelf.highlight('english', 'ban bar', %s), pgshelf.highlight('simple', %s, 'ban')", [query, query]
    )


@given(words=st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=14), least=st.floats(0.1, 40))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_chunk_that_could_reach_a_score_is_left_out(
    db: Connection, words: list[tuple[int, bool]], least: float
) -> None:
    """words: what each can add at most, and whether a chunk holds it."""
    words.sort(key=lambda word: -word[0])
    names = [f"w{number}" for number in range(len(words))]
    row = db.execute(
        """select to_tsvector('simple', %s) @@ pgshelf.words_above(%s::tsquery[], %s::float8[], %s),
          numnode(pgshelf.words_above(%s::tsquery[], %s::float8[], %s)) < 2000""",
        [" ".join(n for n, (_, held) in zip(names, words, strict=True) if held)]
        + [names, [float(most) for most, _ in words], least] * 2,
    ).fetchone()
    assert row
    reachable = sum(most for most, held in words if held) >= least
    if reachable:
        assert row == (True, True)
    elif len(words) <= 10:
        assert not row[0]  # and none that cannot is let in


# -- highlights


def highlight(db: Connection, text: str, query: str, language: str = "english") -> str | None:
    row = db.execute("select pgshelf.highlight(%s, %s, %s)", [language, text, query]).fetchone()
    assert row
    return None if row[0] is None else str(row[0])


@pytest.mark.parametrize(
    ("text", "query", "expected"),
    [
        ("Run the vacuum often", "vacuuming", "Run the <mark>vacuum</mark> often"),
        ("Run the vacuum often", "vac* ofte*", "Run the <mark>vacuum</mark> <mark>often</mark>"),
        ("Run the vacuum often", "vacuum -often", "Run the <mark>vacuum</mark> often"),
        ("Run the vacuum often", "crash", None),
        ("Run the vacuum often", "the", None),
        ("Run the vacuum often", "", None),
        (
            "if (a < b && vector<int> c) <script>alert('vacuum')</script>",
            "vacuum int",
            "if (a &lt; b &amp;&amp; vector&lt;<mark>int</mark>&gt; c) "
            "&lt;script&gt;alert('<mark>vacuum</mark>')&lt;/script&gt;",
        ),
        ("Say &lt; and <mark>rows</mark>", "rows", "Say &amp;lt; and &lt;mark&gt;<mark>rows</mark>&lt;/mark&gt;"),
        ("con\x01trol\x04s in\x05 rows", "rows", "controls in <mark>rows</mark>"),
    ],
)
def test_highlights_are_html(db: Connection, text: str, query: str, expected: str | None) -> None:
    assert highlight(db, text, query) == expected


def test_a_highlight_is_the_passage_that_matches(db: Connection) -> None:
    filler = " ".join(["lorem ipsum dolor"] * 40)
    text = f"the dead, and rows. {filler} dead rows are reclaimed {filler}"
    passage = highlight(db, text, '"dead rows"')
    assert passage and "<mark>dead</mark> <mark>rows</mark> are reclaimed" in passage
    assert len(passage) < 400
    passage = highlight(db, f"{filler} {filler} a crash {filler}", "crash")
    assert passage and passage.startswith("<mark>crash</mark> lorem")


@given(
    text=st.text(
        st.sampled_from("<>&;'\"/!-=ab \n\x01\x04é")
        | st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
        max_size=80,
    ),
    place=st.integers(0, 80),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_highlight_is_a_part_of_the_text(db: Connection, text: str, place: int) -> None:
    text = f"{text[:place]} rows {text[place:]}"
    passage = highlight(db, text, "rows")
    assert passage is not None
    bare = re.sub("</?mark>", "", passage)
    assert not set(bare) & set("<>")
    assert html.unescape(bare) in re.sub("[\x01-\x05]", "", text)
