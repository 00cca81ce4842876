"""File work on the host: what a worker can see and do, that nothing a guest does leads it out of its workspace, and
that nothing of it is left, whoever is killed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server_support import Box, Dns, Server, eventually, new_server, tgz

LARGE = 100 << 20
NEW_LARGE = f"head -c {LARGE} /dev/urandom > large"
NO_CAPABILITY = "0000000000000000"
DETOUR = "a transfer goes through the guest"  # in the log of a server that has no worker for it
# Exchanges a directory for links, and a file for a link, a fifo and a directory, as fast as it can.
SWAP = """
import os
outside = {outside!r}
os.makedirs("race/d", exist_ok=True)
os.chdir("race")
open("d/file", "w").write("inside")
def swap(*steps):
    for step, *names in steps:
        try: step(*names)
        except OSError: pass
while not os.path.exists("/workspace/stop"):
    for target in (outside, "/", "/proc/1/root" + outside, "../../../.." + outside, "/home/user"):
        swap((os.rename, "d", "d1"), (os.symlink, target, "d"), (os.unlink, "d"), (os.rename, "d1", "d"))
    swap((os.unlink, "f"), (os.symlink, outside + "/secret", "f"), (os.unlink, "f"), (os.mkfifo, "f"), (os.unlink, "f"),
         (os.mkdir, "f"), (os.rmdir, "f"), (os.link, "d/file", "f"))
"""


@pytest.fixture(scope="module")
def mortal(directory: Path, dns: Dns) -> Iterator[Server]:
    """A server of this file's own, to be killed."""
    with new_server(directory, dns).running() as started:
        yield started


@pytest.fixture(scope="module")
def box(mortal: Server) -> Iterator[Box]:
    made = mortal.create("gvisor")
    made.output(NEW_LARGE)
    yield made
    made.delete()


@pytest.fixture
def canary() -> Iterator[Path]:
    """A directory of the host that anybody may write to, with a file that anybody may read."""
    made = Path(tempfile.mkdtemp(prefix="rds-canary-", dir="/var/tmp"))
    made.chmod(0o777)
    (made / "secret").write_text("of the host")
    yield made
    assert [path.name for path in made.iterdir()] == ["secret"]
    assert (made / "secret").read_text() == "of the host"
    (made / "secret").unlink()
    made.rmdir()


def helpers() -> list[int]:
    """Helpers and their workers of all servers on this host."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"--outside" in words and words[0] != b"unshare":
                found.append(int(entry.name))
    return found


def workers(box: Box) -> list[int]:
    found = []
    for pid in helpers():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if box.id in Path(f"/proc/{pid}/cgroup").read_text():
                found.append(pid)
    return found


def waiting(box: Box) -> list[int]:
    """The workers that are confined and wait for something to do."""
    found = []
    for pid in workers(box):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seen = status(pid)
            if seen["Uid"].startswith("1000\t") and seen["CapPrm"] == NO_CAPABILITY and seen["State"][0] == "S":
                found.append(pid)
    return found


def helper_of(server: Server) -> int:
    """The one that is no worker: a child of the server's child."""
    return next(pid for pid in helpers() if parent(parent(pid)) == server.pid)


