"""Paths and rules, over everything that hypothesis can think of."""

from __future__ import annotations

import posixpath
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from api_support import make_settings
from hypothesis import given
from hypothesis import strategies as st

from rundatsheesh.manager.api import parse
from rundatsheesh.manager.api.schemas.vms import CreateVmBody, ShownState, VmView
from rundatsheesh.manager.errors import InvalidInput
from rundatsheesh.manager.model import HIDDEN, Isolation, ProvisionMode, State

SETTINGS = make_settings(Path("/tmp"), max_allow_ips=10)
SEGMENT = st.sampled_from(["a", ".", "..", "", "home", "user", "workspace", "é", " "])
PATHS = st.one_of(st.text(min_size=1, max_size=40), st.lists(SEGMENT, min_size=1).map("/".join).filter(bool))


@given(PATHS)
def test_a_parsed_path_is_inside_and_parsing_it_again_changes_nothing(path: str) -> None:
    try:
        inside = parse.guest_path(path, "cwd")
    except InvalidInput as error:
        assert error.code == "path_outside_workspace"
        return
    assert inside == "/workspace" or inside.startswith("/workspace/")
    assert posixpath.normpath(inside) == inside and ".." not in inside.split("/")
    assert parse.guest_path(inside, "cwd") == inside


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/workspace", "/workspace"),
        ("/workspace/", "/workspace"),
        ("/home/user/x", "/workspace/x"),
        ("//workspace//x/./y/../z", "/workspace/x/z"),
        ("src/main.ts", "/workspace/src/main.ts"),
        (".", "/workspace"),
        ("/home/user/../user/a", "/workspace/a"),
    ],
)
def test_names_of_the_workspace(path: str, inside: str) -> None:
    assert parse.guest_path(path, "cwd") == inside


@pytest.mark.parametrize(
    "path", ["/workspace/" + "x" * 256, "/home/user/" + "é" * 128, "a/" * 2045 + "a", "/workspace/" + "é/" * 1400]
)
def test_names_that_no_file_can_have(path: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse.guest_path(path, "dest")
    assert refused.value.code == "path_too_long"
    assert parse.guest_path("x" * 255, "dest") == "/workspace/" + "x" * 255


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_every_network_is_accepted_and_normalised(address: object, bits: int) -> None:
    body = CreateVmBody(cpu=1, memMb=128, allowIps=[str(address), f"{address}/{bits}"])
    assert parse.create_vm(body, SETTINGS).allow_ips == (
        IPv4Network(f"{address}/32"),
        IPv4Network(f"{address}/{bits}", strict=False),
    )


@given(st.text(max_size=64))
def test_any_other_text_is_refused_or_read_as_itself(entry: str) -> None:
    body = CreateVmBody.model_construct(cpu=1, mem_mb=128, allow_ips=[entry], allow_domains=[entry])
    try:
        parse.create_vm(body, SETTINGS)
    except InvalidInput as error:
        assert error.code == "egress_rule_invalid"


@given(st.text(max_size=64))
def test_a_domain_is_lower_case_ascii(entry: str) -> None:
    body = CreateVmBody.model_construct(cpu=1, mem_mb=128, allow_ips=[], allow_domains=[entry])
    try:
        (domain,) = parse.create_vm(body, SETTINGS).allow_domains
    except InvalidInput:
        return
    assert domain.isascii() and domain == domain.lower() and not domain.endswith(".")


def test_the_wire_s_words_are_the_model_s() -> None:
    def words(field: str) -> set[str]:
        return set(VmView.model_fields[field].annotation.__args__)  # type: ignore[union-attr]

    assert set(ShownState.__args__) == {state.value for state in State} - {state.value for state in HIDDEN}  # type: ignore[attr-defined]
    assert words("isolation") == {isolation.value for isolation in Isolation}
    assert words("provision_mode") == {mode.value for mode in ProvisionMode}
