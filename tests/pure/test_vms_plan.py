"""What a creation asks for, made concrete, on a host without an engine that starts anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from api_support import make_settings

from rundatsheesh.manager.errors import NotFound, Unavailable
from rundatsheesh.manager.model import CreateVm
from rundatsheesh.manager.vms import Images, Vms


def plan(directory: Path, default: str | None, wanted: str | None) -> str:
    """The image that is chosen; `known` exists besides the default."""
    host = SimpleNamespace(choose_engine=lambda _: SimpleNamespace(name="gvisor"), check_room=lambda: None)
    images = Images(lambda: default, lambda image_id: image_id in ("known", default))
    vms = Vms(make_settings(directory), cast(Any, None), cast(Any, host), images)
    return vms.plan(CreateVm(cpu=1, mem_mb=128, allow_ips=(), image_id=wanted))[0].image_id


@pytest.mark.parametrize(("wanted", "chosen"), [(None, "built"), ("default", "built"), ("known", "known")])
def test_the_default_image_unless_another_is_named(tmp_path: Path, wanted: str | None, chosen: str) -> None:
    assert plan(tmp_path, "built", wanted) == chosen


@pytest.mark.parametrize("wanted", [None, "default"])
def test_a_missing_default_image_is_the_hosts_trouble(tmp_path: Path, wanted: str | None) -> None:
    with pytest.raises(Unavailable) as refused:
        plan(tmp_path, None, wanted)
    assert refused.value.code == "not_ready" and refused.value.retry_after


def test_an_unknown_image_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as refused:
        plan(tmp_path, "built", "another")
    assert refused.value.code == "image_not_found"
