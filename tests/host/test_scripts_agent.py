"""run-ts and run-js through a real agent. What `result` carries is tested in test_scripts_result."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_support import RunningAgent, agent_on, engines, script, settled, sh

from rundatsheesh.manager.errors import InvalidInput, NotFound
from rundatsheesh.manager.guest import Guest, ScriptRequest
from server_support import scale

PROGRAMS = {"ts": "deno", "js": "node"}
ARGS = {"ts": "Deno.args", "js": "process.argv.slice(2)"}
EXIT = {"ts": "Deno.exit", "js": "process.exit"}


@pytest.fixture(params=engines())
def agent(request: pytest.FixtureRequest) -> Iterator[RunningAgent]:
    with tempfile.TemporaryDirectory(prefix="rds-agent-") as directory:
        Path(directory).chmod(0o755)  # the guest's user comes through it
        with agent_on(request.param, Path(directory)) as running:
            yield running


async def languages(guest: Guest) -> list[str]:
    """Those that the guest has, by its root."""
    found = [name for name, program in PROGRAMS.items() if (await sh(guest, f"command -v {program}")).exit_code == 0]
    assert found
    return found


async def test_results_errors_and_exits(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        for language in await languages(guest):
            got = await script(guest, "result.set({n: 1n}); console.log('out')", language=language)
            assert (got.exit_code, got.stdout, got.stderr, got.result) == (0, "out\n", "", {"n": "1"})
            got = await script(guest, "result.set(null)", language=language)
            assert (got.has_result, got.result, got.error) == (True, None, None)
            got = await script(guest, f"result.error('mine'); {EXIT[language]}(0)", language=language)
            assert (got.exit_code, got.error) == (1, {"name": "Error", "message": "mine"})
            got = await script(guest, "const x = ;", language=language)
            assert (got.exit_code, got.error["name"]) == (1, "SyntaxError")
            got = await script(guest, "result.set('kept'); for (;;);", language=language, timeout_ms=int(scale(1500)))
            assert (got.exit_code, got.timed_out, got.result) == (124, True, "kept")


async def test_a_large_result_survives_an_immediate_exit(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        for language in await languages(guest):
            code = f"for (let i = 0; i < 9; i++) result.set(i + '\"'.repeat(5e5)); {EXIT[language]}(4)"
            got = await script(guest, code, language=language)
            assert (got.exit_code, got.result) == (4, "8" + '"' * 500_000), language


async def test_calls_at_once_never_mix(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        for language in await languages(guest):
            args = ARGS[language]
            code = f"await new Promise((r) => setTimeout(r, 20)); result.set({args}); console.log({args}[0])"
            calls = [script(guest, code, language=language, args=(str(n),), timeout_ms=120_000) for n in range(20)]
            for number, got in enumerate(await asyncio.gather(*calls)):
                assert (got.result, got.stdout, got.exit_code) == ([str(number)], f"{number}\n", 0)


async def test_nothing_of_a_call_stays(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        for language in await languages(guest):
            code = "const secret: string = 'tell-' + 'nobody-x'; result.set(secret)"
            await script(guest, code.replace(": string", "") if language == "js" else code, language=language)
        left = await sh(guest, "ls -A /workspace; grep -rl 'nobody-x' /tmp /var/tmp /dev/shm 2>/dev/null; true")
        assert left.stdout == ""


async def test_paths(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await sh(guest, "mkdir -p p; echo 'export const lib = 7;' > p/lib.mjs; ln -s /etc/passwd out.ts")
        (agent.workspace / "p/main.mjs").write_text(
            "import {lib} from './lib.mjs'; result.set([lib, import.meta.main, import.meta.url])"
        )
        request = {"timeout_ms": 30_000, "max_output": 1 << 20, "allow_net": False, "code": None}
        for language in await languages(guest):
            got = await guest.run_script(ScriptRequest(language=language, path="/home/user/p/main.mjs", **request))  # type: ignore[arg-type]
            assert got.result in ([7, True, "file:///workspace/p/main.mjs"], [7, None, "file:///workspace/p/main.mjs"])
            for path, kind in {
                "/workspace/none.ts": NotFound,
                "/etc/passwd": InvalidInput,
                "out.ts": InvalidInput,
            }.items():
                with pytest.raises(kind):
                    await guest.run_script(ScriptRequest(language=language, path=path, **request))  # type: ignore[arg-type]
            with pytest.raises(InvalidInput):
                await script(guest, "1", language=language, flags=("--inspect-brk",))


async def waiting(guest: Guest) -> str:
    """The pid of the Deno that waits for a script, once there is one."""
    deadline = time.monotonic() + 60
    while not (pid := (await sh(guest, "pgrep -x deno")).stdout.strip()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.3)  # it is started when nobody calls
    await settled(guest)  # before it listens a call starts its own
    return pid


async def test_one_waits_for_the_next_script_and_counts_for_nothing(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await script(guest, "1", language="ts")
        pid = await waiting(guest)
        await settled(guest)
        assert (await sh(guest, "ls -A /tmp")).stdout == ""
        await sh(guest, """echo 'export const x = 5' > l.ts; echo '{"imports": {"l": "./l.ts"}}' > deno.json""")
        code = "import { x } from 'l'; console.log(Deno.pid, Deno.args, x); "
        code += "result.set(await Deno.stdin.read(new Uint8Array(9)))"
        got = await script(guest, code, language="ts", args=("a", "ü"))
        assert (got.exit_code, got.stdout, got.stderr) == (0, f'{pid} [ "a", "ü" ] 5\n', "")
        assert (got.has_result, got.result, got.error) == (True, None, None)
        assert await waiting(guest) != pid


async def test_one_that_waited_and_was_killed_is_not_missed(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await script(guest, "1", language="ts")
        await waiting(guest)
        await sh(guest, "kill -9 -1")
        got = await script(guest, "result.set(1)", language="ts")
        assert (got.exit_code, got.stderr, got.result) == (0, "", 1)
        assert await waiting(guest)
        assert agent.complaints() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"env": {"LANG": "de_DE.UTF-8"}},
        {"env": {"NO_COLOR": "1"}},
        {"env": {"HOME": "/tmp"}},
        {"flags": ("--v8-flags=--stack-size=500",)},
    ],
)
async def test_a_call_that_would_differ_starts_its_own(agent: RunningAgent, fields: dict[str, Any]) -> None:
    async with agent.guest() as guest:
        await script(guest, "1", language="ts")
        pid = await waiting(guest)
        got = await script(guest, "console.log(Deno.pid)", language="ts", **fields)
        assert got.exit_code == 0 and got.stdout.strip() != pid


async def test_variables_reach_the_one_that_waits_and_nobody_else(agent: RunningAgent) -> None:
    async with agent.guest() as guest:
        await script(guest, "1", language="ts")
        pid = await waiting(guest)
        code = "const {A, B} = Deno.env.toObject(); console.log(Deno.pid)"
        got = await script(guest, code, language="ts", env={"A": "x=\n'\"ü", "B": ""})
        assert got.error is not None and got.error["name"] == "NotCapable"
        assert await waiting(guest) != pid
        code = "result.set([Deno.env.get('A'), Deno.env.get('B')]); Deno.env.get('HOME')"
        got = await script(guest, code, language="ts", env={"A": "x=\n'\"ü", "B": ""})
        assert got.result == ["x=\n'\"ü", ""] and got.error["name"] == "NotCapable"
        await waiting(guest)
        got = await script(guest, "result.set(Deno.env.get('A') ?? null)", language="ts", env={"B": "c"})
        assert got.error is not None and got.error["name"] == "NotCapable"
