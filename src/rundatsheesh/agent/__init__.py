"""GUEST: runs as init inside every VM. Standard library only; imports nothing else of the package."""
