"""Which index a library shall have, as a client says it: part of creating a library, and a resource of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType


class IndexChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The index that a library shall have; whatever is absent is chosen. What a type has not is refused."""

    type: Annotated[
        Literal["auto", "flat", "hnsw", "ivfflat", "lsh", "kdtree"],
        Meta(
            description="`auto`: none while the library is small, `hnsw` from PGSHELF_PROMOTE_AT chunks on. "
            "`flat`: none, searched exactly. `ivfflat` is built once there are 1,000 vectors. `lsh`: random "
            "hyperplanes, for the metric cosine. `kdtree`: exact, for the metric l2 in a few dimensions."
        ),
    ]
    storage: Annotated[
        Literal["halfvec", "vector", "bit"] | UnsetType,
        Meta(
            description="How `hnsw` and `ivfflat` keep vectors: `halfvec` is half as large as `vector`, `bit` keeps "
            "the signs only. Distances in answers always come from the full vectors."
        ),
    ] = UNSET
    m: Annotated[
        Annotated[int, Meta(ge=2, le=100)] | UnsetType,
        Meta(description="Links of a node of the graph (`hnsw`, `lsh`), 16 if absent."),
    ] = UNSET
    ef_construction: Annotated[
        Annotated[int, Meta(ge=4, le=1000)] | UnsetType,
        Meta(description="Candidates when a node is linked (`hnsw`, `lsh`), 64 if absent; at least twice `m`."),
    ] = UNSET
    lists: Annotated[
        Annotated[int, Meta(ge=1, le=32_768)] | UnsetType,
        Meta(description="Lists of an `ivfflat`; chosen by the number of vectors if absent."),
    ] = UNSET
    bits: Annotated[
        Annotated[int, Meta(ge=32, le=8192)] | UnsetType, Meta(description="Hyperplanes of an `lsh`; 512 if absent.")
    ] = UNSET
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2_147_483_647)] | UnsetType,
        Meta(description="Seed of the hyperplanes of an `lsh`, 0 if absent: equal seeds give equal hyperplanes."),
    ] = UNSET

    def wanted(self) -> dict[str, Any]:
        """What `libraries.index` holds."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found
