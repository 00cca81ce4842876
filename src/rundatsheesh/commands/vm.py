"""Verbs for whoever uses a server. They speak HTTP through the SDK and need nothing else of this package."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click

from rundatsheesh.client import ApiError, Client, ClientError, ExecResult, RunResult, VmInfo
from rundatsheesh.client.model import UNCHANGED, Unchanged
from rundatsheesh.client.transport import DEFAULT_URL

Command = Callable[..., Any]


def with_server(command: Command) -> Command:
    """Give a command the options that name a server, and a client of it as first argument."""

    @click.option("--url", envvar="RDS_URL", default=DEFAULT_URL, show_default=True, help="The server. [RDS_URL]")
    @click.option("--api-key", envvar="RDS_API_KEY", default="dev-key", help="Its key. [RDS_API_KEY]")
    @wraps(command)
    def wrapped(url: str, api_key: str, **options: Any) -> Any:
        with explained(), Client(url, api_key=api_key) as client:
            return command(client, **options)

    return wrapped


@contextmanager
def explained() -> Iterator[None]:
    """Inside, an error of the SDK ends the command with its message and hint."""
    try:
        yield
    except (ClientError, FileNotFoundError) as error:
        click.echo(click.style("rds: ", fg="red") + str(error), err=True)
        if isinstance(error, ApiError) and error.hint:
            click.echo(f"  → {error.hint}", err=True)
        raise SystemExit(1) from None


@click.group()
def vm() -> None:
    """Create, list, start, stop and delete VMs."""


@vm.command()
@click.option("--cpu", default=1, show_default=True, help="vCPUs.")
@click.option("--mem", "mem_mb", default=256, show_default=True, help="Memory, MiB.")
@click.option("--disk", "disk_size_mb", type=int, help="/workspace, MiB.")
@click.option("--outbound/--no-outbound", default=False, help="Let packets out, to what is allowed.")
@click.option("--allow-ip", "allow_ips", multiple=True, help="IPv4 address or CIDR that may be reached; repeatable.")
@click.option("--allow-domain", "allow_domains", multiple=True, help="Name or *.name that may be reached; repeatable.")
@click.option("--engine", help="gvisor or qemu; the server's choice unless given.")
@click.option("--image", "image_id", help="Image to boot.")
@click.option("--snapshot", "snapshot_id", help="Snapshot to start from.")
@click.option("--name", help="A name of your own.")
@click.option("--label", "labels", multiple=True, help="key=value; repeatable.")
@click.option("--ttl", type=float, help="Delete it after so many seconds.")
@click.option("--idle-timeout", type=float, help="Stop it after so many seconds without a call or a process.")
@click.option("--idempotency-key", help="Give the same VM again when repeated with this key.")
@with_server
def create(
    client: Client,
    outbound: bool,
    labels: tuple[str, ...],
    ttl: float | None,
    idle_timeout: float | None,
    **options: Any,
) -> None:
    """Create a VM and print its id."""
    options |= {"ttl_ms": _ms(ttl), "idle_timeout_ms": _ms(idle_timeout)}
    created = client.create(outbound_internet=outbound, labels=dict(map(_pair, labels)), **options)
    click.echo(created.id)


@vm.command()
@click.option("--ttl", callback=lambda _, __, text: _lifetime(text), help="Seconds from now until it is deleted.")
@click.option(
    "--idle-timeout", callback=lambda _, __, text: _lifetime(text), help="Seconds of idleness until it stops."
)
@click.argument("vm_id")
@with_server
def update(client: Client, vm_id: str, ttl: int | Unchanged | None, idle_timeout: int | Unchanged | None) -> None:
    """Change when a VM ends by itself; `never` clears a time."""
    if isinstance(ttl, Unchanged) and isinstance(idle_timeout, Unchanged):
        raise click.UsageError("give --ttl or --idle-timeout")
    info = client.get(vm_id).update(ttl_ms=ttl, idle_timeout_ms=idle_timeout)
    click.echo(f"expires: {info.expires_at or 'never'}")


@vm.command(name="list")
@click.option("--state", help="Only VMs in this state.")
@click.option("--label", help="Only VMs with this key=value.")
@with_server
def list_(client: Client, state: str | None, label: str | None) -> None:
    """List VMs."""
    for info in client.list(state=state, label=label):
        address = info.guest_ip or "-"
        click.echo(f"{info.id}  {info.state:<8}  {info.engine:<8}  {info.cpu} cpu  {info.mem_mb} MiB  {address}")


@vm.command()
@click.argument("vm_id")
@with_server
def get(client: Client, vm_id: str) -> None:
    """Print what is known about a VM, as JSON."""
    click.echo(json.dumps(_fields(client.get(vm_id).info), indent=1, default=str))


@vm.command()
@click.argument("vm_id")
@with_server
def start(client: Client, vm_id: str) -> None:
    """Start a stopped VM; /workspace is as it was."""
    client.get(vm_id).start()


@vm.command()
@click.argument("vm_id")
@with_server
def stop(client: Client, vm_id: str) -> None:
    """Stop a VM; /workspace is kept."""
    client.get(vm_id).stop()


@vm.command()
@click.argument("vm_ids", nargs=-1, required=True)
@with_server
def delete(client: Client, vm_ids: tuple[str, ...]) -> None:
    """Delete VMs and their files."""
    for vm_id in vm_ids:
        client.get(vm_id).delete()


@click.command(name="exec", context_settings={"allow_interspersed_args": False})
@click.option("--cwd", help="Directory beneath /workspace.")
@click.option("--env", "env", multiple=True, help="KEY=value; repeatable.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds.")
@click.argument("vm_id")
@click.argument("command", nargs=-1, required=True)
@with_server
def exec_(
    client: Client, vm_id: str, command: tuple[str, ...], cwd: str | None, env: tuple[str, ...], timeout_s: float | None
) -> None:
    """Run a command in a VM and exit as it did.

    One argument is a command line for bash; several are a program and its arguments: rds exec VM -- ls -l
    """
    words = command[1:] if command[0] == "--" else command
    line = words[0] if len(words) == 1 else shlex.join(words)
    result = client.get(vm_id).exec(line, cwd=cwd, env=dict(map(_pair, env)), timeout_ms=_ms(timeout_s))
    _finish(result)


@click.command(name="run-ts")
@click.option("--env", multiple=True, help="KEY=value that the script may read; repeatable.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds.")
@click.argument("vm_id")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument("args", nargs=-1)
@with_server
def run_ts(
    client: Client, vm_id: str, file: str, args: tuple[str, ...], env: tuple[str, ...], timeout_s: float | None
) -> None:
    """Run a local TypeScript file in a VM with Deno; `-` reads it from standard input."""
    code = _read(file)
    _finish(client.get(vm_id).run_ts(code, args=args, env=dict(map(_pair, env)), timeout_ms=_ms(timeout_s)))


@click.command(name="run-js")
@click.option("--env", multiple=True, help="KEY=value; repeatable.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds.")
@click.argument("vm_id")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument("args", nargs=-1)
@with_server
def run_js(
    client: Client, vm_id: str, file: str, args: tuple[str, ...], env: tuple[str, ...], timeout_s: float | None
) -> None:
    """Run a local JavaScript file in a VM with Node.js; `-` reads it from standard input."""
    code = _read(file)
    _finish(client.get(vm_id).run_js(code, args=args, env=dict(map(_pair, env)), timeout_ms=_ms(timeout_s)))


@click.command()
@click.option("--dest", default="/workspace", show_default=True, help="Directory in the VM.")
@click.argument("vm_id")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@with_server
def upload(client: Client, vm_id: str, source: Path, dest: str) -> None:
    """Copy a directory's content, or one file, into a VM."""
    client.get(vm_id).upload(source, dest)


