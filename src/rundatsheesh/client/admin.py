"""The admin's login, for what no API key may do: making keys and revoking them.

with Admin(email="admin@localhost", password="admin") as admin:
    print(admin.create_key("ci", scopes=["vm:read", "exec"]).secret)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from rundatsheesh.client import transport
from rundatsheesh.client.model import KeyInfo, key_body


class Admin:
    """A session of the admin on one server. A context manager: entering it logs in, leaving it logs out."""

    def __init__(
        self,
        base_url: str = transport.DEFAULT_URL,
        *,
        email: str,
        password: str,
        transport_: httpx.BaseTransport | None = None,
    ) -> None:
        self._login = {"email": email, "password": password}
        self._http = httpx.Client(**transport.options(base_url), transport=transport_)

    def create_key(
        self,
        name: str,
        *,
        scopes: Sequence[str] | None = None,
        allow_ips: Sequence[str] | None = None,
        expires_at: datetime | None = None,
        max_vms: int | None = None,
        max_cpu: int | None = None,
        max_mem_mb: int | None = None,
        calls_per_minute: int | None = None,
    ) -> KeyInfo:
        """A further API key, with its `secret`, which is told this once.

        `scopes` are some of vm:read, vm:write, exec, files and admin, and all but admin unless given; `allow_ips` is
        where its VMs may reach at most; the limits are over all of its VMs.
        """
        limits = {
            "maxVms": max_vms,
            "maxCpu": max_cpu,
            "maxMemMb": max_mem_mb,
            "callsPerMinute": calls_per_minute,
        }
        body = key_body(name, scopes, allow_ips, expires_at, limits)
        return KeyInfo.parse(self._call("POST", "/v1/admin/api-keys", json=body).json())

    def list_keys(self) -> list[KeyInfo]:
        """All further keys, the revoked too."""
        return [KeyInfo.parse(body) for body in self._call("GET", "/v1/admin/api-keys").json()]

    def revoke_key(self, key_id: str) -> KeyInfo:
        """From now on nobody is let in with it."""
        return KeyInfo.parse(self._call("POST", f"/v1/admin/api-keys/{quote(key_id, safe='')}/revoke").json())

    def __enter__(self) -> Admin:
        try:
            self._call("POST", "/auth/login", json=self._login)
        except BaseException:
            self._http.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._call("POST", "/auth/logout")
        finally:
            self._http.close()

    def _call(self, method: str, path: str, json: Mapping[str, Any] | None = None) -> httpx.Response:
        with transport.translated():
            response = self._http.request(method, path, json=json)
        if response.is_success:
            return response
        raise transport.error_of(response)
