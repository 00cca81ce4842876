"""What guests are made of, and where it comes from."""

from __future__ import annotations

from pathlib import Path

AGENT = Path(__file__).parents[2] / "agent"  # the package, as it is installed
