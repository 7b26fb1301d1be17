"""Reranking through Cohere's API, as a server on this machine speaks it: order, retries, and everything that fails."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import msgspec
import pytest
import sqlalchemy
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pgshelf import providers
from pgshelf.errors import CODES, Problem, problem_of
from pgshelf.pools import make_engine
from pgshelf.rerank import RerankChoice, reach, rerank
from pgshelf.rerankers import (
    ModelUnknown,
    RerankerError,
    RerankerFailed,
    RerankerTimeout,
    RerankerUnavailable,
    cohere,
    reranker_for,
)
from pgshelf.settings import Settings, SettingsError
from tests.cohere_server import CohereServer, Fault, changed, cut_off, hang, raw, relevance, reset, status

QUERY = "vacuum reclaims dead rows"
TEXTS = ["a cat sleeps", "vacuum reclaims storage", "vacuum reclaims dead rows", "rows and columns"]
BEST = [(2, 1.0), (1, 0.4), (3, 1 / 6), (0, 0.0)]
CHOICE = RerankChoice("cohere")
DEADLINE = 30.0  # of calls that must not reach it


def settings_for(server: CohereServer, **given: Any) -> Settings:
    known = {"cohere_api_key": server.key, "cohere_base_url": server.url, "cohere_timeout": DEADLINE}
    return Settings(**{**known, **given})


@pytest.fixture
async def reranker(cohere_server: CohereServer) -> AsyncIterator[cohere.CohereReranker]:
    yield cohere.CohereReranker(settings_for(cohere_server))
    await providers.close()


@pytest.fixture
async def closed() -> AsyncIterator[None]:
    """For tests that make rerankers of their own."""
    yield
    await providers.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited; nothing is."""
    noted: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        noted.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return noted


async def test_the_most_relevant_come_first(reranker: cohere.CohereReranker) -> None:
    assert await reranker.rerank(QUERY, TEXTS, 10) == BEST
    assert await reranker.rerank(QUERY, TEXTS, 2) == BEST[:2]


def test_any_texts_come_in_the_order_of_relevance_then_of_place(cohere_server: CohereServer) -> None:
    texts = st.lists(st.sampled_from(["a", "b", "a b", "b c d", "a a c", "e f"]), max_size=12)

    with asyncio.Runner() as runner:  # one loop and one client for all examples

        @examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(st.sampled_from(["a", "a b", "a b c d"]), texts, st.integers(0, 14))
        def check(query: str, texts: list[str], top: int) -> None:
            ranked = runner.run(reranker_for(settings_for(cohere_server), "cohere").rerank(query, texts, top))
            scored = [(place, relevance(query, text)) for place, text in enumerate(texts)]
            assert ranked == sorted(scored, key=lambda item: (-item[1], item[0]))[:top]

        check()
        runner.run(providers.close())


async def test_what_cohere_is_sent(cohere_server: CohereServer, closed: None) -> None:
    settings = settings_for(cohere_server, cohere_base_url=cohere_server.url + "/")
    long = "x" * (cohere.MAX_CHARACTERS + 1)
    await reranker_for(settings, "cohere").rerank(QUERY, ["short", long], 5)
    await reranker_for(settings, "cohere", "rerank-v5.0-pro").rerank(QUERY, ["short"], 1)
    first, second = cohere_server.asked
    assert first.path == "/v2/rerank"
    assert first.headers["authorization"] == f"Bearer {cohere_server.key}"
    assert first.headers["x-client-name"] == "pgshelf"
    assert first.body == {"model": cohere.MODEL, "query": QUERY, "documents": ["short", long[:-1]], "top_n": 2}
    assert second.body["model"] == "rerank-v5.0-pro"


async def test_nothing_is_sent_for_nothing(cohere_server: CohereServer, reranker: cohere.CohereReranker) -> None:
    assert await reranker.rerank(QUERY, [], 5) == []
    assert await reranker.rerank(QUERY, TEXTS, 0) == []
    with pytest.raises(ValueError, match="at most 1000 texts at a time, not 1001"):
        await reranker.rerank(QUERY, ["text"] * 1001, 5)
    assert cohere_server.asked == []
    assert len(await reranker.rerank(QUERY, ["text"] * 1000, 5)) == 5


