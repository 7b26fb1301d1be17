"""Facets: how many documents have which value of some fields."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Router, post
from litestar.params import JSONBody
from msgspec import Meta

from pgshelf import database, filters
from pgshelf.connections import Connection
from pgshelf.http import Config, LibraryName, Reader, problems
from pgshelf.search_forms import FacetValue, Filter


class FacetsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Which fields to count, and in which documents."""

    attributes: Annotated[
        Annotated[list[str], Meta(min_length=1, max_length=32)],
        Meta(
            description="Fields of the documents' metadata, dots lead into objects; or $title, $source, $key, "
            "$created_at, $updated_at. Declared attributes are counted in their index."
        ),
    ]
    filter: Filter = None
    limit: Annotated[Annotated[int, Meta(ge=1, le=1000)], Meta(description="How many values of each field.")] = 10


class FacetsAnswer(msgspec.Struct):
    """What the documents have, as of one moment."""

    facets: Annotated[
        dict[str, list[FacetValue]], Meta(description="Of each field its values, the most frequent first.")
    ]
    documents: Annotated[int, Meta(description="How many documents match.")]


# one statement, hence one snapshot
STATEMENT = """
select a.name, f.value, f.documents, (select pgshelf.count_documents(%s, %s))
from unnest(%s::text[]) with ordinality a(name, place)
left join lateral pgshelf.facets(%s, array[a.name], %s, %s) with ordinality f(name, value, documents, place) on true
order by a.place, f.place"""


@post(
    "/libraries/{library:str}/facets",
    status_code=200,
    responses=problems(404, 413, 415),
    response_description="The values and their numbers",
    summary="Count values",
    operation_id="facets",
)
async def count_facets(
    library: LibraryName, data: JSONBody[FacetsRequest], reader: Reader, settings: Config
) -> FacetsAnswer:
    """Count how many documents have which value of some fields, of all documents or of those that match a filter."""
    condition = filters.parameter(data.filter, settings)
    names = list(dict.fromkeys(data.attributes))

    async def count(connection: Connection) -> FacetsAnswer:
        rows = await database.rows(connection, STATEMENT, library, condition, names, library, condition, data.limit)
        found: dict[str, list[FacetValue]] = {name: [] for name in names}
        for name, value, documents, _ in rows:
            if documents is not None:
                found[name].append(FacetValue(value, documents))
        return FacetsAnswer(found, rows[0][3])

    return await database.retried(reader, count, single=True)


router = Router("/", route_handlers=[count_facets], tags=["search"])
