"""Calls into running VMs: commands, scripts, uploads, downloads, and what is kept of them."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from isal import isal_zlib
from starlette.requests import ClientDisconnect

from rundatsheesh.manager.disk.archive import UploadLimits, check_upload
from rundatsheesh.manager.errors import InvalidInput, NotFound, RdsError, StorageFull
from rundatsheesh.manager.guest import CallResult, ExecRequest, Guest, ScriptRequest
from rundatsheesh.manager.host import heap
from rundatsheesh.manager.host.space import NO_ROOM
from rundatsheesh.manager.model import (
    Caller,
    CallType,
    CreateVm,
    ExecCall,
    ExecLogPage,
    LifetimeChange,
    LogView,
    ScriptCall,
    State,
    VmRecord,
)
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.store import ExecLog
from rundatsheesh.manager.vms import Vms
from rundatsheesh.manager.vms_files import Mover, file_mover
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_lifetimes import VmLifetimes
from rundatsheesh.manager.vms_once import Creations
from rundatsheesh.manager.vms_running import RunningVm

LOG_WINDOW = 1 << 20  # bytes of a log that are looked at for its tail
GZIP = 31  # zlib's window bits for a gzip header
GZIP_LEVEL = 1  # igzip: about 400 MB/s, so that a download runs at the speed of the channel
LARGE_TRANSFER = 64 << 20  # bytes
COMPRESS_BYTES = 256 << 10  # one step in a thread: large enough that the hop to it costs nothing


@dataclass(slots=True)
class _Outcome:
    """What the log keeps of a call."""

    exit_code: int | None = None
    bytes_in: int | None = None  # where it is not what the log keeps as the call's input
    bytes_out: int = 0
    timed_out: bool = False
    duration_ms: int | None = None


class Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...


class VmSource(Protocol):
    """Where new VMs come from."""

    async def create(self, request: CreateVm, caller: Caller) -> VmRecord: ...


class VmCalls:
    """What the API asks of VMs. The lifecycle is `Vms`; this adds what happens inside."""

    def __init__(
        self,
        settings: Settings,
        vms: Vms,
        host: VmHost,
        calls: ExecLog,
        source: VmSource,
        creations: Creations,
        lifetimes: VmLifetimes,
    ) -> None:
        self._settings = settings
        self._vms = vms
        self._host = host
        self._log = calls
        self._source = source
        self._creations = creations
        self._lifetimes = lifetimes

    async def create(self, request: CreateVm, caller: Caller) -> VmRecord:
        return await self._creations.create(caller, lambda: self._source.create(request, caller))

    async def change_lifetime(self, vm_id: str, change: LifetimeChange, caller: Caller) -> VmRecord:
        return await self._lifetimes.change(vm_id, change, caller)

    async def get(self, vm_id: str) -> VmRecord:
        return self._lifetimes.with_idleness(await self._vms.get(vm_id))

    async def list(self, *, state: State | None, labels: Mapping[str, str]) -> list[VmRecord]:
        records = await self._vms.list(state=state, labels=labels)
        return [self._lifetimes.with_idleness(record) for record in records]

    async def start(self, vm_id: str, caller: Caller) -> None:
        await self._vms.start(vm_id, caller)

    async def stop(self, vm_id: str, caller: Caller) -> None:
        await self._vms.stop(vm_id, caller)

    async def destroy(self, vm_id: str, caller: Caller) -> None:
        await self._vms.destroy(vm_id, caller)

    async def exec(self, vm_id: str, call: ExecCall, caller: Caller) -> CallResult:
        """Run a shell command. Raises NotFound, Conflict, InvalidInput for a wrong cwd, GuestDied."""
        vm = await self._vms.find_running(vm_id)
        request = ExecRequest(
            cmd=call.cmd,
            timeout_ms=call.timeout_ms,
            max_output=self._settings.max_output_bytes,
            cwd=call.cwd,
            env=call.env,
        )
        async with self._logged(vm, "exec", call.cmd, caller) as (outcome, guest):
            try:
                return _note(outcome, await guest.exec(request))
            except NotFound as missing:  # the VM is there: what is not is a directory that the body names
                raise InvalidInput(f"cwd: {missing.message}", code="invalid_cwd") from None

    async def run_script(self, vm_id: str, call: ScriptCall, caller: Caller) -> CallResult:
        """Run TypeScript or JavaScript; raises as `exec`."""
        vm = await self._vms.find_running(vm_id)
        request = ScriptRequest(
            language=call.language,
            timeout_ms=call.timeout_ms,
            max_output=self._settings.max_output_bytes,
            allow_net=vm.record.spec.policy.outbound,
            code=call.code,
            path=call.path,
            args=call.args,
            env=call.env,
            flags=call.flags,
        )
        kind = cast(CallType, f"run-{call.language}")
        async with self._logged(vm, kind, call.code or call.path or "", caller) as (outcome, guest):
            return _note(outcome, await guest.run_script(request))

    async def upload(self, vm_id: str, dest: str, body: AsyncIterator[bytes], caller: Caller) -> None:
        """Check all of the tar.gz, then write it beneath `dest`. Raises InvalidInput, TooLarge, StorageFull; then
        nothing was written."""
        vm = await self._vms.find_running(vm_id)
        limits = UploadLimits(self._settings.max_upload_bytes, vm.record.spec.disk_mb << 20)
        async with self._logged(vm, "upload", dest, caller) as (outcome, guest), self._mover(vm, guest) as mover:
            outcome.bytes_in = 0
            with _open_spool(self._host.layout.spool) as spool:
                checked = await check_upload(_counted(body, outcome), spool, limits)
                await (await mover.ready()).upload(dest, checked.manifest, checked.canonical_chunks())
            await _forget(outcome.bytes_in)

    async def download(self, vm_id: str, path: str, caller: Caller) -> AsyncGenerator[bytes, None]:
        """gzip bytes, the first of them fetched: what can be refused is refused before this returns."""
        vm = await self._vms.find_running(vm_id)
        chunks = self._download(vm, path, caller)
        first = await anext(chunks)
        return _prepend(first, chunks)

    async def _download(self, vm: RunningVm, path: str, caller: Caller) -> AsyncGenerator[bytes, None]:
        async with self._logged(vm, "download", path, caller) as (outcome, guest), self._mover(vm, guest) as mover:
            download = await (await mover.ready()).download(path)
            async for compressed in _gzip(download.chunks):
                outcome.bytes_out += len(compressed)
                yield compressed
            await _forget(outcome.bytes_out)

    def _mover(self, vm: RunningVm, guest: Guest) -> AbstractAsyncContextManager[Mover]:
        return file_mover(self._host.workers, vm, guest)

    async def logs(self, vm_id: str, type_: str, tail: int) -> LogView:
        """The last `tail` lines of the engine's log or of the console."""
        record = await self._vms.get(vm_id)
        files = self._host.files(record)
        path = files.engine_log if type_ == "engine" else files.console_log
        return await asyncio.to_thread(_read_log, type_, path, tail, record.created_at)

    async def exec_logs(self, vm_id: str, limit: int, type_: str | None) -> ExecLogPage:
        """Newest first."""
        await self._vms.get(vm_id)
        return await self._log.page(vm_id, limit=limit, type_=cast("CallType | None", type_))

    @asynccontextmanager
    async def _logged(
        self, vm: RunningVm, kind: CallType, input_: str, caller: Caller
    ) -> AsyncIterator[tuple[_Outcome, Guest]]:
        """The guest, awake, for one call that is noted from its beginning to whatever end it takes."""
        entry = await self._log.started(vm.record.id, kind, input_, caller)
        started = time.monotonic()
        outcome = _Outcome()
        error: str | None = "cancelled"
        try:
            async with vm.call() as guest:
                yield outcome, guest
            error = None
        except RdsError as problem:
            error = problem.code
            raise
        except ClientDisconnect:  # in the middle of an upload's body
            raise
        except Exception:
            error = RdsError.code
            raise
        finally:
            elapsed = int((time.monotonic() - started) * 1000)
            self._log.finished(
                entry,
                duration_ms=elapsed if outcome.duration_ms is None else outcome.duration_ms,
                exit_code=outcome.exit_code,
                bytes_in=outcome.bytes_in,
                bytes_out=outcome.bytes_out,
                timed_out=outcome.timed_out,
                error=error,
            )


