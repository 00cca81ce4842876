"""Commands through the whole channel: a real agent, real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from agent_support import RunningAgent, agent_on, engines, sh, user_lock

from rundatsheesh.agent import limits
from rundatsheesh.manager.errors import InvalidInput, NotFound
from rundatsheesh.manager.guest import Guest, GuestGone, Identity


@pytest.fixture(scope="module", params=engines())
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with agent_on(request.param, tmp_path_factory.mktemp("agent")) as running:
        yield running


@pytest_asyncio.fixture
async def guest(agent: RunningAgent) -> AsyncIterator[Guest]:
    async with agent.guest() as connected:
        yield connected
        await sh(connected, "kill -9 -1")  # a failed test's processes would fail the next ones too


@pytest.fixture
def alone(agent: RunningAgent) -> Iterator[None]:
    """Nobody else has processes of the user's: this test takes all that there may be. Before `guest`, for it waits."""
    if is_native(agent):
        with user_lock.alone():
            yield
    else:
        yield


def is_native(agent: RunningAgent) -> bool:
    return agent.process.args[0] == "unshare"  # type: ignore[index]


async def user_processes(guest: Guest) -> list[str]:
    """Command lines of the user's processes, without those of the question itself and the shell for the next one."""
    listing = await sh(guest, "ps -U 1000 -o args= | grep -v -e 'ps -U' -e 'grep -v' -e ': a shell that waits'")
    return [line.strip() for line in listing.stdout.splitlines()]


def host_processes_of_user() -> int:
    return sum(entry.is_dir() and entry.name.isdigit() and owner(entry) == 1000 for entry in Path("/proc").iterdir())


def owner(entry: Path) -> int | None:
    try:
        return entry.stat().st_uid
    except OSError:
        return None  # it ended


