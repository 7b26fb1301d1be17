"""Which embedder a library shall have, as a client says it: part of creating a library, and a resource of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pgshelf.embedders import PROVIDERS
from pgshelf.embedding import described_embedder
from pgshelf.errors import Problem, invalid
from pgshelf.settings import Settings

Dimension = Annotated[int, Meta(ge=1, le=16000)]
Prefix = Annotated[str, Meta(max_length=1000)]
Provider = Annotated[str, Meta(extra_json_schema={"enum": list(PROVIDERS)})]


class EmbedderChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Who shall make the vectors; with `none` the client brings them."""

    provider: Annotated[
        Annotated[Provider, Meta(max_length=64, examples=["local"])],
        Meta(
            description="`local` and `sentence_transformers` compute in the server; `cohere` and `openai`, any "
            "endpoint of its kind, are asked over the network; `none` leaves it to the client. What the server is not "
            "set up for is answered with 422."
        ),
    ]
    model: Annotated[
        Annotated[str, Meta(max_length=200)] | None,
        Meta(description="A model of the provider; its own choice if absent. With `none`, a note for the reader."),
    ] = None
    dimension: Annotated[
        Dimension | None,
        Meta(
            description="Numbers per vector; the model's own if absent, with `cohere` 1024 where there is a choice. "
            "With `none` it is required, here or outside."
        ),
    ] = None
    query_prefix: Annotated[
        Prefix | UnsetType,
        Meta(description="Of `openai`: goes before each query, for models trained with it, such as `query: ` for E5."),
    ] = UNSET
    document_prefix: Annotated[
        Prefix | UnsetType, Meta(description="Of `openai`: goes before each text of a document, such as `passage: `.")
    ] = UNSET
    embedding_type: Annotated[
        Literal["float", "binary"] | UnsetType,
        Meta(
            description="Of `cohere`: `binary` fetches the vectors of documents as bits, a 32nd of the traffic, and "
            "stores plus and minus one; made for an index of storage `bit`. `float` if absent."
        ),
    ] = UNSET
    truncate: Annotated[
        Literal["end", "start", "none"] | UnsetType,
        Meta(
            description="Of `cohere`: what is left out of a text that is too long for the model; with `none` such a "
            "text is refused. `end` if absent."
        ),
    ] = UNSET


class EmbedderUsed(msgspec.Struct):
    """Who makes the vectors of a library."""

    provider: Annotated[Provider, Meta(description="`none`: the client brings the vectors.")]
    dimension: Annotated[int, Meta(description="Numbers per vector.")]
    model: Annotated[str | None, Meta(description="The model; with `none` what the client noted, or null.")] = None
    embedding_type: Annotated[str | UnsetType, Meta(description="Absent if `float`.")] = UNSET
    truncate: Annotated[str | UnsetType, Meta(description="Absent if `end`.")] = UNSET
    query_prefix: Annotated[str | UnsetType, Meta(description="Absent if there is none.")] = UNSET
    document_prefix: Annotated[str | UnsetType, Meta(description="Absent if there is none.")] = UNSET
    shortened: Annotated[bool | UnsetType, Meta(description="Whether the model was asked for fewer numbers.")] = UNSET


async def chosen(settings: Settings, choice: EmbedderChoice, dimension: int | None = None) -> dict[str, Any]:
    """What `libraries.embedder` holds, with everything that was left open; `dimension` is what was said outside."""
    if choice.dimension and dimension and choice.dimension != dimension:
        raise invalid("dimension", f"is {dimension}, but embedder.dimension is {choice.dimension}")
    dimension = choice.dimension or dimension
    if choice.provider not in PROVIDERS:
        raise Problem(
            "embedder_not_configured", f"There is no embedder {choice.provider!r}; choose {' or '.join(PROVIDERS)}."
        )
    if choice.provider == "none":
        if dimension is None:
            raise invalid("dimension", "is required where the client brings the vectors (embedder none)")
        return {"provider": "none", "model": choice.model, "dimension": dimension}
    return await described_embedder(settings, {**msgspec.to_builtins(choice), "dimension": dimension})
