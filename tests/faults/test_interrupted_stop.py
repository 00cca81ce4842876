"""A stop that was cut short is finished as a stop: what a guest had in memory reaches its disk."""

from __future__ import annotations

import os
import signal

import httpx
import pytest
from lives import Lives

STOPPING_IS_RECORDED = 1  # the second step of a stop


@pytest.mark.parametrize("engine", ["gvisor", "qemu"])
def test_what_was_written_is_there_after_a_stop_that_was_cut_short(lives: Lives, engine: str) -> None:
    if engine == "qemu" and os.uname().machine != "x86_64":
        pytest.skip("the qemu engine runs on x86_64")
    vm_id = lives.create(engine=engine, memMb=256)["id"]
    lives.exec(vm_id, "echo written > file; sleep 1000 > /dev/null 2>&1 &")  # and nothing synced
    lives.arm(STOPPING_IS_RECORDED)
    with pytest.raises(httpx.HTTPError):
        lives.http.post(f"/v1/vms/{vm_id}/stop")
    assert lives.ended() == -signal.SIGKILL
    assert lives.steps()[-1] == "after Store.move"
    lives.live()
    shown = lives.get(vm_id)
    assert (shown["state"], shown["reason"]) == ("STOPPED", "interrupted")
    lives.http.post(f"/v1/vms/{vm_id}/start").raise_for_status()
    assert lives.exec(vm_id, "cat file") == "written\n"
    assert lives.get(vm_id)["bootId"] != shown["bootId"]
    lives.http.delete(f"/v1/vms/{vm_id}").raise_for_status()
    assert lives.leaks() == []
