"""The blocking client.

with Client(api_key="dev-key") as client, client.create(cpu=1, mem_mb=256) as vm:
    print(vm.exec("id").stdout)
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

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

Source = str | Path | bytes | IO[bytes] | Iterable[bytes]


class Client:
    """One server. A context manager: leaving it closes the connections. Safe to share between threads."""

    def __init__(
        self, base_url: str = transport.DEFAULT_URL, *, api_key: str, transport_: httpx.BaseTransport | None = None
    ) -> None:
        self._http = httpx.Client(**transport.options(base_url, api_key), transport=transport_)

    def create(
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
    ) -> Vm:
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
        info = VmInfo.parse(self._call("POST", "/v1/vms", json=body, headers=once(idempotency_key)).json())
        return Vm(self, info)

    def list(self, *, state: str | None = None, label: str | None = None) -> list[VmInfo]:
        """All VMs, or those in a state or with a label (`key=value`)."""
        params = {key: value for key, value in (("state", state), ("label", label)) if value is not None}
        return [VmInfo.parse(body) for body in self._call("GET", "/v1/vms", params=params).json()]

    def get(self, vm_id: str) -> Vm:
        """A handle of an existing VM; raises NotFound."""
        return Vm(self, VmInfo.parse(self._call("GET", transport.vm_path(vm_id)).json()))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        with transport.translated():
            response = self._http.request(method, path, **options)
        if response.is_success:
            return response
        raise transport.error_of(response)

    @contextmanager
    def _stream(self, path: str, params: dict[str, str]) -> Iterator[httpx.Response]:
        with transport.translated(), self._http.stream("GET", path, params=params) as response:
            if not response.is_success:
                response.read()
                raise transport.error_of(response)
            yield response


class Vm:
    """A handle of one VM. `info` is as of the last call that told; `refresh` asks again."""

    def __init__(self, client: Client, info: VmInfo) -> None:
        self._client = client
        self.info = info

    @property
    def id(self) -> str:
        return self.info.id

    def refresh(self) -> VmInfo:
        self.info = VmInfo.parse(self._client._call("GET", transport.vm_path(self.id)).json())
        return self.info

    def update(
        self, *, ttl_ms: int | Unchanged | None = UNCHANGED, idle_timeout_ms: int | Unchanged | None = UNCHANGED
    ) -> VmInfo:
        """Change when the VM ends by itself. A new `ttl_ms` counts from now; None: never."""
        body = update_body(ttl_ms, idle_timeout_ms)
        self.info = VmInfo.parse(self._client._call("PATCH", transport.vm_path(self.id), json=body).json())
        return self.info

    def start(self) -> None:
        self._client._call("POST", transport.vm_path(self.id, "start"))

    def stop(self) -> None:
        self._client._call("POST", transport.vm_path(self.id, "stop"))

    def delete(self) -> None:
        """Returns once nothing of the VM is left; raises NotFound when it is gone already."""
        self._client._call("DELETE", transport.vm_path(self.id))

    def exec(
        self, cmd: str, *, cwd: str | None = None, env: Mapping[str, str] | None = None, timeout_ms: int | None = None
    ) -> ExecResult:
        """Run a command line under `bash -lc`."""
        return ExecResult.parse(self._run("exec", exec_body(cmd, cwd, env, timeout_ms), timeout_ms))

    def run_ts(
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
        return RunResult.parse(self._run("run-ts", body, timeout_ms))

    def run_js(
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
        return RunResult.parse(self._run("run-js", body, timeout_ms))

    def upload(self, source: Source, dest: str = "/workspace") -> None:
        """Put files into the VM: a directory's content or one file by its path, or a finished tar.gz.

        A finished archive is bytes, an open binary file or an iterable of bytes. Nothing is held whole in memory.
        """
        path = transport.vm_path(self.id, "files", "upload")
        self._client._call("POST", path, params={"dest": dest}, content=_chunks(source), headers=transport.GZIP)

    def download(self, path: str, into: str | Path) -> Unpacked:
        """Fetch a directory's content, or one file, into a local directory."""
        with self.download_stream(path) as chunks:
            return unpack(io.BufferedReader(_Reader(chunks), CHUNK), Path(into))

    @contextmanager
    def download_stream(self, path: str) -> Iterator[Iterator[bytes]]:
        """The tar.gz itself, piece by piece."""
        url = transport.vm_path(self.id, "files", "download")
        with self._client._stream(url, {"path": path}) as response:
            yield response.iter_raw(CHUNK)

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.delete()
        except NotFound:
            return  # deleted inside the context

    def _run(self, verb: str, body: dict[str, Any], timeout_ms: int | None) -> Any:
        path = transport.vm_path(self.id, verb)
        return self._client._call("POST", path, json=body, timeout=transport.deadline(timeout_ms)).json()


class _Reader(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _chunks(source: Source) -> bytes | Iterable[bytes]:
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
        return pack(path)
    return source