def parent(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(status(pid)["PPid"])
    return 0


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@contextlib.contextmanager
def stalled_download(box: Box, path: str = "/workspace/large") -> Iterator[tuple[int, Iterator[bytes]]]:
    """A download whose client has stopped to read: its worker, and the rest of what it would read."""
    request = box.server.http.stream("GET", f"{box.path}/files/download", params={"path": path})
    with request as answer:
        assert answer.status_code == 200
        pieces = answer.iter_raw(1 << 16)
        next(pieces)
        (worker,) = workers(box)
        yield worker, pieces


def gone(box: Box) -> None:
    eventually(lambda: not workers(box), 10, "the worker is gone")


def test_a_worker_is_nobody_and_sees_nothing(box: Box) -> None:
    with stalled_download(box) as (pid, _):
        seen = status(pid)
        assert {seen[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {NO_CAPABILITY}
        assert (seen["NoNewPrivs"], seen["Seccomp"], seen["Groups"]) == ("1", "2", "")
        assert {seen["Uid"], seen["Gid"]} == {"1000\t1000\t1000\t1000"}
        root = Path(f"/proc/{pid}/root")
        assert sorted(path.name for path in root.iterdir()) == ["home", "workspace"]
        assert [path.name for path in (root / "home").iterdir()] == ["user"]
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        assert sorted(mount[4] for mount in mounts) == ["/", "/workspace"]
        assert all({"nosuid", "nodev", "noexec"} <= set(mount[5].split(",")) for mount in mounts)
        assert next(mount for mount in mounts if mount[4] == "/")[5].startswith("ro,")
        for kind in ("net", "pid", "mnt", "ipc"):
            assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink(), kind
        assert Path(f"/proc/{pid}/net/dev").read_text().count(":") == 1, "loopback alone"
        links = {int(fd.name): str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert links.pop(0).startswith("socket:") and {links.pop(1), links.pop(2)} == {"/dev/null"}
        assert {link for link in links.values() if not link.startswith("/workspace")} == set()
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max processes             0 " in limits and "Max open files            64 " in limits
    gone(box)


def test_a_helper_holds_nothing_of_the_host(box: Box) -> None:
    pid = helper_of(box.server)
    assert sorted(path.name for path in Path(f"/proc/{pid}/root").iterdir()) == ["home", "workspace"]
    assert len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) == 1
    assert b"KEY" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_client_that_stops_reading_stops_the_worker_and_one_that_goes_ends_it(box: Box) -> None:
    with stalled_download(box) as (pid, _):
        (name,) = [fd.name for fd in Path(f"/proc/{pid}/fd").iterdir() if str(fd.readlink()) == "/workspace/large"]
        place = Path(f"/proc/{pid}/fdinfo/{name}")
        seen = [""]

        def rests() -> bool:
            seen.append(place.read_text().split()[1])
            return seen[-1] == seen[-2] and status(pid)["State"].startswith("S")

        eventually(rests, 10, "it waits")
        assert int(seen[-1]) < LARGE // 2
    gone(box)


def test_a_killed_worker_is_told_and_leaves_the_machine_as_it_was(box: Box) -> None:
    with stalled_download(box) as (pid, pieces):
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            for _ in pieces:
                continue
    whole = tgz({"file": os.urandom(1 << 20)})
    answer = upload_whose_worker_is_killed(box, whole)
    assert (answer.status_code, answer.json()["code"]) == (502, "guest_error"), answer.text
    assert "killed on the host" in answer.json()["message"]
    assert workers(box) == []
    assert box.output("ls killed 2>/dev/null; echo alive") == "alive\n"
    assert box.upload(whole, "/workspace/after").status_code == 204
    assert len(box.fetch("/workspace/after")["./file"] or b"") == 1 << 20
    assert not list((box.server.storage / "spool").iterdir())


def upload_whose_worker_is_killed(box: Box, whole: bytes) -> httpx.Response:
    """A worker that ends before the manager has heard of it is none, and the upload goes through the guest: whether the
    manager has, nobody but its log can tell."""

    def body() -> Iterator[bytes]:
        yield whole[: 1 << 19]
        eventually(lambda: waiting(box), 30, "a worker waits for the upload")
        os.kill(waiting(box)[0], signal.SIGKILL)
        yield whole[1 << 19 :]

    for _ in range(5):
        detours = box.server.log.read_text().count(DETOUR)
        answer = box.upload(body(), "/workspace/killed")
        if answer.status_code != 204 or box.server.log.read_text().count(DETOUR) == detours:
            return answer
        box.output("rm -r killed")
    return answer


def test_a_killed_helper_is_replaced(box: Box) -> None:
    before = helper_of(box.server)
    os.kill(before, signal.SIGKILL)
    assert box.upload(tgz({"a": b"1"}), "/workspace/helper").status_code == 204
    assert box.fetch("/workspace/helper")["./a"] == b"1"

    def is_replaced() -> bool:
        return any(pid != before and parent(parent(pid)) == box.server.pid for pid in helpers())

    eventually(is_replaced, 30, "another helper")


def test_more_at_once_than_there_may_be_workers(box: Box) -> None:
    box.output("mkdir -p many; for n in 1 2 3; do echo $n > many/$n; done")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: box.fetch("/workspace/many")["./2"], range(32)))
    assert set(found) == {b"2\n"}
    gone(box)


def test_a_deleted_machine_ends_its_workers(mortal: Server) -> None:
    other = mortal.create("gvisor")
    other.output(NEW_LARGE)
    with stalled_download(other) as (pid, pieces):
        other.delete()
        assert workers(other) == [] and not Path(f"/proc/{pid}").exists()
        with pytest.raises(httpx.HTTPError):
            for _ in pieces:
                continue
    assert [trace for trace in mortal.traces() if other.id in trace] == []


def test_odd_things_hang_nobody(box: Box) -> None:
    """A guest's own pipes and sockets exist inside the sandbox alone; those on the disk are made from outside here."""
    box.output("mkdir -p odd && cd odd && mkfifo inside && echo x > file && ln -s file link && ln -s loop loop")
    odd = box.server.storage / "vms" / box.id / "workspace" / "odd"
    os.mkfifo(odd / "fifo")
    os.mknod(odd / "sock", stat.S_IFSOCK | 0o666)
    os.mknod(odd / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    for name in ("fifo", "sock", "zero"):
        os.chown(odd / name, 1000, 1000)
    with tarfile.open(fileobj=io.BytesIO(box.download("/workspace/odd").content), mode="r:gz") as tar:
        assert {member.name for member in tar} == {".", "./file", "./link", "./loop"}
    assert box.download("/workspace/odd/inside").status_code == 404
    for name in ("fifo", "sock", "zero"):
        assert box.download(f"/workspace/odd/{name}").json()["code"] == "invalid_input", name
        assert box.upload(tgz({f"{name}/x": b""}), "/workspace/odd").json()["code"] == "path_conflict"
        assert box.upload(tgz({name: b"now a file"}), "/workspace/odd").status_code == 204
        assert box.output(f"cat odd/{name}") == "now a file"
    assert box.download("/workspace/odd/loop").status_code in (400, 404)


def test_links_mean_what_they_mean_inside(box: Box) -> None:
    box.output(
        "mkdir -p real && echo 1 > real/file && ln -sfn /home/user/real by-alias && ln -sfn /workspace/real by-name"
    )
    for name in ("by-alias", "by-name"):
        assert box.upload(tgz({name: b"2"}), f"/home/user/{name}").status_code == 204
        assert box.fetch(f"/workspace/{name}/file") == {"file": b"1\n"}
    assert box.output("cat real/by-alias real/by-name") == "22"


def test_no_race_leads_a_worker_out(mortal: Server, canary: Path) -> None:
    """The guest exchanges directories and files for links to a directory of the host while files go in and out."""
    box = mortal.create("gvisor")
    try:
        script = SWAP.format(outside=str(canary))
        assert box.upload(tgz({"swap.py": script.encode()})).status_code == 204
        box.exec("timeout 60 python3 swap.py > log 2>&1 & until [ -e race/d/file ]; do :; done")
        answers = [answer for _ in range(25) for answer in attempts(box)]
        assert [answer.text for answer in answers if answer.status_code not in (200, 204, 400, 404)] == []
        assert {200, 204} <= {answer.status_code for answer in answers}
        for answer in answers:
            if answer.status_code == 200:
                with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:gz") as tar:
                    contents = {tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
                # Where it was a link to /home/user, the whole workspace: the script and its empty log, too.
                assert contents <= {b"inside", b"planted", script.encode(), b""}
        box.output("touch stop")
        assert not Path("/planted").exists() and not Path("/home/user/planted").exists()
        gone(box)
    finally:
        box.delete()


def attempts(box: Box) -> Iterator[httpx.Response]:
    archive = tgz({"d/planted": b"planted", "planted": b"planted"})
    yield box.upload(archive, "/workspace/race")
    yield box.upload(tgz({"planted": b"planted"}), "/workspace/race/d")
    yield box.upload(tgz({"f": b"planted"}), "/workspace/race")
    for path in ("race", "race/d", "race/d/secret", "race/f"):
        yield box.download(f"/workspace/{path}")


def test_a_killed_server_takes_helper_and_workers_along(mortal: Server) -> None:
    """Last, for the server of the file is another one afterwards."""
    box = mortal.create("gvisor")
    box.output(NEW_LARGE)
    helper = helper_of(mortal)
    with contextlib.suppress(httpx.HTTPError), stalled_download(box) as (worker, pieces):
        uploading = threading.Thread(target=_upload_for_ever, args=(box,))
        uploading.start()
        eventually(lambda: len(waiting(box)) == 2, 30, "another worker waits for an upload")
        mortal.kill()
        uploading.join()
        for pid in (helper, worker):
            eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 10, f"{pid} is gone")
        for _ in pieces:
            continue
    gone(box)
    mortal.start()
    assert not list((mortal.storage / "spool").iterdir())
    assert mortal.http.get("/v1/admin/leaks").json()["leaks"] == []
    assert box.upload(tgz({"a": b"1"}), "/workspace/again").status_code == 204
    assert box.output("cat again/a") == "1"
    box.delete()
    assert [trace for trace in mortal.traces() if box.id in trace] == []


def _upload_for_ever(box: Box) -> None:
    whole = tgz({"file": os.urandom(1 << 20)})

    def body() -> Iterator[bytes]:
        yield whole[: 1 << 19]
        eventually(lambda: not box.server.is_running, 60, "the server is killed")
        yield whole[1 << 19 :]

    with contextlib.suppress(httpx.HTTPError):
        httpx.post(
            f"{box.server.url}{box.path}/files/upload",
            params={"dest": "/workspace/never"},
            content=body(),
            headers={"X-API-Key": "dev-key", "content-type": "application/gzip"},
            timeout=60,
        )
