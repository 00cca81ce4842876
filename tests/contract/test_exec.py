"""Shell commands: results, limits, ends."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from server_support import Box, eventually

NewVm = Callable[..., Box]

KEPT = 2 << 20  # MAX_OUTPUT_BYTES


@pytest.mark.every_engine
def test_the_shape_of_a_result(box: Box) -> None:
    done = box.exec("echo out; echo err >&2; exit 3")
    assert {name: done[name] for name in ("exitCode", "stdout", "stderr", "timedOut", "truncated")} == {
        "exitCode": 3,
        "stdout": "out\n",
        "stderr": "err\n",
        "timedOut": False,
        "truncated": False,
    }
    assert isinstance(done["durationMs"], int) and done["durationMs"] >= 0


def test_it_is_a_login_bash_in_the_workspace(box: Box) -> None:
    assert box.output("shopt -q login_shell && echo $BASH_VERSION | cut -c1; pwd").split() == ["5", "/workspace"]


def test_cwd(box: Box) -> None:
    box.output("mkdir -p a/b; ln -sfn /etc a/out; ln -sfn b a/in; touch a/file")
    assert box.output("pwd", cwd="/workspace/a/b") == "/workspace/a/b\n"
    assert box.output("pwd", cwd="a/b") == "/workspace/a/b\n"
    assert box.exec("pwd", cwd="/workspace/a/in")["exitCode"] == 0
    for outside in ("/", "/etc", "/workspace/../etc", "/workspacex", "/workspace/a/out"):
        refused = box.post("exec", {"cmd": "pwd", "cwd": outside})
        assert (refused.status_code, refused.json()["code"]) == (400, "path_outside_workspace"), outside
    wrongs = {"missing": "invalid_cwd", "a/file": "invalid_cwd", "x" * 256: "path_too_long"}
    for wrong, code in wrongs.items():
        refused = box.post("exec", {"cmd": "pwd", "cwd": f"/workspace/{wrong}"})
        assert (refused.status_code, refused.json()["code"]) == (400, code), refused.text
        assert "cwd" in refused.json()["message"], refused.text


def test_env(box: Box) -> None:
    value = "spaces, 'quotes', $dollar\nand lines, ünïcode"
    assert box.output('printf %s "$ODD"', env={"ODD": value}) == value
    assert box.output('echo "[$ODD]"') == "[]\n"


def soon(box: Box) -> int:
    """Milliseconds, long enough for bash to begin."""
    return max(3000, int(box.scale(60)))


@pytest.mark.every_engine
def test_timeout_kills_the_whole_tree(box: Box) -> None:
    timeout = 500 if box.engine == "gvisor" else soon(box)
    begun = time.monotonic()
    done = box.exec("echo before; (setsid sleep 999 &); sleep 999", timeoutMs=timeout)
    took = time.monotonic() - begun
    assert (done["exitCode"], done["timedOut"]) == (124, True), done
    assert took < timeout / 1000 + box.promised(1), took
    assert box.output("pgrep -x sleep || true") == ""


@pytest.mark.every_engine
def test_a_timeout_keeps_the_output_so_far(box: Box) -> None:
    done = box.exec("echo out; echo err >&2; sleep 999", timeoutMs=soon(box))
    assert (done["exitCode"], done["stdout"], done["stderr"]) == (124, "out\n", "err\n")


def test_a_timeout_cannot_be_ignored(box: Box) -> None:
    deaf = "import os, time; os.fork() or os.setsid(); time.sleep(99)"
    done = box.exec(f"trap '' TERM INT HUP; python3 -c '{deaf}'", timeoutMs=int(box.scale(700)))
    assert done["exitCode"] == 124, done
    assert box.output("pgrep -x python3 -u user || true") == ""


@pytest.mark.parametrize("signal", [9, 15, 11, 6])
def test_a_signal_gives_128_and_its_number(box: Box, signal: int) -> None:
    assert box.exec(f"kill -{signal} $$")["exitCode"] == 128 + signal


def test_output_that_fits_is_whole(box: Box) -> None:
    done = box.exec(f"head -c {KEPT} /dev/zero | tr '\\0' x; head -c {KEPT} /dev/zero | tr '\\0' y >&2")
    assert (len(done["stdout"]), len(done["stderr"]), done["truncated"]) == (KEPT, KEPT, False)


def test_no_character_is_cut_in_two(box: Box) -> None:
    """The program ends in the middle of one; the cut of its output, whatever its place, is in the middle of none."""
    for shift in ("", "x", "xx"):
        text = box.exec(f"printf '{shift}'; yes é | head -c 3000001")["stdout"]
        head, middle, tail = re.split(r"\n\.\.\. \[(\d+) bytes left out\] \.\.\.\n", text)
        assert tail.endswith("\n\ufffd") and text.count("\ufffd") == 1
        kept = len((head + tail.removesuffix("\ufffd")).encode()) + 1
        assert kept + int(middle) == len(shift) + 3_000_001


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_beyond_the_cap_keeps_head_and_tail(box: Box, stream: str) -> None:
    to = ">&2" if stream == "stderr" else ""
    written = 9 + (8 << 20) + 7
    done = box.exec(f"(echo 'the head'; head -c {8 << 20} /dev/zero | tr '\\0' m; echo; echo 'a tail') {to}")
    text = done[stream]
    assert done["truncated"] is True and done["exitCode"] == 0
    assert text.startswith("the head\nmmm") and text.endswith("mmm\na tail\n")
    assert KEPT - 64 <= text.count("m") <= KEPT + 64
    marker = text.replace("m" * 100, "")
    missing = written + 1 - (len(text.encode()) - len(marker_line(text)))
    assert any(abs(int(number) - missing) <= 8 for number in numbers(marker)), (missing, marker[:400])


def marker_line(text: str) -> str:
    """The line between head and tail, with its line ends."""
    inside = next(line for line in text.split("\n") if "bytes" in line)
    return f"\n{inside}\n"


def numbers(text: str) -> list[str]:
    return re.findall(r"\d{4,}", text.replace(",", ""))


def test_bytes_that_are_no_text_are_replaced(box: Box) -> None:
    done = box.exec(r"printf 'a\xff\xfe\xc3b\x00c'; head -c 10000 /dev/urandom >&2")
    assert done["exitCode"] == 0
    assert done["stdout"].startswith("a\ufffd") and done["stdout"].endswith("b\x00c")
    assert len(done["stderr"]) > 1000


@pytest.mark.every_engine
def test_background_processes_live_on(box: Box) -> None:
    ticker = "while true; do date +%s%N >> ticks; sleep 0.1; done"
    # Without an end of its own, and the call's time runs out in half a minute.
    box.output(f"nohup bash -c '{ticker}' > /dev/null 2>&1 & echo $! > pid")
    left = int(box.output("until [ -s ticks ]; do sleep 0.1; done; date +%s%N"))
    time.sleep(max(3, box.scale(0.1)))
    ticks = [int(line) for line in box.output("cat ticks").split()]
    # By the guest's clock, and so long after a call that a guest which then stands still has no such tick.
    assert [tick for tick in ticks if 1e9 < tick - left < 3e9], "it ran while no call was open"
    assert box.output("kill $(cat pid) && rm -f ticks pid && echo gone") == "gone\n"


def test_calls_run_beside_each_other(box: Box) -> None:
    """Each waits for all the others."""
    results: list[tuple[int, str]] = []
    meet = "until [ $(ls met-* | wc -l) = 8 ]; do sleep 0.1; done"

    def one(number: int) -> None:
        results.append((number, box.output(f"touch met-{number}; {meet}; echo {number}", timeoutMs=120_000)))

    callers = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(results) == [(number, f"{number}\n") for number in range(8)]
    box.output("rm met-*")


def test_a_client_that_leaves_ends_its_call(box: Box) -> None:
    with pytest.raises(httpx.ReadTimeout):
        box.post("exec", {"cmd": "exec -a abandoned sleep 999"}, timeout=1)
    eventually(lambda: box.output("pgrep -f ^abandoned || true") == "", box.scale(10), "the process is gone")


def test_standard_input_is_empty(box: Box) -> None:
    assert box.output("cat; echo $?") == "0\n"


@pytest.mark.parametrize("size", [100_000, 131_071])
def test_long_commands(box: Box, size: int) -> None:
    assert box.output("echo ok #" + "x" * (size - 9)) == "ok\n"
