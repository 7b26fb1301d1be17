"""Everything that can go wrong, once: codes, and how SQLSTATEs and exceptions become them."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import msgspec.inspect
import psycopg
from litestar.exceptions import HTTPException, SerializationException, ValidationException

# code -> (status, title). The detail of an answer says what to do about this very case.
CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "The body cannot be read"),
    "validation_failed": (400, "The request is not valid"),
    "invalid_text": (400, "The text cannot be stored"),
    "host_not_allowed": (400, "The address is not one of this server's"),
    "unauthorized": (401, "A key is required"),
    "invalid_key": (401, "The key is not valid"),
    "key_expired": (401, "The key has expired"),
    "key_revoked": (401, "The key was revoked"),
    "invalid_token": (401, "The token is not valid"),
    "forbidden": (403, "The key may not do this"),
    "library_not_found": (404, "No such library"),
    "document_not_found": (404, "No such document"),
    "chunk_not_found": (404, "No such chunk"),
    "key_not_found": (404, "No such key"),
    "route_not_found": (404, "No such address"),
    "method_not_allowed": (405, "The address does not take this method"),
    "request_timeout": (408, "The body did not come in time"),
    "library_exists": (409, "A library of this name exists"),
    "key_exists": (409, "A key of this name exists"),
    "referenced": (409, "Something else references the document"),
    "version_mismatch": (409, "The document has changed"),
    "too_many_affected": (409, "The change would affect too many documents"),
    "backup_running": (409, "Another backup is being taken"),
    "import_running": (409, "An import of this name is running"),
    "import_differs": (409, "The import's name was used for other data"),
    "conflict": (409, "The write conflicts with another one"),
    "event_differs": (409, "The event was sent before, and was another"),
    "changes_expired": (410, "The changes are not kept any more"),
    "idempotency_key_reused": (409, "The idempotency key belongs to another request"),
    "idempotency_key_in_use": (409, "The first request of the idempotency key is not done yet"),
    "body_too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The content type is not supported"),
    "wrong_dimension": (422, "The vector has the wrong dimension"),
    "zero_vector": (422, "The vector is zero"),
    "invalid_vector": (422, "The vector cannot be used"),
    "embedding_required": (422, "A vector is missing"),
    "embedder_not_configured": (422, "The embedder cannot be used here"),
    "no_embedder": (422, "The library has no embedder"),
    "text_not_embeddable": (422, "The text cannot be embedded"),
    "no_vector": (422, "What the hits shall be like has no vector yet"),
    "libraries_differ": (422, "The libraries cannot be searched together"),
    "backups_not_configured": (422, "The service takes no backups"),
    "reranker_not_configured": (422, "The reranker cannot be used here"),
    "index_impossible": (422, "The library cannot have such an index"),
    "too_complex": (422, "The request exceeds what PostgreSQL can store or run"),
    "rate_limited": (429, "Too many requests in this time"),
    "too_many_concurrent": (429, "Too many requests at once"),
    "internal_error": (500, "Something went wrong inside pgshelf"),
    "embedder_failed": (502, "The embedding provider failed"),
    "reranker_failed": (502, "The reranking provider failed"),
    "database_unavailable": (503, "The database is not available"),
    "database_forbidden": (503, "The database role lacks a right"),
    "embedder_unavailable": (503, "The embedding provider is not available"),
    "too_many_readers": (503, "Too many readers wait for changes"),
    "reranker_unavailable": (503, "The reranking provider is not available"),
    "issuer_unavailable": (503, "The issuer's keys cannot be had"),
    "write_outcome_unknown": (503, "The write may have been carried out or not"),
    "pool_exhausted": (503, "All database connections are busy"),
    "lock_timeout": (503, "Another operation holds what this one needs"),
    "read_only": (503, "The database accepts no writes now"),
    "storage_full": (503, "The database has no space left"),
    "not_migrated": (503, "The database schema is missing or outdated"),
    "not_ready": (503, "The service is not ready"),
    "embedder_timeout": (504, "The embedding provider took too long"),
    "reranker_timeout": (504, "The reranking provider took too long"),
    "timeout": (504, "The request took too long"),
}
RETRY_AFTER = {429: 1, 503: 1, 504: 1}  # seconds, where nothing better is known

SQLSTATES: dict[str, str] = {
    "PS001": "library_not_found",
    "PS002": "document_not_found",
    "PS003": "chunk_not_found",
    "PS004": "key_not_found",
    "PS010": "wrong_dimension",
    "PS011": "zero_vector",
    "PS012": "invalid_vector",
    "PS013": "embedding_required",
    "PS014": "index_impossible",
    "PS015": "no_vector",
    "PS020": "version_mismatch",
    "PS021": "too_many_affected",
    "PS022": "event_differs",
    "PS023": "import_running",
    "PS024": "changes_expired",
    "PS030": "validation_failed",
    "PS040": "lock_timeout",
    "PS041": "lock_timeout",
    "PS900": "not_migrated",
    "22021": "invalid_text",
    "22P05": "invalid_text",
    "23503": "referenced",
    "23505": "conflict",
    "25006": "read_only",
    "3F000": "not_migrated",
    "40001": "conflict",
    "40P01": "conflict",
    "42P01": "not_migrated",
    "42501": "database_forbidden",
    "42704": "not_migrated",
    "42883": "not_migrated",
    "53100": "storage_full",
    "55P03": "lock_timeout",
    "57014": "timeout",
}
# The first two characters, where the state itself is not above.
CLASSES: dict[str, str] = {
    "25": "database_unavailable",
    "08": "database_unavailable",
    "22": "validation_failed",
    "23": "validation_failed",
    "53": "database_unavailable",
    "54": "too_complex",
    "57": "database_unavailable",
    "58": "database_unavailable",
}
CONSTRAINTS = {"libraries_name_key": "library_exists", "keys_name_key": "key_exists"}
# What the database says of these tells of our insides; the answer says something of its own.
SILENT = {
    "internal_error": "It has been logged under the request id. Try again, and report it when it stays.",
    "database_unavailable": "pgshelf cannot reach PostgreSQL. Try again shortly; if it stays so, run `pgshelf doctor`.",
    "database_forbidden": "The role in PGSHELF_DATABASE_URL must own the schema pgshelf, or be a member of"
    " pgshelf_service; `pgshelf doctor` says more.",
    "not_migrated": "The schema pgshelf is missing or of another version. Run `pgshelf migrate` against this"
    " database, with the version of pgshelf that serves.",
    "timeout": "The statement was stopped at PGSHELF_STATEMENT_TIMEOUT. Ask for less, or try again later.",
    "lock_timeout": "Something else holds a lock on what this needs. Try again shortly.",
    "storage_full": "The database server's disk is full, and nothing was written. Free space there, then try again.",
    "read_only": "Nothing was written. The server is a standby or set to read only; try again when a primary answers.",
    "conflict": "Another write came in between, and nothing was written. Try again.",
    "invalid_text": "PostgreSQL stores no NUL characters (\\u0000) and no broken Unicode; take them out.",
    "library_exists": "There is a library of this name already. Choose another name, or use the one that is there.",
    "key_exists": "There is a key of this name already. Choose another name, or rotate the one that is there.",
    "referenced": "A table of another application holds a foreign key to it. Delete or change that row first.",
}
COARSE = (
    "A number of the vector is too large for the library's index, whose storage is halfvec: it keeps numbers up to "
    "65,504. Scale the vectors, or choose the storage vector."
)


class Problem(Exception):
    """An answer that is an error: raise it anywhere below a handler. `errors` lists {path, message} for validation."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: list[dict[str, str]] | None = None,
        sqlstate: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.errors, self.sqlstate = code, detail, errors, sqlstate
        self.status, self.title = CODES[code]
        self.headers = headers or {}
        wait = retry_after if retry_after is not None else RETRY_AFTER.get(self.status)
        if wait is not None:
            self.headers["Retry-After"] = str(max(1, round(wait)))


