"""What the agent says about itself. Its standard error is a log that only the host reads, never the protocol."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def report(error: BaseException) -> None:
    """What went wrong inside the agent itself, with its traceback."""
    import traceback  # costs too much for every start

    say("".join(traceback.format_exception(error)).rstrip())
