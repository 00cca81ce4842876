"""Networks of the VMs: `Network` is all that the rest of the manager uses, besides `claim_block` before it."""

from rundatsheesh.manager.net.blocks import claim_block
from rundatsheesh.manager.net.network import Network, TapOwner

__all__ = ["Network", "TapOwner", "claim_block"]
