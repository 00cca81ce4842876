"""The first program of a virtual machine: loads drivers, mounts the read-only root and hands over to the agent.

It contains no secret and nothing that differs between two VMs: identity arrives later, over the agent's channel.
"""

from __future__ import annotations

from collections.abc import Mapping

from rundatsheesh.manager.host import cpio
from rundatsheesh.manager.model import GATEWAY

# Replaced per VM by the agent; the root is read-only, so each is a file in /run that is bound over the image's own.
IDENTITY_FILES = ("hostname", "hosts", "machine-id", "resolv.conf")

INIT = """\
#!/bin/busybox sh
# PID 1 until the agent takes over. `set -e`: a step that fails ends init, which panics the kernel, which the host sees.
set -e
b=/bin/busybox
$b mount -t devtmpfs -o nosuid,noexec dev /dev
# hidepid: the user sees its own processes only.
$b mount -t proc -o nosuid,nodev,noexec,hidepid=invisible proc /proc
{insmod}
$b mount -t erofs -o ro,nodev /dev/vda /root
$b mount -o move /dev /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts -o nosuid,noexec,ptmxmode=0666 devpts /root/dev/pts
$b mount -t tmpfs -o nosuid,nodev,mode=1777,size=20% tmpfs /root/dev/shm
$b mount -t tmpfs -o nosuid,nodev,mode=1777,size=40% tmpfs /root/tmp
$b mount -t tmpfs -o nosuid,nodev,mode=1777,size=20% tmpfs /root/var/tmp
$b mount -t tmpfs -o nosuid,nodev,mode=0755,size=5% tmpfs /root/run
$b ifconfig lo 127.0.0.1 up
$b mount -t sysfs -o nosuid,nodev,noexec sys /root/sys
# What was in use within the last second is not reclaimed. Without it a process that takes all memory is not killed: the
# kernel would for minutes rather read everybody's programs from the disk again and again.
echo 1000 > /root/sys/kernel/mm/lru_gen/min_ttl_ms
$b mount -o remount,ro,nosuid,nodev,noexec /root/sys
# A user namespace would give the guest's user capabilities inside it; the rest tells it nothing of the kernel.
echo 0 > /proc/sys/user/max_user_namespaces
echo 1 > /proc/sys/kernel/dmesg_restrict
echo 2 > /proc/sys/kernel/kptr_restrict
echo 1 > /proc/sys/kernel/unprivileged_bpf_disabled
echo 2 > /proc/sys/kernel/perf_event_paranoid
$b mkdir -p -m 0700 /root/run/agent
$b mkdir -m 0755 /root/run/identity
for file in {identity}; do
  $b cp /root/etc/$file /root/run/identity/$file
  $b mount -o bind /root/run/identity/$file /root/etc/$file
done
echo "nameserver {gateway}" > /root/etc/resolv.conf
$b mount -t tmpfs -o nosuid,nodev,mode=0700,size=16m tmpfs /root/opt/rds
$b cp -r /agent /root/opt/rds/agent
$b mount -o remount,ro,nosuid,nodev /root/opt/rds
$b mount -o move /proc /root/proc
exec $b switch_root /root {command}
"""

# -I and -S: nothing but the standard library and the agent itself is imported, whatever the environment says.
AGENT_COMMAND = "/usr/bin/python3 -I -S /opt/rds/agent/__main__.py --engine qemu --port /dev/vport0p1"


def base_initrd(busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """A cpio archive of init, its one tool and the drivers, which are loaded in the order of `modules`.

    What is appended to it must bring `/agent`.
    """
    entries = [cpio.directory(path) for path in ("bin", "dev", "proc", "root", "modules")]
    entries.append(cpio.file("bin/busybox", busybox, 0o755))
    entries += [cpio.file(f"modules/{name}.ko", content) for name, content in modules.items()]
    entries.append(cpio.file("init", init_script(tuple(modules)).encode(), 0o755))
    return cpio.archive(entries)


def init_script(modules: tuple[str, ...]) -> str:
    insmod = "\n".join(f"$b insmod /modules/{name}.ko" for name in modules)
    return INIT.format(insmod=insmod, identity=" ".join(IDENTITY_FILES), gateway=GATEWAY, command=AGENT_COMMAND)