async def _counted(body: AsyncIterator[bytes], outcome: _Outcome) -> AsyncIterator[bytes]:
    """The body, noted as it comes: what becomes of the upload changes nothing about what arrived."""
    async for chunk in body:
        outcome.bytes_in = (outcome.bytes_in or 0) + len(chunk)
        yield chunk


def _note(outcome: _Outcome, result: CallResult) -> CallResult:
    outcome.exit_code = result.exit_code
    outcome.timed_out = result.timed_out
    outcome.duration_ms = result.duration_ms
    outcome.bytes_out = len(result.stdout.encode()) + len(result.stderr.encode())
    return result


async def _forget(transferred: int) -> None:
    """Give back the memory that a large transfer has had, which the heap would keep."""
    if transferred > LARGE_TRANSFER:
        await asyncio.to_thread(heap.trim)


@contextmanager
def _open_spool(directory: Path) -> Iterator[BinaryIO]:
    """A file that has no name and ends with the block. Raises StorageFull where the disk has no room for even that."""
    try:
        spool = tempfile.TemporaryFile(dir=directory, buffering=1 << 20)  # noqa: SIM115
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StorageFull(f"the host cannot keep the upload while it is checked: {error.strerror}") from error
    try:
        yield cast(BinaryIO, spool)
    finally:
        # On a full disk this fails to write what that had refused before, and is closed all the same.
        with suppress(OSError):
            spool.close()


async def _prepend(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()


async def _gzip(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    compressor = isal_zlib.compressobj(GZIP_LEVEL, wbits=GZIP)
    waiting: list[bytes] = []
    size = 0
    async for chunk in chunks:
        waiting.append(chunk)
        size += len(chunk)
        if size >= COMPRESS_BYTES:
            pieces, waiting, size = waiting, [], 0
            if compressed := await asyncio.to_thread(_compress, compressor, pieces):
                yield compressed
    yield _compress(compressor, waiting) + compressor.flush()


def _compress(compressor: Compressor, pieces: list[bytes]) -> bytes:
    return b"".join([compressor.compress(piece) for piece in pieces])


def _read_log(type_: str, path: Path, tail: int, since: datetime) -> LogView:
    """A log that does not exist is one that is empty `since` then."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_WINDOW))
            data = file.read(LOG_WINDOW)
            updated = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return LogView(type_, (), False, since)
    lines = data.decode(errors="replace").splitlines()
    kept = lines[-tail:] if tail else []
    return LogView(type_, tuple(kept), len(kept) < len(lines) or size > LOG_WINDOW, updated)
