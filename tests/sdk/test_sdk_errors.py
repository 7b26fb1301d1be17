"""Which error an answer becomes, and what it carries."""

from __future__ import annotations

import asyncio
import email.utils
import pickle
import time

import httpx2
import pytest

import pgshelf_client
from pgshelf_client import ApiError, ConnectionFailed, FieldError, PgshelfError, ServerError, errors
from tests.sdk.script import Script, problem

pytestmark = pytest.mark.watched

CLASSES = [
    (400, "BadRequest"),
    (401, "Unauthorized"),
    (403, "Forbidden"),
    (404, "NotFound"),
    (405, "ApiError"),
    (409, "Conflict"),
    (413, "TooLarge"),
    (415, "ApiError"),
    (422, "Unprocessable"),
    (429, "RateLimited"),
    (500, "ServerError"),
    (502, "BadGateway"),
    (503, "Unavailable"),
    (504, "Timeout"),
    (599, "ServerError"),
    (301, "ApiError"),
]


@pytest.mark.parametrize(("status", "name"), CLASSES)
async def test_every_status_has_its_class(connect, status, name):
    with pytest.raises(ApiError) as raised:
        await connect(Script(problem(status, "some_code")), retries=0).get_library("x")
    assert type(raised.value) is getattr(pgshelf_client, name)
    assert (raised.value.status, raised.value.code) == (status, "some_code")
    assert isinstance(raised.value, ServerError) == (status >= 500)


async def test_an_error_carries_all_that_the_server_said(connect):
    answer = problem(
        400, "validation_failed", {"X-Request-Id": "from the header"}, title="Validation failed",
        detail="The body is invalid.", request_id="r1", errors=[{"path": "text", "message": "must not be empty"}],
    )  # fmt: skip
    with pytest.raises(pgshelf_client.BadRequest) as raised:
        await connect(Script(answer)).add_document("x", text="")
    error = raised.value
    assert (error.title, error.detail, error.request_id) == ("Validation failed", "The body is invalid.", "r1")
    assert error.errors == (FieldError("text", "must not be empty"),)
    assert error.retry_after is None
    assert str(error) == "400 validation_failed: The body is invalid.; text: must not be empty [request r1]"


async def test_the_message_says_nothing_twice(connect):
    places = [{"path": "k", "message": "must be positive"}]
    answer = problem(400, "validation_failed", detail="k: must be positive", errors=places)
    with pytest.raises(pgshelf_client.BadRequest) as raised:
        await connect(Script(answer)).search("x", "rows", k=0)
    assert str(raised.value) == "400 validation_failed: k: must be positive"


async def test_a_proxys_page_becomes_an_error_too(connect):
    page = httpx2.Response(502, text="<html>nginx</html>" + "x" * 1000, headers={"X-Request-Id": "r2"})
    with pytest.raises(pgshelf_client.BadGateway) as raised:
        await connect(Script(page), retries=0).get_library("x")
    error = raised.value
    assert (error.code, error.title, error.request_id) == ("", "Bad Gateway", "r2")
    assert error.detail.startswith("<html>nginx</html>")
    assert len(error.detail) == 300


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"[]", b'{"title": 7}', b"{}"])
async def test_an_error_needs_no_body(connect, body):
    with pytest.raises(pgshelf_client.NotFound, match=r"^404 Not Found: ") as raised:
        await connect(Script(httpx2.Response(404, content=body))).get_library("x")
    assert raised.value.title == "Not Found"


async def test_an_unknown_status_is_an_error_like_others(connect):
    with pytest.raises(ServerError, match=r"^599 Unknown status"):
        await connect(Script(httpx2.Response(599))).get_library("x")


@pytest.mark.parametrize(("value", "seconds"), [("7", 7.0), ("0", 0.0), ("soon", None), ("-1", None), ("1.5", None)])
async def test_retry_after_in_seconds(connect, value, seconds):
    with pytest.raises(pgshelf_client.Unavailable) as raised:
        await connect(Script(problem(503, "not_ready", {"Retry-After": value}))).ready()
    assert raised.value.retry_after == seconds


@pytest.mark.parametrize(("ahead", "least", "most"), [(60, 50, 60), (-60, 0, 0)])
async def test_retry_after_as_a_date(connect, ahead, least, most):
    date = email.utils.formatdate(time.time() + ahead, usegmt=True)
    with pytest.raises(pgshelf_client.Unavailable) as raised:
        await connect(Script(problem(503, "not_ready", {"Retry-After": date}))).ready()
    assert least <= raised.value.retry_after <= most


def test_every_error_is_in_the_tree():
    for name in set(errors.__all__) - {"FieldError"}:
        kind = getattr(pgshelf_client, name)
        assert issubclass(kind, PgshelfError)
        assert f"── {name} " in errors.__doc__ or name == "PgshelfError"


def test_whoever_knows_timeouts_of_python_knows_that_of_waiting():
    assert issubclass(pgshelf_client.WaitedTooLong, TimeoutError) and asyncio.TimeoutError is TimeoutError
    assert not issubclass(pgshelf_client.WaitedTooLong, ApiError)


def test_errors_travel_between_processes():
    sent = errors.error_from(problem(409, "library_exists", detail="Taken.", request_id="r"))
    got = pickle.loads(pickle.dumps(sent))  # noqa: S301 - pickled on this line
    assert type(got) is pgshelf_client.Conflict
    assert (str(got), vars(got)) == (str(sent), vars(sent))
    lost = pickle.loads(pickle.dumps(ConnectionFailed("lost", outcome_unknown=True)))  # noqa: S301 - pickled on this line
    assert (str(lost), lost.outcome_unknown) == ("lost", True)
