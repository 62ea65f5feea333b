"""The result in words: what a person who reads nothing else should know, also where it is not good news."""

from __future__ import annotations

from collections.abc import Mapping

from quorate.server.report import figures
from quorate.server.report.figures import count, listed, metric_in_sentence, show, show_gain, show_interval
from quorate.server.report.page import Headline, Tile
from quorate.server.report.run_files import RunFiles, interval_of, value_of
from quorate.server.tracking.records import USELESS, Evaluation, LocalGain, Measured

FEW_ROWS = 200
"""Below this many test rows the reader is told that the interval is wide."""


def headline(files: RunFiles) -> Headline:
    """Say the result, what it compares to, and what to beware of."""
    more = [_against_local(files), _against_centralised(files), _against_guessing(files)]
    return Headline(
        text=_result(files),
        more=[sentence for sentence in more if sentence],
        tiles=_tiles(files),
        warnings=_warnings(files),
    )


def rounds_done(files: RunFiles) -> int:
    """Return how many rounds the record shows."""
    return files.records[-1].round if files.records else 0


def whose_rows(files: RunFiles, evaluation: Evaluation) -> str:
    """Write whose rows an evaluation is over."""
    measured, members = len(evaluation.rows), max(len(files.members), len(evaluation.rows))
    if members == 1:
        return "the only site"
    return f"all {members} sites" if measured == members else f"{measured} of the {members} sites"


def _result(files: RunFiles) -> str:
    result = files.result
    if not files.records:
        return "No round of this run was finished, so there is no federated model yet."
    if result is None:
        rounds = count(rounds_done(files), "round")
        return f"The federated model was trained for {rounds}, but not measured: {why_unmeasured(files)}."
    rows = f"{count(sum(result.rows.values()), f'{result.split} row')} of {whose_rows(files, result)}"
    for metric, words in (
        ("accuracy", "gets {} of the {} right"),
        ("exact_match", "gets all labels right on {} of the {}"),
    ):
        value = value_of(result, metric)
        if value is not None:
            interval = show_interval(metric, interval_of(result, metric))
            said = words.format(show(metric, value), rows)
            return f"The federated model {said}" + (f" (95\u00a0% interval {interval})." if interval else ".")
    metric = files.metric
    interval = show_interval(metric, interval_of(result, metric))
    said = f"reaches a {metric_in_sentence(metric)} of {show(metric, value_of(result, metric))} on the {rows}"
    return f"The federated model {said}" + (f" (95\u00a0% interval {interval})." if interval else ".")


def why_unmeasured(files: RunFiles) -> str:
    """Write why there are no figures of the model."""
    if not files.config.evaluation.share_outcomes:
        return "sites send no outcomes (evaluation.share_outcomes)"
    found = [each for measured in (files.best, files.final) if measured for each in evaluations(measured)]
    found += [each.validation for each in files.metrics if each.validation]
    reasons = {site: why.reason for each in found for site, why in each.missing.items()}
    if reasons:
        return "; ".join(f"{site} {reason.rstrip('.')}" for site, reason in sorted(reasons.items()))
    if files.summary and files.summary.status != "done":
        return "the run did not come to that"
    return "no site has rows for that"


def evaluations(measured: Measured) -> list[Evaluation]:
    """Return the evaluations of a model that there are."""
    return [each for each in (measured.test, measured.validation) if each]


def local_gains(files: RunFiles) -> dict[str, LocalGain]:
    """Return what the federation was worth to each site, where that is a number."""
    found = files.summary.worth if files.summary else {}
    return {site: found[site] for site in sorted(found) if figures.number(found[site].gain) is not None}


