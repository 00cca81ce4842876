"""What is measured beside what, phase by phase."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare
import bare_qemu
import channel
from load import KEY, wait_for_warm

from rundatsheesh.bench import over_http
from rundatsheesh.bench.client import SOURCE_STREAM, prepare_scripts, prepare_transfers, script_calls
from rundatsheesh.bench.connection import Box, Connection
from rundatsheesh.bench.results import Results
from rundatsheesh.bench.samples import files_archive, stream_archive
from rundatsheesh.bench.schedule import Contender, in_turns
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.vms_host import VmHost
from server_support import Server

CALLS_A_TURN = 3
CLONES = 30


@dataclass(frozen=True)
class Bench:
    results: Results
    warm: Server
    cold: Server
    runsc: bare.Runsc
    scratch: Path
    fields: Mapping[str, Any]
    rounds: int
    warm_target: int


async def creates(bench: Bench, seconds: float) -> None:
    """Warm, cold and bare. The pool is full again before each warm one, as it is where creates are apart."""

    async def filled() -> None:
        await wait_for_warm(bench.warm, bench.warm_target)

    warm, cold = Connection(bench.warm.url, KEY), Connection(bench.cold.url, KEY)
    contenders = [
        over_http.create(warm, "_warm", filled, **bench.fields),
        # The pool fills while others measure, unless it is waited for.
        _after(filled, over_http.create(cold, "_cold", **bench.fields)),
        _after(filled, bare.run_agent(bench.runsc)),
        _after(filled, bare.run_shell(bench.runsc)),
    ]
    await in_turns(bench.results, contenders, rounds=max(3, bench.rounds // 2), seconds=seconds)
    warm.close()
    cold.close()


async def clones(bench: Bench, host: VmHost, settings: Settings, seconds: float) -> None:
    """Virtual machines from a template: through a server without a pool, by the engine alone, by QEMU alone."""
    cold = Connection(bench.cold.url, KEY)
    contenders = [
        channel.clone(host, settings),
        bare_qemu.clone(host, settings, bench.scratch),
        over_http.create(cold, "_clone", engine="qemu"),
    ]
    await in_turns(bench.results, contenders, rounds=CLONES, seconds=seconds, warm_up=3)
    cold.close()


async def calls(bench: Bench, box: Box, guest: Guest, seconds: float) -> None:
    """`exec true`: over HTTP, over the channel, by runsc."""
    async with bare.standing(bench.runsc) as sandbox:
        contenders = [
            *[over_http.call(box, "exec", "exec", cmd="true"), channel.exec_true(guest)] * CALLS_A_TURN,
            over_http.rested(box, "exec_rested", "exec", cmd="true"),
            bare.exec_true(sandbox),
        ]
        await in_turns(bench.results, contenders, rounds=bench.rounds, seconds=seconds)
    pairs = zip(bench.results.samples["exec"], bench.results.samples["exec_channel"], strict=True)
    bench.results.add({"http_share": statistics.median(over - bare_ for over, bare_ in pairs)})


async def scripts(bench: Bench, box: Box, seconds: float) -> None:
    prepare_scripts(box)
    contenders = script_calls(box)
    deno = bench.runsc.image / "usr/local/bin/deno"
    if deno.exists():
        contenders.append(bare.host_deno(deno, bench.scratch))
    await in_turns(bench.results, contenders, rounds=bench.rounds, seconds=seconds)


async def transfers(bench: Bench, box: Box, guest: Guest, seconds: float) -> None:
    async with channel.checked_upload(stream_archive()) as (checked, spool):
        up = channel.upload(guest, checked, spool)
        await up()  # what is downloaded
        contenders = [
            *prepare_transfers(box),
            up,
            channel.download(guest, SOURCE_STREAM),
            bare.host_untar(bench.scratch, files_archive()),
            await bare.host_tar(bench.scratch, files_archive()),
        ]
        await in_turns(bench.results, contenders, rounds=max(3, bench.rounds // 4), seconds=seconds, warm_up=1)


def _after(prepare: Callable[[], Awaitable[None]], contender: Contender) -> Contender:
    async def measure() -> Mapping[str, float]:
        await prepare()
        return await contender()

    return measure
