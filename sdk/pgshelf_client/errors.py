"""What can go wrong.

PgshelfError
├── ApiError                 the server refused; carries status, code, title, detail, errors, request_id, retry_after
│   ├── BadRequest           400  malformed or invalid
│   ├── Unauthorized         401  no or a bad key
│   ├── Forbidden            403  the key may not do this
│   ├── NotFound             404  no such library, document or chunk
│   ├── Conflict             409  the name is taken, the version is stale, another table needs the row, too many match
│   ├── TooLarge             413  the body is over the server's limit
│   ├── Unprocessable        422  well-formed, but impossible for this library
│   ├── RateLimited          429  too many requests
│   └── ServerError          5xx  500 and whatever has no class of its own
│       ├── BadGateway       502  the embedding or the reranking provider failed
│       ├── Unavailable      503  the database or a provider is gone or busy
│       └── Timeout          504  the server gave up waiting for the database or for a provider
├── ConnectionFailed         no answer came back
├── UnexpectedAnswer         an answer came back that is not pgshelf's
└── WaitedTooLong            wait_for_index or wait_for_embedder reached its timeout; a TimeoutError, too
"""

import email.utils
import time
from http import HTTPStatus

import httpx2
import msgspec

__all__ = [
    "ApiError",
    "BadGateway",
    "BadRequest",
    "Conflict",
    "ConnectionFailed",
    "FieldError",
    "Forbidden",
    "NotFound",
    "PgshelfError",
    "RateLimited",
    "ServerError",
    "Timeout",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnexpectedAnswer",
    "Unprocessable",
    "WaitedTooLong",
]

SHOWN_CHARACTERS = 300  # of an answer that is no problem document, a proxy's page for one


class FieldError(msgspec.Struct, frozen=True):
    """One invalid place in a request: its path in the body and what is wrong there."""

    path: str = ""
    message: str = ""


class PgshelfError(Exception):
    """Everything this package raises about a request it sent."""


class ApiError(PgshelfError):
    """The server refused the request; `code` is stable and meant for programs, `detail` for people.

    `code` is empty when the answer came from something in front of pgshelf. `retry_after` is in seconds.
    """

    # Defaults for all but the message let errors travel between processes: unpickling calls with that alone.
    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        code: str = "",
        title: str = "",
        detail: str = "",
        errors: tuple[FieldError, ...] = (),
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.title = title
        self.detail = detail
        self.errors = errors
        self.request_id = request_id
        self.retry_after = retry_after


class BadRequest(ApiError):
    """400: the request is malformed or invalid; `errors` names the places."""


class Unauthorized(ApiError):
    """401: the server wants a key and got none, or a bad one."""


class Forbidden(ApiError):
    """403: the key may not do this."""


class NotFound(ApiError):
    """404: the library, document or chunk does not exist."""


class Conflict(ApiError):
    """409: the name is taken, `if_match` is stale, another table refers to the document, or too many match."""


class TooLarge(ApiError):
    """413: the request's body is over the server's limit."""


class Unprocessable(ApiError):
    """422: well-formed, but impossible for this library, such as a vector of the wrong dimension."""


class RateLimited(ApiError):
    """429: too many requests; `retry_after` says when to come back."""


class ServerError(ApiError):
    """5xx: the server failed."""


class BadGateway(ServerError):
    """502: the embedding or the reranking provider failed."""


class Unavailable(ServerError):
    """503: the database or a provider is gone or busy; `retry_after` says when to come back."""


class Timeout(ServerError):
    """504: the server gave up waiting for the database or for a provider."""


class ConnectionFailed(PgshelfError):
    """No answer came back. With `outcome_unknown` the server may have carried the request out all the same."""

    def __init__(self, message: str, *, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


class UnexpectedAnswer(PgshelfError):
    """The server answered with success, but not in the form of pgshelf: the address may be another service's."""


class WaitedTooLong(PgshelfError, TimeoutError):
    """What was waited for, an index or an embedder, was not there in time; the server goes on with it."""


BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Unprocessable,
    429: RateLimited,
    502: BadGateway,
    503: Unavailable,
    504: Timeout,
}


class Problem(msgspec.Struct, frozen=True):
    status: int = 0
    title: str = ""
    detail: str = ""
    code: str = ""
    request_id: str | None = None
    errors: tuple[FieldError, ...] = ()


class Ending(msgspec.Struct, frozen=True):
    """The last line of an answer in lines, as far as it tells of a failure."""

    error: Problem | None = None


def error_from(response: httpx2.Response) -> ApiError | None:
    """The error that an answer stands for: one other than 2xx, or one in lines that ends in a problem."""
    if not response.is_success:
        return api_error(response.status_code, problem_in(response), response)
    if not response.headers.get("content-type", "").startswith("application/x-ndjson"):
        return None
    problem = problem_at_end(response.content)
    return None if problem is None else api_error(problem.status, problem, response)


def problem_at_end(lines: bytes) -> Problem | None:
    """What went wrong after an answer in lines had begun."""
    try:
        return msgspec.json.decode(lines.rstrip().rpartition(b"\n")[2], type=Ending).error
    except msgspec.MsgspecError:
        return None


def api_error(status: int, problem: Problem, response: httpx2.Response) -> ApiError:
    request_id = problem.request_id or response.headers.get("x-request-id")
    kind = BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
    return kind(
        message(status, problem, request_id),
        status=status,
        code=problem.code,
        title=problem.title,
        detail=problem.detail,
        errors=problem.errors,
        request_id=request_id,
        retry_after=retry_after(response),
    )


def problem_in(response: httpx2.Response) -> Problem:
    try:
        problem = msgspec.json.decode(response.content, type=Problem)
    except msgspec.MsgspecError:
        problem = Problem(detail=response.text[:SHOWN_CHARACTERS].strip())
    return problem if problem.title else msgspec.structs.replace(problem, title=reason(response.status_code))


def reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown status"


def message(status: int, problem: Problem, request_id: str | None) -> str:
    places = [f"{place.path}: {place.message}" for place in problem.errors if place.message not in problem.detail]
    said = "; ".join(filter(None, [problem.detail or problem.title, *places]))
    name = f"{status} {problem.code or problem.title}"
    return f"{name}: {said}" + (f" [request {request_id}]" if request_id else "")


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds from a Retry-After header, which holds either seconds or a date."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
