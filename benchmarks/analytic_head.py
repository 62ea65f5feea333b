"""What a head from one exchange is worth on medquad: `adapter.head.init: analytic` against a random head.

    python benchmarks/analytic_head.py OUT [--rounds 0 2 6] [--seed 0] [--random] [key=value ...]

Runs `medquad` with a solved head and LoRA from it (learning rate 1e-3, linear over the rounds of the run), a
run for each number of rounds, and prints a Markdown table of accuracy and macro-F1 of the last round's model
on all test rows. 0 rounds are one round of one step at a learning rate of 1e-20, in which nothing moves in
float32: what it measures is the solved head alone, on the frozen model with LoRA's start, which changes
nothing. `--random` adds the same runs from a random head at the recipe's learning rate. A run that OUT holds
already is not made again. Needs QUORATE_DATA.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from quorate.server.results.outputs import read_summary
from quorate.server.rounds.run import SUMMARY_FILE
from quorate.server.tracking.records import Summary
from quorate.shared.config.load import load_run, load_sites_file
from quorate.simulations.runner import simulate
from quorate.simulations.simulated_sites import default_sites_path, find_recipe, load_sites

RATES = {"analytic": 1e-3, "random": 3e-3}
STILL = 1e-20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 2, 6])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true")
    arguments = parser.parse_args()
    print("| head | rounds | accuracy | macro-F1 | ridge | MB of sums | seconds |\n" + "|---" * 7 + "|")
    for init in ("analytic", "random") if arguments.random else ("analytic",):
        for rounds in arguments.rounds:
            started = time.monotonic()
            folder = arguments.out / f"{init}-{rounds}-s{arguments.seed}"
            summary = played(folder, init, rounds, arguments.seed, arguments.overrides)
            print(line(init, rounds, summary, time.monotonic() - started), flush=True)


def played(folder: Path, init: str, rounds: int, seed: int, overrides: list[str]) -> Summary:
    """Make a run, unless it is there."""
    if (folder / SUMMARY_FILE).exists():
        return read_summary(folder)
    path = find_recipe("medquad")
    rate = RATES[init] if rounds else STILL
    settings = [
        f"seed={seed}",
        f"adapter.head.init={init}",
        f"training.learning_rate={rate}",
        f"federation.rounds={max(rounds, 1)}",
        f"evaluation.every={max(rounds, 1)}",
        "evaluation.bootstrap_samples=0",
        *([] if rounds else ["training.max_steps=1"]),
        *overrides,
    ]
    run, sites = load_run(path, settings), default_sites_path(path)
    return simulate(run, load_sites(load_sites_file(sites), sites.parent, run), folder)


def line(init: str, rounds: int, summary: Summary, seconds: float) -> str:
    """Return a row of the table."""
    assert summary.final is not None and summary.final.test is not None
    figures, head = summary.final.test.pooled, summary.head
    solved = ("", "") if head is None else (f"{head.strength:g}", f"{sum(head.bytes_up.values()) / 1e6:.1f}")
    measured = (f"{figures[name]:.3f}" for name in ("accuracy", "macro_f1"))
    return f"| {init} | {rounds} | {' | '.join(measured)} | {' | '.join(solved)} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
