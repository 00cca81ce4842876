"""`rds bench`: measure a server as its client."""

from __future__ import annotations

import asyncio
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from rundatsheesh import __version__
from rundatsheesh.bench import report, svg
from rundatsheesh.bench.client import Plan, measure
from rundatsheesh.bench.connection import UnexpectedAnswerError
from rundatsheesh.bench.results import Results
from rundatsheesh.client import ClientError
from rundatsheesh.client.transport import DEFAULT_URL


@click.command()
@click.option("--url", envvar="RDS_URL", default=DEFAULT_URL, show_default=True, help="The server. [RDS_URL]")
@click.option("--api-key", envvar="RDS_API_KEY", default="dev-key", help="Its key. [RDS_API_KEY]")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(3, 1000), help="Calls of each kind.")
@click.option("--seconds", default=120.0, show_default=True, help="About how long to measure at most.")
@click.option("--burst", default=10, show_default=True, type=click.IntRange(0, 500), help="VMs to create at once.")
@click.option("--engine", help="gvisor or qemu; the server's choice unless given.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write every sample here.")
@click.option("--svg", "svg_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture here.")
def bench(url: str, api_key: str, json_file: Path | None, svg_file: Path | None, **options: Any) -> None:
    """Measure a server: create, calls, scripts, transfers, a burst. It makes VMs and deletes them again."""
    results = Results()
    try:
        asyncio.run(measure(results, url, api_key, Plan(**options), lambda text: click.echo(text, err=True)))
    except (ClientError, UnexpectedAnswerError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(report.text(results))
    facts = {"version": __version__, "at": datetime.now(UTC).isoformat(timespec="seconds"), "from": platform.node()}
    if json_file is not None:
        json_file.write_text(report.as_json(results, facts), encoding="utf-8")
    if svg_file is not None:
        svg_file.write_text(svg.picture(results, "run-dat-sheesh", f"{url}, {facts['at']}"), encoding="utf-8")
