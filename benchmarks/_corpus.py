"""What benchmarks search: 100,000 chunks of the Python sources on this machine, or an ANN-Benchmarks file; run by none.

A document is a stretch of a source file: a class, a long function, or neighbours that are short. Its chunks are cut at
line ends, 300 to 600 characters, and embedded by the local embedder. The same installation gives the same corpus.

The matching documents of a filter are *spread* (drawn by lot) or *topical*: documents lie in a row, cluster beside like
cluster, and a filter takes a stretch of that row.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sysconfig
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pgshelf.embedders.local import LocalEmbedder

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = (300, 600)  # characters
DOCUMENT = (1500, 4000)  # characters from which a document ends at the next definition, and anywhere
LONGEST_LINE = 1000  # longer ones are data
CLUSTERS = 256
SHARES = {"p70": 0.7, "p50": 0.5, "p10": 0.1, "p1": 0.01, "p01": 0.001, "p001": 0.0001}
STRIPES = {"p50": 0.0, "p10": 0.5, "p1": 0.6, "p01": 0.61, "p001": 0.611}  # where the stretch of each label begins
TAGS_BEGIN = 0.2  # so that containment meets other documents than equality
DECLARED = {"spread.rank": "number", "topical.rank": "number", "year": "number"}
Scatter = Literal["spread", "topical"]


@dataclass
class Corpus:
    """Chunks in the order of their documents; `document[i]` is the document of chunk i."""

    name: str
    metric: str
    texts: list[str]
    vectors: NDArray[np.float32]
    document: NDArray[np.int64]
    documents: list[dict[str, Any]]
    queries: NDArray[np.float32]
    grades: NDArray[np.float64] = field(init=False)  # a number of each chunk, drawn by lot

    def __post_init__(self) -> None:
        self.grades = np.array([round(lot(f"chunk {i}"), 6) for i in range(len(self.texts))])
        if self.documents and "spread" not in self.documents[0]["metadata"]:
            add_attributes(self)

    @property
    def dimension(self) -> int:
        return self.vectors.shape[1]

    def values(self, scatter: Scatter, name: str) -> NDArray[Any]:
        """A value of the documents' attributes, for every chunk."""
        return np.array([each["metadata"][scatter][name] for each in self.documents])[self.document]

    def tagged(self, scatter: Scatter, tag: str) -> NDArray[np.bool_]:
        """Whether the document of each chunk has a tag."""
        return np.array([tag in each["metadata"][scatter]["tags"] for each in self.documents])[self.document]


def lot(name: str) -> float:
    """A number in [0, 1) that depends on a name only."""
    return int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest()[:6]) / 2**48


# -- Python sources


def sources() -> list[tuple[str, Path]]:
    """The source files of the standard library and of the installed packages, by their name, in a fixed order."""
    standard, installed = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    names: dict[str, Path] = {}
    for folder in (standard, installed):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder)
            if "site-packages" not in inside.parts and "dist-packages" not in inside.parts:
                names.setdefault(inside.as_posix(), path)
    return sorted(names.items())


def stretches(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Lines cut at top-level definitions, long classes anywhere; each stretch with its first line's number."""
    start, size = 0, 0
    for number, line in enumerate(lines):
        defines = line.startswith(("class ", "def ", "async def ", "@")) and not lines[number - 1].startswith("@")
        if size > DOCUMENT[1] or (size > DOCUMENT[0] and defines):
            yield start, lines[start:number]
            start, size = number, 0
        size += len(line) + 1
    yield start, lines[start:]


def passages(lines: list[str]) -> Iterator[str]:
    """Lines joined to texts of 300 to 600 characters; what is left over at the end may be shorter."""
    held: list[str] = []
    size = 0
    for line in lines:
        if held and size + len(line) > CHUNK[1]:
            yield "\n".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line) + 1
        if size >= CHUNK[0] and not line.strip():
            yield "\n".join(held)
            held, size = [], 0
    yield "\n".join(held)


