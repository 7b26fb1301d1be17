"""The tables as SQLAlchemy sees them: Alembic's target and the source of Core statements."""

from pgvector.sqlalchemy import VECTOR
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIT, JSONB, TSVECTOR, UUID
from sqlalchemy.types import UserDefinedType


class XID8(UserDefinedType[str]):
    """PostgreSQL's 64-bit transaction id, which SQLAlchemy has no name for."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "xid8"


metadata = MetaData(schema="pgshelf")
moment = DateTime(timezone=True)
now = text("now()")
empty = text("'{}'")

installation = Table(
    "installation",
    metadata,
    Column("only_row", Boolean, nullable=False, server_default=text("true")),
    Column("created_extension", Boolean, nullable=False, server_default=text("false")),
    Column("created_roles", ARRAY(Text), nullable=False, server_default=empty),
    Column("sql_hash", Text),
    PrimaryKeyConstraint("only_row", name="installation_pkey"),
    CheckConstraint("only_row", name="installation_only_row_check"),
    comment="What the migrations made outside the tables, so that a downgrade takes away no more.",
)

libraries = Table(
    "libraries",
    metadata,
    Column("id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("name", Text, nullable=False),
    Column("description", Text),
    Column("dimension", Integer, nullable=False),
    Column("metric", Text, nullable=False, server_default="cosine"),
    Column("embedder", JSONB, nullable=False, comment='Who makes the vectors: {"provider", "model", "dimension"}.'),
    Column("chunking", JSONB, nullable=False, comment='How text is split: {"size", "overlap"} in characters.'),
    Column("language", Text, nullable=False, server_default="english"),
    Column("index", JSONB, nullable=False, comment="The wanted index; index_state tells how far the actual one is."),
    Column("index_state", Text, nullable=False, server_default="ready"),
    Column(
        "attributes",
        JSONB,
        nullable=False,
        server_default=empty,
        comment='Metadata fields to index: {"year": "number"}.',
    ),
    Column("metadata", JSONB, nullable=False, server_default=empty),
    Column(
        "shelf",
        Integer,
        nullable=False,
        server_default="0",
        comment="The partition of chunks that counts for this library; 0 is shared.",
    ),
    Column(
        "moving",
        Integer,
        nullable=False,
        server_default="0",
        comment="0 at rest, 1 writers log documents, 2 writers write both shelves.",
    ),
    Column("moving_to", Integer),
    Column("fanout", Integer, nullable=False, server_default="1"),
    Column("version", BigInteger, nullable=False, server_default="1"),
    Column("created_at", moment, nullable=False, server_default=now),
    Column("updated_at", moment, nullable=False, server_default=now),
    Column("deleted_at", moment, comment="Set when the library was deleted; its rows are reaped afterwards."),
    Column(
        "index_actual",
        JSONB,
        nullable=False,
        server_default=text("""'{"type": "flat"}'"""),
        comment="The index that searches use now.",
    ),
    Column("index_error", Text, comment="Why the last attempt to build the wanted index failed."),
    Column("index_attempts", Integer, nullable=False, server_default="0"),
    Column("index_after", moment, nullable=False, server_default=now),
    Column(
        "attributes_ready",
        JSONB,
        nullable=False,
        server_default=empty,
        comment="The attributes whose values are all in attribute_values.",
    ),
    Column(
        "attributes_filling",
        JSONB,
        comment="How far the worker has come with attributes that were declared; null when it is done.",
    ),
    Column(
        "moving_change",
        Integer,
        comment="The change of the embedder whose vectors the rows on the new shelf hold; null where they move as they "
        "are.",
    ),
    PrimaryKeyConstraint("id", name="libraries_pkey"),
    Index("libraries_name_key", "name", unique=True, postgresql_where=text("deleted_at is null")),
    Index("libraries_order_idx", "created_at", "id"),
    comment="A library: documents that share an embedder, a dimension and a metric.",
)

documents = Table(
    "documents",
    metadata,
    Column(
        "place", Integer, nullable=False, comment="Stable hash of the library, the distribution column on a cluster."
    ),
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("key", Text, comment="The caller's own name for the document, unique in its library."),
    Column("title", Text),
    Column("source", Text),
    Column("metadata", JSONB, nullable=False, server_default=empty),
    Column(
        "content_hash",
        LargeBinary,
        comment="SHA-256 of the texts as they were written together; null once a single chunk was changed.",
    ),
    Column(
        "version",
        BigInteger,
        nullable=False,
        server_default="1",
        comment="Grows with every change of the document or its chunks; the ETag.",
    ),
    Column("created_at", moment, nullable=False, server_default=now),
    Column("updated_at", moment, nullable=False, server_default=now),
    PrimaryKeyConstraint("id", name="documents_pkey"),
    UniqueConstraint("library_id", "key", name="documents_key_key"),
    ForeignKeyConstraint(["library_id"], ["pgshelf.libraries.id"], name="documents_library_fk"),
    Index("documents_order_idx", "library_id", "created_at", "id"),
    Index("documents_sample_idx", "library_id", "id"),
    comment="A document of a library; business tables may reference its id.",
)
Index(
    "documents_metadata_idx",
    func.pgshelf.scoped(documents.c.library_id, documents.c.metadata).label("scoped"),
    postgresql_using="gin",
    postgresql_ops={"scoped": "jsonb_path_ops"},
    postgresql_with={"fastupdate": "off"},
)

chunks = Table(
    "chunks",
    metadata,
    Column("shelf", Integer, nullable=False),
    Column("place", Integer, nullable=False),
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("document_id", UUID(as_uuid=True), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("text", Text, nullable=False),
    Column("metadata", JSONB, nullable=False, server_default=empty),
    Column("embedding", VECTOR, comment="The vector; null asks the worker to make one."),
    Column("language", Text, nullable=False),
    Column("tsv", TSVECTOR, Computed("pgshelf.words(language, text)", persisted=True)),
    Column("embed_attempts", Integer, nullable=False, server_default="0"),
    Column("embed_after", moment, nullable=False, server_default=now),
    Column("embed_error", Text, comment="Why the last attempt to embed this chunk failed."),
    Column(
        "code",
        BIT(varying=True),
        comment="On which side of each hyperplane the vector lies; null where the library has no lsh index.",
    ),
    PrimaryKeyConstraint("library_id", "document_id", "ordinal", "place", "shelf", name="chunks_pkey"),
    Index("chunks_id_idx", "id"),
    Index("chunks_pending_idx", "library_id", "embed_after", postgresql_where=text("embedding is null")),
    comment="The passages that are searched; rows count where their shelf is their library's.",
    postgresql_partition_by="list (shelf)",
)

move_log = Table(
    "move_log",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("document_id", UUID(as_uuid=True), nullable=False),
    Index("move_log_library_idx", "library_id"),
    comment="Documents written while their library moves between shelves.",
)

Sequence("shelf_seq", metadata=metadata, data_type=Integer)
Sequence("index_seq", metadata=metadata, data_type=Integer)

retired_shelves = Table(
    "retired_shelves",
    metadata,
    Column("shelf", Integer, nullable=False, autoincrement=False),
    Column("retired_at", moment, nullable=False, server_default=now),
    PrimaryKeyConstraint("shelf", name="retired_shelves_pkey"),
    comment="Shelves that no library uses any more and that will be dropped.",
)

planes = Table(
    "planes",
    metadata,
    Column("serial", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("plane", VECTOR, nullable=False),
    PrimaryKeyConstraint("serial", "number", name="planes_pkey"),
    comment="Hyperplanes of lsh indexes, by the serial of the index.",
)

attribute_values = Table(
    "attribute_values",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("document_id", UUID(as_uuid=True), nullable=False),
    Column("attribute", Text, nullable=False),
    Column("num", Double),
    Column("txt", Text(collation="C")),
    Column("ts", moment),
    Column(
        "exact",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="False where only the document has the whole value: another type, a long text, a number beyond float8.",
    ),
    PrimaryKeyConstraint("library_id", "document_id", "attribute", name="attribute_values_pkey"),
    Index(
        "attribute_values_inexact_idx",
        "library_id",
        "attribute",
        "document_id",
        postgresql_where=text("not exact"),
    ),
    *(
        Index(
            f"attribute_values_{name}_idx",
            "library_id",
            "attribute",
            name,
            "document_id",
            postgresql_where=text(f"{name} is not null"),
        )
        for name in ("num", "txt", "ts")
    ),
    comment="Declared attributes of documents, kept by triggers, for ranges, sorting and facets.",
)

terms = Table(
    "terms",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("lexeme", Text(collation="C"), nullable=False),
    Column("chunks", BigInteger, nullable=False),
    PrimaryKeyConstraint("library_id", "lexeme", name="terms_pkey"),
    comment="How many chunks of a library hold a frequent word; made by the worker.",
)

word_statistics = Table(
    "word_statistics",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("chunks", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("made_at", moment, nullable=False, server_default=now),
    PrimaryKeyConstraint("library_id", name="word_statistics_pkey"),
    comment="Chunks of a library and the bytes of their texts when its terms were counted.",
)

waiting = Table(
    "waiting",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("xid", XID8, nullable=False),
    Column("due", moment, nullable=False, comment="None of these chunks may be tried before."),
    PrimaryKeyConstraint("library_id", "xid", name="waiting_pkey"),
    Index("waiting_due_idx", "due"),
    comment="Libraries that may hold chunks without a vector, by the transaction that wrote them.",
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", Text, nullable=False, server_default="", comment="Whose keys they are."),
    Column("key", Text, nullable=False),
    Column("request", LargeBinary, nullable=False, comment="SHA-256 of what was asked for."),
    Column("status", Integer, comment="Of the answer; null only inside the transaction that does the work."),
    Column("headers", JSONB),
    Column("body", LargeBinary, comment="The answer as JSON; null where it has none."),
    Column("created_at", moment, nullable=False, server_default=now),
    PrimaryKeyConstraint("scope", "key", name="idempotency_keys_pkey"),
    Index("idempotency_keys_age_idx", "created_at"),
    comment="Answers to writes that came with an Idempotency-Key, for when they are sent again.",
)

events = Table(
    "events",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("key", Text, nullable=False),
    Column("document_id", UUID(as_uuid=True), nullable=False),
    Column("hash", LargeBinary, nullable=False, comment="SHA-256 of text and metadata as they were sent first."),
    PrimaryKeyConstraint("library_id", "key", name="events_pkey"),
    comment="Events that were taken, so that one that is sent again has no effect.",
)

embedding_cache = Table(
    "embedding_cache",
    metadata,
    Column(
        "key",
        LargeBinary,
        nullable=False,
        comment="SHA-256 of provider, model, dimension, kind, options and text: see embedding_cache.py.",
    ),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("embedding", VECTOR, nullable=False),
    Column("used_at", moment, nullable=False, server_default=now, comment="Correct to the hour."),
    PrimaryKeyConstraint("key", name="embedding_cache_pkey"),
    Index("embedding_cache_used_idx", "used_at"),
    comment="Vectors that providers made; the least recently used go.",
)

imports = Table(
    "imports",
    metadata,
    Column("id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("name", Text, comment="The Idempotency-Key that it came with; null ends with the import."),
    Column(
        "runner", UUID(as_uuid=True), nullable=False, comment="Who may write for it: a new one each time it is sent."
    ),
    Column(
        "lines",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="Lines that are committed; the next runner skips them.",
    ),
    Column(
        "checksum",
        BigInteger,
        nullable=False,
        server_default="0",
        comment="CRC-32 of these lines, to tell another file of the same name.",
    ),
    Column("started_at", moment, nullable=False, server_default=now),
    Column("written_at", moment, nullable=False, server_default=now),
    Column("lease_until", moment, nullable=False, comment="The runner lives, or had ended then."),
    PrimaryKeyConstraint("id", name="imports_pkey"),
    UniqueConstraint("library_id", "name", name="imports_name_key"),
    comment="Imports that run, and how far those with a name have come.",
)

change_log = Table(
    "change_log",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("id", BigInteger, Identity(always=True), nullable=False, comment="In the order of writing."),
    Column("kind", Text, nullable=False),
    Column("document_id", UUID(as_uuid=True), comment="Null where the library itself changed."),
    Column("key", Text),
    Column("version", BigInteger, nullable=False),
    Column("created", Boolean),
    Column(
        "position",
        BigInteger,
        comment="In the order of commits, from 1 for each library; null until it is given.",
    ),
    Column("stamped_at", moment),
    PrimaryKeyConstraint("library_id", "id", name="change_log_pkey"),
    Index(
        "change_log_position_idx", "library_id", "position", unique=True, postgresql_where=text("position is not null")
    ),
    Index("change_log_unstamped_idx", "library_id", "id", postgresql_where=text("position is null")),
    comment="The change feed: what was committed, in its order; pgshelf.changes() reads it.",
)

embedder_changes = Table(
    "embedder_changes",
    metadata,
    Column(
        "serial",
        Integer,
        nullable=False,
        autoincrement=False,
        server_default=text("nextval('pgshelf.change_seq'::regclass)"),
    ),
    Column("library_id", UUID(as_uuid=True), nullable=False),
    Column("embedder", JSONB, nullable=False),
    Column("phase", Text, nullable=False, server_default="embedding"),
    Column("walked", UUID(as_uuid=True), comment="The last document that was looked through in this pass."),
    Column("passes", Integer, nullable=False, server_default="0"),
    Column(
        "found", BigInteger, nullable=False, server_default="0", comment="Texts that this pass found without a vector."
    ),
    Column("done", BigInteger, nullable=False, server_default="0", comment="Chunks that the first pass has seen to."),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due", moment, nullable=False, server_default=now),
    Column("error", Text),
    Column("started_at", moment, nullable=False, server_default=now),
    PrimaryKeyConstraint("serial", name="embedder_changes_pkey"),
    Index("embedder_changes_library_key", "library_id", unique=True, postgresql_where=text("phase <> 'over'")),
    comment="Libraries that are to have another embedder, and how far each is.",
)
Sequence("change_seq", metadata=metadata, data_type=Integer)

next_embeddings = Table(
    "next_embeddings",
    metadata,
    Column("change", Integer, nullable=False, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
    Column("embedding", VECTOR),
    Column("error", Text, comment="Why there is none: the embedder refused the text."),
    PrimaryKeyConstraint("change", "hash", name="next_embeddings_pkey"),
    comment="Vectors of an embedder that a library does not use yet, by the SHA-256 of the text.",
)

ROLES = "role in ('reader', 'writer', 'admin')"

keys = Table(
    "keys",
    metadata,
    Column("id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("libraries", ARRAY(Text), comment="Ids, names and patterns (team-*) of the libraries it sees; null: all."),
    Column("created_at", moment, nullable=False, server_default=now),
    Column("expires_at", moment),
    Column("revoked_at", moment),
    Column("last_used_at", moment, comment="Exact to a minute."),
    PrimaryKeyConstraint("id", name="keys_pkey"),
    CheckConstraint(ROLES, name="keys_role_check"),
    Index("keys_name_key", "name", unique=True, postgresql_where=text("revoked_at is null")),
    Index("keys_order_idx", "created_at", "id"),
    comment="Who may call the REST API, with which role, for which libraries; revoked ones stay.",
)

key_secrets = Table(
    "key_secrets",
    metadata,
    Column("hash", LargeBinary, nullable=False, comment="SHA-256 of the secret, which is stored nowhere."),
    Column("key_id", UUID(as_uuid=True), nullable=False),
    Column("hint", Text, nullable=False, comment="How the secret begins, for people who look for it."),
    Column("token", Boolean, nullable=False, server_default=text("false")),
    Column("role", Text, comment="Of a token: a role below that of its key."),
    Column("libraries", ARRAY(Text), comment="Of a token: what it sees of what its key sees; null: all of that."),
    Column("created_at", moment, nullable=False, server_default=now),
    Column("expires_at", moment),
    PrimaryKeyConstraint("hash", name="key_secrets_pkey"),
    ForeignKeyConstraint(["key_id"], ["pgshelf.keys.id"], name="key_secrets_key_fk", ondelete="CASCADE"),
    CheckConstraint(ROLES, name="key_secrets_role_check"),
    Index("key_secrets_key_idx", "key_id"),
    Index("key_secrets_tokens_idx", "expires_at", postgresql_where=text("token")),
    comment="What proves a key: its secret, those before it while they overlap, tokens.",
)

grants = Table(
    "grants",
    metadata,
    Column(
        "role",
        Text,
        nullable=False,
        comment="By name, so that dumps go to other clusters; revoke before it is dropped.",
    ),
    Column("library_id", UUID(as_uuid=True), comment="Null: all libraries, those to come included."),
    Column("access", Text, nullable=False),
    UniqueConstraint("role", "library_id", name="grants_role_library_key", postgresql_nulls_not_distinct=True),
    ForeignKeyConstraint(["library_id"], ["pgshelf.libraries.id"], name="grants_library_fk", ondelete="CASCADE"),
    CheckConstraint("access in ('monitor', 'read', 'write')", name="grants_access_check"),
    Index("grants_library_idx", "library_id"),
    comment="Which libraries a role of PostgreSQL has in SQL; pgshelf.grant_library writes it.",
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("at", moment, nullable=False, server_default=text("clock_timestamp()")),
    Column("id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    Column("action", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column(
        "principal_kind",
        Text,
        nullable=False,
        comment="key, token, jwt, anybody; role: of PostgreSQL.",
    ),
    Column("principal", Text, nullable=False),
    Column("principal_id", UUID(as_uuid=True)),
    Column("library_id", UUID(as_uuid=True)),
    Column("library", Text, comment="What it was called then."),
    Column("document", Text),
    Column("request_id", Text),
    Column(
        "count",
        BigInteger,
        nullable=False,
        comment="Documents, if it is about those; refused attempts.",
    ),
    Column("detail", Text),
    PrimaryKeyConstraint("at", "id", name="audit_log_pkey"),
    CheckConstraint("outcome in ('done', 'refused')", name="audit_log_outcome_check"),
    Index("audit_log_library_idx", "library_id", "at", "id", postgresql_where=text("library_id is not null")),
    comment="Who did what to which library: only added to, the worker forgets old rows.",
)

rate_shares = Table(
    "rate_shares",
    metadata,
    Column("caller", Text, nullable=False),
    Column("class", Text, nullable=False),
    Column("whole_at", moment, nullable=False, comment="When all of the share is there again."),
    PrimaryKeyConstraint("caller", "class", name="rate_shares_pkey"),
    comment="What callers have used of their shares of requests, by class.",
    prefixes=["UNLOGGED"],
    postgresql_with={"fillfactor": "50"},
)

library_marks = Table(
    "library_marks",
    metadata,
    Column("library_id", UUID(as_uuid=True), nullable=False, comment="The nil id stands for all libraries."),
    Column("mark", BigInteger, nullable=False, server_default=text("uuid_hash_extended(gen_random_uuid(), 0)")),
    PrimaryKeyConstraint("library_id", "mark", name="library_marks_pkey"),
    comment="Random numbers left by whoever changes something: all of a library together are its state, "
    "for the query cache.",
)

heartbeats = Table(
    "heartbeats",
    metadata,
    Column("n", Integer, nullable=False, autoincrement=False),
    Column("at", moment, nullable=False),
    Column("wal", BigInteger, nullable=False, comment="The LSN, as a number of bytes."),
    PrimaryKeyConstraint("n", name="heartbeats_pkey"),
    comment="Places in the WAL and their times, a ring: how many seconds a replica is late.",
)
