"""The files of one sandbox, and the small file tree that is all of the host that runsc gets to see.

    <runtime>/             see runtime.py
    ├── machine.json       the processes of the sandbox, runsc itself first
    ├── bundle/config.json
    ├── etc/               identity files of the guest
    ├── state/             runsc's
    ├── channel/           the guest's /run/agent, which the guest's root may write to
    ├── console.log        what the agent and runsc wrote
    └── root/              root of runsc's mount namespace: empty directories to bind onto

The guest can make three things grow without asking: the logs, files in the channel, and runsc's state. All are in the
tmpfs, so the kernel bounds them whether a manager runs or not; a guest that fills it harms itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rundatsheesh.manager.engines import oci, runtime
from rundatsheesh.manager.engines.base import VmFiles
from rundatsheesh.manager.engines.runtime import RuntimeFiles
from rundatsheesh.manager.host import mounts
from rundatsheesh.manager.host.mounts import Bind, Flag
from rundatsheesh.manager.host.namespaces import NETNS_DIRECTORY
from rundatsheesh.manager.host.process import ProcessRef
from rundatsheesh.manager.model import VmRecord

SOURCES = oci.Sources(
    image="/image",
    workspace="/workspace",
    agent_parent="/opt-rds",
    channel="/vm/channel",
    etc="/vm/etc",
    netns="/netns",
)
RUNSC = "/bin/runsc"
BUNDLE = "/vm/bundle"
STATE = "/vm/state"
ENGINE_LOG = "/vm/engine.log"
CONSOLE_EVIDENCE = 2000  # bytes of the log's end


@dataclass(frozen=True, slots=True)
class SandboxFiles(RuntimeFiles):
    @property
    def channel(self) -> Path:
        return self.runtime / "channel"

    @property
    def socket(self) -> Path:
        return self.channel / "agent.sock"


def prepare(record: VmRecord, files: VmFiles, cgroup: str) -> None:
    """Mount the runtime directory and fill it with all that runsc needs to start. Raises OSError."""
    runtime.prepare(files, Flag.NOSUID | Flag.NODEV | Flag.NOEXEC)
    for name in ("bundle", "etc", "state", "channel"):
        (files.runtime / name).mkdir(mode=0o700)
    config = oci.configuration(
        vm_id=record.id, cpu=record.spec.cpu, mem_mb=record.spec.mem_mb, cgroup=cgroup, sources=SOURCES
    )
    (files.runtime / "bundle/config.json").write_text(json.dumps(config))
    for name, text in oci.identity_files(record.id, record.slot.guest_ip).items():
        (files.runtime / "etc" / name).write_text(text)
        (files.runtime / "etc" / name).chmod(0o644)
    _make_root(SandboxFiles(files.runtime).root)


def private_tree(
    record: VmRecord, files: VmFiles, *, runsc: Path, image: Path, agent: Path, device: Path | None
) -> int:
    """A descriptor of runsc's mount namespace. Nothing but these files of the host exists in it, so neither runsc nor
    what may break out of it sees the rest, and no file system of another VM is kept busy by it. The image is read-only
    there by the kernel's word, whatever runsc does. Raises OSError."""
    binds = [
        Bind(Path("/proc"), "proc", recursive=True),
        Bind(Path("/sys/fs/cgroup"), "sys/fs/cgroup", recursive=True),
        Bind(Path("/dev/null"), "dev/null"),
        Bind(runsc.resolve(), "bin/runsc", read_only=True),
        Bind(image, "image", read_only=True),
        Bind(agent, "opt-rds/agent", read_only=True),
        Bind(NETNS_DIRECTORY / record.slot.netns, "netns"),
        Bind(files.workspace, "workspace"),
        Bind(files.runtime, "vm"),
    ]
    root = SandboxFiles(files.runtime).root
    if device is not None:
        (root / "dev" / device.name).touch()
        binds.append(Bind(device, f"dev/{device.name}"))
    # Kernels that show the host's socket buffer sizes in every network namespace make runsc refuse to use one.
    return mounts.private_namespace(root, binds, hidden=["proc/sys/net"])


def remove(files: VmFiles) -> None:
    """Keep the logs, then remove the runtime directory with all that is in it. Idempotent; the sandbox's processes must
    be gone."""
    runtime.keep_logs(files)
    runtime.remove(files)


def write_processes(files: VmFiles, processes: list[ProcessRef]) -> None:
    """Note the sandbox's processes, runsc itself first. Complete or not at all."""
    runtime.write_note(files, [[p.pid, p.start_time] for p in processes])


def read_processes(files: VmFiles) -> list[ProcessRef]:
    """What write_processes noted; empty when nothing was."""
    return [ProcessRef(pid, start_time) for pid, start_time in runtime.read_note(files) or ()]


def evidence(files: VmFiles) -> str:
    """The end of both logs."""
    return runtime.evidence(files, CONSOLE_EVIDENCE)


def _make_root(root: Path) -> None:
    for name in ("proc", "sys/fs/cgroup", "dev", "bin", "tmp", "image", "opt-rds/agent", "workspace", "vm"):
        (root / name).mkdir(parents=True)
    (root / "opt-rds").chmod(0o700)
    for name in ("dev/null", "bin/runsc", "netns"):
        (root / name).touch()
