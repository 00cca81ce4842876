"""What one call may learn of another through /proc: gVisor shows every process's descriptors to everybody."""

from __future__ import annotations

import asyncio
import os

import pytest
from agent_guest import MAX_OUTPUT, sh
from agent_guest import agent_lab as agent_lab
from agent_guest import guest as guest
from gvisor_support import guest_root as guest_root

from rundatsheesh.manager.guest import Guest, ScriptRequest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sandboxes need root")

SECRET = "the-code-of-another-call"
VICTIM = f"""
// {SECRET}
require('fs').writeFileSync('/workspace/begun', '');
console.log('output');
setTimeout(() => {{}}, 600_000);
"""

# Opens all descriptors of all processes but its own, in every way, and tells which it got besides devices for all and
# what the user made or was given, which no kernel keeps from another process of his. The word is not in its own text.
ATTACK = """python3 - <<'EOF'
import os
word = b"-".join([b"the", b"code", b"of", b"another", b"call"])
seen = 0
for pid in (name for name in os.listdir("/proc") if name.isdecimal() and int(name) not in (os.getpid(), os.getppid())):
    try: names = os.listdir(f"/proc/{pid}/fd")
    except OSError: continue
    for name in names:
        link = f"/proc/{pid}/fd/{name}"
        try: target = os.readlink(link)
        except OSError: continue
        seen += 1
        for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            try: fd = os.open(link, mode | os.O_NONBLOCK)
            except OSError: continue
            content = b""
            if mode != os.O_WRONLY:
                try: content = os.read(fd, 1 << 16)
                except OSError: pass
            facts = os.fstat(fd)
            public = facts.st_mode == 0o20666 or target.startswith(("/usr/", "/proc"))
            if word in content or not (public or facts.st_uid == os.getuid()):
                print("opened", pid, name, target, mode, word in content)
print("looked" if seen > 20 else seen)
EOF"""


async def test_no_descriptor_of_another_call_or_of_the_agent_can_be_opened(guest: Guest) -> None:
    request = ScriptRequest(language="js", code=VICTIM, timeout_ms=120_000, max_output=MAX_OUTPUT, allow_net=False)
    victim = asyncio.create_task(guest.run_script(request))
    try:
        await sh(guest, "until test -e begun; do sleep 0.1; done")
        seen = await sh(guest, ATTACK)
        assert (seen.stdout, seen.stderr) == ("looked\n", "")
    finally:
        victim.cancel()
        await asyncio.gather(victim, return_exceptions=True)


async def test_a_script_still_reads_its_own_code(guest: Guest) -> None:
    for language in ("js", "ts"):
        request = ScriptRequest(
            language=language, code="console.log(40 + 2)", timeout_ms=60_000, max_output=MAX_OUTPUT, allow_net=False
        )
        assert (await guest.run_script(request)).stdout == "42\n"
