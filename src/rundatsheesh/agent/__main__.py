"""Started as `python3 -I -S DIRECTORY --engine NAME ...`, as the first process of the guest; with `--outside`, on the
host, as the helper of outside.py."""

from __future__ import annotations

import os
import sys

package = __package__
if not package:  # a directory that is executed is no package: import it as one, by whatever name it was mounted
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[0], package = os.path.split(here)

program = "outside" if sys.argv[1:] == ["--outside"] else "init"
start = __import__(f"{package}.{program}", fromlist=["main"])
start.main(sys.argv[1:])
