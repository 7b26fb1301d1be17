"""One frozen object read from the environment (PGSHELF_*)."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlsplit

import msgspec
import platformdirs
from msgspec import Meta

PREFIX = "PGSHELF_"
BASE_URLS = {"cohere_base_url": "https://api.cohere.com", "openai_base_url": "http://localhost:8000/v1"}
# `*`, or origins as browsers send them, separated by commas
# such as 100/s, 600/10min; `off`: none; empty: what the preset says
RATE = r"^(off|[1-9][0-9]{0,8}/([1-9][0-9]{0,4})?(s|min|h|d))?\Z"
ORIGINS = r"^(\*|(https?://[^/?#,\s@*]+(,\s*https?://[^/?#,\s@*]+)*)?)\Z"


class SettingsError(ValueError):
    """A setting is unknown or has a value that cannot be used; the message says which and what it may be."""


def default_data_dir() -> Path:
    """Where the embedded PostgreSQL keeps its data: /var/lib/pgshelf for root, the user's data directory otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/pgshelf")
    return Path(platformdirs.user_data_dir("pgshelf"))


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that can be set; `docs/configuration.md` describes each field."""

    database_url: str | None = None
    data_dir: Path = msgspec.field(default_factory=default_data_dir)
    postgres_version: Annotated[int, Meta(ge=16, le=18)] = 18
    auto_migrate: bool | None = None
    vector_schema: Annotated[str, Meta(min_length=1, max_length=63)] = "public"

    replica_url: Annotated[str, Meta(min_length=1)] | None = None
    replica_wait: Annotated[float, Meta(ge=0)] = 0.5
    replica_max_lag: Annotated[float, Meta(gt=0)] = 10.0
    replica_interval: Annotated[float, Meta(gt=0, le=60)] = 1.0
    replica_timeout: Annotated[float, Meta(gt=0, le=60)] = 2.0
    consistency_tokens: bool = False

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8432
    allow_unauthenticated: bool = False
    workers: Annotated[int, Meta(ge=1, le=256)] = msgspec.field(default_factory=lambda: os.cpu_count() or 1)
    workers_lifetime: Annotated[int, Meta(ge=60)] | None = None
    workers_max_bytes: Annotated[int, Meta(ge=64 * 1024 * 1024)] | None = None
    api_prefix: Annotated[str, Meta(pattern=r"^(/[A-Za-z0-9._~-]+)*$")] = "/v1"

    auth: Literal["auto", "on", "off"] = "auto"
    api_key: Annotated[str, Meta(pattern=r"^[!-~]+\Z")] | None = None
    public_search: str = ""
    allowed_hosts: str = ""
    cors_origins: Annotated[str, Meta(pattern=ORIGINS)] = ""
    token_lifetime: Annotated[int, Meta(ge=10, le=86_400)] = 3600
    jwt_issuer: Annotated[str, Meta(min_length=1)] | None = None
    jwt_audience: Annotated[str, Meta(min_length=1)] | None = None
    jwt_jwks_url: Annotated[str, Meta(pattern=r"^https?://[^/?#\s]+[^#\s]*\Z")] | None = None
    jwt_keys_file: Path | None = None
    jwt_role_claim: Annotated[str, Meta(min_length=1)] = "pgshelf_role"
    jwt_roles: Annotated[str, Meta(pattern=r"^([^,=]+=(reader|writer|admin)(,[^,=]+=(reader|writer|admin))*)?\Z")] = ""
    jwt_libraries_claim: Annotated[str, Meta(min_length=1)] = "pgshelf_libraries"
    jwt_libraries: str = ""

    embedder: Literal["local", "cohere", "openai", "sentence_transformers", "none"] | None = None
    embedder_model: Annotated[str, Meta(max_length=200)] | None = None
    embedder_dimension: Annotated[int, Meta(ge=1, le=16000)] | None = None
    embedding_cache_rows: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 100_000
    chunk_size: Annotated[int, Meta(ge=50, le=20_000)] = 1200
    chunk_overlap: Annotated[int, Meta(ge=0, le=10_000)] = 0

    cohere_api_key: Annotated[str, Meta(pattern=r"^[!-~]+\Z")] | None = None
    cohere_base_url: Annotated[str, Meta(pattern=r"^https?://[^/?#\s]+[^?#\s]*\Z")] = "https://api.cohere.com"
    cohere_timeout: Annotated[float, Meta(gt=0)] = 10.0

    openai_base_url: Annotated[str, Meta(pattern=r"^https?://[^/?#\s]+[^?#\s]*\Z")] | None = None
    openai_api_key: Annotated[str, Meta(pattern=r"^[!-~]+\Z")] | None = None
    openai_timeout: Annotated[float, Meta(gt=0)] = 30.0
    openai_batch: Annotated[int, Meta(ge=1, le=2048)] = 32
    openai_encoding: Literal["float", "base64"] = "float"

    sentence_transformers_models: str | None = None

    pool_size: Annotated[int, Meta(ge=1, le=1000)] = 10
    pool_timeout: Annotated[float, Meta(gt=0)] = 5.0
    connect_timeout: Annotated[int, Meta(ge=2)] = 5
    statement_timeout: Annotated[float, Meta(gt=0)] = 30.0
    lock_timeout: Annotated[float, Meta(gt=0)] = 10.0

    worker_enabled: bool = True
    worker_interval: Annotated[float, Meta(gt=0)] = 0.5
    worker_lease: Annotated[float, Meta(gt=0)] = 60.0
    worker_concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
    worker_attempts: Annotated[int, Meta(ge=1)] = 8
    embed_batch: Annotated[int, Meta(ge=1, le=10_000)] = 256

    changes_retention: Annotated[float, Meta(gt=0)] = 7.0
    changes_interval: Annotated[float, Meta(gt=0)] = 0.1
    changes_max_wait: Annotated[float, Meta(ge=0)] = 60.0
    changes_readers: Annotated[int, Meta(ge=1)] = 1000
    idempotency_retention: Annotated[float, Meta(gt=0)] = 24.0
    circuit_failures: Annotated[int, Meta(ge=1, le=1000)] = 5
    circuit_wait: Annotated[float, Meta(gt=0, le=3600)] = 60.0

    rate_limits: Literal["off", "team", "public"] = "off"
    rate_limit_search: Annotated[str, Meta(pattern=RATE)] = ""
    rate_limit_write: Annotated[str, Meta(pattern=RATE)] = ""
    rate_limit_import: Annotated[str, Meta(pattern=RATE)] = ""
    rate_limit_admin: Annotated[str, Meta(pattern=RATE)] = ""
    max_concurrent_requests: Annotated[int, Meta(ge=0)] = 0
    max_concurrent_streams: Annotated[int, Meta(ge=0)] = 0
    trusted_proxies: str = ""

    max_connections: Annotated[int, Meta(ge=1, le=100_000)] = 1024
    header_timeout: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    body_timeout: Annotated[float, Meta(gt=0, le=3600)] = 30.0

    cache_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 64 * 1024 * 1024
    cache_ttl: Annotated[float, Meta(gt=0)] = 3600.0
    replication_lag_bytes: Annotated[int, Meta(ge=0)] = 64 * 1024 * 1024
    replication_lag_seconds: Annotated[float, Meta(ge=0)] = 60.0
    heartbeat_interval: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    backup_directory: Path | None = None
    backup_url: str | None = None
    backup_keep: Annotated[int, Meta(ge=0)] = 0
    wal_archive: Path | None = None
    pg_bin: Path | None = None

    recall_interval: Annotated[float, Meta(ge=0)] = 600.0
    promote_at: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 10_000
    index_memory_bytes: Annotated[int, Meta(ge=1024 * 1024, le=2**40)] = 1024 * 1024 * 1024

    max_body_bytes: Annotated[int, Meta(ge=1024)] = 32 * 1024 * 1024
    max_title_length: Annotated[int, Meta(ge=1)] = 1000
    max_query_length: Annotated[int, Meta(ge=1)] = 10_000
    max_text_length: Annotated[int, Meta(ge=1)] = 2_000_000
    max_chunk_length: Annotated[int, Meta(ge=1)] = 20_000
    max_chunks: Annotated[int, Meta(ge=1)] = 1000
    max_metadata_bytes: Annotated[int, Meta(ge=2)] = 64 * 1024
    max_metadata_depth: Annotated[int, Meta(ge=1, le=100)] = 16
    max_filter_bytes: Annotated[int, Meta(ge=2)] = 64 * 1024
    max_filter_depth: Annotated[int, Meta(ge=1, le=40)] = 40
    max_k: Annotated[int, Meta(ge=1, le=10_000)] = 1000
    max_offset: Annotated[int, Meta(ge=0, le=1_000_000)] = 10_000
    max_batch: Annotated[int, Meta(ge=1, le=10_000)] = 100
    import_batch: Annotated[int, Meta(ge=1, le=10_000)] = 500
    import_retention: Annotated[float, Meta(gt=0)] = 168.0
    max_page: Annotated[int, Meta(ge=1, le=10_000)] = 1000
    max_rerank_candidates: Annotated[int, Meta(ge=1, le=1000)] = 100

    audit: bool = True
    audit_retention: Annotated[float, Meta(ge=1)] = 365.0

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"
    access_log: bool = False
    slow_request: Annotated[float, Meta(gt=0)] = 2.0
    tracing: bool = False
    metrics_libraries: Annotated[int, Meta(ge=0, le=1000)] = 20

    def __post_init__(self) -> None:
        if self.postgres_version == 17:
            raise ValueError("the embedded PostgreSQL is 18 or 16")
        if self.chunk_overlap >= self.chunk_size:
            raise ValueError("chunk_overlap must be smaller than chunk_size")
        for name, example in BASE_URLS.items():
            try:
                urlsplit(getattr(self, name) or "").port  # noqa: B018 - reading it is what checks it
            except ValueError:
                raise ValueError(f"{name} must be an address such as {example}") from None
        networks(self.trusted_proxies)
        self._check_jwt()

    def _check_jwt(self) -> None:
        sources = [source for source in (self.jwt_jwks_url, self.jwt_keys_file) if source is not None]
        if not sources and self.jwt_issuer is None and self.jwt_audience is None:
            return
        if len(sources) != 1 or self.jwt_issuer is None or self.jwt_audience is None:
            raise ValueError("JWT needs jwt_issuer, jwt_audience, and either jwt_jwks_url or jwt_keys_file")
        url = urlsplit(self.jwt_jwks_url or "")
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            raise ValueError("jwt_jwks_url must be https: whoever sits in between could give out keys of its own")

    @property
    def tokens(self) -> bool:
        """Whether writes answer with how far they are."""
        return self.replica_url is not None or self.consistency_tokens

    @property
    def jwt(self) -> bool:
        """Whether tokens of an issuer are accepted."""
        return self.jwt_issuer is not None

    @property
    def default_embedder(self) -> str:
        """The provider of libraries that name none."""
        return self.embedder or ("local" if self.cohere_api_key is None else "cohere")

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **overrides: Any) -> Settings:
        """Read PGSHELF_* from `environ`; `overrides` (from the command line) win unless they are None.

        Raises SettingsError naming the variable. An empty value counts as not set, except PGSHELF_API_PREFIX.
        PGSHELF_TEST_* belongs to the test suite and is left alone.
        """
        hints = get_type_hints(cls, include_extras=True)
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(PREFIX) or variable.startswith(PREFIX + "TEST_"):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in hints:
                raise SettingsError(f"{variable} is not a setting of pgshelf; see docs/configuration.md for the list")
            if text == "" and name != "api_prefix":
                continue
            try:
                values[name] = msgspec.convert(text, hints[name], strict=False, dec_hook=_decode)
            except msgspec.ValidationError as error:
                words = ", ".join(_words(hints[name]))
                reason = f"choose one of {words}" if words else str(error)
                raise SettingsError(f"{variable}={_shown(name, text)} cannot be used: {reason}") from None
        values |= {name: value for name, value in overrides.items() if value is not None}
        try:
            return msgspec.convert(values, cls, dec_hook=_decode)
        except (msgspec.ValidationError, ValueError) as error:
            message, _, path = str(error).partition(" - at `$.")
            raise SettingsError(f"{path.rstrip('`')}: {message}" if path else message) from None

    def summary(self) -> dict[str, str]:
        """Every setting as text, secrets masked: what `serve` prints at its start."""
        return {name: _shown(name, getattr(self, name)) for name in self.__struct_fields__}


def _decode(kind: type, value: object) -> object:
    if issubclass(kind, Path):
        return Path(str(value)).expanduser()
    raise NotImplementedError


def _words(kind: Any) -> list[str]:
    """Those that a setting may be, where they are few."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [word for part in get_args(kind) for word in _words(part)]


