"""`rds`, the command line. Each verb is loaded when it is used: client verbs start without the server's parts."""

from __future__ import annotations

from importlib import import_module

import click

from rundatsheesh import __version__

# verb → module of rundatsheesh.commands and the command in it
VERBS = {
    "serve": ("host", "serve"),
    "setup": ("host", "setup"),
    "doctor": ("host", "doctor_"),
    "config": ("host", "config"),
    "image": ("host", "image"),
    "vm": ("vm", "vm"),
    "key": ("key", "key"),
    "exec": ("vm", "exec_"),
    "run-ts": ("vm", "run_ts"),
    "run-js": ("vm", "run_js"),
    "upload": ("vm", "upload"),
    "download": ("vm", "download"),
    "bench": ("bench", "bench"),
}


class Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return super().get_command(ctx, cmd_name)
        module, name = VERBS[cmd_name]
        command = getattr(import_module(f"rundatsheesh.commands.{module}"), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rds", message="%(prog)s %(version)s")
def main() -> None:
    """Runs untrusted code in virtual machines on machines you own."""


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)


if __name__ == "__main__":
    main()
