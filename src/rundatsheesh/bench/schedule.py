"""In which order things are measured: in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rundatsheesh.bench.results import Results

Contender = Callable[[], Awaitable[Mapping[str, float]]]  # measures once; what it took, by measure

FEWEST_ROUNDS = 3  # even where time is up
BREATH = 0.05  # seconds between two turns: what one has set going behind its answer is not to slow the next


async def in_turns(
    results: Results, contenders: Sequence[Contender], *, rounds: int, seconds: float, warm_up: int = 1
) -> None:
    """Let each contender measure once a round, each round starting with another one. The first `warm_up` rounds do
    not count. Ends early when `seconds` are over, but not before FEWEST_ROUNDS count."""
    end = time.monotonic() + seconds
    for number in range(-warm_up, rounds):
        if time.monotonic() > end and number >= FEWEST_ROUNDS:
            return
        turn = number % len(contenders)
        for contender in (*contenders[turn:], *contenders[:turn]):
            await asyncio.sleep(BREATH)
            values = await contender()
            if number >= 0:
                results.add(values)
