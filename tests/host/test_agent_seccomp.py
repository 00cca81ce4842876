"""The filters of system calls, in a process of their own each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rundatsheesh.manager import app

ATTEMPTS = """
import ctypes, os, stat, socket
from agent import libc, seccomp
c = ctypes.CDLL(None, use_errno=True)
def tried(what, call, *arguments):
    try:
        call(*arguments)
        print(what, "done")
    except OSError as error:
        print(what, os.strerror(error.errno))
def system_call(*arguments):
    if c.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
libc.renounce_privileges()
"""
PRIVILEGES = """
seccomp.forbid_privileges()
column = seccomp.ARCHITECTURES[os.uname().machine][0]
number = {name: numbers[column] for name, numbers in seccomp.PRIVILEGED.items()}
for flag in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    tried("unshare", system_call, number["unshare"], flag)
    if flag != 0x80:
        tried("clone", system_call, number["clone"], flag | 17, 0, 0, 0, 0)
tried("clone3", system_call, number["clone3"], 0, 0)
tried("setns", system_call, number["setns"], os.open("/proc/self/ns/uts", os.O_RDONLY), 0)
for kind in (stat.S_IFCHR, stat.S_IFBLK):
    tried("device", os.mknod, "device", kind | 0o600, os.makedev(1, 3))
tried("fifo", os.mkfifo, "fifo")
tried("files of its own", system_call, number["unshare"], 0x400)
if os.fork() == 0:
    tried("unshare of a child", system_call, number["unshare"], 0x10000000)
    os.execv("/bin/echo", ["echo", "executed"])
os.wait()
"""
FILE_WORK = """
import os, socket
seccomp.keep_file_work()
for what, call in {
    "socket": lambda: socket.socket(),
    "fork": os.fork,
    "execution": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(1, 0),
    "chroot": lambda: os.chroot("/"),
    "link": lambda: os.link("one", "two"),
    "symlink": lambda: os.symlink("one", "two"),
    "owner": lambda: os.chown("one", 1, 1),
    "identity": lambda: os.setuid(0),
}.items():
    tried(what, call)
with open("one", "w") as file:
    file.write("text")
here = os.open(".", os.O_RDONLY)
os.mkdir("directory", 0o700)
os.rename("one", "directory/two", src_dir_fd=here, dst_dir_fd=here)
os.rename("directory/two", "directory/three")
os.replace("directory/three", "directory/two")
print(os.listdir("directory"), os.stat("directory/two").st_size, open("directory/two").read())
"""


def run(code: str, directory: Path) -> list[str]:
    program = f"import sys; sys.path.insert(0, {str(app.AGENT.parent)!r})\n{ATTEMPTS}{code}"
    argv = [sys.executable, "-I", "-u", "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=directory)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


def test_nobody_gains_privileges(tmp_path: Path) -> None:
    """Asked for by root itself, who may do all of it."""
    told = run(PRIVILEGES, tmp_path)
    refused = ["unshare", *7 * ["unshare", "clone"], "setns", "device", "device", "unshare of a child"]
    assert sorted(line for line in told if line.endswith("not permitted")) == sorted(
        f"{what} Operation not permitted" for what in refused
    )
    rest = {line for line in told if not line.endswith("not permitted")}
    assert rest == {"clone3 Function not implemented", "fifo done", "files of its own done", "executed"}


def test_file_work_is_all_that_is_left(tmp_path: Path) -> None:
    *told, done = run(FILE_WORK, tmp_path)
    assert len(told) == 9
    assert {line.split(" ", 1)[1] for line in told} == {"Operation not permitted"}
    assert done == "['two'] 4 text"
