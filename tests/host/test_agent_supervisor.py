"""A supervisor alone, without the server that it works for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rundatsheesh.manager import app

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it becomes the user for each program")

# As in a guest whose user has as many processes as allowed: nothing can be launched, only forked.
IN_A_FULL_PROCESS_TABLE = """
import errno, marshal, os, socket
from agent import program, supervisor
launch = supervisor.launch
def refuse(*arguments):
    raise BlockingIOError(errno.EAGAIN, "no process is left")
fork = os.fork
def fork_and_see_the_end():
    pid = fork()
    if pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid
supervisor.launch = refuse
os.dup2(os.open("/dev/null", os.O_RDWR), 3)
server, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if os.fork() == 0:
    server.close()
    one = supervisor.Supervisor(control)
    os.fork = fork_and_see_the_end
    one._rehearse()
    os.fork, supervisor.launch = fork, launch
    one._rehearse = lambda: None
    one.run()
    os._exit(0)
control.close()
from agent import descriptors
job, theirs = socket.socketpair()
descriptors.send(server, supervisor.WORK, [theirs.fileno()])
null = os.open("/dev/null", os.O_RDWR)
program.send_job(job, ("execute", ["/bin/sh", "-c", "sleep 0.2; exit 3"], {"PATH": "/bin"}, "/"), 3 * [null])
while True:
    _, status, empty = marshal.loads(server.recv(256))
    if status is not None:
        print("exit status", os.waitstatus_to_exitcode(status), flush=True)
    if empty:
        break
server.close()
os.wait()
"""


def test_what_was_rehearsed_is_not_taken_for_a_programs_end() -> None:
    code = f"import sys; sys.path.insert(0, {str(app.AGENT.parent)!r})\n{IN_A_FULL_PROCESS_TABLE}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("exit status 3\n", "")
