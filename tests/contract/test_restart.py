"""VMs outlive their manager: after a crash and after an orderly end, the next one finds them as they were."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from server_support import Dns, Server, eventually, new_server, tgz

TICKER = "while true; do date +%s%N > t && mv t tick; sleep 0.1; done"


@pytest.fixture(scope="module")
def mortal(directory: Path, dns: Dns) -> Iterator[Server]:
    """A server of this file's own, to be killed."""
    with new_server(directory, dns).running() as started:
        yield started


@pytest.mark.every_engine
def test_vms_are_adopted_after_a_crash(mortal: Server, engine: str) -> None:
    assert_adopted(mortal, engine, mortal.kill)


def test_vms_are_adopted_after_a_stop(mortal: Server, engine: str) -> None:
    assert_adopted(mortal, engine, mortal.stop)


def assert_adopted(mortal: Server, engine: str, end: Callable[[], object]) -> None:
    box, stopped = mortal.create(engine, allowIps=["172.16.0.1"], outboundInternet=True), mortal.create(engine)
    try:
        assert stopped.post("stop").status_code == 204
        box.output(f"nohup bash -c '{TICKER}' >/dev/null 2>&1 & echo $! > pid")
        box.output("while [ ! -e tick ]; do sleep 0.1; done")
        before, pid = box.look(), box.output("cat pid")
        end()
        mortal.start()
        after = box.look()
        assert after == before, "the same VM, the same boot"
        assert stopped.look()["state"] == "STOPPED"
        assert box.output("kill -0 $(cat pid) && cat pid") == pid
        first = box.output("cat tick")
        eventually(lambda: box.output("cat tick") != first, box.scale(5), "its background process runs on")
        assert box.ts("result.set(1)")["result"] == 1
        assert stopped.post("start").status_code == 204
    finally:
        box.delete()
        stopped.delete()
    assert mortal.traces() == []


def is_written(server: Server, input_: str) -> bool:
    """Without asking the server, which would write it for that."""
    with contextlib.closing(sqlite3.connect(f"file:{server.storage / 'rds.db'}?mode=ro", uri=True)) as database:
        return bool(database.execute("SELECT 1 FROM exec_log WHERE input = ?", (input_,)).fetchall())


def test_a_call_that_was_open_is_told_in_the_log(mortal: Server, engine: str) -> None:
    box = mortal.create(engine)
    try:
        broken: list[BaseException] = []

        def call() -> None:
            try:
                box.post("exec", {"cmd": "touch on; sleep 99"})
            except httpx.HTTPError as error:
                broken.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        eventually(lambda: "on" in box.output("ls"), box.scale(10), "the command runs")
        eventually(lambda: is_written(mortal, "touch on; sleep 99"), box.scale(10), "its beginning is on the disk")
        mortal.kill()
        caller.join()
        assert broken
        mortal.start()
        entries = mortal.http.get(f"{box.path}/exec-logs", params={"type": "exec"}).json()["entries"]
        interrupted = [entry for entry in entries if "sleep 99" in entry["input"]]
        assert interrupted and interrupted[0]["error"] == "interrupted", entries
        assert box.output("echo fine") == "fine\n"
    finally:
        box.delete()
    assert mortal.traces() == []


def test_a_call_that_is_open_when_the_server_is_stopped_is_answered(mortal: Server, engine: str) -> None:
    box = mortal.create(engine)
    try:
        answers: list[httpx.Response] = []
        caller = threading.Thread(target=lambda: answers.append(box.post("exec", {"cmd": "touch on; sleep 99"})))
        caller.start()
        eventually(lambda: "on" in box.output("ls"), box.scale(10), "the command runs")
        assert mortal.stop() == 0
        caller.join()
        mortal.start()
        assert answers[0].status_code == 503, answers
        assert answers[0].json()["code"] == "server_stopping" and answers[0].headers["retry-after"]
        assert box.look()["state"] == "RUNNING"
        eventually(lambda: "sleep" not in box.output("ps ax -o comm"), box.scale(10), "its process is gone")
    finally:
        box.delete()


@pytest.mark.every_engine
def test_what_was_acknowledged_survives_the_death_of_the_machine(mortal: Server, engine: str) -> None:
    box = mortal.create(engine)
    try:
        files = {f"uploaded-{number}": bytes([number]) * (1 + number * 100_000) for number in range(4)}
        box.output("echo synced > written && sync written")
        assert box.upload(tgz(files)).status_code == 204
        for group in Path("/sys/fs/cgroup").rglob(f"{box.id}/cgroup.procs"):
            for pid in group.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        eventually(lambda: box.look()["state"] == "ERROR", box.scale(10), "its death is noticed")
        assert box.seen["reason"] in ("killed", "ended")
        assert box.post("start").status_code == 204
        found = box.fetch("/workspace")
        assert [name for name, content in files.items() if found.get(f"./{name}") != content] == [], list(found)
        assert box.output("cat written") == "synced\n"
    finally:
        box.delete()


def test_sessions_and_keys_survive(mortal: Server) -> None:
    with httpx.Client(base_url=mortal.url, timeout=60) as browser:
        browser.post("/auth/login", json={"email": "admin@localhost", "password": "admin"}).raise_for_status()
        secret = browser.post("/v1/admin/api-keys", json={"name": "lasting"}).json()["secret"]
        token = browser.cookies["rds_session"]
    mortal.kill()
    mortal.start()
    assert httpx.get(mortal.url + "/v1/vms", headers={"Cookie": f"rds_session={token}"}, timeout=60).status_code == 200
    assert httpx.get(mortal.url + "/v1/vms", headers={"X-API-Key": secret}, timeout=60).status_code == 200


def test_half_made_vms_are_cleaned_up(mortal: Server, engine: str) -> None:
    def create() -> None:
        try:
            mortal.create(engine)
        except (httpx.HTTPError, AssertionError):
            return

    makers = [threading.Thread(target=create) for _ in range(3)]
    for maker in makers:
        maker.start()
    eventually(lambda: any((mortal.storage / "vms").glob("*/*")), 20, "a VM is being made")
    mortal.kill()
    for maker in makers:
        maker.join()
    mortal.start()
    for vm in mortal.http.get("/v1/vms").json():
        assert vm["state"] in ("RUNNING", "ERROR", "STOPPED"), vm
        assert mortal.http.delete(f"/v1/vms/{vm['id']}").status_code == 204
    assert mortal.http.post("/v1/admin/reconcile").json()["remaining"] == []  # answers once all is cleaned up
    assert mortal.traces() == []
