"""Networks of the VMs: `Network` is all that the rest of the manager uses, besides `claim_block` before it."""

from rundatsheesh.manager.net.blocks import claim_block
from rundatsheesh.manager.net.network import Network

__all__ = ["Network", "claim_block"]
