"""What runsc is told about a guest: pure values in, the OCI runtime configuration (a JSON object) out.

Paths of sources are those of the private mount namespace in which runsc runs, see gvisor_files.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from rundatsheesh.manager.model import GATEWAY, WORKSPACE, machine_id

AGENT_ARGV = ("/usr/bin/python3", "-I", "-S", "/opt/rds/agent/__main__.py", "--engine", "gvisor")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What the agent, uid 0 in the guest, needs: to become the user (SETUID, SETGID, SETPCAP), to end the user's processes
# (KILL), to write the user's files and hand them over (DAC_OVERRIDE, CHOWN). The user's processes get none of these.
AGENT_CAPABILITIES = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID")
AGENT_FILES = 65_536  # descriptors of the agent; it bounds those of its children itself

# Shares of the guest's memory that temporary files may take: together less than all of it.
TMP_SHARE = {"/tmp": 2, "/var/tmp": 8, "/dev/shm": 8}

# Identity files: name below /etc → bound read-only into the guest.
IDENTITY_FILES = ("hosts", "hostname", "resolv.conf", "machine-id")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where runsc finds what it shows to the guest."""

    image: str  # the guest's root directory
    workspace: str
    agent_parent: str  # a directory that holds the agent's package as `agent`
    channel: str  # the directory in which the agent's socket appears
    etc: str  # the identity files
    netns: str


def configuration(*, vm_id: str, cpu: int, mem_mb: int, cgroup: str, sources: Sources) -> dict[str, Any]:
    """The config.json of a bundle."""
    return {
        "ociVersion": "1.0.0",
        "hostname": vm_id,
        "root": {"path": sources.image, "readonly": True},
        "process": _agent_process(cpu),
        "mounts": [*_system_mounts(mem_mb), *_binds(sources)],
        "linux": {
            # The group exists and has its limits already; runsc joins it and shows the limits to the guest as the
            # size of its machine.
            "cgroupsPath": cgroup,
            "namespaces": [
                *({"type": kind} for kind in ("pid", "mount", "ipc", "uts")),
                {"type": "network", "path": sources.netns},
            ],
        },
    }


def identity_files(vm_id: str, guest_ip: IPv4Address) -> dict[str, str]:
    """Contents of IDENTITY_FILES."""
    return {
        "hosts": f"127.0.0.1 localhost\n{guest_ip} {vm_id}\n",
        "hostname": f"{vm_id}\n",
        "resolv.conf": f"nameserver {GATEWAY}\n",
        "machine-id": f"{machine_id(vm_id)}\n",
    }


def _agent_process(cpu: int) -> dict[str, Any]:
    """`cpu` is told to the agent too, because runsc shows two CPUs at least, whatever the limit is."""
    return {
        "user": {"uid": 0, "gid": 0},
        "args": [*AGENT_ARGV, "--cpus", str(cpu)],
        "env": [f"PATH={PATH}", "LANG=C.UTF-8"],
        "cwd": "/",
        "noNewPrivileges": True,
        "capabilities": {kind: list(AGENT_CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": AGENT_FILES, "hard": AGENT_FILES}],
    }


def _system_mounts(mem_mb: int) -> list[dict[str, Any]]:
    temporary = [
        {
            "destination": path,
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=1777", f"size={mem_mb * 1024 // share}k"],
        }
        for path, share in TMP_SHARE.items()
    ]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
        *temporary,
    ]


def _binds(sources: Sources) -> list[dict[str, Any]]:
    return [
        _bind(sources.workspace, WORKSPACE, "rw", "nosuid", "nodev"),
        # Through the parent, which only the guest's root may enter: the user does not read the agent.
        _bind(sources.agent_parent, "/opt/rds", "ro"),
        _bind(sources.channel, "/run/agent", "rw", "nosuid", "nodev", "noexec"),
        *(_bind(f"{sources.etc}/{name}", f"/etc/{name}", "ro") for name in IDENTITY_FILES),
    ]


def _bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}
