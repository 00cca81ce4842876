"""The Python SDK: `Client` blocks, `AsyncClient` is awaited; see errors.py for what they raise."""

from rundatsheesh.client.admin import Admin
from rundatsheesh.client.aio import AsyncClient, AsyncVm
from rundatsheesh.client.archive import Unpacked
from rundatsheesh.client.errors import ApiError, ClientError
from rundatsheesh.client.model import UNCHANGED, ExecResult, KeyInfo, RunResult, VmInfo
from rundatsheesh.client.sync import Client, Vm

__all__ = [
    "UNCHANGED",
    "Admin",
    "ApiError",
    "AsyncClient",
    "AsyncVm",
    "Client",
    "ClientError",
    "ExecResult",
    "KeyInfo",
    "RunResult",
    "Unpacked",
    "Vm",
    "VmInfo",
]
