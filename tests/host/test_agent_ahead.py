"""A shell that was started ahead of its command cannot be told from one that was started for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from agent_support import RunningAgent, agent_on, settled, sh

from rundatsheesh.agent.ahead_bash import ROOM
from rundatsheesh.manager.errors import NotFound
from rundatsheesh.manager.guest import Guest

OWN = {"OWN": "x"}  # a call with a variable starts its own shell, and leaves the one that waits alone

# What a command can see of its shell, without what is another's in each process: pids, times, random numbers. Two
# traces are left out: the arguments in /proc end in more than one NUL, and `declare -p` shows that SECONDS was set.
COMMANDS = {
    "variables": "declare -p | grep -vE ' (BASHPID|EPOCH|PPID|RANDOM|SECONDS|SRANDOM|BASH_VERSINFO|_=)'",
    "functions and aliases": "declare -f; alias; trap -p; complete -p; hash; jobs",
    "options": "set -o; shopt; echo $-; umask; ulimit -a",
    "arguments": "echo $0 $# \"$@\"; tr -s '\\0' '\\n' < /proc/$$/cmdline; readlink /proc/$$/exe",
    "environment": "tr '\\0' '\\n' < /proc/$$/environ; env",
    "descriptors": "ls -l /proc/$$/fd > ~/fds; sed -n 's/.* \\([0-9]* -> .[a-z]*\\).*/\\1/p' ~/fds; rm ~/fds",
    "status": "grep -E '^(Name|State|Uid|Gid|Groups|Threads|NoNewPrivs|Sig|Shd|Cap|Seccomp)' /proc/$$/status",
    "session": "ps -o pid=,pgid=,sid= -p $$ | awk '{print ($1 == $2), ($2 == $3)}'; pwd; pwd -P; echo ${OLDPWD-no}",
    "the last argument": 'echo "$_"; echo "$BASH_EXECUTION_STRING"; echo ${FUNCNAME-} $BASH_SUBSHELL ${BASH_SOURCE-}',
    "seconds": "echo $SECONDS",
    "the last command's place": "bash -c 'exit 3'; sh -c 'ps -o comm= -p $PPID'",
    "one command": "readlink /proc/self/exe",
    "a syntax error": "echo one\nfoo (",
    "an open quote": "echo 'one",
    "an unknown command": "no-such-program x",
    "an error in line three": "true\ntrue\nlet 1/0",
    "unset": "set -u; echo $nothing",
    "exit": "exit 7",
    "a signal": "kill -TERM $$",
    "a child's signal": "(sh -c 'kill -SEGV $$'; echo $?) 2>&1 | sed 's/ *[0-9]* Seg/ Seg/'",
    "exit on error": "set -e; false; echo not here",
    "a trap": "trap 'echo bye' EXIT; echo in",
    "return": "return 3; echo after",
    "input": "cat; read x; echo $?",
    "here documents": "cat <<'E'\n$HOME `x` ü\nE\nbash <<< 'echo in'",
    "nothing": "",
    "a comment": "# only",
    "bytes": "printf '\\xff\\xfe' | od -c; echo ü$'\\x80'",
    "arrays": "x=(a b); echo ${#x[@]} ${x[-1]} ${REPLY-unset}",
    "a login shell's end": "echo 'echo logged out' > ~/.bash_logout; exit 4",
    "a profile": 'echo "$PROFILE_WAS_READ"; cat ~/seen; rm -f ~/seen',
    "as long as fits": "echo " + "x" * (ROOM - 5),
    "longer than fits": "echo " + "x" * (ROOM - 4),
}
FILES = "echo 'export PROFILE_WAS_READ=yes; echo once >> ~/seen' > ~/.bash_profile; rm -f ~/seen"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with agent_on("gvisor", tmp_path_factory.mktemp("agent")) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One that starts nothing ahead."""
    with agent_on("gvisor", tmp_path_factory.mktemp("agent"), "--ahead", "no") as running:
        yield running


@pytest_asyncio.fixture
async def guest(agent: RunningAgent) -> AsyncIterator[Guest]:
    async with agent.guest() as connected:
        yield connected
        await sh(connected, "rm -rf ~/.bash_logout ~/.bash_profile ~/seen; kill -9 -1", env=OWN)


