"""Started as `python3 -I -S DIRECTORY/__main__.py --engine NAME ...`, as the first process of the guest; with
`--outside`, on the host, as the helper of outside.py.

Where build/agent.py has packed the modules into one file, they come from there: under gVisor each file that is looked
for and read is a dozen requests to another process, and the agent has some sixty.
"""

from __future__ import annotations

import marshal
import os
import sys
from _frozen_importlib import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))
PACK = os.path.join(HERE, "modules")
PACK_FD = 100  # out of the way of those that init.py sees to


class Packed:
    """Finds and loads modules of the pack, which starts with the size of its index in four bytes and the index: name →
    (offset, size, whether it is a package)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        size = int.from_bytes(os.pread(fd, 4, 0), "little")
        self._index: dict[str, tuple[int, int, bool]] = marshal.loads(os.pread(fd, size, 4))
        self._start = 4 + size

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        found = self._index.get(name)
        return ModuleSpec(name, self, is_package=found[2]) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # as usual

    def exec_module(self, module: ModuleType) -> None:
        offset, size, _ = self._index[module.__name__]
        code = marshal.loads(os.pread(self._fd, size, self._start + offset))
        module.__file__ = code.co_filename
        exec(code, module.__dict__)


def close_inherited() -> None:
    """Whatever we were started with besides the standard streams is nobody's business in here."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:
                continue  # the descriptor that listed the directory


def open_pack() -> None:
    try:
        fd = os.open(PACK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    os.dup2(fd, PACK_FD, inheritable=False)
    os.close(fd)
    sys.meta_path.insert(0, Packed(PACK_FD))


package = __package__
if not package:  # a script, or a directory that is executed, is no package: import it as one, whatever its name is
    parent, package = os.path.split(HERE)
    sys.path.insert(0, parent)

close_inherited()
if package == "agent":  # as it is packed
    open_pack()
program = "outside" if sys.argv[1:] == ["--outside"] else "init"
start = __import__(f"{package}.{program}", fromlist=["main"])
start.main(sys.argv[1:])
