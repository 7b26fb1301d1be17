"""The commands that ask a running service: search, index, embedder."""

from __future__ import annotations

import html
import math
import re
import sys
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pgshelf.console import URL, connected, json_object, listed, printable
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from pgshelf_client import Client, Embedder, EmbedderState, Explanation, FacetValue, Hit, Index, SearchResult


@click.command()
@click.argument("library")
@click.argument("query", required=False)
@click.option("-k", default=5, show_default=True, help="How many hits.")
@click.option("--offset", type=int, help="How many hits to skip.")
@click.option("--mode", type=click.Choice(["vector", "text", "hybrid"]), help="By meaning, by words, by both.")
@click.option("--like", metavar="CHUNK_OR_DOCUMENT", help="Find what is near to it, by id or key.")
@click.option("--filter", "condition", metavar="JSON", callback=json_object, help='Such as {"year": {"$gte": 2020}}.')
@click.option("--facets", metavar="FIELD,...", callback=listed, help="Count the values of these fields of documents.")
@click.option("--group-by-document", is_flag=True, help="Of each document only the best hit.")
@click.option("--exact", is_flag=True, help="Look at every chunk that matches, whatever index there is.")
@click.option("--rerank", is_flag=True, help="Let Cohere's rerank model order the best hits.")
@click.option("--explain", is_flag=True, help="Say how the search was done, with its SQL.")
@click.option("--json", "as_json", is_flag=True, help="Print the hits as JSON lines; facets, explanation come behind.")
@URL
@click.pass_obj
def search(
    settings: Callable[[], Settings],
    /,
    library: str,
    query: str | None,
    like: str | None,
    condition: dict[str, Any] | None,
    group_by_document: bool,
    exact: bool,
    rerank: bool,
    explain: bool,
    as_json: bool,
    url: str | None,
    **options: Any,
) -> None:
    """Search LIBRARY of a running service for QUERY, or for what is --like something in it.

    Unless --mode is vector, QUERY may hold "a phrase", -exclusion and prefix*.
    """
    if query is None and like is None:
        raise click.UsageError("Say what to look for: QUERY, --like, or both.")
    asked = {
        "filter": condition,
        "group_by": "document" if group_by_document else None,
        "exact": exact or None,
        "rerank": {"provider": "cohere"} if rerank else None,
        "explain": explain or None,
        "include": ["text", "metadata", "document", "highlight"],
    }
    with connected(settings(), url) as client:
        result = _searched(client, library, query, like, {**options, **asked})
    for line in _json_lines(result) if as_json else _lines(result, options["facets"] or []):
        click.echo(line)


def _searched(
    client: Client, library: str, query: str | None, like: str | None, options: dict[str, Any]
) -> SearchResult:
    """What is like an id may be like a chunk's or a document's: they are told apart by asking."""
    from pgshelf_client import NotFound

    if like is None:
        return client.search(library, query, **options)
    with_id = _is_id(like)
    try:
        return client.search(library, query, like={"chunk" if with_id else "document": like}, **options)
    except NotFound as error:
        if not with_id or error.code != "chunk_not_found":
            raise
        return client.search(library, query, like={"document": like}, **options)


