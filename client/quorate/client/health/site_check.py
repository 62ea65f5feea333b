"""What must be right before a site starts, and what to do where it is not: `quorate site check`."""

from __future__ import annotations

import sys
from pathlib import Path

import quorate.client
from quorate.client.health.credentials import node_key
from quorate.client.health.server_reachability import server_lines
from quorate.client.health.site_conditions import certificates, storage
from quorate.client.health.site_file import check_process
from quorate.client.node.folder import SITE_YAML, SiteFolder, local_data
from quorate.client.node.users import SystemUser, accounts, reads, reads_tree
from quorate.shared.config.run_config import RunConfig
from quorate.shared.errors import ConfigError, DataError, ModelError
from quorate.shared.process.looks import Line, line


def check(folder: Path, run_path: Path | None = None) -> list[Line]:
    """Look at everything a site needs. Reads data and models, trains nothing, changes nothing.

    Args:
        folder: the unpacked start-up kit.
        run_path: a run file that the site is to take part in; its labels, policy and model are checked too.
    Raises: ConfigError: the folder is no kit.
    """
    site = SiteFolder.find(folder)
    lines = [
        line("connection.yaml", lambda: _connection(site)),
        line("site.yaml", lambda: _site_file(site)),
    ]
    if all(each.ok for each in lines):
        if site.users is not None:
            lines.append(line("users", lambda: _users(site)))
        for index in range(len(site.config.models)):
            lines.append(line(f"models[{index}]", lambda index=index: _model(site, index)))  # type: ignore[misc]
        for alias in site.config.data:
            lines.append(line(f"data.{alias}", lambda alias=alias: _data(site, alias)))  # type: ignore[misc]
        lines += storage(site)
        lines.append(line("site process", lambda: check_process(site)))
        if run_path is not None:
            lines.append(line(f"run {run_path.name}", lambda: _run(site, run_path)))
    lines.append(line("node.key", lambda: node_key(site)))
    if lines[0].ok:
        lines += certificates(site)
    needed = ("connection.yaml", "ca.crt", "client.crt", "node.key")
    if all(each.exit_code < 2 for each in lines if each.what in needed):
        lines += server_lines(site, signed=True)
    lines.append(line("versions", _versions))
    return lines


def _connection(site: SiteFolder) -> str:
    about = site.connection
    return f"site {about.site} of federation {about.federation}, server {about.server}"


def _site_file(site: SiteFolder) -> str:
    config = site.config
    return f"{len(config.data)} data aliases, {len(config.models)} models, device {config.device}"


def _users(site: SiteFolder) -> str:
    both = accounts(site.users)
    assert both is not None  # asked for where there are some
    own, supernode = both
    python = Path(sys.executable).resolve()
    for user in both:
        for path in (python, Path(quorate.client.__file__)):
            if not reads(user, [path])[0]:
                raise ConfigError(
                    f"user {user.name} cannot read {path}; install Python and quorate where every user may "
                    "read them, such as /opt/quorate."
                )
    for alias, path in local_data(site).items():
        if path.resolve().is_relative_to(site.path):
            continue  # `site start` gives it to the site's user alone
        if not all(reads_tree(own, path)):
            raise DataError(
                f"data.{alias}: user {own.name} cannot read {path}; allow it with "
                f"`chown -R {own.name} {path}`."
            )
        if any(reads_tree(supernode, path)):
            raise ConfigError(
                f"data.{alias}: user {supernode.name}, which talks to the coordinator, can read {path}; "
                f"forbid it with `chmod -R go-rwx {path}`."
            )
    _models_are_readable(site, own)
    return f"{own.name} for the data, {supernode.name} for Flower"


def _models_are_readable(site: SiteFolder, own: SystemUser) -> None:
    from quorate.client.models.base_models import find

    for model in site.config.models:
        folder = find(model.path, site.path)
        if not all(reads_tree(own, folder)):
            raise ModelError(
                f"models: user {own.name} cannot read {folder}; allow it with `chmod -R a+rX {folder}`, and "
                "the folders above it with `chmod a+x`."
            )


