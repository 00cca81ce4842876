"""What a virtual machine consists of, as QEMU's command line: pure values in, argv out.

All files arrive as descriptors, so QEMU needs no right to any path. Boot and clone differ in where memory comes from
and in what is at the other end of the devices, never in the devices: a clone must be the template's machine exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

GUEST_MEMORY = "memory"
PROGRAM = "qemu-system-x86_64"

# Emulated: the oldest model that has all that x86-64-v2 binaries use. Newer ones are slower, for more is emulated.
# Without arat the kernel distrusts its timer, keeps ticking, and an idle guest takes 6 % of a core instead of 0.6.
EMULATED_CPU = "Nehalem-v1,+arat"
# QEMU would take a quarter of the guest's memory for translated code; 64 MiB hold what a busy interpreter needs.
TRANSLATION_MB = 64

# Found through ACPI. The kernel probes from the highest bus down, so that gives /dev/vport0p1, /dev/vda, vdb, vdc, vdd.
AGENT_BUS, ROOT_BUS, WORKSPACE_BUS, TRANSFER_BUS, NETWORK_BUS, ENTROPY_BUS, FRESH_BUS = 7, 6, 5, 4, 3, 2, 1

# As large as a disk can be: the template sees this size, its clones mount whatever file system is on their own disk.
PLACEHOLDER_BYTES = 1 << 46

# Nothing that a VM does needs a new process, another user, or a different priority.
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Accelerator(StrEnum):
    KVM = "kvm"
    TCG = "tcg"  # emulation


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a template and its clones have in common."""

    cpu: int
    mem_mb: int
    accelerator: Accelerator
    tsc_khz: int


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Numbers of open files that QEMU inherits."""

    memory: int  # read and write, `mem_mb` long
    root: int  # read only
    console: int  # for appending
    qmp: int  # listening sockets
    agent: int
    network: int  # a tap
    transfer: int  # read and write: a disk for what is on its way
    workspace: int | None  # read and write; None is a disk that is always empty
    fresh: int | None = None  # likewise: the workspace that a template mounts, or a copy of it as it was then

    def all(self) -> tuple[int, ...]:
        numbers = (self.memory, self.root, self.console, self.qmp, self.agent, self.network, self.transfer)
        return (*numbers, *(disk for disk in (self.workspace, self.fresh) if disk is not None))


@dataclass(frozen=True, slots=True)
class Boot:
    """Start the kernel. What it writes to memory is in the memory's file, which can be kept as a template."""

    kernel: int  # descriptors
    initrd: int


@dataclass(frozen=True, slots=True)
class Clone:
    """Go on where a template was stopped. What is written to memory from then on stays with the clone."""

    state: int  # descriptor


def command(hardware: Hardware, files: Descriptors, start: Boot | Clone, mac: str) -> list[str]:
    """QEMU's argv. A clone has the hardware address of its template until the guest is told its own."""
    shared = isinstance(start, Boot)
    return [
        PROGRAM,
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-sandbox", SANDBOX),
        *_machine(hardware, files.memory, shared),
        *_disks(files),
        *_channels(files),
        *_network(files.network, mac),
        # QEMU's own generator, seeded by the host's kernel.
        *("-object", "rng-builtin,id=entropy"),
        *("-device", f"virtio-rng-device,rng=entropy,{_bus(ENTROPY_BUS)}"),
        *_start(hardware, start),
    ]


def kernel_arguments(hardware: Hardware) -> str:
    """The guest kernel's command line. It is no secret: users may read it."""
    arguments = [
        "console=ttyS0 quiet",
        "rdinit=/init",
        # A panic or an oops ends the machine at once, by the only reset that this machine has.
        "panic=-1 oops=panic reboot=t",
        "ipv6.disable=1",
        # Without the frequency the kernel measures it against emulated timers, and hangs now and then; and its watchdog
        # takes a host that is busy for a clock that is broken.
        f"tsc_early_khz={hardware.tsc_khz} tsc=reliable no_timer_check nowatchdog rcupdate.rcu_cpu_stall_suppress=1",
        "8250.nr_uarts=1",
    ]
    if hardware.accelerator is Accelerator.TCG:
        arguments.append("mitigations=off")  # there is no speculation in an emulated CPU
    return " ".join(arguments)


