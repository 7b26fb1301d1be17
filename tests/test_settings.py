"""Settings: read from the environment, refused by name, shown without secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pgshelf.cli import main
from pgshelf.settings import Settings, SettingsError, masked

# One good value for each setting, as text, what it becomes, and one that is refused.
VALUES: dict[str, tuple[str, Any, str | None]] = {
    "database_url": ("postgresql://u:secret@h/d", "postgresql://u:secret@h/d", None),
    "data_dir": ("/some/where", Path("/some/where"), None),
    "postgres_version": ("16", 16, "17"),
    "auto_migrate": ("true", True, "maybe"),
    "replica_url": ("postgresql://r1,r2/db", "postgresql://r1,r2/db", None),
    "replica_wait": ("0", 0.0, "-1"),
    "replica_max_lag": ("2.5", 2.5, "0"),
    "replica_interval": ("0.5", 0.5, "0"),
    "replica_timeout": ("3", 3.0, "0"),
    "consistency_tokens": ("true", True, "some"),
    "vector_schema": ("extensions", "extensions", "x" * 64),
    "host": ("::1", "::1", None),
    "port": ("9000", 9000, "65536"),
    "allow_unauthenticated": ("true", True, "2"),
    "workers": ("3", 3, "0"),
    "workers_lifetime": ("3600", 3600, "59"),
    "workers_max_bytes": ("2147483648", 2 * 1024**3, "1000"),
    "api_prefix": ("/api/v2", "/api/v2", "v1/"),
    "auth": ("on", "on", "yes"),
    "api_key": ("pgs_a-secret", "pgs_a-secret", None),
    "public_search": ("docs-*, faq", "docs-*, faq", None),
    "allowed_hosts": ("search.example.org", "search.example.org", None),
    "cors_origins": ("https://app.example.org", "https://app.example.org", "app.example.org"),
    "token_lifetime": ("600", 600, "9"),
    "audit": ("false", False, "perhaps"),
    "audit_retention": ("30", 30.0, "0.5"),
    "jwt_role_claim": ("roles", "roles", None),
    "jwt_roles": ("ops=admin,team=reader", "ops=admin,team=reader", "ops=root"),
    "jwt_libraries_claim": ("libraries", "libraries", None),
    "jwt_libraries": ("public-*", "public-*", None),
    "embedder": ("none", "none", "other"),
    "embedder_model": ("embed-v4.0", "embed-v4.0", "x" * 201),
    "embedder_dimension": ("256", 256, "0"),
    "openai_base_url": ("http://localhost:8000/v1", "http://localhost:8000/v1", "localhost:8000"),
    "openai_api_key": ("a-secret", "a-secret", None),
    "openai_timeout": ("2.5", 2.5, "0"),
    "openai_batch": ("8", 8, "0"),
    "openai_encoding": ("base64", "base64", "int8"),
    "sentence_transformers_models": ("a,b", "a,b", None),
    "embedding_cache_rows": ("0", 0, "-1"),
    "chunk_size": ("500", 500, "49"),
    "chunk_overlap": ("100", 100, "-1"),
    "cohere_api_key": ("a-secret", "a-secret", None),
    "cohere_base_url": ("http://localhost:9000/x", "http://localhost:9000/x", "ftp://api.cohere.com"),
    "cohere_timeout": ("2.5", 2.5, "0"),
    "pool_size": ("5", 5, "0"),
    "pool_timeout": ("2.5", 2.5, "0"),
    "connect_timeout": ("9", 9, "1"),
    "statement_timeout": ("60", 60.0, "-1"),
    "lock_timeout": ("0.5", 0.5, "soon"),
    "worker_enabled": ("false", False, "off?"),
    "worker_interval": ("1", 1.0, "0"),
    "worker_lease": ("30", 30.0, "0"),
    "worker_concurrency": ("2", 2, "0"),
    "circuit_failures": ("3", 3, "0"),
    "circuit_wait": ("30", 30.0, "0"),
    "replication_lag_bytes": ("0", 0, "-1"),
    "replication_lag_seconds": ("2.5", 2.5, "-1"),
    "heartbeat_interval": ("0.5", 0.5, "3601"),
    "backup_directory": ("/backups", Path("/backups"), None),
    "backup_url": ("postgresql://b:secret@h/d", "postgresql://b:secret@h/d", None),
    "backup_keep": ("7", 7, "-1"),
    "wal_archive": ("/wal", Path("/wal"), None),
    "pg_bin": ("/opt/pg/bin", Path("/opt/pg/bin"), None),
    "worker_attempts": ("3", 3, "0"),
    "embed_batch": ("16", 16, "0"),
    "log_level": ("debug", "debug", "loud"),
    "log_format": ("json", "json", "xml"),
    "access_log": ("true", True, "loud"),
    "slow_request": ("0.5", 0.5, "0"),
    "tracing": ("true", True, "perhaps"),
    "recall_interval": ("0", 0.0, "-1"),
    "metrics_libraries": ("5", 5, "1001"),
    "max_k": ("50", 50, "0"),
    "max_offset": ("0", 0, "-1"),
    "max_page": ("10", 10, "10001"),
    "max_batch": ("10", 10, "10001"),
    "cache_bytes": ("0", 0, "-1"),
    "cache_ttl": ("1.5", 1.5, "0"),
    "changes_retention": ("0.5", 0.5, "0"),
    "changes_interval": ("1", 1.0, "0"),
    "changes_max_wait": ("0", 0.0, "-1"),
    "changes_readers": ("5", 5, "0"),
    "idempotency_retention": ("1", 1.0, "0"),
    "import_batch": ("10", 10, "10001"),
    "import_retention": ("60.5", 60.5, "0"),
    "rate_limits": ("team", "team", "some"),
    "rate_limit_search": ("100/s", "100/s", "0/s"),
    "rate_limit_write": ("600/10min", "600/10min", "10"),
    "rate_limit_import": ("off", "off", "1/week"),
    "rate_limit_admin": ("5/h", "5/h", "-5/h"),
    "max_concurrent_requests": ("10", 10, "-1"),
    "max_concurrent_streams": ("2", 2, "-1"),
    "trusted_proxies": ("127.0.0.1, 10.0.0.0/8", "127.0.0.1, 10.0.0.0/8", None),
    "max_connections": ("100", 100, "0"),
    "header_timeout": ("5", 5.0, "0"),
    "body_timeout": ("2.5", 2.5, "0"),
    "max_filter_bytes": ("1000", 1000, "1"),
    "max_filter_depth": ("7", 7, "41"),
    "promote_at": ("5000", 5000, "0"),
    "index_memory_bytes": ("134217728", 134217728, "1"),
    "max_rerank_candidates": ("20", 20, "1001"),
    "max_metadata_depth": ("3", 3, "101"),
    "max_body_bytes": ("2048", 2048, "1"),
    "max_metadata_bytes": ("100", 100, "1"),
}
VALUES |= {
    name: ("7", 7, "0")
    for name in ("max_title_length", "max_query_length", "max_text_length", "max_chunk_length", "max_chunks")
}
# The ones of JWT only work together.
JWT = {"issuer": "https://id.example.org/", "audience": "pgshelf", "keys_file": "/etc/pgshelf/keys.json"}
JWT_URL = "https://id.example.org/keys"


def test_every_setting_is_tried_here() -> None:
    tried = set(VALUES) | {f"jwt_{name}" for name in [*JWT, "jwks_url"]}
    assert tried == set(Settings.__struct_fields__)


def test_the_settings_of_jwt_go_together() -> None:
    environ = {f"PGSHELF_JWT_{name.upper()}": value for name, value in JWT.items()}
    settings = Settings.from_env(environ)
    assert settings.jwt and settings.jwt_keys_file == Path(JWT["keys_file"])
    assert (settings.jwt_issuer, settings.jwt_audience) == (JWT["issuer"], JWT["audience"])
    assert not Settings().jwt
    for missing in environ:
        with pytest.raises(SettingsError, match="JWT needs"):
            Settings.from_env({name: value for name, value in environ.items() if name != missing})
    with pytest.raises(SettingsError, match="JWT needs"):
        Settings.from_env(environ | {"PGSHELF_JWT_JWKS_URL": JWT_URL})
    del environ["PGSHELF_JWT_KEYS_FILE"]
    for url in (JWT_URL, "http://127.0.0.1:9000/keys", "http://localhost/keys", "http://[::1]:9000/keys"):
        assert Settings.from_env(environ | {"PGSHELF_JWT_JWKS_URL": url}).jwt_jwks_url == url
    with pytest.raises(SettingsError, match="must be https"):
        Settings.from_env(environ | {"PGSHELF_JWT_JWKS_URL": "http://id.example.org/keys"})
    with pytest.raises(SettingsError, match="PGSHELF_JWT_JWKS_URL"):
        Settings.from_env(environ | {"PGSHELF_JWT_JWKS_URL": "file:///etc/passwd"})


def test_keys_are_not_shown() -> None:
    settings = Settings(
        api_key="pgs_secret", jwt_issuer="i", jwt_audience="a", jwt_jwks_url="https://user:secret@id.example.org/keys"
    )
    assert settings.summary()["api_key"] == "***"
    assert not [text for text in settings.summary().values() if "secret" in text]


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_is_read(name: str) -> None:
    text, value, _ = VALUES[name]
    settings = Settings.from_env({f"PGSHELF_{name.upper()}": text})
    assert getattr(settings, name) == value
    default = Settings()
    assert {field for field in VALUES if getattr(settings, field) != getattr(default, field)} == {name}


@pytest.mark.parametrize("name", [name for name, (_, _, wrong) in VALUES.items() if wrong is not None])
def test_a_wrong_value_is_refused_by_the_name_of_its_variable(name: str) -> None:
    wrong = VALUES[name][2]
    assert wrong is not None
    with pytest.raises(SettingsError) as refused:
        Settings.from_env({f"PGSHELF_{name.upper()}": wrong})
    if name != "postgres_version":  # 17 is between 16 and 18; the rule is one of the whole
        assert f"PGSHELF_{name.upper()}={wrong}" in str(refused.value)
    else:
        assert "18 or 16" in str(refused.value)


def test_defaults() -> None:
    settings = Settings.from_env({})
    assert (settings.host, settings.port, settings.api_prefix) == ("127.0.0.1", 8432, "/v1")
    assert (settings.database_url, settings.default_embedder, settings.postgres_version) == (None, "local", 18)
    assert settings.workers >= 1 and not settings.allow_unauthenticated


def test_empty_means_not_set_but_for_the_prefix() -> None:
    empty = {f"PGSHELF_{name.upper()}": "" for name in VALUES}
    settings = Settings.from_env(empty)
    assert settings.api_prefix == ""
    assert settings == Settings(api_prefix="")


def test_unknown_variables_are_refused() -> None:
    with pytest.raises(SettingsError, match="PGSHELF_PROT is not a setting"):
        Settings.from_env({"PGSHELF_PROT": "1"})
    Settings.from_env({"PGSHELF_TEST_DSN": "x", "OTHER": "y", "pgshelf_port": "x"})


def test_what_could_be_chosen_is_said() -> None:
    for name, given, words in (
        ("AUTH", "maybe", "auto, on, off"),
        ("EMBEDDER", "ada", "local, cohere, openai, sentence_transformers, none"),
        ("LOG_LEVEL", "loud", "debug, info, warning, error"),
    ):
        with pytest.raises(SettingsError, match=f"PGSHELF_{name}={given} cannot be used: choose one of {words}$"):
            Settings.from_env({f"PGSHELF_{name}": given})


def test_rules_between_settings() -> None:
    with pytest.raises(SettingsError, match="chunk_overlap must be smaller"):
        Settings.from_env({"PGSHELF_CHUNK_SIZE": "100", "PGSHELF_CHUNK_OVERLAP": "100"})
    with pytest.raises(SettingsError, match=r"10\.0\.0\.0/40.*; list addresses, or networks"):
        Settings.from_env({"PGSHELF_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/40"})


def test_the_command_line_wins_where_it_says_something() -> None:
    environ = {"PGSHELF_PORT": "9000", "PGSHELF_HOST": "::1"}
    assert Settings.from_env(environ, port=9001, host=None) == Settings(port=9001, host="::1")
    with pytest.raises(SettingsError, match="port"):
        Settings.from_env({}, port=0)


def test_home_is_understood() -> None:
    assert Settings.from_env({"PGSHELF_DATA_DIR": "~/shelf"}).data_dir == Path.home() / "shelf"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:5432/d?sslmode=require", "postgresql://u:***@h:5432/d?sslmode=require"),
        ("postgresql://u:se%40cret@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:sec@ret@h/d", "***"),
        ("postgresql://u:sec?ret@h/d", "***"),
        ("postgresql://u:sec#ret@h/d", "***"),
        ("postgresql://u:sec/ret@h/d", "***"),
        ("postgresql://h/d?user=u&pass%77ord=secret", "***"),
        ("postgresql://h/d?oauth_client_secret=secret", "***"),
        ("postgresql://h/d", "postgresql://h/d"),
        ("postgresql://u@/d?host=/run", "postgresql://u@/d?host=/run"),
        ("postgresql://h/d?user=u&password=secret", "***"),
        ("postgresql://h/d?PASSWORD=secret", "***"),
        ("host=h user=u password=secret", "***"),
        ("postgresql://[secret", "***"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert masked(url) == shown
    summary = Settings(database_url=url, backup_url=url).summary()
    assert (summary["database_url"], summary["backup_url"]) == (shown, shown)
    assert not [text for text in summary.values() if "secret" in text]


def test_an_error_about_a_url_does_not_show_its_password() -> None:
    runner = CliRunner(env={"PGSHELF_DATABASE_URL": "postgresql://u:secret@h/d", "PGSHELF_PORT": "x"})
    result = runner.invoke(main, ["serve"])
    assert result.exit_code == 1 and "PGSHELF_PORT=x" in result.output and "secret" not in result.output


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104 - refused, that is the point
def test_serving_others_needs_a_word(host: str) -> None:
    runner = CliRunner(env={"PGSHELF_DATABASE_URL": "postgresql://nowhere.invalid/d"})
    result = runner.invoke(main, ["serve", "--host", host])
    assert result.exit_code == 1
    assert host in result.output and "PGSHELF_ALLOW_UNAUTHENTICATED" in result.output
