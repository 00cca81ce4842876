"""Paths that change while they are looked at."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from rundatsheesh.agent import paths
from rundatsheesh.agent.job import CallFailed


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
def test_a_link_that_is_none_any_more_is_not_found(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """os.path.realpath first looks whether it is a link, and then where it leads."""
    realpath = os.path.realpath

    def exchanged(path: str, **more: Any) -> str:
        if path == paths.WORKSPACE:
            return realpath(path, **more)
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os.path, "realpath", exchanged)
    with pytest.raises(CallFailed) as caught:
        paths.inside_workspace("/workspace/link")
    assert caught.value.code == "path_not_found"
    assert number in paths.CHANGED
