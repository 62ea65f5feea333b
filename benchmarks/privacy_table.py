"""What differential privacy costs on medquad: the table of docs/privacy.md.

    python benchmarks/privacy_table.py OUT [--jobs 2] [--seeds 0 1 2]

Runs `medquad_private` for each rule, epsilon and seed, without privacy (the ceiling of each rule), and with
all institutes' passages in one place under privacy (the ceiling of each epsilon); prints a Markdown table of
test accuracy and macro-F1 of the last round's model, mean over seeds and range. A run that OUT holds already
is not made again, so an interrupted table goes on. Needs QUORATE_DATA; a run takes four minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

EPSILONS = (8, 3, 1)
DELTA = 1e-5
RATES = {"ffa": 5e-2, "fedavg": 3e-2, "fedex": 3e-2}
"""By validation accuracy of seed 0 at epsilon 8, among 1e-2 (ffa: 2e-2), 3e-2 and 5e-2."""
RATES_WITHOUT = {"ffa": 3e-2, "fedavg": 1e-2, "fedex": 1e-2}
"""The same without privacy, among 1e-2, 3e-2, 5e-2 (ffa) and 3e-3, 1e-2, 2e-2 (fedavg; fedex takes its)."""
POOLED_RULE = "ffa"
POOLED = """\
data:
  medquad:
    source: ${QUORATE_DATA}/medquad_qtype
    partition: {by: iid, sites: [pooled]}
"""
INSTITUTES = 5


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        rule: aggregation.
        epsilon: None without privacy.
        pooled: all passages at one site, which draws as many in a step as five institutes together.
        seed: of the run.
    """

    rule: str
    epsilon: int | None
    pooled: bool
    seed: int

    @property
    def name(self) -> str:
        """A folder's name."""
        where = "pooled" if self.pooled else self.rule
        return f"{where}-{'none' if self.epsilon is None else f'e{self.epsilon}'}-s{self.seed}"

    @property
    def settings(self) -> list[str]:
        """Overrides of `medquad_private`."""
        rate = (RATES_WITHOUT if self.epsilon is None else RATES)[self.rule]
        settings = [f"seed={self.seed}", f"aggregation.name={self.rule}", f"training.learning_rate={rate}"]
        settings += ["privacy=null"] if self.epsilon is None else [f"privacy.target_epsilon={self.epsilon}"]
        if self.pooled:
            settings += [f"training.per_device_train_batch_size={64 * INSTITUTES}", "federation.quorum=1"]
        return settings


def cells(seeds: list[int]) -> Iterator[Setting]:
    """Yield all runs of the table, whole seeds first."""
    for seed in seeds:
        for epsilon in EPSILONS:
            yield from (Setting(rule, epsilon, False, seed) for rule in RATES)
            yield Setting(POOLED_RULE, epsilon, True, seed)
        yield from (Setting(rule, None, False, seed) for rule in RATES)


def run(cell: Setting, out: Path) -> None:
    """Make one run, unless it is there."""
    folder = out / cell.name
    if (folder / "summary.json").exists():
        return
    quorate = Path(sys.executable).with_name("quorate")
    command = [str(quorate), "simulate", "medquad_private", *cell.settings]
    if cell.pooled:
        command += ["--sites", str(out / "pooled.sites.yaml")]
    command += ["-o", str(folder), "--log-level", "warning"] + (["--resume"] if folder.exists() else [])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def figures(cell: Setting, out: Path) -> tuple[float, float]:
    """Return test accuracy and macro-F1 of a run, over all institutes' rows together."""
    summary = json.loads((out / cell.name / "summary.json").read_text())
    for claim in (site["privacy"] for site in summary["sites"].values() if site.get("privacy")):
        if not (claim["epsilon"] <= cell.epsilon and claim["delta"] == DELTA):
            raise SystemExit(f"{cell.name}: claims epsilon {claim['epsilon']} at delta {claim['delta']}")
    pooled = summary["final"]["test"]["pooled"]
    return pooled["accuracy"], pooled["macro_f1"]


def table(out: Path, seeds: list[int]) -> str:
    """Return the table, in Markdown."""

    def shown(rule: str, epsilon: int | None, pooled: bool) -> str:
        found = [figures(Setting(rule, epsilon, pooled, seed), out) for seed in seeds]
        accuracies, f1s = zip(*found, strict=True)
        return f"{mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f}) / {mean(f1s):.3f}"

    lines = ["| | " + " | ".join(RATES) + " | all in one place |", "|---|" + "---:|" * (len(RATES) + 1)]
    for epsilon in (None, *EPSILONS):
        row = [shown(rule, epsilon, False) for rule in RATES]
        row.append("" if epsilon is None else shown(POOLED_RULE, epsilon, True))
        lines.append(f"| {'no privacy' if epsilon is None else f'epsilon {epsilon}'} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "pooled.sites.yaml").write_text(POOLED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda cell: run(cell, arguments.out), cells(arguments.seeds)))
    print(table(arguments.out, arguments.seeds))


if __name__ == "__main__":
    main()
