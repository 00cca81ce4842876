"""Progress on a terminal, or in a log where there is none."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Sequence

import click

from rundatsheesh.manager.host.doctor import Level, Result

NAME_WIDTH = 16
TERMINAL_TICK = 0.2  # seconds
LOG_TICK = 15.0
COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


class Progress:
    """One line per step. On a terminal the line of the step at work shows what it does and for how long."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._head = ""
        self._what = ""
        self._started = 0.0
        self._tick: asyncio.TimerHandle | None = None

    def begin(self, number: int, total: int, name: str) -> None:
        self._head = f"[{number}/{total}] {name:<{NAME_WIDTH}}"
        self._started = time.monotonic()

    def doing(self, what: str) -> None:
        self._what = what
        self._show()

    def end(self, fact: str, seconds: float) -> None:
        self._finish(f"{fact}  ({seconds:.1f} s)")

    def failed(self, seconds: float) -> None:
        self._finish(click.style("failed", fg="red") + f"  ({seconds:.1f} s)")

    def _finish(self, outcome: str) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
            self._clear()
        click.echo(f"{self._head} {outcome}")

    def _show(self) -> None:
        line = f"{self._head} {self._what} … {time.monotonic() - self._started:.0f} s"
        if self._terminal:
            self._clear()
            click.echo(line[: shutil.get_terminal_size().columns - 1], nl=False)
        else:
            click.echo(line)
        if self._tick is not None:
            self._tick.cancel()
        self._tick = asyncio.get_running_loop().call_later(TERMINAL_TICK if self._terminal else LOG_TICK, self._show)

    def _clear(self) -> None:
        if self._terminal:
            click.echo("\r\x1b[K", nl=False)


def show_results(results: Sequence[Result]) -> None:
    """One line per fact, and a hint beneath where there is one."""
    width = max((len(result.name) for result in results), default=0)
    for result in results:
        finding = result.finding
        level = click.style(f"{finding.level:<4}", fg=COLOURS[finding.level])
        click.echo(f"{level}  {result.name:<{width}}  {finding.fact}")
        if finding.hint:
            click.echo(f"{'':4}  {'':<{width}}  → {finding.hint}")