@pytest.mark.parametrize(
    "fault",
    [*map(status, (408, 429, 500, 502, 503, 504)), raw(b"<html>Bad gateway</html>", 502), reset, cut_off],
    ids=["408", "429", "500", "502", "503", "504", "502 in HTML", "connection reset", "half an answer"],
)
async def test_what_passes_is_tried_again(
    cohere_server: CohereServer, reranker: cohere.CohereReranker, waits: list[float], fault: Fault
) -> None:
    cohere_server.fail(fault, fault)
    assert await reranker.rerank(QUERY, TEXTS, 4) == BEST
    assert len(cohere_server.asked) == 3
    first, second = waits
    assert providers.BACKOFF / 2 <= first <= providers.BACKOFF <= second <= providers.BACKOFF * 2


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (status(429), RerankerUnavailable, "limits how often it may be asked \\(status 429\\)"),
        (status(503), RerankerUnavailable, "is not available \\(status 503\\)"),
        (status(500, "internal."), RerankerFailed, "refused the request \\(status 500\\): internal$"),
        (reset, RerankerUnavailable, "cannot be reached"),
    ],
)
async def test_after_three_attempts_it_is_given_up(
    cohere_server: CohereServer,
    reranker: cohere.CohereReranker,
    waits: list[float],
    fault: Fault,
    kind: type[RerankerError],
    message: str,
) -> None:
    cohere_server.fail(*[fault] * 3)
    with pytest.raises(kind, match=message):
        await reranker.rerank(QUERY, TEXTS, 4)
    assert (len(cohere_server.asked), len(waits)) == (3, 2)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (status(400, "too many tokens"), RerankerFailed, "refused the request \\(status 400\\): too many tokens$"),
        (status(402, "x" * 1000), RerankerFailed, "status 402\\): x{200}$"),
        (raw(b"[1]", 422), RerankerFailed, "refused the request \\(status 422\\)$"),
        (raw(b"nothing", 418), RerankerFailed, "refused the request \\(status 418\\)$"),
        (status(501), RerankerFailed, "status 501"),
        (status(302, location="/elsewhere"), RerankerFailed, "could not be read"),
        (status(403), RerankerFailed, "refused the key in PGSHELF_COHERE_API_KEY \\(status 403\\)$"),
        (status(498), RerankerFailed, "refused the key"),
        (status(404), ModelUnknown, f'no rerank model "{cohere.MODEL}"'),
        (status(499), RerankerUnavailable, "is not available"),
    ],
)
async def test_what_stays_is_not_tried_again(
    cohere_server: CohereServer,
    reranker: cohere.CohereReranker,
    fault: Fault,
    kind: type[RerankerError],
    message: str,
) -> None:
    cohere_server.fail(fault)
    with pytest.raises(kind, match=message):
        await reranker.rerank(QUERY, TEXTS, 4)
    assert len(cohere_server.asked) == 1


async def test_a_retry_after_is_kept(
    cohere_server: CohereServer, reranker: cohere.CohereReranker, waits: list[float]
) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=8), usegmt=True)
    cohere_server.fail(status(429, retry_after="3"), status(503, retry_after=date))
    assert await reranker.rerank(QUERY, TEXTS, 4) == BEST
    first, second = waits
    assert 3 < first <= 3 + providers.BACKOFF
    assert 5 < second <= 8 + providers.BACKOFF * 2


@pytest.mark.parametrize("header", ["soon", "", "1e999", "nan", "-5", "0", "Wed, 21 Oct 2015 07:28:00 -0000"])
async def test_a_retry_after_that_says_nothing_is_no_reason_to_wait(
    cohere_server: CohereServer, reranker: cohere.CohereReranker, waits: list[float], header: str
) -> None:
    cohere_server.fail(status(429, retry_after=header))
    assert await reranker.rerank(QUERY, TEXTS, 4) == BEST
    assert waits[0] <= providers.BACKOFF


async def test_who_would_have_to_wait_for_too_long_is_told_at_once(
    cohere_server: CohereServer, reranker: cohere.CohereReranker, waits: list[float]
) -> None:
    cohere_server.fail(status(429, retry_after="60"))
    with pytest.raises(RerankerUnavailable) as caught:
        await reranker.rerank(QUERY, TEXTS, 4)
    assert (caught.value.retry_after, waits, len(cohere_server.asked)) == (60, [], 1)


