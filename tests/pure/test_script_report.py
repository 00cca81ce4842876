"""What the guest's agent makes of the bytes on a script's channel, however they are cut and whoever wrote them."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.agent.scripts import _LOAD_FAILURES, Report, preload_url

LIMIT = 1000


def fed(data: bytes, cuts: list[int] | None = None) -> Report:
    report = Report(LIMIT, _LOAD_FAILURES["ts"])
    position = 0
    for cut in sorted(cut % (len(data) + 1) for cut in cuts or []):
        report.feed(data[position:cut])
        position = cut
    report.feed(data[position:])
    return report


def line(letter: str, value: object) -> bytes:
    return json.dumps(letter + json.dumps(value)).encode() + b"\n"


@given(st.lists(st.tuples(st.sampled_from("reu"), st.text(max_size=100)), max_size=8), st.lists(st.integers(0, 5000)))
def test_the_latest_of_each_counts_wherever_the_stream_is_cut(said: list[tuple[str, str]], cuts: list[int]) -> None:
    result, error = fed(b"".join(line(letter, value) for letter, value in said), cuts).finish(0, b"")
    latest = dict(said)
    wanted_error = latest.get("e", latest.get("u"))
    assert (None if result is None else json.loads(result)) == latest.get("r")
    assert (None if error is None else json.loads(error)) == wanted_error


@given(st.lists(st.binary(max_size=300)))
def test_garbage_is_survived_and_memory_bounded(pieces: list[bytes]) -> None:
    report = Report(LIMIT, _LOAD_FAILURES["js"])
    for piece in pieces:
        report.feed(piece)
        assert len(report._line) <= 2 * LIMIT + 64
    assert all(text is None or len(text) <= LIMIT for text in report.finish(0, b""))


def test_lines_over_the_limit_count_for_nothing() -> None:
    report = fed(line("r", "good") + line("r", "x" * LIMIT) + b'"r' + b"x" * 10_000 + b'"\n' + line("e", "after"))
    assert report.finish(1, b"") == (b'"good"', b'"after"')


def test_a_result_that_was_cut_off_is_not_replaced_by_an_earlier_one() -> None:
    result, error = fed(line("r", "early") + line("r", "late")[:-4]).finish(0, b"")
    assert result is None and error is not None and "before its last result" in json.loads(error)["message"]


def test_only_a_program_that_never_ran_is_explained_by_its_stderr() -> None:
    stderr = b"error: SyntaxError: Unexpected token\n  |\n"
    for data, exit_code in ((line("x", ""), 1), (b"", 0), (b"", 137), (b"", 124)):
        assert fed(data).finish(exit_code, stderr)[1] is None
    error = fed(b"").finish(1, b"\x1b[1mWarning\x1b[0m x\n" + stderr)[1]
    assert error is not None and json.loads(error)["name"] == "SyntaxError"
    assert fed(b"").finish(1, b"no such line \xff")[1] is None


def test_the_preload_is_one_module_of_modest_size() -> None:
    for runtime in ("deno", "node"):
        url = preload_url(runtime, LIMIT, from_code=True)
        assert re.fullmatch(r"data:text/javascript;base64,[A-Za-z0-9+/]+=*", url)
        assert len(url) < 32_768  # one argument may have 128 KiB
