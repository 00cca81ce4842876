"""QEMU's command line: what every machine has, and how a clone may differ from its template."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.manager.engines.qemu_args import Accelerator, Boot, Clone, Descriptors, Hardware, command

MAC = "02:fd:ac:10:01:02"
FILES = Descriptors(memory=10, root=11, console=12, qmp=13, agent=14, network=15, transfer=17, workspace=16)

hardware = st.builds(
    Hardware,
    cpu=st.integers(1, 64),
    mem_mb=st.integers(128, 1 << 20),
    accelerator=st.sampled_from(Accelerator),
    tsc_khz=st.integers(1, 10_000_000),
)


def option(argv: list[str], name: str) -> list[str]:
    """The values of an option that may be given several times."""
    return [value for key, value in itertools.pairwise(argv) if key == name]


@given(hardware, st.sampled_from([Boot(20, 21), Clone(22)]))
def test_every_machine_is_confined_and_no_path_but_proc_is_named(shape: Hardware, start: Boot | Clone) -> None:
    argv = command(shape, FILES, start, MAC)
    (sandbox,) = option(argv, "-sandbox")
    assert all(f"{name}=deny" in sandbox for name in ("obsolete", "elevateprivileges", "spawn", "resourcecontrol"))
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
    assert all(part.startswith(("/proc/self/fd/", "/dev/fdset/")) for word in argv for part in paths(word))
    assert option(argv, "-smp") == [str(shape.cpu)]
    assert option(argv, "-m") == [f"{shape.mem_mb}M"]


@given(hardware)
def test_a_clone_has_the_devices_of_its_template(shape: Hardware) -> None:
    template = command(shape, Descriptors(10, 11, 12, 13, 14, 15, 17, None), Boot(20, 21), MAC)
    clone = command(shape, FILES, Clone(22), MAC)
    for name in ("-device", "-M", "-cpu", "-smp", "-m", "-global", "-accel"):
        assert option(template, name) == option(clone, name)
    assert "share=on" in option(template, "-object")[0]
    assert "share=off" in option(clone, "-object")[0]


def test_a_clone_boots_nothing_and_a_boot_waits_for_nothing() -> None:
    shape = Hardware(1, 512, Accelerator.TCG, 2_500_000)
    assert not {"-kernel", "-initrd", "-append"} & set(command(shape, FILES, Clone(22), MAC))
    assert "-incoming" not in command(shape, FILES, Boot(20, 21), MAC)


@pytest.mark.parametrize("accelerator", Accelerator)
def test_the_kernel_knows_its_clock_and_ends_at_a_panic(accelerator: Accelerator) -> None:
    (line,) = option(command(Hardware(2, 512, accelerator, 2_596_132), FILES, Boot(20, 21), MAC), "-append")
    words = line.split()
    assert {"tsc_early_khz=2596132", "tsc=reliable", "panic=-1", "reboot=t", "ipv6.disable=1"} <= set(words)
    assert ("mitigations=off" in words) == (accelerator is Accelerator.TCG)


def test_hardware_virtualisation_is_used_where_it_is_there() -> None:
    argv = command(Hardware(1, 512, Accelerator.KVM, 1), FILES, Clone(22), MAC)
    assert option(argv, "-accel") == ["kvm"]
    assert option(argv, "-cpu") == ["host"]


def paths(word: str) -> list[str]:
    """The absolute paths in a list of key=value."""
    return [value for _, _, value in (part.partition("=") for part in f"={word}".split(",")) if value.startswith("/")]
