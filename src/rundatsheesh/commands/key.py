"""`rds key`: further API keys, which only the admin's login may make."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any

import click

from rundatsheesh.client import Admin, KeyInfo
from rundatsheesh.client.transport import DEFAULT_URL
from rundatsheesh.commands.vm import explained

SCOPES = ("vm:read", "vm:write", "exec", "files", "admin")


def with_admin(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a login, and the session as first argument."""

    @click.option("--url", envvar="RDS_URL", default=DEFAULT_URL, show_default=True, help="The server. [RDS_URL]")
    @click.option("--email", envvar="ADMIN_EMAIL", default="admin@localhost", help="The admin's. [ADMIN_EMAIL]")
    @click.option("--password", envvar="ADMIN_PASSWORD", default="admin", help="Better not typed. [ADMIN_PASSWORD]")
    @wraps(command)
    def wrapped(url: str, email: str, password: str, **options: Any) -> Any:
        with explained(), Admin(url, email=email, password=password) as admin:
            return command(admin, **options)

    return wrapped


@click.group()
def key() -> None:
    """Make, list and revoke API keys. Needs the admin's login."""


@key.command()
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="What it may do; repeatable.")
@click.option("--allow-ip", "allow_ips", multiple=True, help="Where its VMs may reach at most; repeatable.")
@click.option("--expires", type=click.DateTime(), help="UTC.")
@click.option("--max-vms", type=int, help="VMs that it may have, stopped ones too.")
@click.option("--max-cpu", type=int, help="vCPUs of them together.")
@click.option("--max-mem", "max_mem_mb", type=int, help="Memory of them together, MiB.")
@click.option("--calls-per-minute", type=int)
@with_admin
def create(
    admin: Admin,
    name: str,
    scopes: tuple[str, ...],
    allow_ips: tuple[str, ...],
    expires: datetime | None,
    **limits: Any,
) -> None:
    """Make a key and print its secret, which is shown this once. Without --scope: everything but admin."""
    made = admin.create_key(
        name,
        scopes=scopes or None,
        allow_ips=allow_ips or None,
        expires_at=None if expires is None else expires.replace(tzinfo=UTC),
        **limits,
    )
    click.echo(f"{made.id}", err=True)
    click.echo(made.secret)


@key.command(name="list")
@with_admin
def list_(admin: Admin) -> None:
    """List the keys, the revoked too."""
    for info in admin.list_keys():
        click.echo(f"{info.id}  {_state(info):<8}  {','.join(info.scopes)}  {info.name}")


@key.command()
@click.argument("key_id")
@with_admin
def revoke(admin: Admin, key_id: str) -> None:
    """Let nobody in with it any more, at once."""
    admin.revoke_key(key_id)


def _state(info: KeyInfo) -> str:
    if info.revoked_at is not None:
        return "revoked"
    return "expired" if info.expires_at is not None and info.expires_at <= datetime.now(UTC) else "valid"