def _machine(hardware: Hardware, memory: int, shared: bool) -> list[str]:
    # Eight virtio buses with interrupts of their own: with a second I/O APIC their numbers would meet those of the
    # timer and the serial port. pit, pic and rtc are for the kernel's start.
    machine = (
        f"microvm,acpi=on,ioapic2=off,pcie=off,pit=on,pic=on,rtc=on,isa-serial=on,x-option-roms=off,"
        f"auto-kernel-cmdline=off,memory-backend={GUEST_MEMORY},dump-guest-core=off,mem-merge=off"
    )
    backend = f"memory-backend-file,id={GUEST_MEMORY},size={hardware.mem_mb}M,mem-path=/proc/self/fd/{memory}"
    if hardware.accelerator is Accelerator.KVM:
        processor = ["-accel", "kvm", "-cpu", "host"]
    else:
        processor = ["-accel", f"tcg,tb-size={TRANSLATION_MB}", "-cpu", EMULATED_CPU]
    return [
        *("-M", machine),
        *processor,
        *("-smp", str(hardware.cpu)),
        *("-m", f"{hardware.mem_mb}M"),
        *("-object", f"{backend},share={'on' if shared else 'off'}"),
        *("-global", "virtio-mmio.force-legacy=false"),
    ]


def _disks(files: Descriptors) -> list[str]:
    arguments = [
        *_add_file(files.root, 1),
        *("-blockdev", "driver=file,node-name=root,filename=/dev/fdset/1,read-only=on"),
        *("-device", f"virtio-blk-device,drive=root,{_bus(ROOT_BUS)}"),
    ]
    return [
        *arguments,
        *_own_disk(files.workspace, 2, "workspace", WORKSPACE_BUS),
        *_add_file(files.transfer, 4),
        *("-blockdev", "driver=file,node-name=transfer,filename=/dev/fdset/4"),
        *("-device", f"virtio-blk-device,drive=transfer,{_bus(TRANSFER_BUS)}"),
        *_own_disk(files.fresh, 5, "fresh", FRESH_BUS),
    ]


def _own_disk(descriptor: int | None, number: int, name: str, bus: int) -> list[str]:
    device = ["-device", f"virtio-blk-device,drive={name},{_bus(bus)}"]
    if descriptor is None:
        placeholder = f"driver=null-co,node-name={name},size={PLACEHOLDER_BYTES},read-zeroes=on"
        return ["-blockdev", placeholder, *device]
    file = f"driver=file,node-name={name},filename=/dev/fdset/{number},discard=unmap"
    return [*_add_file(descriptor, number), "-blockdev", file, *device]


def _channels(files: Descriptors) -> list[str]:
    return [
        *_add_file(files.console, 3),
        *("-chardev", "file,id=console,path=/dev/fdset/3,append=on"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={files.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=agent,fd={files.agent},server=on,wait=off"),
        *("-device", f"virtio-serial-device,id=ports,max_ports=2,{_bus(AGENT_BUS)}"),
        *("-device", "virtserialport,bus=ports.0,nr=1,chardev=agent,name=agent"),
    ]


def _network(tap: int, mac: str) -> list[str]:
    return [
        *("-netdev", f"tap,id=network,fd={tap},vhost=off"),
        *("-device", f"virtio-net-device,netdev=network,mac={mac},{_bus(NETWORK_BUS)}"),
    ]


def _start(hardware: Hardware, start: Boot | Clone) -> list[str]:
    if isinstance(start, Clone):
        return ["-incoming", "defer"]  # its state is read on command
    return [
        *("-kernel", f"/proc/self/fd/{start.kernel}"),
        *("-initrd", f"/proc/self/fd/{start.initrd}"),
        *("-append", kernel_arguments(hardware)),
    ]


def _add_file(descriptor: int, number: int) -> list[str]:
    return ["-add-fd", f"fd={descriptor},set={number}"]


def _bus(number: int) -> str:
    return f"bus=virtio-mmio-bus.{number}"
