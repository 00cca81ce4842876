"""run-dat-sheesh: runs untrusted code in virtual machines on machines you own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rundatsheesh.client import ApiError, AsyncClient, Client, ClientError

__version__ = "0.1.0"

__all__ = ["ApiError", "AsyncClient", "Client", "ClientError"]


def __getattr__(name: str) -> Any:
    """The SDK is loaded when it is asked for: the guest's agent and the command line start without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rundatsheesh import client

    return getattr(client, name)
