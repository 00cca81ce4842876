"""The configuration that runsc gets: what the guest may do is decided here, so every line that matters is checked."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.manager.engines import oci
from rundatsheesh.manager.model import machine_id

SOURCES = oci.Sources("/image", "/workspace", "/opt-rds", "/vm/channel", "/vm/etc", "/netns")


def configuration(mem_mb: int = 256) -> dict[str, Any]:
    return oci.configuration(vm_id="vm-0011223344556677", cpu=1, mem_mb=mem_mb, cgroup="/rds/vm", sources=SOURCES)


def mounts(mem_mb: int = 256) -> dict[str, dict[str, Any]]:
    return {mount["destination"]: mount for mount in configuration(mem_mb)["mounts"]}


def test_the_agent_gains_no_privilege_and_hands_none_on() -> None:
    process = configuration()["process"]
    assert process["noNewPrivileges"] is True
    assert set(process["capabilities"]) == {
        "bounding",
        "effective",
        "permitted",
    }  # nothing inheritable, nothing ambient
    for capabilities in process["capabilities"].values():
        assert set(capabilities) == set(oci.AGENT_CAPABILITIES)
    assert "CAP_SYS_ADMIN" not in oci.AGENT_CAPABILITIES
    assert "CAP_NET_ADMIN" not in oci.AGENT_CAPABILITIES


def test_python_reads_no_environment_and_no_site_directory() -> None:
    assert {"-I", "-S"} <= set(configuration()["process"]["args"])


def test_the_agent_is_told_the_number_of_cpus() -> None:
    args = configuration()["process"]["args"]
    assert args[args.index("--cpus") + 1] == "1"


def test_only_three_kinds_of_places_are_writable() -> None:
    config = configuration()
    assert config["root"] == {"path": "/image", "readonly": True}
    writable = {d for d, m in mounts().items() if m["type"] == "bind" and "rw" in m["options"]}
    assert writable == {"/workspace", "/run/agent"}
    temporary = {d for d, m in mounts().items() if m["type"] == "tmpfs"}
    assert temporary == {"/tmp", "/var/tmp", "/dev/shm"}
    for bind in (m for m in mounts().values() if m["type"] == "bind"):
        assert ("ro" in bind["options"]) != ("rw" in bind["options"])


@given(st.integers(min_value=128, max_value=1 << 20))
def test_temporary_files_fit_into_the_memory_together(mem_mb: int) -> None:
    sizes = [
        next(int(option[5:-1]) for option in mount["options"] if option.startswith("size="))
        for mount in mounts(mem_mb).values()
        if mount["type"] == "tmpfs"
    ]
    assert all(size > 0 for size in sizes)
    assert sum(sizes) < mem_mb * 1024


def test_every_namespace_is_its_own_and_the_network_is_the_given_one() -> None:
    namespaces = {n["type"]: n.get("path") for n in configuration()["linux"]["namespaces"]}
    assert namespaces == {"pid": None, "mount": None, "ipc": None, "uts": None, "network": "/netns"}


@pytest.mark.parametrize("name", oci.IDENTITY_FILES)
def test_identity_files_are_bound_read_only(name: str) -> None:
    bind = mounts()[f"/etc/{name}"]
    assert bind["source"] == f"/vm/etc/{name}"
    assert "ro" in bind["options"]


def test_identity_names_the_vm_and_the_resolver() -> None:
    files = oci.identity_files("vm-0011223344556677", IPv4Address("172.16.3.7"))
    assert set(files) == set(oci.IDENTITY_FILES)
    assert files["resolv.conf"] == "nameserver 172.16.0.1\n"
    assert files["hosts"].splitlines() == ["127.0.0.1 localhost", "172.16.3.7 vm-0011223344556677"]
    assert files["hostname"] == "vm-0011223344556677\n"


@given(st.text(), st.text())
def test_machine_ids_are_well_formed_stable_and_differ(first: str, second: str) -> None:
    assert len(machine_id(first)) == 32
    assert int(machine_id(first), 16) >= 0
    assert (machine_id(first) == machine_id(second)) == (first == second)
