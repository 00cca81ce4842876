"""The lines that the manager itself writes into the logs of engines."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rundatsheesh.manager import vms_notes
from rundatsheesh.manager.engines import logs
from rundatsheesh.manager.engines.base import Exit
from rundatsheesh.manager.errors import EngineError
from rundatsheesh.manager.model import EgressPolicy, Isolation, ProvisionMode, Slot, State, VmRecord, VmSpec, now

LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z manager: (.*)\n")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (tmp_path / "storage").mkdir()
    (tmp_path / "runtime").mkdir()
    return tmp_path / "storage/engine.log"


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tmp_path / "runtime/engine.log"


def record(state: State = State.CREATING) -> VmRecord:
    spec = VmSpec(cpu=2, mem_mb=512, disk_mb=64, policy=EgressPolicy(), engine="gvisor", image_id="default")
    return VmRecord(
        id="vm-0123456789abcdef",
        node_id="node",
        slot=Slot(300),
        spec=spec,
        state=state,
        isolation=Isolation.APPLICATION_KERNEL,
        provision_mode=ProvisionMode.BOOT,
        boot_id=None,
        reason=None,
        created_at=now(),
        started_at=None,
    )


def test_a_line_goes_to_the_log_of_a_running_guest_and_stays(kept: Path, live: Path) -> None:
    logs.open_log(kept, live)
    assert logs.note(kept, "started")
    with live.open("ab") as engine:
        engine.write(b"the engine's own\n")
    logs.settle_log(kept, live)
    assert logs.note(kept, "stopped")
    first, own, last = kept.read_bytes().splitlines(keepends=True)
    assert (LINE.fullmatch(first)[1], own, LINE.fullmatch(last)[1]) == (b"started", b"the engine's own\n", b"stopped")  # type: ignore[index]


def test_the_log_of_a_guest_whose_file_system_is_gone(kept: Path, live: Path) -> None:
    logs.open_log(kept, live)
    live.unlink()
    assert logs.note(kept, "ended") and not kept.is_symlink() and not live.exists()
    assert LINE.fullmatch(kept.read_bytes())


def test_nothing_is_followed_or_waited_for_in_the_engines_directory(kept: Path, live: Path) -> None:
    target = live.with_name("target")
    target.write_bytes(b"untouched")
    logs.open_log(kept, live)
    live.unlink()
    live.symlink_to(target)
    assert not logs.note(kept, "ended") and target.read_bytes() == b"untouched"
    live.unlink()
    os.mkfifo(live)
    assert not logs.note(kept, "ended")


def test_notes_are_bounded_and_need_no_directory(kept: Path) -> None:
    kept.write_bytes(b"x" * (logs.TRIM_BYTES + 1))
    assert logs.note(kept, "again")
    assert kept.stat().st_size < logs.KEEP_BYTES + 100
    assert not logs.note(kept.parent / "gone/engine.log", "again")


def test_what_a_start_says() -> None:
    said = "started in 12 ms: engine gvisor (application-kernel), boot, cpu 2, memory 512 MiB"
    assert vms_notes.started(record(), 12) == said
    assert vms_notes.started(record(State.WARM), 12) == said.replace(" ms", " ms, to be kept warm", 1)
    failed = vms_notes.not_started(EngineError("/srv/secret: no such file"), 12)
    assert failed == "did not start, given up after 12 ms: engine_error"


def test_what_an_end_says() -> None:
    vm = record()
    assert vms_notes.ended("ended_unattended", vm, None) == "ended: ended_unattended, memory 512 MiB"
    ended = Exit("out_of_memory", 137, "/srv/secret", oom_kills=3, memory_peak=600 << 20)
    assert vms_notes.ended("out_of_memory", vm, ended) == (
        "ended: out_of_memory, exit status 137, memory 512 MiB, with its engine at most 600 MiB in use, "
        "processes killed for lack of memory: 3"
    )
    assert "by signal 9" in vms_notes.ended("killed", vm, replace(ended, status=-9))
