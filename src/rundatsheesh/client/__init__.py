"""The Python SDK: `Client` blocks, `AsyncClient` is awaited; see errors.py for what they raise."""

from rundatsheesh.client.aio import AsyncClient, AsyncVm
from rundatsheesh.client.archive import Unpacked
from rundatsheesh.client.errors import ApiError, ClientError
from rundatsheesh.client.model import ExecResult, RunResult, VmInfo
from rundatsheesh.client.sync import Client, Vm

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncVm",
    "Client",
    "ClientError",
    "ExecResult",
    "RunResult",
    "Unpacked",
    "Vm",
    "VmInfo",
]