@click.command()
@click.argument("vm_id")
@click.argument("path")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@with_server
def download(client: Client, vm_id: str, path: str, directory: Path) -> None:
    """Copy a directory's content, or one file, out of a VM into a local directory."""
    unpacked = client.get(vm_id).download(path, directory)
    for name in unpacked.skipped:
        click.echo(f"rds: skipped {name!r}: not a file, or a link that leads elsewhere", err=True)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise click.UsageError(f"{text!r} is not of the form KEY=value")
    return key, value


def _lifetime(text: str | None) -> int | Unchanged | None:
    if text is None:
        return UNCHANGED
    if text == "never":
        return None
    try:
        return int(float(text) * 1000)
    except (ValueError, OverflowError):
        raise click.UsageError(f"{text!r} is neither a number of seconds nor `never`") from None


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _read(file: str) -> str:
    with click.open_file(file, encoding="utf-8") as source:
        return str(source.read())


def _fields(info: VmInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__slots__}


def _finish(result: ExecResult | RunResult) -> NoReturn:
    """Print what the command printed, then what the script returned, and exit as it did."""
    click.echo(result.stdout, nl=False)
    click.echo(result.stderr, nl=False, err=True)
    if isinstance(result, RunResult) and result.has_result:
        click.echo(json.dumps(result.result, ensure_ascii=False))
    if isinstance(result, RunResult) and result.error is not None:
        click.echo(f"rds: {json.dumps(result.error, ensure_ascii=False)}", err=True)
    if result.timed_out:
        click.echo("rds: the command took longer than its timeout and was ended", err=True)
    sys.exit(result.exit_code)
