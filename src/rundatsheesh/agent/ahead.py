"""Programs that are started before the call which will use them: a bash for `exec`, a Deno for scripts.

Starting a program is most of what a short call takes. So one of each kind waits where calls of its kind come in; it is
used once, and replaced when the guest has come to rest. Whatever a call decides reaches it only when the call comes, so
the call cannot tell; a call that would (a variable of its own, another directory) starts its program itself. How each
kind waits is in ahead_bash.py and ahead_deno.py.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

from . import ahead_bash, ahead_deno
from .console import report
from .job import CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from .job import Command
    from .loop import Loop
    from .spawner import Spawner, Tree
    from .streams import Streams
    from .workers import Workers

    class Waiting(Protocol):
        """One that waits. `start` or `close` it."""

        tree: Tree
        streams: Streams

        def fits(self, command: Command, cwd: str) -> bool:
            """Whether the command could not tell this one from its own."""

        def start(self, command: Command, cwd: str) -> bool:
            """Give it its work; False when it has ended, or cannot be told."""

        def was_lost(self) -> bool:
            """Once it has ended: whether that was while it waited, so that nothing of its work was done."""

        def let_go(self) -> None:
            """Its call is over. Tree and outputs are somebody else's now."""

        def close(self) -> None:
            """Also ends it, where it still waits."""


CALM = 0.025  # seconds in which nothing came, before the next are started: that must not slow the calls which follow
_MOST_FAILURES = 3  # in a row, after which a kind is given up: what cannot wait here costs each call a useless start


class Kind:
    """How to start one, and the least memory of a guest, in bytes, in which one may wait."""

    def __init__(self, launch: Callable[[Command, Spawner], Waiting | None], *, least_memory: int) -> None:
        self.launch = launch
        self.least_memory = least_memory


KINDS = {
    "bash": Kind(ahead_bash.launch, least_memory=0),  # takes 2 MiB
    # Takes about 10 MiB, and what else it shows as used is mapped from its file, which memory.py does not count.
    "deno": Kind(ahead_deno.launch, least_memory=256 << 20),
}


class Slot:
    """The place of one that waits."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.waiting: Waiting | None = None
        self.model: Command | None = None  # what the next one is expected to be like
        self.is_wanted = False
        self.failures = 0


class Ahead:
    """Methods may be called from any thread."""

    def __init__(self, spawner: Spawner, loop: Loop, workers: Workers, *, memory: int) -> None:
        """`memory` is the guest's, in bytes; with 0 nothing is ever started ahead."""
        self._spawner = spawner
        self._loop = loop
        self._workers = workers
        self._slots = {name: Slot(kind) for name, kind in KINDS.items() if memory and memory >= kind.least_memory}
        self._lock = threading.Lock()
        self._open = 0  # calls
        self._has_rested = False  # the server, while a call was open
        self._is_filling = False
        loop.at_rest(CALM, self._on_rest)

    @contextmanager
    def call(self, command: Command) -> Iterator[None]:
        """While a command runs nothing is started; some time afterwards one waits for the next of its kind."""
        with self._lock:
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                self._expect(command)

    def take(self, command: Command, cwd: str) -> Waiting | None:
        """One that is at work on the command, or None: then it has to be started as any other."""
        slot = self._slots.get(command.ahead or "")
        if slot is None:
            return None
        with self._lock:
            waiting = slot.waiting
            if waiting is None or not waiting.fits(command, cwd):
                return None
            slot.waiting = None
        if waiting.start(command, cwd):
            return waiting
        waiting.close()
        return None

    def answered(self) -> None:
        """A call has been answered. (What its end brings about has to wait for that.)"""
        with self._lock:
            has_rested, self._has_rested = self._has_rested, False
        if has_rested:
            self._loop.nudge()

    def _expect(self, command: Command) -> None:
        """Have one wait for a command like this. The lock is held."""
        slot = self._slots.get(command.ahead or "")
        if slot is not None and slot.failures < _MOST_FAILURES:
            slot.model, slot.is_wanted = command, True

    def _on_rest(self) -> None:
        with self._lock:
            if self._open:
                self._has_rested = True
                return
            if self._is_filling or not any(slot.is_wanted for slot in self._slots.values()):
                return
            self._is_filling = True
        try:
            self._workers.run(self._fill)
        except RuntimeError:  # no room for a thread now
            self._is_filling = False

    def _fill(self) -> None:
        """Counted like a call's processes meanwhile, so that nobody takes the guest for idle and freezes it."""
        self._spawner.count(1)
        try:
            self._fill_slots()
        finally:
            self._spawner.count(-1)
            with self._lock:
                self._is_filling = False

    def _fill_slots(self) -> None:
        for slot in self._slots.values():
            with self._lock:
                is_missing = slot.is_wanted and slot.waiting is None
                slot.is_wanted, model = False, slot.model
            if is_missing and model is not None:
                waiting = self._launch(slot.kind, model)
                with self._lock:
                    slot.waiting = waiting
                    slot.failures = 0 if waiting is not None else slot.failures + 1

    def _launch(self, kind: Kind, model: Command) -> Waiting | None:
        try:
            return kind.launch(model, self._spawner)
        except CallFailed:
            return None  # no room for another process now
        except Exception as error:
            report(error)
            return None