async def waiting(guest: Guest, background: int = 0) -> str:
    """The pid of the shell that waits, once one does, beside so many trees of processes."""
    deadline = time.monotonic() + 60
    while True:
        found = await sh(guest, "pgrep -f '[a] shell that waits'", env=OWN)
        if found.stdout:
            await settled(guest, background)  # before that a call starts its own
            return found.stdout.strip()
        assert time.monotonic() < deadline
        await sh(guest, "true")
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("name", COMMANDS)
async def test_a_command_cannot_tell(guest: Guest, plain: RunningAgent, name: str) -> None:
    command = COMMANDS[name]
    async with plain.guest() as other:
        for each in (guest, other):
            await sh(each, FILES, env=OWN)
        expected = await sh(other, command)
        await sh(other, "rm -f ~/.bash_logout ~/.bash_profile ~/seen")
    pid = await waiting(guest)
    await sh(guest, "rm -f ~/seen", env=OWN)
    seen = await sh(guest, command)
    assert (seen.exit_code, seen.stdout, seen.stderr) == (expected.exit_code, expected.stdout, expected.stderr)
    left = await sh(guest, f"test -e /proc/{pid} && echo left", env=OWN)
    assert left.stdout == ("left\n" if name == "longer than fits" else ""), "it was the one that waited"


async def test_it_counts_for_nothing_while_it_waits(guest: Guest) -> None:
    pid = await waiting(guest)
    await settled(guest)
    assert (await sh(guest, "echo $$")).stdout.strip() == pid
    assert await waiting(guest) != pid


@pytest.mark.parametrize("signal", ["KILL", "TERM", "INT", "STOP", "SEGV"])
async def test_what_becomes_of_it_meanwhile_harms_no_call(guest: Guest, signal: str) -> None:
    pid = await waiting(guest)
    await sh(guest, f"kill -{signal} {pid}", env=OWN)
    seen = await sh(guest, "echo done; exit 5")
    assert (seen.exit_code, seen.stdout, seen.stderr) == (5, "done\n", "")
    assert await waiting(guest)


async def test_its_deadline_ends_all_that_it_started(guest: Guest) -> None:
    await waiting(guest)
    seen = await sh(guest, "echo begun; setsid sleep 981 & trap '' TERM; sleep 982", timeout_ms=3000)
    assert (seen.exit_code, seen.timed_out, seen.stdout) == (124, True, "begun\n")
    assert (await sh(guest, "pgrep -x sleep", env=OWN)).stdout == ""


async def test_its_background_jobs_live_on(guest: Guest) -> None:
    await waiting(guest)
    await sh(guest, "sleep 983 >/dev/null 2>&1 &")
    pid = await waiting(guest, background=1)
    assert (await sh(guest, "pgrep -f 'sleep 98[3]'; echo $$")).stdout.split()[1] == pid, (
        "and another waits beside them"
    )


async def test_a_call_with_variables_starts_a_shell_of_its_own(guest: Guest) -> None:
    pid = await waiting(guest)
    assert (await sh(guest, "echo $$ $A", env={"A": "b"})).stdout.strip() != pid
    assert (await sh(guest, "echo $$", cwd="/home/user")).stdout.strip() == pid


@pytest.mark.parametrize("name", ["d", "a b", "-P", "$HOME `x` 'ü\\", "link", "new\nline", "d/" * 600])
async def test_it_goes_where_the_call_wants_it(guest: Guest, plain: RunningAgent, name: str) -> None:
    command = "pwd; pwd -P; declare -p PWD OLDPWD; readlink /proc/$$/cwd; cd .. && echo $OLDPWD"
    make = 'mkdir -p "$DIRECTORY" d; ln -sfn d link'
    async with plain.guest() as other:
        for each in (guest, other):
            await sh(each, make, env={"DIRECTORY": "d" if name == "link" else f"./{name}"})
        expected = await sh(other, command, cwd=f"/workspace/{name}")
        pid = await waiting(guest)
        seen = await sh(guest, f"{command}; echo $$", cwd=f"/workspace/{name}")
        shown, own = seen.stdout.rsplit("\n", 2)[:2]
        assert (shown + "\n", seen.stderr) == (expected.stdout, expected.stderr)
        assert (own == pid) == (len(name) < 100 and "\n" not in name)


async def test_a_directory_that_nobody_may_enter_is_told(guest: Guest, plain: RunningAgent) -> None:
    async with plain.guest() as other:
        told = []
        for each in (other, guest):
            await sh(each, "mkdir -p closed; chmod 0 closed", env=OWN)
            if each is guest:
                await waiting(guest)
            with pytest.raises(NotFound) as refused:
                await sh(each, "pwd", cwd="/workspace/closed")
            told.append(refused.value.message)
            await sh(each, "rmdir closed", env=OWN)
        assert told[0] == told[1]


async def test_calls_at_once_have_a_shell_each(guest: Guest) -> None:
    await waiting(guest)
    told = await asyncio.gather(*(sh(guest, f"echo {n} $$") for n in range(8)))
    numbers, pids = zip(*(result.stdout.split() for result in told), strict=True)
    assert list(numbers) == [str(n) for n in range(8)] and len(set(pids)) == 8


async def test_the_agent_had_nothing_to_complain_about(agent: RunningAgent) -> None:
    assert agent.complaints() == []
