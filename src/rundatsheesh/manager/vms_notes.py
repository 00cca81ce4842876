"""What the manager itself says in a VM's engine log: how it started, and why it ended.

Callers read it (`GET /v1/vms/{id}/logs`), so there is nothing in it that they did not choose or may not know: no path
of the host, no words of a guest, none of an error's.
"""

from __future__ import annotations

from rundatsheesh.manager.engines.base import Exit
from rundatsheesh.manager.errors import RdsError
from rundatsheesh.manager.model import State, VmRecord

MIB = 1 << 20
ADOPTED = "taken over by a new server; the guest ran on"
GIVEN_OUT = "given to its caller; it was kept warm until now"


def started(record: VmRecord, elapsed_ms: int) -> str:
    spec = record.spec
    warm = ", to be kept warm" if record.state is State.WARM else ""
    return (
        f"started in {elapsed_ms} ms{warm}: engine {spec.engine} ({record.isolation.value}), "
        f"{record.provision_mode.value}, cpu {spec.cpu}, memory {spec.mem_mb} MiB"
    )


def not_started(error: BaseException, elapsed_ms: int) -> str:
    code = error.code if isinstance(error, RdsError) else "cancelled or failed"
    return f"did not start, given up after {elapsed_ms} ms: {code}"


def stopped(reason: str | None) -> str:
    return f"stopped: {reason or 'somebody asked for it'}"


def ended(reason: str, record: VmRecord, exit_: Exit | None) -> str:
    """`exit_` is what the machine's end has shown, where this server was there."""
    said = [f"ended: {reason}"]
    if exit_ is not None and exit_.status is not None:
        signal = exit_.status < 0
        said.append(f"by signal {-exit_.status}" if signal else f"exit status {exit_.status}")
    said.append(f"memory {record.spec.mem_mb} MiB")
    if exit_ is not None and exit_.memory_peak is not None:
        said.append(f"with its engine at most {exit_.memory_peak // MIB} MiB in use")
    if exit_ is not None and exit_.oom_kills:
        said.append(f"processes killed for lack of memory: {exit_.oom_kills}")
    return ", ".join(said)
