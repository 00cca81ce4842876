"""Programs that use up the guest's memory: they are killed, the guest is not."""

from __future__ import annotations

import asyncio
import os

import pytest
from agent_guest import MAX_OUTPUT, sh
from agent_guest import agent_lab as agent_lab
from agent_guest import guest as guest
from gvisor_support import MEM_MB
from gvisor_support import guest_root as guest_root

from rundatsheesh.manager.guest import Guest, ScriptRequest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sandboxes need root")

HOGS = {
    "one large object": """python3 -c 'b = b"x" * (600 << 20)'""",
    "mapped at once": """python3 -c 'import mmap; [mmap.mmap(-1, 64 << 20, flags=0x8022) for _ in range(99)]'""",
    "a pipe that is one line": "tail /dev/zero",
    "a file in memory": """python3 -c '
import os
fd = os.memfd_create("x")
while True: os.write(fd, bytes(1 << 20))'""",
}


async def test_a_program_without_measure_is_killed_and_nobody_else(guest: Guest) -> None:
    await sh(guest, "sleep 600 >/dev/null 2>&1 & echo $! > bystander")
    for kind, hog in HOGS.items():
        seen = await sh(guest, f"{hog}\necho status $?")
        assert (seen.exit_code, seen.stdout) == (0, "status 137\n"), (kind, seen)
    assert (await sh(guest, "kill -0 $(cat bystander) && echo lives")).stdout == "lives\n"


async def test_the_call_says_what_killed_it(guest: Guest) -> None:
    seen = await sh(guest, "exec tail /dev/zero")
    assert (seen.exit_code, seen.timed_out) == (137, False)
    assert seen.stderr.endswith(f"Killed: the VM is out of memory ({MEM_MB} MiB)\n")
    assert "out of memory" not in (await sh(guest, "kill -9 $$")).stderr
    endless = "const all = []; for (;;) all.push(new Uint8Array(1 << 20).fill(1))"
    for language in ("ts", "js"):
        request = ScriptRequest(
            language=language,
            code=endless,
            timeout_ms=60_000,
            max_output=MAX_OUTPUT,
            allow_net=False,
        )
        seen = await guest.run_script(request)
        assert seen.exit_code == 137 and "the VM is out of memory" in seen.stderr, seen


async def test_many_hogs_at_once_end_without_the_guest(guest: Guest) -> None:
    calls = [sh(guest, """exec python3 -c 'b = b"x" * (600 << 20)'""") for _ in range(4)]
    assert [seen.exit_code for seen in await asyncio.gather(*calls)] == [137] * 4
    assert (await sh(guest, "echo alive")).stdout == "alive\n"


async def test_many_interpreters_at_once_are_no_hogs(guest: Guest) -> None:
    """By the guest's own count they leave nothing, for it counts the programs' files; by the host's they fit."""
    request = ScriptRequest(
        language="ts", code="result.set(1)", timeout_ms=120_000, max_output=MAX_OUTPUT, allow_net=False
    )
    seen = await asyncio.gather(*(guest.run_script(request) for _ in range(20)))
    assert [(call.exit_code, call.result) for call in seen] == [(0, 1)] * 20


async def test_full_temporary_directories_cost_nobody_their_life(guest: Guest) -> None:
    """They take three quarters of the memory at most, and the user can still make room."""
    fill = "for d in /tmp /var/tmp /dev/shm; do head -c 900M /dev/zero > $d/x 2>/dev/null; done; echo full"
    assert (await sh(guest, fill)).stdout == "full\n"
    seen = await sh(guest, "tail /dev/zero; rm /tmp/x /var/tmp/x /dev/shm/x; echo empty")
    assert seen.stdout == "empty\n", seen
    assert (await sh(guest, """python3 -c 'b = b"x" * (100 << 20); print(len(b))'""")).exit_code == 0


async def test_what_fits_is_left_alone(guest: Guest) -> None:
    seen = await sh(guest, f"""python3 -c 'b = b"x" * ({MEM_MB - 90} << 20); print(len(b))'""")
    assert seen.exit_code == 0, seen
