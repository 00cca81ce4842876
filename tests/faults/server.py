"""The process behind `lives.Lives`: forks one server per life, and wraps what a server does into countable steps."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rundatsheesh.manager import app, vms_host
from rundatsheesh.manager.disk import workspace
from rundatsheesh.manager.engines import gvisor, gvisor_files
from rundatsheesh.manager.guest import Guest
from rundatsheesh.manager.host import mounts
from rundatsheesh.manager.host.cgroups import Cgroup
from rundatsheesh.manager.net import kernel, rtnetlink
from rundatsheesh.manager.net.firewall import Firewall
from rundatsheesh.manager.net.network import Network
from rundatsheesh.manager.settings import Settings
from rundatsheesh.manager.store import Store
from rundatsheesh.manager.vms_host import VmHost
from rundatsheesh.manager.vms_running import RunningVm

# Before and after each of these is a step. Both what the manager calls and what that consists of.
STEPS: tuple[tuple[Any, str], ...] = (
    (Store, "_reserve"),
    (Store, "_move"),
    (Store, "_delete"),
    (VmHost, "make_disk"),
    (VmHost, "take_down"),
    (VmHost, "release"),
    (vms_host, "_remove_tree"),
    (workspace, "_make_sparse"),
    (workspace, "_format"),
    (workspace, "_commit"),
    (workspace, "_mount"),
    (workspace, "_unmount"),
    (Network, "attach"),
    (Network, "detach"),
    (Firewall, "put"),
    (Firewall, "remove"),
    (kernel, "create_namespace"),
    (kernel, "remove_namespace"),
    (rtnetlink, "create_veth"),
    (rtnetlink, "delete_link"),
    (gvisor.GVisor, "_launch"),
    (gvisor_files, "prepare"),
    (gvisor_files, "private_tree"),
    (gvisor_files, "write_processes"),
    (gvisor_files, "remove"),
    (mounts, "mount"),
    (mounts, "unmount"),
    (Cgroup, "create"),
    (Cgroup, "kill"),
    (Cgroup, "remove"),
    (Guest, "configure"),
    (Guest, "shutdown"),
    (Guest, "upload"),
    (RunningVm, "detach"),
)


class Counter:
    """Counts steps once armed, and ends the process at the chosen one as a crash would."""

    def __init__(self, storage: Path) -> None:
        self._storage = storage
        self._fatal: int | None = None
        self._count = 0
        self._lock = threading.Lock()

    def arm(self, *_: object) -> None:
        self._fatal = int((self._storage / "arm").read_text())
        say(armed=self._fatal)

    def step(self, name: str) -> None:
        if self._fatal is None:
            return
        with self._lock:
            with open(self._storage / "steps", "a") as steps:
                steps.write(f"{name}\n")
            if self._count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self._count += 1


def wrap(owner: Any, name: str, counter: Counter) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    title = f"{getattr(owner, '__name__', owner).rpartition('.')[2]}.{name.lstrip('_')}"

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        counter.step(f"before {title}")
        result = original(*args, **kwargs)
        counter.step(f"after {title}")
        return result

    @functools.wraps(original)
    async def call_async(*args: Any, **kwargs: Any) -> Any:
        counter.step(f"before {title}")
        result = await original(*args, **kwargs)
        counter.step(f"after {title}")
        return result

    setattr(owner, name, call_async if asyncio.iscoroutinefunction(original) else call)


def say(**fact: Any) -> None:
    os.write(1, json.dumps(fact).encode() + b"\n")


def live(settings: Settings, counter: Counter) -> None:
    signal.signal(signal.SIGUSR1, counter.arm)

    async def serve() -> None:
        serving = asyncio.ensure_future(app.serve(settings))
        await serving

    asyncio.run(serve())


def announce(text: str, **_: Any) -> None:
    say(url=text.removeprefix("serving on ").replace("localhost", "127.0.0.1"))


def main() -> None:
    settings = Settings(_env_file=None)
    counter = Counter(settings.storage_root)
    for owner, name in STEPS:
        wrap(owner, name, counter)
    app.print = announce  # type: ignore[attr-defined]
    child = 0
    for line in sys.stdin:
        if line.strip() == "live":
            child = os.fork()
            if child == 0:
                try:
                    live(settings, counter)
                finally:
                    sys.stderr.flush()
                os._exit(0)
            say(pid=child)
        elif line.strip() == "bury":
            say(status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