def read(name: str, path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The documents of a file, with their texts."""
    try:
        lines = path.read_text("utf-8").replace("\0", "").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    lines = [line for line in lines if len(line) <= LONGEST_LINE]
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for start, stretch in stretches(lines):
        texts = [text for text in passages(stretch) if len(re.sub(r"\W+", "", text)) >= 100]
        defined = re.search(r"^(?:async )?(class|def) (\w+)", "\n".join(stretch), re.MULTILINE)
        metadata = {
            "package": module.split(".")[0],
            "module": module,
            "kind": {"class": "class", "def": "function"}[defined[1]] if defined else "module",
            "defines": re.findall(r"^(?:async )?(?:class|def) (\w+)", "\n".join(stretch), re.MULTILINE)[:20],
            "line": start + 1,
            "size": sum(map(len, texts)),
            "year": 1991 + int(lot(f"year {name} {start}") * 35),
        }
        title = f"{module}.{defined[2]}" if defined else module
        yield {"key": f"{name}:{start + 1}", "title": title, "source": name, "metadata": metadata}, texts


def draw(single: bool) -> list[tuple[dict[str, Any], list[str]]]:
    """All documents of this machine in an order drawn by lot; no text occurs twice."""
    seen: set[str] = set()
    drawn = []
    for name, path in sources():
        for document, texts in read(name, path):
            fresh = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(fresh)
            if single:
                drawn += [({**document, "key": f"{document['key']}#{i}"}, [text]) for i, text in enumerate(fresh)]
            elif fresh:
                drawn.append((document, fresh))
    return sorted(drawn, key=lambda each: lot(each[0]["key"]))


def embed(texts: list[str], cache: Path) -> NDArray[np.float32]:
    """Unit vectors of texts by the local embedder, remembered in a file of the temporary directory."""
    if cache.exists():
        return np.asarray(np.load(cache)["vectors"])
    print(f"embedding {len(texts)} chunks", flush=True)
    vectors = LocalEmbedder()._embed(texts)
    fresh = cache.with_suffix(f".{uuid.uuid4().hex}.npz")
    np.savez(fresh, vectors=vectors)
    fresh.replace(cache)
    return vectors


def python_sources(chunks: int = 100_000, queries: int = 500, *, single: bool = False) -> Corpus:
    """At least `chunks` chunks of Python sources, and as many chunks of other documents as there shall be queries.

    With `single` every chunk is a document by itself.
    """
    texts: list[str] = []
    owner: list[int] = []
    documents: list[dict[str, Any]] = []
    asked: list[str] = []
    for document, parts in draw(single):
        if len(asked) < queries:  # one of each of the first documents, which are left out of the corpus
            asked.append(parts[int(lot(parts[0]) * len(parts))])
        elif len(texts) < chunks:
            owner += [len(documents)] * len(parts)
            documents.append(document)
            texts += parts
    if len(texts) < chunks:
        raise SystemExit(f"there are {len(texts)} chunks of Python source here, not {chunks}; give a file with --hdf5")
    digest = hashlib.sha256("\0".join([*texts, *asked]).encode()).hexdigest()[:16]
    vectors = embed([*texts, *asked], Path(tempfile.gettempdir()) / f"pgshelf-corpus-{digest}.npz")
    n = len(texts)
    name = f"Python sources {digest}" + (", one chunk a document" if single else "")
    return Corpus(name, "cosine", texts, vectors[:n], np.array(owner), documents, vectors[n:])


# -- an ANN-Benchmarks file


def hdf5(path: Path, chunks: int | None = None, queries: int = 500, *, per_document: int = 5) -> Corpus:
    """The vectors of a file as ann-benchmarks.com offers them (datasets `train` and `test`), dense metrics only."""
    try:
        import h5py  # type: ignore[import-not-found]  # an extra of whoever brings such a file
    except ModuleNotFoundError:
        raise SystemExit("reading HDF5 needs the package h5py: .venv/bin/python -m pip install h5py") from None
    metrics = {"angular": "cosine", "euclidean": "l2"}
    with h5py.File(path) as file:
        distance = str(file.attrs.get("distance", "angular"))
        if distance not in metrics or not {"train", "test"} <= set(file):
            raise SystemExit(f"{path} is no ANN-Benchmarks file of dense vectors: distance {distance}, holds {[*file]}")
        vectors = np.asarray(file["train"][:chunks], dtype=np.float32)
        asked = np.asarray(file["test"][:queries], dtype=np.float32)
    texts = [f"vector {i}" for i in range(len(vectors))]
    owner = np.arange(len(vectors)) // per_document
    documents: list[dict[str, Any]] = [
        {"key": f"n{i}", "title": None, "source": path.name, "metadata": {}} for i in range(owner[-1] + 1)
    ]
    return Corpus(path.name, metrics[distance], texts, vectors, owner, documents, asked)


def low(corpus: Corpus, dimension: int) -> Corpus:
    """The same chunks in few dimensions, under l2: their vectors on their first principal axes."""
    centre = corpus.vectors.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov((corpus.vectors - centre).T.astype(np.float64)))
    chosen = axes[:, ::-1][:, :dimension].astype(np.float32)
    vectors, queries = (np.ascontiguousarray((each - centre) @ chosen) for each in (corpus.vectors, corpus.queries))
    name = f"{corpus.name}, {dimension} principal axes"
    return Corpus(name, "l2", corpus.texts, vectors, corpus.document, corpus.documents, queries)


def first(corpus: Corpus, chunks: int) -> Corpus:
    """The first chunks of a corpus as a corpus, whole documents."""
    if chunks >= len(corpus.texts):
        return corpus
    documents = int(corpus.document[chunks - 1]) + 1
    n = int(np.searchsorted(corpus.document, documents))
    return Corpus(
        corpus.name, corpus.metric, corpus.texts[:n], corpus.vectors[:n], corpus.document[:n],
        corpus.documents[:documents], corpus.queries,
    )  # fmt: skip


# -- attributes


def topical_order(corpus: Corpus, seed: int = 1) -> NDArray[np.float64]:
    """The place in [0, 1) of every document in a row in which like stands beside like.

    Documents are clustered by their mean vectors (k-means); clusters stand in a chain, each next to the nearest left.
    """
    rng = np.random.default_rng(seed)
    n = len(corpus.documents)
    sums = np.zeros((n, corpus.dimension), dtype=np.float64)
    np.add.at(sums, corpus.document, corpus.vectors)
    sizes = np.bincount(corpus.document, minlength=n)
    means = (sums / sizes[:, None]).astype(np.float32)
    centres = means[rng.choice(n, min(CLUSTERS, n), replace=False)]
    for _ in range(12):
        nearest = np.argmax(means @ centres.T - (centres**2).sum(axis=1) / 2, axis=1)
        for i in np.unique(nearest):
            centres[i] = means[nearest == i].mean(axis=0)
    chain = [0]
    left = set(range(1, len(centres)))
    while left:
        chain.append(min(left, key=lambda i: float(((centres[i] - centres[chain[-1]]) ** 2).sum())))
        left.remove(chain[-1])
    lots = np.array([lot(each["key"]) for each in corpus.documents])
    return places(corpus, np.argsort(chain)[nearest] + lots)


def places(corpus: Corpus, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The place in [0, 1) of every document in the order of some values: the share of all chunks that is before it."""
    sizes = np.bincount(corpus.document, minlength=len(corpus.documents))
    row = np.argsort(values)
    result = np.empty(len(row))
    result[row] = (np.cumsum(sizes[row]) - sizes[row]) / sizes.sum()
    return result


def labels(place: float) -> dict[str, str]:
    """What a place in [0, 1) is called: `wide` is "p90" for 90 % of the places, `most` "p70"; `label` lesser ones."""
    held = [label for label, start in STRIPES.items() if start <= place < start + SHARES[label]]
    return {
        "wide": "p90" if place < 0.9 else "other",
        "most": "p70" if place < 0.7 else "other",
        "label": held[0] if held else "other",
    }


def add_attributes(corpus: Corpus) -> None:
    """Give each document what filters ask for, below `spread` and below `topical`; the figures are rounded."""
    row = topical_order(corpus)
    by_lot = {
        part: places(corpus, np.array([lot(f"{part} {each['key']}") for each in corpus.documents]))
        for part in ("label", "rank", *SHARES)
    }
    for i, document in enumerate(corpus.documents):
        noise = [f"t{int(lot(f'tag {j} ' + document['key']) * 1000)}" for j in range(3)]
        drawn = [tag for tag, share in SHARES.items() if by_lot[tag][i] < share]
        within = [tag for tag, share in SHARES.items() if (row[i] - TAGS_BEGIN) % 1 < share]
        spread, topical = float(by_lot["rank"][i]), float(row[i])
        document["metadata"] |= {
            "spread": {**labels(by_lot["label"][i]), "rank": round(spread, 6), "tags": noise + drawn},
            "topical": {**labels(topical), "rank": round(topical, 6), "tags": noise + within},
        }


# -- options


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark over this corpus."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--hdf5", type=Path, help="a file of ann-benchmarks.com instead of Python sources")
    parser.add_argument("--single", action="store_true", help="every chunk a document by itself")
    parser.add_argument("--cpu", action="store_true", help="the server's CPU time, not the client's clock (Linux)")
    parser.add_argument("--strict", action="store_true", help="end with an error when a goal is missed")
    return parser


def chosen(options: argparse.Namespace) -> Corpus:
    """The corpus that the options ask for."""
    if options.hdf5:
        return hdf5(options.hdf5, options.chunks, options.queries, per_document=1 if options.single else 5)
    return python_sources(options.chunks, single=options.single)
