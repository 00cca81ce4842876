"""Where packets and names may go, seen from bash, Deno and Node.js inside the VM."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from world import PORT, World, listening, open_world

from server_support import Box, Dns, Server

NewVm = Callable[..., Box]
GATEWAY = "172.16.0.1"
AT_ONCE = 1.0  # seconds until a refusal is known


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world() as opened:
        yield opened


def fetch_with(box: Box, tool: str, url: str) -> tuple[bool, float]:
    """Whether the world answers, and the seconds until that was known inside."""
    if tool == "curl":
        command = f"s=$(date +%s%N); curl -sS -m 20 {url} || true; echo; echo $((($(date +%s%N) - s) / 1000000))"
        *body, took = box.output(command).splitlines()
        return "hello from the world" in body, int(took) / 1000
    code = f"""const s = Date.now();
        const said = await fetch("{url}", {{ signal: AbortSignal.timeout(20000) }}).then((r) => r.text(), () => "");
        result.set([said, Date.now() - s]);"""
    if tool == "node":
        code = f"(async () => {{ {code} }})()"
    said, took = (box.ts(code) if tool == "deno" else box.js(code))["result"]
    return said == "hello from the world", took / 1000


def reaches(box: Box, address: str, tool: str = "curl") -> bool:
    """A refusal has to be known at once."""
    answered, took = fetch_with(box, tool, f"http://{address}:{PORT}/")
    assert answered or took < box.promised(AT_ONCE), f"{address} refused only after {took} s"
    return answered


@pytest.fixture(scope="module")
def narrow(server: Server, engine: str, world: World) -> Iterator[Box]:
    """May reach one address of the world."""
    made = server.create(engine, allowIps=[world.allowed], outboundInternet=True)
    yield made
    made.delete()


@pytest.mark.every_engine
def test_only_the_listed_address_answers(narrow: Box, world: World) -> None:
    assert reaches(narrow, world.allowed)
    assert not reaches(narrow, world.other)


@pytest.mark.parametrize("tool", ["deno", "node"])
def test_interpreters_reach_the_listed_address_alone(narrow: Box, world: World, tool: str) -> None:
    assert reaches(narrow, world.allowed, tool)
    assert not reaches(narrow, world.other, tool)


@pytest.mark.every_engine
def test_nothing_is_reached_without_outbound_internet(vm: NewVm, world: World) -> None:
    box = vm(allowIps=[world.allowed, GATEWAY], outboundInternet=False)
    with listening(GATEWAY):
        for address in (*world.addresses, GATEWAY):
            assert not reaches(box, address), address
    assert box.exec("getent hosts example.com")["exitCode"] != 0
    assert box.ts('await fetch("http://example.com/")')["error"]["name"] == "NotCapable"


def test_networks(vm: NewVm, world: World) -> None:
    box = vm(allowIps=[f"{world.router}/31", f"{world.allowed}/31"], outboundInternet=True)
    assert reaches(box, world.allowed) and reaches(box, world.other)
    assert not reaches(box, world.named)


def test_everything_means_the_public_internet_only(vm: NewVm, world: World) -> None:
    box = vm(allowIps=["0.0.0.0/0"], outboundInternet=True)
    assert reaches(box, world.allowed) and reaches(box, world.other)
    with listening(GATEWAY):
        for address in (world.private, world.metadata, GATEWAY, "127.0.0.1", world.router):
            assert not reaches(box, address), address


def test_private_ranges_open_by_an_entry_inside_them(vm: NewVm, world: World) -> None:
    assert reaches(vm(allowIps=["10.177.0.0/16"], outboundInternet=True), world.private)


def test_metadata_is_refused_even_by_name(vm: NewVm, world: World) -> None:
    box = vm(allowIps=["169.254.169.254/32", "169.254.0.0/16"], outboundInternet=True)
    assert not reaches(box, world.metadata)


def test_the_hosts_listeners_answer_only_when_listed(vm: NewVm, narrow: Box) -> None:
    box = vm(allowIps=["172.16.0.1/32"], outboundInternet=True)
    with listening(GATEWAY):
        assert reaches(box, GATEWAY)
        assert not reaches(narrow, GATEWAY)


def test_vms_do_not_reach_each_other(vm: NewVm) -> None:
    everything = {"allowIps": ["0.0.0.0/0", "172.16.0.0/12"], "outboundInternet": True}
    one, other = vm(**everything), vm(**everything)
    other.output(f"nohup python3 -m http.server {PORT} >/dev/null 2>&1 & disown")
    other.output(f"for i in $(seq 100); do curl -s localhost:{PORT} > /dev/null && exit; sleep 0.1; done; exit 1")
    assert not reaches(one, other.ip)
    assert one.exec(f"curl -sS -m 5 http://{other.ip}:{PORT}/")["exitCode"] == 7


def test_the_server_itself_is_not_reached(server: Server, vm: NewVm) -> None:
    box = vm(allowIps=["0.0.0.0/0", "127.0.0.0/8", "172.16.0.1"], outboundInternet=True)
    port = server.url.rsplit(":", 1)[1]
    for address in ("127.0.0.1", GATEWAY):
        assert box.exec(f"curl -sS -m 5 http://{address}:{port}/health")["exitCode"] != 0


def test_ipv6_is_refused(vm: NewVm) -> None:
    box = vm(allowIps=["0.0.0.0/0"], outboundInternet=True)
    begun = time.monotonic()
    assert box.exec("curl -sS -m 20 -6 'http://[2001:db8::1]/'")["exitCode"] != 0
    assert time.monotonic() - begun < box.promised(5)


@pytest.mark.every_engine
def test_names(vm: NewVm, world: World, dns: Dns) -> None:
    dns.zone.update({name: (60, [world.named]) for name in ("ok.example.org", "a.wild.example.org", "no.example.org")})
    box = vm(allowIps=[], allowDomains=["ok.example.org", "*.wild.example.org"], outboundInternet=True)
    assert box.seen["allowDomains"] == ["ok.example.org", "*.wild.example.org"]
    assert not reaches(box, world.named), "closed until a name was asked for"
    assert reaches(box, "ok.example.org")
    assert reaches(box, "a.wild.example.org")
    assert reaches(box, world.named), "open while the answer lives"
    dns.asked.clear()
    for name in ("no.example.org", "wild.example.org", "secret.in.a.name.example.net", "example.org"):
        assert box.exec(f"getent ahostsv4 {name}")["exitCode"] != 0, name
    assert dns.asked == [], "refused on the host; nothing was asked elsewhere"


def test_a_name_opens_nothing_private(vm: NewVm, world: World, dns: Dns) -> None:
    dns.zone["rebind.example.org"] = (60, [world.private])
    dns.zone["meta.example.org"] = (60, [world.metadata])
    dns.zone["home.example.org"] = (60, [GATEWAY])
    box = vm(allowDomains=["*.example.org"], outboundInternet=True)
    with listening(GATEWAY):
        for name in ("rebind.example.org", "meta.example.org", "home.example.org"):
            assert box.exec(f"curl -sS -m 10 http://{name}:{PORT}/")["exitCode"] != 0, name
        assert not reaches(box, world.private) and not reaches(box, GATEWAY)


def test_names_resolve_when_the_public_internet_is_open(vm: NewVm, world: World, dns: Dns) -> None:
    dns.zone["any.example.com"] = (60, [world.named])
    box = vm(allowIps=["0.0.0.0/0"], outboundInternet=True)
    assert box.output("getent ahostsv4 any.example.com | head -1 | cut -d' ' -f1").strip() == world.named
    closed = vm(allowIps=[world.named], outboundInternet=True)
    assert closed.exec("getent ahostsv4 any.example.com")["exitCode"] != 0


def test_the_policy_is_in_force_after_a_restart_of_the_vm(vm: NewVm, world: World) -> None:
    box = vm(allowIps=[world.allowed], outboundInternet=True)
    assert box.post("stop").status_code == 204 and box.post("start").status_code == 204
    assert reaches(box, world.allowed) and not reaches(box, world.other)
