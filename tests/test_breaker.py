"""The circuit breaker by itself, on a clock that the tests turn."""

from __future__ import annotations

import logging

import pytest

from pgshelf.breaker import Breaker, CircuitOpen


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("cohere", 3, 8.0, clock)


def trip(breaker: Breaker) -> None:
    for _ in range(3):
        assert breaker.enter() is False
        breaker.failed(False)


def refused(breaker: Breaker) -> float:
    with pytest.raises(CircuitOpen) as caught:
        breaker.enter()
    return caught.value.retry_after


def test_it_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    for _ in range(2):
        breaker.enter()
        breaker.failed(False)
    assert (breaker.is_open, breaker.remaining()) == (False, 0)
    breaker.enter()
    breaker.failed(False)
    assert breaker.is_open
    assert 0.75 <= refused(breaker) <= 1
    assert breaker.remaining() == refused(breaker)


def test_a_success_between_failures_keeps_it_closed(breaker: Breaker) -> None:
    for _ in range(5):
        for _ in range(2):
            breaker.enter()
            breaker.failed(False)
        breaker.enter()
        breaker.succeeded()
    assert not breaker.is_open


def test_one_probe_at_a_time(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += 1
    assert breaker.remaining() == 0
    assert breaker.enter() is True
    assert refused(breaker) == 1, "a second probe"
    breaker.succeeded()
    assert breaker.enter() is False
    assert not breaker.is_open


def test_waits_grow_up_to_the_longest_and_start_anew_after_a_success(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    for longest in (1, 2, 4, 8, 8, 8):
        wait = refused(breaker)
        assert 0.75 * longest <= wait <= longest
        clock.now += wait
        breaker.failed(breaker.enter())
    clock.now += 8
    assert breaker.enter()
    breaker.succeeded()
    trip(breaker)
    assert refused(breaker) <= 1


def test_an_hour_of_failing_probes_is_no_trouble(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    for _ in range(2000):
        clock.now += 8
        breaker.failed(breaker.enter())
    assert refused(breaker) <= 8


def test_a_probe_that_was_given_up_lets_another_probe(breaker: Breaker, clock: Clock) -> None:
    trip(breaker)
    clock.now += 1
    breaker.left(breaker.enter())
    assert breaker.is_open
    assert breaker.enter() is True


def test_who_leaves_without_an_answer_changes_nothing(breaker: Breaker, clock: Clock) -> None:
    breaker.left(breaker.enter())
    trip(breaker)
    clock.now += 1
    assert breaker.enter() is True
    breaker.left(False)  # a call from before
    assert refused(breaker) == 1


def test_a_failure_from_before_it_opened_prolongs_nothing(breaker: Breaker, clock: Clock) -> None:
    for _ in range(4):
        breaker.enter()
    for _ in range(3):
        breaker.failed(False)
    clock.now += 0.5
    wait = breaker.remaining()
    breaker.failed(False)
    assert breaker.remaining() == wait


def test_a_late_answer_from_before_it_opened_closes_it(breaker: Breaker) -> None:
    breaker.enter()
    trip(breaker)
    breaker.succeeded()
    assert breaker.enter() is False


def test_what_the_provider_says_is_honoured_within_bounds(breaker: Breaker, clock: Clock) -> None:
    for _ in range(3):
        breaker.enter()
        breaker.failed(False, 5)
    assert refused(breaker) == 5
    clock.now += 5
    breaker.failed(breaker.enter(), 86_400)
    assert refused(breaker) == 8


def test_opening_and_closing_are_logged_once(breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pgshelf.breaker"):
        trip(breaker)
        refused(breaker)
        clock.now += 1
        breaker.enter()
        breaker.succeeded()
        breaker.succeeded()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("cohere keeps failing") and said[1] == "cohere answers again"
