"""`python -m quorate.deploy.server.registering FOLDER`: registers the admitted sites, then ends."""

from __future__ import annotations

import sys
from pathlib import Path

from quorate.deploy.failures import report_failure
from quorate.deploy.server.paths import ServerPaths
from quorate.deploy.server.start import register_sites
from quorate.server.federation import FederationFolder


def main() -> int:
    """Register; returns the exit code."""
    try:
        names = register_sites(ServerPaths(FederationFolder(Path(sys.argv[1]))))
    except Exception as error:
        return report_failure(error, show_traceback=False)
    print(f"sites that may connect: {', '.join(names.values()) or 'none yet'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
