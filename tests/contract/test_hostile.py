"""Code that attacks from inside its VM fails, or harms only itself; the VM next door goes on at its usual pace."""

from __future__ import annotations

import io
import secrets
import socket
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from attacks import ESCAPES, FLOODS, OF_THE_ENGINE

from server_support import Box, Dns, Server, tgz

NewVm = Callable[..., Box]
DOMAIN = "tunnel.example.net"
FLOOD_MS = 1500
SWAP = """
import os
while not os.path.exists("stop"):
    for step in ((os.rename, "d", "d1"), (os.symlink, "/tmp", "d"), (os.unlink, "d"), (os.symlink, "/", "d"),
                 (os.unlink, "d"), (os.rename, "d1", "d")):
        try: step[0](*step[1:])
        except OSError: pass
"""


@pytest.fixture(scope="module")
def attacker(server: Server, engine: str) -> Iterator[Box]:
    """Has a network, but no address of it that anything in these tests has."""
    made = server.create(engine, allowIps=["203.0.113.0/24"], outboundInternet=True)
    yield made
    made.delete()


@pytest.fixture(scope="module")
def neighbour(server: Server, engine: str) -> Iterator[Box]:
    made = server.create(engine, allowIps=["203.0.113.0/24"], outboundInternet=True)
    made.exec("python3 -m http.server 7777 >/dev/null 2>&1 & echo")
    yield made
    made.delete()


@pytest.fixture(scope="module")
def marker() -> Iterator[str]:
    """Stands in the arguments of a process of the host."""
    word = f"marker-{secrets.token_hex(8)}"
    process = subprocess.Popen([sys.executable, "-c", "input()", word], stdin=subprocess.PIPE)
    yield word
    process.communicate(b"\n")


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    """A port of every address that the host has."""
    with socket.create_server(("0.0.0.0", 0)) as made:
        yield made.getsockname()[1]


def address_of_host() -> str:
    """One that others can reach it by, where it has one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def aimed(attack: str, **targets: object) -> str:
    return attack.format(gateway="172.16.0.1", domain=DOMAIN, **targets)


@pytest.fixture(scope="module")
def targets(attacker: Box, neighbour: Box, marker: str, listener: int) -> dict[str, object]:
    return {
        "other_vm": neighbour.ip,
        "host": address_of_host(),
        "host_port": listener,
        "marker": marker,
        "node": attacker.server.storage,
    }


def assert_fails(attacker: Box, attack: str, targets: dict[str, object], dns: Dns) -> None:
    done = attacker.exec(aimed(ESCAPES[attack], **targets), timeoutMs=120_000)
    assert (done["exitCode"], done["stdout"]) == (0, ""), (attack, done)
    assert not [name for name in dns.asked if name.endswith(DOMAIN)], "nothing of a name left the host"


@pytest.mark.parametrize("attack", ESCAPES)
def test_an_escape_fails(attacker: Box, targets: dict[str, object], dns: Dns, attack: str) -> None:
    assert_fails(attacker, attack, targets, dns)
    assert attacker.output("echo here") == "here\n"


@pytest.mark.every_engine
def test_escapes_fail_on_every_engine(attacker: Box, targets: dict[str, object], dns: Dns) -> None:
    for attack in OF_THE_ENGINE:
        assert_fails(attacker, attack, targets, dns)
    assert attacker.output("echo here") == "here\n"


@dataclass
class Pace:
    """How long the neighbour's calls take, each beside what goes on in the meantime."""

    box: Box
    seconds: list[float] = field(default_factory=list)

    def measure(self, calls: int) -> float:
        """The median of some calls."""
        return statistics.median([self._call() for _ in range(calls)])

    @contextmanager
    def during(self) -> Iterator[None]:
        over = threading.Event()

        def go_on() -> None:
            while not over.is_set():
                self.seconds.append(self._call())

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _call(self) -> float:
        begun = time.monotonic()
        assert self.box.output("echo fine") == "fine\n"
        return time.monotonic() - begun


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_stays_where_it_is(vm: NewVm, neighbour: Box, dns: Dns, flood: str) -> None:
    box = vm(allowIps=["203.0.113.0/24"], outboundInternet=True)
    pace = Pace(neighbour)
    usual = pace.measure(5)
    with pace.during():
        answer = box.post("exec", {"cmd": aimed(FLOODS[flood]), "timeoutMs": FLOOD_MS})
        answer_size = len(answer.content)
    assert answer.status_code in (200, 502), answer.text[:500]
    assert answer_size < 32 << 20
    slow = statistics.median(pace.seconds)
    usual = max(usual, pace.measure(5))  # what else this host does may have begun meanwhile
    print(f"{flood}: neighbour's call {usual * 1000:.0f} ms usually, {slow * 1000:.0f} ms meanwhile")
    assert slow < 2 * usual + box.promised(0.5), f"{usual:.3f} s usually, {slow:.3f} s beside {flood}"
    if answer.status_code == 502:
        assert box.post("start").status_code == 204
    assert box.output("echo here") == "here\n"
    assert not [name for name in dns.asked if name.endswith(DOMAIN)]


