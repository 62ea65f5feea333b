"""What a resident site saves: seconds per message with the base model kept, or loaded for each message.

    python benchmarks/resident_site.py [--messages 5]

Flower starts a process for every message. Were the work done in it, each would import torch, load the base
model and read the rows; the resident site does that once. Both answer the same request, the evaluation of the
seeded start on the validation rows of one site of the demo. The resident site's first message is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from quorate.client.site.engine import answer_all
from quorate.client.site.site import Site
from quorate.shared.config.load import load_run, load_sites_file
from quorate.shared.protocol.messages import RequestHeader, RoundRequest
from quorate.simulations.simulated_sites import default_sites_path, find_recipe, load_sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--messages", type=int, default=5)
    parser.add_argument(
        "--one", action="store_true", help="answer one message and end, as a fresh process would"
    )
    options = parser.parse_args()
    if options.one:
        answer_some(1)
        return
    first, *others = answer_some(options.messages + 1)
    fresh = []
    for _ in range(options.messages):
        started = time.monotonic()
        subprocess.run([sys.executable, __file__, "--one"], check=True, capture_output=True)
        fresh.append(time.monotonic() - started)
    kept, loaded = statistics.median(others), statistics.median(fresh)
    print(f"resident, first message (loads): {first:.2f} s")
    print(f"resident, each message after it: {kept:.2f} s (median of {len(others)})")
    print(
        f"a process for each message:      {loaded:.2f} s (median of {len(fresh)}), {loaded / kept:.1f} times"
    )


def answer_some(count: int) -> list[float]:
    """Answer requests in one process; returns the seconds of each, the first with rows and model."""
    started = time.monotonic()
    path = find_recipe("demo")
    run = load_run(path)
    sites_path = default_sites_path(path)
    rows = load_sites(load_sites_file(sites_path), sites_path.parent, run)
    name = sorted(rows)[0]
    site = Site({name: rows[name]})
    seconds = []
    for number in range(count):
        header = RequestHeader(
            run_id="benchmark",
            round=number,
            phase="evaluate",
            site=name,
            split="validation",
            run_config=run.canonical_json(),
            config_hash=run.content_hash,
        )
        (update,) = answer_all(site, [RoundRequest(header)])
        assert update.header.error is None and update.header.outcomes is not None
        seconds.append(time.monotonic() - started)
        started = time.monotonic()
    return seconds


if __name__ == "__main__":
    main()
