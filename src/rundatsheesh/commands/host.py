"""Verbs for whoever runs a server: serve, setup, doctor, config, image."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import SecretStr, ValidationError

from rundatsheesh.commands.checks import all_checks, all_steps, conclude
from rundatsheesh.commands.display import Progress, show_results
from rundatsheesh.manager.build import image as images
from rundatsheesh.manager.errors import RdsError
from rundatsheesh.manager.host import doctor
from rundatsheesh.manager.host.doctor import Level
from rundatsheesh.manager.host.setup import locked, set_up
from rundatsheesh.manager.settings import Settings, inherited_environment

T = TypeVar("T")

USAGE_ERROR = 2
TERMINATED = 128 + signal.SIGTERM
MASK = "********"


@click.command()
@click.option("--setup", "with_setup", is_flag=True, help="Install what is missing first.")
@click.option("--earlier", default=0, hidden=True, help="Steps of the set-up that were shown before.")
def serve(with_setup: bool, earlier: int) -> None:
    """Serve until SIGTERM or Ctrl-C. Settings come from the environment: see `rds config`."""
    settings = load_settings()
    with explained():
        if with_setup:
            _run(lambda: _set_up(settings, earlier))
        else:
            _run(lambda: _gate(settings))
        from rundatsheesh.manager import app

        asyncio.run(app.serve(settings))


@click.command()
@click.option("--earlier", default=0, hidden=True, help="Steps of the set-up that were shown before.")
def setup(earlier: int) -> None:
    """Install what the server needs from its host: Debian packages, gVisor, the guest image."""
    settings = load_settings()
    with explained():
        _run(lambda: _set_up(settings, earlier))


@click.command(name="doctor")
@click.option("--leaks", is_flag=True, help="Compare the records with the host instead: exits with 1 when they differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_(leaks: bool, as_json: bool) -> None:
    """Say what this host has and lacks. Exits with 1 when the server would not start."""
    settings = load_settings()
    if leaks:
        _show_leaks(settings, as_json)
        return
    results = _run(lambda: doctor.examine(all_checks(settings)))
    if as_json:
        click.echo(json.dumps([{"name": result.name, **asdict(result.finding)} for result in results], indent=1))
    else:
        show_results(results)
    if any(result.finding.level is Level.FAIL for result in results):
        raise SystemExit(1)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def config(as_json: bool) -> None:
    """Print every setting: its value now, its default, what it means. Secrets are masked."""
    rows = list(setting_rows(load_settings()))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        changed = "" if row["value"] == row["default"] else f"  (default: {row['default'] or 'none'})"
        click.echo(f"{row['name']}={row['value']}{changed}\n    {row['help']}")


@click.group()
def image() -> None:
    """Build and examine guest images."""


@image.command()
def build() -> None:
    """Build the image of this version's recipe unless it is there."""
    settings = load_settings()

    async def run() -> images.Image:
        async with locked(settings.image_cache, click.echo):
            built = await images.ensure_image(settings.image_cache, inherited_environment(), click.echo)
            await images.ensure_boot_files(built, inherited_environment(), click.echo)
            return built

    with explained():
        built = _run(run)
    click.echo(f"{built.id}  {built.root}")


@image.command(name="list")
def list_() -> None:
    """List the images in the cache; `*` marks this version's."""
    settings = load_settings()
    current = images.find_image(settings.image_cache)
    for found in images.list_images(settings.image_cache):
        mark = "*" if current and found.id == current.id else " "
        manifest = found.manifest
        size = f"{manifest.size_bytes >> 20} MiB"
        click.echo(f"{mark} {found.id}  Debian {manifest.suite} {manifest.architecture}  {size}  {found.directory}")


@image.command()
@click.argument("image_id", required=False)
def verify(image_id: str | None) -> None:
    """Compare an image's files with what was built. Exits with 1 and the differences when they changed."""
    found = images.find_image(load_settings().image_cache, image_id)
    if found is None:
        raise click.ClickException(f"no image {image_id or 'of this recipe'}; see `rds image list`")
    _show_differences(images.changed_files(found), f"{found.id} is as it was built")


