"""The model card: front matter that hubs read, figures of the summary, and nothing that breaks out."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
import yaml
from report_data import LABELS, MIX, Shape, config, make_summary, record, round_metrics

from quorate.server.results.model_card import escape, model_card
from quorate.server.tracking.records import Summary
from quorate.shared.config.run_config import RunConfig

SHAPE = Shape(rounds=2, planned=2)


def summary_of(run: RunConfig, shape: Shape) -> Summary:
    rounds = range(1, shape.rounds + 1)
    return make_summary(
        run, shape, [record(shape, r) for r in rounds], [round_metrics(run, shape, r) for r in rounds]
    )


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture(scope="module")
def made() -> tuple[RunConfig, Summary, str]:
    run = config(SHAPE)
    summary = summary_of(run, SHAPE)
    return run, summary, model_card(run, summary)


def test_front_matter_is_read_by_the_hubs_client(made: tuple[RunConfig, Summary, str]) -> None:
    from huggingface_hub import ModelCard

    run, summary, card = made
    data = ModelCard(card).data
    assert (data.base_model, data.library_name) == (run.model.model_name_or_path, "peft")
    assert data.pipeline_tag == "text-classification"
    assert {"lora", "federated-learning", "fedavg"} <= set(data.tags)
    assert data.license is None
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    pooled = summary.best.test.pooled
    assert values["Accuracy, all sites' rows"] == pytest.approx(pooled["accuracy"], abs=1e-4)
    assert values["Macro-F1, all sites' rows"] == pytest.approx(pooled["macro_f1"], abs=1e-4)
    assert all(result.dataset_name == "questions" for result in data.eval_results)


def test_it_says_what_a_reader_must_know(made: tuple[RunConfig, Summary, str]) -> None:
    _, summary, card = made
    assert "Differential privacy was not used" in card and "No licence is given" in card
    assert "4,210\u00a0training rows" in card and "3f" * 32 in card
    for site in MIX:
        row = next(line for line in card.splitlines() if line.startswith(f"| {site} |"))
        federated = summary.best.test.sites[site]["macro_f1"]
        assert f"{100 * federated:.1f}\u00a0%" in row and row.count("|") == 7


def test_the_loading_code_is_python_with_the_runs_labels() -> None:
    labels = ("plain", "it's", 'a "quote"', "back`tick ```", "back\\slash`", "line\nbreak", "ünï")
    shape = replace(SHAPE, labels=labels, sites=("a", "b"), local={"a": 0.7, "b": 0.7})
    run = config(shape)
    card = model_card(run, summary_of(run, shape))
    tree = ast.parse(code_of(card))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [c for c in calls if any(k.arg == "num_labels" for k in c.keywords)]
    keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert keywords == run.task.model_kwargs()
    assert len(re.findall(r"^```", card, re.MULTILINE)) == 2


def test_a_hub_id_is_loaded_by_name_and_revision(made: tuple[RunConfig, Summary, str]) -> None:
    run, summary, card = made
    assert "FOLDER_OF_THE_BASE_MODEL" in code_of(card)
    model = run.model.model_copy(update={"model_name_or_path": "org/some-base", "revision": "0123abc"})
    code = code_of(model_card(run.model_copy(update={"model": model}), summary))
    assert "base = 'org/some-base'\n" in code and "revision='0123abc'" in code
    assert code.count("revision='0123abc'") == 2, "the tokenizer must be of the same revision"


def test_names_from_outside_stay_text() -> None:
    nasty = "a | b\n# <script>x</script> [l](http://x) `c`"
    shape = replace(SHAPE, sites=(nasty, "b"), local={nasty: 0.7, "b": 0.7})
    run = config(shape)
    card = model_card(run, summary_of(run, shape))
    assert not re.search(r"(?<!\\)<", card.split("## How good it is")[1])
    (row,) = [line for line in card.splitlines() if "script" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 7
    assert "`" not in re.sub(r"\\`", "", escape(nasty))


def test_runs_that_lack_something_have_a_card() -> None:
    for shape, words in (
        (replace(SHAPE, splits=(), references=()), "It was not measured"),
        (replace(SHAPE, splits=("validation",), references=()), "not test rows"),
        (replace(SHAPE, status="interrupted", planned=9), "**The run did not finish** (interrupted"),
    ):
        run = config(shape)
        card = model_card(run, summary_of(run, shape))
        front = yaml.safe_load(card.split("---")[1])
        assert words in card, shape
        assert ("model-index" in front) == ("It was not measured" not in card)
        assert all(label in code_of(card) for label in LABELS)
