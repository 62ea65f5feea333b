"""The model card of an exported adapter: README.md beside the arrays, with front matter for model hubs."""

from __future__ import annotations

import pprint
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from quorate.server.report.figures import DASH, count, metric_name, show, show_interval
from quorate.server.report.run_files import interval_of, value_of
from quorate.server.report.sections.guarantee import claim_in_words
from quorate.server.rounds.evaluation import scalars
from quorate.server.tracking.records import Evaluation, Summary
from quorate.shared.config.run_config import RunConfig
from quorate.shared.model.sources import is_hub_id

if TYPE_CHECKING:
    from jinja2 import Template

_HUB_TASKS = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "image_classification": "image-classification",
}
"""Task -> what model hubs call it."""
_HUB_METRICS = {"macro_f1": "f1", "micro_f1": "f1"}
"""Metric -> the type under which hubs list it, where its name is not that already."""
_ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "tanh": "Tanh"}
"""Activation of a head -> its class in torch.nn."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")


def model_card(run: RunConfig, summary: Summary) -> str:
    """Return the README.md of the adapter that `summary.best` describes.

    It names counts, never rows, and promises nothing that was not done: no licence, no privacy guarantee.
    """
    best = summary.best
    test = best.test if best and best.test and best.test.pooled else None
    measured = test or (best.validation if best and best.validation and best.validation.pooled else None)
    return _template().render(
        front_matter=_front_matter(run, summary, measured),
        run=run,
        summary=summary,
        best=best,
        measured=measured,
        figures=_figures(measured) if measured else [],
        sites=_sites(summary, measured, summary.metric),
        metric=metric_name(summary.metric),
        rows=sum(site.rows.get("train", 0) for site in summary.sites.values()),
        load=_loading(run),
        claim=claim_in_words(summary),
        count=count,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("quorate.server", "templates"),
        autoescape=False,  # this is Markdown; what comes from outside goes through `escape`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape
    return environment.get_template("card.md.j2")


def escape(text: str) -> str:
    """Return `text` so that Markdown shows it as it is, on one line: names and labels come from outside."""
    return _MARKDOWN.sub(r"\\\1", _CONTROL.sub(" ", text))


def _front_matter(run: RunConfig, summary: Summary, measured: Evaluation | None) -> str:
    """Return the YAML that model hubs read. Without a licence, which is the owners' to give."""
    from huggingface_hub import EvalResult, ModelCardData

    task = _HUB_TASKS.get(run.task.name)
    split = measured.split if measured else None
    results = [
        EvalResult(
            task_type=task or run.task.name.replace("_", "-"),
            dataset_type=run.data,
            dataset_name=run.data,
            dataset_split=split,
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_name=f"{metric_name(metric)}, all sites' rows",
            metric_value=round(value, 4),
        )
        for metric, value in _finite(measured).items()
    ]
    data = ModelCardData(
        base_model=run.model.model_name_or_path,
        library_name="peft",
        pipeline_tag=task,
        tags=["lora", "federated-learning", "quorate", run.aggregation.name],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=summary.name,
        eval_results=results or None,
    )
    return str(data.to_yaml(line_break="\n")).strip()


def _finite(measured: Evaluation | None) -> dict[str, float]:
    if measured is None:
        return {}
    return {m: v for m in scalars(measured.pooled) if (v := value_of(measured, m)) is not None}


def _figures(measured: Evaluation) -> list[tuple[str, str, str, str]]:
    """Return (metric, value, interval, mean over sites) for each figure."""
    return [
        (
            metric_name(metric),
            show(metric, value),
            show_interval(metric, interval_of(measured, metric)) or DASH,
            show(metric, measured.mean.get(metric)),
        )
        for metric, value in _finite(measured).items()
    ]


def _sites(summary: Summary, measured: Evaluation | None, metric: str) -> list[tuple[str, ...]]:
    """Return (site, training rows, rows measured, figure, interval, local only) for each site."""
    rows: list[tuple[str, ...]] = []
    for site, description in sorted(summary.sites.items()):
        worth = summary.worth.get(site)
        rows.append(
            (
                escape(site),
                f"{description.rows.get('train', 0):,}",
                f"{measured.rows.get(site, 0):,}" if measured else "0",
                show(metric, value_of(measured, metric, site)),
                show_interval(metric, interval_of(measured, metric, site)) or DASH,
                show(metric, worth.local_only if worth else None),
            )
        )
    return rows


def _loading(run: RunConfig) -> Mapping[str, Any]:
    """Return what the few lines that load the adapter need.

    A base model that is a folder or package resource at the coordinator gets a placeholder: its reader has
    it elsewhere.
    """
    model = run.model.model_name_or_path
    on_hub = is_hub_id(model)
    revision = run.model.revision if on_hub else None
    arguments: dict[str, Any] = {"revision": revision} if revision else {}
    if run.task.processor_class == "AutoImageProcessor":
        arguments["ignore_mismatched_sizes"] = True  # the checkpoint's own head gives way
    # Python literals: quoted by repr, so that no label can end the line or the code block.
    keywords = "".join(
        f",\n    {name}={pprint.pformat(value, width=90, sort_dicts=False, compact=True)}"
        for name, value in {**arguments, **run.task.model_kwargs()}.items()
    )
    return {
        "base": repr(model if on_hub else "FOLDER_OF_THE_BASE_MODEL"),
        "on_hub": on_hub,
        "at": f", revision={revision!r}" if revision else "",
        "auto_class": run.task.auto_class,
        "processor": run.task.processor_class,
        "activation": _ACTIVATIONS[run.adapter.head.activation] if run.adapter.head else "",
        "keywords": keywords.replace("`", "\\x60"),
    }
