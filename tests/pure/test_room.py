"""Scripts wait for room in the guest's memory: not the first one, not for ever, and not when nobody wants them."""

from __future__ import annotations

import threading

import pytest

from rundatsheesh.agent import room as of_room
from rundatsheesh.agent.calls import Cancelled
from rundatsheesh.agent.room import _NEED, Room

FULL, ROOMY = 0, 100 * _NEED


class Wanted:
    cancelled = False


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    made = Room()
    monkeypatch.setattr(made, "_available", lambda: FULL)
    return made


class Clock:
    """Goes on while somebody waits, and never else."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(room: Room, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(of_room, "time", made)
    monkeypatch.setattr(room._changed, "wait", made.wait)
    return made


def test_the_first_never_waits(room: Room, clock: Clock) -> None:
    with room.place(Wanted(), 1000) as waited:  # type: ignore[arg-type]
        assert waited == 0


def test_another_waits_until_there_is_room(room: Room) -> None:
    entered = threading.Event()

    def second() -> None:
        with room.place(Wanted(), 60_000):  # type: ignore[arg-type]
            entered.set()

    thread = threading.Thread(target=second)
    with room.place(Wanted(), 60_000):  # type: ignore[arg-type]
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(30)
    thread.join()


def test_with_memory_free_nobody_waits(room: Room, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_available", lambda: ROOMY)
    with room.place(Wanted(), 60_000), room.place(Wanted(), 60_000) as waited:  # type: ignore[arg-type]
        assert waited == 0


def test_those_that_still_grow_are_counted(room: Room, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_available", lambda: 2 * _NEED)
    with room.place(Wanted(), 400), room.place(Wanted(), 400) as second, room.place(Wanted(), 400) as third:  # type: ignore[arg-type]
        assert second == 0 and 200 <= third <= 300


def test_it_waits_for_half_of_its_time_at_most(room: Room, clock: Clock) -> None:
    with room.place(Wanted(), 60_000), room.place(Wanted(), 600) as waited:  # type: ignore[arg-type]
        assert 300 <= waited <= 400


def test_who_is_cancelled_goes_away(room: Room) -> None:
    call = Wanted()
    call.cancelled = True
    with room.place(Wanted(), 60_000), pytest.raises(Cancelled), room.place(call, 60_000):  # type: ignore[arg-type]
        raise AssertionError("not reached")
