"""run-dat-sheesh: runs untrusted code in virtual machines on machines you own."""

__version__ = "0.1.0"