@pytest.mark.every_engine
def test_links_swapped_during_an_upload_lead_nowhere(vm: NewVm) -> None:
    """A loop exchanges a directory for a link to /tmp as fast as it can, while archives are put into it.

    In a VM of its own: gVisor's file system may be confused for good afterwards (a directory answers EBADF).
    """
    box = vm()
    box.output("mkdir -p race/d")
    box.exec(f"cd race && (timeout 20 python3 -c '{SWAP}') >/dev/null 2>&1 & echo")
    archive = tgz({f"d/planted{n}": b"x" for n in range(20)})
    statuses = {box.upload(archive, f"/workspace/race{way}").status_code for way in ("", "/d", "", "/d") * 3}
    box.output("touch race/stop")
    assert statuses <= {204, 400, 404, 409, 500}, statuses
    assert 500 not in statuses, "a race is the guest's doing, and told as a conflict"
    found = box.output("find / -name 'planted*' -not -path '/proc/*' -not -path '/workspace/*' 2>/dev/null || true")
    assert found == ""


def test_an_upload_replaces_links_instead_of_writing_through_them(attacker: Box) -> None:
    attacker.output("echo mine > /tmp/target; ln -s /tmp/target soft; echo kept > first; ln first second")
    assert attacker.upload(tgz({"soft": b"new", "second": b"new"})).status_code == 204
    assert attacker.output("cat /tmp/target first soft second") == "mine\nkept\nnewnew"
    attacker.output("rm -f soft first second /tmp/target")


def test_a_download_neither_follows_nor_waits(attacker: Box) -> None:
    attacker.output(
        "mkdir -p odd && cd odd && ln -s /etc/passwd passwd && ln -s / root && mkfifo pipe && echo x > file && "
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")'"
    )
    answer = attacker.download("/workspace/odd")
    assert answer.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as tar:
        members = {member.name.removeprefix("./"): member for member in tar}
        assert members["passwd"].issym() and members["root"].issym() and members["file"].isfile()
        assert not [name for name in members if name.startswith(("passwd/", "root/"))]
    assert attacker.download("/workspace/odd/pipe").status_code in (200, 400, 404)
    attacker.output("rm -rf odd")


def test_names_as_long_as_they_get(vm: NewVm) -> None:
    box = vm()  # after much else a directory this deep may answer EBADF in gVisor, and cannot be removed then
    deep = "import os\nfor n in range(12): os.mkdir('n' * 255); os.chdir('n' * 255)\nopen('x' * 255, 'w').write('end')"
    box.output(f'mkdir -p long && cd long && python3 -c "{deep}"')
    answer = box.download("/workspace/long")
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as tar:
            assert max(len(member.name) for member in tar) > 255 * 12
    box.output("rm -rf long")
    assert box.upload(tgz({"y" * 255: b"x"})).status_code == 204
    assert box.upload(tgz({"y" * 256: b"x"})).status_code == 400


def test_killing_everything_kills_the_call_alone(attacker: Box) -> None:
    for signal in ("KILL", "STOP"):
        done = attacker.exec(f"kill -{signal} -1; echo on", timeoutMs=int(max(1500, attacker.scale(300))))
        assert done["exitCode"] in (0, 137, 124), done
        assert attacker.output("echo here") == "here\n"
    assert attacker.ts("result.set(1)")["result"] == 1


def test_a_hole_of_a_petabyte_is_not_downloaded(attacker: Box) -> None:
    """Sparse files are as large as they say; what the guest may say is bounded by its file system."""
    attacker.output("truncate -s 20G hole && ls -s hole")
    with attacker.server.http.stream(
        "GET", f"{attacker.path}/files/download", params={"path": "/workspace/hole"}
    ) as answer:
        assert answer.status_code == 200
        received = 0
        for chunk in answer.iter_bytes():
            received += len(chunk)
            if received > 1 << 16:
                break
    attacker.output("rm -f hole")
    assert attacker.output("echo here") == "here\n"
