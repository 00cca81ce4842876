"""What is kept of a guest's output, and what is believed of a script's result. Bounded, whatever arrives."""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any, NoReturn

from rundatsheesh.manager.errors import GuestMisbehaved

MAX_TEXT = 4000  # characters of a guest's own words in an error message
MAX_DEPTH = 200  # of nested arrays and objects in a result; encoding it again must not exhaust the stack

_SURROGATE = re.compile("[\ud800-\udfff]")


class Capture:
    """The head and the tail of a stream: `limit` bytes at most, twice that for a moment."""

    def __init__(self, limit: int) -> None:
        self._head_limit = limit // 2
        self._tail_limit = limit - limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.left_out = 0  # bytes between the two; the guest's own omissions are added

    def feed(self, data: bytes) -> None:
        room = self._head_limit - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._tail_limit:
            self._trim()

    def text(self) -> str:
        """UTF-8, with U+FFFD for what is not. Of a character that the cut went through nothing is kept."""
        self._trim()
        if not self.left_out:
            return (self._head + self._tail).decode(errors="replace")
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        head = decoder.decode(self._head)
        begun = len(decoder.getstate()[0])  # bytes of a character that would go on
        rest = _continuation(self._tail)
        mark = f"\n... [{self.left_out + begun + rest} bytes left out] ...\n"
        return head + mark + self._tail[rest:].decode(errors="replace")

    def _trim(self) -> None:
        excess = max(0, len(self._tail) - self._tail_limit)
        self.left_out += excess
        del self._tail[:excess]


def _continuation(tail: bytearray) -> int:
    """How many bytes at the beginning can be the end of a character. More than three in a row are of none."""
    count = next((at for at, byte in enumerate(tail[:4]) if byte & 0xC0 != 0x80), len(tail[:4]))
    return count if count <= 3 else 0


class Value:
    """A JSON text of at most `limit` bytes; the agent promised to stay within."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.text = bytearray()

    def feed(self, data: bytes) -> None:
        if len(self.text) + len(data) > self._limit:
            raise GuestMisbehaved(f"a result of more than {self._limit} bytes")
        self.text += data


class UnusableValueError(Exception):
    """The script wrote something that is no JSON value we would pass on; says what is wrong with it."""


def parse_value(value: Value) -> tuple[bool, Any]:
    """Whether there is one, and what it is. Raises UnusableValueError: the text is the user's process's own, so a
    wrong one is no misbehaviour of the agent."""
    if not value.text:
        return False, None
    try:
        parsed = json.loads(value.text.decode(), parse_constant=_refuse, parse_float=_finite)
        return True, _clean(parsed, MAX_DEPTH)
    except UnicodeDecodeError:
        raise UnusableValueError("it is not UTF-8") from None
    except RecursionError:
        raise UnusableValueError(f"it is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise UnusableValueError(clean_text(str(error))[:200]) from None


def clean_text(text: str) -> str:
    """Without lone surrogates, which no encoder takes."""
    return _SURROGATE.sub("\ufffd", text)


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list | dict) and depth == 0:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [_clean(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {clean_text(key): _clean(item, depth - 1) for key, item in value.items()}
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number out of range")
    return number
