"""`quorate validate`: check a run file, and with it the sites file and what both point to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quorate.deploy.commands.both.options import (
    JsonOption,
    LogLevel,
    LogLevelOption,
    OverridesArgument,
    RunArgument,
    SitesOption,
    print_json,
)
from quorate.deploy.commands.simulation.inputs import find_run, find_sites, load_rows
from quorate.shared.errors import BadInput, ConfigError, ModelError

if TYPE_CHECKING:
    from quorate.shared.config.run_config import RunConfig
    from quorate.shared.config.sites_config import SitesConfig


def validate(
    run: RunArgument,
    overrides: OverridesArgument = None,
    sites: SitesOption = None,
    as_json: JsonOption = False,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Check a run file; with a sites file, also that the model is there and every site's rows can be used.

    Nothing is fetched and the model is not loaded. Exit code 0 if all is well; 2 otherwise, with
    every problem on a line of its own.

    Example: quorate validate medquad --sites my.sites.yaml federation.rounds=10
    """
    try:
        found = _check(run, overrides or [], sites)
    except BadInput as error:
        if as_json:
            print_json({"ok": False, "problems": str(error).splitlines()})
        raise
    if as_json:
        print_json({"ok": True, **found})
    else:
        _print_summary(found)


def _check(run: str, overrides: list[str], sites: Path | None) -> dict[str, Any]:
    """Return what is valid: the resolved run, the files, and notes on what was not checked.

    Raises: ConfigError: every problem, a line each.
    """
    from quorate.shared.config.load import load_run, load_sites_file
    from quorate.simulations.simulated_sites import default_sites_path

    run_path = find_run(run)
    config = load_run(run_path, overrides)
    found: dict[str, Any] = {
        "run_file": str(run_path),
        "sites_file": None,
        "sites": None,
        "notes": [],
        "config_hash": config.content_hash,
        "run": config.model_dump(mode="json"),
    }
    if sites is None and not default_sites_path(run_path).exists():
        found["notes"].append("no sites file: neither data nor model were looked for")
        return found
    sites_path = find_sites(sites, run_path)
    sites_config = load_sites_file(sites_path)
    found["sites_file"] = str(sites_path)
    problems: list[str] = []
    checks = (
        partial(_check_model, config, str(run_path), found["notes"]),
        partial(_check_data, config, sites_config, sites_path, str(run_path), found),
    )
    for check in checks:
        try:
            check()
        except BadInput as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _check_model(config: RunConfig, where: str, notes: list[str]) -> None:
    """Look for the model's folder and its weights; a hub id is not looked up."""
    from quorate.shared.model.sources import is_hub_id, resolve_model

    reference = config.model.model_name_or_path
    if is_hub_id(reference):
        notes.append(f"the model {reference} is a hub id, which was not looked up")
        return
    field = f"{where}: model.model_name_or_path"
    folder = resolve_model(reference, None, where=field)
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise ModelError(f"{field}: {folder} holds no {pattern}; name a folder made by save_pretrained.")


def _check_data(
    config: RunConfig, sites: SitesConfig, path: Path, run_file: str, found: dict[str, Any]
) -> None:
    """Read the rows of every site, and compare the number of sites with the quorum."""
    from quorate.shared.config.sites_config import SiteList

    data = sites.data.get(config.data)
    sources = data.sites if isinstance(data, SiteList) else [data] if data else []
    if any(source.source.startswith("hub:") for source in sources):
        found["notes"].append(f"the data {config.data} come from a hub and were not fetched")
        return
    rows = load_rows(sites, path, config)
    found["sites"] = {
        name: {split: len(part) for split, part in splits.items()} for name, splits in rows.items()
    }
    if config.federation.quorum > len(rows):
        raise ConfigError(
            f"{run_file}: federation.quorum: {config.federation.quorum} is above the number of sites "
            f"({len(rows)}: {', '.join(rows)}); lower it to at most {len(rows)}."
        )


def _print_summary(found: dict[str, Any]) -> None:
    run = found["run"]
    federation, training, adapter = run["federation"], run["training"], run["adapter"]
    labels = run["task"].get("labels", [])
    steps = training["max_steps"]
    lines = {
        "run": f"{run['name']}, seed {run['seed']}, config hash {found['config_hash'][:12]}",
        "task": run["task"]["name"] + (f", {len(labels)} labels: {_few(labels, 8)}" if labels else ""),
        "model": run["model"]["model_name_or_path"],
        "adapter": f"LoRA of rank {adapter['r']}, lora_alpha {adapter['lora_alpha']:g}",
        "rounds": f"{federation['rounds']}, quorum {federation['quorum']}, "
        + ("all sites" if federation["sites_per_round"] is None else f"{federation['sites_per_round']} sites")
        + " each",
        "training": (f"{steps} steps" if steps else f"{training['num_train_epochs']} epochs")
        + f" a round of {training['per_device_train_batch_size']} rows, {training['optim']}, "
        f"learning rate {training['learning_rate']:g}",
        "rule": run["aggregation"]["name"],
    }
    if found["sites"] is not None:
        counts = [f"{name} {_rows(splits)}" for name, splits in found["sites"].items()]
        lines["sites"] = f"{len(counts)}, rows to train on / validate / test: {_few(counts, 12)}"
    typer.echo(f"OK {found['run_file']}" + (f" with {found['sites_file']}" if found["sites_file"] else ""))
    for name, text in lines.items():
        typer.echo(f"  {name:9} {text}")
    for note in found["notes"]:
        typer.echo(f"  {'note':9} {note}")


def _few(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _rows(splits: dict[str, int]) -> str:
    return "/".join(str(splits.get(split, 0)) for split in ("train", "validation", "test"))
