"""Whether what a caller asks for lies within its key's egress ceiling."""

from __future__ import annotations

from ipaddress import IPv4Network

from rundatsheesh.manager.errors import Forbidden
from rundatsheesh.manager.model import CreateVm, Rights
from rundatsheesh.manager.net.policy import is_special


def check_ceiling(request: CreateVm, rights: Rights) -> None:
    """Raises Forbidden (`egress_not_allowed`) that names the entry. A ceiling reads as a policy does: a private range
    is only within an entry that lies in such a range itself."""
    if rights.egress is None:
        return
    for index, network in enumerate(request.allow_ips):
        if not any(_covers(allowed, network) for allowed in rights.egress):
            raise _outside("allowIps", index, str(network), rights.egress)
    if request.allow_domains:  # what a name resolves to is its owner's decision
        raise _outside("allowDomains", 0, request.allow_domains[0], rights.egress)


def _covers(allowed: IPv4Network, network: IPv4Network) -> bool:
    return network.subnet_of(allowed) and is_special(network) == is_special(allowed)


def _outside(field: str, index: int, entry: str, ceiling: tuple[IPv4Network, ...]) -> Forbidden:
    return Forbidden(
        f"{field}[{index}]: {entry!r} is beyond what VMs of this API key may reach",
        code="egress_not_allowed",
        details={"field": field, "index": index, "entry": entry, "allowed": [str(network) for network in ceiling]},
    )