async def test_a_retry_after_of_the_last_attempt_is_handed_on(
    cohere_server: CohereServer, reranker: cohere.CohereReranker, waits: list[float]
) -> None:
    cohere_server.fail(status(503), status(503), status(503, retry_after="17"))
    with pytest.raises(RerankerUnavailable) as caught:
        await reranker.rerank(QUERY, TEXTS, 4)
    assert caught.value.retry_after == 17


@pytest.mark.parametrize("faults", [[hang], [status(503), hang]], ids=["at once", "at the second attempt"])
async def test_no_answer_in_time(
    cohere_server: CohereServer, closed: None, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    monkeypatch.setattr(providers, "BACKOFF", 0.001)
    cohere_server.fail(*faults)
    reranker = cohere.CohereReranker(settings_for(cohere_server, cohere_timeout=1.0))
    with pytest.raises(RerankerTimeout, match="within 1 second"):
        await reranker.rerank(QUERY, TEXTS, 4)
    assert len(cohere_server.asked) == len(faults)
    patient = cohere.CohereReranker(settings_for(cohere_server))
    assert await patient.rerank(QUERY, TEXTS, 4) == BEST


async def test_nobody_there(closed: None, waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    reranker = cohere.CohereReranker(Settings(cohere_api_key="key", cohere_base_url=f"http://127.0.0.1:{port}"))
    with pytest.raises(RerankerUnavailable, match="cannot be reached") as caught:
        await reranker.rerank(QUERY, TEXTS, 4)
    assert (caught.value.retry_after, len(waits)) == (providers.RETRY_AFTER, 2)


def results(*changes: tuple[str, Any]) -> Fault:
    """The right answer, whose first results have these values instead."""

    def change(answer: dict[str, Any]) -> None:
        for result, (name, value) in zip(answer["results"], changes, strict=False):
            result[name] = value

    return changed(change)


WRONG: dict[str, Fault] = {
    "place behind the end": results(("index", 4)),
    "place before the start": results(("index", -1)),
    "place twice": results(("index", 1)),
    "no place": results(("index", None)),
    "place in words": results(("index", "first")),
    "place true": results(("index", True)),
    "relevance NaN": results(("relevance_score", float("nan"))),
    "relevance infinite": results(("relevance_score", float("inf"))),
    "no relevance": results(("relevance_score", None)),
    "relevance in words": results(("relevance_score", "high")),
    "too few": changed(lambda answer: answer["results"].pop()),
    "too many": changed(lambda answer: answer["results"].append({"index": 0, "relevance_score": 0.5})),
    "no result": changed(lambda answer: answer["results"].append(7)),
    "no results": changed(lambda answer: answer.pop("results")),
    "results null": changed(lambda answer: answer.update(results=None)),
    "results object": changed(lambda answer: answer.update(results={})),
    "nothing": raw(b""),
    "null": raw(b"null"),
    "list": raw(b"[]"),
    "text": raw(b'"x"'),
    "number": raw(b"7"),
    "object": raw(b"{}"),
    "HTML": raw(b"<html>"),
    "bytes": raw(b"\xff\xfe\x00"),
    "depth": raw(b"[" * 100_000),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_is_none(cohere_server: CohereServer, reranker: cohere.CohereReranker, name: str) -> None:
    cohere_server.fail(WRONG[name])
    with pytest.raises(RerankerFailed, match="Cohere's answer"):
        await reranker.rerank(QUERY, TEXTS, 3)
    assert len(cohere_server.asked) == 1


async def test_an_answer_out_of_order_is_put_in_order(
    cohere_server: CohereServer, reranker: cohere.CohereReranker
) -> None:
    cohere_server.fail(changed(lambda answer: answer["results"].reverse()))
    assert await reranker.rerank(QUERY, TEXTS, 4) == BEST


async def test_connections_are_kept_between_searches(
    cohere_server: CohereServer, reranker: cohere.CohereReranker
) -> None:
    await asyncio.gather(*[reranker.rerank(QUERY, TEXTS, 4) for _ in range(5)])
    assert len(providers._connections[asyncio.get_running_loop()]) == 1
    opened = cohere_server.connections
    assert opened <= 5
    for _ in range(5):
        await reranker.rerank(QUERY, TEXTS, 4)
    assert cohere_server.connections == opened
    await providers.close()
    await reranker.rerank(QUERY, TEXTS, 4)
    assert cohere_server.connections == opened + 1


def engine() -> sqlalchemy.Engine:
    """A pool that opens no connection: circuits belong to one."""
    return make_engine(Settings(), "postgresql://127.0.0.1:1/nowhere")


async def test_the_application_closes_them_at_its_end(cohere_server: CohereServer) -> None:
    from pgshelf.app import create_app

    nowhere = "postgresql://127.0.0.1:1/nowhere"  # nothing asks the database here
    settings = settings_for(cohere_server, database_url=nowhere, worker_enabled=False, embedder="none")
    async with create_app(settings).lifespan():
        assert await rerank(engine(), settings, CHOICE, QUERY, TEXTS, 4) == BEST
        [connection] = providers._connections[asyncio.get_running_loop()].values()
        assert not connection.http.is_closed
    assert connection.http.is_closed


def test_the_package_is_imported_by_the_first_rerank_only_and_without_a_warning(cohere_server: CohereServer) -> None:
    code = f"""
import asyncio, sys
import pgshelf.app
from pgshelf.rerankers import reranker_for
from pgshelf.settings import Settings
reranker = reranker_for(Settings(cohere_api_key="{cohere_server.key}", cohere_base_url="{cohere_server.url}"), "cohere")
assert "cohere" not in sys.modules

async def main():
    from pgshelf import providers
    assert len(await reranker.rerank("a", ["a", "b"], 2)) == 2
    await providers.close()

asyncio.run(main())
assert "cohere" in sys.modules
"""
    # the package would take these, if it was let
    elsewhere = {"CO_API_URL": "http://127.0.0.1:1", "CO_API_KEY": "another"}
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], env=elsewhere, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


async def test_the_key_stays_out_of_logs_messages_and_summaries(
    cohere_server: CohereServer, reranker: cohere.CohereReranker, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (None, "httpx", "httpcore", "cohere"):  # what logs.configure may have made quiet in this process
        caplog.set_level(logging.DEBUG, name)
    key = cohere_server.key
    cohere_server.fail(status(400, f"what is {key}?"))
    with pytest.raises(RerankerFailed, match=r"what is \*\*\*\?"):
        await reranker.rerank(QUERY, TEXTS, 4)
    assert caplog.text and key not in caplog.text
    settings = settings_for(cohere_server, cohere_base_url="https://somebody:hunter2@gateway.example")
    assert settings.summary()["cohere_api_key"] == "***"
    assert settings.summary()["cohere_base_url"] == "https://somebody:***@gateway.example"
    assert Settings().summary()["cohere_base_url"] == "https://api.cohere.com"
    assert not [text for text in settings.summary().values() if key in text or "hunter2" in text]


@pytest.mark.parametrize("key", ["two words", "s3cret\n", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(SettingsError, match=r"PGSHELF_COHERE_API_KEY=\*\*\* cannot be used") as refused:
        Settings.from_env({"PGSHELF_COHERE_API_KEY": key})
    assert key not in str(refused.value)


@pytest.mark.parametrize("url", ["https://", "https:///v2", "https://h/?a=b", "https://h/#a", "https://h h", "h:80"])
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="PGSHELF_COHERE_BASE_URL"):
        Settings.from_env({"PGSHELF_COHERE_BASE_URL": url})


@pytest.mark.parametrize("url", ["http://h:port", "http://h:65536", "http://[::1"])
def test_a_base_url_with_a_host_or_port_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="cohere_base_url must be an address such as https://api"):
        Settings.from_env({"PGSHELF_COHERE_BASE_URL": url})


async def test_a_base_url_that_leads_nowhere(closed: None) -> None:
    lost = Settings(cohere_api_key="key")
    msgspec.structs.force_setattr(lost, "cohere_base_url", "http://localhost:port")
    with pytest.raises(RerankerFailed, match="PGSHELF_COHERE_BASE_URL"):
        await cohere.CohereReranker(lost).rerank(QUERY, TEXTS, 4)


@pytest.mark.parametrize(
    ("faults", "code", "words", "retry_after"),
    [
        ([status(429, retry_after="60")], "reranker_unavailable", "how often", "60"),
        ([status(503)] * 3, "reranker_unavailable", "not available", "5"),
        ([status(400, "too many tokens")], "reranker_failed", "too many tokens", None),
        ([raw(b"<html>")], "reranker_failed", "could not be read", None),
        ([hang], "reranker_timeout", "within 2 seconds", "1"),
    ],
)
async def test_failures_are_problems(
    cohere_server: CohereServer,
    closed: None,
    waits: list[float],
    faults: list[Fault],
    code: str,
    words: str,
    retry_after: str | None,
) -> None:
    cohere_server.fail(*faults)
    with pytest.raises(Problem, match=words) as caught:
        await rerank(engine(), settings_for(cohere_server, cohere_timeout=2.0), CHOICE, QUERY, TEXTS, 4)
    assert (caught.value.code, caught.value.status) == (code, CODES[code][0])
    assert caught.value.headers.get("Retry-After") == retry_after
    assert QUERY not in caught.value.detail and TEXTS[0] not in caught.value.detail


async def test_a_server_that_cannot_rerank_says_so(cohere_server: CohereServer, closed: None) -> None:
    without = Settings(cohere_base_url=cohere_server.url)
    unknown = RerankChoice("cohere", "rerank-of-tomorrow")
    for settings, choice, words in (
        (without, CHOICE, "needs PGSHELF_COHERE_API_KEY"),
        (settings_for(cohere_server), unknown, 'no rerank model "rerank-of-tomorrow"'),
        (settings_for(cohere_server), RerankChoice("other"), "one of cohere, not 'other'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Problem, match=words) as caught:
            await rerank(engine(), settings, choice, QUERY, TEXTS, 4)
        assert (caught.value.code, caught.value.status) == ("reranker_not_configured", 422)
    with pytest.raises(Problem, match="needs PGSHELF_COHERE_API_KEY") as caught:
        reach(without, CHOICE, 10)
    assert caught.value.code == "reranker_not_configured"
    wrong = settings_for(cohere_server, cohere_api_key="wrong")
    with pytest.raises(Problem, match="refused the key in PGSHELF_COHERE_API_KEY") as caught:
        await rerank(engine(), wrong, CHOICE, QUERY, TEXTS, 4)
    assert caught.value.code == "reranker_failed"


async def test_a_query_must_be_there_and_be_text(cohere_server: CohereServer, closed: None) -> None:
    with pytest.raises(Problem, match="rerank: needs query") as caught:
        await rerank(engine(), settings_for(cohere_server), CHOICE, " ", TEXTS, 4)
    assert caught.value.status == 400
    with pytest.raises(UnicodeEncodeError) as refused:
        await rerank(engine(), settings_for(cohere_server), CHOICE, "a\ud800b", TEXTS, 4)
    assert problem_of(refused.value).code == "invalid_text"
    assert cohere_server.asked == []


@pytest.mark.parametrize(
    ("candidates", "wanted", "limit", "expected"),
    [(None, 10, 100, 50), (None, 60, 100, 60), (None, 10, 30, 30), (20, 10, 100, 20), (20, 40, 100, 40), (7, 7, 7, 7)],
)
def test_how_many_hits_are_fetched(
    cohere_server: CohereServer, candidates: int | None, wanted: int, limit: int, expected: int
) -> None:
    settings = settings_for(cohere_server, max_rerank_candidates=limit)
    assert reach(settings, RerankChoice("cohere", None, candidates), wanted) == expected


@pytest.mark.parametrize(
    ("candidates", "wanted", "path", "words"),
    [(101, 10, "rerank.candidates", "is 101, at most 100"), (None, 101, "rerank", "at most 100 .* is 101")],
)
def test_more_than_may_be_reranked(
    cohere_server: CohereServer, candidates: int | None, wanted: int, path: str, words: str
) -> None:
    with pytest.raises(Problem, match=words) as caught:
        reach(settings_for(cohere_server), RerankChoice("cohere", None, candidates), wanted)
    assert caught.value.errors is not None
    assert (caught.value.status, caught.value.errors[0]["path"]) == (400, path)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"provider": "other"}',
        b'{"provider": "cohere", "model": ""}',
        b'{"provider": "cohere", "candidates": 0}',
        b'{"provider": "cohere", "candidates": 1001}',
        b'{"provider": "cohere", "top": 3}',
    ],
)
def test_a_choice_is_strict(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=RerankChoice)


def test_a_choice_describes_itself() -> None:
    full = msgspec.json.decode(b'{"provider": "cohere", "model": "m", "candidates": 30}', type=RerankChoice)
    assert full == RerankChoice("cohere", "m", 30)
    schema = msgspec.json.schema(RerankChoice)["$defs"]["RerankChoice"]
    assert schema["required"] == ["provider"] and schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())
    assert cohere.MODEL in schema["properties"]["model"]["description"]
