"""The client's half of the benchmark: everything that can be measured of a server from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rundatsheesh.bench import over_http
from rundatsheesh.bench.burst import measure_burst
from rundatsheesh.bench.connection import Box, Connection
from rundatsheesh.bench.results import Results
from rundatsheesh.bench.samples import files_archive, stream_archive
from rundatsheesh.bench.schedule import Contender, in_turns

PHASES = 4
SOURCE_STREAM = "/workspace/source/stream"
SOURCE_FILES = "/workspace/files"


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int = 20  # of calls; half as many creates, a quarter as many transfers
    seconds: float = 120.0  # for all of it, about
    burst: int = 10  # VMs at once; 0 leaves it out
    engine: str | None = None  # the server's own choice


async def measure(results: Results, url: str, api_key: str, plan: Plan, say: Callable[[str], None]) -> None:
    """Fill `results`. Makes VMs and deletes them. Raises UnexpectedAnswerError and the client's errors."""
    connection = Connection(url, api_key)
    fields: dict[str, Any] = {} if plan.engine is None else {"engine": plan.engine}
    share = plan.seconds / PHASES
    say("create → first output")
    creating = over_http.create(connection, "", **fields)
    await in_turns(results, [creating], rounds=max(3, plan.rounds // 2), seconds=share)
    box = Box.create(connection, diskSizeMb=1024, **fields)
    try:
        say("calls and scripts")
        await in_turns(results, _calls(box), rounds=plan.rounds, seconds=share)
        say("uploads and downloads")
        await in_turns(results, prepare_transfers(box), rounds=max(3, plan.rounds // 4), seconds=share)
    finally:
        box.delete()
        connection.close()
    if plan.burst:
        say(f"{plan.burst} creates at once")
        outcome = await measure_burst(results, url, api_key, plan.burst, **fields)
        say("  " + ", ".join(f"{number} {what}" for what, number in outcome.items()))


def prepare_scripts(box: Box) -> None:
    """Files that the runtimes inside the VM are given."""
    box.run("exec", cmd='printf %s "$TS" >hello.ts; printf %s "$JS" >hello.js', env=_SOURCES)


def exec_calls(box: Box) -> list[Contender]:
    return [
        over_http.call(box, "exec", "exec", cmd="true"),
        over_http.rested(box, "exec_rested", "exec", cmd="true"),
    ]


def script_calls(box: Box) -> list[Contender]:
    """run-ts and run-js beside the bare runtimes in the same VM."""
    return [
        over_http.call(box, "run_ts", "run-ts", code=over_http.HELLO_TS),
        over_http.rested(box, "run_ts_rested", "run-ts", code=over_http.HELLO_TS),
        over_http.inside(box, "bare_deno", "deno run --no-prompt --quiet hello.ts"),
        over_http.call(box, "run_js", "run-js", code=over_http.HELLO_JS),
        over_http.inside(box, "bare_node", "node hello.js"),
    ]


def prepare_transfers(box: Box) -> list[Contender]:
    """Uploads and downloads of a VM that holds what is to be downloaded."""
    stream, files = stream_archive(), files_archive()
    box.upload(stream, "/workspace/source")
    box.upload(files, SOURCE_FILES)
    return [
        over_http.upload_stream(box, stream),
        over_http.download_stream(box, SOURCE_STREAM),
        over_http.upload_files(box, files),
        over_http.download_files(box, SOURCE_FILES),
    ]


def _calls(box: Box) -> list[Contender]:
    prepare_scripts(box)
    return [*exec_calls(box), *script_calls(box)]


_SOURCES = {"TS": over_http.HELLO_TS, "JS": over_http.HELLO_JS}