def _model(site: SiteFolder, index: int) -> str:
    from quorate.client.models.base_models import find
    from quorate.shared.model.base_model import whole_files

    model = site.config.models[index]
    folder = find(model.path, site.path)
    _, found = whole_files(folder)
    if found != model.sha256:
        raise ModelError(
            f"{folder}: its weights have sha256 {found}, {SITE_YAML} says {model.sha256}; get the right "
            "model, or correct the hash if this one is meant."
        )
    return f"{folder}, sha256 {found[:12]}... as it should be"


def _data(site: SiteFolder, alias: str) -> str:
    from quorate.client.data.readers import read_source

    source = site.config.data[alias]
    try:
        splits = read_source(source, site.path)
    except DataError as error:
        # Which column holds images, the run file says; a folder of images is none of rows without it.
        try:
            splits = read_source(source, site.path, ["image"])
        except DataError:
            raise error from None
    return ", ".join(f"{split} {len(rows)} rows" for split, rows in splits.items())


def _run(site: SiteFolder, run_path: Path) -> str:
    """Hold a run file against policy, data, models and privacy budgets as the site process will."""
    from quorate.client.policy.gate import admit
    from quorate.client.privacy.budgets import Budgets
    from quorate.client.privacy.ledger import reservations, verify_of
    from quorate.client.site.request import Request
    from quorate.client.site.site_data import SiteData
    from quorate.shared.config.load import load_run
    from quorate.shared.config.privacy_config import SitePrivacy
    from quorate.shared.privacy.accounting import epsilon
    from quorate.shared.protocol.messages import RequestHeader

    run, which = _pinned(site, load_run(run_path))
    header = RequestHeader(
        run_id="check",
        round=0,
        phase="join",
        site=site.connection.site,
        run_config=run.canonical_json(),
        config_hash=run.content_hash,
    )
    policy = site.config.policy.model_copy(update={"approve_each_run": False})  # nobody asks for it yet
    config = site.config.model_copy(update={"policy": policy})
    admit(Request(run, header), config, site.state)
    at_site = SiteData(site, looks_only=True)
    at_site.at_hand(run)
    rows = at_site.rows(run, site.connection.site)
    budgets = Budgets(site.config, site.path, epsilon)
    budgets.admit(run)
    if isinstance(run.privacy, SitePrivacy):
        spending = at_site.spending(run)
        entries = reservations(verify_of(site).rows)
        budgets.check(spending, entries, spending.over(spending.rounds))
    counts = ", ".join(f"{split} {len(each)}" for split, each in rows.items())
    later = "; a person must approve it when it begins" if site.config.policy.approve_each_run else ""
    return f"{run.name}: allowed, its labels and columns are there ({counts} rows){later}{which}"


def _pinned(site: SiteFolder, run: RunConfig) -> tuple[RunConfig, str]:
    """Return the run with its base model's hash, which `quorate run` fills in, and a remark on it."""
    from quorate.client.models.base_models import find
    from quorate.shared.model.base_model import whole_files

    named, listed = run.model.model_name_or_path, [model.sha256 for model in site.config.models]
    if run.model.sha256 is not None or not listed:  # where there is no model at all, the policy says so
        return run, ""
    try:
        _, sha256 = whole_files(find(named, Path.cwd()))
        remark = f"; the run file names no model.sha256, that of {named} is {sha256[:12]}..."
    except ModelError:  # it is the coordinator's copy that will be hashed
        sha256 = listed[0]
        remark = (
            f"; not its base model: the run file names no model.sha256, and there is no {named} on this "
            "machine to hash; ask the coordinator which hash `quorate run` fills in"
        )
    return run.model_copy(update={"model": run.model.model_copy(update={"sha256": sha256})}), remark


def _versions() -> str:
    from importlib.metadata import version

    from quorate.shared.protocol.versions import versions

    return ", ".join(f"{name} {each}" for name, each in {**versions(), "flwr": version("flwr")}.items())
