"""Head and tail of output, whatever the cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.manager.guest_output import Capture


@given(limit=st.integers(0, 40), chunks=st.lists(st.text("abcdefgh", max_size=30), max_size=20))
def test_head_and_tail_and_an_exact_count(limit: int, chunks: list[str]) -> None:
    capture = Capture(limit)
    for chunk in chunks:
        capture.feed(chunk.encode())
        assert len(capture._head) + len(capture._tail) <= limit // 2 + 2 * (limit - limit // 2) + 30
    whole = "".join(chunks)
    left_out = max(0, len(whole) - limit)
    head, tail = whole[: limit // 2], whole[len(whole) - (limit - limit // 2) :] if left_out else ""
    expected = f"{head}\n... [{left_out} bytes left out] ...\n{tail}" if left_out else whole
    assert capture.text() == expected
    assert capture.left_out == left_out


@given(limit=st.integers(0, 40), text=st.text("aé日\U0001f600", max_size=60))
def test_no_character_is_cut_in_two(limit: int, text: str) -> None:
    capture = Capture(limit)
    capture.feed(text.encode())
    found = capture.text()
    assert "\ufffd" not in found
    match = re.fullmatch(r"(.*)\n\.\.\. \[(\d+) bytes left out\] \.\.\.\n(.*)", found)
    if match is None:
        assert found == text
    else:
        assert text.startswith(match[1]) and text.endswith(match[3])
        assert len(text.encode()) == len(match[1].encode()) + int(match[2]) + len(match[3].encode())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\xffab" + bytes(9) + b"cd\xff", "\ufffdab|9|cd\ufffd"),
        (b"a\x80\x80" + bytes(9) + b"\x80\x80b", "a\ufffd\ufffd|11|b"),
        (b"a\xc3(" + bytes(9) + b"(\xa9b", "a\ufffd(|9|(\ufffdb"),
        (b"\x80" * 20, "\ufffd\ufffd\ufffd|17|"),
        (b"\x80" * 3 + bytes(9) + b"\x80\x80\x80", "\ufffd\ufffd\ufffd|12|"),
    ],
)
def test_what_is_no_character_stays_replaced(data: bytes, found: str) -> None:
    capture = Capture(6)
    capture.feed(data)
    head, left_out, tail = found.split("|")
    assert capture.text() == f"{head}\n... [{left_out} bytes left out] ...\n{tail}"


def test_a_stream_of_no_characters_loses_none_at_the_cut() -> None:
    capture = Capture(8)
    capture.feed(b"\x80" * 100)
    assert capture.text() == f"{4 * chr(0xFFFD)}\n... [92 bytes left out] ...\n{4 * chr(0xFFFD)}"


def test_what_the_guest_left_out_counts_too() -> None:
    capture = Capture(10)
    capture.feed(b"0123456789")
    capture.left_out += 90
    assert capture.text() == "01234\n... [90 bytes left out] ...\n56789"
