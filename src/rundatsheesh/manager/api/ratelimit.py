"""Who may call how often. In memory, bounded; a restart forgives."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from rundatsheesh.manager.errors import LimitReached

MAX_TRACKED = 10_000  # callers remembered per table; the one longest idle goes first

TOO_MANY = "too_many_failures"

Clock = Callable[[], float]


class TokenBuckets:
    """At most `per_minute` calls a minute for each key, a minute's worth at once. 0 means no limit; None that each
    call of `take` says what is its key's."""

    def __init__(
        self, per_minute: int | None, what: str, clock: Clock = time.monotonic, code: str = "rate_limited"
    ) -> None:
        self._per_minute = per_minute
        self._what = what
        self._code = code
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens left, when that was true

    def take(self, key: str, per_minute: int = 0) -> None:
        """Raises LimitReached (`rate_limited`) with the time until the next token."""
        capacity = float(per_minute if self._per_minute is None else self._per_minute)
        if capacity == 0:
            return
        tokens = self._left(key, capacity)
        self._buckets.pop(key, None)
        self._buckets[key] = (tokens - 1 if tokens >= 1 else tokens, self._clock())
        if len(self._buckets) > MAX_TRACKED:
            self._buckets.popitem(last=False)
        self._refuse_below_one(tokens, capacity)

    def check(self, key: str) -> None:
        """Raises as `take` would, and takes nothing: for what is known to cost a token only afterwards."""
        if self._per_minute:
            capacity = float(self._per_minute)
            self._refuse_below_one(self._left(key, capacity), capacity)

    def _left(self, key: str, capacity: float) -> float:
        tokens, since = self._buckets.get(key, (capacity, self._clock()))
        return min(capacity, tokens + (self._clock() - since) * capacity / 60)

    def _refuse_below_one(self, tokens: float, capacity: float) -> None:
        if tokens < 1:
            raise LimitReached(
                f"more than {capacity:.0f} {self._what} per minute",
                code=self._code,
                details={"limit": int(capacity)},
                retry_after=(1 - tokens) * 60 / capacity,
            )


class Throttle:
    """Failures make a key wait: after `free` of them each further one doubles the pause, up to `longest` seconds.

    A success forgets the key; so does a quiet time of FORGET_AFTER_S.
    """

    FORGET_AFTER_S = 900.0

    def __init__(self, free: int, longest: float, clock: Clock = time.monotonic) -> None:
        self._free = free
        self._longest = longest
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, when the last was

    def check(self, key: str) -> None:
        """Raises LimitReached (TOO_MANY) while the key has to wait."""
        count, last = self._failures.get(key, (0, 0.0))
        wait = last + self._pause(count) - self._clock()
        if wait > 0:
            raise LimitReached("too many failed attempts", code=TOO_MANY, hint="wait and try again", retry_after=wait)

    def fail(self, key: str) -> None:
        at = self._clock()
        count, last = self._failures.pop(key, (0, at))
        if at - last > self.FORGET_AFTER_S:
            count = 0
        self._failures[key] = (count + 1, at)
        if len(self._failures) > MAX_TRACKED:
            self._failures.popitem(last=False)

    def succeed(self, key: str) -> None:
        self._failures.pop(key, None)

    def _pause(self, count: int) -> float:
        """Seconds to wait after the `count`-th failure."""
        if count < self._free:
            return 0.0
        return float(min(self._longest, 2 ** min(count - self._free, 30)))


class Recent:
    """The keys that were noted in the last `seconds`: the newest MAX_TRACKED of them."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._noted: OrderedDict[str, float] = OrderedDict()

    def note(self, key: str) -> None:
        self._noted[key] = self._clock()
        self._noted.move_to_end(key)
        if len(self._noted) > MAX_TRACKED:
            self._noted.popitem(last=False)

    def __contains__(self, key: str) -> bool:
        at = self._noted.get(key)
        return at is not None and self._clock() - at < self._seconds