def _shown(name: str, value: object) -> str:
    if name.endswith("api_key") and value:
        return "***"
    if name == "replica_url" and value:
        return ",".join(masked(url) for url in connection_strings(str(value)))
    if (name in ("database_url", "backup_url") and value) or (
        name in {*BASE_URLS, "jwt_jwks_url"} and "@" in str(value)
    ):
        return masked(str(value))
    return str(value)


def listed(text: str) -> list[str]:
    """The parts of a setting that is a list, separated by commas."""
    return [part for part in map(str.strip, text.split(",")) if part]


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(text: str) -> list[Network]:
    """The networks of a setting that lists some, such as 10.0.0.0/8; an address is a network of its own."""
    try:
        return [ipaddress.ip_network(entry, strict=False) for entry in listed(text)]
    except ValueError as error:
        raise ValueError(f"{error}; list addresses, or networks such as 10.0.0.0/8") from None


def connection_strings(text: str) -> list[str]:
    """The connection strings of a list; commas inside of one name several hosts."""
    return [part.strip() for part in re.split(r",(?=\s*postgres(?:ql)?(?:\+psycopg)?://)", text)]


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# The parts of a URL that nothing can be hidden in: whatever else stands in one may be a password that is not encoded.
PLAIN = re.compile(
    r"([a-z+]+://)(?:([^:@/?#]*)(:[^@/?#]*)?@)?((?:[^@/?#[\]]|\[[0-9a-fA-F:.%]*\])*(?:/[^@?#]*)?(?:\?([^@#]*))?)"
)


def masked(url: str) -> str:
    """A connection string without its password; anything that is not a plain URL is hidden whole."""
    parts = PLAIN.fullmatch(url)
    if parts is None or re.search("pass|secret", unquote(parts[5] or ""), re.IGNORECASE):
        return "***"
    scheme, user, password, rest = parts.groups()[:4]
    account = "" if user is None else f"{user}:***@" if len(password or "") > 1 else f"{user}@"
    return f"{scheme}{account}{rest}"
