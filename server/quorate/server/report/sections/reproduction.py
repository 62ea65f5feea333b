"""How the run was made, how to make it again, and what it does not say."""

from __future__ import annotations

from quorate.server.report.figures import count
from quorate.server.report.page import Cell, Code, Section, Table
from quorate.server.report.run_files import RunFiles
from quorate.shared.config.run_config import RunConfig


def limits_section(files: RunFiles) -> Section:
    """Say what the figures and the model must not be taken for."""
    section = Section("limits", "What this does not say")
    section.say(
        "Figures hold for rows like those tested. They say nothing of other institutions, later years or "
        "other ways of writing, and single rows can be wrong whatever the average."
    )
    section.say(f"Sites send updates, never rows. {_bounded(files.config)}")
    references = files.summary.references if files.summary else None
    if references and (references.tested_everywhere or references.centralised):
        section.say(
            "The reference runs (local only, centralised) had all sites' rows on one machine, "
            "as a simulation does."
        )
    section.say("This page itself holds counts and figures per site, and no row of anyone's data.")
    return section


def _bounded(config: RunConfig) -> str:
    if config.private_clients:
        return (
            "What the adapter may tell of a site is bounded (see Privacy); what the coordinator saw is not."
        )
    if config.privacy is not None:
        return (
            f"What the updates may tell of one {config.privacy.unit} is bounded (see Privacy); any "
            "figures on validation and test rows are exact, and what a site's rows have in common is learnt."
        )
    return (
        "But no differential privacy was used: nothing guarantees that the adapter, or the updates the "
        "coordinator saw, reveal nothing of single rows. Treat the adapter as derived from the data."
    )


def origin_section(files: RunFiles) -> Section:
    """Give configuration, versions, hashes and commands."""
    section = Section("made", "How this was made")
    config, summary = files.config, files.summary
    model, adapter, training = config.model, config.adapter, config.training
    passes = count(training.num_train_epochs, "pass", "passes") + " over its rows"
    steps = count(training.max_steps, "step") if training.max_steps is not None else passes
    batch = count(training.per_device_train_batch_size * training.gradient_accumulation_steps, "row")
    facts = [
        ("Task", config.task.name.replace("_", " ")),
        ("Data alias", config.data),
        ("Base model", model.model_name_or_path + (f", revision {model.revision}" if model.revision else "")),
        ("SHA-256 of the base model", model.sha256 or "not pinned"),
        (
            "Adapter",
            f"LoRA, rank {adapter.r}, alpha {adapter.lora_alpha:g}, dropout {adapter.lora_dropout:g}",
        ),
        (
            "Training of a site in a round",
            f"{steps}, {batch} a step, "
            f"{training.optim}, learning rate {training.learning_rate:g}, {training.lr_scheduler_type}",
        ),
        ("Aggregation", config.aggregation.name),
        ("Seed", f"{config.seed}"),
        ("SHA-256 of the configuration", summary.config_hash if summary else config.content_hash),
    ]
    if files.records:
        last = files.records[-1]
        facts.append((f"Content hash of the model after round {last.round}", last.state_hash))
    if summary:
        facts.append(("Run", summary.run_id))
        facts += [(f"Version of {name}", found) for name, found in sorted(summary.versions.items())]
    section.blocks.append(
        Table("Facts", ["What", "Value"], [[Cell(a), Cell(b)] for a, b in facts], words=(1,))
    )
    _differing_versions(files, section)
    section.blocks.append(Code("The run file, resolved (run.yaml)", files.config_text, folded=True))
    section.say(
        "To make the run again with the same release and data (a simulation keeps what it needs for that in "
        "its folder), and to make this page again from it:"
    )
    section.blocks.append(
        Code("Commands", "quorate rerun OUTPUT_FOLDER -o NEW_FOLDER\nquorate report OUTPUT_FOLDER")
    )
    return section


def _differing_versions(files: RunFiles, section: Section) -> None:
    """Note sites whose libraries are not those of the coordinator."""
    if files.summary is None:
        return
    ours = files.summary.versions
    for site, description in sorted(files.summary.sites.items()):
        other = [
            f"{name} {found} (coordinator: {ours[name]})"
            for name, found in sorted(description.versions.items())
            if name in ours and ours[name] != found
        ]
        if other:
            section.say(f"{site} ran {', '.join(other)}.", "note")
