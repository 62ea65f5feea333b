"""`python -m quorate.client.node.launch ...`: the guarding launcher, with a sign of life while it loads."""

from __future__ import annotations

import sys

from quorate.shared.heartbeat import beating


def main() -> None:
    """Load what answers a message, then answer it."""
    with beating("flwr-clientapp", sys.argv[1:]):
        from quorate.client.node import launcher

        launcher.load()
    launcher.main()


if __name__ == "__main__":
    main()
