"""Started as `python3 -I -S DIRECTORY --engine NAME ...`, as the first process of the guest."""

from __future__ import annotations

import os
import sys

if not __package__:  # a directory that is executed is no package: make it one, by whatever name it was mounted
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[0] = os.path.dirname(here)
    __package__ = os.path.basename(here)
    __import__(__package__)

from .init import main
from .options import Options

main(Options(sys.argv[1:]))
