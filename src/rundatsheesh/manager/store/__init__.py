"""The database: VM records and their moves, credentials, and what happened. `Store` is the way in."""

from rundatsheesh.manager.store.credentials import Credentials
from rundatsheesh.manager.store.exec_log import ExecLog
from rundatsheesh.manager.store.history import History
from rundatsheesh.manager.store.idempotency import Idempotency
from rundatsheesh.manager.store.store import Store, VmChanges

__all__ = ["Credentials", "ExecLog", "History", "Idempotency", "Store", "VmChanges"]