def _against_local(files: RunFiles) -> str:
    found = local_gains(files)
    if not found:
        if files.result is None:
            return ""
        if len(files.members) == 1:
            return "With a single site there is nobody to learn from: this equals training alone."
        return f"Whether it was worth it for each site is not known: {why_no_reference(files)}."
    metric, total = next(iter(found.values())).metric, len(found)
    unit, gains = metric_in_sentence(metric), {site: each.gain for site, each in found.items()}
    better = [site for site in gains if figures.sign(metric, gains[site]) > 0]
    if total == 1:
        site = next(iter(gains))
        return (
            f"On {site}'s own rows that is {show_gain(metric, gains[site])} of {unit} against training alone."
        )
    compared = "than the adapter the site trains alone, both tested on the site's own rows"
    if len(better) == total:
        low, high = show_gain(metric, min(gains.values()), unit=False), show_gain(metric, max(gains.values()))
        said = f"It is better for every one of the {total} sites {compared} ({low} to {high} of {unit})"
    elif better:
        rest = [f"{site} ({_shortfall(found[site])})" for site in gains if site not in better]
        said = f"By {unit} it is better for {len(better)} of {total} sites {compared}; not for {listed(rest)}"
    else:
        said = f"By {unit} it is not better for any of the {total} sites {compared}: it was not worth it"
    return said + "." + _beyond_chance(found, 1 if better else -1)


def why_no_reference(files: RunFiles) -> str:
    """Say why there is nothing that the federated model can be compared with."""
    if files.summary and files.summary.references and files.summary.references.failed:
        return "the reference runs failed"
    if "local_only" in files.config.evaluation.references:
        return "the run ended before the reference runs could be trained and tested"
    return (
        "the run was made without the local-only reference (evaluation.references: [local_only, centralised])"
    )


def _beyond_chance(found: Mapping[str, LocalGain], direction: int) -> str:
    """Say for how many sites the whole interval of the gain lies above (1) or below (-1) zero."""
    intervals = [interval for each in found.values() if (interval := figures.bounds(each.interval))]
    if not intervals:
        return ""
    sure = sum(1 for low, high in intervals if (low > 0 if direction > 0 else high < 0))
    words = ("above", "better") if direction > 0 else ("below", "worse")
    return (
        f" Beyond chance (the gain's 95\u00a0% interval is {words[0]} zero) it is {words[1]} for "
        f"{sure} of {len(found)}."
    )


def _shortfall(worth: LocalGain) -> str:
    """Write a gain that is none, and whether that may be chance."""
    interval = figures.bounds(worth.interval)
    chance = interval is not None and interval[1] >= 0 and figures.sign(worth.metric, worth.gain) < 0
    return show_gain(worth.metric, worth.gain) + (", which may be chance" if chance else "")


def best_local(files: RunFiles, metric: str) -> tuple[str, float] | None:
    """Return the site whose own adapter does best on everybody's rows, and how well."""
    references = files.summary.references if files.summary else None
    values = {
        site: value
        for site, each in (references.local_only if references else {}).items()
        if (value := value_of(each.test, metric)) is not None
    }
    better = files.config.task.sign(metric)
    return max(values.items(), key=lambda each: better * each[1]) if values else None


def _against_centralised(files: RunFiles) -> str:
    metric = files.metric
    references = files.summary.references if files.summary else None
    ours = value_of(files.result, metric)
    if references is None or ours is None or files.result is None or files.result.split != "test":
        return ""
    if len(files.members) == 1:
        return ""
    alone, sentences = best_local(files, metric), []
    unit = metric_in_sentence(metric)
    if alone and references.tested_everywhere:
        sentences.append(
            f"On everybody's rows the federated model reaches {show(metric, ours)} {unit}, the best adapter "
            f"of a single site ({alone[0]}) {show(metric, alone[1])}."
        )
    central = value_of(references.centralised.test, metric) if references.centralised else None
    if central is not None:
        sentences.append(
            f"Training on all rows in one place reaches {show(metric, central)} {unit}: "
            + _cost_of_federating(metric, files.config.task.sign(metric) * (ours - central))
        )
    return " ".join(sentences)


def _cost_of_federating(metric: str, gap: float) -> str:
    shown = show_gain(metric, abs(gap)).lstrip("+±")
    words = {
        -1: f"leaving the rows where they are costs {shown}.",
        0: "leaving the rows where they are costs nothing.",
        1: f"leaving the rows where they are costs nothing (the federated model is {shown} better).",
    }
    return words[figures.sign(metric, gap)]


def _against_guessing(files: RunFiles) -> str:
    """Say what always guessing the most common class would give, so that a high accuracy is not overrated."""
    pooled = files.result.pooled if files.result else {}
    accuracy, per_class = figures.number(pooled.get("accuracy")), pooled.get("per_class")
    if accuracy is None or not isinstance(per_class, dict) or not per_class:
        return ""
    supports = {label: int(each.get("support", 0)) for label, each in per_class.items()}
    label = max(supports, key=lambda each: supports[each])
    share = supports[label] / max(sum(supports.values()), 1)
    return f"Always answering \u201c{label}\u201d would get {show('accuracy', share)} right."


