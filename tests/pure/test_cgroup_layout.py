"""Which hierarchy a controller is taken from, over the mount tables of hosts as they are in the wild."""

from __future__ import annotations

from pathlib import Path

from rundatsheesh.manager.host.cgroup_layout import Layout, parse_layout
from rundatsheesh.manager.host.mounts import parse_mountinfo

V2_ONLY = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = """\
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:6 - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:7 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:8 - cgroup cgroup rw,memory
35 30 0:31 / /sys/fs/cgroup/pids rw,nosuid shared:9 - cgroup cgroup rw,pids
36 30 0:32 / /sys/fs/cgroup/freezer rw,nosuid - cgroup cgroup rw,freezer
37 30 0:33 / /sys/fs/cgroup/cpuset rw,nosuid - cgroup cgroup rw,cpuset
38 30 0:30 / /mnt/copy\\040of\\040memory rw,nosuid - cgroup cgroup rw,memory"""


def layout(mountinfo: str, v2_controllers: str = "") -> Layout:
    return parse_layout(parse_mountinfo(mountinfo), lambda mount: v2_controllers)


def test_a_host_with_v2_only() -> None:
    found = layout(V2_ONLY, "cpuset cpu io memory hugetlb pids rdma\n")
    assert found.v2 == Path("/sys/fs/cgroup")
    assert found.v2_controllers == {"cpu", "memory", "pids"}
    assert found.v1 == {}
    assert found.missing == ()


def test_a_hybrid_host_whose_v2_holds_no_controller() -> None:
    found = layout(HYBRID)
    base = Path("/sys/fs/cgroup")
    assert found.v2 == base / "unified"
    assert found.v1 == {
        "cpu": base / "cpu,cpuacct",
        "cpuacct": base / "cpu,cpuacct",
        "memory": base / "memory",  # the first of two mounts of the same hierarchy
        "pids": base / "pids",
        "freezer": base / "freezer",
        "name=systemd": base / "systemd",
    }
    assert found.missing == ()
    assert base / "cpuset" in found.every_mount
    assert Path("/mnt/copy of memory") in found.every_mount


def test_controllers_split_over_both_versions() -> None:
    without_pids = "\n".join(line for line in HYBRID.splitlines() if "pids" not in line)
    found = layout(without_pids, "pids")
    assert found.missing == ()
    assert found.v2_controllers == {"pids"}


def test_what_is_missing_is_named() -> None:
    assert layout(V2_ONLY, "cpu").missing == ("memory", "pids")
    assert layout("").missing == ("cpu", "memory", "pids", "freezer")
    v1_without_freezer = "\n".join(
        line for line in HYBRID.splitlines() if "freezer" not in line and "unified" not in line
    )
    assert layout(v1_without_freezer).missing == ("freezer",)
