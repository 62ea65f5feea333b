"""Every command of the README runs as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import NEEDS_NGINX, free_ports, place_as_simulated

SOUTH = "notes: {source: ../south.csv, columns: {text: letter}, labels: {u: urgent, r: routine}}"
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def shell(command: str, folder: Path, **environment: str) -> str:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": binaries, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def write_example(folder: Path) -> None:
    """Put the README's run and sites file, and rows for its two sites, into a folder."""
    for kind, text in BLOCKS:
        if kind == "yaml" and not text.startswith("# north/"):
            (folder / text.split()[1]).write_text(text)
    words = {"routine": "check-up booked for next month", "urgent": "chest pain and short of breath now"}
    rows = [(f"{words[label]}, case {n}", label) for n in range(15) for label in words]
    (folder / "north.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    )
    (folder / "south.csv").write_text(
        "letter,label\n" + "".join(f'"{text}",{label[0]}\n' for text, label in rows)
    )


def test_the_readme_has_the_commands_this_file_knows() -> None:
    known = {"make demo", "make test", ". .venv/bin/activate"}
    others = [c for c in COMMANDS if c not in known]
    assert known <= set(COMMANDS)
    assert others and all(
        c.startswith(("quorate ", "tar -xf ", "for ", "  quorate ", "done")) for c in others
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_as_a_newcomer_types_it(tmp_path: Path) -> None:
    said = shell("make demo", ROOT, OUT=str(tmp_path / "demo"))
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").exists()
    assert str(tmp_path / "demo" / "report.html") in said
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["best"]["test"]["pooled"]["accuracy"] > 0.7  # 0.63 are benign


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_on_own_data_run_in_their_order(tmp_path: Path) -> None:
    write_example(tmp_path)
    mine = [c for c in COMMANDS if c.startswith("quorate ") and "triage" in c and "federation" not in c]
    assert len(mine) == 4
    said = [shell(command, tmp_path) for command in mine]
    assert "routine" in said[2] or "urgent" in said[2]
    assert (tmp_path / "runs/triage/report.html").stat().st_size > 10_000
    summary = json.loads((tmp_path / "runs/triage/summary.json").read_text())
    assert set(summary["worth"]) == {"north", "south"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("QUORATE_DATA" not in os.environ, reason="QUORATE_DATA is not set")
def test_the_commands_of_the_table_make_it(tmp_path: Path) -> None:
    (block,) = [text for kind, text in BLOCKS if kind == "sh" and "quorate compare" in text]
    # The commands as they stand, for a run so small that its figures mean nothing.
    little = "federation.rounds=1 training.max_steps=1 task.max_length=8 evaluation.bootstrap_samples=0"
    assert block.count("simulate medquad ") == 1 and "in 0 1 2;" in block
    said = shell(block.replace("simulate medquad ", f"simulate medquad {little} "), tmp_path)
    rows = ("federated", "centralised", *(f"local only: {site}" for site in ("CancerGov", "GARD", "NIDDK")))
    assert all(f"| {row} | 0." in said for row in rows)
    assert "Mean over seeds 0, 1, 2" in said


@NEEDS_NGINX
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_between_machines_run_in_their_order(tmp_path: Path) -> None:
    """As they stand there, on one machine; the second site does what the first does."""
    write_example(tmp_path)
    port, superlink, health = free_ports(3)
    ports = f"port: {port}, superlink_port: {superlink}, health_port: {health}, listen: 127.0.0.1, hostname"
    file = tmp_path / "federation.yaml"
    file.write_text(file.read_text().replace("{hostname", f"{{{ports}"))
    (site_yaml,) = [text for kind, text in BLOCKS if text.startswith("# north/site.yaml")]
    first = COMMANDS.index("quorate provision federation.yaml")
    commands = COMMANDS[first : 1 + next(n for n, c in enumerate(COMMANDS) if "--federation clinics -o" in c)]
    assert len(commands) == 8
    home = {"QUORATE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    sources = {"north": "notes: {source: ../north.jsonl}", "south": SOUTH}
    try:
        for command in commands:
            each_site = "north" in command or command.startswith("tar")
            for site in ("north", "south") if each_site else ("",):
                mine = command.replace("north", site)
                if mine.startswith("tar"):  # the kit has come by mail, under the name that provision gave it
                    (told,) = re.findall(r"`(\S+/north/kit\.tar)`", README)
                    kit = Path(told.replace("~/.quorate", str(tmp_path / "home")).replace("north", site))
                    (tmp_path / kit.name).write_bytes(kit.read_bytes())
                if mine.startswith("quorate site check"):
                    written = site_yaml.replace("notes: {source: /srv/north/notes.jsonl}", sources[site])
                    assert written != site_yaml
                    (tmp_path / site / "site.yaml").write_text(written)
                    place_as_simulated(tmp_path / site)
                shell(mine, tmp_path, **home)
        simulated = tmp_path / "simulated"
        shell(f"quorate simulate triage.yaml training.max_stack=1 -o {simulated}", tmp_path, **home)
        for name in ("north/state/received/*/adapter", "runs/clinics/adapter"):
            (adapter,) = tmp_path.glob(f"{name}/adapter_model.safetensors")
            assert adapter.read_bytes() == (simulated / "adapter" / "adapter_model.safetensors").read_bytes()
    finally:
        for stop in ("site stop north", "site stop south", "server stop --federation clinics"):
            subprocess.run(
                [Path(sys.executable).with_name("quorate"), *stop.split()],
                cwd=tmp_path,
                env={**os.environ, **home},
            )
