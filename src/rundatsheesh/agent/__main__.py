"""Started as `python3 -I -S DIRECTORY --engine NAME ...`, as the first process of the guest."""

from __future__ import annotations

import os
import sys

package = __package__
if not package:  # a directory that is executed is no package: import it as one, by whatever name it was mounted
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[0], package = os.path.split(here)

start = __import__(f"{package}.init", fromlist=["main"])
start.main(sys.argv[1:])