def invalid(path: str, message: str) -> Problem:
    """A 400 about one field, named by its path in the request."""
    return Problem("validation_failed", f"{path}: {message}", errors=[{"path": path, "message": message}])


def problem_of(error: Exception) -> Problem:
    """The problem that any exception is to a client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, psycopg.Error):
        return _of_database(error)
    if isinstance(error, msgspec.ValidationError):
        return problem_of_value(error)
    if isinstance(error, (msgspec.DecodeError, SerializationException)):
        return Problem("invalid_json", f"The body could not be decoded: {error}. Send JSON or MessagePack.")
    if isinstance(error, HTTPException):
        return _of_litestar(error)
    if isinstance(error, RecursionError):
        return Problem("invalid_json", "The body is nested too deeply to be read. Send a flatter one.")
    if isinstance(error, UnicodeError):
        return Problem("invalid_text", SILENT["invalid_text"])
    return Problem("internal_error", SILENT["internal_error"])


def problem_of_value(error: msgspec.ValidationError, model: Any = None) -> Problem:
    """What msgspec has against a value that should be a `model`; with that known, it says what could be chosen."""
    message, _, path = str(error).partition(" - at `")
    path = path.rstrip("`").removeprefix("$").removeprefix(".")
    return invalid(path or "body", message + ("" if model is None else choices(message, model, path)))


def choices(message: str, model: Any, path: str = "") -> str:
    """What goes behind a message of msgspec that a value is not among those of a type, which it does not list."""
    if not message.startswith("Invalid enum value"):
        return ""
    steps = re.findall(r"\[[^]]*\]|[^.\[]+", path)
    found = [str(value) for value in _values(msgspec.inspect.type_info(model), steps)]
    return "; choose " + " or ".join(filter(None, [", ".join(found[:-1]), found[-1]])) if found else ""


def _values(kind: msgspec.inspect.Type, steps: list[str]) -> list[Any]:
    """The values of the closed sets at a place; of a list those of its items."""
    match kind:
        case msgspec.inspect.LiteralType():
            return list(kind.values)
        case msgspec.inspect.Metadata():
            return _values(kind.type, steps)
        case msgspec.inspect.UnionType():
            return [value for part in kind.types for value in _values(part, steps)]
        case msgspec.inspect.ListType():
            return _values(kind.item_type, steps[1:])
        case msgspec.inspect.DictType():
            return _values(kind.value_type, steps[1:])
        case msgspec.inspect.StructType() if steps:
            found = [field.type for field in kind.fields if field.encode_name == steps[0]]
            return [value for part in found for value in _values(part, steps[1:])]
    return []


def _of_database(error: psycopg.Error) -> Problem:
    state = error.sqlstate
    if state is None:  # raised by the driver itself
        if isinstance(error, psycopg.DataError):
            return Problem("invalid_text", SILENT["invalid_text"])
        reason = "not_migrated" if isinstance(error, psycopg.ProgrammingError) else "database_unavailable"
        return Problem(reason, SILENT[reason])
    code = CONSTRAINTS.get(error.diag.constraint_name or "") or SQLSTATES.get(state) or CLASSES.get(state[:2])
    if code is None:
        return Problem("internal_error", SILENT["internal_error"], sqlstate=state)
    if state == "23514":
        return Problem(
            code, f"A value is not allowed: it breaks the rule {error.diag.constraint_name}.", sqlstate=state
        )
    if state == "22003" and "halfvec" in (error.diag.message_primary or ""):
        return Problem("invalid_vector", COARSE, sqlstate=state)
    return problem_of_state(state, error.diag.message_primary, error.diag.message_hint, code)


def problem_of_state(state: str, message: str | None, hint: str | None, code: str | None = None) -> Problem:
    """The problem that a SQLSTATE with its message and hint is to a client."""
    code = code or SQLSTATES[state]
    said = [part.rstrip(".") for part in (message, hint) if part]
    return Problem(code, SILENT.get(code, ". ".join(part[0].upper() + part[1:] for part in said) + "."), sqlstate=state)


def _of_litestar(error: HTTPException) -> Problem:
    if isinstance(error, ValidationException):
        found: list[dict[str, Any]] = [item for item in error.extra or [] if isinstance(item, dict)]
        if any(item.get("key") == "data" for item in found):  # the handler's parameter: no body came
            return invalid("body", "is missing; send a JSON object")
        errors = [{"path": str(item.get("key", "body")), "message": str(item.get("message", ""))} for item in found]
        detail = "; ".join(f"{item['path']}: {item['message']}" for item in errors) or error.detail
        return Problem("validation_failed", detail, errors=errors or None)
    if error.status_code == 404:
        return Problem("route_not_found", "There is nothing at this address; /schema lists what there is.")
    if error.status_code == 405:
        return Problem("method_not_allowed", "/schema lists the methods of this address.", headers=error.headers or {})
    if error.status_code == 413:
        return Problem("body_too_large", "Send less at a time; PGSHELF_MAX_BODY_BYTES is the limit.")
    if error.status_code < 500:
        return Problem("validation_failed", error.detail)
    return Problem("internal_error", SILENT["internal_error"])
