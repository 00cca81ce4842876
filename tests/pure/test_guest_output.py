"""Head and tail of output, whatever the cut."""

from __future__ import annotations

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


def test_what_the_guest_left_out_counts_too() -> None:
    capture = Capture(10)
    capture.feed(b"0123456789")
    capture.left_out += 90
    assert capture.text() == "01234\n... [90 bytes left out] ...\n56789"
