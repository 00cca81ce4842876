"""The client for asyncio: the blocking one's methods, awaited.

async with AsyncClient(api_key="dev-key") as client, await client.create(cpu=1, mem_mb=256) as vm:
    print((await vm.exec("id")).stdout)
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from rundatsheesh.client import transport
from rundatsheesh.client.archive import CHUNK, Unpacked, pack, unpack
from rundatsheesh.client.errors import NotFound
from rundatsheesh.client.model import (
    UNCHANGED,
    ExecResult,
    RunResult,
    Unchanged,
    VmInfo,
    create_body,
    exec_body,
    once,
    run_body,
    update_body,
)

Source = str | Path | bytes | AsyncIterable[bytes]


class AsyncClient:
    """One server. An asynchronous context manager: leaving it closes the connections."""

    def __init__(
        self, base_url: str = transport.DEFAULT_URL, *, api_key: str, transport_: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._http = httpx.AsyncClient(**transport.options(base_url, api_key), transport=transport_)

    async def create(
        self,
        *,
        cpu: int = 1,
        mem_mb: int = 256,
        allow_ips: Sequence[str] = (),
        outbound_internet: bool = False,
        allow_domains: Sequence[str] = (),
        engine: str | None = None,
        image_id: str | None = None,
        snapshot_id: str | None = None,
        disk_size_mb: int | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl_ms: int | None = None,
        idle_timeout_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncVm:
        """Create a VM and return once it answers. Leaving the VM's context deletes it.

        It ends by itself after `ttl_ms`, and stops after `idle_timeout_ms` without a call or a process. With an
        `idempotency_key` the call may be repeated, and gives the same VM.
        """
        body = create_body(
            cpu=cpu,
            mem_mb=mem_mb,
            allow_ips=allow_ips,
            outbound_internet=outbound_internet,
            allow_domains=allow_domains,
            engine=engine,
            image_id=image_id,
            snapshot_id=snapshot_id,
            disk_size_mb=disk_size_mb,
            name=name,
            labels=labels,
            ttl_ms=ttl_ms,
            idle_timeout_ms=idle_timeout_ms,
        )
        response = await self._call("POST", "/v1/vms", json=body, headers=once(idempotency_key))
        return AsyncVm(self, VmInfo.parse(response.json()))

    async def list(self, *, state: str | None = None, label: str | None = None) -> list[VmInfo]:
        """All VMs, or those in a state or with a label (`key=value`)."""
        params = {key: value for key, value in (("state", state), ("label", label)) if value is not None}
        return [VmInfo.parse(body) for body in (await self._call("GET", "/v1/vms", params=params)).json()]

    async def get(self, vm_id: str) -> AsyncVm:
        """A handle of an existing VM; raises NotFound."""
        response = await self._call("GET", transport.vm_path(vm_id))
        return AsyncVm(self, VmInfo.parse(response.json()))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        with transport.translated():
            response = await self._http.request(method, path, **options)
        if response.is_success:
            return response
        raise transport.error_of(response)

    @asynccontextmanager
    async def _stream(self, path: str, params: dict[str, str]) -> AsyncIterator[httpx.Response]:
        with transport.translated():
            async with self._http.stream("GET", path, params=params) as response:
                if not response.is_success:
                    await response.aread()
                    raise transport.error_of(response)
                yield response


class AsyncVm:
    """A handle of one VM. `info` is as of the last call that told; `refresh` asks again."""

    def __init__(self, client: AsyncClient, info: VmInfo) -> None:
        self._client = client
        self.info = info

    @property
    def id(self) -> str:
        return self.info.id

    async def refresh(self) -> VmInfo:
        self.info = VmInfo.parse((await self._client._call("GET", transport.vm_path(self.id))).json())
        return self.info

    async def update(
        self, *, ttl_ms: int | Unchanged | None = UNCHANGED, idle_timeout_ms: int | Unchanged | None = UNCHANGED
    ) -> VmInfo:
        """Change when the VM ends by itself. A new `ttl_ms` counts from now; None: never."""
        body = update_body(ttl_ms, idle_timeout_ms)
        self.info = VmInfo.parse((await self._client._call("PATCH", transport.vm_path(self.id), json=body)).json())
        return self.info

    async def start(self) -> None:
        await self._client._call("POST", transport.vm_path(self.id, "start"))

    async def stop(self) -> None:
        await self._client._call("POST", transport.vm_path(self.id, "stop"))

    async def delete(self) -> None:
        """Returns once nothing of the VM is left; raises NotFound when it is gone already."""
        await self._client._call("DELETE", transport.vm_path(self.id))

    async def exec(
        self, cmd: str, *, cwd: str | None = None, env: Mapping[str, str] | None = None, timeout_ms: int | None = None
    ) -> ExecResult:
        """Run a command line under `bash -lc`."""
        return ExecResult.parse(await self._run("exec", exec_body(cmd, cwd, env, timeout_ms), timeout_ms))

    async def run_ts(
        self,
        code: str | None = None,
        *,
        path: str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        deno_flags: Sequence[str] = (),
        timeout_ms: int | None = None,
    ) -> RunResult:
        """Run TypeScript with Deno: either `code`, or the file `path` inside the VM."""
        body = run_body("denoFlags", code=code, path=path, args=args, env=env, flags=deno_flags, timeout_ms=timeout_ms)
        return RunResult.parse(await self._run("run-ts", body, timeout_ms))

    async def run_js(
        self,
        code: str | None = None,
        *,
        path: str | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        node_flags: Sequence[str] = (),
        timeout_ms: int | None = None,
    ) -> RunResult:
        """Run JavaScript with Node.js: either `code`, or the file `path` inside the VM."""
        body = run_body("nodeFlags", code=code, path=path, args=args, env=env, flags=node_flags, timeout_ms=timeout_ms)
        return RunResult.parse(await self._run("run-js", body, timeout_ms))

    async def upload(self, source: Source, dest: str = "/workspace") -> None:
        """Put files into the VM: a directory's content or one file by its path, or a finished tar.gz.

        A finished archive is bytes or an asynchronous iterable of bytes. Nothing is held whole in memory.
        """
        path = transport.vm_path(self.id, "files", "upload")
        content = await _chunks(source)
        await self._client._call("POST", path, params={"dest": dest}, content=content, headers=transport.GZIP)

    async def download(self, path: str, into: str | Path) -> Unpacked:
        """Fetch a directory's content, or one file, into a local directory, by way of a temporary file."""
        with tempfile.TemporaryFile() as scratch:
            async with self.download_stream(path) as chunks:
                async for chunk in chunks:
                    await asyncio.to_thread(scratch.write, chunk)
            scratch.seek(0)
            return await asyncio.to_thread(unpack, scratch, Path(into))

    @asynccontextmanager
    async def download_stream(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The tar.gz itself, piece by piece."""
        url = transport.vm_path(self.id, "files", "download")
        async with self._client._stream(url, {"path": path}) as response:
            yield response.aiter_raw(CHUNK)

    async def __aenter__(self) -> AsyncVm:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            await self.delete()
        except NotFound:
            return  # deleted inside the context

    async def _run(self, verb: str, body: dict[str, Any], timeout_ms: int | None) -> Any:
        path = transport.vm_path(self.id, verb)
        return (await self._client._call("POST", path, json=body, timeout=transport.deadline(timeout_ms))).json()


async def _chunks(source: Source) -> bytes | AsyncIterable[bytes]:
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if not await asyncio.to_thread(path.exists):
        raise FileNotFoundError(f"{path}: no such file or directory")
    return _in_thread(pack(path))


async def _in_thread(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(next, chunks, b""):
        yield chunk
