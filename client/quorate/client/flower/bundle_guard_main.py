"""`python -m quorate.client.flower.bundle_guard_main ...`: the guard, with a sign of life while it loads."""

from __future__ import annotations

import sys

from quorate.shared.process.heartbeat import beating


def main() -> None:
    """Load what answers a message, then answer it."""
    with beating("flwr-clientapp", sys.argv[1:]):
        from quorate.client.flower import bundle_guard

        bundle_guard.load()
    bundle_guard.main()


if __name__ == "__main__":
    main()
