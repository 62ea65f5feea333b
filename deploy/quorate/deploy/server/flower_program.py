"""`python -m quorate.deploy.server.flower_program NAME ...`: one of Flower's programs, with this very Python.

Its scripts need not be on the PATH then, and a PATH cannot name others.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution

if __name__ == "__main__":
    _, name, *arguments = sys.argv
    sys.argv = [name, *arguments]
    sys.exit(distribution("flwr").entry_points.select(group="console_scripts", name=name)[name].load()())
