"""What code finds inside a VM, and what it does not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from server_support import Box

NewVm = Callable[..., Box]


@pytest.mark.every_engine
def test_the_user(box: Box) -> None:
    assert box.output("id -u; id -g; id -G; id -un; echo $HOME") == "1000\n1000\n1000\nuser\n/workspace\n"
    status = box.output("grep -E '^(Cap|NoNewPrivs)' /proc/self/status || true")
    assert all(line.split()[1].strip("0") == "" for line in status.splitlines() if line.startswith("Cap")), status


def test_no_way_to_gain_privileges(box: Box) -> None:
    escapes = (
        "su -c id",
        "sudo -n id",
        "chroot / id",
        "mount -t tmpfs none /mnt",
        "mknod disk b 8 0",
        "chown root:root /workspace",
        "nice -n -5 true && kill -9 1",
        "python3 -c 'import os; os.setuid(0)'",
        "ip link set eth0 down",
        "cp /bin/bash b; chmod u+s b; chown 0 b",
    )
    for escape in escapes:
        assert box.exec(escape)["exitCode"] != 0, escape
    assert box.output("id -u") == "1000\n"
    box.output("rm -f b disk")


@pytest.mark.every_engine
def test_what_is_writable(box: Box) -> None:
    for path in ("/workspace", "/tmp", "/var/tmp", "/dev/shm", "/home/user"):
        box.output(f"echo x > {path}/probe && rm {path}/probe")
    for path in ("/", "/etc", "/usr/bin", "/opt", "/var/lib", "/run", "/home", "/root"):
        assert box.exec(f"echo x > {path}/probe")["exitCode"] != 0, path


@pytest.mark.every_engine
def test_the_number_of_cpus(box: Box) -> None:
    """Programs start as many threads as this says; the box was created with one CPU."""
    assert box.output("nproc") == "1\n"
    assert box.output("python3 -c 'import os; print(len(os.sched_getaffinity(0)))'") == "1\n"
    assert box.ts("result.set(navigator.hardwareConcurrency)")["result"] == 1


def test_home_user_is_the_workspace(box: Box) -> None:
    box.output("echo same > /home/user/alias.txt")
    assert box.output("cat /workspace/alias.txt && rm /workspace/alias.txt") == "same\n"
    box.output("mkdir -p deep")
    assert box.output("pwd", cwd="/home/user/deep") == "/workspace/deep\n"
    assert box.ts('console.log("x")', timeoutMs=60_000)["exitCode"] == 0


def test_what_is_present(box: Box) -> None:
    programs = "bash ls git curl tar gzip python3 node npm deno"
    box.output(
        f"for each in {programs}; do command -v $each || exit 1; done; test -s /etc/ssl/certs/ca-certificates.crt"
    )
    box.output(
        "git init -q r && cd r && git -c user.name=u -c user.email=e commit -qm x --allow-empty; rm -rf /workspace/r"
    )


def test_nothing_of_the_host_is_readable(box: Box) -> None:
    for path in ("/opt/rds/agent/__main__.py", "/run/agent/agent.sock", "/proc/1/mem", "/etc/shadow"):
        assert box.exec(f"cat {path}")["exitCode"] != 0, path
    for entry in box.output("cat /proc/1/environ || true").split("\0"):
        assert entry.partition("=")[0] in ("", "PATH", "LANG", "HOME"), entry  # gVisor shows it to everybody
    assert box.output("ls /opt/rds/agent /run/agent /root 2>/dev/null || true") == ""
    assert str(box.server.storage) not in box.output("cat /proc/mounts; env; cat /proc/1/cmdline | tr '\\0' ' '")


def test_nothing_of_another_vm_is_readable(vm: NewVm) -> None:
    one, other = vm(), vm()
    one.output("echo secret > secret.txt; echo secret > /tmp/secret.txt; echo secret > /dev/shm/secret.txt")
    assert other.output("find / -name 'secret.txt' -not -path '/proc/*' 2>/dev/null || true") == ""


def test_the_variables_of_another_call_are_gone(box: Box) -> None:
    box.output("true", env={"SECRET": "hunter2"})
    box.ts("1", env=["SECRET=hunter2"])
    found = box.output(
        "env; cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' || true; grep -rs hunter /tmp . || true"
    )
    assert "hunter2" not in found


def test_the_network_inside(vm: NewVm) -> None:
    box = vm()
    address = box.output('python3 -c "import socket; print(socket.gethostbyname(socket.gethostname()))"').strip()
    assert address == box.ip
    assert box.ip in box.output("ip -o -4 address show dev eth0")
    assert "nameserver " in box.output("cat /etc/resolv.conf")


@pytest.mark.every_engine
def test_the_clock_is_right(box: Box) -> None:
    before = time.time()
    clock = int(box.output("date +%s"))
    assert before - 2 < clock < time.time() + 2