async def until(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_command_runs_as_the_user_and_nobody_else(guest: Guest) -> None:
    shown = "grep -E '[UG]id:' /proc/self/status; grep -E 'Cap(Inh|Prm|Eff|Bnd)' /proc/self/status"
    seen = await sh(guest, f"id -G; pwd; echo $HOME; {shown}")
    groups, cwd, home, uids, gids, *capabilities = seen.stdout.split("\n")
    assert (groups, cwd, home) == ("1000", "/workspace", "/workspace")
    assert uids.split()[1:] == gids.split()[1:] == 4 * ["1000"]  # the saved one too: there is no way back to another
    assert [line.split()[1].strip("0") for line in capabilities if line] == ["", "", "", ""]
    assert (seen.exit_code, seen.stderr, seen.timed_out, seen.truncated) == (0, "", False, False)


async def test_a_command_inherits_only_its_standard_streams(guest: Guest) -> None:
    seen = await sh(guest, "ls /proc/$$/fd; readlink /proc/$$/fd/0")
    assert seen.stdout.split() == ["0", "1", "2", "/dev/null"]


async def test_streams_exit_codes_and_signals(guest: Guest) -> None:
    seen = await sh(guest, "echo out; echo err >&2; exit 7")
    assert (seen.exit_code, seen.stdout, seen.stderr) == (7, "out\n", "err\n")
    assert (await sh(guest, "kill -TERM $$")).exit_code == 128 + 15
    assert (await sh(guest, "no-such-program")).exit_code == 127
    assert (await sh(guest, r"printf 'a\xff\xc3b'")).stdout == "a\ufffd\ufffdb"


async def test_environment_and_working_directory(guest: Guest) -> None:
    await sh(guest, "mkdir -p d/e && ln -sfn /etc out && ln -sfn d in")
    seen = await sh(guest, 'printf %s "$A"; pwd -P', cwd="/home/user/in/e", env={"A": "x\n'\"ü"})
    assert seen.stdout == "x\n'\"ü/workspace/d/e\n"
    assert (await sh(guest, "pwd", cwd="d")).stdout == "/workspace/d\n"
    for outside in ("/etc", "/workspace/../etc", "/workspace/out", "/home/user/out", "/nowhere"):
        with pytest.raises(InvalidInput) as refused:
            await sh(guest, "true", cwd=outside)
        assert refused.value.code == "path_outside_workspace"
    with pytest.raises(NotFound) as missing:
        await sh(guest, "true", cwd="/workspace/none")
    assert missing.value.code == "path_not_found"


@pytest.mark.parametrize("env", [{"A=B": "x"}, {"": "x"}, {"A": "x\0y"}, {"A": "\ud800"}])
async def test_what_the_kernel_cannot_take_is_refused(guest: Guest, env: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        await sh(guest, "true", env=env)
    with pytest.raises(InvalidInput):
        await sh(guest, "a\0b")


async def test_a_large_environment_and_command_arrive_whole(guest: Guest) -> None:
    seen = await sh(guest, "echo ${#A}; : " + "x" * 100_000, env={"A": "y" * 100_000})
    assert seen.stdout == "100000\n"
    too_long = await sh(guest, ": " + "x" * 200_000)
    assert (too_long.exit_code, too_long.stderr.startswith("/bin/bash: ")) == (126, True)


async def test_output_keeps_head_and_tail_and_counts_the_rest(guest: Guest) -> None:
    limit = 10_000
    seen = await sh(
        guest, "printf HEAD; head -c 5000000 /dev/zero | tr '\\0' x; printf TAIL; echo e >&2", max_output=limit
    )
    mark = f"\n... [{5_000_008 - limit} bytes left out] ...\n"
    assert seen.truncated and seen.stdout.startswith("HEADx") and seen.stdout.endswith("xTAIL")
    assert mark in seen.stdout and len(seen.stdout) == limit + len(mark)
    assert seen.stderr == "e\n"
    exact = await sh(guest, f"head -c {limit} /dev/zero | tr '\\0' x", max_output=limit)
    assert not exact.truncated and exact.stdout == "x" * limit


async def test_a_deadline_ends_the_whole_tree(guest: Guest) -> None:
    seen = await sh(
        guest,
        "echo begun; setsid sleep 901 & (setsid sh -c 'sleep 902 & exec sleep 903' </dev/null >/dev/null 2>&1 &); "
        "trap '' TERM; sleep 904",
        timeout_ms=3000,
    )
    assert (seen.exit_code, seen.timed_out, seen.stdout) == (124, True, "begun\n")
    assert not [line for line in await user_processes(guest) if "sleep 90" in line]


async def test_a_deadline_ends_nobody_elses_processes(guest: Guest) -> None:
    assert (await sh(guest, "sleep 911 & setsid sleep 912 >/dev/null & echo $$")).exit_code == 0
    other = asyncio.create_task(sh(guest, "sleep 1.2; echo survived"))
    assert (await sh(guest, "sleep 913", timeout_ms=300)).timed_out
    assert (await other).stdout == "survived\n"

    async def both() -> bool:  # until they are executed they are a shell, or setsid
        lines = sorted(line for line in await user_processes(guest) if "sleep 91" in line)
        return lines == ["sleep 911", "sleep 912"]

    await until(both)
    await sh(guest, "pkill -f 'sleep 91'")


async def test_a_background_job_neither_delays_the_answer_nor_dies_of_writing(guest: Guest) -> None:
    job = "until test -f end-job; do echo noise; echo >> noises; sleep 0.1; done; echo done > job-ended"
    seen = await sh(guest, f"({job}) & echo started")  # it ends when it is told to, and that is later
    assert (seen.exit_code, seen.timed_out) == (0, False) and "started\n" in seen.stdout
    goes_on = "n=$(wc -l < noises); until [ $(wc -l < noises) -ge $((n + 5)) ]; do sleep 0.05; done"
    assert (await sh(guest, f"test ! -e job-ended && {goes_on}")).exit_code == 0
    ended = await sh(guest, "touch end-job; until test -f job-ended; do sleep 0.05; done; rm job-ended end-job noises")
    assert ended.exit_code == 0


async def test_a_fork_bomb_ends_with_its_deadline(alone: None, guest: Guest) -> None:
    seen = await sh(guest, "b() { b | b & }; b; sleep 30", timeout_ms=1500)
    assert seen.timed_out
    assert await user_processes(guest) == []
    assert (await sh(guest, "echo alive")).stdout == "alive\n"


async def test_a_full_process_table_can_still_be_cleared(alone: None, agent: RunningAgent, guest: Guest) -> None:
    await sh(guest, "for i in $(seq 600); do sleep 961 & done >/dev/null 2>&1", timeout_ms=1500)
    # Waits without a process of its own, for which there may be no room.
    wait = "now=$EPOCHSECONDS; until ((EPOCHSECONDS > now)); do :; done"
    filled = await sh(guest, f"exec 2>/dev/null; (while :; do sleep 961 & done) & {wait}; echo")
    assert filled.stdout == "\n" and not filled.timed_out

    async def full() -> bool:  # those of supervisors that are about to be the user count too
        return host_processes_of_user() >= limits.processes - 8

    if is_native(agent):  # gVisor knows no such limit
        await until(full)
    cleared = await sh(guest, "kill -9 -1", timeout_ms=60_000)
    assert cleared.exit_code in (0, 137)

    async def gone() -> bool:
        return not await user_processes(guest)

    await until(gone, 60)

    async def reaped() -> bool:  # natively the limit counts the whole host's, and the next test needs some
        return host_processes_of_user() < limits.processes // 4

    await until(reaped, 60)


async def test_the_loss_of_a_supervisor_ends_what_it_watched(agent: RunningAgent, guest: Guest) -> None:
    if not is_native(agent):
        pytest.skip("nobody outside a sandbox can kill one of its processes")
    await sh(guest, "setsid sleep 971 >/dev/null 2>&1 & echo")

    async def begun() -> bool:  # until then it is still a shell, or setsid
        return "sleep 971" in await user_processes(guest)

    await until(begun)
    watch = guest.processes()
    assert await anext(watch) >= 1  # the tree of the last question may still be there
    os.kill(parent_of("sleep\0971\0"), signal.SIGKILL)
    await until_there_are(watch, False)

    async def gone() -> bool:
        return not await user_processes(guest)

    await until(gone)
    assert "supervisor" in agent.log()
    (agent.directory / "log").write_text("")
    await watch.aclose()  # type: ignore[attr-defined]


async def until_there_are(watch: AsyncIterator[int], some: bool) -> None:
    """Read the watch until it tells that there are processes, or none. It leaves out what is not true any more."""
    async with asyncio.timeout(30):
        while bool(await anext(watch)) != some:
            pass


def parent_of(cmdline: str) -> int:
    """The parent of the process with that command line, as the host numbers them."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (entry / "cmdline").read_text() == cmdline:
            return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    raise AssertionError(f"no process {cmdline!r}")


async def test_many_calls_at_once(guest: Guest) -> None:
    results = await asyncio.gather(*(sh(guest, f"sleep 0.2; echo {n}") for n in range(12)))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(12)]


async def test_cancelling_kills(guest: Guest) -> None:
    task = asyncio.create_task(sh(guest, "setsid sleep 921 & sleep 922"))

    async def running() -> bool:
        return len(await user_processes(guest)) >= 3

    await until(running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def gone() -> bool:
        return not await user_processes(guest)

    await until(gone)


async def test_a_vanished_manager_takes_its_commands_along_but_not_the_background(agent: RunningAgent) -> None:
    async with agent.guest() as first:
        assert (await sh(first, "sleep 931 >/dev/null 2>&1 &")).exit_code == 0
        running = asyncio.create_task(sh(first, "echo partial; exec sleep 932"))

        async def started() -> bool:
            return "sleep 932" in await user_processes(first)

        await until(started)
    with pytest.raises(GuestGone) as gone:
        await running
    assert gone.value.partial is not None and gone.value.partial.stdout == "partial\n"
    async with agent.guest() as second:

        async def swept() -> bool:
            return await user_processes(second) == ["sleep 931"]

        await until(swept)
        await sh(second, "pkill -f 'sleep 931'")


async def test_a_new_connection_replaces_the_old_one(agent: RunningAgent) -> None:
    async with agent.guest() as first, agent.guest() as second:
        await asyncio.wait_for(first.wait_closed(), 10)
        await second.ping(10)
        with pytest.raises(GuestGone):
            await first.ping(10)


async def test_the_watch_tells_when_processes_come_and_go(guest: Guest) -> None:
    watch = guest.processes()
    try:
        await until_there_are(watch, False)
        await sh(guest, "sleep 942 & echo")
        await until_there_are(watch, True)
        await sh(guest, "pkill -x sleep")
        await until_there_are(watch, False)
    finally:
        await watch.aclose()  # type: ignore[attr-defined]


async def test_the_user_cannot_touch_the_agent(guest: Guest) -> None:
    probe = """
    import os, signal, socket
    def refused(f, *a):
        try: f(*a)
        except PermissionError: return
        raise SystemExit(f"allowed: {f} {a}")
    for pid in (int(p) for p in os.listdir("/proc") if p.isdecimal()):
        if os.stat(f"/proc/{pid}").st_uid != 1000 and pid != os.getpid():
            refused(os.kill, pid, signal.SIGKILL)
            refused(open, f"/proc/{pid}/mem")
            refused(os.readlink, f"/proc/{pid}/cwd")
            # Linux does not even list them; gVisor does, and must not open them.
            try: fds = os.listdir(f"/proc/{pid}/fd")
            except PermissionError: fds = []
            for fd in fds:
                link = f"/proc/{pid}/fd/{fd}"
                if os.stat(link).st_uid == os.getuid(): continue  # the output of a call, which is its user's
                if "[" in os.readlink(link) and "host" not in os.readlink(link):
                    for mode in (os.O_RDONLY, os.O_WRONLY):
                        try: os.open(link, mode | os.O_NONBLOCK)
                        except OSError: continue
                        raise SystemExit(f"allowed: open {link}")
    refused(os.setuid, 0); refused(os.setgroups, [])
    refused(os.listdir, "/run/agent")
    s = socket.socket(socket.AF_UNIX); refused(s.connect, "/run/agent/agent.sock")
    print("safe")
    """
    lines = "\n".join(line.removeprefix("    ") for line in probe.splitlines())
    seen = await sh(guest, "python3 - <<'EOF'\n" + lines + "\nEOF")
    assert (seen.stdout, seen.stderr) == ("safe\n", "")


async def test_the_users_limits_hold(guest: Guest) -> None:
    seen = await sh(guest, "ulimit -u; ulimit -Hn; ulimit -c; ulimit -u 100000 2>/dev/null || echo refused; umask")
    assert seen.stdout.split() == ["512", "4096", "0", "refused", "0022"]


async def test_configure_and_greeting(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        boot = guest.hello.boot_id
        identity = Identity("name", "172.16.1.2", "02:fd:ac:10:01:02", "172.16.0.1", "0" * 32, bytes(64))
        await guest.configure(identity)
        assert guest.hello.boot_id == boot
        await guest.configure(
            Identity("name", "172.16.1.2", "02:fd:ac:10:01:02", "172.16.0.1", "0" * 32, bytes(64), boot_id="new")
        )
    async with agent.guest() as again:
        assert (again.hello.boot_id, again.hello.engine) == ("new", "gvisor")


@pytest.mark.parametrize("engine", engines())
async def test_shutdown_ends_the_guest(engine: str, tmp_path: Path) -> None:
    with agent_on(engine, tmp_path) as agent:
        async with agent.guest() as guest:
            await sh(guest, "sleep 941 &")
            await guest.shutdown()
            assert isinstance(await asyncio.wait_for(guest.wait_closed(), 10), GuestGone)
        assert agent.process.wait(timeout=10) == 0
        assert agent.log() == ""


async def test_the_agent_had_nothing_to_complain_about(agent: RunningAgent) -> None:
    assert agent.complaints() == []
