"""The agent's arguments."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

ENGINES = ("gvisor", "qemu")
DEFAULT_SOCKET = "/run/agent/agent.sock"


class Options:
    """--engine NAME; --socket PATH to listen on, or --port NAME of a virtio-serial port (or a device's path);
    --max-processes N and --max-files N, limits of the user; --cpus N, how many of those that the kernel shows to use;
    --ahead no to start nothing ahead of its call. Parsed by hand: argparse costs more than all the rest."""

    def __init__(self, arguments: list[str]) -> None:
        self.engine = "gvisor"
        self.socket = DEFAULT_SOCKET
        self.port: str | None = None
        self.max_processes = 512
        self.max_files = 4096
        self.ahead = True
        self.cpus: int | None = None
        pairs = iter(arguments)
        for name in pairs:
            value = next(pairs, None)
            if value is None:
                _refuse(f"{name} needs a value")
            self._set(name, value)

    def _set(self, name: str, value: str) -> None:
        if name == "--engine" and value in ENGINES:
            self.engine = value
        elif name == "--socket":
            self.socket = value
        elif name == "--port":
            self.port = value
        elif name == "--max-processes" and value.isdecimal():
            self.max_processes = int(value)
        elif name == "--max-files" and value.isdecimal():
            self.max_files = int(value)
        elif name == "--ahead" and value in ("yes", "no"):
            self.ahead = value == "yes"
        elif name == "--cpus" and value.isdecimal():
            self.cpus = int(value)
        else:
            _refuse(f"cannot understand {name} {value}")


def _refuse(reason: str) -> NoReturn:
    sys.exit(f"agent: {reason}")