def _warnings(files: RunFiles) -> list[str]:
    summary, result, done = files.summary, files.result, rounds_done(files)
    asked = files.config.federation.rounds
    found = []
    if summary is None:
        found.append(
            f"The run has not finished: {done} of {asked} rounds are done. It is still going, or it was "
            "killed; --resume continues it."
        )
    elif summary.rounds < done:
        found.append(
            f"The run went on to round {done} after its summary was written (round {summary.rounds}); "
            "the figures of the result are those of the summary."
        )
    elif summary.status == "interrupted":
        found.append(f"The run was interrupted after {done} of {asked} rounds; --resume continues it.")
    elif summary.status == "quorum-not-met":
        found.append(
            f"The run stopped after {done} of {asked} rounds for want of a quorum: "
            + (summary.stopped or "--resume continues it once enough sites can take part.")
        )
    elif summary.status == "diverged":
        kept = f"the adapter is that of round {summary.best.round}" if summary.best else "there is no adapter"
        found.append(f"The run failed after {done} of {asked} rounds, and {kept}: {summary.stopped}")
    elif summary.stopped:
        found.append(f"{summary.stopped[0].upper()}{summary.stopped[1:]} (early stopping).")
    if result and result.missing:
        found.append(
            f"Without {listed(sorted(result.missing))}, which did not give figures that count: the result is "
            "that of the other sites' rows."
        )
    if result and result.split != "test":
        found.append(
            f"No figures on test rows: these are on {result.split} rows"
            + (
                ", on which the best round was also picked, so they flatter the model a little."
                if files.picks_best
                else "."
            )
        )
    elif result and sum(result.rows.values()) < FEW_ROWS:
        rows = count(sum(result.rows.values()), "test row")
        why = ", as the wide intervals show" if result.intervals else ""
        found.append(f"There are only {rows}: small differences mean little{why}.")
    if summary and (claim := summary.client_privacy) and claim.noise_on_mean > USELESS:
        found.append(
            f"Noise for privacy moved the adapter {claim.noise_on_mean:.3g} times as far in a round as "
            "all sites together could (see Privacy)."
        )
    return found


def _tiles(files: RunFiles) -> list[Tile]:
    metric, result, summary = files.metric, files.result, files.summary
    tiles = []
    if result is not None:
        interval = show_interval(metric, interval_of(result, metric))
        tiles.append(
            Tile(show(metric, value_of(result, metric)), "Federated", _detail(metric, interval), strong=True)
        )
    if alone := best_local(files, metric):
        tiles.append(Tile(show(metric, alone[1]), "Best site alone", f"{alone[0]}, on all rows"))
    references = summary.references if summary else None
    central = references.centralised.test if references and references.centralised else None
    if value_of(central, metric) is not None:
        interval = show_interval(metric, interval_of(central, metric))
        tiles.append(Tile(show(metric, value_of(central, metric)), "Centralised", _detail(metric, interval)))
    best = f"round {files.best.round} is the best" if files.best and result and files.picks_best else ""
    tiles.append(Tile(f"{rounds_done(files)} of {files.config.federation.rounds}", "Rounds", best))
    if files.records and not files.config.hides_participation:
        total = sum(sum(r.bytes_down.values()) + sum(r.bytes_up.values()) for r in files.records)
        seconds = sum(sum(r.seconds.values()) for r in files.records)
        each = total / max(sum(len(r.cohort) for r in files.records), 1)
        tiles.append(
            Tile(figures.show_bytes(total), "Traffic", f"{figures.show_bytes(each)} per site, round")
        )
        tiles.append(
            Tile(
                figures.show_seconds(seconds),
                "Time in rounds",
                f"{figures.show_seconds(seconds / len(files.records))} a round",
            )
        )
    return tiles


def _detail(metric: str, interval: str) -> str:
    # Word joiners: a narrow tile may break before the interval, not inside.
    unbroken = interval.replace(figures.DASH, f"\u2060{figures.DASH}\u2060")
    return metric_in_sentence(metric) + (f" ({unbroken})" if interval else "")
