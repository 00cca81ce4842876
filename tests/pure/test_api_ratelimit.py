"""Rates and throttles, on a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_support import KEY, serve

from rundatsheesh.manager.api import ratelimit
from rundatsheesh.manager.api.ratelimit import Recent, Throttle, TokenBuckets
from rundatsheesh.manager.errors import LimitReached


class Clock:
    at = 1000.0

    def __call__(self) -> float:
        return self.at


def test_a_bucket_empties_and_fills() -> None:
    clock = Clock()
    buckets = TokenBuckets(60, "calls", clock)
    for _ in range(60):
        buckets.take("a")
    with pytest.raises(LimitReached) as refused:
        buckets.take("a")
    assert refused.value.code == "rate_limited" and refused.value.retry_after == pytest.approx(1)
    buckets.take("b")
    clock.at += 1
    buckets.take("a")
    with pytest.raises(LimitReached):
        buckets.take("a")


def test_no_limit() -> None:
    buckets = TokenBuckets(0, "calls", Clock())
    for _ in range(1000):
        buckets.take("a")


def test_a_check_takes_nothing() -> None:
    clock = Clock()
    buckets = TokenBuckets(1, "calls", clock)
    for _ in range(3):
        buckets.check("a")
    buckets.take("a")
    with pytest.raises(LimitReached):
        buckets.check("a")
    clock.at += 60
    buckets.check("a")
    TokenBuckets(0, "calls", clock).check("a")


def test_what_was_noted_is_recent_for_a_while() -> None:
    clock = Clock()
    recent = Recent(60, clock)
    assert "a" not in recent
    recent.note("a")
    clock.at += 59
    assert "a" in recent and "b" not in recent
    clock.at += 1
    assert "a" not in recent


def test_all_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratelimit, "MAX_TRACKED", 10)
    buckets, throttle, recent = TokenBuckets(1, "calls", Clock()), Throttle(1, 60, Clock()), Recent(60, Clock())
    for n in range(100):
        buckets.take(str(n))
        throttle.fail(str(n))
        recent.note(str(n))
    assert len(buckets._buckets) == len(throttle._failures) == len(recent._noted) == 10
    assert "99" in recent


def test_failures_double_the_pause_up_to_the_longest() -> None:
    clock = Clock()
    throttle = Throttle(free=5, longest=8, clock=clock)
    for _ in range(4):
        throttle.fail("a")
        throttle.check("a")
    pauses = []
    for _ in range(6):
        throttle.fail("a")
        with pytest.raises(LimitReached) as refused:
            throttle.check("a")
        pauses.append(refused.value.retry_after)
        clock.at += refused.value.retry_after or 0
        throttle.check("a")
    assert pauses == [1, 2, 4, 8, 8, 8]
    throttle.check("b")
    throttle.succeed("a")
    throttle.fail("a")
    throttle.check("a")


def test_a_quiet_time_forgives() -> None:
    clock = Clock()
    throttle = Throttle(free=2, longest=8, clock=clock)
    throttle.fail("a")
    clock.at += Throttle.FORGET_AFTER_S + 1
    throttle.fail("a")
    throttle.check("a")


async def test_the_api_counts_per_key(tmp_path: Path) -> None:
    async with serve(tmp_path, rate_limit_per_minute=20) as server:
        vm = {"cpu": 1, "memMb": 128, "allowIps": []}
        created = [await server.client.post("/v1/vms", headers=KEY, json=vm) for _ in range(3)]
        assert [answer.status_code for answer in created] == [201, 201, 429]  # a tenth of 20
        others = [await server.client.get("/v1/vms", headers=KEY) for _ in range(18)]
        assert [answer.status_code for answer in others] == [200] * 17 + [429]
        assert others[-1].json()["retryable"] is True and int(others[-1].headers["retry-after"]) >= 1
        await server.log_in()
        assert (await server.client.get("/v1/vms")).status_code == 200
        assert (await server.client.get("/health")).status_code == 200