@image.command()
def reproduce() -> None:
    """Build this version's image once more and compare it with the one in the cache. Takes about a minute."""
    settings = load_settings()
    found = images.find_image(settings.image_cache)
    if found is None:
        raise click.ClickException("no image of this recipe to compare with; see `rds image build`")

    async def run() -> list[str]:
        with tempfile.TemporaryDirectory(prefix=".new-", dir=settings.image_cache) as scratch:
            again = await images.build_image(Path(scratch), inherited_environment(), click.echo)
            return images.compare_images(found, again)

    with explained():
        differences = _run(run)
    _show_differences(differences, f"{found.id} was built again with the same files")


def load_settings() -> Settings:
    """Read the settings; on wrong ones say each in a line of its own and exit with 2."""
    try:
        return Settings()
    except ValidationError as error:
        for problem in error.errors():
            click.echo(f"rds: {describe_problem(problem)}", err=True)
        raise SystemExit(USAGE_ERROR) from None


def describe_problem(problem: Any) -> str:
    """One of pydantic's errors as `NAME='value': what is wrong`, without the values of secrets."""
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return str(message)
    field = str(problem["loc"][0])
    info = Settings.model_fields.get(field.lower())
    secret = info is not None and info.annotation is SecretStr
    return f"{field.upper()}={MASK if secret else repr(problem['input'])}: {message}"


def setting_rows(settings: Settings) -> Iterator[dict[str, str]]:
    """Name, value, default and help of each setting, in the table's order."""
    for name, info in Settings.model_fields.items():
        yield {
            "name": name.upper(),
            "value": _printable(name, getattr(settings, name)),
            "default": _printable(name, info.default),
            "help": info.description or "",
        }


@contextmanager
def explained() -> Iterator[None]:
    """Inside, an error that we foresaw ends the command with its message and hint instead of a stack trace."""
    try:
        yield
    except RdsError as error:
        hint = f"\n  → {error.hint}" if error.hint else ""
        click.echo(click.style("rds: ", fg="red") + f"{error.message}{hint}", err=True)
        raise SystemExit(1) from None


def _run(action: Callable[[], Awaitable[T]]) -> T:
    """Run one action; SIGTERM and Ctrl-C cancel it, so that it cleans up, and end the command."""

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await action()

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        sys.exit(TERMINATED)
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _set_up(settings: Settings, earlier: int) -> None:
    steps = all_steps(settings, inherited_environment())
    await set_up(steps, Progress(), cache=settings.image_cache, earlier=earlier)


async def _gate(settings: Settings) -> None:
    """Refuse to start on a host that cannot run VMs."""
    conclude(await doctor.examine(all_checks(settings)))


def _show_leaks(settings: Settings, as_json: bool) -> None:
    """Whether the server runs or not; it is not asked, and nothing is changed."""
    from rundatsheesh.manager.reconcile_outside import audit_from_outside

    with explained():
        found = _run(lambda: audit_from_outside(settings))
    if as_json:
        click.echo(json.dumps([{"kind": leak.kind, "name": leak.name, "vmId": leak.vm_id} for leak in found], indent=1))
    else:
        for leak in found:
            click.echo(f"{leak.kind:<12}  {leak.vm_id or 'no VM that is known':<19}  {leak.name}")
        click.echo(f"{len(found)} leaks" if found else "no leaks")
    if found:
        raise SystemExit(1)


def _show_differences(differences: list[str], otherwise: str) -> None:
    for line in differences:
        click.echo(line)
    if differences:
        raise SystemExit(1)
    click.echo(otherwise)


def _printable(name: str, value: Any) -> str:
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    if name == "database_url" and value:
        from sqlalchemy.engine import make_url  # slow to load, and only needed here

        return make_url(value).render_as_string(hide_password=True)
    return str(value)