def _is_id(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _json_lines(result: SearchResult) -> list[bytes]:
    behind = {"facets": result.facets, "explain": result.explain}
    told = [{name: value} for name, value in behind.items() if value is not None]
    return [msgspec.json.encode(each) for each in (*result.hits, *told)]


def _lines(result: SearchResult, facets: list[str]) -> list[str]:
    lines = [_shown(hit) for hit in result.hits] or ["nothing found"]
    lines += [_counted(field, (result.facets or {})[field]) for field in facets]
    return lines if result.explain is None else [*lines, _told(result.explain)]


def _shown(hit: Hit) -> str:
    """A hit on two lines; the words that were found are bold where the output is a terminal."""
    text = printable(hit.text or "")[:160]
    if hit.highlight is not None:
        marked = re.sub("<mark>(.*?)</mark>", lambda found: click.style(found[1], bold=True), printable(hit.highlight))
        text = html.unescape(marked)
    return f"{hit.score:.3f}  {hit.key or hit.document_id} #{hit.ordinal}\n       {text}"


def _counted(field: str, values: list[FacetValue]) -> str:
    counts = [f"{printable(_plain(value.value))} {value.documents}" for value in values]
    return f"{field}: {', '.join(counts) or 'no values'}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _told(explanation: Explanation) -> str:
    recall = "" if explanation.recall is None else f", recall {explanation.recall:.2f} against exact search"
    removed = f"{explanation.rows_removed} rows were looked at and did not match"
    return f"how: {explanation.strategy}{recall}; {removed}\n{explanation.statement}"


@click.command()
@click.argument("library")
@click.option(
    "--type", "kind", type=click.Choice(["auto", "flat", "hnsw", "ivfflat", "lsh", "kdtree"]), help="Ask for it."
)
@click.option("--storage", type=click.Choice(["halfvec", "vector", "bit"]), help="How hnsw and ivfflat keep vectors.")
@click.option("--wait", is_flag=True, help="Wait until it is built.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@URL
@click.pass_obj
def index(
    settings: Callable[[], Settings],
    /,
    library: str,
    kind: str | None,
    storage: str | None,
    wait: bool,
    as_json: bool,
    url: str | None,
) -> None:
    """Show the index of LIBRARY of a running service, or ask for another one."""
    if storage and not kind:
        raise click.UsageError("--storage needs --type.")
    with connected(settings(), url) as client:
        found = client.set_index(library, kind, storage=storage) if kind else client.get_index(library)
        if wait:
            found = client.wait_for_index(library, timeout=math.inf)
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    click.echo(f"wanted  {_described(found.wanted)}\nin use  {_described(found.actual)}\nstate   {_state(found)}")
    if wait and found.state == "failed":
        sys.exit(1)


def _described(index: dict[str, Any]) -> str:
    kind, *options = [str(index["type"]), *(f"{name} {value}" for name, value in index.items() if name != "type")]
    return ", ".join([kind, *options])


def _state(index: Index) -> str:
    if index.state == "building":
        about = f", about {index.estimate.seconds:.0f} s in all" if index.estimate else ""
        return f"building, {index.progress:.0%} done{about}"
    more = {"failed": f": {index.error}; it is tried again", "waiting": " for enough vectors, searched exactly so far"}
    return index.state + more.get(index.state, "")


@click.command()
@click.argument("library")
@click.option("--provider", help="Ask for it: local, cohere, openai, sentence_transformers, none.")
@click.option("--model", help="A model of the provider.")
@click.option("--dimension", type=int, help="Numbers per vector.")
@click.option("--cancel", is_flag=True, help="Call a change off.")
@click.option("--wait", is_flag=True, help="Wait until it is changed.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@URL
@click.pass_obj
def embedder(
    settings: Callable[[], Settings],
    library: str,
    provider: str | None,
    model: str | None,
    dimension: int | None,
    cancel: bool,
    wait: bool,
    as_json: bool,
    url: str | None,
) -> None:
    """Show the embedder of LIBRARY of a running service, change it, or call a change off."""
    if (model or dimension) and not provider:
        raise click.UsageError("--model and --dimension need --provider.")
    if cancel and provider:
        raise click.UsageError("Either --cancel or --provider.")
    with connected(settings(), url) as client:
        if provider:
            found = client.set_embedder(library, provider, model=model, dimension=dimension)
        else:
            found = client.cancel_embedder(library) if cancel else client.get_embedder(library)
        if wait:
            found = client.wait_for_embedder(library, timeout=math.inf)
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    wanted = found.wanted or found.embedder
    click.echo(f"wanted  {_maker(wanted)}\nin use  {_maker(found.embedder)}\nstate   {_changing(found)}")
    if wait and found.state == "failed":
        sys.exit(1)


def _maker(embedder: Embedder) -> str:
    return ", ".join([embedder.provider, *filter(None, [embedder.model]), f"dimension {embedder.dimension}"])


def _changing(found: EmbedderState) -> str:
    about = f"{found.state}, {found.progress:.0%} done, {found.embedded} of {found.total} chunks embedded"
    return {"ready": "ready", "failed": f"failed: {found.error}; it is tried again"}.get(found.state, about)
