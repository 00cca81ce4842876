"""What the guest's root may try against the host: it got hold of the agent, and with it of all that a guest has."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from gvisor_support import Lab, call
from gvisor_support import guest_root as guest_root
from gvisor_support import lab as lab

from rundatsheesh.manager.engines import runtime
from rundatsheesh.manager.errors import EngineError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sandboxes need root")

TMPFS_BYTES = 2 << 20


async def test_the_sandbox_has_no_power_on_the_host(lab: Lab) -> None:
    await lab.start()
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{lab.role('sandbox')}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split()[:3] == ["65534"] * 3
    assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    gofer = Path(f"/proc/{lab.role('gofer')}/status").read_text()
    assert "Seccomp:\t2" in gofer


async def test_neither_the_image_nor_the_agent_can_be_written(lab: Lab) -> None:
    machine = await lab.start()
    for path in ("/etc/x", "/usr/bin/x", "/opt/rds/x", "/opt/rds/agent/x", "/etc/hosts", "/etc/resolv.conf", "/run/x"):
        told = await call(machine, f"echo bad > {path} && echo written; mount -o remount,rw / && echo remounted")
        assert "written" not in told and "remounted" not in told


async def test_the_user_sees_nothing_of_the_agent(lab: Lab) -> None:
    machine = await lab.start()
    for command in (
        "ls /opt/rds",
        "cat /opt/rds/agent/__main__.py",
        "ls /run/agent",
        "kill -9 1",
        "head -c 1 /proc/1/mem",
        "ls /proc/1/cwd/",
        "ls /proc/1/root/",
        "echo > /proc/1/fd/1",
        "chroot / true",
        "unshare -U true && mount -t tmpfs x /workspace",
    ):
        assert await call(machine, f"({command}) > /dev/null 2>&1 && echo allowed", as_user=True) == "", command
    # gVisor lets everybody read the environment of everybody, so there is nothing in it.
    environment = await call(machine, "tr '\\0' '\\n' < /proc/1/environ", as_user=True)
    assert {line.split("=")[0] for line in environment.splitlines()} == {"HOME", "LANG", "PATH"}


async def test_a_link_in_place_of_the_socket_leads_nowhere(lab: Lab, tmp_path: Path) -> None:
    """The host must not be made to dial its own services."""
    victim = socket.socket(socket.AF_UNIX)
    with victim:
        path = f"/tmp/rds-victim-{os.getpid()}.sock"
        victim.bind(path)
        try:
            victim.listen()
            victim.setblocking(False)
            machine = await lab.start()
            await call(machine, f"rm /run/agent/agent.sock; ln -s {path} /run/agent/agent.sock")
            assert lab.files.runtime.joinpath("channel/agent.sock").is_symlink()
            with pytest.raises(EngineError):
                await machine.connect()
            with pytest.raises(BlockingIOError):
                victim.accept()
        finally:
            Path(path).unlink()


async def test_a_file_in_place_of_the_socket_is_refused(lab: Lab) -> None:
    machine = await lab.start()
    await call(machine, "rm /run/agent/agent.sock; echo > /run/agent/agent.sock")
    with pytest.raises(EngineError, match="something else"):
        await machine.connect()


async def test_what_the_guest_can_fill_is_bounded(lab: Lab) -> None:
    """The channel's directory and the console share one small file system of the VM's own."""
    machine = await lab.start()
    told = await call(
        machine, "cat /dev/zero > /run/agent/file; for i in $(seq 400); do echo > /run/agent/$i; done; true"
    )
    assert "No space left" in told
    free = os.statvfs(lab.files.runtime)
    assert free.f_blocks * free.f_frsize <= TMPFS_BYTES
    assert free.f_favail == 0 or free.f_bavail == 0
    await call(machine, "rm -f /run/agent/file /run/agent/[0-9]*; head -c 8M /dev/zero | tr '\\0' x > /proc/1/fd/1")
    assert lab.files.console_log.stat().st_size <= TMPFS_BYTES
    assert await call(machine, "echo fine") == "fine\n"


async def test_logs_of_a_running_guest_make_room_and_go_on(lab: Lab) -> None:
    machine = await lab.start()
    await call(machine, "head -c 1M /dev/zero | tr '\\0' x > /proc/1/fd/1")
    full = lab.files.console_log.stat().st_size
    runtime.trim_logs(lab.files)
    assert lab.files.console_log.stat().st_size < full
    await call(machine, "echo the end > /proc/1/fd/1")
    assert lab.files.console_log.read_bytes().endswith(b"xthe end\n")


async def test_a_full_workspace_is_full_for_this_guest_alone(lab: Lab) -> None:
    machine = await lab.start()
    told = await call(machine, "cat /dev/zero > /workspace/big; ls -s --block-size=1M /workspace/big", as_user=True)
    assert "No space left on device" in told
    assert lab.files.disk.stat().st_blocks * 512 <= lab.record.spec.disk_mb << 20
    assert await call(machine, "rm /workspace/big && echo x > /workspace/y && cat /workspace/y", as_user=True) == "x\n"


async def test_devices_and_setuid_files_made_in_the_workspace_do_nothing(lab: Lab) -> None:
    machine = await lab.start()
    await call(machine, "mknod /workspace/disk b 8 0; cp /usr/bin/id /workspace/id; chmod 4755 /workspace/id")
    assert "euid=0" not in await call(machine, "/workspace/id", as_user=True)
    assert os.statvfs(lab.files.workspace).f_flag & (os.ST_NOSUID | os.ST_NODEV) == os.ST_NOSUID | os.ST_NODEV


async def test_no_socket_of_the_host_can_be_dialled(lab: Lab) -> None:
    """The host puts a listening socket where the guest sees it: even then the guest may not connect."""
    machine = await lab.start()
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(lab.files.workspace, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{directory}/host.sock")
        finally:
            os.close(directory)
        listener.listen()
        (lab.files.workspace / "host.sock").chmod(0o777)
        dial = "import socket; socket.socket(socket.AF_UNIX).connect('/workspace/host.sock'); print('con' + 'nected')"
        assert "connected" not in await call(machine, f'python3 -c "{dial}" 2>&1')
