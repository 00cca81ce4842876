"""Subprocesses: real children, their output, their end, and what is left when we end them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rundatsheesh.manager.host.process import (
    ProcessError,
    ProcessRef,
    ProcessTimeoutError,
    run,
    start,
)


def open_descriptors() -> set[str]:
    return {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


async def first_line(path: Path) -> str:
    """The first complete line of a file that a child is about to write."""
    async with asyncio.timeout(30):
        while not (path.exists() and path.read_text().endswith("\n")):
            await asyncio.sleep(0.005)
    return path.read_text().splitlines()[0]


async def test_run_returns_both_streams_and_passes_input() -> None:
    done = await run(["sh", "-c", "cat; echo oops >&2"], input=b"hello", timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello", b"oops\n")


async def test_large_input_that_nobody_reads_does_not_block() -> None:
    assert (await run(["true"], input=b"x" * (4 << 20), timeout=30)).returncode == 0


async def test_failure_names_the_command_the_status_and_the_output() -> None:
    with pytest.raises(ProcessError) as caught:
        await run(["sh", "-c", "echo 'it broke' >&2; exit 7"], timeout=30)
    assert caught.value.returncode == 7
    assert caught.value.argv[0] == "sh"
    assert "exit status 7" in caught.value.message
    assert "it broke" in caught.value.message


async def test_unchecked_failure_is_a_result() -> None:
    assert (await run(["sh", "-c", "exit 3"], timeout=30, check=False)).returncode == 3
    assert (await run(["sh", "-c", "kill -9 $$"], timeout=30, check=False)).returncode == -9


@pytest.mark.parametrize("argv", [["no-such-program-at-all"], ["/etc/passwd"], ["/nonexistent/x"]])
async def test_program_that_cannot_start(argv: list[str]) -> None:
    with pytest.raises(ProcessError):
        await run(argv, timeout=30)


async def test_environment_is_only_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_MANAGER", "1")
    default = (await run(["env"], timeout=30)).stdout.decode().splitlines()
    assert {line.partition("=")[0] for line in default} == {"PATH", "LANG"}
    assert (await run(["env"], env={"ONLY": "this"}, timeout=30)).stdout == b"ONLY=this\n"


async def test_only_named_descriptors_are_inherited(tmp_path: Path) -> None:
    with open(tmp_path / "given", "w+") as given, open(tmp_path / "kept", "w+") as kept:
        os.set_inheritable(kept.fileno(), True)
        done = await run(["ls", "-l", "/proc/self/fd"], pass_fds=[given.fileno()], timeout=30)
    assert b"/given" in done.stdout
    assert b"/kept" not in done.stdout


async def test_timeout_kills_the_whole_group_and_keeps_the_output(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    before = time.monotonic()
    with pytest.raises(ProcessTimeoutError) as caught:
        await run(["sh", "-c", f"echo so far; sleep 100 & echo $! > {pids}; wait"], timeout=3)
    assert time.monotonic() - before < 60
    assert caught.value.output == "so far"
    with contextlib.suppress(ProcessLookupError):  # else its death is under way, or waits for init to take notice
        await asyncio.wait_for(ProcessRef.of(int(pids.read_text())).wait(), 30)


async def test_output_held_open_by_a_grandchild_counts_as_running() -> None:
    with pytest.raises(ProcessTimeoutError):
        await run(["sh", "-c", "sleep 100 & exit 0"], timeout=0.3)


async def test_too_much_output_is_an_error_and_ends_the_writer() -> None:
    with pytest.raises(ProcessError, match="more than 1000 bytes"):
        await run(["yes"], limit=1000, timeout=30)


async def test_too_much_output_is_nothing_to_the_next_command() -> None:
    """It gets the same descriptors."""
    for _ in range(5):
        with pytest.raises(ProcessError):
            await run(["yes"], limit=1000, timeout=10)
        assert (await run(["echo", "fine"], timeout=10)).stdout == b"fine\n"


async def test_stderr_keeps_its_tail() -> None:
    done = await run(["sh", "-c", "seq 1 100000 >&2"], limit=1000, timeout=30)
    assert len(done.stderr) == 1000
    assert done.stderr.endswith(b"\n100000\n")


async def test_cancellation_kills_and_reaps(tmp_path: Path) -> None:
    descriptors = open_descriptors()
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(run(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 100"], timeout=50))
    pid = int(await first_line(pid_file))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid}").exists()
    await asyncio.sleep(0)
    assert open_descriptors() <= descriptors


async def test_child_has_a_session_of_its_own_and_many_may_wait() -> None:
    child = start(["sleep", "100"])
    assert os.getsid(child.pid) == child.pid
    assert child.returncode is None
    waiters = [asyncio.create_task(child.wait()) for _ in range(3)]
    assert child.signal(signal.SIGTERM)
    assert await asyncio.gather(*waiters) == [-15, -15, -15]
    assert await child.wait() == -15
    assert not child.signal(signal.SIGTERM)
    child.kill()


async def test_cancelled_waiter_does_not_end_the_wait_of_others() -> None:
    child = start(["sleep", "100"])
    first, second = asyncio.create_task(child.wait()), asyncio.create_task(child.wait())
    await asyncio.sleep(0)
    first.cancel()
    child.kill()
    assert await second == -9


async def test_child_is_reaped_without_a_waiter() -> None:
    child = start(["true"])
    async with asyncio.timeout(30):
        await child.ref.wait()
        while child.returncode is None:
            await asyncio.sleep(0)
    assert not Path(f"/proc/{child.pid}").exists()


async def test_child_runs_as_the_given_user(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+b") as out:
        child = start(["sh", "-c", "id -u; id -g; id -G; umask"], stdout=out, user=1000, group=1000, umask=0o077)
        assert await child.wait() == 0
        out.seek(0)
        assert out.read().decode().split() == ["1000", "1000", "1000", "0077"]


def test_child_outlives_its_starter(tmp_path: Path) -> None:
    """A second interpreter plays the manager: it starts a child and ends."""
    script = (
        "import asyncio\nfrom rundatsheesh.manager.host.process import start\n"
        "async def main():\n    child = start(['sleep', '100'])\n    print(child.ref.pid, child.ref.start_time)\n"
        "asyncio.run(main())\n"
    )

    async def check() -> None:
        done = await run([sys.executable, "-c", script], timeout=60)
        assert done.stderr == b""
        pid, start_time = map(int, done.stdout.split())
        ref = ProcessRef(pid, start_time)
        assert ref.alive()
        assert ref.signal(signal.SIGKILL)
        await asyncio.wait_for(ref.wait(), 30)
        assert not ref.alive()

    asyncio.run(check())


async def test_reference_to_a_recycled_pid_is_refused() -> None:
    child = start(["sleep", "100"])
    stranger = ProcessRef(child.pid, child.ref.start_time - 1)
    assert not stranger.alive()
    assert not stranger.signal(signal.SIGKILL)
    await stranger.wait()
    assert child.ref.alive()
    child.kill()
    await child.wait()
    assert not child.ref.alive()
    assert not child.ref.signal(signal.SIGKILL)
    await child.ref.wait()


async def test_start_time_is_read_past_a_strange_command_name(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    child = start([str(program), "100"])
    assert ProcessRef.of(child.pid) == child.ref
    child.kill()
    assert await child.wait() == -9


async def test_no_descriptor_is_left_by_many_runs() -> None:
    await run(["true"], timeout=30)
    before = open_descriptors()
    for _ in range(20):
        await run(["true"], timeout=30)
    await asyncio.sleep(0)
    assert open_descriptors() <= before
